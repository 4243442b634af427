"""What a sampler is: a frozen dataclass of settings with ``init`` and ``step``, and nothing else.

A sampler sees a target and numbers from the noise stream. The driver does the rest: it checks the input, keeps
coordinates that are frozen, stops chains that are not finite, keeps every thin-th state, and looks for a faster run of
the same steps (backends/table.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..box import Box
from ..rng import Noise
from ..scalars import number_or_tensor
from ..targets.base import View
from ..tracing import readable

__all__ = [
    "Info",
    "Sampler",
    "check_settings",
    "checked_coefficient",
    "checked_sampler",
    "for_chains",
    "for_steps",
    "settled",
    "value_at",
]


class Info(NamedTuple):
    """What one step did.

    finite: (n,) bool, whether every state that the step computed was finite, before any clamp; None: all were. Where it
    is False the returned state is the chain's last finite one. telemetry: a function without arguments, called only if
    it was asked for: two dicts of (n,) numbers, those to be averaged over the steps and those of which the last counts.
    """

    finite: Tensor | None
    telemetry: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]


class Sampler(Protocol):
    """A frozen dataclass of settings.

    A setting that may change by step or by chain is a float, a (steps,) tensor or a (n_chains, 1) tensor: see
    ``checked_coefficient`` and ``value_at``. States are NamedTuples of tensors with one row per chain, and a field x.

    exact: whether an accept test makes each step leave exp(-E) as it is. States outside the bounds then have
    probability 0 and are rejected; without a test they are projected onto the bounds.
    reports: the names of ``Info``'s telemetry, which are fields of ``SampleInfo`` (driver/info.py), with their values
    after no step.
    """

    @property
    def box(self) -> Box | None:
        """Bounds of the states."""
        ...

    exact: ClassVar[bool]
    reports: ClassVar[Mapping[str, float]]

    def init(self, target: View, x: Tensor, noise: Noise) -> Any:
        """The state of chains that start at x, (n, dim)."""
        ...

    def step(self, target: View, state: Any, noise: Noise, t: int) -> tuple[Any, Info]:
        """One transition of all chains; pure. t: the step of this call, from 0."""
        ...


_Sampler = TypeVar("_Sampler", bound=Any)


def checked_sampler(sampler: object) -> Any:
    """The sampler, or an error with the likely mistake."""
    if callable(getattr(sampler, "step", None)) and dataclasses.is_dataclass(sampler) and not isinstance(sampler, type):
        return sampler
    hint = ""
    if isinstance(sampler, type) or callable(sampler):
        hint = ": are its parentheses missing, as in Langevin(0.1)?"
    elif isinstance(sampler, (int, float)):
        hint = ": a step size alone is Langevin(0.1), and numbers of chains and steps have names (n_chains=, steps=)"
    raise TypeError(f"the sampler must be a Langevin or another sampler of fastebm, got {sampler!r}{hint}")


def settled(target: View, x: Tensor, moved: Tensor, box: Box | None) -> tuple[Tensor, Tensor | None]:
    """Where chains are that were to go from x to moved, within the box; and which could, or None for all.

    Frozen coordinates stay. Finiteness is tested before the clamp, which would turn infinity into a bound.
    """
    moved = target.held(x, moved)
    # A sum is finite only if all its terms are: on a CPU one pass clears all chains. (A sum may overflow by itself.)
    if moved.device.type == "cpu" and bool(moved.sum().isfinite()):
        return (moved if box is None else box.clamp(moved)), None
    finite = moved.isfinite().all(dim=1)
    return torch.where(finite[:, None], moved if box is None else box.clamp(moved), x), finite


# -- settings that change by step or by chain ---------------------------------------------------------------------


def checked_coefficient(name: str, value: Any, *, positive: bool) -> float | Tensor:
    """A finite float, a (steps,) tensor or a (n_chains, 1) tensor; > 0, or >= 0.

    Raises:
        TypeError, ValueError: with the rule and the value received.
    """
    rule = f"{name} must be finite and {'> 0' if positive else '>= 0'}"
    # a tensor without dims stays where it is: a captured call may read it there
    value = value if isinstance(value, Tensor) else number_or_tensor(value)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.ndim > 2 or (value.ndim == 2 and value.shape[1] != 1):
            raise ValueError(
                f"{name} must be a float, a (steps,) tensor or a (n_chains, 1) tensor, got shape {tuple(value.shape)}"
            )
        if not readable(value.device):
            return value  # a compiled call checks when it runs (backends/op.py); a captured one can't
        # One reduction for all three faults: NaN fails every comparison.
        good = torch.isfinite(value) & ((value > 0) if positive else (value >= 0))
        if not bool(good.all()):
            raise ValueError(f"{rule}, got a tensor with {value[~good].flatten()[0].item()}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = ": a whole sampler is passed as rule=" if dataclasses.is_dataclass(value) else ""
        raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}{hint}")
    elif not ((value > 0 if positive else value >= 0) and value < float("inf")):
        raise ValueError(f"{rule}, got {value}")
    checked: float | Tensor = value
    return checked


def value_at(value: float | Tensor, t: int, device: torch.device) -> float | Tensor:
    """A coefficient at step t: a number, or float64 of shape () or (n_chains, 1)."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to(device, torch.float64)
    return value[t] if value.ndim == 1 else value


def for_chains(sampler: _Sampler, rows: Tensor | slice, n_chains: int) -> _Sampler:
    """The sampler for some of n_chains chains: (n_chains, 1) settings keep these rows.

    Raises:
        ValueError: a setting for another number of chains, which might fit the rows by chance.
    """

    def part(name: str, value: Tensor) -> Tensor:
        if value.ndim < 2 or len(value) == 1:
            return value
        _check_rows(name, value, n_chains)
        return value[rows.to(value.device) if isinstance(rows, Tensor) else rows]

    return _replaced(sampler, part)


def for_steps(sampler: _Sampler, first: int, last: int) -> _Sampler:
    """The sampler for steps first to last - 1 of a call: schedules keep these entries."""
    return _replaced(sampler, lambda name, value: value[first:last] if value.ndim == 1 else value)


def check_settings(sampler: Any, n_chains: int, steps: int) -> None:
    """Schedules have an entry per step, and settings per chain a row per chain."""

    def check(name: str, value: Tensor) -> Tensor:
        if value.ndim == 1 and len(value) != steps:
            raise ValueError(
                f"a {name} schedule must have one entry per step: got {len(value)} entries for {steps} steps"
            )
        if value.ndim == 2 and len(value) != 1:
            _check_rows(name, value, n_chains)
        return value

    _replaced(sampler, check)


def _check_rows(name: str, value: Tensor, n_chains: int) -> None:
    if len(value) != n_chains:
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit {n_chains} chains; use ({n_chains}, 1)")


def _replaced(sampler: _Sampler, function: Callable[[str, Tensor], Tensor]) -> _Sampler:
    """With every setting that is a tensor mapped. Bounds are none of these: they belong to dims."""
    changed = {}
    for field in dataclasses.fields(sampler):
        value = getattr(sampler, field.name)
        if isinstance(value, Tensor) and (new := function(field.name, value)) is not value:
            changed[field.name] = new
    return dataclasses.replace(sampler, **changed) if changed else sampler
