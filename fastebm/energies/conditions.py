"""Which argument of an energy's forward is its condition: labels, or any other tensor with one row per chain.

It is decided by name, never by position alone: ``forward(x, scale=1.0)`` takes no labels. A module, or a function, may
tell by itself: ``condition_argument = "sigma"`` on the class or the instance names the argument, and None says that
there is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .functions import name_of_forward

__all__ = ["are_labels", "condition_parameter", "unwrapped"]

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

# Wrappers that pass a call on, by where they are defined (no need to import them), and what is in them.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",  # torch.compile
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside torch.compile, AveragedModel, DistributedDataParallel and DataParallel, nested or not."""
    while (name := _WRAPPERS.get((type(module).__module__, type(module).__name__))) is not None:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            break
        module = getattr(module, name)
    return module


def are_labels(condition: Tensor) -> bool:
    """Integers, one per chain."""
    whole = not (condition.is_floating_point() or condition.is_complex() or condition.dtype == torch.bool)
    return whole and condition.ndim == 1


def condition_parameter(module: nn.Module, kind: str, *, alone: bool = True) -> inspect.Parameter | None:
    """The parameter of forward that takes it beside x; None: there is none.

    Labels go to the one parameter with a name for labels or conditions, or else to the one that has no default. A
    condition of another kind may have more names, and goes to the second parameter if there are only two and the module
    stands alone: not, if it is one term of a sum.

    Args:
        kind: "labels" or "condition": the keyword that it was given by.

    Raises:
        ValueError: it is ambiguous.
    """
    inner = unwrapped(module)
    if isinstance(inner, torch.jit.ScriptModule):
        others = _of_script(inner)
    elif "forward" in inner.__dict__:
        others = _others(inner.forward, 0)  # not kept: it may hold the module
    else:  # torch.compile warns of caches, which it does not use
        others = (_others if torch.compiler.is_compiling() else _others_kept)(type(inner).forward, 1)
    told = getattr(inner, "condition_argument", "")
    if told is None:
        return None
    plain = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if told:
        if any(p.kind is p.VAR_KEYWORD for p in others):
            plain.append(inspect.Parameter(told, inspect.Parameter.KEYWORD_ONLY))
        if told not in (p.name for p in plain):
            raise ValueError(
                f"condition_argument is {told!r}, and {name_of_forward(inner)} has no argument of that name"
            )
        return next(p for p in plain if p.name == told)
    required = [p for p in plain if p.default is p.empty]
    named: list[inspect.Parameter] = []
    for known in (_LABELS,) if kind == "labels" else (_CONDITIONS, _LABELS):
        named = named or [p for p in plain if p.name == kind] or [p for p in plain if p.name.lower() in known]
    if not named and len(required) == 1:
        named = required
    elif not named and alone and kind == "condition" and len(others) == len(plain) == 1:
        named = plain
    found = named if len(named) == 1 else [p for p in named if p in required]
    if len(found) == 1:
        return found[0]
    if named or len(others) > len(plain):
        names = ", ".join(str(p) for p in others)
        raise ValueError(
            f"{name_of_forward(inner)} takes ({names}) beside x, and which of them is the {kind} is not clear: "
            'set condition_argument = "NAME" on the module, or None if it takes none'
        )
    return None


def _of_script(module: nn.Module) -> list[inspect.Parameter]:
    forward: Any = module.forward
    return [
        inspect.Parameter(
            a.name,
            inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in forward.schema.arguments[2:]  # after self and x
    ]


def _others(forward: Callable[..., Any], first: int) -> list[inspect.Parameter]:
    """All parameters but the states and what comes before them. first: where the states are."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except ValueError:  # written in C, without a signature: of x alone
        return []
    if len(parameters) > first and parameters[first].kind is not inspect.Parameter.VAR_POSITIONAL:
        first += 1
    return parameters[first:]


_others_kept = lru_cache(maxsize=1024)(_others)
