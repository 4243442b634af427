"""MALA: exact at any step, the same on every path, and safe with bounds, frozen coordinates and bad energies."""

from __future__ import annotations

import math

import pytest
import torch
from laws import fits_gaussian
from scipy import stats
from small_energies import Beyond
from torch import nn

from fastebm import MALA, ChainPool, GaussianEnergy, MLPEnergy, NonFiniteError, SumEnergy, sample
from fastebm.rng import Noise
from fastebm.samplers import collapsed
from fastebm.targets.base import View
from fastebm.targets.collapsed import Collapsed

pytestmark = pytest.mark.usefixtures("seeded")

N = 40_000
ALPHA = 1e-6  # of each test of a law


# -- laws ----------------------------------------------------------------------------------------------------------


def gaussian(step_size, steps=12):
    """From the law itself, which each step must leave as it is."""
    std = torch.tensor([1.0, 0.5, 2.0])
    init = torch.randn(N, 3) * std
    result = sample(GaussianEnergy(0.0, std), MALA(step_size), init=init, steps=steps, seed=5)
    return result, fits_gaussian(result.x, std, ALPHA)


@pytest.mark.parametrize(("step_size", "least", "most"), [(0.1, 0.95, 1.0), (0.6, 0.4, 0.8), (1.5, 0.02, 0.35)])
def test_a_gaussian_stays_what_it_is(step_size, least, most):
    result, fits = gaussian(step_size)
    assert fits
    assert least < float(result.info.acceptance.mean()) < most


MUTANTS = {
    "accepts always": lambda patch: patch.setattr(Noise, "uniform", lambda self, stream, t: torch.full((N,), 1e-38)),
    "more noise than it counts": lambda patch: patch.setattr(
        Noise, "normal", lambda self, stream, t, draw=Noise.normal: draw(self, stream, t) * 1.3
    ),
    "another energy in the test": lambda patch: patch.setattr(
        View, "value_and_gradient", lambda self, x, of=View.value_and_gradient: (of(self, x)[0] / 2, of(self, x)[1])
    ),
    "half of the gradient in the proposal": lambda patch: patch.setattr(
        MALA, "step", lambda self, target, state, noise, t, step=MALA.step: step(
            self, target, state._replace(gradient=state.gradient / 2), noise, t
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_rejects_mutants(mutant, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    assert not gaussian(0.6)[1]


def test_bounds_cut_the_law_off():
    result = sample(GaussianEnergy(), MALA(0.5, clamp=(0.3, math.inf)), init=torch.full((N, 1), 0.5), steps=300, seed=2)
    assert float(result.x.min()) >= 0.3
    assert stats.kstest(result.x[:, 0].numpy(), stats.truncnorm(0.3, math.inf).cdf).pvalue > ALPHA


class Correlated(nn.Module):
    """A Gaussian with covariance [[1, r], [r, 1]]."""

    r = 0.8

    def forward(self, x):
        a, b = x[:, 0], x[:, 1]
        return (a * a + b * b - 2 * self.r * a * b) / (2 * (1 - self.r**2))


def test_frozen_coordinates_give_the_conditional_law():
    init = torch.randn(N, 2)
    kept = init[:, 1].clone()
    # outside of the bounds, which are not for what is frozen
    init[:, 1], kept = kept + 10, kept + 10
    frozen = torch.tensor([False, True])
    result = sample(Correlated(), MALA(0.3), init=init, frozen=frozen, steps=200, seed=3)
    assert torch.equal(result.x[:, 1], kept)
    z = (result.x[:, 0] - 0.8 * kept) / 0.6
    assert stats.kstest(z.numpy(), "norm").pvalue > ALPHA
    clamped = sample(Correlated(), MALA(0.3, clamp=(-9.0, 9.0)), init=init.clamp(max=torch.tensor([9.0, 99.0])),
                     frozen=frozen, steps=5, seed=3)  # fmt: skip
    assert torch.equal(clamped.x[:, 1], kept)
    assert bool((clamped.info.acceptance > 0).any())


def test_settings_by_step_and_by_chain():
    energy = MLPEnergy(5, (16, 8))
    schedule, each = torch.linspace(0.6, 0.1, 8), torch.linspace(0.1, 0.9, 6)[:, None]
    options = {"steps": 8, "seed": 9}
    by_chain = sample(energy, MALA(each), n_chains=6, **options)
    for i in range(6):
        one = sample(energy, MALA(float(each[i])), n_chains=1, first_chain=i, **options)
        torch.testing.assert_close(one.x[0], by_chain.x[i])
    by_step = sample(energy, MALA(schedule), n_chains=6, **options)
    then = sample(energy, MALA(schedule[:3]), n_chains=6, steps=3, seed=9)
    then = sample(energy, MALA(schedule[3:]), init=then, steps=5)
    assert torch.equal(then.x, by_step.x)


def test_pools_take_it():
    pool = ChainPool(2000, 3, seed=1, reinit_prob=0.0, init="gaussian")
    energy = GaussianEnergy(0.0, torch.tensor([1.0, 0.5, 2.0]))
    for _ in range(30):
        pool.sample(energy, 1000, MALA(0.5), 10)
    pool.advance(energy, MALA(0.5), 20)
    assert fits_gaussian(pool.states, torch.tensor([1.0, 0.5, 2.0]), ALPHA)
    torch.testing.assert_close(pool.energies, energy(pool.states))
    bounded = ChainPool(100, 3, seed=1, clamp=(-0.5, 0.5))
    x, _ = bounded.sample(energy, 50, MALA(0.5), 20)
    assert float(x.abs().max()) <= 0.5
    with pytest.raises(ValueError, match="the pool clamps to"):
        bounded.sample(energy, 50, MALA(0.5, clamp=(-1.0, 1.0)), 1)
    with pytest.raises(TypeError, match="are its parentheses missing"):
        bounded.sample(energy, 50, MALA, 1)


# -- energies that are not numbers ---------------------------------------------------------------------------------


def test_infinite_energy_is_never_entered():
    init = torch.zeros(N, 1)
    result = sample(Beyond(math.inf), MALA(0.7), init=init, steps=200, seed=4)
    assert float(result.x.max()) <= 1.0
    assert stats.kstest(result.x[:, 0].numpy(), stats.truncnorm(-math.inf, 1.0).cdf).pvalue > ALPHA


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_other_energies_stop_the_chain(number):
    options = {"init": torch.zeros(500, 2), "steps": 30, "seed": 4}
    with pytest.raises(NonFiniteError, match=r"of 500 chains are not finite.*step_size = 0.7.*Try a smaller step_size"):
        sample(Beyond(number), MALA(0.7), **options)
    result = sample(Beyond(number), MALA(0.7), on_nonfinite="ignore", **options)
    stopped = result.info.first_bad_step >= 0
    assert 50 < int(stopped.sum())
    assert float(result.x.max()) <= 1.0
    assert bool(result.energies.isfinite().all())
    again = sample(Beyond(number), MALA(0.7), on_nonfinite="reinit", **options)
    assert bool(again.x.isfinite().all())
    assert not torch.equal(again.x[stopped], result.x[stopped])


def test_a_proposal_that_overflows_stops_the_chain():
    class Steep(nn.Module):
        def forward(self, x):
            return x.pow(20).sum(dim=1)

    options = {"steps": 3, "seed": 1, "on_nonfinite": "ignore"}
    result = sample(Steep(), MALA(1.0), init=torch.full((3, 1), 200.0), **options)
    assert result.info.first_bad_step.tolist() == [0, 0, 0]
    assert torch.equal(result.x, torch.full((3, 1), 200.0))
    far = sample(Steep(), MALA(1.0), init=torch.full((3, 1), 50.0), **options)  # its energy overflows: rejected
    assert far.info.first_bad_step.tolist() == [-1, -1, -1]
    assert far.info.acceptance.tolist() == [0, 0, 0]


def test_a_square_that_overflows_rejects():
    """|s|^2 is infinite in float32, and everything else finite."""
    energy = lambda x: x.pow(4).sum(dim=1)  # noqa: E731
    result = sample(energy, MALA(1.0), init=torch.full((20, 1), 300.0), steps=2, seed=0)
    assert result.info.acceptance.tolist() == [0.0] * 20
    assert torch.equal(result.x, torch.full((20, 1), 300.0))


def test_products_in_bf16_do_not_reach_the_test(monkeypatch):
    monkeypatch.setattr("fastebm.backends.choose.multiplies_bf16", lambda: True)
    energy, before = MLPEnergy(5, (64, 64)), torch.get_float32_matmul_precision()
    options = {"n_chains": 100, "steps": 10, "seed": 1}
    truth = sample(energy, MALA(0.02), **options)
    torch.set_float32_matmul_precision("medium")
    try:
        found = sample(energy, MALA(0.02), **options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.x, truth.x)
    assert found.info.precision == "ieee"


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MALA(0.0), ValueError, "step_size must be finite and > 0, got 0.0"),
        (lambda: MALA(torch.tensor([1.0, math.nan])), ValueError, "got a tensor with nan"),
        (lambda: MALA("0.1"), TypeError, "step_size must be a float or a tensor, got str"),
        (lambda: MALA(0.1, clamp=(1.0, 0.0)), ValueError, r"clamp needs lo < hi, got \(1.0, 0.0\)"),
        (lambda: MALA(), TypeError, "step_size"),
        (lambda: MALA(0.1, target_acceptance=1.0), ValueError, r"target_acceptance must be in \(0, 1\), got 1.0"),
        (lambda: MALA(0.1, target_acceptance="high"), TypeError, "target_acceptance must be a number"),
        (
            lambda: MALA(0.1, preconditioner=torch.tensor([1.0, 0.0])),
            ValueError,
            "preconditioner must be finite and > 0",
        ),
        (lambda: MALA(0.1, preconditioner=-1), ValueError, "preconditioner must be finite and > 0, got -1"),
        (
            lambda: sample(GaussianEnergy(), MALA(0.1, preconditioner=torch.ones(2)), 3, steps=1),
            ValueError,
            "preconditioner must be a number or have one value for each of the 3 dims",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_it_can_not_do_is_said(device):
    energy = MLPEnergy(2, (8,))
    with pytest.raises(ValueError, match=r"backend=\"triton\" can't run: MALA has no fused kernel"):
        sample(GaussianEnergy(), MALA(0.1), 2, steps=1, backend="triton", device=device)
    with pytest.raises(ValueError, match=r"MALA starts within its clamp, \(-1.0, 1.0\), and 1 of 2 chains do not"):
        sample(energy, MALA(0.1, clamp=(-1, 1)), init=torch.tensor([[0.0, 0.0], [0.0, 1.5]]), steps=1)


def test_float64_is_float64():
    energy = MLPEnergy(3, (8,)).double()
    result = sample(energy, MALA(0.3), n_chains=4, steps=3, seed=1)
    assert result.x.dtype == result.energies.dtype == torch.float64
    torch.testing.assert_close(result.energies, energy(result.x)[:, 0], rtol=1e-12, atol=1e-12)


# -- warm-up -------------------------------------------------------------------------------------------------------

SCALES = torch.logspace(-1, 1, 12)  # a condition number of 10,000


@pytest.mark.parametrize("n_chains", [1, 40, 1000])
def test_a_warmup_finds_step_size_and_scale(n_chains):
    result = sample(GaussianEnergy(0.0, SCALES), MALA(0.01), 12, n_chains=n_chains, warmup=1500, steps=300, seed=1)
    assert 0.45 < float(result.info.acceptance.mean()) < 0.7
    ratio = result.sampler.preconditioner.sqrt() / SCALES
    assert float(ratio.log().abs().max()) < (0.7 if n_chains == 1 else 0.2)
    assert result.info.step_size == result.sampler.step_size


def test_after_a_warmup_the_law_is_exact():
    result = sample(GaussianEnergy(0.0, SCALES), MALA(0.3), 12, n_chains=10_000, warmup=300, steps=100, seed=1)
    assert fits_gaussian(result.x, SCALES, ALPHA)


def test_adapted_values_reproduce_the_rest():
    energy = SumEnergy([MLPEnergy(5, (16, 8)), GaussianEnergy()])
    options = {"n_chains": 130, "warmup": 60, "seed": 8}
    whole = sample(energy, MALA(0.4), 5, steps=30, **options)
    part = sample(energy, MALA(0.4), 5, steps=10, **options)
    assert not torch.equal(part.x, sample(energy, MALA(0.4), 5, steps=10, **options | {"warmup": 61}).x)
    then = sample(energy, part.info.sampler, init=part, steps=20)
    assert torch.equal(then.x, whole.x)
    assert torch.equal(sample(energy, MALA(0.4), 5, steps=30, progress=True, **options).x, whole.x)
    # a part of the batch, with these values
    before = sample(energy, MALA(0.4), 5, steps=0, **options)
    after = sample(energy, init=before, steps=30)
    assert torch.equal(after.x, whole.x)


def test_what_is_given_is_not_adapted():
    energy, options = GaussianEnergy(0.0, SCALES), {"n_chains": 30, "warmup": 60, "steps": 2, "seed": 1}
    kept = sample(energy, MALA(0.4, target_acceptance=None), 12, **options)
    assert (kept.sampler.step_size, kept.sampler.preconditioner) == (0.4, None)
    scale = sample(energy, MALA(0.4, preconditioner=2.0), 12, **options).sampler
    assert scale.step_size != 0.4
    assert scale.preconditioner == 2.0
    each = torch.full((30, 1), 0.3)
    assert torch.equal(sample(energy, MALA(each), 12, **options).sampler.step_size, each)


def test_chains_that_never_accept_are_named():
    with pytest.warns(UserWarning, match=r"2 of 4 chains accepted next to none of 50 proposals \(chains 1, 3\)"):
        sample(GaussianEnergy(), MALA(torch.tensor([[0.5], [1e6], [0.5], [1e6]])), 3, n_chains=4, steps=50, seed=1)


def test_a_preconditioner_changes_the_coordinates():
    """With C = std^2, MALA on a Gaussian is MALA on the standard normal."""
    std = torch.tensor([0.5, 2.0, 1.0])
    init = torch.randn(50, 3)
    scaled = sample(GaussianEnergy(0.0, std), MALA(0.5, std**2), init=init * std, steps=20, seed=1)
    plain = sample(GaussianEnergy(), MALA(0.5), init=init, steps=20, seed=1)
    torch.testing.assert_close(scaled.x / std, plain.x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled.info.acceptance, plain.info.acceptance, rtol=1e-4, atol=1e-5)


def test_chains_that_reject_are_put_together_when_the_others_are(monkeypatch):
    """In the first layer this takes two products for all chains of a tile, so it must not be due in every step."""
    monkeypatch.setattr(collapsed, "REFRESHED", 8)
    calls = []
    put_together = Collapsed.put_together
    monkeypatch.setattr(Collapsed, "put_together", lambda *arguments: calls.append(1) or put_together(*arguments))
    energy = SumEnergy([MLPEnergy(400, (16,)), GaussianEnergy()])
    result = sample(energy, MALA(0.3), 400, n_chains=50, steps=64, seed=1)
    assert result.info.path == "collapsed"
    assert 0.3 < float(result.info.acceptance.mean()) < 0.9
    assert len(calls) <= 64 // 8 + 2
