"""What a sampling call did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backends import Advanced, Chains
from ..backends.choose import Choice

__all__ = ["SampleInfo", "info_of"]


@dataclass(frozen=True, eq=False)
class SampleInfo:
    """What a sampling call did.

    Attributes:
        backend: "triton", "torch" or "reference".
        path: what ran in it: "resident" or "streaming" (the fused kernel), "tiles" or "products" (closed-form
            gradient), or "autograd".
        kernels: what computed noise, update and activations: "triton", "numba" or "torch" (plain PyTorch).
        why_not_fused: why the fused kernel did not run, and what ran instead; or None.
        precision: of the matrix products.
        seed: reproduces the call. A tensor if it was given as one, or the call is compiled.
        cuda_graph: with ``cuda_graph=True``, "recorded", or why no step was; else None.
        step_size: of the sampler, or None if it has none.
        temperature: implied, noise_scale^2 of a ``Langevin``; 1 for an exact sampler.
        energies: (n_chains,) E of the last states.
        first_bad_step: (n_chains,) int32, the first step of this call whose new state was not finite; -1 if none.
        acceptance: (n_chains,) the mean acceptance probability of proposals, or None without an accept test.
        grad_norm: (n_chains,) |dE/dx| before clips, over the coordinates that are not frozen, where the last step took
            the gradient; NaN after no step; None if the sampler does not report it.
        clipped, clamped: (n_chains,) the fraction of steps in which a clip changed the gradient, or the clamp the state
            (with noise_first: the clamp after the gradient); None for samplers other than ``Langevin``.
    """

    backend: str
    path: str
    kernels: str
    why_not_fused: str | None
    precision: str
    seed: int | Tensor
    cuda_graph: str | None
    step_size: float | Tensor | None
    temperature: float | Tensor
    energies: Tensor
    first_bad_step: Tensor
    acceptance: Tensor | None = None
    grad_norm: Tensor | None = None
    clipped: Tensor | None = None
    clamped: Tensor | None = None


def info_of(choice: Choice, done: Advanced, chains: Chains, sampler: Any) -> SampleInfo:
    """What a run did. done.telemetry: what was asked for."""
    return SampleInfo(
        backend=choice.backend,
        path=choice.path,
        kernels=choice.kernels,
        why_not_fused=choice.why_not_fused,
        precision=choice.precision,
        seed=chains.seed,
        cuda_graph=done.cuda_graph,
        step_size=getattr(sampler, "step_size", None),
        temperature=getattr(sampler, "temperature", 1.0),
        energies=done.energy,
        first_bad_step=done.first_bad,
        **(done.telemetry or {}),
    )
