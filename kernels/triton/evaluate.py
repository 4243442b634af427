"""Energy and gradient of a batch of states of an MLP energy, in one launch.

    E = sum_k w_k E_k(x) + sum_d [ c (x - m)^2 / 2 + b x ] + constant,    g = dE/dx

For samplers whose steps run in PyTorch. Either result may be left out. Nothing of a state depends on the tile's other
states.

evaluate_resident    all weights are on the chip
evaluate_streaming   W_1 is read in chunks of the dims, once for z_1 = x W_1 and once for g = (dE/dz_1) W_1^T
"""

import triton
import triton.language as tl

from .mlp import Sum, add_terms, add_to, energy_at, energy_of_terms, load_bias, load_weights, slope_at
from .parking import through_memory
from .products import operand, product, transpose
from .step import Frozen, load_labels
from .streaming import empty_sums, forward_chunk, gradient_chunk, load_chunk
from .tiles import Shape, Tile, chunk_at, load_tile, store_tile, tile_at
from .weights import bias_pointers, constant_pointer, scale_pointer, terms_of, weight_pointers


@triton.jit(do_not_specialize=["n_states"], do_not_specialize_on_alignment=["label_ptr"])
def evaluate_resident(
    energy_ptr,  # (n_states,) float32, out: E; or None
    gradient_ptr,  # (n_states, DIM) float32, out: dE/dx; or None
    x_ptr,  # (n_states, DIM) float32
    label_ptr,  # (n_states,) int64, or None
    prepared_ptr, n_states,
    WEIGHTS: tl.constexpr, LOWS: tl.constexpr, BIASES: tl.constexpr, TERMS: tl.constexpr,  # see Layout.places
    LAYERS: tl.constexpr,  # see mlp.Layers
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    OWN_CHAINS: tl.constexpr,  # each warp has 16 states of the tile to itself
    BOTH_ORDERS: tl.constexpr,  # see load_weight
):  # fmt: skip
    weight_ptrs = weight_pointers(prepared_ptr, WEIGHTS, LOWS)
    bias_ptrs = bias_pointers(prepared_ptr, BIASES)
    scale_ptr = scale_pointer(prepared_ptr, TERMS)
    terms = terms_of(prepared_ptr, TERMS)
    SHAPE: tl.constexpr = Shape(DIM, BLOCK_DIM, BLOCK_CHAINS, "held" if OWN_CHAINS else "turned")

    first, states, inside = tile_at(tl.program_id(0), n_states, BLOCK_CHAINS)
    tile = Tile(first, n_states, states, inside, states, 0, 0)
    labels = load_labels(label_ptr, tile)
    x = load_tile(x_ptr, DIM, tile, SHAPE)
    weights = load_weights(weight_ptrs, LAYERS, BLOCK_DIM, BOTH_ORDERS)

    grad = add_terms(tl.zeros((BLOCK_CHAINS, BLOCK_DIM), tl.float32), x, terms, 0, BLOCK_DIM)
    energy = None
    if energy_ptr is not None:
        energy = Sum(energy_ptr + states, inside)
        start = energy_of_terms(x, terms, 0, BLOCK_DIM) + tl.load(constant_pointer(prepared_ptr, TERMS))
        tl.store(energy.ptrs, start, mask=inside)
    for k in tl.static_range(len(LAYERS.FIRSTS) - 1):
        tl.debug_barrier()  # another thread may have stored E
        z = product(x, weights[LAYERS.FIRSTS[k]], LAYERS) + load_bias(bias_ptrs, 0, LAYERS.FIRSTS[k], LAYERS)
        if gradient_ptr is None:
            add_to(energy, energy_at(z, weights, bias_ptrs, scale_ptr + k, labels, 0, LAYERS.FIRSTS[k], LAYERS))
        else:
            slope = slope_at(
                z, weights, bias_ptrs, scale_ptr + k, labels, 0, None, LAYERS.FIRSTS[k], LAYERS, energy
            )  # fmt: skip
            grad = product(slope, transpose(weights[LAYERS.FIRSTS[k]], LAYERS), LAYERS, grad)

    if gradient_ptr is not None:
        store_tile(gradient_ptr, DIM, grad, tile, SHAPE)


@triton.jit(do_not_specialize=["n_states", "first_tile"], do_not_specialize_on_alignment=["label_ptr"])
def evaluate_streaming(
    energy_ptr, gradient_ptr, x_ptr, label_ptr, prepared_ptr, n_states,  # as in evaluate_resident
    first_tile,  # of this launch
    slope_ptrs,  # one per network, (programs * BLOCK_CHAINS, its first width), scratch; two halves at bf16x3
    WEIGHTS: tl.constexpr, LOWS: tl.constexpr, BIASES: tl.constexpr, TERMS: tl.constexpr,
    LAYERS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    OWN_CHAINS: tl.constexpr,
    IN_MEMORY: tl.constexpr, LEAN: tl.constexpr,  # as in langevin_streaming
):  # fmt: skip
    weight_ptrs = weight_pointers(prepared_ptr, WEIGHTS, LOWS)
    bias_ptrs = bias_pointers(prepared_ptr, BIASES)
    scale_ptr = scale_pointer(prepared_ptr, TERMS)
    terms = terms_of(prepared_ptr, TERMS)
    SHAPE: tl.constexpr = Shape(DIM, BLOCK_DIM, BLOCK_CHAINS, "held" if OWN_CHAINS else "turned")
    PRECISION: tl.constexpr = LAYERS.PRECISION
    NO_LICM: tl.constexpr = IN_MEMORY or LEAN
    N_CHUNKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    HALVES: tl.constexpr = 2 if PRECISION == "bf16x3" else 1

    first, states, inside = tile_at(first_tile + tl.program_id(0), n_states, BLOCK_CHAINS)
    tile = Tile(first, n_states, states, inside, states, 0, 0)
    labels = load_labels(label_ptr, tile)
    weights = load_weights(weight_ptrs, LAYERS, 0, False)

    start = tl.zeros((BLOCK_CHAINS,), tl.float32) + tl.load(constant_pointer(prepared_ptr, TERMS))
    zs = empty_sums(LAYERS, SHAPE)
    for c in tl.range(0, N_CHUNKS, disable_licm=NO_LICM):
        w = load_chunk(weight_ptrs, c, LAYERS, SHAPE)
        x = load_tile(x_ptr, DIM, chunk_at(tile, c, SHAPE), SHAPE)
        zs = forward_chunk(zs, x, w, LAYERS)
        start += energy_of_terms(x, terms, c * BLOCK_DIM, BLOCK_DIM)

    energy = None
    if energy_ptr is not None:
        energy = Sum(energy_ptr + states, inside)
        tl.store(energy.ptrs, start, mask=inside)
    slopes = ()
    for k in tl.static_range(len(LAYERS.FIRSTS) - 1):
        tl.debug_barrier()  # another thread may have stored E
        z = zs[k] + load_bias(bias_ptrs, 0, LAYERS.FIRSTS[k], LAYERS)
        if gradient_ptr is None:
            add_to(energy, energy_at(z, weights, bias_ptrs, scale_ptr + k, labels, 0, LAYERS.FIRSTS[k], LAYERS))
        else:
            memory = slope_ptrs[k] + tl.program_id(0).to(tl.int64) * (BLOCK_CHAINS * HALVES * z.shape[1])
            if IN_MEMORY:
                parking = memory.to(tl.pointer_type(tl.float32))
            else:
                parking = memory if PRECISION == "bf16" else None
            slope = slope_at(
                z, weights, bias_ptrs, scale_ptr + k, labels, 0, parking, LAYERS.FIRSTS[k], LAYERS, energy
            )  # fmt: skip
            if PRECISION == "bf16x3" and not OWN_CHAINS:
                slope = operand(slope, LAYERS)  # mma.sync's shared memory has no room for two halves
            else:
                slope = through_memory(slope, memory, 0, OWN_CHAINS, LAYERS)
            slopes = slopes + (slope,)

    if gradient_ptr is not None:
        for c in tl.range(0, N_CHUNKS, disable_licm=NO_LICM):
            w = load_chunk(weight_ptrs, c, LAYERS, SHAPE)
            chunk = chunk_at(tile, c, SHAPE)
            _, grad = gradient_chunk(x_ptr, slopes, w, terms, Frozen(None, None), chunk, LAYERS, SHAPE, False)
            store_tile(gradient_ptr, DIM, grad, chunk, SHAPE)
