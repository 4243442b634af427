"""Numbers about all chains of a pool, computed where they are and fetched at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PoolStats", "statistics"]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

# Of ages: 0, and a bin for each power of two up to 2^32, the most steps that are counted.
_N_AGES = 34


@dataclass(frozen=True)
class PoolStats:
    """Plain numbers about all chains of a pool, on all processes.

    n_energies: chains whose energy is known and finite. energy: {q: the smallest such energy that at least a share q
    of them do not exceed}; NaN if there are none. ages: counts of chains by their steps since they started: ages[0]
    of 0 steps, ages[i] of 2^(i-1) to 2^i - 1. reinits, nonfinite: sums over the chains' lives.
    """

    n_chains: int
    draws: int
    n_energies: int
    energy: dict[float, float]
    ages: tuple[int, ...]
    reinits: int
    nonfinite: int


def statistics(
    n_chains: int, draws: int, energies: Tensor, ages: Tensor, reinits: Tensor, nonfinite: Tensor,
    total: Callable[[Tensor], Tensor],
) -> PoolStats:  # fmt: skip
    """Tensors: (n_local,), of this process' chains. total: sums over the processes."""
    device = energies.device
    # Floats in the order of their bits, as int64; what is not finite stands last.
    bits = energies.view(torch.int32).long()
    known = energies.isfinite()
    keys = torch.where(bits < 0, 0x7FFFFFFF & ~bits, bits + 2**31)
    keys = torch.where(known, keys, 2**32).sort().values
    n_energies = total(known.sum().reshape(1))
    shares = torch.tensor(QUANTILES, dtype=torch.float64, device=device)
    ranks = (shares * n_energies).ceil().long().clamp_(min=1)
    # The smallest key that at least rank keys do not exceed, by bisection: exact, and the same in any split.
    low = torch.zeros_like(ranks)
    high = low + (2**32 - 1)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = total(torch.searchsorted(keys, middle, right=True)) >= ranks
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    found = torch.where(low < 2**31, low ^ 0x7FFFFFFF, low).sub(2**31).to(torch.int32).view(torch.float32)
    edges = 2 ** torch.arange(_N_AGES - 1, device=device)
    bins = torch.bucketize(ages, edges, right=True)
    histogram = torch.zeros(_N_AGES, dtype=torch.int64, device=device).index_add_(0, bins, torch.ones_like(bins))
    counts = total(torch.cat([histogram, torch.stack([reinits.sum(), nonfinite.sum()])]))
    values = torch.cat([found.double(), counts.double(), n_energies.double()]).tolist()
    quantiles = values[: len(QUANTILES)]
    *by_age, n_reinits, n_nonfinite, n_known = map(int, values[len(QUANTILES) :])
    while len(by_age) > 1 and by_age[-1] == 0:
        by_age.pop()
    return PoolStats(
        n_chains=n_chains,
        draws=draws,
        n_energies=n_known,
        energy=dict(zip(QUANTILES, quantiles if n_known else [math.nan] * len(QUANTILES), strict=True)),
        ages=tuple(by_age),
        reinits=n_reinits,
        nonfinite=n_nonfinite,
    )
