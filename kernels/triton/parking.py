"""Operands and slopes that wait in memory (in L2) instead of registers, of which a thread has 255."""

import triton
import triton.language as tl

from .activations import activation_and_slope
from .products import operand
from .tiles import as_held, from_held


@triton.jit
def settled(x, LAYERS: tl.constexpr):
    """x, computed before what follows in the source. It adds no instruction.

    triton 3.6 delays a sum until it is used, and keeps the two inputs of each slope in registers instead of one.
    """
    if LAYERS.TARGET == "wgmma":
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    else:
        return x


@triton.jit
def park(ptr, slope):
    """Write a tensor-core accumulator to memory, 16 bytes at a time, as bf16 or float32."""
    ROWS: tl.constexpr = slope.shape[0]
    COLUMNS: tl.constexpr = slope.shape[1]
    if ptr.dtype.element_ty == tl.bfloat16:
        parts = tl.reshape(slope, (ROWS // 16, 2, 8, COLUMNS // 16, 2, 4, 2))
        held = tl.reshape(tl.permute(parts, (3, 0, 2, 5, 4, 1, 6)), (ROWS * COLUMNS,)).to(tl.bfloat16)
    else:
        held = as_held(slope)
    tl.store(ptr + tl.arange(0, ROWS * COLUMNS), held)


@triton.jit
def fetch(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAYERS: tl.constexpr):
    """What `park` wrote, in float32. Each thread reads what it wrote itself."""
    held = tl.load(ptr + tl.arange(0, ROWS * COLUMNS))
    if ptr.dtype.element_ty == tl.bfloat16:
        if LAYERS.TARGET == "interpreter":
            flat = held.to(tl.float32)
        else:
            # one instruction per element; the compiler takes three for two
            flat = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&f,=f,r", [held], tl.float32, True, 2
            )
        parts = tl.reshape(flat, (COLUMNS // 16, ROWS // 16, 8, 4, 2, 2, 2))
        return tl.reshape(tl.permute(parts, (1, 5, 2, 0, 4, 3, 6)), (ROWS, COLUMNS))
    else:
        return from_held(held, ROWS, COLUMNS)


@triton.jit
def activate_and_park(z, ptr, LAYER: tl.constexpr, LAYERS: tl.constexpr):
    """act(z) as an operand, while act'(z) goes to memory.

    In float32 64 columns at a time, with a barrier in between: otherwise the compiler computes all exponentials first
    and runs out of registers.
    """
    ROWS: tl.constexpr = z.shape[0]
    COLUMNS: tl.constexpr = z.shape[1]
    if ptr.dtype.element_ty == tl.bfloat16 or COLUMNS <= 64:
        a, slope = activation_and_slope(z, LAYER, LAYERS)
        park(ptr, slope)
        if ptr.dtype.element_ty != tl.bfloat16:
            tl.debug_barrier()
        return operand(a, LAYERS)
    else:
        left, right = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        left = activate_and_park(left, ptr, LAYER, LAYERS)
        right = activate_and_park(right, ptr + ROWS * COLUMNS // 2, LAYER, LAYERS)
        whole = ()
        for half in tl.static_range(len(left)):
            joined = tl.permute(tl.join(left[half], right[half]), (0, 2, 1))
            whole = whole + (tl.reshape(joined, (ROWS, COLUMNS)),)
        return whole


@triton.jit
def through_memory(slope, ptr, shift, OWN_CHAINS: tl.constexpr, LAYERS: tl.constexpr):
    """A slope as an operand in shared memory, where the compiler puts what is loaded from global memory.

    Used directly, it would take half of its 64 registers per thread during all chunks, beside the 128 of the next z.
    shift: always 0, but opaque to the compiler: stops it carrying 16 pointers across the loop.
    """
    ROWS: tl.constexpr = slope.shape[0]
    COLUMNS: tl.constexpr = slope.shape[1]
    SIZE: tl.constexpr = ROWS * COLUMNS
    i = tl.arange(0, SIZE)
    if OWN_CHAINS:  # the order in which threads hold an accumulator, 2 neighbours at a time
        row = i // 64 % (ROWS // 16) * 16 + i // (4 * ROWS) % 2 * 8 + i // 8 % 8
        i = tl.max_contiguous(row * COLUMNS + i // (8 * ROWS) * 8 + i % 8, 2)
    rows = shift + tl.arange(0, ROWS)
    square = rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]

    halves = operand(slope, LAYERS)
    tl.debug_barrier()  # other threads may still read what is overwritten
    for half in tl.static_range(len(halves)):
        values = halves[half].to(ptr.dtype.element_ty)
        if OWN_CHAINS:
            values = tl.permute(tl.reshape(values, (ROWS // 16, 2, 8, COLUMNS // 8, 4, 2)), (3, 1, 0, 2, 4, 5))
        tl.store(ptr + half * SIZE + i, tl.reshape(values, (SIZE,)))
    tl.debug_barrier()
    read = ()
    for half in tl.static_range(len(halves)):
        values = tl.load(ptr + half * SIZE + square)
        read = read + (values.to(halves[half].dtype),)
    return read
