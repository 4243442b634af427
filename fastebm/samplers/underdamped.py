"""Underdamped Langevin dynamics by splitting: positions x and momenta p of law exp(-(E(x) + p M^-1 p / 2) / T).

dx = M^-1 p dt,   dp = -dE/dx dt - friction p dt + sqrt(2 friction T M) dW,   T = noise_scale^2

Each part alone is solved exactly for a time s:

A (drift)  x' = x + s M^-1 p
B (kick)   p' = p - s dE/dx(x)
O          p' = c p + sqrt(T (1 - c^2) M) xi,   c = exp(-friction s),   xi ~ N(0, I)

A step applies the parts in the order of a palindrome, such as BAOAB. A part that occurs k times takes the time
step_size / k at each. The law of x is then that of the exact dynamics up to an error of second order in the step. For
a Gaussian, BAOAB and ABOBA have no error in the law of x at any stable step. Sources: Leimkuhler & Matthews 2013,
"Rational construction of stochastic numerical methods for molecular sampling" (BAOAB, ABOBA); Bussi & Parrinello 2007
(OBABO).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise, Stream
from ..targets.base import View
from .base import (
    Info,
    Sampler,
    both,
    checked_coefficient,
    checked_diagonal,
    diagonal_at,
    finite_rows,
    once,
    plus,
    rows_of,
    settled,
    value_at,
)

__all__ = ["UnderdampedLangevin", "UnderdampedState"]


class UnderdampedState(NamedTuple):
    """x, momentum: (n_chains, dim). gradient: (n_chains, dim) dE/dx where the last kick took it."""

    x: Tensor
    gradient: Tensor
    momentum: Tensor


@dataclass(frozen=True, eq=False)
class UnderdampedLangevin(Sampler):
    """Underdamped (kinetic) Langevin dynamics without an accept test, by splitting (Leimkuhler & Matthews 2013).

    As step_size goes to 0, the chain samples exp(-E/T), T = noise_scale^2. The bias is of second order in step_size,
    while that of ``Langevin`` is of first order in its own, which corresponds to step_size^2. Momentum carries the
    chain on, so it explores faster than ``Langevin`` where E is badly scaled. The top of this file states the parts
    A, B and O of a step.

    Args:
        step_size: the time of a step, > 0, in units of the state for unit masses. A float, a (steps,) tensor (a
            schedule) or a (n_chains, 1) tensor (one value per chain). Stable below 2 / sqrt(largest curvature of E) for
            unit masses.
        friction: rate at which momentum is lost, per unit of time, > 0, in the same three forms. Small values keep the
            direction for long; with large values the chain becomes ``Langevin`` with step size step_size^2.
        mass: the diagonal of M: a number, or a tensor of one state's shape, > 0. Best is the inverse variance of each
            coordinate. None: 1.
        noise_scale: sqrt(T), >= 0, in the same three forms as step_size. With 0 there is no noise, and the chain is
            gradient descent with momentum.
        splitting: the parts of a step: a palindrome of A, B and O that has each of them, such as "BAOAB", "ABOBA" or
            "OBABO". These take one gradient per step.
        clamp: bounds (lo, hi) of the states with lo < hi, each a number or a tensor of one state's shape, or None.
            After each drift the state is moved onto the bounds, and the momentum is reversed in the coordinates that
            were outside.

    Chains start with momenta drawn from N(0, T M), also at each draw of a pool. A call that resumes a ``SampleResult``
    goes on with its momenta. ``grad_norm`` is that of the last kick.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    step_size: float | Tensor
    friction: float | Tensor = 1.0
    mass: float | Tensor | None = None
    noise_scale: float | Tensor = 1.0
    splitting: str = "BAOAB"
    clamp: Bounds | None = None

    scheduled: ClassVar[tuple[str, ...]] = ("step_size", "friction", "noise_scale")
    reports: ClassVar[Mapping[str, float]] = {"grad_norm": math.nan}
    carries: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        for name in self.scheduled:
            value = checked_coefficient(name, getattr(self, name), positive=name != "noise_scale")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "mass", checked_diagonal("mass", self.mass))
        object.__setattr__(self, "clamp", Box.of(self.clamp))
        parts = self.splitting
        if not isinstance(parts, str) or set(parts) != set("ABO") or parts != parts[::-1]:
            raise ValueError(
                f'splitting must read the same from both ends and have A, B and O, as "BAOAB" does, got {parts!r}'
            )

    @property
    def temperature(self) -> float | Tensor:
        """T = noise_scale^2, in the shape of noise_scale."""
        return self.noise_scale**2

    def init(self, target: View, x: Tensor, noise: Noise, momentum: Tensor | None = None) -> UnderdampedState:
        """Take the gradient at x. A fresh start draws momenta."""
        momentum = self.drawn(x, noise) if momentum is None else momentum
        return UnderdampedState(x, target.gradient(x), momentum)

    def drawn(self, x: Tensor, noise: Noise) -> Tensor:
        """Momenta from N(0, T M), (n, dim), with T of the first step."""
        if isinstance(self.noise_scale, Tensor) and self.noise_scale.shape == (0,):
            return torch.full_like(x, math.nan)  # no step, so no T: the next part starts afresh
        scale = _in_dtype(value_at(self.noise_scale, 0, x.device), x)
        momentum: Tensor = scale * diagonal_at("mass", self.mass, x) ** 0.5 * noise.normal(Stream.MOMENTUM, 0)
        return momentum

    def step(self, target: View, state: UnderdampedState, noise: Noise, t: int) -> tuple[UnderdampedState, Info]:
        """Apply the parts of the splitting in turn."""
        x, gradient, p = state
        drift, kick, kept, spread = once(target, "coefficients", self, lambda: self.coefficients(t, x))
        of = self.splitting.count("O")
        finite: Tensor | None = None
        at_x, draws = True, 0  # whether the gradient is that of x; how many O have been applied
        for part in self.splitting:
            if part == "A":
                moved, at_x = target.held(x, plus(x, p, drift)), False
                if target.box is not None:
                    inside, here = settled(target, x, moved, target.box)
                    p, moved, finite = torch.where(inside != moved, -p, p), inside, both(finite, here)
                x = moved
            elif part == "B":
                gradient, at_x = gradient if at_x else target.gradient(x), True
                p = plus(p, gradient, -kick)
            else:
                xi = noise.part(draws, of).normal(Stream.LANGEVIN, t)
                p, draws = plus(kept * p, xi, spread), draws + 1
        # A momentum that is not finite would show in x only in the next step.
        finite = both(finite, finite_rows(target.held(state.x, x + p)))
        new = UnderdampedState(x, gradient, p)
        if finite is not None:
            new = rows_of(finite, new, state)

        def last() -> Mapping[str, Tensor]:
            return {"grad_norm": gradient.square().sum(dim=1).sqrt()}

        return new, Info(finite, last=last)

    def coefficients(self, t: int, x: Tensor) -> tuple[Any, Any, Any, Any]:
        """At step t: s / M of a part A, s of a part B, and c and sqrt(T (1 - c^2) M) of a part O."""
        step_size, friction, noise_scale = (value_at(getattr(self, name), t, x.device) for name in self.scheduled)
        mass = diagonal_at("mass", self.mass, x)
        times = {part: step_size / self.splitting.count(part) for part in "ABO"}
        kept, spread = _ornstein_uhlenbeck(friction * times["O"], noise_scale, x)
        return _in_dtype(times["A"], x) / mass, _in_dtype(times["B"], x), kept, spread * mass**0.5


def _ornstein_uhlenbeck(damping: Any, noise_scale: Any, x: Tensor) -> tuple[Any, Any]:
    """c and sqrt(T (1 - c^2)) of part O with c = exp(-damping), in the dtype of x."""
    if isinstance(damping, Tensor):
        return _in_dtype(torch.exp(-damping), x), _in_dtype((-torch.expm1(-2 * damping)).sqrt() * noise_scale, x)
    # Numbers: an operation on a tensor of one element takes as long as one on a small batch of chains.
    return math.exp(-damping), _in_dtype(math.sqrt(-math.expm1(-2 * damping)) * noise_scale, x)


def _in_dtype(value: Any, x: Tensor) -> Any:
    """A number as it is; a tensor in the dtype of x."""
    return value.to(x.dtype) if isinstance(value, Tensor) else value
