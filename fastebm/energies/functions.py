"""An energy may be any callable: functions become modules, and anything else is refused with a hint."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["EnergyLike", "FunctionModule", "as_module", "enclosed", "is_library", "name_of_forward"]

# Maps (batch, *shape) to (batch,) or (batch, 1).
EnergyLike = nn.Module | Callable[..., Any]


class FunctionModule(nn.Module):
    """A function as the forward of a module.

    The modules that it calls become submodules, so that they run in eval mode while sampling and determine the device
    and the dtype. They are searched for in the owner of a method, the arguments of a functools.partial, closures,
    global variables that the code names, and the attributes of a callable object. Modules elsewhere (in a list, in an
    imported module) are not found, and keep their mode. A copy calls the same function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function  # on the instance: the signature is found as for any other forward
        for i, module in enumerate(_modules_of(function)):
            self.add_module(str(i), module)
        if hasattr(function, "condition_argument"):
            self.condition_argument = function.condition_argument


def as_module(energy: EnergyLike, what: str = "energy") -> nn.Module:
    """A module unchanged, and any other callable wrapped in one.

    Args:
        what: the name of the argument, for the error.

    Raises:
        TypeError: it is neither. The message has a hint at the likely mistake.
    """
    if isinstance(energy, nn.Module):
        return energy
    if callable(energy) and not isinstance(energy, type):
        return FunctionModule(energy)
    got, hint = type(energy).__name__, ""
    if isinstance(energy, type):
        got, hint = f"the class {energy.__name__}", f": are its parentheses missing, as in {energy.__name__}(...)?"
    elif energy is None:
        hint = ": is a return missing in the function that builds it?"
    elif isinstance(energy, (Tensor, np.ndarray)):
        got, hint = f"{got} {tuple(energy.shape)}", ": it is the first argument, and states to start from are init="
    elif isinstance(energy, str):
        got, hint = repr(energy), ": the energy of a run folder is fastebm.load(RUN).model"
    elif isinstance(getattr(energy, "model", None), nn.Module):  # from fastebm.load, or a trainer
        hint = ": pass its .model"
    elif isinstance(energy, (tuple, list)):
        got = f"{got} of {', '.join(type(part).__name__ for part in energy)}"
        hint = ": pass one of them, or their sum, SumEnergy([...])"
    raise TypeError(f"{what} must be an nn.Module or a function (batch, *shape) -> (batch,), got {got}{hint}")


def name_of_forward(module: nn.Module) -> str:
    """The forward's name for an error, such as "MLPEnergy.forward", or the name of a wrapped function."""
    if not isinstance(module, FunctionModule):
        return f"{type(module).__name__}.forward"
    function: Any = module.forward
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__name__))


def _modules_of(function: Any) -> list[nn.Module]:
    """The modules that a function may call, searched breadth first."""
    found: list[nn.Module] = []
    plain = isinstance(function, (FunctionType, MethodType, functools.partial))
    todo: list[Any] = [function if plain else function.__call__]
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
    """The values in a function's closure."""
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # an empty cell: the variable is assigned later
            continue
    return contents


def is_library(module: str | None) -> bool:
    """Whether a module name belongs to a library whose functions are not searched: they hold no user's modules."""
    return (module or "").partition(".")[0] in ("torch", "fastebm", "numpy", "builtins")


@functools.lru_cache(maxsize=1024)
def _globals_in(code: CodeType) -> tuple[str, ...]:
    """The names of global variables that the code reads, in order. (co_names has names of attributes too.)"""
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _globals_in(const)]
    return tuple(dict.fromkeys([*names, *inner]))
