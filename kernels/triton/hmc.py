"""K steps of Hamiltonian Monte Carlo on an MLP energy in one launch, with weights on the chip for all steps.

The mathematics is that of samplers/hmc.py. In each step, with h = step_size M^(-1/2),

    v = v_0 ~ N(0, I);   v = v - (h / 2) dE/dx (x_0)
    x = x + h v,   v = v - h dE/dx (x)              n_leapfrog times, the last v with h / 2
    x_0 = x  if  log u <= log a = E(x_0) - E(x) - gained

where gained = (|v|^2 - |v_0|^2) / 2 is summed up over the changes of v, which avoids the difference of large numbers,
and whose largest value on the way tells whether a trajectory has diverged.

Step -1 evaluates the start: a trajectory with h = 0, whose end is x_0 and always becomes the state. So the code of
energy and gradient exists once.

With whole states (reduced.py), x here is z.

Products have few registers to spare, so x, v and the gradient at x_0 wait in memory (in L2) while a gradient is
computed. ENERGY: the layers for E(x), LAYERS: those for the gradients. They differ at bf16. A gradient that is rounded,
but always in the same way, still gives a leapfrog that is reversible and keeps volume, so the accept test corrects for
it. The energies decide which law that test makes invariant, so they are computed at bf16x3.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .mlp import add_terms, energy_at, energy_of_terms, gradient_of, high_halves, load_bias, load_weights
from .philox import normals, uniforms
from .products import product
from .reduced import (
    Whole,
    gained_by_curvature,
    load_leaps,
    measured,
    move_whole,
    reduced_momentum,
    whole_end,
    whole_square_norm,
)
from .step import (
    Bounds,
    Coefficient,
    Counters,
    Frozen,
    hold,
    is_finite,
    load_coefficient,
    load_counters,
    load_key,
    load_labels,
    load_row_of_dims,
    report_bad,
    stopped_at,
    store_telemetry,
    store_trajectory,
    within,
)
from .tiles import Shape, Tile, lane_order, load_tile, store_tile, tile_at, zero_padding
from .weights import bias_pointers, constant_pointer, scale_pointer, seed_pointer, terms_of, weight_pointers

METROPOLIS: tl.constexpr = tl.constexpr(3)  # rng.Stream
TOO_FAR: tl.constexpr = tl.constexpr(1000.0)  # of samplers/hmc.py


# Places in scratch: where the trajectory is, its momentum, the gradient at x_0, and alpha z + beta q (reduced.py).
POSITION: tl.constexpr = tl.constexpr(0)
MOMENTUM: tl.constexpr = tl.constexpr(1)
GRADIENT: tl.constexpr = tl.constexpr(2)
FREE: tl.constexpr = tl.constexpr(3)
PLACES: tl.constexpr = tl.constexpr(4)


class Scratch(NamedTuple):
    """A tile's scratch. The addresses of its places differ by constants, which saves registers."""

    ptr: tl.tensor  # (BLOCK_CHAINS, PLACES, BLOCK_DIM) float32
    room: Tile


@triton.jit
def load_place(scratch, PLACE: tl.constexpr, shift, SHAPE: tl.constexpr):
    """(BLOCK_CHAINS, BLOCK_DIM). shift: always 0, see resident.py."""
    ptr = scratch.ptr + (shift * PLACES + PLACE) * SHAPE.BLOCK_DIM
    return load_tile(ptr, PLACES * SHAPE.BLOCK_DIM, scratch.room, SHAPE)


@triton.jit
def store_place(scratch, PLACE: tl.constexpr, x, shift, SHAPE: tl.constexpr):
    ptr = scratch.ptr + (shift * PLACES + PLACE) * SHAPE.BLOCK_DIM
    store_tile(ptr, PLACES * SHAPE.BLOCK_DIM, x, scratch.room, SHAPE)


@triton.jit
def load_step(step_of, factor_ptr, tile, t, SHAPE: tl.constexpr, PER_CHAIN: tl.constexpr):
    """h at step t, 0 at step -1: a number, or a tensor that broadcasts with the state."""
    h = load_coefficient(step_of, tile, tl.maximum(t, 0), PER_CHAIN)
    h = tl.where(t < 0, 0.0, h)
    if factor_ptr is not None:
        h = h * load_row_of_dims(factor_ptr, tile, SHAPE)
    return h


@triton.jit
def judged(energy, end, gained, fastest, sound, finite, inside):
    """Which trajectories may be accepted, which have diverged, and which chains are finite: (BLOCK_CHAINS,) bool.

    energy, end: E at the start and at the end. gained: kinetic energy at the end beyond that at the start; fastest: at
    most on the way. sound: v at the end is finite. finite: x at the end is. inside: it is within the bounds.
    `judged` in samplers/hmc.py has the reasons.
    """
    possible = end != float("inf")
    walled = ~possible & (gained <= TOO_FAR)
    diverged = ~(energy - end - gained >= -TOO_FAR) & (fastest > TOO_FAR) & ~walled
    finite = diverged | (finite & ((sound & (end > -float("inf"))) | ~possible))
    return possible & inside & finite & ~diverged, diverged, finite


# As for langevin_resident, of which all arguments but those of the sampler are.
@triton.jit(
    do_not_specialize=["n_chains", "steps", "n_leapfrog", "zero", "thin", "first_tile", "n_rows"],
    do_not_specialize_on_alignment=["chain_ptr", "step_ptr", "label_ptr"],
)
def hmc_resident(
    x_ptr, energy_ptr, first_bad_ptr, trajectory_ptr, thin,
    telemetry_ptr,  # (3, n_chains) float32, out: see store_telemetry, of acceptance and divergences; or None
    chain_ptr, step_ptr, label_ptr, frozen_ptr, stride_frozen,
    h_ptr, stride_h_chain, stride_h_step,  # see Coefficient
    factor_ptr,  # (DIM,) float32, of h for each dim; or None
    lo, hi, n_leapfrog,
    prepared_ptr, in_weights_ptr, in_biases_ptr, n_chains, steps, zero, first_tile,
    scratch_ptr,  # (programs, BLOCK_CHAINS, PLACES, BLOCK_DIM) float32
    end_ptr,  # (n_chains,) float32, scratch; None without labels
    # Of whole states, or None: see reduced.Whole. end: of all tiles.
    whole_ptr, whole_end_ptr, sums_ptr, mean_ptr, dim_scale_ptr, curvature,
    leaps_ptr, n_rows, stride_leaps_chain, stride_leaps_step,  # (4, n_rows) float32
    WEIGHTS: tl.constexpr, LOWS: tl.constexpr, BIASES: tl.constexpr, TERMS: tl.constexpr,
    LAYERS: tl.constexpr, ENERGY: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    BOTH_ORDERS: tl.constexpr,
    OWN_CHAINS: tl.constexpr,  # each warp has 16 chains of the tile to itself
    H_PER_CHAIN: tl.constexpr, CLAMP: tl.constexpr,
    STREAM: tl.constexpr,  # rng.Stream of the momenta
    # Of whole states: Q in the buffer (`Layout.places`), as LAYERS for its products, the dims, and those of a chunk.
    BASIS: tl.constexpr, BASIS_LOWS: tl.constexpr, OF_BASIS: tl.constexpr,
    WHOLE_DIM: tl.constexpr, CHUNK_DIM: tl.constexpr,
    CURVED: tl.constexpr,  # c is not 0
):  # fmt: skip
    weight_ptrs = weight_pointers(in_weights_ptr, WEIGHTS, LOWS)
    bias_ptrs = bias_pointers(in_biases_ptr, BIASES)
    scale_ptr = scale_pointer(prepared_ptr, TERMS)
    constant_ptr = constant_pointer(prepared_ptr, TERMS)
    terms = terms_of(prepared_ptr, TERMS)
    seed_ptr = seed_pointer(prepared_ptr)
    frozen = Frozen(frozen_ptr, stride_frozen)
    bounds = Bounds(lo, hi)
    step_of = Coefficient(h_ptr, stride_h_chain, stride_h_step)
    SHAPE: tl.constexpr = Shape(DIM, BLOCK_DIM, BLOCK_CHAINS, "held" if OWN_CHAINS and DIM % 4 == 0 else "lanes")
    SCRATCH: tl.constexpr = Shape(BLOCK_DIM, BLOCK_DIM, BLOCK_CHAINS, "held" if OWN_CHAINS else "lanes")

    program = tl.program_id(0).to(tl.int64)
    if whole_ptr is not None:
        CHUNK: tl.constexpr = Shape(WHOLE_DIM, CHUNK_DIM, BLOCK_CHAINS, "held" if OWN_CHAINS else "turned")
        whole = Whole(
            whole_ptr, whole_end_ptr + program * (BLOCK_CHAINS * WHOLE_DIM), sums_ptr, mean_ptr, dim_scale_ptr,
            curvature, weight_pointers(in_weights_ptr, BASIS, BASIS_LOWS)[0],
        )  # fmt: skip

    number = first_tile + tl.program_id(0)
    first, chains, inside = tile_at(number, n_chains, BLOCK_CHAINS)
    dims = lane_order(tl.arange(0, BLOCK_DIM))
    rows = tl.arange(0, BLOCK_CHAINS)
    room = Tile(0, BLOCK_CHAINS, rows, rows >= 0, dims, 0, 0)
    scratch = Scratch(scratch_ptr + program * (BLOCK_CHAINS * PLACES * BLOCK_DIM), room)

    weights = load_weights(weight_ptrs, ENERGY, BLOCK_DIM, BOTH_ORDERS)
    if LAYERS.PRECISION == ENERGY.PRECISION:
        gradient_weights = weights
    else:
        gradient_weights = high_halves(weights)
    acceptance = tl.zeros((BLOCK_CHAINS,), tl.float32)
    n_diverged = tl.zeros((BLOCK_CHAINS,), tl.float32)
    start = Tile(first, n_chains, chains, inside, dims, 0, 0)
    # These wait in memory too.
    tl.store(energy_ptr + chains, 0.0, mask=inside)
    tl.store(first_bad_ptr + chains, -1, mask=inside)
    store_place(scratch, GRADIENT, tl.zeros((BLOCK_CHAINS, BLOCK_DIM), tl.float32), 0, SCRATCH)
    if whole_ptr is not None:
        store_tile(x_ptr, DIM, tl.zeros((BLOCK_CHAINS, BLOCK_DIM), tl.float32), start, SHAPE)
        tl.store(sums_ptr + chains, 0.0, mask=inside)
    tl.debug_barrier()  # other threads may load them

    for t in tl.range(-1, steps, disable_licm=True):
        # Always 0, but opaque to the compiler, as in resident.py.
        shift = zero & t
        first, chains, inside = tile_at(number + shift, n_chains, BLOCK_CHAINS)
        tile = Tile(first, n_chains, chains, inside, dims, 0, shift)
        chain, step = load_counters(chain_ptr, step_ptr, tile, t)
        key0, key1 = load_key(seed_ptr, shift)
        if whole_ptr is not None:
            counters = Counters(key0, key1, chain, step)
            leaps = load_leaps(leaps_ptr, stride_leaps_chain, stride_leaps_step, n_rows, tile, t, H_PER_CHAIN)
            v = reduced_momentum(whole, counters, tile, BLOCK_DIM, STREAM, CHUNK, OF_BASIS)
        else:
            v = normals(
                key0, key1, chain, step, 0, STREAM, DIM, BLOCK_CHAINS, BLOCK_DIM, LAYERS.FAST, True
            )  # fmt: skip
            v = zero_padding(hold(v, 0.0, frozen, tile, SHAPE), tile, SHAPE)
        h = load_step(step_of, factor_ptr, tile, t, SHAPE, H_PER_CHAIN)
        moved = v - 0.5 * h * load_place(scratch, GRADIENT, tile.shift, SCRATCH)
        gained = 0.5 * tl.sum((moved - v) * (moved + v), axis=1)
        x = load_tile(x_ptr, DIM, tile, SHAPE)
        if whole_ptr is not None:
            if CURVED:
                # What the other dims gain: what all do, which is added later, without what these do.
                first_gain, last_gain = gained_by_curvature(
                    0.5 * h * curvature, leaps, tl.sum(x * x, axis=1), tl.sum(x * v, axis=1), tl.sum(v * v, axis=1)
                )
                first_gain = gained - first_gain
                gained -= last_gain
            store_place(scratch, FREE, x + (leaps.alpha_1 * x + leaps.beta * v), tile.shift, SCRATCH)
        # Comparisons, here and below, because a maximum may return NaN.
        fastest = tl.where(gained == gained, gained, -float("inf"))
        x += h * moved
        store_place(scratch, MOMENTUM, moved, tile.shift, SCRATCH)
        store_place(scratch, POSITION, x, tile.shift, SCRATCH)
        tl.debug_barrier()
        sound = tl.full((BLOCK_CHAINS,), 1, tl.int1)

        last = tl.where(t < 0, 1, n_leapfrog) - 1
        for i in tl.range(0, last + 1, disable_licm=True):
            shift = zero & i
            first, chains, inside = tile_at(number + shift, n_chains, BLOCK_CHAINS)
            now = Tile(first, n_chains, chains, inside, dims, 0, shift)
            x = load_place(scratch, POSITION, now.shift, SCRATCH)
            if whole_ptr is not None:
                if i == last:
                    # Loaded again: kept through the loop, they would take registers.
                    chain, step = load_counters(chain_ptr, step_ptr, now, t)
                    key0, key1 = load_key(seed_ptr, shift)
                    leaps = load_leaps(
                        leaps_ptr + shift, stride_leaps_chain, stride_leaps_step, n_rows, now, t, H_PER_CHAIN
                    )
                    counters = Counters(key0, key1, chain, step)
                    rest = x - load_place(scratch, FREE, now.shift, SCRATCH)
                    x = whole_end(rest, leaps, whole, counters, now, room, CURVED, STREAM, CHUNK, OF_BASIS)
                    store_place(scratch, POSITION, x, now.shift, SCRATCH)
                    tl.debug_barrier()
            labels = load_labels(label_ptr, now)
            grad = gradient_of(
                x, gradient_weights, bias_ptrs, scale_ptr, labels, shift, LAYERS.FIRSTS[0], LAYERS
            )  # fmt: skip
            for k in tl.static_range(1, len(LAYERS.FIRSTS) - 1):
                grad += gradient_of(
                    x, gradient_weights, bias_ptrs, scale_ptr + k, labels, shift, LAYERS.FIRSTS[k], LAYERS
                )  # fmt: skip
            # The same address, but opaque to the compiler: stops it keeping the state that it loaded above.
            shift = zero & ~i
            first, chains, inside = tile_at(number + shift, n_chains, BLOCK_CHAINS)
            again = Tile(first, n_chains, chains, inside, dims, 0, shift)
            x = load_place(scratch, POSITION, again.shift, SCRATCH)
            if CURVED:
                grad += curvature * x
            else:
                grad = add_terms(grad, x, terms, shift, BLOCK_DIM)
            grad = zero_padding(hold(grad, 0.0, frozen, again, SHAPE), again, SHAPE)
            h = load_step(step_of, factor_ptr, again, t, SHAPE, H_PER_CHAIN)
            v = load_place(scratch, MOMENTUM, again.shift, SCRATCH)
            moved = v - tl.where(i < last, 1.0, 0.5) * h * grad
            gained += 0.5 * tl.sum((moved - v) * (moved + v), axis=1)
            fastest = tl.where(gained > fastest, gained, fastest)
            if i < last:
                store_place(scratch, MOMENTUM, moved, again.shift, SCRATCH)
                store_place(scratch, POSITION, x + h * moved, again.shift, SCRATCH)
            else:
                # The momentum at the end is not needed again: its place takes the gradient there.
                sound = is_finite(moved)
                store_place(scratch, MOMENTUM, grad, again.shift, SCRATCH)
            tl.debug_barrier()

        shift = zero & ~t
        first, chains, inside = tile_at(number + shift, n_chains, BLOCK_CHAINS)
        tile = Tile(first, n_chains, chains, inside, dims, 0, shift)
        x = load_place(scratch, POSITION, tile.shift, SCRATCH)
        if whole_ptr is not None:
            square, fits = measured(whole, room, bounds, CURVED, CLAMP, CHUNK)
            if CURVED:
                yy = tl.load(sums_ptr + chains, mask=inside, other=0.0)
                yv = tl.load(sums_ptr + n_chains.to(tl.int64) + chains, mask=inside, other=0.0)
                vv = tl.load(sums_ptr + 2 * n_chains.to(tl.int64) + chains, mask=inside, other=0.0)
                leaps = load_leaps(leaps_ptr, stride_leaps_chain, stride_leaps_step, n_rows, tile, t, H_PER_CHAIN)
                h = load_step(step_of, factor_ptr, tile, t, SHAPE, H_PER_CHAIN)
                first_kick, last_gain = gained_by_curvature(0.5 * h * curvature, leaps, yy, yv, vv)
                gained += last_gain
                fastest = tl.where(last_gain * 0.0 == 0.0, fastest + last_gain, float("inf"))  # where it overflows
                fastest = tl.where(first_gain + first_kick > fastest, first_gain + first_kick, fastest)
            end = tl.load(constant_ptr + shift) + 0.5 * curvature * square
        else:
            end = energy_of_terms(x, terms, shift, BLOCK_DIM) + tl.load(constant_ptr + shift)
        labels = load_labels(label_ptr, tile)
        for k in tl.static_range(len(ENERGY.FIRSTS) - 1):
            z = product(x, weights[ENERGY.FIRSTS[k]], ENERGY)
            z += load_bias(bias_ptrs, shift, ENERGY.FIRSTS[k], ENERGY)
            end += energy_at(z, weights, bias_ptrs, scale_ptr + k, labels, shift, ENERGY.FIRSTS[k], ENERGY)

        if label_ptr is not None:
            # Through memory: otherwise all that follows takes the layout of the heads that labels select, and spills.
            tl.store(end_ptr + chains, end, mask=inside)
            tl.debug_barrier()
            end = tl.load(end_ptr + chains, mask=inside, other=0.0)
        x = load_place(scratch, POSITION, tile.shift, SCRATCH)
        energy = tl.load(energy_ptr + chains, mask=inside, other=0.0)
        first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
        if whole_ptr is None:
            fits = within(x, bounds, frozen, tile, SHAPE, CLAMP)
        possible, diverged, finite = judged(energy, end, gained, fastest, sound, is_finite(x), fits)
        started = sound & (end > -float("inf"))
        first_bad = stopped_at(first_bad, tl.where(t < 0, started, finite), tl.maximum(t, 0))
        alive = (t >= 0) & (first_bad < 0)
        log_accept = energy - end - gained
        chain, step = load_counters(chain_ptr, step_ptr, tile, t)
        key0, key1 = load_key(seed_ptr, shift)
        u = uniforms(key0, key1, chain, step, METROPOLIS, LAYERS.FAST)
        accepted = (t < 0) | (alive & possible & (tl.log(u) <= log_accept))
        chance = tl.exp(tl.where(log_accept < 0.0, log_accept, 0.0))
        acceptance += tl.where(alive & possible, chance, 0.0)
        n_diverged += tl.where(alive & diverged, 1.0, 0.0)
        tl.store(energy_ptr + chains, tl.where(accepted, end, energy), mask=inside)
        tl.store(first_bad_ptr + chains, first_bad, mask=inside)
        x = tl.where(accepted[:, None], x, load_tile(x_ptr, DIM, tile, SHAPE))
        store_tile(x_ptr, DIM, x, tile, SHAPE)
        if whole_ptr is not None:
            before = tl.load(sums_ptr + chains, mask=inside, other=0.0)
            tl.store(sums_ptr + chains, tl.where(accepted, square, before), mask=inside)
            # Not at step -1, where the end is x unless the weights are not finite.
            move_whole(accepted & (t >= 0), whole, trajectory_ptr, t, thin, steps, tile, room, CHUNK)
        elif trajectory_ptr is not None:
            if t >= 0:
                store_trajectory(trajectory_ptr, x, t, thin, steps, tile, SHAPE)
        there = load_place(scratch, MOMENTUM, tile.shift, SCRATCH)
        grad = tl.where(accepted[:, None], there, load_place(scratch, GRADIENT, tile.shift, SCRATCH))
        store_place(scratch, GRADIENT, grad, tile.shift, SCRATCH)
        tl.debug_barrier()

    first, chains, inside = tile_at(number + zero, n_chains, BLOCK_CHAINS)
    tile = Tile(first, n_chains, chains, inside, dims, 0, zero)
    energy = tl.load(energy_ptr + chains, mask=inside, other=0.0)
    first_bad = tl.load(first_bad_ptr + chains, mask=inside, other=-1)
    first_bad = tl.where(steps > 0, first_bad, -1)
    tl.store(first_bad_ptr + chains, first_bad, mask=inside)
    # A start that is not finite stays, and is reported too.
    x = load_tile(x_ptr, DIM, tile, SHAPE)
    report_bad(prepared_ptr, first_bad, tl.where(is_finite(x), energy, float("nan")), inside)
    if telemetry_ptr is not None:
        grad = load_place(scratch, GRADIENT, tile.shift, SCRATCH)
        if whole_ptr is not None:
            square_norm = whole_square_norm(grad, x, whole, tile, CURVED, CHUNK, OF_BASIS)
        else:
            square_norm = tl.sum(grad * grad, axis=1)
        store_telemetry(telemetry_ptr, tile, square_norm, acceptance, n_diverged, steps)
