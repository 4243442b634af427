"""What the warm-ups of all samplers share (samplers/adaptation.py)."""

from __future__ import annotations

import pytest
import torch

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
