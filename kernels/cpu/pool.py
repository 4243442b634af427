"""What a pool of persistent chains does besides steps: which chains are drawn, and their rows."""

from __future__ import annotations

import sys

from numpy import int32, int64, uint32

from . import CHUNK, jit
from .jit import f32s, i32s, i64s, next_of, u8s, u32s
from .philox import philox4x32

_1, _2, _3 = CHUNK, 2 * CHUNK, 3 * CHUNK
_FREE, _HASH = int32(-1), uint32(0x9E3779B1)  # Knuth's multiplicative hashing: 2**32 over the golden ratio


def compiled(name: str):
    return jit.compiled(getattr(sys.modules[__name__], name))


def draw(
    first: int, count: int, n: int, k: int, key0: int, key1: int, draw_block: int, coin_block: int, threshold: int,
    table: i32s, bits: int, w: u32s, chains: i64s, restarts: u8s,
):  # fmt: skip
    """Draws first to first + count - 1: k distinct chains of n each, and which of them start anew.

    Candidates are drawn until k of them differ, so n is to be a few times k.

    Args:
        draw_block, coin_block: the counter's last word, of candidates and of coins. threshold: a coin below it is a
            restart.
        table: 2**bits > k, to work in: the chains that a draw has so far, by their hash. w: (4, CHUNK), likewise.
        chains, restarts: (count, k), out.
    """
    k0, k1 = uint32(key0), uint32(key1)
    size, shift = 1 << bits, uint32(32 - bits)
    for d in range(count):
        step = uint32(first + d)
        to = d * k
        for j in range(size):
            table[j] = _FREE
        found, tried = 0, 0
        while found < k:
            width = k - found if k - found > 16 else 16
            width = CHUNK if width > CHUNK else width
            for j in range(width):
                w[j], w[_1 + j], w[_2 + j], w[_3 + j] = uint32(tried + j), uint32(0), step, uint32(draw_block)
            philox4x32(w, width, k0, k1)
            tried += width
            for j in range(width):
                if found < k:
                    # floor(n w / 2**64), as scaled() of starts.py has it
                    chain = (int64(w[j]) * n + ((int64(w[_1 + j]) * n) >> 32)) >> 32
                    at = int64(uint32(uint32(chain) * _HASH) >> shift)
                    while table[at] != _FREE and table[at] != int32(chain):
                        at = (at + 1) & (size - 1)
                    if table[at] == _FREE:
                        table[at] = int32(chain)
                        chains[to + found] = chain
                        found += 1
        i = 0
        while i < k:
            width = CHUNK if CHUNK < k - i else k - i
            for j in range(width):
                w[j], w[_1 + j], w[_2 + j], w[_3 + j] = uint32(chains[to + i + j]), uint32(0), step, uint32(coin_block)
            philox4x32(w, width, k0, k1)
            for j in range(width):
                restarts[to + i + j] = int64(w[j]) < threshold
            i += width


def take(
    n: int, dim: int, size: int, taken: i64s, rows: i64s, source: i64s, fresh: f32s, data: f32s, steps: i64s, x: f32s,
    before: i64s,
):  # fmt: skip
    """The chains at ``rows`` of a pool's data and steps: x (n, dim) and before (n,).

    For as many threads as are in here: each takes the next ``size`` chains until none are left.

    Args:
        taken: (1,), 0. source: (n,), the row of ``fresh`` that a chain starts from anew, or -1.
    """
    while True:
        first = next_of(taken) * size
        if first >= n:
            return
        for i in range(first, first + size if first + size < n else n):
            row = rows[i]
            before[i] = steps[row]
            to = i * dim
            if source[i] < 0:
                at = row * dim
                for j in range(dim):
                    x[to + j] = data[at + j]
            else:
                at = source[i] * dim
                for j in range(dim):
                    x[to + j] = fresh[at + j]


def put(
    n: int, dim: int, size: int, taken: i64s, rows: i64s, source: i64s, x: f32s, before: i64s, after: i64s,
    energies: f32s, data: f32s, steps: i64s, energy: f32s, started: i64s, restarts: i32s,
):  # fmt: skip
    """Back after ``take``: into the pool's data, steps, energy, started and restarts. By threads, likewise."""
    while True:
        first = next_of(taken) * size
        if first >= n:
            return
        for i in range(first, first + size if first + size < n else n):
            row = rows[i]
            at, to = i * dim, row * dim
            for j in range(dim):
                data[to + j] = x[at + j]
            steps[row] = after[i]
            energy[row] = energies[i]
            if source[i] >= 0:
                started[row] = before[i]
                restarts[row] += 1
