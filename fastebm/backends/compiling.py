"""``langevin_sample`` under torch.compile. Imported only while tracing: importing torch._dynamo takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..energies.functions import EnergyLike
from ..samplers.langevin import Langevin
from ..targets.description import check_shape, describe
from ..targets.mlp import NotAnMLP
from . import Advanced, Chains, cpu, op
from . import choose as choosing

__all__ = ["can_compile", "run", "uncompiled"]


# torch can't trace these functions, so it calls them while compiling and keeps the results. They describe the machine,
# which does not change; torch.set_float32_matmul_precision counts as it was while compiling.
for _function in (choosing._has_triton, choosing._capability, choosing.default_precision, cpu.why_not):
    torch.compiler.assume_constant_result(_function)  # type: ignore[no-untyped-call]


def can_compile(
    energy: EnergyLike,
    rules: Sequence[object],
    labels: Tensor | None,
    condition: Tensor | None,
    backend: str,
    generator: torch.Generator | None,
) -> bool:
    """Whether the call can be traced as one operator.

    Decided before anything else: otherwise a graph break could leave the call half traced.

    Args:
        rules: the arguments that may be the sampler, unchecked.
    """
    if any(isinstance(rule, Langevin) and (rule.preconditioner is not None or rule.marginal_noise) for rule in rules):
        return False
    if not isinstance(energy, nn.Module) or backend == "reference" or condition is not None or generator is not None:
        return False
    try:
        describe(energy, labels=labels is not None, bare=True)
    except NotAnMLP:
        return False
    return True


def _uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


uncompiled = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _uncompiled,
    reason="langevin_sample compiles in whole for MLP energies only (see fastebm.why_not_fused), without a "
    'preconditioner, marginal_noise, generator= and backend="reference"; sample and ChainPool do not',
)


def run(
    energy: nn.Module,
    chains: Chains,
    sampler: Langevin,
    steps: int,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
    precision: str | None,
    **options: Any,
) -> tuple[choosing.Choice, Advanced]:
    """Trace a call that ``can_compile``, as one operator.

    chains.x: (n_chains, *shape), or (n_chains, 0) for a uniform start. options: keywords of ``op.run``.
    """
    choice = choosing.choose(
        energy, chains.x.device, dtype, backend, precision, condition=None if chains.labels is None else "labels"
    )
    description = choice.description
    assert description is not None  # can_compile
    check_shape(energy, description, shape)
    return choice, op.run(description, chains, sampler, steps, path=choice.path, precision=choice.precision, **options)
