"""What holds for every sampler: paths agree, chains do not depend on the batch, exact samplers have the right law."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from laws import cells_of_box, fits_cells, fits_gaussian
from sampler_cases import CASES
from torch import nn

import fastebm
from fastebm import (
    AnnealedLangevin,
    ChainPool,
    ClassifierEnergy,
    GaussianEnergy,
    MLPEnergy,
    NonFiniteError,
    PredictorCorrector,
    SumEnergy,
    sample,
)
from fastebm.backends import tiles
from fastebm.samplers.base import Sampler

pytestmark = pytest.mark.usefixtures("seeded")

ALL = {name: getattr(fastebm, name) for name in fastebm.samplers.__all__}
every_sampler = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
per_chain = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if not case.make().coupled],
    ids=[name for name, case in CASES.items() if not case.make().coupled],
)  # fmt: skip
exact = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.make().exact],
    ids=[name for name, case in CASES.items() if case.make().exact],
)  # fmt: skip


def has_warmup(sampler):
    """Whether it adapts a step_size of its own, not that of an inner sampler."""
    return "step_size" in sampler.scheduled and sampler.adaptation(10) is not None


N = 20_000
ALPHA = 1e-7  # of each test of a law
DIM, CHAINS = 5, 130


class Conditioned(nn.Module):
    """A Gaussian around its condition, (n, 1)."""

    def __init__(self):
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(1.5))

    def forward(self, x, condition):
        return self.precision * (x - condition).square().sum(dim=1) / 2


def classifier():
    return ClassifierEnergy(nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Linear(8, 3)))


ENERGIES = {
    "mlp": lambda: (SumEnergy([MLPEnergy(DIM, (16, 8)), GaussianEnergy()]), {}),
    "labels": lambda: (SumEnergy([classifier(), GaussianEnergy()]), {"labels": torch.arange(CHAINS) % 3}),
    "autograd": lambda: (GaussianEnergy(0.3, 1.2), {}),
    "condition": lambda: (Conditioned(), {"condition": torch.linspace(-1, 1, CHAINS)[:, None]}),
}
every_energy = pytest.mark.parametrize("name", ENERGIES)


def test_every_sampler_is_here():
    # they need an energy with a noise level: test_annealed.py and test_predictor_corrector.py
    apart = {AnnealedLangevin, PredictorCorrector}
    assert {type(case.make()) for case in CASES.values()} | apart == set(ALL.values())
    for sampler in ALL.values():
        assert issubclass(sampler, Sampler)
        assert dataclasses.is_dataclass(sampler)
        assert sampler.__doc__


@every_energy
@every_sampler
def test_paths_agree(case, name):
    energy, given = ENERGIES[name]()
    options = {"n_chains": CHAINS, "steps": 8, "thin": 4, "seed": 6, **given}
    truth = sample(energy.double(), case.make(), DIM, backend="reference", **double(options))
    energy.float()
    for backend in ("auto", "torch", "reference"):
        found = sample(energy, case.make(), DIM, backend=backend, **options)
        near = (found.x - truth.x).abs().amax(dim=1) < 1e-3
        assert int((~near).sum()) <= case.by_rounding * CHAINS
        torch.testing.assert_close(found.energies[near].double(), truth.energies[near], rtol=1e-3, atol=1e-3)
        assert torch.equal(found.trajectory[:, -1], found.x)
        assert found.trajectory.shape == (CHAINS, 2, DIM)
        assert found.info.path == ("tiles" if backend != "reference" and name in ("mlp", "labels") else "autograd")
        assert {name for name in case.make().reports if getattr(found.info, name) is None} == set()


def double(options):
    return {k: v.double() if k == "condition" else v for k, v in options.items()}


@every_energy
@per_chain
def test_other_chains_change_no_bits(case, name):
    energy, given = ENERGIES[name]()
    whole = sample(energy, case.make(), DIM, n_chains=CHAINS, steps=6, seed=7, **given)
    for rows in (slice(0, 1), slice(3, 70), slice(64, CHAINS)):
        part = sample(
            energy, case.make(), DIM, n_chains=rows.stop - rows.start, steps=6, seed=7, first_chain=rows.start,
            **{k: v[rows] for k, v in given.items()},
        )  # fmt: skip
        assert torch.equal(part.x, whole.x[rows])
        assert torch.equal(part.energies, whole.energies[rows])


@per_chain
def test_tiles_change_no_bits(case, monkeypatch):
    """Few chains are one tile, and many are tiles on several threads."""
    energy, _ = ENERGIES["mlp"]()
    options = {"n_chains": CHAINS, "steps": 6, "thin": 2, "seed": 7}
    whole = sample(energy, case.make(), DIM, **options)
    parts = [slice(0, 64), slice(64, 128), slice(128, CHAINS)]
    monkeypatch.setattr(tiles, "tiles", lambda *_: parts)
    split = sample(energy, case.make(), DIM, **options)
    for name in ("x", "energies", "trajectory"):
        assert torch.equal(getattr(split, name), getattr(whole, name))
    assert torch.equal(split.info.grad_norm, whole.info.grad_norm)


def test_few_chains_are_one_tile_and_many_use_all_threads():
    assert len(tiles.tiles(128, 2, held=140)) == 1
    assert len(tiles.tiles(128, 2)) == 2
    assert len(tiles.tiles(1024, 2, held=140)) == 2
    assert len(tiles.tiles(100_000, 8, held=140)) >= 8
    ladder = tiles.tiles(128, 2, rows_per_chain=8, held=140)  # 1,024 rows
    assert len(ladder) == 2
    assert sum(rows.stop - rows.start for rows in ladder) == 128


@every_energy
@every_sampler
def test_going_on_is_as_if_it_had_not_stopped(case, name):
    energy, given = ENERGIES[name]()
    frozen = torch.rand(CHAINS, DIM) < 0.2
    options = {"n_chains": CHAINS, "seed": 8, "frozen": frozen, **given}
    whole = sample(energy, case.make(), DIM, steps=9, **options)
    then = sample(energy, case.make(), init=sample(energy, case.make(), DIM, steps=4, **options), steps=5)
    assert torch.equal(then.x, whole.x)
    assert torch.equal(then.energies, whole.energies)
    shown = sample(energy, case.make(), DIM, steps=9, progress=True, **options)
    assert torch.equal(shown.x, whole.x)
    for name in case.make().reports:
        torch.testing.assert_close(getattr(shown.info, name), getattr(whole.info, name), equal_nan=True)


@every_energy
@every_sampler
def test_values_of_a_warmup_reproduce_the_rest(case, name):
    energy, given = ENERGIES[name]()
    options = {"n_chains": CHAINS, "seed": 8, **given}
    whole = sample(energy, case.make(), DIM, warmup=40, steps=9, **options)
    first = sample(energy, case.make(), DIM, warmup=40, steps=4, **options)
    then = sample(energy, init=first, steps=5)
    assert torch.equal(then.x, whole.x)
    assert bool((whole.info.first_bad_step < 0).all())


@every_sampler
def test_bounds_and_frozen_coordinates(case):
    energy, init = GaussianEnergy(), 0.5 * torch.rand(CHAINS, DIM)
    init[:, 0] = 3.0  # outside of the bounds, which are not for what is frozen
    frozen = torch.tensor([True, False, False, False, True])
    result = sample(energy, case.make(clamp=(-0.1, 0.5)), init=init, frozen=frozen, steps=20, thin=1, seed=3)
    assert torch.equal(result.x[:, frozen], init[:, frozen])
    free = result.trajectory[:, :, ~frozen]
    assert float(free.min()) >= -0.1000001
    assert float(free.max()) <= 0.5
    assert bool((result.x[:, ~frozen] != init[:, ~frozen]).any())


class NaNBeyond(nn.Module):
    """A Gaussian whose energy and gradient are NaN beyond 1.2."""

    def forward(self, x):
        return x.square().sum(dim=1) / 2 * torch.where((x > 1.2).any(dim=1), math.nan, 1.0)


@every_sampler
def test_chains_that_are_not_finite(case):
    init = torch.zeros(300, 2)
    init[::2] = 1.1  # with short steps these chains are lost, with long trajectories some of the others survive
    init += 0.05 * torch.randn(300, 2) if case.make().coupled else 0.0  # particles in one place move alike
    options = {"init": init, "steps": 3, "seed": 4}
    with pytest.raises(NonFiniteError, match=r"of 300 chains are not finite"):
        sample(NaNBeyond(), case.make(), **options)
    result = sample(NaNBeyond(), case.make(), on_nonfinite="ignore", **options)
    lost = (result.info.first_bad_step >= 0) | ~result.energies.isfinite()
    assert 5 < int(lost.sum()) < 300
    assert bool(result.x.isfinite().all())
    again = sample(NaNBeyond(), case.make(), on_nonfinite="reinit", **options)
    assert bool(again.x.isfinite().all())
    assert bool(again.energies.isfinite().all())
    assert torch.equal(again.x[~lost], result.x[~lost])
    assert not torch.equal(again.x[lost], result.x[lost])


@per_chain
def test_telemetry_ends_where_a_chain_stops(case):
    init = torch.zeros(300, 2)
    init[::2] = 1.1
    options = {"init": init, "seed": 4, "on_nonfinite": "ignore"}
    whole, seen = sample(NaNBeyond(), case.make(), steps=3, **options).info, 0
    for k in (0, 1):
        cut = sample(NaNBeyond(), case.make(), steps=k + 1, **options).info
        stops = whole.first_bad_step == k
        seen += int(stops.sum())
        torch.testing.assert_close(whole.grad_norm[stops], cut.grad_norm[stops], rtol=0, atol=0, equal_nan=True)
        if whole.acceptance is not None:  # that of the step in which it stops, and later ones, counts as 0
            torch.testing.assert_close(whole.acceptance[stops] * 3, cut.acceptance[stops] * (k + 1))
    assert seen > 5


class NaNGradient(nn.Module):
    """A Gaussian whose gradient is NaN everywhere: backwards, 0 times NaN is NaN."""

    def forward(self, x):
        energy = x.square().sum(dim=1) / 2
        return torch.where(energy < math.inf, energy, energy * math.nan)


@every_sampler
def test_a_gradient_that_is_nan_at_the_start(case):
    with pytest.raises(NonFiniteError, match=r"20 of 20 chains are not finite \(first at step 0 of 3;"):
        sample(NaNGradient(), case.make(), init=torch.randn(20, 2), steps=3, seed=4)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if has_warmup(case.make())])
def test_a_step_size_without_dims_is_a_number_to_a_warmup(name):
    options = {"input_size": 3, "n_chains": 4, "warmup": 20, "steps": 1, "seed": 1}
    sampler = CASES[name].make()
    found = sample(GaussianEnergy(), sampler, **options).sampler.step_size
    sampler = dataclasses.replace(sampler, step_size=torch.tensor(sampler.step_size, dtype=torch.float64))
    assert sample(GaussianEnergy(), sampler, **options).sampler.step_size == found != sampler.step_size


@exact
def test_an_energy_of_minus_infinity_at_the_start(case):
    def energy(x):
        return x.square().sum(dim=1) / 2 + torch.where((x == 0).all(dim=1), -math.inf, 0.0)

    result = sample(energy, case.make(), init=torch.zeros(20, 2), steps=3, seed=4, on_nonfinite="ignore")
    assert result.info.first_bad_step.tolist() == [0] * 20


@every_sampler
def test_pools_take_it(case):
    energy = SumEnergy([MLPEnergy(DIM, (16, 8)), GaussianEnergy()])
    pool = ChainPool(200, DIM, seed=1, clamp=(-2.0, 2.0))
    x, _ = pool.sample(energy, 50, case.make(), 6)
    assert float(x.abs().max()) <= 2
    before = pool.states.clone()
    pool.advance(energy, case.make(), 5)
    assert not torch.equal(pool.states, before)
    torch.testing.assert_close(pool.energies, energy(pool.states).detach(), rtol=1e-4, atol=1e-4)


@every_sampler
def test_the_caller_keeps_everything(case):
    energy = nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    weights = {name: value.clone() for name, value in energy.state_dict().items()}
    init, state = torch.randn(20, DIM), torch.get_rng_state()
    kept = init.clone()
    sample(energy, case.make(), init=init, steps=3, warmup=25, seed=1)
    assert energy.training
    assert all(torch.equal(value, weights[name]) for name, value in energy.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in energy.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(init, kept)


@every_sampler
def test_the_default_device_does_not_matter(case):
    init, options = torch.randn(4, 3), {"warmup": 80, "steps": 2, "seed": 1}  # a warm-up that adapts a scale too
    expected = sample(GaussianEnergy(), case.make(), init=init, **options)
    energy, sampler = GaussianEnergy(), case.make()
    with torch.device("meta"):
        result = sample(energy, sampler, init=init, **options)
    assert torch.equal(result.x, expected.x)


@every_sampler
def test_energies_without_gradient(case):
    with pytest.raises(ValueError, match="the energy does not depend on x through differentiable operations"):
        sample(lambda x: x.detach().square().sum(dim=1), case.make(), DIM, steps=2)


@every_sampler
def test_no_chains_and_no_steps(case):
    energy = MLPEnergy(DIM, (8,))
    assert sample(energy, case.make(), n_chains=0, steps=3).x.shape == (0, DIM)
    init = torch.randn(4, DIM)
    still = sample(energy, case.make(), init=init, steps=0)
    assert torch.equal(still.x, init)
    for name in case.make().reports:
        assert len(getattr(still.info, name)) == 4


# -- laws of exact samplers -----------------------------------------------------------------------------------------


@exact
def test_a_gaussian_stays_what_it_is(case):
    std = torch.tensor([1.0, 0.5, 2.0])
    result = sample(GaussianEnergy(0.0, std), case.make(), init=torch.randn(N, 3) * std, steps=8, seed=5)
    assert fits_gaussian(result.x, std, ALPHA)


@exact
def test_an_mlp_in_a_box_by_quadrature(case):
    """From a uniform start, so it also shows that the chains mix."""
    energy, expected = cells_of_box(MLPEnergy(2, (16, 16), "tanh"))
    n = 6000
    x = sample(energy, case.make(clamp=(-2.0, 2.0)), n_chains=n, steps=case.settled, seed=1).x
    assert fits_cells(x, expected, ALPHA)
    assert not fits_cells(torch.rand(n, 2) * 4 - 2, expected, ALPHA)  # the test has power
