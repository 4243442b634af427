"""Activations with their slopes.

LAYERS, here and in the files that use this: see mlp.Layers.
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
def tanh(z, LAYERS: tl.constexpr):
    if LAYERS.FAST and LAYERS.PRECISION == "bf16":
        # One instruction with a relative error of 2^-11: below the rounding of the bf16 operand it becomes.
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)
    else:
        return 2.0 * sigmoid(2.0 * z, LAYERS.FAST) - 1.0


@triton.jit
def activation_and_slope(z, LAYER: tl.constexpr, LAYERS: tl.constexpr):
    """act(z) and act'(z). NaN passes through: a comparison that is false keeps z."""
    NAME: tl.constexpr = tl.constexpr(LAYERS.ACTIVATIONS[LAYER])
    PARAMETER: tl.constexpr = tl.constexpr(LAYERS.PARAMETERS[LAYER])
    if NAME == "silu":
        if LAYERS.PRECISION == "bf16":
            # `weights.prepare` has halved the weights below: z is u = z/2, and the slope is d silu(2u)/du.
            # With t = tanh(u):  silu(2u) = u t + u,  slope = (1 + t) + u (1 - t^2)
            t = tanh(z, LAYERS)
            return z * t + z, (1.0 + t) + z * (1.0 - t * t)
        else:
            if LAYERS.HALVED:
                z = z + z
            s = sigmoid(z, LAYERS.FAST)
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
        t = tanh(z * (0.7978845608028654 + 0.035677408136300125 * square), LAYERS)
        du = 0.7978845608028654 + 0.10703222440890037 * square
        return z * (0.5 + 0.5 * t), 0.5 + 0.5 * t + 0.5 * z * (1.0 - t * t) * du
    elif NAME == "tanh":
        t = tanh(z, LAYERS)
        return t, 1.0 - t * t
    elif NAME == "sigmoid":
        s = sigmoid(z, LAYERS.FAST)
        return s, s * (1.0 - s)
    elif NAME == "identity":
        return z, tl.full(z.shape, 1.0, tl.float32)
    else:
        tl.static_assert(NAME == "softplus", "unknown activation")
        # softplus(t) = max(t, 0) + ln(1 + e^-|t|), over beta: no overflow on either side
        t = PARAMETER * z
        e = tl.exp(-tl.abs(t))
        soft = (tl.where(t <= 0.0, 0.0, t) + tl.log(1.0 + e)) * (1.0 / PARAMETER)
        return soft, sigmoid(t, LAYERS.FAST)


@triton.jit
def slope_times(z, grad, LAYER: tl.constexpr, LAYERS: tl.constexpr):
    """act'(z) grad, where act(z) is not needed: silu' = f (1 + g) absorbs the product without an instruction."""
    NAME: tl.constexpr = tl.constexpr(LAYERS.ACTIVATIONS[LAYER])
    if NAME == "silu" and LAYERS.PRECISION == "bf16":
        t = tanh(z, LAYERS)
        f = grad * t + grad
        return f * (z - z * t) + f
    elif NAME == "silu":
        s = sigmoid(z, LAYERS.FAST)
        f = grad * s
        return f * (z - z * s) + f
    else:
        _, slope = activation_and_slope(z, LAYER, LAYERS)
        return slope * grad
