"""Any module as a target: energies and autograd's gradients of flat states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from ..energies.base import values_of
from ..energies.conditions import unwrapped

__all__ = ["NO_GRADIENT", "Autograd", "Energy"]

NO_GRADIENT = (
    "the energy does not depend on x through differentiable operations "
    "(is there a detach(), an item(), torch.no_grad() or a torch.tensor(...) of its values in its forward?)"
)


def _gradient(value: Tensor, x: Tensor, twice: bool) -> Tensor | None:
    """The gradient of value.sum() with respect to x; None if value does not depend on x.

    twice: with a graph, to be differentiated again.
    """
    ones = torch.ones_like(value)  # the same gradient, without computing the sum
    if twice:
        return torch.autograd.grad(value, x, ones, create_graph=True, allow_unused=True)[0]
    if value.is_cpu and x.is_cpu and type(value) is Tensor and (engine := _engine()) is not None:
        return engine(value, x, ones)
    return torch.autograd.grad(value, x, ones, allow_unused=True)[0]


@contextmanager
def _out_of_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


@cache
def _engine() -> Callable[[Tensor, Tensor, Tensor], Tensor | None] | None:
    """The autograd engine that ``torch.autograd.grad`` calls, or None if this PyTorch has a different one.

    Calling it directly skips Python code for general arguments, which takes much of the time of a small energy's
    gradient. It is not a public interface, so it is tested here first.
    """

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
    """A module as a function of flat states: energies, and gradients that leave no ``.grad`` on its parameters.

    The module receives copies of states and conditions, so it may write to its inputs.

    Args:
        module: maps (batch, *shape), and a condition if it takes one, to (batch,) or (batch, 1).
        shape: shape of one state; its product is dim.
        dtype: dtype of the states. A module of another floating dtype is evaluated in this one by
            torch.func.functional_call, so that a float64 start is computed in float64 throughout.
        kind: the keyword of the module's condition, "labels" or "condition".
    """

    def __init__(self, module: nn.Module, shape: Sequence[int], dtype: torch.dtype, kind: str = "labels") -> None:
        # Sampling bypasses DistributedDataParallel, whose forward waits for the other processes.
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
        """E(x), (n,) in x's dtype, without an autograd graph. x: (n, dim)."""
        if len(x) == 0:
            return x.new_empty(0)
        with torch.no_grad():
            return self._evaluated(x, condition).reshape(len(x)).to(x.dtype)

    def gradient(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """dE/dx of each chain's own energy, (n, dim): the gradient of the sum over chains, not of the mean."""
        if len(x) == 0:
            return x
        with self.differentiating():
            # An inference tensor can't require grad, so clone it.
            x = x.clone() if x.is_inference() else x.detach()
            return self.pulled_back(x.requires_grad_(), condition)

    def value_and_gradient(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E(x), (n,) in x's dtype, and dE/dx, (n, dim), from one forward pass."""
        if len(x) == 0:
            return x.new_empty(0), x
        with self.differentiating():
            x = x.clone() if x.is_inference() else x.detach()
            value, gradient = self._both(x.requires_grad_(), condition)
            return value.detach().reshape(len(x)).to(x.dtype), gradient

    @staticmethod
    def differentiating() -> AbstractContextManager[None]:
        """Enable autograd, also inside the caller's torch.inference_mode or torch.no_grad.

        A loop of many gradients enters it once, because entering takes as long as an operation on a few numbers.
        """
        return _out_of_inference_mode() if torch.is_inference_mode_enabled() else torch.enable_grad()

    def pulled_back(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``gradient`` for loops that enter ``differentiating`` once themselves. x: a leaf that requires grad."""
        return self._both(x, condition)[1]

    def gradient_and_trace(
        self, x: Tensor, condition: Tensor | None = None, probes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """dE/dx, (n, dim), and the trace of each chain's Hessian, (n,).

        probes: (k, n, dim) vectors v of covariance I: the trace is estimated by the mean of v^T H v (Hutchinson 1989),
        for k backward passes. None: it is exact, for one backward pass per dim.
        """
        if len(x) == 0:
            return x, x.new_empty(0)
        with self.differentiating():
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            gradient = self._both(x, condition, twice=True)[1]

            if not gradient.requires_grad:  # E is linear in x
                return gradient, x.new_zeros(len(x))
            vectors = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None] if probes is None else probes
            traces = [
                (torch.autograd.grad((gradient * v).sum(), x, retain_graph=True)[0] * v).sum(dim=1) for v in vectors
            ]
            trace = torch.stack(traces).sum(dim=0) / (1 if probes is None else len(probes))
            return gradient.detach(), trace.detach()

    def _both(self, x: Tensor, condition: Tensor | None, *, twice: bool = False) -> tuple[Tensor, Tensor]:
        """twice: the gradient has a graph, to be differentiated again."""
        value = self._evaluated(x, condition)
        if value.requires_grad and (grad := _gradient(value, x, twice)) is not None:
            return value, grad
        raise ValueError(NO_GRADIENT)

    def _evaluated(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The module's output. If its first call fails, before any chain has moved, the error explains the input."""
        states = x.clone()
        # Reshape only if needed: a view costs as much as the smallest operations of an energy.
        states = states if len(self.shape) == 1 else states.reshape(len(x), *self.shape)
        try:
            value = values_of(
                self.module, states, self._params, None if condition is None else condition.clone(), self.kind
            )
        except (RuntimeError, TypeError, IndexError) as error:
            if self._worked or isinstance(error, torch.OutOfMemoryError):
                raise
            shape = ", ".join(str(size) for size in self.shape)
            beside = "" if condition is None else f" with {self.kind} {tuple(condition.shape)}"
            why = str(error)
            if "numpy()" in why:  # PyTorch's message suggests detach(), which would lose the gradient
                why = "it turns them into NumPy's arrays, which have no gradient: compute it by operations of PyTorch"
            raise ValueError(f"the energy does not take states of shape (n_chains, {shape}){beside}: {why}") from error
        self._worked = True
        return value


class Autograd:
    """A ``Target`` (base.py) for any module: an ``Energy`` together with the condition of its chains."""

    def __init__(self, energy: Energy, condition: Tensor | None = None) -> None:
        self.energy, self.condition = energy, condition

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self.energy(x, self.condition)

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        return self.energy.gradient(x, self.condition)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx."""
        return self.energy.value_and_gradient(x, self.condition)

    def repeated(self, k: int) -> Autograd:
        """The energy of k copies of each chain."""
        condition = self.condition
        return Autograd(self.energy, None if condition is None else condition.repeat_interleave(k, dim=0))

    def at(self, condition: Tensor) -> Autograd:
        """The energy at another condition."""
        return Autograd(self.energy, condition)
