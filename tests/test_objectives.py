"""Objectives: one type of result, the loss of the function, and the chains of the pool."""

import pytest
import torch

from fastebm import ChainPool, ContrastiveDivergence, Langevin, Loss, MLPEnergy, contrastive_divergence_loss

SAMPLER = Langevin(0.1)


@pytest.fixture
def energy(seeded):
    return MLPEnergy(3, [5, 4])


@pytest.fixture
def batch(seeded):
    return torch.randn(6, 3)


def pool():
    return ChainPool(20, 3, clamp=(-2.0, 2.0), seed=1)


def test_persistent_contrastive_divergence_is_the_loop_that_people_write(energy, batch):
    by_hand, objective = pool(), ContrastiveDivergence(SAMPLER, steps=3, pool=pool(), reg_alpha=0.1)
    for _ in range(3):
        samples, _ = by_hand.sample(energy, len(batch), SAMPLER, 3)
        energies = energy(torch.cat([batch, samples]))[:, 0]
        expected = contrastive_divergence_loss(energies[:6], energies[6:], reg_alpha=0.1)
        found = objective(energy, batch)
        assert isinstance(found, Loss)
        assert torch.equal(found.loss, expected)
        assert torch.equal(found.samples, samples)
        assert found.metrics["energy_real"].item() == pytest.approx(energies[:6].mean().item())
        assert found.metrics["energy_samples"].item() == pytest.approx(energies[6:].mean().item())
        assert not any(value.requires_grad for value in found.metrics.values())
    found.loss.backward()
    assert all(p.grad is not None for p in energy.parameters())
    assert torch.equal(objective.pool.states, by_hand.states)


def test_without_a_pool_chains_start_at_the_data(energy, batch):
    still = ContrastiveDivergence(SAMPLER, steps=0)(energy, batch)
    assert torch.equal(still.samples, batch)
    assert still.loss.item() == pytest.approx(0.02 * energy(batch).square().mean().item(), abs=1e-6)
    torch.manual_seed(5)
    first = ContrastiveDivergence(SAMPLER, steps=4)(energy, batch).samples
    again = ContrastiveDivergence(SAMPLER, steps=4)(energy, batch).samples
    torch.manual_seed(5)
    assert torch.equal(ContrastiveDivergence(SAMPLER, steps=4)(energy, batch).samples, first)
    assert not torch.equal(first, again)


def test_a_part_of_a_batch_is_divided_by_the_whole(energy, batch):
    """As processes do that share a batch of 12: their losses and metrics add up."""
    objective = ContrastiveDivergence(SAMPLER, steps=2, pool=pool())
    found = objective(energy, batch, batch_size=12)
    assert len(found.samples) == 12  # the pool of a single process draws all
    energies = energy(torch.cat([batch, found.samples]))[:, 0]
    assert found.metrics["energy_real"].item() == pytest.approx(energies[:6].sum().item() / 12)
    expected = contrastive_divergence_loss(energies[:6], energies[6:], batch_size=12)
    assert found.loss.item() == pytest.approx(expected.item())
