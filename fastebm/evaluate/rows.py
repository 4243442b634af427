"""Sets of states as arrays of flat rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["as_rows", "checked_pair"]


def as_rows(x: ArrayLike) -> NDArray[Any]:
    """(n, *shape) -> (n, dim)."""
    x = np.asarray(x)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"a set of states is (n, dim) with n >= 1, got shape {x.shape}")
    return x.reshape(len(x), -1)


def checked_pair(measure: str, real: ArrayLike, fake: ArrayLike, *, least: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two sets as float64 rows of the same dim, with at least so many rows each. measure: its name, for errors."""
    real, fake = as_rows(real).astype(np.float64), as_rows(fake).astype(np.float64)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"{measure} compares states of one dim, got {real.shape[1]} and {fake.shape[1]}")
    if min(len(real), len(fake)) < least:
        raise ValueError(f"{measure} needs at least {least} rows a side, got {len(real)} and {len(fake)}")
    for side, rows in (("first", real), ("second", fake)):
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows)).any(axis=1).sum())
            raise ValueError(f"{measure} needs finite states, got {bad} rows of the {side} set that are not")
    return real, fake
