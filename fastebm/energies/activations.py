"""The supported activations, with their forward and backward as ``out=`` kernels of PyTorch.

Each kernel is one pass over memory: the CPU path on PyTorch calls them on buffers that it reuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation", "ActivationKind", "activation_layer"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation with its parameter: LeakyReLU's slope, ELU's alpha, softplus' beta; 0 for the others."""

    name: str
    parameter: float = 0.0

    def forward(self, z: Tensor, out: Tensor) -> Tensor:
        """out = act(z)."""
        return ACTIVATIONS[self.name].forward(z, self.parameter, out)

    def backward(self, grad: Tensor, z: Tensor, out: Tensor) -> Tensor:
        """out = grad * act'(z)."""
        return ACTIVATIONS[self.name].backward(grad, z, self.parameter, out)


@dataclass(frozen=True)
class ActivationKind:
    """What fastebm knows of one activation.

    forward, backward: out= kernels of PyTorch.
    module: makes the layer from its parameter.
    layer: the class of that layer.
    parameter_of: the parameter of such a layer, or None if the layer has options that are not supported.
    default: the parameter if none is given.
    """

    forward: Callable[[Tensor, float, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, float, Tensor], Tensor]
    module: Callable[[float], nn.Module]
    layer: type[nn.Module]
    parameter_of: Callable[[Any], float | None] = lambda layer: 0.0
    default: float = 0.0


# The backward kernels of tanh and sigmoid take act(z), not z: only these two allocate a temporary.
ACTIVATIONS: dict[str, ActivationKind] = {
    "silu": ActivationKind(
        lambda z, p, out: _aten.silu.out(z, out=out),
        lambda g, z, p, out: _aten.silu_backward.grad_input(g, z, grad_input=out),
        lambda p: nn.SiLU(),
        nn.SiLU,
    ),
    "relu": ActivationKind(
        lambda z, p, out: torch.clamp_min(z, 0.0, out=out),
        lambda g, z, p, out: _aten.threshold_backward.grad_input(g, z, 0.0, grad_input=out),
        lambda p: nn.ReLU(),
        nn.ReLU,
    ),
    "leaky_relu": ActivationKind(
        lambda z, p, out: _aten.leaky_relu.out(z, p, out=out),
        lambda g, z, p, out: _aten.leaky_relu_backward.grad_input(g, z, p, False, grad_input=out),
        lambda p: nn.LeakyReLU(p),
        nn.LeakyReLU,
        lambda layer: float(layer.negative_slope),
        0.01,
    ),
    "elu": ActivationKind(
        lambda z, p, out: _aten.elu.out(z, p, out=out),
        lambda g, z, p, out: _aten.elu_backward.grad_input(g, p, 1.0, 1.0, False, z, grad_input=out),
        lambda p: nn.ELU(p),
        nn.ELU,
        lambda layer: float(layer.alpha),
        1.0,
    ),
    "softplus": ActivationKind(
        lambda z, p, out: _aten.softplus.out(z, p, 20.0, out=out),
        lambda g, z, p, out: _aten.softplus_backward.grad_input(g, z, p, 20.0, grad_input=out),
        lambda p: nn.Softplus(p),
        nn.Softplus,
        lambda layer: float(layer.beta) if layer.threshold == 20 else None,
        1.0,
    ),
    "gelu": ActivationKind(
        lambda z, p, out: _aten.gelu.out(z, approximate="none", out=out),
        lambda g, z, p, out: _aten.gelu_backward.grad_input(g, z, approximate="none", grad_input=out),
        lambda p: nn.GELU(),
        nn.GELU,
        lambda layer: 0.0 if layer.approximate == "none" else None,
    ),
    "gelu_tanh": ActivationKind(
        lambda z, p, out: _aten.gelu.out(z, approximate="tanh", out=out),
        lambda g, z, p, out: _aten.gelu_backward.grad_input(g, z, approximate="tanh", grad_input=out),
        lambda p: nn.GELU("tanh"),
        nn.GELU,
        lambda layer: 0.0 if layer.approximate == "tanh" else None,
    ),
    "tanh": ActivationKind(
        lambda z, p, out: torch.tanh(z, out=out),
        lambda g, z, p, out: _aten.tanh_backward.grad_input(g, torch.tanh(z), grad_input=out),
        lambda p: nn.Tanh(),
        nn.Tanh,
    ),
    "sigmoid": ActivationKind(
        lambda z, p, out: torch.sigmoid(z, out=out),
        lambda g, z, p, out: _aten.sigmoid_backward.grad_input(g, torch.sigmoid(z), grad_input=out),
        lambda p: nn.Sigmoid(),
        nn.Sigmoid,
    ),
    "identity": ActivationKind(
        lambda z, p, out: out.copy_(z),
        lambda g, z, p, out: out.copy_(g),
        lambda p: nn.Identity(),
        nn.Identity,
    ),
}


def activation_layer(activation: str | Activation) -> nn.Module:
    """The layer of an activation: by its name, with the default parameter, or an ``Activation``.

    Raises:
        ValueError: an unknown name.
    """
    name = activation if isinstance(activation, str) else activation.name
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    kind = ACTIVATIONS[name]
    return kind.module(kind.default if isinstance(activation, str) else activation.parameter)
