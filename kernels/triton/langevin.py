"""K Langevin steps of an MLP energy in one launch: gradient, noise, update and clamp of many chains in parallel.

    g  = dE/dx (x);   g = clip(g);   x' = x - a g + b xi;   x' = clamp(x')

or with NOISE_FIRST, x taking the noise before its gradient is made:

    x = x + b xi;   x = clamp(x), if CLAMP_NOISE;   g = clip(dE/dx (x));   x' = clamp(x - a g)

Two regimes, one arithmetic. Resident: all weights and the state stay on the chip for all K steps. Streaming:
the first layer does not fit, so the state lies in global memory (that is, in L2) and W_1 passes by in chunks
of the input dimension; each chunk serves this step's backward product and the next step's forward product.

A chain whose next state is not finite (tested before the clamp, which would hide it; with NOISE_FIRST the state after
the noise is one too) is frozen at its last finite state, and the step is recorded.

An argument that is None takes its code with it: an option that is not used costs nothing.
"""

import triton
import triton.language as tl

from .mlp import (
    add_terms,
    as_held,
    energy_at,
    energy_of_terms,
    from_held,
    load_bias,
    load_weight,
    load_weights,
    multiply,
    operand,
    product,
    slope_at,
    transpose,
)
from .philox import from_lanes, lane_order, normals, to_lanes
from .weights import BOUNDS, REPORT, bias_pointers, float_pointer, seed_pointer, weight_pointers

# -- parts of a step, shared with update.py --------------------------------------------------------------------


@triton.jit
def load_coefficient(c, stride_chain, stride_step, chains, inside, t, PER_CHAIN: tl.constexpr):
    """a or b of step t: a number, or (BLOCK_CHAINS, 1) when each chain has its own.

    c: a pointer; or, where the strides are None, the number itself.
    """
    if PER_CHAIN:
        return tl.load(c + chains * stride_chain + t * stride_step, mask=inside, other=0.0)[:, None]
    elif stride_step is not None:
        return tl.load(c + t * stride_step)
    else:
        return tl.cast(c, tl.float32)


@triton.jit
def tile_at(number, n_chains, BLOCK_CHAINS: tl.constexpr):
    """A tile's first chain, all of its chains (in int64: n_chains * DIM can pass 2**31), and which of them exist."""
    first = number.to(tl.int64) * BLOCK_CHAINS
    chains = first + tl.arange(0, BLOCK_CHAINS)
    return first, chains, chains < n_chains


@triton.jit
def load_key(seed_ptr, shift=0):
    """shift is 0, but where the compiler does not know, it can't carry the ten rounds' keys in 18 registers."""
    seed = tl.load(seed_ptr + shift)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def load_counters(chain_ptr, step_ptr, chains, inside, t):
    """Global chain number and lifetime step of every chain at step t."""
    chain = tl.load(chain_ptr + chains, mask=inside, other=0)
    step = tl.load(step_ptr + chains, mask=inside, other=0) + t
    return chain, step.to(tl.uint32)


@triton.jit
def load_labels(label_ptr, chains, inside, shift):
    if label_ptr is not None:
        return tl.load(label_ptr + chains + shift, mask=inside, other=0)
    else:
        return tl.zeros_like(chains)  # that nobody reads


@triton.jit
def hold(moved, x, frozen_ptr, stride_frozen, chains, inside, dims, shift, DIM: tl.constexpr):
    """moved, with frozen coordinates at x."""
    if frozen_ptr is not None:
        mask = inside[:, None] & (dims < DIM)[None, :]
        frozen = tl.load(frozen_ptr + shift + chains[:, None] * stride_frozen + dims[None, :], mask=mask, other=0)
        return tl.where(frozen != 0, x, moved)
    else:
        return moved


@triton.jit
def clipped_by_value(grad, grad_clip):
    """Written with comparisons, not min and max, so that NaN stays NaN."""
    if grad_clip is not None:
        return tl.where(grad > grad_clip, grad_clip, tl.where(grad < -grad_clip, -grad_clip, grad))
    else:
        return grad


@triton.jit
def shrinkage(square_norm, norm_clip):
    """(BLOCK_CHAINS, 1): what makes each chain's gradient no longer than norm_clip."""
    norm = tl.sqrt(square_norm)
    return (norm_clip / tl.where(norm > norm_clip, norm, norm_clip))[:, None]  # NaN: times 1, and NaN it stays


@triton.jit
def clamped(x, lo, hi, dims, shift, DIM: tl.constexpr, CLAMP: tl.constexpr):
    """CLAMP: "" for none, "numbers", or "rows" for pointers to a bound a dim."""
    # min and max may swallow NaN: only states that were found finite are kept
    if CLAMP == "numbers":
        return tl.minimum(tl.maximum(x, lo), hi)
    elif CLAMP == "rows":
        low = tl.load(lo + shift + dims, mask=dims < DIM, other=0.0)[None, :]
        high = tl.load(hi + shift + dims, mask=dims < DIM, other=0.0)[None, :]
        return tl.minimum(tl.maximum(x, low), high)
    else:
        return x


@triton.jit
def is_finite(x):
    """(BLOCK_CHAINS,) bool: 0 * x is 0 for finite x, else NaN, and a sum carries NaN."""
    return tl.sum(x * 0.0, axis=1) == 0.0


@triton.jit
def report_bad(prepared_ptr, first_bad, energy, inside):
    """Tell the host, which then looks at every chain, of any that is not finite."""
    bad = inside & ((first_bad >= 0) | (energy * 0.0 != 0.0))
    if tl.max(bad.to(tl.int32), axis=0) > 0:
        tl.store(prepared_ptr + REPORT, 1)


@triton.jit
def differs(x, y, dims, DIM: tl.constexpr):
    """(BLOCK_CHAINS,) int32: 1 where any coordinate does."""
    return tl.max(((x != y) & (dims < DIM)[None, :]).to(tl.int32), axis=1)


@triton.jit
def store_telemetry(ptr, n_chains, chains, inside, square_norm, n_clipped, n_clamped, steps):
    """Rows of a (3, n_chains) table: gradient norm, fraction of steps clipped, fraction of steps clamped."""
    share = 1.0 / tl.maximum(steps, 1).to(tl.float32)
    tl.store(ptr + chains, tl.sqrt(square_norm), mask=inside)
    tl.store(ptr + n_chains.to(tl.int64) + chains, n_clipped.to(tl.float32) * share, mask=inside)
    tl.store(ptr + 2 * n_chains.to(tl.int64) + chains, n_clamped.to(tl.float32) * share, mask=inside)


@triton.jit
def store_trajectory(ptr, x, t, thin, steps, chains, inside, dims, DIM: tl.constexpr):
    """These dims of every thin-th state, in (n_chains, steps // thin, DIM)."""
    if ptr is not None:
        if (t + 1) % thin == 0:
            row = (chains * (steps // thin) + t // thin)[:, None] * DIM
            tl.store(ptr + row + dims[None, :], x, mask=inside[:, None] & (dims < DIM)[None, :])


@triton.jit
def places(
    stride, first, n_chains, c, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    OWN_CHAINS: tl.constexpr,
):  # fmt: skip
    """Offsets of chunk c of rows that are stride apart, and which of them exist.

    OWN_CHAINS: each warp has 16 chains of the tile to itself. Then they are in the order in which threads hold an
    accumulator: of 16 chains and 16 dims a thread has four neighbouring dims (lane_order) of two chains, so it reads
    and writes 16 bytes at a time, and neither way leads through shared memory.
    """
    if OWN_CHAINS:
        i = tl.arange(0, BLOCK_CHAINS * BLOCK_DIM)
        chains = first + (i // 128 % (BLOCK_CHAINS // 16) * 16 + i // (8 * BLOCK_CHAINS) % 2 * 8 + i // 16 % 8)
        dims = c * BLOCK_DIM + i // (16 * BLOCK_CHAINS) * 16 + i % 16
        return tl.max_contiguous(chains * stride + dims, 4), (chains < n_chains) & (dims < DIM)
    else:
        chains = (first + tl.arange(0, BLOCK_CHAINS))[:, None]
        dims = (c * BLOCK_DIM + tl.arange(0, BLOCK_DIM))[None, :]
        return chains * stride + dims, (chains < n_chains) & (dims < DIM)


@triton.jit
def load_tile(
    ptr, stride, first, n_chains, c, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    OWN_CHAINS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_CHAINS, BLOCK_DIM), dims in lane_order, 0 where there is none."""
    offsets, exist = places(stride, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
    x = tl.load(ptr + offsets, mask=exist, other=0)
    if OWN_CHAINS:
        return from_held(x, BLOCK_CHAINS, BLOCK_DIM)
    else:
        return to_lanes(x)


@triton.jit
def store_tile(
    ptr, stride, x, first, n_chains, c, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    OWN_CHAINS: tl.constexpr,
):  # fmt: skip
    offsets, exist = places(stride, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
    if OWN_CHAINS:
        x = as_held(x)
    else:
        x = from_lanes(x)
    tl.store(ptr + offsets, x, mask=exist)


# -- resident --------------------------------------------------------------------------------------------------


@triton.jit
def load_state(
    x_ptr, state_ptr, first, n_chains, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr
):  # fmt: skip
    """A tile's state from where it waits: in place, if no column is padding, else in scratch."""
    if DIM == BLOCK_DIM:
        return load_tile(x_ptr, DIM, first, n_chains, 0, DIM, BLOCK_DIM, BLOCK_CHAINS, True)
    else:
        return load_tile(state_ptr, BLOCK_DIM, first, n_chains, 0, BLOCK_DIM, BLOCK_DIM, BLOCK_CHAINS, True)


@triton.jit
def store_state(
    x_ptr, state_ptr, x, first, n_chains, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr
):  # fmt: skip
    if DIM == BLOCK_DIM:
        store_tile(x_ptr, DIM, x, first, n_chains, 0, DIM, BLOCK_DIM, BLOCK_CHAINS, True)
    else:
        store_tile(state_ptr, BLOCK_DIM, x, first, n_chains, 0, BLOCK_DIM, BLOCK_DIM, BLOCK_CHAINS, True)
    tl.debug_barrier()  # other threads may load it


@triton.jit
def network_gradient(
    x, weights, bias_ptrs, scale_ptr, labels, shift, FIRST: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """dE_k/dx of the network whose first layer is FIRST: (BLOCK_CHAINS, BLOCK_DIM)."""
    z = product(x, weights[FIRST], PRECISION, TARGET) + load_bias(bias_ptrs, shift, FIRST, BLOCKS)
    slope = slope_at(
        z, weights, bias_ptrs, scale_ptr, labels, shift, None, FIRST, BLOCKS, ACTIVATIONS, PARAMETERS, PRECISION,
        FAST, TARGET,
    )  # fmt: skip
    return product(slope, transpose(weights[FIRST], PRECISION), PRECISION, TARGET)


# Parts of a pool begin at any chain, so tensors of one number each may lie at any 8 bytes: no reason to compile anew.
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
    drift, stride_a_chain, stride_a_step,  # a: a number and no strides, or a pointer
    noise_std, stride_b_chain, stride_b_step,  # b
    grad_clip, norm_clip,  # numbers, or None
    lo, hi,  # by CLAMP
    # The seed, the energy and the place of the report: see weights.py. The same buffer thrice: the compiler adds an
    # index to an argument in one instruction, and to a place that it has computed in two, for which it keeps registers.
    prepared_ptr, in_weights_ptr, in_biases_ptr,
    n_chains, steps,
    zero,  # 0, but the compiler does not know
    first_tile,  # of this launch
    state_ptr,  # (programs * BLOCK_CHAINS, BLOCK_DIM) float32, scratch, if IN_MEMORY and DIM != BLOCK_DIM; or None
    WEIGHTS: tl.constexpr, LOWS: tl.constexpr, BIASES: tl.constexpr, TERMS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_CHAINS: tl.constexpr, BOTH_ORDERS: tl.constexpr,
    IN_MEMORY: tl.constexpr,  # while a step makes the gradient, the state waits in memory; else in registers
    A_PER_CHAIN: tl.constexpr, B_PER_CHAIN: tl.constexpr, CLAMP: tl.constexpr,
    NOISE_FIRST: tl.constexpr, CLAMP_NOISE: tl.constexpr,
    FAST: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    weight_ptrs = weight_pointers(in_weights_ptr, WEIGHTS, LOWS)
    bias_ptrs = bias_pointers(in_biases_ptr, BIASES)
    scale_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[0]))
    constant_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[1]))
    curvature_ptr, mean_ptr, linear_ptr = None, None, None  # here, as no function of triton 3.6 can return None
    if tl.constexpr(TERMS[2]) >= 0:
        curvature_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[2]))
        mean_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[3]))
    if tl.constexpr(TERMS[4]) >= 0:
        linear_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[4]))
    seed_ptr = seed_pointer(prepared_ptr)
    tile = first_tile + tl.program_id(0)
    first, chains, inside = tile_at(tile, n_chains, BLOCK_CHAINS)
    if IN_MEMORY and DIM != BLOCK_DIM:
        state_ptr -= first_tile.to(tl.int64) * (BLOCK_CHAINS * BLOCK_DIM)  # launches share one scratch
    dims = lane_order(tl.arange(0, BLOCK_DIM))

    weights = load_weights(weight_ptrs, FIRSTS, BLOCK_DIM, BLOCKS, ACTIVATIONS, PRECISION, TARGET, BOTH_ORDERS)
    x = tl.load(
        x_ptr + chains[:, None] * DIM + dims[None, :], mask=inside[:, None] & (dims < DIM)[None, :], other=0.0
    )  # fmt: skip
    first_bad = tl.full((BLOCK_CHAINS,), -1, tl.int32)
    square_norm = tl.full((BLOCK_CHAINS,), float("nan"), tl.float32)
    n_clipped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    n_clamped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    if IN_MEMORY and DIM != BLOCK_DIM:
        store_state(x_ptr, state_ptr, x, first, n_chains, DIM, BLOCK_DIM, BLOCK_CHAINS)

    for t in tl.range(0, steps, disable_licm=IN_MEMORY):
        # 0, anew in each step. What is loaded from here is not kept in registers from step to step, nor what follows
        # from it: biases alone would take 32 a layer. (With a product for the "and", places become sums in registers.)
        shift = zero & t
        first, chains, inside = tile_at(tile + shift, n_chains, BLOCK_CHAINS)
        if IN_MEMORY:
            x = load_state(x_ptr, state_ptr, first, n_chains, DIM, BLOCK_DIM, BLOCK_CHAINS)
        if NOISE_FIRST:
            chain, step = load_counters(chain_ptr, step_ptr, chains, inside, t)
            b = load_coefficient(noise_std, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)
            key0, key1 = load_key(seed_ptr, shift)
            noise = normals(key0, key1, chain, step, 0, 0, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST, True, b)
            noisy = hold(x + noise, x, frozen_ptr, stride_frozen, chains, inside, dims, shift, DIM)
            if DIM != BLOCK_DIM:
                noisy = tl.where((dims < DIM)[None, :], noisy, 0.0)
            first_bad = tl.where((first_bad < 0) & ~is_finite(noisy), t, first_bad)
            if CLAMP_NOISE:
                noisy = clamped(noisy, lo, hi, dims, shift, DIM, CLAMP)
                noisy = hold(noisy, x, frozen_ptr, stride_frozen, chains, inside, dims, shift, DIM)
            x = tl.where((first_bad < 0)[:, None], noisy, x)
            if IN_MEMORY:
                store_state(x_ptr, state_ptr, x, first, n_chains, DIM, BLOCK_DIM, BLOCK_CHAINS)
        labels = load_labels(label_ptr, chains, inside, shift)
        grad = network_gradient(
            x, weights, bias_ptrs, scale_ptr, labels, shift, tl.constexpr(FIRSTS[0]), BLOCKS, ACTIVATIONS,
            PARAMETERS, PRECISION, FAST, TARGET,
        )  # fmt: skip
        for k in tl.static_range(1, len(FIRSTS) - 1):
            grad += network_gradient(
                x, weights, bias_ptrs, scale_ptr + k, labels, shift, tl.constexpr(FIRSTS[k]), BLOCKS, ACTIVATIONS,
                PARAMETERS, PRECISION, FAST, TARGET,
            )  # fmt: skip
        if IN_MEMORY:
            # once more, from a place that only differs for the compiler, or it keeps what it has read
            first, _, _ = tile_at(tile + (zero & ~t), n_chains, BLOCK_CHAINS)
            x = load_state(x_ptr, state_ptr, first, n_chains, DIM, BLOCK_DIM, BLOCK_CHAINS)
        grad = add_terms(grad, x, curvature_ptr, mean_ptr, linear_ptr, shift, BLOCK_DIM)
        grad = hold(grad, 0.0, frozen_ptr, stride_frozen, chains, inside, dims, shift, DIM)
        if DIM != BLOCK_DIM and (norm_clip is not None or telemetry_ptr is not None):
            grad = tl.where((dims < DIM)[None, :], grad, 0.0)
        clipped = clipped_by_value(grad, grad_clip)
        if norm_clip is not None:
            clipped *= shrinkage(tl.sum(clipped * clipped, axis=1), norm_clip)

        if NOISE_FIRST:
            a = load_coefficient(drift, stride_a_chain, stride_a_step, chains, inside, t, A_PER_CHAIN)
            moved = x - a * clipped
        else:
            chain, step = load_counters(chain_ptr, step_ptr, chains, inside, t)
            a = load_coefficient(drift, stride_a_chain, stride_a_step, chains, inside, t, A_PER_CHAIN)
            b = load_coefficient(noise_std, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)
            key0, key1 = load_key(seed_ptr, shift)
            noise = normals(key0, key1, chain, step, 0, 0, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST, True, b)
            moved = x - a * clipped + noise
        moved = hold(moved, x, frozen_ptr, stride_frozen, chains, inside, dims, shift, DIM)
        if DIM != BLOCK_DIM:
            # Padded columns hold noise of no dim and, where dE/dz is infinite, 0 * inf: neither may freeze a chain.
            moved = tl.where((dims < DIM)[None, :], moved, 0.0)
        first_bad = tl.where((first_bad < 0) & ~is_finite(moved), t, first_bad)
        new = clamped(moved, lo, hi, dims, shift, DIM, CLAMP)
        if CLAMP != "":
            new = hold(new, x, frozen_ptr, stride_frozen, chains, inside, dims, shift, DIM)
        if telemetry_ptr is not None:
            alive = (first_bad < 0).to(tl.int32)
            square_norm = tl.sum(grad * grad, axis=1)
            n_clipped += alive * differs(clipped, grad, dims, DIM)
            n_clamped += alive * differs(new, moved, dims, DIM)
        x = tl.where((first_bad < 0)[:, None], new, x)
        store_trajectory(trajectory_ptr, x, t, thin, steps, chains, inside, dims, DIM)
        if IN_MEMORY:
            store_state(x_ptr, state_ptr, x, first, n_chains, DIM, BLOCK_DIM, BLOCK_CHAINS)

    if TARGET == "wgmma":
        # but the compiler does not know, or each step would keep what it makes of the weights' places for what follows
        always = zero == 0
    else:
        always: tl.constexpr = True
    if always:
        in_place: tl.constexpr = IN_MEMORY and DIM == BLOCK_DIM
        if IN_MEMORY:
            first, again, _ = tile_at(tile + zero, n_chains, BLOCK_CHAINS)
            x = load_state(x_ptr, state_ptr, first, n_chains, DIM, BLOCK_DIM, BLOCK_CHAINS)
        if in_place:
            chains = again  # those of the loop would take two registers during all steps
        else:
            chains += zero
        inside = chains < n_chains
        if not in_place:
            tl.store(x_ptr + chains[:, None] * DIM + dims[None, :], x, mask=inside[:, None] & (dims < DIM)[None, :])
        energy = energy_of_terms(x, curvature_ptr, mean_ptr, linear_ptr, 0, BLOCK_DIM) + tl.load(constant_ptr)
        labels = load_labels(label_ptr, chains, inside, 0)
        for k in tl.static_range(len(FIRSTS) - 1):
            z = product(x, weights[tl.constexpr(FIRSTS[k])], PRECISION, TARGET)
            z += load_bias(bias_ptrs, 0, tl.constexpr(FIRSTS[k]), BLOCKS)
            energy += energy_at(
                z, weights, bias_ptrs, scale_ptr + k, labels, 0, tl.constexpr(FIRSTS[k]), BLOCKS, ACTIVATIONS,
                PARAMETERS, PRECISION, FAST, TARGET,
            )  # fmt: skip
        tl.store(energy_ptr + chains, energy, mask=inside)
        tl.store(first_bad_ptr + chains, first_bad, mask=inside)
        report_bad(prepared_ptr, first_bad, energy, inside)
        if telemetry_ptr is not None:
            store_telemetry(telemetry_ptr, n_chains, chains, inside, square_norm, n_clipped, n_clamped, steps)


# -- streaming -------------------------------------------------------------------------------------------------

IN_DOUBT: tl.constexpr = tl.constexpr(-2)  # in the place of a chain's first bad step: whether this is one


@triton.jit
def load_chunk(
    weight_ptrs, c, n_chunks, BLOCK_DIM: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Rows c BLOCK_DIM and on of every network's W_1."""
    weights = ()
    for k in tl.static_range(len(FIRSTS) - 1):
        w = load_weight(
            weight_ptrs[tl.constexpr(FIRSTS[k])], c * BLOCK_DIM, n_chunks * BLOCK_DIM, BLOCK_DIM,
            tl.constexpr(BLOCKS[tl.constexpr(FIRSTS[k])]), PRECISION, TARGET,
        )  # fmt: skip
        weights = weights + (w,)
    return weights


@triton.jit
def forward_chunk(zs, x, weights, PRECISION: tl.constexpr, TARGET: tl.constexpr):
    """Every network's z_1 with one more chunk of x in it."""
    sums = ()
    for k in tl.static_range(len(weights)):
        sums = sums + (product(x, weights[k], PRECISION, TARGET, zs[k]),)
    return sums


@triton.jit
def empty_sums(FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_CHAINS: tl.constexpr):
    zs = ()
    for k in tl.static_range(len(FIRSTS) - 1):
        zs = zs + (tl.zeros((BLOCK_CHAINS, tl.constexpr(BLOCKS[tl.constexpr(FIRSTS[k])])), tl.float32),)
    return zs


@triton.jit
def hold_tile(
    moved, x, frozen_ptr, stride_frozen, first, n_chains, c, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr, OWN_CHAINS: tl.constexpr,
):  # fmt: skip
    """`hold`, for a tile as `load_tile` gives it."""
    if frozen_ptr is not None:
        frozen = load_tile(frozen_ptr, stride_frozen, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
        return tl.where(frozen != 0, x, moved)
    else:
        return moved


@triton.jit
def gradient_chunk(
    x_ptr, first, n_chains, c, slopes, weights, curvature_ptr, mean_ptr, linear_ptr, frozen_ptr, stride_frozen,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr, OWN_CHAINS: tl.constexpr,
    PRECISION: tl.constexpr, TARGET: tl.constexpr, ZERO_PADDING: tl.constexpr,
):  # fmt: skip
    """Chunk c of the state and of its gradient, 0 where frozen.

    So are padded columns, but those of a chain with an infinite slope, where 0 * inf may stand, if not ZERO_PADDING.
    """
    dims = c * BLOCK_DIM + lane_order(tl.arange(0, BLOCK_DIM))
    x = load_tile(x_ptr, DIM, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
    grad = multiply(slopes[0], transpose(weights[0], PRECISION), PRECISION)
    for k in tl.static_range(len(weights) - 1):
        grad += multiply(slopes[k + 1], transpose(weights[k + 1], PRECISION), PRECISION)
    grad = add_terms(grad, x, curvature_ptr, mean_ptr, linear_ptr, c * BLOCK_DIM, BLOCK_DIM)
    grad = hold_tile(grad, 0.0, frozen_ptr, stride_frozen, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
    if ZERO_PADDING and DIM % BLOCK_DIM != 0:
        grad = tl.where((dims < DIM)[None, :], grad, 0.0)
    return x, grad


@triton.jit
def move_chunk(
    x, grad, shrink, first, n_chains, c, noise_key, chain, step, a, b, grad_clip, frozen_ptr, stride_frozen,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr, OWN_CHAINS: tl.constexpr,
    FAST: tl.constexpr, ZERO_PADDING: tl.constexpr, NOISE_FIRST: tl.constexpr,
):  # fmt: skip
    """The clipped gradient, and where chunk c would move to before the clamp. shrink: (BLOCK_CHAINS, 1) or None.

    NOISE_FIRST: without noise.

    If not ZERO_PADDING, padded columns hold noise of no dim. The weights that it meets are 0, so it must become finite.
    """
    dims = c * BLOCK_DIM + lane_order(tl.arange(0, BLOCK_DIM))
    clipped = clipped_by_value(grad, grad_clip)
    if shrink is not None:
        clipped *= shrink
    if NOISE_FIRST:
        moved = x - a * clipped
    else:
        noise = normals(
            noise_key[0], noise_key[1], chain, step, c * (BLOCK_DIM // 4), 0, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST, True,
            b,
        )  # fmt: skip
        moved = x - a * clipped + noise
    moved = hold_tile(moved, x, frozen_ptr, stride_frozen, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
    if ZERO_PADDING and DIM % BLOCK_DIM != 0:
        moved = tl.where((dims < DIM)[None, :], moved, 0.0)  # as in the resident kernel
    return clipped, moved


@triton.jit
def add_noise(
    x, first, n_chains, c, noise_key, chain, step, b, frozen_ptr, stride_frozen, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr, OWN_CHAINS: tl.constexpr, FAST: tl.constexpr,
    ZERO_PADDING: tl.constexpr,
):  # fmt: skip
    """Chunk c with noise, but for frozen coordinates."""
    dims = c * BLOCK_DIM + lane_order(tl.arange(0, BLOCK_DIM))
    noise = normals(
        noise_key[0], noise_key[1], chain, step, c * (BLOCK_DIM // 4), 0, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST, True, b
    )  # fmt: skip
    noisy = hold_tile(
        x + noise, x, frozen_ptr, stride_frozen, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS
    )  # fmt: skip
    if ZERO_PADDING and DIM % BLOCK_DIM != 0:
        noisy = tl.where((dims < DIM)[None, :], noisy, 0.0)
    return noisy


@triton.jit
def clamp_chunk(
    moved, x, lo, hi, frozen_ptr, stride_frozen, first, n_chains, c, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr, OWN_CHAINS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Chunk c within the bounds, but for frozen coordinates, which are those of x."""
    dims = c * BLOCK_DIM + lane_order(tl.arange(0, BLOCK_DIM))
    new = clamped(moved, lo, hi, dims, 0, DIM, CLAMP)
    if CLAMP != "":
        new = hold_tile(new, x, frozen_ptr, stride_frozen, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
    return new


@triton.jit
def moves_at(t, first_bad, NOISE_FIRST: tl.constexpr):
    """(BLOCK_CHAINS,) bool: chains that take step t. With NOISE_FIRST, some are bad by the next step's noise only."""
    if NOISE_FIRST:
        return (first_bad < 0) | (first_bad > t)
    else:
        return first_bad < 0


@triton.jit
def load_next(c, stride_chain, stride_step, chains, inside, t, steps, PER_CHAIN: tl.constexpr):
    """`load_coefficient` of step t + 1; 0 after the last."""
    value = load_coefficient(c, stride_chain, stride_step, chains, inside, tl.minimum(t + 1, steps - 1), PER_CHAIN)
    return tl.where(t + 1 < steps, value, 0.0)


@triton.jit
def through_memory(
    slope, ptr, shift, OWN_CHAINS: tl.constexpr, PRECISION: tl.constexpr, TARGET: tl.constexpr
):  # fmt: skip
    """A slope as an operand, written to memory and read back, which brings it into shared memory.

    As the product's result that it is, it would lie in 64 registers a thread and half during all chunks, beside the
    128 of the next z.
    """
    ROWS: tl.constexpr = slope.shape[0]
    COLUMNS: tl.constexpr = slope.shape[1]
    SIZE: tl.constexpr = ROWS * COLUMNS
    i = tl.arange(0, SIZE)
    if OWN_CHAINS:  # as threads hold an accumulator: neighbours in twos
        row = i // 64 % (ROWS // 16) * 16 + i // (4 * ROWS) % 2 * 8 + i // 8 % 8
        i = tl.max_contiguous(row * COLUMNS + i // (8 * ROWS) * 8 + i % 8, 2)
    # shift is 0, but unknown to the compiler, or it carries 16 pointers across the loop
    rows = shift + tl.arange(0, ROWS)
    square = rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]

    halves = operand(slope, PRECISION, TARGET)
    tl.debug_barrier()  # others may still fetch from there
    for half in tl.static_range(len(halves)):
        values = halves[half].to(ptr.dtype.element_ty)
        if OWN_CHAINS:
            values = tl.permute(tl.reshape(values, (ROWS // 16, 2, 8, COLUMNS // 8, 4, 2)), (3, 1, 0, 2, 4, 5))
        tl.store(ptr + half * SIZE + i, tl.reshape(values, (SIZE,)))
    tl.debug_barrier()
    read = ()
    for half in tl.static_range(len(halves)):
        values = tl.load(ptr + half * SIZE + square)
        read = read + (values.to(halves[half].dtype),)
    return read


@triton.jit(
    do_not_specialize=["n_chains", "steps", "zero", "thin", "first_tile"],
    do_not_specialize_on_alignment=["chain_ptr", "step_ptr", "label_ptr"],
)
def langevin_streaming(
    x_ptr, energy_ptr, first_bad_ptr, trajectory_ptr, thin, telemetry_ptr,
    chain_ptr, step_ptr, label_ptr, frozen_ptr, stride_frozen,
    drift, stride_a_chain, stride_a_step, noise_std, stride_b_chain, stride_b_step,
    grad_clip, norm_clip, lo, hi,
    prepared_ptr, in_weights_ptr, in_biases_ptr, n_chains, steps, zero, first_tile,
    slope_ptrs,  # a network each, (programs * BLOCK_CHAINS, its first width), scratch; at bf16x3 of two halves
    WEIGHTS: tl.constexpr, LOWS: tl.constexpr, BIASES: tl.constexpr, TERMS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_CHAINS: tl.constexpr, OWN_CHAINS: tl.constexpr,
    A_PER_CHAIN: tl.constexpr, B_PER_CHAIN: tl.constexpr, CLAMP: tl.constexpr,
    BOUNDED: tl.constexpr,  # lo and hi are finite numbers
    # What lies in memory is then the state after the noise; a chunk that has moved takes the next step's at once.
    NOISE_FIRST: tl.constexpr, CLAMP_NOISE: tl.constexpr,
    IN_MEMORY: tl.constexpr,  # act'(z_1) waits in memory in float32 (at bf16 it always does, in bf16)
    LEAN: tl.constexpr,  # nothing is made before a loop that could be made in it
    FAST: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    weight_ptrs = weight_pointers(in_weights_ptr, WEIGHTS, LOWS)
    bias_ptrs = bias_pointers(in_biases_ptr, BIASES)
    scale_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[0]))
    constant_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[1]))
    curvature_ptr, mean_ptr, linear_ptr = None, None, None  # here, as no function of triton 3.6 can return None
    if tl.constexpr(TERMS[2]) >= 0:
        curvature_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[2]))
        mean_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[3]))
    if tl.constexpr(TERMS[4]) >= 0:
        linear_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[4]))
    seed_ptr = seed_pointer(prepared_ptr)
    reach_ptr = float_pointer(prepared_ptr, BOUNDS)
    first, chains, inside = tile_at(first_tile + tl.program_id(0), n_chains, BLOCK_CHAINS)
    weights = load_weights(weight_ptrs, FIRSTS, 0, BLOCKS, ACTIVATIONS, PRECISION, TARGET, False)

    ANEW: tl.constexpr = IN_MEMORY or LEAN
    n_chunks: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    HALVES: tl.constexpr = 2 if PRECISION == "bf16x3" else 1
    HAS_TERMS: tl.constexpr = curvature_ptr is not None or linear_ptr is not None
    zs = empty_sums(FIRSTS, BLOCKS, BLOCK_CHAINS)
    size = tl.zeros((BLOCK_CHAINS,), tl.float32)  # no |x| of the chain is larger
    PAD_NOISE: tl.constexpr = not (BOUNDED and CLAMP_NOISE)  # or a clamp makes it finite
    if NOISE_FIRST:
        start_key = load_key(seed_ptr)
        start_b = load_coefficient(noise_std, stride_b_chain, stride_b_step, chains, inside, 0, B_PER_CHAIN)
        start_chain, start_step = load_counters(chain_ptr, step_ptr, chains, inside, 0)
        start_finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
        for c in tl.range(0, n_chunks, disable_licm=ANEW):
            x0 = load_tile(x_ptr, DIM, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
            noisy = add_noise(
                x0, first, n_chains, c, start_key, start_chain, start_step, start_b, frozen_ptr, stride_frozen, DIM,
                BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS, FAST, True,
            )  # fmt: skip
            start_finite = start_finite & is_finite(noisy)
        start_bad = tl.where(start_finite, -1, 0)
        tl.debug_barrier()  # others may still load what the next loop overwrites
    else:
        start_bad = tl.full((BLOCK_CHAINS,), -1, tl.int32)
    for c in tl.range(0, n_chunks, disable_licm=ANEW):
        x0 = load_tile(x_ptr, DIM, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
        if NOISE_FIRST:
            noisy = add_noise(
                x0, first, n_chains, c, start_key, start_chain, start_step, start_b, frozen_ptr, stride_frozen, DIM,
                BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS, FAST, PAD_NOISE,
            )  # fmt: skip
            if CLAMP_NOISE:
                noisy = clamp_chunk(
                    noisy, x0, lo, hi, frozen_ptr, stride_frozen, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS,
                    OWN_CHAINS, CLAMP,
                )  # fmt: skip
            x0 = tl.where((start_bad < 0)[:, None], noisy, x0)
            store_tile(x_ptr, DIM, x0, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
            if CLAMP != "" and not BOUNDED:
                # the first step may end on a bound that is farther out than the start
                edge = clamped(x0, lo, hi, c * BLOCK_DIM + lane_order(tl.arange(0, BLOCK_DIM)), 0, DIM, CLAMP)
                size += tl.sum(tl.abs(edge), axis=1)
        w0 = load_chunk(weight_ptrs, c, n_chunks, BLOCK_DIM, FIRSTS, BLOCKS, PRECISION, TARGET)
        zs = forward_chunk(zs, x0, w0, PRECISION, TARGET)
        size += tl.sum(tl.abs(x0), axis=1)
    if BOUNDED:
        # holds at every step: what moves is clamped, and what does not is as it was
        size += tl.maximum(tl.abs(lo), tl.abs(hi))
    # these wait in memory while a step makes its slopes; there is no energy yet to lie in that place
    tl.store(energy_ptr + chains, size, mask=inside)
    tl.store(first_bad_ptr + chains, start_bad, mask=inside)
    tl.debug_barrier()  # other threads may load them
    square_norm = tl.full((BLOCK_CHAINS,), float("nan"), tl.float32)
    n_clipped = tl.zeros((BLOCK_CHAINS,), tl.int32)
    n_clamped = tl.zeros((BLOCK_CHAINS,), tl.int32)

    # At bf16 the loop just fits in registers, if nothing is made before it that could be made in it: pointers, and the
    # descriptors by which wgmma finds its operands.
    for t in tl.range(0, steps, disable_licm=OWN_CHAINS):
        # 0, anew in each step, as in the resident kernel. (With an "and" here, or added to the tile, more would spill.)
        shift = zero * t
        if OWN_CHAINS:
            first_now = first + shift
        else:  # or mma.sync keeps it, and has no registers left for it
            first_now, _, _ = tile_at(first_tile + tl.program_id(0) + shift, n_chains, BLOCK_CHAINS)
        chains = first_now + tl.arange(0, BLOCK_CHAINS)
        inside = chains < n_chains
        labels = load_labels(label_ptr, chains, inside, shift)

        # Chunks are stored as they are made, so a chain must be known to stay finite before its first chunk
        # moves. |x'| <= |x| + a (sum_k |slope_k|_1 max|W_1k| + max|c| |x| + max|b - c m|) + 7 b settles it for all
        # but exploding chains; only for a tile that holds one, a rehearsal without stores finds out exactly.
        # With NOISE_FIRST, b is the next step's. This step's counts in |x|: `size` may be of states before their noise,
        # and what a clamp returns is no farther out than its bound, from which the noise came.
        slopes = ()
        pull = tl.zeros((BLOCK_CHAINS,), tl.float32)
        for k in tl.static_range(len(FIRSTS) - 1):
            z = zs[k] + load_bias(bias_ptrs, shift, tl.constexpr(FIRSTS[k]), BLOCKS)
            memory = slope_ptrs[k] + tl.program_id(0).to(tl.int64) * (BLOCK_CHAINS * HALVES * z.shape[1])
            if IN_MEMORY:
                parking = memory.to(tl.pointer_type(tl.float32))
            else:
                parking = memory if PRECISION == "bf16" else None
            slope = slope_at(
                z, weights, bias_ptrs, scale_ptr + k, labels, shift, parking,
                tl.constexpr(FIRSTS[k]), BLOCKS, ACTIVATIONS, PARAMETERS, PRECISION, FAST, TARGET,
            )  # fmt: skip
            pull += tl.sum(tl.abs(slope), axis=1) * tl.load(reach_ptr + 2 + k)
            if k == len(FIRSTS) - 2:
                size = tl.load(energy_ptr + chains, mask=inside, other=0.0)
                if NOISE_FIRST:
                    b = load_coefficient(noise_std, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)
                    size += tl.sum(tl.zeros((BLOCK_CHAINS, 1), tl.float32) + 7.0 * b, axis=1)
                if HAS_TERMS:
                    pull += tl.load(reach_ptr) * size + tl.load(reach_ptr + 1)
                a = load_coefficient(drift, stride_a_chain, stride_a_step, chains, inside, t, A_PER_CHAIN)
                if NOISE_FIRST:
                    b = load_next(noise_std, stride_b_chain, stride_b_step, chains, inside, t, steps, B_PER_CHAIN)
                else:
                    b = load_coefficient(noise_std, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)
                reach = size + tl.sum(pull[:, None] * a + 7.0 * b, axis=1)
                first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
                in_doubt = (first_bad < 0) & ~(reach < 1e38)
                # Written down, if only to settle it here: the compiler likes to put sums off, and then keeps slopes
                # beside the operand that they become.
                tl.store(first_bad_ptr + chains, tl.where(in_doubt, IN_DOUBT, first_bad), mask=inside)
            if PRECISION == "bf16x3" and not OWN_CHAINS:
                halves = operand(slope, PRECISION, TARGET)  # two halves are too much for mma.sync's shared memory
                tl.debug_barrier()
            else:
                halves = through_memory(slope, memory, shift, OWN_CHAINS, PRECISION, TARGET)
            slopes = slopes + (halves,)
        first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
        in_doubt = first_bad == IN_DOUBT

        # loaded now, and a and b anew, so that they are in no register while slopes are
        noise_key = load_key(seed_ptr, shift)
        a = load_coefficient(drift, stride_a_chain, stride_a_step, chains, inside, t, A_PER_CHAIN)
        if NOISE_FIRST:
            b = load_next(noise_std, stride_b_chain, stride_b_step, chains, inside, t, steps, B_PER_CHAIN)
            chain, step = load_counters(chain_ptr, step_ptr, chains, inside, t + 1)
        else:
            b = load_coefficient(noise_std, stride_b_chain, stride_b_step, chains, inside, t, B_PER_CHAIN)
            chain, step = load_counters(chain_ptr, step_ptr, chains, inside, t)
        shrink = None
        if norm_clip is not None:
            square = tl.zeros((BLOCK_CHAINS,), tl.float32)
            for c in tl.range(0, n_chunks, disable_licm=ANEW):
                w = load_chunk(weight_ptrs, c, n_chunks, BLOCK_DIM, FIRSTS, BLOCKS, PRECISION, TARGET)
                x, grad = gradient_chunk(
                    x_ptr, first_now, n_chains, c, slopes, w, curvature_ptr, mean_ptr, linear_ptr, frozen_ptr,
                    stride_frozen, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS, PRECISION, TARGET, True,
                )  # fmt: skip
                clipped = clipped_by_value(grad, grad_clip)
                square += tl.sum(clipped * clipped, axis=1)
            shrink = shrinkage(square, norm_clip)
        if tl.max(in_doubt.to(tl.int32), axis=0) > 0:
            finite = tl.full((BLOCK_CHAINS,), 1, tl.int1)
            finite_noisy = tl.full((BLOCK_CHAINS,), 1, tl.int1)
            for c in tl.range(0, n_chunks, disable_licm=ANEW):
                w = load_chunk(weight_ptrs, c, n_chunks, BLOCK_DIM, FIRSTS, BLOCKS, PRECISION, TARGET)
                x, grad = gradient_chunk(
                    x_ptr, first_now, n_chains, c, slopes, w, curvature_ptr, mean_ptr, linear_ptr, frozen_ptr,
                    stride_frozen, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS, PRECISION, TARGET, True,
                )  # fmt: skip
                clipped, moved = move_chunk(
                    x, grad, shrink, first_now, n_chains, c, noise_key, chain, step, a, b, grad_clip, frozen_ptr,
                    stride_frozen, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS, FAST, True, NOISE_FIRST,
                )  # fmt: skip
                finite = finite & is_finite(moved)
                if NOISE_FIRST:
                    new = clamp_chunk(
                        moved, x, lo, hi, frozen_ptr, stride_frozen, first_now, n_chains, c, DIM, BLOCK_DIM,
                        BLOCK_CHAINS, OWN_CHAINS, CLAMP,
                    )  # fmt: skip
                    noisy = add_noise(
                        new, first_now, n_chains, c, noise_key, chain, step, b, frozen_ptr, stride_frozen, DIM,
                        BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS, FAST, True,
                    )  # fmt: skip
                    finite_noisy = finite_noisy & is_finite(noisy)
            if NOISE_FIRST:
                first_bad = tl.where(in_doubt, tl.where(finite, tl.where(finite_noisy, -1, t + 1), t), first_bad)
            else:
                first_bad = tl.where(in_doubt, tl.where(finite, -1, t), first_bad)
            tl.store(first_bad_ptr + chains, first_bad, mask=inside)

        zs = empty_sums(FIRSTS, BLOCKS, BLOCK_CHAINS)
        size = tl.zeros((BLOCK_CHAINS,), tl.float32)
        raw_square = tl.zeros((BLOCK_CHAINS,), tl.float32)
        any_clipped = tl.zeros((BLOCK_CHAINS,), tl.int32)
        any_clamped = tl.zeros((BLOCK_CHAINS,), tl.int32)
        for c in tl.range(0, n_chunks, disable_licm=ANEW):
            w = load_chunk(weight_ptrs, c, n_chunks, BLOCK_DIM, FIRSTS, BLOCKS, PRECISION, TARGET)
            x, grad = gradient_chunk(
                x_ptr, first_now, n_chains, c, slopes, w, curvature_ptr, mean_ptr, linear_ptr, frozen_ptr,
                stride_frozen, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS, PRECISION, TARGET,
                telemetry_ptr is not None,
            )  # fmt: skip
            clipped, moved = move_chunk(
                x, grad, shrink, first_now, n_chains, c, noise_key, chain, step, a, b, grad_clip, frozen_ptr,
                stride_frozen, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS, FAST, not BOUNDED, NOISE_FIRST,
            )  # fmt: skip
            dims = c * BLOCK_DIM + lane_order(tl.arange(0, BLOCK_DIM))
            new = clamp_chunk(
                moved, x, lo, hi, frozen_ptr, stride_frozen, first_now, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS,
                OWN_CHAINS, CLAMP,
            )  # fmt: skip
            if telemetry_ptr is not None:
                raw_square += tl.sum(grad * grad, axis=1)
                any_clipped = tl.maximum(any_clipped, differs(clipped, grad, dims, DIM))
                any_clamped = tl.maximum(any_clamped, differs(new, moved, dims, DIM))
            x = tl.where(moves_at(t, first_bad, NOISE_FIRST)[:, None], new, x)
            if not NOISE_FIRST:
                store_tile(x_ptr, DIM, x, first_now, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
            if trajectory_ptr is not None:
                if (t + 1) % thin == 0:
                    row_ptr = trajectory_ptr + (t // thin).to(tl.int64) * DIM
                    stride = (steps // thin).to(tl.int64) * DIM
                    store_tile(row_ptr, stride, x, first_now, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
            if NOISE_FIRST:
                noisy = add_noise(
                    x, first_now, n_chains, c, noise_key, chain, step, b, frozen_ptr, stride_frozen, DIM, BLOCK_DIM,
                    BLOCK_CHAINS, OWN_CHAINS, FAST, PAD_NOISE,
                )  # fmt: skip
                if CLAMP_NOISE:
                    noisy = clamp_chunk(
                        noisy, x, lo, hi, frozen_ptr, stride_frozen, first_now, n_chains, c, DIM, BLOCK_DIM,
                        BLOCK_CHAINS, OWN_CHAINS, CLAMP,
                    )  # fmt: skip
                x = tl.where((first_bad < 0)[:, None], noisy, x)
                store_tile(x_ptr, DIM, x, first_now, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
            zs = forward_chunk(zs, x, w, PRECISION, TARGET)
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

    if ANEW:
        always = zero == 0  # as in the resident kernel
    else:
        always: tl.constexpr = True
    if always:
        # made anew, as in the resident kernel
        chains = first + zero + tl.arange(0, BLOCK_CHAINS)
        inside = chains < n_chains
        energy = tl.zeros((BLOCK_CHAINS,), tl.float32) + tl.load(constant_ptr)
        if HAS_TERMS:
            for c in tl.range(0, n_chunks, disable_licm=ANEW):
                x1 = load_tile(x_ptr, DIM, first, n_chains, c, DIM, BLOCK_DIM, BLOCK_CHAINS, OWN_CHAINS)
                energy += energy_of_terms(x1, curvature_ptr, mean_ptr, linear_ptr, c * BLOCK_DIM, BLOCK_DIM)
        labels = load_labels(label_ptr, chains, inside, 0)
        for k in tl.static_range(len(FIRSTS) - 1):
            z = zs[k] + load_bias(bias_ptrs, zero, tl.constexpr(FIRSTS[k]), BLOCKS)
            energy += energy_at(
                z, weights, bias_ptrs, scale_ptr + k, labels, zero, tl.constexpr(FIRSTS[k]), BLOCKS, ACTIVATIONS,
                PARAMETERS, PRECISION, FAST, TARGET,
            )  # fmt: skip
        tl.store(energy_ptr + chains, energy, mask=inside)
        first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
        report_bad(prepared_ptr, first_bad, energy, inside)
        if telemetry_ptr is not None:
            store_telemetry(telemetry_ptr, n_chains, chains, inside, square_norm, n_clipped, n_clamped, steps)
