"""run_chains: K steps of any sampler on given chains, each with its own global number and lifetime step.

    energy -> target -> run (backends/table.py) -> chains

It puts the energy in eval mode, chooses the backend, runs the steps, and handles chains that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Advanced, Chains, marginal, settle, table
from ..backends.choose import Choice, choose, default_precision
from ..backends.collapsed import collapses
from ..backends.graphs import CudaRecorder
from ..energies import EnergyLike, first_tensor, n_classes
from ..energies.conditions import are_labels
from ..energies.eval_mode import evaluating
from ..energies.functions import as_module
from ..samplers.base import Adaptation, check_settings
from ..targets.autograd import Energy
from ..targets.description import check_shape
from ..threads import survives_fork
from ..tracing import capturing, readable
from .arguments import checked_condition, checked_count, same_device, with_own_condition
from .settings import Settings

__all__ = ["energies_of", "run_chains"]

# States whose energies are computed at once: enough for all threads or a GPU, and little memory.
_AT_ONCE = 1 << 16


@survives_fork
def run_chains(
    energy: EnergyLike,
    chains: Chains,
    sampler: Any,
    steps: int,
    *,
    shape: Sequence[int],
    settings: Settings | None = None,
    thin: int = 0,
    telemetry: bool = False,
    check_start: bool = False,
    part: tuple[int, int] | None = None,
    adaptation: Adaptation | None = None,
    resumable: bool = False,
) -> tuple[Advanced, Choice]:
    """Run the steps. Returns the result and the choice of backend. ``chains`` is not modified.

    Args:
        chains: while torch.compile traces, x has the form that backends/op.py takes, and the seed is a tensor.
        shape: shape of one state, as the energy takes it.
        thin: store the state after every thin-th step; 0 stores none.
        telemetry: also return the sampler's telemetry.
        check_start: check that the states at the start are finite.
        part: for errors, if these steps are part of a call: the number of steps before them, and of all steps.
        adaptation: tunes the sampler in a warm-up, or None. Its ``sampler`` takes the steps.
        resumable: return all that the chains carry to a next call (``Job``).

    Raises:
        TypeError, ValueError: an argument is wrong or does not fit the energy.
        NonFiniteError: chains are not finite after the steps, with on_nonfinite="raise".
    """
    settings = settings or Settings()
    settings.check()
    energy, steps = as_module(energy), checked_count("steps", steps)
    x = chains.x
    parameter = first_tensor(energy)
    if parameter is not None and not same_device(parameter.device, x.device):
        raise ValueError(f"the energy is on {parameter.device} and the chains on {x.device}: move one with .to(...)")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    chains = checked_condition(energy, with_own_condition(energy, chains, sampler), dtype)
    if torch.compiler.is_compiling():
        return _run_compiled(energy, chains, sampler, steps, shape, settings, dtype, thin, telemetry)
    check_settings(sampler, len(chains.numbers), steps)
    device = x.device
    start = x if check_start and readable(device) else None
    with evaluating(energy), torch.no_grad(), torch.autocast(device.type, enabled=False):
        choice = _chosen(energy, chains, sampler, settings, dtype, adaptation)
        if start is not None and not table.reports_bad_starts(choice.path, steps):
            settle.check_finite(start)
            start = None
        # A private, contiguous copy: runs may move it in place.
        x = x.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        chains = chains._replace(x=x)
        if capturing(device) and not choice.on_device:
            only = "while a CUDA graph is captured only kernels can run, and this call would wait"
            raise ValueError(f"{only}: {choice.why_not_fused}")
        _check_bounds(sampler, chains)
        module = Energy(energy, shape, dtype, chains.kind)
        _check_energy(energy, module, choice, chains, shape)
        why_not = _why_not_recorded(choice, device) if settings.cuda_graph else None
        recorder = CudaRecorder(device) if settings.cuda_graph and why_not is None else None
        done = table.run(
            table.Job(choice, module, chains, sampler, steps, thin, telemetry, recorder, adaptation, resumable)
        )
        done = done if why_not is None else done._replace(cuda_graph=why_not)
        energy_of: Callable[[Tensor, Tensor | None], Tensor] = module
        if choice.description is not None:
            energy_of = table.energy_of(choice.description)
        settle.settle(
            done, chains, sampler, steps, lambda: dict(energy.named_parameters()), energy_of, settings.on_nonfinite,
            start, part or (0, steps),
        )  # fmt: skip
    return done, choice


def _chosen(
    energy: nn.Module, chains: Chains, sampler: Any, settings: Settings, dtype: torch.dtype,
    adaptation: Adaptation | None,
) -> Choice:  # fmt: skip
    """The backend and path of the steps."""
    precision = settings.precision
    captured = capturing(chains.x.device)
    rounded = sampler.exact and (precision or default_precision()) == "bf16"
    if rounded:
        # A rounded energy would be another target. For kernels not "ieee", which has no tensor cores and is for tests;
        # PyTorch's own products are in full float32 all the same.
        precision = "bf16x3"
    choice = choose(
        energy, chains.x.device, dtype, settings.backend, precision,
        condition=None if chains.labels_or_condition is None else chains.kind,
        sampler=table.name_of(sampler, adaptation), triton_paths=table.triton_paths(sampler, adaptation),
        exact=sampler.exact,
        # before steps in the first layer, the host reads values from the device
        collapses=(lambda *_: False) if captured else partial(collapses, sampler, chains, adaptation),
    )  # fmt: skip
    if rounded and choice.fused:  # the fused kernel computes energies at bf16x3, and rounds gradients only
        choice = replace(choice, precision="bf16")
    in_graph = settings.cuda_graph or captured
    if not in_graph and choice.description is not None and marginal.applies(sampler, chains, choice.description):
        choice = replace(choice, path="marginal")
    return choice


def _run_compiled(
    energy: nn.Module, chains: Chains, sampler: Any, steps: int, shape: Sequence[int], settings: Settings,
    dtype: torch.dtype, thin: int, telemetry: bool,
) -> tuple[Advanced, Choice]:  # fmt: skip
    """The whole call as one operator, while torch.compile traces."""
    from ..backends import compiling  # imported here, because it takes seconds

    choice, done = compiling.run(
        energy, chains, sampler, steps, shape=shape, dtype=dtype, backend=settings.backend,
        precision=settings.precision, on_nonfinite=settings.on_nonfinite, thin=thin, telemetry=telemetry,
    )  # fmt: skip
    if settings.cuda_graph:
        done = done._replace(cuda_graph="a compiled call records nothing by itself")
    return done, choice


@survives_fork
def energies_of(
    energy: EnergyLike, chains: Chains, sampler: Any, *, shape: Sequence[int], settings: Settings,
    along: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """E of the chains' states, (n_chains,), without an autograd graph. In closed form if the energy allows it.

    sampler: the chains', which may give the energy a condition of its own.
    along: (n_chains, draws, dim) states of these chains instead of the present ones. The result is (n_chains, draws).
    """
    energy, x = as_module(energy), chains.x
    chains = with_own_condition(energy, chains, sampler)
    chains = checked_condition(energy, chains, x.dtype)
    with evaluating(energy), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        condition = None if chains.labels_or_condition is None else chains.kind
        choice = choose(energy, x.device, x.dtype, settings.backend, settings.precision, condition=condition)
        given = chains.labels_or_condition
        if choice.description is None:
            module = Energy(energy, shape, x.dtype, chains.kind)
            if along is None:
                return module(x, given)
            # One draw at a time: an energy may hold one measurement per chain.
            energies = [module(states, given) for states in along.unbind(dim=1)]
            return torch.stack(energies, dim=1) if energies else x.new_empty(len(x), 0)
        energy_of = table.energy_of(choice.description)
        if along is None:
            return energy_of(x, given)
        given = None if given is None else given.repeat_interleave(along.shape[1], dim=0)
        parts = [slice(i, i + _AT_ONCE) for i in range(0, along.shape[0] * along.shape[1], _AT_ONCE)]
        states = along.flatten(0, 1)
        energies = [energy_of(states[part], None if given is None else given[part]) for part in parts]
        return torch.cat([x.new_empty(0), *energies]).view(along.shape[:2])


def _check_bounds(sampler: Any, chains: Chains) -> None:
    """Check that chains start within the bounds of an exact sampler, which can't move them there."""
    if not sampler.exact or sampler.box is None or not readable(chains.x.device):
        return
    x = chains.x
    box = sampler.box.on(x.shape[1], dtype=x.dtype, device=x.device).except_at(chains.frozen, x.dtype)
    outside = ~box.contains(x)
    if bool(outside.any()):
        raise ValueError(
            f"{type(sampler).__name__} starts within its clamp, {sampler.box}, and {int(outside.sum())} of {len(x)} "
            "chains do not: clamp the start, give a pool the clamp, or leave clamp= out"
        )


def _check_energy(energy: nn.Module, module: Energy, choice: Choice, chains: Chains, shape: Sequence[int]) -> None:
    """Check that the energy takes these states and labels."""
    x, description = chains.x, choice.description
    if description is not None:
        check_shape(energy, description, shape)
    if len(x) == 0 or not readable(x.device):
        return
    if description is not None and len(shape) > 1:
        # The layers do not say whether the module takes this shape, so call it once. Two states are enough.
        module(x[:2], None if chains.labels is None else chains.labels[:2] * 0)
    value = chains.labels_or_condition
    if value is not None and are_labels(value):
        n = n_classes(energy, x.reshape(len(x), *shape)) if description is None else description.n_classes
        if n is not None:
            settle.check_classes(value, n)


def _why_not_recorded(choice: Choice, device: torch.device) -> str | None:
    if choice.fused:
        return "all steps are one launch of the fused kernel"
    if not choice.on_device:
        return "steps in plain PyTorch wait for the device"
    if device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    return "a CUDA graph is captured already" if capturing(device) else None
