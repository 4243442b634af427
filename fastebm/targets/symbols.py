"""Run a module's forward on symbols instead of states, and return the graph of its operations.

A weightless copy of the module runs, so the user's module stays as it is. A forward is refused if it computes with a
real tensor, needs a value of a symbol, or changes the module. What a forward does to objects outside the module, such
as global variables, it does here too.

Unlike ``torch.fx.symbolic_trace`` this patches no class while it runs, which would affect modules that other threads
call, and it copies no layers.
"""

from __future__ import annotations

import copy
import functools
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from logging import Logger
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from .checks import is_layer
from .operations import NotAnMLP

__all__ = ["graph_of"]


def graph_of(module: nn.Module, where: str) -> fx.Graph:
    """The graph of what the forward does to x.

    Args:
        where: the module, for an error.

    Raises:
        NotAnMLP: the forward can't run on symbols.
    """
    tracer = _Tracer()
    copied = _copy(module, where, tracer)
    before = _state(copied)
    classes = {type(m): dict(vars(type(m))) for m in copied.modules() if not type(m).__module__.startswith("torch.")}
    try:
        with torch.inference_mode(False), torch.enable_grad(), _NoTensors(tracer):
            value = copied(tracer.create_proxy("placeholder", "x", (), {}))
            tracer.create_node("output", "output", (tracer.create_arg(value),), {})
    except Exception as error:  # a user's code may raise anything when it is given a symbol
        text = tracer.refused or " ".join(str(error).split()) or type(error).__name__
        raise NotAnMLP(f"the forward of {where} can't be read: {text[:200]}") from error
    finally:
        changed = [_restore(cls, members) for cls, members in classes.items()]
    if tracer.refused is not None:
        raise NotAnMLP(f"the forward of {where} can't be read: {tracer.refused}")
    if _state(copied) != before or any(changed):
        raise NotAnMLP(f"the forward of {where} changes the module")
    return tracer.graph


# -- symbols -------------------------------------------------------------------------------------------------------


def _refusing(name: str) -> Any:
    def refuse(self: Any, *_: Any) -> Any:
        self.tracer.refuse(f"it needs values, by {name}")

    return refuse


class _NoValue:
    """Refuses every use that needs a value. The tracer remembers it, in case the forward catches the error."""

    __len__ = _refusing("len()")
    __bool__ = _refusing("a branch")
    __float__ = _refusing("float()")
    __int__ = _refusing("int()")
    __index__ = _refusing("an index")
    __complex__ = _refusing("complex()")
    __contains__ = _refusing("in")
    __array__ = _refusing("NumPy")
    __array_priority__ = 1000  # so that NumPy's numbers let the symbol handle a product


class _Member(_NoValue, fx.proxy.Attribute):
    """A method of a tensor, or its shape."""


class _Symbol(_NoValue, fx.Proxy):
    """Stands in for a tensor, with no more attributes than a tensor has."""

    def __getattr__(self, name: str) -> Any:
        member = getattr(Tensor, name)  # raises AttributeError for what tensors do not have
        if name != "shape" and not callable(member):
            tracer: Any = self.tracer
            tracer.refuse(f"it asks for the {name} of a tensor")
        return _Member(self, name)


class _Tracer(GraphAppendingTracer):
    """Records what is done to symbols. Parameters are known by name; any other tensor is refused.

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
            self.refuse("it computes with a tensor that is not a parameter")
        return super().create_arg(a)

    def create_node(self, *arguments: Any, **options: Any) -> fx.Node:
        # fx records operations only, not the modes they run in
        if not torch.is_grad_enabled():
            self.refuse("it turns gradients off (torch.no_grad, or the like)")
        if _autocast() != self.autocast:
            self.refuse("it changes torch.autocast")
        return super().create_node(*arguments, **options)

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse("it needs values, by a loop")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse("it uses its input as a dict")


class _NoTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operation on real tensors before it runs: on symbols, a forward needs none."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tracer.refuse(f"it computes with tensors other than its input ({func})")


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


# -- the copy that runs --------------------------------------------------------------------------------------------


def _copy(module: nn.Module, where: str, tracer: _Tracer) -> nn.Module:
    """A copy whose tensors are on the meta device, and whose layers record that they are called."""
    empty: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise NotAnMLP(f"{name} of {where} has no shape yet: call the module once")
        meta = torch.empty_like(parameter, device="meta")
        empty[id(parameter)] = meta = nn.Parameter(meta, requires_grad=parameter.requires_grad)
        tracer.names[id(meta)] = name
    for buffer in module.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    # Instances of the same classes, since a forward may test for them; their __init__ is not called.
    copies: dict[int, Any] = {id(m): type(m).__new__(type(m)) for m in module.modules()}
    for name, child in module.named_modules():
        copied, known = copies[id(child)], bool(name) and is_layer(child)
        copied.__dict__.update(child.__dict__)
        for key, value in child.__dict__.items():
            if key == "_modules":
                copied.__dict__[key] = {k: None if m is None else copies[id(m)] for k, m in value.items()}
            elif key in ("_parameters", "_buffers"):
                copied.__dict__[key] = {k: None if v is None else empty[id(v)] for k, v in value.items()}
            elif key not in _OF_ALL and not known:
                copied.__dict__[key] = _copied_value(value, copies, f"the attribute {key} of {name or where}")
        copied.__dict__["_compiled_call_impl"] = None
        if known:
            copied.__dict__.update(_forward_pre_hooks={}, forward=_recording(tracer, name, copied))
    return copies[id(module)]  # type: ignore[no-any-return]


# Attributes that every module has. Hooks among them were checked before.
_OF_ALL = frozenset(nn.Module().__dict__) - {"training"}

# Objects that a forward can't change. Tensors too: any operation on them is refused.
_CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), type, type(...), slice, range, Enum, torch.dtype, torch.device,
    torch.Size, np.generic, np.dtype, FunctionType, BuiltinFunctionType, Logger, Tensor, nn.Parameter,
)  # fmt: skip

_CONTAINERS = (dict, list, tuple, set, frozenset)

# Copying more items would take longer than the call that needs the graph.
_MAX_ITEMS = 1000


def _copied_value(value: Any, copies: Mapping[int, Any], where: str) -> Any:
    """The attribute for the copy: a container is copied, a constant kept, and anything else refused."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, _CONSTANTS) or (callable(value) and type(value).__module__.startswith("torch")):
        return value
    if isinstance(value, _CONTAINERS) and len(value) <= _MAX_ITEMS:
        new: Any = copy.copy(value)
        if isinstance(value, dict):
            new.update({k: _copied_value(v, copies, where) for k, v in value.items()})
            return new
        parts = [_copied_value(v, copies, where) for v in value]
        if isinstance(value, list):
            new[:] = parts
        return tuple(parts) if type(value) is tuple else new
    if isinstance(value, functools.partial):
        return functools.partial(*_copied_value((value.func, *value.args), copies, where), **value.keywords)
    if _holds_settings(value):
        new = copy.copy(value)
        new.__dict__.update({k: _copied_value(v, copies, where) for k, v in vars(value).items()})
        return new
    size = f" of {len(value)}" if isinstance(value, _CONTAINERS) else ""
    raise NotAnMLP(f"{where} is a {type(value).__name__}{size}, which its forward may change")


def _holds_settings(value: object) -> bool:
    return isinstance(value, (Namespace, SimpleNamespace)) or (is_dataclass(value) and hasattr(value, "__dict__"))


def _recording(tracer: _Tracer, name: str, layer: nn.Module) -> Callable[..., Any]:
    """A forward for a layer's copy that records the call. The layer itself is read later, so a forward that changes
    it before the call is refused."""
    state = _contents(layer)

    def forward(*arguments: Any, **options: Any) -> Any:
        if _contents(layer) != state:
            tracer.refuse(f"it changes {name} before it calls it")
        return tracer.create_proxy("call_module", name, arguments, options)

    return forward


# -- changes -------------------------------------------------------------------------------------------------------


def _state(module: nn.Module) -> list[Any]:
    """Everything of the module that a forward may have set, to be compared."""
    return [(_contents(m), list(map(id, m._modules.values()))) for m in module.modules()]


def _contents(value: Any) -> Any:
    """The attributes of a module or of a settings object, and the items of a container, by identity."""
    if type(value) in _CONSTANTS:  # the most frequent case
        return id(value)
    if isinstance(value, dict):
        return id(value), [(key, _contents(v)) for key, v in value.items()]
    if isinstance(value, (list, set)):
        return id(value), list(map(_contents, value))
    if _holds_settings(value):
        return id(value), _contents(vars(value))[1]
    if isinstance(value, nn.Module):
        return [(name, _contents(v)) for name, v in value.__dict__.items() if name not in _NOT_COMPARED]
    return id(value)


_NOT_COMPARED = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers", "training"} | {"forward"}


def _restore(cls: type, members: dict[str, Any]) -> bool:
    """Set a class' attributes back to ``members``. Returns whether they had changed."""
    now = dict(vars(cls))
    changed = [name for name in now.keys() | members.keys() if now.get(name) is not members.get(name)]
    for name in changed:
        if name in members:
            setattr(cls, name, members[name])
        else:
            delattr(cls, name)
    return bool(changed)
