"""The calls of an MLP's gradient on a CPU: matrix products, and Numba kernels for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import cpu as kernels
from ..kernels.cpu import Call
from ..targets.closed_form import NARROW, Network
from ..targets.description import Description
from ..targets.mlp import MLP
from .blas import matrix_product

__all__ = ["FEW_DIMS", "NetworkCalls", "Program", "Weights", "weights_of"]

# Up to this many dims, the activation loops compute the products with the first weight, for which BLAS is slow.
FEW_DIMS = 4

# Arguments of ``mlp.energy`` for an energy without a quadratic and a linear term.
_NO_TERMS = (None, 0, 0, None, None, 0, None, 0)


class Weights:
    """The weights of one MLP of the energy's sum, in the layouts that the kernels read. Shared by all tiles."""

    def __init__(self, mlp: MLP, scale: float, operand: torch.dtype) -> None:
        self.mlp, self.scale = mlp, scale
        self.few = mlp.dim if mlp.dim <= FEW_DIMS else 0
        first = mlp.weights[0]
        self.first = first.t().contiguous() if mlp.dim <= NARROW else None  # (dim, width)
        self.down = [w.contiguous().to(operand) for w in mlp.weights]
        self.up = [w.t() for w in self.down]
        if self.first is not None:
            self.down[0] = self.first.to(operand).t()
        self.biases = [
            first.new_zeros(len(w)) if bias is None else bias.contiguous()
            for w, bias in zip(mlp.weights, mlp.biases, strict=True)
        ]
        # Factors of the slopes of each layer: 1, and the head's weights for the last layer.
        self.heads = [first.new_ones(1, width) for width in mlp.widths]
        if mlp.head != "logsumexp":
            self.heads[-1] = mlp.weights[-1].contiguous()


def weights_of(description: Description, precision: str) -> list[Weights]:
    """The weights of all MLPs. precision: "ieee", or "bf16" for bf16 operands."""
    assert description.scales is not None  # only a bare description has none
    operand = torch.bfloat16 if precision == "bf16" else torch.float32
    return [
        Weights(mlp, float(scale), operand)
        for mlp, scale in zip(description.scaled_heads(), description.scales, strict=True)
    ]


class NetworkCalls:
    """The calls of one MLP's gradient on a tile. ``evaluated`` owns the buffers and computes the energy.

    z: the layers' preactivations, overwritten by the slopes. h: activations, overwritten by gradients.
    """

    def __init__(self, weights: Weights, evaluated: Network, labels: Tensor | None) -> None:
        self.weights, self.n_rows = weights, len(evaluated.z[0])
        self.labels = labels if weights.mlp.head == "class" else None
        self.z, self.h, self.logits = evaluated.z, evaluated.h, evaluated.top

    def gradients(self, states: Sequence[Tensor], out: Tensor, *, add: bool) -> list[list[Callable[[], object]]]:
        """For each tensor x in ``states``, the calls that compute out (+)= dE_k/dx."""
        rest = self._rest() + self._down(out, add)
        return [[*self._up(0, x), *rest] for x in states]

    def slopes(self, u: Tensor) -> tuple[list[list[Callable[[], object]]], Tensor]:
        """The calls that compute dE_k/dz of the first layer, and where they put it: calls that find its product with x
        in z[0], and calls that find it in u."""
        where = self.z[0] if len(self.z) == 1 and self.weights.mlp.head != "logsumexp" else self.h[0]
        rest = self._rest() + self._down(None, False)
        (first,) = self._up(0, None)
        assert isinstance(first, Call)  # no product comes before it
        return [[call, *rest] for call in (first, first.again(x=u, x_stride=u.stride(0), few=-1))], where

    def energy(self, out: Tensor, add: bool, terms: Sequence[Any] = _NO_TERMS) -> Call:
        """The call that computes out (+)= w_k E_k plus the terms, (n_rows,), after a gradient.

        It reads the activations of the last layer, which the gradient of a logsumexp overwrites.
        """
        w, h, labels = self.weights, self.h[-1], self.labels
        layer = h, self.n_rows, h.shape[1], h.stride(0), w.heads[-1], w.biases[-1], labels, int(labels is not None)
        return kernels.load("mlp.energy").prepared(out, *layer, int(add), *terms)

    def _rest(self) -> list[Callable[[], object]]:
        return [call for i in range(1, len(self.z)) for call in self._up(i, self.h[i - 1])]

    def _up(self, i: int, below: Tensor | None) -> list[Callable[[], object]]:
        """The calls of the forward pass of layer i from its input ``below``. None: its product is in z[i] already."""
        w, activation, z = self.weights, self.weights.mlp.activations[i], self.z[i]
        few = w.few if i == 0 and below is not None else 0
        labels = self.labels if i == len(self.z) - 1 else None
        layer = [z, self.h[i], self.n_rows, z.shape[1], z.stride(0), w.biases[i], activation.parameter, w.heads[i]]
        up = kernels.load(f"mlp.up_{activation.name}")
        stride = 0 if below is None else below.stride(0)
        call = up.prepared(*layer, labels, int(labels is not None), below, stride, few, w.first)
        return [call] if below is None or few > 0 else [*matrix_product(below, w.up[i], z), call]

    def _down(self, out: Tensor | None, add: bool) -> list[Callable[[], object]]:
        """The calls of the backward pass from the head to ``out``. None: to the first layer."""
        w, n = self.weights, self.n_rows
        above, slope = self.z[-1], None
        calls: list[Callable[[], object]] = []
        if w.mlp.head == "logsumexp":
            assert self.logits is not None
            shape = n, self.logits.shape[1], self.logits.stride(0)
            calls += matrix_product(self.h[-1], w.up[-1], self.logits)
            calls.append(kernels.load("mlp.softmax").prepared(self.logits, *shape, w.biases[-1], -w.scale))
            calls += matrix_product(self.logits, w.down[-1], self.h[-1])
            above, slope = self.h[-1], self.z[-1]
        for i in reversed(range(len(self.z))):
            few = w.few if i == 0 and out is not None else 0
            if slope is not None or few > 0:
                shape = n, above.shape[1], above.stride(0)
                out_stride = 0 if out is None else out.stride(0)
                slopes, dims = (slope, int(slope is not None)), (out, out_stride, few, w.first, int(add))
                calls.append(kernels.load("mlp.down").prepared(above, *slopes, *shape, *dims))
            if i > 0:
                calls += matrix_product(above, w.down[i], self.h[i - 1])
                above, slope = self.h[i - 1], self.z[i - 1]
            elif out is not None and few == 0:
                calls += matrix_product(above, w.down[0], out, add=add)
        return calls


class Program:
    """A loop over steps, each a list of calls: even steps go from x to new, odd ones back. t: (1,) int64, the step."""

    def __init__(self, even: Sequence[Callable[[], object]], odd: Sequence[Callable[[], object]], t: Tensor) -> None:
        self.steps, self.t = (even, odd), t
        self.lists: list[Any] = []
        for calls in self.steps:
            self.lists.append(kernels.listed([call for call in calls if isinstance(call, Call)]))
        self.compiled = all(len(pairs) == 2 * len(calls) for pairs, calls in zip(self.lists, self.steps, strict=True))

    def run(self, first: int, last: int) -> None:
        if self.compiled:
            kernels.load("program.run")(*self.lists, len(self.steps[0]), self.t, first, last)
            return
        for t in range(first, last):  # some calls are PyTorch products, not kernels
            self.t.fill_(t)
            for call in self.steps[t % 2]:
                call()
