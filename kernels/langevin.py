"""K Langevin steps of an MLP energy in one launch: gradient, noise, update and clamp of many chains in parallel.

    g  = dE/dx (x);   g = clip(g);   x' = x - a g + b xi;   x' = clamp(x')

Two regimes, one arithmetic. Resident: all weights and the state stay on the chip for all K steps. Streaming:
the first layer does not fit, so the state lies in global memory (that is, in L2) and W_1 passes by in chunks
of the input dimension; each chunk serves this step's backward product and the next step's forward product.

A chain whose next state is not finite (tested before the clamp, which would hide it) is frozen at its last
finite state, and the step is recorded.
"""

import triton
import triton.language as tl

from .mlp import energy_at, load_row, load_weight, product, slope_at, transpose
from .philox import normals


@triton.jit
def load_coefficient(ptr, stride_chain, stride_step, chains, inside, t, PER_CHAIN: tl.constexpr):
    """a or b of step t: a number, or (BLOCK_CHAINS, 1) when each chain has its own."""
    if PER_CHAIN:
        return tl.load(ptr + chains * stride_chain + t * stride_step, mask=inside, other=0.0)[:, None]
    else:
        return tl.load(ptr + t * stride_step)


@triton.jit
def move(x, grad, noise, a, b, grad_clip, CLIP: tl.constexpr):
    """x' before the clamp. Written with comparisons, not min and max, so that NaN stays NaN."""
    if CLIP:
        grad = tl.where(grad > grad_clip, grad_clip, tl.where(grad < -grad_clip, -grad_clip, grad))
    return x - a * grad + b * noise


@triton.jit
def clamped(x, lo, hi, CLAMP: tl.constexpr):
    # min and max may swallow NaN: only states that were found finite are kept
    if CLAMP:
        return tl.minimum(tl.maximum(x, lo), hi)
    else:
        return x


@triton.jit
def is_finite(x):
    """(BLOCK_CHAINS,) bool: 0 * x is 0 for finite x, else NaN, and a sum carries NaN."""
    return tl.sum(x * 0.0, axis=1) == 0.0


@triton.jit
def load_key(seed_ptr):
    seed = tl.load(seed_ptr)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def load_counters(chain_ptr, step_ptr, chains, inside, t, zero):
    """Global chain number and lifetime step of every chain at step t, read anew each time: + zero * t keeps the
    compiler from carrying them, and what Philox makes of them, in some 50 registers across the loop."""
    chain = tl.load(chain_ptr + chains + zero * t, mask=inside, other=0)
    step = tl.load(step_ptr + chains + zero * t, mask=inside, other=0) + t
    return chain, step.to(tl.uint32)


@triton.jit(do_not_specialize=["n_chains", "steps", "zero"])
def langevin_resident(
    x_ptr,  # (n_chains, DIM) float32, in and out
    energy_ptr,  # (n_chains,) float32, out: E at the last state
    first_bad_ptr,  # (n_chains,) int32, out: first step with a non-finite state, or -1
    chain_ptr,  # (n_chains,) int64 global chain numbers
    step_ptr,  # (n_chains,) int64 lifetime step numbers of the first step
    seed_ptr,  # (1,) int64
    a_ptr, stride_a_chain, stride_a_step,  # drift coefficients
    b_ptr, stride_b_chain, stride_b_step,  # noise standard deviations
    grad_clip, lo, hi,
    weight_ptrs,  # a tuple a layer, input first, head apart: one pointer for each half
    bias_ptrs, head_ptr, head_bias_ptr,
    n_chains, steps,
    zero,  # 0, at run time: bias + zero * t is loaded in each step, where hoisting would cost 32 registers a layer
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    A_PER_CHAIN: tl.constexpr, B_PER_CHAIN: tl.constexpr, CLIP: tl.constexpr, CLAMP: tl.constexpr,
    FAST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # int64: n_chains * DIM can pass 2**31
    chains = tl.program_id(0).to(tl.int64) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
    inside = chains < n_chains
    dims = tl.arange(0, BLOCK_DIM)
    x_ptrs = x_ptr + chains[:, None] * DIM + dims[None, :]
    x_inside = inside[:, None] & (dims < DIM)[None, :]

    key0, key1 = load_key(seed_ptr)
    w1 = load_weight(weight_ptrs[0], 0, BLOCK_DIM, BLOCK_DIM, BLOCKS[0], PRECISION, INTERPRETED)
    weights = ()
    for layer in tl.static_range(len(BLOCKS) - 1):
        upper = load_weight(
            weight_ptrs[layer + 1], 0, BLOCKS[layer], BLOCKS[layer], BLOCKS[layer + 1],
            PRECISION, INTERPRETED,
        )  # fmt: skip
        weights = weights + (upper,)
    x = tl.load(x_ptrs, mask=x_inside, other=0.0)
    first_bad = tl.full((BLOCK_CHAINS,), -1, tl.int32)

    for t in range(steps):
        z = product(x, w1, PRECISION, INTERPRETED) + load_row(bias_ptrs[0], zero * t, BLOCKS[0])
        slope = slope_at(
            z, weights, bias_ptrs, head_ptr, zero * t, 0, BLOCKS, ACTIVATIONS, PARAMETERS, PRECISION, FAST,
            INTERPRETED,
        )  # fmt: skip
        grad = product(slope, transpose(w1, PRECISION), PRECISION, INTERPRETED)
        chain, step = load_counters(chain_ptr, step_ptr, chains, inside, t, zero)
        noise = normals(key0, key1, chain, step, 0, 0, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST)
        a = load_coefficient(a_ptr, stride_a_chain, stride_a_step, chains, inside, t, A_PER_CHAIN)
        b = load_coefficient(b_ptr, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)
        moved = move(x, grad, noise, a, b, grad_clip, CLIP)
        if DIM != BLOCK_DIM:
            # Padded columns hold noise of no dim and, where dE/dz is infinite, 0 * inf: neither may freeze a chain.
            moved = tl.where((dims < DIM)[None, :], moved, 0.0)
        first_bad = tl.where((first_bad < 0) & ~is_finite(moved), t, first_bad)
        x = tl.where((first_bad < 0)[:, None], clamped(moved, lo, hi, CLAMP), x)

    z = product(x, w1, PRECISION, INTERPRETED) + load_row(bias_ptrs[0], 0, BLOCKS[0])
    energy = energy_at(
        z, weights, bias_ptrs, head_ptr, head_bias_ptr, 0, BLOCKS, ACTIVATIONS, PARAMETERS, PRECISION, FAST,
        INTERPRETED,
    )  # fmt: skip
    # Pointers made anew, for the same reason.
    chains += zero
    inside = chains < n_chains
    x_ptrs = x_ptr + chains[:, None] * DIM + dims[None, :]
    tl.store(x_ptrs, x, mask=inside[:, None] & (dims < DIM)[None, :])
    tl.store(energy_ptr + chains, energy, mask=inside)
    tl.store(first_bad_ptr + chains, first_bad, mask=inside)


@triton.jit
def move_chunk(
    x_ptr, chains, inside, c, slope, w, noise_key, chain, step, a, b, grad_clip,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    CLIP: tl.constexpr, FAST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Chunk c of the state, where it would move to before the clamp, its pointers and its mask."""
    dims = c * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    x_ptrs = x_ptr + chains[:, None] * DIM + dims[None, :]
    x_inside = inside[:, None] & (dims < DIM)[None, :]
    x = tl.load(x_ptrs, mask=x_inside, other=0.0)
    grad = product(slope, transpose(w, PRECISION), PRECISION, INTERPRETED)
    noise = normals(
        noise_key[0], noise_key[1], chain, step, c * (BLOCK_DIM // 4), 0, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST
    )  # fmt: skip
    moved = move(x, grad, noise, a, b, grad_clip, CLIP)
    if DIM % BLOCK_DIM != 0:
        moved = tl.where((dims < DIM)[None, :], moved, 0.0)  # as in the resident kernel
    return x, moved, x_ptrs, x_inside


@triton.jit(do_not_specialize=["n_chains", "steps", "zero"])
def langevin_streaming(
    x_ptr, energy_ptr, first_bad_ptr, chain_ptr, step_ptr, seed_ptr,
    a_ptr, stride_a_chain, stride_a_step, b_ptr, stride_b_chain, stride_b_step,
    grad_clip, lo, hi,
    weight_ptrs, bias_ptrs, head_ptr, head_bias_ptr,
    n_chains, steps, zero,
    w1_max_ptr,  # (1,) float32: the largest |W_1|
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    A_PER_CHAIN: tl.constexpr, B_PER_CHAIN: tl.constexpr, CLIP: tl.constexpr, CLAMP: tl.constexpr,
    FAST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    chains = tl.program_id(0).to(tl.int64) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
    inside = chains < n_chains
    noise_key = load_key(seed_ptr)
    w1_max = tl.load(w1_max_ptr)
    weights = ()
    for layer in tl.static_range(len(BLOCKS) - 1):
        upper = load_weight(
            weight_ptrs[layer + 1], 0, BLOCKS[layer], BLOCKS[layer], BLOCKS[layer + 1],
            PRECISION, INTERPRETED,
        )  # fmt: skip
        weights = weights + (upper,)

    n_chunks: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    z = tl.zeros((BLOCK_CHAINS, tl.constexpr(BLOCKS[0])), tl.float32)
    size = tl.zeros((BLOCK_CHAINS,), tl.float32)  # sum |x| of each chain
    for c in range(n_chunks):
        dims = c * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
        x0_inside = inside[:, None] & (dims < DIM)[None, :]
        x0 = tl.load(x_ptr + chains[:, None] * DIM + dims[None, :], mask=x0_inside, other=0.0)
        w0 = load_weight(
            weight_ptrs[0], c * BLOCK_DIM, n_chunks * BLOCK_DIM, BLOCK_DIM, BLOCKS[0], PRECISION, INTERPRETED
        )  # fmt: skip
        z += product(x0, w0, PRECISION, INTERPRETED)
        size += tl.sum(tl.abs(x0), axis=1)
    first_bad = tl.full((BLOCK_CHAINS,), -1, tl.int32)

    for t in range(steps):
        z += load_row(bias_ptrs[0], zero * t, BLOCKS[0])
        slope = slope_at(
            z, weights, bias_ptrs, head_ptr, zero * t, 0, BLOCKS, ACTIVATIONS, PARAMETERS, PRECISION, FAST,
            INTERPRETED,
        )  # fmt: skip
        a = load_coefficient(a_ptr, stride_a_chain, stride_a_step, chains, inside, t, A_PER_CHAIN)
        b = load_coefficient(b_ptr, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)

        chain, step = load_counters(chain_ptr, step_ptr, chains, inside, t, zero)

        # Chunks are stored as they are made, so a chain must be known to stay finite before its first chunk
        # moves. |x'| <= |x| + a |slope|_1 max|W_1| + 7 b settles it for all but exploding chains; only for
        # a tile that holds one, a rehearsal without stores finds out exactly.
        reach = tl.sum(tl.abs(slope), axis=1)[:, None] * w1_max * a + 7.0 * b
        reach = size + tl.sum(reach, axis=1)
        in_doubt = (first_bad < 0) & ~(reach < 1e38)
        if tl.max(in_doubt.to(tl.int32), axis=0) > 0:
            finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
            for c in range(n_chunks):
                w = load_weight(
                    weight_ptrs[0], c * BLOCK_DIM, n_chunks * BLOCK_DIM, BLOCK_DIM, BLOCKS[0], PRECISION, INTERPRETED
                )  # fmt: skip
                x, moved, x_ptrs, x_inside = move_chunk(
                    x_ptr, chains, inside, c, slope, w, noise_key, chain, step, a, b, grad_clip,
                    DIM, BLOCK_DIM, PRECISION, BLOCK_CHAINS, CLIP, FAST, INTERPRETED,
                )  # fmt: skip
                finite = finite & is_finite(moved)
            first_bad = tl.where((first_bad < 0) & ~finite, t, first_bad)

        z = tl.zeros((BLOCK_CHAINS, tl.constexpr(BLOCKS[0])), tl.float32)
        size = tl.zeros((BLOCK_CHAINS,), tl.float32)
        for c in range(n_chunks):
            w = load_weight(
                weight_ptrs[0], c * BLOCK_DIM, n_chunks * BLOCK_DIM, BLOCK_DIM, BLOCKS[0], PRECISION, INTERPRETED
            )  # fmt: skip
            x, moved, x_ptrs, x_inside = move_chunk(
                x_ptr, chains, inside, c, slope, w, noise_key, chain, step, a, b, grad_clip,
                DIM, BLOCK_DIM, PRECISION, BLOCK_CHAINS, CLIP, FAST, INTERPRETED,
            )  # fmt: skip
            x = tl.where((first_bad < 0)[:, None], clamped(moved, lo, hi, CLAMP), x)
            tl.store(x_ptrs, x, mask=x_inside)
            z += product(x, w, PRECISION, INTERPRETED)
            size += tl.sum(tl.abs(x), axis=1)
        # the next step's loads may be issued by other threads than this step's stores
        tl.debug_barrier()

    z += load_row(bias_ptrs[0], 0, BLOCKS[0])
    energy = energy_at(
        z, weights, bias_ptrs, head_ptr, head_bias_ptr, 0, BLOCKS, ACTIVATIONS, PARAMETERS, PRECISION, FAST,
        INTERPRETED,
    )  # fmt: skip
    tl.store(energy_ptr + chains, energy, mask=inside)
    tl.store(first_bad_ptr + chains, first_bad, mask=inside)
