"""Underdamped Langevin dynamics in the first layer of an MLP energy: the same steps up to rounding.

targets/collapsed.py explains the first layer. With y = x - m = base + a W and p = push + b W, the parts of a step
(underdamped.py) are

A (drift)  base' = base + (s / M) push,   a' = a + (s / M) b
B (kick)   push' = push - s c base,       b' = b - s (slopes + c a)
O          push' = kept push + spread xi, b' = kept b

with the same noise. A gradient takes one product with W, where that of ``UnderdampedLangevin`` takes two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..rng import Noise, Stream
from ..targets.base import View
from ..targets.collapsed import Collapsed
from .base import Info, both, finite_rows, once, plus, rows_of
from .collapsed import REFRESHED, Form, layer_of, renewed, resumed, same_rows, zeros_like_rows

__all__ = ["CollapsedMotion", "CollapsedUnderdamped"]

# The time of a step's other operations, per chain and unit of the first layer, in that of a term of a product.
_STEP = 90


class CollapsedMotion(NamedTuple):
    """Chains at y = base + a W with momenta p = push + b W.

    base, push: (n, dim). a, b: (n, width). slopes: (n, width) s where the last kick took it. age: (n,) int64, steps
    since base was y.
    """

    base: Tensor
    a: Tensor
    push: Tensor
    b: Tensor
    slopes: Tensor
    age: Tensor


class CollapsedUnderdamped(Form):
    """The steps of ``UnderdampedLangevin`` on a target that is ``Collapsed``. It has no bounds."""

    carries: ClassVar[tuple[str, ...]] = ("momentum",)
    recomputes: ClassVar[tuple[str, ...]] = ("base", "a", "push", "b", "slopes", "age")
    _parts: ClassVar[tuple[str, ...]] = ("base", "a", "push", "b", "age")

    @property
    def possible(self) -> bool:
        """A bound reverses the momentum of single coordinates."""
        return self.sampler.clamp is None and not isinstance(self.sampler.mass, Tensor)

    def scale(self, x: Tensor) -> float | Tensor:
        """1: the mass is a number, which the coefficients have."""
        return 1.0

    def saved(self, dim: int, width: int) -> float:
        """A gradient takes a product with W and one with G in place of two with W."""
        return 2 * dim * width - width * ((1 + 2 / REFRESHED) * dim + width + _STEP)

    def init(
        self, target: View, x: Tensor, noise: Noise, momentum: Tensor | None = None, **parts: Tensor
    ) -> CollapsedMotion:
        """Carried parts that make up x and the momentum with these weights are kept, so that bits do not depend on
        where a call ends."""
        layer, y = layer_of(target), layer_of(target).away(x)
        if momentum is None:
            momentum = self.sampler.drawn(x, noise)
        a = y.new_zeros(len(y), layer.layer.width)
        fresh = CollapsedMotion(y, a, momentum, a, a, zeros_like_rows(y))

        def same(given: CollapsedMotion) -> Tensor:
            of_x = same_rows(layer.positions(given.base, given.a), x)
            return of_x & same_rows(layer.put_together(given.push, given.b), momentum)

        state = resumed(fresh, parts, same, lambda: fresh)
        return state._replace(slopes=layer.slopes_at(state.base, state.a))

    def positions(self, target: View, state: CollapsedMotion) -> Tensor:
        """x, put together."""
        return layer_of(target).positions(state.base, state.a)

    def carried(self, target: View, state: CollapsedMotion) -> Mapping[str, Tensor]:
        """The momentum, put together, and the parts."""
        momentum = layer_of(target).put_together(state.push, state.b)
        return {"momentum": momentum, **{name: getattr(state, name) for name in self._parts}}

    def taken(self, carried: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The momentum, and all parts or none."""
        names = super().taken(carried)
        return (*names, *self._parts) if all(name in carried for name in (*names, *self._parts)) else names

    def step(self, target: View, state: CollapsedMotion, noise: Noise, t: int) -> tuple[CollapsedMotion, Info]:
        """Apply the parts of the splitting in turn."""
        layer, splitting = layer_of(target), self.sampler.splitting
        state = renewed(state, lambda: _together(layer, state))
        base, a, push, b, slopes, age = state
        drift, kick, kept, spread = once(target, "coefficients", self, lambda: self.sampler.coefficients(t, base))
        of = splitting.count("O")
        where = base, a  # of the last gradient
        at_x, draws = True, 0  # whether the gradient is that of x; how many O have been applied
        for part in splitting:
            if part == "A":
                base, a, at_x = plus(base, push, drift), plus(a, b, drift), False
            elif part == "B":
                if not at_x:
                    slopes, where, at_x = layer.slopes_at(base, a), (base, a), True
                b = plus(b, slopes, -kick)
                if layer.curvature != 0.0:
                    push, b = plus(push, base, -kick * layer.curvature), plus(b, a, -kick * layer.curvature)
            else:
                xi = noise.part(draws, of).normal(Stream.LANGEVIN, t)
                push, b, draws = plus(kept * push, xi, spread), kept * b, draws + 1
        finite = both(finite_rows(base + push), finite_rows(a + b))
        new = CollapsedMotion(base, a, push, b, slopes, age + 1)
        if finite is not None:
            new = rows_of(finite, new, state)

        def last() -> Mapping[str, Tensor]:
            gradient = layer.gradient_from(*where, slopes)
            return {"grad_norm": torch.linalg.vector_norm(gradient, dim=1)}

        return new, Info(finite, last=last)


def _together(layer: Collapsed, state: CollapsedMotion) -> CollapsedMotion:
    """The state, with y and p put together."""
    y, p = layer.put_together(state.base, state.a), layer.put_together(state.push, state.b)
    zero = torch.zeros_like(state.a)
    return CollapsedMotion(y, zero, p, zero, state.slopes, zeros_like_rows(y))
