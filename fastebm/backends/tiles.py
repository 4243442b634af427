"""Chains of an MLP energy on tiles, all K steps of a tile before the next: extra memory is O(tile), not O(chains x
width), and a tile's buffers stay in cache. Any sampler: its own ``step``, and the closed-form gradient.

On a CPU threads share the tiles. Bits do not depend on how the batch is split: see targets/closed_form.py.
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

# Rows of one tile on a CPU: large enough for PyTorch's cost per operation to be small, small enough for the buffers to
# stay in cache. A power of two times the rows of a product.
_TILE_ROWS = 512

# What a tile costs beside its rows, in rows.
_TILE_COST = 16


def run(
    chains: Chains, sampler: Any, steps: int, *, make_target: Callable[[int, Tensor | None], Target], thin: int = 0,
    telemetry: bool = False,
) -> Advanced:  # fmt: skip
    """chains.x is moved in place. make_target: the target of so many chains with these labels."""
    x, n_chains = chains.x, len(chains.x)
    done = Advanced.blank(x, steps, thin)
    told: dict[int, dict[str, Tensor]] = {}

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
            told[rows.start] = dict(part.telemetry or {})

    _each_tile(x, move)
    if not telemetry:
        return done
    parts = [told[first] for first in sorted(told)]
    named = {name: torch.cat([part[name] for part in parts] or [x[:, 0]]) for name in sampler.reports}
    return done._replace(telemetry=named)


def energies(description: Description, x: Tensor, labels: Tensor | None) -> Tensor:
    """E of (n, dim) states with these labels, (n,)."""
    out = x.new_empty(len(x))

    def evaluate(rows: slice, interrupted: Callable[[], bool]) -> None:
        with torch.inference_mode():
            part = x[rows]
            out[rows] = ClosedForm(description, len(part), None if labels is None else labels[rows]).value(part)

    _each_tile(x, evaluate)
    return out


def _each_tile(x: Tensor, work: Callable[[slice, Callable[[], bool]], None]) -> None:
    """``work`` on the rows of every tile, with a function that says whether to stop early."""
    if x.device.type == "cpu":
        n_threads = torch.get_num_threads()
        share(tiles(len(x), n_threads), work, n_threads)
    else:
        for first in range(0, len(x), DEVICE_ROWS):
            work(slice(first, min(first + DEVICE_ROWS, len(x))), lambda: False)


def tiles(n_chains: int, n_threads: int) -> list[slice]:
    """Rows of a CPU's tiles: of the powers of two times a product's rows, the size with which all threads are done
    first."""
    sizes, size = [], _TILE_ROWS
    while size >= PRODUCT_ROWS:
        sizes.append(size)
        size //= 2
    size = min(sizes, key=lambda size: -(-n_chains // (size * n_threads)) * (min(size, n_chains) + _TILE_COST))
    return [slice(first, min(first + size, n_chains)) for first in range(0, n_chains, size)]
