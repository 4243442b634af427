"""HMC: its law and what breaks it, the leapfrog, divergences, warm-up. tests/test_samplers.py has what all share."""

from __future__ import annotations

import math

import pytest
import torch
from laws import cells_of_box, fits_cells, fits_gaussian
from scipy import stats
from torch import nn

from fastebm import HMC, GaussianEnergy, MLPEnergy, NonFiniteError, sample
from fastebm.rng import Noise
from fastebm.samplers import hmc
from fastebm.samplers.hmc import Trajectory, leapfrog
from fastebm.targets.autograd import Autograd, Energy
from fastebm.targets.base import View
from fastebm.targets.remembered import Point

pytestmark = pytest.mark.usefixtures("seeded")

N = 20_000
ALPHA = 1e-6  # of each test of a law
STD, MASS = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([2.0, 3.0, 0.5])


# -- laws ----------------------------------------------------------------------------------------------------------


def gaussian(step_size, n_leapfrog=3, steps=6, mass=MASS):
    """From the law itself, which each step must leave as it is."""
    result = sample(
        GaussianEnergy(0.0, STD), HMC(step_size, n_leapfrog, mass), init=torch.randn(N, 3) * STD, steps=steps, seed=5
    )
    return result, fits_gaussian(result.x, STD, ALPHA)


@pytest.mark.parametrize(("step_size", "least", "most"), [(0.3, 0.95, 1.0), (1.2, 0.4, 0.9), (1.6, 0.1, 0.7)])
def test_a_gaussian_stays_what_it_is(step_size, least, most):
    result, fits = gaussian(step_size)
    assert fits
    assert least < float(result.info.acceptance.mean()) < most
    assert float(result.info.divergences.max()) == 0
    assert result.info.gradients.tolist() == [3.0] * N


def euler(target, state, momentum, h, n_leapfrog, speeds=None):
    """The leapfrog without its half steps."""
    x, v = state.x, momentum
    for _ in range(n_leapfrog):
        v = v - h * target.gradient(x)
        x = x + h * v
    energy, gradient = target.value_and_gradient(x)
    log_accept = state.energy - energy + (momentum.square() - v.square()).sum(dim=1) / 2
    if speeds is not None:
        speeds.append(v.norm(dim=1))
    return Trajectory(x, energy, gradient, v, n_leapfrog, log_accept)


def without_kinetic_energy(target, state, momentum, h, n_leapfrog, speeds=None):
    end = leapfrog(target, state, momentum, h, n_leapfrog, speeds)
    return end._replace(log_accept=state.energy - end.energy)


def normal(change):
    return lambda patch: patch.setattr(
        Noise, "normal", lambda self, stream, t, draw=Noise.normal: change(self, stream, t, draw)
    )


MUTANTS = {
    "accepts always": lambda patch: patch.setattr(Noise, "uniform", lambda self, stream, t: torch.full((N,), 1e-38)),
    "no kinetic energy in the test": lambda patch: patch.setattr(hmc, "leapfrog", without_kinetic_energy),
    "the same momentum in every step": normal(lambda self, stream, t, draw: draw(self, stream, 0)),
    "no half steps": lambda patch: patch.setattr(hmc, "leapfrog", euler),
    "momentum of another mass": normal(lambda self, stream, t, draw: draw(self, stream, t) * 1.3),
    "momentum without the mass": normal(lambda self, stream, t, draw: draw(self, stream, t) / MASS.sqrt()),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_rejects_mutants(mutant, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    assert not gaussian(1.2)[1]


def test_an_mlp_in_a_box_with_a_mass():
    energy, expected = cells_of_box(MLPEnergy(2, (16, 16), "tanh"))
    sampler = HMC(0.4, 4, torch.tensor([2.0, 0.5]), clamp=(-2.0, 2.0))
    result = sample(energy, sampler, n_chains=6000, steps=40, seed=1)
    assert 0.2 < float(result.info.acceptance.mean()) < 0.9
    assert fits_cells(result.x, expected, ALPHA)


class Beyond(nn.Module):
    """A Gaussian whose energy is this number beyond 1, with a gradient as if it were not."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        value = x.square().sum(dim=1) / 2
        return value + torch.where((x > 1.0).any(dim=1), self.number, 0.0)


def test_infinite_energy_is_never_entered():
    result = sample(Beyond(math.inf), HMC(0.5, 4), init=torch.zeros(N, 1), steps=60, seed=4)
    assert float(result.x.max()) <= 1.0
    assert float(result.info.divergences.max()) == 0
    assert stats.kstest(result.x[:, 0].numpy(), stats.truncnorm(-math.inf, 1.0).cdf).pvalue > ALPHA


# -- the leapfrog --------------------------------------------------------------------------------------------------


def double_well(x):
    return (x[:, 0].square() - 1).square() + (x[:, 1] - 0.3 * x[:, 0]).square() * 2


def started(energy=double_well, n=50):
    target = View(Autograd(Energy(as_module(energy), (2,), torch.float64)))
    x = torch.randn(n, 2, dtype=torch.float64)
    return target, Point(x, *target.value_and_gradient(x)), torch.randn(n, 2, dtype=torch.float64)


def as_module(energy):
    module = nn.Module()
    module.forward = energy
    return module


def energy_error(h):
    torch.manual_seed(1)
    target, state, momentum = started()
    end = leapfrog(target, state, momentum, torch.tensor(h, dtype=torch.float64), round(1.6 / h))
    error = end.energy + end.momentum.square().sum(dim=1) / 2 - state.energy - momentum.square().sum(dim=1) / 2
    torch.testing.assert_close(end.log_accept, -error)
    return error


def test_the_error_of_the_energy_is_of_second_order():
    coarse, fine = energy_error(0.02).abs().mean(), energy_error(0.01).abs().mean()
    assert 3.8 < float(coarse / fine) < 4.2


def test_a_trajectory_runs_backwards():
    target, state, momentum = started()
    h = torch.tensor([0.2, 0.1], dtype=torch.float64)
    end = leapfrog(target, state, momentum, h, 12)
    assert float((end.x - state.x).abs().mean()) > 0.3
    for turned in (
        leapfrog(target, Point(*end[:3]), -end.momentum, h, 12),
        leapfrog(target, Point(*end[:3]), end.momentum, -h, 12),
    ):
        torch.testing.assert_close(turned.x, state.x, rtol=0, atol=1e-11)
        torch.testing.assert_close(turned.momentum.abs(), momentum.abs(), rtol=0, atol=1e-11)


def test_chains_with_other_numbers_of_steps():
    target, state, momentum = started(n=7)
    h, numbers = torch.tensor(0.15, dtype=torch.float64), torch.tensor([1, 5, 3, 1, 9, 9, 2])
    together = leapfrog(target, state, momentum, h, numbers)
    for i, number in enumerate(numbers.tolist()):
        alone = leapfrog(target, state, momentum, h, number)
        for found, expected in zip((*together[:4], together.log_accept), (*alone[:4], alone.log_accept), strict=True):
            assert torch.equal(found[i], expected[i])


@pytest.mark.parametrize("wall", [math.inf, 0.5])
def test_one_gradient_per_leapfrog_step(wall):
    """Also if some trajectories end behind a wall."""
    counts = {"value": 0, "gradient": 0}

    def energy(x):
        counts["gradient" if torch.is_grad_enabled() else "value"] += 1
        return x.square().sum(dim=1) + torch.where(x[:, 0] > wall, math.inf, 0.0)

    result = sample(energy, HMC(0.1, 7), init=torch.zeros(20, 3), steps=4, seed=1)
    assert float(result.info.divergences.max()) == 0
    assert counts == {"value": 0, "gradient": 1 + 4 * 7}


def test_a_mass_changes_the_coordinates():
    """With M = 1 / std^2, HMC on a Gaussian is HMC on the standard normal."""
    init = torch.randn(50, 3)
    scaled = sample(GaussianEnergy(0.0, STD), HMC(0.4, 5, 1 / STD**2), init=init * STD, steps=10, seed=1)
    plain = sample(GaussianEnergy(), HMC(0.4, 5), init=init, steps=10, seed=1)
    torch.testing.assert_close(scaled.x / STD, plain.x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled.info.acceptance, plain.info.acceptance, rtol=1e-4, atol=1e-5)


def test_settings_by_step_and_by_chain():
    energy = MLPEnergy(5, (16, 8))
    schedule, each = torch.linspace(0.6, 0.1, 8), torch.linspace(0.1, 0.9, 6)[:, None]
    options = {"steps": 8, "seed": 9}
    by_chain = sample(energy, HMC(each, 3, torch.linspace(0.5, 2.0, 5)), n_chains=6, **options)
    for i in range(6):
        one = HMC(float(each[i]), 3, torch.linspace(0.5, 2.0, 5))
        assert torch.equal(sample(energy, one, n_chains=1, first_chain=i, **options).x[0], by_chain.x[i])
    by_step = sample(energy, HMC(schedule, 3), n_chains=6, **options)
    then = sample(energy, HMC(schedule[:3], 3), n_chains=6, steps=3, seed=9)
    assert torch.equal(sample(energy, HMC(schedule[3:], 3), init=then, steps=5).x, by_step.x)


# -- trajectories that diverge, and energies that are not finite -----------------------------------------------------


def quartic(x):
    return x.pow(4).sum(dim=1)


@pytest.mark.parametrize("start", [0.5, 5.0, 1e3, 1e9])
def test_divergences_are_rejected_and_counted(start):
    """Overflow comes sooner or later, on the way or at the end."""
    init = torch.full((20, 2), start)
    for n_leapfrog in (1, 2, 3, 4, 10):
        result = sample(quartic, HMC(10.0, n_leapfrog), init=init, steps=2, seed=1)
        assert result.info.divergences.tolist() == [1.0] * 20
        assert result.info.acceptance.tolist() == [0.0] * 20
        assert torch.equal(result.x, init)


def test_chains_that_diverge_do_not_disturb_the_others():
    init = torch.randn(40, 2)
    init[::4] = 1e4
    result = sample(quartic, HMC(0.1, 5), init=init, steps=10, seed=1)
    alone = sample(quartic, HMC(0.1, 5), init=init[1:2], steps=10, seed=1, first_chain=1)
    assert torch.equal(result.x[1:2], alone.x)
    assert torch.equal(result.info.divergences > 0, torch.arange(40) % 4 == 0)


def test_a_fall_into_a_deep_minimum_is_no_divergence():
    """Kinetic energy grows by far more than 1000 there, and the total energy is kept."""
    result = sample(GaussianEnergy(0.0, 0.01), HMC(1e-3, 15), init=torch.full((20, 2), 3.0), steps=1, seed=1)
    assert float(result.info.divergences.max()) == 0
    assert float(result.x.abs().max()) < 1.0


class Rooted(nn.Module):
    """NaN below -1. Close to -1 it is so steep that some trajectories diverge."""

    def forward(self, x):
        return x.square().sum(dim=1) / 2 - (x + 1).log().sum(dim=1)


@pytest.mark.parametrize("energy", [Beyond(math.nan), Beyond(-math.inf), Rooted()])
def test_other_energies_stop_the_chain(energy):
    options = {"init": torch.zeros(300, 2), "steps": 6, "seed": 4}
    with pytest.raises(NonFiniteError, match=r"of 300 chains are not finite.*step_size = 0.6"):
        sample(energy, HMC(0.6, 2), **options)
    result = sample(energy, HMC(0.6, 2), on_nonfinite="ignore", **options)
    stopped = result.info.first_bad_step >= 0
    assert 20 < int(stopped.sum()) < 300
    assert bool(result.energies.isfinite().all())
    assert float(result.info.divergences[stopped].max()) == 0 or isinstance(energy, Rooted)
    again = sample(energy, HMC(0.6, 2), on_nonfinite="reinit", **options)
    assert not torch.equal(again.x[stopped], result.x[stopped])
    assert torch.equal(again.x[~stopped], result.x[~stopped])


def test_ends_outside_are_rejected_whatever_their_energy():
    result = sample(Beyond(math.nan), HMC(0.6, 2, clamp=(-1.0, 1.0)), init=torch.zeros(300, 2), steps=10, seed=4)
    assert float(result.x.abs().max()) <= 1.0
    assert bool((result.info.first_bad_step < 0).all())


# -- warm-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1e-3, 30.0])
def test_a_warmup_finds_step_size_and_mass(start):
    std = torch.logspace(-1, 0, 8)  # a condition number of 100
    result = sample(GaussianEnergy(0.0, std), HMC(start, 5), 8, n_chains=100, warmup=400, steps=50, seed=1)
    assert 0.75 < float(result.info.acceptance.mean()) < 0.85
    assert float((result.sampler.mass.rsqrt() / std).log().abs().max()) < 0.1
    assert float(result.info.divergences.max()) == 0
    given = sample(GaussianEnergy(0.0, std), HMC(0.1, 5, mass=1.0), 8, n_chains=100, warmup=100, steps=1, seed=1)
    assert given.sampler.mass == 1.0
    assert given.sampler.step_size != 0.1
    kept = HMC(0.1, 5, target_acceptance=None)
    assert sample(GaussianEnergy(0.0, std), kept, 8, warmup=10, steps=1).sampler is kept


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HMC(0.0), ValueError, "step_size must be finite and > 0, got 0.0"),
        (lambda: HMC("0.1"), TypeError, "step_size must be a float or a tensor, got str"),
        (lambda: HMC(0.1, 0), ValueError, "n_leapfrog must be >= 1, got 0"),
        (lambda: HMC(0.1, 2.0), TypeError, "n_leapfrog must be an int, got 2.0"),
        (lambda: HMC(0.1, True), TypeError, "n_leapfrog must be an int, got True"),
        (lambda: HMC(0.1, mass=0.0), ValueError, "mass must be finite and > 0, got 0"),
        (lambda: HMC(0.1, mass="heavy"), TypeError, "mass must be None, a number or a tensor"),
        (lambda: HMC(0.1, target_acceptance=1.0), ValueError, r"target_acceptance must be in \(0, 1\), got 1.0"),
        (lambda: HMC(0.1, clamp=(1.0, 0.0)), ValueError, r"clamp needs lo < hi, got \(1.0, 0.0\)"),
        (
            lambda: sample(GaussianEnergy(), HMC(0.1, mass=torch.ones(2)), 3, steps=1),
            ValueError,
            "mass must be a number or have one value for each of the 3 dims",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()
