"""MALA: a Langevin step as the proposal of a Metropolis test, which makes exp(-E) invariant for every step size.

y     = x - (step_size / 2) C dE/dx(x) + sqrt(step_size C) xi,   xi ~ N(0, I)
log a = E(x) - E(y) + log q(x | y) - log q(y | x)
      = E(x) - E(y) + sqrt(step_size) xi . s / 2 - step_size |s|^2 / 8,   s = sqrt(C) (dE/dx(x) + dE/dx(y))
x'    = y if log u <= log a, else x,                             u ~ U(0, 1]

C is the preconditioner, a diagonal matrix. q(y | x) is the density of the proposal. The second form of log a is the
first with the squares expanded. It avoids the difference of large numbers. Sources: Roberts & Tweedie 1996; Roberts &
Rosenthal 1998 (optimal acceptance rate 0.574); Girolami & Calderhead 2011 (preconditioning).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise, Stream
from ..targets.base import View
from .adaptation import WarmUp
from .base import Info, Sampler, checked_coefficient, checked_diagonal, checked_fraction, diagonal_at, value_at

__all__ = ["MALA", "MALAState"]


class MALAState(NamedTuple):
    """x: (n_chains, dim). energy: (n_chains,) E(x). gradient: (n_chains, dim) dE/dx(x)."""

    x: Tensor
    energy: Tensor
    gradient: Tensor


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
            (one value per chain). A warm-up adapts a float only.
        preconditioner: the diagonal of C: a number, or a tensor of one state's shape, > 0. Best is the variance of each
            coordinate. None: 1, and a warm-up adapts it.
        target_acceptance: mean acceptance probability that the warm-up aims at, in (0, 1). None: adapt nothing.
        clamp: bounds (lo, hi) of the states with lo < hi, each a number or a tensor of one state's shape, or None.
            Proposals outside the bounds are rejected, so the chain samples exp(-E) restricted to them. (Projecting
            proposals onto the bounds, as ``Langevin`` does, would break detailed balance.) Chains must start inside.

    A proposal with energy +inf is rejected too. An energy of NaN or -inf, a non-finite gradient, or a proposal that
    overflows stops the chain, and ``on_nonfinite`` decides what follows.

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
    reports: ClassVar[Mapping[str, float]] = {"acceptance": math.nan, "grad_norm": math.nan}

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", checked_coefficient("step_size", self.step_size, positive=True))
        object.__setattr__(self, "preconditioner", checked_diagonal("preconditioner", self.preconditioner))
        object.__setattr__(self, "target_acceptance", checked_fraction("target_acceptance", self.target_acceptance))
        object.__setattr__(self, "clamp", Box.of(self.clamp))

    def adaptation(self, steps: int) -> WarmUp | None:
        """Adapt step_size, and the preconditioner if it is None."""
        if self.target_acceptance is None or isinstance(self.step_size, Tensor):
            return None
        scaled = None
        if self.preconditioner is None:
            scaled = lambda sampler, variance: replace(sampler, preconditioner=variance)  # noqa: E731
        return WarmUp(self, steps, self.target_acceptance, scaled)

    def init(self, target: View, x: Tensor, noise: Noise) -> MALAState:
        """Evaluate energy and gradient at x. Later steps carry them in the state."""
        return MALAState(x, *target.value_and_gradient(x))

    def step(self, target: View, state: MALAState, noise: Noise, t: int) -> tuple[MALAState, Info]:
        """Propose y, then accept or reject it."""
        x, energy, gradient = state
        step_size = value_at(self.step_size, t, x.device)
        root: float | Tensor = step_size**0.5
        if isinstance(step_size, Tensor) and isinstance(root, Tensor):
            step_size, root = step_size.to(x.dtype), root.to(x.dtype)
        c = diagonal_at("preconditioner", self.preconditioner, x)
        xi = noise.normal(Stream.LANGEVIN, t)
        y = target.held(x, x - (step_size / 2) * c * gradient + root * c**0.5 * xi)
        new_energy, new_gradient = target.value_and_gradient(y)

        s = (gradient + new_gradient) * c**0.5
        ratio = (s * (root * xi / 2 - step_size * s / 8)).sum(dim=1)  # -inf if |s|^2 overflows: rejected
        log_accept = energy - new_energy + ratio
        possible = new_energy != math.inf
        if target.box is not None:
            possible &= target.box.contains(y)
        # A proposal of probability 0 is rejected whatever else is NaN. Any other proposal must have finite terms.
        sound = (new_energy != -math.inf) & ~new_energy.isnan() & ~energy.isnan() & ~ratio.isnan()
        sound &= gradient.isfinite().all(dim=1) & new_gradient.isfinite().all(dim=1)
        finite = y.isfinite().all(dim=1) & (sound | ~possible)
        accepted = possible & finite & (noise.uniform(Stream.METROPOLIS, t).log() <= log_accept)

        new = MALAState(
            torch.where(accepted[:, None], y, x),
            torch.where(accepted, new_energy, energy),
            torch.where(accepted[:, None], new_gradient, gradient),
        )

        chance = torch.where(possible & finite, log_accept.clamp(max=0.0).exp(), 0.0)

        def telemetry() -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
            return {"acceptance": chance}, {"grad_norm": new.gradient.square().sum(dim=1).sqrt()}

        return new, Info(finite, telemetry, chance)
