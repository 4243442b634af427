"""The interface of a sampler: a frozen dataclass of settings with the methods ``init`` and ``step``.

A sampler gets a target and the random numbers of its chains. The driver does the rest: it checks the input, holds
frozen coordinates, stops chains that are no longer finite, stores every thin-th state, and uses a fused run of the same
steps if there is one (backends/table.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..box import Bounds, Box
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
    """What one step reports.

    finite: (n,) bool, False for chains that computed a non-finite state, tested before any clamp. For those chains the
    step returns the last finite state. None means that all chains were finite.
    telemetry: returns two dicts of (n,) tensors by name: values to average over the steps, and values of which the
    last step's is reported. Called only if the caller wants telemetry.
    """

    finite: Tensor | None
    telemetry: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]


class Sampler(Protocol):
    """A frozen dataclass of settings.

    clamp is a field, (lo, hi) or None: pools put theirs in its place. box is the same, checked (``Box.of``).
    A setting that may vary by step or by chain is a float, a (steps,) tensor or a (n_chains, 1) tensor: see
    ``checked_coefficient`` and ``value_at``. scheduled names these fields.
    A state is a NamedTuple of tensors with one row per chain: the positions x, and if the sampler carries them, their
    energy and gradient. Nothing else, because a call has parts (warm-up, progress, resumption), each of which starts
    with ``init`` at x.

    exact: whether each step leaves exp(-E) invariant, thanks to an accept test. Such a sampler rejects proposals
    outside the bounds. A sampler without the test projects them onto the bounds.
    reports: names of the telemetry and their values after zero steps. The names are fields of ``SampleInfo``.
    """

    @property
    def clamp(self) -> Bounds | None:
        """Bounds of the states as they were given, or None."""
        ...

    @property
    def box(self) -> Box | None:
        """Bounds of the states, or None."""
        ...

    exact: ClassVar[bool]
    scheduled: ClassVar[tuple[str, ...]]
    reports: ClassVar[Mapping[str, float]]

    def init(self, target: View, x: Tensor, noise: Noise) -> Any:
        """The state of chains that start at x: (n, dim)."""
        ...

    def step(self, target: View, state: Any, noise: Noise, t: int) -> tuple[Any, Info]:
        """One transition of all chains, without side effects.

        t: index of the step in this part of the call, from 0. Schedules are cut to the part.
        """
        ...


_MEMBERS = ("init", "step", "clamp", "box", "exact", "scheduled", "reports")
_Sampler = TypeVar("_Sampler", bound=Any)


def checked_sampler(sampler: object) -> Any:
    """Return the sampler unchanged, or raise a TypeError that names the likely mistake."""
    if callable(getattr(sampler, "step", None)) and dataclasses.is_dataclass(sampler) and not isinstance(sampler, type):
        missing = [name for name in _MEMBERS if not hasattr(sampler, name)]
        if missing:
            raise TypeError(f"{type(sampler).__name__} is no sampler: it lacks {', '.join(missing)} (samplers/base.py)")
        return sampler
    hint = ""
    if isinstance(sampler, type) or callable(sampler):
        hint = ": are its parentheses missing, as in Langevin(0.1)?"
    elif isinstance(sampler, (int, float)):
        hint = ": a step size alone is Langevin(0.1), and numbers of chains and steps have names (n_chains=, steps=)"
    raise TypeError(f"the sampler must be a Langevin or another sampler of fastebm, got {sampler!r}{hint}")


def settled(target: View, x: Tensor, moved: Tensor, box: Box | None) -> tuple[Tensor, Tensor | None]:
    """Finish a move from x to ``moved``: hold frozen coordinates, clamp to the box, and undo non-finite moves.

    Returns the new states, and a (n,) mask of the finite ones (None: all). A chain with a non-finite move stays at x.
    Finiteness is tested before the clamp, which would turn an infinity into a bound.
    """
    moved = target.held(x, moved)
    # Fast path on a CPU: a finite sum proves that all terms are finite. (A sum of finite terms may overflow, so an
    # infinite one proves nothing.)
    if moved.device.type == "cpu" and bool(moved.sum().isfinite()):
        return (moved if box is None else box.clamp(moved)), None
    finite = moved.isfinite().all(dim=1)
    return torch.where(finite[:, None], moved if box is None else box.clamp(moved), x), finite


# -- settings that vary by step or by chain -----------------------------------------------------------------------


def checked_coefficient(name: str, value: Any, *, positive: bool) -> float | Tensor:
    """Check a setting: a finite float, a (steps,) tensor or a (n_chains, 1) tensor. All values > 0, or >= 0.

    Raises:
        TypeError, ValueError: the message states the requirement and the value received.
    """
    requirement = f"{name} must be finite and {'> 0' if positive else '>= 0'}"
    # A 0-dim tensor stays a tensor on its device: a CUDA graph may read it there at each replay.
    value = value if isinstance(value, Tensor) else number_or_tensor(value)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.ndim > 2 or (value.ndim == 2 and value.shape[1] != 1):
            raise ValueError(
                f"{name} must be a float, a (steps,) tensor or a (n_chains, 1) tensor, got shape {tuple(value.shape)}"
            )
        if not readable(value.device):
            return value  # a compiled call checks it at run time (backends/op.py); a CUDA-graph capture can't
        # One reduction finds NaN, infinity and a wrong sign: NaN fails every comparison.
        good = torch.isfinite(value) & ((value > 0) if positive else (value >= 0))
        if not bool(good.all()):
            raise ValueError(f"{requirement}, got a tensor with {value[~good].flatten()[0].item()}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = ": a whole sampler is passed as rule=" if dataclasses.is_dataclass(value) else ""
        raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}{hint}")
    elif not ((value > 0 if positive else value >= 0) and value < float("inf")):
        raise ValueError(f"{requirement}, got {value}")
    checked: float | Tensor = value
    return checked


def value_at(value: float | Tensor, t: int, device: torch.device) -> float | Tensor:
    """The value of a setting at step t: a number, or a float64 tensor of shape () or (n_chains, 1)."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to(device, torch.float64)
    return value[t] if value.ndim == 1 else value


def for_chains(sampler: _Sampler, rows: Tensor | slice, n_chains: int) -> _Sampler:
    """The sampler for a subset of n_chains chains: only these rows of its (n_chains, 1) settings.

    Raises:
        ValueError: a setting has neither 1 nor n_chains rows. Indexing alone might not notice.
    """

    def part(name: str, value: Tensor) -> Tensor:
        if value.ndim < 2 or len(value) == 1:
            return value
        _check_rows(name, value, n_chains)
        return value[rows.to(value.device) if isinstance(rows, Tensor) else rows]

    return _replaced(sampler, part)


def for_steps(sampler: _Sampler, first: int, last: int) -> _Sampler:
    """The sampler for steps first to last - 1 of a call: only these entries of its schedules."""
    return _replaced(sampler, lambda name, value: value[first:last] if value.ndim == 1 else value)


def check_settings(sampler: Any, n_chains: int, steps: int) -> None:
    """Check that schedules have one entry per step and per-chain settings one row per chain (or 1).

    Raises:
        ValueError: a setting of another length.
    """

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
    """The sampler with ``function(name, tensor)`` in place of each scheduled setting that is a tensor."""
    changed = {}
    for name in sampler.scheduled:
        value = getattr(sampler, name)
        if isinstance(value, Tensor) and (new := function(name, value)) is not value:
            changed[name] = new
    return dataclasses.replace(sampler, **changed) if changed else sampler
