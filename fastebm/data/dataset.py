"""Data sets in memory, split into training and held-out rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .info import DataInfo

__all__ = ["Data", "Images", "Points"]


@dataclass(frozen=True, eq=False)
class Images:
    """Images of integer grey levels 0 .. levels.

    train: (n_train, dim) and test: (n_test, dim), integers as float32. Their labels: (n,) int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    shape: tuple[int, int]
    levels: int
    name: str = "images"

    @property
    def info(self) -> DataInfo:
        return DataInfo(self.name, "images", self.shape, (0.0, 1.0), levels=self.levels)

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    def dequantise(self, k: Tensor, width: float, generator: torch.Generator) -> Tensor:
        """x = clamp((k + width (u - 1/2)) / levels, 0, 1), u uniform on [0, 1). It rounds back to k."""
        u = torch.rand(k.shape, generator=generator)
        return ((k + width * (u - 0.5)) / self.levels).clamp_(0.0, 1.0)

    def quantise(self, x: Tensor) -> Tensor:
        """The nearest grey level, as a float."""
        return (x * self.levels).round_()

    @property
    def states(self) -> Tensor:
        """The training images without dequantisation: (n_train, dim) in [0, 1]."""
        return self.train / self.levels

    @property
    def classes(self) -> Tensor:
        """The class of each training image: (n_train,) int64."""
        return self.train_labels

    def batch(self, size: int, width: float, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Distinct dequantised training images, (size, dim), and their classes, (size,)."""
        rows = torch.randperm(len(self.train), generator=generator)[:size]
        return self.dequantise(self.train[rows], width, generator), self.train_labels[rows]


@dataclass(frozen=True, eq=False)
class Points:
    """Rows of a plane or a table, as states.

    train: (n_train, dim) and test: (n_test, dim), float32. outliers: name -> (n, dim), rows known to be of another
    kind. train_labels: (n_train,) words, for rows with classes. findings: see ``inspection.findings``.
    """

    info: DataInfo
    train: Tensor
    test: Tensor
    outliers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    train_labels: NDArray[np.str_] | None = None
    findings: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        return self.info.dim

    @property
    def states(self) -> Tensor:
        """The training rows."""
        return self.train

    @functools.cached_property
    def classes(self) -> Tensor | None:
        """The class of each training row, (n_train,) int64: the place of its label in their order. None: no labels."""
        if self.train_labels is None:
            return None
        return torch.from_numpy(np.unique(self.train_labels, return_inverse=True)[1]).long()

    def batch(self, size: int, width: float, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Distinct training rows, (size, dim), and their classes, (size,), if there are any.

        width: not used; only images are dequantised.
        """
        rows = torch.randperm(len(self.train), generator=generator)[:size]
        return self.train[rows], None if self.classes is None else self.classes[rows]


Data: TypeAlias = Images | Points
