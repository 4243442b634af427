"""Random numbers; and noise, update and clamp in one pass.

    x' = clamp(x - drift clip(g) + noise_std xi)

With the noise first, a call for y = x + noise_std xi, and one of DRIFT for x' = clamp(y - drift clip(g)).
"""

from __future__ import annotations

import math
import sys

from numpy import float32, int32, uint32

from . import CHUNK, DRIFT, LANGEVIN, UNIFORM, WORDS, jit
from .jit import bits_of, device, dot, f32s, i32s, i64s, u8s, u32s
from .philox import box_muller, count, philox4x32, spread, uniform

_MAGNITUDE, _INFINITY = int32(0x7FFFFFFF), int32(0x7F800000)
_ZERO, _ONE, _NO_BOUND = float32(0.0), float32(1.0), float32(math.inf)


def compiled(name: str):
    return jit.compiled(getattr(sys.modules[__name__], name))


# -- the update, for both kernels ------------------------------------------------------------------------------


@device
def updated(x, clipped, noise, drift, noise_std):
    """One coordinate, before the clamp."""
    return x - drift * clipped + noise_std * noise


@device
def clamp(v, lo, hi):
    v = lo if v < lo else v
    return hi if v > hi else v


@device
def larger(largest, v):
    """The larger of a magnitude and that of v, as integers: they are in the order of the floats, and NaN is above all.
    Taken before the clamp, which would hide what is not finite."""
    size = int32(bits_of(v) & _MAGNITUDE)
    return size if size > largest else largest


@device
def stop(new, x, to, dim, row, largest, first_bad, t):
    """Record a first bad step t, and leave a chain that has one where it was."""
    if first_bad[row] < 0 and largest >= _INFINITY:
        first_bad[row] = int32(t)
    if first_bad[row] >= 0:
        for j in range(dim):
            new[to + j] = x[to + j]


# -- kernels ---------------------------------------------------------------------------------------------------


def draw(
    kind: int, first: int, last: int, n_total: int, block: int, n_blocks: int, stream: int, key0: int, key1: int,
    chains: i64s, steps: i64s, step_stride: int, t: i64s, w: u32s, r: f32s, out: f32s, new: f32s,
    x: f32s, grad: f32s, dim: int, stride: int, first_bad: i32s, drifts: f32s, drift_chain: int,
    drift_step: int, noise_stds: f32s, noise_chain: int, noise_step: int, lo: float, hi: float,
):  # fmt: skip
    """Rows first to last - 1 of n_total, blocks block to block + n_blocks - 1, by ``kind``:

    UNIFORM, NORMAL: draws into out, (n_total, 4 n_blocks) float32. WORDS: their raw bits; pass w as r too.

    LANGEVIN: new = clamp(x - drift grad + noise_std xi), three (n_total, stride) float32 arrays of dim columns;
    drifts are drift_chain apart per chain and drift_step per step, noise_stds likewise. first_bad: (n_total,) int32,
    -1 or the first step whose new state was not finite before the clamp; such a chain stays where it was. out: room
    for the noise of a row, or of CHUNK blocks.

    DRIFT: the same without drawing: out is what a call of LANGEVIN left, and noise_std is 0.

    One kernel for all, because most of the code is the same and the first call waits for it to compile.

    Args:
        chains, steps: (n_total,) int64 global chain numbers, and step numbers at t = 0, step_stride apart.
        t: (1,) int64, the step of this call.
        w, r: (4, CHUNK), scratch.
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
                drift = drifts[row * drift_chain + at_step * drift_step]
                noise_std = noise_stds[row * noise_chain + at_step * noise_step]
                largest = int32(0)
                for j in range(dim):
                    v = updated(x[to + j], grad[to + j], out[at + j], drift, noise_std)
                    largest = larger(largest, v)
                    new[to + j] = clamp(v, lo, hi)
                stop(new, x, to, dim, row, largest, first_bad, at_step)
        i += n_rows


def update(
    kind: int, first: int, last: int, n_telemetry: int, key0: int, key1: int, chains: i64s, steps: i64s, t: i64s,
    w: u32s, r: f32s, out: f32s, new: f32s, x: f32s, grad: f32s, dim: int, stride: int, first_bad: i32s,
    telemetry: f32s, frozen: u8s, frozen_chain: int, drifts: f32s, drift_chain: int, drift_step: int,
    noise_stds: f32s, noise_chain: int, noise_step: int, grad_clip: float, norm_clip: float, lo: f32s, lo_dim: int,
    hi: f32s, hi_dim: int, g: f32s,
):  # fmt: skip
    """``draw`` of LANGEVIN or DRIFT with all options.

    A kernel of its own, although the loop over rows is the same: within ``draw``, every first call would wait for
    options that few calls use to compile, and sharing the loop's head makes compiling a third slower.

    Args:
        telemetry: (3, n_telemetry) float32, in and out: gradient norm, steps clipped, steps clamped. n_telemetry: 0
            without it.
        frozen: uint8, rows frozen_chain apart; -1 without it.
        grad_clip, norm_clip: infinite for none. lo, hi: the bound of a dim, lo_dim apart, infinite for none.
        g: (2, dim), scratch.
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
            drift = drifts[row * drift_chain + at_step * drift_step]
            noise_std = noise_stds[row * noise_chain + at_step * noise_step]
            # g[:dim]: the gradient, 0 where frozen; g[dim:]: clipped
            for j in range(dim):
                g[j] = grad[to + j]
            if frozen_chain >= 0:
                for j in range(dim):
                    g[j] = _ZERO if frozen[row * frozen_chain + j] != 0 else g[j]
            for j in range(dim):
                g[dim + j] = clamp(g[j], -grad_clip, grad_clip)
            if norm_clip < _NO_BOUND:
                norm = float32(math.sqrt(dot(g, dim, g, dim, dim)))
                if norm > norm_clip or norm != norm:
                    shrink = norm_clip / norm
                    for j in range(dim):
                        g[dim + j] *= shrink
            largest = int32(0)
            n_clamped = int32(0)
            for j in range(dim):
                v = updated(x[to + j], g[dim + j], out[at + j], drift, noise_std)
                if frozen_chain >= 0:
                    v = x[to + j] if frozen[row * frozen_chain + j] != 0 else v
                largest = larger(largest, v)
                u = clamp(v, lo[j * lo_dim], hi[j * hi_dim])
                if frozen_chain >= 0:
                    u = x[to + j] if frozen[row * frozen_chain + j] != 0 else u
                n_clamped += int32(1) if u != v else int32(0)
                new[to + j] = u
            stop(new, x, to, dim, row, largest, first_bad, at_step)
            if n_telemetry > 0:
                telemetry[row] = float32(math.sqrt(dot(g, 0, g, 0, dim)))
                n_clipped = int32(0)
                for j in range(dim):
                    n_clipped += int32(1) if g[j] != g[dim + j] else int32(0)
                if first_bad[row] < 0:
                    telemetry[n_telemetry + row] += _ONE if n_clipped > 0 else _ZERO
                    telemetry[2 * n_telemetry + row] += _ONE if n_clamped > 0 else _ZERO
        i += n_rows


def push(
    s: f32s, a: f32s, new: f32s, n: int, width: int, stride: int, drifts: f32s, shrunk: f32s, rows: int,
    first_bad: i32s, t: i64s,
):  # fmt: skip
    """new = a - drift s + shrunk a: ``draw`` of LANGEVIN in the first layer (fastebm/samplers/collapsed_langevin.py).

    s, a, new: (n, stride) float32 of width columns. drifts, shrunk: (rows,); rows is 1 or n. first_bad: as there.
    """
    for i in range(n):
        at, row = i * stride, i if rows > 1 else 0
        largest = int32(0)
        for j in range(width):
            v = a[at + j] - drifts[row] * s[at + j] + shrunk[row] * a[at + j]
            new[at + j] = v
            largest = larger(largest, v)
        if first_bad[i] < 0 and largest >= _INFINITY:
            first_bad[i] = int32(t[0])
