"""The probability-flow ODE: where states go, laws and likelihoods on Gaussian data, which are known exactly."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from laws import fits_gaussian
from torch import nn

import fastebm
from fastebm import GaussianEnergy, MLPEnergy, NoiseConditionalEnergy, NonFiniteError, flow_likelihood, probability_flow
from fastebm.energies.noise_conditional import variance_preserving
from fastebm.targets.autograd import Energy

pytestmark = pytest.mark.usefixtures("seeded")

SIGMAS, BETAS = (0.05, 60.0), (0.1, 20.0)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
ALPHA = 1e-5  # of each test of a law
DIM = 3

# a covariance that is not diagonal, and a mean
FACTOR = torch.tensor([[0.8, 0.0, 0.0], [0.5, 0.4, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
EYE = torch.eye(DIM, dtype=torch.float64)


class Exploding(nn.Module):
    """E(x, sigma) of Gaussian data that are blurred."""

    def forward(self, x, sigma):
        assert sigma.shape == (len(x),)
        assert bool((sigma == sigma[0]).all())
        precision = torch.linalg.inv(COVARIANCE + sigma[0].double() ** 2 * EYE).to(x.dtype)
        d = x.reshape(len(x), -1) - MEAN.to(x.dtype)
        return (d @ precision * d).sum(dim=1) / 2


class Preserving(nn.Module):
    """E(x, t) of alpha x_0 + sigma xi."""

    def forward(self, x, t):
        alpha, sigma = variance_preserving(t[0].double(), BETAS)
        precision = torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * EYE).to(x.dtype)
        d = x - (alpha * MEAN).to(x.dtype)
        return (d @ precision * d).sum(dim=1) / 2


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def laws(betas):
    """Mean and covariance at the data end and at the noise end, and the noise's standard deviation."""
    if betas is None:
        return [(MEAN, COVARIANCE + s**2 * EYE) for s in SIGMAS], SIGMAS[1]
    at = [variance_preserving(torch.tensor(t, dtype=torch.float64), BETAS) for t in (1e-3, 1.0)]
    return [(alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * EYE) for alpha, sigma in at], 1.0


CASES = {"exploding": (Exploding, {"sigmas": SIGMAS}), "preserving": (Preserving, {"betas": BETAS})}
every_case = pytest.mark.parametrize(("make", "levels"), CASES.values(), ids=CASES)


@every_case
def test_states_go_where_they_must(make, levels):
    """A Gaussian's flow is affine: the whitened state stays the same."""
    ((mean, data), (last_mean, noise)), std = laws(levels.get("betas"))
    x = std * torch.randn(50, DIM, dtype=torch.float64)
    expected = mean + (x - last_mean) @ power(noise, -0.5) @ power(data, 0.5)
    found = probability_flow(make(), x, **levels, **TIGHT)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    back = probability_flow(make(), found, to_noise=True, **levels, **TIGHT)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6 * std)


@every_case
def test_log_likelihoods_are_exact(make, levels):
    ((mean, data), (last_mean, noise)), std = laws(levels.get("betas"))
    x = mean + torch.randn(50, DIM, dtype=torch.float64) @ power(data, 0.5)
    found = flow_likelihood(make(), x, **levels, **TIGHT)
    z = (x - mean) @ power(data, -0.5)
    end = last_mean + z @ power(noise, 0.5)
    torch.testing.assert_close(found.x, end, rtol=1e-6, atol=1e-6 * std)
    # that of N(0, std^2) at the noise end, and the change of volume
    expected = torch.distributions.Normal(0.0, std).log_prob(end).sum(1)
    expected = expected + (torch.logdet(noise) - torch.logdet(data)) / 2
    torch.testing.assert_close(found.log_likelihood, expected, rtol=0, atol=1e-6)
    # and that of the data, but for their mean and variance at the noise end: |mean| |z| / std to first order
    true = torch.distributions.MultivariateNormal(mean, data).log_prob(x)
    neglected = 1.1 * float(last_mean.norm() * z.norm(dim=1).max()) / std
    assert neglected < 0.1
    torch.testing.assert_close(found.log_likelihood, true, rtol=0, atol=neglected)
    torch.testing.assert_close(found.bits_per_dim, -found.log_likelihood / (DIM * math.log(2)))


def samples(energy, levels):
    std = SIGMAS[1] if "sigmas" in levels else 1.0
    return probability_flow(energy, std * torch.randn(20_000, DIM), **levels)


def fits(x, betas):
    """Whether states have the law that the flow gives to draws of N(0, std^2)."""
    ((mean, data), (last_mean, noise)), std = laws(betas)
    root = power(noise, -0.5) @ power(data, 0.5)
    return fits_gaussian((x.double() - mean + last_mean @ root) @ power(root, -1) / std, torch.ones(DIM), ALPHA)


@every_case
def test_samples_have_the_law_of_the_data(make, levels):
    assert fits(samples(make(), levels), levels.get("betas"))


class Mutant(nn.Module):
    """An energy at another noise level than it is told, or times a factor."""

    def __init__(self, energy, level, factor=1.0):
        super().__init__()
        self.energy, self.level, self.factor = energy, level, factor

    def forward(self, x, sigma):
        return self.factor * self.energy(x, self.level(sigma))


MUTANTS = {
    "half the energy": (Mutant(Exploding(), lambda s: s, 0.5), {"sigmas": SIGMAS}),
    "sigma for sigma^2": (Mutant(Exploding(), torch.sqrt), {"sigmas": SIGMAS}),
    "twice sigma": (Mutant(Exploding(), lambda s: 2 * s), {"sigmas": SIGMAS}),
    "a higher sigma_min": (Exploding(), {"sigmas": (0.3, SIGMAS[1])}),
    "other betas": (Preserving(), {"betas": (0.1, 15.0)}),
    "1 - t": (Mutant(Preserving(), lambda t: 1.001 - t), {"betas": BETAS}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_rejects_mutants(name):
    energy, levels = MUTANTS[name]
    assert not fits(samples(energy, levels), BETAS if "betas" in levels else None)


def test_hutchinsons_estimate_is_unbiased():
    """For E = x^T H x / 2 one probe of random signs has the variance 2 sum_{i != j} H_ij^2."""
    matrix = torch.linalg.inv(COVARIANCE)
    n = 20_000
    energy = Energy(
        fastebm.energies.functions.as_module(lambda x: (x @ matrix * x).sum(dim=1) / 2), (DIM,), torch.float64
    )
    x = torch.randn(n, DIM, dtype=torch.float64)
    gradient, exact = energy.gradient_and_trace(x)
    torch.testing.assert_close(gradient, x @ matrix)
    torch.testing.assert_close(exact, torch.full((n,), float(matrix.trace()), dtype=torch.float64))
    from fastebm.estimates.flow import _signs

    probes = _signs(2, x, seed=3)
    assert set(probes.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(_signs(2, x[:7], seed=3), probes[:, :7])
    assert not torch.equal(_signs(2, x, seed=4), probes)
    _, estimate = energy.gradient_and_trace(x, None, probes)
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum()) / 2
    z = float(estimate.mean() - matrix.trace()) / math.sqrt(variance / n)
    assert abs(z) < 4.5  # alpha 1e-5
    assert float(estimate.var()) == pytest.approx(variance, rel=0.1)


def test_likelihoods_by_probes():
    x = MEAN + torch.randn(4000, DIM, dtype=torch.float64) @ FACTOR.T
    exact = flow_likelihood(Exploding(), x, sigmas=SIGMAS).log_likelihood
    found = flow_likelihood(Exploding(), x, sigmas=SIGMAS, n_probes=1, seed=1).log_likelihood
    again = flow_likelihood(Exploding(), x, sigmas=SIGMAS, n_probes=1, seed=1).log_likelihood
    assert torch.equal(found, again)
    errors = found - exact
    assert float(errors.std()) > 0.1
    assert abs(float(errors.mean())) < 4.5 * float(errors.std()) / math.sqrt(len(x))
    more = flow_likelihood(Exploding(), x, sigmas=SIGMAS, n_probes=16, seed=1).log_likelihood
    assert float((more - exact).std()) == pytest.approx(float(errors.std()) / 4, rel=0.1)


def test_a_network_in_either_parametrisation_has_the_same_samples():
    """A variance-preserving energy is that of the scaled state, so its flow ends at alpha times the other's."""
    network = MLPEnergy(2 + 5, (16,), outputs=2).double()
    preserving, exploding = NoiseConditionalEnergy(network, betas=BETAS), NoiseConditionalEnergy(network)
    t = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    alpha, sigma = variance_preserving(t, BETAS)
    low, high = (sigma / alpha).tolist()
    x = torch.randn(20, 2, dtype=torch.float64)
    found = probability_flow(preserving, x, betas=BETAS, **TIGHT)
    expected = probability_flow(exploding, x / alpha[1], sigmas=(low, high), **TIGHT)
    torch.testing.assert_close(found / alpha[0], expected, rtol=1e-5, atol=1e-5)


def test_shapes_dtypes_and_the_model_left_as_it_was():
    model = NoiseConditionalEnergy(MLPEnergy(6 + 5, (8,), dropout=0.5, spectral_norm=True, outputs=6))
    kept = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 6)
    found = probability_flow(model, x, sigmas=(0.1, 1.0))
    assert torch.equal(found, probability_flow(model, x, sigmas=(0.1, 1.0)))  # dropout is off
    result = flow_likelihood(model, x, sigmas=(0.1, 1.0))
    assert (result.x.shape, result.x.dtype) == ((4, 6), torch.float32)
    assert (result.log_likelihood.shape, result.log_likelihood.dtype) == ((4,), torch.float64)
    double = flow_likelihood(model, x.double(), sigmas=(0.1, 1.0))
    assert double.x.dtype == torch.float64
    torch.testing.assert_close(double.log_likelihood, result.log_likelihood, rtol=0, atol=0.01)
    assert all(torch.equal(v, kept[name]) for name, v in model.state_dict().items())
    assert model.training
    assert probability_flow(model, x[:0], sigmas=(0.1, 1.0)).shape == (0, 6)
    cube = flow_likelihood(Exploding(), torch.randn(4, 1, 3), sigmas=SIGMAS)
    assert cube.x.shape == (4, 1, 3)


@pytest.mark.parametrize("to_noise", [False, True])
def test_no_level_beyond_the_ends_is_asked_for(to_noise):
    """Where states hardly move, a guess of the first step may be of any size."""
    seen = []

    def energy(x, sigma):
        seen.append(float(sigma[0]))
        return 1e-3 * x.square().sum(dim=1)

    probability_flow(energy, torch.ones(2, 3), sigmas=(0.1, 1.0), to_noise=to_noise)
    assert min(seen) == pytest.approx(0.1)
    assert max(seen) == pytest.approx(1.0)


def test_a_linear_energy_has_no_trace():
    def energy(x, sigma):
        return x.sum(dim=1) + 0 * sigma

    result = flow_likelihood(energy, torch.zeros(2, 3), sigmas=(0.1, 1.0))
    # dx / d log sigma = sigma^2
    torch.testing.assert_close(result.x, torch.full((2, 3), (1.0 - 0.01) / 2), rtol=1e-3, atol=1e-4)


# -- bad input ------------------------------------------------------------------------------------------------------

X = torch.zeros(4, DIM)
NET = NoiseConditionalEnergy(MLPEnergy(8, outputs=3))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: probability_flow(Exploding(), X), ValueError, "pass sigmas=.* or betas=.*, got neither"),
        (lambda: probability_flow(Exploding(), X, sigmas=SIGMAS, betas=BETAS), ValueError, ", got both"),
        (lambda: probability_flow(Exploding(), X, sigmas=(1.0, 0.1)), ValueError, "0 < sigma_min < sigma_max, got"),
        (lambda: probability_flow(Exploding(), X, sigmas=0.1), ValueError, "sigmas must be .*, got 0.1"),
        (lambda: probability_flow(Exploding(), X, betas=(0.0, 1.0)), ValueError, "0 < beta_min <= beta_max, got"),
        (lambda: probability_flow(Exploding(), X.long(), sigmas=SIGMAS), TypeError, "x must be floating point"),
        (lambda: probability_flow(Exploding(), X / 0, sigmas=SIGMAS), ValueError, "x"),
        (lambda: probability_flow(GaussianEnergy(), X, sigmas=SIGMAS), ValueError, 'give it an argument "sigma"'),
        (lambda: probability_flow(NET, X, betas=BETAS), ValueError, "was built with betas=None, and got betas="),
        (lambda: flow_likelihood(NET, X, sigmas=SIGMAS, n_probes=0), ValueError, "n_probes must be >= 1, got 0"),
        (
            lambda: probability_flow(
                lambda x, sigma: x.square().sum(1) * (math.nan if sigma[0] < 1 else 0), X, sigmas=SIGMAS
            ),
            NonFiniteError,
            "not finite in 4 of 4 rows, at the noise level .*: was the energy trained there",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("call", [probability_flow, flow_likelihood])
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_are_between_0_and_1(call, name):
    before = torch.get_rng_state()
    probes = {"n_probes": 1} if call is flow_likelihood else {}
    for value in (-1.0, 0.0, 1.0, 100.0, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value:g}"):
            call(Exploding(), X, sigmas=SIGMAS, **probes, **{name: value})
    with pytest.raises(TypeError, match=f"{name} must be a number, got 'low'"):
        call(Exploding(), X, sigmas=SIGMAS, **probes, **{name: "low"})
    assert torch.equal(torch.get_rng_state(), before)


def test_without_torchdiffeq_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r'needs torchdiffeq: pip install "fastebm\[cli\]"'):
        probability_flow(Exploding(), X, sigmas=SIGMAS)
