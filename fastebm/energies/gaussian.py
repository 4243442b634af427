"""A Gaussian as an energy, alone or as the base measure in a sum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["GaussianEnergy"]


class GaussianEnergy(nn.Module):
    """E(x) = sum_d ((x_d - mean_d) / std_d)^2 / 2: a Gaussian base measure, as a term of a ``SumEnergy``.

    Args:
        mean: a number, or a tensor or nested list of the shape of one state.
        std: > 0, in the same form.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[Any] | Tensor = 0.0, std: float | Sequence[Any] | Tensor = 1.0) -> None:
        super().__init__()
        for name, argument in (("mean", mean), ("std", std)):
            try:
                value = torch.as_tensor(argument, dtype=torch.get_default_dtype()).detach().clone()
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"{name} must be a number, or numbers of one state's shape, got {argument!r}") from None
            positive = name != "std" or bool((value > 0).all())
            if value.numel() == 0 or not bool(value.isfinite().all()) or not positive:
                raise ValueError(f"{name} must be finite{' and > 0' if name == 'std' else ''}, got {value}")
            self.register_buffer(name, value)
        try:
            np.broadcast_shapes(self.mean.shape, self.std.shape)
        except ValueError:
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.std.shape)}"
            raise ValueError(
                f"mean and std must each be a number or of one state's shape, got shapes {shapes}"
            ) from None

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless mean and std fit states of this shape.

        Broadcasting alone is no check: a mean with one row per chain would fit a batch of that size.
        """
        states = (1, *shape)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if any(size not in (1, n) for size, n in zip_longest(reversed(value.shape), reversed(states), fillvalue=1)):
                raise ValueError(
                    f"a GaussianEnergy has a {name} of shape {tuple(value.shape)}, and the chains' states have "
                    f"{tuple(shape)}: give it a number, or one state's shape"
                )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *shape) -> (batch,)."""
        self.check_shape(x.shape[1:])
        return ((x - self.mean) / self.std).flatten(1).square().sum(dim=1) / 2
