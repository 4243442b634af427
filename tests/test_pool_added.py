"""ChainPool.add and labels: a replay buffer, first in first out or a reservoir."""

import math

import pytest
import torch
from pools import DIM, RULE, pool_of, same
from scipy import stats
from torch import nn

import fastebm
from fastebm import ClassifierEnergy, MLPEnergy

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def energy() -> MLPEnergy:
    return MLPEnergy(DIM, (9, 8))


def test_labels_stay_with_their_chains():
    energy = ClassifierEnergy(nn.Sequential(nn.Linear(DIM, 8), nn.SiLU(), nn.Linear(8, 4)))
    labels = torch.arange(50) % 4
    pool = pool_of(labels=labels.to(torch.int32), reinit_prob=0.0)
    samples, energies = pool.sample(energy, 20, RULE, 3)
    assert torch.equal(pool.last.labels, labels[pool.last.chains])
    torch.testing.assert_close(energies, fastebm.energy(energy, samples, labels=pool.last.labels).detach())
    pool.advance(energy, RULE, 2, chunk_size=8)
    torch.testing.assert_close(pool.energies, fastebm.energy(energy, pool.states, labels=labels).detach())
    pool.add(torch.zeros(3, DIM), torch.tensor([3, 3, 2], dtype=torch.uint8))
    assert pool.labels.tolist() == [3, 3, 2, *labels[3:].tolist()]
    assert pool.last.labels.tolist() == labels.tolist()  # `last` is not changed by add

    other = pool_of()
    other.load_state_dict(pool.state_dict())
    assert same(pool, other)
    other.labels = labels + 1
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
        other.sample(energy, 20, RULE, 1)
    other.labels = None
    other.sample(energy, 20, RULE, 1)
    assert other.last.labels is None
    with pytest.raises(ValueError, match=r"labels= was given, and MLPEnergy.forward takes x only"):
        pool.sample(MLPEnergy(DIM, (4,)), 20, RULE, 1)


def numbered(first, n):
    """States whose value is their number."""
    return torch.arange(first, first + n, dtype=torch.float32)[:, None].expand(n, DIM) / 1000


def test_fifo_replaces_the_oldest(energy):
    pool = pool_of(10, labels=torch.zeros(10, dtype=torch.int64))
    pool.advance(ClassifierEnergy(nn.Linear(DIM, 3)), RULE, 2)
    pool.add(numbered(0, 4), torch.arange(4))
    assert pool.steps.tolist() == [2] * 10  # the noise counter is not reset
    assert pool.ages.tolist() == [0] * 4 + [2] * 6
    assert pool.reinits.tolist() == [1] * 4 + [0] * 6
    assert pool.energies.isnan().tolist() == [True] * 4 + [False] * 6
    pool.add(numbered(4, 3), torch.arange(3))
    pool.add(numbered(7, 6), torch.arange(6))
    assert (pool.states[:, 0] * 1000).round().long().tolist() == [10, 11, 12, 3, 4, 5, 6, 7, 8, 9]
    assert pool.labels.tolist() == [3, 4, 5, 3, 0, 1, 2, 0, 1, 2]
    pool.add(numbered(0, 25), torch.zeros(25, dtype=torch.int64))  # more than the pool has: the last ones stay
    assert sorted((pool.states[:, 0] * 1000).round().long().tolist()) == list(range(15, 25))
    assert pool.added == 38


def test_a_reservoir_keeps_every_state_that_was_seen_equally_often():
    kept = torch.zeros(40, dtype=torch.int64)
    for seed in range(200):
        pool = pool_of(8, seed=seed)
        for first, n in ((0, 5), (5, 10), (15, 24), (39, 1)):
            pool.add(numbered(first, n), policy="reservoir")
        numbers = (pool.states[:, 0] * 1000).round().long()
        assert len(numbers.unique()) == 8
        kept[numbers] += 1
    assert stats.chisquare(kept.numpy()).pvalue > 1e-6


def test_added_states_do_not_depend_on_how_they_come():
    pool, other = pool_of(8), pool_of(8)
    pool.add(numbered(0, 100), policy="reservoir")
    for first, n in ((0, 3), (3, 60), (63, 37)):
        other.add(numbered(first, n), policy="reservoir")
    assert torch.equal(pool.states, other.states)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"policy": "lifo"}, ValueError, 'policy must be "fifo" or "reservoir", got \'lifo\''),
        ({"samples": torch.zeros(3, 4)}, ValueError, r"samples must be \(n, 3\), got \(3, 4\)"),
        ({"samples": torch.full((3, 3), math.nan)}, ValueError, "samples must be finite"),
        ({"samples": torch.full((3, 3), 1e39, dtype=torch.float64)}, ValueError, "samples must be finite in float32"),
        ({"samples": torch.full((3, 3), 255.0)}, ValueError, "samples must lie within the pool's clamp .* 255: scale"),
        ({"samples": [[0.0] * 3]}, TypeError, "samples must be a floating-point tensor of states, got list"),
        ({"labels": None}, ValueError, "this pool has labels: pass labels= of the samples"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels must be \(3,\), one per sample"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be a tensor of integers"),
        ({"labels": torch.zeros(3) + 0j}, TypeError, "labels must be a tensor of integers, got torch.complex64"),
    ],
)
def test_added_states_that_are_refused_change_nothing(options, error, match):
    labels = torch.zeros(50, dtype=torch.int64)
    pool = pool_of(labels=labels)
    with pytest.raises(error, match=match):
        pool.add(**{"samples": torch.zeros(3, 3), "labels": labels[:3], **options})
    assert same(pool, pool_of(labels=labels))
    with pytest.raises(ValueError, match="this pool has no labels: build it with labels=, or pass none"):
        pool_of().add(torch.zeros(3, 3), labels[:3])
