"""Tempered transitions: a proposal that heats the state, cools it again, and is accepted or rejected as a whole.

The ladder is 1 = T_0 < ... < T_K, with b_j = 1 / T_j. K_j is a step of the inner sampler with the energy E / T_j, which
satisfies detailed balance. From x = y_0, the way up and the way down are

y_j     = K_j(y_{j-1}),   j = 1, ..., K
z_K     = y_K
z_{j-1} = K_j(z_j),       j = K, ..., 1

log a   = sum_{j=1}^{K} (b_{j-1} - b_j) (E(y_{j-1}) - E(z_{j-1}))
x'      = z_0 if log u <= log a, else x,                      u ~ U(0, 1]

The two ways have the same steps in opposite order, so detailed balance of each K_j makes the whole reversible. Before
that, each step moves the state by K_0, so that chains also move where tempered transitions are rejected.

Source: Neal 1996, "Sampling from multimodal distributions using tempered transitions", which also alternates them with
ordinary steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..box import Bounds
from ..rng import Noise, Stream
from ..targets.base import View
from ..targets.remembered import Point
from .base import Info, Sampler, once, rows_of
from .tempering import checked_temperatures, for_temperatures, step_factors, tempered, with_inner

__all__ = ["TemperedTransitions"]


@dataclass(frozen=True, eq=False)
class TemperedTransitions(Sampler):
    """Tempered transitions: one chain that crosses barriers by heating and cooling, without copies of it.

        TemperedTransitions(MALA(0.1), (1.0, 1.5, 2.2, 3.3, 5.0))

    The top of this file states the acceptance (Neal 1996). One step is a step of the inner sampler at temperature 1,
    then a tempered transition, one step up and one down for each higher temperature. With R temperatures these are
    2 R - 1 inner steps, one after another. ``SampleInfo.acceptance`` is that of the tempered transitions. It needs more
    temperatures than ``ParallelTempering``, because one ratio decides over the whole way.

    Args:
        sampler: MALA or another sampler whose steps satisfy detailed balance (``reversible``). At temperature T its
            step size is that at which lengths grow as sqrt(T). A warm-up adapts it, from the steps at temperature 1.
        temperatures: 1 = T_0 < ... < T_{R-1}, R >= 2.
        clamp: bounds (lo, hi) of the states, in place of the inner sampler's; or None, to keep those.

    Where the inner sampler stops a chain, at any temperature, the chain keeps its state before the step.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    sampler: Any
    temperatures: Sequence[float]
    clamp: Bounds | None = None

    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = False  # an inner step and then another one
    scheduled: ClassVar[tuple[str, ...]] = ("sampler",)

    def __post_init__(self) -> None:
        inner, clamp = with_inner("TemperedTransitions", self.sampler, self.clamp)
        if not inner.reversible:
            raise ValueError(
                "TemperedTransitions needs steps that satisfy detailed balance, and those of "
                f"{type(inner).__name__} do not: use MALA, for example"
            )
        settings = {"sampler": inner, "clamp": clamp, "temperatures": checked_temperatures(self.temperatures)}
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    @property
    def reports(self) -> Mapping[str, float | Tensor]:  # type: ignore[override]
        """What the inner sampler reports at temperature 1, but the gradients of all its steps, and acceptance is that
        of tempered transitions."""
        return {**self.sampler.reports, "acceptance": math.nan, "gradients": math.nan}

    @property
    def step_size(self) -> Any:
        """The step size at temperature 1."""
        return self.sampler.step_size

    def adaptation(self, steps: int) -> _WarmUp | None:
        """Adapt the inner sampler, from its steps at temperature 1."""
        inner = self.sampler.adaptation(steps)
        return None if inner is None else _WarmUp(self, inner)

    def init(self, target: View, x: Tensor, noise: Noise) -> Point:
        """Evaluate energy and gradient at x. Later steps carry them in the state."""
        return Point(x, *target.value_and_gradient(x))

    def step(self, target: View, state: Point, noise: Noise, t: int) -> tuple[Point, Info]:
        """One inner step at temperature 1, then one tempered transition."""
        ladder = tuple(self.temperatures)
        top, n = len(ladder) - 1, 2 * len(ladder) - 1
        plain, info = self._moved(target, state, 0, noise.part(0, n), t)
        new, finite = plain, info.finite
        infos, up, down = [info], [], []
        for k, level in enumerate([*range(1, top + 1), *range(top, 0, -1)]):
            if k < top:
                up.append(new.energy)
            new, moved = self._moved(target, new, level, noise.part(k + 1, n), t)
            infos.append(moved)
            if k >= top:
                down.append(new.energy)
            if moved.finite is not None:
                finite = moved.finite if finite is None else finite & moved.finite
        log_accept = _log_accept(ladder, up, down[::-1])
        # Never for NaN, the difference of two energies of +inf.
        accepted = noise.uniform(Stream.TEMPERING, t).log() <= log_accept
        new = rows_of(accepted, new, plain)
        new = new if finite is None else rows_of(finite, new, state)
        chance = torch.where(log_accept.isnan(), 0.0, log_accept.clamp(max=0.0).exp())
        chance = chance if finite is None else torch.where(finite, chance, 0.0)

        def averaged() -> Mapping[str, Tensor | float]:
            gradients = sum(of.averaged().get("gradients", 1) for of in infos)
            return {**info.averaged(), "acceptance": chance, "gradients": gradients}

        return new, Info(finite, averaged, info.last, info.acceptance)

    def _moved(self, target: View, state: Point, level: int, noise: Noise, t: int) -> tuple[Point, Info]:
        """One inner step at a temperature."""
        inner = once(target, f"inner {level}", self, lambda: self._inner(level, t, state.x))
        view, known = tempered(target, 1 / self.temperatures[level], state)
        new, info = inner.step(view, inner.init(view, state.x, noise), noise, t)
        return known.after(new.x), info

    def _inner(self, level: int, t: int, x: Tensor) -> Any:
        """The inner sampler at a temperature and step."""
        factor = step_factors(self.sampler, tuple(self.temperatures))[level]
        return for_temperatures(self.sampler, (factor,), len(x), t, x.device)


class _WarmUp:
    """The ``Adaptation`` (base.py) of the inner sampler."""

    def __init__(self, sampler: TemperedTransitions, inner: Any) -> None:
        self.sampler, self.inner = sampler, inner

    def update(self, old: Any, new: Any, info: Info, active: Tensor | None) -> None:
        """Learn from one step."""
        self.inner.update(old, new, info, active)
        self.sampler = replace(self.sampler, sampler=self.inner.sampler)


def _log_accept(ladder: Sequence[float], up: Sequence[Tensor], down: Sequence[Tensor]) -> Tensor:
    """log a, (n,). up, down: E(y_j) and E(z_j), (n,) each, for j = 0 to K - 1."""
    b = [1 / temperature for temperature in ladder]
    log_accept = torch.zeros_like(up[0])
    for j, (before, after) in enumerate(zip(up, down, strict=True)):
        log_accept = log_accept + (b[j] - b[j + 1]) * (before - after)
    return log_accept
