"""A target for one step of an inner sampler, which is not evaluated twice at the same states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Target

__all__ = ["Point", "Remembered"]


class Point(NamedTuple):
    """States and what is known there. x: (n, dim). energy: (n,) E(x). gradient: (n, dim) dE/dx(x)."""

    x: Tensor
    energy: Tensor
    gradient: Tensor


class Remembered:
    """A ``Target`` (base.py) that knows where a step starts, and remembers where it was evaluated last.

    So a step that evaluates its proposal once, such as MALA's, costs one evaluation, whatever the energy is mixed with
    or divided by around this target.

    Args:
        target: E.
        start: the states from which the step starts, and E there.
    """

    def __init__(self, target: Target, start: Point) -> None:
        self.target, self.start, self.last = target, start, start

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self.target.value(x)

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        return self.start.gradient if x is self.start.x else self.target.gradient(x)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx."""
        if x is self.start.x:
            return self.start.energy, self.start.gradient
        # A copy, because a sampler may write to its own x afterwards.
        self.last = Point(x.clone(), *self.target.value_and_gradient(x))
        return self.last.energy, self.last.gradient

    def repeated(self, k: int) -> Target:
        """The energy of k copies of each chain, about which nothing is known."""
        return self.target.repeated(k)

    def after(self, x: Tensor) -> Point:
        """E at the states x after the step. It is evaluated only if a row is neither where it started nor where it was
        evaluated last."""
        start, last = self.start, self.last
        stayed = (x - start.x).abs().amax(dim=1) == 0  # much faster on a CPU than (x == start.x).all(dim=1)
        rows = stayed[:, None]
        if not torch.equal(x, torch.where(rows, start.x, last.x)):
            return Point(x, *self.target.value_and_gradient(x))
        energy = torch.where(stayed, start.energy, last.energy)
        return Point(x, energy, torch.where(rows, start.gradient, last.gradient))
