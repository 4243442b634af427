"""The closed-form gradient of an MLP energy in plain PyTorch, on tiles of chains, all K steps of one before the next.

It runs where Numba's kernels (cpu.py) do not: in float64, without Numba, and on devices without kernels. Extra memory
is O(tile), not O(chains x width).

Bits do not depend on the batch: a matrix product may round a row differently for another number of rows or threads, so
every product has, or rounds like one that has, the same few rows on one thread (the last tile is padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..rng import Stream, normals_of_steps
from ..samplers.langevin import Langevin
from ..targets.description import Description
from ..targets.mlp import MLP
from ..threads import share, threads
from . import Advanced, Chains, Telemetry

__all__ = [
    "Evaluator",
    "Network",
    "advance",
    "matrix",
    "padded_rows",
    "product",
    "rounds_alike",
    "rows_of",
    "rows_of_products",
    "tiles",
]

# Rows of one matrix product on a CPU: a call with few chains is padded to no more than this.
_PRODUCT_ROWS = 64

# Rows of one tile on a CPU: large enough for PyTorch's cost per operation to be small, small enough for the buffers to
# stay in cache. A power of two times the above.
_TILE_ROWS = 512

# Up to as many dims, a CPU's library is slow on the way down to them (fivefold at 2) unless the first weight is laid
# out transposed. Beyond them that gains nothing, and takes long.
NARROW = 16

# What a tile costs beside its rows, in rows.
_TILE_COST = 16

# Rows of both on any other device, where a launch costs more than the padding.
_DEVICE_ROWS = 4096


def advance(
    description: Description, chains: Chains, rule: Langevin, steps: int, *, thin: int = 0, telemetry: bool = False
) -> Advanced:
    """chains.x is moved in place."""
    x = chains.x
    n_chains = len(x)
    a, b = (c.expand(-1, steps) for c in rule.coefficients(n_chains, steps, dtype=x.dtype, device=x.device))
    done = Advanced.blank(x, steps, thin, telemetry)

    def move(rows: slice, interrupted: Callable[[], bool]) -> None:
        with torch.inference_mode():
            a_rows, b_rows = (c[rows] if len(c) > 1 else c for c in (a, b))
            tile = _Tile(description, rule, rows.stop - rows.start, rows_of_products(x.device))
            tile.advance(chains.rows(rows), a_rows, b_rows, thin, rows_of(done, rows), interrupted)

    if x.device.type == "cpu":
        n_threads = torch.get_num_threads()
        share(tiles(n_chains, n_threads), move, n_threads)
    else:
        for first in range(0, n_chains, _DEVICE_ROWS):
            move(slice(first, min(first + _DEVICE_ROWS, n_chains)), lambda: False)
    return done


def tiles(n_chains: int, n_threads: int) -> list[slice]:
    """Rows of a CPU's tiles: of the powers of two times a product's rows, the size with which all threads are done
    first."""
    sizes, size = [], _TILE_ROWS
    while size >= _PRODUCT_ROWS:
        sizes.append(size)
        size //= 2
    size = min(sizes, key=lambda size: -(-n_chains // (size * n_threads)) * (min(size, n_chains) + _TILE_COST))
    return [slice(first, min(first + size, n_chains)) for first in range(0, n_chains, size)]


def rows_of_products(device: torch.device) -> int:
    """The one number of rows that every product has on a device."""
    return _PRODUCT_ROWS if device.type == "cpu" else _DEVICE_ROWS


def rows_of(done: Advanced, rows: slice) -> Advanced:
    """Views of some chains' results."""
    return Advanced(
        done.x[rows],
        done.energy[rows],
        done.first_bad[rows],
        None if done.trajectory is None else done.trajectory[rows],
        None if done.telemetry is None else Telemetry(*(v[rows] for v in done.telemetry)),
    )


def matrix(n_rows: int, width: int, like: Tensor) -> Tensor:
    """(n_rows, width), not initialised.

    MKL peels the start of a row that is not 16-byte aligned, and the row's sums then round by its place in the
    tile: rows of odd widths get a stride of their own. (No width up to 4 was seen to need it.)
    """
    return like.new_empty(n_rows, _stride(width))[:, :width]


def _stride(width: int) -> int:
    return width if width <= 4 else -(-width // 4) * 4


@cache
def rounds_alike(
    multiply: Callable[[Tensor, Tensor, Tensor], object], n_in: int, n_out: int, transposed: bool, few: int, many: int,
    dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Whether a product of many rows has the bits of products of few rows each, here and on one thread: then it is
    taken, being faster. Found out by trying, once for each shape: a library does not promise it.

    multiply: makes its third argument, (rows, n_out), the product of the first two. transposed: of w, (n_in, n_out),
    columns are whole.
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
    """out = a @ w (+ bias) (+ out), in products of a fixed number of rows, or what rounds like them. On a CPU of one
    thread, and rows in a multiple of ``rows_of_products``."""
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
    """One MLP of the sum, on a tile: its buffers, forward and backward."""

    def __init__(self, mlp: MLP, scale: Tensor, n_rows: int) -> None:
        self.mlp, self.scale = mlp, scale
        weight = mlp.weights[0]
        self.down = weight.t().contiguous().t() if mlp.dim <= NARROW else weight
        self.z = [matrix(n_rows, width, weight) for width in mlp.widths]
        self.h = [matrix(n_rows, width, weight) for width in mlp.widths]  # activations going up, gradients coming down
        self.top = None if mlp.head == "scalar" else matrix(n_rows, len(mlp.weights[-1]), weight)

    def forward(self, x: Tensor) -> Tensor:
        """The activation of the last hidden layer."""
        below = x
        for i, activation in enumerate(self.mlp.activations):
            product(below, self.mlp.weights[i].t(), self.mlp.biases[i], self.z[i])
            below = activation.forward(self.z[i], self.h[i])
        return below

    def logits(self, last: Tensor, out: Tensor) -> Tensor:
        return product(last, self.mlp.weights[-1].t(), self.mlp.biases[-1], out)

    def gradient(self, x: Tensor, labels: Tensor | None, out: Tensor, *, add: bool) -> None:
        """out (+)= dE_k/dx. Each layer's gradient overwrites its activation, which is spent."""
        last = self.forward(x)
        weight = self.mlp.weights[-1]
        if self.top is None:
            above = weight.expand_as(self.z[-1])
        elif self.mlp.head == "class":
            above = weight[labels]
        else:
            torch.softmax(self.logits(last, self.top), dim=1, out=self.top)
            above = product(self.top.mul_(-self.scale), weight, None, self.h[-1])
        for i in reversed(range(len(self.z))):
            self.mlp.activations[i].backward(above, self.z[i], self.h[i])
            if i == 0:
                product(self.h[0], self.down, None, out, add=add)
            else:
                above = product(self.h[i], self.mlp.weights[i], None, self.h[i - 1])

    def energy(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """(rows,) w_k E_k(x)."""
        last = self.forward(x)
        if self.top is None:
            return self.logits(last, matrix(len(x), 1, last))[:, 0]
        logits = self.logits(last, self.top)
        if self.mlp.head == "class":
            return logits.gather(1, labels[:, None])[:, 0]  # type: ignore[index]
        return torch.logsumexp(logits, dim=1) * -self.scale


class Evaluator:
    """Energy and gradient of a description in closed form, on tiles of n_rows states, in buffers of its own.

    n_rows: a multiple of ``rows_of_products``. A state's values do not depend on the others. mlps: the description's
    ``scaled_heads``, if they are there already.
    """

    def __init__(self, description: Description, n_rows: int, mlps: Sequence[MLP] | None = None) -> None:
        assert description.scales is not None  # nor is the constant: it is not bare
        assert description.constant is not None
        self.description, self.constant = description, description.constant
        mlps = description.scaled_heads() if mlps is None else mlps
        self.networks = [Network(mlp, scale, n_rows) for mlp, scale in zip(mlps, description.scales, strict=True)]

    def gradient(self, x: Tensor, labels: Tensor | None, out: Tensor) -> Tensor:
        """out = dE/dx, (n_rows, dim)."""
        for k, network in enumerate(self.networks):
            network.gradient(x, labels, out, add=k > 0)
        d = self.description
        if d.curvature is not None and d.mean is not None:
            out.addcmul_(x - d.mean, d.curvature)
        if d.linear is not None:
            out.add_(d.linear)
        return out

    def energy(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """(n_rows,) E(x)."""
        value = sum((network.energy(x, labels) for network in self.networks), self.constant)
        d = self.description
        if d.curvature is not None and d.mean is not None:
            value = value + ((x - d.mean).square_() * d.curvature).sum(dim=1) / 2
        if d.linear is not None:
            value = value + (x * d.linear).sum(dim=1)
        return value


class _Tile:
    """The buffers of one tile, and the steps on them."""

    def __init__(self, description: Description, rule: Langevin, n_chains: int, product_rows: int) -> None:
        self.rule, self.n_rows = rule, -(-n_chains // product_rows) * product_rows
        self.evaluator = Evaluator(description, self.n_rows)
        dim, weight = description.dim, description.mlps[0].weights[0]
        self.x, self.moved, self.grad = (matrix(self.n_rows, dim, weight) for _ in range(3))
        self.bounds = rule.bounds(dim, dtype=weight.dtype, device=weight.device)
        self.noise_bounds = self.bounds if rule.clamp_noise else None

    def advance(
        self, chains: Chains, a: Tensor, b: Tensor, thin: int, done: Advanced, interrupted: Callable[[], bool]
    ) -> None:
        """All steps of one tile; everything in ``done`` is written."""
        n, dim = chains.x.shape
        steps = a.shape[1]
        labels = None if chains.labels is None else padded_rows(chains.labels, self.n_rows)
        frozen = None if chains.frozen is None else padded_rows(chains.frozen, self.n_rows)
        self.x.copy_(padded_rows(chains.x, self.n_rows))
        self.bad_at = done.first_bad.new_full((self.n_rows,), -1)
        self.stopped = self.bad_at >= 0
        self.any_stopped = False
        noises = normals_of_steps(
            int(chains.seed), Stream.LANGEVIN, chains.numbers, chains.first_steps, steps, dim, dtype=self.x.dtype
        )
        for t, noise in enumerate(noises):
            if interrupted():
                return
            moved, b_t = self.moved[:n], b[:, t, None]  # padding needs no noise
            if self.rule.noise_first:
                self.moved[n:] = self.x[n:]
                _add_product(self.x[:n], noise, b_t, 1.0, out=moved)
                self._settle(t, frozen, self.noise_bounds, False)
            grad = self.evaluator.gradient(self.x, labels, self.grad)
            if frozen is not None:
                grad.masked_fill_(frozen, 0.0)
            raw = grad if done.telemetry is None else grad.clone()
            if self.rule.grad_norm_clip is not None:
                grad = self.rule.clip(grad)
            elif self.rule.grad_clip is not None:
                grad.clamp_(-self.rule.grad_clip, self.rule.grad_clip)
            _add_product(self.x, grad, padded_rows(a[:, t, None], self.n_rows), -1.0, out=self.moved)
            if not self.rule.noise_first:
                _add_product(moved, noise, b_t, 1.0, out=moved)
            before = self._settle(t, frozen, self.bounds, done.telemetry is not None)
            if done.telemetry is not None:
                norm, clipped, clamped = done.telemetry
                norm.copy_(raw.square().sum(dim=1).sqrt()[:n])
                clipped += (torch.ne(grad, raw).any(dim=1) & ~self.stopped)[:n]
                clamped += (torch.ne(self.x, before).any(dim=1) & ~self.stopped)[:n]
            if done.trajectory is not None and (t + 1) % thin == 0:
                done.trajectory[:, t // thin] = self.x[:n]
        done.x.copy_(self.x[:n])
        done.energy.copy_(self.evaluator.energy(self.x, labels)[:n])
        done.first_bad.copy_(self.bad_at[:n])
        if done.telemetry is not None:
            done.telemetry.averaged(steps)

    def _settle(self, t: int, frozen: Tensor | None, bounds: tuple[Any, Any] | None, copied: bool) -> Tensor:
        """x becomes moved, where that may be. Returns moved as it was before the clamp, if that is to be copied."""
        if frozen is not None:
            torch.where(frozen, self.x, self.moved, out=self.moved)
        # A sum is finite only if all its terms are: one cheap pass clears the tile, and what it can't clear (a sum may
        # overflow by itself) goes to the exact test.
        if self.any_stopped or not bool(self.moved.sum().isfinite()):
            self.bad_at[~self.moved.isfinite().all(dim=1) & ~self.stopped] = t
            self.stopped = self.bad_at >= 0
            self.any_stopped = bool(self.stopped.any())
        before = self.moved.clone() if copied else self.moved
        if bounds is not None:
            torch.clamp(self.moved, *bounds, out=self.moved)
            if frozen is not None:
                torch.where(frozen, self.x, self.moved, out=self.moved)
        if self.any_stopped:
            self.moved[self.stopped] = self.x[self.stopped]
        self.x, self.moved = self.moved, self.x
        return before


def _add_product(x: Tensor, v: Tensor, c: Tensor, sign: float, *, out: Tensor) -> None:
    """out = x + sign c v, for c (n, 1) or (1, 1): a number is faster than a broadcast tensor."""
    if len(c) == 1 and len(x) > 1:
        torch.add(x, v, alpha=sign * c.item(), out=out)
    else:
        torch.addcmul(x, v, c, value=sign, out=out)


def padded_rows(v: Tensor, n_rows: int) -> Tensor:
    """Rows repeated up to n_rows; a single row (of coefficients that all chains share) is left to broadcast."""
    if len(v) == n_rows or (v.ndim == 2 and len(v) == 1):
        return v
    return torch.cat([v, v[-1:].expand(n_rows - len(v), *v.shape[1:])])
