"""fastebm.sample: one call for all samplers, with warm-up, thinning and resuming."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..backends import Advanced, Chains
from ..backends.choose import Choice
from ..backends.settle import NonFiniteError, reinitialised
from ..energies import EnergyLike
from ..energies.functions import as_module
from ..samplers.base import check_settings, checked_sampler, for_steps
from ..threads import survives_fork
from ..tracing import capturing
from .arguments import checked_count, checked_frozen, checked_thin
from .info import SampleInfo, check_reports, info_of
from .run import energies_of, run_chains
from .settings import Settings
from .start import Start

__all__ = ["ChainState", "SampleResult", "sample"]

# A call with a progress bar runs in this many parts, and the bar moves after each.
_PARTS = 20

# With progress=None a bar appears above this many chains x dims x steps: the call then takes seconds.
_MANY = 10**8

# The one number that is of the last step. All others are means over the steps.
_LAST = "grad_norm"


class ChainState(NamedTuple):
    """All that a later call needs to continue the chains.

    chains: states, seed, chain numbers, lifetime steps, labels or condition, and frozen coordinates.
    energies: (n_chains,) E of the states, or None before the first step.
    stopped: (n_chains,) bool, chains that stopped because they were not finite, or None.
    """

    chains: Chains
    energies: Tensor | None = None
    stopped: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SampleResult:
    """The result of ``fastebm.sample``.

    Attributes:
        x: (n_chains, *shape) last states.
        trajectory: (n_chains, steps // thin, *shape) every thin-th state after the warm-up. None with thin=0.
        energies: (n_chains,) E of x.
        info: a ``SampleInfo``. Its averages exclude the warm-up.
        state: what ``sample(..., init=result)`` needs to continue the chains.
    """

    x: Tensor
    trajectory: Tensor | None
    energies: Tensor
    info: SampleInfo
    state: ChainState


@survives_fork
def sample(
    energy: EnergyLike,
    sampler: Any,
    input_size: int | Sequence[int] | None = None,
    *,
    n_chains: int = 32,
    steps: int,
    warmup: int = 0,
    thin: int = 0,
    init: Tensor | SampleResult | None = None,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
    frozen: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_chain: int = 0,
    backend: str = "auto",
    precision: str | None = None,
    device: torch.device | str | None = None,
    on_nonfinite: str = "raise",
    cuda_graph: bool = False,
    progress: bool | None = None,
) -> SampleResult:
    """Sample exp(-E) with any sampler: ``sample(energy, Langevin(0.1), steps=1000)``.

    The energy runs in eval mode and is left unchanged. On one kind of device, the same weights, start, seed and
    precision give the same bits for each chain, whatever else is in the batch.

    Args:
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1). On CUDA the fused kernel runs
            ``Langevin`` on MLPs, on a ``ClassifierEnergy`` of an MLP, and on a ``SumEnergy`` of these.
        sampler: ``Langevin(step_size)``, ``MALA(step_size)``, ... A schedule has warmup + steps entries.
        input_size: number of dims or shape of one state. Optional with ``init``, or if the energy defines it: an MLP,
            or a ``GaussianEnergy`` with a mean of that shape.
        n_chains: number of chains, >= 0. Ignored with ``init``.
        steps: number of steps after the warm-up, >= 0.
        warmup: number of steps before them, >= 0. Their states are not stored.
        thin: store the state after every thin-th step; must divide ``steps``. 0: return the last states only.
        init: (n_chains, *shape) floating-point start. float64 is computed in float64, every other dtype in float32.
            A ``SampleResult`` continues its chains, with the same bits as one longer call. None: uniform on the
            sampler's clamp, or on [-1, 1] without a clamp.
        labels: (n_chains,) integers, the class of each chain, for an energy that takes labels besides x.
        condition: (n_chains, ...) tensor in place of labels: what each chain is conditioned on.
        frozen: bool, of one state's shape or (n_chains, *shape). True marks coordinates that keep their start value.
        seed: 64-bit seed of the noise. None: drawn from ``generator``. An int64 tensor of one element is read on the
            device.
        generator: source of the seed. None: torch's global CPU generator.
        first_chain: global number of the first chain. Together with seed and step it determines the noise.
        backend: "auto", "triton", "torch" or "reference".
        precision: of the fused kernel's products: "bf16x3", "tf32", "bf16" or "ieee". None: see ``langevin_sample``.
        device: where to sample without ``init``. None: the energy's device.
        on_nonfinite: what to do with chains that are not finite: "raise", "reinit" (start them again) or "ignore"
            (keep their last finite state).
        cuda_graph: record one step as a CUDA graph and replay it: see ``langevin_sample``.
        progress: show a progress bar on stderr. None: on a terminal, for calls that take seconds.

    With a ``SampleResult`` as ``init``, the seed and the chain numbers come from the result, and so do labels,
    condition and frozen unless they are passed.

    Returns:
        A ``SampleResult``: states, trajectory, energies, a ``SampleInfo``, and what is needed to continue.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing has been changed. The message states the requirement, the
            value and the likely fix.
        NonFiniteError: chains are not finite, with ``on_nonfinite="raise"``. The message says what to try.
    """
    if torch.compiler.is_compiling():
        from ..backends import compiling

        result: SampleResult = compiling.uncompiled(
            sample, energy, sampler, input_size, n_chains=n_chains, steps=steps, warmup=warmup, thin=thin, init=init,
            labels=labels, condition=condition, frozen=frozen, seed=seed, generator=generator, first_chain=first_chain,
            backend=backend, precision=precision, device=device, on_nonfinite=on_nonfinite, cuda_graph=cuda_graph,
            progress=progress,
        )  # fmt: skip
        return result
    energy, sampler = as_module(energy), checked_sampler(sampler)
    check_reports(sampler)
    steps, warmup, thin = (checked_count(*count) for count in (("steps", steps), ("warmup", warmup), ("thin", thin)))
    thin = checked_thin(max(thin, 1), steps, thin > 0, on_nonfinite)
    settings = Settings(backend, precision, cuda_graph, on_nonfinite)
    settings.check()
    if isinstance(init, SampleResult):
        _check_resumed(input_size, seed, generator, first_chain, device)
        shape = tuple(init.x.shape[1:])
        check_settings(sampler, len(init.x), warmup + steps)
        state = _resumed(init, labels, condition, frozen, energy, sampler, settings)
    else:
        start = Start(
            energy, input_size, ("n_chains", n_chains), init, labels, condition, frozen, seed, generator, first_chain,
            0, device,
        )  # fmt: skip
        place = start.place()
        shape = place.shape
        if capturing(place.device):
            raise ValueError("fastebm.sample can't be captured in a CUDA graph: langevin_sample can")
        check_settings(sampler, place.n_chains, warmup + steps)
        state = ChainState(_owned(start.chains(place, warmup + steps, sampler.box)))
    chains = state.chains
    run = _Run(energy, sampler, shape, settings, thin, warmup + steps, check_start=isinstance(init, Tensor))
    many = len(chains.x) * chains.x.shape[1] * (warmup + steps) > _MANY
    shown = (sys.stderr.isatty() and many) if progress is None else progress
    # Parts must not change the result: "reinit" acts at the end of a part, and a CUDA graph needs many steps.
    in_parts = shown and not cuda_graph and on_nonfinite != "reinit"
    size = max(thin, -(-max(steps, warmup) // (_PARTS * max(thin, 1))) * max(thin, 1)) if in_parts else 0
    with tqdm(total=warmup + steps, unit=" steps", disable=not shown, dynamic_ncols=True) as bar:
        if warmup > 0:
            before, _, state = run.steps(state, 0, warmup, size, bar, keep=False)
        done, choice, state = run.steps(state, warmup, warmup + steps, size, bar, keep=True)
    if warmup > 0:  # the first bad step may have been in the warm-up
        done = done._replace(first_bad=torch.where(before.first_bad >= 0, before.first_bad, done.first_bad))
    trajectory = None if done.trajectory is None else done.trajectory.reshape(*done.trajectory.shape[:2], *shape)
    # A copy: whoever changes the samples in place does not change what the chains go on from.
    x = done.x.reshape(len(done.x), *shape).clone()
    return SampleResult(x, trajectory, done.energy, info_of(choice, done, chains, sampler), state)


@dataclass(frozen=True, eq=False)
class _Run:
    """Runs the steps of one call, in parts if there is a progress bar."""

    energy: EnergyLike
    sampler: Any
    shape: Sequence[int]
    settings: Settings
    thin: int
    total: int
    check_start: bool

    def steps(
        self, state: ChainState, first: int, last: int, size: int, bar: Any, *, keep: bool
    ) -> tuple[Advanced, Choice, ChainState]:
        """Run steps first to last - 1 of the call.

        size: steps per part; 0 runs all in one part. keep: store the trajectory.
        """
        parts: list[tuple[int, Advanced]] = []
        edges = [*range(first, last, size), last] if size > 0 and last > first else [first, last]
        for start, stop in pairwise(edges):
            n = stop - start
            done, choice = run_chains(
                self.energy, state.chains, for_steps(self.sampler, start, stop), n, shape=self.shape,
                settings=self.settings, thin=self.thin if keep else 0, telemetry=True, check_start=self.check_start,
                part=(start, self.total),
            )  # fmt: skip
            done = _still_stopped(done, state, start)
            stopped = state.stopped
            if self.settings.on_nonfinite == "ignore":
                stopped = done.first_bad >= 0
            chains = state.chains._replace(x=done.x, first_steps=state.chains.first_steps + n)
            state = ChainState(chains, done.energy, stopped)
            parts.append((n, done))
            bar.update(n)
        return _joined(parts), choice, state


def _still_stopped(done: Advanced, before: ChainState, first: int) -> Advanced:
    """Count bad steps from the start of the call, and put chains that had stopped before back where they were."""
    first_bad = torch.where(done.first_bad >= 0, done.first_bad + first, done.first_bad)
    rows, energies = before.stopped, before.energies
    if rows is None or energies is None or not bool(rows.any()):
        return done._replace(first_bad=first_bad)
    x = torch.where(rows[:, None], before.chains.x.to(done.x.dtype), done.x)
    trajectory = done.trajectory
    if trajectory is not None:
        trajectory = torch.where(rows[:, None, None], x[:, None], trajectory)
    reported = {
        name: value.masked_fill(rows, math.nan if name == _LAST else 0.0)
        for name, value in (done.telemetry or {}).items()
    }
    return done._replace(
        x=x,
        energy=torch.where(rows, energies, done.energy),
        first_bad=torch.where(rows, first, first_bad),
        trajectory=trajectory,
        telemetry=reported,
    )


def _joined(parts: list[tuple[int, Advanced]]) -> Advanced:
    """One result from consecutive parts. parts: (number of steps, result) of each."""
    _, result = parts[0]
    if len(parts) == 1:
        return result
    total = sum(steps for steps, _ in parts)
    first_bad, telemetry = result.first_bad, {name: 0.0 * v for name, v in (result.telemetry or {}).items()}
    for steps, done in parts:
        stopped = first_bad >= 0  # before this part
        first_bad = torch.where(stopped, first_bad, done.first_bad)
        for name, value in (done.telemetry or {}).items():
            if name == _LAST:
                telemetry[name] = value if done is result else torch.where(stopped, telemetry[name], value)
            else:
                telemetry[name] = telemetry[name] + value * (steps / total)
    trajectories = [done.trajectory for _, done in parts if done.trajectory is not None]
    trajectory = torch.cat(trajectories, dim=1) if trajectories else None
    return parts[-1][1]._replace(first_bad=first_bad, telemetry=telemetry, trajectory=trajectory)


def _owned(chains: Chains) -> Chains:
    """Chains whose tensors nobody else holds: the caller may change those that were passed."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return chains._replace(
        seed=copy(chains.seed),
        labels=copy(chains.labels),
        condition=copy(chains.condition),
        frozen=copy(chains.frozen),
    )


def _check_resumed(input_size: object, seed: object, generator: object, first_chain: int, device: object) -> None:
    """Raise if an argument is passed that the ``SampleResult`` already determines."""
    options = {"input_size": input_size, "seed": seed, "generator": generator, "device": device}
    names = [name for name, value in options.items() if value is not None]
    names += ["first_chain"] if first_chain != 0 else []
    if names:
        raise ValueError(
            f"a SampleResult as init= has its own {', '.join(names)}: leave them out, or pass init=result.x"
        )


def _resumed(
    result: SampleResult, labels: Tensor | None, condition: Tensor | None, frozen: Tensor | None, energy: EnergyLike,
    sampler: Any, settings: Settings,
) -> ChainState:  # fmt: skip
    """The state to continue from, with new labels, condition or frozen coordinates if they are passed.

    Chains that have stopped stay so with on_nonfinite="ignore", and are reinitialised with "reinit".
    """
    chains, _, stopped = result.state
    shape = tuple(result.x.shape[1:])
    if labels is not None or condition is not None:
        chains = chains._replace(labels=labels, condition=condition)
    if frozen is not None:
        chains = chains._replace(frozen=checked_frozen(frozen, len(chains.x), shape, chains.x.device))
    chains = _owned(chains)
    if stopped is None or not bool(stopped.any()):
        return ChainState(chains)
    if settings.on_nonfinite == "raise":
        raise NonFiniteError(
            f"{int(stopped.sum())} of {len(stopped)} chains of the SampleResult stopped because they were not finite: "
            'on_nonfinite="ignore" leaves them where they are, "reinit" starts them again'
        )
    if settings.on_nonfinite == "ignore":  # their energies under the energy of this call
        return ChainState(chains, energies_of(energy, chains, shape=shape, settings=settings), stopped)
    x = chains.x.clone()
    x[stopped] = reinitialised(chains.rows(stopped), sampler)
    return ChainState(chains._replace(x=x))
