"""Accept NumPy scalars and tensors without dims wherever a Python number is meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tracing import readable

__all__ = ["number_or_tensor", "plain_number"]


def plain_number(value: Any) -> Any:
    """NumPy scalars, and arrays and tensors without dims, as Python numbers. Anything else is returned unchanged."""
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.item()
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type != "meta" and readable(value.device):
        return value.item()
    return value


def number_or_tensor(value: Any) -> Any:
    """A number of any kind as Python's, an array as a tensor; all else as it is, for a check to refuse."""
    value = plain_number(value)
    return torch.as_tensor(value) if isinstance(value, np.ndarray) else value
