"""Sets of states as arrays of flat rows, and checks of them and of their labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["as_rows", "check_labels", "checked_pair"]


def as_rows(x: ArrayLike) -> NDArray[Any]:
    """(n, *shape) -> (n, dim)."""
    x = np.asarray(x)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"a set of states is (n, dim) with n >= 1, got shape {x.shape}")
    return x.reshape(len(x), -1)


def checked_pair(
    measure: str, real: ArrayLike, fake: ArrayLike, *, least: int, least_of_second: int | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two sets as float64 rows of the same dim, finite, with at least so many rows. measure: its name, for errors."""
    real, fake = as_rows(real).astype(np.float64), as_rows(fake).astype(np.float64)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"{measure} compares states of one dim, got {real.shape[1]} and {fake.shape[1]}")
    least_of_second = least if least_of_second is None else least_of_second
    for side, rows, fewest in (("first", real, least), ("second", fake, least_of_second)):
        if len(rows) < fewest:
            raise ValueError(f"{measure} needs at least {fewest} rows in the {side} set, got {len(rows)}")
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows)).any(axis=1).sum())
            raise ValueError(f"{measure} needs finite states, got {bad} rows of the {side} set that are not")
    return real, fake


def check_labels(labels: Tensor, n: int, n_classes: int) -> None:
    """Refuse labels that are not one integer 0 .. n_classes - 1 for each of n rows."""
    if labels.shape != (n,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers ({n},), got {tuple(labels.shape)} {labels.dtype}")
    if not bool(((labels >= 0) & (labels < n_classes)).all()):
        raise ValueError(f"labels must be 0 to {n_classes - 1}, got {int(labels.min())} to {int(labels.max())}")
