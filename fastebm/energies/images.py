"""What the energies of images share: states as rows or as images, and a condition that shifts channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..scalars import checked_integer, plain_number
from .activations import Activation, activation_layer

__all__ = ["ImageEnergy", "Shift"]


class ImageEnergy(nn.Module):
    """Base class of the energies of images, with checked settings.

    States are images, (batch, *shape) or (batch, channels, height, width), or flat rows, (batch, dim), as training
    loops hold them.

    Args:
        shape: (height, width), or (channels, height, width).
        channels: channels after each layer or block, at least one.
        activation, spectral_norm: of every layer, as for ``ConvEnergy``.
        outputs: number of outputs; 1 for an energy, >= 2 for logits or features.
        condition_size: numbers per state that forward takes as ``condition``; 0: it takes x only.
    """

    condition_argument: str | None

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int], activation: str | Activation, spectral_norm: bool,
        outputs: int, condition_size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape = _sizes("shape", shape)
        if len(self.shape) not in (2, 3):
            raise ValueError(f"shape must be (height, width) or (channels, height, width), got {self.shape}")
        self.channels = _sizes("channels", channels)
        self.outputs = checked_integer("outputs", outputs, least=1)
        self.condition_size = checked_integer("condition_size", condition_size, least=0)
        self.condition_argument = "condition" if self.condition_size > 0 else None
        self.activation = activation_layer(activation)
        if not isinstance(spectral_norm, bool):
            raise TypeError(f"spectral_norm must be True or False, got {spectral_norm!r}")
        self._spectral_norm = spectral_norm

    def images(self, x: Tensor) -> Tensor:
        """States as (batch, channels, height, width)."""
        dim, image = math.prod(self.shape), (1, *self.shape)[-3:]
        if tuple(x.shape[1:]) not in ((dim,), self.shape, image):
            rows = f"(n, {dim}) or (n, {', '.join(map(str, image))})"
            raise ValueError(
                f"{type(self).__name__} takes states {rows}, got {tuple(x.shape)}: build it with the shape of one state"
            )
        return x.reshape(len(x), *image)

    def shift(self, channels: int) -> Shift:
        """The layer that adds the condition to so many channels."""
        return Shift(self.condition_size, channels)

    def normed(self, layer: nn.Module) -> nn.Module:
        """The layer, with spectral norm if this energy has it."""
        return parametrizations.spectral_norm(layer) if self._spectral_norm else layer

    def conv(self, n_in: int, n_out: int, kernel_size: int = 3, stride: int = 1) -> nn.Module:
        """A convolution. With stride s it returns ceil(size / s) rows and columns."""
        return self.normed(nn.Conv2d(n_in, n_out, kernel_size, stride, padding=kernel_size // 2))


class Shift(nn.Module):
    """Adds a linear function of the condition to channels. condition_size 0: there is none, and nothing is added."""

    def __init__(self, condition_size: int, channels: int) -> None:
        super().__init__()
        self.size = condition_size
        self.linear = nn.Linear(condition_size, channels) if condition_size > 0 else None

    def forward(self, h: Tensor, condition: Tensor | None) -> Tensor:
        """(batch, channels, height, width), and (batch, condition_size) -> (batch, channels, height, width)."""
        if self.linear is None:
            return h
        if condition is None or condition.shape != (len(h), self.size) or not condition.is_floating_point():
            got = "None" if condition is None else f"{tuple(condition.shape)} {condition.dtype}"
            raise ValueError(
                f"condition must be ({len(h)}, {self.size}) floating-point numbers, got {got}: pass it, or build the "
                "energy with condition_size=0"
            )
        added: Tensor = self.linear(condition)
        return h + added[:, :, None, None]


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    """A checked sequence of ints >= 1, at least one."""
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str):
        raise TypeError(f"{name} must be ints, as in (32, 64), got {values!r}")
    sizes = tuple(map(plain_number, values))
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"{name} must be one or more ints >= 1, got {list(sizes)}")
    return sizes
