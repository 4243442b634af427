"""Noise-contrastive estimation: its losses against the formulas, its minima against laws that are known."""

import math

import pytest
import torch
from objective_cases import a_flow
from torch import nn

from fastebm import (
    FlowContrastiveEstimation,
    GaussianEnergy,
    GaussianNoise,
    MLPEnergy,
    NoiseContrastiveEstimation,
    RankingNoiseContrastiveEstimation,
    UniformNoise,
)

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
PRECISION = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
WIDE = GaussianNoise([0.0, 0.0], std=2.0)

# each objective with its number of noise rows per row of data
OBJECTIVES = {
    "nce": (lambda: NoiseContrastiveEstimation(WIDE, seed=1), 1),
    "nce, ratio 3": (lambda: NoiseContrastiveEstimation(WIDE, noise_ratio=3, seed=1), 3),
    "ranking": (lambda: RankingNoiseContrastiveEstimation(WIDE, n_noise=4, seed=1), 4),
    "flow": (lambda: FlowContrastiveEstimation(a_flow(2).double(), seed=1), 1),
}


class Quadratic(nn.Module):
    """E(x) = |L^T (x - mean)|^2 / 2, of precision L L^T."""

    def __init__(self):
        super().__init__()
        self.mean, self.factor = nn.Parameter(torch.zeros(2).double()), nn.Parameter(torch.eye(2).double())

    def forward(self, x):
        return ((x - self.mean) @ self.factor).square().sum(1) / 2

    @property
    def precision(self):
        return (self.factor @ self.factor.T).detach()

    @property
    def log_z(self):
        return math.log(2 * math.pi) - self.precision.logdet().item() / 2


def gaussian_data(n):
    """Rows of the normal law of MEAN and PRECISION, with exactly these moments."""
    z = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / n), z.T, upper=False).T
    return MEAN + torch.linalg.solve_triangular(torch.linalg.cholesky(PRECISION).T, z.T, upper=True).T


@pytest.fixture
def energy(seeded):
    return MLPEnergy(2, [6, 5], "tanh").double()


@pytest.fixture
def batch(seeded):
    return torch.randn(7, 2, dtype=torch.float64)


def gradients(loss, *modules):
    return torch.autograd.grad(loss, [p for m in modules for p in m.parameters()], retain_graph=True)


@pytest.mark.parametrize("ratio", [1, 3])
def test_the_loss_is_that_of_the_classifier(energy, batch, ratio):
    """Written with densities: h = p / (p + k q)."""
    objective = NoiseContrastiveEstimation(WIDE, noise_ratio=ratio, log_z=0.7, seed=1)
    found = objective(energy, batch)
    assert found.samples.shape == (7 * ratio, 2)

    def h(x):
        p, q = torch.exp(-energy(x)[:, 0] - objective.log_z), WIDE.log_prob(x).exp()
        return p / (p + ratio * q)

    real, noise = h(batch), h(found.samples)
    expected = -real.log().mean() - ratio * (1 - noise).log().mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(gradients(found.loss, energy), gradients(expected, energy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    d_log_z = [
        torch.autograd.grad(loss, objective.log_z, retain_graph=True)[0].item() for loss in (found.loss, expected)
    ]
    assert d_log_z[0] == pytest.approx(d_log_z[1], rel=1e-6)  # log_z is float32
    even = 1 / (1 + ratio)  # h where p = q
    right = ((real > even).double().mean() + (noise < even).double().mean()) / 2
    assert found.metrics["accuracy"].item() == pytest.approx(right.item())
    assert found.metrics["log_z"].item() == pytest.approx(0.7)
    assert found.metrics["energy_real"].item() == pytest.approx(energy(batch).mean().item())
    assert found.metrics["energy_samples"].item() == pytest.approx(energy(found.samples).mean().item())


def test_the_ranking_loss_is_that_of_the_formula(energy, batch):
    found = RankingNoiseContrastiveEstimation(WIDE, n_noise=4, seed=1)(energy, batch)
    rows = torch.cat([batch[:, None], found.samples.reshape(7, 4, 2)], 1)
    ratios = torch.exp(-energy(rows)[..., 0]) / WIDE.log_prob(rows.flatten(0, 1)).exp().reshape(7, 5)
    expected = -(ratios[:, 0] / ratios.sum(1)).log().mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(gradients(found.loss, energy), gradients(expected, energy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert found.metrics["accuracy"].item() == pytest.approx((ratios.argmax(1) == 0).double().mean().item())


def test_the_energy_and_the_flow_play_one_game(energy, batch):
    """The gradient is that of -V for the energy and log Z, and that of V for the flow, by its density and samples."""
    objective = FlowContrastiveEstimation(a_flow(2).double(), seed=1)
    flow = objective.noise
    found = objective(energy, batch)
    z = FlowContrastiveEstimation(a_flow(2).double(), seed=1).draws(batch).normal()
    samples = flow(z)[0]
    assert torch.equal(found.samples, samples)

    def p_and_q(x):
        return torch.exp(-energy(x)[:, 0] - objective.log_z), flow.log_prob(x).exp()

    (p, q), (p_of_samples, q_of_samples) = p_and_q(batch), p_and_q(samples)
    value = (p / (p + q)).log().mean() + (q_of_samples / (p_of_samples + q_of_samples)).log().mean()
    assert found.loss.item() == pytest.approx(-value.item(), rel=1e-10)
    for sign, module in ((-1.0, energy), (1.0, flow)):
        pairs = zip(gradients(found.loss, module), gradients(value, module), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, sign * b, rtol=1e-8, atol=1e-10)
        assert any(b.abs().max() > 1e-3 for b in gradients(value, module))


def test_nce_finds_the_gaussian_and_its_log_z():
    """The tolerances are five standard deviations over seeds of the noise: 0.004 of log Z, 0.004 of the mean and 0.007
    of the precision. The data have exactly the moments of the law."""
    data, energy = gaussian_data(40_000), Quadratic()
    objective = NoiseContrastiveEstimation(GaussianNoise.fit(1.5 * data), noise_ratio=4, seed=0).double()
    fit(objective, energy, data)
    assert objective.log_z.item() == pytest.approx(math.log(2 * math.pi) - PRECISION.logdet().item() / 2, abs=0.02)
    assert objective.log_z.item() == pytest.approx(energy.log_z, abs=0.02)
    torch.testing.assert_close(energy.mean.detach(), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(energy.precision, PRECISION, rtol=0, atol=0.035)


def test_ranking_finds_the_gaussian():
    data, energy = gaussian_data(40_000), Quadratic()
    fit(RankingNoiseContrastiveEstimation(GaussianNoise.fit(1.5 * data), n_noise=5, seed=0), energy, data)
    torch.testing.assert_close(energy.mean.detach(), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(energy.precision, PRECISION, rtol=0, atol=0.035)


def fit(objective, energy, data):
    """Minimise the loss of one large sample, with the same noise at each evaluation."""
    optimiser = torch.optim.LBFGS([*energy.parameters(), *objective.parameters()], line_search_fn="strong_wolfe")
    start = objective.get_extra_state()

    def closure():
        objective.set_extra_state(start)
        optimiser.zero_grad()
        loss = objective(energy, data).loss
        loss.backward()
        return loss

    for _ in range(2):
        optimiser.step(closure)


def test_an_energy_that_is_the_noise_at_first(batch):
    """The start that the docstring advises: the classifier knows nothing, so the loss is 2 log 2."""
    mean, std = torch.tensor([3.0, -2.0]), torch.tensor([0.1, 20.0])
    noise = GaussianNoise(mean, std=std)
    objective = NoiseContrastiveEstimation(noise, log_z=-noise.log_prob(mean[None]).item())
    assert objective(GaussianEnergy(mean, std), batch).loss.item() == pytest.approx(2 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_forward_pass_of_the_energy(energy, batch, name):
    passes = []
    energy.register_forward_hook(lambda *_: passes.append(1))
    found = OBJECTIVES[name][0]()(energy, batch)
    assert passes == [1]
    assert not any(value.requires_grad for value in found.metrics.values())
    assert not found.samples.requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noise_has_the_label_of_its_row(batch, name):
    class Labelled(nn.Module):
        def forward(self, x, labels):
            return (1.0 + labels) * x.square().sum(1)

    make, n_noise = OBJECTIVES[name]
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found = make()(Labelled(), batch, labels=labels)
    expected = (1.0 + labels.repeat_interleave(n_noise)) * found.samples.square().sum(1)
    assert found.metrics["energy_samples"].item() == pytest.approx(expected.mean().item())
    assert found.metrics["energy_real"].item() == pytest.approx(((1.0 + labels) * batch.square().sum(1)).mean().item())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_a_classifier_that_is_sure_has_finite_gradients(batch, name, scale):
    weight = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    class Steep(nn.Module):
        def forward(self, x):
            return weight * x.square().sum(1)

    found = OBJECTIVES[name][0]()(Steep(), batch)
    found.loss.backward()
    assert found.loss.isfinite()
    assert weight.grad.isfinite()


def test_bad_input_is_refused(energy, batch):
    for make in (NoiseContrastiveEstimation, RankingNoiseContrastiveEstimation):
        with pytest.raises(TypeError, match="noise must be a NoiseDistribution"):
            make(torch.distributions.Normal(0.0, 1.0))
        objective = make(UniformNoise([-0.1, -0.1], 0.1), seed=1)
        with pytest.raises(ValueError, match="no density at 7 of 7 rows of data: take a wider noise"):
            objective(energy, batch)
        assert objective.calls == 0
        with pytest.raises(ValueError, match=r"states of shape \(3,\), and the batch's have \(2,\)"):
            make(GaussianNoise([0.0, 0.0, 0.0], std=1.0))(energy, batch)
    with pytest.raises(ValueError, match="noise_ratio must be >= 1, got 0"):
        NoiseContrastiveEstimation(WIDE, noise_ratio=0)
    with pytest.raises(ValueError, match="log_z must be finite, got inf"):
        NoiseContrastiveEstimation(WIDE, log_z=math.inf)
    with pytest.raises(TypeError, match=r"n_noise must be an int, got 2\.5"):
        RankingNoiseContrastiveEstimation(WIDE, n_noise=2.5)
    with pytest.raises(TypeError, match="flow must be a CouplingFlow"):
        FlowContrastiveEstimation(WIDE)
    with pytest.raises(ValueError, match=r"states of shape \(2,\), and the batch's have \(3,\)"):
        FlowContrastiveEstimation(a_flow(2).double())(energy, torch.zeros(4, 3, dtype=torch.float64))
