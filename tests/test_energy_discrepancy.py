"""Energy discrepancy: the loss of the formula, and the law of the data at its minimum."""

import math

import pytest
import torch
from quadratics import COVARIANCE, MEAN, Quadratic, fit, gaussian_rows
from torch import nn
from torch.func import functional_call, grad

from fastebm import ClassifierEnergy, EnergyDiscrepancy, Objective


@pytest.mark.parametrize("w", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_the_loss_and_its_gradient_are_those_of_the_formula(shape, w, seeded):
    n, m, t = 5, 4, 0.7
    batch = torch.randn(n, *shape, dtype=torch.float64)
    energy = nn.Sequential(nn.Flatten(), nn.Linear(batch[0].numel(), 7), nn.Tanh(), nn.Linear(7, 1)).double()
    weights = dict(energy.named_parameters())
    draws = Objective(seed=8).draws(batch)
    first, second = draws.normal(), draws.normal(copies=m)
    copies = [[batch[i] + math.sqrt(t) * (first[i] + second[i, j]) for j in range(m)] for i in range(n)]

    def loss(weights):
        def value(x):
            return functional_call(energy, weights, x[None]).sum()

        terms = [
            torch.log(w / m + sum(torch.exp(value(batch[i]) - value(copy)) for copy in copies[i]) / m) for i in range(n)
        ]
        return sum(terms) / n

    found = EnergyDiscrepancy(t, m, w=w, seed=8)(energy, batch)
    assert found.loss.item() == pytest.approx(loss(weights).item(), rel=1e-12)
    torch.testing.assert_close(found.samples, torch.stack([torch.stack(c) for c in copies]).flatten(0, 1))
    assert found.metrics["energy_real"].item() == pytest.approx(energy(batch).mean().item())
    assert found.metrics["energy_samples"].item() == pytest.approx(energy(found.samples).mean().item())
    found.loss.backward()
    for name, expected in grad(loss)(weights).items():
        torch.testing.assert_close(weights[name].grad, expected, rtol=1e-10, atol=1e-13)


def test_energies_far_apart_do_not_overflow():
    steep = nn.Linear(2, 1, bias=False)
    nn.init.constant_(steep.weight, 1e4)
    found = EnergyDiscrepancy(1.0, 8, seed=1)(steep, torch.zeros(6, 2))
    found.loss.backward()
    assert found.loss.isfinite()
    assert steep.weight.grad.isfinite().all()


def discrepancy(energy, rows, t):
    """E[E(x)] - E[E_t(y)] of a quadratic energy, exactly, on the rows: what the loss estimates as M grows."""
    blurred = torch.eye(2, dtype=torch.float64) + t * energy.precision
    offsets = rows - energy.mean
    precision = torch.linalg.solve(blurred, energy.precision)  # of exp(-E_t)
    moments = offsets.T @ offsets / len(rows)
    of_blurred = 0.5 * (precision * (moments + t * torch.eye(2))).sum() + 0.5 * torch.logdet(blurred)
    return 0.5 * (energy.precision * moments).sum() - of_blurred


def test_with_many_negatives_it_is_the_discrepancy():
    """The mean of 20 calls. With 256 negatives the bias of the logarithm is below the standard error of 0.0035."""
    rows, energy = gaussian_rows(2_000), Quadratic()
    objective = EnergyDiscrepancy(0.2, 256, w=0.0, seed=1)
    with torch.no_grad():
        losses = torch.stack([objective(energy, rows).loss for _ in range(20)])
        exact = discrepancy(energy, rows, 0.2)
    error = losses.std() / 20**0.5
    assert error < 0.004
    assert abs(losses.mean() - exact) < 5 * error


def test_its_minimum_is_the_law_of_the_data():
    """Of the exact discrepancy it is the moments of the rows; of the estimate, the law within its standard errors.

    For 4,000 rows and 12 seeds the entries had the standard deviations 0.086, 0.045 and 0.025 (covariance) and 0.038
    and 0.032 (mean). Here are five times as many rows, and five standard deviations are allowed.
    """
    rows, exact, energy = gaussian_rows(20_000), Quadratic(), Quadratic()
    fit(exact, lambda: discrepancy(exact, rows, 0.25))
    torch.testing.assert_close(torch.linalg.inv(exact.precision), rows.T.cov(correction=0), rtol=1e-6, atol=1e-6)
    fit(energy, lambda: EnergyDiscrepancy(0.25, 32, seed=1)(energy, rows).loss)
    errors = torch.tensor([[0.086, 0.045], [0.045, 0.025]]) * 5**0.5
    found = torch.linalg.inv(energy.precision)
    assert ((found - COVARIANCE).abs() < errors).all()
    assert ((energy.mean - MEAN).abs() < torch.tensor([0.038, 0.032]) * 5**0.5).all()
    assert ((found - COVARIANCE - 0.25 * torch.eye(2)).abs() > errors).any()  # the law of perturbed data is rejected


def test_labels_are_those_of_the_row(seeded):
    classifier, batch, labels = nn.Linear(3, 4), torch.randn(5, 3), torch.tensor([3, 0, 2, 2, 1])
    found = EnergyDiscrepancy(0.5, 2, seed=1)(ClassifierEnergy(classifier), batch, labels=labels)
    energies = -classifier(found.samples).reshape(5, 2, 4)[torch.arange(5), :, labels]
    assert found.metrics["energy_samples"].item() == pytest.approx(energies.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: EnergyDiscrepancy(0.0), ValueError, "t must be finite and > 0, got 0"),
        (lambda: EnergyDiscrepancy(0.1, 0), ValueError, "n_negatives must be >= 1, got 0"),
        (lambda: EnergyDiscrepancy(0.1, w=-1.0), ValueError, "w must be finite and >= 0, got -1"),
        (lambda: EnergyDiscrepancy(True), TypeError, "t must be a number, got True"),
    ],
)
def test_wrong_settings_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
