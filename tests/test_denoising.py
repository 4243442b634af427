"""Denoising score matching: the loss of the formula, and the law of noisy data at its minimum."""

import math
from functools import partial

import pytest
import torch
from quadratics import COVARIANCE, MEAN, Quadratic, fit, gaussian_rows
from torch import nn
from torch.func import functional_call, grad, vmap

from fastebm import (
    ClassifierEnergy,
    DenoisingScoreMatching,
    MLPEnergy,
    MultiLevelDenoisingScoreMatching,
    Objective,
    VariancePreservingScoreMatching,
)
from fastebm.energies.functions import as_module

SIGMAS = [2.0, 0.5, 0.1]


class Conditional(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 1, 7), nn.Tanh(), nn.Linear(7, 1)).double()

    def forward(self, x, sigma):
        return self.net(torch.cat([x.flatten(1), sigma[:, None]], dim=1))


def vp(t):
    """alpha and sigma of the variance-preserving diffusion: exp(-1/2 integral of beta), and what keeps variance 1."""
    alpha = torch.exp(-0.5 * (0.1 * t + 0.5 * (20.0 - 0.1) * t**2))
    return alpha, torch.sqrt(1 - alpha**2)


def levels(u):
    """Equal shares of [0, 1] to each of SIGMAS."""
    return torch.tensor(SIGMAS, dtype=torch.float64)[[min(int(3 * v), 2) for v in u.tolist()]]


CASES = {
    # name: objective, and from uniform u: alpha, sigma, condition, weight, and the sigma_0 of the energy
    "one level": (
        DenoisingScoreMatching(0.3, seed=8),
        lambda u: (torch.ones_like(u), torch.full_like(u, 0.3), None, 0.3**2, 0.3),
    ),
    "levels": (
        MultiLevelDenoisingScoreMatching(SIGMAS, seed=8),
        lambda u: (torch.ones_like(u), levels(u), levels(u), levels(u) ** 2, levels(u)),
    ),
    "one energy for all levels": (
        MultiLevelDenoisingScoreMatching(SIGMAS, sigma_0=0.4, seed=8),
        lambda u: (torch.ones_like(u), levels(u), None, 0.4**4 / levels(u) ** 2, 0.4),
    ),
    "variance-preserving": (
        VariancePreservingScoreMatching(t_min=0.01, seed=8),
        lambda u: (*vp(1 - 0.99 * u), 1 - 0.99 * u, vp(1 - 0.99 * u)[1] ** 2, vp(1 - 0.99 * u)[1]),
    ),
}


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
@pytest.mark.parametrize(("objective", "of"), CASES.values(), ids=CASES.keys())
def test_the_loss_and_its_gradient_are_those_of_the_formula(objective, of, shape, seeded):
    """weight / 2 |dE/dx(x') - (x' - alpha x) / sigma_0^2|^2, as the papers write it."""
    batch, draws = torch.randn(6, *shape, dtype=torch.float64), Objective(seed=8).draws(torch.zeros(6, *shape).double())
    alpha, sigma, condition, weight, sigma_0 = of(draws.strata())
    dim = math.prod(shape)
    rows = (-1, *[1] * len(shape))
    noisy = alpha.reshape(rows) * batch + sigma.reshape(rows) * draws.normal()
    energy = nn.Sequential(nn.Flatten(), nn.Linear(dim, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    energy = Conditional(dim) if condition is not None else energy
    weights = dict(energy.named_parameters())

    def loss(weights):
        def value(x, *condition):
            return functional_call(energy, weights, (x[None], *(c[None] for c in condition))).sum()

        arguments = (noisy,) if condition is None else (noisy, condition)
        scores = vmap(grad(value))(*arguments).flatten(1)
        target = (noisy - alpha.reshape(rows) * batch).flatten(1)
        scale = torch.as_tensor(sigma_0, dtype=torch.float64).expand(6)[:, None] ** 2
        return (0.5 * weight * (scores - target / scale).square().sum(1)).mean()

    objective.calls = 0
    found = objective(energy, batch)
    assert found.loss.item() == pytest.approx(loss(weights).item(), rel=1e-12)
    assert found.metrics["noise_error"].item() == pytest.approx(2 * found.loss.item() / dim, rel=1e-12)
    found.loss.backward()
    for name, expected in grad(loss)(weights).items():
        torch.testing.assert_close(weights[name].grad, expected, rtol=1e-10, atol=1e-13)


def test_its_minimum_is_the_law_of_the_noisy_data():
    """The fit regresses xi / sigma on x', linearly: its standard errors are those of least squares."""
    n, sigma = 20_000, 0.8
    rows, energy = gaussian_rows(n), Quadratic()
    fit(energy, lambda: DenoisingScoreMatching(sigma, seed=1)(energy, rows).loss)
    precision = torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2))
    residual = torch.eye(2) / sigma**2 - precision  # covariance of xi / sigma given x'
    errors = (residual.diag()[:, None] * precision.diag() / n).sqrt()
    assert ((energy.precision - precision).abs() < 5 * errors).all()
    inverse = torch.linalg.inv(precision)
    assert ((energy.mean - MEAN).abs() < 5 * ((inverse @ residual @ inverse).diag() / n).sqrt()).all()
    assert ((torch.linalg.inv(COVARIANCE) - precision).abs() > 5 * errors).any()  # the law of clean data is rejected


class Noisy(nn.Module):
    """The energy of N(mean, variance I) blurred by a level's noise, from the wrong mean 0 and variance 1."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.mean = noise, nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.log_variance = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, condition):
        alpha, sigma = self.noise(condition)
        variance = alpha**2 * self.log_variance.exp() + sigma**2
        return 0.5 * (x - alpha[:, None] * self.mean).square().sum(1) / variance


# Of 20 runs with other seeds, errors of the mean and of the variance had the standard deviations 0.008 and 0.005 with
# levels, and 0.012 and 0.008 along the diffusion: five of them are allowed.
@pytest.mark.parametrize(
    ("objective", "noise", "error_of_mean", "error_of_variance"),
    [
        (partial(MultiLevelDenoisingScoreMatching, [2.0, 1.0, 0.5]), lambda s: (torch.ones_like(s), s), 0.04, 0.025),
        (VariancePreservingScoreMatching, vp, 0.06, 0.04),
    ],
    ids=["levels", "variance-preserving"],
)
def test_its_minimum_is_the_law_at_every_level(objective, noise, error_of_mean, error_of_variance):
    rows = MEAN + 0.6 * torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    energy = Noisy(noise)
    fit(energy, lambda: objective(seed=1)(energy, rows).loss)
    assert (energy.mean - MEAN).abs().max() < error_of_mean
    assert abs(energy.log_variance.exp() - 0.36) < error_of_variance


def test_one_energy_and_one_level_are_plain_denoising(seeded):
    energy, batch = MLPEnergy(3, [5]), torch.randn(8, 3)
    one = MultiLevelDenoisingScoreMatching([0.4], sigma_0=0.4, seed=2)(energy, batch).loss
    assert one.item() == pytest.approx(DenoisingScoreMatching(0.4, seed=2)(energy, batch).loss.item(), rel=1e-5)


def test_levels_are_taken_in_equal_shares():
    seen = []

    def energy(x, sigma):
        seen.append(sigma)
        return x.square().sum(1)

    objective = MultiLevelDenoisingScoreMatching(torch.tensor(SIGMAS))
    for _ in range(50):
        objective(as_module(energy), torch.zeros(9, 2))
    counts = torch.stack([torch.stack([(sigma == level).sum() for level in SIGMAS]) for sigma in seen])
    assert (counts == 3).all()
    # and every row takes every level: each has probability (2 / 3)^50 = 2e-9 to be missed
    assert all((torch.stack(seen) == level).any(0).all() for level in SIGMAS)


def test_labels_go_to_the_energy(seeded):
    classifier, batch, labels = nn.Linear(3, 4), torch.randn(5, 3), torch.tensor([3, 0, 2, 2, 1])
    found = DenoisingScoreMatching(0.5, seed=1)(ClassifierEnergy(classifier), batch, labels=labels)
    draws = Objective(seed=1).draws(batch)
    draws.strata()
    expected = 0.5 * (-0.5 * classifier.weight[labels] - draws.normal()).square().sum(1).mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: DenoisingScoreMatching(0.0), ValueError, "sigma must be finite and > 0, got 0"),
        (lambda: DenoisingScoreMatching("0.1"), TypeError, "sigma must be a number, got '0.1'"),
        (lambda: DenoisingScoreMatching(float("inf")), ValueError, "finite"),
        (lambda: MultiLevelDenoisingScoreMatching([]), ValueError, "one or more"),
        (lambda: MultiLevelDenoisingScoreMatching(0.5), ValueError, "one or more finite numbers > 0, got 0.5"),
        (lambda: MultiLevelDenoisingScoreMatching([1.0, -0.5]), ValueError, "sigmas must be .* > 0, got"),
        (lambda: MultiLevelDenoisingScoreMatching([1.0], sigma_0=0.0), ValueError, "sigma_0"),
        (lambda: VariancePreservingScoreMatching(20.0, 0.1), ValueError, "0 < beta_min <= beta_max, got"),
        (lambda: VariancePreservingScoreMatching(0.0), ValueError, "0 < beta_min"),
        (lambda: VariancePreservingScoreMatching(t_min=1.0), ValueError, r"t_min must be in \(0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("objective", [MultiLevelDenoisingScoreMatching([1.0, 0.1]), VariancePreservingScoreMatching()])
def test_an_energy_without_a_condition_is_refused(objective):
    with pytest.raises(ValueError, match=r"MLPEnergy.forward takes x only: use a noise-conditional energy"):
        objective(MLPEnergy(2, [3]), torch.zeros(4, 2))


def test_an_energy_that_cuts_the_graph_is_refused():
    with pytest.raises(ValueError, match="does not depend on x through differentiable operations"):
        DenoisingScoreMatching(0.1)(as_module(lambda x: x.detach().sum(1)), torch.zeros(4, 2))
