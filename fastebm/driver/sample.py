"""fastebm.sample: one call for all samplers, with warm-up, thinning and resuming."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backends import Chains
from ..backends.settle import NonFiniteError, forget, reinitialised
from ..energies import EnergyLike
from ..energies.functions import as_module
from ..samplers.base import check_settings, checked_sampler
from ..threads import survives_fork
from ..tracing import capturing
from .arguments import checked_count, checked_frozen, checked_thin
from .info import SampleInfo, check_reports, info_of
from .parts import Parts
from .result import ChainState, SampleResult
from .run import energies_of
from .settings import Settings
from .start import Start

__all__ = ["ChainState", "SampleResult", "sample"]

# A call with a progress bar runs in this many parts, and the bar moves after each.
_PARTS = 20

# With progress=None a bar appears above this many chains x dims x steps: the call then takes seconds.
_MANY = 10**8

# From this many steps on, chains that accept next to nothing are reported.
_MANY_STEPS = 20


@survives_fork
def sample(
    energy: EnergyLike,
    sampler: Any = None,
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
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1). On CUDA a fused kernel runs
            ``Langevin`` on MLPs, on a ``ClassifierEnergy`` of an MLP, and on a ``SumEnergy`` of these. It runs ``HMC``
            and ``MALA`` up to 128 dims, or units of the first layer.
        sampler: ``Langevin(step_size)``, ``MALA(step_size)``, ... A schedule has warmup + steps entries. None with a
            ``SampleResult`` as init: its sampler, with the values that its warm-up adapted.
        input_size: number of dims or shape of one state. Optional with ``init``, or if the energy defines it: an MLP,
            or a ``GaussianEnergy`` with a mean of that shape.
        n_chains: number of chains, >= 0. Ignored with ``init``.
        steps: number of steps after the warm-up, >= 0.
        warmup: number of steps before them, >= 0, on top of ``steps``, and possibly more than these. 0: none. Their
            states are not stored. Samplers with an accept test adapt their step size and scale in these steps, from
            all chains together, and then keep them: see the sampler. Below about 50 steps only the step size is
            adapted. If ``info.acceptance`` is far below target_acceptance afterwards, or is 1, take more steps.
        thin: store the state after every thin-th step; must divide ``steps``. 0: return the last states only.
        init: (n_chains, *shape) floating-point start. float64 is computed in float64, every other dtype in float32.
            A ``SampleResult`` continues its chains, with the same bits as one longer call. None: uniform on the
            sampler's clamp, or on [-1, 1] without a clamp.
        labels: (n_chains,) integers, the class of each chain, for an energy that takes labels besides x.
        condition: (n_chains, ...) tensor in place of labels: what each chain is conditioned on. None for
            ``AnnealedLangevin`` and ``PredictorCorrector``, which give the energy its noise level.
        frozen: bool, of one state's shape or (n_chains, *shape). True marks coordinates that keep their start value.
        seed: 64-bit seed of the noise. None: drawn from ``generator``. An int64 tensor of one element is read on the
            device.
        generator: source of the seed. None: torch's global CPU generator.
        first_chain: global number of the first chain. Together with seed and step it determines the noise.
        backend: "auto", "triton", "torch" or "reference".
        precision: of the fused kernel's products: "bf16x3", "tf32", "bf16" or "ieee". None: see ``langevin_sample``.
            A sampler with an accept test replaces "bf16" by "bf16x3", in the fused kernel of HMC and MALA for energies
            only: a rounded energy would be another target.
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
    if sampler is None and isinstance(init, SampleResult):
        sampler = init.sampler
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
    run = Parts(energy, shape, settings, thin, warmup + steps, check_start=isinstance(init, Tensor))
    many = len(chains.x) * chains.x.shape[1] * (warmup + steps) > _MANY
    shown = (sys.stderr.isatty() and many) if progress is None else progress
    # Parts must not change the result: "reinit" acts at the end of a part, where marginal noise completes the states.
    # And a CUDA graph needs many steps.
    whole = cuda_graph or on_nonfinite == "reinit" or getattr(sampler, "marginal_noise", False)
    in_parts = shown and not whole
    size = max(thin, -(-max(steps, warmup) // (_PARTS * max(thin, 1))) * max(thin, 1)) if in_parts else 0
    with tqdm(total=warmup + steps, unit=" steps", disable=not shown, dynamic_ncols=True) as bar:
        if warmup > 0:
            adaptation = sampler.adaptation(warmup)
            before, _, state = run.steps(sampler, state, 0, warmup, size, bar, keep=False, adaptation=adaptation)
            sampler = sampler if adaptation is None else adaptation.sampler
        begun = time.perf_counter()
        done, choice, state = run.steps(sampler, state, warmup, warmup + steps, size, bar, keep=True)
        _wait(done.x.device)
        seconds = time.perf_counter() - begun
    if warmup > 0:  # the first bad step may have been in the warm-up
        done = done._replace(first_bad=torch.where(before.first_bad >= 0, before.first_bad, done.first_bad))
    trajectory = None if done.trajectory is None else done.trajectory.reshape(*done.trajectory.shape[:2], *shape)
    # A copy: whoever changes the samples in place does not change what the chains go on from.
    x = done.x.reshape(len(done.x), *shape).clone()
    info = info_of(choice, done, chains, sampler, seconds=seconds)
    _warn_of_rejections(info, steps)
    return SampleResult(x, trajectory, done.energy, info, state, energy)


def _wait(device: torch.device) -> None:
    """Wait for the device's steps, so that their time is known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warn_of_rejections(info: SampleInfo, steps: int) -> None:
    """Warn about chains that accepted next to nothing: they did not sample anything."""
    if info.acceptance is None or steps < _MANY_STEPS:
        return
    # Chains that stopped because they were not finite are reported elsewhere.
    rows = ((info.acceptance * steps < 0.5) & (info.first_bad_step < 0)).nonzero().flatten()
    if len(rows) > 0:
        first = ", ".join(str(int(row)) for row in rows[:5])
        warnings.warn(
            f"{len(rows)} of {len(info.acceptance)} chains accepted next to none of {steps} proposals (chains "
            f"{first}{', ...' if len(rows) > 5 else ''}), so they did not move: use a smaller step_size, or a longer "
            "warm-up, which finds one",
            stacklevel=4,
        )


def _owned(chains: Chains) -> Chains:
    """Chains whose tensors nobody else holds: the caller may change those that were passed."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    carried = chains.carried
    return chains._replace(
        carried=None if carried is None else {name: copy(value) for name, value in carried.items()},
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
    if type(sampler) is not type(result.sampler):  # another sampler has another state
        chains = chains._replace(carried=None)
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
        return ChainState(chains, energies_of(energy, chains, sampler, shape=shape, settings=settings), stopped)
    x = chains.x.clone()
    x[stopped] = reinitialised(chains.rows(stopped), sampler)
    forget(chains.carried, stopped)
    return ChainState(chains._replace(x=x))
