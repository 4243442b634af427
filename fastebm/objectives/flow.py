"""A normalising flow of affine coupling layers (RealNVP: Dinh, Sohl-Dickstein & Bengio 2017).

A layer leaves every second coordinate as it is, x_a, and moves the others by an affine map that depends on x_a:

    y_a = x_a,    y_b = x_b exp(s(x_a)) + t(x_a),    log |det dy/dx| = sum s(x_a).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..scalars import checked_integer
from .base import Draws
from .noise import NoiseDistribution, Values, checked_values

__all__ = ["CouplingFlow"]

# |s| of a layer stays below this, so that no step of training can make exp(s) overflow.
_MOST_LOG_SCALE = 2.0


class CouplingFlow(NoiseDistribution):
    """A distribution that learns: x = mean + std f(z), z normal, f a chain of coupling layers. It starts as f(z) = z.

        flow = CouplingFlow(data.mean(0), data.std(0))

    Args:
        mean: about that of the data: numbers of one state's shape.
        std: > 0, about that of the data, in the same form or one number for all coordinates.
        n_layers: coupling layers; neighbours move different coordinates.
        width: of the two hidden layers of each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Values, std: Values = 1.0, *, n_layers: int = 8, width: int = 64) -> None:
        mean = checked_values("mean", mean)
        super().__init__(mean.shape)
        std = checked_values("std", std, mean.shape, positive=True)
        self.register_buffer("mean", mean.flatten().to(torch.get_default_dtype()))
        self.register_buffer("std", std.flatten().to(torch.get_default_dtype()))
        n_layers, width = checked_integer("n_layers", n_layers, least=1), checked_integer("width", width, least=1)
        layers = nn.ModuleList(_Coupling(mean.numel(), width, i % 2) for i in range(n_layers))
        self.layers = cast("Sequence[_Coupling]", layers)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Normal numbers to states, and the log-density of these: (n, *shape) -> (n, *shape), (n,)."""
        self.check_shape(z.shape[1:])
        y = z.flatten(1)
        log_prob = self._log_prob_of_start(y)
        for layer in self.layers:
            y, log_det = layer.forward(y)
            log_prob = log_prob - log_det
        return (self.mean + self.std * y).reshape(z.shape), log_prob

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States to the normal numbers that map to them, and the states' log-density: (n, *shape) -> as x, (n,)."""
        self.check_shape(x.shape[1:])
        y = (x.flatten(1) - self.mean) / self.std
        log_det = y.new_zeros(len(y))
        for layer in reversed(self.layers):
            y, log_det_of_layer = layer.inverse(y)
            log_det = log_det + log_det_of_layer
        return y.reshape(x.shape), self._log_prob_of_start(y) - log_det

    def log_prob(self, x: Tensor) -> Tensor:
        """(n, *shape) -> (n,)."""
        return self.inverse(x)[1]

    def sample(self, draws: Draws, copies: int) -> Tensor:
        z = draws.normal(copies)
        x, _ = self.forward(z.flatten(0, 1))
        return x.reshape(z.shape)

    def _log_prob_of_start(self, y: Tensor) -> Tensor:
        """The log-density of mean + std y if y is normal: (n, dim) -> (n,)."""
        return -(y.square() / 2 + math.log(2 * math.pi) / 2 + self.std.log()).sum(dim=1)


class _Coupling(nn.Module):
    """One layer. first: 0 or 1, the first coordinate that it moves."""

    moved: Tensor

    def __init__(self, dim: int, width: int, first: int) -> None:
        super().__init__()
        self.register_buffer("moved", ((torch.arange(dim) + first) % 2 == 0).to(torch.get_default_dtype()))
        last = nn.Linear(width, 2 * dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self._scale_and_shift(x)
        return x * s.exp() + t, s.sum(dim=1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x of y, and the log-determinant of the forward map there."""
        s, t = self._scale_and_shift(y)
        return (y - t) * (-s).exp(), s.sum(dim=1)

    def _scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s and t, 0 at coordinates that stay, of which alone they are functions."""
        s, t = self.net(x * (1.0 - self.moved)).chunk(2, dim=1)
        return self.moved * _MOST_LOG_SCALE * torch.tanh(s / _MOST_LOG_SCALE), self.moved * t
