"""HMC and MALA in the first layer of an MLP energy: the same steps up to rounding, with fewer and smaller products.

The chains have the same momenta and accept draws as those of ``HMC`` and ``MALA``. targets/collapsed.py states the
equations. Positions are kept in two parts, y = base + a W, which are put together only where the caller or bounds need
x. So a step takes one product with W, for the momentum. The parts, u and |y|^2 are rounded in each step, so they are
computed anew every REFRESHED steps.

MALA is HMC with one leapfrog step (mala.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..rng import Noise, Stream
from ..targets.base import View
from ..targets.collapsed import Collapsed, Leaps
from ..targets.remembered import Point
from .base import Info, Sampler, diagonal_at, once, overwritten, rows_of, value_at
from .hmc import Trajectory, decided, judged, scaled_step

__all__ = [
    "REFRESHED",
    "CollapsedHMC",
    "CollapsedMALA",
    "CollapsedPoint",
    "Form",
    "layer_of",
    "renewed",
    "resumed",
    "same_rows",
    "zeros_like_rows",
]

_State = TypeVar("_State", bound=Any)

# Steps after which y is put together, and all else computed from it again. Over 1,000 steps of each sampler (400 dims,
# with and without a Gaussian term) the error against float64 was the same with any number from 1 to 1,000. But base
# collects all momenta or noise, and a W what the gradient took back: after n steps of Langevin dynamics of size e in
# one place, base is some sqrt(n e) away from y, and both are rounded at that size. This bounds it, and the products
# take 1/64 of their time per step.
REFRESHED = 64

# The time of a leapfrog step's other operations, and of those of a step of MALA, per chain and unit of the first layer,
# in that of a term of a product.
_LEAP, _STEP = 32, 100

# Products with W of a step, with those of y and u from time to time.
_ONCE = 1 + 2 / REFRESHED


class CollapsedPoint(NamedTuple):
    """Chains at y = base + a W (with a scale r, y = base + r a W diag(r)).

    base: (n, dim). a, inner, slopes: (n, width) a, u and s. square: (n,) float64 |y|^2, 0 without a Gaussian term.
    energy: (n,) E. pull: (n, width) s G. age: (n,) int64, steps since base was y, rejected ones too: chains that
    started together are then due together. mark: (n,) int64, ``FirstLayer.mark`` of the weights.
    """

    base: Tensor
    a: Tensor
    inner: Tensor
    square: Tensor
    slopes: Tensor
    energy: Tensor
    pull: Tensor
    age: Tensor
    mark: Tensor


@dataclass(frozen=True, eq=False)
class Form(Sampler):
    """Base class of the forms of samplers that run on a target that is ``Collapsed``, with the same steps."""

    sampler: Any

    scheduled: ClassVar[tuple[str, ...]] = ("sampler",)

    @property
    def clamp(self) -> Any:  # type: ignore[override]
        return self.sampler.clamp

    @property
    def reports(self) -> Mapping[str, float | Tensor]:  # type: ignore[override]
        return cast(Mapping[str, float | Tensor], self.sampler.reports)

    @property
    def possible(self) -> bool:
        """Whether nothing in the sampler's settings acts on single coordinates, except its diagonal scale."""
        return True

    def scale(self, x: Tensor) -> float | Tensor:
        """r (targets/collapsed.py) for states x, (n, dim): a number, or (dim,)."""
        raise NotImplementedError

    def saved(self, dim: int, width: int) -> float:
        """The time that a step saves against the sampler's own, per chain, in that of a term of a product."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class CollapsedHMC(Form):
    """The steps of ``HMC`` on a target that is ``Collapsed``.

    eager: put y together after every step, as a warm-up needs it.
    """

    eager: bool = False

    exact: ClassVar[bool] = True
    carries: ClassVar[tuple[str, ...]] = ("base", "a", "inner", "square", "age", "mark")
    recomputes: ClassVar[tuple[str, ...]] = ("slopes", "energy", "pull")
    stream: ClassVar[Stream] = Stream.MOMENTUM

    def scale(self, x: Tensor) -> float | Tensor:
        """M^(-1/2)."""
        scale: float | Tensor = diagonal_at("mass", self.sampler.mass, x) ** -0.5
        return scale

    def saved(self, dim: int, width: int) -> float:
        """A leapfrog step takes one product with G in place of two with W. A trajectory takes one with W."""
        n: int = self.sampler.n_leapfrog
        return n * 2 * dim * width - width * (n * (width + _LEAP) + _ONCE * dim)

    def init(self, target: View, x: Tensor, noise: Noise, **carried: Tensor) -> CollapsedPoint:
        """Compute u from x. What chains carry is kept if it belongs to x and to these weights, so that bits do not
        depend on where a call ends."""
        layer = layer_of(target)
        y = layer.away(x)
        a, age = y.new_zeros(len(y), layer.layer.width), zeros_like_rows(y)
        like = CollapsedPoint(y, a, a, a[:, 0].double(), a, a[:, 0], a, age, age + layer.layer.mark)

        def same(given: CollapsedPoint) -> Tensor:
            return same_rows(layer.positions(given.base, given.a), x) & (given.mark == like.mark)

        state = resumed(like, carried, same, lambda: _at(layer, y))
        if self.eager:
            state = state._replace(base=layer.put_together(state.base, state.a), a=torch.zeros_like(state.a))
        return self._completed(layer, state)

    def positions(self, target: View, state: CollapsedPoint) -> Tensor:
        """x, put together."""
        return layer_of(target).positions(state.base, state.a)

    def step(self, target: View, state: CollapsedPoint, noise: Noise, t: int) -> tuple[CollapsedPoint, Info]:
        """Follow a trajectory, then accept or reject its end."""
        layer = layer_of(target)
        leaps = once(target, "leaps", self, lambda: self._leaps(layer, t, state.base))
        old = renewed(state, lambda: self._completed(layer, _at(layer, layer.put_together(state.base, state.a))))
        old = old._replace(age=old.age + 1)
        if self.eager:  # G may have another scale than in the last step
            old = old._replace(pull=layer.multiplied(old.slopes))
        v, q = layer.momenta(noise, self.stream, t)
        end = layer.followed(old.inner, q, old.slopes, old.pull, leaps)
        base, a, *sums, size = layer.arrived(old.base, old.a, old.inner, v, q, end, leaps)
        square, gained = _squares(layer, old, leaps, *sums)
        energy = layer.energy(end.value, square)
        log_accept = torch.add(old.energy - energy, gained, alpha=-0.5)

        def whole() -> tuple[Point, Tensor, Tensor, Trajectory]:
            y = layer.put_together(old.base, old.a)
            gradient = layer.gradient_from(old.base, old.a, old.slopes)
            start = Point(layer.positions(old.base, old.a), old.energy, gradient)
            momentum = layer.momentum(leaps, y, v, end.b)
            there = layer.positions(base, a)
            moved = Trajectory(there, energy, start.gradient, momentum, leaps.n_leapfrog, log_accept)
            return start, v, self._h(t, there), moved

        inside = None if target.box is None else target.box.contains(layer.positions(base, a))
        verdict = judged(target, size, inside, log_accept, whole)
        if self.eager:
            base, a = layer.put_together(base, a), torch.zeros_like(a)
        there = CollapsedPoint(base, a, end.u, square, end.slopes, energy, end.pull, old.age, old.mark)
        return decided(
            old, there, noise, t, log_accept, verdict, leaps.n_leapfrog,
            lambda new: layer.gradient_from(new.base, new.a, new.slopes), overwritten,
        )  # fmt: skip

    def _completed(self, layer: Collapsed, state: CollapsedPoint) -> CollapsedPoint:
        """The state with its energy, s and s G."""
        value, slopes, pull = layer.evaluated(state.inner)
        return state._replace(slopes=slopes, energy=layer.energy(value, state.square), pull=pull)

    # -- what MALA has of its own ---------------------------------------------------------------------------

    def _leaps(self, layer: Collapsed, t: int, x: Tensor) -> Leaps:
        """The trajectory of step t. A scale of one value per dim is the layer's."""
        h, scale = value_at(self.sampler.step_size, t, x.device), self.scale(x)
        h = h if isinstance(scale, Tensor) else h * scale
        return Leaps.of(h, self.sampler.n_leapfrog, layer.curvature, x)

    def _h(self, t: int, x: Tensor) -> Tensor:
        """The step of ``hmc.leapfrog``."""
        return scaled_step(self.sampler, t, x)


class CollapsedMALA(CollapsedHMC):
    """The steps of ``MALA`` on a target that is ``Collapsed``."""

    stream: ClassVar[Stream] = Stream.LANGEVIN

    def scale(self, x: Tensor) -> float | Tensor:
        """C^(1/2)."""
        return diagonal_at("preconditioner", self.sampler.preconditioner, x) ** 0.5

    def saved(self, dim: int, width: int) -> float:
        """A step takes a product with W and one with G in place of two with W."""
        return 2 * dim * width - width * (_ONCE * dim + width + _STEP)

    def _leaps(self, layer: Collapsed, t: int, x: Tensor) -> Leaps:
        h, scale = value_at(self.sampler.step_size, t, x.device) ** 0.5, self.scale(x)
        return Leaps.of(h if isinstance(scale, Tensor) else h * scale, 1, layer.curvature, x)

    def _h(self, t: int, x: Tensor) -> Tensor:
        return cast(Tensor, self.sampler.scaled_step(t, x))


def layer_of(target: View) -> Collapsed:
    """The target of a view."""
    return cast(Collapsed, target.target)


def _at(layer: Collapsed, y: Tensor) -> CollapsedPoint:
    """Chains at y. slopes, energy and pull are not computed."""
    u = layer.projected(y)
    square = y.new_zeros(len(y)) if layer.curvature == 0.0 else y.square().sum(dim=1)
    age = zeros_like_rows(y)
    return CollapsedPoint(y, torch.zeros_like(u), u, square.double(), u, square, u, age, age + layer.layer.mark)


def _squares(
    layer: Collapsed, state: CollapsedPoint, leaps: Leaps, of_a: Tensor, of_b: Tensor, vv: Tensor, vy: Tensor
) -> tuple[Tensor, Tensor]:
    """|y|^2 and |v|^2 - |v_0|^2, (n,) each, at the end of a trajectory, as at the top of targets/collapsed.py."""
    if layer.curvature == 0.0:
        return state.square, of_b
    alpha_1, beta, gamma, delta_1 = (c[:, 0].double() for c in leaps[2:])
    yy, vv, vy = state.square, vv.double(), vy.double()
    square = yy + alpha_1 * (2 + alpha_1) * yy + 2 * (1 + alpha_1) * beta * vy + beta**2 * vv + of_a
    gained = gamma**2 * yy + 2 * gamma * (1 + delta_1) * vy + delta_1 * (2 + delta_1) * vv + of_b
    return square, gained.to(of_b.dtype)


def zeros_like_rows(x: Tensor) -> Tensor:
    """(n,) int64."""
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def resumed(
    like: _State, carried: Mapping[str, Tensor], same: Callable[[_State], Tensor], make: Callable[[], _State]
) -> _State:  # fmt: skip
    """The state with what chains carry, where it belongs to them, and those of ``make`` elsewhere.

    like: a state of the right shapes, whose fields are kept if they are not carried. same: which belong, (n,) bool.
    """
    given: _State = like._replace(**carried)
    if not carried or any(v.shape != w.shape for v, w in zip(given, like, strict=True)):
        return make()
    rows = same(given)
    return given if bool(rows.all()) else rows_of(rows, given, make())


def renewed(state: _State, make: Callable[[], _State]) -> _State:
    """The state, with those of ``make``, which puts y together, for chains where it is due."""
    due = state.age >= REFRESHED
    return rows_of(due, make(), state) if bool(due.any()) else state


def same_rows(a: Tensor, b: Tensor) -> Tensor:
    """Whether rows are equal, (n,). The same parts and weights make up a state with the same bits."""
    return (a == b).all(dim=1)
