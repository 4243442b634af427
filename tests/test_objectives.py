"""Objectives: one type of result, their random numbers, the loss of the function, and the chains of the pool."""

from functools import partial

import pytest
import torch
from objective_cases import LABELS, OBJECTIVES
from scipy import stats
from torch import nn

from fastebm import (
    JEM,
    ChainPool,
    ClassifierEnergy,
    ContrastiveDivergence,
    CooperativeTraining,
    DenoisingScoreMatching,
    DiffusionRecoveryLikelihood,
    GaussianEnergy,
    HingeLoss,
    Langevin,
    Loss,
    MLPEnergy,
    MultiLevelDenoisingScoreMatching,
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


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"rows": 0}, ValueError, "a batch must have rows, got 0: .* passes batch_size="),
        ({"dtype": torch.int64}, TypeError, r"got torch.int64: pass batch.float\(\)"),
        ({"batch_size": 5}, ValueError, "batch_size, the rows over all processes, must be >= 6, got 5"),
        ({"batch_size": 6.0}, TypeError, "must be an int, got 6.0"),
        ({"batch_size": 0, "rows": 0}, ValueError, "must be >= 1, got 0"),
        ({"batch_size": 8, "first_row": 3}, ValueError, "first_row must be 0 to 2, got 3"),
        ({"labels": torch.zeros(6)}, ValueError, r"labels must be \(6,\) integers, .* got \(6,\) torch.float32"),
        ({"labels": torch.zeros(5).long()}, ValueError, r"labels must be \(6,\) integers, .* got \(5,\)"),
    ],
)
def test_bad_arguments_change_nothing(energy, call, error, match):
    batch = torch.zeros(call.pop("rows", 6), 3, dtype=call.pop("dtype", torch.float32))
    objective = ContrastiveDivergence(SAMPLER, 2, pool=pool())
    with pytest.raises(error, match=match):
        objective(energy, batch, **call)
    assert objective.calls == 0
    assert objective.pool.draws == 0


def test_a_refused_call_is_not_counted(energy, batch):
    """Else a run that goes on after it would have other numbers."""
    refused = [
        MultiLevelDenoisingScoreMatching([2.0, 1.0]),  # the energy takes no condition
        DiffusionRecoveryLikelihood([2.0, 1.0], 1),
        CooperativeTraining(nn.Linear(2, 4), SAMPLER, 1, latent_dim=2),  # states have 3 dims
        ContrastiveDivergence(SAMPLER, 2, pool=ChainPool(20, 3, labels=torch.arange(20) % 3)),  # no labels in the call
        HingeLoss(SAMPLER, 2, pool=ChainPool(20, 3, labels=torch.arange(20) % 3)),
    ]
    for objective in refused:
        with pytest.raises(ValueError, match=r"x only|must return \(6, 3\)|pool's chains have labels: pass labels="):
            objective(energy, batch)
        assert objective.calls == 0
        assert getattr(objective, "pool", None) is None or objective.pool.draws == 0
    with pytest.raises(ValueError, match="takes x only, and labels="):
        DenoisingScoreMatching(0.1)(energy, batch, labels=torch.zeros(6).long())
    objective = ContrastiveDivergence(SAMPLER, 2, pool=pool(), pull_away=0.1)
    with pytest.raises(ValueError, match=r"last nn.Linear, and it has none"):
        objective(GaussianEnergy(torch.zeros(3), 1.0), batch)
    assert (objective.calls, objective.pool.draws) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cd", "cd, penalised", "jem", "hinge", "diffusion_recovery", "vp_dsm", "entropy"])
def test_energies_in_half_precision(name, dtype, seeded):
    entropy = partial(ContrastiveDivergence, SAMPLER, 2, entropy=0.1), OBJECTIVES["cd"][1]
    objective, energy = {**OBJECTIVES, "entropy": entropy}[name]
    energy, x = energy(), torch.randn(12, 3)
    labels = LABELS if name == "jem" else None
    found = objective(seed=1)(energy.to(dtype), x.to(dtype), labels=labels)
    assert found.samples is None or found.samples.dtype == dtype
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in energy.parameters())


@pytest.mark.parametrize("objective", [partial(ContrastiveDivergence, pull_away=0.1), JEM])
def test_a_compiled_energy_that_was_called_before(batch, objective):
    energy, labels = ClassifierEnergy(MLPEnergy(3, [4], outputs=3)), torch.arange(6) % 3
    compiled = torch.compile(energy, backend="eager")
    compiled(torch.cat([batch, batch]))
    found, expected = (objective(SAMPLER, 1, seed=1)(model, batch, labels=labels) for model in (compiled, energy))
    assert found.loss.item() == pytest.approx(expected.loss.item())
    assert found.metrics.keys() == expected.metrics.keys()
