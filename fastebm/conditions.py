"""Which argument of an energy's forward is its condition: labels, or any other tensor with one row per chain.

It is decided by name, never by position alone: ``forward(x, scale=1.0)`` takes no labels. A module may tell by itself:
``condition_argument = "sigma"`` on the class or the instance names the argument, and None says that there is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["condition_parameter", "kind_of", "unwrapped"]

# fmt: off
_LABELS = frozenset({
    "y", "label", "labels", "class_label", "class_labels", "class_id", "class_ids", "cls", "classes", "target",
    "targets", "c", "cond", "condition", "conditions", "conditioning", "context",
})
_CONDITIONS = _LABELS | {
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


def kind_of(condition: Tensor) -> str:
    """ "labels": integers, one per chain; or "condition", anything else."""
    whole = not (condition.is_floating_point() or condition.is_complex() or condition.dtype == torch.bool)
    return "labels" if whole and condition.ndim == 1 else "condition"


def condition_parameter(module: nn.Module, kind: str, *, alone: bool = True) -> inspect.Parameter | None:
    """The parameter of forward that takes it beside x; None: there is none.

    Labels go to the one parameter with a name for labels or conditions, or else to the one that has no default. A
    condition of another kind may have more names, and goes to the second parameter if there are only two and the module
    stands alone: not, if it is one term of a sum.

    Raises:
        ValueError: it is ambiguous.
    """
    inner = unwrapped(module)
    # torch.compile warns of caches, which it does not use
    others_of = _others.__wrapped__ if torch.compiler.is_compiling() else _others
    others = others_of(inner.__dict__.get("forward", type(inner).forward), "forward" in inner.__dict__)
    told = getattr(inner, "condition_argument", "")
    if told is None:
        return None
    plain = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p for p in plain if p.default is p.empty]
    named = [p for p in plain if p.name == told]
    named = named or [p for p in plain if p.name.lower() in (_LABELS if kind == "labels" else _CONDITIONS)]
    if len(named) > 1:
        named = [p for p in named if p in required]
    elif not named and len(required) == 1:
        named = required
    elif not named and alone and kind == "condition" and len(others) == len(plain) == 1:
        named = plain
    if len(named) == 1:
        return named[0]
    if named or len(others) > len(plain) or sum(p.name.lower() in _LABELS for p in plain) > 1:
        names = ", ".join(str(p) for p in others)
        raise ValueError(
            f"{type(inner).__name__}.forward takes ({names}) beside x, and which of them is the {kind} is not clear: "
            'set condition_argument = "NAME" on the module, or None if it takes none'
        )
    return None


@lru_cache(maxsize=1024)
def _others(forward: Callable[..., Any], bound: bool) -> list[inspect.Parameter]:
    """All parameters but self and the states."""
    parameters = list(inspect.signature(forward).parameters.values())
    first = 0 if bound else 1
    if len(parameters) > first and parameters[first].kind is not inspect.Parameter.VAR_POSITIONAL:
        first += 1
    return parameters[first:]
