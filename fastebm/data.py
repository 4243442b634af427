"""Data to train on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DIGITS_LEVELS", "DIGITS_SHAPE", "Images", "load_digits"]

DIGITS_SHAPE, DIGITS_LEVELS = (8, 8), 16


@dataclass(frozen=True, eq=False)
class Images:
    """Images of integer grey levels 0 .. levels, split in two.

    train: (n_train, dim), test: (n_test, dim), float32 holding integers; their labels: (n,) int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    shape: tuple[int, int]
    levels: int

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    def dequantise(self, k: Tensor, width: float, generator: torch.Generator) -> Tensor:
        """x = clamp((k + width (u - 1/2)) / levels, 0, 1), u uniform on [0, 1), which rounds back to k."""
        u = torch.rand(k.shape, generator=generator)
        return ((k + width * (u - 0.5)) / self.levels).clamp_(0.0, 1.0)

    def quantise(self, x: Tensor) -> Tensor:
        """The nearest grey level, as a float."""
        return (x * self.levels).round_()

    def batch(self, size: int, width: float, generator: torch.Generator) -> Tensor:
        """Distinct dequantised training images: (size, dim)."""
        rows = torch.randperm(len(self.train), generator=generator)[:size]
        return self.dequantise(self.train[rows], width, generator)


def load_digits() -> Images:
    """scikit-learn's bundled handwritten digits: 8 x 8, levels 0 .. 16; 1,437 to train on and 360 held out.

    The split is the same for every seed, so that what is held out stays held out.
    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits (its test set).
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    x, y = load(return_X_y=True)
    split = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    train, test = (torch.from_numpy(part).float() for part in split[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in split[2:])
    return Images(train, train_labels, test, test_labels, DIGITS_SHAPE, DIGITS_LEVELS)
