"""The operations that the forward of an MLP may consist of, and how they look in a ``torch.fx`` graph.

``forward.py`` turns a module into a list of these; ``mlp.py`` assembles the list into weights, biases and activations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

__all__ = [
    "ActivationCall",
    "Affine",
    "Flatten",
    "NotAnMLP",
    "Operation",
    "Scale",
    "Squeeze",
    "is_batch_size",
    "is_shape",
    "recognised",
]


class NotAnMLP(Exception):
    """Why fastebm can't read a module as an MLP energy: the message names the layer, operation or hook."""


class ActivationCall(NamedTuple):
    """An activation called as a function, as the equivalent layer class and its keyword arguments."""

    layer: Callable[..., nn.Module]
    options: Mapping[str, Any]


class Affine(NamedTuple):
    """x W^T + b with parameters that do not belong to an nn.Linear."""

    weight: Tensor
    bias: Tensor | None


class Scale(NamedTuple):
    """Multiplication by a number."""

    factor: float


class Flatten(NamedTuple):
    """(batch, *shape) -> (batch, columns); columns is -1 if the code does not state the number."""

    columns: int = -1


class Squeeze(NamedTuple):
    """(batch, 1) -> (batch,)."""


class Operation(NamedTuple):
    """One step of a forward pass.

    where: a description for error messages. op: one of the module's own layers, or one of the classes above.
    """

    where: str
    op: nn.Module | ActivationCall | Affine | Scale | Flatten | Squeeze


# Function or name of the tensor method -> layer class, and the names of its positional options.
_ACTIVATIONS: dict[Any, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    F.silu: (nn.SiLU, ("inplace",)),
    F.relu: (nn.ReLU, ("inplace",)),
    torch.relu: (nn.ReLU, ()),
    torch.relu_: (nn.ReLU, ()),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.elu: (nn.ELU, ("alpha", "inplace")),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    F.gelu: (nn.GELU, ("approximate",)),
    torch.tanh: (nn.Tanh, ()),
    torch.tanh_: (nn.Tanh, ()),
    torch.sigmoid: (nn.Sigmoid, ()),
    torch.sigmoid_: (nn.Sigmoid, ()),
    "relu": (nn.ReLU, ()),
    "relu_": (nn.ReLU, ()),
    "tanh": (nn.Tanh, ()),
    "tanh_": (nn.Tanh, ()),
    "sigmoid": (nn.Sigmoid, ()),
    "sigmoid_": (nn.Sigmoid, ()),
}

_NEGATIONS = (operator.neg, torch.neg, torch.negative, "neg", "negative")
_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")
_QUOTIENTS = (operator.truediv, torch.div, torch.true_divide, "div", "true_divide")
_RESHAPES = (torch.reshape, "view", "reshape")
_FLATTENS = (torch.flatten, "flatten")
_SQUEEZES = (torch.squeeze, "squeeze")


def is_shape(node: fx.Node) -> bool:
    """Whether the node is x.shape or x.size()."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1:] == ("shape",)
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs


def is_batch_size(node: fx.Node, shapes: set[fx.Node]) -> bool:
    """Whether the node is x.shape[0] or x.size(0). Every known operation keeps the batch dimension, so any
    intermediate result will do for x."""
    if node.op == "call_method" and node.target == "size":
        return (node.args[1:], dict(node.kwargs)) in (((0,), {}), ((), {"dim": 0}))
    of_shape = node.op == "call_function" and node.target is operator.getitem and node.args[0] in shapes
    return of_shape and type(node.args[1]) is int and node.args[1] == 0


def recognised(
    node: fx.Node, chain: fx.Node, batch_sizes: set[fx.Node], parameters: Mapping[str, Tensor]
) -> ActivationCall | Affine | Scale | Flatten | Squeeze | None:
    """The operation that a call of a function or method applies to ``chain``, or None if it is not a known one."""
    target: Any = node.target
    args: Any = node.args
    kwargs: Any = dict(node.kwargs)
    if target is F.linear:
        return _affine(args, kwargs, chain, parameters)
    if target in _PRODUCTS and len(args) == 2 and not kwargs:
        return _scale(args[1] if args[0] is chain else args[0])
    if not args or args[0] is not chain:
        return None
    rest = args[1:]
    if target in _ACTIVATIONS:
        layer, names = _ACTIVATIONS[target]
        options = {**dict(zip(names, rest, strict=False)), **kwargs}
        known = len(rest) <= len(names) and options.keys() <= set(names)
        options.pop("inplace", None)
        return ActivationCall(layer, options) if known else None
    if target is F.dropout:
        options = {**dict(zip(("p", "training", "inplace"), rest, strict=False)), **kwargs}
        return Scale(1.0) if options.get("training", True) is False else None
    if target in _NEGATIONS and not rest and not kwargs:
        return Scale(-1.0)
    if target == "contiguous" and not rest and not kwargs:
        return Scale(1.0)
    if target in _QUOTIENTS and len(rest) == 1 and not kwargs:
        return _scale(rest[0], inverse=True)
    return _reshaped(target, rest, kwargs, batch_sizes)


def _scale(factor: object, *, inverse: bool = False) -> Scale | None:
    """None if the factor is not a number, or so large or small that scaling the weights could overflow."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1e-12 < abs(factor) < 1e12:
        return None
    return Scale(1.0 / factor if inverse else float(factor))


def _reshaped(target: Any, rest: Any, kwargs: Any, batch_sizes: set[fx.Node]) -> Flatten | Squeeze | None:
    """The part of ``recognised`` for operations that change the shape only. rest: arguments after the tensor."""
    if target in _SQUEEZES:
        dims = kwargs if not rest else {"dim": rest[0]} if len(rest) == 1 and not kwargs else None
        return Squeeze() if dims in ({}, {"dim": 1}, {"dim": -1}) else None
    if target is operator.getitem:
        column = rest[0][1] if isinstance(rest[0], tuple) and len(rest[0]) == 2 else None
        return Squeeze() if type(column) is int and column == 0 and rest[0][0] in (slice(None), ...) else None
    if target in _FLATTENS:
        dims = kwargs if not rest else {"start_dim": rest[0]} if len(rest) == 1 and not kwargs else None
        return Squeeze() if dims in ({}, {"start_dim": 0}) else Flatten() if dims == {"start_dim": 1} else None
    if target in _RESHAPES and not kwargs:
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        if len(shape) == 1 and (shape[0] == -1 or shape[0] in batch_sizes):
            return Squeeze()
        rows_are_states = len(shape) == 2 and (shape[0] in batch_sizes or (shape[0] == -1 and shape[1] != -1))
        return Flatten(shape[1]) if rows_are_states and type(shape[1]) is int else None
    return None


def _affine(args: Any, kwargs: Any, chain: fx.Node, parameters: Mapping[str, Tensor]) -> Affine | None:
    values = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    weight, bias = values.get("weight"), values.get("bias")
    if values.get("input") is not chain or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return None
    return Affine(parameters[str(weight.target)], None if bias is None else parameters[str(bias.target)])
