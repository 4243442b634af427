"""Pools on a CPU: Numba's draws and copies give the bits of plain PyTorch."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import runs
import torch
from small_energies import Square, seeded_mlp
from torch import nn

import fastebm
from fastebm import rng as noise
from fastebm import threads


@pytest.mark.parametrize(
    ("n", "k", "probability"),
    [(10_000, 128, 0.05), (256, 128, 0.5), (1000, 1, 1.0), (2**31 - 1, 2000, 0.0), (5000, 2500, 0.3), (2, 1, 0.2)],
)
def test_drawn_and_reinitialised_chains_are_those_of_pytorch(without_numba, n, k, probability):
    arguments = 2**63 + 5, 2**31 + 7, 9, n, k, probability
    chains, reinit = runs.drawn_chains(*arguments)
    assert all(len(row.unique()) == k for row in chains)
    for ours, theirs in zip((chains, reinit), without_numba(runs.drawn_chains, *arguments), strict=True):
        assert torch.equal(ours, theirs)


DIM = 200  # a batch of 400 is large enough for a second thread


def tensors_of(pool):
    return {name: value for name, value in pool.state_dict().items() if isinstance(value, torch.Tensor)}


def rows_that_share_memory(seed, stream, chains, steps):
    return noise.uniform(seed, stream, chains, steps, 1).expand(-1, DIM)


class Plane(nn.Module):
    """E = sum of x: its slope is exactly 1, so that steps by Numba and by PyTorch have the same bits."""

    def forward(self, x):
        return x.sum(dim=1)


@pytest.fixture
def three_threads():
    with threads.threads(3):
        yield


@pytest.mark.parametrize("batch_size", [1, 17, 400])  # 400 chains are drawn by sorting keys, and copied by 2 threads
@pytest.mark.parametrize("init", ["uniform", rows_that_share_memory, torch.linspace(0, 1, 10 * DIM).reshape(10, DIM)])
@pytest.mark.usefixtures("team", "three_threads")
def test_pools_are_those_of_pytorch(without_numba, init, batch_size):
    """All that is kept of every chain, after 70 draws (more than are computed ahead) with reinitialised chains."""
    sampler = fastebm.Langevin(0.125, 0.0, clamp=(0.0, 1.0))

    def kept():
        pool = fastebm.ChainPool(500, DIM, clamp=(0.0, 1.0), seed=3, reinit_prob=0.3, init=init)
        for _ in range(70):
            pool.sample(Plane(), batch_size, sampler, 1)
        return tensors_of(pool)

    ours = kept()
    assert ours["reinits"].sum() > 0
    torch.testing.assert_close(ours, without_numba(kept), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("three_threads")
def test_a_pool_in_several_threads_keeps_its_memory_whole():
    """Which chains a call gets depends on timing, but every chain that is written is whole."""
    energy, sampler = seeded_mlp(DIM), fastebm.Langevin(0.1, 0.005)
    pool = fastebm.ChainPool(500, DIM, seed=3, clamp=(0.0, 1.0))

    def work(batch_size):
        for _ in range(40):
            pool.sample(energy, batch_size, sampler, 3)

    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(4) as callers:
            list(callers.map(work, [3, 11, 200, 400]))
    finally:
        sys.setswitchinterval(interval)
    assert ((pool.steps % 3 == 0) & (pool.steps <= 4 * 40 * 3)).all()
    assert (pool.states.isfinite() & (pool.states >= 0) & (pool.states <= 1)).all()
    assert (pool.reinits <= 4 * 40).all()


def test_backward_through_states_that_have_moved_is_refused():
    pool, w = fastebm.ChainPool(50, 6), torch.ones(6, requires_grad=True)
    loss = (pool.states @ w).sum()
    pool.sample(seeded_mlp(6), 8, fastebm.Langevin(0.1, 0.005), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_pool_of_inference_mode_and_one_after_it():
    energy, sampler, found = seeded_mlp(6), fastebm.Langevin(0.1, 0.005), []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            pool = fastebm.ChainPool(50, 6, seed=1)
            found.append(pool.sample(energy, 8, sampler, 2)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copied_pool_moves_its_own_chains(copied_by):
    energy, sampler = seeded_mlp(6), fastebm.Langevin(0.1, 0.005)
    pool, same = (fastebm.ChainPool(50, 6, seed=1) for _ in range(2))
    pool.sample(energy, 8, sampler, 2)  # it computes later draws ahead, which are copied too
    same.sample(energy, 8, sampler, 2)
    copied = copied_by(pool)
    before = tensors_of(copied)
    pool.sample(energy, 8, sampler, 2)
    torch.testing.assert_close(tensors_of(copied), before, rtol=0, atol=0, equal_nan=True)
    for other in (same, copied):
        assert torch.equal(other.sample(energy, 8, sampler, 2)[0], pool.states[pool.last.chains])
        assert torch.equal(other.states, pool.states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_energies_of_another_dtype(dtype):
    """A module may return energies in another dtype than the states."""

    class Other(Square):
        def forward(self, x):
            return super().forward(x).to(dtype)

    pool = fastebm.ChainPool(50, 6, seed=1)
    _, energies = pool.sample(Other(6), 8, fastebm.Langevin(0.01, 0.005), 2)
    assert energies.dtype == pool.energies.dtype == torch.float32
    assert torch.equal(pool.energies[pool.last.chains], energies)
    assert (energies - Square(6)(pool.states[pool.last.chains])).abs().max() < (1e-6 if dtype == torch.float64 else 0.1)
