"""Energies that write to their input, and energies that depend on the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from user_modules import DIM, LABELS, Images, N, Usual, assert_same, mlp, pull, sampled

from fastebm import (
    ChainPool,
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    SumEnergy,
    langevin_sample,
)
from fastebm.energies import energy as energy_of

pytestmark = pytest.mark.usefixtures("seeded")


# -- energies that write in place ----------------------------------------------------------------------------------


class Shifts(nn.Module):
    def forward(self, x):
        x -= 0.5
        return x.square().sum(1) / 2


class ByData(nn.Module):
    def forward(self, x):
        x.data.mul_(0.5)
        return x.square().sum(1)


class Clamps(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            x.clamp_(-0.5, 0.5)
        return x.square().sum(1)


class Fills(nn.Module):
    def forward(self, x):
        value = x.sum(1).square()
        x[:, 0] = 7.0
        return value


class Normalises(nn.Module):
    def forward(self, x):
        return x.sub_(0.1).div_(0.7).flatten(1).abs().sum(1)


class WritesToLabels(nn.Module):
    def forward(self, x, y):
        value = pull(x, y)
        y.zero_()
        return value


WRITERS = {
    "shifts": Shifts,
    "by data": ByData,
    "clamps": Clamps,
    "fills": Fills,
    "normalises": Normalises,
    "relu in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, 1)),
    "a sum": lambda: SumEnergy([Shifts(), GaussianEnergy(), Fills()]),
    "a classifier": lambda: ClassifierEnergy(nn.Sequential(nn.Hardtanh(-0.3, 0.3, inplace=True), mlp(out=3))),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_energies_that_write_in_place_write_to_copies(make, backend, dtype):
    model, start = make(), torch.linspace(-1, 1, N * DIM, dtype=dtype).reshape(N, DIM)
    kept = start.clone()
    for steps in (0, 1):
        samples, info = langevin_sample(
            model, init=start, steps=steps, step_size=1e-9, noise_scale=0.0, backend=backend, return_info=True
        )
        assert torch.equal(start, kept)
        torch.testing.assert_close(samples, start, rtol=0, atol=1e-7)
        torch.testing.assert_close(info.energies, energy_of(model.to(dtype), start.clone()).detach())
        model.float()
    expected, _ = sampled(model, "reference")
    torch.testing.assert_close(sampled(model, "auto")[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_pools_are_safe_from_them(make):
    pool = ChainPool(8, DIM, seed=0, reinit_prob=0.0)
    kept = pool.states.clone()
    pool.sample(make(), 4, Langevin(1e-9, 0.0), 0)
    pool.advance(make(), Langevin(1e-9, 0.0), 0)
    torch.testing.assert_close(pool.states, kept, rtol=0, atol=0)


def test_labels_are_safe_too():
    labels, pool = LABELS.clone(), ChainPool(N, DIM, seed=0, labels=LABELS)
    for backend in ("auto", "reference"):
        sampled(WritesToLabels(), backend, labels=labels)
    pool.advance(WritesToLabels(), Langevin(0.1, 0.0), 2)
    assert torch.equal(labels, LABELS)
    assert torch.equal(pool.labels, LABELS)


# -- what depends on the batch -------------------------------------------------------------------------------------


class Squeezes(nn.Module):
    """JEM's idiom: a batch of one is squeezed to a number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Unflatten(1, (1, DIM)), nn.Conv1d(1, 2, DIM))
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        return self.head(F.silu(self.conv(x).flatten(1))).squeeze()


class Batchwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM, track_running_stats=False)

    def forward(self, x):
        return self.norm(x).pow(4).sum(1)


class Correlated(nn.Module):
    """The unbiased variance of one state is NaN."""

    def forward(self, x):
        return ((x - x.mean(0)) / x.std(0)).square().sum(1) + x.square().sum(1)


class Held(nn.Module):
    """A measurement for every chain inside the energy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("measured", torch.randn(N, DIM))

    def forward(self, x):
        return (x - self.measured).square().sum(1)


class HeldAsColumn(Held):
    def forward(self, x):
        return super().forward(x)[:, None]


class Interacting(nn.Module):
    """Chains repel each other (Stein, or a repulsive ensemble)."""

    def forward(self, x):
        others = torch.cdist(x, x).square()
        return x.square().sum(1) + torch.exp(-others).sum(1)


class Paired(nn.Module):
    def forward(self, x):
        return (x - x.roll(1, 0)).square().sum(1)


BATCHED = {
    "squeezes": Squeezes,
    "batch statistics": Batchwise,
    "correlated": Correlated,
    "held": Held,
    "held as a column": HeldAsColumn,
    "interacting": Interacting,
    "paired": Paired,
}


@pytest.mark.parametrize("make", BATCHED.values(), ids=BATCHED)
def test_energies_that_know_their_batch_are_given_the_whole(make):
    assert_same(make(), path="autograd")
    pool = ChainPool(N, DIM, seed=0)
    _, energies = pool.sample(make(), N, Langevin(0.01, 1.0), 2)
    assert energies.isfinite().all()


def test_a_batch_of_one_may_be_squeezed_to_a_number():
    for model in (Squeezes(), Images(), Usual()):
        shape = (12,) if isinstance(model, Images) else (DIM,)
        one = torch.randn(1, *shape)
        for backend in ("auto", "reference"):
            samples, info = langevin_sample(model, init=one, steps=2, backend=backend, return_info=True)
            assert samples.shape == one.shape
            assert info.energies.shape == (1,)
        assert langevin_sample(model, init=one[:0], steps=2).shape == (0, *shape)


def test_energies_of_restarted_chains_are_those_of_the_whole_batch():
    class Explodes(Held):
        def forward(self, x):
            return super().forward(x) + torch.where(x[:, 0] > 0.5, torch.inf, 0.0)

    start = torch.zeros(N, DIM)
    start[3] = 0.9
    model = Explodes()
    samples, info = langevin_sample(
        model, init=start, steps=1, step_size=0.01, noise_scale=0.0, clamp=(-0.1, 0.1), on_nonfinite="reinit",
        return_info=True, seed=1,
    )  # fmt: skip
    torch.testing.assert_close(info.energies, model(samples))
