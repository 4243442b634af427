"""What the warm-ups of all samplers share (samplers/adaptation.py)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastebm import HMC, MALA, NUTS, GaussianEnergy, sample
from fastebm.samplers.adaptation import Variance, total

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


def test_coordinates_that_never_moved_count_as_the_others():
    old, x = 100 * torch.randn(2, 50, 3)
    x[:, 2] = old[:, 2]
    variance = Variance()
    assert variance.regularised() is None
    variance.update(old, old)
    assert variance.regularised() is None
    variance = Variance()
    variance.update(old, x)
    found = variance.regularised()
    torch.testing.assert_close(found[:2], x[:, :2].double().var(dim=0), rtol=0.15, atol=0.0)
    torch.testing.assert_close(found[2], found[:2].log().mean().exp())


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
