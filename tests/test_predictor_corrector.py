"""PredictorCorrector: its law where the blurred density is known, its steps by hand, parts of a call, and errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from laws import fits_gaussian
from test_annealed import Blurred

from fastebm import GaussianEnergy, MLPEnergy, PredictorCorrector, sample
from fastebm.rng import Stream, normal

pytestmark = pytest.mark.usefixtures("seeded")

SIGMAS = [8.0, 3.0, 1.0, 0.4]
N = 20_000
ALPHA = 1e-5  # of each test of a law


def variance_after(sampler, std, variance):
    """Of a coordinate after all steps, exactly, from this variance at the start."""
    before = math.inf
    for sigma in sampler.sigmas:
        if before == math.inf:
            variance = variance + sigma**2
        else:
            d = before**2 - sigma**2
            variance = (1 - d / (std**2 + before**2)) ** 2 * variance + d
        step = (2 * sampler.snr * sigma) ** 2
        for _ in range(sampler.corrector_steps):
            variance = (1 - step / 2 / (std**2 + sigma**2)) ** 2 * variance + step
        before = sigma
    return variance


def fits_the_law(sampler, expected, energy=None):
    """Whether the states have the law that ``expected`` gives them."""
    x = sample(energy or Blurred(std=0.7), sampler, init=torch.zeros(N, 3), steps=4, seed=5).x
    return fits_gaussian(x, torch.full((3,), math.sqrt(variance_after(expected, 0.7, 0.0))), ALPHA)


RIGHT = PredictorCorrector(SIGMAS, 1, 0.3)


@pytest.mark.parametrize("sampler", [PredictorCorrector(SIGMAS, 0), RIGHT, PredictorCorrector(SIGMAS, 3)])
def test_the_law_of_a_blurred_gaussian(sampler):
    assert fits_the_law(sampler, sampler)


class OfLevel(Blurred):
    """Blurred by another standard deviation than it is told."""

    def __init__(self, function):
        super().__init__(std=0.7)
        self.function = function

    def forward(self, x, sigma):
        return super().forward(x, self.function(sigma))


MUTANTS = {
    "no corrector": (PredictorCorrector(SIGMAS, 0), None),
    "another step of the corrector": (PredictorCorrector(SIGMAS, 1, 0.3 / math.sqrt(2)), None),
    "one level is left out": (PredictorCorrector([8.0, 3.0, 0.41, 0.4], 1, 0.3), None),
    "sigma without its square": (RIGHT, OfLevel(torch.sqrt)),
    "twice the sigma": (RIGHT, OfLevel(lambda sigma: 2 * sigma)),
    "the variance in place of sigma": (RIGHT, OfLevel(torch.square)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_rejects_mutants(name):
    sampler, energy = MUTANTS[name]
    assert not fits_the_law(sampler, RIGHT, energy)


def test_with_many_levels_it_has_the_law_of_the_data():
    """The steps' bias is below what 20,000 draws show."""
    sigmas = torch.logspace(1, -2, 300)
    x = sample(Blurred(mean=0.5, std=0.7), PredictorCorrector(sigmas), 2, n_chains=N, steps=300, seed=2).x
    assert fits_gaussian(x - 0.5, torch.full((2,), math.sqrt(0.7**2 + 1e-4)), ALPHA)


def test_steps_by_hand():
    energy, n = Blurred(mean=0.2, std=0.7), 5
    sampler = PredictorCorrector([3.0, 1.0], 1, 0.2)
    start = torch.randn(n, 6, dtype=torch.float64)
    found = sample(energy, sampler, init=start, steps=2, seed=7, thin=1).trajectory
    chains, x = torch.arange(n), start
    for t, sigma in enumerate((3.0, 1.0)):
        # parts 0 and 1 of two have the blocks 0, 1 and 2, 3: of 6 dims each
        xi = normal(7, Stream.LANGEVIN, chains, t, 16, dtype=torch.float64)
        if t == 0:
            x = x + 3.0 * xi[:, :6]
        else:
            x = x - 8.0 * (x - 0.2) / (0.49 + 9.0) + math.sqrt(8.0) * xi[:, :6]
        step = (0.4 * sigma) ** 2
        x = x - step / 2 * (x - 0.2) / (0.49 + sigma**2) + math.sqrt(step) * xi[:, 8:14]
        torch.testing.assert_close(found[:, t], x)


def test_two_modes_get_their_weights():
    """A mixture with weights 0.8 and 0.2, from a start in between."""

    def energy(x, sigma):
        variance = 0.2**2 + sigma**2
        terms = [math.log(w) - (x[:, 0] - m) ** 2 / (2 * variance) for w, m in ((0.8, -2.0), (0.2, 2.0))]
        return -torch.logsumexp(torch.stack(terms), dim=0) + variance.log() / 2

    sigmas = torch.logspace(math.log10(20), -2, 200, dtype=torch.float64)
    x = sample(energy, PredictorCorrector(sigmas), init=torch.zeros(4000, 1), steps=200, seed=2).x
    left = float((x < 0).double().mean())
    assert abs(left - 0.8) < 5 * math.sqrt(0.16 / 4000)


# -- parts of a call ------------------------------------------------------------------------------------------------


def test_each_step_has_its_levels():
    energy = Blurred()
    result = sample(energy, PredictorCorrector([3.0, 1.0, 0.5], 2), 2, n_chains=5, steps=3, seed=1)
    assert energy.seen == [3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]  # energies at the last
    torch.testing.assert_close(result.energies, energy(result.x, torch.full((5,), 0.5)))
    assert bool((result.info.grad_norm > 0).all())
    first = sample(energy, PredictorCorrector([3.0], 0), 2, n_chains=5, steps=1, seed=1)
    assert bool(first.info.grad_norm.isnan().all())


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_parts_have_the_bits_of_the_whole(backend):
    sampler = PredictorCorrector(torch.logspace(1, -1, 20))
    options = {"n_chains": 30, "seed": 3, "backend": backend}
    whole = sample(Blurred(), sampler, 2, steps=20, **options)
    shown = sample(Blurred(), sampler, 2, steps=20, progress=True, **options)
    first, then = (dataclasses.replace(sampler, levels=part) for part in (sampler.levels[:8], sampler.levels[8:]))
    resumed = sample(Blurred(), then, init=sample(Blurred(), first, 2, steps=8, **options), steps=12, backend=backend)
    half = sample(Blurred(), sampler, 2, first_chain=15, steps=20, **{**options, "n_chains": 15})
    for other in (shown, resumed):
        assert torch.equal(other.x, whole.x)
        assert torch.equal(other.energies, whole.energies)
    assert torch.equal(half.x, whole.x[15:])
    expected = sample(Blurred(), sampler, 2, steps=20, n_chains=30, seed=3, backend="reference")
    torch.testing.assert_close(whole.x, expected.x, rtol=1e-4, atol=1e-4)


def test_a_chain_that_fails_in_the_predictor_stays_at_its_last_finite_state():
    def energy(x, sigma):
        bad = (sigma > 0.9) & (x[:, 0] > 0)
        return (x.square().sum(dim=1) / (2 * (0.1 + sigma**2))) * torch.where(bad, math.nan, 1.0)

    ignored = {"seed": 3, "on_nonfinite": "ignore"}
    first = sample(energy, PredictorCorrector([1.0], 0), init=torch.zeros(200, 2), steps=1, **ignored)
    bad = first.x[:, 0] > 0
    sampler = PredictorCorrector([1.0, 0.5], 0)
    result = sample(energy, sampler, init=torch.zeros(200, 2), steps=2, **ignored)
    assert torch.equal(result.info.first_bad_step >= 0, bad)
    assert torch.equal(result.x[bad], first.x[bad])
    corrected = dataclasses.replace(sampler, corrector_steps=2, levels=torch.tensor([1]))
    again = sample(energy, corrected, init=first.x, steps=1, **ignored)
    assert torch.equal(again.info.first_bad_step >= 0, bad)
    assert torch.equal(again.x[bad], first.x[bad])
    assert not bool((again.x[~bad] == first.x[~bad]).any())


def test_bounds_and_frozen_coordinates():
    init = torch.zeros(50, 2)
    init[:, 1] = 3.0
    sampler = PredictorCorrector(SIGMAS, clamp=(-0.2, 0.3))
    result = sample(Blurred(), sampler, init=init, frozen=torch.tensor([False, True]), steps=4, thin=1, seed=3)
    assert torch.equal(result.x[:, 1], init[:, 1])
    moving = result.trajectory[..., 0]
    assert (float(moving.min()), float(moving.max())) == pytest.approx((-0.2, 0.3))


def test_float64_is_float64():
    result = sample(Blurred(), PredictorCorrector(SIGMAS), init=torch.zeros(3, 2).double(), steps=4)
    assert result.x.dtype == result.energies.dtype == torch.float64


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0],), ValueError, "sigmas must decrease, got 2 after 1"),
        (([1.0, 0.0],), ValueError, "sigmas must be one or more finite numbers > 0, got"),
        (([1.0], -1), ValueError, "corrector_steps must be >= 0, got -1"),
        (([1.0], 1.5), TypeError, "corrector_steps must be an int, got 1.5"),
        (([1.0], 1, 0.0), ValueError, "snr must be finite and > 0, got 0.0"),
        (([1.0], 1, True), TypeError, "snr must be a number, got True"),
        (([1.0], 1, 0.1, (1.0, 0.0)), ValueError, "clamp needs lo < hi"),
        (([1.0], 1, 0.1, None, torch.tensor([1])), ValueError, r"levels must be in \[0, 1\), got \[1\]"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        PredictorCorrector(*arguments)


@pytest.mark.parametrize(
    ("energy", "given", "message"),
    [
        (Blurred(), {"steps": 9}, "a levels schedule must have one entry per step: got 4 entries for 9 steps"),
        (GaussianEnergy(), {"steps": 4}, "PredictorCorrector gives the energy a noise level as its condition, and Gau"),
        (MLPEnergy(2, (8,)), {"steps": 4}, r"takes x only, .*: give it an argument \"sigma\", a tensor \(n_chains,\)"),
        (Blurred(), {"steps": 4, "condition": torch.ones(4)}, "and got condition= as well: leave it out"),
    ],
)
def test_calls_that_do_not_fit(energy, given, message):
    with pytest.raises(ValueError, match=message):
        sample(energy, PredictorCorrector(SIGMAS), 2, n_chains=4, **given)
