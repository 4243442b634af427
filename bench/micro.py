"""Single operations, by pytest-benchmark; not part of the test command.

pytest bench/micro.py                                    a table; --benchmark-json FILE keeps it
pytest bench/micro.py -k noise --benchmark-compare       see pytest-benchmark's own options
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastebm.bench.cases import DIGITS, TABLE, TOY, Case
from fastebm.bench.contestants import CONTESTANTS, Missing, written_out
from fastebm.bench.problem import SEED, Problem

from fastebm import ChainPool, Langevin
from fastebm.pool.draws import draw_distinct
from fastebm.rng import Stream, normal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_CHAINS = 1_024
POOLS = (10_000, 1_000_000)
BATCH = 256


def synchronised(operation: Callable[[], Any]) -> Callable[[], Any]:
    """The operation, with a synchronisation on a GPU."""
    if DEVICE.type != "cuda":
        return operation

    def run() -> Any:
        result = operation()
        torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("dim", [2, 64, 784])
@pytest.mark.parametrize("generator", ["fastebm", "torch"])
def test_noise(benchmark: Any, generator: str, dim: int) -> None:
    """N_CHAINS x dim normal numbers: the counter-based stream, and PyTorch's own generator."""
    chains, out = torch.arange(N_CHAINS, device=DEVICE), torch.empty(N_CHAINS, dim, device=DEVICE)
    draws = {"fastebm": lambda: normal(SEED, Stream.LANGEVIN, chains, 0, dim), "torch": lambda: out.normal_()}
    x = benchmark(synchronised(draws[generator]))
    assert x.shape == (N_CHAINS, dim)


@pytest.mark.parametrize("energy", [TOY, TABLE, DIGITS], ids=["toy", "table", "digits"])
@pytest.mark.parametrize("how", ["autograd", "closed-form"])
def test_gradient(benchmark: Any, how: str, energy: tuple[int, tuple[int, ...]]) -> None:
    p = Problem(Case(*energy, N_CHAINS), DEVICE)
    mlp = p.mlp
    assert mlp is not None
    ways = {"autograd": lambda: p.gradient(p.x0), "closed-form": lambda: written_out(mlp, p.x0)}
    g = benchmark(synchronised(ways[how]))
    assert torch.allclose(g, p.gradient(p.x0), atol=1e-4)


@pytest.mark.parametrize("name", ["eager", "closed-form", "jax", "fastebm", "fastebm-triton"])
def test_one_step(benchmark: Any, name: str) -> None:
    """The fixed cost of a call: one step of the table energy."""
    contestant = next(c for c in CONTESTANTS if c.name == name)
    p = Problem(replace(Case(*TABLE, N_CHAINS), steps=1), DEVICE)
    try:
        run = contestant.prepare(p, 1, p.case.noise_std)
    except Missing as why:
        pytest.skip(str(why))
    x = benchmark(synchronised(run))
    assert x.shape == p.x0.shape


@pytest.mark.parametrize("n", POOLS)
def test_pool_draw(benchmark: Any, n: int) -> None:
    """BATCH distinct rows of n."""
    rows = benchmark(synchronised(lambda: draw_distinct(SEED, 0, n, BATCH, device=DEVICE)))
    assert len(rows.unique()) == BATCH


@pytest.mark.parametrize("n", POOLS)
def test_pool_round_trip(benchmark: Any, n: int) -> None:
    """Draw, restart, energies, write back: all of a pool's call but the steps."""
    p = Problem(Case(*TABLE, 1), DEVICE)
    pool = ChainPool(n, p.case.dim, clamp=p.case.clamp, seed=SEED, device=DEVICE)
    sampler = Langevin.from_drift_and_noise(p.case.drift, p.case.noise_std)
    x, _ = benchmark(synchronised(lambda: pool.sample(p.energy, BATCH, sampler, steps=0)))
    assert x.shape == (BATCH, p.case.dim)
