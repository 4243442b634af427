"""The report of a sampling call."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..backends import Advanced, Chains
from ..backends.choose import Choice
from ..samplers.base import RATIOS

__all__ = ["SampleInfo", "check_reports", "info_of"]


@dataclass(frozen=True, eq=False)
class SampleInfo:
    """What ran in a sampling call, and statistics of its chains.

    Attributes:
        backend: "triton", "torch" or "reference".
        path: how gradients were computed: "resident" or "streaming" (inside the fused kernel), "evaluation" (by a
            kernel that evaluates an MLP energy in one launch), "tiles" or "products" (closed form, by matrix products),
            "collapsed" (steps in the first layer of the MLP, in closed form or inside the fused kernel), "marginal"
            (``Langevin(..., marginal_noise=True)``: steps of what the first layer sees alone), or "autograd".
        kernels: what computed noise, update and activations: "triton" (on the path "evaluation" the activations only),
            "numba" or "torch" (plain PyTorch).
        why_not_fused: why the fused kernel did not run, and what ran instead. None if it ran.
        precision: of the matrix products: "bf16x3", "tf32", "bf16", "ieee" (full float32) or "float64".
        seed: the 64-bit seed that reproduces the call. A tensor if one was passed or the call was compiled.
        cuda_graph: with ``cuda_graph=True``, "recorded" or the reason why not. Otherwise None.
        sampler: the sampler of the last step, with the values that a warm-up adapted.
        step_size: the sampler's, or None if it has none.
        temperature: the temperature that the chains sample: noise_scale^2 for ``Langevin``, 1 for an exact sampler.
        energies: (n_chains,) E of the last states.
        first_bad_step: (n_chains,) int32, the first step of this call whose new state was not finite; -1 if none.
        acceptance: (n_chains,) mean acceptance probability. None for a sampler without an accept test.
        grad_norm: (n_chains,) |dE/dx| over the coordinates that are not frozen, before clips, at the last step's
            gradient. NaN after zero steps. None if the sampler does not report it.
        divergences: (n_chains,) fraction of steps whose proposal or trajectory diverged. These are rejected; ``NUTS``
            takes a state from before the divergence. None if the sampler does not report it.
        gradients: (n_chains,) mean number of gradients per step. None for a sampler that always takes one.
        swap_acceptance: (n_chains, n_temperatures - 1) mean acceptance probability of swaps between neighbouring
            temperatures. NaN for pairs without a swap. None without temperatures.
        swaps: (n_chains, n_temperatures - 1) fraction of steps in which a swap was tried. None without temperatures.
        seconds: wall time of the steps after the warm-up. None if not measured.
        clipped, clamped: (n_chains,) fraction of steps in which a clip changed the gradient, or the clamp changed the
            state (with noise_first: the clamp of x'). None for samplers other than ``Langevin``.
    """

    backend: str
    path: str
    kernels: str
    why_not_fused: str | None
    precision: str
    seed: int | Tensor
    cuda_graph: str | None
    sampler: Any
    step_size: float | Tensor | None
    temperature: float | Tensor
    energies: Tensor
    first_bad_step: Tensor
    acceptance: Tensor | None = None
    grad_norm: Tensor | None = None
    divergences: Tensor | None = None
    gradients: Tensor | None = None
    swap_acceptance: Tensor | None = None
    swaps: Tensor | None = None
    seconds: float | None = None
    clipped: Tensor | None = None
    clamped: Tensor | None = None


def info_of(
    choice: Choice, done: Advanced, chains: Chains, sampler: Any, *, seconds: float | None = None
) -> SampleInfo:
    """The report of a run. Telemetry that was not requested stays None."""
    telemetry = dict(done.telemetry or {})
    for name in RATIOS.keys() & telemetry.keys():
        telemetry[name] = telemetry[name] / telemetry[RATIOS[name]]
    return SampleInfo(
        backend=choice.backend,
        path=choice.path,
        kernels=choice.kernels,
        why_not_fused=choice.why_not_fused,
        precision=choice.precision,
        seed=chains.seed,
        cuda_graph=done.cuda_graph,
        sampler=sampler,
        step_size=getattr(sampler, "step_size", None),
        temperature=getattr(sampler, "temperature", 1.0),
        energies=done.energy,
        first_bad_step=done.first_bad,
        seconds=seconds,
        **telemetry,
    )


def check_reports(sampler: Any) -> None:
    """Raise a TypeError if the sampler reports a number for which ``SampleInfo`` has no field."""
    known = {field.name for field in fields(SampleInfo)}
    if unknown := sorted(set(sampler.reports) - known):
        raise TypeError(f"{type(sampler).__name__} reports {', '.join(unknown)}, which SampleInfo has no field for")
