"""A target between two others: (1 - b) E_0 + b E_1, the path of annealed importance sampling."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Target

__all__ = ["Mixed", "Point"]


class Point(NamedTuple):
    """States and what is known there. x: (n, dim). energy: (n,) E_1(x). gradient: (n, dim) dE_1/dx(x)."""

    x: Tensor
    energy: Tensor
    gradient: Tensor


class Mixed:
    """A ``Target`` (base.py): (1 - b) E_0 + b E_1.

    It remembers E_1 at the states where it was evaluated last, so that a new b at the same states costs nothing.

    Args:
        start, end: E_0 and E_1.
        b: in [0, 1].
        known: E_1 at the states from which the chains move, or None.
    """

    def __init__(self, start: Target, end: Target, b: float, known: Point | None = None) -> None:
        self.start, self.end, self.b = start, end, b
        self.known, self.last = known, known

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self._between(self.start.value(x), self.end.value(x))

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        return self._between(self.start.gradient(x), self.end.gradient(x))

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx."""
        if self.known is None or x is not self.known.x:
            self.last = Point(x, *self.end.value_and_gradient(x))
        else:
            self.last = self.known
        value, gradient = self.start.value_and_gradient(x)
        return self._between(value, self.last.energy), self._between(gradient, self.last.gradient)

    def repeated(self, k: int) -> Mixed:
        """The energy of k copies of each chain."""
        return Mixed(self.start.repeated(k), self.end.repeated(k), self.b)

    def end_at(self, x: Tensor) -> Point:
        """E_1 at x. Nothing is evaluated if each row is where its chain started or where it was evaluated last."""
        known, last = self.known, self.last
        if known is not None and last is not None:
            moved = (x == last.x).all(dim=1)
            if bool((moved | (x == known.x).all(dim=1)).all()):
                return Point(
                    x,
                    torch.where(moved, last.energy, known.energy),
                    torch.where(moved[:, None], last.gradient, known.gradient),
                )
        return Point(x, *self.end.value_and_gradient(x))

    def _between(self, start: Tensor, end: Tensor) -> Tensor:
        return start if self.b == 0 else (1 - self.b) * start + self.b * end  # E_1 may be infinite: 0 inf is NaN
