"""Score matching with second derivatives: the loss of the formula, and the law of the data at its minimum."""

import warnings

import pytest
import torch
from quadratics import COVARIANCE, MEAN, Quadratic, fit, gaussian_rows
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

from fastebm import ExactScoreMatching, MLPEnergy, Objective, SlicedScoreMatching
from fastebm.energies.functions import as_module


def derivatives(energy, weights, x):
    """dE/dx (n, dim) and the Hessian (n, dim, dim) of each row, by torch.func."""

    def value(row):
        return functional_call(energy, weights, row.reshape(1, *x.shape[1:])).sum()

    rows = x.flatten(1)
    return vmap(grad(value))(rows), vmap(hessian(value))(rows)


def expected_of(objective, gradient, hessian, batch, draws):
    """The loss as the papers write it, with the score s = -dE/dx."""
    score, jacobian = -gradient, -hessian
    if isinstance(objective, ExactScoreMatching):
        return (0.5 * score.square().sum(1) + jacobian.diagonal(dim1=1, dim2=2).sum(1)).mean()
    v = draws.normal(copies=objective.n_projections).flatten(2)
    v = torch.where(v < 0, -1.0, 1.0).to(v) if objective.projection == "rademacher" else v
    curvature = torch.einsum("nki,nij,nkj->nk", v, jacobian, v)
    squared = torch.einsum("nki,ni->nk", v, score).square()
    if objective.variance_reduced:
        squared = score.square().sum(1, keepdim=True)
    return (curvature + 0.5 * squared).mean()


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: ExactScoreMatching(**o),
        lambda **o: SlicedScoreMatching(**o),
        lambda **o: SlicedScoreMatching(3, projection="gaussian", **o),
        lambda **o: SlicedScoreMatching(2, variance_reduced=False, **o),
    ],
    ids=["exact", "one", "gaussian", "as it is"],
)
def test_the_loss_and_its_gradient_are_those_of_the_formula(make, shape, noise_std, seeded):
    dim = torch.Size(shape).numel()
    batch = torch.randn(6, *shape, dtype=torch.float64)
    energy = nn.Sequential(nn.Flatten(), nn.Linear(dim, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    weights = dict(energy.named_parameters())
    objective = make(noise_std=noise_std, seed=8)

    def loss(weights):
        draws = Objective(seed=8).draws(batch)
        x = batch + noise_std * draws.normal() if noise_std else batch
        return expected_of(objective, *derivatives(energy, weights, x), x, draws)

    found = objective(energy, batch)
    assert found.loss.item() == pytest.approx(loss(weights).item(), rel=1e-12)
    found.loss.backward()
    for name, expected in grad(loss)(weights).items():
        torch.testing.assert_close(weights[name].grad, expected, rtol=1e-10, atol=1e-13)
    squared, laplacian = found.metrics["squared_gradient"], found.metrics["laplacian"]
    assert found.loss.item() == pytest.approx((0.5 * squared - laplacian).item(), rel=1e-12)


def test_the_minimum_of_the_exact_loss_has_the_moments_of_the_rows():
    rows, energy = gaussian_rows(500), Quadratic()
    fit(energy, lambda: ExactScoreMatching()(energy, rows).loss)
    torch.testing.assert_close(torch.linalg.inv(energy.precision), rows.T.cov(correction=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(energy.mean.detach(), rows.mean(0), rtol=1e-6, atol=1e-6)


def test_with_noise_it_is_the_law_of_the_noisy_data():
    n = 20_000
    rows, energy = gaussian_rows(n), Quadratic()
    fit(energy, lambda: ExactScoreMatching(noise_std=0.8, seed=1)(energy, rows).loss)
    covariance = COVARIANCE + 0.64 * torch.eye(2)
    # standard errors of moments of n normal rows
    variances = (covariance.square() + covariance.diag()[:, None] * covariance.diag()) / n
    assert ((torch.linalg.inv(energy.precision) - covariance).abs() < 5 * variances.sqrt()).all()
    assert ((energy.mean - MEAN).abs() < 5 * (covariance.diag() / n).sqrt()).all()


def test_random_directions_have_the_same_minimum():
    """The fit solves (P S + S P) / 2 = mean v v^T, whose entry off the diagonal has standard error 1 / sqrt(n)."""
    n = 20_000
    rows, energy = gaussian_rows(n), Quadratic()
    fit(energy, lambda: SlicedScoreMatching(seed=1)(energy, rows).loss)
    product = energy.precision @ rows.T.cov(correction=0)
    symmetric = (product + product.T) / 2
    torch.testing.assert_close(symmetric.diag(), torch.ones(2).double(), rtol=0, atol=1e-6)
    assert 0 < symmetric[0, 1].abs() < 5 / n**0.5


def test_too_many_dims_are_refused():
    energy = MLPEnergy(101, [3])
    with pytest.raises(ValueError, match=r"at most 100 dims, got 101: use SlicedScoreMatching"):
        ExactScoreMatching()(energy, torch.zeros(2, 101))
    ExactScoreMatching()(MLPEnergy(100, [3]), torch.zeros(2, 100))


@pytest.mark.parametrize("objective", [SlicedScoreMatching, ExactScoreMatching])
def test_an_energy_without_second_derivatives_is_reported(objective, seeded):
    x = torch.randn(5, 2)
    with pytest.warns(UserWarning, match="no second derivatives, so score matching only makes it flat"):
        objective()(MLPEnergy(2, [6], "relu"), x)
    weight = torch.randn(2, requires_grad=True)
    with pytest.warns(UserWarning, match="no second derivatives"):
        objective()(as_module(lambda x: x @ weight), x)  # its gradient has no path back to x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective()(MLPEnergy(2, [6]), x)
        objective()(MLPEnergy(2, [6], "relu"), x[:0], batch_size=5)  # a part without rows


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SlicedScoreMatching(0), ValueError, "n_projections must be >= 1, got 0"),
        (lambda: SlicedScoreMatching(1.5), TypeError, "n_projections must be an int"),
        (lambda: SlicedScoreMatching(projection="sphere"), ValueError, "'rademacher' or 'gaussian', got 'sphere'"),
        (lambda: SlicedScoreMatching(noise_std=-0.1), ValueError, "noise_std must be finite and >= 0, got -0.1"),
        (lambda: ExactScoreMatching(noise_std=float("nan")), ValueError, "noise_std must be finite"),
    ],
)
def test_wrong_settings_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
