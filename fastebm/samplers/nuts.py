"""NUTS: Hamiltonian trajectories that double in length until they turn back, and one of their points as the new state.

H(x, p) = E(x) + p . M^-1 p / 2,   p ~ N(0, M),   M = diag(mass)

A leapfrog step of size h = step_size:

p_half = p - (h / 2) dE/dx(x),   x' = x + h M^-1 p_half,   p' = p_half - (h / 2) dE/dx(x')

A trajectory starts with one point, at depth 0. At each depth a fair coin chooses an end, and as many steps from there
as the trajectory has points, 2^depth, make a sub-tree. Steps backwards in time are steps forwards from -p. A point has
the weight w = exp(H(start) - H).

- The way from a to b turns if p_a . (x_b - x_a) <= 0 or p_b . (x_b - x_a) <= 0 (Hoffman & Gelman 2014, section 3).
  Betancourt's generalised criterion has the sum of the momenta in place of M (x_b - x_a) / h. With a constant mass the
  two differ by the error of the leapfrog only.
- Two neighbouring halves, from a to b and from c to d, have turned if the way from a to d, from a to c or from b to d
  turns. The last two, as in Stan since 2.21, matter where all coordinates have one period: a trajectory of a whole
  period has come back, and its ends look as if it had just begun.
- If a balanced part of the sub-tree, or all of it, has turned, or if one of its points has no weight, the trajectory
  ends without the sub-tree. From each of its points the same trajectory is as likely to be built and to end there,
  which makes the step exact.
- A point of the sub-tree is drawn with probability w / W, where W is the sum of w (Betancourt 2017, A.3). It is the
  point with the largest w / e, with e ~ Exp(1) for each. It replaces the point drawn before with probability
  min(1, W_sub-tree / W_trajectory), which favours the far half.
- If the longer trajectory has turned, it ends, with the sub-tree.

A point has no weight if it lies outside the bounds, or if H exceeds H(start) by more than 1000: a divergence. (The
latter depends on the start. From another point of the trajectory the limit differs, at weights of about exp(-1000).)

All chains build trees of the same depth side by side, without recursion (Phan, Pradhan & Jankowiak 2019, appendix A):
leaf i of a sub-tree ends the balanced parts of 2, 4, ... leaves whose size divides i + 1. Only the first leaf of each
part that is still open is kept, and the last leaf of its first half, both under the number of binary ones of the first
leaf's number. A chain that has ended waits, and its energy is still evaluated, because an energy may expect all chains.

Random numbers of METROPOLIS: number 0 has the coin of depth d as its binary digit d. The 2^d + 1 numbers from 2^d + d
on belong to depth d: one to join the sub-tree, then one for each of its leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..box import Bounds
from ..rng import Noise, Stream
from ..scalars import checked_integer
from ..targets.base import View
from ..targets.remembered import Point
from .base import Info, diagonal_at, rows_of, value_at
from .hmc import Hamiltonian

__all__ = ["NUTS"]

# H(start) - H below which a point counts as divergent, as in Stan.
_DIVERGENT = -1000.0

_MOST_DEPTH = 12  # 4095 gradients per step


class _End(NamedTuple):
    """An end of a trajectory: position, momentum away from the trajectory, and gradient, (n_chains, dim) each."""

    x: Tensor
    p: Tensor
    gradient: Tensor


class _SubTree(NamedTuple):
    """first, last: its ends, both with the momentum towards the last. drawn: one of its points. log_weight: (n,) log W.

    whole: (n,) whether all points have weight, and no part has turned.
    """

    first: _End
    last: _End
    drawn: Point
    log_weight: Tensor
    whole: Tensor


@dataclass(frozen=True, eq=False)
class NUTS(Hamiltonian):
    """The No-U-Turn Sampler: Hamiltonian Monte Carlo that finds its trajectory length in every step of every chain.

    The top of this file states the algorithm: multinomial NUTS (Hoffman & Gelman 2014; Betancourt 2017). It samples
    exp(-E) without step-size bias, and needs nothing but a step size, which a warm-up finds:
    ``sample(energy, NUTS(0.1), warmup=500, steps=1000)``. The values are in ``SampleInfo.sampler``.

    All chains wait for the one with the longest trajectory, and each of the gradients is computed for all of them. So
    NUTS suits few chains. For many, a sampler whose chains take the same number of gradients is faster.

    Args:
        step_size: of the leapfrog, > 0. A float, a (steps,) tensor (a schedule) or a (n_chains, 1) tensor (one value
            per chain). A warm-up adapts a number only.
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
    that has not diverged stops the chain, and ``on_nonfinite`` decides what follows. So does an energy or a gradient
    that is not finite where the chain starts.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    step_size: float | Tensor
    max_depth: int = 10
    mass: float | Tensor | None = None
    target_acceptance: float | None = 0.8
    clamp: Bounds | None = None

    power: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "max_depth", checked_integer("max_depth", self.max_depth, least=1, most=_MOST_DEPTH))

    def step(self, target: View, state: Point, noise: Noise, t: int) -> tuple[Point, Info]:
        """Build a trajectory through the state, and draw one of its points."""
        mass = diagonal_at("mass", self.mass, state.x)
        p = noise.normal(Stream.MOMENTUM, t) * mass**0.5
        step_size = value_at(self.step_size, t, p.device)
        tree = _Tree(target, state, p, mass, step_size.to(p.dtype) if isinstance(step_size, Tensor) else step_size)
        of = 2**self.max_depth + self.max_depth
        coins = noise.part(0, of).uniform(Stream.METROPOLIS, t)
        end, other = (_End(state.x, outwards, state.gradient) for outwards in (p, -p))
        forward = torch.ones_like(coins, dtype=torch.bool)  # whether ``end`` is the later end
        sample, log_weight, active = state, torch.zeros_like(coins), forward
        for depth in range(self.max_depth):
            before, forward = forward, (coins * 2**depth).frac() < 0.5
            same = forward == before
            end, other = rows_of(same, end, other), rows_of(same, other, end)
            numbers = noise.copies(2**depth + 1, first=2**depth + depth, of=of)
            log_u = numbers.uniform(Stream.METROPOLIS, t).log().view(len(p), -1)
            new = tree.grown(end, active, log_u[:, 1:].neg().log())

            joined = new.whole & (log_u[:, 0] <= new.log_weight - log_weight)
            sample, log_weight = rows_of(joined, new.drawn, sample), _log_add(log_weight, new.log_weight)
            active = new.whole & _goes_on(other._replace(p=-other.p), end, new.first, new.last)
            end = new.last
            if not bool(active.any()):
                break
        if not bool(sample.x.isfinite().all()):  # a position that overflowed, on a flat and finite energy
            overflown = ~sample.x.isfinite().all(dim=1)
            sample, tree.diverged = rows_of(overflown, state, sample), tree.diverged | overflown
        acceptance = tree.acceptance / tree.leaves

        def averaged() -> Mapping[str, Tensor | float]:
            return {"acceptance": acceptance, "divergences": tree.diverged, "gradients": tree.leaves}

        def last() -> Mapping[str, Tensor]:
            return {"grad_norm": sample.gradient.square().sum(dim=1).sqrt()}

        finite = None if bool(tree.finite.all()) else tree.finite
        return sample, Info(finite, averaged, last, acceptance)


class _Tree:
    """The trajectories of one step, and what is counted along them: (n_chains,) each.

    finite: whether the energy and the gradient were finite at the start, and not NaN later. diverged: whether a point
    was divergent. leaves: number of points after the first. acceptance: sum over these of min(1, w).
    """

    def __init__(self, target: View, state: Point, p: Tensor, mass: float | Tensor, step_size: float | Tensor) -> None:
        self.target, self.energy, self.p, self.mass, self.step_size = target, state.energy, p, mass, step_size
        self.finite = state.energy.isfinite() & state.gradient.isfinite().all(dim=1)
        self.diverged = torch.zeros_like(self.finite)
        self.leaves, self.acceptance = torch.zeros_like(state.energy), torch.zeros_like(state.energy)

    def grown(self, end: _End, active: Tensor, log_e: Tensor) -> _SubTree:
        """Grow a sub-tree from an end of the trajectory.

        active: (n,) bool, chains that grow. log_e: (n, leaves) logarithms of exponential numbers, which draw a point.
        """
        firsts: dict[int, _End] = {}
        middles: dict[int, _End] = {}
        weights, weighing, moving = [], [], -1
        for i in range(log_e.shape[1]):
            if moving != (moving := int(active.sum())):
                if moving == 0:
                    break
                h = active[:, None].to(log_e.dtype) * self.step_size  # a chain that has ended waits
            self.leaves += active
            end, energy, log_w, active = self._leaf(end, h, active)
            weights.append(log_w)
            weighing.append(active)

            leaf, lead = Point(end.x, energy, end.gradient), log_w - log_e[:, i]
            if i == 0:
                drawn, most = leaf, lead
            else:
                drawn, most = rows_of(lead > most, leaf, drawn), torch.maximum(most, lead)
            firsts[i.bit_count()] = end
            size = 2
            while (i + 1) % size == 0:  # this leaf ends a part of so many leaves
                ones = (i + 1 - size).bit_count()
                active = active & _goes_on(firsts[ones], middles[ones], firsts[ones + 1], end)
                size *= 2
            middles[(i + 1 - size // 2).bit_count()] = end
        log_w = torch.where(torch.stack(weighing, dim=1), torch.stack(weights, dim=1), -math.inf)
        self.acceptance += log_w.clamp(max=0.0).exp().sum(dim=1)
        total = log_w.logsumexp(dim=1)
        self.finite &= total < math.inf  # E was not -inf
        return _SubTree(firsts[0], end, drawn, total, active & self.finite)

    def _leaf(self, end: _End, h: Tensor, active: Tensor) -> tuple[_End, Tensor, Tensor, Tensor]:
        """Take a leapfrog step: the new end, E, log w, and which of the active chains have weight there."""
        half = torch.addcmul(end.p, end.gradient, h, value=-0.5)
        x = self.target.held(end.x, torch.addcmul(end.x, half, h / self.mass))
        energy, gradient = self.target.value_and_gradient(x)
        p = torch.addcmul(half, gradient, h, value=-0.5)
        log_w = torch.sub(self.energy - energy, self._kinetic_gain(p), alpha=0.5)
        inside = active if self.target.box is None else active & self.target.box.contains(x)
        weighs = inside & (log_w > _DIVERGENT)
        if not torch.equal(weighs, inside):
            # NaN is an error of the energy, unless it follows from a trajectory that had already diverged.
            sound = x.isfinite().all(dim=1) & (self._kinetic_gain(half) <= -2 * _DIVERGENT)
            stops = inside & sound & log_w.isnan() & (energy != math.inf)
            self.finite &= ~stops
            self.diverged |= inside & ~weighs & ~stops
        return _End(x, p, gradient), energy, log_w, weighs

    def _kinetic_gain(self, p: Tensor) -> Tensor:
        """Twice the kinetic energy above that at the start, (n,), as a sum of small terms."""
        return _dot(p - self.p, (p + self.p) / self.mass)


def _goes_on(a: _End, b: _End, c: _End, d: _End) -> Tensor:
    """Whether two neighbouring halves, from a to b and from c to d, have not turned, (n,)."""
    straight = _straight(a, d)
    return straight if c is d else straight & _straight(a, c) & _straight(b, d)


def _straight(a: _End, b: _End) -> Tensor:
    """Whether the way from a to b does not turn, (n,)."""
    way = b.x - a.x
    return torch.minimum(_dot(a.p, way), _dot(b.p, way)) > 0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)). The bits of torch.logaddexp depend on the place in the batch."""
    return torch.maximum(a, b) + (a - b).abs().neg().exp().log1p()
