"""The steps of one ``fastebm.sample`` call, run in parts: the warm-up, and a part for each move of a progress bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..backends import Advanced
from ..backends.choose import Choice
from ..energies import EnergyLike
from ..samplers.base import LAST, Adaptation, for_steps
from .result import ChainState
from .run import run_chains
from .settings import Settings

__all__ = ["Parts"]


@dataclass(frozen=True, eq=False)
class Parts:
    """Runs the steps of one call, in parts if there is a progress bar."""

    energy: EnergyLike
    shape: Sequence[int]
    settings: Settings
    thin: int
    total: int
    check_start: bool

    def steps(
        self, sampler: Any, state: ChainState, first: int, last: int, size: int, bar: Any, *, keep: bool,
        adaptation: Adaptation | None = None,
    ) -> tuple[Advanced, Choice, ChainState]:  # fmt: skip
        """Run steps first to last - 1 of the call.

        size: steps per part; 0 runs all in one part. keep: store the trajectory. adaptation: tunes the sampler.
        """
        parts: list[tuple[int, Advanced]] = []
        edges = [*range(first, last, size), last] if size > 0 and last > first else [first, last]
        for start, stop in pairwise(edges):
            n, stopped = stop - start, state.stopped
            moving = state.chains._replace(stopped=None if stopped is None or not bool(stopped.any()) else stopped)
            done, choice = run_chains(
                self.energy, moving, for_steps(sampler, start, stop), n, shape=self.shape,
                settings=self.settings, thin=self.thin if keep else 0, telemetry=True, check_start=self.check_start,
                part=(start, self.total), adaptation=adaptation, resumable=True,
            )  # fmt: skip
            done = _still_stopped(done, state, start)
            chains = state.chains._replace(x=done.x, first_steps=state.chains.first_steps + n, carried=done.carried)
            ignored = self.settings.on_nonfinite == "ignore"
            state = ChainState(chains, done.energy, done.first_bad >= 0 if ignored else state.stopped)
            parts.append((n, done))
            bar.update(n)
        return _joined(parts), choice, state


def _still_stopped(done: Advanced, before: ChainState, first: int) -> Advanced:
    """Count bad steps from the start of the call, and put chains that had stopped before back where they were."""
    first_bad = torch.where(done.first_bad >= 0, done.first_bad + first, done.first_bad)
    rows, energies = before.stopped, before.energies
    if rows is None or energies is None or not bool(rows.any()):
        return done._replace(first_bad=first_bad)
    x = torch.where(rows[:, None], before.chains.x.to(done.x.dtype), done.x)
    trajectory = done.trajectory
    if trajectory is not None:
        trajectory = torch.where(rows[:, None, None], x[:, None], trajectory)
    reported = {
        name: value.masked_fill(rows.view(-1, *[1] * (value.ndim - 1)), math.nan if name in LAST else 0.0)
        for name, value in (done.telemetry or {}).items()
    }
    return done._replace(
        x=x,
        energy=torch.where(rows, energies, done.energy),
        first_bad=torch.where(rows, first, first_bad),
        trajectory=trajectory,
        telemetry=reported,
    )


def _joined(parts: list[tuple[int, Advanced]]) -> Advanced:
    """One result from consecutive parts. parts: (number of steps, result) of each."""
    _, result = parts[0]
    if len(parts) == 1:
        return result
    total = sum(steps for steps, _ in parts)
    first_bad, telemetry = result.first_bad, {name: 0.0 * v for name, v in (result.telemetry or {}).items()}
    for steps, done in parts:
        stopped = first_bad >= 0  # before this part
        first_bad = torch.where(stopped, first_bad, done.first_bad)
        for name, value in (done.telemetry or {}).items():
            if name in LAST:
                telemetry[name] = value if done is result else torch.where(stopped, telemetry[name], value)
            else:
                telemetry[name] = telemetry[name] + value * (steps / total)
    trajectories = [done.trajectory for _, done in parts if done.trajectory is not None]
    trajectory = torch.cat(trajectories, dim=1) if trajectories else None
    return parts[-1][1]._replace(first_bad=first_bad, telemetry=telemetry, trajectory=trajectory)
