"""NUTS: exact, tree by tree equal to a plain recursive version, and chains that wait for others keep their bits."""

from __future__ import annotations

import inspect
import math
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from laws import cells_of_box, fits_cells, fits_gaussian
from scipy import stats
from small_energies import Beyond

from fastebm import NUTS, GaussianEnergy, MLPEnergy, NonFiniteError, SumEnergy, sample
from fastebm.rng import Noise, Stream
from fastebm.samplers import nuts
from fastebm.targets.autograd import Autograd, Energy
from fastebm.targets.base import View

pytestmark = pytest.mark.usefixtures("seeded")

ALPHA = 1e-6  # of each test of a law
STD = torch.tensor([1.0, 0.5, 2.0])


def mutant(*changes: tuple[str, str]) -> type[NUTS]:
    """NUTS with changes to its source: (old, new)."""
    source = inspect.getsource(nuts)
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    module = types.ModuleType(nuts.__name__)
    module.__package__ = nuts.__package__
    exec(compile(source, "a mutant", "exec"), module.__dict__)
    return module.NUTS


# -- laws ----------------------------------------------------------------------------------------------------------


def gaussian(sampler, n=20_000, steps=5):
    """From the law itself, which each step must leave as it is. Returns the result and whether it did."""
    result = sample(GaussianEnergy(0.0, STD), sampler, init=torch.randn(n, 3) * STD, steps=steps, seed=5)
    return result, fits_gaussian(result.x, STD, ALPHA)


@pytest.mark.parametrize(("step_size", "most"), [(0.1, 1.0), (0.7, 0.95), (0.9, 0.7)])
def test_a_gaussian_stays_what_it_is(step_size, most):
    result, fits = gaussian(NUTS(step_size))
    assert fits
    assert most - 0.2 < float(result.info.acceptance.mean()) <= most
    assert float(result.info.divergences.max()) == 0


def test_a_gaussian_stays_what_it_is_with_a_mass_and_few_doublings():
    assert gaussian(NUTS(0.5, max_depth=2, mass=torch.tensor([0.5, 6.0, 1.0])))[1]


MUTANTS = {
    "points drawn with equal weights": ("log_w - log_e[:, i]", "-log_e[:, i]"),
    "all weights equal": ("        inside = active if", "        log_w = log_w * 0\n        inside = active if"),
    "always forwards": ("frac() < 0.5", "frac() >= 0"),
    "a sub-tree that has turned is joined": ("joined = new.whole &", "joined = active &"),
    "parts of sub-trees are not checked": ("while (i + 1) % size == 0:", "while False:"),
    "a sub-tree is always joined": (" & (log_u[:, 0] <= new.log_weight - log_weight)", ""),
    "momenta of another mass": ("* mass**0.5", "* 1.2"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_rejects_mutants(name):
    assert not gaussian(mutant(MUTANTS[name])(0.7))[1]


def test_the_law_rejects_a_wrong_sign_backwards_in_time():
    assert not gaussian(mutant(("in (p, -p)", "in (p, p)"))(0.9), 40_000, 10)[1]


def stays_in_a_box(sampler):
    """Start from the law of an MLP energy on [-2, 2]^2. Returns the result and whether the law stayed."""
    energy, expected = cells_of_box(MLPEnergy(2, (16, 16), "tanh"))
    x = torch.rand(200_000, 2) * 4 - 2
    with torch.no_grad():
        log_p = -energy(x)[:, 0]
    init = x[torch.rand(len(x)).log() < log_p - log_p.max()][:10_000]
    assert len(init) == 10_000
    result = sample(energy, sampler, init=init, steps=5, seed=1)
    return result, fits_cells(result.x, expected, ALPHA)


def test_an_mlp_in_a_box_stays_what_it_is():
    result, fits = stays_in_a_box(NUTS(0.6, clamp=(-2.0, 2.0)))
    assert fits
    assert float(result.info.divergences.max()) == 0  # to leave the box is none
    assert 0.2 < float(result.info.acceptance.mean()) < 0.8


def test_the_box_rejects_a_mutant():
    """A trajectory that leaves the box, and keeps what its sub-tree had found inside."""
    wrong = mutant(
        ("joined = new.whole &", "joined = active &"),
        ("log_w - log_e[:, i]", "torch.where(active, log_w, -math.inf) - log_e[:, i]"),
    )
    assert not stays_in_a_box(wrong(0.6, clamp=(-2.0, 2.0)))[1]


# -- trees ---------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    x: np.ndarray
    p: np.ndarray
    path: np.ndarray  # integral of the momentum from the start, by the trapezoidal rule
    log_weight: float


class Recursive:
    """One step of one chain, by recursion, on a Gaussian. h: the step size. mass: (dim,)."""

    def __init__(self, std, h, mass, start, p, *, by_momenta=False):
        self.std, self.h, self.mass, self.by_momenta = std, h, mass, by_momenta
        self.start = Point(start, p, np.zeros_like(p), 0.0)
        self.start.log_weight = -self.hamiltonian(start, p)

    def hamiltonian(self, x, p):
        return 0.5 * (x**2 / self.std**2).sum() + 0.5 * (p**2 / self.mass).sum()

    def leapfrog(self, point, h):
        half = point.p - h / 2 * point.x / self.std**2
        x = point.x + h * half / self.mass
        p = half - h / 2 * x / self.std**2
        return Point(x, p, point.path + h * (point.p + p) / 2, -self.hamiltonian(x, p))

    def turns(self, a, b):
        """By the way in x, as the library does, or by Betancourt's sum of momenta."""
        way = (b.path - a.path) / self.mass if self.by_momenta else b.x - a.x
        return a.p @ way <= 0 or b.p @ way <= 0

    def turned(self, early, late):
        """Two neighbouring lists of points, in order of time."""
        ends = [(early[0], late[-1]), (early[0], late[0]), (early[-1], late[-1])]
        return any(self.turns(*pair) for pair in ends)

    def built(self, point, sign, depth):
        """2^depth points beyond this one, or as many as it gets to, in order of time; and whether it is whole."""
        if depth == 0:
            new = self.leapfrog(point, sign * self.h)
            return [new], new.log_weight - self.start.log_weight > -1000
        near, whole = self.built(point, sign, depth - 1)
        if not whole:
            return near, False
        far, whole = self.built(near[-1 if sign > 0 else 0], sign, depth - 1)
        early, late = (near, far) if sign > 0 else (far, near)
        return early + late, whole and not self.turned(early, late)

    def step(self, numbers, max_depth):
        """numbers: uniform ones, those of nuts.py. Returns the new x, the number of leapfrog steps and of doublings."""
        points, chosen, steps = [self.start], self.start, 0
        for depth in range(max_depth):
            forward = math.floor(numbers[0] * 2 ** (depth + 1)) % 2 == 0
            new, whole = self.built(points[-1 if forward else 0], 1 if forward else -1, depth)
            steps += len(new)
            if not whole:
                return chosen.x, steps, depth
            weights, before = (
                np.exp([point.log_weight - self.start.log_weight for point in some]) for some in (new, points)
            )
            join, *others = numbers[2**depth + depth : 2 ** (depth + 1) + depth + 1]
            in_order_of_growth = others if forward else others[::-1]
            drawn = new[int(np.argmax(weights / -np.log(in_order_of_growth)))]
            chosen = drawn if join <= weights.sum() / before.sum() else chosen
            early, late = (points, new) if forward else (new, points)
            points = early + late
            if self.turned(early, late):
                return chosen.x, steps, depth + 1
        return chosen.x, steps, max_depth


@pytest.mark.parametrize("by_momenta", [False, True])
def test_trees_are_those_of_the_recursion(by_momenta):
    """With the sum of momenta in the check, nearly all trees are the same: the criteria differ by the step's error."""
    n, h, max_depth = 40, 0.15, 6
    std, mass = np.array([1.0, 0.25, 4.0]), np.array([0.7, 5.0, 0.1])  # the energy keeps float32 values
    sampler = NUTS(h, max_depth, torch.tensor(mass))
    view = View(Autograd(Energy(GaussianEnergy(0.0, torch.tensor(std)), (3,), torch.float64), None))
    noise = Noise(3, torch.arange(n), torch.full((n,), 11), 3, dtype=torch.float64, steps=4, by_definition=True)
    state = sampler.init(view, torch.randn(n, 3, dtype=torch.float64) * torch.tensor(std), noise)
    same, depths = [], set()
    for t in range(4):
        p = noise.normal(Stream.MOMENTUM, t) * torch.tensor(mass).sqrt()
        numbers = noise.copies(2**max_depth + max_depth).uniform(Stream.METROPOLIS, t).view(n, -1)
        new, info = sampler.step(view, state, noise, t)
        leaves = info.averaged()["gradients"]
        for i in range(n):
            tree = Recursive(std, h, mass, state.x[i].numpy(), p[i].numpy(), by_momenta=by_momenta)
            x, steps, depth = tree.step(numbers[i].tolist(), max_depth)
            same.append(steps == int(leaves[i]) and np.allclose(new.x[i], x, rtol=1e-9, atol=1e-9))
            depths.add(depth)
        state = new
    assert np.mean(same) == 1.0 if not by_momenta else np.mean(same) > 0.9
    assert depths >= {2, 3, 4, 5}


def test_depth_and_length_of_trajectories():
    for depth in (1, 3):
        short = sample(GaussianEnergy(), NUTS(1e-3, depth), 4, n_chains=50, steps=3, seed=2)
        assert short.info.gradients.tolist() == [2.0**depth - 1] * 50  # none has turned yet
    length = {}
    for scale in (1.0, 4.0):
        result = sample(GaussianEnergy(0.0, scale), NUTS(0.1), init=torch.randn(400, 4) * scale, steps=3, seed=2)
        length[scale] = float(result.info.gradients.mean())
    # A Gaussian turns after half a period, pi scale / step_size steps, and trajectories are powers of two.
    assert 10 < length[1.0] < 64
    assert 3 < length[4.0] / length[1.0] < 5


def test_no_trajectory_runs_through_whole_periods():
    """With one period for all coordinates, that is what happens without the checks between the halves."""
    init = 1.2 * torch.randn(60, 5)
    unchecked = mutant(("straight & _straight(a, c) & _straight(b, d)", "straight"))
    checked, unchecked = (
        float(sample(GaussianEnergy(0.0, 1.2), sampler, init=init, steps=6, seed=6).info.gradients.max())
        for sampler in (NUTS(0.5), unchecked(0.5))
    )
    assert checked <= 15
    assert unchecked > 30


# -- chains side by side -------------------------------------------------------------------------------------------

ENERGIES = {
    "mlp": lambda: SumEnergy([MLPEnergy(5, (16, 8)), GaussianEnergy()]),
    "autograd": lambda: lambda x: (x.square().square().sum(dim=1) + x.square().sum(dim=1)) / 4,
}


@pytest.mark.parametrize("name", ENERGIES)
def test_chains_that_wait_keep_their_bits(name):
    """Chains take from 1 to 127 gradients per step, so most of them wait, alone or with others."""
    energy, each = ENERGIES[name](), torch.logspace(-2, 0, 70)[:, None]
    options = {"steps": 4, "seed": 7}
    whole = sample(energy, NUTS(each, 7), 5, n_chains=70, **options)
    assert float(whole.info.gradients.max()) > 20 * float(whole.info.gradients.min())
    for rows in (slice(0, 1), slice(3, 50), slice(64, 70)):
        part = sample(
            energy, NUTS(each[rows], 7), 5, n_chains=rows.stop - rows.start, first_chain=rows.start, **options
        )
        assert torch.equal(part.x, whole.x[rows])
        assert torch.equal(part.energies, whole.energies[rows])
        assert torch.equal(part.info.acceptance, whole.info.acceptance[rows])
    first = sample(energy, NUTS(each, 7), 5, n_chains=70, **options | {"steps": 1})
    assert torch.equal(sample(energy, init=first, steps=3).x, whole.x)


def test_frozen_coordinates_give_the_conditional_law():
    energy = lambda x: (x.square().sum(dim=1) - 1.6 * x[:, 0] * x[:, 1]) / 0.72  # noqa: E731
    init = torch.randn(20_000, 2)
    result = sample(energy, NUTS(0.4), init=init, frozen=torch.tensor([False, True]), steps=8, seed=3)
    assert torch.equal(result.x[:, 1], init[:, 1])
    z = (result.x[:, 0] - 0.8 * init[:, 1]) / 0.6
    assert stats.kstest(z.numpy(), "norm").pvalue > ALPHA


# -- energies that are not numbers ---------------------------------------------------------------------------------


def test_infinite_energy_is_never_entered():
    result = sample(Beyond(math.inf), NUTS(0.5), init=torch.zeros(20_000, 1), steps=20, seed=4)
    assert float(result.x.max()) <= 1.0
    assert stats.kstest(result.x[:, 0].numpy(), stats.truncnorm(-math.inf, 1.0).cdf).pvalue > ALPHA
    assert 0 < float(result.info.divergences.mean()) < 1


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_other_energies_stop_the_chain(number):
    options = {"init": torch.zeros(300, 2), "steps": 6, "seed": 4}
    with pytest.raises(NonFiniteError, match=r"of 300 chains are not finite.*step_size = 0.5.*Try a smaller step_size"):
        sample(Beyond(number), NUTS(0.5), **options)
    result = sample(Beyond(number), NUTS(0.5), on_nonfinite="ignore", **options)
    stopped = result.info.first_bad_step >= 0
    assert 50 < int(stopped.sum())
    assert float(result.x.max()) <= 1.0
    assert bool(result.energies.isfinite().all())
    again = sample(Beyond(number), NUTS(0.5), on_nonfinite="reinit", **options)
    assert bool(again.x.isfinite().all())
    assert not torch.equal(again.x[stopped], result.x[stopped])


@pytest.mark.parametrize(
    ("energy", "step_size", "at"),
    [
        (lambda x: x.pow(4).sum(dim=1), 10.0, 1.0),  # H grows until it overflows
        (lambda x: x.pow(20).sum(dim=1), 1.0, 50.0),  # the first energy overflows
        (lambda x: x.tanh().sum(dim=1) * 0, 3e38, 1.0),  # the energy is flat, and the position overflows
    ],
)
def test_a_divergence_is_counted_and_stops_no_chain(energy, step_size, at):
    init = torch.full((20, 3), at)
    result = sample(energy, NUTS(step_size, mass=1e-4), init=init, steps=3, seed=1)
    assert torch.equal(result.x, init)
    assert result.info.divergences.tolist() == [1.0] * 20
    assert result.info.first_bad_step.tolist() == [-1] * 20


def test_float64_is_float64():
    energy = MLPEnergy(3, (8,)).double()
    result = sample(energy, NUTS(0.3, 3), n_chains=4, steps=3, seed=1)
    assert result.x.dtype == result.energies.dtype == result.info.gradients.dtype == torch.float64
    torch.testing.assert_close(result.energies, energy(result.x)[:, 0], rtol=1e-12, atol=1e-12)


# -- warm-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_chains", [1, 20])
def test_a_warmup_finds_step_size_and_mass(n_chains):
    std = torch.logspace(-0.5, 0.5, 8)
    result = sample(GaussianEnergy(0.0, std), NUTS(0.1), 8, n_chains=n_chains, warmup=120, steps=30, seed=1)
    assert abs(float(result.info.acceptance.mean()) - 0.8) < (0.15 if n_chains == 1 else 0.07)
    assert float((result.sampler.mass**-0.5 / std).log().abs().max()) < (0.7 if n_chains == 1 else 0.15)
    assert float(result.info.gradients.mean()) < 12  # as on a round Gaussian, where few steps are enough


def test_what_is_given_is_not_adapted():
    options = {"n_chains": 4, "warmup": 40, "steps": 1, "seed": 1}
    kept = sample(GaussianEnergy(), NUTS(0.4, target_acceptance=None), 3, **options).sampler
    assert (kept.step_size, kept.mass) == (0.4, None)
    kept = sample(GaussianEnergy(), NUTS(0.4, mass=2.0), 3, **options).sampler
    assert kept.step_size != 0.4
    assert kept.mass == 2.0


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NUTS(), TypeError, "step_size"),
        (lambda: NUTS(0.0), ValueError, "step_size must be finite and > 0, got 0.0"),
        (lambda: NUTS(0.1, 0), ValueError, "max_depth must be 1 to 12, got 0"),
        (lambda: NUTS(0.1, 13), ValueError, "max_depth must be 1 to 12, got 13"),
        (lambda: NUTS(0.1, 2.0), TypeError, "max_depth must be an int, got 2.0"),
        (lambda: NUTS(0.1, True), TypeError, "max_depth must be an int, got True"),
        (lambda: NUTS(0.1, mass=-1), ValueError, "mass must be finite and > 0, got -1"),
        (lambda: NUTS(0.1, target_acceptance=1.0), ValueError, r"target_acceptance must be in \(0, 1\), got 1.0"),
        (lambda: NUTS(0.1, clamp=(1.0, 0.0)), ValueError, r"clamp needs lo < hi, got \(1.0, 0.0\)"),
        (
            lambda: sample(GaussianEnergy(), NUTS(0.1, mass=torch.ones(2)), 3, steps=1),
            ValueError,
            "mass must be a number or have one value for each of the 3 dims",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_max_depth_may_be_a_numpy_integer():
    assert NUTS(0.1, np.int64(3)).max_depth == 3
