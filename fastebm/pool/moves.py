"""Moving some of a pool's chains: take drawn chains out of the pool, run the sampler, prepare to write them back.

``sample`` draws chains and uses all of this; ``advance`` (sweep.py) visits all chains and only runs the sampler.
Nothing here changes the pool: writes are returned as functions, to be called once everything that can fail is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends import Advanced, Chains
from ..driver.run import energies_of, run_chains
from ..driver.settings import Settings
from ..energies.functions import EnergyLike
from ..rng import Stream
from ..samplers.base import Sampler
from . import copies
from .draws import Draw
from .records import Records
from .starts import Starts
from .storage import Storage

__all__ = ["PoolCall", "chains_of", "move", "outside_graphs", "put", "take"]

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class PoolCall:
    """What the last ``sample`` or ``advance`` of a pool did.

    Attributes:
        chains: (n,) int64, global numbers of the chains that this process moved, in the order of the samples.
        labels: (n,) int64, their labels, or None.
        reinits: number of drawn chains that were reinitialised before they moved, over all processes.
        nonfinite: number of chains that became non-finite, over all processes.
        condition: (n, ...), the conditions of the moved chains, or None.
    """

    chains: Tensor
    labels: Tensor | None
    reinits: int
    nonfinite: int
    condition: Tensor | None = None


def outside_graphs(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call it; while torch.compile traces, outside of the compiled graph."""
    if not torch.compiler.is_compiling():
        return function(*arguments)
    from ..backends import compiling  # takes seconds to import

    result: _T = compiling.uncompiled(function, *arguments)
    return result


def chains_of(x: Tensor, rows: slice | Tensor, steps: Tensor, storage: Storage, records: Records) -> Chains:
    """The chains in some rows of the pool, at states x (n, dim) and lifetime steps (n,), as the driver takes them."""
    labels, condition = records.labels, records.condition
    return Chains(
        x,
        storage.seed,
        storage.chains(rows),
        steps,
        None if labels is None else labels[rows],
        condition=None if condition is None else condition[rows],
    )


def move(
    energy: EnergyLike, chains: Chains, sampler: Sampler, steps: int, starts: Starts, settings: Settings
) -> tuple[Advanced, Tensor]:
    """Advance chains by ``steps``; with on_nonfinite="reinit", reinitialise those that are not finite.

    Returns:
        The moved chains, and the indices of those that were not finite. The latter are empty with
        on_nonfinite="raise", which raises instead.
    """
    settings.check()
    policy = settings.on_nonfinite
    kept = replace(settings, on_nonfinite="ignore") if policy == "reinit" else settings
    done, _ = run_chains(energy, chains, sampler, steps, shape=starts.shape, settings=kept)
    if policy == "raise":
        return done, chains.numbers[:0]
    bad = ((done.first_bad >= 0) | ~done.energy.isfinite()).nonzero().flatten()
    if policy == "reinit" and len(bad) > 0:
        fresh = starts.states(Stream.POOL, chains.numbers[bad], chains.first_steps[bad] + steps)
        # Their energies need the whole batch: an energy may depend on the number of its rows.
        x = done.x.index_copy_(0, bad, fresh)
        energies = energies_of(energy, chains._replace(x=x), sampler, shape=starts.shape, settings=settings)
        done.energy.index_copy_(0, bad, energies[bad])
    return done, bad


def take(draw: Draw, storage: Storage, records: Records) -> tuple[Tensor, Tensor]:
    """States from which the drawn chains move, (n, dim), and their lifetime steps, (n,). Both are copies."""
    if copies.can_copy(storage):
        return copies.take(draw, storage.data, records.steps)
    x, steps = storage.read(draw.rows), records.steps.index_select(0, draw.rows)
    if len(draw.reinit) > 0:
        x.index_copy_(0, draw.reinit, draw.fresh)
    return x, steps


def put(
    draw: Draw, storage: Storage, records: Records, before: Tensor, after: Tensor, done: Advanced
) -> Callable[[], None]:
    """Prepare to write drawn chains back. The returned function writes, and cannot fail.

    Args:
        before, after: (n,) lifetime steps before and after the chains moved.
    """
    if copies.can_copy(storage):
        kept = storage.data, records.steps, records.energy, records.started, records.reinits
        return copies.put(draw, done.x, before, after, done.energy, *kept)
    write_states = storage.writing(draw.rows, done.x, after)
    record_reinits = records.reinit(draw.rows[draw.reinit], before[draw.reinit])
    energies = done.energy.to(records.energy)

    def write() -> None:
        write_states()
        records.steps.index_copy_(0, draw.rows, after)
        records.energy.index_copy_(0, draw.rows, energies)
        record_reinits()

    return write
