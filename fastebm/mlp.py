"""The flat description of an MLP, read once out of any nn.Module that is one.

    z_1 = x W_1^T + b_1,   z_{l+1} = act_l(z_l) W_{l+1}^T + b_{l+1},   f(x) = z_{L+1}

    head "scalar":     E(x) = f(x), one output
    head "logsumexp":  E(x) = -log sum_c exp f(x)_c: a classifier as an energy (JEM, Grathwohl et al. 2020)
    head "class":      E(x) = -f(x)_y, a label y a chain

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
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .tracing import operator, readable

__all__ = ["ACTIVATIONS", "MLP", "Activation", "NotAnMLP", "evaluating", "read_mlp", "reading"]

_aten = torch.ops.aten


class NotAnMLP(Exception):
    """Why a module is not an MLP energy that fastebm can read: the message names the layer."""


@dataclass(frozen=True)
class Activation:
    """An activation by name, with its parameter (LeakyReLU's slope, ELU's alpha, softplus' beta; 0 for the others)."""

    name: str
    parameter: float = 0.0

    def forward(self, z: Tensor, out: Tensor) -> Tensor:
        """out = act(z)."""
        return ACTIVATIONS[self.name].forward(z, self.parameter, out)

    def backward(self, grad: Tensor, z: Tensor, out: Tensor) -> Tensor:
        """out = grad * act'(z)."""
        return ACTIVATIONS[self.name].backward(grad, z, self.parameter, out)


@dataclass(frozen=True)
class _Rule:
    """forward, backward: out= kernels of PyTorch, one pass each. module: makes the layer from its parameter.

    layer, read: the class of that layer, and its parameter; None from ``read`` means that it has other options.
    """

    forward: Callable[[Tensor, float, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, float, Tensor], Tensor]
    module: Callable[[float], nn.Module]
    layer: type[nn.Module]
    read: Callable[[Any], float | None] = lambda layer: 0.0
    default: float = 0.0


# The backward kernels of tanh and sigmoid want act(z): one scratch tensor, which only these two need.
ACTIVATIONS: dict[str, _Rule] = {
    "silu": _Rule(
        lambda z, p, out: _aten.silu.out(z, out=out),
        lambda g, z, p, out: _aten.silu_backward.grad_input(g, z, grad_input=out),
        lambda p: nn.SiLU(),
        nn.SiLU,
    ),
    "relu": _Rule(
        lambda z, p, out: torch.clamp_min(z, 0.0, out=out),
        lambda g, z, p, out: _aten.threshold_backward.grad_input(g, z, 0.0, grad_input=out),
        lambda p: nn.ReLU(),
        nn.ReLU,
    ),
    "leaky_relu": _Rule(
        lambda z, p, out: _aten.leaky_relu.out(z, p, out=out),
        lambda g, z, p, out: _aten.leaky_relu_backward.grad_input(g, z, p, False, grad_input=out),
        lambda p: nn.LeakyReLU(p),
        nn.LeakyReLU,
        lambda layer: float(layer.negative_slope),
        0.01,
    ),
    "elu": _Rule(
        lambda z, p, out: _aten.elu.out(z, p, out=out),
        lambda g, z, p, out: _aten.elu_backward.grad_input(g, p, 1.0, 1.0, False, z, grad_input=out),
        lambda p: nn.ELU(p),
        nn.ELU,
        lambda layer: float(layer.alpha),
        1.0,
    ),
    "softplus": _Rule(
        lambda z, p, out: _aten.softplus.out(z, p, 20.0, out=out),
        lambda g, z, p, out: _aten.softplus_backward.grad_input(g, z, p, 20.0, grad_input=out),
        lambda p: nn.Softplus(p),
        nn.Softplus,
        lambda layer: float(layer.beta) if layer.threshold == 20 else None,
        1.0,
    ),
    "gelu": _Rule(
        lambda z, p, out: _aten.gelu.out(z, approximate="none", out=out),
        lambda g, z, p, out: _aten.gelu_backward.grad_input(g, z, approximate="none", grad_input=out),
        lambda p: nn.GELU(),
        nn.GELU,
        lambda layer: 0.0 if layer.approximate == "none" else None,
    ),
    "gelu_tanh": _Rule(
        lambda z, p, out: _aten.gelu.out(z, approximate="tanh", out=out),
        lambda g, z, p, out: _aten.gelu_backward.grad_input(g, z, approximate="tanh", grad_input=out),
        lambda p: nn.GELU("tanh"),
        nn.GELU,
        lambda layer: 0.0 if layer.approximate == "tanh" else None,
    ),
    "tanh": _Rule(
        lambda z, p, out: torch.tanh(z, out=out),
        lambda g, z, p, out: _aten.tanh_backward.grad_input(g, torch.tanh(z), grad_input=out),
        lambda p: nn.Tanh(),
        nn.Tanh,
    ),
    "sigmoid": _Rule(
        lambda z, p, out: torch.sigmoid(z, out=out),
        lambda g, z, p, out: _aten.sigmoid_backward.grad_input(g, torch.sigmoid(z), grad_input=out),
        lambda p: nn.Sigmoid(),
        nn.Sigmoid,
    ),
    "identity": _Rule(
        lambda z, p, out: out.copy_(z),
        lambda g, z, p, out: out.copy_(g),
        lambda p: nn.Identity(),
        nn.Identity,
    ),
}


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

    bare: the parameters themselves, not detached, for a caller that makes no graph: no operation is dispatched then.

    Accepted: nn.Sequential (nested too, or a module whose only child is one and whose forward only calls
    it) of nn.Linear and a supported activation in turn, with or without bias, spectral norm, weight norm
    and dropout, ending in a Linear (with one output for a scalar head); a leading nn.Flatten.

    Raises:
        NotAnMLP: naming the layer that does not fit.
    """
    with reading(module):
        mlp = _assemble(list(_layers(module, "")), head)
        if not _is_plain(module, nn.Sequential):
            _check_forward(module, mlp)
    # torch 2.13 can't compile a detach under torch.inference_mode; operators let no gradient through anyway
    return mlp if bare or torch.compiler.is_compiling() else mlp.detached()


def _is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """An instance of cls (parametrized or not) that runs cls' own forward."""
    return isinstance(module, cls) and type(module).forward is cls.forward


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Leaf layers in the order of the forward pass, with their names."""
    here = f"{path or 'the energy'} ({type(module).__name__})"
    hooked = module._forward_hooks or (module._forward_pre_hooks and not isinstance(module, nn.Linear))
    if hooked:
        raise NotAnMLP(f"{here} has a forward hook, which may change what it computes")
    # not named_children(), which leaves out the second use of a layer that appears twice
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if _is_plain(module, nn.Sequential):
        for name, child in children:
            yield from _layers(child, f"{path}.{name}" if path else name)
    elif isinstance(module, nn.Linear) or not children:
        yield here, module
    elif len(children) == 1:
        name, child = children[0]
        yield from _layers(child, f"{path}.{name}" if path else name)
    else:
        names = ", ".join(name for name, _ in children)
        raise NotAnMLP(f"{here} is not a plain nn.Sequential but has several parts: {names}")


def _read_activation(module: nn.Module) -> Activation | None:
    for name, rule in ACTIVATIONS.items():
        if _is_plain(module, rule.layer) and (parameter := rule.read(module)) is not None:
            return Activation(name, parameter)
    return None


def _assemble(layers: list[tuple[str, nn.Module]], head: str) -> MLP:
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    activations: list[Activation] = []
    for i, (name, layer) in enumerate(layers):
        if _is_plain(layer, nn.Dropout) or _is_plain(layer, nn.Identity):
            continue
        if i == 0 and isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            continue
        if isinstance(layer, nn.Linear) and _is_plain(layer, nn.Linear):
            if len(weights) > len(activations):
                activations.append(Activation("identity"))
            weights.append(_effective_weight(name, layer))
            biases.append(layer.bias)
        elif (activation := _read_activation(layer)) is not None:
            if len(activations) == len(weights):
                raise NotAnMLP(f"{name} does not follow a Linear layer")
            activations.append(activation)
        else:
            known = ", ".join(ACTIVATIONS)
            raise NotAnMLP(f"{name} is neither nn.Linear nor a supported activation ({known})")
    if len(weights) < 2:
        raise NotAnMLP("it has no hidden layer: an MLP energy is Linear, activation, ..., Linear")
    if len(activations) == len(weights):
        raise NotAnMLP(f"it ends in an activation ({activations[-1].name}), not in a Linear layer")
    if head == "scalar" and weights[-1].shape[0] != 1:
        raise NotAnMLP(f"its last Linear has {weights[-1].shape[0]} outputs, not one")
    return MLP(tuple(weights), tuple(biases), tuple(activations), head)


def _effective_weight(name: str, layer: nn.Linear) -> Tensor:
    """The weight that the forward pass would use, under parametrizations and under the older hook-based norms."""
    if torch.compiler.is_compiling():
        return _traced_weight(name, layer)
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook.compute_weight(layer, do_power_iteration=False).detach()
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(layer).detach()  # type: ignore[no-any-return]
        raise NotAnMLP(f"{name} has a forward pre-hook, which may change what it computes")
    return layer.weight


@operator("normalised_weight", "(Tensor weight, Tensor u, Tensor? v, int dim) -> Tensor")
def _normalised_weight(weight: Tensor, u: Tensor, v: Tensor | None, dim: int) -> Tensor:
    """A weight under spectral norm at rest (u, v: the singular vectors), or weight norm (u: the lengths, v: None)."""
    if v is None:
        return torch._weight_norm(weight, u, dim)
    matrix = weight.movedim(dim, 0).flatten(1)
    return weight / torch.vdot(u, torch.mv(matrix, v))


def _traced_weight(name: str, layer: nn.Linear) -> Tensor:
    """``_effective_weight`` in a compiled call, which must never trace the training mode's power iteration."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return _normalised_weight(layer.weight_orig, layer.weight_u, layer.weight_v, hook.dim)  # type: ignore[no-any-return]
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return _normalised_weight(layer.weight_v, layer.weight_g, None, hook.dim)  # type: ignore[no-any-return]
        raise NotAnMLP(f"{name} has a forward pre-hook, which may change what it computes")
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


def _check_forward(module: nn.Module, mlp: MLP) -> None:
    """A wrapper's forward is code that can't be read: hold what it computes against what its layers say."""
    weight = mlp.weights[0]
    if not readable(weight.device):
        raise NotAnMLP(f"the forward of {type(module).__name__} can't be compared with its layers now")
    probe = torch.linspace(-1.0, 1.0, 3 * mlp.dim, dtype=weight.dtype, device=weight.device).reshape(3, mlp.dim)
    probe = probe * probe.new_tensor([[1.0], [30.0], [1000.0]])  # a wrapper may clamp what it is given
    try:
        value = module(probe)
    except Exception as error:
        raise NotAnMLP(
            f"the forward of {type(module).__name__} does not take a (batch, {mlp.dim}) tensor: {error}"
        ) from error
    expected = mlp.output(probe)
    # The layers run the same operations on the same weights, so only rounding may differ.
    tolerance = max(1e-5, torch.finfo(weight.dtype).eps) * expected.abs().clamp_min(1.0)
    same = value.numel() == expected.numel() and (value.reshape(expected.shape) - expected).abs() <= tolerance
    if not bool(torch.as_tensor(same).all()):
        raise NotAnMLP(f"the forward of {type(module).__name__} computes something else than its layers in turn")
