"""Diffusion recovery likelihood: its formula, levels, processes, resumption, generation, and its minimum."""

import math

import pytest
import torch
from torch import nn

from fastebm import DiffusionRecoveryLikelihood, Langevin, MLPEnergy, sample

SIGMAS = (2.0, 1.0, 0.3)


class NoiseConditional(nn.Module):
    """E(x, sigma): an MLP of x and log sigma."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = MLPEnergy(dim + 1, [5, 4])

    def forward(self, x, sigma):
        return self.mlp(torch.cat([x, sigma[:, None].log()], dim=1))


class Gaussian(nn.Module):
    """The energy of blurred N(mean, exp(2 log_std)): exact at every noise level."""

    def __init__(self, mean=0.0, log_std=0.0):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(log_std))

    def forward(self, x, sigma):
        return (x - self.mean).square().sum(dim=1) / (2 * ((2 * self.log_std).exp() + sigma.square()))


@pytest.fixture
def energy(seeded):
    return NoiseConditional(3).double()


@pytest.fixture
def batch(seeded):
    return torch.randn(7, 3).double()


def test_the_loss_is_its_formula(energy, batch):
    objective = DiffusionRecoveryLikelihood(SIGMAS, 4, step_scale=0.2, reg_alpha=0.1, seed=3)
    draws = objective.draws(batch)
    loss, metrics, samples = objective(energy, batch)
    second = (draws.uniform() > 0.5).double()  # of two levels
    assert 0 < second.sum() < 7
    sigma, before = 1.0 - 0.7 * second, 2.0 - second
    s = (before.square() - sigma.square()).sqrt()
    x = batch + sigma[:, None] * draws.normal()
    noisy = x + s[:, None] * draws.normal()

    def posterior(states):
        return energy(states, sigma)[:, 0] + (states - noisy).square().sum(dim=1) / (2 * s.square())

    sampler = Langevin((0.2 * s[:, None]).square(), 1.0)
    recovered = sample(posterior, sampler, init=noisy, steps=4, seed=draws.seed(), backend="reference").x
    assert torch.allclose(samples, recovered, rtol=1e-10)
    real, negative = energy(x, sigma), energy(samples, sigma)
    expected = real.mean() - negative.mean() + 0.1 * (real.square().mean() + negative.square().mean())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for found, wanted in zip(
        *(torch.autograd.grad(v, list(energy.parameters())) for v in (loss, expected)), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert metrics["energy_real"].item() == pytest.approx(real.mean().item())
    assert metrics["energy_samples"].item() == pytest.approx(negative.mean().item())


def test_generation_has_the_law_of_the_energy():
    """Gaussian data: samples have the variance of the data and the last level, up to the bias of the steps."""
    mean, std, n = 1.0, 0.5, 4000
    sigmas = torch.logspace(1.0, -1.0, 9).tolist()
    objective = DiffusionRecoveryLikelihood(sigmas, 100, step_scale=0.3)
    energy = Gaussian(mean, math.log(std)).double()
    x = objective.sample(energy, n, (2,), seed=1)
    assert x.shape == (n, 2)
    assert x.dtype == torch.float64
    variance = std**2 + sigmas[-1] ** 2
    assert (x.mean(0) - mean).abs().max() < 4.9 * math.sqrt(variance / n) + 0.02
    # the step's size is at most 0.09 of each posterior's variance, and a Langevin step's bias a quarter of that
    assert (x.var(0) / variance - 1).abs().max() < 4.9 * math.sqrt(2 / n) + 0.09 / 4
    assert abs(torch.corrcoef(x.T)[0, 1]) < 4.9 / math.sqrt(n)
    still = DiffusionRecoveryLikelihood([3.0, 1.0], 1, step_scale=1e-6).sample(energy, n, 2, seed=1)
    assert (still.var(0) / 9.0 - 1).abs().max() < 4.9 * math.sqrt(2 / n)  # chains start from N(0, sigma_1^2)
    again = objective.sample(energy, 100, 2, seed=1)
    assert torch.equal(again, x[:100])  # other rows change nothing


def test_bad_input_is_refused(energy, batch):
    with pytest.raises(ValueError, match="sigmas must decrease"):
        DiffusionRecoveryLikelihood([1.0, 2.0], 3)
    with pytest.raises(ValueError, match="two or more noise levels"):
        DiffusionRecoveryLikelihood([1.0], 3)
    with pytest.raises(ValueError, match="step_scale must be finite and > 0"):
        DiffusionRecoveryLikelihood(SIGMAS, 3, step_scale=0.0)
    with pytest.raises(ValueError, match="on_nonfinite must be one of"):
        DiffusionRecoveryLikelihood(SIGMAS, 3, on_nonfinite="drop")
    with pytest.raises(ValueError, match="sampler_steps must be >= 1"):
        DiffusionRecoveryLikelihood(SIGMAS, 0)
    with pytest.raises(ValueError, match="leave labels= out"):
        DiffusionRecoveryLikelihood(SIGMAS, 3)(energy, batch, labels=torch.zeros(7).long())
    with pytest.raises(ValueError, match="takes x only"):
        DiffusionRecoveryLikelihood(SIGMAS, 3)(MLPEnergy(3, [4]).double(), batch)


def test_the_minimum_is_the_law_of_the_data():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = 1.0 + 0.5 * torch.randn(1000, 2)
    energy = Gaussian()
    objective = DiffusionRecoveryLikelihood([2.0, 0.7, 0.2], 20, step_scale=0.3, seed=0)
    optimizer = torch.optim.Adam(energy.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    for _ in range(200):
        optimizer.zero_grad()
        objective(energy, data).loss.backward()
        optimizer.step()
        schedule.step()
    assert energy.mean.item() == pytest.approx(1.0, abs=0.05)
    assert energy.log_std.exp().item() == pytest.approx(0.5, abs=0.05)
