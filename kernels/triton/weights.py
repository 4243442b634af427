"""Weights as the step kernels read them: padded, split into halves and reordered, in one launch per call.

They are prepared in every call and never cached, so that writes to a parameter in between always count. In PyTorch the
same takes a dozen operations per layer, whose dispatch may take longer than all steps on the device.

A call has one buffer of int32 words. `layout` says where everything lies in it, `prepare` fills it, and the functions
below `prepare` find things in it.
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import block
from .mlp import Terms
from .tiles import lane_order

# The buffer's head. REPORT: not 0 if any chain is not finite. SEED: its two words. BOUNDS: what bounds a gradient in
# the streaming kernel, in float32: max|c|, max|b - c m|, then max|W_1| of each network.
REPORT = tl.constexpr(0)
SEED = tl.constexpr(2)
BOUNDS = tl.constexpr(4)

# In words: each part begins at a multiple of 128 bytes, so that loads of 16 bytes are aligned.
_ALIGNMENT = 32

# Elements per program of `prepare`: 8 per thread of its four warps.
_BLOCK = 1024


class Network(NamedTuple):
    """What a layout depends on of an MLP: the outputs of each layer and the head, and which weights are halved."""

    outputs: tuple[int, ...]
    head: str
    halved: tuple[bool, ...]


class Part(NamedTuple):
    """A matrix in the buffer, from a source of rows x cols.

    halves: 0 for float32, 1 for bf16, 2 for bf16 followed by its remainder in bf16. in_lanes: columns in lane_order;
    rows_in_lanes: rows too.
    scale: the network whose weight w_k multiplies the source, or -1; factor: a number that multiplies it too.
    padding: the value outside the source; missing: the value if the source is None. reach: the word that receives the
    largest |source|, or -1.
    """

    rows: int
    cols: int
    padded_rows: int
    padded_cols: int
    halves: int = 0
    in_lanes: bool = False
    rows_in_lanes: bool = False
    scale: int = -1
    factor: float = 1.0
    padding: float = 0.0
    missing: float = 0.0
    reach: int = -1

    @property
    def size(self) -> int:
        return self.padded_rows * self.padded_cols

    @property
    def words(self) -> int:
        return self.size * self.halves // 2 if self.halves else self.size


# The same of all parts, each field a tuple: triton loses the field names of a constant within a tuple.
Parts = namedtuple("Parts", Part._fields)


@dataclass(frozen=True)
class Layout:
    """parts: weight and bias of each layer, w (k,), the constant, then those of c, m, b, b - c m and Q^T that exist.

    n_layers: of all networks. curvature, linear, basis: whether c and m, b, and Q (reduced.py) exist.
    """

    parts: tuple[Part, ...]
    n_layers: int
    n_networks: int
    curvature: bool
    linear: bool
    basis: bool

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first word of each part, and the end of the last."""
        ends = [_aligned(BOUNDS.value + 2 + self.n_networks)]
        for part in self.parts:
            ends.append(_aligned(ends[-1] + part.words))
        return tuple(ends)

    @property
    def words(self) -> int:
        return self.offsets[-1]

    @property
    def n_programs(self) -> int:
        return self.tables["TILES"][-1]

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The constants of `prepare`."""
        tiles = [0]
        for part in self.parts:
            tiles.append(tiles[-1] + -(-part.size // _BLOCK))
        return {
            "TILES": tuple(tiles),
            "OFFSETS": self.offsets[:-1],
            "PARTS": Parts(*zip(*self.parts, strict=True)),
            "BLOCK": _BLOCK,
        }

    @cached_property
    def places(self) -> dict[str, Any]:
        """The constants of the step kernels.

        WEIGHTS, BIASES: the first word of each layer's. LOWS: the first word of a weight's low half, 0 if it has none,
        -1 if the weight is float32. TERMS: the first words of -w, constant, c, m, b; -1 for one that is absent.
        BASIS, BASIS_LOWS: the same of Q^T, where there is one.
        """
        layers, rest = 2 * self.n_layers, iter(self.offsets[2 * self.n_layers :])
        there = (True, True, self.curvature, self.curvature, self.linear)
        places: dict[str, Any] = {
            "WEIGHTS": self.offsets[:layers:2],
            "LOWS": tuple(map(self._low, range(0, layers, 2))),
            "BIASES": self.offsets[1:layers:2],
            "TERMS": tuple(next(rest) if is_there else -1 for is_there in there),
        }
        if self.basis:
            last = len(self.parts) - 1
            places |= {"BASIS": (self.offsets[last],), "BASIS_LOWS": (self._low(last),)}
        return places

    def _low(self, i: int) -> int:
        """The first word of a part's low half."""
        return {0: -1, 1: 0, 2: self.offsets[i] + self.parts[i].size // 2}[self.parts[i].halves]


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT


@lru_cache(maxsize=256)
def layout(
    dim: int, networks: tuple[Network, ...], precision: str, block_dim: int, streaming: bool, curvature: bool,
    linear: bool, whole: tuple[int, int] | None = None,
) -> Layout:  # fmt: skip
    """The layout for an architecture; it depends on no weight's value. whole: the dims of whole states, and of a chunk.

    A scalar or class head is (1 or classes, padded in) in float32, multiplied by w_k (and a class head's sign), and its
    bias is not padded. A "logsumexp" head keeps its factor apart; its bias is padded with -inf, for there is no class.
    """
    padded_dim = -(-dim // block_dim) * block_dim
    halves = {"bf16": 1, "bf16x3": 2}.get(precision, 0)
    parts = []
    for k, network in enumerate(networks):
        n_in, padded_in = dim, padded_dim
        for i, (n_out, halved) in enumerate(zip(network.outputs, network.halved, strict=True)):
            is_head = i == len(network.outputs) - 1
            if is_head and network.head != "logsumexp":
                options: dict[str, Any] = {"scale": k, "factor": -1.0 if network.head == "class" else 1.0}
                parts += [Part(n_out, n_in, n_out, padded_in, **options), Part(1, n_out, 1, n_out, **options)]
                break
            factor, padded_out = 0.5 if halved else 1.0, block(n_out)
            reach = BOUNDS.value + 2 + k if streaming and i == 0 else -1
            parts += [
                Part(n_out, n_in, padded_out, padded_in, halves, in_lanes=i == 0, factor=factor, reach=reach),
                Part(1, n_out, 1, padded_out, factor=factor, padding=-float("inf") if is_head else 0.0),
            ]
            n_in, padded_in = n_out, padded_out
    n_layers = len(parts) // 2
    parts += [Part(1, len(networks), 1, len(networks), factor=-1.0, missing=-1.0), Part(1, 1, 1, 1)]
    row = Part(1, dim, 1, padded_dim, in_lanes=True)
    if curvature:
        parts += [row._replace(reach=BOUNDS.value if streaming else -1), row]
    if linear:
        parts.append(row)
    if streaming and (curvature or linear):
        parts.append(row._replace(reach=BOUNDS.value + 1))
    if whole is not None:
        columns = -(-whole[0] // whole[1]) * whole[1]
        halves = 0 if precision == "ieee" else 2  # see reduced.py
        parts.append(Part(dim, whole[0], padded_dim, columns, halves, in_lanes=True, rows_in_lanes=True))
    return Layout(tuple(parts), n_layers, len(networks), curvature, linear, whole is not None)


@triton.jit
def rounded_to_bf16(x):
    """To nearest, ties to even, as float32. On the bits, because Triton's interpreter truncates instead."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def store_bf16(ptr, x, exists):
    """x holds values of bf16 in float32, so nothing is rounded."""
    upper = (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    tl.store(ptr, upper.to(tl.bfloat16, bitcast=True), mask=exists)


@triton.jit
def fill_part(
    out_ptr, source_ptr, stride_row, stride_col, scale_ptr, tile, P: tl.constexpr, OFFSETS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements from tile * BLOCK on of part P."""
    SIZE: tl.constexpr = PARTS.padded_rows[P] * PARTS.padded_cols[P]
    i = tile * BLOCK + tl.arange(0, BLOCK)
    row = i // PARTS.padded_cols[P]
    col = i % PARTS.padded_cols[P]
    if PARTS.in_lanes[P]:
        col = lane_order(col)
    if PARTS.rows_in_lanes[P]:
        row = lane_order(row)
    inside = (row < PARTS.rows[P]) & (col < PARTS.cols[P])
    if source_ptr is None:
        x = tl.full((BLOCK,), PARTS.missing[P], tl.float32)
    else:
        # int64: a parameter may be a part of a larger tensor
        offsets = row.to(tl.int64) * stride_row + col.to(tl.int64) * stride_col
        x = tl.load(source_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if PARTS.reach[P] >= 0:
            # as integers, magnitudes order like the floats, and NaN is above all
            magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            tl.atomic_max(out_ptr + PARTS.reach[P], tl.max(magnitude, axis=0))
        if PARTS.scale[P] >= 0 and scale_ptr is not None:
            x = x * (tl.load(scale_ptr + PARTS.scale[P]).to(tl.float32) * PARTS.factor[P])
        elif PARTS.factor[P] != 1.0:
            x = x * PARTS.factor[P]
    x = tl.where(inside, x, PARTS.padding[P])
    exists = i < SIZE
    if PARTS.halves[P] == 0:
        tl.store((out_ptr + OFFSETS[P]).to(tl.pointer_type(tl.float32)) + i, x, mask=exists)
    else:
        half_ptr = (out_ptr + OFFSETS[P]).to(tl.pointer_type(tl.bfloat16)) + i
        hi = rounded_to_bf16(x)
        store_bf16(half_ptr, hi, exists)
        if PARTS.halves[P] == 2:
            store_bf16(half_ptr + SIZE, rounded_to_bf16(x - hi), exists)


# Parameters may lie anywhere: another alignment or stride must not recompile this.
@triton.jit(
    do_not_specialize=["seed_ptr", "seed_low", "seed_high", "scale_ptr", "sources", "row_strides", "col_strides"]
)
def prepare(
    out_ptr,  # int32, all 0
    seed_ptr, seed_low, seed_high,  # (1,) int64; or None, and the two words of a number
    scale_ptr,  # (networks,), the w_k; None if all are 1
    sources, row_strides, col_strides,  # of each part; a source is a pointer to any float type, or None
    TILES: tl.constexpr,  # of each part its first program, and the end
    OFFSETS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    if number == 0:
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
            seed_low = seed.to(tl.int32)
            seed_high = (seed >> 32).to(tl.int32)
        tl.store(out_ptr + SEED, seed_low)
        tl.store(out_ptr + SEED + 1, seed_high)
    for p in tl.static_range(len(OFFSETS)):
        # tl.constexpr: triton 3.6 takes an entry of a constexpr tuple for a run-time value
        if (number >= tl.constexpr(TILES[p])) & (number < tl.constexpr(TILES[p + 1])):
            fill_part(
                out_ptr, sources[p], row_strides[p], col_strides[p], scale_ptr, number - tl.constexpr(TILES[p]), p,
                OFFSETS, PARTS, BLOCK,
            )  # fmt: skip


@triton.jit
def float_pointer(prepared_ptr, WORD: tl.constexpr):
    """To float32 numbers of the buffer."""
    return (prepared_ptr + WORD).to(tl.pointer_type(tl.float32))


@triton.jit
def half_pointer(prepared_ptr, WORD: tl.constexpr):
    """To bf16 numbers of the buffer."""
    return (prepared_ptr + WORD).to(tl.pointer_type(tl.bfloat16))


@triton.jit
def seed_pointer(prepared_ptr):
    """To the seed, (1,) int64."""
    return (prepared_ptr + SEED).to(tl.pointer_type(tl.int64))


@triton.jit
def weight_pointers(prepared_ptr, WEIGHTS: tl.constexpr, LOWS: tl.constexpr):
    """For each layer, a pointer to each half of its weight. See `Layout.places`."""
    pointers = ()
    for layer in tl.static_range(len(WEIGHTS)):
        if tl.constexpr(LOWS[layer]) < 0:
            weight = (float_pointer(prepared_ptr, tl.constexpr(WEIGHTS[layer])),)
        else:
            weight = (half_pointer(prepared_ptr, tl.constexpr(WEIGHTS[layer])),)
            if tl.constexpr(LOWS[layer]) > 0:
                weight = weight + (half_pointer(prepared_ptr, tl.constexpr(LOWS[layer])),)
        pointers = pointers + (weight,)
    return pointers


@triton.jit
def bias_pointers(prepared_ptr, BIASES: tl.constexpr):
    pointers = ()
    for layer in tl.static_range(len(BIASES)):
        pointers = pointers + (float_pointer(prepared_ptr, tl.constexpr(BIASES[layer])),)
    return pointers


@triton.jit
def scale_pointer(prepared_ptr, TERMS: tl.constexpr):
    """To -w_k of each network."""
    return float_pointer(prepared_ptr, tl.constexpr(TERMS[0]))


@triton.jit
def constant_pointer(prepared_ptr, TERMS: tl.constexpr):
    return float_pointer(prepared_ptr, tl.constexpr(TERMS[1]))


@triton.jit
def terms_of(prepared_ptr, TERMS: tl.constexpr):
    quadratic, linear = (), ()  # a function of triton 3.6 can return an empty tuple, but not None
    if tl.constexpr(TERMS[2]) >= 0:
        curvature_ptr = float_pointer(prepared_ptr, tl.constexpr(TERMS[2]))
        quadratic = (curvature_ptr, float_pointer(prepared_ptr, tl.constexpr(TERMS[3])))
    if tl.constexpr(TERMS[4]) >= 0:
        linear = (float_pointer(prepared_ptr, tl.constexpr(TERMS[4])),)
    return Terms(quadratic, linear)
