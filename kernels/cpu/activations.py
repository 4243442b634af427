"""Activations with their slopes, and the functions that they are made of.

libm has no vector code, so the exponential, tanh and erf are polynomials here, within a few units of the last place.
Names and parameters of the activations are those of ``fastebm.energies.ACTIVATIONS``.
"""

from __future__ import annotations

import math

from numpy import float32, int32

from .jit import bits_of, device, float_of
from .philox import log

_ZERO, _HALF, _ONE, _TWO = float32(0.0), float32(0.5), float32(1.0), float32(2.0)

# -- functions -------------------------------------------------------------------------------------------------

_LOWEST, _HIGHEST = float32(-87.0), float32(88.0)
_LOG2E, _ROUND = float32(1.4426950408889634), float32(12582912.0)  # 1.5 2^23: adding it rounds to a whole number
_LN2_HIGH, _LN2_LOW = float32(0.693359375), float32(-2.12194440e-4)
_E1, _E2, _E3 = float32(5.0000001201e-1), float32(1.6666665459e-1), float32(4.1665795894e-2)
_E4, _E5, _E6 = float32(8.3334519073e-3), float32(1.3981999507e-3), float32(1.9875691500e-4)
_127, _23 = int32(127), int32(23)


@device
def exp_parts(x):
    """2^n and expm1(r), with x = n ln 2 + r, by Cephes' expf.

    x is clamped to [-87, 88], where 2^n is a normal number.
    """
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    n = (x * _LOG2E + _ROUND) - _ROUND
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    r2 = r * r
    p = (_E1 + _E2 * r) + (_E3 + _E4 * r) * r2 + (_E5 + _E6 * r) * (r2 * r2)
    return float_of(int32(int32(int32(n) + _127) << _23)), p * r2 + r


@device
def exp(x):
    power, rest = exp_parts(x)
    return power * rest + power


@device
def expm1(x):
    power, rest = exp_parts(x)
    return power * rest + (power - _ONE)


_T0, _T1, _T2 = float32(-3.33332819422e-1), float32(1.33314422036e-1), float32(-5.37397155531e-2)
_T3, _T4, _SMALL = float32(2.06390887954e-2), float32(-5.70498872745e-3), float32(0.625)
_SIGN, _MAGNITUDE = int32(-0x80000000), int32(0x7FFFFFFF)


@device
def tanh_of(x):
    size = float_of(int32(bits_of(x) & _MAGNITUDE))
    t = exp(-_TWO * size)
    large = (_ONE - t) / (_ONE + t)
    large = float_of(int32(bits_of(large) | int32(bits_of(x) & _SIGN)))
    x2 = x * x
    small = ((((_T4 * x2 + _T3) * x2 + _T2) * x2 + _T1) * x2 + _T0) * x2 * x + x
    return large if size > _SMALL else small


_ERF_ONE = float32(3.832506856900711)  # where erf is 1 in float32
_A0, _A1, _A2 = float32(1.128379143519084), float32(0.18520832239976145), float32(0.050955695062380861)
_A3, _A4 = float32(0.0034082910107109506), float32(0.00022905065861350646)
_B1, _B2, _B3 = float32(0.49746925110067538), float32(0.11098505178285362), float32(0.014070470171167667)
_B4, _B5, _B6 = float32(0.0010179625278914885), float32(0.000023547966471313185), float32(-1.1791602954361697e-7)


@device
def erf(x):
    """A quotient of polynomials, as Eigen and XLA have it."""
    x = -_ERF_ONE if x < -_ERF_ONE else x
    x = _ERF_ONE if x > _ERF_ONE else x
    x2 = x * x
    above = (((_A4 * x2 + _A3) * x2 + _A2) * x2 + _A1) * x2 + _A0
    below = (((((_B6 * x2 + _B5) * x2 + _B4) * x2 + _B3) * x2 + _B2) * x2 + _B1) * x2 + _ONE
    return x * above / below


# -- activations: value and slope at z, with a parameter p -----------------------------------------------------


@device
def silu(z, p):
    s = _ONE / (_ONE + exp(-z))
    v = z * s
    return v, s + v * (_ONE - s)


@device
def relu(z, p):
    return _ZERO if z < _ZERO else z, _ZERO if z <= _ZERO else _ONE


@device
def leaky_relu(z, p):
    return z if z > _ZERO else z * p, _ONE if z > _ZERO else p


@device
def elu(z, p):
    below = p * expm1(z)
    return z if z > _ZERO else below, _ONE if z > _ZERO else below + p


_THRESHOLD = float32(20.0)  # as in nn.Softplus


@device
def softplus(z, p):
    y = z * p
    size = float_of(int32(bits_of(y) & _MAGNITUDE))
    t = exp(-size)
    u = _ONE + t
    v = log(u) + (t - (u - _ONE)) / u  # log1p(t): the second term is what u was rounded by
    v = ((y if y > _ZERO else _ZERO) + v) / p
    s = (_ONE if y > _ZERO else t) / u
    return z if y > _THRESHOLD else v, _ONE if y > _THRESHOLD else s


_ROOT_HALF, _INV_ROOT_2PI = float32(math.sqrt(0.5)), float32(1.0 / math.sqrt(2.0 * math.pi))


@device
def gelu(z, p):
    c = _HALF * (_ONE + erf(z * _ROOT_HALF))
    return z * c, c + z * (_INV_ROOT_2PI * exp(-_HALF * z * z))


_G0, _G1 = float32(math.sqrt(2.0 / math.pi)), float32(0.044715)
_G3 = float32(3 * 0.044715)


@device
def gelu_tanh(z, p):
    z2 = z * z
    t = tanh_of(_G0 * (z + _G1 * z2 * z))
    c = _HALF * (_ONE + t)
    return z * c, c + _HALF * z * (_ONE - t * t) * (_G0 * (_ONE + _G3 * z2))


@device
def tanh(z, p):
    v = tanh_of(z)
    return v, _ONE - v * v


@device
def sigmoid(z, p):
    s = _ONE / (_ONE + exp(-z))
    return s, s * (_ONE - s)


@device
def identity(z, p):
    return z, _ONE


ACTIVATIONS = {
    "silu": silu, "relu": relu, "leaky_relu": leaky_relu, "elu": elu, "softplus": softplus, "gelu": gelu,
    "gelu_tanh": gelu_tanh, "tanh": tanh, "sigmoid": sigmoid, "identity": identity,
}  # fmt: skip
