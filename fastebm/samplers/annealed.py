"""Annealed Langevin dynamics: Langevin steps at one noise level after another (Song & Ermon 2019, algorithm 1).

For an energy E(x, sigma), whose exp(-E) is the data's density blurred by Gaussian noise of standard deviation sigma:

for sigma = sigma_1 > ... > sigma_L:
    a = step_size sigma^2 / sigma_L^2
    repeat steps_per_level times:  x' = x - (a / 2) dE/dx(x, sigma) + sqrt(a) xi,   xi ~ N(0, I)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise
from ..scalars import checked_integer, number_or_tensor, plain_number
from ..targets.base import View
from .base import Info, Sampler
from .langevin import Langevin, LangevinState

__all__ = ["AnnealedLangevin", "checked_levels", "checked_sigmas"]


@dataclass(frozen=True, eq=False)
class AnnealedLangevin(Sampler):
    """Annealed Langevin dynamics, for an energy that takes a noise level: ``energy(x, sigma)``, sigma of (n_chains,).

        sampler = AnnealedLangevin([1.0, 0.3, 0.1], steps_per_level=100, step_size=2e-3)
        sample(energy, sampler, 2, n_chains=1000, steps=300)

    A call takes len(sigmas) * steps_per_level steps and gives the energy its sigma: neither condition= nor labels= is
    passed. The energies that it reports are those at the last sigma. The top of this file states the steps (Song &
    Ermon 2019, algorithm 1).

    Args:
        sigmas: noise levels, decreasing and > 0: a sequence of numbers or a (n_levels,) tensor or array.
        steps_per_level: number of steps at each, >= 1.
        step_size: that of the last level, > 0. A level's own is step_size sigma^2 / sigma_L^2.
        clamp: bounds (lo, hi) of the states with lo < hi, applied after each step, or None.
        levels: (n_steps,) int64, the index of each step's sigma. None: each level steps_per_level times, in order. To
            take the steps in several calls, pass each its part:
            ``dataclasses.replace(sampler, levels=sampler.levels[:100])``.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    sigmas: Sequence[float] | Tensor
    steps_per_level: int
    step_size: float
    clamp: Bounds | None = None
    levels: Tensor | None = None

    scheduled: ClassVar[tuple[str, ...]] = ("levels",)
    reports: ClassVar[Mapping[str, float]] = {"grad_norm": math.nan}

    def __post_init__(self) -> None:
        sigmas = checked_sigmas(self.sigmas)
        object.__setattr__(self, "sigmas", sigmas)
        n = checked_integer("steps_per_level", self.steps_per_level, least=1)
        object.__setattr__(self, "steps_per_level", n)
        step_size = plain_number(self.step_size)
        if not _is_positive(step_size):
            raise ValueError(f"step_size must be a finite number > 0, got {step_size!r}")
        object.__setattr__(self, "step_size", step_size)
        object.__setattr__(self, "clamp", Box.of(self.clamp))
        object.__setattr__(self, "levels", checked_levels(self.levels, len(sigmas), n))

    @property
    def condition(self) -> float:
        """The last sigma, at which energies are reported."""
        return self.sigmas[-1]  # type: ignore[return-value]  # __post_init__ made it a tuple

    def init(self, target: View, x: Tensor, noise: Noise) -> LangevinState:
        """The state is x alone."""
        return LangevinState(x)

    def step(self, target: View, state: LangevinState, noise: Noise, t: int) -> tuple[LangevinState, Info]:
        """One step of ``Langevin`` at the step's noise level."""
        assert self.levels is not None  # __post_init__
        sigma = float(self.sigmas[int(self.levels[t])])
        sampler = Langevin(self.step_size * (sigma / self.condition) ** 2)
        return sampler.step(target.at(sigma), state, noise, t)


def checked_sigmas(sigmas: object) -> tuple[float, ...]:
    """Check noise levels: one or more numbers > 0, decreasing."""
    values = number_or_tensor(sigmas)
    values = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(values, Sequence) or not all(_is_positive(plain_number(v)) for v in values) or not values:
        raise ValueError(f"sigmas must be one or more finite numbers > 0, got {sigmas!r}")
    numbers = tuple(float(plain_number(v)) for v in values)
    if rising := [(a, b) for a, b in pairwise(numbers) if a <= b]:
        raise ValueError(f"sigmas must decrease, got {rising[0][1]:g} after {rising[0][0]:g}")
    return numbers


def checked_levels(levels: object, n_levels: int, steps_per_level: int) -> Tensor:
    """Check the index of each step's noise level, (n_steps,) int64. None: all levels in order."""
    if levels is None:
        return torch.arange(n_levels, device="cpu").repeat_interleave(steps_per_level)
    if not isinstance(levels, Tensor) or levels.dtype != torch.int64 or levels.ndim != 1:
        raise TypeError(f"levels must be a (n_steps,) tensor of int64, got {levels!r}")
    if bool(((levels < 0) | (levels >= n_levels)).any()):
        raise ValueError(f"levels must be in [0, {n_levels}), got {levels.tolist()}")
    return levels


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
