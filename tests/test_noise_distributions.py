"""Noise distributions: their densities against SciPy's, the law of their samples, fits, and what they refuse."""

import laws
import numpy as np
import pytest
import torch
from scipy import stats

from fastebm import GaussianNoise, MixtureNoise, Objective, UniformNoise

ALPHA = 1e-5

MEAN = torch.tensor([1.0, -2.0, 0.5])
STD = torch.tensor([0.5, 2.0, 1.0])
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.5, 0.0], [-1.0, 0.3, 2.0]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[-3.0, 0.0, 1.0], [0.0, 2.0, 0.0], [4.0, -1.0, 2.0]], dtype=torch.float64)
COVARIANCES = torch.stack([COVARIANCE, torch.diag(STD.double()), 0.1 * COVARIANCE])


def mixture_density(x):
    parts = zip(WEIGHTS, MEANS, COVARIANCES, strict=True)
    return np.log(sum(float(w) * stats.multivariate_normal.pdf(x, m, c) for w, m, c in parts))


# name: the noise, and its log-density by SciPy
CASES = {
    "uniform": (
        UniformNoise([-4.0, -4.0, -3.0], [4.0, 5.0, 6.0]),
        lambda x: stats.uniform.logpdf(x, [-4, -4, -3], [8, 9, 9]).sum(1),
    ),
    "std": (GaussianNoise(MEAN, std=STD), lambda x: stats.norm.logpdf(x, MEAN, STD).sum(1)),
    "covariance": (
        GaussianNoise(MEAN, covariance=COVARIANCE),
        lambda x: stats.multivariate_normal.logpdf(x, MEAN, COVARIANCE),
    ),
    "mixture": (MixtureNoise(WEIGHTS, MEANS, COVARIANCES), mixture_density),
}


def samples_of(noise, n, copies, dtype=torch.float32, first_row=0, shape=(3,)):
    return noise.sample(Objective(seed=3).draws(torch.zeros(n, *shape, dtype=dtype), first_row), copies)


@pytest.mark.parametrize("name", CASES)
def test_densities_are_those_of_scipy(name):
    noise, expected = CASES[name]
    x = samples_of(noise, 50, 2, torch.float64).flatten(0, 1)
    found = noise.log_prob(x)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected(x.numpy()), rtol=1e-12)
    # float32 states have the same density, rounded once
    x = x.float()
    assert torch.equal(noise.log_prob(x), noise.log_prob(x.double()).float())


def test_a_uniform_density_is_zero_outside():
    noise = UniformNoise([0.0, 0.0], [1.0, 2.0])
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.1, 1.0], [0.5, -1e-6]])
    assert torch.equal(noise.log_prob(x).exp(), torch.tensor([0.5, 0.5, 0.0, 0.0]))
    # states on a bound that float32 rounds outwards
    assert UniformNoise([-8.97], 8.97).log_prob(torch.tensor([[-8.97], [8.97]])).isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_law_of_the_density(name):
    """Every coordinate and a projection, by Kolmogorov and Smirnov's test; copies are independent."""
    noise, _ = CASES[name]
    x = samples_of(noise, 10_000, 2).double()
    assert not (x[:, 0] == x[:, 1]).all(dim=1).any()
    p_values = []
    for direction in torch.eye(3).double().tolist() + [[0.5, -0.5, 1.0]] * (name != "uniform"):
        d = torch.tensor(direction, dtype=torch.float64)
        if name == "uniform":
            cdf = stats.uniform(float(noise.low @ d), float((noise.high - noise.low) @ d)).cdf
        else:
            cdf = projected_cdf(name, d)
        y = x @ d
        p_values += [stats.kstest(y.flatten(), cdf).pvalue]
        u = stats.norm.ppf(np.clip(cdf(y.numpy()), 1e-12, 1 - 1e-12))
        p_values += [laws.two_sided((u[:, 0] * u[:, 1]).sum() / len(u) ** 0.5)]
    assert min(p_values) > ALPHA / len(p_values)
    assert (noise.log_prob(x.flatten(0, 1).float()) > -torch.inf).all()


def projected_cdf(name, d):
    """The distribution function of d . x."""
    weights, means, covariances = {
        "std": (torch.ones(1), MEAN[None], torch.diag(STD.square())[None]),
        "covariance": (torch.ones(1), MEAN[None], COVARIANCE[None]),
        "mixture": (WEIGHTS, MEANS, COVARIANCES),
    }[name]
    parts = [
        (float(w), float(m.double() @ d), float(d @ c.double() @ d) ** 0.5)
        for w, m, c in zip(weights, means, covariances, strict=True)
    ]
    return lambda y: sum(w * stats.norm.cdf(y, m, s) for w, m, s in parts)


@pytest.mark.parametrize("name", CASES)
def test_samples_depend_on_the_row_alone(name):
    noise, _ = CASES[name]
    whole = samples_of(noise, 9, 4)
    assert whole.shape == (9, 4, 3)
    # rounding of a matrix product may depend on the number of rows
    torch.testing.assert_close(samples_of(noise, 4, 4, first_row=5), whole[5:], rtol=1e-6, atol=1e-6)
    assert samples_of(noise, 0, 4).shape == (0, 4, 3)
    assert noise.log_prob(torch.zeros(0, 3)).shape == (0,)


def test_states_of_any_shape():
    mean, x = torch.arange(6.0).reshape(2, 3), torch.randn(5, 2, 3)
    gaussian = GaussianNoise(mean, std=2.0)
    assert samples_of(gaussian, 4, 2, shape=(2, 3)).shape == (4, 2, 2, 3)
    expected = GaussianNoise(mean.flatten(), covariance=4.0 * torch.eye(6)).log_prob(x.flatten(1))
    torch.testing.assert_close(gaussian.log_prob(x), expected)
    one = MixtureNoise([1.0], mean[None], 4.0 * torch.eye(6)[None])
    torch.testing.assert_close(one.log_prob(x), expected)
    assert samples_of(one, 4, 2, shape=(2, 3)).shape == (4, 2, 2, 3)
    for noise in (gaussian, one, UniformNoise(mean, 9.0)):
        with pytest.raises(ValueError, match=r"states of shape \(2, 3\), and the batch's have \(3, 2\)"):
            noise.log_prob(x.reshape(5, 3, 2))


def test_a_fitted_gaussian_has_the_moments_of_the_rows():
    x = torch.randn(100, 2, 2) @ torch.tensor([[1.0, 0.5], [0.0, 2.0]]) + 3.0
    x[:, 1, 1] = 0.25  # a constant pixel
    noise = GaussianNoise.fit(x, reg_covar=1e-4)
    rows = x.flatten(1).double().numpy()
    np.testing.assert_allclose(noise.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(noise.scale @ noise.scale.T, np.cov(rows.T) + 1e-4 * np.eye(4), atol=1e-12)
    with pytest.raises(ValueError, match="positive definite; fit adds reg_covar"):
        GaussianNoise.fit(x, reg_covar=0.0)
    assert GaussianNoise.fit(x[:, :1, 0]).scale.shape == (1, 1)


def test_a_fitted_mixture_is_that_of_scikit_learn():
    from sklearn.mixture import GaussianMixture

    rows = samples_of(CASES["mixture"][0], 400, 1, torch.float64)[:, 0]
    found = MixtureNoise.fit(rows, 3, seed=1)
    reference = GaussianMixture(3, random_state=1).fit(rows.numpy())
    np.testing.assert_allclose(found.log_prob(rows), reference.score_samples(rows.numpy()), rtol=1e-9)


def test_a_saved_noise_is_the_same():
    for noise, other in (
        (CASES["mixture"][0], MixtureNoise([1.0, 1.0, 1.0], torch.zeros(3, 3), torch.eye(3).expand(3, 3, 3))),
        (CASES["std"][0], GaussianNoise(torch.zeros(3), std=1.0)),
    ):
        other.load_state_dict(noise.state_dict())
        assert torch.equal(samples_of(other, 5, 2), samples_of(noise, 5, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformNoise([0.0, 1.0], [1.0, 1.0]), "low < high"),
        (lambda: UniformNoise([0.0], float("inf")), "high must be finite"),
        (lambda: UniformNoise([0.0, 0.0], [1.0, 1.0, 1.0]), r"high must be a number or have shape \(2,\), got \(3,\)"),
        (lambda: GaussianNoise([0.0]), "std= or covariance="),
        (lambda: GaussianNoise([0.0], std=1.0, covariance=torch.eye(1)), "std= or covariance="),
        (lambda: GaussianNoise([0.0], std=0.0), "std must be finite and > 0"),
        (lambda: GaussianNoise([0.0, 0.0], covariance=torch.eye(3)), r"\(2, 2\), got \(3, 3\)"),
        (lambda: GaussianNoise([0.0, 0.0], covariance=torch.ones(2, 2)), "positive definite"),
        (lambda: GaussianNoise([0.0, 0.0], covariance=torch.tensor([[1.0, 0.9], [0.0, 1.0]])), "must be symmetric"),
        (lambda: MixtureNoise([1.0, 0.0], torch.zeros(2, 1), torch.ones(2, 1, 1)), "weights must be finite and > 0"),
        (lambda: MixtureNoise([1.0], torch.zeros(2, 1), torch.ones(2, 1, 1)), "one row per component"),
        (lambda: MixtureNoise.fit(torch.zeros(3, 1), 4), "n_components must be 1 to 3, got 4"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_noise_in_float32():
    """As after ``.float()`` of the objective that it belongs to."""
    for noise in (GaussianNoise(MEAN, covariance=COVARIANCE), MixtureNoise(WEIGHTS, MEANS, COVARIANCES)):
        x = samples_of(noise, 20, 1)[:, 0]
        expected = noise.log_prob(x)
        torch.testing.assert_close(noise.float().log_prob(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(samples_of(noise, 20, 1)[:, 0], x, rtol=1e-5, atol=1e-5)


def test_parameters_that_are_not_numbers_are_refused():
    with pytest.raises(TypeError, match="mean must be numbers"):
        GaussianNoise("wide", std=1.0)
