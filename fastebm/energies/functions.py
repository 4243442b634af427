"""Functions as modules: an energy may be any callable, and what is none is refused with the likely mistake."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["EnergyLike", "FunctionModule", "as_module", "enclosed", "is_library", "name_of_forward"]

# It maps (batch, *shape) to (batch,) or (batch, 1).
EnergyLike = nn.Module | Callable[..., Any]


class FunctionModule(nn.Module):
    """A function as the forward of a module.

    Modules that it calls are submodules: they run in eval mode while sampling, and tell the device and the dtype. They
    are looked for in what a method belongs to, what a functools.partial was given, a closure, global variables by their
    names, and the attributes of an object. Elsewhere (in a list, behind an import) they are not found, and keep their
    mode. A copy calls the same function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function  # on the instance, so that its signature is read as any forward's
        for i, module in enumerate(_modules_of(function)):
            self.add_module(str(i), module)
        if hasattr(function, "condition_argument"):
            self.condition_argument = function.condition_argument


def as_module(energy: EnergyLike, what: str = "energy") -> nn.Module:
    """A module as it is, and any other callable in one.

    Args:
        what: its name in the error.

    Raises:
        TypeError: it is neither, with the likely mistake.
    """
    if isinstance(energy, nn.Module):
        return energy
    if callable(energy) and not isinstance(energy, type):
        return FunctionModule(energy)
    got, hint = type(energy).__name__, ""
    if isinstance(energy, type):
        got, hint = f"the class {energy.__name__}", f": are its parentheses missing, as in {energy.__name__}(...)?"
    elif energy is None:
        hint = ": does what builds it return it?"
    elif isinstance(energy, (Tensor, np.ndarray)):
        got, hint = f"{got} {tuple(energy.shape)}", ": it is the first argument, and states to start from are init="
    elif isinstance(energy, str):
        got, hint = repr(energy), ": the energy of a run folder is fastebm.load(RUN).model"
    elif isinstance(getattr(energy, "model", None), nn.Module):  # of fastebm.load, or of a trainer
        hint = ": pass its .model"
    elif isinstance(energy, (tuple, list)):
        got = f"{got} of {', '.join(type(part).__name__ for part in energy)}"
        hint = ": pass one of them, or their sum, SumEnergy([...])"
    raise TypeError(f"{what} must be an nn.Module or a function (batch, *shape) -> (batch,), got {got}{hint}")


def name_of_forward(module: nn.Module) -> str:
    """For an error: "MLPEnergy.forward", or the function that stands in its place."""
    if not isinstance(module, FunctionModule):
        return f"{type(module).__name__}.forward"
    function: Any = module.forward
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__name__))


def _modules_of(function: Any) -> list[nn.Module]:
    found: list[nn.Module] = []
    plain = isinstance(function, (FunctionType, MethodType, functools.partial))
    todo: list[Any] = [function if plain else function.__call__]  # of an object: its method
    seen: set[int] = set()
    while todo:
        value = todo.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            owner = value.__self__
            todo += [owner, value.__func__]
            if not isinstance(owner, (nn.Module, type)):
                todo += getattr(owner, "__dict__", {}).values()
        elif isinstance(value, FunctionType) and not is_library(value.__module__):
            todo += enclosed(value)
            todo += [value.__globals__.get(name) for name in _globals_in(value.__code__)]
    return found


def enclosed(function: FunctionType) -> list[Any]:
    """What it closes over."""
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return contents


def is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ("torch", "fastebm", "numpy", "builtins")


@functools.lru_cache(maxsize=1024)
def _globals_in(code: CodeType) -> tuple[str, ...]:
    """Names of global variables that it reads, in order; not of attributes, which co_names holds too."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _globals_in(const)]
    return tuple(dict.fromkeys([*names, *inner]))
