"""ChEES-HMC: its lengths, its warm-up, chains of other ages. tests/test_samplers.py has what all samplers share."""

from __future__ import annotations

import math

import pytest
import torch
from laws import cells_of_box, fits_cells, fits_gaussian

from fastebm import ChEESHMC, GaussianEnergy, MLPEnergy, SumEnergy, sample
from fastebm.backends import Chains
from fastebm.driver.run import run_chains
from fastebm.rng import Noise
from fastebm.samplers import chees, hmc
from fastebm.samplers.base import Info
from fastebm.samplers.chees import halton

pytestmark = pytest.mark.usefixtures("seeded")

ALPHA = 1e-6  # of each test of a law


def mlp():
    return SumEnergy([MLPEnergy(5, (16, 8)), GaussianEnergy()])


# -- lengths -------------------------------------------------------------------------------------------------------


def test_halton_numbers():
    found = [halton(step) for step in range(7)]
    assert found == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]
    last = [halton(2**32 - 2), halton(2**32 - 1)]
    assert last == [1 - 2**-32, 2**-33]


def gradients(sampler, steps=4, **options):
    result = sample(GaussianEnergy(), sampler, 2, n_chains=3, steps=steps, seed=1, **options)
    return (result.info.gradients * steps).tolist()


def test_leapfrog_steps_of_each_step():
    assert gradients(ChEESHMC(0.1, 1.0)) == [5 + 3 + 8 + 2] * 3  # 5, 2.5, 7.5 and 1.25, rounded up
    assert gradients(ChEESHMC(1.0, 0.1)) == [4] * 3  # at least 1 each
    assert gradients(ChEESHMC(1e-4, 1e9), steps=1) == [1000] * 3  # at most
    assert gradients(ChEESHMC(torch.tensor([[0.1], [0.2], [1.0]]), 1.0)) == [18, 3 + 2 + 4 + 1, 4]
    assert gradients(ChEESHMC(torch.tensor([0.1, 0.1, 0.2, 1.0]), 1.0)) == [5 + 3 + 4 + 1] * 3


@pytest.mark.parametrize("energy", [mlp, lambda: GaussianEnergy(0.3, 1.2)], ids=["mlp", "autograd"])
def test_chains_of_other_ages_keep_their_bits(energy):
    """As in a pool, whose chains have taken different numbers of steps."""
    energy, sampler, n = energy(), ChEESHMC(0.2, 2.0), 90
    ages = torch.arange(n) % 3 * 5
    chains = Chains(torch.randn(n, 5), 7, torch.arange(n), ages)
    together, _ = run_chains(energy, chains, sampler, 4, shape=(5,), telemetry=True)
    for age in (0, 5, 10):
        rows = ages == age
        alone, _ = run_chains(energy, chains.rows(rows), sampler, 4, shape=(5,), telemetry=True)
        assert torch.equal(together.x[rows], alone.x)
        assert torch.equal(together.energy[rows], alone.energy)
        for name in sampler.reports:
            assert torch.equal(together.telemetry[name][rows], alone.telemetry[name])
    assert len(together.telemetry["gradients"].unique()) == 3


# -- the law -------------------------------------------------------------------------------------------------------

STD = torch.logspace(-1, 0, 6)


def after_warmup(n=6000):
    return sample(GaussianEnergy(0.0, STD), ChEESHMC(0.3), 6, n_chains=n, warmup=120, steps=25, seed=1)


def test_after_a_warmup_the_law_is_exact():
    result = after_warmup()
    assert fits_gaussian(result.x, STD, ALPHA)
    assert 0.55 < float(result.info.acceptance.mean()) < 0.85


MUTANTS = {
    "accepts always": lambda patch: patch.setattr(
        Noise, "uniform", lambda self, stream, t: torch.full((len(self.chains),), 1e-38)
    ),
    "more steps where the energy is high": lambda patch: patch.setattr(
        chees, "transition",
        lambda target, state, noise, t, h, n: hmc.transition(target, state, noise, t, h, 1 + 2 * (state.energy > 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_rejects_mutants(mutant, monkeypatch):
    adapted = after_warmup(200).sampler
    MUTANTS[mutant](monkeypatch)
    result = sample(GaussianEnergy(0.0, STD), adapted, init=torch.randn(10_000, 6) * STD, steps=8, seed=2)
    assert not fits_gaussian(result.x, STD, ALPHA)


def test_an_mlp_in_a_box_after_a_warmup():
    energy, expected = cells_of_box(MLPEnergy(2, (16, 16), "tanh"))
    result = sample(energy, ChEESHMC(0.1, clamp=(-2.0, 2.0)), n_chains=6000, warmup=60, steps=20, seed=1)
    assert 0.5 < float(result.info.acceptance.mean()) < 0.8
    assert fits_cells(result.x, expected, ALPHA)


# -- warm-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [1.0, None])
@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_a_warmup_finds_the_length(mass, start):
    """A quarter of the period of the slowest coordinate, 2 pi std, or somewhat more: h_t shortens trajectories."""
    std = torch.logspace(-1.5, 0, 8)
    result = sample(GaussianEnergy(0.0, std), ChEESHMC(start, mass=mass), 8, n_chains=100, warmup=300, steps=31, seed=1)
    assert 0.7 < result.sampler.trajectory_length / (math.pi / 2) < 1.4
    assert 0.55 < float(result.info.acceptance.mean()) < 0.85
    if mass is None:
        assert float((result.sampler.mass.rsqrt() / std).log().abs().max()) < 0.15
    h = torch.tensor([halton(step) for step in range(300, 331)], dtype=torch.float64)
    n = (h * result.sampler.trajectory_length / result.sampler.step_size).ceil()
    torch.testing.assert_close(result.info.gradients, n.float().mean().expand(100))


@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_bounds_shorten_trajectories(start):
    """Otherwise the step size would fall without end, since smaller steps keep no trajectory inside."""
    sampler = ChEESHMC(start, clamp=(-0.5, 0.5))
    result = sample(GaussianEnergy(), sampler, 8, n_chains=100, warmup=300, steps=31, seed=1)
    assert float(result.info.gradients.mean()) < 10
    assert 0.5 < float(result.info.acceptance.mean()) < 0.8


def test_frozen_coordinates_do_not_change_the_length():
    init = torch.randn(50, 10)
    init[:, 3:] = 0.0  # the same in all chains, so without variance
    frozen = torch.arange(10) >= 3
    options = {"warmup": 300, "steps": 31, "seed": 1}
    result = sample(GaussianEnergy(), ChEESHMC(0.3), init=init, frozen=frozen, **options)
    alone = sample(GaussianEnergy(), ChEESHMC(0.3), init=init[:, :3], **options)
    ratio = result.sampler.trajectory_length / alone.sampler.trajectory_length
    assert abs(math.log(ratio)) < 0.3
    assert torch.equal(result.x[:, 3:], init[:, 3:])


def test_the_gradient_is_that_of_the_criterion():
    """On a standard normal, x' = x cos l + v sin l with l = h T, so ChEES is known as a function of T."""
    x, v = torch.randn(2, 400, 3, dtype=torch.float64) * 1.2
    x, v = x - x.mean(dim=0), v - v.mean(dim=0)  # the estimate takes the means as given
    mass = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)
    log_length = torch.tensor(-0.1, dtype=torch.float64, requires_grad=True)

    def end(length):
        return x * length.cos() + v * length.sin(), v * length.cos() - x * length.sin()

    z, _ = end(log_length.exp())
    sizes = [(of - of.mean(dim=0)).square().sum(dim=1) for of in (z, x)]
    criterion = (sizes[0] - sizes[1]).square().mean() / 4 / (log_length / 2).exp()
    (criterion * math.exp(-0.1 / 2)).backward()
    z, v_end = (of.detach() for of in end(log_length.exp()))
    sampler = ChEESHMC(math.exp(-0.1) / 2, 1.0, mass)
    trajectory = hmc.Trajectory(z / mass.sqrt(), None, None, v_end, 2, None)
    info = Info(None, acceptance=torch.full((400,), 0.7), proposal=trajectory)
    found = chees._slope(sampler, x / mass.sqrt(), info, None)
    assert found == pytest.approx(float(log_length.grad), rel=1e-6)
    # chains that stopped, or were rejected for sure, do not count, even if they are NaN
    ends = torch.cat([trajectory.x, torch.full((9, 3), math.nan)])
    trajectory = trajectory._replace(x=ends, momentum=torch.cat([v_end, v_end[:9]]))
    chance = torch.cat([torch.full((400,), 0.7), torch.tensor([0.0] * 4 + [1.0] * 5)])
    info, active = Info(None, acceptance=chance, proposal=trajectory), torch.arange(409) < 404
    assert chees._slope(sampler, torch.cat([x, x[:9]]) / mass.sqrt(), info, active) == pytest.approx(found, rel=1e-6)


def test_a_resumed_call_equals_a_longer_one():
    energy, options = mlp(), {"n_chains": 130, "warmup": 60, "seed": 8}
    whole = sample(energy, ChEESHMC(0.4), 5, steps=12, **options)
    then = sample(energy, init=sample(energy, ChEESHMC(0.4), 5, steps=5, **options), steps=7)
    assert torch.equal(then.x, whole.x)
    assert then.sampler.trajectory_length == whole.sampler.trajectory_length
    assert torch.equal(sample(energy, ChEESHMC(0.4), 5, steps=12, progress=True, **options).x, whole.x)
    part = sample(energy, whole.sampler, init=then.x[40:70], first_chain=40, steps=3, seed=8)
    every = sample(energy, whole.sampler, init=then.x, steps=3, seed=8)
    assert torch.equal(part.x, every.x[40:70])


def test_what_is_given_is_not_adapted():
    energy, options = GaussianEnergy(0.0, STD), {"n_chains": 30, "warmup": 60, "steps": 1, "seed": 1}
    adapted = sample(energy, ChEESHMC(0.4, 1.5), 6, **options).sampler
    assert adapted.trajectory_length == 1.5
    assert adapted.step_size != 0.4
    assert adapted.mass is not None
    kept = ChEESHMC(0.4, 1.5, target_acceptance=None)
    assert sample(energy, kept, 6, **options).sampler is kept


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ChEESHMC(0.0), ValueError, "step_size must be finite and > 0, got 0.0"),
        (lambda: ChEESHMC(0.1, 0.0), ValueError, "trajectory_length must be finite and > 0, got 0.0"),
        (lambda: ChEESHMC(0.1, torch.ones(3)), TypeError, "trajectory_length must be a number or None, got Tensor"),
        (lambda: ChEESHMC(0.1, "long"), TypeError, "trajectory_length must be a number or None, got str"),
        (lambda: ChEESHMC(0.1, mass=-1.0), ValueError, "mass must be finite and > 0, got -1"),
        (lambda: ChEESHMC(0.1, target_acceptance=0.0), ValueError, r"target_acceptance must be in \(0, 1\), got 0"),
        (lambda: ChEESHMC(0.1, clamp=(1.0, 0.0)), ValueError, r"clamp needs lo < hi, got \(1.0, 0.0\)"),
        (
            lambda: sample(GaussianEnergy(), ChEESHMC(0.1), 3, steps=1),
            ValueError,
            "ChEESHMC has no trajectory_length yet: pass one, or a warm-up",
        ),
        (
            lambda: sample(GaussianEnergy(), ChEESHMC(0.1), 3, n_chains=1, warmup=10, steps=1),
            ValueError,
            "from several chains, got 1: pass trajectory_length=",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()
