"""Noise, update and clamp in one launch, for any energy whose gradient was computed elsewhere.

    x' = clamp(x - drift clip(g) + noise_std xi)

or, for samplers that add the noise first, half a step: y = x + noise_std xi, or x' = clamp(y - drift clip(g)).

Reads x and g, writes x' to a second buffer: only its last chunk shows whether a chain is finite, and its old state
must still be there to stop at.
"""

import triton
import triton.language as tl

from .step import (
    Bounds,
    Coefficient,
    Frozen,
    clip,
    differs,
    hold,
    load_coefficient,
    load_counters,
    noise_of,
    shrinkage,
    stopped_at,
    updated,
)
from .tiles import Shape, Tile, load_tile, store_tile, tile_at


@triton.jit
def plain_chunk_at(tile, c, SHAPE: tl.constexpr):
    """Chunk c of a tile's dims, in their order."""
    dims = c * SHAPE.BLOCK_DIM + tl.arange(0, SHAPE.BLOCK_DIM)
    return Tile(tile.first, tile.n_chains, tile.chains, tile.inside, dims, c, 0)


@triton.jit
def load_gradient(grad_ptr, frozen, tile, SHAPE: tl.constexpr):
    """(BLOCK_CHAINS, BLOCK_DIM), 0 where frozen."""
    return hold(load_tile(grad_ptr, SHAPE.DIM, tile, SHAPE), 0.0, frozen, tile, SHAPE)


@triton.jit(do_not_specialize=["n_chains"], do_not_specialize_on_alignment=["chain_ptr", "step_ptr", "seed_ptr"])
def langevin_update(
    new_ptr,  # (n_chains, DIM) float32, out
    x_ptr,  # (n_chains, DIM) float32
    grad_ptr,  # (n_chains, DIM) float32; None for noise alone
    first_bad_ptr,  # (n_chains,) int32, in and out
    telemetry_ptr,  # (3, n_chains) float32, in and out: gradient norm, steps clipped, steps clamped; or None
    chain_ptr, step_ptr, seed_ptr, frozen_ptr, stride_frozen,
    drift_ptr, stride_drift_chain, stride_drift_step, noise_std_ptr, stride_noise_chain, stride_noise_step,
    grad_clip, norm_clip, lo, hi,
    n_chains,
    t_ptr,  # (1,) int64, the step of this call: in memory, so that a CUDA graph of one step serves them all
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    DRIFT_PER_CHAIN: tl.constexpr, NOISE_STD_PER_CHAIN: tl.constexpr, CLAMP: tl.constexpr,
    HALF: tl.constexpr,  # "noise", "drift", or "" for both
    FAST: tl.constexpr,
):  # fmt: skip
    SHAPE: tl.constexpr = Shape(DIM, BLOCK_DIM, BLOCK_CHAINS, "plain")
    N_CHUNKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    frozen = Frozen(frozen_ptr, stride_frozen)
    bounds = Bounds(lo, hi)
    first, chains, inside = tile_at(tl.program_id(0), n_chains, BLOCK_CHAINS)
    tile = Tile(first, n_chains, chains, inside, chains, 0, 0)
    t = tl.load(t_ptr)
    counters = load_counters(seed_ptr, chain_ptr, step_ptr, tile, t)
    first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
    drift_of = Coefficient(drift_ptr, stride_drift_chain, stride_drift_step)
    noise_std_of = Coefficient(noise_std_ptr, stride_noise_chain, stride_noise_step)
    drift = load_coefficient(drift_of, tile, t, DRIFT_PER_CHAIN)
    noise_std = load_coefficient(noise_std_of, tile, t, NOISE_STD_PER_CHAIN)

    shrink = None
    if norm_clip is not None:
        square = tl.zeros((BLOCK_CHAINS,), tl.float32)
        for c in range(N_CHUNKS):
            grad = load_gradient(grad_ptr, frozen, plain_chunk_at(tile, c, SHAPE), SHAPE)
            clipped = clip(grad, grad_clip, None)
            square += tl.sum(clipped * clipped, axis=1)
        shrink = shrinkage(square, norm_clip)

    all_finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
    raw_square = tl.zeros((BLOCK_CHAINS,), tl.float32)
    any_clipped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    any_clamped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    for c in range(N_CHUNKS):
        chunk = plain_chunk_at(tile, c, SHAPE)
        x = load_tile(x_ptr, DIM, chunk, SHAPE)
        clipped, noise = None, None
        if HALF != "noise":
            grad = load_gradient(grad_ptr, frozen, chunk, SHAPE)
            clipped = clip(grad, grad_clip, shrink)
        if HALF != "drift":
            noise = noise_of(counters, noise_std, chunk, SHAPE, FAST)
        moved, finite, new = updated(x, clipped, noise, drift, frozen, bounds, chunk, SHAPE, CLAMP, HALF, True)
        all_finite = all_finite & finite
        if telemetry_ptr is not None:
            raw_square += tl.sum(grad * grad, axis=1)
            any_clipped = tl.maximum(any_clipped, differs(clipped, grad, chunk, SHAPE))
            any_clamped = tl.maximum(any_clamped, differs(new, moved, chunk, SHAPE))
        store_tile(new_ptr, DIM, new, chunk, SHAPE)

    first_bad = stopped_at(first_bad, all_finite, t.to(tl.int32))
    stopped = inside & (first_bad >= 0)
    if tl.max(stopped.to(tl.int32), axis=0) > 0:
        those = Tile(first, n_chains, chains, stopped, chains, 0, 0)
        for c in range(N_CHUNKS):
            chunk = plain_chunk_at(those, c, SHAPE)
            store_tile(new_ptr, DIM, load_tile(x_ptr, DIM, chunk, SHAPE), chunk, SHAPE)
    tl.store(first_bad_ptr + chains, first_bad, mask=inside)
    if telemetry_ptr is not None:
        alive = inside & (first_bad < 0)
        counts = telemetry_ptr + n_chains.to(tl.int64) + chains
        tl.store(telemetry_ptr + chains, tl.sqrt(raw_square), mask=inside)
        tl.store(counts, tl.load(counts, mask=alive, other=0.0) + any_clipped.to(tl.float32), mask=alive)
        counts += n_chains.to(tl.int64)
        tl.store(counts, tl.load(counts, mask=alive, other=0.0) + any_clamped.to(tl.float32), mask=alive)
