"""Cooperative training: its formula, who learns from what, processes, resumption, samples, and what it learns."""

import pytest
import torch
from torch import nn

from fastebm import CooperativeTraining, Langevin, MLPEnergy

SAMPLER = Langevin(0.1)


def generator(dim=3):
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, dim)).double()


def objective(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return CooperativeTraining(generator(), SAMPLER, 3, **{"latent_dim": 2, "seed": 5, **options})


@pytest.fixture
def energy(seeded):
    return MLPEnergy(3, [5, 4]).double()


@pytest.fixture
def batch(seeded):
    return torch.randn(6, 3).double()


def test_the_loss_is_its_formula(energy, batch):
    cooperative = objective(weight=0.5, reg_alpha=0.1)
    z = cooperative.draws(batch).normal(shape=(2,))
    loss, metrics, revised = cooperative(energy, batch)
    generated = cooperative.generator(z)
    teaching = torch.stack([(g - r).square().sum() for g, r in zip(generated, revised, strict=True)]).mean()
    real, negative = energy(batch), energy(revised)
    of_energy = real.mean() - negative.mean() + 0.1 * (real.square().mean() + negative.square().mean())
    assert loss.item() == pytest.approx((of_energy + 0.5 * teaching).item(), rel=1e-12)
    assert metrics["teaching"].item() == pytest.approx(teaching.item(), rel=1e-12)
    assert not torch.allclose(generated, revised)
    players = (energy, of_energy), (cooperative.generator, 0.5 * teaching)
    loss.backward()
    for player, alone in players:
        expected = torch.autograd.grad(alone, list(player.parameters()))
        for p, g in zip(player.parameters(), expected, strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-10, atol=1e-13)
    assert {name.split(".")[0] for name, _ in cooperative.named_parameters()} == {"generator"}


def test_chains_start_within_the_bounds(energy, batch):
    still = CooperativeTraining(generator(), Langevin(0.1), 0, latent_dim=2, clamp=(-0.1, 0.1))
    assert still(energy, batch).samples.abs().max() == 0.1


def test_samples_of_the_generator(energy):
    cooperative = objective()
    x = cooperative.sample(7, seed=3)
    assert x.shape == (7, 3)
    assert not x.requires_grad
    assert torch.equal(cooperative.sample(4, seed=3), x[:4])
    assert not torch.equal(cooperative.sample(7, seed=4), x)
    assert cooperative.sample(0).shape == (0, 3)


def test_bad_input_is_refused(energy, batch):
    with pytest.raises(ValueError, match=r"the generator must return \(6, 3\), got \(6, 2\)"):
        CooperativeTraining(generator(2), SAMPLER, 2, latent_dim=2)(energy, batch)
    with pytest.raises(TypeError, match="generator must be"):
        CooperativeTraining(None, SAMPLER, 2, latent_dim=2)
    with pytest.raises(ValueError, match="latent_dim must be >= 1"):
        CooperativeTraining(generator(), SAMPLER, 2, latent_dim=0)


def test_a_linear_generator_and_a_quadratic_energy_find_a_gaussian():
    """Means of data, energy and generator agree. Each player has the other's help alone."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return (x - self.mean).square().sum(dim=1) / 2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data, linear = 2.0 + torch.randn(500, 1), nn.Linear(1, 1)
    energy = Quadratic()
    cooperative = CooperativeTraining(linear, Langevin(0.5), 5, latent_dim=1, reg_alpha=0.0, seed=0)
    optimizer = torch.optim.Adam([*energy.parameters(), *cooperative.parameters()], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        cooperative(energy, data).loss.backward()
        optimizer.step()
    assert energy.mean.item() == pytest.approx(data.mean().item(), abs=0.25)
    assert cooperative.sample(2000, seed=0).mean().item() == pytest.approx(data.mean().item(), abs=0.25)
