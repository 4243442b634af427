"""Tempered transitions: exact for every ladder, across barriers, with the cost that they state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from laws import fits_gaussian
from scipy import stats
from small_energies import Beyond
from torch import nn

from fastebm import HMC, MALA, GaussianEnergy, Langevin, MLPEnergy, ParallelTempering, TemperedTransitions, sample
from fastebm.rng import Noise, Stream
from fastebm.samplers import tempered_transitions
from fastebm.samplers.tempering import Tempered

pytestmark = pytest.mark.usefixtures("seeded")

N = 20_000
ALPHA = 1e-6  # of each test of a law
LADDER = (1.0, 1.6, 2.5)


# -- laws ----------------------------------------------------------------------------------------------------------


def gaussian(inner, steps=5):
    """From the law itself, which each step must leave as it is."""
    std = torch.tensor([1.0, 0.5])
    sampler = TemperedTransitions(inner, LADDER)
    result = sample(GaussianEnergy(0.0, std), sampler, init=torch.randn(N, 2) * std, steps=steps, seed=5)
    return result, fits_gaussian(result.x, std, ALPHA)


@pytest.mark.parametrize(("step_size", "least", "most"), [(0.05, 0.6, 0.9), (0.4, 0.6, 0.95), (1.2, 0.3, 0.95)])
def test_a_gaussian_stays_what_it_is(step_size, least, most):
    result, fits = gaussian(MALA(step_size))
    assert fits
    assert least < float(result.info.acceptance.mean()) < most


def test_a_gaussian_stays_what_it_is_with_hmc():
    result, fits = gaussian(HMC(0.4, 4))
    assert fits
    assert result.info.gradients.tolist() == [20.0] * N


def accepts_always(patch):
    draw = Noise.uniform
    patch.setattr(
        Noise, "uniform", lambda self, stream, t: draw(self, stream, t) * (1e-38 if stream == Stream.TEMPERING else 1)
    )


def ratio(log_accept):
    return lambda patch: patch.setattr(tempered_transitions, "_log_accept", log_accept)


MUTANTS = {
    "accepts always": accepts_always,
    "counts the way up only": ratio(lambda ladder, up, down: sum(_gaps(ladder, up))),
    "the inverse ratio": ratio(lambda ladder, up, down: sum(_gaps(ladder, down)) - sum(_gaps(ladder, up))),
    "the energies of the ends only": ratio(
        lambda ladder, up, down: (1 - 1 / ladder[-1]) * (up[0] - down[0])
    ),
    "moves at temperature 1 only": lambda patch: patch.setattr(
        Tempered, "__init__",
        lambda self, target, beta, *given, init=Tempered.__init__: init(self, target, 1.0, *given),
    ),
}  # fmt: skip


def _gaps(ladder, energies):
    """(b_{j-1} - b_j) E of each level."""
    return [(1 / a - 1 / b) * e for a, b, e in zip(ladder, ladder[1:], energies, strict=False)]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_rejects_mutants(mutant, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    assert not gaussian(MALA(0.4), steps=8)[1]


class TwoModes(nn.Module):
    """0.3 N(-2, 1/16) + 0.7 N(2, 1/16), so the barrier is 32 high."""

    def forward(self, x):
        both = torch.stack([-8 * (x[:, 0] + 2) ** 2 + math.log(0.3), -8 * (x[:, 0] - 2) ** 2 + math.log(0.7)])
        return -both.logsumexp(dim=0)


def fits_two_modes(x):
    def cdf(v):
        return 0.3 * stats.norm(-2, 0.25).cdf(v) + 0.7 * stats.norm(2, 0.25).cdf(v)

    return stats.kstest(x[:, 0].numpy(), cdf).pvalue > ALPHA


def test_it_crosses_a_barrier_that_mala_does_not():
    ladder = tuple(np.geomspace(1, 40, 16))
    options = {"init": torch.full((500, 1), -2.0), "seed": 1}
    result = sample(TwoModes(), TemperedTransitions(MALA(0.1), ladder), steps=40, **options)
    assert fits_two_modes(result.x)
    alone = sample(TwoModes(), MALA(0.1), steps=40 * 31, **options)
    assert float(alone.x.max()) < 0
    assert not fits_two_modes(alone.x)


# -- cost and telemetry --------------------------------------------------------------------------------------------


def test_one_evaluation_per_inner_step():
    rows = []

    class Counted(nn.Module):
        def forward(self, x):
            rows.append(len(x))
            return x.square().sum(dim=1) / 2

    result = sample(Counted(), TemperedTransitions(MALA(0.3), LADDER), 2, n_chains=7, steps=10, seed=1)
    assert result.info.gradients.tolist() == [5.0] * 7
    assert rows == [7] * (1 + 10 * 5)  # the start, and 2 R - 1 for each step


def test_without_tempered_transitions_it_is_the_inner_sampler(monkeypatch):
    """If none is accepted. They have further numbers of the same streams."""
    monkeypatch.setattr(tempered_transitions, "_log_accept", lambda ladder, up, down: torch.full_like(up[0], -math.inf))
    energy, options = MLPEnergy(2, (8,)), {"n_chains": 30, "steps": 10, "seed": 2}
    found = sample(energy, TemperedTransitions(MALA(0.3), LADDER), **options)
    plain = sample(energy, MALA(0.3), **options)
    assert torch.equal(found.x, plain.x)
    assert found.info.acceptance.tolist() == [0.0] * 30
    torch.testing.assert_close(found.info.grad_norm, plain.info.grad_norm)


def test_a_warmup_adapts_the_inner_sampler():
    std = torch.tensor([0.1, 1.0, 3.0])
    sampler = TemperedTransitions(MALA(0.01), LADDER)
    result = sample(GaussianEnergy(0.0, std), sampler, 3, n_chains=200, warmup=150, steps=10, seed=1)
    assert float((result.sampler.sampler.preconditioner.sqrt() / std).log().abs().max()) < 0.3
    inner = sample(GaussianEnergy(0.0, std), result.sampler.sampler, init=result.x, steps=100, seed=1)
    assert 0.5 < float(inner.info.acceptance.mean()) < 0.65
    assert result.info.step_size == result.sampler.sampler.step_size
    assert fits_gaussian(result.x, std, ALPHA)


# -- energies that are not numbers ---------------------------------------------------------------------------------


def test_infinite_energy_is_never_entered():
    sampler = TemperedTransitions(MALA(0.7), LADDER)
    result = sample(Beyond(math.inf), sampler, init=torch.zeros(N, 1), steps=40, seed=4)
    assert float(result.x.max()) <= 1.0
    assert stats.kstest(result.x[:, 0].numpy(), stats.truncnorm(-math.inf, 1.0).cdf).pvalue > ALPHA


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_other_energies_stop_the_chain_where_it_was(number):
    sampler = TemperedTransitions(MALA(0.3), LADDER)
    options = {"init": torch.zeros(500, 1) - 1, "steps": 4, "thin": 1, "seed": 4, "on_nonfinite": "ignore"}
    result = sample(Beyond(number), sampler, **options)
    first = result.info.first_bad_step
    assert 20 < int((first >= 0).sum()) < 480
    assert float(result.trajectory.max()) <= 1.0
    assert bool(result.energies.isfinite().all())
    for i in (first > 0).nonzero().flatten()[:20].tolist():
        assert torch.equal(result.x[i], result.trajectory[i, first[i] - 1])


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TemperedTransitions(MALA(0.1), (1.0,)), ValueError, "at least two finite numbers"),
        (lambda: TemperedTransitions(MALA(0.1), "auto"), TypeError, "temperatures must be numbers"),
        (lambda: TemperedTransitions(MALA, LADDER), TypeError, "are its parentheses missing"),
        (
            lambda: TemperedTransitions(Langevin(0.1), LADDER),
            ValueError,
            "detailed balance, and those of Langevin do not",
        ),
        (
            lambda: TemperedTransitions(ParallelTempering(MALA(0.1), LADDER), LADDER),
            ValueError,
            "TemperedTransitions can't use ParallelTempering",
        ),
        (
            lambda: TemperedTransitions(TemperedTransitions(MALA(0.1), LADDER), LADDER),
            ValueError,
            "because it does not say how its step size grows",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()
