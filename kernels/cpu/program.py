"""Many steps of calls without Python between them, for whose lock two threads would wait at every call."""

from __future__ import annotations

import sys

from . import jit
from .jit import call, call_blas, i64s


def compiled(name: str):
    return jit.compiled(getattr(sys.modules[__name__], name))


def run(even: i64s, odd: i64s, n_calls: int, t: i64s, first: int, last: int):
    """Steps first to last - 1: t[0] becomes the step, and then all calls of an even or of an odd one are made.

    even, odd: n_calls pairs of addresses, of a kernel and of its block.
    """
    for step in range(first, last):
        t[0] = step
        if step % 2 == 0:
            for i in range(n_calls):
                call(even[2 * i], even[2 * i + 1])
        else:
            for i in range(n_calls):
                call(odd[2 * i], odd[2 * i + 1])


def blas(function: int, arguments: i64s):
    """A function of BLAS in Fortran's convention, of thirteen arguments: their addresses."""
    call_blas(function, arguments)
