"""Any sampler on an MLP energy with the closed-form gradient, tile by tile.

A tile of chains takes all K steps before the next tile starts. So extra memory is needed for one tile only, not for all
chains, and a tile's buffers stay in cache. On a CPU each thread works on its own tile. The bits of a chain do not
depend on how the batch is split: see targets/closed_form.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..samplers.base import for_chains
from ..targets.base import Target
from ..targets.closed_form import (
    DEVICE_ROWS,
    PRODUCT_ROWS,
    ClosedForm,
    matrix,
    product,
    repeated_labels,
    rows_of_products,
)
from ..targets.description import Description
from ..threads import share
from . import Advanced, Chains, reference

__all__ = ["Together", "energies", "multiplied", "run", "tiles"]

# Largest tile on a CPU, in rows: large enough to amortise PyTorch's cost per operation, small enough for the buffers to
# stay in cache. A power of two times PRODUCT_ROWS.
_TILE_ROWS = 512

# Fixed cost of a tile, in units of the cost of a row.
_TILE_COST = 16

# A sampler's step holds Python's lock between its small operations, so steps on several threads wait for each other. In
# that time, the products of a gradient could be computed for so many rows times weights (Zen 4).
_HELD = 3_500_000


def run(
    chains: Chains, sampler: Any, steps: int, *, make_target: Callable[[int, Tensor | None], Target],
    n_weights: int | None = None, thin: int = 0, telemetry: bool = False, carry: bool = True,
) -> Advanced:  # fmt: skip
    """Run the steps. chains.x is modified in place.

    carry: return what the chains carry to a next call.

    make_target: (n_chains, labels) -> the target of these chains. n_weights: of the energy. None: as if
    no step made another one wait.
    """
    x, n_chains = chains.x, len(chains.x)
    done = Advanced.blank(x, steps, thin)
    reported: dict[int, dict[str, Tensor]] = {}
    carried: dict[int, Mapping[str, Tensor]] = {}

    def move(rows: slice, interrupted: Callable[[], bool]) -> None:
        with torch.inference_mode():
            here, trajectory = chains.rows(rows), done.trajectory
            part = reference.run(
                make_target(len(here.x), here.labels), here, for_chains(sampler, rows, n_chains), steps,
                thin=thin, telemetry=telemetry, by_definition=False, interrupted=interrupted,
                trajectory=None if trajectory is None else trajectory[rows],
            )  # fmt: skip
            done.x[rows], done.energy[rows], done.first_bad[rows] = part.x, part.energy, part.first_bad
            carried[rows.start] = (part.carried or {}) if carry else {}
            reported[rows.start] = dict(part.telemetry or {})

    _each_tile(x, move, sampler.rows_per_chain, n_weights)
    if sampler.carries and carried and carry:
        of_tiles = [carried[first] for first in sorted(carried)]
        joined = {name: torch.cat([of_tile[name] for of_tile in of_tiles]) for name in of_tiles[0]}
        done = done._replace(carried=joined)
    if not telemetry:
        return done
    parts = [reported[first] for first in sorted(reported)]
    named = {
        name: torch.cat([part[name] for part in parts] or [reference.blank(empty, x)])
        for name, empty in sampler.reports.items()
    }
    return done._replace(telemetry=named)


class Together:
    """A ``Target`` (targets/base.py) for all chains at once, evaluated tile by tile on all threads.

    For samplers whose chains move together. make_target, n_weights: as for ``run``.
    """

    def __init__(
        self, n_chains: int, labels: Tensor | None, device: torch.device,
        make_target: Callable[[int, Tensor | None], Target], n_weights: int,
    ) -> None:  # fmt: skip
        self.n_threads = torch.get_num_threads()
        self.parts = _parts(n_chains, device, 1, n_weights)
        self.targets = {
            rows.start: make_target(rows.stop - rows.start, None if labels is None else labels[rows])
            for rows in self.parts
        }
        self._built_from = n_chains, labels, device, make_target, n_weights

    def repeated(self, k: int) -> Together:
        """The energy of k copies of each chain."""
        n_chains, labels, device, make_target, n_weights = self._built_from
        return Together(k * n_chains, repeated_labels(labels, k), device, make_target, n_weights)

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        out = x.new_empty(len(x))

        def evaluate(rows: slice) -> None:
            out[rows] = self.targets[rows.start].value(x[rows])

        self._each(x, evaluate)
        return out

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        out = torch.empty_like(x)

        def evaluate(rows: slice) -> None:
            out[rows] = self.targets[rows.start].gradient(x[rows])

        self._each(x, evaluate)
        return out

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx."""
        value, gradient = x.new_empty(len(x)), torch.empty_like(x)

        def evaluate(rows: slice) -> None:
            value[rows], gradient[rows] = self.targets[rows.start].value_and_gradient(x[rows])

        self._each(x, evaluate)
        return value, gradient

    def _each(self, x: Tensor, evaluate: Callable[[slice], None]) -> None:
        def work(rows: slice, interrupted: Callable[[], bool]) -> None:
            with torch.inference_mode():
                evaluate(rows)

        if x.device.type == "cpu":
            share(self.parts, work, self.n_threads)
        else:
            for rows in self.parts:
                work(rows, lambda: False)


def energies(description: Description, x: Tensor, labels: Tensor | None) -> Tensor:
    """E of states, (n, dim), with these labels: (n,)."""
    out = x.new_empty(len(x))

    def evaluate(rows: slice, interrupted: Callable[[], bool]) -> None:
        with torch.inference_mode():
            part = x[rows]
            out[rows] = ClosedForm(description, len(part), None if labels is None else labels[rows]).value(part)

    _each_tile(x, evaluate)
    return out


def multiplied(v: Tensor, w: Tensor) -> Tensor:
    """v @ w, (n, columns of w), with bits per row that do not depend on the other rows."""
    out = v.new_empty(len(v), w.shape[1])

    def multiply(rows: slice, interrupted: Callable[[], bool]) -> None:
        few, n = rows_of_products(v.device), rows.stop - rows.start
        n_rows = -(-n // few) * few
        part = matrix(n_rows, v.shape[1], v)
        part[n:] = 0.0
        part[:n] = v[rows]
        out[rows] = product(part, w, None, matrix(n_rows, w.shape[1], v))[:n]

    _each_tile(v, multiply)
    return out


def _each_tile(
    x: Tensor, work: Callable[[slice, Callable[[], bool]], None], rows_per_chain: int = 1, n_weights: int | None = None
) -> None:
    """Call ``work(rows, interrupted)`` for every tile. ``interrupted()`` tells it to stop early, after an error."""
    parts = _parts(len(x), x.device, rows_per_chain, n_weights)
    if x.device.type == "cpu":
        share(parts, work, torch.get_num_threads())
    else:
        for rows in parts:
            work(rows, lambda: False)


def _parts(n_chains: int, device: torch.device, rows_per_chain: int, n_weights: int | None) -> list[slice]:
    """The tiles. n_weights: of the energy, if the steps are a sampler's. None: one evaluation."""
    if device.type == "cpu":
        held = 0.0 if n_weights is None else _HELD / n_weights
        return tiles(n_chains, torch.get_num_threads(), rows_per_chain, held)
    size = max(1, DEVICE_ROWS // rows_per_chain)
    return [slice(first, min(first + size, n_chains)) for first in range(0, n_chains, size)]


def tiles(n_chains: int, n_threads: int, rows_per_chain: int = 1, held: float = 0.0) -> list[slice]:
    """Split the chains into tiles for a CPU, of the size with which all threads finish earliest.

    Sizes are powers of two times PRODUCT_ROWS; with several rows per chain, they are smaller by this factor.

    held: for how long each tile makes all others wait, in units of the cost of a row.
    """

    def cost(size: int) -> float:
        at_once, rounds = min(n_threads, -(-n_chains // size)), -(-n_chains // (size * n_threads))
        return rounds * (min(size, n_chains) * rows_per_chain + _TILE_COST + held * at_once)

    sizes, size = [], _TILE_ROWS
    while size >= PRODUCT_ROWS:
        sizes.append(max(1, size // rows_per_chain))
        size //= 2
    size = min(sizes, key=cost)
    return [slice(first, min(first + size, n_chains)) for first in range(0, n_chains, size)]
