"""Leapfrog steps in the first layer of an MLP energy: see fastebm/targets/collapsed.py."""

from __future__ import annotations

from . import jit
from .jit import f32s, i64s


def leap(
    s: f32s, a: f32s, b: f32s, z: f32s, u: f32s, q: f32s, n: int, width: int, stride: int, kicks: f32s, drifts: f32s,
    alphas_1: f32s, betas: f32s, rows: int, curvature: float, t: i64s,
):  # fmt: skip
    """b -= kick (s + curvature a), then a += drift b and z = u + alpha_1 u + beta q, but not after a drift of 0.

    s, a, b, z, u, q: (n, stride) float32 of width columns. s may be z. kicks, drifts, alphas_1, betas: (steps, rows),
    of which row t[0] is used; rows is 1 or n.
    """
    for i in range(n):
        at, row = i * stride, t[0] * rows + (i if rows > 1 else 0)
        kick, drift, alpha_1, beta = kicks[row], drifts[row], alphas_1[row], betas[row]
        if drift != 0.0:
            for j in range(width):
                v = b[at + j] - kick * (s[at + j] + curvature * a[at + j])
                b[at + j] = v
                a[at + j] += drift * v
                z[at + j] = u[at + j] + (alpha_1 * u[at + j] + beta * q[at + j])
        else:
            for j in range(width):
                b[at + j] -= kick * (s[at + j] + curvature * a[at + j])


_KERNELS = {"leap": leap}


def compiled(name: str):
    return jit.compiled(_KERNELS[name])
