"""What samplers with a ladder of temperatures share: checks of their settings, and the target at a temperature.

At the temperature T a state has the density exp(-E(x) / T). The inner sampler moves on the energy E / T. Its step size
grows with T: on a quadratic energy all lengths grow as sqrt(T).
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..scalars import plain_number
from ..targets.base import Target, View
from ..targets.remembered import Point, Remembered
from .base import Sampler, checked_sampler, value_at

__all__ = [
    "Tempered",
    "checked_temperatures",
    "for_temperatures",
    "step_factors",
    "tempered",
    "with_inner",
]


def checked_temperatures(value: Any) -> tuple[float, ...]:
    """Check a ladder: at least two finite temperatures that start at 1 and increase.

    Raises:
        TypeError, ValueError: the message states the requirement and the value received.
    """
    try:
        ladder = tuple(float(plain_number(v)) for v in (value.tolist() if isinstance(value, Tensor) else value))
    except (TypeError, ValueError):
        raise TypeError(f"temperatures must be numbers, as in (1.0, 2.0, 4.0), got {value!r}") from None
    rising = all(a < b < math.inf for a, b in pairwise(ladder))  # NaN fails too
    if len(ladder) < 2 or ladder[0] != 1.0 or not rising:
        raise ValueError(f"temperatures must be at least two finite numbers that start at 1 and increase, got {ladder}")
    return ladder


def with_inner(name: str, sampler: Any, clamp: Bounds | None) -> tuple[Any, Box | None]:
    """The inner sampler of the sampler ``name``, and the bounds of both: clamp, or else the inner sampler's.

    Each of its chains must move alone, by steps that can scale with the temperature.

    Raises:
        TypeError: not a sampler. ValueError: a sampler that a ladder can't use.
    """
    sampler = checked_sampler(sampler)
    why = None
    if sampler.coupled:
        why = "its chains interact"
    elif sampler.carries:
        why = f"it carries {' and '.join(sampler.carries)} from step to step"
    elif sampler.power is None:
        why = "it does not say how its step size grows with the temperature"
    if why is not None:
        raise ValueError(
            f"{name} can't use {type(sampler).__name__} at its temperatures, because {why}: use MALA, for example"
        )
    if clamp is not None and sampler.box is not clamp:
        sampler = replace(sampler, clamp=clamp)
    return sampler, sampler.box


def step_factors(sampler: Any, temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """The step size at each temperature, over that at temperature 1, with which lengths grow as sqrt(T)."""
    factors = (temperature ** (sampler.power / 2) for temperature in temperatures)
    return tuple(factors)


def for_temperatures(sampler: Sampler, factors: tuple[float, ...], n_chains: int, t: int, device: torch.device) -> Any:
    """The inner sampler of step t, for rows i k + r: chain i with step sizes multiplied by factors[r], r = 0 to k - 1.

    Settings that vary by step have their value at t, and settings per chain one row per row.
    """
    k, changed = len(factors), {}
    for name in sampler.scheduled:
        value = value_at(getattr(sampler, name), t, device)
        if name == "step_size":
            value = torch.as_tensor(value, dtype=torch.float64, device=device).reshape(-1, 1)
            value = value * torch.tensor(factors, dtype=torch.float64, device=device)
            value = value.expand(n_chains, k).reshape(-1, 1)
        elif isinstance(value, Tensor) and value.ndim == 2 and len(value) > 1:
            value = value.repeat_interleave(k, dim=0)
        changed[name] = value
    return replace(sampler, **changed)  # type: ignore[type-var]  # samplers are dataclasses


class Tempered:
    """The ``Target`` E / T (targets/base.py). An energy of +inf stays +inf, and NaN stays NaN.

    Args:
        target: E.
        beta: 1 / T, (n,) or one number.
    """

    def __init__(self, target: Target, beta: float | Tensor) -> None:
        self.target, self.beta = target, beta
        self.column = beta[:, None] if isinstance(beta, Tensor) else beta

    def value(self, x: Tensor) -> Tensor:
        """E(x) / T, (n,)."""
        return self.target.value(x) * self.beta

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx / T, (n, dim)."""
        return self.target.gradient(x) * self.column

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) / T and dE/dx / T."""
        energy, gradient = self.target.value_and_gradient(x)
        return energy * self.beta, gradient * self.column

    def repeated(self, k: int) -> Target:
        """No sampler within a ladder asks for copies."""
        raise NotImplementedError


def tempered(view: View, beta: float | Tensor, start: Point) -> tuple[View, Remembered]:
    """The view of E / T for a step, and E itself, which remembers where the step evaluated it.

    beta: 1 / T, (n,) or one number. start: the states from which the step starts, and E there.
    """
    remembered = Remembered(view.target, start)
    return replace(view, target=Tempered(remembered, beta)), remembered
