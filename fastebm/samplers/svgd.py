"""Stein variational gradient descent: particles that descend E together and repel each other (Liu & Wang 2016).

x_i' = x_i + step_size phi(x_i)
phi(x) = (1/n) sum_j [ -k(x_j, x) dE/dx(x_j) + grad_{x_j} k(x_j, x) ],   k(x, y) = exp(-|x - y|^2 / bandwidth)

(Their algorithm 1 and equation 8.) Without a bandwidth it is med^2 / log n, where med is the median distance of two
particles, at each step (their section 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise
from ..scalars import plain_number
from ..targets.base import View
from .base import Info, Sampler, checked_coefficient, settled, value_at

__all__ = ["SVGD", "SVGDState"]

# Matrices of all pairs of particles then take 1.6 GB each in float32.
_MOST_PARTICLES = 20_000


class SVGDState(NamedTuple):
    """x: (n_chains, dim). group: (n_chains,) int64; particles with the same number have the same target."""

    x: Tensor
    group: Tensor


@dataclass(frozen=True, eq=False)
class SVGD(Sampler):
    """Stein variational gradient descent: a set of particles that comes to represent exp(-E), without noise.

    The chains of a call are the particles, and they move together: the result depends on all of them, but on no random
    number except the start. With one particle it is gradient descent on E. The top of this file states the step (Liu
    & Wang 2016).

    Particles interact if they have the same target: equal labels or conditions, and equal values at equal frozen
    coordinates. A particle whose gradient is not finite stops, and acts on no other. In a pool, the particles of a
    draw interact; ``ChainPool.advance`` moves chunks of chains, and each chunk is a set of its own.

    Time and memory of a step grow with the square of the number of particles with the same target, which is at most
    20,000.

    Args:
        step_size: > 0. A float, a (steps,) tensor (a schedule) or a (n_chains, 1) tensor (one value per chain).
        bandwidth: of the kernel, > 0, in squared units of the state. None: the median heuristic, in each step.
        clamp: bounds (lo, hi) of the states with lo < hi, each a number or a tensor of one state's shape, applied after
            each step, or None.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    step_size: float | Tensor
    bandwidth: float | None = None
    clamp: Bounds | None = None

    scheduled: ClassVar[tuple[str, ...]] = ("step_size",)
    reports: ClassVar[Mapping[str, float]] = {"grad_norm": math.nan}
    recomputes: ClassVar[tuple[str, ...]] = ("x", "group")
    coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", checked_coefficient("step_size", self.step_size, positive=True))
        bandwidth = plain_number(self.bandwidth)
        number = isinstance(bandwidth, (int, float)) and not isinstance(bandwidth, bool)
        if bandwidth is not None and not (number and 0 < bandwidth < math.inf):
            raise ValueError(f"bandwidth must be a finite number > 0 or None, got {bandwidth!r}")
        object.__setattr__(self, "bandwidth", bandwidth)
        object.__setattr__(self, "clamp", Box.of(self.clamp))

    def init(self, target: View, x: Tensor, noise: Noise) -> SVGDState:
        """Find out which particles have the same target."""
        group = _groups(target, x)
        most = int(group.bincount().max()) if len(x) > 0 else 0
        if most > _MOST_PARTICLES:
            raise ValueError(
                f"SVGD compares all pairs of particles, so at most {_MOST_PARTICLES:,} may have the same target, got "
                f"{most:,}: use fewer chains, or a sampler whose chains are independent"
            )
        return SVGDState(x, group)

    def step(self, target: View, state: SVGDState, noise: Noise, t: int) -> tuple[SVGDState, Info]:
        """Move the particles of each target."""
        x, group = state
        gradient = target.gradient(x)
        sound = gradient.isfinite().all(dim=1)
        direction = torch.full_like(x, math.nan)  # for the particles without a finite gradient
        for g in range(int(group.max()) + 1 if len(x) > 0 else 0):
            rows = ((group == g) & sound).nonzero().flatten()
            direction[rows] = _direction(x[rows], gradient[rows], self.bandwidth)
        step_size = value_at(self.step_size, t, x.device)
        step_size = step_size.to(x.dtype) if isinstance(step_size, Tensor) else step_size
        new, finite = settled(target, x, x + step_size * direction, target.box)

        def last() -> Mapping[str, Tensor]:
            return {"grad_norm": gradient.square().sum(dim=1).sqrt()}

        return SVGDState(new, group), Info(finite, last=last)


def _groups(target: View, x: Tensor) -> Tensor:
    """The number of each particle's target, (n,) int64."""
    parts = [] if target.condition is None else [target.condition]
    if target.frozen is not None:
        parts += [target.frozen.expand_as(x), torch.where(target.frozen, x, 0.0)]
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for part in parts if len(x) > 0 else []:
        group = _numbered(torch.stack([group, _numbered(part)], dim=1))
    return group


def _numbered(rows: Tensor) -> Tensor:
    """The number of each row's value among the values of all rows, (n,) int64."""
    numbers: Tensor = torch.unique(rows, dim=0, return_inverse=True)[1]
    return numbers


def _direction(x: Tensor, gradient: Tensor, bandwidth: float | None) -> Tensor:
    """phi at each of the particles x, (n, dim)."""
    n = len(x)
    # By differences: with products, distances between close particles far from 0 would cancel.
    width = _median(torch.pdist(x)) ** 2 / math.log(max(n, 2)) if bandwidth is None else bandwidth
    # In place, because these matrices are the largest.
    kernel = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    kernel.div_(width**0.5).square_().neg_().exp_()
    centred = x - x.mean(dim=0)
    repulsion = (2 / width) * (kernel.sum(dim=1, keepdim=True) * centred - kernel @ centred)
    return (repulsion - kernel @ gradient) / n


def _median(distance: Tensor) -> float:
    """The median distance of two particles in different places; 1 if there are none. distance: of each pair."""
    apart = distance[distance > 0]
    return float(apart.median()) if len(apart) > 0 else 1.0
