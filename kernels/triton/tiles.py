"""Where the chains and dims of a tile lie: in memory, and in the registers of its threads.

A program moves a tile of BLOCK_CHAINS chains. A tensor-core product leaves its result spread over the threads in one
fixed order; the columns of a state are numbered to suit it (`lane_order`), so that neither noise nor loads and stores
need shared memory. Nothing here computes on values.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Shape(NamedTuple):
    """What is fixed at compile time of a tile, or of a chunk of its dims. Passed as a constexpr.

    ORDER says how it is read from memory and written to it:
        "plain"   columns are dims
        "lanes"   columns are dims in `lane_order`, each element at its own address
        "turned"  the same columns, read in the order of the dims and then permuted
        "held"    the same columns, read in the order in which threads hold them (each warp has 16 chains to itself)
    """

    DIM: int  # of a row in memory; columns past it are padding
    BLOCK_DIM: int  # columns
    BLOCK_CHAINS: int
    ORDER: str


class Tile(NamedTuple):
    """A tile, or chunk c of its dims, at run time."""

    first: tl.tensor  # its first chain, int64: n_chains * DIM can pass 2**31
    n_chains: tl.tensor
    chains: tl.tensor  # (BLOCK_CHAINS,) int64
    inside: tl.tensor  # (BLOCK_CHAINS,) bool: which of them exist
    dims: tl.tensor  # (BLOCK_DIM,) int32, of each column
    c: tl.tensor
    shift: tl.tensor  # always 0; see `zero` in resident.py


@triton.jit
def tile_at(number, n_chains, BLOCK_CHAINS: tl.constexpr):
    """A tile's first chain, all of its chains, and which of them exist."""
    first = number.to(tl.int64) * BLOCK_CHAINS
    chains = first + tl.arange(0, BLOCK_CHAINS)
    return first, chains, chains < n_chains


@triton.jit
def lane_order(k):
    """The dim at column k of a state in registers: of each 16 columns, a thread holds 4 neighbouring dims.

    In an accumulator of a tensor-core product a thread holds columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of each 16. In
    this order they are four neighbouring dims, which one draw of Philox serves, so noise is made where it is used
    without shared memory or a barrier. `weights.prepare` orders the columns of W_1 likewise.
    """
    return k // 16 * 16 + k % 8 // 2 * 4 + k // 8 % 2 * 2 + k % 2


@triton.jit
def to_lanes(x):
    """(chains, dims) in the order of the dims -> with dim lane_order(k) at column k."""
    parts = tl.reshape(x, (x.shape[0], x.shape[1] // 16, 4, 2, 2))
    return tl.reshape(tl.permute(parts, (0, 1, 3, 2, 4)), x.shape)


@triton.jit
def from_lanes(x):
    """The inverse of to_lanes."""
    parts = tl.reshape(x, (x.shape[0], x.shape[1] // 16, 2, 4, 2))
    return tl.reshape(tl.permute(parts, (0, 1, 3, 2, 4)), x.shape)


@triton.jit
def as_held(x):
    """A tensor-core accumulator, flat, in the order in which its threads hold it, 4 neighbours at a time."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    parts = tl.reshape(x, (ROWS // 16, 2, 8, COLUMNS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(parts, (3, 1, 0, 2, 5, 4, 6)), (ROWS * COLUMNS,))


@triton.jit
def from_held(flat, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of as_held."""
    parts = tl.reshape(flat, (COLUMNS // 16, 2, ROWS // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(parts, (2, 1, 3, 0, 5, 4, 6)), (ROWS, COLUMNS))


@triton.jit
def chunk_at(tile, c, SHAPE: tl.constexpr):
    """Chunk c of a tile's dims, in lane_order."""
    dims = c * SHAPE.BLOCK_DIM + lane_order(tl.arange(0, SHAPE.BLOCK_DIM))
    return Tile(tile.first, tile.n_chains, tile.chains, tile.inside, dims, c, 0)


@triton.jit
def places(stride, tile, SHAPE: tl.constexpr):
    """Offsets of a tile in rows that are stride apart, in the order of SHAPE, and which of them exist."""
    if SHAPE.ORDER == "held":
        # Of 16 chains and 16 dims a thread has four neighbouring dims of two chains: loads and stores of 16 bytes.
        i = tl.arange(0, SHAPE.BLOCK_CHAINS * SHAPE.BLOCK_DIM)
        row = i // 128 % (SHAPE.BLOCK_CHAINS // 16) * 16 + i // (8 * SHAPE.BLOCK_CHAINS) % 2 * 8 + i // 16 % 8
        chains = tile.first + row
        dims = tile.c * SHAPE.BLOCK_DIM + i // (16 * SHAPE.BLOCK_CHAINS) * 16 + i % 16
        return tl.max_contiguous(chains * stride + dims, 4), (chains < tile.n_chains) & (dims < SHAPE.DIM)
    elif SHAPE.ORDER == "turned":
        chains = (tile.first + tl.arange(0, SHAPE.BLOCK_CHAINS))[:, None]
        dims = (tile.c * SHAPE.BLOCK_DIM + tl.arange(0, SHAPE.BLOCK_DIM))[None, :]
        return chains * stride + dims, (chains < tile.n_chains) & (dims < SHAPE.DIM)
    else:
        exist = tile.inside[:, None] & (tile.dims < SHAPE.DIM)[None, :]
        return tile.chains[:, None] * stride + tile.dims[None, :], exist


@triton.jit
def load_tile(ptr, stride, tile, SHAPE: tl.constexpr):
    """(BLOCK_CHAINS, BLOCK_DIM), 0 where there is none."""
    offsets, exist = places(stride, tile, SHAPE)
    x = tl.load(ptr + offsets, mask=exist, other=0)
    if SHAPE.ORDER == "held":
        return from_held(x, SHAPE.BLOCK_CHAINS, SHAPE.BLOCK_DIM)
    elif SHAPE.ORDER == "turned":
        return to_lanes(x)
    else:
        return x


@triton.jit
def store_tile(ptr, stride, x, tile, SHAPE: tl.constexpr):
    offsets, exist = places(stride, tile, SHAPE)
    if SHAPE.ORDER == "held":
        x = as_held(x)
    elif SHAPE.ORDER == "turned":
        x = from_lanes(x)
    tl.store(ptr + offsets, x, mask=exist)


@triton.jit
def zero_padding(x, tile, SHAPE: tl.constexpr):
    """x, with 0 in the columns past the last dim."""
    if SHAPE.DIM % SHAPE.BLOCK_DIM != 0:
        return tl.where((tile.dims < SHAPE.DIM)[None, :], x, 0.0)
    else:
        return x
