"""The flat description of an MLP, read once out of any nn.Module that is one.

    z_1 = x W_1^T + b_1,   z_{l+1} = act_l(z_l) W_{l+1}^T + b_{l+1},   f(x) = z_{L+1}

    head "scalar":     E(x) = f(x), one output
    head "logsumexp":  E(x) = -log sum_c exp f(x)_c: a classifier as an energy (JEM, Grathwohl et al. 2020)
    head "class":      E(x) = -f(x)_y, one label y per chain

Backends see this description only, so a new way to build an MLP is read here, in one place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..energies.activations import ACTIVATIONS, Activation
from ..tracing import operator
from .forward import Activated, Affine, Flatten, NotAnMLP, Operation, Scale, Squeeze, operations, plain

__all__ = [
    "MLP",
    "NotAnMLP",
    "check_affine",
    "effective_weight",
    "evaluating",
    "read_mlp",
    "reading",
]


@dataclass(frozen=True, eq=False)
class MLP:
    """An MLP and its head: "scalar", "logsumexp" or "class".

    weights: L+1 tensors (out, in), as in nn.Linear; the last is the head's, (1 or classes, width).
    biases: L+1 tensors (out,) or None.
    activations: L of them, one after each hidden layer; L >= 1.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[Activation, ...]
    head: str = "scalar"

    @property
    def dim(self) -> int:
        return self.weights[0].shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden widths, from the input up."""
        return tuple(w.shape[0] for w in self.weights[:-1])

    def to(self, device: torch.device, dtype: torch.dtype) -> MLP:
        return self._mapped(lambda v: v.to(device, dtype))

    def detached(self) -> MLP:
        return self._mapped(Tensor.detach)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> MLP:
        return MLP(
            tuple(map(function, self.weights)),
            tuple(None if b is None else function(b) for b in self.biases),
            self.activations,
            self.head,
        )

    def output(self, x: Tensor) -> Tensor:
        """f(x): (batch, dim) -> (batch, 1 or classes), without a graph."""
        with torch.no_grad():
            for weight, bias, activation in zip(self.weights[:-1], self.biases[:-1], self.activations, strict=True):
                z = nn.functional.linear(x, weight, bias)
                x = activation.forward(z, torch.empty_like(z))
            return nn.functional.linear(x, self.weights[-1], self.biases[-1])


# Modules in eval mode for now: how many uses are under way, and the mode to go back to after the last.
_at_rest: dict[nn.Module, tuple[int, bool]] = {}
_at_rest_lock = threading.Lock()


class _Mine(threading.local):
    """Modules in eval mode by uses of this thread, all of which end after what begins now."""

    modules: frozenset[nn.Module] = frozenset()


_mine = _Mine()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode (dropout off, spectral norm's power iteration at rest), then each submodule's own mode again.

    Uses may nest, and overlap in several threads; within, nobody else sets modes or adds modules.
    """
    before = _mine.modules
    if module in before:
        yield
        return
    modules = list(module.modules())
    with _at_rest_lock:
        for m in modules:
            uses, mode = _at_rest.get(m, (0, m.training))
            _at_rest[m] = (uses + 1, mode)
            if m.training:  # a module's attribute is slow to set
                m.training = False
    _mine.modules = before.union(modules)
    try:
        yield
    finally:
        _mine.modules = before
        with _at_rest_lock:
            for m in modules:
                uses, mode = _at_rest.pop(m)
                if uses > 1:
                    _at_rest[m] = (uses - 1, mode)
                elif m.training is not mode:
                    m.training = mode


@contextmanager
def reading(module: nn.Module) -> Iterator[None]:
    """In eval mode and without a graph. A compiler needs neither: it runs no module, and operators make no graph."""
    if torch.compiler.is_compiling():
        yield
        return
    with evaluating(module), torch.no_grad():
        yield


def read_mlp(module: nn.Module, head: str = "scalar", *, bare: bool = False) -> MLP:
    """Read an MLP with a head out of a module, in eval mode and without touching it.

    bare: the parameters themselves, not detached, for a caller that makes no graph: no operation is dispatched then,
    unless the output is scaled.

    Accepted: nn.Linear and a supported activation in turn, with or without bias, spectral norm, weight norm and
    dropout, ending in a Linear (with one output for a scalar head). They may stand in an nn.Sequential (nested too),
    or be called one after another by the forward of any class, as modules or as functions; with a flatten before, and
    a squeeze, a minus sign or a factor after them. What is accepted is read from types and code (forward.py), never
    from values.

    Raises:
        NotAnMLP: naming the layer that does not fit.
    """
    with reading(module):
        mlp = _assemble(operations(module), head)
    # torch 2.13 can't compile a detach under torch.inference_mode; operators let no gradient through anyway
    return mlp if bare or torch.compiler.is_compiling() else mlp.detached()


def _read_activation(what: nn.Module | Activated) -> Activation | None:
    if isinstance(what, Activated):
        if not all(isinstance(value, (int, float, str)) for value in what.options.values()):
            return None
        return _read_activation(what.layer(**what.options))
    for name, rule in ACTIVATIONS.items():
        if plain(what, rule.layer) and (parameter := rule.read(what)) is not None:
            return Activation(name, parameter)
    return None


def _assemble(operations: list[Operation], head: str) -> MLP:
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    activations: list[Activation] = []
    columns, factor, squeezed = -1, 1.0, False  # columns: of the last operation's output; -1: not known
    for where, what in operations:
        after_linear = len(weights) > len(activations)
        if isinstance(what, Flatten) or (isinstance(what, nn.Flatten) and (what.start_dim, what.end_dim) == (1, -1)):
            width = what.columns if isinstance(what, Flatten) else -1
            if squeezed or (weights and (isinstance(what, nn.Flatten) or width not in (-1, columns))):
                raise NotAnMLP(f"{where} is neither nn.Linear nor a supported activation")
            columns = width if not weights else columns
        elif isinstance(what, Squeeze):
            if not after_linear or columns != 1 or squeezed:
                raise NotAnMLP(f"{where} does not follow a Linear layer with one output")
            squeezed = True
        elif isinstance(what, Scale):
            if what.factor != 1.0 and not after_linear:
                raise NotAnMLP(f"{where} does not follow a Linear layer")
            factor *= what.factor
            if not 1e-12 < abs(factor) < 1e12:  # weights times it would round otherwise than outputs do
                raise NotAnMLP(f"{where} makes a factor of {factor:g}")
        elif isinstance(what, nn.Module) and (plain(what, nn.Dropout) or plain(what, nn.Identity)):
            pass
        elif squeezed or factor != 1.0:
            raise NotAnMLP(f"{where} follows the output")
        elif isinstance(what, Affine) or (isinstance(what, nn.Linear) and plain(what, nn.Linear)):
            if after_linear:
                activations.append(Activation("identity"))
            weights.append(what.weight if isinstance(what, Affine) else effective_weight(where, what))
            biases.append(what.bias)
            check_affine(where, weights[-1], biases[-1])
            if columns not in (-1, weights[-1].shape[1]):
                raise NotAnMLP(f"{where} takes {weights[-1].shape[1]} columns, and gets {columns}")
            columns = len(weights[-1])
        elif (activation := _read_activation(what)) is not None:
            if not after_linear:
                raise NotAnMLP(f"{where} does not follow a Linear layer")
            activations.append(activation)
        else:
            raise NotAnMLP(f"{where} is neither nn.Linear nor a supported activation ({', '.join(ACTIVATIONS)})")
    if len(weights) < 2:
        raise NotAnMLP("it has no hidden layer: an MLP energy is Linear, activation, ..., Linear")
    if len(activations) == len(weights):
        raise NotAnMLP(f"it ends in an activation ({activations[-1].name}), not in a Linear layer")
    if head == "scalar" and columns != 1:
        raise NotAnMLP(f"its last Linear has {columns} outputs, not one")
    if head != "scalar" and squeezed:
        raise NotAnMLP("a classifier that puts out one logit is no MLP with a head")
    if factor != 1.0:
        bias = biases[-1]
        weights[-1], biases[-1] = weights[-1] * factor, None if bias is None else bias * factor
    return MLP(tuple(weights), tuple(biases), tuple(activations), head)


def effective_weight(name: str, layer: nn.Linear) -> Tensor:
    """The weight that the forward pass would use, under parametrizations and under the older hook-based norms."""
    hooks = list(layer._forward_pre_hooks.values())
    norm = hooks[0] if len(hooks) == 1 and isinstance(hooks[0], (SpectralNorm, WeightNorm)) else None
    if hooks and (norm is None or norm.name != "weight"):
        raise NotAnMLP(f"{name} has a forward pre-hook, which may change what it computes")
    if torch.compiler.is_compiling():
        return _traced_weight(name, layer, norm)
    if isinstance(norm, SpectralNorm):
        return norm.compute_weight(layer, do_power_iteration=False).detach()
    if isinstance(norm, WeightNorm):
        return norm.compute_weight(layer).detach()  # type: ignore[no-any-return]
    for key in ("weight", "bias"):
        if isinstance(getattr(type(layer), key, None), property) and not is_parametrized(layer, key):
            raise NotAnMLP(f"{name} has a {key} that its class computes")
    for of_tensor in layer.parametrizations.values() if is_parametrized(layer) else ():  # type: ignore[operator]
        for rule in of_tensor:  # of any other kind a forward may do anything
            if type(rule).__module__ != parametrizations.__name__:
                raise NotAnMLP(f"{name} has a parametrization that is none of PyTorch's ({type(rule).__name__})")
    return layer.weight


def check_affine(where: str, weight: Tensor, bias: Tensor | None) -> None:
    """Kernels read both as plain numbers in memory: (out, in) and (out,)."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        raise NotAnMLP(f"{where} has weight and bias of shapes {shapes}, not (out, in) and (out,)")
    for value in (weight, bias) if not torch.compiler.is_compiling() else ():
        if value is not None and (type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided):
            raise NotAnMLP(f"{where} has weights of a kind of their own ({type(value).__name__}, {value.layout})")


@operator("normalised_weight", "(Tensor weight, Tensor u, Tensor? v, int dim) -> Tensor")
def _normalised_weight(weight: Tensor, u: Tensor, v: Tensor | None, dim: int) -> Tensor:
    """A weight under spectral norm at rest (u, v: the singular vectors), or weight norm (u: the lengths, v: None)."""
    if v is None:
        return torch._weight_norm(weight, u, dim)
    matrix = weight.movedim(dim, 0).flatten(1)
    return weight / torch.vdot(u, torch.mv(matrix, v))


def _traced_weight(name: str, layer: nn.Linear, hook: SpectralNorm | WeightNorm | None) -> Tensor:
    """``effective_weight`` in a compiled call, which must never trace the training mode's power iteration."""
    if isinstance(hook, SpectralNorm):
        return _normalised_weight(layer.weight_orig, layer.weight_u, layer.weight_v, hook.dim)  # type: ignore[no-any-return]
    if isinstance(hook, WeightNorm):
        return _normalised_weight(layer.weight_v, layer.weight_g, None, hook.dim)  # type: ignore[no-any-return]
    if is_parametrized(layer, "bias"):
        raise NotAnMLP(f"{name} has a parametrized bias, which can't be compiled in whole")
    if not is_parametrized(layer, "weight"):
        return layer.weight
    of_weight: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    norm = of_weight[0]
    if len(of_weight) == 1 and isinstance(norm, _SpectralNorm):
        return _normalised_weight(of_weight.original, norm._u, norm._v, norm.dim)  # type: ignore[no-any-return]
    if len(of_weight) == 1 and isinstance(norm, _WeightNorm):
        return _normalised_weight(of_weight.original1, of_weight.original0, None, norm.dim)  # type: ignore[no-any-return]
    raise NotAnMLP(f"{name} has a parametrization that can't be compiled in whole ({type(norm).__name__})")
