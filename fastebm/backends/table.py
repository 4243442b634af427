"""Which run serves a sampler on a target: the table of fused runs, and the sampler's own steps for everything else.

A fused run makes all K steps, or whole steps, by kernels that are written for one sampler. To add one: a function of a
``Job`` and a line of ``FUSED_RUNS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..samplers.langevin import Langevin
from ..targets.autograd import Autograd, Energy
from ..targets.base import Target
from ..targets.closed_form import ClosedForm
from ..targets.description import Description
from ..threads import survives_fork
from . import Advanced, Chains, cpu, reference, tiles
from .choose import FUSED, Choice
from .graphs import Recorder

__all__ = ["FUSED_RUNS", "Job", "energy_of", "reports_bad_starts", "run", "why_no_kernel"]


@dataclass(frozen=True, eq=False)
class Job:
    """K steps of a sampler on some chains, and how they run.

    energy: what autograd differentiates; None in a compiled call, which has a closed form. thin: keep the state after
    every thin-th step; 0: none. recorder: to record one step as a CUDA graph and replay it. chains.x is private and
    contiguous, and may be moved in place.
    """

    choice: Choice
    energy: Energy | None
    chains: Chains
    sampler: Any
    steps: int
    thin: int = 0
    telemetry: bool = False
    recorder: Recorder | None = None

    @property
    def description(self) -> Description:
        """The MLP energy where the chains are, and in their dtype."""
        assert self.choice.description is not None
        x = self.chains.x
        return self.choice.description.to(x.device, x.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """What every run takes."""
        return {"thin": self.thin, "telemetry": self.telemetry}


# -- Langevin ------------------------------------------------------------------------------------------------------


def _fused_mlp(job: Job) -> Advanced:
    from . import fused  # here, because it imports triton

    description, choice = job.choice.description, job.choice
    assert description is not None
    return fused.run_mlp(
        description, job.chains, job.sampler, job.steps, precision=choice.precision, launch=choice.launch, **job.options
    )


def _fused_products(job: Job) -> Advanced:
    from . import fused

    return fused.run_products(job.description, job.chains, job.sampler, job.steps, recorder=job.recorder, **job.options)


def _fused_module(job: Job) -> Advanced:
    from . import fused

    assert job.energy is not None
    return fused.run_module(job.energy, job.chains, job.sampler, job.steps, recorder=job.recorder, **job.options)


def _cpu_mlp(job: Job) -> Advanced:
    return cpu.run_mlp(
        job.description, job.chains, job.sampler, job.steps, precision=job.choice.precision, **job.options
    )


def _cpu_module(job: Job) -> Advanced:
    assert job.energy is not None
    return cpu.run_module(job.energy, job.chains, job.sampler, job.steps, **job.options)


# By sampler, path and kernels (``Choice``).
FUSED_RUNS: dict[tuple[type, str, str], Callable[[Job], Advanced]] = {
    (Langevin, "resident", "triton"): _fused_mlp,
    (Langevin, "streaming", "triton"): _fused_mlp,
    (Langevin, "products", "triton"): _fused_products,
    (Langevin, "autograd", "triton"): _fused_module,
    (Langevin, "tiles", "numba"): _cpu_mlp,
    (Langevin, "autograd", "numba"): _cpu_module,
}


# -- all samplers --------------------------------------------------------------------------------------------------


def why_no_kernel(sampler: Any) -> str | None:
    """Why no Triton kernel runs this sampler, in words; None if one does."""
    if any(kind is type(sampler) and kernels == "triton" for kind, _, kernels in FUSED_RUNS):
        return None
    return f"{type(sampler).__name__} has no fused kernel"


@survives_fork  # here too, because a compiled call comes here by itself
def run(job: Job) -> Advanced:
    """By the fused run of the table, or else by the sampler's own steps on the fastest target."""
    choice, chains, sampler = job.choice, job.chains, job.sampler
    fused = FUSED_RUNS.get((type(sampler), choice.path, choice.kernels))
    if fused is not None and choice.backend != "reference":
        return fused(job)
    if choice.path == "tiles":
        description = job.description
        make_target: Callable[[int, Tensor | None], Target] = partial(ClosedForm, description)
        if choice.kernels == "numba":
            make_target = cpu.closed_form(description, choice.precision)
        return tiles.run(chains, sampler, job.steps, make_target=make_target, **job.options)
    assert job.energy is not None
    target = Autograd(job.energy, chains.given)
    by_definition = choice.backend == "reference"
    return reference.run(target, chains, sampler, job.steps, by_definition=by_definition, **job.options)


def reports_bad_starts(path: str, steps: int) -> bool:
    """Whether ``Advanced.report`` covers a start that is not finite, which then needs no test, and sync, of its own."""
    return path in FUSED and steps > 0


def energy_of(description: Description) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(n, dim) states, and labels (n,) or None -> (n,), in closed form."""

    def energy(x: Tensor, labels: Tensor | None) -> Tensor:
        return tiles.energies(description.to(x.device, x.dtype), x, labels)

    return energy
