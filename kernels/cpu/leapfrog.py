"""Leapfrog steps of HMC (fastebm/samplers/hmc.py), in all dims or in the first layer of an MLP energy."""

from __future__ import annotations

from numpy import float32

from . import jit
from .jit import f32s, i64s

_HALF, _ONE = float32(0.5), float32(1.0)


def move(
    v: f32s, grad: f32s, x: f32s, n: int, dim: int, stride: int, h: f32s, h_chain: int, h_dim: int, n_leapfrog: int,
    t: i64s,
):  # fmt: skip
    """v -= h grad, with h / 2 at t = 0 and t = n_leapfrog, then x += h v, but not at t = n_leapfrog.

    v, grad, x: (n, stride) float32 of dim columns. h: h_chain apart per chain and h_dim per dim. t: (1,).
    """
    share = _HALF if t[0] == 0 or t[0] == n_leapfrog else _ONE
    for i in range(n):
        at, step = i * stride, i * h_chain
        if t[0] < n_leapfrog:
            for j in range(dim):
                w = v[at + j] - share * h[step + j * h_dim] * grad[at + j]
                v[at + j] = w
                x[at + j] += h[step + j * h_dim] * w
        else:
            for j in range(dim):
                v[at + j] -= share * h[step + j * h_dim] * grad[at + j]


def leap(
    s: f32s, a: f32s, b: f32s, z: f32s, u: f32s, q: f32s, n: int, width: int, stride: int, kicks: f32s, drifts: f32s,
    alphas_1: f32s, betas: f32s, rows: int, n_leapfrog: int, curvature: float, t: i64s,
):  # fmt: skip
    """The same in the first layer (fastebm/targets/collapsed.py): b -= kick (s + curvature a), then a += drift b and
    z = u + alpha_1 u + beta q, but not at t = n_leapfrog.

    s, a, b, z, u, q: (n, stride) float32 of width columns. s may be z. kicks, drifts, alphas_1, betas: (steps, rows),
    of which row t[0] is used; rows is 1 or n.
    """
    for i in range(n):
        at, row = i * stride, t[0] * rows + (i if rows > 1 else 0)
        kick, drift, alpha_1, beta = kicks[row], drifts[row], alphas_1[row], betas[row]
        if t[0] < n_leapfrog:
            for j in range(width):
                v = b[at + j] - kick * (s[at + j] + curvature * a[at + j])
                b[at + j] = v
                a[at + j] += drift * v
                z[at + j] = u[at + j] + (alpha_1 * u[at + j] + beta * q[at + j])
        else:
            for j in range(width):
                b[at + j] -= kick * (s[at + j] + curvature * a[at + j])


_KERNELS = {"move": move, "leap": leap}


def compiled(name: str):
    return jit.compiled(_KERNELS[name])
