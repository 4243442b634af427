"""What a module's forward does, as a chain of known operations: read from its code, never from its values.

The forward of a user's class runs once on symbols (the proxies of torch.fx) in place of states. What runs is a copy
without weights, so nothing of the user's module changes, and no symbol stays in it.

Unlike ``torch.fx.symbolic_trace`` this patches no class while it runs, which would reach modules that other threads
call, and it makes no copy of layers: a fraction of a millisecond.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy

__all__ = [
    "Affine",
    "Flatten",
    "Named",
    "Operation",
    "Scale",
    "Squeeze",
    "Unknown",
    "check_hooks",
    "operations",
    "plain",
]


class Unknown(Exception):
    """Why a forward can't be read: the message names the operation, the hook or the module."""


class Named(NamedTuple):
    """An activation by its name in torch.nn.functional, with its arguments by name."""

    function: str
    options: Mapping[str, Any]


class Affine(NamedTuple):
    """x W^T + b of parameters that are no nn.Linear's."""

    weight: Tensor
    bias: Tensor | None


class Scale(NamedTuple):
    """Times a number."""

    factor: float


class Flatten(NamedTuple):
    """(batch, *shape) -> (batch, columns); -1: whatever they are."""

    columns: int = -1


class Squeeze(NamedTuple):
    """(batch, 1) -> (batch,)."""


class Operation(NamedTuple):
    """where: in words, for an error. what: a layer of the module itself, or one of the above."""

    where: str
    what: nn.Module | Named | Affine | Scale | Flatten | Squeeze


def plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """An instance of cls that runs cls' own forward: neither a subclass nor the instance has replaced it."""
    own: Any = type(module)
    return (
        isinstance(module, cls)
        and own.forward is cls.forward
        and own.__call__ is nn.Module.__call__
        and (cls is not nn.Sequential or own.__iter__ is nn.Sequential.__iter__)
        and "forward" not in module.__dict__
    )


def check_hooks(module: nn.Module, where: str) -> None:
    """Hooks may change what a module computes, or its gradient. An nn.Linear may have forward pre-hooks, which the
    older norms of weights are: mlp.py looks at them."""
    kinds = ["forward hook"] if module._forward_hooks else []
    kinds += ["forward pre-hook"] if module._forward_pre_hooks and not isinstance(module, nn.Linear) else []
    kinds += ["backward hook"] if module._backward_hooks or module._backward_pre_hooks else []
    if kinds:
        raise Unknown(f"{where} has a {kinds[0]}, which may change what it computes")


def operations(module: nn.Module) -> list[Operation]:
    """In the order of the forward pass, for x alone. The module is in eval mode.

    Raises:
        Unknown: there is an operation that is not known, a branch on values, or anything else that a chain of
            operations does not tell.
    """
    if not torch.compiler.is_compiling() and _has_any_global_hook():  # type: ignore[no-untyped-call]
        raise Unknown("a hook on all modules is registered, which may change what they compute")
    return list(_operations(module, ""))


def _operations(module: nn.Module, path: str) -> Iterator[Operation]:
    where = f"{path or 'the energy'} ({type(module).__name__})"
    check_hooks(module, where)
    if plain(module, nn.Sequential):
        # not named_children(), which leaves out the second use of a layer that appears twice
        for name, child in module._modules.items():
            if child is not None:
                yield from _operations(child, f"{path}.{name}" if path else name)
    elif _is_layer(module):
        yield Operation(where, module)
    elif torch.compiler.is_compiling():
        raise Unknown(f"the forward of {where} can't be read in a compiled call")
    else:
        yield from _traced(module, path, where)


def _is_layer(module: nn.Module) -> bool:
    """One of PyTorch's own, to be known by its type alone."""
    base = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return (
        base.__module__.startswith("torch.nn.modules.")
        and plain(module, base)
        and not module._modules.keys() - {"parametrizations"}
    )


# -- on symbols ----------------------------------------------------------------------------------------------------


def _traced(module: nn.Module, path: str, where: str) -> Iterator[Operation]:
    names = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
    for name, child in module.named_modules():
        if name:
            check_hooks(child, f"{_joined(path, name)} ({type(child).__name__})")
        if isinstance(child, torch.jit.ScriptModule):
            raise Unknown(f"{where} is made of TorchScript, whose code can't be read")
        if "forward" in child.__dict__:
            raise Unknown(f"{_joined(path, name) or where} has a forward of its own, set on the instance")
    graph, parameters = _graph(module, where)
    chain: Any = None
    sizes: set[fx.Node] = set()  # numbers of states in the batch, and what they are read from
    for node in graph.nodes:
        if node.op == "placeholder":
            chain = node
        elif node.op == "output":
            if node.args != (chain,):
                raise Unknown(f"the forward of {where} puts out something else than its last operation")
        elif _is_size(node, sizes):
            sizes.add(node)
        elif node.op != "get_attr":
            first = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node) and arg is chain]
            if len(first) != 1 or (node.op == "call_module" and (node.args != (chain,) or node.kwargs)):
                raise Unknown(f"the forward of {where} is no chain of operations: {_text(node)}")
            if node.op == "call_module":
                yield from _operations(names[str(node.target)], _joined(path, str(node.target)))
            else:
                what = _known(node, chain, sizes, parameters)
                if what is None:
                    raise Unknown(f"the forward of {where} does what no MLP does: {_text(node)}")
                yield Operation(f"{_text(node)} in {where}", what)
            chain = node
        others = [user for user in node.users if user not in sizes and not _is_size(user, sizes)]
        if node.op != "output" and node not in sizes and node.op != "get_attr" and len(others) > 1:
            raise Unknown(f"the forward of {where} is no chain of operations: {_text(node)} is used twice")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _text(node: fx.Node) -> str:
    if node.op == "placeholder":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name}()"


class _Tracer(GraphAppendingTracer):
    """Notes what is done to proxies. Weights are known by their names, all other tensors not at all."""

    def __init__(self) -> None:
        super().__init__(fx.Graph())
        self.names: dict[int, str] = {}  # of the copy's parameters, by identity
        self.autocast = _autocast()

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            if id(a) in self.names:
                return self.create_node("get_attr", self.names[id(a)], (), {})
            raise Unknown("it computes with a tensor that is no parameter")
        return super().create_arg(a)

    def create_node(self, *arguments: Any, **options: Any) -> fx.Node:
        # fx writes down operations alone, not the modes that they run in
        if not torch.is_grad_enabled():
            raise Unknown("it turns gradients off (torch.no_grad, or the like)")
        if _autocast() != self.autocast:
            raise Unknown("it changes torch.autocast")
        return super().create_node(*arguments, **options)


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _graph(module: nn.Module, where: str) -> tuple[fx.Graph, dict[str, Tensor]]:
    """What the forward does to x, and the module's own parameters by name."""
    tracer = _Tracer()
    try:
        copied = _copy(module, tracer)
        before, drawn = _state(copied), _random_state()
        with torch.inference_mode(False), torch.enable_grad():
            value = copied(tracer.create_proxy("placeholder", "x", (), {}))
            tracer.create_node("output", "output", (tracer.create_arg(value),), {})
    except Exception as error:  # whatever a user's code raises when it is given a symbol
        text = " ".join(str(error).split()) or type(error).__name__
        raise Unknown(f"the forward of {where} can't be read: {text[:200]}") from error
    if _state(copied) != before:
        raise Unknown(f"the forward of {where} changes the module")
    if _random_state() != drawn:
        raise Unknown(f"the forward of {where} draws random numbers")
    return tracer.graph, dict(module.named_parameters(remove_duplicate=False))


def _copy(module: nn.Module, tracer: _Tracer) -> nn.Module:
    """With tensors that hold nothing, and layers that note that they are called. All other objects are shared, as there
    is no telling how large they are."""
    empty: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise Unknown(f"{name} has no shape yet: call the module once")
        meta = torch.empty_like(parameter, device="meta")
        empty[id(parameter)] = meta = nn.Parameter(meta, requires_grad=parameter.requires_grad)
        tracer.names[id(meta)] = name
    for buffer in module.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    copies: dict[int, nn.Module] = {}
    for name, child in module.named_modules():
        # An instance of the same class, which a forward may go by, without a call of its __init__.
        cls: Any = type(child)
        copies[id(child)] = copied = cls.__new__(cls)
        copied.__dict__.update(child.__dict__)
        # What a forward may change in place is copied.
        own = {
            k: copy.copy(v) for k, v in child.__dict__.items() if k not in _HOOKS and isinstance(v, (dict, list, set))
        }
        copied.__dict__.update(own)
        for tensors in (copied._parameters, copied._buffers):
            tensors.update({key: None if v is None else empty[id(v)] for key, v in tensors.items()})
        if name and _is_layer(child):
            copied.__dict__.update(_forward_pre_hooks={}, forward=_noting(tracer, name))
    for copied in copies.values():
        copied._modules.update({key: None if m is None else copies[id(m)] for key, m in copied._modules.items()})
    return copies[id(module)]


def _noting(tracer: _Tracer, name: str) -> Callable[..., Any]:
    def forward(*arguments: Any, **options: Any) -> Any:
        return tracer.create_proxy("call_module", name, arguments, options)

    return forward


# Attributes that every module has; hooks were looked at before.
_HOOKS = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers", "_modules", "training"}


def _state(module: nn.Module) -> list[Any]:
    """What a forward may have set, by identity; of containers also what is in them."""

    def told(value: Any) -> Any:
        if isinstance(value, dict):
            return id(value), [(key, id(v)) for key, v in value.items()]
        return (id(value), list(map(id, value))) if isinstance(value, (list, set)) else id(value)

    return [[(name, told(v)) for name, v in m.__dict__.items() if name not in _HOOKS] for m in module.modules()]


def _random_state() -> tuple[Any, ...]:
    """Of the generators that a user's forward may draw from."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    words = numpy_state[1].tobytes(), torch.random.get_rng_state().numpy().tobytes()
    return random.getstate(), numpy_state[2:], *words


# -- known operations ----------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.silu: ("silu", ("inplace",)),
    F.relu: ("relu", ("inplace",)),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.elu: ("elu", ("alpha", "inplace")),
    F.softplus: ("softplus", ("beta", "threshold")),
    F.gelu: ("gelu", ("approximate",)),
    torch.tanh: ("tanh", ()),
    torch.tanh_: ("tanh", ()),
    torch.sigmoid: ("sigmoid", ()),
    torch.sigmoid_: ("sigmoid", ()),
    "relu": ("relu", ()),
    "relu_": ("relu", ()),
    "tanh": ("tanh", ()),
    "tanh_": ("tanh", ()),
    "sigmoid": ("sigmoid", ()),
    "sigmoid_": ("sigmoid", ()),
}

_NEGATIONS = (operator.neg, torch.neg, torch.negative, "neg", "negative")
_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")
_QUOTIENTS = (operator.truediv, torch.div, torch.true_divide, "div", "true_divide")
_RESHAPES = (torch.reshape, "view", "reshape")
_FLATTENS = (torch.flatten, "flatten")
_SQUEEZES = (torch.squeeze, "squeeze")
_WHOLE = slice(None)


def _is_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """x.shape, x.size(), and the number of states out of them: x.shape[0], x.size(0)."""
    args: Any = node.args
    if node.op == "call_function" and node.target is getattr:
        return bool(args[1:] == ("shape",))
    if node.op == "call_method" and node.target == "size":
        return args[1:] in ((), (0,)) and not node.kwargs
    if node.op == "call_function" and node.target is operator.getitem:
        return isinstance(args[0], fx.Node) and args[0] in sizes and args[1:] == (0,)
    return False


def _known(
    node: fx.Node, chain: fx.Node, sizes: set[fx.Node], parameters: Mapping[str, Tensor]
) -> Named | Affine | Scale | Flatten | Squeeze | None:
    """What a call of a function or method does to ``chain``; None: not known."""
    target: Any = node.target
    args: Any = node.args
    kwargs = node.kwargs
    if target is F.linear:
        return _affine(args, kwargs, chain, parameters)
    if target in _PRODUCTS and len(args) == 2 and not kwargs:
        other = args[1] if args[0] is chain else args[0]
        return Scale(float(other)) if _is_number(other) else None
    if not args or args[0] is not chain:
        return None
    rest = args[1:]
    if target in _ACTIVATIONS:
        name, names = _ACTIVATIONS[target]
        options = {**dict(zip(names, rest, strict=False)), **kwargs}
        known = len(rest) <= len(names) and options.keys() <= set(names)
        options.pop("inplace", None)
        return Named(name, options) if known else None
    if target is F.dropout:
        options = {**dict(zip(("p", "training", "inplace"), rest, strict=False)), **kwargs}
        return Scale(1.0) if options.get("training", True) is False else None
    if target in _NEGATIONS and not rest and not kwargs:
        return Scale(-1.0)
    if target in _QUOTIENTS and len(rest) == 1 and not kwargs:
        return Scale(1.0 / float(rest[0])) if _is_number(rest[0]) and rest[0] != 0 else None
    if target in _SQUEEZES and not rest and kwargs in ({}, {"dim": 1}, {"dim": -1}):
        return Squeeze()
    if target in _SQUEEZES and rest in ((1,), (-1,)) and not kwargs:
        return Squeeze()
    if target is operator.getitem and rest in (((_WHOLE, 0),), ((..., 0),)):
        return Squeeze()
    if target in _FLATTENS:
        first = (*rest, *kwargs.values())
        return Squeeze() if first in ((), (0,)) else Flatten() if first == (1,) else None
    if target in _RESHAPES and not kwargs:
        return _reshape(rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest, sizes)
    return None


def _reshape(shape: Any, sizes: set[fx.Node]) -> Flatten | Squeeze | None:
    if len(shape) == 1 and (shape[0] == -1 or shape[0] in sizes):
        return Squeeze()
    rows_are_states = len(shape) == 2 and (shape[0] in sizes or (shape[0] == -1 and shape[1] != -1))
    return Flatten(shape[1]) if rows_are_states and type(shape[1]) is int else None


def _affine(args: Any, kwargs: Any, chain: fx.Node, parameters: Mapping[str, Tensor]) -> Affine | None:
    values = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    weight, bias = values.get("weight"), values.get("bias")
    if values.get("input") is not chain or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return None
    return Affine(parameters[str(weight.target)], None if bias is None else parameters[str(bias.target)])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
