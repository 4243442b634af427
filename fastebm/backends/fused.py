"""The Triton path: the fused K-step kernel for MLP energies, and autograd with the fused update for all others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..energies import Energy
from ..kernels import langevin as kernels
from ..kernels.launch import Launch, block
from ..kernels.update import langevin_update
from ..langevin import Langevin
from ..mlp import MLP
from . import Advanced
from .choose import interpreted

__all__ = ["advance_mlp", "advance_module"]

# triton 3.10 turns fused multiply-add off by default; the interpreter takes no such option.
_OPTIONS = {} if interpreted() else {"enable_fp_fusion": True}


def advance_mlp(
    mlp: MLP,
    x: Tensor,
    rule: Langevin,
    steps: int,
    *,
    seed: int,
    chains: Tensor,
    first_steps: Tensor,
    precision: str,
    launch: Launch,
) -> Advanced:
    """x: (n_chains, dim) float32, contiguous, moved in place; chains, first_steps: (n_chains,) int64."""
    n_chains, dim = x.shape
    device = x.device
    energy = torch.empty(n_chains, dtype=torch.float32, device=device)
    first_bad = torch.empty(n_chains, dtype=torch.int32, device=device)
    arguments, flags = _rule_arguments(rule, n_chains, steps, device)
    weights, biases, head, head_bias = _padded_layers(mlp, precision, launch)
    kernel, extra = kernels.langevin_resident, []
    if launch.regime == "streaming":
        kernel, extra = kernels.langevin_streaming, [weights[0].abs().amax()]
    if n_chains == 0:
        return Advanced(x, energy, first_bad)
    # triton launches on the current device, which may be another than x's
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[((n_chains + launch.block_chains - 1) // launch.block_chains,)](
            x,
            energy,
            first_bad,
            chains,
            first_steps,
            _seed_tensor(seed, device),
            *arguments,
            tuple(_operand(w, precision) for w in weights),
            tuple(biases),
            head,
            head_bias,
            n_chains,
            steps,
            0,
            *extra,
            DIM=dim,
            BLOCK_DIM=launch.block_dim,
            BLOCKS=tuple(block(w) for w in mlp.widths),
            ACTIVATIONS=tuple(a.name for a in mlp.activations),
            PARAMETERS=tuple(a.parameter for a in mlp.activations),
            PRECISION=precision,
            BLOCK_CHAINS=launch.block_chains,
            **flags,
            FAST=_fast(precision),
            INTERPRETED=interpreted(),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **_OPTIONS,
        )
    return Advanced(x, energy, first_bad)


def advance_module(
    energy: Energy, x: Tensor, rule: Langevin, steps: int, *, seed: int, chains: Tensor, first_steps: Tensor
) -> Advanced:
    """Any energy: its gradient by autograd, then noise, update and clamp in one launch. x is overwritten."""
    n_chains, dim = x.shape
    device = x.device
    first_bad = torch.full((n_chains,), -1, dtype=torch.int32, device=device)
    arguments, flags = _rule_arguments(rule, n_chains, steps, device)
    seed_tensor = _seed_tensor(seed, device)
    # about 1,024 elements a program: 8 a thread of four warps
    block_dim = max(4, min(1024, 1 << (dim - 1).bit_length()))
    block_chains = max(1, 1024 // block_dim)
    new = torch.empty_like(x)
    for t in range(steps if n_chains > 0 else 0):
        grad = energy.gradient(x).contiguous()
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            langevin_update[((n_chains + block_chains - 1) // block_chains,)](
                new,
                x,
                grad,
                first_bad,
                chains,
                first_steps,
                seed_tensor,
                *arguments,
                n_chains,
                t,
                DIM=dim,
                BLOCK_DIM=block_dim,
                BLOCK_CHAINS=block_chains,
                **flags,
                FAST=_fast(None),
                num_warps=4,
                **_OPTIONS,
            )
        x, new = new, x
    return Advanced(x, energy(x), first_bad)


def _rule_arguments(
    rule: Langevin, n_chains: int, steps: int, device: torch.device
) -> tuple[list[Tensor | int | float], dict[str, bool]]:
    """The rule as kernel arguments (a and b with their strides, bounds) and compile-time flags."""
    arguments: list[Tensor | int | float] = []
    flags = {}
    for name, c in zip("AB", rule.coefficients(n_chains, steps, device=device), strict=True):
        c = c.contiguous()
        per_chain = c.shape[0] > 1
        arguments += [c, c.stride(0) if per_chain else 0, 1 if c.shape[1] > 1 else 0]
        flags[f"{name}_PER_CHAIN"] = per_chain
    arguments += [0.0 if rule.grad_clip is None else rule.grad_clip, *(rule.clamp or (0.0, 0.0))]
    flags |= {"CLIP": rule.grad_clip is not None, "CLAMP": rule.clamp is not None}
    return arguments, flags


def _seed_tensor(seed: int, device: torch.device) -> Tensor:
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return torch.full((1,), signed, dtype=torch.int64, device=device)


def _padded_layers(mlp: MLP, precision: str, launch: Launch) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Hidden weights (BLOCK_OUT, padded in) and biases (BLOCK_OUT,), the head (BLOCK,) and its bias (1,), zero-padded.

    At bf16 the kernel's silu takes z/2 (kernels/mlp.py), so the layers that feed one are halved, which is exact.
    """
    weights, biases = [], []
    padded_in = -(-mlp.dim // launch.block_dim) * launch.block_dim
    for weight, bias, activation in zip(mlp.weights[:-1], mlp.biases[:-1], mlp.activations, strict=True):
        scale = 0.5 if precision == "bf16" and activation.name == "silu" else 1.0
        n_out, n_in = weight.shape
        padded_out = block(n_out)
        weights.append(pad(weight * scale if scale != 1.0 else weight, (0, padded_in - n_in, 0, padded_out - n_out)))
        bias = weight.new_zeros(n_out) if bias is None else bias
        biases.append(pad(bias * scale if scale != 1.0 else bias, (0, padded_out - n_out)).contiguous())
        padded_in = padded_out
    head, head_bias = mlp.weights[-1][0], mlp.biases[-1]
    head = pad(head, (0, padded_in - len(head))).contiguous()
    return weights, biases, head, head.new_zeros(1) if head_bias is None else head_bias


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
