"""The coupling flow: an exact inverse, and a density that is that of its samples."""

import math

import pytest
import torch
from objective_cases import a_flow

from fastebm import CouplingFlow, GaussianNoise, Objective


@pytest.mark.parametrize("dim", [1, 2, 5, 64])
def test_the_inverse_is_exact(dim, seeded):
    flow, z = a_flow(dim, 8, 64).double(), torch.randn(50, dim, dtype=torch.float64)
    x, log_prob = flow(z)
    assert (x - 0.5 - 1.5 * z).abs().max() > 0.5
    back, log_prob_of_x = flow.inverse(x)
    # rounding, enlarged by the condition of the map: measured up to 2e-13
    torch.testing.assert_close(back, z, rtol=0, atol=1e-11)
    torch.testing.assert_close(log_prob_of_x, log_prob, rtol=1e-10, atol=1e-10)
    assert torch.equal(flow.log_prob(x), log_prob_of_x)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_density_is_that_of_the_change_of_variables(dim, seeded):
    flow, z = a_flow(dim, 8, 64).double(), torch.randn(6, dim, dtype=torch.float64)
    _, log_prob = flow(z)
    for row, found in zip(z, log_prob, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda row: flow(row[None])[0][0], row)
        expected = -row.square().sum() / 2 - dim * math.log(2 * math.pi) / 2 - torch.linalg.slogdet(jacobian)[1]
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_density_integrates_to_one():
    flow, cells = a_flow(2, 4, 16).double(), 600
    with torch.no_grad():
        x, _ = flow(torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        half = 1.2 * x.abs().max().item()
        axis = half * (2 * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 1)
        grid = torch.cartesian_prod(axis, axis)
        total = sum(flow.log_prob(part).exp().sum() for part in grid.split(100_000)) * (2 * half / cells) ** 2
    assert total.item() == pytest.approx(1.0, abs=1e-4)


def test_it_starts_as_a_normal_distribution():
    mean, std = torch.arange(6.0).reshape(2, 3), torch.linspace(0.5, 2.0, 6).reshape(2, 3)
    flow = CouplingFlow(mean, std)
    x = flow.sample(Objective(seed=1).draws(torch.zeros(5, 2, 3)), 4)
    assert x.shape == (5, 4, 2, 3)
    z = Objective(seed=1).draws(torch.zeros(5, 2, 3)).normal(4)
    torch.testing.assert_close(x, mean + std * z)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(flow.log_prob(rows), GaussianNoise(mean, std=std).log_prob(rows))


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="std must be finite and > 0"):
        CouplingFlow([0.0, 0.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="n_layers must be >= 1, got 0"):
        CouplingFlow([0.0], n_layers=0)
    with pytest.raises(ValueError, match=r"states of shape \(2,\), and the batch's have \(3,\)"):
        CouplingFlow([0.0, 0.0]).log_prob(torch.zeros(4, 3))
