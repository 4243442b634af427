"""What a pool of persistent chains does besides steps: draw chains, and copy their rows."""

from __future__ import annotations

import sys

from numpy import int32, int64, uint32

from . import CHUNK, jit
from .jit import device, f32s, i32s, i64s, next_of, u8s, u32s
from .philox import count, philox4x32

_1, _2, _3 = CHUNK, 2 * CHUNK, 3 * CHUNK
_FREE, _HASH = int32(-1), uint32(0x9E3779B1)  # Knuth's multiplicative hashing: 2**32 over the golden ratio


def compiled(name: str):
    return jit.compiled(getattr(sys.modules[__name__], name))


def draw(
    first: i64s, n_draws: int, n: int, k: int, key0: int, key1: int, stream: int, draw_block: int, coin_block: int,
    threshold: int, table: i32s, bits: int, w: u32s, chains: i64s, reinits: u8s,
):  # fmt: skip
    """n_draws draws from number first[0] on: k distinct chains of n each, and which of them start again.

    Candidates are drawn until k of them differ, so n should be a few times k.

    Args:
        first: (1,). draw_block, coin_block: the Philox blocks of candidates and of coins. A coin below threshold
            reinitialises its chain.
        table: (2**bits > k,), scratch: a hash set of the chains that a draw has so far. w: (4, CHUNK), scratch.
        chains, reinits: (n_draws, k), out.
    """
    k0, k1 = uint32(key0), uint32(key1)
    size, shift = 1 << bits, uint32(32 - bits)
    block = uint32(stream << 24) | uint32(draw_block)
    for d in range(n_draws):
        step = uint32(first[0] + d)
        to = d * k
        for j in range(size):
            table[j] = _FREE
        found, tried = 0, 0
        while found < k:
            width = k - found if k - found > 16 else 16
            width = CHUNK if width > CHUNK else width
            for j in range(width):
                w[j], w[_1 + j], w[_2 + j], w[_3 + j] = uint32(tried + j), uint32(0), step, block
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
            count(w, to + i, width, coin_block, 1, stream, chains, first, 0, d)
            philox4x32(w, width, k0, k1)
            for j in range(width):
                reinits[to + i + j] = int64(w[j]) < threshold
            i += width


@device
def place_from(places, n, first):
    """Index of the first of n ascending places that is not before ``first``."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if places[middle] < first:
            low = middle + 1
        else:
            high = middle
    return low


@device
def next_part(taken, size, n):
    """The next ``size`` of n chains for one of several threads: first and last (exclusive)."""
    first = next_of(taken) * size
    return first, (first + size if first + size < n else n)


def take(
    dim: int, size: int, taken: i64s, n: int, n_reinit: int, rows: i64s, reinit: i64s, data: f32s, steps: i64s,
    fresh: f32s, x: f32s, before: i64s,
):  # fmt: skip
    """Copy the states and lifetime steps of a pool's chains at ``rows`` to x (n, dim) and before (n,).

    Several threads may run this at once: each takes the next ``size`` chains until none are left.

    Args:
        taken: (1,), 0. reinit: (n_reinit,), ascending places of chains that start again, from the rows of fresh.
    """
    first, last = next_part(taken, size, n)
    while first < n:
        j = place_from(reinit, n_reinit, first)
        for i in range(first, last):
            row, to = rows[i], i * dim
            before[i] = steps[row]
            if j < n_reinit and reinit[j] == i:
                for c in range(dim):
                    x[to + c] = fresh[j * dim + c]
                j += 1
            else:
                at = row * dim
                for c in range(dim):
                    x[to + c] = data[at + c]
        first, last = next_part(taken, size, n)


def put(
    dim: int, size: int, taken: i64s, n: int, n_reinit: int, rows: i64s, reinit: i64s, data: f32s, steps: i64s,
    energy: f32s, started: i64s, reinits: i32s, x: f32s, before: i64s, after: i64s, energies: f32s,
):  # fmt: skip
    """Write what ``take`` took, after its steps, into the pool's data, steps, energy, started and reinits.

    Several threads may run this at once.
    """
    first, last = next_part(taken, size, n)
    while first < n:
        j = place_from(reinit, n_reinit, first)
        for i in range(first, last):
            row = rows[i]
            at, to = i * dim, row * dim
            for c in range(dim):
                data[to + c] = x[at + c]
            steps[row] = after[i]
            energy[row] = energies[i]
            if j < n_reinit and reinit[j] == i:
                started[row] = before[i]
                reinits[row] += 1
                j += 1
        first, last = next_part(taken, size, n)
