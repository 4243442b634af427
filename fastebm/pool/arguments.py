"""Checks of the arguments of a pool's calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..box import Box
from ..driver.arguments import check_integers
from ..samplers.base import Sampler, checked_sampler
from ..scalars import plain_number
from .processes import Processes

__all__ = ["asked_labels", "checked_condition", "checked_int", "checked_labels", "checked_probability", "with_clamp"]


def checked_int(name: str, value: Any, rule: str, least: int, most: int) -> int:
    """An int in [least, most]. Tensors without dims and numbers of NumPy pass too. rule: what it must be, in words."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return value


def checked_probability(name: str, value: Any) -> float:
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return float(value)


def checked_labels(labels: Tensor, n: int, per: str) -> Tensor:
    """(n,) integers, as int64. per: what each belongs to, for the error."""
    check_integers("labels", labels)
    if labels.shape != (n,):
        raise ValueError(f"labels must be ({n},), one per {per}, got {tuple(labels.shape)}")
    return labels.to(torch.int64)


def asked_labels(labels: Tensor, batch_size: int, held: Tensor | None, processes: Processes) -> tuple[Tensor, Tensor]:
    """Arguments of ``Draws.matching``: the labels of all chains of the pool, and those that ``sample`` asks for.

    Args:
        held: labels of this process' chains.
    """
    with processes.together():
        if held is None:
            raise ValueError("labels= draws chains with these labels, but this pool has none: build it with labels=")
        wanted = checked_labels(labels, batch_size, "chain of the batch").to(held.device)
        mine = wanted, held
    asked, parts = zip(*processes.gather(mine), strict=True)
    with processes.together():
        if any(not torch.equal(theirs, wanted) for theirs in asked):
            raise ValueError("all processes of a group must make the same calls, and some asked for other labels")
        return torch.cat(parts), wanted


def checked_condition(condition: Tensor, n: int, like: Tensor | None = None) -> Tensor:
    """(n, ...), of the trailing shape and dtype of ``like`` if that is given."""
    if not isinstance(condition, Tensor):
        raise TypeError(f"condition must be a tensor, one row per chain, got {type(condition).__name__}")
    shape = (n, *(condition if like is None else like).shape[1:])
    if tuple(condition.shape) != shape:
        raise ValueError(f"condition must be {shape}, one row per chain, got {tuple(condition.shape)}")
    if like is None:
        return condition
    if not torch.can_cast(condition.dtype, like.dtype):
        raise TypeError(f"condition must be of {like.dtype}, as the pool's condition is, got {condition.dtype}")
    return condition.to(like.dtype)


def with_clamp(sampler: Sampler, clamp: Box | None, dim: int) -> Sampler:
    """The sampler with the pool's clamp. An error if it has another one."""
    sampler = checked_sampler(sampler)
    if clamp is None:
        return sampler
    if sampler.box is not None and not sampler.box.equals(clamp, dim):
        raise ValueError(f"the pool clamps to {clamp} and the sampler to {sampler.box}: use one")
    return dataclasses.replace(sampler, clamp=clamp)  # type: ignore[type-var]
