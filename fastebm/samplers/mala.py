"""MALA: a Langevin step as the proposal of a Metropolis test, which makes exp(-E) invariant for every step size.

y     = x - (step_size / 2) C dE/dx(x) + sqrt(step_size C) xi,   xi ~ N(0, I)
log a = E(x) - E(y) + log q(x | y) - log q(y | x)
      = E(x) - E(y) + sqrt(step_size) xi . s / 2 - step_size |s|^2 / 8,   s = sqrt(C) (dE/dx(x) + dE/dx(y))
x'    = y if log u <= log a, else x,                             u ~ U(0, 1]

C is the preconditioner, a diagonal matrix. q(y | x) is the density of the proposal. The second form of log a is the
first with the squares expanded. This is HMC with one leapfrog step of size sqrt(step_size) and the mass 1 / C (Neal
2011, section 5.5.2), and so it is computed (hmc.py). Sources: Roberts & Tweedie 1996; Roberts & Rosenthal 1998 (optimal
acceptance rate 0.574); Girolami & Calderhead 2011 (preconditioning).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise, Stream
from ..targets.base import View
from ..targets.remembered import Point
from .adaptation import WarmUp, tunable
from .base import Info, Sampler, checked_coefficient, checked_diagonal, checked_fraction, diagonal_at, once, value_at
from .hmc import step_tensor, transition

__all__ = ["MALA"]


@dataclass(frozen=True, eq=False)
class MALA(Sampler):
    """The Metropolis-adjusted Langevin algorithm: samples exp(-E) without step-size bias.

        y = x - (step_size / 2) C dE/dx(x) + sqrt(step_size C) xi,   accepted with probability min(1, a)

    The top of this file states a (Roberts & Tweedie 1996). Every step size leaves exp(-E) invariant. With large steps
    most proposals are rejected, and with small ones the chain explores slowly. About 57% accepted is best
    (``SampleInfo.acceptance``; Roberts & Rosenthal 1998). A warm-up finds that step size:
    ``sample(energy, MALA(0.1), warmup=500, steps=1000)``. The values are in ``SampleInfo.sampler``.

    Args:
        step_size: > 0, in squared units of the state. A float, a (steps,) tensor (a schedule) or a (n_chains, 1) tensor
            (one value per chain). A warm-up adapts a number only.
        preconditioner: the diagonal of C: a number, or a tensor of one state's shape, > 0. Best is the variance of each
            coordinate. None: 1, and a warm-up adapts it.
        target_acceptance: mean acceptance probability that the warm-up aims at, in (0, 1). None: adapt nothing.
        clamp: bounds (lo, hi) of the states with lo < hi, each a number or a tensor of one state's shape, or None.
            Proposals outside the bounds are rejected, so the chain samples exp(-E) restricted to them. (Projecting
            proposals onto the bounds, as ``Langevin`` does, would break detailed balance.) Chains must start inside.

    A proposal with energy +inf is rejected too. So is one that has diverged, because the step is too large for the
    energy there: see hmc.py. ``SampleInfo.divergences`` counts these. Otherwise an energy of NaN or -inf, a gradient
    that is not finite, or a proposal that overflows stops the chain, and ``on_nonfinite`` decides what follows.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    step_size: float | Tensor
    preconditioner: float | Tensor | None = None
    target_acceptance: float | None = 0.574
    clamp: Bounds | None = None

    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = True
    power: ClassVar[int] = 2
    scheduled: ClassVar[tuple[str, ...]] = ("step_size",)
    reports: ClassVar[Mapping[str, float]] = dict.fromkeys(("acceptance", "divergences", "grad_norm"), math.nan)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", checked_coefficient("step_size", self.step_size, positive=True))
        object.__setattr__(self, "preconditioner", checked_diagonal("preconditioner", self.preconditioner))
        object.__setattr__(self, "target_acceptance", checked_fraction("target_acceptance", self.target_acceptance))
        object.__setattr__(self, "clamp", Box.of(self.clamp))

    def adaptation(self, steps: int) -> WarmUp | None:
        """Adapt step_size, and the preconditioner if it is None."""
        scaled = _with_preconditioner if self.preconditioner is None else None
        return WarmUp(self, steps, scaled) if tunable(self) else None

    def init(self, target: View, x: Tensor, noise: Noise) -> Point:
        """Evaluate energy and gradient at x. Later steps carry them in the state."""
        return Point(x, *target.value_and_gradient(x))

    def step(self, target: View, state: Point, noise: Noise, t: int) -> tuple[Point, Info]:
        """Propose y, then accept or reject it."""
        h = once(target, "h", self, lambda: self.scaled_step(t, state.x))
        return transition(target, state, noise, t, h, 1, Stream.LANGEVIN)

    def scaled_step(self, t: int, x: Tensor) -> Tensor:
        """sqrt(step_size C) at step t, the step of HMC, which broadcasts with x: (n_chains, dim)."""
        c = diagonal_at("preconditioner", self.preconditioner, x)
        h = (value_at(self.step_size, t, x.device) * (c.double() if isinstance(c, Tensor) else c)) ** 0.5
        return step_tensor(h, x)


def _with_preconditioner(sampler: Any, squared_scale: Tensor) -> Any:
    """The sampler with the squared scale of each coordinate, (dim,), as its preconditioner."""
    return replace(sampler, preconditioner=squared_scale)
