"""Runs of K steps on one path each, for tests that compare paths: the one place that knows where they are.

All take chains, a sampler and a number of steps, and options ``thin`` and ``telemetry``; all return an ``Advanced``.
"""

from __future__ import annotations

from functools import partial

from fastebm.backends import Advanced, Chains, cpu, reference, tiles
from fastebm.targets.autograd import Autograd, Energy
from fastebm.targets.closed_form import ClosedForm
from fastebm.targets.description import Description


def by_definition(energy: Energy, chains: Chains, sampler, steps: int, **asked) -> Advanced:
    """The reference."""
    return reference.run(Autograd(energy, chains.labels_or_condition), chains, sampler, steps, **asked)


def closed_form(description: Description, chains: Chains, sampler, steps: int, **asked) -> Advanced:
    """An MLP in plain PyTorch, on tiles."""
    x = chains.x
    make_target = partial(ClosedForm, description.to(x.device, x.dtype))
    return tiles.run(chains, sampler, steps, make_target=make_target, **asked)


def cpu_mlp(*arguments, **asked) -> Advanced:
    """An MLP by Numba's kernels."""
    return cpu.run_mlp(*arguments, **asked)


def cpu_module(*arguments, **asked) -> Advanced:
    """Any module: autograd's gradient, and Numba's kernels."""
    return cpu.run_module(*arguments, **asked)


def fused_mlp(*arguments, **asked) -> Advanced:
    """The fused Triton kernel."""
    from fastebm.backends import fused  # here, because it imports triton

    return fused.run_mlp(*arguments, **asked)


def fused_module(*arguments, **asked) -> Advanced:
    """Any module: autograd's gradient, and the Triton kernel of the update."""
    from fastebm.backends import fused

    return fused.run_module(*arguments, **asked)


def fused_products(*arguments, **asked) -> Advanced:
    """A wide MLP: library products, and the Triton kernel of the update."""
    from fastebm.backends import fused

    return fused.run_products(*arguments, **asked)
