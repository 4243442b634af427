"""HMC in the first layer of an MLP energy: the same steps as ``HMC`` up to rounding, with fewer and smaller products.

The chains have the same momenta and accept draws. targets/collapsed.py states the equations. Positions are kept in two
parts, x = base + a W, which are put together where x is needed: by the energy's Gaussian term, by bounds, or by the
caller. Else a step takes one product with W, for the momentum. Both parts and u are rounded in each step, so they are
computed anew from x every _REFRESHED steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ..rng import Noise, Stream
from ..targets.base import View
from ..targets.collapsed import Collapsed, Leaps
from ..targets.description import Description
from ..targets.remembered import Point
from .base import Info, Sampler, diagonal_at, once, rows_of, value_at
from .hmc import HMC, Trajectory, decided, judged, scaled_step

__all__ = ["CollapsedHMC", "CollapsedPoint", "collapsed", "scale_of"]

# Steps after which x is put together, and u is computed from it again. A step rounds u and x apart by a unit in the
# last place or so, and the differences add up as in a random walk: to four units after 16 steps. The two products then
# take 1/16 of their time per step.
_REFRESHED = 16

# The other operations of a leapfrog step, per chain and unit of the first layer, in the time of a product's terms.
_OVERHEAD = 64

# Carried values that are further than this from those computed from x, relative to a chain's largest, belong to other
# states or weights. Rounding is some 1e-6 (float32).
_SAME = 1e-3


class CollapsedPoint(NamedTuple):
    """Chains at x = base + a W (with a scale r, base + r a W diag(r)).

    base: (n, dim). a, inner, slopes: (n, width) a, u and s. energy: (n,) E(x). age: (n,) int64, steps since base was x.
    """

    base: Tensor
    a: Tensor
    inner: Tensor
    slopes: Tensor
    energy: Tensor
    age: Tensor


@dataclass(frozen=True, eq=False)
class CollapsedHMC(Sampler):
    """The steps of ``sampler`` on a target that is ``Collapsed``."""

    sampler: HMC

    exact: ClassVar[bool] = True
    scheduled: ClassVar[tuple[str, ...]] = ("sampler",)
    reports: ClassVar[Mapping[str, float | Tensor]] = HMC.reports
    carries: ClassVar[tuple[str, ...]] = ("base", "a", "inner", "age")
    recomputes: ClassVar[tuple[str, ...]] = ("slopes", "energy")

    @property
    def clamp(self) -> Any:  # type: ignore[override]
        return self.sampler.clamp

    def init(self, target: View, x: Tensor, noise: Noise, **carried: Tensor) -> CollapsedPoint:
        """Compute u from x. What chains carry is kept where it is the same up to rounding, so that bits do not depend
        on where a call ends."""
        layer = _layer(target)
        u = layer.projected(x)
        fresh = CollapsedPoint(x, torch.zeros_like(u), u, u, x.new_zeros(len(x)), _zeros(x))
        state = fresh._replace(**carried)
        if carried and state.a.shape == u.shape == state.inner.shape and state.base.shape == x.shape:
            same = _close(layer.put_together(state.base, state.a), x) & _close(state.inner, u)
            state = rows_of(same, state, fresh)
        else:
            state = fresh
        value, slopes = layer.evaluated(state.inner)
        return state._replace(slopes=slopes, energy=layer.energy(x, value))

    def positions(self, target: View, state: CollapsedPoint) -> Tensor:
        """x, put together."""
        return _layer(target).put_together(state.base, state.a)

    def step(self, target: View, state: CollapsedPoint, noise: Noise, t: int) -> tuple[CollapsedPoint, Info]:
        """Follow a trajectory, then accept or reject its end."""
        layer, sampler = _layer(target), self.sampler
        leaps = once(target, "leaps", self, lambda: _leaps(sampler, t, layer, state.base))
        state = _refreshed(layer, state)
        v = noise.normal(Stream.MOMENTUM, t)
        q = layer.projected_momentum(v)
        end = layer.followed(state.inner, q, state.slopes, leaps)
        alpha, beta = leaps.alpha[-1, :, None], leaps.beta[-1, :, None]
        if layer.curvature == 0.0 and target.box is None:
            base, a, age = layer.drifted(state.base, v, beta), state.a + end.a, state.age + 1
        else:  # the energy or the bounds need x
            base, a, age = layer.combined(alpha, state.base, beta, v, end.a), state.a, state.age
        energy = layer.energy(base, end.value)
        log_accept = torch.add(state.energy - energy, _gained(layer, state, v, q, end.b, leaps), alpha=-0.5)

        def whole() -> tuple[Point, Tensor, Tensor, Trajectory]:
            x, there = layer.put_together(state.base, state.a), layer.put_together(base, a)
            start = Point(x, state.energy, layer.gradient_from(x, state.slopes))
            momentum = layer.combined_momentum(leaps.gamma, x, leaps.delta, v, end.b)
            moved = Trajectory(there, energy, start.gradient, momentum, leaps.n_leapfrog, log_accept)
            return start, v, scaled_step(sampler, t, x), moved

        inside = None if target.box is None else target.box.contains(base)
        verdict = judged(target, base.sum() + a.sum(), inside, log_accept, whole)
        return decided(
            state, CollapsedPoint(base, a, end.u, end.slopes, energy, age), noise, t, log_accept, verdict,
            leaps.n_leapfrog, lambda new: layer.gradient_from(self.positions(target, new), new.slopes),
        )  # fmt: skip


def _layer(target: View) -> Collapsed:
    return cast(Collapsed, target.target)


def _leaps(sampler: HMC, t: int, layer: Collapsed, x: Tensor) -> Leaps:
    """The trajectory of step t. A mass of one value per dim is the layer's scale."""
    h = value_at(sampler.step_size, t, x.device)
    if sampler.mass is not None and not isinstance(sampler.mass, Tensor):
        h = h / sampler.mass**0.5
    return Leaps.of(h, sampler.n_leapfrog, layer.curvature, x)


def _refreshed(layer: Collapsed, state: CollapsedPoint) -> CollapsedPoint:
    """The state, with x put together and u computed from it for chains where it is due."""
    due = state.age >= _REFRESHED
    if not bool(due.any()):
        return state
    x = layer.put_together(state.base, state.a)
    fresh = state._replace(base=x, a=torch.zeros_like(state.a), inner=layer.projected(x), age=_zeros(x))
    return rows_of(due, fresh, state)


def _gained(layer: Collapsed, state: CollapsedPoint, v: Tensor, q: Tensor, b: Tensor, leaps: Leaps) -> Tensor:
    """|v_L|^2 - |v_0|^2 = 2 v_0 . d + |d|^2, (n,). See targets/collapsed.py for d."""
    vb, bgb = (q * b).sum(dim=1), (layer.multiplied(b) * b).sum(dim=1)
    if layer.curvature == 0.0:
        return torch.add(bgb, vb, alpha=2)
    gamma, less = leaps.gamma[:, 0], leaps.delta[:, 0] - 1
    y = layer.away(state.base)  # a is 0
    vv, vy, yy = (v * v).sum(dim=1), (v * y).sum(dim=1), (y * y).sum(dim=1)
    yb = (state.inner * b).sum(dim=1)
    along = gamma * vy + less * vv + vb  # v_0 . d
    return 2 * along + gamma**2 * yy + less**2 * vv + bgb + 2 * (gamma * less * vy + gamma * yb + less * vb)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def _close(a: Tensor, b: Tensor) -> Tensor:
    """Whether rows are the same up to rounding. False for NaN."""
    return (a - b).abs().amax(dim=1) <= b.abs().amax(dim=1) * _SAME


def collapsed(sampler: Any, description: Description) -> CollapsedHMC | None:
    """The form of this sampler that runs on a ``Collapsed`` energy, where there is one and it is cheaper; or None."""
    if type(sampler) is not HMC or not _one_number(description.curvature):
        return None
    if isinstance(sampler.mass, Tensor) and description.curvature is not None:
        return None  # the Gaussian term is not isotropic in the scale of the mass
    width = sum(mlp.widths[0] for mlp in description.mlps) + (description.linear is not None)
    return CollapsedHMC(sampler) if _cheaper(description.dim, width, sampler.n_leapfrog) else None


def scale_of(sampler: HMC, description: Description) -> Tensor | None:
    """The scale r of ``FirstLayer``: M^(-1/2), (dim,), or None for a mass that is a number.

    Raises:
        ValueError: a mass that has not one value per dim.
    """
    mass = diagonal_at("mass", sampler.mass, description.mlps[0].weights[0])
    return mass.rsqrt() if isinstance(mass, Tensor) else None


def _one_number(v: Tensor | None) -> bool:
    return v is None or bool((v == v[0]).all())


def _cheaper(dim: int, width: int, n_leapfrog: int) -> bool:
    """Whether a trajectory takes less time. Products with upper layers are the same.

    A leapfrog step takes one product with G, (width, width), in place of two with W, (width, dim), and a trajectory
    takes two with W.
    """
    return width * (width + _OVERHEAD) + 2 * dim * width / n_leapfrog < 2 * dim * width
