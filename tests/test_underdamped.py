"""UnderdampedLangevin: its exact law on a Gaussian, its order, momenta, bounds, and chains that start again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from laws import fits_gaussian
from scipy import integrate, linalg

from fastebm import GaussianEnergy, Langevin, MLPEnergy, SumEnergy, UnderdampedLangevin, rng, sample
from fastebm.rng import Noise, Stream
from fastebm.samplers import underdamped
from fastebm.targets.base import View

pytestmark = pytest.mark.usefixtures("seeded")

SPLITTINGS = ("BAOAB", "ABOBA", "OBABO", "BABOBAB")
every_splitting = pytest.mark.parametrize("splitting", SPLITTINGS)

N = 20_000
ALPHA = 1e-7  # of each test of a law


# -- the law on a Gaussian ------------------------------------------------------------------------------------------


def linear_step(splitting, step, friction, curvature, mass, temperature):
    """F and Q of one step on E = curvature x^2 / 2: (x, p)' = F (x, p) + N(0, Q)."""
    c = math.exp(-friction * step / splitting.count("O"))
    parts = {
        "A": np.array([[1, step / splitting.count("A") / mass], [0, 1]]),
        "B": np.array([[1, 0], [-step / splitting.count("B") * curvature, 1]]),
        "O": np.diag([1, c]),
    }
    f, q = np.eye(2), np.zeros((2, 2))
    for part in splitting:
        a = parts[part]
        f, q = a @ f, a @ q @ a.T
        if part == "O":
            q[1, 1] += temperature * (1 - c**2) * mass
    return f, q


STD, MASS, TEMPERATURE, FRICTION, STEP = np.array([1.0, 0.5, 2.0]), np.array([1.0, 3.0, 0.4]), 1.4, 0.8, 0.7


def gaussian(splitting, steps=3):
    """Whether positions and momenta have their exact law, from x = 0 and fresh momenta."""
    mass = torch.tensor(MASS, dtype=torch.float32)
    sampler = UnderdampedLangevin(STEP, FRICTION, mass, math.sqrt(TEMPERATURE), splitting)
    energy = GaussianEnergy(0.0, torch.tensor(STD, dtype=torch.float32))
    result = sample(energy, sampler, init=torch.zeros(N, 3), steps=steps, seed=5)
    variances = []
    for std, m in zip(STD, MASS, strict=True):
        f, q = linear_step(splitting, STEP, FRICTION, std**-2, m, TEMPERATURE)
        covariance = np.diag([0, TEMPERATURE * m])
        for _ in range(steps):
            covariance = f @ covariance @ f.T + q
        variances.append(np.diag(covariance))
    of_x, of_p = torch.tensor(np.array(variances)).sqrt().T
    momentum = result.state.chains.carried["momentum"]
    return fits_gaussian(result.x, of_x, ALPHA), fits_gaussian(momentum, of_p, ALPHA)


@every_splitting
def test_positions_and_momenta_of_a_gaussian(splitting):
    assert gaussian(splitting) == (True, True)


MUTANTS = {
    "kicks of a whole step": ("BAOAB", View, "gradient", lambda self, x, of=View.gradient: 2 * of(self, x)),
    "too much noise": (
        "BAOAB", Noise, "normal",
        lambda self, stream, t, draw=Noise.normal: draw(self, stream, t) * (1.05 if stream == Stream.LANGEVIN else 1),
    ),
    "no O": ("BAOAB", underdamped, "_ornstein_uhlenbeck", lambda damping, noise_scale, x: (1.0, 0.0)),
    "O without friction": (
        "BAOAB", underdamped, "_ornstein_uhlenbeck",
        lambda damping, noise_scale, x, of=underdamped._ornstein_uhlenbeck: (1.0, of(damping, noise_scale, x)[1]),
    ),
    "one noise for both O": ("OBABO", Noise, "part", lambda self, k, of: self),
    "momenta from the noise of the step": (
        "BAOAB", Noise, "normal",
        lambda self, stream, t, draw=Noise.normal: draw(self, Stream.LANGEVIN, t),
    ),
    "momenta without masses": (
        "BAOAB", UnderdampedLangevin, "init",
        lambda self, target, x, noise, momentum=None, init=UnderdampedLangevin.init: init(
            self, target, x, noise, noise.normal(Stream.MOMENTUM, 0)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_rejects_mutants(name, monkeypatch):
    splitting, *replaced = MUTANTS[name]
    monkeypatch.setattr(*replaced)
    assert gaussian(splitting) != (True, True)


@pytest.mark.parametrize(
    ("splitting", "factor"),
    [("BAOAB", lambda s: 1.0), ("ABOBA", lambda s: 1.0), ("OBABO", lambda s: 1 / (1 - s))],
)
@pytest.mark.parametrize("step", [0.1, 0.9, 1.9])
def test_stationary_variance_of_a_gaussian(splitting, factor, step):
    """In units of the exact variance, with s = (step / 2)^2 curvature / mass. Two have no error at any stable step."""
    curvature, mass = 0.7, 0.8
    f, q = linear_step(splitting, step, 0.6, curvature, mass, TEMPERATURE)
    variance = linalg.solve_discrete_lyapunov(f, q)[0, 0]
    assert variance * curvature / TEMPERATURE == pytest.approx(factor(step**2 * curvature / mass / 4), rel=1e-9)


def test_baoab_stays_in_the_law_of_a_gaussian():
    """From the law itself, with a step at which ``Langevin`` would have a third more variance."""
    std = torch.tensor([1.0, 2.0])
    options = {"init": torch.randn(N, 2) * std, "steps": 40, "seed": 2}
    x = sample(GaussianEnergy(0.0, std), UnderdampedLangevin(1.0), **options).x
    assert fits_gaussian(x, std, ALPHA)
    other = sample(GaussianEnergy(0.0, std), UnderdampedLangevin(1.0, splitting="OBABO"), **options).x
    assert not fits_gaussian(other, std, ALPHA)


# -- the order of its bias ------------------------------------------------------------------------------------------


def two_wells(x):
    return (x.square() / 2 + torch.cos(2 * x)).sum(dim=1)


def bias(sampler):
    """Of the mean of cos 2x, from samples, and its Monte-Carlo error."""
    density = lambda x: math.exp(-(x**2) / 2 - math.cos(2 * x))  # noqa: E731
    total = integrate.quad(density, -9, 9)[0]
    truth = integrate.quad(lambda x: math.cos(2 * x) * density(x) / total, -9, 9)[0]
    n, every = 2 * N, round(2 / sampler.step_size)
    states = sample(two_wells, sampler, 1, n_chains=n, steps=110 * every, thin=every, seed=1).trajectory[:, 10:, 0]
    means = torch.cos(2 * states.double()).mean(dim=1)
    return float(means.mean()) - truth, float(means.std()) / math.sqrt(n)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "coarse", "order"),
    [
        (Langevin, 0.2, 1),
        (lambda step: UnderdampedLangevin(step, splitting="ABOBA"), 0.5, 2),
        (lambda step: UnderdampedLangevin(step, splitting="OBABO"), 0.5, 2),
    ],
    ids=["Langevin", "ABOBA", "OBABO"],
)
def test_order_of_the_bias(make, coarse, order):
    """Half the step divides the bias by 2^order. Each rules out the order of the others."""
    (more, error), (less, less_error) = bias(make(coarse)), bias(make(coarse / 2))
    spread = math.hypot(error / more, less_error / less) / math.log(2)
    assert abs(math.log2(more / less) - 1.1 * order) < 5.3 * spread + 0.3 < 0.8  # 10% for the next order


@pytest.mark.slow
def test_baoab_has_the_least_bias():
    (baoab, error), (obabo, _) = (bias(UnderdampedLangevin(0.4, splitting=name)) for name in ("BAOAB", "OBABO"))
    assert abs(baoab) + 5.3 * error < obabo / 3


# -- the arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitting", ["BAOAB", "OBABO"])
def test_steps_are_the_formula(splitting):
    """In float64, with the noise of the contract: the second O takes the blocks after those of the first."""
    n, dim, steps, h = 4, 5, 3, 0.3
    std = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
    friction = torch.linspace(0.2, 2.0, n, dtype=torch.float64)[:, None]
    mass, scale = torch.linspace(1.0, 3.0, dim, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0]).double()
    init = torch.randn(n, dim, dtype=torch.float64)
    sampler = UnderdampedLangevin(h, friction, mass, scale, splitting)
    found = sample(GaussianEnergy(0.0, std).double(), sampler, init=init, steps=steps, seed=3)

    def normal(stream, t, part=0):
        blocks = -(-dim // 4)
        return rng.normal(3, stream, torch.arange(n), t, 4 * blocks * 2, dtype=torch.float64)[
            :, 4 * blocks * part : 4 * blocks * part + dim
        ]

    x, p = init.clone(), 0.5 * mass.sqrt() * normal(Stream.MOMENTUM, 0)
    for t in range(steps):
        part = 0
        for letter in splitting:
            s = h / splitting.count(letter)
            if letter == "A":
                x = x + s * p / mass
            elif letter == "B":
                p = p - s * x / std**2
            else:
                c = torch.exp(-friction * s)
                p = c * p + scale[t] * ((1 - c**2) * mass).sqrt() * normal(Stream.LANGEVIN, t, part)
                part += 1
    torch.testing.assert_close(found.x, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.state.chains.carried["momentum"], p, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.info.temperature, scale**2)


@pytest.mark.parametrize(("splitting", "per_step"), [("BAOAB", 1), ("ABOBA", 1), ("OBABO", 1), ("BABOBAB", 2)])
def test_gradients_per_step(splitting, per_step):
    calls = []

    def energy(x):
        calls.append(x.requires_grad)
        return x.square().sum(dim=1)

    sample(energy, UnderdampedLangevin(0.1, splitting=splitting), 2, n_chains=3, steps=10)
    assert sum(calls) == 10 * per_step + 1


def test_without_noise_it_is_damped_descent():
    energy = GaussianEnergy(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.3]))
    init = torch.randn(20, 2)
    a = sample(energy, UnderdampedLangevin(0.2, 2.0, noise_scale=0.0), init=init, steps=300, seed=1)
    torch.testing.assert_close(a.x, energy.mean.expand(20, 2), rtol=0, atol=1e-5)
    b = sample(energy, UnderdampedLangevin(0.2, 2.0, noise_scale=0.0), init=init, steps=7, seed=1)
    c = sample(energy, UnderdampedLangevin(0.2, 2.0, noise_scale=0.0), init=init, steps=7, seed=2)
    assert torch.equal(b.x, c.x)


def test_a_schedule_of_no_steps():
    """The momenta are drawn with the temperature of the first step, which comes later."""
    options = {"init": torch.randn(5, 2), "seed": 3}
    none, noise_scale = torch.ones(0), torch.tensor([2.0, 1.0])
    start = sample(GaussianEnergy(), UnderdampedLangevin(0.1, noise_scale=none), steps=0, **options)
    then = sample(GaussianEnergy(), UnderdampedLangevin(0.1, noise_scale=noise_scale), init=start, steps=2)
    at_once = sample(GaussianEnergy(), UnderdampedLangevin(0.1, noise_scale=noise_scale), steps=2, **options)
    assert torch.equal(then.x, at_once.x)


def test_at_a_bound_the_momentum_is_reversed():
    """Free flight in [-1, 1]: a coordinate that leaves is put on the bound and flies back."""
    free = lambda x: 0.0 * x.sum(dim=1)  # noqa: E731
    sampler = UnderdampedLangevin(0.5, 1e-12, noise_scale=0.0, clamp=(-1.0, 1.0))
    start = sample(free, sampler, init=torch.tensor([[0.9, 0.0]]), steps=0)
    start.state.chains.carried["momentum"].copy_(torch.tensor([[1.0, 0.1]]))
    result = sample(free, sampler, init=start, steps=1)
    torch.testing.assert_close(result.x, torch.tensor([[0.75, 0.05]]))  # 0.9 -> 1 -> 0.75, by two drifts of 0.25
    torch.testing.assert_close(result.state.chains.carried["momentum"], torch.tensor([[-1.0, 0.1]]))


# -- chains that stop -----------------------------------------------------------------------------------------------


@every_splitting
def test_a_gradient_that_is_not_finite_stops_the_chain(splitting):
    """It keeps a state whose gradient and momentum are finite."""
    energy = lambda x: (x.square() / 2 + torch.where(x > 1.0, math.inf, 0.0) * x).sum(dim=1)  # noqa: E731
    sampler = UnderdampedLangevin(0.3, splitting=splitting)
    result = sample(energy, sampler, init=torch.zeros(500, 1), steps=20, seed=3, on_nonfinite="ignore")
    stopped = result.info.first_bad_step >= 0
    assert 50 < int(stopped.sum()) < 450
    assert bool(result.state.chains.carried["momentum"].isfinite().all())
    assert bool(result.x.isfinite().all())


@pytest.mark.parametrize("make", [GaussianEnergy, lambda: SumEnergy([MLPEnergy(2, (8,)), GaussianEnergy()])])
def test_chains_that_start_again_draw_their_momenta_anew(make):
    """A stopped chain has the momentum that sent it away, which must not send its next start away too."""
    energy, sampler, n = make(), UnderdampedLangevin(0.1, 0.01, mass=0.01), 1000
    start = sample(energy, sampler, 2, n_chains=n, steps=0, seed=1)
    start.state.chains.carried["momentum"][::2] = 3e38  # x overflows
    before = sample(energy, sampler, init=start, steps=4, on_nonfinite="ignore")
    assert (before.info.first_bad_step >= 0).nonzero().flatten().tolist() == list(range(0, n, 2))
    again = sample(energy, sampler, init=start, steps=4, on_nonfinite="reinit")
    others = sample(energy, sampler, init=before, steps=1, on_nonfinite="ignore").x[1::2]
    for result, policy in ((again, "raise"), (before, "reinit")):
        drawn = sample(energy, sampler, init=result, steps=0, on_nonfinite=policy).state.chains.carried["momentum"]
        assert 0.09 < float(drawn[::2].std()) < 0.11
        later = sample(energy, sampler, init=result, steps=1, on_nonfinite=policy)
        assert bool((later.info.first_bad_step < 0).all())
        assert torch.equal(later.x[1::2], others)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UnderdampedLangevin(0.0), ValueError, "step_size must be finite and > 0, got 0.0"),
        (lambda: UnderdampedLangevin(0.1, 0.0), ValueError, "friction must be finite and > 0, got 0.0"),
        (lambda: UnderdampedLangevin(0.1, noise_scale=-1.0), ValueError, "noise_scale must be finite and >= 0"),
        (lambda: UnderdampedLangevin(0.1, mass=0.0), ValueError, "mass must be finite and > 0, got 0.0"),
        (lambda: UnderdampedLangevin(0.1, splitting="BAO"), ValueError, "must read the same from both ends"),
        (lambda: UnderdampedLangevin(0.1, splitting="BAB"), ValueError, "and have A, B and O"),
        (lambda: UnderdampedLangevin(0.1, splitting="baoab"), ValueError, "as \"BAOAB\" does, got 'baoab'"),
        (lambda: UnderdampedLangevin(0.1, splitting=None), ValueError, "got None"),
        (
            lambda: sample(GaussianEnergy(), UnderdampedLangevin(0.1, mass=torch.ones(2)), 3, steps=1),
            ValueError,
            "mass must be a number or have one value for each of the 3 dims",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()
