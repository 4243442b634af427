"""A target between two others: (1 - b) E_0 + b E_1, the path of annealed importance sampling."""

from __future__ import annotations

from torch import Tensor

from .base import Target

__all__ = ["Mixed"]


class Mixed:
    """A ``Target`` (base.py): (1 - b) E_0 + b E_1.

    Args:
        start, end: E_0 and E_1.
        b: in [0, 1].
    """

    def __init__(self, start: Target, end: Target, b: float) -> None:
        self.start, self.end, self.b = start, end, b

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self._between(self.start.value(x), self.end.value(x))

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        return self._between(self.start.gradient(x), self.end.gradient(x))

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx."""
        end_value, end_gradient = self.end.value_and_gradient(x)
        value, gradient = self.start.value_and_gradient(x)
        return self._between(value, end_value), self._between(gradient, end_gradient)

    def repeated(self, k: int) -> Mixed:
        """The energy of k copies of each chain."""
        return Mixed(self.start.repeated(k), self.end.repeated(k), self.b)

    def _between(self, start: Tensor, end: Tensor) -> Tensor:
        return start if self.b == 0 else (1 - self.b) * start + self.b * end  # E_1 may be infinite: 0 inf is NaN
