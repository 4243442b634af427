"""Any module as a target: flat states in, energies or autograd's gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from ..energies.base import values_of
from ..energies.conditions import unwrapped

__all__ = ["Autograd", "Energy"]


def _gradient(value: Tensor, x: Tensor) -> Tensor | None:
    """Of the sum of value; None if that does not depend on x."""
    ones = torch.ones_like(value)  # in place of a sum, and of its gradient
    if value.is_cpu and x.is_cpu and type(value) is Tensor and (engine := _engine()) is not None:
        return engine(value, x, ones)
    return torch.autograd.grad(value, x, ones, allow_unused=True)[0]


@cache
def _engine() -> Callable[[Tensor, Tensor, Tensor], Tensor | None] | None:
    """What ``torch.autograd.grad`` calls in the end. Its own Python before that, for arguments of many kinds, is a good
    part of a small energy's gradient. None where PyTorch has another: it is not public."""

    def gradient(value: Tensor, x: Tensor, ones: Tensor) -> Tensor | None:
        found = torch.autograd.Variable._execution_engine.run_backward(
            (value,), (ones,), False, False, (x,), allow_unreachable=True, accumulate_grad=False
        )
        return found[0]

    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(2, device="cpu", requires_grad=True)
            grad = gradient(3 * x, x, torch.ones(2, device="cpu"))
    except (AttributeError, TypeError, RuntimeError):
        return None
    return gradient if grad is not None and grad.tolist() == [3, 3] else None


class Energy:
    """A module as the samplers see it: flat states in, energies or their gradients out, no trace left behind.

    The module is given copies, never memory that the library or the caller keeps: it may write to what it gets.

    Args:
        module: maps (batch, *shape), and a condition if it takes one, to (batch,) or (batch, 1).
        shape: shape of one state; its product is dim.
        dtype: of the states. A module of another floating dtype is computed in this one, through
            torch.func.functional_call, so that a float64 start is float64 end to end.
        kind: of its condition, "labels" or "condition".
    """

    def __init__(self, module: nn.Module, shape: Sequence[int], dtype: torch.dtype, kind: str = "labels") -> None:
        # Gradients of a DistributedDataParallel are for training alone: its forward waits for other processes.
        is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        self.module = module = unwrapped(module) if is_ddp else module
        self.shape, self.kind = tuple(shape), kind
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        cast = any(t.is_floating_point() and t.dtype != dtype for t in tensors.values())
        self._params = (
            {k: t.detach().to(dtype) if t.is_floating_point() else t for k, t in tensors.items()} if cast else None
        )
        self._worked = False

    def __call__(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(n, dim) -> (n,) of x's dtype, without a graph."""
        if len(x) == 0:
            return x.new_empty(0)
        with torch.no_grad():
            return self._evaluated(x, condition).reshape(len(x)).to(x.dtype)

    def gradient(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """dE/dx of each chain: (n, dim). The gradient of the sum, so no chain's is divided by their number."""
        if len(x) == 0:
            return x
        with self.differentiating():
            # an inference tensor can be no leaf
            x = x.clone() if x.is_inference() else x.detach()
            return self.pulled_back(x.requires_grad_(), condition)

    def value_and_gradient(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both, by one forward pass: (n,) of x's dtype, and (n, dim)."""
        if len(x) == 0:
            return x.new_empty(0), x
        with self.differentiating():
            x = x.clone() if x.is_inference() else x.detach()
            value, gradient = self._both(x.requires_grad_(), condition)
            return value.detach().reshape(len(x)).to(x.dtype), gradient

    @staticmethod
    @contextmanager
    def differentiating() -> Iterator[None]:
        """Within, graphs are made: sampling inside torch.inference_mode or no_grad still needs those of the energy."""
        with torch.inference_mode(False), torch.enable_grad():
            yield

    def pulled_back(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``gradient`` of a leaf that requires grad, within ``differentiating``: for loops, which enter that once."""
        return self._both(x, condition)[1]

    def _both(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        value = self._evaluated(x, condition)
        if value.requires_grad and (grad := _gradient(value, x)) is not None:
            return value, grad
        raise ValueError(
            "the energy does not depend on x through differentiable operations "
            "(is there a detach(), an item(), torch.no_grad() or a torch.tensor(...) of its values in its forward?)"
        )

    def _evaluated(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """What the module does not take is told in words the first time, before any chain has moved."""
        given = x.clone()
        # No view that is not needed: each costs as much as the smallest operations of an energy do.
        given = given if len(self.shape) == 1 else given.reshape(len(x), *self.shape)
        try:
            value = values_of(
                self.module, given, self._params, None if condition is None else condition.clone(), self.kind
            )
        except (RuntimeError, TypeError, IndexError) as error:
            if self._worked or isinstance(error, torch.OutOfMemoryError):
                raise
            shape = ", ".join(str(size) for size in self.shape)
            beside = "" if condition is None else f" with {self.kind} {tuple(condition.shape)}"
            why = str(error)
            if "numpy()" in why:  # PyTorch says to detach, which loses the gradient
                why = "it turns them into NumPy's arrays, which have no gradient: compute it by operations of PyTorch"
            raise ValueError(f"the energy does not take states of shape (n_chains, {shape}){beside}: {why}") from error
        self._worked = True
        return value


class Autograd:
    """A module as a ``Target`` (base.py): an ``Energy`` with the condition of its chains."""

    def __init__(self, energy: Energy, condition: Tensor | None = None) -> None:
        self.energy, self.condition = energy, condition

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self.energy(x, self.condition)

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        return self.energy.gradient(x, self.condition)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.energy.value_and_gradient(x, self.condition)
