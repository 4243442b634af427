"""``ChainPool.add``: which chains the added states replace, as a first-in-first-out queue or a reservoir."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..rng import Stream, words
from .arguments import checked_condition, checked_labels
from .records import Records
from .starts import Starts, checked_states
from .storage import Storage

__all__ = ["checked_added", "prepared", "replaced"]

# Block of the pool's random stream, above the blocks of any state; draws.py and storage.py use others.
_RESERVOIR_BLOCK = 0xFFFFFD


def checked_added(
    samples: Tensor, labels: Tensor | None, condition: Tensor | None, policy: str, starts: Starts, records: Records
) -> tuple[Tensor, Tensor | None]:
    """The arguments of ``ChainPool.add``: states (n, dim), and their labels or condition."""
    if policy not in ("fifo", "reservoir"):
        raise ValueError(f'policy must be "fifo" or "reservoir", got {policy!r}')
    x = checked_states("samples", samples, starts.shape, starts.clamp)
    for name, given, kept in (("labels", labels, records.labels), ("condition", condition, records.condition)):
        if given is not None and kept is None:
            raise ValueError(f"this pool has no {name}: build it with {name}=, or pass none")
        if given is None and kept is not None:
            raise ValueError(f"this pool has {name}: pass {name}= of the samples")
    if labels is not None:
        return x, checked_labels(labels, len(x), "sample")
    if condition is not None:
        return x, checked_condition(condition, len(x), like=records.condition)
    return x, None


def replaced(policy: str, seed: int, first: int, n: int, n_chains: int, device: torch.device) -> Tensor:
    """(n,) int64: the chain that each added state replaces; n_chains or more if none.

    Args:
        first: number of states that were added before.
    """
    numbers = torch.arange(first, first + n, device=device)
    if policy == "fifo":
        return numbers % n_chains
    w0, w1, _, _ = (w[:, 0] for w in words(seed, Stream.POOL, numbers, 0, 1, _RESERVOIR_BLOCK))
    # floor(u * (number + 1)) for a u of 53 bits: float64 products are the same on every device.
    u = ((w0 << 21) | (w1 >> 11)).double() * 2.0**-53
    chosen = (u * (numbers + 1).double()).long().clamp_(max=numbers)
    return torch.where(numbers < n_chains, numbers, chosen)


def prepared(
    x: Tensor, values: Tensor | None, chains: Tensor, storage: Storage, records: Records
) -> Callable[[], None]:
    """Prepare to overwrite chains with added states. The returned function writes, and cannot fail.

    Args:
        values: labels or condition of the states, for a pool that has them.
        chains: (n,) as from ``replaced``. Where several states replace the same chain, the last one stays.
    """
    rows = chains - storage.first_chain
    which = _last_of_each(rows, len(storage.data))
    rows = rows[which]
    steps = records.steps[rows]
    write_states = storage.writing(rows, x[which.to(x.device)].to(storage.device, torch.float32), steps)
    record_reinits = records.reinit(rows, steps)
    kept = records.condition if records.labels is None else records.labels
    new = None if values is None else values.to(storage.device)[which]

    def write() -> None:
        write_states()
        record_reinits()
        records.energy.index_fill_(0, rows, math.nan)
        if new is not None and kept is not None:
            kept.index_copy_(0, rows, new)

    return write


def _last_of_each(rows: Tensor, n: int) -> Tensor:
    """Index of the last occurrence of each distinct row in [0, n)."""
    values, order = torch.sort(rows, stable=True)
    is_last = torch.ones_like(values, dtype=torch.bool)
    is_last[:-1] = values[1:] != values[:-1]
    return order[is_last & (values >= 0) & (values < n)]
