"""The definition of correct: K steps of any sampler in plain PyTorch, on any target, on any device.

Every faster run is tested against this one. Read it as documentation. With ``by_definition`` even the random numbers
come from PyTorch operations. Faster paths without a loop of their own use this loop with ``by_definition=False``, a
faster target, and random numbers from Numba.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..rng import Noise
from ..samplers.base import Adaptation, Info, rows_of, where_rows
from ..targets.base import Target, View
from . import Advanced, Chains

__all__ = ["blank", "run"]


def run(
    target: Target, chains: Chains, sampler: Any, steps: int, *, thin: int = 0, telemetry: bool = False,
    by_definition: bool = True, interrupted: Callable[[], bool] = lambda: False, adaptation: Adaptation | None = None,
    trajectory: Tensor | None = None,
) -> Advanced:  # fmt: skip
    """Run the steps. ``chains`` is not modified.

    thin: store the state after every thin-th step; 0 stores none. telemetry: also return the sampler's telemetry.
    by_definition: draw random numbers by PyTorch operations. interrupted: asked before each step whether to stop
    early; the result is then unused. adaptation: tunes the sampler after each step; its ``sampler`` takes the steps.
    trajectory: where to store the states, (n_chains, steps // thin, dim). None: in a new tensor.
    """
    x, frozen = chains.x, chains.frozen
    n_chains, dim = x.shape
    box = None if sampler.box is None else sampler.box.on(dim, dtype=x.dtype, device=x.device)
    box = None if box is None else box.except_at(frozen, x.dtype)
    view = View(target, box, frozen, chains.labels_or_condition)
    noise = Noise(
        chains.seed, chains.numbers, chains.first_steps, dim, dtype=x.dtype, steps=steps, frozen=frozen,
        by_definition=by_definition,
    )  # fmt: skip
    done = Advanced.blank(x, steps, thin, trajectory)
    first_bad = done.first_bad
    stopped = chains.stopped  # (n_chains,) bool, chains that are no longer finite; None if none are
    if stopped is not None:
        first_bad[stopped] = 0
    reported = _Telemetry(x) if telemetry else None

    state = _started(sampler, view, x, noise, chains.carried)
    if lost := set(state._fields) - {*sampler.carries, *sampler.recomputes}:
        raise TypeError(
            f"the state of {type(sampler).__name__} holds {', '.join(sorted(lost))}, which would be lost between the "
            "parts of a call: name it in carries or in recomputes"
        )
    kept: Tensor | None = None  # the positions, where the last step stored them
    for t in range(steps if n_chains > 0 else 0):
        if interrupted():
            break
        before = stopped
        if adaptation is not None:
            sampler = adaptation.sampler
        moved, info = sampler.step(view, state, noise, t)
        # A stopped chain stays at its last finite state. In the step that stops it, ``moved`` already holds that state.
        old, state = state, moved if stopped is None else rows_of(stopped, state, moved)
        if info.finite is not None:
            first_bad[~info.finite & (first_bad < 0)] = t
            stopped = first_bad >= 0
        if adaptation is not None:
            adaptation.update(old, state, info, None if stopped is None else ~stopped)
        if reported is not None:
            reported.add(info, before, stopped, is_last=t == steps - 1)
        kept = None
        if done.trajectory is not None and (t + 1) % thin == 0:
            done.trajectory[:, t // thin] = kept = sampler.positions(view, state)
    x = sampler.positions(view, state) if kept is None else kept
    energy = getattr(state, "energy", None)  # MALA's state has it, for example
    energy = target.value(x) if energy is None else energy
    named = None if reported is None else reported.named(sampler.reports, steps)
    carried = sampler.carried(view, state) or None
    return done._replace(x=x, energy=energy, telemetry=named, carried=carried)


def _started(sampler: Any, view: View, x: Tensor, noise: Noise, carried: Mapping[str, Tensor] | None) -> Any:
    """The state at x. Chains that start again have NaN in what they carried, and take the values of a fresh start."""
    names = sampler.taken(carried or {})
    if not names:
        return sampler.init(view, x, noise)
    carried = {name: carried[name] for name in names}  # type: ignore[index]
    rows = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for value in carried.values():
        rows |= value.isnan().reshape(len(x), math.prod(value.shape[1:])).any(dim=1)
    if bool(rows.any()):
        fresh = sampler.carried(view, sampler.init(view, x, noise))
        carried = {name: where_rows(rows, fresh[name], value) for name, value in carried.items()}
    return sampler.init(view, x, noise, **carried)


class _Telemetry:
    """What the steps report. x: (n_chains, dim), for the form of the result."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.sums: dict[str, Tensor | float] = {}
        self.last: Mapping[str, Tensor] = {}

    def add(self, info: Info, before: Tensor | None, stopped: Tensor | None, *, is_last: bool) -> None:
        """Add a step. before, stopped: (n_chains,) bool, chains that stopped before it, or not later than in it."""
        for name, value in info.averaged().items():
            if stopped is not None and not isinstance(value, Tensor):
                value = self.x.new_full((len(self.x),), value)
            if isinstance(value, Tensor):
                value = value.to(self.x.dtype)
                value = value if stopped is None else where_rows(stopped, torch.zeros_like(value), value)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if is_last or info.finite is not None:  # otherwise no chain stops in this step
            new, old = info.last(), self.last
            self.last = (
                {k: where_rows(before, old[k], v) for k, v in new.items()} if before is not None and old else new
            )

    def named(self, reports: Mapping[str, float | Tensor], steps: int) -> dict[str, Tensor]:
        """Means over the steps, and values of the last one, by name. reports: names, and values without a step."""
        means = {name: value / steps for name, value in self.sums.items()}
        of_chains = {k: v for k, v in {**means, **self.last}.items() if isinstance(v, Tensor)}
        return {
            k: of_chains[k] if k in of_chains else blank(means.get(k, empty), self.x) for k, empty in reports.items()
        }


def blank(empty: float | Tensor, x: Tensor) -> Tensor:
    """Telemetry after no step, one row per chain. empty: of one chain, as in the sampler's ``reports``."""
    value = torch.as_tensor(empty, dtype=x.dtype, device=x.device)
    return value.expand(len(x), *value.shape).clone()
