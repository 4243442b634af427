"""Annealed importance sampling (Neal 2001) as a sampler: chains move from one law to another and weigh themselves.

    E_b      = (1 - b) E_0 + b E_1,   b_0, ..., b_K
    log w_k  = log w_(k-1) + (b_k - b_(k-1)) (E_0(x_(k-1)) - E_1(x_(k-1)))
    x_k      ~ T_k(. | x_(k-1)),   which leaves exp(-E_(b_k)) invariant

If x_0 has the law of b_0, then E[w_K] = Z_(b_K) / Z_(b_0) for any transitions T_k (Neal 2001, section 2). From b = 0
to b = 1 this estimates Z_1 / Z_0. From b = 1 to b = 0, with draws of exp(-E_1) as x_0, it estimates Z_0 / Z_1 (reverse
AIS: Burda, Grosse & Salakhutdinov 2015). The weight is updated before the transition. T_K changes no weight: it moves
the last states on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..box import Bounds
from ..rng import Noise
from ..samplers.base import Info, Sampler
from ..targets.base import View
from ..targets.mixed import Mixed
from ..targets.remembered import Point, Remembered
from .normal import Normal

__all__ = ["AIS", "AISState"]


class AISState(NamedTuple):
    """x: (n, dim). log_weight: (n,) float64. energy: (n,) E_1(x). gradient: (n, dim) dE_1/dx(x)."""

    x: Tensor
    log_weight: Tensor
    energy: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class AIS(Sampler):
    """K transitions along a ladder of K + 1 temperatures. The target is E_1.

    A state with E_1 = +inf has the weight 0 (log_weight = -inf), and its chain stays there.

    Args:
        base: E_0.
        betas: K + 1 numbers in [0, 1].
        samplers: an exact sampler for each of the betas. The first one is not used. (Reversed, it is the last.)
        clamp: bounds of the states, those of the samplers.
    """

    base: Normal
    betas: tuple[float, ...]
    samplers: tuple[Any, ...]
    clamp: Bounds | None = None

    exact: ClassVar[bool] = True
    reports: ClassVar[Mapping[str, float]] = {"acceptance": math.nan}
    carries: ClassVar[tuple[str, ...]] = ("log_weight",)

    def part(self, first: int, last: int) -> AIS:
        """Transitions first to last - 1."""
        return AIS(self.base, self.betas[first : last + 1], self.samplers[first : last + 1], self.clamp)

    def reversed(self) -> AIS:
        """The same ladder from its last temperature to its first."""
        return AIS(self.base, self.betas[::-1], self.samplers[::-1], self.clamp)

    def init(self, target: View, x: Tensor, noise: Noise, *, log_weight: Tensor | None = None) -> AISState:
        """Evaluate E_1 at x. The weights start at 1."""
        if log_weight is None:
            log_weight = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return AISState(x, log_weight, *target.value_and_gradient(x))

    def step(self, target: View, state: AISState, noise: Noise, t: int) -> tuple[AISState, Info]:
        """Update the weights for betas[t + 1], then make its transition."""
        x, log_weight, energy, gradient = state
        b, change = self.betas[t + 1], self.betas[t + 1] - self.betas[t]
        if change != 0:  # 0 inf is NaN
            log_weight = log_weight + change * (self.base.value(x).double() - energy.double())
        end_energy = Remembered(target.target, Point(x, energy, gradient))
        view, sampler = replace(target, target=Mixed(self.base, end_energy, b)), self.samplers[t + 1]
        moved, info = sampler.step(view, sampler.init(view, x, noise), noise, t)
        if bool((log_weight + energy).sum().isfinite()):  # then all terms are, which saves masks
            end, finite = end_energy.after(moved.x), info.finite
        else:
            without = log_weight == -math.inf  # chains of weight 0
            end = end_energy.after(torch.where(without[:, None], x, moved.x))
            sound = ~energy.isnan() & (energy != -math.inf)
            finite = without | (sound if info.finite is None else sound & info.finite)
        acceptance = torch.ones_like(energy) if info.acceptance is None else info.acceptance

        return AISState(end.x, log_weight, end.energy, end.gradient), Info(
            finite, lambda: {"acceptance": acceptance}, acceptance=acceptance
        )
