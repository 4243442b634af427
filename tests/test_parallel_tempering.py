"""Parallel tempering: each rung keeps its law, swaps carry chains across barriers, and ladders resume bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from laws import fits_gaussian
from scipy import stats
from torch import nn

from fastebm import (
    HMC,
    MALA,
    NUTS,
    ChainPool,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    ParallelTempering,
    UnderdampedLangevin,
    sample,
)
from fastebm.backends import Chains
from fastebm.driver.run import run_chains
from fastebm.rng import Noise, Stream
from fastebm.samplers import parallel_tempering
from fastebm.samplers.tempering import Tempered

pytestmark = pytest.mark.usefixtures("seeded")

ALPHA = 1e-6  # of each test of a law
LADDER = (1.0, 2.0, 4.5)
STD = torch.tensor([1.0, 0.5])


# -- laws ----------------------------------------------------------------------------------------------------------


def moved_ladders(sampler, n=20_000, steps=9, temperature=1.0):
    """Ladders of a Gaussian that start from their law: the run, and whether each rung still has its law."""
    scale = torch.tensor(sampler.temperatures).mul(temperature).sqrt()[:, None]
    rungs = torch.randn(n, len(scale), len(STD)) * scale * STD
    chains = Chains(
        rungs[:, 0], 5, torch.arange(n), torch.zeros(n, dtype=torch.int64), carried={"rungs": rungs.clone()}
    )
    done, _ = run_chains(GaussianEnergy(0.0, STD), chains, sampler, steps, shape=(2,), telemetry=True)
    after = done.carried["rungs"]
    assert torch.equal(after[:, 0], done.x)
    fits = [fits_gaussian(after[:, r], s * STD, ALPHA / len(scale)) for r, s in enumerate(scale)]
    return done, all(fits)


def test_every_rung_keeps_its_law():
    done, fits = moved_ladders(ParallelTempering(MALA(0.4), LADDER))
    assert fits
    assert moved_ladders(ParallelTempering(HMC(0.4, 3), LADDER))[1]
    assert moved_ladders(ParallelTempering(NUTS(0.5, 3), LADDER), n=5000)[1]
    rates = done.telemetry["swap_acceptance"].mean(dim=0) / done.telemetry["swaps"].mean(dim=0)
    # The rate in equilibrium, from independent energies: chi-squared with two degrees, so exponential.
    energies = torch.tensor(LADDER) * torch.distributions.Exponential(torch.tensor(1.0)).sample((400_000, 3))
    beta = 1 / torch.tensor(LADDER)
    chance = ((beta[:-1] - beta[1:]) * (energies[:, :-1] - energies[:, 1:])).clamp(max=0).exp()
    error = chance.std(dim=0) * math.sqrt(1 / 400_000 + 1 / 80_000) * 3  # 3: chains are correlated over the steps
    assert bool(((rates - chance.mean(dim=0)).abs() < 5 * error).all())


def test_the_inner_temperature_enters_the_swaps():
    """Langevin with noise_scale 2 samples exp(-E / 4). Its small steps move little, so the swaps decide."""
    assert moved_ladders(ParallelTempering(Langevin(1e-4, 2.0), LADDER), temperature=4.0)[1]
    assert not moved_ladders(ParallelTempering(Langevin(1e-4, 2.0), LADDER), temperature=1.5)[1]


def swaps_always(patch):
    draw = Noise.uniform
    patch.setattr(
        Noise, "uniform", lambda self, stream, t: draw(self, stream, t) * (1e-38 if stream == Stream.TEMPERING else 1)
    )


MUTANTS = {
    "swaps always": swaps_always,
    "swaps without the temperatures": lambda patch: patch.setattr(
        parallel_tempering, "_log_accept", lambda beta, energies: energies[:, :-1] - energies[:, 1:]
    ),
    "swaps by the inverse ratio": lambda patch: patch.setattr(
        parallel_tempering, "_log_accept",
        lambda beta, energies, log_accept=parallel_tempering._log_accept: -log_accept(beta, energies),
    ),
    "swaps by another pair's temperatures": lambda patch: patch.setattr(
        parallel_tempering, "_log_accept",
        lambda beta, energies, log_accept=parallel_tempering._log_accept: log_accept(beta.flip(0), energies.flip(1)),
    ),
    "swaps energies and not states": lambda patch: patch.setattr(
        parallel_tempering, "_reordered",
        lambda v, order, reordered=parallel_tempering._reordered: v if v.ndim == 3 else reordered(v, order),
    ),
    "swaps states and not energies": lambda patch: patch.setattr(
        parallel_tempering, "_reordered",
        lambda v, order, reordered=parallel_tempering._reordered: reordered(v, order) if v.ndim == 3 else v,
    ),
    "moves all rungs at temperature 1": lambda patch: patch.setattr(
        Tempered, "__init__",
        lambda self, target, beta, *given, init=Tempered.__init__: init(self, target, beta * 0 + 1, *given),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_rejects_mutants(mutant, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    assert not moved_ladders(ParallelTempering(MALA(0.4), LADDER))[1]


class TwoModes(nn.Module):
    """0.3 N(-4, 1/4) + 0.7 N(4, 1/4), so the barrier is 32 high."""

    def forward(self, x):
        both = torch.stack([-2 * (x[:, 0] + 4) ** 2 + math.log(0.3), -2 * (x[:, 0] - 4) ** 2 + math.log(0.7)])
        return -both.logsumexp(dim=0)


def fits_two_modes(x):
    def cdf(v):
        return 0.3 * stats.norm(-4, 0.5).cdf(v) + 0.7 * stats.norm(4, 0.5).cdf(v)

    return stats.kstest(x[:, 0].numpy(), cdf).pvalue > ALPHA


def test_it_crosses_a_barrier_that_langevin_and_mala_do_not():
    ladder = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    options = {"init": torch.full((1000, 1), -4.0), "seed": 1}
    result = sample(TwoModes(), ParallelTempering(MALA(0.3), ladder), steps=250, **options)
    assert fits_two_modes(result.x)
    alone = sample(TwoModes(), MALA(0.3), steps=250 * len(ladder), **options)
    assert float(alone.x.max()) < 0
    assert not fits_two_modes(alone.x)
    assert 0.5 < float(alone.info.acceptance.mean())  # it does move
    unadjusted = sample(TwoModes(), Langevin(0.1), steps=250 * len(ladder), **options)
    assert float(unadjusted.x.max()) < 0
    assert 0.4 < float(unadjusted.x.std()) < 0.7  # so does Langevin


# -- cost and telemetry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner", "gradients"), [(MALA(0.3), 1), (Langevin(0.3), 1), (HMC(0.3, 4), 4)])
def test_a_step_evaluates_all_rungs_as_often_as_the_inner_sampler_one(inner, gradients):
    rows = []

    class Counted(nn.Module):
        def forward(self, x):
            rows.append(len(x))
            return x.square().sum(dim=1) / 2

    result = sample(Counted(), ParallelTempering(inner, LADDER), 2, n_chains=5, steps=20, seed=1)
    assert result.info.gradients.tolist() == [3.0 * gradients] * 5
    assert rows == [15] * (1 + 20 * gradients)  # the start, and each step


def test_swaps_are_reported_for_the_pairs_that_were_tried():
    energy, options = GaussianEnergy(), {"input_size": 2, "n_chains": 40, "seed": 1}
    one = sample(energy, ParallelTempering(MALA(0.3), LADDER), steps=1, **options).info
    assert one.swaps.tolist() == [[1.0, 0.0]] * 40
    assert bool(one.swap_acceptance[:, 0].isfinite().all())
    assert bool(one.swap_acceptance[:, 1].isnan().all())
    info = sample(energy, ParallelTempering(MALA(0.3), LADDER, swap_every=3), steps=12, **options).info
    torch.testing.assert_close(info.swaps, torch.full((40, 2), 1 / 6))
    assert 0 < float(info.swap_acceptance.min()) <= float(info.swap_acceptance.max()) <= 1
    assert sample(energy, ParallelTempering(MALA(0.3), LADDER), steps=0, **options).info.swap_acceptance.shape == (
        40,
        2,
    )
    equal = sample(lambda x: 0 * x.sum(dim=1), ParallelTempering(MALA(0.3), LADDER), steps=7, **options).info
    assert equal.swap_acceptance.tolist() == [[1.0, 1.0]] * 40
    assert (info.step_size, info.temperature) == (0.3, 1.0)


# -- resuming ------------------------------------------------------------------------------------------------------


def test_a_ladder_starts_again_where_its_chain_was_changed():
    energy, sampler = MLPEnergy(2, (8,)), ParallelTempering(MALA(0.3), LADDER)
    first = sample(energy, sampler, n_chains=20, steps=10, seed=1)
    rungs = first.state.chains.carried["rungs"]
    x = first.x.clone()
    x[3] = 0.25
    chains = first.state.chains._replace(x=x)
    done, _ = run_chains(energy, chains, sampler, 0, shape=(2,))
    kept = torch.arange(20) != 3
    assert torch.equal(done.carried["rungs"][kept], rungs[kept])
    assert torch.equal(done.carried["rungs"][3], torch.full((3, 2), 0.25))
    # and where the bounds or the frozen coordinates are new
    inside = ParallelTempering(MALA(0.3, clamp=(-0.5, 0.5)), LADDER)
    done, _ = run_chains(energy, chains._replace(x=x.clamp(-0.5, 0.5)), inside, 5, shape=(2,))
    assert float(done.carried["rungs"].abs().max()) <= 0.5
    frozen = torch.tensor([[True, False]])
    done, _ = run_chains(energy, chains._replace(frozen=frozen), sampler, 30, shape=(2,))
    assert torch.equal(done.carried["rungs"][:, :, 0], x[:, :1].expand(-1, 3))


def test_chains_that_start_again_have_new_ladders():
    class NaNBeyond(nn.Module):
        def forward(self, x):
            return x.square().sum(dim=1) / 2 * torch.where((x.abs() > 2.5).any(dim=1), math.nan, 1.0)

    sampler, options = ParallelTempering(MALA(0.5), LADDER), {"n_chains": 200, "steps": 20, "seed": 1}
    ignored = sample(NaNBeyond(), sampler, 1, on_nonfinite="ignore", **options)
    lost = ignored.info.first_bad_step >= 0
    assert 20 < int(lost.sum()) < 200
    # Rungs at higher temperatures were lost, too: no chain itself came near.
    assert bool((ignored.x[lost].abs() < 1.5).any())
    assert bool(ignored.energies.isfinite().all())
    assert bool(ignored.state.chains.carried["rungs"].isfinite().all())
    again = sample(NaNBeyond(), sampler, 1, on_nonfinite="reinit", **options)
    then = sample(NaNBeyond(), sampler, init=again, steps=0)
    assert torch.equal(then.state.chains.carried["rungs"][lost], again.x[lost][:, None].expand(-1, 3, -1))


def test_another_number_of_temperatures_is_refused():
    first = sample(GaussianEnergy(), ParallelTempering(MALA(0.3), LADDER), 2, steps=3)
    with pytest.raises(ValueError, match=r"these chains have 3 temperatures, and the sampler 2: .* init=result.x"):
        sample(first.energy, ParallelTempering(MALA(0.3), (1, 2)), init=first, steps=1)


def test_inner_settings_by_step_and_by_chain():
    energy, each = MLPEnergy(2, (16, 8)), torch.linspace(0.1, 0.9, 6)[:, None]
    by_chain = sample(energy, ParallelTempering(MALA(each), LADDER), n_chains=6, steps=8, seed=9)
    for i in range(6):
        alone = ParallelTempering(MALA(float(each[i])), LADDER)
        one = sample(energy, alone, n_chains=1, first_chain=i, steps=8, seed=9)
        torch.testing.assert_close(one.x[0], by_chain.x[i])
    schedule, noise = torch.linspace(0.6, 0.1, 8), torch.linspace(1.0, 0.5, 6)[:, None]

    def sampler(first, last):
        return ParallelTempering(Langevin(schedule[first:last], noise), LADDER)

    whole = sample(energy, sampler(0, 8), n_chains=6, steps=8, seed=9)
    then = sample(energy, sampler(3, 8), init=sample(energy, sampler(0, 3), n_chains=6, steps=3, seed=9), steps=5)
    assert torch.equal(then.x, whole.x)
    shown = sample(energy, sampler(0, 8), n_chains=6, steps=8, seed=9, progress=True)
    assert torch.equal(shown.x, whole.x)
    with pytest.raises(ValueError, match="got 3 entries for 5 steps"):
        sample(energy, sampler(0, 3), n_chains=6, steps=5)
    with pytest.raises(ValueError, match="does not fit 7 chains"):
        sample(energy, sampler(0, 8), n_chains=7, steps=8)


@pytest.mark.parametrize("given", [{"step_size": torch.full((1, 1), 0.3)}, {"noise_scale": torch.full((1, 1), 0.7)}])
def test_one_row_is_for_all_chains(given):
    energy, inner = MLPEnergy(2, (8,)), {"step_size": 0.3, "noise_scale": 0.7}
    one, number = (
        sample(energy, ParallelTempering(Langevin(**settings), LADDER), n_chains=4, steps=3, seed=2).x
        for settings in (inner | given, inner)
    )
    torch.testing.assert_close(one, number)


def test_chains_of_a_pool_swap_by_their_own_age():
    energy, sampler = MLPEnergy(2, (8,)), ParallelTempering(MALA(0.3), LADDER, swap_every=2)
    pool = ChainPool(64, 2, seed=3, reinit_prob=0.0)
    for _ in range(5):
        pool.sample(energy, 32, MALA(0.3), 3)
    before, steps = pool.states.clone(), pool.steps.clone()
    assert len(set((steps % 4).tolist())) > 1
    pool.advance(energy, sampler, 6)
    for i in (0, 10, 63):
        chains = Chains(before[i : i + 1], 3, torch.tensor([i]), steps[i : i + 1])
        done, _ = run_chains(energy, chains, sampler, 6, shape=(2,))
        assert torch.equal(done.x[0], pool.states[i])


# -- warm-up -------------------------------------------------------------------------------------------------------


def test_a_warmup_finds_a_step_size_for_each_rung():
    energy = GaussianEnergy(0.0, torch.tensor([0.1, 1.0, 3.0]))
    sampler = ParallelTempering(MALA(0.01), LADDER, factors=(1.0, 1.0, 1.0))
    result = sample(energy, sampler, 3, n_chains=100, warmup=400, steps=200, seed=1)
    assert 0.5 < float(result.info.acceptance.mean()) < 0.65
    np.testing.assert_allclose(result.sampler.factors, LADDER, rtol=0.25)
    assert result.sampler.sampler.preconditioner is not None
    kept = sample(energy, ParallelTempering(MALA(0.01, target_acceptance=None), LADDER), 3, warmup=40, steps=1)
    assert kept.sampler.factors is None


@pytest.mark.parametrize("inner", [MALA(0.02), Langevin(0.002)], ids=["MALA", "Langevin"])
def test_auto_finds_temperatures_that_swap_alike(inner):
    """In a narrow box the density at high temperatures is flat, and temperatures in equal ratios are far from good."""
    energy, options = GaussianEnergy(0.0, 0.2), {"input_size": 4, "n_chains": 100, "seed": 1}
    sampler = ParallelTempering(inner, "auto", n_temperatures=5, max_temperature=1000.0, clamp=(-1.0, 1.0))
    tuned = sample(energy, sampler, warmup=400, steps=200, **options)
    plain = sample(
        energy, ParallelTempering(inner, sampler.ladder, clamp=(-1.0, 1.0)), warmup=150, steps=200, **options
    )
    rates, before = (r.info.swap_acceptance.mean(dim=0) for r in (tuned, plain))
    assert float(rates.max() - rates.min()) < 0.08
    assert float(before.max() - before.min()) > 0.5
    assert float(rates.min()) > float(before.min()) + 0.2
    ladder = tuned.sampler.temperatures
    assert (ladder[0], ladder[-1], len(ladder)) == (1.0, 1000.0, 5)
    then = sample(energy, init=tuned, steps=3)
    again = sample(energy, tuned.sampler, init=tuned, steps=3)
    assert torch.equal(then.x, again.x)


def test_auto_needs_a_warmup():
    auto = ParallelTempering(MALA(0.3), "auto", max_temperature=10)
    assert len(auto.ladder) == 8
    with pytest.raises(ValueError, match='temperatures="auto" are found in a warm-up'):
        sample(GaussianEnergy(), auto, 2, steps=3)
    with pytest.raises(ValueError, match="needs a longer warm-up than 10 steps: 200 or more"):
        sample(GaussianEnergy(), auto, 2, warmup=10, steps=3)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ParallelTempering(MALA(0.1), (1.0,)),
            ValueError,
            r"at least two .* start at 1 and increase, got \(1.0,",
        ),
        (lambda: ParallelTempering(MALA(0.1), (2.0, 3.0)), ValueError, "start at 1 and increase"),
        (lambda: ParallelTempering(MALA(0.1), (1.0, 3.0, 3.0)), ValueError, "start at 1 and increase"),
        (lambda: ParallelTempering(MALA(0.1), (1.0, math.nan)), ValueError, "start at 1 and increase"),
        (lambda: ParallelTempering(MALA(0.1), torch.tensor([1.0, math.inf])), ValueError, "start at 1 and increase"),
        (lambda: ParallelTempering(MALA(0.1), 5.0), TypeError, r"temperatures must be numbers, .* got 5.0"),
        (lambda: ParallelTempering(MALA(0.1), "best"), ValueError, """numbers or "auto", got 'best'"""),
        (lambda: ParallelTempering(MALA(0.1), "auto"), ValueError, "needs max_temperature, a finite number > 1"),
        (
            lambda: ParallelTempering(MALA(0.1), "auto", max_temperature=1.0),
            ValueError,
            "a finite number > 1.* got 1.0",
        ),
        (
            lambda: ParallelTempering(MALA(0.1), "auto", n_temperatures=1, max_temperature=9.0),
            ValueError,
            ">= 2, got 1",
        ),
        (lambda: ParallelTempering(MALA(0.1), LADDER, n_temperatures=3), ValueError, 'are for temperatures="auto"'),
        (
            lambda: ParallelTempering(MALA(torch.ones(5)), "auto", max_temperature=9.0),
            ValueError,
            "needs an inner sampler without schedules",
        ),
        (lambda: ParallelTempering(MALA(0.1), LADDER, swap_every=0), ValueError, "swap_every must be >= 1, got 0"),
        (lambda: ParallelTempering(MALA(0.1), LADDER, swap_every=1.5), TypeError, "swap_every must be an int, got 1.5"),
        (lambda: ParallelTempering(MALA(0.1), LADDER, factors=(1, 2)), ValueError, "for each of the 3 temperatures"),
        (lambda: ParallelTempering(MALA(0.1), LADDER, factors=2.0), TypeError, "factors must be numbers"),
        (
            lambda: ParallelTempering(UnderdampedLangevin(0.1), LADDER),
            ValueError,
            "can't use UnderdampedLangevin at its temperatures, because it carries momentum",
        ),
        (lambda: ParallelTempering(MALA, LADDER), TypeError, "are its parentheses missing"),
        (
            lambda: ParallelTempering(ParallelTempering(MALA(0.1), LADDER), LADDER),
            ValueError,
            "ParallelTempering can't use ParallelTempering at its temperatures, because it carries rungs",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bounds_are_those_of_the_inner_sampler_or_its_own():
    assert ParallelTempering(MALA(0.1, clamp=(0, 1)), LADDER).box == (0.0, 1.0)
    own = ParallelTempering(MALA(0.1), LADDER, clamp=(0, 1))
    assert own.box == own.sampler.box == (0.0, 1.0)
    assert ParallelTempering(MALA(0.1), LADDER).exact
    assert not ParallelTempering(Langevin(0.1), LADDER).exact


def test_float64_is_float64():
    energy = MLPEnergy(3, (8,)).double()
    result = sample(energy, ParallelTempering(MALA(0.3), LADDER), n_chains=4, steps=3, seed=1)
    assert result.x.dtype == result.energies.dtype == result.state.chains.carried["rungs"].dtype == torch.float64
    torch.testing.assert_close(result.energies, energy(result.x)[:, 0], rtol=1e-12, atol=1e-12)
