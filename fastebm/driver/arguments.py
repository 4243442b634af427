"""Checks of the arguments of a sampling call. Errors state the requirement, the value received and the likely fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import Chains
from ..devices import named_device
from ..energies import shape_of, takes_condition
from ..energies.functions import name_of_forward
from ..rng import draw_seed
from ..scalars import checked_integer, plain_number
from ..targets.description import describe
from ..targets.mlp import NotAnMLP

__all__ = [
    "check_capture",
    "check_init",
    "check_integers",
    "check_out",
    "checked_condition",
    "checked_count",
    "checked_first_steps",
    "checked_frozen",
    "checked_thin",
    "on_device_or_plain",
    "same_device",
    "seed_tensor",
    "shape_of_states",
    "state_shape",
    "with_own_condition",
]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def checked_count(name: str, value: int) -> int:
    return checked_integer(name, value, least=0)


def on_device_or_plain(value: Any) -> Any:
    """Keep an int64 tensor, which kernels read on the device at run time; convert other numbers to Python's."""
    return value if isinstance(value, Tensor) and value.dtype == torch.int64 else plain_number(value)


def state_shape(input_size: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one state, from its number of dims or its shape."""
    size: Any = plain_number(input_size)
    states = "states to start from are passed as init=, (n_chains, *shape)"
    if isinstance(size, (Tensor, np.ndarray)) and (size.ndim > 1 or isinstance(size, Tensor) or size.dtype.kind == "f"):
        raise TypeError(f"input_size must be an int or a shape, got {_short(size)}: {states}")
    if not isinstance(size, (int, Sequence, np.ndarray)) or isinstance(size, str):
        raise TypeError(f"input_size must be an int or a shape, got {_short(input_size)}")
    shape = (size,) if isinstance(size, int) else tuple(map(plain_number, size))
    if not shape or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in shape):
        hint = f": {states}" if any(isinstance(s, (float, Sequence)) for s in shape) else ""
        raise ValueError(f"input_size must be an int >= 1 or a shape of such ints, got {_short(input_size)}{hint}")
    return shape


def shape_of_states(
    energy: nn.Module, input_size: int | Sequence[int] | None, labels: bool, states: str
) -> tuple[int, ...]:
    """The shape of one state. states: name of the argument that could tell it too, for the error."""
    if input_size is not None:
        return state_shape(input_size)
    try:
        return (describe(energy, labels=labels, bare=True).dim,)
    except NotAnMLP as error:
        if (shape := shape_of(energy)) is not None:
            return shape
        raise ValueError(
            f"pass input_size= or {states}=: the energy does not tell its input's shape ({error})"
        ) from None


def _short(value: object) -> str:
    """A repr for errors: type and shape only if the value is a tensor or an array."""
    return f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else repr(value)


def check_init(
    init: Tensor, input_size: int | Sequence[int] | None, device: torch.device | str | None, name: str
) -> None:
    if not isinstance(init, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(init).__name__}")
    if not init.is_floating_point():
        raise TypeError(
            f"{name} must be floating point (float32, float64 or half), got {init.dtype}: use {name}.float()"
        )
    if init.ndim < 2 or math.prod(init.shape[1:]) == 0:
        raise ValueError(f"{name} must be (n_chains, *shape) with at least one dim, got shape {tuple(init.shape)}")
    if input_size is not None and state_shape(input_size) != tuple(init.shape[1:]):
        raise ValueError(f"input_size {input_size!r} and {name} of shape {tuple(init.shape)} disagree: leave one out")
    if device is not None and not same_device(named_device(device), init.device):
        raise ValueError(f"{name} is on {init.device} and device={device}: move one, or leave device= out")


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if tuple(out.shape) != shape or out.dtype != dtype or not same_device(device, out.device):
        raise ValueError(
            f"out must be a {shape} tensor of {dtype} on {device}, got {tuple(out.shape)}, {out.dtype}, {out.device}"
        )
    if out.requires_grad:
        raise ValueError("out must not require grad: samples carry none")


def same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)


def check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")


def checked_condition(energy: nn.Module, chains: Chains, dtype: torch.dtype) -> Chains:
    """Check that labels or condition fit the chains and the energy.

    Returns the chains with contiguous int64 labels, or a contiguous condition. A floating-point condition is converted
    to ``dtype``.
    """
    labels, condition, numbers = chains.labels, chains.condition, chains.numbers
    if labels is not None and condition is not None:
        raise ValueError("an energy takes labels= or condition= beside x, got both: leave one out")
    kind, value = chains.kind, chains.labels_or_condition
    if value is None:
        return chains
    if labels is not None:
        check_integers("labels", labels)
    elif not isinstance(condition, Tensor):
        raise TypeError(f"condition must be a tensor (n_chains, ...), got {type(condition).__name__}")
    fits = value.shape == numbers.shape if labels is not None else value.shape[:1] == numbers.shape
    if not fits or not same_device(value.device, numbers.device):
        shape = f"({len(numbers)},)" if labels is not None else f"({len(numbers)}, ...)"
        raise ValueError(
            f"{kind} must be {shape}, one per chain, on {numbers.device}, got {tuple(value.shape)} on {value.device}"
        )
    if not takes_condition(energy, kind):
        raise ValueError(
            f"{kind}= was given, and {name_of_forward(energy)} takes x only, or nothing that is named for it: "
            f'wrap a classifier in ClassifierEnergy, name the argument "{kind}", set condition_argument = "NAME" on '
            f"the module, or leave {kind}= out"
        )
    if labels is not None:
        return chains._replace(labels=labels.to(torch.int64).contiguous())
    value = value.detach()
    return chains._replace(condition=(value.to(dtype) if value.is_floating_point() else value).contiguous())


def with_own_condition(energy: nn.Module, chains: Chains, sampler: Any) -> Chains:
    """The chains with the condition that the sampler itself gives the energy, if it does.

    Raises:
        ValueError: labels or a condition were passed as well, or the energy takes x only.
    """
    if sampler.condition is None:
        return chains
    gives = f"{type(sampler).__name__} gives the energy a noise level as its condition"
    if chains.labels_or_condition is not None:
        raise ValueError(f"{gives}, and got {chains.kind}= as well: leave it out")
    if not takes_condition(energy, "condition"):
        raise ValueError(
            f"{gives}, and {name_of_forward(energy)} takes x only, or nothing that is named for it: give it an "
            'argument "sigma", a tensor (n_chains,)'
        )
    numbers = chains.numbers
    condition = torch.full(numbers.shape, sampler.condition, dtype=torch.float64, device=numbers.device)
    return chains._replace(condition=condition)


def checked_frozen(frozen: Tensor | None, n_chains: int, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The checked mask as a (1 or n_chains, dim) bool tensor, or None."""
    if frozen is None:
        return None
    if not isinstance(frozen, Tensor) or frozen.dtype != torch.bool:
        got = frozen.dtype if isinstance(frozen, Tensor) else type(frozen).__name__
        raise TypeError(f"frozen must be a tensor of bools, True where a coordinate stays, got {got}")
    if tuple(frozen.shape) not in (shape, (n_chains, *shape)):
        raise ValueError(
            f"frozen must have one state's shape {shape}, or {(n_chains, *shape)}, got {tuple(frozen.shape)}"
        )
    if not same_device(frozen.device, device):
        raise ValueError(f"frozen is on {frozen.device} and the chains on {device}: move one with .to(...)")
    rows = 1 if tuple(frozen.shape) == shape else n_chains
    return frozen.reshape(rows, math.prod(shape)).contiguous()


def checked_thin(thin: int, steps: int, return_trajectory: bool, on_nonfinite: str) -> int:
    """The checked ``thin``; 0 if no trajectory is returned."""
    thin = checked_count("thin", thin)
    if not return_trajectory:
        if thin != 1:
            raise ValueError(f"thin is for return_trajectory=True, got thin={thin} without it")
        return 0
    if thin < 1 or steps % thin != 0:
        raise ValueError(f"thin must divide steps, so that the last state is kept, got thin={thin}, steps={steps}")
    if on_nonfinite == "reinit":
        raise ValueError('a trajectory shows where chains exploded: use on_nonfinite="raise" or "ignore" with it')
    return thin


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a (1,) int64 tensor. None draws one on the chains' device, so that nothing synchronises."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"a seed tensor must be one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}")
        return seed.reshape(1)
    if seed is None:
        low, high = torch.randint(2**32, (2,), device=device)
        drawn: Tensor = high << 32 | low
        return drawn.reshape(1)
    seed = draw_seed(seed)
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def checked_first_steps(first_step: int | Tensor, steps: int, chains: Tensor) -> Tensor:
    """The chains' first lifetime steps, (n_chains,) int64."""
    if not isinstance(first_step, Tensor):
        first_step = checked_count("first_step", first_step)
        if first_step + steps > 2**32:
            raise ValueError(f"step numbers are 32-bit: first_step + steps must be <= 2**32, got {first_step + steps}")
        return torch.full_like(chains, first_step)
    if first_step.dtype != torch.int64 or (first_step.numel() != 1 and first_step.shape != chains.shape):
        raise ValueError(
            f"a first_step tensor must be one int64 number or ({len(chains)},), got {first_step.dtype} of shape "
            f"{tuple(first_step.shape)}"
        )
    first_steps = first_step.to(chains.device)
    return (first_steps if first_steps.shape == chains.shape else first_steps.reshape(1).expand_as(chains)).contiguous()


def check_capture(
    on_nonfinite: str, seed: object, first_step: object, tensors: Sequence[object], device: torch.device
) -> None:
    """Check that a call can be captured in a CUDA graph.

    tensors: the call's arguments that may be tensors; others are ignored. All tensors must be on ``device``.
    """
    where = "while a CUDA graph is captured"
    if on_nonfinite != "ignore":
        raise ValueError(f'{where} nothing can wait for the device: pass on_nonfinite="ignore", not {on_nonfinite!r}')
    if not (isinstance(seed, Tensor) or isinstance(first_step, Tensor)):
        raise ValueError(
            f"{where} the seed and the step would be frozen, and each replay repeat the same noise: pass seed= or "
            "first_step= as an int64 tensor on the device, and change it between replays"
        )
    for value in tensors:
        if isinstance(value, Tensor) and value.device.type != device.type:
            raise ValueError(f"{where} every tensor must be on {device}, got one on {value.device}")
