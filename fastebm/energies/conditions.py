"""Find the argument of an energy's forward that is its condition: labels, or any tensor with one row per chain.

Names decide, never the position alone: ``forward(x, scale=1.0)`` takes no labels. A module or function can also say
it: ``condition_argument = "sigma"`` on the class or instance names the argument, and None means that there is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .functions import name_of_forward

__all__ = ["are_labels", "arguments_of", "condition_parameter", "unwrapped"]

# fmt: off
_EITHER = frozenset({"c", "cond", "condition", "conditions", "conditioning", "context"})
_LABELS = _EITHER | {
    "y", "label", "labels", "class_label", "class_labels", "class_id", "class_ids", "cls", "classes", "target",
    "targets",
}
_CONDITIONS = _EITHER | {
    "sigma", "sigmas", "noise_level", "noise_levels", "t", "time", "times", "timestep", "timesteps", "measurement",
    "measurements", "attribute", "attributes", "attrs", "embedding", "embeddings",
}
# fmt: on

# Wrappers that only pass the call on: where they are defined (so that none has to be imported) -> attribute.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",  # torch.compile
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, AveragedModel, DistributedDataParallel and DataParallel, nested or not."""
    while (name := _WRAPPERS.get((type(module).__module__, type(module).__name__))) is not None:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            break
        module = getattr(module, name)
    return module


def are_labels(condition: Tensor) -> bool:
    """Whether a condition is class labels: integers, one per chain."""
    whole = not (condition.is_floating_point() or condition.is_complex() or condition.dtype == torch.bool)
    return whole and condition.ndim == 1


def condition_parameter(module: nn.Module, condition_kind: str, *, in_sum: bool = False) -> inspect.Parameter | None:
    """The parameter of forward that takes the condition, or None if there is none.

    Labels go to the one parameter whose name means labels or a condition, or else to the one without a default. For
    any other condition more names are known; and if forward has only one parameter besides x, it is that one, unless
    the module is a term of a sum.

    Args:
        condition_kind: "labels" or "condition", the keyword that the condition was passed by.
        in_sum: the module is one term of a sum, so the condition may be meant for another term.

    Raises:
        ValueError: it is ambiguous which parameter is meant.
    """
    inner = unwrapped(module)
    if isinstance(inner, torch.jit.ScriptModule):
        others = _parameters_of_script(inner)
    elif "forward" in inner.__dict__:
        others = _other_parameters(inner.forward, 0)  # not cached: a cache would keep the module alive
    else:  # torch.compile warns about functools caches
        find = _other_parameters if torch.compiler.is_compiling() else _cached_other_parameters
        others = find(type(inner).forward, 1)
    argument = getattr(inner, "condition_argument", "")
    if argument is None:
        return None
    plain = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if argument:
        if any(p.kind is p.VAR_KEYWORD for p in others):
            plain.append(inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY))
        if argument not in (p.name for p in plain):
            raise ValueError(
                f"condition_argument is {argument!r}, and {name_of_forward(inner)} has no argument of that name"
            )
        return next(p for p in plain if p.name == argument)
    required = [p for p in plain if p.default is p.empty]
    named: list[inspect.Parameter] = []
    for known in (_LABELS,) if condition_kind == "labels" else (_CONDITIONS, _LABELS):
        named = named or [p for p in plain if p.name == condition_kind] or [p for p in plain if p.name.lower() in known]
    if not named and len(required) == 1:
        named = required
    elif not named and not in_sum and condition_kind == "condition" and len(others) == len(plain) == 1:
        named = plain
    found = named if len(named) == 1 else [p for p in named if p in required]
    if len(found) == 1:
        return found[0]
    if named or len(others) > len(plain):
        names = ", ".join(str(p) for p in others)
        raise ValueError(
            f"{name_of_forward(inner)} takes ({names}) besides x, and which of them is the {condition_kind} is not "
            'clear: set condition_argument = "NAME" on the module, or None if it takes none'
        )
    return None


def arguments_of(
    x: Tensor, condition: Tensor, parameter: inspect.Parameter
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The arguments of a forward whose condition is this parameter, by position and by name."""
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return (x, condition), {}
    return (x,), {parameter.name: condition}


def _parameters_of_script(module: nn.Module) -> list[inspect.Parameter]:
    forward: Any = module.forward
    return [
        inspect.Parameter(
            a.name,
            inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in forward.schema.arguments[2:]  # after self and x
    ]


def _other_parameters(forward: Callable[..., Any], first: int) -> list[inspect.Parameter]:
    """The parameters after the states. first: the position of the states, 1 if ``self`` comes before."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except ValueError:  # a function in C without a signature: taken for one of x alone
        return []
    if len(parameters) > first and parameters[first].kind is not inspect.Parameter.VAR_POSITIONAL:
        first += 1
    return parameters[first:]


_cached_other_parameters = lru_cache(maxsize=1024)(_other_parameters)
