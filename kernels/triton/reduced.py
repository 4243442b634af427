"""States of many dims of which an MLP energy sees few: HMC (hmc.py) takes its steps in those, this is the rest.

An MLP sees a state x only through its first layer, W y with y = (x - m) / r. m is the mean of a Gaussian term
c |x - m|^2 / 2, r a scale of each dim; one of c and r - 1 is 0. Let W diag(r) = R^T Q^T, with orthonormal columns of Q,
(dims, K). Then E is that of an MLP with the first layer R^T at z = y Q, plus c |p|^2 / 2 with p = y - z Q^T. The
trajectory of z is that of HMC with the momentum q = v Q. The rest of the state, p, and of the momentum, w = v - q Q^T,
feel the Gaussian term alone. So the end of a trajectory is

y_L = alpha y + beta v + (z_L - alpha z - beta q) Q^T,   |w_L|^2 = gamma^2 |p|^2 + 2 gamma delta p . w + delta^2 |w|^2

The four numbers depend on the step, the number of steps, and c (fastebm/targets/collapsed.py). Before energy and
gradient at the end are computed, z_L is computed anew, as y_L Q. So a step depends on the states alone, and a call that
goes on has the same bits.

Products with Q are never in bf16 or tf32: with Q^T Q far from I, the trajectory of z would not be that of y.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .philox import normals
from .products import load_weight, multiply, operand, product, transpose
from .step import Coefficient, Frozen, load_coefficient, load_row_of_dims, store_trajectory, within
from .tiles import chunk_at, load_tile, store_tile, zero_padding


class Whole(NamedTuple):
    """The states in all dims. Pointers are None where there is nothing."""

    x: tl.tensor  # (n_chains, DIM) float32
    end: tl.tensor  # (BLOCK_CHAINS, DIM) float32, scratch of the tile: where trajectories end
    sums: tl.tensor  # (3, n_chains) float32, scratch: |y|^2, y . v and |v|^2
    mean: tl.tensor  # (DIM,) float32, m
    scale: tl.tensor  # (2, DIM) float32, r and 1 / r
    curvature: tl.tensor  # c, a number
    basis: tuple[tl.tensor, ...]  # of each half of Q, as load_weight takes it


class Leaps(NamedTuple):
    """alpha - 1, beta, gamma and delta - 1 of a trajectory: numbers, or (BLOCK_CHAINS, 1)."""

    alpha_1: tl.tensor
    beta: tl.tensor
    gamma: tl.tensor
    delta_1: tl.tensor


@triton.constexpr_function
def n_chunks(CHUNK):
    return -(-CHUNK.DIM // CHUNK.BLOCK_DIM)


@triton.jit
def load_leap(ptr, stride_chain, stride_step, tile, t, PER_CHAIN: tl.constexpr):
    number = load_coefficient(Coefficient(ptr, stride_chain, stride_step), tile, tl.maximum(t, 0), PER_CHAIN)
    return tl.where(t < 0, 0.0, number)


@triton.jit
def load_leaps(ptr, stride_chain, stride_step, n_rows, tile, t, PER_CHAIN: tl.constexpr):
    """The numbers of step t, from (4, n_rows) in memory; 0 at step -1, which goes nowhere."""
    return Leaps(
        load_leap(ptr, stride_chain, stride_step, tile, t, PER_CHAIN),
        load_leap(ptr + n_rows, stride_chain, stride_step, tile, t, PER_CHAIN),
        load_leap(ptr + 2 * n_rows, stride_chain, stride_step, tile, t, PER_CHAIN),
        load_leap(ptr + 3 * n_rows, stride_chain, stride_step, tile, t, PER_CHAIN),
    )


@triton.jit
def load_basis(whole, c, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, LAYERS: tl.constexpr):
    """Rows of Q for chunk c of the dims, as `load_weight` gives them."""
    STRIDE: tl.constexpr = n_chunks(CHUNK) * CHUNK.BLOCK_DIM
    return load_weight(whole.basis, c * CHUNK.BLOCK_DIM, STRIDE, CHUNK.BLOCK_DIM, COLUMNS, LAYERS)


@triton.jit
def momentum(counters, chunk, STREAM: tl.constexpr, CHUNK: tl.constexpr, LAYERS: tl.constexpr):
    """v of a chunk of the dims: (BLOCK_CHAINS, CHUNK.BLOCK_DIM), 0 in padding."""
    v = normals(
        counters.key0, counters.key1, counters.chain, counters.step, chunk.c * (CHUNK.BLOCK_DIM // 4), STREAM,
        CHUNK.DIM, CHUNK.BLOCK_CHAINS, CHUNK.BLOCK_DIM, LAYERS.FAST, True,
    )  # fmt: skip
    return zero_padding(v, chunk, CHUNK)


@triton.jit
def away(x, whole, chunk, CHUNK: tl.constexpr):
    """y of a chunk of states, 0 in padding."""
    if whole.mean is not None:
        x -= load_row_of_dims(whole.mean, chunk, CHUNK)
    if whole.scale is not None:
        x *= load_row_of_dims(whole.scale + CHUNK.DIM, chunk, CHUNK)
    return x


@triton.jit
def reduced_momentum(
    whole, counters, tile, COLUMNS: tl.constexpr, STREAM: tl.constexpr, CHUNK: tl.constexpr, LAYERS: tl.constexpr
):  # fmt: skip
    """q = v Q: (BLOCK_CHAINS, COLUMNS)."""
    q = tl.zeros((CHUNK.BLOCK_CHAINS, COLUMNS), tl.float32)
    for c in tl.range(0, n_chunks(CHUNK), disable_licm=True):
        chunk = chunk_at(tile, c, CHUNK)
        v = momentum(counters, chunk, STREAM, CHUNK, LAYERS)
        q = product(v, load_basis(whole, c, COLUMNS, CHUNK, LAYERS), LAYERS, q)
    return q


@triton.jit
def gained_by_curvature(kick, leaps, yy, yv, vv):
    """The gain of |v|^2 / 2 by the Gaussian term alone, after the first kick and at the end: (BLOCK_CHAINS,) each.

    kick: the first, h c / 2. yy, yv, vv: |y|^2, y . v and |v|^2 at the start, of all dims or of some.
    """
    yy, yv, vv = yy[:, None], yv[:, None], vv[:, None]
    gamma, delta_1 = leaps.gamma, leaps.delta_1
    first = 0.5 * kick * (kick * yy - 2.0 * yv)
    last = 0.5 * (gamma * (gamma * yy + 2.0 * (1.0 + delta_1) * yv) + delta_1 * (2.0 + delta_1) * vv)
    return tl.sum(first, axis=1), tl.sum(last, axis=1)


@triton.jit
def whole_end(
    rest, leaps, whole, counters, tile, room, CURVED: tl.constexpr, STREAM: tl.constexpr, CHUNK: tl.constexpr,
    LAYERS: tl.constexpr,
):  # fmt: skip
    """Store x_L and return z_L. If CURVED, store y . v and |v|^2 too.

    rest: z_L - alpha z - beta q, with z_L of the trajectory. room: the tile in scratch.
    """
    yv = tl.zeros((CHUNK.BLOCK_CHAINS,), tl.float32)
    vv = tl.zeros((CHUNK.BLOCK_CHAINS,), tl.float32)
    end_ptr = whole.end + tile.shift * CHUNK.DIM  # the same, but addresses are not kept in registers for all steps
    COLUMNS: tl.constexpr = rest.shape[1]
    rest = operand(rest, LAYERS)
    for c in tl.range(0, n_chunks(CHUNK), disable_licm=True):
        chunk = chunk_at(tile, c, CHUNK)
        w = load_basis(whole, c, COLUMNS, CHUNK, LAYERS)
        v = momentum(counters, chunk, STREAM, CHUNK, LAYERS)
        moved = leaps.beta * v + multiply(rest, transpose(w, LAYERS), LAYERS)
        if whole.scale is not None:
            moved *= load_row_of_dims(whole.scale, chunk, CHUNK)
        x = load_tile(whole.x, CHUNK.DIM, chunk, CHUNK)
        if CURVED:
            y = away(x, whole, chunk, CHUNK)
            moved += leaps.alpha_1 * y
            yv += tl.sum(y * v, axis=1)
            vv += tl.sum(v * v, axis=1)
        x += moved
        store_tile(end_ptr, CHUNK.DIM, x, chunk_at(room, c, CHUNK), CHUNK)
    if CURVED:
        tl.store(whole.sums + tile.n_chains.to(tl.int64) + tile.chains, yv, mask=tile.inside)
        tl.store(whole.sums + 2 * tile.n_chains.to(tl.int64) + tile.chains, vv, mask=tile.inside)
    tl.debug_barrier()
    z = tl.zeros((CHUNK.BLOCK_CHAINS, COLUMNS), tl.float32)
    for c in tl.range(0, n_chunks(CHUNK), disable_licm=True):
        chunk = chunk_at(room, c, CHUNK)
        y = away(load_tile(end_ptr, CHUNK.DIM, chunk, CHUNK), whole, chunk, CHUNK)
        z = product(y, load_basis(whole, c, COLUMNS, CHUNK, LAYERS), LAYERS, z)
    return z


@triton.jit
def measured(whole, room, bounds, CURVED: tl.constexpr, CLAMP: tl.constexpr, CHUNK: tl.constexpr):
    """|y_L|^2, 0 if not CURVED, and which ends are within the bounds: (BLOCK_CHAINS,)."""
    yy = tl.zeros((CHUNK.BLOCK_CHAINS,), tl.float32)
    fits = tl.full((CHUNK.BLOCK_CHAINS,), 1, tl.int1)
    if CURVED or CLAMP != "":
        for c in tl.range(0, n_chunks(CHUNK), disable_licm=True):
            chunk = chunk_at(room, c, CHUNK)
            x = load_tile(whole.end, CHUNK.DIM, chunk, CHUNK)
            if CURVED:
                y = away(x, whole, chunk, CHUNK)
                yy += tl.sum(y * y, axis=1)
            fits = fits & within(x, bounds, Frozen(None, None), chunk, CHUNK, CLAMP)
    return yy, fits


@triton.jit
def move_whole(accepted, whole, trajectory_ptr, t, thin, steps, tile, room, CHUNK: tl.constexpr):
    """Replace states by the accepted ends, and store every thin-th."""
    for c in tl.range(0, n_chunks(CHUNK), disable_licm=True):
        chunk = chunk_at(tile, c, CHUNK)
        end = load_tile(whole.end + tile.shift * CHUNK.DIM, CHUNK.DIM, chunk_at(room, c, CHUNK), CHUNK)
        x = tl.where(accepted[:, None], end, load_tile(whole.x, CHUNK.DIM, chunk, CHUNK))
        store_tile(whole.x, CHUNK.DIM, x, chunk, CHUNK)
        if trajectory_ptr is not None:
            if t >= 0:
                store_trajectory(trajectory_ptr, x, t, thin, steps, chunk, CHUNK)


@triton.jit
def whole_square_norm(grad, z, whole, tile, CURVED: tl.constexpr, CHUNK: tl.constexpr, LAYERS: tl.constexpr):
    """|dE/dx|^2: (BLOCK_CHAINS,), given dE/dz."""
    COLUMNS: tl.constexpr = grad.shape[1]
    if CURVED:
        grad -= whole.curvature * z
    grad = operand(grad, LAYERS)
    square = tl.zeros((CHUNK.BLOCK_CHAINS,), tl.float32)
    for c in tl.range(0, n_chunks(CHUNK), disable_licm=True):
        chunk = chunk_at(tile, c, CHUNK)
        g = multiply(grad, transpose(load_basis(whole, c, COLUMNS, CHUNK, LAYERS), LAYERS), LAYERS)
        if whole.scale is not None:
            g *= load_row_of_dims(whole.scale + CHUNK.DIM, chunk, CHUNK)
        if CURVED:
            g += whole.curvature * away(load_tile(whole.x, CHUNK.DIM, chunk, CHUNK), whole, chunk, CHUNK)
        square += tl.sum(g * g, axis=1)
    return square
