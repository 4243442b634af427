"""Any sampler on an MLP energy with the closed-form gradient, tile by tile.

A tile of chains takes all K steps before the next tile starts. So extra memory is needed for one tile only, not for all
chains, and a tile's buffers stay in cache. On a CPU each thread works on its own tile. The bits of a chain do not
depend on how the batch is split: see targets/closed_form.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..samplers.base import for_chains
from ..targets.base import Target
from ..targets.closed_form import DEVICE_ROWS, PRODUCT_ROWS, ClosedForm
from ..targets.description import Description
from ..threads import share
from . import Advanced, Chains, reference

__all__ = ["energies", "run", "tiles"]

# Largest tile on a CPU, in rows: large enough to amortise PyTorch's cost per operation, small enough for the buffers to
# stay in cache. A power of two times PRODUCT_ROWS.
_TILE_ROWS = 512

# Fixed cost of a tile, in units of the cost of a row.
_TILE_COST = 16


def run(
    chains: Chains, sampler: Any, steps: int, *, make_target: Callable[[int, Tensor | None], Target], thin: int = 0,
    telemetry: bool = False,
) -> Advanced:  # fmt: skip
    """Run the steps. chains.x is modified in place. make_target: (n_chains, labels) -> the target of these chains."""
    x, n_chains = chains.x, len(chains.x)
    done = Advanced.blank(x, steps, thin)
    reported: dict[int, dict[str, Tensor]] = {}

    def move(rows: slice, interrupted: Callable[[], bool]) -> None:
        with torch.inference_mode():
            here = chains.rows(rows)
            part = reference.run(
                make_target(len(here.x), here.labels), here, for_chains(sampler, rows, n_chains), steps,
                thin=thin, telemetry=telemetry, by_definition=False, interrupted=interrupted,
            )  # fmt: skip
            done.x[rows], done.energy[rows], done.first_bad[rows] = part.x, part.energy, part.first_bad
            if done.trajectory is not None and part.trajectory is not None:
                done.trajectory[rows] = part.trajectory
            reported[rows.start] = dict(part.telemetry or {})

    _each_tile(x, move)
    if not telemetry:
        return done
    parts = [reported[first] for first in sorted(reported)]
    named = {name: torch.cat([part[name] for part in parts] or [x[:, 0]]) for name in sampler.reports}
    return done._replace(telemetry=named)


def energies(description: Description, x: Tensor, labels: Tensor | None) -> Tensor:
    """E of states, (n, dim), with these labels: (n,)."""
    out = x.new_empty(len(x))

    def evaluate(rows: slice, interrupted: Callable[[], bool]) -> None:
        with torch.inference_mode():
            part = x[rows]
            out[rows] = ClosedForm(description, len(part), None if labels is None else labels[rows]).value(part)

    _each_tile(x, evaluate)
    return out


def _each_tile(x: Tensor, work: Callable[[slice, Callable[[], bool]], None]) -> None:
    """Call ``work(rows, interrupted)`` for every tile. ``interrupted()`` tells it to stop early, after an error."""
    if x.device.type == "cpu":
        n_threads = torch.get_num_threads()
        share(tiles(len(x), n_threads), work, n_threads)
    else:
        for first in range(0, len(x), DEVICE_ROWS):
            work(slice(first, min(first + DEVICE_ROWS, len(x))), lambda: False)


def tiles(n_chains: int, n_threads: int) -> list[slice]:
    """Split the chains into tiles for a CPU, of the size with which all threads finish earliest.

    Sizes are powers of two times PRODUCT_ROWS.
    """
    sizes, size = [], _TILE_ROWS
    while size >= PRODUCT_ROWS:
        sizes.append(size)
        size //= 2
    size = min(sizes, key=lambda size: -(-n_chains // (size * n_threads)) * (min(size, n_chains) + _TILE_COST))
    return [slice(first, min(first + size, n_chains)) for first in range(0, n_chains, size)]
