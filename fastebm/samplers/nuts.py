"""NUTS: Hamiltonian trajectories that double in length until they turn back, and one of their points as the new state.

H(x, p) = E(x) + p . M^-1 p / 2,   p ~ N(0, M),   M = diag(mass)

A leapfrog step of size h = step_size:

p_half = p - (h / 2) dE/dx(x),   x' = x + h M^-1 p_half,   p' = p_half - (h / 2) dE/dx(x')

A trajectory starts with one point, at depth 0. At each depth a fair coin chooses an end, and as many steps from there
as the trajectory has points, 2^depth, make a sub-tree. Steps backwards in time are steps forwards from -p. A point has
the weight w = exp(H(start) - H).

- A trajectory or sub-tree from a to b has turned if p_a . (x_b - x_a) <= 0 or p_b . (x_b - x_a) <= 0 (Hoffman &
  Gelman 2014, section 3). Betancourt's generalised criterion has the sum of the momenta in place of
  M (x_b - x_a) / h. With a constant mass the two differ by the error of the leapfrog only.
- If a balanced part of the sub-tree, or all of it, has turned, or if one of its points has no weight, the trajectory
  ends without the sub-tree. From each of its points the same trajectory is as likely to be built and to end there,
  which makes the step exact.
- Within a sub-tree a point is drawn with probability w / (sum of w) (Betancourt 2017, A.3). It replaces the point drawn
  so far with probability min(1, W_sub-tree / W_trajectory), where W is a sum of w. This favours the far half.
- If the longer trajectory has turned, it ends, with the sub-tree.

A point has no weight if it lies outside the bounds, or if H exceeds H(start) by more than 1000: a divergence. The
checks across two neighbouring sub-trees, which Stan has had since 2.21, are left out.

All chains build trees of the same depth side by side, without recursion (Phan, Pradhan & Jankowiak 2019, appendix A):
leaf i of a sub-tree ends the balanced parts of 2, 4, ... leaves whose size divides i + 1. Only the first leaf of each
part that is still open is kept, under its number of binary ones. A chain that has ended waits, and its energy is still
evaluated, because an energy may expect all chains.

Random numbers of METROPOLIS: number 0 has the coin of depth d as its binary digit d. Number 2^d + i belongs to leaf i
of the sub-tree of depth d. The first leaf has nothing to compete with in its sub-tree, so its number is used to join
the sub-tree to the trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise, Stream
from ..scalars import plain_number
from ..targets.base import View
from .adaptation import WarmUp
from .base import Info, Sampler, checked_coefficient, checked_diagonal, checked_fraction, diagonal_at, value_at

__all__ = ["NUTS", "NUTSState"]

# H(start) - H below which a point counts as divergent, as in Stan.
_DIVERGENT = -1000.0

_MOST_DEPTH = 12  # 4095 gradients per step


class NUTSState(NamedTuple):
    """x: (n_chains, dim). energy: (n_chains,) E(x). gradient: (n_chains, dim) dE/dx(x)."""

    x: Tensor
    energy: Tensor
    gradient: Tensor


class _End(NamedTuple):
    """An end of a trajectory: position, momentum away from the trajectory, and gradient, (n_chains, dim) each."""

    x: Tensor
    p: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class NUTS(Sampler):
    """The No-U-Turn Sampler: Hamiltonian Monte Carlo that finds its trajectory length in every step of every chain.

    The top of this file states the algorithm: multinomial NUTS (Hoffman & Gelman 2014; Betancourt 2017). It samples
    exp(-E) without step-size bias, and needs nothing but a step size, which a warm-up finds:
    ``sample(energy, NUTS(0.1), warmup=500, steps=1000)``. The values are in ``SampleInfo.sampler``.

    All chains wait for the one with the longest trajectory, and each of the gradients is computed for all of them. So
    NUTS suits few chains. For many, a sampler whose chains take the same number of gradients is faster.

    Args:
        step_size: of the leapfrog, > 0. A float, a (steps,) tensor (a schedule) or a (n_chains, 1) tensor (one value
            per chain). A warm-up adapts a float only.
        max_depth: how often a trajectory may double, 1 to 12: a step takes at most 2^max_depth - 1 gradients.
        mass: the diagonal of M: a number, or a tensor of one state's shape, > 0. Best is 1 / the variance of each
            coordinate. None: 1, and a warm-up adapts it.
        target_acceptance: what the warm-up aims at, in (0, 1): the mean over a trajectory's points of
            min(1, exp(H(start) - H)). None: adapt nothing.
        clamp: bounds (lo, hi) of the states with lo < hi, each a number or a tensor of one state's shape, or None. A
            trajectory ends where it leaves the bounds, so the chain samples exp(-E) restricted to them. Chains must
            start inside.

    A trajectory also ends where H has grown by more than 1000 or overflows; ``SampleInfo.divergences`` is the fraction
    of such steps. The chain goes on from what it had found before. Many divergences mean that the step size is too
    large, or that some region is never entered. An energy of NaN or -inf, or a NaN in the gradient, in a trajectory
    that has not diverged stops the chain, and ``on_nonfinite`` decides what follows. A chain that starts at infinite
    energy stays there.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    step_size: float | Tensor
    max_depth: int = 10
    mass: float | Tensor | None = None
    target_acceptance: float | None = 0.8
    clamp: Bounds | None = None

    exact: ClassVar[bool] = True
    scheduled: ClassVar[tuple[str, ...]] = ("step_size",)
    reports: ClassVar[Mapping[str, float]] = dict.fromkeys(
        ("acceptance", "divergences", "gradients", "grad_norm"), math.nan
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", checked_coefficient("step_size", self.step_size, positive=True))
        object.__setattr__(self, "max_depth", _checked_depth(self.max_depth))
        object.__setattr__(self, "mass", checked_diagonal("mass", self.mass))
        object.__setattr__(self, "target_acceptance", checked_fraction("target_acceptance", self.target_acceptance))
        object.__setattr__(self, "clamp", Box.of(self.clamp))

    def adaptation(self, steps: int) -> WarmUp | None:
        """Adapt step_size, and the mass if it is None."""
        if self.target_acceptance is None or isinstance(self.step_size, Tensor):
            return None
        scaled = None
        if self.mass is None:
            scaled = lambda sampler, variance: replace(sampler, mass=1 / variance)  # noqa: E731
        return WarmUp(self, steps, self.target_acceptance, scaled, power=1)

    def init(self, target: View, x: Tensor, noise: Noise) -> NUTSState:
        """Evaluate energy and gradient at x. Later steps carry them in the state."""
        return NUTSState(x, *target.value_and_gradient(x))

    def step(self, target: View, state: NUTSState, noise: Noise, t: int) -> tuple[NUTSState, Info]:
        """Build a trajectory through the state, and draw one of its points."""
        mass = diagonal_at("mass", self.mass, state.x)
        p = noise.normal(Stream.MOMENTUM, t) * mass**0.5
        tree = _Tree(target, state, p, mass)
        step_size = torch.as_tensor(value_at(self.step_size, t, p.device), dtype=p.dtype, device=p.device).view(-1, 1)
        coins, numbers = noise.uniform(Stream.METROPOLIS, t), noise.part(1, 2)
        right, left = (_End(state.x, outwards, state.gradient) for outwards in (p, -p))
        sample, log_weight, active = state, torch.zeros_like(state.energy), torch.ones_like(coins, dtype=torch.bool)
        for depth in range(self.max_depth):
            forward = (coins * 2**depth).frac() < 0.5
            log_u = numbers.copies(2**depth).uniform(Stream.METROPOLIS, t).log().view(len(p), -1)
            end, drawn, log_sum, whole = tree.grown(_where(forward, right, left), step_size, active, log_u)

            joined = whole & (log_u[:, 0] <= log_sum - log_weight)
            sample, log_weight = _where(joined, drawn, sample), _log_add(log_weight, log_sum)
            right, left = _where(whole & forward, end, right), _where(whole & ~forward, end, left)
            active = whole & ~_turned(left._replace(p=-left.p), right)
            if not bool(active.any()):
                break
        acceptance = tree.acceptance / tree.leaves

        def telemetry() -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
            counted = {"acceptance": acceptance, "divergences": tree.diverged, "gradients": tree.leaves}
            return counted, {"grad_norm": sample.gradient.square().sum(dim=1).sqrt()}

        return sample, Info(tree.finite, telemetry, acceptance)


class _Tree:
    """The trajectories of one step, and what is counted along them: (n_chains,) each.

    finite: whether no energy or gradient was NaN. diverged: whether a point was divergent. leaves: number of points
    after the first. acceptance: sum over these of min(1, w).
    """

    def __init__(self, target: View, state: NUTSState, p: Tensor, mass: float | Tensor) -> None:
        self.target, self.energy, self.p, self.mass = target, state.energy, p, mass
        self.finite = torch.ones_like(state.energy, dtype=torch.bool)
        self.diverged = ~self.finite
        self.leaves, self.acceptance = torch.zeros_like(state.energy), torch.zeros_like(state.energy)

    def grown(
        self, end: _End, step_size: Tensor, active: Tensor, log_u: Tensor
    ) -> tuple[_End, NUTSState, Tensor, Tensor]:
        """Grow a sub-tree from one end.

        step_size: (1 or n, 1). active: (n,) bool, chains that grow. log_u: (n, leaves) logarithms
        of uniform numbers.

        Returns the other end, the state drawn, its logarithmic weight, (n,), and whether the sub-tree is whole, (n,):
        all points have weight, and no part has turned.
        """
        firsts: dict[int, _End] = {}
        for i in range(log_u.shape[1]):
            h = torch.where(active[:, None], step_size, 0.0)  # a chain that has ended waits
            end, energy, log_w, weighs = self._leaf(end, h, active)
            leaf = NUTSState(end.x, energy, end.gradient)
            if i == 0:
                drawn, log_sum = leaf, log_w
            else:
                log_sum = _log_add(log_sum, log_w)
                drawn = _where(log_u[:, i] <= log_w - log_sum, leaf, drawn)
            active = weighs
            if i % 2 == 0:
                firsts[i.bit_count()] = end
            size = 2
            while (i + 1) % size == 0:  # this leaf ends a part of so many leaves
                active = active & ~_turned(firsts[(i + 1 - size).bit_count()], end)
                size *= 2
            if not bool(active.any()):
                break
        # A position that overflowed stays infinite, even where the energy is flat and finite.
        overflown = active & ~end.x.isfinite().all(dim=1)
        self.diverged |= overflown
        return end, drawn, log_sum, active & ~overflown

    def _leaf(self, end: _End, h: Tensor, active: Tensor) -> tuple[_End, Tensor, Tensor, Tensor]:
        """Take a leapfrog step: the new end, E, log w, and which of the active chains have weight there."""
        half = torch.addcmul(end.p, end.gradient, h, value=-0.5)
        x = self.target.held(end.x, torch.addcmul(end.x, half, h / self.mass))
        energy, gradient = self.target.value_and_gradient(x)
        p = torch.addcmul(half, gradient, h, value=-0.5)
        log_w = self.energy - energy - self._kinetic_gain(p)
        inside = active if self.target.box is None else active & self.target.box.contains(x)
        weighs = inside & (log_w > _DIVERGENT) & (log_w < math.inf)
        self.leaves += active
        self.acceptance += torch.where(weighs, log_w.clamp(max=0.0).exp(), 0.0)
        if bool((bad := inside & ~weighs).any()):
            # NaN is an error of the energy, unless it follows from a trajectory that had already diverged.
            sound = x.isfinite().all(dim=1) & (self._kinetic_gain(half) <= -_DIVERGENT)
            stops = bad & sound & ~(log_w < math.inf) & (energy != math.inf)
            self.finite &= ~stops
            self.diverged |= bad & ~stops
        return _End(x, p, gradient), energy, log_w, weighs

    def _kinetic_gain(self, p: Tensor) -> Tensor:
        """Kinetic energy above that at the start, (n,), as a sum of small terms."""
        return ((p - self.p) * (p + self.p) / self.mass).sum(dim=1) / 2


def _turned(first: _End, last: _End) -> Tensor:
    """Whether the trajectory from the first point to the last has turned, (n,)."""
    way = last.x - first.x
    return ~(torch.minimum((first.p * way).sum(dim=1), (last.p * way).sum(dim=1)) > 0)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)). The bits of torch.logaddexp depend on the place in the batch."""
    return torch.maximum(a, b) + (a - b).abs().neg().exp().log1p()


_Rows = TypeVar("_Rows", bound=Any)


def _where(rows: Tensor, a: _Rows, b: _Rows) -> _Rows:
    """a at these rows, b at the others. rows: (n,) bool."""
    wide = rows[:, None]
    chosen: _Rows = type(a)(*(torch.where(rows if v.ndim == 1 else wide, v, w) for v, w in zip(a, b, strict=True)))
    return chosen


def _checked_depth(value: Any) -> int:
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_depth must be an integer, got {value!r}")
    if not 1 <= value <= _MOST_DEPTH:
        raise ValueError(f"max_depth must be 1 to {_MOST_DEPTH}, got {value}: a step takes up to 2^max_depth gradients")
    return value
