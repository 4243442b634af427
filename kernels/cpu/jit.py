"""How kernels are compiled, and small building blocks for them.

A kernel's arguments are addresses and numbers, typed by their annotations. Loops vectorise if they are plain: few
branches, no calls of libm, int32 and float32 throughout.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy import float32

__all__ = [
    "bits_of",
    "compiled",
    "device",
    "dot",
    "f32s",
    "float_of",
    "i32s",
    "i64s",
    "next_of",
    "u8s",
    "u32s",
]

# Arrays of numbers: an address for the kernel; the caller passes a tensor or None (``Kernel.prepared``).
f32s = i32s = i64s = u8s = u32s = int

_TYPES = {
    "int": types.int64,
    "float": types.float32,
    "f32s": types.CPointer(types.float32),
    "i32s": types.CPointer(types.int32),
    "i64s": types.CPointer(types.int64),
    "u8s": types.CPointer(types.uint8),
    "u32s": types.CPointer(types.uint32),
}

# A product and a sum may be fused, and -0 may become 0. Sums keep their order, except with ``device(reorder=True)``:
# with "reassoc" the compiler may choose another order in another loop, which changes bits.
_FAST = frozenset({"contract", "nsz"})


def device(function: Callable[..., Any], *, reorder: bool = False) -> Any:
    """Decorator of functions that kernels call. Always inlined, because a loop with a call in it does not vectorise.

    Inlined by Numba, because LLVM would also compile the function on its own, which takes as long again.

    reorder: allow sums in any order. The order must depend on nothing but the number of terms.
    """
    if reorder:
        return numba.njit(
            function, fastmath={*_FAST, "reassoc"}, error_model="numpy", forceinline=True, no_cpython_wrapper=True,
            no_cfunc_wrapper=True,
        )  # fmt: skip
    return numba.njit(function, error_model="numpy", inline="always")


def compiled(function: Callable[..., None]) -> tuple[dict[str, Any], bytes]:
    """A kernel's header (see ``_function`` of the package) and machine code. All its arguments are annotated."""
    arguments = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    signature = types.void(*(_TYPES[kind] for kind in arguments.values()))
    collects = gc.isenabled()
    gc.disable()  # scanning Numba's millions of objects would take a tenth of the time
    try:
        done = numba.cfunc(signature, fastmath=set(_FAST), error_model="numpy")(function)
    finally:
        if collects:
            gc.enable()
    return {"symbol": done.native_name, "arguments": arguments}, done._library._get_compiled_object()


@intrinsic
def next_of(typing_context, counter):  # type: ignore[no-untyped-def]
    """Return counter[0] and add one to it, atomically."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


def _dot(a, at, b, to, n):  # type: ignore[no-untyped-def]
    """Sum of a[at + j] b[to + j] over j < n."""
    total = float32(0.0)
    for j in range(n):
        total += a[at + j] * b[to + j]
    return total


dot = device(_dot, reorder=True)


@intrinsic
def bits_of(typing_context, x):  # type: ignore[no-untyped-def]
    """float32 -> the int32 of the same bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def float_of(typing_context, bits):  # type: ignore[no-untyped-def]
    """int32 -> the float32 of the same bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate
