"""K Langevin steps of an MLP energy in one launch, where the first layer does not fit on the chip.

The mathematics is that of resident.py. States lie in global memory (that is, in L2), and W_1 is streamed in chunks of
the input dims. Each chunk is loaded once and serves two products: this step's backward and the next step's forward.

    prologue:   z = x W_1, chunk by chunk
    each step:  e = dE/dz from z, through the upper layers;  z' = 0
                for each chunk c:  x_c moves by the gradient e W_1c^T;  z' += x_c W_1c
                z = z'

Chunks are stored as they are made, so before its first chunk moves a chain must be known to stay finite. A bound on
|x'| settles that for all but exploding chains; a tile that holds one rehearses the step without stores first.
"""

import triton
import triton.language as tl

from .mlp import add_terms, energy_at, energy_of_terms, load_bias, load_weights, slope_at
from .parking import through_memory
from .products import load_weight, multiply, operand, product, transpose
from .step import (
    Bounds,
    Coefficient,
    Frozen,
    clamp,
    clip,
    differs,
    hold,
    load_coefficient,
    load_counters,
    load_labels,
    noise_of,
    report_bad,
    shrinkage,
    store_telemetry,
    store_trajectory,
    updated,
)
from .tiles import Shape, Tile, chunk_at, load_tile, store_tile, tile_at, zero_padding
from .weights import (
    BOUNDS,
    bias_pointers,
    constant_pointer,
    float_pointer,
    scale_pointer,
    seed_pointer,
    terms_of,
    weight_pointers,
)

IN_DOUBT: tl.constexpr = tl.constexpr(-2)  # in place of a chain's first bad step: this step may be one


@triton.jit
def load_chunk(weight_ptrs, c, LAYERS: tl.constexpr, SHAPE: tl.constexpr):
    """Rows c * BLOCK_DIM and on of every network's W_1."""
    STRIDE: tl.constexpr = (SHAPE.DIM + SHAPE.BLOCK_DIM - 1) // SHAPE.BLOCK_DIM * SHAPE.BLOCK_DIM
    weights = ()
    for k in tl.static_range(len(LAYERS.FIRSTS) - 1):
        w = load_weight(
            weight_ptrs[LAYERS.FIRSTS[k]], c * SHAPE.BLOCK_DIM, STRIDE, SHAPE.BLOCK_DIM,
            LAYERS.BLOCKS[LAYERS.FIRSTS[k]], LAYERS,
        )  # fmt: skip
        weights = weights + (w,)
    return weights


@triton.jit
def forward_chunk(zs, x, weights, LAYERS: tl.constexpr):
    """Every network's z_1 with one more chunk of x in it."""
    sums = ()
    for k in tl.static_range(len(weights)):
        sums = sums + (product(x, weights[k], LAYERS, zs[k]),)
    return sums


@triton.jit
def empty_sums(LAYERS: tl.constexpr, SHAPE: tl.constexpr):
    zs = ()
    for k in tl.static_range(len(LAYERS.FIRSTS) - 1):
        zs = zs + (tl.zeros((SHAPE.BLOCK_CHAINS, tl.constexpr(LAYERS.BLOCKS[LAYERS.FIRSTS[k]])), tl.float32),)
    return zs


@triton.jit
def gradient_chunk(
    x_ptr, slopes, weights, terms, frozen, chunk, LAYERS: tl.constexpr, SHAPE: tl.constexpr,
    ZERO_PADDING: tl.constexpr,
):  # fmt: skip
    """A chunk of the state and of its gradient, 0 where frozen.

    Padded columns are 0 too, except, if not ZERO_PADDING, those of a chain with an infinite slope: 0 * inf is NaN.
    """
    x = load_tile(x_ptr, SHAPE.DIM, chunk, SHAPE)
    grad = multiply(slopes[0], transpose(weights[0], LAYERS), LAYERS)
    for k in tl.static_range(len(weights) - 1):
        grad += multiply(slopes[k + 1], transpose(weights[k + 1], LAYERS), LAYERS)
    grad = add_terms(grad, x, terms, chunk.c * SHAPE.BLOCK_DIM, SHAPE.BLOCK_DIM)
    grad = hold(grad, 0.0, frozen, chunk, SHAPE)
    if ZERO_PADDING:
        grad = zero_padding(grad, chunk, SHAPE)
    return x, grad


@triton.jit
def moves_at(t, first_bad, NOISE_FIRST: tl.constexpr):
    """(BLOCK_CHAINS,) bool: chains that take step t. With NOISE_FIRST, some are bad by the next step's noise only."""
    if NOISE_FIRST:
        return (first_bad < 0) | (first_bad > t)
    else:
        return first_bad < 0


@triton.jit
def load_next(coefficient, tile, t, steps, PER_CHAIN: tl.constexpr):
    """`load_coefficient` of step t + 1; 0 after the last."""
    value = load_coefficient(coefficient, tile, tl.minimum(t + 1, steps - 1), PER_CHAIN)
    return tl.where(t + 1 < steps, value, 0.0)


@triton.jit(
    do_not_specialize=["n_chains", "steps", "zero", "thin", "first_tile"],
    do_not_specialize_on_alignment=["chain_ptr", "step_ptr", "label_ptr"],
)
def langevin_streaming(
    x_ptr, energy_ptr, first_bad_ptr, trajectory_ptr, thin, telemetry_ptr,  # as in langevin_resident
    chain_ptr, step_ptr, label_ptr, frozen_ptr, stride_frozen,
    drift_ptr, stride_drift_chain, stride_drift_step, noise_std_ptr, stride_noise_chain, stride_noise_step,
    grad_clip, norm_clip, lo, hi,
    prepared_ptr, in_weights_ptr, in_biases_ptr, n_chains, steps, zero, first_tile,
    slope_ptrs,  # one per network, (programs * BLOCK_CHAINS, its first width), scratch; two halves at bf16x3
    WEIGHTS: tl.constexpr, LOWS: tl.constexpr, BIASES: tl.constexpr, TERMS: tl.constexpr,
    LAYERS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    OWN_CHAINS: tl.constexpr,  # each warp has 16 chains of the tile to itself
    DRIFT_PER_CHAIN: tl.constexpr, NOISE_STD_PER_CHAIN: tl.constexpr, CLAMP: tl.constexpr,
    BOUNDED: tl.constexpr,  # lo and hi are finite numbers
    # With NOISE_FIRST, the state in memory has the next step's noise in it: a chunk that has moved gets it at once.
    NOISE_FIRST: tl.constexpr, CLAMP_NOISE: tl.constexpr,
    IN_MEMORY: tl.constexpr,  # keep act'(z_1) in memory in float32 (at bf16 it always is there, in bf16)
    LEAN: tl.constexpr,  # hoist nothing out of a loop
):  # fmt: skip
    weight_ptrs = weight_pointers(in_weights_ptr, WEIGHTS, LOWS)
    bias_ptrs = bias_pointers(in_biases_ptr, BIASES)
    scale_ptr = scale_pointer(prepared_ptr, TERMS)
    constant_ptr = constant_pointer(prepared_ptr, TERMS)
    terms = terms_of(prepared_ptr, TERMS)
    seed_ptr = seed_pointer(prepared_ptr)
    reach_ptr = float_pointer(prepared_ptr, BOUNDS)
    frozen = Frozen(frozen_ptr, stride_frozen)
    bounds = Bounds(lo, hi)
    drift_of = Coefficient(drift_ptr, stride_drift_chain, stride_drift_step)
    noise_std_of = Coefficient(noise_std_ptr, stride_noise_chain, stride_noise_step)
    PRECISION: tl.constexpr = LAYERS.PRECISION
    SHAPE: tl.constexpr = Shape(DIM, BLOCK_DIM, BLOCK_CHAINS, "held" if OWN_CHAINS else "turned")
    NO_LICM: tl.constexpr = IN_MEMORY or LEAN
    N_CHUNKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    HALVES: tl.constexpr = 2 if PRECISION == "bf16x3" else 1
    HAS_TERMS: tl.constexpr = len(terms.quadratic) + len(terms.linear) > 0
    NOISE_CLAMP: tl.constexpr = CLAMP if CLAMP_NOISE else ""
    # Noise in padded columns is multiplied by weights that are 0, so it only has to be finite; a clamp ensures that.
    PAD_NOISE: tl.constexpr = not (BOUNDED and CLAMP_NOISE)

    first, chains, inside = tile_at(first_tile + tl.program_id(0), n_chains, BLOCK_CHAINS)
    start = Tile(first, n_chains, chains, inside, chains, 0, 0)
    weights = load_weights(weight_ptrs, LAYERS, 0, False)
    zs = empty_sums(LAYERS, SHAPE)
    size = tl.zeros((BLOCK_CHAINS,), tl.float32)  # no |x| of the chain is larger
    if NOISE_FIRST:
        start_counters = load_counters(seed_ptr, chain_ptr, step_ptr, start, 0)
        start_std = load_coefficient(noise_std_of, start, 0, NOISE_STD_PER_CHAIN)
        start_finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
        for c in tl.range(0, N_CHUNKS, disable_licm=NO_LICM):
            chunk = chunk_at(start, c, SHAPE)
            x0 = load_tile(x_ptr, DIM, chunk, SHAPE)
            noise = noise_of(start_counters, start_std, chunk, SHAPE, LAYERS.FAST)
            _, finite, _ = updated(x0, None, noise, None, frozen, bounds, chunk, SHAPE, "", "noise", True)
            start_finite = start_finite & finite
        start_bad = tl.where(start_finite, -1, 0)
        tl.debug_barrier()  # other threads may still load what the next loop overwrites
    else:
        start_bad = tl.full((BLOCK_CHAINS,), -1, tl.int32)
    for c in tl.range(0, N_CHUNKS, disable_licm=NO_LICM):
        chunk = chunk_at(start, c, SHAPE)
        x0 = load_tile(x_ptr, DIM, chunk, SHAPE)
        if NOISE_FIRST:
            noise = noise_of(start_counters, start_std, chunk, SHAPE, LAYERS.FAST)
            _, _, noisy = updated(x0, None, noise, None, frozen, bounds, chunk, SHAPE, NOISE_CLAMP, "noise", PAD_NOISE)
            x0 = tl.where((start_bad < 0)[:, None], noisy, x0)
            store_tile(x_ptr, DIM, x0, chunk, SHAPE)
            if CLAMP != "" and not BOUNDED:
                # the first step may end on a bound farther out than the start
                size += tl.sum(tl.abs(clamp(x0, bounds, chunk, SHAPE, CLAMP)), axis=1)
        w0 = load_chunk(weight_ptrs, c, LAYERS, SHAPE)
        zs = forward_chunk(zs, x0, w0, LAYERS)
        size += tl.sum(tl.abs(x0), axis=1)
    if BOUNDED:
        # holds at every step: coordinates are clamped or frozen
        size += tl.maximum(tl.abs(lo), tl.abs(hi))
    # These wait in memory while a step computes its slopes; there is no energy yet in that place.
    tl.store(energy_ptr + chains, size, mask=inside)
    tl.store(first_bad_ptr + chains, start_bad, mask=inside)
    tl.debug_barrier()  # other threads may load them
    square_norm = tl.full((BLOCK_CHAINS,), float("nan"), tl.float32)
    n_clipped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    n_clamped = tl.zeros((BLOCK_CHAINS,), tl.int32)

    # disable_licm: at bf16 the loop just fits in registers, as long as nothing is hoisted out of it: no pointers, and
    # not the descriptors by which wgmma finds its operands.
    for t in tl.range(0, steps, disable_licm=OWN_CHAINS):
        # Always 0, but opaque to the compiler, as in resident.py. ("&" here, or adding it to the tile, spills more.)
        shift = zero * t
        if OWN_CHAINS:
            first_now = first + shift
        else:  # computed again: mma.sync has no registers left to keep it
            first_now = tile_at(first_tile + tl.program_id(0) + shift, n_chains, BLOCK_CHAINS)[0]
        chains = first_now + tl.arange(0, BLOCK_CHAINS)
        inside = chains < n_chains
        now = Tile(first_now, n_chains, chains, inside, chains, 0, shift)
        labels = load_labels(label_ptr, now)

        # |x'| <= |x| + a (sum_k |slope_k|_1 max|W_1k| + max|c| |x| + max|b - c m|) + 7 s, with drift a and noise_std s.
        # With NOISE_FIRST, s is the next step's, and this step's 7 s is added to |x|: `size` may be that of states
        # before their noise.
        slopes = ()
        pull = tl.zeros((BLOCK_CHAINS,), tl.float32)
        for k in tl.static_range(len(LAYERS.FIRSTS) - 1):
            z = zs[k] + load_bias(bias_ptrs, shift, LAYERS.FIRSTS[k], LAYERS)
            memory = slope_ptrs[k] + tl.program_id(0).to(tl.int64) * (BLOCK_CHAINS * HALVES * z.shape[1])
            if IN_MEMORY:
                parking = memory.to(tl.pointer_type(tl.float32))
            else:
                parking = memory if PRECISION == "bf16" else None
            slope = slope_at(
                z, weights, bias_ptrs, scale_ptr + k, labels, shift, parking, LAYERS.FIRSTS[k], LAYERS
            )  # fmt: skip
            pull += tl.sum(tl.abs(slope), axis=1) * tl.load(reach_ptr + 2 + k)
            if k == len(LAYERS.FIRSTS) - 2:
                size = tl.load(energy_ptr + chains, mask=inside, other=0.0)
                if NOISE_FIRST:
                    std = load_coefficient(noise_std_of, now, t, NOISE_STD_PER_CHAIN)
                    size += tl.sum(tl.zeros((BLOCK_CHAINS, 1), tl.float32) + 7.0 * std, axis=1)
                if HAS_TERMS:
                    pull += tl.load(reach_ptr) * size + tl.load(reach_ptr + 1)
                drift = load_coefficient(drift_of, now, t, DRIFT_PER_CHAIN)
                if NOISE_FIRST:
                    std = load_next(noise_std_of, now, t, steps, NOISE_STD_PER_CHAIN)
                else:
                    std = load_coefficient(noise_std_of, now, t, NOISE_STD_PER_CHAIN)
                reach = size + tl.sum(pull[:, None] * drift + 7.0 * std, axis=1)
                first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
                in_doubt = (first_bad < 0) & ~(reach < 1e38)
                # Stored only to force it here: the compiler delays sums, and then keeps slopes beside the operand that
                # they become.
                tl.store(first_bad_ptr + chains, tl.where(in_doubt, IN_DOUBT, first_bad), mask=inside)
            if PRECISION == "bf16x3" and not OWN_CHAINS:
                halves = operand(slope, LAYERS)  # mma.sync's shared memory has no room for two halves
                tl.debug_barrier()
            else:
                halves = through_memory(slope, memory, shift, OWN_CHAINS, LAYERS)
            slopes = slopes + (halves,)
        first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
        in_doubt = first_bad == IN_DOUBT

        # loaded now, and coefficients again, so that they take no registers while slopes do
        drift = load_coefficient(drift_of, now, t, DRIFT_PER_CHAIN)
        if NOISE_FIRST:
            std = load_next(noise_std_of, now, t, steps, NOISE_STD_PER_CHAIN)
            counters = load_counters(seed_ptr, chain_ptr, step_ptr, now, t + 1)
        else:
            std = load_coefficient(noise_std_of, now, t, NOISE_STD_PER_CHAIN)
            counters = load_counters(seed_ptr, chain_ptr, step_ptr, now, t)
        shrink = None
        if norm_clip is not None:
            square = tl.zeros((BLOCK_CHAINS,), tl.float32)
            for c in tl.range(0, N_CHUNKS, disable_licm=NO_LICM):
                w = load_chunk(weight_ptrs, c, LAYERS, SHAPE)
                chunk = chunk_at(now, c, SHAPE)
                x, grad = gradient_chunk(x_ptr, slopes, w, terms, frozen, chunk, LAYERS, SHAPE, True)
                clipped = clip(grad, grad_clip, None)
                square += tl.sum(clipped * clipped, axis=1)
            shrink = shrinkage(square, norm_clip)
        if tl.max(in_doubt.to(tl.int32), axis=0) > 0:
            all_finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
            noisy_finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
            for c in tl.range(0, N_CHUNKS, disable_licm=NO_LICM):
                w = load_chunk(weight_ptrs, c, LAYERS, SHAPE)
                chunk = chunk_at(now, c, SHAPE)
                x, grad = gradient_chunk(x_ptr, slopes, w, terms, frozen, chunk, LAYERS, SHAPE, True)
                clipped = clip(grad, grad_clip, shrink)
                noise = noise_of(counters, std, chunk, SHAPE, LAYERS.FAST)
                _, finite, new = updated(
                    x, clipped, noise, drift, frozen, bounds, chunk, SHAPE, CLAMP, "drift" if NOISE_FIRST else "", True
                )
                all_finite = all_finite & finite
                if NOISE_FIRST:
                    _, finite, _ = updated(new, None, noise, None, frozen, bounds, chunk, SHAPE, "", "noise", True)
                    noisy_finite = noisy_finite & finite
            if NOISE_FIRST:
                rehearsed = tl.where(all_finite, tl.where(noisy_finite, -1, t + 1), t)
            else:
                rehearsed = tl.where(all_finite, -1, t)
            first_bad = tl.where(in_doubt, rehearsed, first_bad)
            tl.store(first_bad_ptr + chains, first_bad, mask=inside)

        zs = empty_sums(LAYERS, SHAPE)
        size = tl.zeros((BLOCK_CHAINS,), tl.float32)
        raw_square = tl.zeros((BLOCK_CHAINS,), tl.float32)
        any_clipped = tl.zeros((BLOCK_CHAINS,), tl.int32)
        any_clamped = tl.zeros((BLOCK_CHAINS,), tl.int32)
        for c in tl.range(0, N_CHUNKS, disable_licm=NO_LICM):
            w = load_chunk(weight_ptrs, c, LAYERS, SHAPE)
            chunk = chunk_at(now, c, SHAPE)
            x, grad = gradient_chunk(x_ptr, slopes, w, terms, frozen, chunk, LAYERS, SHAPE, telemetry_ptr is not None)
            clipped = clip(grad, grad_clip, shrink)
            noise = noise_of(counters, std, chunk, SHAPE, LAYERS.FAST)
            moved, _, new = updated(
                x, clipped, noise, drift, frozen, bounds, chunk, SHAPE, CLAMP, "drift" if NOISE_FIRST else "",
                not BOUNDED,
            )  # fmt: skip
            if telemetry_ptr is not None:
                raw_square += tl.sum(grad * grad, axis=1)
                any_clipped = tl.maximum(any_clipped, differs(clipped, grad, chunk, SHAPE))
                any_clamped = tl.maximum(any_clamped, differs(new, moved, chunk, SHAPE))
            x = tl.where(moves_at(t, first_bad, NOISE_FIRST)[:, None], new, x)
            if not NOISE_FIRST:
                store_tile(x_ptr, DIM, x, chunk, SHAPE)
            store_trajectory(trajectory_ptr, x, t, thin, steps, chunk, SHAPE)
            if NOISE_FIRST:
                _, _, noisy = updated(
                    x, None, noise, None, frozen, bounds, chunk, SHAPE, NOISE_CLAMP, "noise", PAD_NOISE
                )
                x = tl.where((first_bad < 0)[:, None], noisy, x)
                store_tile(x_ptr, DIM, x, chunk, SHAPE)
            zs = forward_chunk(zs, x, w, LAYERS)
            if not BOUNDED:
                size += tl.sum(tl.abs(x), axis=1)
        if not BOUNDED:
            tl.store(energy_ptr + chains, size, mask=inside)
        if telemetry_ptr is not None:
            alive = moves_at(t, first_bad, NOISE_FIRST).to(tl.int32)
            square_norm = raw_square
            n_clipped += alive * any_clipped
            n_clamped += alive * any_clamped
        # the next step's loads may be issued by other threads than this step's stores
        tl.debug_barrier()

    if NO_LICM:
        always = zero == 0  # as in resident.py
    else:
        always: tl.constexpr = True
    if always:
        chains = first + zero + tl.arange(0, BLOCK_CHAINS)
        inside = chains < n_chains
        end = Tile(first, n_chains, chains, inside, chains, 0, 0)
        energy = tl.zeros((BLOCK_CHAINS,), tl.float32) + tl.load(constant_ptr)
        if HAS_TERMS:
            for c in tl.range(0, N_CHUNKS, disable_licm=NO_LICM):
                x1 = load_tile(x_ptr, DIM, chunk_at(end, c, SHAPE), SHAPE)
                energy += energy_of_terms(x1, terms, c * BLOCK_DIM, BLOCK_DIM)
        labels = load_labels(label_ptr, end)
        for k in tl.static_range(len(LAYERS.FIRSTS) - 1):
            z = zs[k] + load_bias(bias_ptrs, zero, LAYERS.FIRSTS[k], LAYERS)
            energy += energy_at(z, weights, bias_ptrs, scale_ptr + k, labels, zero, LAYERS.FIRSTS[k], LAYERS)
        tl.store(energy_ptr + chains, energy, mask=inside)
        first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
        report_bad(prepared_ptr, first_bad, energy, inside)
        if telemetry_ptr is not None:
            store_telemetry(telemetry_ptr, end, square_norm, n_clipped, n_clamped, steps)
