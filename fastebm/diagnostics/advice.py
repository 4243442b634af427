"""Warnings where a user would be misled. Each says what was measured, what it means, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..driver.result import SampleResult
from ..samplers.langevin import Langevin
from .draws import Draws
from .modes import apart
from .step_bias import excess_variance, one_number

__all__ = ["advice", "different_laws"]

# Vehtari et al. 2021: R-hat below 1.01, and 400 effective draws, from which R-hat and ESS are themselves reliable.
_RHAT, _ESS = 1.01, 400

# A variance that is this much too large shifts the 5% and 95% quantiles of a Gaussian by 2.5%.
_EXCESS = 0.05

# A clip or clamp in more steps than this is no rare event of the tails.
_OFTEN = 0.05

# Pairs of temperatures that swap less often than this exchange next to nothing. About 0.23 is best (Atchade, Roberts &
# Rosenthal 2011).
_SWAPS = 0.05

Table = Mapping[str, list[Any]]


def different_laws(result: SampleResult, draws: Draws) -> str | None:
    """In what the chains' laws differ, so that chains can't be compared; None if they sample one law."""
    chains, rows = result.state.chains.rows(draws.rows), draws.rows
    given = chains.labels_or_condition
    if given is not None and bool((given != given[:1]).any()):
        return chains.kind
    frozen, temperature = chains.frozen, result.info.temperature
    if frozen is not None:
        kept = torch.where(frozen, chains.x, 0.0)
        if bool((frozen != frozen[:1]).any()) or bool((kept != kept[:1]).any()):
            return "frozen coordinates"
    if isinstance(temperature, Tensor) and temperature.ndim == 2 and len(temperature) > 1:
        temperature = temperature[rows.to(temperature.device)]
        if bool((temperature != temperature[:1]).any()):
            return "temperatures"
    return None


def advice(
    result: SampleResult, draws: Draws, table: Table, energies: Tensor | None, mala_acceptance: float | None
) -> list[str]:
    """The warnings, the gravest first. energies: (n, draws) or None."""
    found = [*_failures(result, draws, energies), *_law(result, draws, mala_acceptance)]
    different = different_laws(result, draws)
    if type(result.sampler).coupled:
        found.append(
            f"the chains of {type(result.sampler).__name__} interact. R-hat, ESS and MCSE are for independent chains, "
            "so they say nothing about its error: repeat the call with other seeds and compare"
        )
    elif different is not None:
        found.append(
            f"the chains have different {different}, so they sample different laws, and R-hat, ESS and MCSE, which "
            "compare chains, do not apply: diagnose the chains of each law by themselves, as in "
            "diagnose(result, chains=labels == 0)"
        )
    elif result.sampler.condition is None:  # at falling noise levels there is no law to have explored: _law says so
        found += [*_mixing(draws, table)]
    return found


def _failures(result: SampleResult, draws: Draws, energies: Tensor | None) -> Iterator[str]:
    """Chains that failed, or that did not move."""
    info, n = result.info, len(draws.rows)
    if draws.stopped:
        yield (
            f"{draws.stopped} of {n + draws.stopped} chains stopped, because they were no longer finite, and are left "
            "out here. What is left is biased towards where the energy is tame: use a smaller step_size"
        )
    if energies is not None and (bad := int((~energies.isfinite()).sum())):
        yield (
            f"the energy is not finite at {bad} of {energies.numel()} stored states, so it is left out here. An exact "
            "sampler, such as MALA, rejects such states"
        )
    still = int(draws.still.sum())
    if still:
        yield (
            f"{still} of {n} chains never moved, so they sampled nothing: use a smaller step_size, or a warm-up, which "
            "finds one"
        )
    if info.divergences is not None and (rate := _mean(info.divergences, draws)) > 0:
        yield (
            f"{rate:.2%} of the trajectories diverged and were rejected. Where they do, the energy bends more sharply "
            "than the step size resolves, and the chains hardly go there: use a smaller step_size, or a higher "
            "target_acceptance in the warm-up"
        )
    if info.swap_acceptance is not None:
        swaps = info.swap_acceptance[draws.rows].nanmean(dim=0)
        if bool((untried := swaps.isnan()).any()):
            first = int(untried.nonzero()[0])
            yield (
                f"the temperatures {first} and {first + 1} did not try to swap once, so the hot chains did not help "
                "the cold one: take more steps, or a smaller swap_every"
            )
        if bool((swaps < _SWAPS).any()):
            worst = int(swaps.nan_to_num(nan=1.0).argmin())
            yield (
                f"the temperatures {worst} and {worst + 1} swap in {float(swaps[worst]):.1%} of the tries, so the hot "
                "chains hardly help the cold one: put more temperatures between them (0.2 to 0.4 is good)"
            )


def _law(result: SampleResult, draws: Draws, mala_acceptance: float | None) -> Iterator[str]:
    """What else than exp(-E) the chains sample."""
    info = result.info
    if result.sampler.condition is not None:
        yield (
            f"the noise level of {type(result.sampler).__name__} falls over the steps, so the stored states have no "
            "common law: its samples are the last states. Diagnose Langevin at the last level, started from them"
        )
    schedule = info.temperature
    temperature = one_number(schedule, draws.x.shape[1])
    if isinstance(schedule, Tensor) and schedule.ndim == 1 and temperature is None:
        yield (
            f"the temperature changed over the steps, from {float(schedule[0]):.3g} to {float(schedule[-1]):.3g}, so "
            "the stored states have no common law: sample at one temperature, and diagnose that"
        )
    elif temperature == 0:
        yield "the temperature is 0, so the chains descended the energy and sampled nothing: use noise_scale=1"
    elif temperature not in (None, 1):
        yield (
            f"the chains sample exp(-E / T) with the temperature T = {temperature:.3g}, not exp(-E): for exp(-E) pass "
            "a step size and leave noise_scale at 1, as in Langevin(0.1)"
        )
    sampler = result.sampler
    measured = isinstance(sampler, Langevin) and not sampler.noise_first
    if not (sampler.exact or measured or sampler.coupled or sampler.condition is not None):
        yield (
            f"the moves of {type(sampler).__name__} have no accept test, and their bias is not measured: repeat the "
            "call with half the step size and compare"
        )
    dims = int((~draws.held).sum())
    if mala_acceptance is not None and (excess := excess_variance(mala_acceptance, dims)) > _EXCESS:
        yield (
            f"a Metropolis test would accept {mala_acceptance:.1%} of these steps, so the step size biases the law. On "
            f"a Gaussian, this means variances that are {_percent(excess)} too large if all {dims} dims share the "
            f"error, or {_percent(excess_variance(mala_acceptance, 1))} in one dim that has all of it. Use MALA, which "
            "makes the test, or a smaller step_size, to which the bias is proportional"
        )
    if info.clipped is not None and (rate := _mean(info.clipped, draws)) > _OFTEN:
        yield (
            f"the gradient was clipped in {rate:.1%} of the steps. A clipped gradient is that of another energy: "
            "loosen grad_clip or grad_norm_clip, or use MALA, which needs no clip"
        )
    if info.clamped is not None and (rate := _mean(info.clamped, draws)) > _OFTEN:
        yield (
            f"the clamp changed the state in {rate:.1%} of the steps. So states pile up on the bounds, more than under "
            "exp(-E) in the box: widen clamp, or use MALA, which rejects what is outside"
        )


def _mixing(draws: Draws, table: Table) -> Iterator[str]:
    """Chains that have not explored what they sample."""
    n = len(draws.rows)
    if n == 1:
        yield "there is one chain, and R-hat needs several: without it, nothing tells of modes that it never reached"
    name = "rhat_nested" if "rhat_nested" in table else "rhat"
    if table[name] and (worst := max(table[name])) > _RHAT:
        words = "nested R-hat" if name == "rhat_nested" else "R-hat"
        where = table["name"][table[name].index(worst)]
        yield (
            f"{words} of {where} is {worst:.3f}, above {_RHAT}: the chains disagree, so each is still too short. Take "
            "a longer warm-up or more steps. Chains in equilibrium get below it with a few hundred effective draws "
            "each; many chains that are shorter can share starts, see superchains="
        )
    if (found := apart(draws)) is not None:
        yield (
            f"the chains stay in separate regions: {found.below} of {n} below {found.axis}, {found.above} above, and "
            f"{found.crossed} on both sides. These are modes, or the chains are far too short. How many chains are in "
            "each comes from the starts, not from exp(-E): use ParallelTempering, or far more steps"
        )
    ess = [min(pair) for pair in zip(table["ess_bulk"], table["ess_tail"], strict=True)]
    if ess and min(ess) < _ESS:
        where = table["name"][ess.index(min(ess))]
        yield (
            f"{where} has {min(ess):.0f} effective draws, fewer than {_ESS}: its estimates, and R-hat and ESS "
            "themselves, are unreliable. Take more steps or more chains"
        )


def _mean(value: Tensor, draws: Draws) -> float:
    return float(value[draws.rows].double().mean())


def _percent(excess: float) -> str:
    return f"{excess:.0%}" if excess < 10 else "over 1000%"
