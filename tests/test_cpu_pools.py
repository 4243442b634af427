"""Pools on a CPU: Numba's draws and copies give the bits of plain PyTorch."""

import copy
import pickle
import sys

import pytest
import torch
from small_energies import Square, seeded_mlp

import fastebm
from fastebm import rng as noise
from fastebm import threads
from fastebm.backends import Advanced
from fastebm.pool import copies, draws, moves
from fastebm.threads import share


@pytest.mark.parametrize(
    ("n", "k", "probability"),
    [(10_000, 128, 0.05), (256, 128, 0.5), (1000, 1, 1.0), (2**31 - 1, 2000, 0.0), (5000, 2500, 0.3), (2, 1, 0.2)],
)
def test_drawn_chains_and_restarts_are_those_of_pytorch(without_numba, n, k, probability):
    arguments = 2**63 + 5, 2**31 + 7, 9, n, k, probability, torch.device("cpu")
    chains, restarts = draws._drawn(*arguments)
    assert all(len(row.unique()) == k for row in chains)
    for ours, theirs in zip((chains, restarts), without_numba(draws._drawn, *arguments), strict=True):
        assert torch.equal(ours, theirs)


def tensors_of(pool):
    return {name: value for name, value in pool.state_dict().items() if isinstance(value, torch.Tensor)}


def rows_that_share_memory(seed, stream, chains, steps):
    return noise.uniform(seed, stream, chains, steps, 1).expand(-1, 6)


@pytest.fixture
def small_parts(monkeypatch):
    """Threads share the copies of a few chains. -> How many threads each call had."""
    seen = []

    def counted(call, n_threads):
        seen.append(n_threads)
        threads.together(call, n_threads)

    monkeypatch.setattr(copies, "_NUMBERS_PER_THREAD", 8)
    monkeypatch.setattr(copies, "_NUMBERS_AT_ONCE", 20)
    monkeypatch.setattr(copies, "together", counted)
    copies._spares.cache_clear()
    with threads.threads(3):
        yield seen
    copies._spares.cache_clear()


@pytest.mark.parametrize("batch_size", [1, 17, 400])  # the last sorts keys
@pytest.mark.parametrize("init", ["uniform", rows_that_share_memory, torch.linspace(0, 1, 60).reshape(10, 6)])
def test_pools_are_those_of_pytorch(without_numba, team, small_parts, init, batch_size):
    """All that is kept of every chain, after draws, restarts and states put back."""

    def kept():
        pool = fastebm.ChainPool(500, 6, clamp=(0.0, 1.0), seed=3, reinit_prob=0.3, init=init)
        for i in range(70):  # more than are worked out at once
            draw = pool._next_draw(batch_size)
            x, before = moves.take(draw, pool._storage, pool._records)
            energies = x.sum(dim=1)
            done = Advanced((x + 0.01 * i).clamp(0, 1), energies, energies)
            moves.put(draw, pool._storage, pool._records, before, before + i, done)()
            pool.draws += 1
        return tensors_of(pool)

    ours, n_calls = kept(), len(small_parts)
    theirs = without_numba(kept)
    assert n_calls == len(small_parts) == 140
    assert (max(small_parts) > 1) == (batch_size > 1)
    assert ours["reinits"].sum() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_pool_in_several_threads_keeps_its_memory_whole(small_parts):
    """Which chains a call gets is then anybody's guess, but all that is written is right."""
    energy, rule = seeded_mlp(6), fastebm.Langevin(0.1, 0.005)
    pool = fastebm.ChainPool(500, 6, seed=3, clamp=(0.0, 1.0))

    def work(batch_size, interrupted):
        for _ in range(40):
            pool.sample(energy, batch_size, rule, 3)

    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        share([3, 11, 200, 400], work, 4)
    finally:
        sys.setswitchinterval(interval)
    assert ((pool.steps % 3 == 0) & (pool.steps <= 4 * 40 * 3)).all()
    assert (pool.states.isfinite() & (pool.states >= 0) & (pool.states <= 1)).all()
    assert (pool.reinits <= 4 * 40).all()


def test_a_graph_of_states_that_have_moved_is_refused():
    pool, w = fastebm.ChainPool(50, 6), torch.ones(6, requires_grad=True)
    loss = (pool.states @ w).sum()
    pool.sample(seeded_mlp(6), 8, fastebm.Langevin(0.1, 0.005), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_pool_of_inference_mode_and_one_after_it():
    copies._spares.cache_clear()
    energy, rule, found = seeded_mlp(6), fastebm.Langevin(0.1, 0.005), []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            pool = fastebm.ChainPool(50, 6, seed=1)
            found.append(pool.sample(energy, 8, rule, 2)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copied_pool_moves_chains_of_its_own(copied_by):
    energy, rule = seeded_mlp(6), fastebm.Langevin(0.1, 0.005)
    pool, same = (fastebm.ChainPool(50, 6, seed=1) for _ in range(2))
    pool.sample(energy, 8, rule, 2)  # what it keeps for the next draw is copied too
    same.sample(energy, 8, rule, 2)
    copied = copied_by(pool)
    before = tensors_of(copied)
    pool.sample(energy, 8, rule, 2)
    torch.testing.assert_close(tensors_of(copied), before, rtol=0, atol=0, equal_nan=True)
    for other in (same, copied):
        assert torch.equal(other.sample(energy, 8, rule, 2)[0], pool.states[pool.last.chains])
        assert torch.equal(other.states, pool.states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_energies_of_another_dtype(dtype):
    """A module may put out what is not the states' dtype."""

    class Other(Square):
        def forward(self, x):
            return super().forward(x).to(dtype)

    pool = fastebm.ChainPool(50, 6, seed=1)
    _, energies = pool.sample(Other(6), 8, fastebm.Langevin(0.01, 0.005), 2)
    assert energies.dtype == pool.energies.dtype == torch.float32
    assert torch.equal(pool.energies[pool.last.chains], energies)
    assert (energies - Square(6)(pool.states[pool.last.chains])).abs().max() < (1e-6 if dtype == torch.float64 else 0.1)
