"""The margin loss: its formula on pairs, labels, processes, and which energies it stops at."""

import pytest
import torch

from fastebm import ChainPool, HingeLoss, Langevin, MLPEnergy

SAMPLER = Langevin(0.5)


@pytest.fixture
def energy(seeded):
    return MLPEnergy(3, [5, 4]).double()


@pytest.fixture
def batch(seeded):
    return torch.randn(6, 3).double()


def test_the_loss_is_its_formula(energy, batch):
    margin = 0.01
    loss, metrics, samples = HingeLoss(SAMPLER, 4, margin=margin)(energy, batch)
    pairs = [(margin + energy(x[None]) - energy(y[None])).squeeze() for x, y in zip(batch, samples, strict=True)]
    zero = torch.zeros((), dtype=torch.float64)
    expected = torch.stack([torch.maximum(pair, zero) for pair in pairs]).mean()
    assert 0 < sum(pair > 0 for pair in pairs) < 6  # both cases
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["within_margin"].item() == pytest.approx(sum((pair > 0).item() for pair in pairs) / 6)
    assert metrics["energy_samples"].item() == pytest.approx(energy(samples).mean().item())
    for found, wanted in zip(
        *(torch.autograd.grad(v, list(energy.parameters())) for v in (loss, expected)), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14)


def test_a_pool_gives_each_row_a_sample(energy, batch):
    pool = ChainPool(20, 3, seed=1)
    found = HingeLoss(SAMPLER, 2, pool=pool)(energy.float(), batch.float(), batch_size=12)
    assert len(found.samples) == 6
    assert len(pool.last.chains) == 6


def test_a_pool_that_processes_share_is_refused():
    class Shared(ChainPool):
        n_local = 3

        def __init__(self):
            pass

        def __len__(self):
            return 6

    with pytest.raises(ValueError, match="no pool that processes share"):
        HingeLoss(SAMPLER, 2, pool=Shared())
    with pytest.raises(ValueError, match="margin must be finite and >= 0"):
        HingeLoss(SAMPLER, 2, margin=-1.0)


def test_energies_end_a_margin_apart():
    """Two points: 0 is data, and the chains stay at 1. The loss has no gradient from there on."""
    energy = torch.nn.Linear(1, 1)
    data, pool = torch.zeros(4, 1), ChainPool(4, 1, init=torch.ones(1, 1), reinit_prob=0.0, seed=0)
    objective = HingeLoss(SAMPLER, 0, pool=pool, margin=2.0)
    optimizer = torch.optim.SGD(energy.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        objective(energy, data).loss.backward()
        optimizer.step()
    gap = energy(torch.ones(1, 1)) - energy(torch.zeros(1, 1))
    assert 2.0 <= gap.item() <= 2.1 + 1e-5  # a step changes the gap by 0.1
    assert objective(energy, data).loss.item() == 0.0
