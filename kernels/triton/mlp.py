"""The way through an MLP on the device: activations with their slopes, products at each precision, layers.

Any depth without generated source: `slope_at` calls itself for the layer above, so the return path is the
backpropagation. The layers of all networks of a sum are numbered through. Network k has those from FIRSTS[k] up to
FIRSTS[k + 1], of which the last is its head. Of each layer, BLOCKS holds the padded width, ACTIVATIONS the activation
or the head ("scalar", "class", "logsumexp"), PARAMETERS the activation's parameter.

TARGET is "interpreter", "wgmma" (sm_90 where registers are short) or "gpu", for the few lines that differ.
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
def settled(x, TARGET: tl.constexpr):
    """x, computed before what follows in the source. No instruction is left of it.

    triton 3.6 puts a sum off until it is used: of each slope it keeps two inputs in registers instead.
    """
    if TARGET == "wgmma":
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    else:
        return x


@triton.jit
def slope_times(z, grad, NAME: tl.constexpr, PARAMETER: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """act'(z) grad, where act(z) is not asked for: silu' = f (1 + g) takes the product in without an instruction."""
    if NAME == "silu" and PRECISION == "bf16":
        t = tanh(z, FAST, PRECISION)
        f = grad * t + grad
        return f * (z - z * t) + f
    elif NAME == "silu":
        s = sigmoid(z, FAST)
        f = grad * s
        return f * (z - z * s) + f
    else:
        _, slope = activation_and_slope(z, NAME, PARAMETER, PRECISION, FAST)
        return slope * grad


@triton.jit
def operand(a, PRECISION: tl.constexpr, TARGET: tl.constexpr):
    """A float32 factor as the tensor cores take it: (hi,) or, for bf16x3, (hi, lo)."""
    if PRECISION == "bf16":
        hi = a.to(tl.bfloat16)
        if TARGET == "interpreter":
            # The interpreter's bf16 product returns garbage (triton #11584): multiply the rounded values in float32.
            hi = hi.to(tl.float32)
        return (hi,)
    elif PRECISION == "bf16x3":
        # The high half is a's upper 16 bits, cut and not rounded: one logical operation where rounding and
        # widening again take three, and the low half makes up for it.
        if TARGET == "wgmma":
            # Two at a time. What is cut off is found by the packed high halves: the compiler, left to itself, keeps
            # them in 32 bits each beside a, until the low half's product is done.
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
            if TARGET == "interpreter":
                hi = hi.to(tl.float32)
                lo = lo.to(tl.float32)
        return (hi, lo)
    else:
        return (a,)


@triton.jit
def multiply(a, w, PRECISION: tl.constexpr, acc=None):
    """a @ w in float32, for a as `operand` gives it and w = (hi, lo) as `load_weight` does."""
    if PRECISION == "bf16x3":
        # the product of the two low halves is below float32's own rounding; small terms first
        small = tl.dot(a[1], w[0], acc=acc, input_precision="ieee", out_dtype=tl.float32)
        small = tl.dot(a[0], w[1], acc=small, input_precision="ieee", out_dtype=tl.float32)
        return tl.dot(a[0], w[0], acc=small, input_precision="ieee", out_dtype=tl.float32)
    elif PRECISION == "bf16":
        return tl.dot(a[0], w[0], acc=acc, input_precision="ieee", out_dtype=tl.float32)
    else:
        return tl.dot(a[0], w[0], acc=acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def product(a, w, PRECISION: tl.constexpr, TARGET: tl.constexpr, acc=None):
    """a @ w in float32, for a in float32 and w = (hi, lo) as `load_weight` gives it."""
    return multiply(operand(a, PRECISION, TARGET), w, PRECISION, acc)


@triton.jit
def transpose(w, PRECISION: tl.constexpr):
    if len(w) == 4:
        return (w[2], w[3])
    elif PRECISION == "bf16x3":
        return (tl.trans(w[0]), tl.trans(w[1]))
    elif len(w) == 2:
        return (w[1],)
    else:
        return (tl.trans(w[0]),)


@triton.jit
def load_weight(
    ptrs, first_in, STRIDE: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr, TARGET: tl.constexpr, BOTH_ORDERS: tl.constexpr = False,
):  # fmt: skip
    """Rows first_in .. first_in + BLOCK_IN - 1 of an (in, BLOCK_OUT) weight: (hi,) or, for bf16x3, (hi, lo).

    BOTH_ORDERS appends the transposed ones. Without wgmma, an operand that was turned in registers stays in
    registers for all steps, more than there are; one that is used as it was loaded waits in shared memory.

    ptrs: one pointer for each half. In memory a weight is (BLOCK_OUT, STRIDE), as in nn.Linear; the host has
    padded it with zeros, so no mask is needed.
    """
    rows = first_in + tl.arange(0, BLOCK_IN)
    cols = tl.arange(0, BLOCK_OUT)
    # Read along the memory's rows, turn in registers: shared memory takes either order.
    offsets = cols[:, None] * STRIDE + rows[None, :]
    hi = tl.load(ptrs[0] + offsets)
    if TARGET == "interpreter":
        hi = hi.to(tl.float32)
    if BOTH_ORDERS:
        turned = cols[None, :] * STRIDE + rows[:, None]
        hi_turned = tl.load(ptrs[0] + turned)
        if TARGET == "interpreter":
            hi_turned = hi_turned.to(tl.float32)
    if PRECISION == "bf16x3":
        lo = tl.load(ptrs[1] + offsets)
        if TARGET == "interpreter":
            lo = lo.to(tl.float32)
        if BOTH_ORDERS:
            lo_turned = tl.load(ptrs[1] + turned)
            if TARGET == "interpreter":
                lo_turned = lo_turned.to(tl.float32)
            return (hi_turned, lo_turned, hi, lo)
        else:
            return (tl.trans(hi), tl.trans(lo))
    elif BOTH_ORDERS:
        return (hi_turned, hi)
    else:
        return (tl.trans(hi),)


@triton.jit
def load_row(ptr, shift, BLOCK: tl.constexpr):
    """A bias or the head's weight, padded by the host: (1, BLOCK). shift is 0, but the compiler must not know."""
    return tl.load(ptr + shift + tl.arange(0, BLOCK))[None, :]


@triton.jit
def load_bias(ptrs, shift, LAYER: tl.constexpr, BLOCKS: tl.constexpr):
    return load_row(ptrs[LAYER], shift, BLOCKS[LAYER])


@triton.jit
def load_weights(
    ptrs, FIRSTS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCKS: tl.constexpr, ACTIVATIONS: tl.constexpr,
    PRECISION: tl.constexpr, TARGET: tl.constexpr, BOTH_ORDERS: tl.constexpr,
):  # fmt: skip
    """Every layer's weight as `load_weight` gives it. Left as pointers: a scalar or class head, which is no product,
    and, with BLOCK_DIM = 0, the first layers."""
    weights = ()
    for k in tl.static_range(len(FIRSTS) - 1):
        for layer in tl.static_range(tl.constexpr(FIRSTS[k]), tl.constexpr(FIRSTS[k + 1])):
            # tl.constexpr: triton 3.6 takes an entry of a constexpr tuple for a value
            if layer == tl.constexpr(FIRSTS[k]):
                if BLOCK_DIM > 0:
                    w = load_weight(
                        ptrs[layer], 0, BLOCK_DIM, BLOCK_DIM, BLOCKS[layer], PRECISION, TARGET, BOTH_ORDERS
                    )  # fmt: skip
                else:
                    w = ptrs[layer]
            elif tl.constexpr(ACTIVATIONS[layer]) == "scalar" or tl.constexpr(ACTIVATIONS[layer]) == "class":
                w = ptrs[layer]
            else:
                w = load_weight(
                    ptrs[layer], 0, BLOCKS[layer - 1], BLOCKS[layer - 1], BLOCKS[layer], PRECISION, TARGET,
                    BOTH_ORDERS,
                )  # fmt: skip
            weights = weights + (w,)
    return weights


@triton.jit
def load_head(ptr, labels, shift, BLOCK: tl.constexpr, HEAD: tl.constexpr):
    """The head's weight: one row for all chains, (1, BLOCK), or that of each chain's label, (BLOCK_CHAINS, BLOCK)."""
    if HEAD == "class":
        return tl.load(ptr + shift + labels[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    else:
        return load_row(ptr, shift, BLOCK)


@triton.jit
def as_held(x):
    """A tensor-core accumulator, flat, in the order in which its threads hold it, 4 neighbours at a time."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    parts = tl.reshape(x, (ROWS // 16, 2, 8, COLUMNS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(parts, (3, 1, 0, 2, 5, 4, 6)), (ROWS * COLUMNS,))


@triton.jit
def from_held(flat, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of as_held."""
    parts = tl.reshape(flat, (COLUMNS // 16, 2, ROWS // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(parts, (2, 1, 3, 0, 5, 4, 6)), (ROWS, COLUMNS))


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
def fetch(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TARGET: tl.constexpr):
    """What `park` wrote, in float32. Each thread reads what it wrote itself."""
    held = tl.load(ptr + tl.arange(0, ROWS * COLUMNS))
    if ptr.dtype.element_ty == tl.bfloat16:
        if TARGET == "interpreter":
            flat = held.to(tl.float32)
        else:
            # one instruction each, where the compiler takes three for two
            flat = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&f,=f,r", [held], tl.float32, True, 2
            )
        parts = tl.reshape(flat, (COLUMNS // 16, ROWS // 16, 8, 4, 2, 2, 2))
        return tl.reshape(tl.permute(parts, (1, 5, 2, 0, 4, 3, 6)), (ROWS, COLUMNS))
    else:
        return from_held(held, ROWS, COLUMNS)


@triton.jit
def activate_and_park(
    z, ptr, NAME: tl.constexpr, PARAMETER: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """act(z) as an operand, while act'(z) goes to memory.

    In float32 64 columns at a time, with a barrier to tell: given more, the compiler takes all exponentials first,
    and has no registers for them.
    """
    ROWS: tl.constexpr = z.shape[0]
    COLUMNS: tl.constexpr = z.shape[1]
    if ptr.dtype.element_ty == tl.bfloat16 or COLUMNS <= 64:
        a, slope = activation_and_slope(z, NAME, PARAMETER, PRECISION, FAST)
        park(ptr, slope)
        if ptr.dtype.element_ty != tl.bfloat16:
            tl.debug_barrier()
        return operand(a, PRECISION, TARGET)
    else:
        left, right = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        left = activate_and_park(left, ptr, NAME, PARAMETER, PRECISION, FAST, TARGET)
        right = activate_and_park(right, ptr + ROWS * COLUMNS // 2, NAME, PARAMETER, PRECISION, FAST, TARGET)
        whole = ()
        for half in tl.static_range(len(left)):
            joined = tl.permute(tl.join(left[half], right[half]), (0, 2, 1))
            whole = whole + (tl.reshape(joined, (ROWS, COLUMNS)),)
        return whole


@triton.jit
def slope_at(
    z, weights, bias_ptrs, scale_ptr, labels, shift, parking_ptr, LAYER: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """dE/dz at hidden layer LAYER: (BLOCK_CHAINS, BLOCKS[LAYER]), given its z.

    weights[l] and bias_ptrs[l] lead to layer l. scale_ptr: of a "logsumexp" head. parking_ptr: bf16 or float32, one for
    each of dE/dz, where act'(z) waits while the layers above are worked out; None: in registers.
    """
    ABOVE: tl.constexpr = tl.constexpr(ACTIVATIONS[LAYER + 1])
    if ABOVE == "scalar" or ABOVE == "class":
        head = load_head(weights[LAYER + 1][0], labels, shift, BLOCKS[LAYER], ABOVE)
        return slope_times(
            z, head, tl.constexpr(ACTIVATIONS[LAYER]), tl.constexpr(PARAMETERS[LAYER]), PRECISION, FAST
        )  # fmt: skip
    else:
        NAME: tl.constexpr = tl.constexpr(ACTIVATIONS[LAYER])
        PARAMETER: tl.constexpr = tl.constexpr(PARAMETERS[LAYER])
        if parking_ptr is not None:
            a = activate_and_park(z, parking_ptr, NAME, PARAMETER, PRECISION, FAST, TARGET)
        else:
            a, slope = activation_and_slope(z, NAME, PARAMETER, PRECISION, FAST)
            slope = settled(slope, TARGET)
            a = operand(a, PRECISION, TARGET)
        above = multiply(a, weights[LAYER + 1], PRECISION)
        above += load_bias(bias_ptrs, shift, LAYER + 1, BLOCKS)
        if ABOVE == "logsumexp":
            share = tl.exp(above - tl.max(above, axis=1)[:, None])
            grad = share * (tl.load(scale_ptr) / tl.sum(share, axis=1))[:, None]
        else:
            grad = slope_at(
                above, weights, bias_ptrs, scale_ptr, labels, shift, None, LAYER + 1, BLOCKS, ACTIVATIONS,
                PARAMETERS, PRECISION, FAST, TARGET,
            )  # fmt: skip
        back = product(grad, transpose(weights[LAYER + 1], PRECISION), PRECISION, TARGET)
        if parking_ptr is not None:
            slope = fetch(parking_ptr, z.shape[0], z.shape[1], TARGET)
        return slope * back


@triton.jit
def energy_at(
    z, weights, bias_ptrs, scale_ptr, labels, shift, LAYER: tl.constexpr, BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """E: (BLOCK_CHAINS,), given z at hidden layer LAYER."""
    a, _ = activation_and_slope(
        z, tl.constexpr(ACTIVATIONS[LAYER]), tl.constexpr(PARAMETERS[LAYER]), PRECISION, FAST
    )  # fmt: skip
    ABOVE: tl.constexpr = tl.constexpr(ACTIVATIONS[LAYER + 1])
    if ABOVE == "scalar" or ABOVE == "class":
        value = tl.sum(a * load_head(weights[LAYER + 1][0], labels, shift, BLOCKS[LAYER], ABOVE), axis=1)
        if ABOVE == "class":
            return value + tl.load(bias_ptrs[LAYER + 1] + labels)
        else:
            return value + tl.load(bias_ptrs[LAYER + 1])
    else:
        above = product(a, weights[LAYER + 1], PRECISION, TARGET)
        above += load_bias(bias_ptrs, shift, LAYER + 1, BLOCKS)
        if ABOVE == "logsumexp":
            top = tl.max(above, axis=1)
            return tl.load(scale_ptr) * (top + tl.log(tl.sum(tl.exp(above - top[:, None]), axis=1)))
        else:
            return energy_at(
                above, weights, bias_ptrs, scale_ptr, labels, shift, LAYER + 1, BLOCKS, ACTIVATIONS, PARAMETERS,
                PRECISION, FAST, TARGET,
            )  # fmt: skip


@triton.jit
def add_terms(grad, x, curvature_ptr, mean_ptr, linear_ptr, shift, BLOCK: tl.constexpr):
    """grad + c (x - m) + b: the energy's quadratic and linear terms; shift is the first dim's number."""
    if curvature_ptr is not None:
        grad += load_row(curvature_ptr, shift, BLOCK) * (x - load_row(mean_ptr, shift, BLOCK))
    if linear_ptr is not None:
        grad += load_row(linear_ptr, shift, BLOCK)
    return grad


@triton.jit
def energy_of_terms(x, curvature_ptr, mean_ptr, linear_ptr, shift, BLOCK: tl.constexpr):
    """(BLOCK_CHAINS,): sum of c (x - m)^2 / 2 + b x over these dims."""
    value = tl.sum(x * 0.0, axis=1)
    if curvature_ptr is not None:
        away = x - load_row(mean_ptr, shift, BLOCK)
        value += 0.5 * tl.sum(load_row(curvature_ptr, shift, BLOCK) * away * away, axis=1)
    if linear_ptr is not None:
        value += tl.sum(load_row(linear_ptr, shift, BLOCK) * x, axis=1)
    return value
