"""Objectives: one type of result, their random numbers, the loss of the function, and the chains of the pool."""

import pytest
import torch
from scipy import stats

from fastebm import (
    ChainPool,
    ContrastiveDivergence,
    Langevin,
    Loss,
    MLPEnergy,
    Objective,
    contrastive_divergence_loss,
)
from fastebm.objectives.base import Draws

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


def numbers(draws):
    """One of each kind of draw, by name."""
    return {
        "normal": draws.normal(),
        "copies": draws.normal(copies=3),
        "uniform": draws.uniform(),
        "uniform copies": draws.uniform(copies=2),
        "uniforms": draws.uniforms(),
        "uniforms copies": draws.uniforms(copies=2),
        "again": draws.normal(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_numbers_depend_on_the_seed_the_call_and_the_row_alone(dtype):
    batch = torch.zeros(7, 2, 3, dtype=dtype)
    objective = Objective(seed=-5)
    whole = numbers(objective.draws(batch))
    shapes = {
        "normal": (7, 2, 3), "copies": (7, 3, 2, 3), "uniform": (7,), "uniform copies": (7, 2), "uniforms": (7, 2, 3),
        "uniforms copies": (7, 2, 2, 3), "again": (7, 2, 3),
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in whole.items()} == shapes
    assert all(x.dtype == dtype for x in whole.values())
    # a part of the rows
    part = numbers(Objective(seed=-5).draws(batch[4:], first_row=4))
    assert all(torch.equal(part[name], x[4:]) for name, x in whole.items())
    # another call, seed or draw has other numbers
    objective.calls += 1
    later, other = numbers(objective.draws(batch)), numbers(Objective(seed=6).draws(batch))
    assert not any(torch.isin(new[name], x).any() for new in (later, other) for name, x in whole.items())
    assert not torch.isin(whole["again"], torch.cat([whole["normal"].flatten(), whole["copies"].flatten()])).any()
    # a saved objective goes on
    resumed = Objective(seed=0)
    objective.calls += 1
    resumed.load_state_dict(objective.state_dict())
    assert resumed.seed == objective.seed
    next_call = numbers(objective.draws(batch))
    assert all(torch.equal(x, next_call[name]) for name, x in numbers(resumed.draws(batch)).items())


def test_seeds_for_samplers():
    draws = Objective(seed=1).draws(torch.zeros(2, 3))
    first, second = draws.seed(), draws.seed()
    assert first != second
    assert Objective(seed=1).draws(torch.zeros(5, 4), first_row=9).seed() == first  # the same for any rows
    assert 0 <= first < 2**64
    for _ in range(14):
        draws.uniform()
    with pytest.raises(RuntimeError, match="16 draws"):
        draws.uniform()


def test_normal_numbers_are_normal():
    draws = Objective(seed=3).draws(torch.zeros(20_000, 2))
    x, u = draws.normal(copies=2).flatten(1), draws.uniforms()
    assert (x.mean(0).abs() < 4.9 / 20_000**0.5).all()
    assert ((x.T @ x / 20_000 - torch.eye(4)).abs() < 4.9 * 2**0.5 / 20_000**0.5).all()
    assert ((u.mean(0) - 0.5).abs() < 4.9 / (12 * 20_000) ** 0.5).all()


def test_strata_divide_the_batch_evenly():
    n, batch = 8, torch.zeros(8, 2, dtype=torch.float64)
    calls = torch.stack([Draws(3, call, batch).strata() for call in range(1000)])
    torch.testing.assert_close(calls.sort(dim=1).values.diff(dim=1), torch.full((1000, n - 1), 1 / n).double())
    assert all(stats.kstest(row, "uniform").pvalue > 1e-6 for row in calls.T)
    # in random order: rows are in the same half as the first, 3 times of 7, and one row's rank follows no other's
    same_half = ((calls - calls[:, :1]) % 1.0 < 0.5)[:, 1:].double().mean(0)
    assert ((same_half - 3 / 7).abs() < 4.9 * 0.5 / 1000**0.5).all()
    part = Draws(3, 0, batch[4:6], first_row=4, n_rows=n).strata()
    assert torch.equal(part, calls[0, 4:6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_strata_of_half_precision_have_all_levels(dtype):
    u = Draws(3, 0, torch.zeros(1000, 1, dtype=dtype)).strata()
    assert u.dtype == torch.float32
    assert len((u * 1000).long().unique()) > 990  # of 1000, up to rounding


def test_a_part_of_a_batch_is_divided_by_the_whole(energy, batch):
    """As processes do that share a batch of 12: their losses and metrics add up."""
    objective = ContrastiveDivergence(SAMPLER, steps=2, pool=pool())
    found = objective(energy, batch, batch_size=12)
    assert len(found.samples) == 12  # the pool of a single process draws all
    energies = energy(torch.cat([batch, found.samples]))[:, 0]
    assert found.metrics["energy_real"].item() == pytest.approx(energies[:6].sum().item() / 12)
    expected = contrastive_divergence_loss(energies[:6], energies[6:], batch_size=12)
    assert found.loss.item() == pytest.approx(expected.item())
