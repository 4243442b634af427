"""What the warm-ups of all samplers share (samplers/adaptation.py)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fastebm.bench.problem import Banana, gradient_of

from fastebm import HMC, MALA, NUTS, ChEESHMC, GaussianEnergy, ParallelTempering, TemperedTransitions, sample
from fastebm.samplers.adaptation import Scale, total

pytestmark = pytest.mark.usefixtures("seeded")


def test_a_total_does_not_depend_on_the_number_of_threads():
    v, n_threads = torch.rand(200_000, dtype=torch.float64), torch.get_num_threads()
    totals = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        totals.append((float(total(v)), float(total(v[:, None]))))
    torch.set_num_threads(n_threads)
    assert len({*totals}) == 1
    assert totals[0][0] == totals[0][1] == pytest.approx(float(v.sum()), rel=1e-12)


# -- the scale -----------------------------------------------------------------------------------------------------


def scale_of(x, gradient):
    """The squared scales that these states and gradients give: by gradients, and the variance."""
    scale = Scale()
    for rows, gradients in zip(x.split(1000), gradient.split(1000), strict=True):
        scale.update(torch.full_like(rows, math.nan), rows, gradients)
    return scale.squared(by_gradients=True), scale.squared(by_gradients=False)


def test_the_scale_of_a_gaussian_is_exact_for_any_states():
    """The gradients are x / std^2, wherever the chains are."""
    std = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    x = 50 * torch.rand(20_000, 3, dtype=torch.float64).square() + 7
    found, variance = scale_of(x, x / std**2)
    torch.testing.assert_close(found, std**2, rtol=1e-3, atol=0.0)  # 1e-3 has 5 / 20,005 of the weight
    torch.testing.assert_close(variance, x.var(dim=0), rtol=1e-3, atol=0.0)


def test_the_scale_of_the_banana():
    """E = z_1^2 / 2 + z_2^2 / 2, so dE/dx_1 = z_1 (1 - 2 z_2) and dE/dx_2 = 2 z_2: their variances are 5 and 4."""
    z = torch.randn(400_000, 2, dtype=torch.float64)
    x = Banana().draw(z)
    found, variance = scale_of(x, gradient_of(Banana(), x))
    variances = torch.tensor(Banana.variances, dtype=torch.float64)
    # The fourth moments give standard errors of at most 0.44%: five of them.
    torch.testing.assert_close(found, (variances / torch.tensor([5.0, 4.0])).sqrt(), rtol=0.022, atol=0.0)
    torch.testing.assert_close(variance, variances, rtol=0.022, atol=0.0)


@pytest.mark.parametrize("slope", [0.0, 1.0], ids=["flat", "a Gaussian"])
def test_within_narrow_bounds_the_scale_is_the_variance(slope):
    x = torch.rand(1000, 3) * torch.tensor([0.01, 0.1, 1.0])
    found, variance = scale_of(x, slope * x)
    assert torch.equal(found, variance)


def test_coordinates_that_never_moved_count_as_the_others():
    old, x = 100 * torch.randn(2, 50, 3)
    x[:, 2] = old[:, 2]
    gradient = x / torch.tensor([1.0, 1e8, 1.0])
    scale = Scale()
    assert scale.squared(by_gradients=False) is None
    scale.update(old, old, gradient)
    assert scale.squared(by_gradients=False) is None
    scale = Scale()
    scale.update(old, x, gradient)
    expected = {False: x[:, :2].double().var(dim=0), True: torch.tensor([1.0, x[:, 1].var()]).double()}
    for by_gradients, first in expected.items():
        found = scale.squared(by_gradients=by_gradients)
        torch.testing.assert_close(found[:2], first, rtol=0.15, atol=0.0)
        torch.testing.assert_close(found[2], found[:2].log().mean().exp())


@pytest.mark.parametrize(
    "sampler",
    [
        MALA(0.1), HMC(0.1), NUTS(0.1), ChEESHMC(0.1),
        ParallelTempering(MALA(0.1), (1.0, 2.0, 4.0)), TemperedTransitions(MALA(0.1), (1.0, 2.0)),
    ],
    ids=lambda sampler: type(sampler).__name__,
)  # fmt: skip
def test_it_learns_from_the_gradients_at_the_states(sampler, monkeypatch):
    std, seen = torch.tensor([0.5, 1.0, 2.0]), []
    monkeypatch.setattr(Scale, "update", lambda self, old, x, gradient: seen.append((x, gradient)))
    sample(GaussianEnergy(0.0, std), sampler, 3, n_chains=10, warmup=60, steps=1, seed=1)
    assert len(seen) > 20
    for x, gradient in seen:
        torch.testing.assert_close(gradient, x / std**2)


def test_the_last_two_windows_use_the_variance(monkeypatch):
    """After the first of them the step size, and the length of trajectories, are tuned to such a scale."""
    seen, squared = [], Scale.squared
    monkeypatch.setattr(
        Scale,
        "squared",
        lambda self, by_gradients: (seen.append(by_gradients), squared(self, by_gradients=by_gradients))[1],
    )
    for warmup, n_early in ((200, 0), (400, 1), (1500, 3)):
        seen.clear()
        sample(GaussianEnergy(), MALA(0.1), 3, n_chains=10, warmup=warmup, steps=1, seed=1)
        assert seen == [True] * n_early + [False] * 2


def far_from_a_quartic():
    """After a warm-up from where a quartic energy is very steep: least acceptance, and error of the log variances."""
    std = torch.logspace(-1, 1, 8)
    energy = lambda x: (x / std).pow(4).sum(dim=1) / 4  # noqa: E731
    result = sample(energy, MALA(0.01), 8, n_chains=64, warmup=600, steps=50, seed=1)
    ratio = result.sampler.preconditioner / (2 * math.gamma(3 / 4) / math.gamma(1 / 4) * std**2)  # over the variances
    return float(result.info.acceptance.min()), float(ratio.log().abs().max())


def test_chains_that_start_where_the_energy_is_steep():
    least, off = far_from_a_quartic()
    assert least > 0.2
    assert off < 0.1


def test_with_variances_alone_they_are_stuck(monkeypatch):
    monkeypatch.setattr(Scale, "squared", lambda self, by_gradients, of=Scale.squared: of(self, by_gradients=False))
    with pytest.warns(UserWarning, match="accepted next to none"):
        least, off = far_from_a_quartic()
    assert least < 0.01
    assert off > 2


# -- chains that have stopped --------------------------------------------------------------------------------------


def nan_beyond_3(x):
    return x.square().sum(dim=1) / 2 + torch.where(x[:, 0] > 3, math.nan, 0.0)


def test_nothing_is_learnt_from_chains_that_have_stopped():
    """A bar and a result to go on from split a call into parts. In a later part, the chains are still stopped."""
    options = {"n_chains": 20, "warmup": 60, "steps": 10, "seed": 3, "on_nonfinite": "ignore"}
    plain = sample(nan_beyond_3, MALA(0.3), 2, progress=False, **options)
    stopped = plain.info.first_bad_step >= 0
    assert 5 < int(stopped.sum()) < 20
    shown = sample(nan_beyond_3, MALA(0.3), 2, progress=True, **options)
    assert torch.equal(shown.x, plain.x)
    assert shown.info.step_size == plain.info.step_size
    # their last states have no influence
    changed = plain.state.chains.x.clone()
    changed[stopped] = 50.0
    other = dataclasses.replace(plain, state=plain.state._replace(chains=plain.state.chains._replace(x=changed)))
    given = {"warmup": 20, "steps": 1, "on_nonfinite": "ignore"}
    assert sample(nan_beyond_3, init=other, **given).sampler.step_size == (
        sample(nan_beyond_3, init=plain, **given).sampler.step_size
    )


@pytest.mark.parametrize("make", [MALA, HMC, NUTS])
def test_a_short_warmup_adapts_the_step_size_alone(make):
    """As ``sample`` documents. It may be longer than the call that follows, and have a single step."""
    energy, scale = GaussianEnergy(0.0, torch.tensor([0.5, 2.0])), "preconditioner" if make is MALA else "mass"
    for warmup in (1, 3, 45):
        found = sample(energy, make(0.1), n_chains=4, warmup=warmup, steps=0, seed=1).sampler
        assert found.step_size != 0.1
        assert getattr(found, scale) is None
    found = sample(energy, make(0.1), n_chains=4, warmup=60, steps=0, seed=1).sampler
    assert getattr(found, scale) is not None
