"""Random numbers; and noise, update and clamp in one pass: the twin of kernels/triton/update.py.

x' = clamp(x - a clip(g) + b xi)

With the noise first, a call for y = x + b xi, and one of DRIFT for x' = clamp(y - a clip(g)).
"""

from __future__ import annotations

import math
import sys

from numpy import float32, int32, uint32

from . import CHUNK, DRIFT, LANGEVIN, UNIFORM, WORDS, jit
from .jit import bits_of, dot, f32s, i32s, i64s, u8s, u32s
from .philox import box_muller, count, philox4x32, spread, uniform

_MAGNITUDE, _INFINITY = int32(0x7FFFFFFF), int32(0x7F800000)
_ZERO, _ONE, _NO_BOUND = float32(0.0), float32(1.0), float32(math.inf)


def compiled(name: str):
    return jit.compiled(getattr(sys.modules[__name__], name))


def draw(
    kind: int, first: int, last: int, n_total: int, block: int, n_blocks: int, stream: int, key0: int, key1: int,
    chains: i64s, steps: i64s, step_stride: int, t: i64s, w: u32s, r: f32s, out: f32s, new: f32s,
    x: f32s, grad: f32s, dim: int, stride: int, first_bad: i32s, a: f32s, a_chain: int, a_step: int, b: f32s,
    b_chain: int, b_step: int, lo: float, hi: float,
):  # fmt: skip
    """Rows first to last - 1 of n_total: what ``kind`` says of blocks block to block + n_blocks - 1.

    UNIFORM, NORMAL: out, (n_total, 4 n_blocks) float32. WORDS: the same of their bits, with w itself as r.

    LANGEVIN: new = clamp(x - a grad + b xi), three (n_total, stride) float32 arrays of dim columns; a, b at a chain and
    step are a_chain and a_step apart. first_bad: (n_total,) int32, -1 or the first step whose new state was not
    finite before the clamp; such a chain stays where it was. out: room for a row, and CHUNK blocks, of noise.

    DRIFT: the same, but nothing is drawn: out is what a call of LANGEVIN left, and b is 0.

    One kernel for all: most of it is the same, and to compile it is most of what the first call waits for.

    Args:
        chains, steps: (n_total,) int64 global chain numbers, and step numbers at t = 0, step_stride apart.
        t: (1,) int64, the step of this call.
        w, r: (4, CHUNK), to work in.
    """
    k0, k1, at_step = uint32(key0), uint32(key1), t[0]
    at_once = CHUNK // n_blocks if n_blocks < CHUNK else 1
    i = first
    while i < last:
        n_rows = at_once if at_once < last - i else last - i
        c = n_blocks if kind == DRIFT else 0
        while c < n_blocks:
            width = CHUNK if CHUNK < n_blocks - c else n_blocks - c
            n = n_rows * width
            count(w, i, n_rows, block + c, width, stream, chains, steps, step_stride, at_step)
            philox4x32(w, n, k0, k1)
            if kind == UNIFORM:
                uniform(w, r, n)
            elif kind != WORDS:
                box_muller(w, r, n)
            spread(r, n, out, 4 * c if kind == LANGEVIN else 4 * (i * n_blocks + c))
            c += CHUNK
        if kind >= LANGEVIN:
            for row in range(i, i + n_rows):
                to, at = row * stride, (row - i) * n_blocks * 4
                drift, std = a[row * a_chain + at_step * a_step], b[row * b_chain + at_step * b_step]
                largest = int32(0)
                for j in range(dim):
                    v = x[to + j] - drift * grad[to + j] + std * out[at + j]
                    size = int32(bits_of(v) & _MAGNITUDE)
                    largest = size if size > largest else largest
                    v = lo if v < lo else v
                    new[to + j] = hi if v > hi else v
                if first_bad[row] < 0 and largest >= _INFINITY:
                    first_bad[row] = int32(at_step)
                if first_bad[row] >= 0:
                    for j in range(dim):
                        new[to + j] = x[to + j]
        i += n_rows


def update(
    kind: int, first: int, last: int, n_told: int, key0: int, key1: int, chains: i64s, steps: i64s, t: i64s, w: u32s,
    r: f32s, out: f32s, new: f32s, x: f32s, grad: f32s, dim: int, stride: int, first_bad: i32s, told: f32s,
    frozen: u8s, frozen_chain: int, a: f32s, a_chain: int, a_step: int, b: f32s, b_chain: int, b_step: int,
    grad_clip: float, norm_clip: float, lo: f32s, lo_dim: int, hi: f32s, hi_dim: int, g: f32s,
):  # fmt: skip
    """``draw`` of LANGEVIN or DRIFT with all options. Apart, and the loop over rows written once more: compiled into
    ``draw`` it would make every first call wait for options that few calls have, and a function for the loop's head a
    third longer.

    Args:
        told: (3, n_told) float32, in and out: the gradient's norm, steps clipped, steps clamped. n_told: 0 without it.
        frozen: uint8, rows frozen_chain apart; -1 without it.
        grad_clip, norm_clip: infinite for none. lo, hi: the bound of a dim, lo_dim apart, infinite for none.
        g: (2, dim), to work in.
    """
    k0, k1, at_step = uint32(key0), uint32(key1), t[0]
    n_blocks = (dim + 3) // 4
    at_once = CHUNK // n_blocks if n_blocks < CHUNK else 1
    i = first
    while i < last:
        n_rows = at_once if at_once < last - i else last - i
        c = n_blocks if kind == DRIFT else 0
        while c < n_blocks:
            width = CHUNK if CHUNK < n_blocks - c else n_blocks - c
            count(w, i, n_rows, c, width, 0, chains, steps, 1, at_step)
            philox4x32(w, n_rows * width, k0, k1)
            box_muller(w, r, n_rows * width)
            spread(r, n_rows * width, out, 4 * c)
            c += CHUNK
        for row in range(i, i + n_rows):
            to, at = row * stride, (row - i) * n_blocks * 4
            drift, std = a[row * a_chain + at_step * a_step], b[row * b_chain + at_step * b_step]
            # g[:dim]: the gradient, 0 where frozen; g[dim:]: clipped
            for j in range(dim):
                g[j] = grad[to + j]
            if frozen_chain >= 0:
                for j in range(dim):
                    g[j] = _ZERO if frozen[row * frozen_chain + j] != 0 else g[j]
            for j in range(dim):
                v = g[j]
                v = -grad_clip if v < -grad_clip else v
                g[dim + j] = grad_clip if v > grad_clip else v
            if norm_clip < _NO_BOUND:
                norm = float32(math.sqrt(dot(g, dim, g, dim, dim)))
                if norm > norm_clip or norm != norm:
                    shrink = norm_clip / norm
                    for j in range(dim):
                        g[dim + j] *= shrink
            largest = int32(0)
            n_clamped = int32(0)
            for j in range(dim):
                v = x[to + j] - drift * g[dim + j] + std * out[at + j]
                if frozen_chain >= 0:
                    v = x[to + j] if frozen[row * frozen_chain + j] != 0 else v
                size = int32(bits_of(v) & _MAGNITUDE)
                largest = size if size > largest else largest
                low, high = lo[j * lo_dim], hi[j * hi_dim]
                u = low if v < low else v
                u = high if u > high else u
                if frozen_chain >= 0:
                    u = x[to + j] if frozen[row * frozen_chain + j] != 0 else u
                n_clamped += int32(1) if u != v else int32(0)
                new[to + j] = u
            if first_bad[row] < 0 and largest >= _INFINITY:
                first_bad[row] = int32(at_step)
            if first_bad[row] >= 0:
                for j in range(dim):
                    new[to + j] = x[to + j]
            if n_told > 0:
                told[row] = float32(math.sqrt(dot(g, 0, g, 0, dim)))
                n_clipped = int32(0)
                for j in range(dim):
                    n_clipped += int32(1) if g[j] != g[dim + j] else int32(0)
                if first_bad[row] < 0:
                    told[n_told + row] += _ONE if n_clipped > 0 else _ZERO
                    told[2 * n_told + row] += _ONE if n_clamped > 0 else _ZERO
        i += n_rows
