"""What a module's forward does, as a chain of known operations: read from its code, never from its values.

The forward of a user's class runs on symbols (the proxies of torch.fx) in place of states. What runs is a copy without
weights, whose attributes are copies or can't change, so the user's module stays as it is. It runs twice: a forward that
does something else the second time is refused, as is one that computes with any real tensor, asks a symbol for
a value, or may tell symbols from tensors. (What a forward does to objects outside of its module, global variables say,
it does here too.)

Unlike ``torch.fx.symbolic_trace`` this patches no class while it runs, which would reach modules that other threads
call, and it makes no copy of layers.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from logging import Logger
from types import (
    BuiltinFunctionType,
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ..energies.functions import FunctionModule, enclosed, is_library, name_of_forward

__all__ = [
    "Activated",
    "Affine",
    "Flatten",
    "NotAnMLP",
    "Operation",
    "Scale",
    "Squeeze",
    "check_hooks",
    "operations",
    "plain",
]


class NotAnMLP(Exception):
    """Why a module is not an MLP energy that fastebm can read: the message names the layer, operation or hook."""


class Activated(NamedTuple):
    """A function with its options by name, as the layer that calls it takes them too."""

    layer: Callable[..., nn.Module]
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
    what: nn.Module | Activated | Affine | Scale | Flatten | Squeeze


def plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """An instance of cls that runs cls' own forward: neither a subclass nor the instance has replaced it."""
    own: Any = type(module)
    return (
        isinstance(module, cls)
        and own.forward is cls.forward
        and own.__call__ is nn.Module.__call__
        and own._call_impl is nn.Module._call_impl
        and own.__getattr__ is nn.Module.__getattr__
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
        raise NotAnMLP(f"{where} has a {kinds[0]}, which may change what it computes")


def operations(module: nn.Module) -> list[Operation]:
    """In the order of the forward pass, for x alone. The module is in eval mode.

    Raises:
        NotAnMLP: there is an operation that is not known, a branch on values, or anything else that a chain of
            operations does not tell.
    """
    if not torch.compiler.is_compiling() and _has_any_global_hook():  # type: ignore[no-untyped-call]
        raise NotAnMLP("a hook on all modules is registered, which may change what they compute")
    try:
        return list(_operations(module, ""))
    except NotAnMLP:
        raise
    except (
        Exception
    ) as error:  # attributes that can't be copied, containers in themselves: a user's objects may be anything
        raise NotAnMLP(f"it can't be read: {type(error).__name__}: {error}") from error


def _operations(module: nn.Module, path: str) -> Iterator[Operation]:
    where = f"{path or 'the energy'} ({type(module).__name__})"
    if isinstance(module, FunctionModule):
        raise NotAnMLP(f"{path or 'the energy'} is the function {name_of_forward(module)}, and only modules are read")
    check_hooks(module, where)
    if plain(module, nn.Sequential):
        # not named_children(), which leaves out the second use of a layer that appears twice
        for name, child in module._modules.items():
            if child is not None:
                yield from _operations(child, f"{path}.{name}" if path else name)
    elif _is_layer(module):
        yield Operation(where, module)
    elif torch.compiler.is_compiling():
        raise NotAnMLP(f"the forward of {where} can't be read in a compiled call")
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
        here = f"{_joined(path, name)} ({type(child).__name__})" if name else where
        if name:
            check_hooks(child, here)
        if isinstance(child, torch.jit.ScriptModule):
            raise NotAnMLP(f"{here} is made of TorchScript, whose code can't be read")
        if "forward" in child.__dict__:
            raise NotAnMLP(f"{here} has a forward of its own, set on the instance")
        if hasattr(type(child), "__del__"):
            raise NotAnMLP(f"{here} has a __del__, which a copy of it would run")
    _check_code(module, where)
    graph = _graph(module, where)
    if _listed(_graph(module, where)) != _listed(graph):
        raise NotAnMLP(f"the forward of {where} does something else each time")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    chain: Any = None
    shapes: set[fx.Node] = set()  # of the states
    counts: set[fx.Node] = set()  # numbers of states in the batch
    for node in graph.nodes:
        if node.op == "placeholder":
            chain = node
        elif node.op == "output":
            if node.args != (chain,):
                raise NotAnMLP(f"the forward of {where} puts out something else than its last operation")
        elif _is_shape(node):
            shapes.add(node)
        elif _is_count(node, shapes):
            counts.add(node)
        elif node.op != "get_attr":
            first = [arg for arg in (*node.args, *node.kwargs.values()) if arg is chain]
            if len(first) != 1 or (node.op == "call_module" and (node.args != (chain,) or node.kwargs)):
                raise NotAnMLP(f"the forward of {where} is no chain of operations: {_text(node)}")
            if node.op == "call_module":
                yield from _operations(names[str(node.target)], _joined(path, str(node.target)))
            else:
                what = _known(node, chain, counts, parameters)
                if what is None:
                    raise NotAnMLP(f"the forward of {where} does what no MLP does: {_text(node)}")
                yield Operation(f"{_text(node)} in {where}", what)
            chain = node
        if node is chain and sum(not (_is_shape(user) or _is_count(user, shapes)) for user in node.users) > 1:
            raise NotAnMLP(f"the forward of {where} is no chain of operations: {_text(node)} is used twice")


def _check_code(module: nn.Module, where: str) -> None:
    """Symbols are no tensors, what an autograd.Function does to them can't be seen, and a global generator would be
    moved: code that may do such things is not run at all."""
    methods: dict[str, list[Any]] = {}  # of all classes, by name, and functions that are attributes
    for m in module.modules():
        classes = [cls for cls in type(m).__mro__ if not is_library(cls.__module__)]
        for name, value in itertools.chain(m.__dict__.items(), *(vars(cls).items() for cls in classes)):
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(value, FunctionType):
                methods.setdefault(name, []).append(value)
    todo = [function for name in ("forward", "__call__", "__getattr__") for function in methods.get(name, ())]
    seen: set[Any] = set()
    while todo:
        function = todo.pop()
        if function in seen or is_library(function.__module__):
            continue
        seen.add(function)
        names = _names_in(function.__code__)
        if "apply" in names:
            raise NotAnMLP(f"the forward of {where} may call an autograd.Function ({function.__qualname__})")
        if "is_tensor" in names or names >= {"isinstance", "Tensor"}:
            raise NotAnMLP(f"the forward of {where} may ask whether something is a tensor ({function.__qualname__})")
        used = [function.__globals__.get(name) for name in names]
        used += enclosed(function)
        modules = [v for v in used if isinstance(v, ModuleType) and not is_library(v.__name__)]
        used += [vars(v).get(name) for v in modules for name in names]
        todo += [value for value in used if isinstance(value, FunctionType)]
        todo += [method for name in names for method in methods.get(name, ())]
        owners = [v.__self__ for v in used if isinstance(v, (MethodType, BuiltinMethodType))]
        if any(isinstance(v, type) and issubclass(v, torch.autograd.Function) for v in owners):
            raise NotAnMLP(f"the forward of {where} may call an autograd.Function ({function.__qualname__})")
        if "random" in names or any(isinstance(v, _GENERATORS) for v in (*used, *owners)):
            raise NotAnMLP(f"the forward of {where} may draw random numbers ({function.__qualname__})")


_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator)


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> frozenset[str]:
    inner = [_names_in(const) for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(code.co_names).union(*inner)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _text(node: fx.Node) -> str:
    if node.op == "placeholder":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name}()"


def _listed(graph: fx.Graph) -> list[Any]:
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


def _refusing(name: str) -> Any:
    def refuse(self: Any, *_: Any) -> Any:
        self.tracer.refuse(f"it needs values, by {name}")

    return refuse


class _NoValue:
    """What can't be told of a symbol. Noted, so that a forward that catches the error is not read on."""

    __len__ = _refusing("len()")
    __bool__ = _refusing("a branch")
    __float__ = _refusing("float()")
    __int__ = _refusing("int()")
    __index__ = _refusing("an index")
    __complex__ = _refusing("complex()")
    __contains__ = _refusing("in")
    __array__ = _refusing("NumPy")
    __array_priority__ = 1000  # before NumPy's numbers, in products


class _Member(_NoValue, fx.proxy.Attribute):
    """A method of a tensor, or its shape."""


class _Symbol(_NoValue, fx.Proxy):
    """In place of a tensor, with no more attributes than one has."""

    def __getattr__(self, name: str) -> Any:
        member = getattr(Tensor, name)  # an AttributeError for what tensors do not have
        if name != "shape" and not callable(member):
            tracer: Any = self.tracer
            tracer.refuse(f"it asks for the {name} of a tensor")
        return _Member(self, name)


class _Tracer(GraphAppendingTracer):
    """Notes what is done to symbols. Weights are known by their names, all other tensors not at all.

    refused: why the forward can't be read, or None.
    """

    def __init__(self) -> None:
        super().__init__(fx.Graph())
        self.names: dict[int, str] = {}  # of the copy's parameters, by identity
        self.autocast = _autocast()
        self.refused: str | None = None

    def refuse(self, why: str) -> Any:
        self.refused = self.refused or why
        raise NotAnMLP(why)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            if id(a) in self.names:
                return self.create_node("get_attr", self.names[id(a)], (), {})
            self.refuse("it computes with a tensor that is no parameter")
        return super().create_arg(a)

    def create_node(self, *arguments: Any, **options: Any) -> fx.Node:
        # fx writes down operations alone, not the modes that they run in
        if not torch.is_grad_enabled():
            self.refuse("it turns gradients off (torch.no_grad, or the like)")
        if _autocast() != self.autocast:
            self.refuse("it changes torch.autocast")
        return super().create_node(*arguments, **options)

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse("it needs values, by a loop")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse("it takes its input for a dict")


class _NoTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses all operations on tensors, before they run: a forward that is read has none."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tracer.refuse(f"it computes with other tensors than its input ({func})")


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _graph(module: nn.Module, where: str) -> fx.Graph:
    """What the forward does to x."""
    tracer = _Tracer()
    copied = _copy(module, where, tracer)
    before = _state(copied)
    classes = {type(m): dict(vars(type(m))) for m in copied.modules() if not type(m).__module__.startswith("torch.")}
    try:
        with torch.inference_mode(False), torch.enable_grad(), _NoTensors(tracer):
            value = copied(tracer.create_proxy("placeholder", "x", (), {}))
            tracer.create_node("output", "output", (tracer.create_arg(value),), {})
    except Exception as error:  # whatever a user's code raises when it is given a symbol
        text = tracer.refused or " ".join(str(error).split()) or type(error).__name__
        raise NotAnMLP(f"the forward of {where} can't be read: {text[:200]}") from error
    finally:
        changed = [_restored(cls, members) for cls, members in classes.items()]
    if tracer.refused is not None:
        raise NotAnMLP(f"the forward of {where} can't be read: {tracer.refused}")
    if _state(copied) != before or any(changed):
        raise NotAnMLP(f"the forward of {where} changes the module")
    return tracer.graph


def _restored(cls: type, members: dict[str, Any]) -> bool:
    """Put a class' attributes back. Returns whether they had changed."""
    now = dict(vars(cls))
    changed = [name for name in now.keys() | members.keys() if now.get(name) is not members.get(name)]
    for name in changed:
        if name in members:
            setattr(cls, name, members[name])
        else:
            delattr(cls, name)
    return bool(changed)


def _copy(module: nn.Module, where: str, tracer: _Tracer) -> nn.Module:
    """With tensors that hold nothing, and layers that note that they are called."""
    empty: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise NotAnMLP(f"{name} of {where} has no shape yet: call the module once")
        meta = torch.empty_like(parameter, device="meta")
        empty[id(parameter)] = meta = nn.Parameter(meta, requires_grad=parameter.requires_grad)
        tracer.names[id(meta)] = name
    for buffer in module.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    # Instances of the same classes, which a forward may go by, without a call of their __init__.
    copies: dict[int, Any] = {id(m): type(m).__new__(type(m)) for m in module.modules()}
    for name, child in module.named_modules():
        copied, is_layer = copies[id(child)], bool(name) and _is_layer(child)
        copied.__dict__.update(child.__dict__)
        for key, value in child.__dict__.items():
            if key == "_modules":
                copied.__dict__[key] = {k: None if m is None else copies[id(m)] for k, m in value.items()}
            elif key in ("_parameters", "_buffers"):
                copied.__dict__[key] = {k: None if v is None else empty[id(v)] for k, v in value.items()}
            elif key not in _OF_ALL and not is_layer:
                copied.__dict__[key] = _apart(value, copies, f"the attribute {key} of {name or where}")
        copied.__dict__["_compiled_call_impl"] = None
        if is_layer:
            copied.__dict__.update(_forward_pre_hooks={}, forward=_noting(tracer, name, copied))
    return copies[id(module)]  # type: ignore[no-any-return]


# What every module has: hooks were looked at before.
_OF_ALL = frozenset(nn.Module().__dict__) - {"training"}

# Objects that a forward can't change, and holders of settings, whose attributes are copied.
_CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), type, type(...), slice, range, Enum, torch.dtype, torch.device,
    torch.Size, np.generic, np.dtype, FunctionType, BuiltinFunctionType, Logger, Tensor, nn.Parameter,
)  # fmt: skip

_CONTAINERS = (dict, list, tuple, set, frozenset)

# A copy of more would take longer than the call.
_MOST = 1000


def _apart(value: Any, copies: Mapping[int, Any], where: str) -> Any:
    """An attribute for a copy: what a forward may change in place is copied, and what else it may change refused."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, _CONSTANTS) or (callable(value) and type(value).__module__.startswith("torch")):
        return value
    if isinstance(value, _CONTAINERS) and len(value) <= _MOST:
        new: Any = copy.copy(value)
        if isinstance(value, dict):
            new.update({k: _apart(v, copies, where) for k, v in value.items()})
            return new
        parts = [_apart(v, copies, where) for v in value]
        if isinstance(value, list):
            new[:] = parts
        return tuple(parts) if type(value) is tuple else new
    if isinstance(value, functools.partial):
        return functools.partial(*_apart((value.func, *value.args), copies, where), **value.keywords)
    if _is_holder(value):
        new = copy.copy(value)
        new.__dict__.update({k: _apart(v, copies, where) for k, v in vars(value).items()})
        return new
    size = f" of {len(value)}" if isinstance(value, _CONTAINERS) else ""
    raise NotAnMLP(f"{where} is a {type(value).__name__}{size}, which its forward may change")


def _is_holder(value: object) -> bool:
    return isinstance(value, (Namespace, SimpleNamespace)) or (is_dataclass(value) and hasattr(value, "__dict__"))


def _noting(tracer: _Tracer, name: str, layer: nn.Module) -> Callable[..., Any]:
    """The forward of a layer's copy. What it computes is read from the layer later, so it must be as it was."""
    state = _told(layer)

    def forward(*arguments: Any, **options: Any) -> Any:
        if _told(layer) != state:
            tracer.refuse(f"it changes {name} before it calls it")
        return tracer.create_proxy("call_module", name, arguments, options)

    return forward


def _told(value: Any) -> Any:
    """What a module, or a holder of settings, is: its attributes by identity; of containers also what is in them."""
    if type(value) in _CONSTANTS:  # most are
        return id(value)
    if isinstance(value, dict):
        return id(value), [(key, _told(v)) for key, v in value.items()]
    if isinstance(value, (list, set)):
        return id(value), list(map(_told, value))
    if _is_holder(value):
        return id(value), _told(vars(value))[1]
    if isinstance(value, nn.Module):
        return [(name, _told(v)) for name, v in value.__dict__.items() if name not in _UNTOLD]
    return id(value)


_UNTOLD = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers", "training"} | {"forward"}


def _state(module: nn.Module) -> list[Any]:
    """What a forward may have set."""
    return [(_told(m), list(map(id, m._modules.values()))) for m in module.modules()]


# -- known operations ----------------------------------------------------------------------------------------------

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


def _is_shape(node: fx.Node) -> bool:
    """x.shape or x.size()."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1:] == ("shape",)
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs


def _is_count(node: fx.Node, shapes: set[fx.Node]) -> bool:
    """x.shape[0] or x.size(0): of whatever comes from x by known operations, the number of states."""
    if node.op == "call_method" and node.target == "size":
        return (node.args[1:], dict(node.kwargs)) in (((0,), {}), ((), {"dim": 0}))
    of_shape = node.op == "call_function" and node.target is operator.getitem and node.args[0] in shapes
    return of_shape and type(node.args[1]) is int and node.args[1] == 0


def _known(
    node: fx.Node, chain: fx.Node, counts: set[fx.Node], parameters: Mapping[str, Tensor]
) -> Activated | Affine | Scale | Flatten | Squeeze | None:
    """What a call of a function or method does to ``chain``; None: not known."""
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
        return Activated(layer, options) if known else None
    if target is F.dropout:
        options = {**dict(zip(("p", "training", "inplace"), rest, strict=False)), **kwargs}
        return Scale(1.0) if options.get("training", True) is False else None
    if target in _NEGATIONS and not rest and not kwargs:
        return Scale(-1.0)
    if target == "contiguous" and not rest and not kwargs:
        return Scale(1.0)
    if target in _QUOTIENTS and len(rest) == 1 and not kwargs:
        return _scale(rest[0], inverse=True)
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
        return _reshape(rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest, counts)
    return None


def _scale(factor: object, *, inverse: bool = False) -> Scale | None:
    """None, if it is no number that is safe to multiply weights by."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1e-12 < abs(factor) < 1e12:
        return None
    return Scale(1.0 / factor if inverse else float(factor))


def _reshape(shape: Any, counts: set[fx.Node]) -> Flatten | Squeeze | None:
    if len(shape) == 1 and (shape[0] == -1 or shape[0] in counts):
        return Squeeze()
    rows_are_states = len(shape) == 2 and (shape[0] in counts or (shape[0] == -1 and shape[1] != -1))
    return Flatten(shape[1]) if rows_are_states and type(shape[1]) is int else None


def _affine(args: Any, kwargs: Any, chain: fx.Node, parameters: Mapping[str, Tensor]) -> Affine | None:
    values = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    weight, bias = values.get("weight"), values.get("bias")
    if values.get("input") is not chain or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return None
    return Affine(parameters[str(weight.target)], None if bias is None else parameters[str(bias.target)])
