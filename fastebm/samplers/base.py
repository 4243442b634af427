"""The base class of samplers: frozen dataclasses of settings with the methods ``init`` and ``step``.

A sampler gets a target and the random numbers of its chains. The driver does the rest: it checks the input, holds
frozen coordinates, stops chains that are no longer finite, stores every thin-th state, adapts settings in a warm-up,
and uses a fused run of the same steps if there is one (backends/table.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise
from ..scalars import number_or_tensor, plain_number
from ..targets.base import View
from ..tracing import readable

__all__ = [
    "LAST",
    "RATIOS",
    "Adaptation",
    "Info",
    "Sampler",
    "both",
    "check_settings",
    "checked_coefficient",
    "checked_diagonal",
    "checked_fraction",
    "checked_sampler",
    "diagonal_at",
    "finite_rows",
    "for_chains",
    "for_steps",
    "once",
    "overwritten",
    "plus",
    "rows_of",
    "settled",
    "value_at",
    "where_rows",
]


class Info(NamedTuple):
    """What one step reports.

    finite: (n,) bool, False for chains that computed a non-finite state, tested before any clamp. For those chains the
    step returns the last finite state. None means that all chains were finite.
    averaged: returns telemetry by name, whose mean over the steps is reported: tensors with one row per chain, or
    numbers that hold for all chains.
    last: likewise, tensors of which each chain's last step is reported (``LAST``).
    Both are called only if the caller wants telemetry, and ``last`` only where a step may be a chain's last.
    acceptance: (n,) probability with which each proposal was accepted, for adaptation. None without an accept test.
    proposal: what the sampler's own adaptation needs besides, or None.
    """

    finite: Tensor | None
    averaged: Callable[[], Mapping[str, Tensor | float]] = dict
    last: Callable[[], Mapping[str, Tensor]] = dict
    acceptance: Tensor | None = None
    proposal: Any = None


# Telemetry of the last step. All other telemetry is averaged over the steps.
LAST = frozenset({"grad_norm"})

# Telemetry that counts in some steps only, and is 0 in the others. Its mean over all steps is divided by the mean of
# another one, the fraction of steps in which it counts.
RATIOS = {"swap_acceptance": "swaps"}


class Adaptation(Protocol):
    """Tunes settings of a sampler during the warm-up, from all chains together.

    sampler: the sampler with its current settings. After the last update, these are final.
    """

    sampler: Any

    def update(self, old: Any, new: Any, info: Info, active: Tensor | None) -> None:
        """Learn from one step of ``sampler``, from the state ``old`` to the state ``new``.

        active: (n,) bool, the chains that have not stopped. None: all.
        """
        ...


class Sampler:
    """Base class of samplers. A sampler is a frozen dataclass of settings with the methods ``init`` and ``step``.

    clamp is a field, (lo, hi) or None: pools put theirs in its place. ``__post_init__`` sets it to ``Box.of(clamp)``.
    A setting that may vary by step or by chain is a float, a (steps,) tensor or a (n_chains, 1) tensor: see
    ``checked_coefficient`` and ``value_at``. scheduled names these fields, and a field that holds another sampler.
    A state is a NamedTuple of tensors with one row per chain. It has the positions x, (n, dim), unless ``positions``
    computes them, and may have energy, (n,) E(x), and more. A call has parts (warm-up, progress, resumption), each of
    which starts with ``init`` at x. So ``init`` must compute each field from x (``recomputes`` names these), or get it
    as a keyword (``carries``).

    exact: whether each step leaves exp(-E) invariant, thanks to an accept test. Such a sampler rejects proposals
    outside the bounds. A sampler without the test projects them onto the bounds.
    reversible: whether each step also satisfies detailed balance for exp(-E).
    power: step_size is in units of the state to this power. None: there is no such setting.
    reports: names of the telemetry and their values after zero steps: a number, or a tensor of one chain's numbers. The
    names are fields of ``SampleInfo``.
    carries: names of the state's fields that persist between parts, such as a momentum.
    recomputes: names of the state's fields that ``init`` computes anew.
    coupled: whether chains interact, as particles do. Then all chains move together, and bits depend on the batch.
    rows_per_chain: number of states that the sampler evaluates per chain at once.
    """

    clamp: Bounds | None

    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = False
    power: ClassVar[int | None] = None
    scheduled: ClassVar[tuple[str, ...]] = ()
    reports: ClassVar[Mapping[str, float | Tensor]] = {}
    carries: ClassVar[tuple[str, ...]] = ()
    recomputes: ClassVar[tuple[str, ...]] = ("x", "energy", "gradient")
    coupled: ClassVar[bool] = False

    @property
    def box(self) -> Box | None:
        """The clamp as a ``Box``, or None."""
        return self.clamp  # type: ignore[return-value]  # __post_init__ made it a Box

    @property
    def rows_per_chain(self) -> int:
        """1, or the number of copies of each chain."""
        return 1

    @property
    def condition(self) -> float | None:
        """The condition that the sampler itself gives the energy besides x, such as a noise level.

        At this value energies are reported; ``View.at`` evaluates others. None: the caller's labels or condition.
        """
        return None

    def init(self, target: View, x: Tensor, noise: Noise) -> Any:
        """The state of chains that start at x: (n, dim). A sampler that carries fields takes them as keywords."""
        raise NotImplementedError

    def step(self, target: View, state: Any, noise: Noise, t: int) -> tuple[Any, Info]:
        """One transition of all chains, without side effects.

        t: index of the step in this part of the call, from 0. Schedules are cut to the part.
        """
        raise NotImplementedError

    def positions(self, target: View, state: Any) -> Tensor:
        """The positions of a state, (n, dim)."""
        x: Tensor = state.x
        return x

    def carried(self, target: View, state: Any) -> Mapping[str, Tensor]:
        """What persists between parts, by name."""
        return {name: getattr(state, name) for name in self.carries}

    def taken(self, carried: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The names of what ``init`` takes of this: none if another form of the sampler carried something else."""
        return self.carries if all(name in carried for name in self.carries) else ()

    def adaptation(self, steps: int) -> Adaptation | None:
        """What tunes this sampler in a warm-up of so many steps, or None."""
        return None


_Sampler = TypeVar("_Sampler", bound=Any)
_State = TypeVar("_State", bound=Any)
_Made = TypeVar("_Made")


def checked_sampler(sampler: object) -> Any:
    """Return the sampler unchanged, or raise a TypeError that names the likely mistake."""
    if isinstance(sampler, Sampler):
        return sampler
    hint = ""
    if callable(getattr(sampler, "step", None)) and not isinstance(sampler, type):
        hint = ": a sampler of your own is a frozen dataclass and a subclass of fastebm.samplers.base.Sampler"
    elif isinstance(sampler, type) or callable(sampler):
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
    finite = finite_rows(moved)
    moved = moved if box is None else box.clamp(moved)
    return (moved if finite is None else torch.where(finite[:, None], moved, x)), finite


def finite_rows(v: Tensor) -> Tensor | None:
    """A (n,) mask of the rows that are finite, or None if all are known to be. v: (n, dim)."""
    # Fast path on a CPU: a finite sum proves that all terms are finite. (A sum of finite terms may overflow, so an
    # infinite one proves nothing.)
    if v.device.type == "cpu" and math.isfinite(v.sum().item()):
        return None
    return v.isfinite().all(dim=1)


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a & b, where None means that all are True."""
    return b if a is None else a if b is None else a & b


def where_rows(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a at these rows, b at the others. rows: (n,) bool."""
    return torch.where(rows.view(-1, *[1] * (b.ndim - 1)), a, b)


def rows_of(rows: Tensor, a: _State, b: _State) -> _State:
    """The state with these rows of a, and the others of b. rows: (n,) bool."""
    chosen: _State = type(b)(*(where_rows(rows, v, w) for v, w in zip(a, b, strict=True)))
    return chosen


def overwritten(rows: Tensor, a: _State, b: _State) -> _State:
    """``rows_of`` in the memory of a, which the caller has just made. Faster if a has most rows."""
    others = (~rows).nonzero()[:, 0]
    for v, w in zip(a, b, strict=True):
        if v is not w:
            v.index_copy_(0, others, w.index_select(0, others))
    return a


def plus(x: Tensor, v: Tensor, c: float | Tensor, *, out: Tensor | None = None) -> Tensor:
    """x + c v in one pass. c: a number, or a tensor that broadcasts with x, (n_chains, dim)."""
    return torch.addcmul(x, v, c, out=out) if isinstance(c, Tensor) else torch.add(x, v, alpha=c, out=out)


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


def once(target: View, name: str, sampler: Sampler, make: Callable[[], _Made]) -> _Made:
    """make(), which depends on the settings of a sampler at a step: made once per call, unless one is a schedule."""
    return make() if _has_schedule(sampler) else target.once(name, sampler, make)


def _has_schedule(sampler: Sampler) -> bool:
    for name in sampler.scheduled:
        value = getattr(sampler, name)
        if _has_schedule(value) if isinstance(value, Sampler) else isinstance(value, Tensor) and value.ndim == 1:
            return True
    return False


def value_at(value: float | Tensor, t: int, device: torch.device) -> float | Tensor:
    """The value of a setting at step t: a number, or a float64 tensor of shape () or (n_chains, 1)."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to(device, torch.float64)
    return value[t] if value.ndim == 1 else value


def checked_diagonal(name: str, value: Any) -> float | Tensor | None:
    """Check a diagonal matrix: None, a number > 0, or a tensor of one state's shape with finite values > 0.

    Raises:
        TypeError, ValueError: the message states the requirement and the value received.
    """
    value = number_or_tensor(value)
    if value is None:
        return None
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        good = torch.isfinite(value) & (value > 0)
        if not bool(good.all()):
            raise ValueError(f"{name} must be finite and > 0, got a tensor with {value[~good].flatten()[0].item()}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be None, a number or a tensor of one state's shape, got {type(value).__name__}")
    elif not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    checked: float | Tensor = value
    return checked


def diagonal_at(name: str, value: float | Tensor | None, x: Tensor) -> float | Tensor:
    """A diagonal matrix for states x, (n, dim): a number, 1.0 for None, or a (dim,) tensor in x's dtype.

    Raises:
        ValueError: a tensor that has not one value per dim.
    """
    if not isinstance(value, Tensor):
        return 1.0 if value is None else value
    if value.numel() != x.shape[1]:
        raise ValueError(
            f"{name} must be a number or have one value for each of the {x.shape[1]} dims, got shape "
            f"{tuple(value.shape)}"
        )
    return value.detach().flatten().to(x.device, x.dtype)


def checked_fraction(name: str, value: Any) -> float | None:
    """Check a fraction in (0, 1), or None.

    Raises:
        TypeError, ValueError: the message states the requirement and the value received.
    """
    if value is None:
        return None
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1) or None, got {value!r}")
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")
    return float(value)


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
    changed: dict[str, Any] = {}
    for name in sampler.scheduled:
        value = new = getattr(sampler, name)
        if isinstance(value, Tensor):
            new = function(name, value)
        elif isinstance(value, Sampler):
            new = _replaced(value, function)
        if new is not value:
            changed[name] = new
    return dataclasses.replace(sampler, **changed) if changed else sampler
