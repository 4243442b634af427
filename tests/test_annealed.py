"""AnnealedLangevin: its law where the blurred density is known, its noise levels in parts of a call, and its errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from laws import fits_gaussian
from torch import nn

from fastebm import AnnealedLangevin, ChainPool, GaussianEnergy, Langevin, MLPEnergy, sample

pytestmark = pytest.mark.usefixtures("seeded")

SIGMAS = [2.0, 1.0, 0.5, 0.25]
N = 20_000
ALPHA = 1e-7  # of each test of a law


class Blurred(nn.Module):
    """A Gaussian of standard deviation std around mean, blurred by noise of standard deviation sigma."""

    def __init__(self, mean=0.0, std=0.3):
        super().__init__()
        self.mean, self.std = mean, std
        self.seen = []

    def forward(self, x, sigma):
        assert sigma.shape == (len(x),)
        assert sigma.dtype == x.dtype
        self.seen.append(float(sigma[0]))
        return ((x - self.mean).square().sum(dim=1)) / (2 * (self.std**2 + sigma**2))


def variance_after(sampler, std, variance):
    """Of a coordinate after all steps, exactly, from this variance at the start."""
    for sigma in SIGMAS:
        step = sampler.step_size * sigma**2 / SIGMAS[-1] ** 2
        for _ in range(sampler.steps_per_level):
            variance = (1 - step / 2 / (std**2 + sigma**2)) ** 2 * variance + step
    return variance


RIGHT = AnnealedLangevin(SIGMAS, 3, 0.03)


def fits_the_law(sampler):
    """Whether the states have the law that ``RIGHT`` gives them."""
    x = sample(Blurred(std=0.3), sampler, init=torch.zeros(N, 3), steps=12, seed=5).x
    return fits_gaussian(x, torch.full((3,), math.sqrt(variance_after(RIGHT, 0.3, 0.0))), ALPHA)


def test_the_law_of_a_blurred_gaussian():
    assert fits_the_law(RIGHT)


MUTANTS = {
    "another order of the levels": lambda sampler: dataclasses.replace(sampler, levels=sampler.levels.flip(0)),
    "steps that do not follow sigma": lambda sampler: dataclasses.replace(
        sampler, sigmas=[0.25 + s / 1e6 for s in (3, 2, 1, 0)]
    ),
    "one level is left out": lambda sampler: dataclasses.replace(
        sampler, levels=torch.where(sampler.levels == 2, 3, sampler.levels)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_rejects_mutants(name):
    assert not fits_the_law(MUTANTS[name](RIGHT))


def test_two_modes_get_their_weights():
    """A mixture with weights 0.8 and 0.2. Langevin at the last level alone keeps the weights of its start."""

    def energy(x, sigma):
        variance = 0.2**2 + sigma**2
        terms = [math.log(w) - (x[:, 0] - m) ** 2 / (2 * variance) for w, m in ((0.8, -2.0), (0.2, 2.0))]
        return -torch.logsumexp(torch.stack(terms), dim=0) + variance.log() / 2

    init = torch.linspace(-4, 4, 4000)[:, None]
    sigmas = torch.logspace(math.log10(4), math.log10(0.1), 12, dtype=torch.float64)
    x = sample(energy, AnnealedLangevin(sigmas, 30, 0.004), init=init, steps=360, seed=2).x
    left = int((x < 0).sum())
    assert abs(left / 4000 - 0.8) < 0.05  # levels are finitely many, so the weights are nearly right only
    plain = sample(energy, Langevin(0.004), init=init, condition=torch.full((4000,), 0.1), steps=360, seed=2).x
    assert abs(int((plain < 0).sum()) / 4000 - 0.5) < 0.05


# -- parts of a call ------------------------------------------------------------------------------------------------


def test_each_step_has_its_level():
    energy = Blurred()
    result = sample(energy, AnnealedLangevin([3.0, 1.0, 0.5], 2, 0.01), 2, n_chains=5, steps=6, seed=1)
    assert energy.seen == [3.0, 3.0, 1.0, 1.0, 0.5, 0.5, 0.5]  # energies at the last
    torch.testing.assert_close(result.energies, energy(result.x, torch.full((5,), 0.5)))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_parts_have_the_bits_of_the_whole(backend):
    sampler = AnnealedLangevin(SIGMAS, 5, 0.02)
    options = {"n_chains": 30, "seed": 3, "backend": backend}
    whole = sample(Blurred(), sampler, 2, steps=20, thin=1, **options)
    shown = sample(Blurred(), sampler, 2, steps=20, thin=1, progress=True, **options)
    warmed = sample(Blurred(), sampler, 2, warmup=7, steps=13, **options)
    first, then = (dataclasses.replace(sampler, levels=part) for part in (sampler.levels[:8], sampler.levels[8:]))
    resumed = sample(Blurred(), then, init=sample(Blurred(), first, 2, steps=8, **options), steps=12, backend=backend)
    for other in (shown, warmed, resumed):
        assert torch.equal(other.x, whole.x)
        assert torch.equal(other.energies, whole.energies)
    assert torch.equal(shown.trajectory, whole.trajectory)


def test_stopped_chains_keep_the_energy_of_the_last_level():
    def energy(x, sigma):
        return (x.square().sum(dim=1) / (2 * (0.1 + sigma**2))) * torch.where(x[:, 0] > 1.5, math.nan, 1.0)

    sampler = AnnealedLangevin(SIGMAS, 5, 0.02)
    options = {"n_chains": 200, "steps": 20, "seed": 3}
    result = sample(energy, sampler, 2, on_nonfinite="ignore", **options)
    stopped = result.info.first_bad_step >= 0
    assert 5 < int(stopped.sum()) < 195
    again = sample(energy, sampler, init=result, steps=20, on_nonfinite="ignore")
    assert torch.equal(again.x[stopped], result.x[stopped])
    assert torch.equal(again.energies.isfinite(), energy(again.x, torch.full((200,), 0.25)).isfinite())
    started = sample(energy, sampler, 2, on_nonfinite="reinit", **options)
    assert bool(started.x.isfinite().all())


def test_bounds_and_frozen_coordinates():
    init = torch.zeros(50, 2)
    init[:, 1] = 3.0
    frozen = torch.tensor([False, True])
    sampler = AnnealedLangevin(SIGMAS, 5, 0.05, clamp=(-0.2, 0.3))
    result = sample(Blurred(), sampler, init=init, frozen=frozen, steps=20, thin=1, seed=3)
    assert torch.equal(result.x[:, 1], init[:, 1])
    moving = result.trajectory[..., 0]
    assert (float(moving.min()), float(moving.max())) == pytest.approx((-0.2, 0.3))


def test_pools_take_it():
    pool = ChainPool(100, 2, seed=1, clamp=(-3.0, 3.0))
    energy = Blurred()
    x, _ = pool.sample(energy, 50, AnnealedLangevin(SIGMAS, 5, 0.02), 20)
    rows = pool.last.chains
    torch.testing.assert_close(pool.energies[rows], energy(x, torch.full((50,), SIGMAS[-1])))


def test_forms_of_the_noise_levels():
    for sigmas in ((2.0, 0.5), [2, 0.5], np.array([2.0, 0.5]), torch.tensor([2.0, 0.5]), [np.float32(2), 0.5]):
        assert AnnealedLangevin(sigmas, 1, 0.1).sigmas == (2.0, 0.5)


def test_float64_is_float64():
    result = sample(Blurred(), AnnealedLangevin(SIGMAS, 2, 0.02), init=torch.zeros(3, 2).double(), steps=8)
    assert result.x.dtype == result.energies.dtype == torch.float64


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 1.0], 5, 0.1), ValueError, "sigmas must decrease, got 1 after 1"),
        (([1.0, 2.0], 5, 0.1), ValueError, "sigmas must decrease, got 2 after 1"),
        (([1.0, 0.0], 5, 0.1), ValueError, "sigmas must be one or more finite numbers > 0, got"),
        (([1.0, math.nan], 5, 0.1), ValueError, "sigmas must be one or more finite numbers > 0, got"),
        (([], 5, 0.1), ValueError, r"sigmas must be one or more finite numbers > 0, got \[\]"),
        ((1.0, 5, 0.1), ValueError, "sigmas must be one or more finite numbers > 0, got 1.0"),
        (([1.0], 0, 0.1), ValueError, "steps_per_level must be >= 1, got 0"),
        (([1.0], 1.5, 0.1), TypeError, "steps_per_level must be an int, got 1.5"),
        (([1.0], 5, 0.0), ValueError, "step_size must be a finite number > 0, got 0.0"),
        (([1.0], 5, 0.1, (1.0, 0.0)), ValueError, "clamp needs lo < hi"),
        (([1.0], 5, 0.1, None, [0, 0]), TypeError, r"levels must be a \(n_steps,\) tensor of int64, got \[0, 0\]"),
        (([1.0], 5, 0.1, None, torch.tensor([0, 1])), ValueError, r"levels must be in \[0, 1\), got \[0, 1\]"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        AnnealedLangevin(*arguments)


SAMPLER = AnnealedLangevin([1.0, 0.5], 5, 0.1)


@pytest.mark.parametrize(
    ("energy", "given", "message"),
    [
        (Blurred(), {"steps": 9}, "a levels schedule must have one entry per step: got 10 entries for 9 steps"),
        (GaussianEnergy(), {"steps": 10}, "AnnealedLangevin gives the energy a noise level as its condition, and Gau"),
        (MLPEnergy(2, (8,)), {"steps": 10}, r"takes x only, .*: give it an argument \"sigma\", a tensor \(n_chains,\)"),
        (lambda x: x.square().sum(dim=1), {"steps": 10}, "takes x only"),
        (Blurred(), {"steps": 10, "condition": torch.ones(4)}, "and got condition= as well: leave it out"),
        (Blurred(), {"steps": 10, "labels": torch.ones(4).long()}, "and got labels= as well: leave it out"),
    ],
)
def test_calls_that_do_not_fit(energy, given, message):
    with pytest.raises(ValueError, match=message):
        sample(energy, SAMPLER, 2, n_chains=4, **given)
