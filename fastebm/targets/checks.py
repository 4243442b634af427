"""Which modules can be read at all: checks of types, hooks and code, made before anything of a module runs."""

from __future__ import annotations

import functools
import itertools
import random
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..energies.functions import enclosed, is_library
from .operations import NotAnMLP

__all__ = ["check_code", "check_hooks", "check_submodules", "is_layer", "plain"]


def plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the module is an instance of cls that runs cls' own forward, not replaced by a subclass or on the
    instance."""
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


def is_layer(module: nn.Module) -> bool:
    """Whether the module is one of PyTorch's own layers, whose type alone says what it computes."""
    base = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return (
        base.__module__.startswith("torch.nn.modules.")
        and plain(module, base)
        and not module._modules.keys() - {"parametrizations"}
    )


def check_hooks(module: nn.Module, where: str) -> None:
    """Refuse hooks, which may change what a module computes, or its gradient.

    An nn.Linear may have forward pre-hooks, since the older spectral and weight norms are such hooks:
    ``weights.py`` checks which they are.
    """
    kinds = ["forward hook"] if module._forward_hooks else []
    kinds += ["forward pre-hook"] if module._forward_pre_hooks and not isinstance(module, nn.Linear) else []
    kinds += ["backward hook"] if module._backward_hooks or module._backward_pre_hooks else []
    if kinds:
        raise NotAnMLP(f"{where} has a {kinds[0]}, which may change what it computes")


def check_submodules(module: nn.Module, where: str, prefix: str) -> None:
    """Refuse a module that contains something whose code can't be read or copied.

    Args:
        where: the module, for an error. prefix: its path, with a dot, or "".
    """
    for name, child in module.named_modules():
        here = f"{prefix}{name} ({type(child).__name__})" if name else where
        if name:
            check_hooks(child, here)
        if isinstance(child, torch.jit.ScriptModule):
            raise NotAnMLP(f"{here} is TorchScript, whose code can't be read")
        if "forward" in child.__dict__:
            raise NotAnMLP(f"{here} has a forward of its own, set on the instance")
        if hasattr(type(child), "__del__"):
            raise NotAnMLP(f"{here} has a __del__, which would also run for a copy of it")


def check_code(module: nn.Module, where: str) -> None:
    """Refuse a forward whose code could do something that a run on symbols does not show or must not do.

    It may test for tensors (symbols are not tensors), call an autograd.Function (whose backward is not in the graph),
    or advance a global random generator. Such code is never run.
    """
    methods: dict[str, list[Any]] = {}  # by name: methods of all classes, and functions that are attributes
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
