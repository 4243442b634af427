"""The interface of an energy to samplers: values and gradients of flat states, for one device, dtype and condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..box import Box

__all__ = ["Conditional", "Target", "View"]

_T = TypeVar("_T")


class Target(Protocol):
    """The energy E of flat states x, (n, dim), of one set of chains and their conditions.

    Results are new tensors without an autograd graph, so a sampler may keep them.
    """

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        ...

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx of each chain's own energy, (n, dim)."""
        ...

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx, from one forward pass where possible."""
        ...

    def repeated(self, k: int) -> Target:
        """The energy of k copies of each chain: row i k + r of x is copy r of chain i."""
        ...


class Conditional(Target, Protocol):
    """A target whose condition can be replaced."""

    def at(self, condition: Tensor) -> Target:
        """The energy at another condition, (n, ...)."""
        ...


@dataclass(frozen=True, eq=False)
class View:
    """A target as a sampler sees it: with bounds, and with frozen coordinates held.

    box: bounds on the states' device and in their dtype, infinite at frozen coordinates; or None.
    frozen: (1 or n, dim) bool, True at coordinates that stay and whose gradient is set to 0; or None.
    condition: (n, ...) the labels or condition of the chains; or None.
    """

    target: Target
    box: Box | None = None
    frozen: Tensor | None = None
    condition: Tensor | None = None
    _copies: dict[int, View] = field(default_factory=dict, init=False, repr=False)
    # What ``once`` has made, by owner. Views of other energies, made by ``replace``, share it.
    _made: WeakKeyDictionary[object, dict[str, Any]] = field(default_factory=WeakKeyDictionary, repr=False)

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self.target.value(x)

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim); 0 at frozen coordinates."""
        return self._masked(self.target.gradient(x))

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x), and dE/dx with 0 at frozen coordinates."""
        value, gradient = self.target.value_and_gradient(x)
        return value, self._masked(gradient)

    def repeated(self, k: int) -> View:
        """The view of k copies of each chain: row i k + r of x is copy r of chain i. Made once, for all steps."""
        if k not in self._copies:
            box, frozen, condition = (
                None if self.box is None else Box(*(_repeated(bound, k) for bound in self.box)),
                None if self.frozen is None else _repeated(self.frozen, k),
                None if self.condition is None else self.condition.repeat_interleave(k, dim=0),
            )
            self._copies[k] = View(self.target.repeated(k), box, frozen, condition)
        return self._copies[k]

    def once(self, name: str, owner: object, make: Callable[[], _T]) -> _T:
        """make(), which is the same in all steps of a call because it depends on ``owner`` alone, such as a sampler.

        It is kept until the call ends, or the owner does: in a warm-up each step has another sampler.
        """
        made = self._made.setdefault(owner, {})
        if name not in made:
            made[name] = make()
        found: _T = made[name]
        return found

    def at(self, number: float) -> View:
        """The view of the energy at this condition for all chains. For a sampler with a ``condition`` of its own."""
        assert self.condition is not None  # the driver set it, so the target is autograd's
        condition = torch.full_like(self.condition, number)
        return replace(self, target=cast(Conditional, self.target).at(condition), condition=condition)

    def held(self, x: Tensor, moved: Tensor) -> Tensor:
        """``moved`` with the frozen coordinates of x.

        Zero gradient and zero noise are not enough: with an infinite step size they give infinity times 0, NaN.
        """
        return moved if self.frozen is None else torch.where(self.frozen, x, moved)

    def _masked(self, gradient: Tensor) -> Tensor:
        return gradient if self.frozen is None else gradient.masked_fill(self.frozen, 0.0)


def _repeated(value: Any, k: int) -> Any:
    """Repeat each row of a (n, dim) tensor. Numbers and tensors that broadcast over chains stay."""
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) == 1:
        return value
    return value.repeat_interleave(k, dim=0)
