"""The way through an MLP on the device: activations with their slopes, products at each precision, layers.

Any depth without generated source: `slope_at` calls itself for the layer above, so the return path is the
backpropagation. `ACTIVATIONS`, `PARAMETERS` and the tuples of weights hold one entry a hidden layer.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    if FAST:
        # 1 / (1 + 2^(-z log2 e)): two special-function instructions, where a division takes eight more
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [z * -1.4426950408889634], tl.float32, True, 1
        )
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1)
    else:
        return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def tanh(z, FAST: tl.constexpr, PRECISION: tl.constexpr):
    if FAST and PRECISION == "bf16":
        # One instruction with a relative error of 2^-11: below the rounding of the bf16 operand it becomes.
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)
    else:
        return 2.0 * sigmoid(2.0 * z, FAST) - 1.0


@triton.jit
def activation_and_slope(z, NAME: tl.constexpr, PARAMETER: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """act(z) and act'(z). NaN goes through: a comparison that is false keeps z."""
    if NAME == "silu":
        if PRECISION == "bf16":
            # The host has halved the weights below, so this is u = z/2, and the slope is d silu(2u)/du.
            # With t = tanh(u):  silu(2u) = u t + u,  slope = (1 + t) + u (1 - t^2)
            t = tanh(z, FAST, PRECISION)
            return z * t + z, (1.0 + t) + z * (1.0 - t * t)
        else:
            s = sigmoid(z, FAST)
            a = z * s
            return a, a + s * (1.0 - a)
    elif NAME == "relu":
        return tl.where(z <= 0.0, 0.0, z), tl.where(z <= 0.0, 0.0, 1.0)
    elif NAME == "leaky_relu":
        return tl.where(z <= 0.0, PARAMETER * z, z), tl.where(z <= 0.0, PARAMETER, 1.0)
    elif NAME == "elu":
        e = PARAMETER * tl.exp(z)
        return tl.where(z <= 0.0, e - PARAMETER, z), tl.where(z <= 0.0, e, 1.0)
    elif NAME == "gelu":
        # z Phi(z), and Phi(z) + z phi(z)
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * cdf, cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif NAME == "gelu_tanh":
        # z (1 + tanh u) / 2,  u = sqrt(2/pi) (z + 0.044715 z^3)
        square = z * z
        t = tanh(z * (0.7978845608028654 + 0.035677408136300125 * square), FAST, PRECISION)
        du = 0.7978845608028654 + 0.10703222440890037 * square
        return z * (0.5 + 0.5 * t), 0.5 + 0.5 * t + 0.5 * z * (1.0 - t * t) * du
    elif NAME == "tanh":
        t = tanh(z, FAST, PRECISION)
        return t, 1.0 - t * t
    elif NAME == "sigmoid":
        s = sigmoid(z, FAST)
        return s, s * (1.0 - s)
    elif NAME == "identity":
        return z, tl.full(z.shape, 1.0, tl.float32)
    else:
        tl.static_assert(NAME == "softplus", "unknown activation")
        # softplus(t) = max(t, 0) + ln(1 + e^-|t|), over beta: no overflow on either side
        t = PARAMETER * z
        e = tl.exp(-tl.abs(t))
        soft = (tl.where(t <= 0.0, 0.0, t) + tl.log(1.0 + e)) * (1.0 / PARAMETER)
        return soft, sigmoid(t, FAST)


@triton.jit
def product(a, w, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """a @ w in float32, for a in float32 and w = (hi, lo) as `load_weight` gives it."""
    if PRECISION == "bf16":
        hi = a.to(tl.bfloat16)
        if INTERPRETED:
            # The interpreter's bf16 product returns garbage (triton #11584): multiply the rounded values in float32.
            hi = hi.to(tl.float32)
        return tl.dot(hi, w[0], input_precision="ieee", out_dtype=tl.float32)
    elif PRECISION == "bf16x3":
        # The high half is a's upper 16 bits, cut and not rounded: one logical operation where rounding and
        # widening again take three, and the low half makes up for it.
        top = (a.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        hi = top.to(tl.bfloat16)
        lo = (a - top).to(tl.bfloat16)
        if INTERPRETED:
            hi = hi.to(tl.float32)
            lo = lo.to(tl.float32)
        # the product of the two low halves is below float32's own rounding; small terms first
        small = tl.dot(lo, w[0], input_precision="ieee", out_dtype=tl.float32)
        small = tl.dot(hi, w[1], acc=small, input_precision="ieee", out_dtype=tl.float32)
        return tl.dot(hi, w[0], acc=small, input_precision="ieee", out_dtype=tl.float32)
    else:
        return tl.dot(a, w[0], input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def transpose(w, PRECISION: tl.constexpr):
    if PRECISION == "bf16x3":
        return (tl.trans(w[0]), tl.trans(w[1]))
    else:
        return (tl.trans(w[0]),)


@triton.jit
def load_weight(
    ptrs, first_in, STRIDE: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows first_in .. first_in + BLOCK_IN - 1 of an (in, BLOCK_OUT) weight: (hi,) or, for bf16x3, (hi, lo).

    ptrs: one pointer for each half. In memory a weight is (BLOCK_OUT, STRIDE), as in nn.Linear; the host has
    padded it with zeros, so no mask is needed.
    """
    rows = first_in + tl.arange(0, BLOCK_IN)
    cols = tl.arange(0, BLOCK_OUT)
    # Read along the memory's rows, turn in registers: shared memory takes either order.
    offsets = cols[:, None] * STRIDE + rows[None, :]
    hi = tl.load(ptrs[0] + offsets)
    if INTERPRETED:
        hi = hi.to(tl.float32)
    if PRECISION == "bf16x3":
        lo = tl.load(ptrs[1] + offsets)
        if INTERPRETED:
            lo = lo.to(tl.float32)
        return (tl.trans(hi), tl.trans(lo))
    else:
        return (tl.trans(hi),)


@triton.jit
def load_row(ptr, shift, BLOCK: tl.constexpr):
    """A bias or the head's weight, padded by the host: (1, BLOCK). shift is 0, but the compiler must not know."""
    return tl.load(ptr + shift + tl.arange(0, BLOCK))[None, :]


@triton.jit
def slope_at(
    z, weights, bias_ptrs, head_ptr, shift, LAYER: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dE/dz at hidden layer LAYER: (BLOCK_CHAINS, BLOCKS[LAYER]), given its z.

    weights[l] leads from hidden layer l to l + 1; bias_ptrs[l] belongs to hidden layer l; head_ptr is the
    output's weight.
    """
    # tl.constexpr again: triton 3.6 takes an entry of a constexpr tuple for a value
    a, slope = activation_and_slope(
        z, tl.constexpr(ACTIVATIONS[LAYER]), tl.constexpr(PARAMETERS[LAYER]), PRECISION, FAST
    )  # fmt: skip
    if LAYER == len(BLOCKS) - 1:
        return slope * load_row(head_ptr, shift, BLOCKS[LAYER])
    else:
        above = product(a, weights[LAYER], PRECISION, INTERPRETED)
        above += load_row(bias_ptrs[LAYER + 1], shift, BLOCKS[LAYER + 1])
        grad = slope_at(
            above, weights, bias_ptrs, head_ptr, shift, LAYER + 1, BLOCKS, ACTIVATIONS, PARAMETERS,
            PRECISION, FAST, INTERPRETED,
        )  # fmt: skip
        return slope * product(grad, transpose(weights[LAYER], PRECISION), PRECISION, INTERPRETED)


@triton.jit
def energy_at(
    z, weights, bias_ptrs, head_ptr, head_bias_ptr, LAYER: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """E: (BLOCK_CHAINS,), given z at hidden layer LAYER."""
    a, _ = activation_and_slope(
        z, tl.constexpr(ACTIVATIONS[LAYER]), tl.constexpr(PARAMETERS[LAYER]), PRECISION, FAST
    )  # fmt: skip
    if LAYER == len(BLOCKS) - 1:
        head = load_row(head_ptr, 0, BLOCKS[LAYER])
        return tl.sum(a * head, axis=1) + tl.load(head_bias_ptr)
    else:
        above = product(a, weights[LAYER], PRECISION, INTERPRETED)
        above += load_row(bias_ptrs[LAYER + 1], 0, BLOCKS[LAYER + 1])
        return energy_at(
            above, weights, bias_ptrs, head_ptr, head_bias_ptr, LAYER + 1, BLOCKS, ACTIVATIONS, PARAMETERS,
            PRECISION, FAST, INTERPRETED,
        )  # fmt: skip
