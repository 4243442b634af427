"""Statistics of all chains of a pool."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .processes import Processes

__all__ = ["PoolStats", "statistics"]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

# Bins of ages: one for 0, and one per power of two up to 2**32, where step counters end.
_N_AGES = 34


@dataclass(frozen=True)
class PoolStats:
    """Statistics of all chains of a pool, on all processes. Plain numbers.

    Attributes:
        n_chains: size of the pool.
        draws: number of calls of ``sample``.
        n_energies: number of chains whose energy is known and finite.
        energy: {q: the smallest of these energies that at least a share q of them does not exceed}; NaN if there are
            none.
        ages: numbers of chains by their steps since they last started: ages[0] with 0 steps, ages[i] with 2**(i - 1) to
            2**i - 1 steps.
        reinits: how often chains started again, in total.
        nonfinite: how often because they were not finite.
    """

    n_chains: int
    draws: int
    n_energies: int
    energy: dict[float, float]
    ages: tuple[int, ...]
    reinits: int
    nonfinite: int


def statistics(
    n_chains: int, draws: int, energies: Tensor, ages: Tensor, reinits: Tensor, nonfinite: Tensor, processes: Processes
) -> PoolStats:
    """Tensors: (n_local,), of the chains of this process."""
    device = energies.device
    known = processes.concatenated(energies[energies.isfinite()]).sort().values
    quantiles = [math.nan] * len(QUANTILES)
    if len(known) > 0:
        ranks = [max(math.ceil(q * len(known)), 1) for q in QUANTILES]
        quantiles = known[torch.tensor(ranks, device=known.device) - 1].tolist()
    edges = 2 ** torch.arange(_N_AGES - 1, device=device)
    by_age = torch.bincount(torch.bucketize(ages, edges, right=True), minlength=_N_AGES)
    sums = torch.stack([reinits.sum(), nonfinite.sum()])
    *counts, n_reinits, n_nonfinite = processes.total(torch.cat([by_age, sums])).tolist()
    while len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return PoolStats(
        n_chains=n_chains,
        draws=draws,
        n_energies=len(known),
        energy=dict(zip(QUANTILES, quantiles, strict=True)),
        ages=tuple(counts),
        reinits=n_reinits,
        nonfinite=n_nonfinite,
    )
