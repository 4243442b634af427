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
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .philox import normals
from .products import load_weight, multiply, operand, product, transpose
from .step import Coefficient, Frozen, load_coefficient, load_row_of_dims, store_trajectory, within
from .tiles import chunk_at, load_tile, store_tile, zero_padding
from .weights import float_pointer, half_pointer


class Whole(NamedTuple):
    """The states in all dims. Pointers are None where there is nothing."""

    x: tl.tensor  # (n_chains, DIM) float32
    end: tl.tensor  # (BLOCK_CHAINS, DIM) float32, scratch of the tile: where trajectories end
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


@triton.jit
def basis_pointers(prepared_ptr, WORD: tl.constexpr, LOW: tl.constexpr):
    """See `Layout.places`."""
    if LOW < 0:
        return (float_pointer(prepared_ptr, WORD),)
    else:
        return (half_pointer(prepared_ptr, WORD), half_pointer(prepared_ptr, LOW))


@triton.jit
def load_leaps(ptr, stride_chain, stride_step, n_rows, tile, t, PER_CHAIN: tl.constexpr):
    """The numbers of step t, from (4, n_rows) in memory; 0 at step -1, which goes nowhere."""
    at = tl.maximum(t, 0)
    alpha_1 = load_coefficient(Coefficient(ptr, stride_chain, stride_step), tile, at, PER_CHAIN)
    beta = load_coefficient(Coefficient(ptr + n_rows, stride_chain, stride_step), tile, at, PER_CHAIN)
    gamma = load_coefficient(Coefficient(ptr + 2 * n_rows, stride_chain, stride_step), tile, at, PER_CHAIN)
    delta_1 = load_coefficient(Coefficient(ptr + 3 * n_rows, stride_chain, stride_step), tile, at, PER_CHAIN)
    return Leaps(
        tl.where(t < 0, 0.0, alpha_1), tl.where(t < 0, 0.0, beta), tl.where(t < 0, 0.0, gamma),
        tl.where(t < 0, 0.0, delta_1),
    )  # fmt: skip


@triton.jit
def load_basis(whole, c, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, LAYERS: tl.constexpr):
    """Rows of Q for chunk c of the dims, as `load_weight` gives them."""
    STRIDE: tl.constexpr = (CHUNK.DIM + CHUNK.BLOCK_DIM - 1) // CHUNK.BLOCK_DIM * CHUNK.BLOCK_DIM
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
    whole, counters, tile, CURVED: tl.constexpr, COLUMNS: tl.constexpr, STREAM: tl.constexpr, CHUNK: tl.constexpr,
    LAYERS: tl.constexpr,
):  # fmt: skip
    """q = v Q: (BLOCK_CHAINS, COLUMNS), and, if CURVED, |v|^2 and v . y: (BLOCK_CHAINS,)."""
    q = tl.zeros((CHUNK.BLOCK_CHAINS, COLUMNS), tl.float32)
    vv = tl.zeros((CHUNK.BLOCK_CHAINS,), tl.float32)
    vy = tl.zeros((CHUNK.BLOCK_CHAINS,), tl.float32)
    for c in tl.range(0, (CHUNK.DIM + CHUNK.BLOCK_DIM - 1) // CHUNK.BLOCK_DIM, disable_licm=True):
        chunk = chunk_at(tile, c, CHUNK)
        v = momentum(counters, chunk, STREAM, CHUNK, LAYERS)
        q = product(v, load_basis(whole, c, COLUMNS, CHUNK, LAYERS), LAYERS, q)
        if CURVED:
            y = away(load_tile(whole.x, CHUNK.DIM, chunk, CHUNK), whole, chunk, CHUNK)
            vv += tl.sum(v * v, axis=1)
            vy += tl.sum(v * y, axis=1)
    return q, vv, vy


@triton.jit
def gained_outside(z, q, kick, leaps, yy, vv, vy):
    """Kinetic energy |w|^2 / 2 after the first kick and at the end, beyond that at the start: (BLOCK_CHAINS,) each.

    kick: of the first, h c / 2. yy: |y|^2 at the start; vv, vy: of `reduced_momentum`.
    """
    pp = (yy - tl.sum(z * z, axis=1))[:, None]
    pw = (vy - tl.sum(z * q, axis=1))[:, None]
    ww = (vv - tl.sum(q * q, axis=1))[:, None]
    gamma, delta_1 = leaps.gamma, leaps.delta_1
    first = tl.sum(0.5 * kick * (kick * pp - 2.0 * pw), axis=1)
    last = tl.sum(0.5 * (gamma * (gamma * pp + 2.0 * (1.0 + delta_1) * pw) + delta_1 * (2.0 + delta_1) * ww), axis=1)
    return first, tl.where(last == last, last, float("inf"))  # NaN where the four numbers overflow


@triton.jit
def whole_end(
    rest, leaps, whole, counters, tile, room, CURVED: tl.constexpr, STREAM: tl.constexpr, CHUNK: tl.constexpr,
    LAYERS: tl.constexpr,
):  # fmt: skip
    """Store x_L and return z_L.

    rest: z_L - alpha z - beta q, with z_L of the trajectory. room: the tile in scratch.
    """
    COLUMNS: tl.constexpr = rest.shape[1]
    rest = operand(rest, LAYERS)
    z = tl.zeros((CHUNK.BLOCK_CHAINS, COLUMNS), tl.float32)
    for c in tl.range(0, (CHUNK.DIM + CHUNK.BLOCK_DIM - 1) // CHUNK.BLOCK_DIM, disable_licm=True):
        chunk = chunk_at(tile, c, CHUNK)
        w = load_basis(whole, c, COLUMNS, CHUNK, LAYERS)
        moved = leaps.beta * momentum(counters, chunk, STREAM, CHUNK, LAYERS)
        moved += multiply(rest, transpose(w, LAYERS), LAYERS)
        if whole.scale is not None:
            moved *= load_row_of_dims(whole.scale, chunk, CHUNK)
        x = load_tile(whole.x, CHUNK.DIM, chunk, CHUNK)
        if CURVED:
            moved += leaps.alpha_1 * away(x, whole, chunk, CHUNK)
        x += moved
        store_tile(whole.end, CHUNK.DIM, x, chunk_at(room, c, CHUNK), CHUNK)
    tl.debug_barrier()
    z = tl.zeros((CHUNK.BLOCK_CHAINS, COLUMNS), tl.float32)
    for c in tl.range(0, (CHUNK.DIM + CHUNK.BLOCK_DIM - 1) // CHUNK.BLOCK_DIM, disable_licm=True):
        chunk = chunk_at(room, c, CHUNK)
        y = away(load_tile(whole.end, CHUNK.DIM, chunk, CHUNK), whole, chunk, CHUNK)
        z = product(y, load_basis(whole, c, COLUMNS, CHUNK, LAYERS), LAYERS, z)
    return z


@triton.jit
def measured(whole, room, bounds, CURVED: tl.constexpr, CLAMP: tl.constexpr, CHUNK: tl.constexpr):
    """|y_L|^2, 0 if not CURVED, and which ends are within the bounds: (BLOCK_CHAINS,)."""
    yy = tl.zeros((CHUNK.BLOCK_CHAINS,), tl.float32)
    fits = tl.full((CHUNK.BLOCK_CHAINS,), 1, tl.int1)
    if CURVED or CLAMP != "":
        for c in tl.range(0, (CHUNK.DIM + CHUNK.BLOCK_DIM - 1) // CHUNK.BLOCK_DIM, disable_licm=True):
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
    for c in tl.range(0, (CHUNK.DIM + CHUNK.BLOCK_DIM - 1) // CHUNK.BLOCK_DIM, disable_licm=True):
        chunk = chunk_at(tile, c, CHUNK)
        end = load_tile(whole.end, CHUNK.DIM, chunk_at(room, c, CHUNK), CHUNK)
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
    for c in tl.range(0, (CHUNK.DIM + CHUNK.BLOCK_DIM - 1) // CHUNK.BLOCK_DIM, disable_licm=True):
        chunk = chunk_at(tile, c, CHUNK)
        g = multiply(grad, transpose(load_basis(whole, c, COLUMNS, CHUNK, LAYERS), LAYERS), LAYERS)
        if whole.scale is not None:
            g *= load_row_of_dims(whole.scale + CHUNK.DIM, chunk, CHUNK)
        if CURVED:
            g += whole.curvature * away(load_tile(whole.x, CHUNK.DIM, chunk, CHUNK), whole, chunk, CHUNK)
        square += tl.sum(g * g, axis=1)
    return square
