"""Noise, update and clamp in one launch, for any energy whose gradient was computed elsewhere.

    x' = clamp(x - a clip(g) + b xi)

or, for rules with the noise first, one half of a step: y = x + b xi, or x' = clamp(y - a clip(g)).

Reads x and g, writes x' to a second buffer: a chain turns out non-finite only at its last chunk, and its old
state must still be there to freeze at.
"""

import triton
import triton.language as tl

from .langevin import (
    clamped,
    clipped_by_value,
    differs,
    hold,
    is_finite,
    load_coefficient,
    load_counters,
    load_key,
    shrinkage,
    tile_at,
)
from .philox import normals


@triton.jit
def load_gradient(grad_ptr, frozen_ptr, stride_frozen, chains, inside, dims, DIM: tl.constexpr):
    """(BLOCK_CHAINS, BLOCK_DIM), 0 where frozen."""
    mask = inside[:, None] & (dims < DIM)[None, :]
    grad = tl.load(grad_ptr + chains[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    return hold(grad, 0.0, frozen_ptr, stride_frozen, chains, inside, dims, 0, DIM)


@triton.jit(do_not_specialize=["n_chains"], do_not_specialize_on_alignment=["chain_ptr", "step_ptr", "seed_ptr"])
def langevin_update(
    new_ptr,  # (n_chains, DIM) float32, out
    x_ptr,  # (n_chains, DIM) float32
    grad_ptr,  # (n_chains, DIM) float32; None for noise alone
    first_bad_ptr,  # (n_chains,) int32, in and out
    telemetry_ptr,  # (3, n_chains) float32, in and out: gradient norm, steps clipped, steps clamped; or None
    chain_ptr, step_ptr, seed_ptr, frozen_ptr, stride_frozen,
    drift, stride_a_chain, stride_a_step, noise_std, stride_b_chain, stride_b_step,
    grad_clip, norm_clip, lo, hi,
    n_chains,
    t_ptr,  # (1,) int64, the step of this call: in memory, so that a CUDA graph of one step serves them all
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    A_PER_CHAIN: tl.constexpr, B_PER_CHAIN: tl.constexpr, CLAMP: tl.constexpr,
    HALF: tl.constexpr,  # "noise", "drift", or "" for both
    FAST: tl.constexpr,
):  # fmt: skip
    _, chains, inside = tile_at(tl.program_id(0), n_chains, BLOCK_CHAINS)
    t = tl.load(t_ptr)
    key0, key1 = load_key(seed_ptr)
    chain, step = load_counters(chain_ptr, step_ptr, chains, inside, t)
    first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
    a = load_coefficient(drift, stride_a_chain, stride_a_step, chains, inside, t, A_PER_CHAIN)
    b = load_coefficient(noise_std, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)

    shrink = None
    if norm_clip is not None:
        square = tl.zeros((BLOCK_CHAINS,), tl.float32)
        for first_dim in range(0, DIM, BLOCK_DIM):
            dims = first_dim + tl.arange(0, BLOCK_DIM)
            grad = load_gradient(grad_ptr, frozen_ptr, stride_frozen, chains, inside, dims, DIM)
            clipped = clipped_by_value(grad, grad_clip)
            square += tl.sum(clipped * clipped, axis=1)
        shrink = shrinkage(square, norm_clip)

    finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
    raw_square = tl.zeros((BLOCK_CHAINS,), tl.float32)
    any_clipped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    any_clamped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    for first_dim in range(0, DIM, BLOCK_DIM):
        dims = first_dim + tl.arange(0, BLOCK_DIM)
        offsets = chains[:, None] * DIM + dims[None, :]
        mask = inside[:, None] & (dims < DIM)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        if HALF != "noise":
            grad = load_gradient(grad_ptr, frozen_ptr, stride_frozen, chains, inside, dims, DIM)
            clipped = clipped_by_value(grad, grad_clip)
            if shrink is not None:
                clipped *= shrink
        if HALF != "drift":
            noise = normals(key0, key1, chain, step, first_dim // 4, 0, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST, False, b)
        if HALF == "noise":
            moved = x + noise
        elif HALF == "drift":
            moved = x - a * clipped
        else:
            moved = x - a * clipped + noise
        moved = hold(moved, x, frozen_ptr, stride_frozen, chains, inside, dims, 0, DIM)
        moved = tl.where(mask, moved, 0.0)
        finite = finite & is_finite(moved)
        new = clamped(moved, lo, hi, dims, 0, DIM, CLAMP)
        if CLAMP != "":
            new = hold(new, x, frozen_ptr, stride_frozen, chains, inside, dims, 0, DIM)
        if telemetry_ptr is not None:
            raw_square += tl.sum(grad * grad, axis=1)
            any_clipped = tl.maximum(any_clipped, differs(clipped, grad, dims, DIM))
            any_clamped = tl.maximum(any_clamped, differs(new, moved, dims, DIM))
        tl.store(new_ptr + offsets, new, mask=mask)

    first_bad = tl.where((first_bad < 0) & ~finite, t.to(tl.int32), first_bad)
    frozen = inside & (first_bad >= 0)
    if tl.max(frozen.to(tl.int32), axis=0) > 0:
        for first_dim in range(0, DIM, BLOCK_DIM):
            dims = first_dim + tl.arange(0, BLOCK_DIM)
            offsets = chains[:, None] * DIM + dims[None, :]
            mask = frozen[:, None] & (dims < DIM)[None, :]
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
            tl.store(new_ptr + offsets, x, mask=mask)
    tl.store(first_bad_ptr + chains, first_bad, mask=inside)
    if telemetry_ptr is not None:
        alive = inside & (first_bad < 0)
        counts = telemetry_ptr + n_chains.to(tl.int64) + chains
        tl.store(telemetry_ptr + chains, tl.sqrt(raw_square), mask=inside)
        tl.store(counts, tl.load(counts, mask=alive, other=0.0) + any_clipped.to(tl.float32), mask=alive)
        counts += n_chains.to(tl.int64)
        tl.store(counts, tl.load(counts, mask=alive, other=0.0) + any_clamped.to(tl.float32), mask=alive)
