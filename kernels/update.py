"""Noise, update and clamp in one launch, for any energy whose gradient was computed elsewhere.

    x' = clamp(x - a clip(g) + b xi)

Reads x and g, writes x' to a second buffer: a chain turns out non-finite only at its last chunk, and its old
state must still be there to freeze at.
"""

import triton
import triton.language as tl

from .langevin import clamped, is_finite, load_coefficient, load_key, move
from .philox import normals


@triton.jit(do_not_specialize=["n_chains", "t"])
def langevin_update(
    new_ptr,  # (n_chains, DIM) float32, out
    x_ptr,  # (n_chains, DIM) float32
    grad_ptr,  # (n_chains, DIM) float32
    first_bad_ptr,  # (n_chains,) int32, in and out
    chain_ptr, step_ptr, seed_ptr,
    a_ptr, stride_a_chain, stride_a_step, b_ptr, stride_b_chain, stride_b_step,
    grad_clip, lo, hi,
    n_chains, t,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    A_PER_CHAIN: tl.constexpr, B_PER_CHAIN: tl.constexpr, CLIP: tl.constexpr, CLAMP: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    # int64: n_chains * DIM can pass 2**31
    chains = tl.program_id(0).to(tl.int64) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
    inside = chains < n_chains
    key0, key1 = load_key(seed_ptr)
    chain = tl.load(chain_ptr + chains, mask=inside, other=0)
    step = tl.load(step_ptr + chains, mask=inside, other=0).to(tl.uint32)
    step = (step + t).to(tl.uint32)
    first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
    a = load_coefficient(a_ptr, stride_a_chain, stride_a_step, chains, inside, t, A_PER_CHAIN)
    b = load_coefficient(b_ptr, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)

    finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
    for first_dim in range(0, DIM, BLOCK_DIM):
        dims = first_dim + tl.arange(0, BLOCK_DIM)
        offsets = chains[:, None] * DIM + dims[None, :]
        mask = inside[:, None] & (dims < DIM)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
        noise = normals(key0, key1, chain, step, first_dim // 4, 0, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST)
        moved = tl.where(mask, move(x, grad, noise, a, b, grad_clip, CLIP), 0.0)
        finite = finite & is_finite(moved)
        tl.store(new_ptr + offsets, clamped(moved, lo, hi, CLAMP), mask=mask)

    first_bad = tl.where((first_bad < 0) & ~finite, t, first_bad)
    frozen = inside & (first_bad >= 0)
    if tl.max(frozen.to(tl.int32), axis=0) > 0:
        for first_dim in range(0, DIM, BLOCK_DIM):
            dims = first_dim + tl.arange(0, BLOCK_DIM)
            offsets = chains[:, None] * DIM + dims[None, :]
            mask = frozen[:, None] & (dims < DIM)[None, :]
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
            tl.store(new_ptr + offsets, x, mask=mask)
    tl.store(first_bad_ptr + chains, first_bad, mask=inside)
