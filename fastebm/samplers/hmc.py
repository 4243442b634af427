"""Hamiltonian Monte Carlo: a trajectory of leapfrog steps as the proposal of a Metropolis test.

p ~ N(0, M)                                                     momentum, anew in each step
p = p - (step_size / 2) dE/dx(x)
x = x + step_size M^-1 p,   p = p - step_size dE/dx(x)          n_leapfrog times, the last p with step_size / 2
log a = E(x_0) - E(x_L) + (p_0 M^-1 p_0 - p_L M^-1 p_L) / 2
x' = x_L if log u <= log a, else x_0,                           u ~ U(0, 1]

M, the mass, is a diagonal matrix. The code uses v = M^(-1/2) p ~ N(0, I) and h = step_size M^(-1/2):

v = v - (h / 2) dE/dx(x)
x = x + h v,   v = v - h dE/dx(x)
log a = E(x_0) - E(x_L) + (v_0 - v_L) . (v_0 + v_L) / 2

The last form avoids the difference of large numbers. A trajectory has diverged if its kinetic energy |v|^2 / 2 has
grown by more than 1000, and its total energy is off by more than 1000 or is not a number. Kinetic energy alone does not
tell: it grows as much where a chain falls into a deep minimum. Sources: Duane et al. 1987; Neal 2011, sections 5.2 and
5.3; Beskos et al. 2013 and Betancourt, Byrne & Girolami 2014 (acceptance rates of 0.6 to 0.9 are best).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise, Stream
from ..scalars import checked_integer
from ..targets.base import View
from ..targets.remembered import Point
from .adaptation import WarmUp, tunable
from .base import (
    Info,
    Sampler,
    checked_coefficient,
    checked_diagonal,
    checked_fraction,
    diagonal_at,
    once,
    rows_of,
    value_at,
)

__all__ = [
    "HMC",
    "Hamiltonian",
    "Trajectory",
    "Verdict",
    "decided",
    "judged",
    "leapfrog",
    "scaled_step",
    "step_tensor",
    "transition",
    "with_mass",
]

_State = TypeVar("_State", bound=Any)

# Energy above which a trajectory counts as diverged. Its probability to be accepted would be exp(-1000).
_TOO_FAR = 1000.0


class Trajectory(NamedTuple):
    """The end of a trajectory.

    x, energy, gradient: as in ``Point`` (targets/remembered.py).
    momentum: (n_chains, dim) v = M^(-1/2) p.
    n_leapfrog: number of leapfrog steps, or (n_chains,) int64 numbers.
    log_accept: (n_chains,) log a, the loss of total energy. It knows of no bounds.
    """

    x: Tensor
    energy: Tensor
    gradient: Tensor
    momentum: Tensor
    n_leapfrog: int | Tensor
    log_accept: Tensor


class Verdict(NamedTuple):
    """Of each trajectory, (n_chains,) bool: whether its end may be accepted, whether it has diverged, and whether it is
    finite. None in place of the first or the last means all, and in place of the second none."""

    possible: Tensor | None
    diverged: Tensor | None
    finite: Tensor | None


class Hamiltonian(Sampler):
    """What samplers that follow Hamilton's equations share: settings and their checks, the start, and the warm-up."""

    step_size: float | Tensor
    mass: float | Tensor | None
    target_acceptance: float | None

    exact: ClassVar[bool] = True
    scheduled: ClassVar[tuple[str, ...]] = ("step_size",)
    reports: ClassVar[Mapping[str, float]] = dict.fromkeys(
        ("acceptance", "divergences", "gradients", "grad_norm"), math.nan
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", checked_coefficient("step_size", self.step_size, positive=True))
        object.__setattr__(self, "mass", checked_diagonal("mass", self.mass))
        object.__setattr__(self, "target_acceptance", checked_fraction("target_acceptance", self.target_acceptance))
        object.__setattr__(self, "clamp", Box.of(self.clamp))

    def adaptation(self, steps: int) -> WarmUp | None:
        """Adapt step_size, and the mass if it is None."""
        return WarmUp(self, steps, with_mass if self.mass is None else None, power=1) if tunable(self) else None

    def init(self, target: View, x: Tensor, noise: Noise) -> Point:
        """Evaluate energy and gradient at x. Later steps carry them in the state."""
        return Point(x, *target.value_and_gradient(x))


@dataclass(frozen=True, eq=False)
class HMC(Hamiltonian):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps: samples exp(-E) without step-size bias.

    Each step draws a momentum, follows Hamilton's equations for n_leapfrog steps of size step_size, and accepts the end
    with probability min(1, a). The top of this file states the equations (Duane et al. 1987; Neal 2011). A step takes
    n_leapfrog gradients. A warm-up finds the step size: ``sample(energy, HMC(0.1), warmup=500, steps=1000)``. The
    values are in ``SampleInfo.sampler``. The best number of steps depends on the energy: ``ChEESHMC`` finds that too.

    Args:
        step_size: > 0, in units of the state if the mass is 1. A float, a (steps,) tensor (a schedule) or a
            (n_chains, 1) tensor (one value per chain). A warm-up adapts a number only.
        n_leapfrog: number of leapfrog steps per step, an int >= 1.
        mass: the diagonal of M: a number, or a tensor of one state's shape, > 0. Best is 1 / the variance of each
            coordinate. None: 1, and a warm-up adapts it.
        target_acceptance: mean acceptance probability that the warm-up aims at, in (0, 1). None: adapt nothing.
        clamp: bounds (lo, hi) of the states with lo < hi, each a number or a tensor of one state's shape, or None. A
            trajectory that ends outside the bounds is rejected, so the chain samples exp(-E) restricted to them. On its
            way it may pass outside, so the energy must be defined there. Chains must start inside.

    A trajectory that ends with energy +inf is rejected too. So is one that has diverged, because the step is too large
    for the energy there: ``SampleInfo.divergences`` counts these. Otherwise an energy of NaN or -inf at the end, a
    gradient of NaN on the way, or a position that overflows stops the chain, and ``on_nonfinite`` decides what follows.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    step_size: float | Tensor
    n_leapfrog: int = 10
    mass: float | Tensor | None = None
    target_acceptance: float | None = 0.8
    clamp: Bounds | None = None

    reversible: ClassVar[bool] = True
    power: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n_leapfrog", checked_integer("n_leapfrog", self.n_leapfrog, least=1))

    def step(self, target: View, state: Point, noise: Noise, t: int) -> tuple[Point, Info]:
        """Follow a trajectory, then accept or reject its end."""
        h = once(target, "h", self, lambda: scaled_step(self, t, state.x))
        return transition(target, state, noise, t, h, self.n_leapfrog)


def with_mass(sampler: Any, squared_scale: Tensor) -> Any:
    """The sampler whose mass fits the squared scale of each coordinate, (dim,)."""
    return replace(sampler, mass=1 / squared_scale)


def scaled_step(sampler: Any, t: int, x: Tensor) -> Tensor:
    """h = step_size M^(-1/2) at step t, in x's dtype: a tensor that broadcasts with x, (n_chains, dim)."""
    mass = diagonal_at("mass", sampler.mass, x)
    # In float64, so that numbers and values per chain round alike.
    h = value_at(sampler.step_size, t, x.device) / (mass.double().sqrt() if isinstance(mass, Tensor) else mass**0.5)
    return step_tensor(h, x)


def step_tensor(h: float | Tensor, x: Tensor) -> Tensor:
    """h as a tensor in x's dtype, also if it is a number."""
    return h.to(x.dtype) if isinstance(h, Tensor) else x.new_full((), h)


def leapfrog(
    target: View, state: Point, momentum: Tensor, h: Tensor, n_leapfrog: int | Tensor,
    speeds: list[Tensor] | None = None,
) -> Trajectory:  # fmt: skip
    """Leapfrog steps from a state.

    Args:
        momentum: (n_chains, dim) v = M^(-1/2) p at the start.
        h: step_size M^(-1/2), a tensor that broadcasts with x. Negative: backwards in time.
        n_leapfrog: number of steps >= 1, or (n_chains,) int64 numbers. A chain that has arrived stays where it is while
            others move on.
        speeds: gets |v| after each kick, (n_chains,), if it is a list.
    """
    fast = getattr(target.target, "leapfrog", None)  # some targets have it (backends/cpu.py)
    if fast is not None and target.frozen is None and isinstance(n_leapfrog, int) and speeds is None:
        end, v = fast(state, momentum, h, n_leapfrog)
        return _ended(target, state, momentum, end, v, n_leapfrog)
    v = torch.addcmul(momentum, state.gradient, h, value=-0.5)
    x = torch.addcmul(state.x, v, h)
    if speeds is not None:
        speeds.append(torch.linalg.vector_norm(v, dim=1))
    kick = drift = last = h
    most = n_leapfrog if isinstance(n_leapfrog, int) else int(n_leapfrog.max())
    for i in range(1, most):
        gradient = target.gradient(x)
        if isinstance(n_leapfrog, Tensor):
            left = (n_leapfrog - i)[:, None]
            drift = h * (left > 0)
            kick = drift + h * (left == 0) / 2
        v.addcmul_(gradient, kick, value=-1)
        x.addcmul_(v, drift)
        if speeds is not None:
            speeds.append(torch.linalg.vector_norm(v, dim=1))
    energy, gradient = target.value_and_gradient(x)
    if isinstance(n_leapfrog, Tensor):
        last = h * (n_leapfrog == most)[:, None]
    v.addcmul_(gradient, last, value=-0.5)
    if speeds is not None:
        speeds.append(torch.linalg.vector_norm(v, dim=1))
    return _ended(target, state, momentum, Point(x, energy, gradient), v, n_leapfrog)


def _ended(
    target: View, start: Point, momentum: Tensor, end: Point, v: Tensor, n_leapfrog: int | Tensor
) -> Trajectory:  # fmt: skip
    slower = ((momentum - v) * (momentum + v)).sum(dim=1)  # |v_0|^2 - |v_L|^2
    log_accept = torch.add(start.energy - end.energy, slower, alpha=0.5)
    return Trajectory(target.held(start.x, end.x), end.energy, end.gradient, v, n_leapfrog, log_accept)


def transition(
    target: View, state: Point, noise: Noise, t: int, h: Tensor, n_leapfrog: int | Tensor,
    stream: Stream = Stream.MOMENTUM,
) -> tuple[Point, Info]:  # fmt: skip
    """One step of HMC: draw a momentum, follow the trajectory, accept or reject its end (``Info.proposal``)."""
    momentum = noise.normal(stream, t)
    end = leapfrog(target, state, momentum, h, n_leapfrog)
    inside = None if target.box is None else target.box.contains(end.x)
    verdict = judged(target, end.x.sum(), inside, end.log_accept, lambda: (state, momentum, h, end))
    there = Point(end.x, end.energy, end.gradient)
    new, info = decided(state, there, noise, t, end.log_accept, verdict, n_leapfrog, lambda new: new.gradient)
    return new, info._replace(proposal=end)


def decided(
    state: _State, there: _State, noise: Noise, t: int, log_accept: Tensor, verdict: Verdict, n_leapfrog: int | Tensor,
    gradient_of: Callable[[_State], Tensor], chosen: Callable[[Tensor, _State, _State], _State] = rows_of,
) -> tuple[_State, Info]:  # fmt: skip
    """Accept or reject the end of a trajectory, ``there``.

    gradient_of: a state's dE/dx, for the telemetry. chosen: makes the new state, as ``rows_of`` does.
    """
    possible, diverged, finite = verdict
    accepted = noise.uniform(Stream.METROPOLIS, t).log() <= log_accept
    chance = log_accept.clamp(max=0.0).exp_()
    if possible is not None:
        accepted, chance = accepted & possible, torch.where(possible, chance, 0.0)
    new = chosen(accepted, there, state)

    def averaged() -> Mapping[str, Tensor | float]:
        return {"acceptance": chance, "divergences": 0.0 if diverged is None else diverged, "gradients": n_leapfrog}

    def last() -> Mapping[str, Tensor]:
        return {"grad_norm": torch.linalg.vector_norm(gradient_of(new), dim=1)}

    return new, Info(finite, averaged, last, chance)


def judged(
    target: View, total: Tensor, inside: Tensor | None, log_accept: Tensor,
    whole: Callable[[], tuple[Point, Tensor, Tensor, Trajectory]],
) -> Verdict:  # fmt: skip
    """Which chains may accept the end of their trajectory, which have diverged, and which are finite.

    Args:
        total: the sum of all that the ends are made of.
        inside: (n_chains,) bool, which ends are within the bounds; None for all.
        whole: returns the start, its momentum, h, and the end. Called only if a chain is out of the ordinary.
    """
    # Fast path. NaN fails the comparison, and a finite sum proves that all terms are finite. (On a GPU, waiting for
    # these three numbers takes less than a second trajectory.)
    least, most, sum_of_ends = torch.stack([*log_accept.aminmax(), total]).tolist()
    if -_TOO_FAR <= least and most < math.inf and math.isfinite(sum_of_ends):
        return Verdict(inside, None, None)
    state, momentum, h, end = whole()
    possible = end.energy != math.inf
    # An end of infinite energy is a wall, not a divergence, if it is as slow as others.
    before = momentum.square().sum(dim=1)
    gained = (end.momentum.square().sum(dim=1) - before) / 2
    walled = ~possible & (gained <= _TOO_FAR)
    diverged, fast = ~(log_accept >= -_TOO_FAR) & ~walled, gained > _TOO_FAR
    if bool((diverged & ~fast).any()):
        # Most are fastest at their end. For the others, all are followed once more, rather than watched each time.
        speeds: list[Tensor] = []
        leapfrog(target, state, momentum, h, end.n_leapfrog, speeds)
        fastest = torch.stack(speeds).nan_to_num(nan=0.0, posinf=math.inf).amax(dim=0)
        fast = fast | ((fastest.square() - before) / 2 > _TOO_FAR)
    diverged &= fast
    if inside is not None:
        possible &= inside
    # An end of probability 0 is rejected whatever else is NaN. Any other end must have finite terms.
    sound = (end.energy > -math.inf) & end.momentum.isfinite().all(dim=1)
    started = (state.energy > -math.inf) & state.gradient.isfinite().all(dim=1)
    finite = started & (diverged | (end.x.isfinite().all(dim=1) & (sound | ~possible)))
    return Verdict(possible & finite & ~diverged, diverged, finite)
