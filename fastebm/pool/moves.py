"""Moving some of a pool's chains: take drawn chains out of the pool, run the sampler, prepare to write them back.

``sample`` draws chains and uses all of this; ``advance`` (sweep.py) visits all chains and only runs the sampler.
Nothing here changes the pool: writes are returned as functions, to be called once everything that can fail is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..backends import Advanced, Chains
from ..driver.sampling import ON_NONFINITE, advance_chains
from ..energies.functions import EnergyLike
from ..rng import Stream
from ..samplers.langevin import Langevin
from . import copies
from .draws import Draw
from .records import Records
from .starts import Starts
from .storage import Storage

__all__ = ["PoolCall", "RunOptions", "chains_of", "for_chains", "move", "outside_graphs", "put", "take"]

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


class RunOptions(NamedTuple):
    """Arguments that ``sample`` and ``advance`` pass on to the driver."""

    backend: str
    precision: str | None
    cuda_graph: bool
    on_nonfinite: str


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
    energy: EnergyLike, chains: Chains, sampler: Langevin, steps: int, starts: Starts, options: RunOptions
) -> tuple[Advanced, Tensor]:
    """Advance chains by ``steps``; with on_nonfinite="reinit", reinitialise those that are not finite.

    Returns:
        The moved chains, and the indices of those that were not finite. The latter are empty with
        on_nonfinite="raise", which raises instead.
    """
    policy = options.on_nonfinite
    if policy not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {policy!r}")
    done, _ = advance_chains(
        energy, chains, sampler, steps, shape=starts.shape, backend=options.backend, precision=options.precision,
        cuda_graph=options.cuda_graph, on_nonfinite="ignore" if policy == "reinit" else policy,
    )  # fmt: skip
    if policy == "raise":
        return done, chains.numbers[:0]
    bad = ((done.first_bad >= 0) | ~done.energy.isfinite()).nonzero().flatten()
    if policy == "reinit" and len(bad) > 0:
        fresh = starts.states(Stream.POOL, chains.numbers[bad], chains.first_steps[bad] + steps)
        # Their energies need a second call, of the whole batch: an energy may depend on the number of its rows.
        again, _ = advance_chains(
            energy, chains._replace(x=done.x.index_copy(0, bad, fresh)), Langevin(), 0, shape=starts.shape,
            on_nonfinite="ignore", backend=options.backend, precision=options.precision,
        )  # fmt: skip
        done.x.index_copy_(0, bad, again.x[bad])
        done.energy.index_copy_(0, bad, again.energy[bad])
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


def for_chains(sampler: Langevin, which: Tensor, n: int) -> Langevin:
    """The sampler for some of n chains: step sizes and noise scales that differ per chain are indexed."""

    def part(name: str) -> float | Tensor:
        value: float | Tensor = getattr(sampler, name)
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) == 1:
            return value
        if len(value) != n:  # checked here, as the wrong size could happen to fit a chunk
            raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit {n} chains; use ({n}, 1)")
        return value[which.to(value.device)]

    return dataclasses.replace(sampler, step_size=part("step_size"), noise_scale=part("noise_scale"))
