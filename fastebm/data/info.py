"""What a run records of its data set: its name and shape, and how its units and the states of chains correspond.

States are float32 on one scale, about 1, for all data sets. The user's data have units of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .table import Layout

__all__ = ["DIGITS", "SPREAD", "DataInfo"]

# Standard deviation of the states. An MLP with the usual initial weights is smooth on the scale of 1, and a plane has
# finer details than that, so planes are stretched: without it, four rings took ten times as many steps.
SPREAD = {"plane": 4.0, "table": 1.0}


@dataclass(frozen=True)
class DataInfo:
    """What a data set is, and the conversion between its units and states.

    Args:
        name: one of SETS, or the absolute path of the user's file.
        kind: "images", "plane" (two dims) or "table".
        shape: of one state.
        clamp: (lo, hi), the range of states.
        levels: of images: grey levels are 0 .. levels, and a state is the level divided by levels.
        columns: of planes and tables: names. offset, scale: one number per column;
            state = clip((value - offset) / scale, lo, hi).
        sha256: of the values in the user's file. layout: how it was read; None in runs of earlier versions.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    clamp: tuple[float, float]
    levels: int | None = None
    columns: tuple[str, ...] = ()
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    sha256: str | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        is_points = self.kind in ("plane", "table")
        parts = [len(self.columns), len(self.offset), len(self.scale)]
        good = (
            (is_points or self.kind == "images")
            and all(type(size) is int and size >= 1 for size in self.shape)
            and len(self.shape) == (1 if is_points else 2)
            and len(self.clamp) == 2
            and parts == [self.dim if is_points else 0] * 3
            and all(map(math.isfinite, (*self.clamp, *self.offset, *self.scale)))
            and all(scale > 0 for scale in self.scale)
            and (self.levels is None) == is_points
            and (self.kind == "plane") == (self.shape == (2,))
        )
        if not good:
            raise ValueError(f"{self} describes no data set")

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    @property
    def deviation(self) -> tuple[float, ...]:
        """Standard deviations of the training rows of a plane or table, per column."""
        return tuple(scale * SPREAD[self.kind] for scale in self.scale)

    def to_states(self, x: ArrayLike) -> Tensor:
        """Values of a plane or table, (n, dim), in the data's units -> states (n, dim) float32."""
        scores = (np.asarray(x, np.float64) - self.offset) / self.scale
        return torch.from_numpy(scores.clip(*self.clamp).astype(np.float32))

    def to_data(self, states: Tensor) -> NDArray[Any]:
        """States (n, dim) -> (n, *shape) in the data's units: float64; for images, float32 in [0, 1]."""
        x = states.cpu().numpy()
        if self.kind == "images":
            return x.reshape(-1, *self.shape)
        return x.astype(np.float64) * self.scale + self.offset

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataInfo:
        """From JSON."""
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if (layout := values.get("layout")) is not None:
            entries["layout"] = Layout(**{**layout, "positions": tuple(layout["positions"])})
        return cls(**entries)


DIGITS = DataInfo("digits", "images", (8, 8), (0.0, 1.0), levels=16)
