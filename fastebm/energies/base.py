"""Evaluate an energy on a batch, and check what the module returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .conditions import arguments_of, condition_parameter
from .functions import EnergyLike, as_module, name_of_forward

__all__ = ["energy", "first_tensor", "values_of"]


def energy(
    model: EnergyLike,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    *,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Energies of a batch: (batch, *shape) -> (batch,), differentiable.

    Args:
        model: a module or a function, (batch, *shape) -> (batch,) or (batch, 1).
        params: parameters (and buffers) by name to use in place of the model's own (torch.func.functional_call).
        labels: (batch,) int64, one class label per state; or None.
        condition: (batch, ...), any other second argument of the model, one row per state; or None.

    Raises:
        ValueError: the model returns another shape, or takes no labels or condition.
    """
    if labels is not None and condition is not None:
        raise ValueError("an energy takes labels= or condition=, got both")
    condition_kind, condition = ("condition", condition) if labels is None else ("labels", labels)
    return values_of(as_module(model), x, params, condition, condition_kind).reshape(len(x))


def values_of(
    model: nn.Module, x: Tensor, params: Mapping[str, Tensor] | None, condition: Tensor | None, condition_kind: str
) -> Tensor:
    """The checked output of the model: (batch,) or (batch, 1), or () for a batch of one that it squeezes.

    Args:
        condition_kind: "labels" or "condition", the keyword that ``condition`` was passed by.
    """
    arguments: tuple[Tensor, ...] = (x,)
    options: dict[str, Tensor] = {}
    if condition is not None:
        parameter = condition_parameter(model, condition_kind)
        if parameter is None:
            raise ValueError(f"{name_of_forward(model)} takes x only, and {condition_kind}= was given")
        arguments, options = arguments_of(x, condition, parameter)
    if params is None:
        value: Any = model(*arguments, **options)
    else:
        value = torch.func.functional_call(model, dict(params), arguments, options)
    n = len(x)
    if not isinstance(value, Tensor) or not (value.shape in ((n,), (n, 1)) or (n == 1 and value.ndim == 0)):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"an energy maps ({n}, ...) to ({n},) or ({n}, 1), got {got}{_mistake(value, x)}")
    if value.is_complex():
        raise ValueError(f"an energy is real, got {value.dtype}: take .real or .abs() of the model's output")
    if not value.is_floating_point():
        raise ValueError(f"an energy is a floating-point number, got {value.dtype}, which has no gradient")
    return value


def _mistake(value: object, x: Tensor) -> str:
    """The likely mistake behind an output of another shape, as the end of an error message."""
    if value is None:
        return ": is a return missing?"
    if not isinstance(value, Tensor):
        return ": return a tensor, one energy for each state"
    if value.ndim == 0:
        return ": one number for the whole batch; drop the mean() or sum() over the states"
    if value.shape == x.shape:
        return ": one number per coordinate; sum over all dims but the first, as by .flatten(1).sum(1)"
    if len(value) == len(x) and x.ndim > 2:
        shape = tuple(x.shape[1:])
        return f": a state has shape {shape}; sum over all dims of it (or is the number of chains, batch_size=, in it?)"
    if len(value) == len(x) and value.ndim == 2:
        return ": several numbers per state; sum them, or, of a classifier, use ClassifierEnergy"
    return ": the first dim is the batch, and the other dims are summed over"


def first_tensor(model: nn.Module) -> Tensor | None:
    """A parameter, or else a floating-point buffer, whose device and dtype are taken for the model's."""
    parameter = next(model.parameters(), None)
    return next((b for b in model.buffers() if b.is_floating_point()), None) if parameter is None else parameter
