"""Run a sampler on a target: by a fused run if there is one, otherwise by the sampler's own ``step``.

A fused run computes one or all K steps by kernels written for one sampler. To add one, write a function of a ``Job``
and add a line to ``FUSED_RUNS``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..samplers.base import Adaptation
from ..samplers.hmc import HMC
from ..samplers.langevin import Langevin
from ..samplers.mala import MALA
from ..targets.autograd import Autograd, Energy
from ..targets.base import Target
from ..targets.closed_form import ClosedForm
from ..targets.description import Description
from ..threads import survives_fork
from . import Advanced, Chains, collapsed, cpu, marginal, reference, tiles
from .choose import FUSED, TRITON_PATHS, Choice, launch_for
from .graphs import Recorder

__all__ = ["FUSED_RUNS", "Job", "energy_of", "name_of", "reports_bad_starts", "run", "triton_paths"]


@dataclass(frozen=True, eq=False)
class Job:
    """K steps of a sampler on some chains, and the backend that runs them.

    energy: the energy for autograd. None in a compiled call, which always has a closed form.
    chains: x is contiguous and may be modified in place.
    thin: store the state after every thin-th step; 0 stores none.
    telemetry: also return the sampler's telemetry.
    recorder: records one step as a CUDA graph, or None.
    adaptation: tunes the sampler after each step, from all chains together; or None.
    resumable: return all that the chains carry. Otherwise steps in the first layer, which carry whole states, return
        nothing of it.
    """

    choice: Choice
    energy: Energy | None
    chains: Chains
    sampler: Any
    steps: int
    thin: int = 0
    telemetry: bool = False
    recorder: Recorder | None = None
    adaptation: Adaptation | None = None
    resumable: bool = False

    @property
    def description(self) -> Description:
        """The MLP energy on the chains' device and in their dtype."""
        assert self.choice.description is not None
        x = self.chains.x
        return self.choice.description.to(x.device, x.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that every run takes."""
        return {"thin": self.thin, "telemetry": self.telemetry}


# -- Langevin ------------------------------------------------------------------------------------------------------


def _fused_mlp(job: Job) -> Advanced:
    from . import fused  # imported here, because it imports triton

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


# -- HMC and MALA --------------------------------------------------------------------------------------------------


def _fused_hmc(job: Job) -> Advanced:
    from . import fused_hmc

    choice = job.choice
    reduced = choice.path == "collapsed"
    description = job.description if reduced else choice.description
    assert description is not None
    return fused_hmc.run_hmc(
        description, job.chains, job.sampler, job.steps, precision=choice.precision, launch=choice.launch,
        reduced=reduced, **job.options,
    )  # fmt: skip


# By sampler, path and kernels (``Choice``).
FUSED_RUNS: dict[tuple[type, str, str], Callable[[Job], Advanced]] = {
    (Langevin, "resident", "triton"): _fused_mlp,
    (Langevin, "streaming", "triton"): _fused_mlp,
    (Langevin, "products", "triton"): _fused_products,
    (Langevin, "autograd", "triton"): _fused_module,
    (Langevin, "tiles", "numba"): _cpu_mlp,
    (Langevin, "autograd", "numba"): _cpu_module,
    (HMC, "resident", "triton"): _fused_hmc,
    (HMC, "collapsed", "triton"): _fused_hmc,
    (MALA, "resident", "triton"): _fused_hmc,
    (MALA, "collapsed", "triton"): _fused_hmc,
}


def _marginal(job: Job) -> Advanced:
    def inner(description: Description, chains: Chains) -> Advanced:
        choice = job.choice
        path, launch = "tiles", None
        if choice.backend == "triton":
            launch = launch_for(description, choice.precision, chains.x.device)
            path, launch = ("products", None) if isinstance(launch, str) else (launch.regime, launch)
        choice = replace(choice, description=description, path=path, launch=launch)
        return run(replace(job, choice=choice, chains=chains, sampler=replace(job.sampler, marginal_noise=False)))

    return marginal.run(job.description, job.chains, job.sampler, job.steps, inner=inner, **job.options)


# -- all samplers --------------------------------------------------------------------------------------------------


def _fused_run(sampler: Any, path: str, kernels: str) -> Callable[[Job], Advanced] | None:
    return None if _preconditioned(sampler) else FUSED_RUNS.get((type(sampler), path, kernels))


def _preconditioned(sampler: Any) -> bool:
    """Whether the sampler is a ``Langevin`` with a preconditioner, which no kernel knows."""
    return isinstance(sampler, Langevin) and sampler.preconditioner is not None


def name_of(sampler: Any, adaptation: Adaptation | None = None) -> str:
    """The sampler in words, for the reason why no kernel runs it."""
    with_it = " with a preconditioner" if _preconditioned(sampler) else ""
    return f"{type(sampler).__name__}{with_it}{'' if adaptation is None else ' in a warm-up'}"


def triton_paths(sampler: Any, adaptation: Adaptation | None = None) -> list[str]:
    """The paths on which a Triton kernel runs this sampler. In a warm-up none: its settings change in each step."""
    if adaptation is not None:
        return []
    return [path for path in TRITON_PATHS if _fused_run(sampler, path, "triton") is not None]


@survives_fork  # here too, because a compiled call enters here, not through the driver
def run(job: Job) -> Advanced:
    """Run a job by its fused run, or else by the sampler's own steps on the fastest target."""
    choice, chains, sampler = job.choice, job.chains, job.sampler
    if choice.path == "marginal":
        return _marginal(job)
    fused = _fused_run(sampler, choice.path, choice.kernels)
    if fused is not None and choice.backend != "reference" and job.adaptation is None:
        return fused(job)
    if choice.path == "collapsed":
        return collapsed.run(
            job.description, chains, sampler, job.steps, kernels=choice.kernels, carry=job.resumable,
            adaptation=job.adaptation, **job.options,
        )  # fmt: skip
    by_definition = choice.backend == "reference"
    target: Target
    mode: AbstractContextManager[None] = nullcontext()
    if choice.launch is not None:
        from .evaluation import Evaluation  # imported here, because it imports triton

        assert choice.description is not None
        target = Evaluation(choice.description, chains, precision=choice.precision, launch=choice.launch)
    elif choice.path == "tiles":
        description = job.description
        make_target: Callable[[int, Tensor | None], Target] = partial(ClosedForm, description)
        if choice.kernels == "numba":
            make_target = cpu.closed_form(description, choice.precision)
        n_weights = sum(weight.numel() for mlp in description.mlps for weight in mlp.weights)
        if job.adaptation is None and not sampler.coupled:
            return tiles.run(chains, sampler, job.steps, make_target=make_target, n_weights=n_weights, **job.options)
        target = tiles.Together(len(chains.x), chains.labels, chains.x.device, make_target, n_weights)
    else:
        assert job.energy is not None
        target = Autograd(job.energy, chains.labels_or_condition)
        mode = job.energy.differentiating()
    with mode:
        return reference.run(
            target, chains, sampler, job.steps, by_definition=by_definition, adaptation=job.adaptation, **job.options
        )


def reports_bad_starts(path: str, steps: int) -> bool:
    """Whether ``Advanced.report`` also covers a non-finite start, which saves a separate test and its device sync."""
    return path in FUSED and steps > 0


def energy_of(description: Description) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function that maps states, (n, dim), and labels, (n,) or None, to E, (n,), in closed form."""

    def energy(x: Tensor, labels: Tensor | None) -> Tensor:
        return tiles.energies(description.to(x.device, x.dtype), x, labels)

    return energy
