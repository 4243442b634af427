"""K steps of HMC or MALA on an MLP energy in one launch (kernels/triton/hmc.py), also in its first layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.triton import hmc, weights
from ..kernels.triton.launch import CHUNK_DIM, Launch
from ..rng import Stream
from ..samplers.base import diagonal_at
from ..samplers.hmc import HMC
from ..samplers.mala import MALA
from ..targets.collapsed import FirstLayer, end_of_leaps
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
    reduced: bool = False,
) -> Advanced:
    """All steps of an MLP energy in one launch. chains.x: float32, contiguous, modified in place.

    precision: "bf16" is for the gradients on the way; the energies of the accept test are then computed at bf16x3.
    launch: resident, with room for the weights at bf16x3 if the precision is "bf16".
    reduced: take the steps in the dims that the first layer sees (kernels/triton/reduced.py). The launch is that of
        the reduced energy.
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
    n_tiles = -(-n_chains // launch.block_chains)
    tiles_at_once = min(n_tiles, CHAINS_AT_ONCE // launch.block_chains)
    n_rows = tiles_at_once * launch.block_chains
    of = _Steps(description, x, factor)
    if reduced:
        of = _reduced(FirstLayer(description, factor), x, h, n_leapfrog, n_rows, launch, precision)
    halved = precision == "bf16"
    exact = "bf16x3" if halved else precision
    scratch = x.new_empty(n_rows, hmc.PLACES.value, launch.block_dim)
    end = None if chains.labels is None else torch.empty_like(done.energy)
    # Triton launches on the current device, which may not be x's.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        prepared, places = prepare(
            of.description, chains.seed, exact, launch, x.device, halved=halved, basis=of.basis
        )  # fmt: skip
        for first_tile in range(0, n_tiles, tiles_at_once):
            hmc.hmc_resident[(min(tiles_at_once, n_tiles - first_tile),)](
                of.state,
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
                of.factor,
                *bounds,
                n_leapfrog,
                *(prepared,) * 3,
                n_chains,
                steps,
                0,
                first_tile,
                scratch,
                end,
                *of.whole,
                **{**of.constants, **places},
                **compiled_for(of.description, launch, precision),
                ENERGY=layers_of(of.description, launch, exact, halved=halved),
                BOTH_ORDERS=launch.both_orders,
                OWN_CHAINS=launch.own_chains,
                H_PER_CHAIN=per_chain,
                CLAMP=clamp,
                STREAM=int(stream),
            )
    report = prepared[weights.REPORT.value]
    return done._replace(telemetry=_named(table, sampler, done, steps), report=report)


class _Steps(NamedTuple):
    """The energy and state that the kernel takes its steps with.

    state: (n_chains, dim). factor: one factor of h per dim, or None. basis: as ``prepare`` takes it.
    whole: the kernel's arguments from whole_ptr to stride_leaps_step. constants: its constants of whole states.
    """

    description: Description
    state: Tensor
    factor: Tensor | None = None
    basis: Tensor | None = None
    whole: Sequence[Any] = (None,) * 10
    constants: Mapping[str, Any] = dict.fromkeys(
        ("BASIS", "BASIS_LOWS", "OF_BASIS", "WHOLE_DIM", "CHUNK_DIM", "CURVED")
    )


def _reduced(
    layer: FirstLayer, x: Tensor, h: float | Tensor, n_leapfrog: int, n_rows: int, launch: Launch, precision: str
) -> _Steps:
    """Steps in the dims that the first layer sees. x: whole states. n_rows: of scratch."""
    (n_chains, dim), (q, _) = x.shape, layer.basis
    description, c, mean, scale = layer.reduced(), layer.curvature, layer.mean, layer.scale
    numbers = end_of_leaps(h if isinstance(h, float) else h.flatten(), n_leapfrog, c)
    table = torch.stack([torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1) for v in numbers])
    whole = [
        x, x.new_empty(n_rows, dim), x.new_empty(3, n_chains), None if mean is None else aligned(mean),
        None if scale is None else torch.stack([scale, 1 / scale]), c,
        table, table.shape[1], *(int(isinstance(h, Tensor) and h.shape[i] > 1) for i in (0, 1)),
    ]  # fmt: skip
    of_basis = layers_of(
        description, launch, "ieee" if precision == "ieee" else "bf16x3", halved=precision == "bf16"
    )  # fmt: skip
    constants = {"OF_BASIS": of_basis, "WHOLE_DIM": dim, "CHUNK_DIM": CHUNK_DIM, "CURVED": c != 0.0}
    return _Steps(description, x.new_empty(n_chains, description.dim), None, q.t(), whole, constants)


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
