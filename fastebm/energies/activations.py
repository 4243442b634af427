"""Activations by name: each with its forward and backward as ``out=`` kernels of PyTorch, one pass over memory each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation"]

_aten = torch.ops.aten


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
