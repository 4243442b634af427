"""Leapfrog steps of HMC (fastebm/samplers/hmc.py), in all dims or in the first layer of an MLP energy."""

from __future__ import annotations

from numpy import float32, int32

from . import jit
from .jit import device, dot, f32s, float_of, i64s
from .update import larger

_ZERO, _HALF, _ONE = float32(0.0), float32(0.5), float32(1.0)


def move(
    v: f32s, grad: f32s, x: f32s, n: int, dim: int, stride: int, h: f32s, h_chain: int, n_leapfrog: int, t: i64s
):  # fmt: skip
    """v -= h grad, with h / 2 at t = 0 and t = n_leapfrog, then x += h v, but not at t = n_leapfrog.

    v, grad, x: (n, stride) float32 of dim columns. h: of each dim, rows h_chain apart. t: (1,).
    """
    share = _HALF if t[0] == 0 or t[0] == n_leapfrog else _ONE
    for i in range(n):
        at, step = i * stride, i * h_chain
        if t[0] < n_leapfrog:
            for j in range(dim):
                w = v[at + j] - share * h[step + j] * grad[at + j]
                v[at + j] = w
                x[at + j] += h[step + j] * w
        else:
            for j in range(dim):
                v[at + j] -= share * h[step + j] * grad[at + j]


def leap(
    u_0: f32s, q_0: f32s, s_0: f32s, pull_0: f32s, n_chains: int, s: f32s, pull: f32s, a: f32s, b: f32s, u: f32s,
    q: f32s, z: f32s, n: int, width: int, stride: int, kicks: f32s, drifts: f32s, rows: int, n_leapfrog: int,
    curvature: float, t: i64s,
):  # fmt: skip
    """The same in the first layer (fastebm/targets/collapsed.py): b -= kick (s + curvature a) and
    q -= kick (pull + curvature u), then a += drift b and u += drift q, but not at t = n_leapfrog. The last u is also
    written to z.

    At t = 0, a and b count as 0, and u, q, s and pull are read from u_0 to pull_0, (n_chains, stride); rows from
    n_chains on start at 0.

    s, pull, a, b, u, q, z: (n, stride) float32 of width columns. s may be z. kicks, drifts: (steps, rows), of which
    row t[0] is used; rows is 1 or n.
    """
    for i in range(n):
        at, row = i * stride, t[0] * rows + (i if rows > 1 else 0)
        kick, drift = kicks[row], drifts[row]
        if t[0] == 0 and i < n_chains:
            for j in range(at, at + width):
                v = -kick * s_0[j]
                b[j] = v
                a[j] = drift * v
                w = q_0[j] - kick * (pull_0[j] + curvature * u_0[j])
                q[j] = w
                u[j] = u_0[j] + drift * w
        elif t[0] == 0:
            for j in range(at, at + width):
                a[j], b[j], u[j], q[j] = _ZERO, _ZERO, _ZERO, _ZERO
        elif t[0] < n_leapfrog:
            for j in range(at, at + width):
                v = b[j] - kick * (s[j] + curvature * a[j])
                b[j] = v
                a[j] += drift * v
            for j in range(at, at + width):
                w = q[j] - kick * (pull[j] + curvature * u[j])
                q[j] = w
                u[j] += drift * w
        else:
            for j in range(at, at + width):
                b[j] -= kick * (s[j] + curvature * a[j])
                q[j] -= kick * (pull[j] + curvature * u[j])
        if t[0] == n_leapfrog - 1:
            for j in range(at, at + width):
                z[j] = u[j]


def _along(a, y, y_0, v_0, at, n, alpha_1, beta):  # type: ignore[no-untyped-def]
    """a . (y + alpha y_0 + beta v_0), n numbers each from ``at`` on."""
    total = _ZERO
    for j in range(at, at + n):
        total += a[j] * (y[j] + (y_0[j] + (alpha_1 * y_0[j] + beta * v_0[j])))
    return total


along = device(_along, reorder=True)


def arrive(
    n: int, dim: int, width: int, base: f32s, base_stride: int, v: f32s, v_stride: int, scale: f32s, a: f32s, u: f32s,
    q: f32s, end_a: f32s, end_b: f32s, end_q: f32s, end_u: f32s, alphas_1: f32s, betas: f32s, gammas: f32s,
    deltas_1: f32s, rows: int, curvature: float, new: f32s, new_stride: int, new_a: f32s, sums: f32s,
):  # fmt: skip
    """``Collapsed.arrived`` (fastebm/targets/collapsed.py) in one pass: new = alpha base + scale beta v, and
    new_a = alpha a + end_a.

    base, v, new: (n, dim) float32, rows base_stride, v_stride and new_stride apart. scale: (dim,). a to end_u, new_a:
    (n, width) as named there. alphas_1 to deltas_1: (rows,); rows is 1 or n. sums: (5, n), gets of_a, of_b, vv, vy, and
    the largest magnitude of new and new_a (``larger``).
    """
    for i in range(n):
        row = i if rows > 1 else 0
        alpha_1, beta, gamma, delta_1 = alphas_1[row], betas[row], gammas[row], deltas_1[row]
        y, w, to, at = i * base_stride, i * v_stride, i * new_stride, i * width
        largest = int32(0)
        for j in range(dim):
            x = base[y + j] + (alpha_1 * base[y + j] + beta * scale[j] * v[w + j])
            new[to + j] = x
            largest = larger(largest, x)
        for j in range(at, at + width):
            x = end_a[j] + (a[j] + alpha_1 * a[j])
            new_a[j] = x
            largest = larger(largest, x)
        of_a = vv = vy = _ZERO
        if curvature != _ZERO:
            of_a = along(end_a, end_u, u, q, at, width, alpha_1, beta)
            vv, vy = dot(v, w, v, w, dim), dot(v, w, base, y, dim) + dot(q, at, a, at, width)
        of_b = along(end_b, end_q, q, u, at, width, delta_1, gamma)
        sums[i], sums[n + i], sums[2 * n + i], sums[3 * n + i] = of_a, of_b, vv, vy
        sums[4 * n + i] = float_of(largest)


_KERNELS = {"move": move, "leap": leap, "arrive": arrive}


def compiled(name: str):
    return jit.compiled(_KERNELS[name])
