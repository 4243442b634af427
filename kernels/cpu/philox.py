"""Philox4x32-10 and Box-Muller: the noise stream of fastebm/rng.py, counter for counter.

Loops run over a chunk of counters in a structure of arrays, which LLVM vectorises.
"""

from __future__ import annotations

import math

from numpy import float32, int32, uint32, uint64

from . import CHUNK
from .jit import bits_of, device, float_of

_1, _2, _3, _4 = CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK

_LOW, _32 = uint64(0xFFFFFFFF), uint64(32)
_M0, _M1 = uint64(0xD2511F53), uint64(0xCD9E8D57)
_W0, _W1 = uint32(0x9E3779B9), uint32(0xBB67AE85)


@device
def philox4x32(w, n, k0, k1):
    """n counters become their four words, in place. w: (4, CHUNK) uint32."""
    for j in range(n):
        # 64 bits per lane, for the product of two words; the upper half is masked where it matters
        a, b, c, d = uint64(w[j]), uint64(w[_1 + j]), uint64(w[_2 + j]), uint64(w[_3 + j])
        key0, key1 = k0, k1
        for _ in range(10):
            p0, p1 = (a & _LOW) * _M0, (c & _LOW) * _M1
            a, b = (p1 >> _32) ^ b ^ uint64(key0), p1
            c, d = (p0 >> _32) ^ d ^ uint64(key1), p0
            key0, key1 = uint32(key0 + _W0), uint32(key1 + _W1)
        w[j], w[_1 + j], w[_2 + j], w[_3 + j] = uint32(a), uint32(b), uint32(c), uint32(d)


_ULP, _HALF_ULP = float32(2.0**-32), float32(2.0**-33)


@device
def unit(w):
    """u(w) = (w + 0.5) 2^-32 in float32; scaling by 2^-32 is exact."""
    return float32(w) * _ULP + _HALF_ULP


_ROOT_HALF, _23 = int32(0x3F3504F3), int32(23)
_ONE, _HALF, _MINUS_TWO = float32(1.0), float32(0.5), float32(-2.0)
_LN2_HIGH, _LN2_LOW = float32(0.693359375), float32(-2.12194440e-4)
_L0, _L1, _L2 = float32(3.3333331174e-1), float32(-2.4999993993e-1), float32(2.0000714765e-1)
_L3, _L4, _L5 = float32(-1.6668057665e-1), float32(1.4249322787e-1), float32(-1.2420140846e-1)
_L6, _L7, _L8 = float32(1.1676998740e-1), float32(-1.1514610310e-1), float32(7.0376836292e-2)


@device
def log(u):
    """ln u of a normal float32 number: an exponent, and the polynomial of Cephes' logf by Estrin's scheme."""
    bits = bits_of(u)
    exponent = int32(int32(bits - _ROOT_HALF) >> _23)  # of the power of two nearest to u
    z = float_of(int32(bits - int32(exponent << _23))) - _ONE  # in [sqrt(1/2) - 1, sqrt(2) - 1)
    z2 = z * z
    z4 = z2 * z2
    low = (_L0 + _L1 * z) + (_L2 + _L3 * z) * z2
    high = (_L4 + _L5 * z) + (_L6 + _L7 * z) * z2
    e = float32(exponent)
    y = (low + high * z4 + _L8 * (z4 * z4)) * z * z2 + e * _LN2_LOW - _HALF * z2
    return z + y + e * _LN2_HIGH


_FOUR, _QUARTER, _TWO_PI = float32(4.0), float32(0.25), float32(6.283185307179586)
_S1, _S2, _S3 = float32(-1.6666654611e-1), float32(8.3321608736e-3), float32(-1.9515295891e-4)
_C1, _C2, _C3 = float32(4.166664568298827e-2), float32(-1.388731625493765e-3), float32(2.443315711809948e-5)
_I0, _I1, _I2, _I30 = int32(0), int32(1), int32(2), int32(30)


@device
def box_muller(w, r, n):
    """r: (4, CHUNK) float32 normals of the words w: r (cos t, sin t), r = sqrt(-2 ln u(w0)), t = 2 pi u(w1), and of
    w2, w3 likewise. Within 5e-7 of the exact values."""
    for pair in range(0, _4, _2):
        # Two loops: in one, the chain of dependent instructions is too long for a core to overlap two iterations.
        for j in range(n):
            r[pair + j] = float32(math.sqrt(_MINUS_TWO * log(unit(w[pair + j]))))
        for j in range(n):
            v = unit(w[pair + _1 + j])
            quarter = int32(v * _FOUR + _HALF)
            t = (v - float32(quarter) * _QUARTER) * _TWO_PI  # in [-pi/4, pi/4]
            t2 = t * t
            sin = ((_S3 * t2 + _S2) * t2 + _S1) * t2 * t + t
            cos = ((_C3 * t2 + _C2) * t2 + _C1) * t2 * t2 - _HALF * t2 + _ONE
            odd = int32(quarter & _I1) != _I0
            # their signs depend on the quarter of the circle
            c = bits_of(sin if odd else cos) ^ int32(int32(int32(quarter + _I1) & _I2) << _I30)
            s = bits_of(cos if odd else sin) ^ int32(int32(quarter & _I2) << _I30)
            radius = r[pair + j]
            r[pair + j] = radius * float_of(int32(c))
            r[pair + _1 + j] = radius * float_of(int32(s))


@device
def count(w, row, n_rows, block, n_blocks, stream, chains, steps, step_stride, t):
    """w = the counters of n_blocks blocks, from ``block`` on, of n_rows rows: at most CHUNK. w: (4, CHUNK) uint32."""
    n = 0
    high_block = uint32(stream << 24)
    for i in range(row, row + n_rows):
        chain, step = chains[i], uint32(steps[i * step_stride] + t)
        low, high = uint32(chain), uint32(chain >> 32)
        for b in range(n_blocks):
            w[n + b], w[_1 + n + b], w[_2 + n + b] = low, high, step
            w[_3 + n + b] = uint32(block + b) | high_block
        n += n_blocks


@device
def uniform(w, r, n):
    """r: (4, CHUNK) float32, u of the words w."""
    for word in range(0, _4, _1):
        for j in range(n):
            r[word + j] = unit(w[word + j])


@device
def spread(r, n, out, at):
    """out[at:] = r, with the four numbers of a block next to each other: the order of the dims."""
    for j in range(n):
        q = at + 4 * j
        out[q], out[q + 1], out[q + 2], out[q + 3] = r[j], r[_1 + j], r[_2 + j], r[_3 + j]
