"""The layers of an MLP around the library's products: up through the activations, and down with their slopes."""

from __future__ import annotations

from numpy import float32

from . import jit
from .activations import ACTIVATIONS, exp
from .jit import device, dot, f32s, i64s

_ZERO, _HALF = float32(0.0), float32(0.5)


def _up(activation):
    def up(
        z: f32s, h: f32s, n: int, width: int, stride: int, bias: f32s, parameter: float, head: f32s, labels: i64s,
        has_labels: int, x: f32s, x_stride: int, few: int, w: f32s,
    ):  # fmt: skip
        """h = act(z + bias), and z = act'(z + bias) times the head's row for the chain's label (the first if none).

        z, h: (n, stride) float32 of width columns. head: (classes or 1, width), the head's weights if this is the last
        hidden layer, else ones. few: 0, or the number of dims if this call is to compute z = x w first, from
        x (n, x_stride) and w (few, width). -1: z = x first.
        """
        for i in range(n):
            at = i * stride
            if few > 0:
                v = x[i * x_stride]
                for j in range(width):
                    z[at + j] = v * w[j]
                for d in range(1, few):
                    v = x[i * x_stride + d]
                    for j in range(width):
                        z[at + j] += v * w[d * width + j]
            elif few < 0:
                for j in range(width):
                    z[at + j] = x[i * x_stride + j]
            row = labels[i] * width if has_labels != 0 else 0
            for j in range(width):
                value, slope = activation(z[at + j] + bias[j], parameter)
                h[at + j] = value
                z[at + j] = slope * head[row + j]

    return up


def down(
    grad: f32s, slope: f32s, has_slope: int, n: int, width: int, stride: int, out: f32s, out_stride: int, few: int,
    w: f32s, add: int,
):  # fmt: skip
    """grad *= slope, both (n, stride) float32 of width columns.

    If few > 0, also out = grad w^T, or out += with add, for out (n, out_stride) and w (few, width).
    """
    for i in range(n):
        at = i * stride
        if has_slope != 0:
            for j in range(width):
                grad[at + j] *= slope[at + j]
        for d in range(few):
            to, row = i * out_stride + d, d * width
            total = dot(grad, at, w, row, width)
            out[to] = out[to] + total if add != 0 else total


def softmax(z: f32s, n: int, width: int, stride: int, bias: f32s, scale: float):
    """z = scale softmax(z + bias), (n, stride) float32 of width columns."""
    for i in range(n):
        at = i * stride
        largest = z[at] + bias[0]
        for j in range(width):
            v = z[at + j] + bias[j]
            z[at + j] = v
            largest = v if v > largest else largest
        total = _ZERO
        for j in range(width):
            v = exp(z[at + j] - largest)
            z[at + j] = v
            total += v
        share = scale / total
        for j in range(width):
            z[at + j] *= share


def quadratic(
    grad: f32s, x: f32s, n: int, dim: int, stride: int, curvature: f32s, mean: f32s, has_curvature: int, linear: f32s,
    has_linear: int,
):  # fmt: skip
    """grad += curvature (x - mean) + linear: (n, stride) float32 of dim columns, and (dim,)."""
    for i in range(n):
        at = i * stride
        if has_curvature != 0:
            for j in range(dim):
                grad[at + j] += curvature[j] * (x[at + j] - mean[j])
        if has_linear != 0:
            for j in range(dim):
                grad[at + j] += linear[j]


def _squares(c, x, at, m, n):  # type: ignore[no-untyped-def]
    """Sum of c[j] (x[at + j] - m[j])^2 over j < n."""
    total = _ZERO
    for j in range(n):
        total += c[j] * ((x[at + j] - m[j]) * (x[at + j] - m[j]))
    return total


squares = device(_squares, reorder=True)


def energy(
    out: f32s, h: f32s, n: int, width: int, stride: int, head: f32s, bias: f32s, labels: i64s, has_labels: int,
    add: int, x: f32s, dim: int, x_stride: int, curvature: f32s, mean: f32s, has_curvature: int, linear: f32s,
    has_linear: int,
):  # fmt: skip
    """out = h head^T + bias for the chain's label (the first if none), or out += with add; plus the terms of which
    ``quadratic`` adds the gradient, curvature (x - mean)^2 / 2 + linear x. out: (n,).

    h: (n, stride) float32 of width columns, the activations of the last layer. head: (classes or 1, width). bias:
    (classes or 1,). x: (n, x_stride) of dim columns. In BLAS, a product with one column takes ten times as long where
    h is not in the cache.
    """
    for i in range(n):
        label = labels[i] if has_labels != 0 else 0
        total = dot(h, i * stride, head, label * width, width) + bias[label]
        if has_curvature != 0:
            total += _HALF * squares(curvature, x, i * x_stride, mean, dim)
        if has_linear != 0:
            total += dot(x, i * x_stride, linear, 0, dim)
        out[i] = out[i] + total if add != 0 else total


_KERNELS = {
    "down": down, "softmax": softmax, "quadratic": quadratic, "energy": energy,
    **{f"up_{name}": _up(activation) for name, activation in ACTIVATIONS.items()},
}  # fmt: skip


def compiled(name: str):
    return jit.compiled(_KERNELS[name])
