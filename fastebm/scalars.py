"""Accept NumPy scalars and tensors without dims wherever a Python number is meant."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .tracing import readable

__all__ = ["plain_number"]


def plain_number(value: Any) -> Any:
    """NumPy scalars, and arrays and tensors without dims, as Python numbers. Anything else is returned unchanged."""
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.item()
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type != "meta" and readable(value.device):
        return value.item()
    return value
