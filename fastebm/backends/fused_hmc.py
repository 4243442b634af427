"""K steps of HMC or MALA on an MLP energy in one launch (kernels/triton/hmc.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.triton import hmc, weights
from ..kernels.triton.launch import Launch
from ..rng import Stream
from ..samplers.base import diagonal_at
from ..samplers.hmc import HMC
from ..samplers.mala import MALA
from ..targets.description import Description
from . import Advanced, Chains
from .fused import (
    CHAINS_AT_ONCE,
    aligned,
    bounds_arguments,
    coefficient_arguments,
    compiled_for,
    frozen_arguments,
    layers_of,
    prepare,
)
from .reference import blank

__all__ = ["run_hmc"]


def run_hmc(
    description: Description,
    chains: Chains,
    sampler: HMC | MALA,
    steps: int,
    *,
    precision: str,
    launch: Launch,
    thin: int = 0,
    telemetry: bool = False,
) -> Advanced:
    """All steps of an MLP energy in one launch. chains.x: float32, contiguous, modified in place.

    precision: "bf16" is for the gradients on the way; the energies of the accept test are then computed at bf16x3.
    launch: resident, with room for the weights at bf16x3 if the precision is "bf16".
    """
    x = chains.x
    n_chains, dim = x.shape
    done = Advanced.blank(x, steps, thin)
    table = x.new_empty(3, n_chains) if telemetry else None
    if n_chains == 0:
        return done._replace(telemetry=_named(table, sampler, done, steps))
    n_leapfrog, stream = (sampler.n_leapfrog, Stream.MOMENTUM) if isinstance(sampler, HMC) else (1, Stream.LANGEVIN)
    h, factor = _step(sampler, x) if steps > 0 else (0.0, None)
    h_arguments, per_chain = coefficient_arguments(h)
    bounds, clamp = bounds_arguments(sampler.box, dim, x.device)
    halved = precision == "bf16"
    exact = "bf16x3" if halved else precision
    n_tiles = -(-n_chains // launch.block_chains)
    tiles_at_once = min(n_tiles, CHAINS_AT_ONCE // launch.block_chains)
    scratch = [x.new_empty(tiles_at_once * launch.block_chains, launch.block_dim) for _ in range(3)]
    # Triton launches on the current device, which may not be x's.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        prepared, places = prepare(description, chains.seed, exact, launch, x.device, halved=halved)
        for first_tile in range(0, n_tiles, tiles_at_once):
            hmc.hmc_resident[(min(tiles_at_once, n_tiles - first_tile),)](
                x,
                done.energy,
                done.first_bad,
                done.trajectory,
                thin,
                table,
                chains.numbers,
                chains.first_steps,
                chains.labels,
                *frozen_arguments(chains),
                *h_arguments,
                factor,
                *bounds,
                n_leapfrog,
                *(prepared,) * 3,
                n_chains,
                steps,
                0,
                first_tile,
                *scratch,
                None if chains.labels is None else torch.empty_like(done.energy),
                **places,
                **compiled_for(description, launch, precision),
                ENERGY=layers_of(description, launch, exact, halved=halved),
                BOTH_ORDERS=launch.both_orders,
                OWN_CHAINS=launch.own_chains,
                H_PER_CHAIN=per_chain,
                CLAMP=clamp,
                STREAM=int(stream),
            )
    report = prepared[weights.REPORT.value]
    return done._replace(telemetry=_named(table, sampler, done, steps), report=report)


def _step(sampler: HMC | MALA, x: Tensor) -> tuple[float | Tensor, Tensor | None]:
    """h = step_size M^(-1/2): a number or (1 or n_chains, 1 or steps), times one factor per dim, (dim,), or None.

    In float64 until the end, like the samplers.
    """
    h = sampler.step_size
    if isinstance(h, Tensor):
        h = h.detach().to(x.device, torch.float64)
        h = h if h.ndim == 2 else h.reshape(1, -1)
    if isinstance(sampler, HMC):
        mass = diagonal_at("mass", sampler.mass, x)
        scale = 1 / (mass.double().sqrt() if isinstance(mass, Tensor) else math.sqrt(mass))
    else:
        c = diagonal_at("preconditioner", sampler.preconditioner, x)
        scale = c.double().sqrt() if isinstance(c, Tensor) else math.sqrt(c)
        h = h**0.5
    if isinstance(scale, Tensor):
        return h, aligned(scale.to(torch.float32))
    return h * scale, None


def _named(table: Tensor | None, sampler: HMC | MALA, done: Advanced, steps: int) -> dict[str, Tensor] | None:
    """Telemetry by name, from the kernel's table of |dE/dx| at the end, and mean acceptance and divergences."""
    if table is None:
        return None
    if steps == 0:
        return {name: blank(empty, done.x) for name, empty in sampler.reports.items()}
    named: dict[str, Any] = dict(zip(("grad_norm", "acceptance", "divergences"), table, strict=True))
    if isinstance(sampler, HMC):
        taken = torch.where(done.first_bad < 0, steps, done.first_bad)  # steps of each chain
        named["gradients"] = (taken * sampler.n_leapfrog / steps).to(done.x.dtype)
    return {name: named[name] for name in sampler.reports}
