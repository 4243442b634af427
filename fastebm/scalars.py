"""Accept NumPy scalars and tensors without dims wherever a Python number is meant."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tracing import readable

__all__ = ["checked_integer", "checked_number", "number_or_tensor", "plain_number"]


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


def checked_integer(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Check an integer >= least, and <= most unless it is None.

    Raises:
        TypeError, ValueError: the message states the requirement and the value received.
    """
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {f'>= {least}' if most is None else f'{least} to {most}'}, got {value}")
    return value


def checked_number(name: str, value: Any, *, positive: bool) -> float:
    """Check a finite number > 0, or >= 0 unless ``positive``.

    Raises:
        TypeError, ValueError: the message states the requirement and the value received.
    """
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (0 < value < math.inf or (value == 0 and not positive)):
        raise ValueError(f"{name} must be finite and {'> 0' if positive else '>= 0'}, got {value}")
    return float(value)
