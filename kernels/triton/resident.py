"""K Langevin steps of an MLP energy in one launch, with weights and states on the chip for all steps.

    g  = dE/dx (x);   g = clip(g);   x' = x - drift g + noise_std xi;   x' = clamp(x')

or with NOISE_FIRST, where the noise is added before the gradient is taken:

    x = x + noise_std xi;   x = clamp(x), if CLAMP_NOISE;   g = clip(dE/dx (x));   x' = clamp(x - drift g)

A chain whose next state is not finite (tested before the clamp, which would hide it; with NOISE_FIRST, also after the
noise) stops at its last finite state, and the step is recorded. streaming.py does the same where the first layer does
not fit on the chip.
"""

import triton
import triton.language as tl

from .mlp import add_terms, energy_at, energy_of_terms, gradient_of, load_bias, load_weights
from .products import product
from .step import (
    Bounds,
    Coefficient,
    Frozen,
    clip,
    differs,
    hold,
    load_coefficient,
    load_counters,
    load_labels,
    noise_of,
    report_bad,
    shrinkage,
    stopped_at,
    store_telemetry,
    store_trajectory,
    updated,
)
from .tiles import Shape, Tile, lane_order, load_tile, store_tile, tile_at, zero_padding
from .weights import bias_pointers, constant_pointer, scale_pointer, seed_pointer, terms_of, weight_pointers


# Parts of a pool begin at any chain, so tensors of one number per chain are aligned to 8 bytes only: do not recompile.
@triton.jit(
    do_not_specialize=["n_chains", "steps", "zero", "thin", "first_tile"],
    do_not_specialize_on_alignment=["chain_ptr", "step_ptr", "label_ptr"],
)
def langevin_resident(
    x_ptr,  # (n_chains, DIM) float32, in and out
    energy_ptr,  # (n_chains,) float32, out: E at the last state
    first_bad_ptr,  # (n_chains,) int32, out: first step with a non-finite state, or -1
    trajectory_ptr, thin,  # (n_chains, steps // thin, DIM) float32, out: every thin-th state; or None
    telemetry_ptr,  # (3, n_chains) float32, out: see store_telemetry; or None
    chain_ptr,  # (n_chains,) int64 global chain numbers
    step_ptr,  # (n_chains,) int64 lifetime step numbers of the first step
    label_ptr,  # (n_chains,) int64, or None
    frozen_ptr, stride_frozen,  # (1 or n_chains, DIM) uint8, 1 where a coordinate stays; or None
    drift_ptr, stride_drift_chain, stride_drift_step,  # see Coefficient
    noise_std_ptr, stride_noise_chain, stride_noise_step,
    grad_clip, norm_clip,  # numbers, or None
    lo, hi,  # by CLAMP
    # Seed, energy and report: see weights.py. One buffer passed three times: an index added to an argument takes one
    # instruction, added to a computed address two, and registers to keep that address.
    prepared_ptr, in_weights_ptr, in_biases_ptr,
    n_chains, steps,
    zero,  # always 0, but opaque to the compiler
    first_tile,  # of this launch
    state_ptr,  # (programs * BLOCK_CHAINS, BLOCK_DIM) float32, scratch, if IN_MEMORY and DIM != BLOCK_DIM; or None
    WEIGHTS: tl.constexpr, LOWS: tl.constexpr, BIASES: tl.constexpr, TERMS: tl.constexpr,  # see Layout.places
    LAYERS: tl.constexpr,  # see mlp.Layers
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    BOTH_ORDERS: tl.constexpr,  # see load_weight
    IN_MEMORY: tl.constexpr,  # keep the state in memory, not in registers, while the gradient is computed
    DRIFT_PER_CHAIN: tl.constexpr, NOISE_STD_PER_CHAIN: tl.constexpr, CLAMP: tl.constexpr,
    NOISE_FIRST: tl.constexpr, CLAMP_NOISE: tl.constexpr,
):  # fmt: skip
    weight_ptrs = weight_pointers(in_weights_ptr, WEIGHTS, LOWS)
    bias_ptrs = bias_pointers(in_biases_ptr, BIASES)
    scale_ptr = scale_pointer(prepared_ptr, TERMS)
    constant_ptr = constant_pointer(prepared_ptr, TERMS)
    terms = terms_of(prepared_ptr, TERMS)
    seed_ptr = seed_pointer(prepared_ptr)
    frozen = Frozen(frozen_ptr, stride_frozen)
    bounds = Bounds(lo, hi)
    drift_of = Coefficient(drift_ptr, stride_drift_chain, stride_drift_step)
    noise_std_of = Coefficient(noise_std_ptr, stride_noise_chain, stride_noise_step)
    SHAPE: tl.constexpr = Shape(DIM, BLOCK_DIM, BLOCK_CHAINS, "lanes")
    HELD: tl.constexpr = Shape(BLOCK_DIM, BLOCK_DIM, BLOCK_CHAINS, "held")  # of the state in memory
    IN_PLACE: tl.constexpr = IN_MEMORY and DIM == BLOCK_DIM

    number = first_tile + tl.program_id(0)
    first, chains, inside = tile_at(number, n_chains, BLOCK_CHAINS)
    if IN_PLACE:
        state_ptr = x_ptr
    elif IN_MEMORY:
        state_ptr -= first_tile.to(tl.int64) * (BLOCK_CHAINS * BLOCK_DIM)  # all launches share the scratch of one
    dims = lane_order(tl.arange(0, BLOCK_DIM))

    weights = load_weights(weight_ptrs, LAYERS, BLOCK_DIM, BOTH_ORDERS)
    start = Tile(first, n_chains, chains, inside, dims, 0, 0)
    x = load_tile(x_ptr, DIM, start, SHAPE)
    first_bad = tl.full((BLOCK_CHAINS,), -1, tl.int32)
    square_norm = tl.full((BLOCK_CHAINS,), float("nan"), tl.float32)
    n_clipped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    n_clamped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    if IN_MEMORY and not IN_PLACE:
        store_tile(state_ptr, BLOCK_DIM, x, start, HELD)
        tl.debug_barrier()  # other threads may load it

    for t in tl.range(0, steps, disable_licm=IN_MEMORY):
        # Always 0, but opaque to the compiler: stops it hoisting loads out of the loop (biases alone would take 32
        # registers per layer). "&" because a product makes every address a sum in a register of its own.
        shift = zero & t
        first, chains, inside = tile_at(number + shift, n_chains, BLOCK_CHAINS)
        tile = Tile(first, n_chains, chains, inside, dims, 0, shift)
        if IN_MEMORY:
            x = load_tile(state_ptr, BLOCK_DIM, tile, HELD)
        if NOISE_FIRST:
            counters = load_counters(seed_ptr, chain_ptr, step_ptr, tile, t)
            noise_std = load_coefficient(noise_std_of, tile, t, NOISE_STD_PER_CHAIN)
            noise = noise_of(counters, noise_std, tile, SHAPE, LAYERS.FAST)
            _, finite, noisy = updated(
                x, None, noise, None, frozen, bounds, tile, SHAPE, CLAMP if CLAMP_NOISE else "", "noise", True
            )
            first_bad = stopped_at(first_bad, finite, t)
            x = tl.where((first_bad < 0)[:, None], noisy, x)
            if IN_MEMORY:
                store_tile(state_ptr, BLOCK_DIM, x, tile, HELD)
                tl.debug_barrier()
        labels = load_labels(label_ptr, tile)
        grad = gradient_of(x, weights, bias_ptrs, scale_ptr, labels, shift, LAYERS.FIRSTS[0], LAYERS)
        for k in tl.static_range(1, len(LAYERS.FIRSTS) - 1):
            grad += gradient_of(x, weights, bias_ptrs, scale_ptr + k, labels, shift, LAYERS.FIRSTS[k], LAYERS)
        if IN_MEMORY:
            # The same address, but opaque to the compiler: stops it keeping the state that it loaded above.
            first = tile_at(number + (zero & ~t), n_chains, BLOCK_CHAINS)[0]
            again = Tile(first, n_chains, chains, inside, dims, 0, shift)
            x = load_tile(state_ptr, BLOCK_DIM, again, HELD)
        grad = add_terms(grad, x, terms, shift, BLOCK_DIM)
        grad = hold(grad, 0.0, frozen, tile, SHAPE)
        if norm_clip is not None or telemetry_ptr is not None:
            grad = zero_padding(grad, tile, SHAPE)
        shrink = None
        if norm_clip is not None:
            clipped = clip(grad, grad_clip, None)
            shrink = shrinkage(tl.sum(clipped * clipped, axis=1), norm_clip)
        clipped = clip(grad, grad_clip, shrink)

        drift = load_coefficient(drift_of, tile, t, DRIFT_PER_CHAIN)
        noise = None
        if not NOISE_FIRST:
            noise_std = load_coefficient(noise_std_of, tile, t, NOISE_STD_PER_CHAIN)
            counters = load_counters(seed_ptr, chain_ptr, step_ptr, tile, t)
            noise = noise_of(counters, noise_std, tile, SHAPE, LAYERS.FAST)
        moved, finite, new = updated(
            x, clipped, noise, drift, frozen, bounds, tile, SHAPE, CLAMP, "drift" if NOISE_FIRST else "", True
        )
        first_bad = stopped_at(first_bad, finite, t)
        if telemetry_ptr is not None:
            alive = (first_bad < 0).to(tl.int32)
            square_norm = tl.sum(grad * grad, axis=1)
            n_clipped += alive * differs(clipped, grad, tile, SHAPE)
            n_clamped += alive * differs(new, moved, tile, SHAPE)
        x = tl.where((first_bad < 0)[:, None], new, x)
        store_trajectory(trajectory_ptr, x, t, thin, steps, tile, SHAPE)
        if IN_MEMORY:
            store_tile(state_ptr, BLOCK_DIM, x, again, HELD)
            tl.debug_barrier()

    if LAYERS.TARGET == "wgmma":
        # Always true, but opaque to the compiler: stops it carrying addresses of weights through the loop to here.
        always = zero == 0
    else:
        always: tl.constexpr = True
    if always:
        if IN_MEMORY:
            first, again, exist = tile_at(number + zero, n_chains, BLOCK_CHAINS)
            last = Tile(first, n_chains, again, exist, dims, 0, 0)
            x = load_tile(state_ptr, BLOCK_DIM, last, HELD)
        if IN_PLACE:
            chains = again  # those of the loop would take two registers during all steps
        else:
            chains += zero
        inside = chains < n_chains
        end = Tile(first, n_chains, chains, inside, dims, 0, 0)
        if not IN_PLACE:
            store_tile(x_ptr, DIM, x, end, SHAPE)
        energy = energy_of_terms(x, terms, 0, BLOCK_DIM) + tl.load(constant_ptr)
        labels = load_labels(label_ptr, end)
        for k in tl.static_range(len(LAYERS.FIRSTS) - 1):
            z = product(x, weights[LAYERS.FIRSTS[k]], LAYERS)
            z += load_bias(bias_ptrs, 0, LAYERS.FIRSTS[k], LAYERS)
            energy += energy_at(z, weights, bias_ptrs, scale_ptr + k, labels, 0, LAYERS.FIRSTS[k], LAYERS)
        tl.store(energy_ptr + chains, energy, mask=inside)
        tl.store(first_bad_ptr + chains, first_bad, mask=inside)
        report_bad(prepared_ptr, first_bad, energy, inside)
        if telemetry_ptr is not None:
            store_telemetry(telemetry_ptr, end, square_norm, n_clipped, n_clamped, steps)
