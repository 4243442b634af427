"""Langevin steps by Triton kernels.

MLP energies: one launch for all steps. Other energies: at each step a gradient, then one launch for noise, update and
clamp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..box import Box
from ..kernels.triton import resident, streaming, update, weights
from ..kernels.triton.launch import CHUNK_DIM, Launch, block
from ..kernels.triton.mlp import Layers
from ..samplers.langevin import Langevin
from ..targets.autograd import Energy
from ..targets.closed_form import Evaluator, matrix, rows_of_products
from ..targets.description import Description
from . import LANGEVIN_TELEMETRY, Advanced, Chains, averaged
from .choose import interpreted
from .graphs import Recorder, run_steps

__all__ = [
    "CHAINS_AT_ONCE",
    "aligned",
    "bounds_arguments",
    "coefficient_arguments",
    "compiled_for",
    "frozen_arguments",
    "layers_of",
    "prepare",
    "run_mlp",
    "run_module",
    "run_products",
    "slopes_scratch",
]

# triton 3.10 turns fused multiply-add off by default; the interpreter takes no such option.
_OPTIONS = {} if interpreted() else {"enable_fp_fusion": True}
# Lower than ptxas' default of 5: less is hoisted out of loops, which saves registers.
_LEAN_OPTIONS = {} if interpreted() else {"ptx_options": "--register-usage-level=3"}

# Most chains per launch where each chain needs scratch memory, which the next launch reuses. An H200 works on about
# 17,000 chains at a time (132 SMs with a tile of 128 each), so the last of a launch's eight rounds may leave SMs idle,
# which costs a few per cent. With 256 hidden units the scratch is at most 128 MiB; for 10 million chains at once it
# would be 10 GB. (HMC in the first layer takes as much as their states, too.)
CHAINS_AT_ONCE = 2**17


def run_mlp(
    description: Description,
    chains: Chains,
    sampler: Langevin,
    steps: int,
    *,
    precision: str,
    launch: Launch,
    thin: int = 0,
    telemetry: bool = False,
) -> Advanced:
    """All Langevin steps of an MLP energy in one launch. chains.x: float32, contiguous, modified in place."""
    x = chains.x
    n_chains, dim = x.shape
    device = x.device
    energy = torch.empty(n_chains, dtype=torch.float32, device=device)
    first_bad = torch.empty(n_chains, dtype=torch.int32, device=device)
    trajectory = x.new_empty(n_chains, steps // thin, dim) if thin else None
    table = x.new_empty(3, n_chains) if telemetry else None
    if n_chains == 0:
        return Advanced(x, energy, first_bad, trajectory, _named(table))
    arguments, flags = _sampler_arguments(sampler, n_chains, steps, dim, device)
    # With zero steps, the kernel must not load the first step's coefficients, as it does with noise first.
    flags["NOISE_FIRST"] = sampler.noise_first and steps > 0
    flags["CLAMP_NOISE"] = sampler.clamp_noise and steps > 0
    n_tiles = -(-n_chains // launch.block_chains)
    tiles_at_once, extra, of_regime = _regime(description, launch, precision, n_tiles, x)
    flags.update(of_regime)
    if launch.regime == "streaming":
        kernel = streaming.langevin_streaming
        flags["BOUNDED"] = flags["CLAMP"] == "numbers" and all(map(math.isfinite, arguments[-2:]))
    else:
        kernel = resident.langevin_resident
    constants, frozen = compiled_for(description, launch, precision), frozen_arguments(chains)
    # Triton launches on the current device, which may not be x's.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        prepared, places = prepare(description, chains.seed, precision, launch, device)
        state = x, energy, first_bad, trajectory, thin, table, chains.numbers, chains.first_steps, chains.labels
        for first_tile in range(0, n_tiles, tiles_at_once):
            kernel[(min(tiles_at_once, n_tiles - first_tile),)](
                *state,
                *frozen,
                *arguments,
                *(prepared,) * 3,
                n_chains,
                steps,
                0,
                first_tile,
                *extra,
                **places,
                **constants,
                **flags,
                IN_MEMORY=launch.in_memory,
            )
    report = prepared[weights.REPORT.value]
    return Advanced(x, energy, first_bad, trajectory, _named(table), report=report)


def _regime(
    description: Description, launch: Launch, precision: str, n_tiles: int, x: Tensor
) -> tuple[int, list[Any], dict[str, Any]]:
    """The number of tiles per launch, and the scratch and compile-time flags that only this regime's kernel takes."""
    padded = launch.in_memory and x.shape[1] != launch.block_dim
    tiles_at_once = n_tiles
    if launch.regime == "streaming" or padded:
        tiles_at_once = min(n_tiles, CHAINS_AT_ONCE // launch.block_chains)
    rows = tiles_at_once * launch.block_chains
    if launch.regime == "resident":
        scratch = [x.new_empty(rows, launch.block_dim) if padded else None]
        return tiles_at_once, scratch, {"BOTH_ORDERS": launch.both_orders}
    return tiles_at_once, [slopes_scratch(description, launch, precision, x.device, rows)], {
        "OWN_CHAINS": launch.own_chains, "LEAN": launch.lean,
    }  # fmt: skip


def slopes_scratch(
    description: Description, launch: Launch, precision: str, device: torch.device, rows: int
) -> tuple[Tensor, ...]:
    """Memory for the first layers' slopes in the streaming regime, of each network."""
    halves = (2 if launch.own_chains else 0) if precision == "bf16x3" else 1
    operand = torch.bfloat16 if precision in ("bf16", "bf16x3") else torch.float32
    return tuple(
        torch.empty(rows, halves, block(mlp.widths[0]), dtype=operand, device=device) for mlp in description.mlps
    )


def compiled_for(description: Description, launch: Launch, precision: str) -> dict[str, Any]:
    """What every kernel of an MLP energy is compiled for: the networks, the tile, and the compiler's options."""
    return {
        "LAYERS": layers_of(description, launch, precision, halved=precision == "bf16"),
        "DIM": description.dim,
        "BLOCK_DIM": launch.block_dim,
        "BLOCK_CHAINS": launch.block_chains,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **_OPTIONS,
        **(_LEAN_OPTIONS if launch.lean else {}),
    }


def layers_of(description: Description, launch: Launch, precision: str, *, halved: bool) -> Layers:
    """The networks as compile-time constants. halved: as for ``prepare``."""
    mlps = description.mlps
    return Layers(
        FIRSTS=tuple(accumulate((len(mlp.weights) for mlp in mlps), initial=0)),
        BLOCKS=tuple(block(len(weight)) for mlp in mlps for weight in mlp.weights),
        ACTIVATIONS=tuple(name for mlp in mlps for name in (*(a.name for a in mlp.activations), mlp.head)),
        PARAMETERS=tuple(p for mlp in mlps for p in (*(a.parameter for a in mlp.activations), 0.0)),
        PRECISION=precision,
        FAST=_fast(precision),
        TARGET="interpreter" if interpreted() else "wgmma" if launch.in_memory or launch.lean else "gpu",
        HALVED=halved,
    )


def prepare(
    description: Description, seed: int | Tensor, precision: str, launch: Launch, device: torch.device,
    *, halved: bool | None = None, basis: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """A buffer with the seed and the weights, and the offsets in it as compile-time constants of the kernel.

    halved: halve the layers below a silu, which is exact. The kernel's silu takes z/2 at bf16 (activations.py). None:
    if the precision is bf16. basis: (dim, dims of whole states) Q^T (kernels/triton/reduced.py), or None.
    """
    mlps = description.mlps
    halved = precision == "bf16" if halved is None else halved
    networks = tuple(
        weights.Network(
            tuple(map(len, mlp.weights)),
            mlp.head,
            (*(halved and a.name == "silu" for a in mlp.activations), False),
        )
        for mlp in mlps
    )
    c, m, b = (
        None if row is None else row.to(device, torch.float32)
        for row in (description.curvature, description.mean, description.linear)
    )
    streaming = launch.regime == "streaming"
    plan = weights.layout(
        description.dim, networks, precision, launch.block_dim, streaming, c is not None, b is not None,
        None if basis is None else (basis.shape[1], CHUNK_DIM),
    )  # fmt: skip
    sources = [source for mlp in mlps for layer in zip(mlp.weights, mlp.biases, strict=True) for source in layer]
    sources += [description.scales, description.constant, *(row for row in (c, m, b) if row is not None)]
    if streaming and c is not None and m is not None:
        sources.append(c * m if b is None else b - c * m)
    elif streaming and b is not None:
        sources.append(b)
    if basis is not None:
        sources.append(basis)
    sources = [None if v is None else v if v.device == device else v.to(device) for v in sources]
    strides = [(0, 0) if v is None else (0, 0, *v.stride())[-2:] for v in sources]
    prepared = torch.zeros(plan.words, dtype=torch.int32, device=device)
    low, high = (0, 0) if isinstance(seed, Tensor) else _signed_words(seed)
    weights.prepare[(plan.n_programs,)](
        prepared,
        seed.to(device) if isinstance(seed, Tensor) else None,
        low,
        high,
        sources[2 * plan.n_layers],
        tuple(sources),
        tuple(row for row, _ in strides),
        tuple(col for _, col in strides),
        **plan.tables,
        num_warps=4,
        **_OPTIONS,
    )
    return prepared, plan.places


def _signed_words(seed: int) -> tuple[int, int]:
    """The low and high word of a seed as int32: Triton chooses the type of an int argument by its value."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def run_module(
    energy: Energy, chains: Chains, sampler: Langevin, steps: int, *, thin: int = 0, telemetry: bool = False,
    recorder: Recorder | None = None,
) -> Advanced:  # fmt: skip
    """Langevin steps of any energy: autograd's gradient, then noise, update and clamp in one launch.

    chains.x is modified in place. recorder: records one step as a CUDA graph and replays it; or None.
    """

    def gradient(x: Tensor) -> Tensor:
        return aligned(energy.gradient(x, chains.labels_or_condition))

    done = _run_by_gradient(gradient, chains, sampler, steps, thin, telemetry, recorder)
    return done._replace(energy=energy(chains.x, chains.labels_or_condition))


def run_products(
    description: Description, chains: Chains, sampler: Langevin, steps: int, *, thin: int = 0, telemetry: bool = False,
    recorder: Recorder | None = None,
) -> Advanced:  # fmt: skip
    """Langevin steps of an MLP too wide for the fused kernel: closed-form gradient by library products, fused update.

    chains.x is modified in place. recorder: records one step as a CUDA graph and replays it; or None.
    """
    n_chains, dim = chains.x.shape
    n_rows = rows_of_products(chains.x.device)
    evaluator = Evaluator(description, n_rows)
    tile, tile_grad = matrix(n_rows, dim, chains.x).zero_(), matrix(n_rows, dim, chains.x)
    tile_labels = None if chains.labels is None else chains.labels.new_zeros(n_rows)
    grad, energy = torch.empty_like(chains.x), chains.x.new_empty(n_chains)

    def each_tile(x: Tensor) -> Iterator[slice]:
        """Load one tile of states after another. Padding rows hold finite numbers, and their results are not used."""
        for first in range(0, n_chains, n_rows):
            rows = slice(first, min(first + n_rows, n_chains))
            tile[: rows.stop - first] = x[rows]
            if chains.labels is not None and tile_labels is not None:
                tile_labels[: rows.stop - first] = chains.labels[rows]
            yield rows

    def gradient(x: Tensor) -> Tensor:
        for rows in each_tile(x):
            grad[rows] = evaluator.gradient(tile, tile_labels, tile_grad)[: rows.stop - rows.start]
        return grad

    done = _run_by_gradient(gradient, chains, sampler, steps, thin, telemetry, recorder)
    for rows in each_tile(chains.x):
        energy[rows] = evaluator.energy(tile, tile_labels)[: rows.stop - rows.start]
    return done._replace(energy=energy)


def _run_by_gradient(
    gradient: Callable[[Tensor], Tensor], chains: Chains, sampler: Langevin, steps: int, thin: int, telemetry: bool,
    recorder: Recorder | None,
) -> Advanced:  # fmt: skip
    """Steps by a function that returns the gradient. Everything of the result except the energies."""
    x = chains.x
    n_chains, dim = x.shape
    device = x.device
    first_bad = torch.full((n_chains,), -1, dtype=torch.int32, device=device)
    trajectory = x.new_empty(n_chains, steps // thin, dim) if thin else None
    table = x.new_zeros(3, n_chains) if telemetry else None
    arguments, flags = _sampler_arguments(sampler, n_chains, steps, dim, device)
    *coefficients, _, _, lo, hi = arguments
    bounds, clamp = ((lo, hi), flags["CLAMP"]) if sampler.clamp_noise else ((None, None), "")
    of_noise = [*coefficients, None, None, *bounds], clamp
    seed = _seed_tensor(chains.seed, device)
    at = torch.zeros(1, dtype=torch.int64, device=device)
    # About 1,024 elements per program: 8 per thread of four warps.
    block_dim = max(4, min(1024, 1 << (dim - 1).bit_length()))
    block_chains = max(1, 1024 // block_dim)
    new = torch.empty_like(x)

    def launch(
        half: str, new: Tensor, x: Tensor, grad: Tensor | None, table: Tensor | None, arguments: list[Any], clamp: str
    ) -> None:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            update.langevin_update[((n_chains + block_chains - 1) // block_chains,)](
                new,
                x,
                grad,
                first_bad,
                table,
                chains.numbers,
                chains.first_steps,
                seed,
                *frozen_arguments(chains),
                *arguments,
                n_chains,
                at,
                DIM=dim,
                BLOCK_DIM=block_dim,
                BLOCK_CHAINS=block_chains,
                **{**flags, "CLAMP": clamp},
                HALF=half,
                FAST=_fast(None),
                num_warps=4,
                **_OPTIONS,
            )

    def step() -> None:
        # Only the gradient may raise or synchronise, and it runs before any chain moves.
        if sampler.noise_first:
            launch("noise", new, x, None, None, *of_noise)
            launch("drift", x, new, gradient(new), table, arguments, flags["CLAMP"])
        else:
            launch("", new, x, gradient(x), table, arguments, flags["CLAMP"])
            x.copy_(new)  # not a swap: a CUDA graph replays with the same addresses
        at.add_(1)

    def keep(t: int) -> None:
        if trajectory is not None and (t + 1) % thin == 0:
            trajectory[:, t // thin] = x

    outcome = run_steps(step, steps if n_chains > 0 else 0, recorder, keep)
    return Advanced(x, x, first_bad, trajectory, None if table is None else averaged(table, steps), outcome)


def _named(table: Tensor | None) -> dict[str, Tensor] | None:
    """Telemetry by name, from the (3, n_chains) table of a kernel that has already averaged it."""
    return None if table is None else dict(zip(LANGEVIN_TELEMETRY, table, strict=True))


def _sampler_arguments(
    sampler: Langevin, n_chains: int, steps: int, dim: int, device: torch.device
) -> tuple[list[Any], dict[str, Any]]:
    """The sampler as kernel arguments (drift, noise std and their strides, clips, bounds) and compile-time flags."""
    arguments: list[Any] = []
    flags: dict[str, Any] = {}
    for name, c in zip(("DRIFT", "NOISE_STD"), sampler.drift_and_noise(n_chains, steps, device=device), strict=True):
        coefficient, flags[f"{name}_PER_CHAIN"] = coefficient_arguments(c)
        arguments += coefficient
    # Floats, because Triton specialises on an int of 1 and would recompile.
    arguments += [None if clip is None else float(clip) for clip in (sampler.grad_clip, sampler.grad_norm_clip)]
    bounds, flags["CLAMP"] = bounds_arguments(sampler.box, dim, device)
    return [*arguments, *bounds], flags


def coefficient_arguments(c: float | Tensor) -> tuple[list[Any], bool]:
    """A number or (1 or n_chains, 1 or steps) as a ``Coefficient`` of the kernels, and whether it is per chain."""
    if not isinstance(c, Tensor):
        return [float(c), None, None], False
    c = c.to(torch.float32).contiguous()
    per_chain = c.shape[0] > 1
    return [c, c.stride(0) if per_chain else 0, 1 if c.shape[1] > 1 else 0], per_chain


def bounds_arguments(box: Box | None, dim: int, device: torch.device) -> tuple[list[Any], str]:
    """lo and hi, each a number, (dim,) or None, and the kernels' constant CLAMP."""
    if box is None:
        return [None, None], ""
    bounds = box.on(dim, device=device)
    if isinstance(bounds.lo, Tensor) and isinstance(bounds.hi, Tensor):
        return [aligned(bounds.lo), aligned(bounds.hi)], "rows"
    return [*bounds], "numbers"


def aligned(v: Tensor) -> Tensor:
    """The tensor, contiguous and 16-byte aligned. For other pointers Triton recompiles, which takes seconds."""
    v = v.contiguous()
    return v if v.data_ptr() % 16 == 0 else v.clone()


def frozen_arguments(chains: Chains) -> tuple[Tensor | None, int]:
    if chains.frozen is None:
        return None, 0
    return aligned(chains.frozen).view(torch.uint8), chains.x.shape[1] if len(chains.frozen) > 1 else 0


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.to(device)
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return torch.full((1,), signed, dtype=torch.int64, device=device)


def _fast(precision: str | None) -> bool:
    """Whether to use approximate special functions: not in the interpreter, which has none, nor at "ieee"."""
    return not interpreted() and precision != "ieee"
