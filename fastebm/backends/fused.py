"""The Triton path: the fused K-step kernel for MLP energies; for all others a gradient, and the fused update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..description import Description
from ..energies import Energy
from ..kernels import langevin as kernels
from ..kernels.launch import Launch, block
from ..kernels.update import langevin_update
from ..langevin import Langevin
from ..mlp import MLP
from . import Advanced, Chains, Telemetry
from .choose import interpreted
from .graphs import Recorder, run_steps
from .torch_tiles import Evaluator, matrix, rows_of_products

__all__ = ["advance_mlp", "advance_module", "advance_products"]

# triton 3.10 turns fused multiply-add off by default; the interpreter takes no such option.
_OPTIONS = {} if interpreted() else {"enable_fp_fusion": True}
# ptxas moves no more out of loops than it must (its default is 5)
_LEAN_OPTIONS = {} if interpreted() else {"ptx_options": "--register-usage-level=3"}


def advance_mlp(
    description: Description,
    chains: Chains,
    rule: Langevin,
    steps: int,
    *,
    precision: str,
    launch: Launch,
    thin: int = 0,
    telemetry: bool = False,
) -> Advanced:
    """chains.x: float32, contiguous, moved in place."""
    x = chains.x
    n_chains, dim = x.shape
    device = x.device
    energy = torch.empty(n_chains, dtype=torch.float32, device=device)
    first_bad = torch.empty(n_chains, dtype=torch.int32, device=device)
    trajectory = x.new_empty(n_chains, steps // thin, dim) if thin else None
    told = x.new_empty(3, n_chains) if telemetry else None
    arguments, flags = _rule_arguments(rule, n_chains, steps, dim, device)
    mlps = description.scaled_heads()
    layers = [layer for mlp in mlps for layer in _layers(mlp, precision, launch)]
    depths = [len(mlp.weights) for mlp in mlps]
    terms = _term_arguments(description, launch)
    extra: list[Any]
    rows = -(-n_chains // launch.block_chains) * launch.block_chains
    if launch.regime == "streaming":
        halves = (2 if launch.own_chains else 0) if precision == "bf16x3" else 1
        operand = torch.bfloat16 if precision in ("bf16", "bf16x3") else torch.float32
        slopes = (torch.empty(rows, halves, block(mlp.widths[0]), dtype=operand, device=device) for mlp in mlps)
        kernel, extra = kernels.langevin_streaming, [_reach(description), tuple(slopes)]
        flags["OWN_CHAINS"] = launch.own_chains
        flags["LEAN"] = launch.lean
        flags["BOUNDED"] = flags["CLAMP"] == "numbers" and all(map(math.isfinite, arguments[-2:]))
    else:
        padded = launch.in_memory and dim != launch.block_dim
        kernel, extra = kernels.langevin_resident, [x.new_empty(rows, launch.block_dim) if padded else None]
        flags["BOTH_ORDERS"] = launch.both_orders
    if n_chains > 0:
        # triton launches on the current device, which may be another than x's
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernel[((n_chains + launch.block_chains - 1) // launch.block_chains,)](
                x,
                energy,
                first_bad,
                trajectory,
                thin,
                told,
                chains.numbers,
                chains.first_steps,
                _seed_tensor(chains.seed, device),
                chains.labels,
                *_frozen_arguments(chains),
                *arguments,
                tuple(weight for weight, _ in layers),
                tuple(bias for _, bias in layers),
                -description.scales,
                *terms,
                n_chains,
                steps,
                0,
                *extra,
                DIM=dim,
                BLOCK_DIM=launch.block_dim,
                FIRSTS=tuple(accumulate(depths, initial=0)),
                BLOCKS=tuple(block(len(weight)) for mlp in mlps for weight in mlp.weights),
                ACTIVATIONS=tuple(name for mlp in mlps for name in (*(a.name for a in mlp.activations), mlp.head)),
                PARAMETERS=tuple(p for mlp in mlps for p in (*(a.parameter for a in mlp.activations), 0.0)),
                PRECISION=precision,
                BLOCK_CHAINS=launch.block_chains,
                **flags,
                FAST=_fast(precision),
                IN_MEMORY=launch.in_memory,
                TARGET="interpreter" if interpreted() else "wgmma" if launch.in_memory or launch.lean else "gpu",
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                **_OPTIONS,
                **(_LEAN_OPTIONS if launch.lean else {}),
            )
    return Advanced(x, energy, first_bad, trajectory, None if told is None else Telemetry(*told))


def advance_module(
    energy: Energy, chains: Chains, rule: Langevin, steps: int, *, thin: int = 0, telemetry: bool = False,
    recorder: Recorder | None = None,
) -> Advanced:  # fmt: skip
    """Any energy: its gradient by autograd, then noise, update and clamp in one launch. chains.x is moved in place.

    recorder: to record one step and replay it.
    """

    def gradient(x: Tensor) -> Tensor:
        return energy.gradient(x, chains.labels).contiguous()

    done = _advance_by_gradient(gradient, chains, rule, steps, thin, telemetry, recorder)
    return done._replace(energy=energy(chains.x, chains.labels))


def advance_products(
    description: Description, chains: Chains, rule: Langevin, steps: int, *, thin: int = 0, telemetry: bool = False,
    recorder: Recorder | None = None,
) -> Advanced:  # fmt: skip
    """An MLP energy too wide for the fused kernel: closed-form gradient by library products, and the fused update.

    chains.x is moved in place. recorder: to record one step and replay it.
    """
    n_chains, dim = chains.x.shape
    n_rows = rows_of_products(chains.x.device)
    evaluator = Evaluator(description, n_rows, n_rows)
    tile, tile_grad = matrix(n_rows, dim, chains.x).zero_(), matrix(n_rows, dim, chains.x)
    tile_labels = None if chains.labels is None else chains.labels.new_zeros(n_rows)
    grad, energy = torch.empty_like(chains.x), chains.x.new_empty(n_chains)

    def each_tile(x: Tensor) -> Iterator[slice]:
        """Load every tile of the states in turn; rows past the last hold something finite that nobody reads."""
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

    done = _advance_by_gradient(gradient, chains, rule, steps, thin, telemetry, recorder)
    for rows in each_tile(chains.x):
        energy[rows] = evaluator.energy(tile, tile_labels)[: rows.stop - rows.start]
    return done._replace(energy=energy)


def _advance_by_gradient(
    gradient: Callable[[Tensor], Tensor], chains: Chains, rule: Langevin, steps: int, thin: int, telemetry: bool,
    recorder: Recorder | None,
) -> Advanced:  # fmt: skip
    """Without the energies."""
    x = chains.x
    n_chains, dim = x.shape
    device = x.device
    first_bad = torch.full((n_chains,), -1, dtype=torch.int32, device=device)
    trajectory = x.new_empty(n_chains, steps // thin, dim) if thin else None
    told = x.new_zeros(3, n_chains) if telemetry else None
    arguments, flags = _rule_arguments(rule, n_chains, steps, dim, device)
    seed = _seed_tensor(chains.seed, device)
    at = torch.zeros(1, dtype=torch.int64, device=device)
    # about 1,024 elements a program: 8 a thread of four warps
    block_dim = max(4, min(1024, 1 << (dim - 1).bit_length()))
    block_chains = max(1, 1024 // block_dim)
    new = torch.empty_like(x)

    def step() -> None:
        grad = gradient(x)  # the only line that may raise or wait: nothing has moved yet
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            langevin_update[((n_chains + block_chains - 1) // block_chains,)](
                new,
                x,
                grad,
                first_bad,
                told,
                chains.numbers,
                chains.first_steps,
                seed,
                *_frozen_arguments(chains),
                *arguments,
                n_chains,
                at,
                DIM=dim,
                BLOCK_DIM=block_dim,
                BLOCK_CHAINS=block_chains,
                **flags,
                FAST=_fast(None),
                num_warps=4,
                **_OPTIONS,
            )
        x.copy_(new)  # not a swap: what a CUDA graph records stays in its place
        at.add_(1)

    def keep(t: int) -> None:
        if trajectory is not None and (t + 1) % thin == 0:
            trajectory[:, t // thin] = x

    how = run_steps(step, steps if n_chains > 0 else 0, recorder, keep)
    if told is not None:
        told[1:] /= max(steps, 1)
        if steps == 0:
            told[0] = torch.nan
    return Advanced(x, x, first_bad, trajectory, None if told is None else Telemetry(*told), how)


def _rule_arguments(
    rule: Langevin, n_chains: int, steps: int, dim: int, device: torch.device
) -> tuple[list[Any], dict[str, Any]]:
    """The rule as kernel arguments (a and b with their strides, clips, bounds) and compile-time flags."""
    arguments: list[Any] = []
    flags: dict[str, Any] = {}
    for name, c in zip("AB", rule.coefficients(n_chains, steps, device=device), strict=True):
        c = c.contiguous()
        per_chain = c.shape[0] > 1
        arguments += [c, c.stride(0) if per_chain else 0, 1 if c.shape[1] > 1 else 0]
        flags[f"{name}_PER_CHAIN"] = per_chain
    bounds = rule.bounds(dim, device=device)
    arguments += [rule.grad_clip, rule.grad_norm_clip, *(bounds or (None, None))]
    flags["CLAMP"] = "" if bounds is None else "rows" if isinstance(bounds[0], Tensor) else "numbers"
    return arguments, flags


def _frozen_arguments(chains: Chains) -> tuple[Tensor | None, int]:
    if chains.frozen is None:
        return None, 0
    return chains.frozen.contiguous().view(torch.uint8), chains.x.shape[1] if len(chains.frozen) > 1 else 0


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.to(device)
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return torch.full((1,), signed, dtype=torch.int64, device=device)


def _layers(mlp: MLP, precision: str, launch: Launch) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Of each layer, the weight (BLOCK_OUT, padded in) in its halves and the bias (BLOCK_OUT,), zero-padded.

    A scalar or class head is (1 or classes, padded in) float32, and its bias not padded; that of a "logsumexp" head is
    -inf in the padding, which holds no class. At bf16 the kernel's silu takes z/2 (kernels/mlp.py), so the layers
    that feed one are halved, which is exact.
    """
    padded_in = -(-mlp.dim // launch.block_dim) * launch.block_dim
    for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        is_head = i == len(mlp.activations)
        if precision == "bf16" and not is_head and mlp.activations[i].name == "silu":
            weight, bias = weight * 0.5, None if bias is None else bias * 0.5
        n_out, n_in = weight.shape
        bias = weight.new_zeros(n_out) if bias is None else bias
        weight = pad(weight, (0, padded_in - n_in))
        if is_head and mlp.head != "logsumexp":
            yield (weight.contiguous(),), bias.contiguous()
            return
        padded_in = block(n_out)
        weight = pad(weight, (0, 0, 0, padded_in - n_out))
        bias = pad(bias, (0, padded_in - n_out), value=-torch.inf if is_head else 0.0)
        if i == 0:
            weight = _in_lanes(weight)
        yield _operand(weight, precision), bias.contiguous()


def _term_arguments(description: Description, launch: Launch) -> list[Tensor | None]:
    """curvature, mean and linear, zero-padded, and the constant (1,)."""
    padded = -(-description.dim // launch.block_dim) * launch.block_dim
    rows = (description.curvature, description.mean, description.linear)
    return [
        *(None if row is None else _in_lanes(pad(row, (0, padded - len(row)))).contiguous() for row in rows),
        description.constant.reshape(1),
    ]


def _in_lanes(v: Tensor) -> Tensor:
    """The last axis in the order of kernels/philox.py, to_lanes."""
    return v.reshape(*v.shape[:-1], -1, 4, 2, 2).transpose(-3, -2).reshape(v.shape)


def _reach(description: Description) -> Tensor:
    """What bounds a gradient in the streaming kernel: max|c|, max|b - c m|, and max|W_1| of each network."""
    zero = description.constant.new_zeros(())
    c, m, b = description.curvature, description.mean, description.linear
    pull = (zero if b is None else b) - (zero if c is None or m is None else c * m)
    largest = [zero if c is None else c.abs().amax(), pull.abs().amax()]
    return torch.stack([*largest, *(mlp.weights[0].abs().amax() for mlp in description.mlps)])


def _operand(weight: Tensor, precision: str) -> tuple[Tensor, ...]:
    """A weight as the kernel multiplies it: one tensor, or for bf16x3 its rounded value and what that left."""
    weight = weight.contiguous()
    if precision not in ("bf16", "bf16x3"):
        return (weight,)
    hi = weight.bfloat16()
    return (hi,) if precision == "bf16" else (hi, (weight - hi).bfloat16())


def _fast(precision: str | None) -> bool:
    """Approximate special functions: not under the interpreter, which has none, nor at full precision."""
    return not interpreted() and precision != "ieee"
