"""Products on tensor cores at each precision: operands, weights, and how both are split into halves."""

import triton
import triton.language as tl


@triton.jit
def operand(a, LAYERS: tl.constexpr):
    """A float32 factor as the tensor cores take it: (hi,) or, for bf16x3, (hi, lo)."""
    if LAYERS.PRECISION == "bf16":
        hi = a.to(tl.bfloat16)
        if LAYERS.TARGET == "interpreter":
            # The interpreter's bf16 product returns garbage (triton #11584): multiply the rounded values in float32.
            hi = hi.to(tl.float32)
        return (hi,)
    elif LAYERS.PRECISION == "bf16x3":
        # The high half is a's upper 16 bits, truncated: one instruction where rounding and widening again take three.
        # The low half makes up for it.
        if LAYERS.TARGET == "wgmma":
            # Two at a time, with the low halves computed from the packed high ones: otherwise the compiler keeps the
            # high halves unpacked, in a register each, until the low half's product is done.
            hi, lo = tl.inline_asm_elementwise(
                """{
                .reg .b32 t0, t1; .reg .f32 l0, l1;
                prmt.b32 $0, $2, $3, 0x7632;
                shl.b32 t0, $0, 16; and.b32 t1, $0, 0xffff0000;
                sub.f32 l0, $2, t0; sub.f32 l1, $3, t1;
                cvt.rn.bf16x2.f32 $1, l1, l0;
                }""",
                "=&r,=r,r,r", [a.to(tl.uint32, bitcast=True)], (tl.bfloat16, tl.bfloat16), True, 2,
            )  # fmt: skip
        else:
            top = (a.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
            hi = top.to(tl.bfloat16)
            lo = (a - top).to(tl.bfloat16)
            if LAYERS.TARGET == "interpreter":
                hi = hi.to(tl.float32)
                lo = lo.to(tl.float32)
        return (hi, lo)
    else:
        return (a,)


@triton.jit
def multiply(a, w, LAYERS: tl.constexpr, acc=None):
    """a @ w in float32, for a as `operand` gives it and w = (hi, lo) as `load_weight` does."""
    if LAYERS.PRECISION == "bf16x3":
        # the product of the two low halves is below float32's own rounding; small terms first
        small = tl.dot(a[1], w[0], acc=acc, input_precision="ieee", out_dtype=tl.float32)
        small = tl.dot(a[0], w[1], acc=small, input_precision="ieee", out_dtype=tl.float32)
        return tl.dot(a[0], w[0], acc=small, input_precision="ieee", out_dtype=tl.float32)
    elif LAYERS.PRECISION == "bf16":
        return tl.dot(a[0], w[0], acc=acc, input_precision="ieee", out_dtype=tl.float32)
    else:
        return tl.dot(a[0], w[0], acc=acc, input_precision=LAYERS.PRECISION, out_dtype=tl.float32)


@triton.jit
def product(a, w, LAYERS: tl.constexpr, acc=None):
    """a @ w in float32, for a in float32 and w = (hi, lo) as `load_weight` gives it."""
    return multiply(operand(a, LAYERS), w, LAYERS, acc)


@triton.jit
def transpose(w, LAYERS: tl.constexpr):
    if len(w) == 4:
        return (w[2], w[3])
    elif LAYERS.PRECISION == "bf16x3":
        return (tl.trans(w[0]), tl.trans(w[1]))
    elif len(w) == 2:
        return (w[1],)
    else:
        return (tl.trans(w[0]),)


@triton.jit
def load_weight(
    ptrs, first_in, STRIDE: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    LAYERS: tl.constexpr, BOTH_ORDERS: tl.constexpr = False,
):  # fmt: skip
    """Rows first_in .. first_in + BLOCK_IN - 1 of an (in, BLOCK_OUT) weight: (hi,) or, for bf16x3, (hi, lo).

    BOTH_ORDERS appends the transposed ones. Without wgmma, an operand transposed in registers stays there for all
    steps and does not fit; one that is used as it was loaded stays in shared memory.

    ptrs: one pointer per half. In memory a weight is (BLOCK_OUT, STRIDE), as in nn.Linear, padded with zeros, so no
    mask is needed.
    """
    rows = first_in + tl.arange(0, BLOCK_IN)
    cols = tl.arange(0, BLOCK_OUT)
    # Read along the rows in memory, transpose in registers: shared memory takes either order.
    offsets = cols[:, None] * STRIDE + rows[None, :]
    hi = tl.load(ptrs[0] + offsets)
    if LAYERS.TARGET == "interpreter":
        hi = hi.to(tl.float32)
    if BOTH_ORDERS:
        turned = cols[None, :] * STRIDE + rows[:, None]
        hi_turned = tl.load(ptrs[0] + turned)
        if LAYERS.TARGET == "interpreter":
            hi_turned = hi_turned.to(tl.float32)
    if LAYERS.PRECISION == "bf16x3":
        lo = tl.load(ptrs[1] + offsets)
        if LAYERS.TARGET == "interpreter":
            lo = lo.to(tl.float32)
        if BOTH_ORDERS:
            lo_turned = tl.load(ptrs[1] + turned)
            if LAYERS.TARGET == "interpreter":
                lo_turned = lo_turned.to(tl.float32)
            return (hi_turned, lo_turned, hi, lo)
        else:
            return (tl.trans(hi), tl.trans(lo))
    elif BOTH_ORDERS:
        return (hi_turned, hi)
    else:
        return (tl.trans(hi),)
