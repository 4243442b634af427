"""Langevin dynamics in the first layer of an MLP energy: the same steps up to rounding, with fewer products.

targets/collapsed.py explains the first layer. With y = x - m = base + r a W diag(r), r the root of the preconditioner,
the update x' = x - drift r^2 dE/dx + noise_std r xi is

base' = (1 - drift c) base + noise_std r xi
a'    = (1 - drift c) a - drift s,   s at u = base W^T + a G

The noise is that of ``Langevin``. A step takes one product with W, where ``Langevin`` takes two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..rng import Noise
from ..targets.base import View
from ..targets.collapsed import Collapsed, Drift
from .base import Info, diagonal_at, once, rows_of, value_at
from .collapsed import REFRESHED, Form, layer_of, renewed, resumed, same_rows, zeros_like_rows
from .langevin import drift_and_noise_of

__all__ = ["CollapsedLangevin", "CollapsedState"]

# The time of a step's other operations, per chain and unit of the first layer, in that of a term of a product.
_STEP = 120


class CollapsedState(NamedTuple):
    """Chains at y = base + r a W diag(r). base: (n, dim). a: (n, width). age: (n,) int64, steps since base was y."""

    base: Tensor
    a: Tensor
    age: Tensor


class CollapsedLangevin(Form):
    """The steps of ``Langevin`` on a target that is ``Collapsed``."""

    carries: ClassVar[tuple[str, ...]] = ("base", "a", "age")
    recomputes: ClassVar[tuple[str, ...]] = ()

    @property
    def possible(self) -> bool:
        """See ``Langevin.unbounded``."""
        return bool(self.sampler.unbounded)

    def scale(self, x: Tensor) -> float | Tensor:
        """C^(1/2)."""
        return diagonal_at("preconditioner", self.sampler.preconditioner, x) ** 0.5

    def saved(self, dim: int, width: int) -> float:
        """A step takes a product with W and one with G in place of two with W."""
        return 2 * dim * width - width * ((1 + 1 / REFRESHED) * dim + width + _STEP)

    def init(self, target: View, x: Tensor, noise: Noise, **carried: Tensor) -> CollapsedState:
        """Carried parts that make up x with these weights are kept, so that bits do not depend on where a call ends."""
        layer = layer_of(target)
        y = layer.away(x)
        fresh = CollapsedState(y, y.new_zeros(len(y), layer.layer.width), zeros_like_rows(y))

        def same(given: CollapsedState) -> Tensor:
            return same_rows(layer.positions(given.base, given.a), x)

        return resumed(fresh, carried, same, lambda: fresh)

    def positions(self, target: View, state: CollapsedState) -> Tensor:
        """x, put together."""
        return layer_of(target).positions(state.base, state.a)

    def step(self, target: View, state: CollapsedState, noise: Noise, t: int) -> tuple[CollapsedState, Info]:
        """One update, as defined at the top of this file."""
        layer = layer_of(target)
        state = renewed(state, lambda: _together(layer, state))
        drift = once(target, "drift", self, lambda: self._drift(t, state.base, layer.curvature))
        base, a, finite = layer.stepped(state.base, state.a, drift, noise, t)
        new = CollapsedState(base, a, state.age + 1)
        if finite is not None:
            new = rows_of(finite, new, state)

        def averaged() -> Mapping[str, Tensor | float]:
            return {"clipped": 0.0, "clamped": 0.0}

        def last() -> Mapping[str, Tensor]:
            gradient = layer.gradient_from(state.base, state.a, layer.slopes()[: len(state.a)])
            return {"grad_norm": torch.linalg.vector_norm(gradient, dim=1)}

        return new, Info(finite, averaged, last)

    def _drift(self, t: int, x: Tensor, curvature: float) -> Drift:
        """The coefficients of step t. A scale of one value per dim is the layer's."""
        drift, noise_std = drift_and_noise_of(*(value_at(c, t, x.device) for c in self._settings))
        scale = self.scale(x)
        if not isinstance(scale, Tensor):
            drift, noise_std = drift * scale**2, noise_std * scale
        drift, noise_std = (
            torch.as_tensor(c, dtype=torch.float64, device=x.device).reshape(-1, 1) for c in (drift, noise_std)
        )
        return Drift(drift.to(x.dtype), noise_std.to(x.dtype), (-drift * curvature).to(x.dtype))

    @property
    def _settings(self) -> tuple[Any, Any]:
        return self.sampler.step_size, self.sampler.noise_scale


def _together(layer: Collapsed, state: CollapsedState) -> CollapsedState:
    """The state, with y put together."""
    y = layer.put_together(state.base, state.a)
    return CollapsedState(y, torch.zeros_like(state.a), zeros_like_rows(y))
