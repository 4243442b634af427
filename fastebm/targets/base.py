"""What an energy is to samplers: values and gradients of flat states, for one device, dtype and condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..box import Box

__all__ = ["Target", "View"]


class Target(Protocol):
    """E of flat states x, (n, dim), for the chains that it was made for.

    Results are new tensors: a sampler may keep them. No graph is made.
    """

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        ...

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx of each chain's own energy, (n, dim)."""
        ...

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, by one forward pass."""
        ...


@dataclass(frozen=True, eq=False)
class View:
    """A target as a sampler gets it: with bounds, and without the coordinates that are frozen.

    box: on the states' device and in their dtype, open at frozen coordinates; or None.
    frozen: (1 or n, dim) bool, coordinates whose gradient is 0; or None.
    """

    target: Target
    box: Box | None = None
    frozen: Tensor | None = None

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self.target.value(x)

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        return self._masked(self.target.gradient(x))

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        value, gradient = self.target.value_and_gradient(x)
        return value, self._masked(gradient)

    def held(self, x: Tensor, moved: Tensor) -> Tensor:
        """moved, with frozen coordinates at x. Without a gradient and noise they stay by themselves, but for a step
        size that overflows: infinity times 0 is NaN."""
        return moved if self.frozen is None else torch.where(self.frozen, x, moved)

    def _masked(self, gradient: Tensor) -> Tensor:
        return gradient if self.frozen is None else gradient.masked_fill(self.frozen, 0.0)
