"""The closed-form gradient of an MLP energy in plain PyTorch, on a tile of states.

The bits of a chain do not depend on the batch. A matrix product may round a row differently for another number of rows
or threads. So every product has the same small number of rows on one thread, or was tested to round the same way. The
last tile is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..threads import threads
from .description import Description
from .mlp import MLP

__all__ = [
    "NARROW",
    "ClosedForm",
    "Evaluator",
    "Network",
    "matrix",
    "padded_rows",
    "product",
    "repeated_labels",
    "rounds_alike",
    "rows_of_products",
]

# Rows of one matrix product on a CPU. Calls with fewer chains are padded to this.
PRODUCT_ROWS = 64

# Rows of one matrix product on any other device, where a launch costs more than padding.
DEVICE_ROWS = 4096

# Up to this many dims, the product of the backward pass that ends at the dims is slow on a CPU (five times slower at 2)
# unless the first weight is stored transposed. Above this, transposing takes time and gains nothing.
NARROW = 16


def rows_of_products(device: torch.device) -> int:
    """The fixed number of rows of a product on this device."""
    return PRODUCT_ROWS if device.type == "cpu" else DEVICE_ROWS


def matrix(n_rows: int, width: int, like: Tensor) -> Tensor:
    """An uninitialised (n_rows, width) matrix whose rows are 16-byte aligned.

    MKL treats the start of an unaligned row separately, so its sums would round differently by position in the tile.
    The stride is therefore a multiple of 4. (Widths up to 4 showed no such effect.)
    """
    return like.new_empty(n_rows, _stride(width))[:, :width]


def _stride(width: int) -> int:
    return width if width <= 4 else -(-width // 4) * 4


@cache
def rounds_alike(
    multiply: Callable[[Tensor, Tensor, Tensor], object], n_in: int, n_out: int, transposed: bool, few: int, many: int,
    dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Whether one product of many rows has the same bits as products of few rows each, on one thread.

    The large product is faster. Libraries do not guarantee equal bits, so each shape is tested once on this machine.

    multiply: writes the product of its first two arguments to the third, (rows, n_out). transposed: w, (n_in, n_out),
    has contiguous columns.
    """
    if few == many:
        return True
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n_out, n_in, dtype=dtype, device="cpu", generator=generator).t()
    w = w if transposed else w.contiguous()
    a, whole, parts = (matrix(many, width, w) for width in (n_in, n_out, n_out))
    a.copy_(torch.randn(many, n_in, dtype=dtype, device="cpu", generator=generator))
    with threads(1):
        multiply(a, w, whole)
        for i in range(0, many, few):
            multiply(a[i : i + few], w, parts[i : i + few])
    return torch.equal(whole, parts)


def _mm(a: Tensor, w: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, w, out=out)


def product(a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ w (+ bias) (+ out), with the bits of products of a fixed number of rows.

    len(a) must be a multiple of ``rows_of_products``. On a CPU, call it with PyTorch set to one thread.
    """
    few = rows_of_products(a.device)
    if a.device.type != "cpu" or rounds_alike(_mm, *w.shape, w.stride(0) == 1, few, len(a), a.dtype):
        return _multiply(a, w, bias, out, add)
    for i in range(0, len(a), few):
        _multiply(a[i : i + few], w, bias, out[i : i + few], add)
    return out


def _multiply(a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> Tensor:
    if add:
        return out.addmm_(a, w)
    return torch.mm(a, w, out=out) if bias is None else torch.addmm(bias, a, w, out=out)


class Network:
    """One MLP of the energy's sum: forward and backward on a tile, with its buffers.

    first: the buffers z and h of the first layer, (n_rows, width) each. None: new ones.
    """

    def __init__(self, mlp: MLP, scale: Tensor, n_rows: int, first: tuple[Tensor, Tensor] | None = None) -> None:
        self.mlp, self.scale = mlp, scale
        weight = mlp.weights[0]
        self.down = weight.t().contiguous().t() if mlp.dim <= NARROW else weight
        self.z = [matrix(n_rows, width, weight) for width in mlp.widths]
        self.h = [matrix(n_rows, width, weight) for width in mlp.widths]  # activations, then gradients
        if first is not None:
            self.z[0], self.h[0] = first
        self.top = None if mlp.head == "scalar" else matrix(n_rows, len(mlp.weights[-1]), weight)

    def forward(self, x: Tensor) -> Tensor:
        """The activation of the last hidden layer."""
        product(x, self.mlp.weights[0].t(), self.mlp.biases[0], self.z[0])
        return self.rise()

    def rise(self) -> Tensor:
        """``forward``, from the first layer's preactivations in z[0]."""
        below = self.mlp.activations[0].forward(self.z[0], self.h[0])
        for i, activation in enumerate(self.mlp.activations[1:], start=1):
            product(below, self.mlp.weights[i].t(), self.mlp.biases[i], self.z[i])
            below = activation.forward(self.z[i], self.h[i])
        return below

    def backward(self, last: Tensor, labels: Tensor | None, out: Tensor, *, add: bool) -> None:
        """out (+)= dE_k/dx, after ``forward``."""
        product(self.slopes(last, labels), self.down, None, out, add=add)

    def slopes(self, last: Tensor, labels: Tensor | None) -> Tensor:
        """dE_k/dz of the first layer, after ``forward``. Each layer's gradient overwrites its activation."""
        weight = self.mlp.weights[-1]
        if self.top is None:
            above = weight.expand_as(self.z[-1])
        elif self.mlp.head == "class":
            above = weight[labels]
        else:
            torch.softmax(self._logits(last, self.top), dim=1, out=self.top)
            above = product(self.top.mul_(-self.scale), weight, None, self.h[-1])
        for i in reversed(range(1, len(self.z))):
            self.mlp.activations[i].backward(above, self.z[i], self.h[i])
            above = product(self.h[i], self.mlp.weights[i], None, self.h[i - 1])
        self.mlp.activations[0].backward(above, self.z[0], self.h[0])
        return self.h[0]

    def energy(self, last: Tensor, labels: Tensor | None) -> Tensor:
        """w_k E_k(x), (rows,), after ``forward``."""
        if self.top is None:
            return self._logits(last, matrix(len(last), 1, last))[:, 0]
        logits = self._logits(last, self.top)
        if self.mlp.head == "class":
            return logits.gather(1, labels[:, None])[:, 0]  # type: ignore[index]
        return torch.logsumexp(logits, dim=1) * -self.scale

    def _logits(self, last: Tensor, out: Tensor) -> Tensor:
        return product(last, self.mlp.weights[-1].t(), self.mlp.biases[-1], out)


class Evaluator:
    """Energy and gradient of a description in closed form, on tiles of n_rows states. It owns its buffers.

    The results of a state do not depend on the other states. n_rows: a multiple of ``rows_of_products``. mlps: the
    description's ``scaled_heads``, if already computed.
    """

    def __init__(self, description: Description, n_rows: int, mlps: Sequence[MLP] | None = None) -> None:
        assert description.scales is not None  # only a bare description has none
        assert description.constant is not None
        self.description, self.constant = description, description.constant
        mlps = description.scaled_heads() if mlps is None else mlps
        self.networks = [Network(mlp, scale, n_rows) for mlp, scale in zip(mlps, description.scales, strict=True)]

    def gradient(self, x: Tensor, labels: Tensor | None, out: Tensor) -> Tensor:
        """out = dE/dx, (n_rows, dim)."""
        for k, network in enumerate(self.networks):
            network.backward(network.forward(x), labels, out, add=k > 0)
        return self._add_terms(x, out)

    def energy(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """E(x), (n_rows,)."""
        values = [network.energy(network.forward(x), labels) for network in self.networks]
        return self._energy(x, values)

    def energy_and_gradient(self, x: Tensor, labels: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
        """E(x), and out = dE/dx, from one forward pass."""
        values = []
        for k, network in enumerate(self.networks):
            last = network.forward(x)
            values.append(network.energy(last, labels))
            network.backward(last, labels, out, add=k > 0)
        return self._energy(x, values), self._add_terms(x, out)

    def _add_terms(self, x: Tensor, out: Tensor) -> Tensor:
        d = self.description
        if d.curvature is not None and d.mean is not None:
            out.addcmul_(x - d.mean, d.curvature)
        if d.linear is not None:
            out.add_(d.linear)
        return out

    def _energy(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        value = sum(values, self.constant)
        d = self.description
        if d.curvature is not None and d.mean is not None:
            value = value + ((x - d.mean).square_() * d.curvature).sum(dim=1) / 2
        if d.linear is not None:
            value = value + (x * d.linear).sum(dim=1)
        return value


class ClosedForm:
    """A ``Target`` (base.py) for an MLP energy and at most one tile of chains.

    labels: (n,) int64, one per chain, or None.
    """

    def __init__(self, description: Description, n_chains: int, labels: Tensor | None) -> None:
        like = description.mlps[0].weights[0]
        few = rows_of_products(like.device)
        self.n_rows = -(-n_chains // few) * few
        self.evaluator = Evaluator(description, self.n_rows)
        self._built_from = description, n_chains, labels
        self.labels = None if labels is None else padded_rows(labels, self.n_rows)
        # Padding rows are 0, so they stay finite; their results are not used.
        self.x = matrix(self.n_rows, description.dim, like).zero_()

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self.evaluator.energy(self._padded(x), self.labels)[: len(x)]

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        return self.evaluator.gradient(self._padded(x), self.labels, self._out(x))[: len(x)]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx."""
        value, gradient = self.evaluator.energy_and_gradient(self._padded(x), self.labels, self._out(x))
        return value[: len(x)], gradient[: len(x)]

    def repeated(self, k: int) -> ClosedForm:
        """The energy of k copies of each chain."""
        description, n_chains, labels = self._built_from
        return ClosedForm(description, k * n_chains, repeated_labels(labels, k))

    def _padded(self, x: Tensor) -> Tensor:
        if len(x) == self.n_rows and x.stride() == self.x.stride():
            return x  # as it is
        self.x[: len(x)] = x
        return self.x

    def _out(self, x: Tensor) -> Tensor:
        return matrix(self.n_rows, x.shape[1], x)


def repeated_labels(labels: Tensor | None, k: int) -> Tensor | None:
    """The labels of k copies of each chain."""
    return None if labels is None else labels.repeat_interleave(k)


def padded_rows(v: Tensor, n_rows: int) -> Tensor:
    """Repeat the last row up to n_rows. A 2-d tensor with one row broadcasts over chains and is returned as it is."""
    if len(v) == n_rows or (v.ndim == 2 and len(v) == 1):
        return v
    return torch.cat([v, v[-1:].expand(n_rows - len(v), *v.shape[1:])])
