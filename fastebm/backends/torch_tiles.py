"""The fast pure-PyTorch path for MLP energies: closed-form gradient, all K steps of a tile before the next.

A tile's buffers fit in cache and are reused, so extra memory is O(threads x tile), not O(chains x width).
Tiles run on Python threads, one PyTorch thread each: an operation on a tile is too small to split further.

Bits do not depend on the batch: a matrix product may round a row differently for another number of rows, so
every product has the same number of rows (the last tile is padded), whatever the number of chains.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..langevin import Langevin
from ..mlp import MLP
from ..noise import Stream, normal
from . import Advanced

__all__ = ["advance"]

# Rows of one matrix product on a CPU. 64 costs at most 15% of the rate of 256 on a Zen 4 core, and a call with
# few chains is padded to no more than 64.
_PRODUCT_ROWS = 64

# Rows of one tile on a CPU, a multiple of the above: large enough for PyTorch's cost per operation to be small,
# small enough for the buffers to stay in a core's cache.
_TILE_ROWS = 256

# Philox blocks drawn ahead for a tile: what noise.py works on at once.
_NOISE_BLOCKS = 32768

# Rows of both on any other device, where a launch costs more than the padding.
_DEVICE_ROWS = 4096


def advance(
    mlp: MLP, x: Tensor, rule: Langevin, steps: int, *, seed: int, chains: Tensor, first_steps: Tensor
) -> Advanced:
    """x: (n_chains, dim), moved in place; chains, first_steps: (n_chains,) int64."""
    n_chains = len(x)
    a, b = (c.expand(-1, steps) for c in rule.coefficients(n_chains, steps, dtype=x.dtype, device=x.device))
    energy = torch.empty(n_chains, dtype=x.dtype, device=x.device)
    first_bad = torch.full((n_chains,), -1, dtype=torch.int32, device=x.device)

    on_cpu = x.device.type == "cpu"
    product_rows, tile_rows = (_PRODUCT_ROWS, _TILE_ROWS) if on_cpu else (_DEVICE_ROWS, _DEVICE_ROWS)

    def run(rows: slice) -> None:
        tile = _Tile(mlp, rule, rows.stop - rows.start, product_rows)
        a_rows, b_rows = (c[rows] if len(c) > 1 else c for c in (a, b))
        tile.advance(x[rows], a_rows, b_rows, seed, chains[rows], first_steps[rows], energy[rows], first_bad[rows])

    n_threads = torch.get_num_threads() if on_cpu else 1
    # Few chains are shared out evenly among the threads; bits depend on product_rows alone.
    share = -(-n_chains // (n_threads * product_rows)) * product_rows
    tile_rows = max(product_rows, min(tile_rows, share))
    tiles = [slice(i, min(i + tile_rows, n_chains)) for i in range(0, n_chains, tile_rows)]
    _run_on_threads(run, tiles, min(n_threads, len(tiles)))
    return Advanced(x, energy, first_bad)


def _run_on_threads(run: Callable[[slice], None], tiles: list[slice], n_threads: int) -> None:
    """Every tile once, on Python threads that use one PyTorch thread each (so that products round alike)."""

    def task(rows: slice) -> None:
        with torch.inference_mode():  # of this thread only
            run(rows)

    before = torch.get_num_threads()
    try:
        if n_threads <= 1:
            torch.set_num_threads(1)
            for rows in tiles:
                task(rows)
        else:
            with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(task, tiles))
    finally:
        # The setting is a thread's own in OpenMP builds of PyTorch, and the process' in others.
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


class _Tile:
    """The buffers of one tile, and the steps on them."""

    def __init__(self, mlp: MLP, rule: Langevin, n_chains: int, product_rows: int) -> None:
        n_rows = -(-n_chains // product_rows) * product_rows
        dtype, device = mlp.weights[0].dtype, mlp.weights[0].device

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.mlp, self.rule, self.n_rows, self.product_rows = mlp, rule, n_rows, product_rows

        def matrix(width: int) -> Tensor:
            # MKL peels the start of a row that is not 16-byte aligned, and the row's sums then round by its place
            # in the tile: rows of odd widths get a stride of their own. (No width up to 4 was seen to need it.)
            return buffer(n_rows, width if width <= 4 else -(-width // 4) * 4)[:, :width]

        self.z = [matrix(width) for width in mlp.widths]
        self.h = [matrix(width) for width in mlp.widths]  # activations going up, gradients coming down
        self.x, self.moved, self.grad = (matrix(mlp.dim) for _ in range(3))
        # With small dims the noise of several steps is drawn at once, so that its many small operations pay.
        n_blocks = (mlp.dim + 3) // 4
        self.noise_steps = max(1, _NOISE_BLOCKS // (n_rows * n_blocks))
        self.noise = buffer(self.noise_steps * n_chains, n_blocks, 4)

    def product(self, a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """out = a @ w (+ bias), in products of a fixed number of rows."""
        for i in range(0, self.n_rows, self.product_rows):
            rows, part = a[i : i + self.product_rows], out[i : i + self.product_rows]
            if bias is None:
                torch.mm(rows, w, out=part)
            else:
                torch.addmm(bias, rows, w, out=part)
        return out

    def forward(self) -> None:
        """z and h of every hidden layer, at self.x."""
        below = self.x
        for i, activation in enumerate(self.mlp.activations):
            self.product(below, self.mlp.weights[i].t(), self.mlp.biases[i], self.z[i])
            below = activation.forward(self.z[i], self.h[i])

    def gradient(self) -> Tensor:
        """dE/dx at self.x, in self.grad. Each layer's gradient overwrites its activation, which is spent."""
        self.forward()
        above = self.mlp.weights[-1].expand_as(self.z[-1])
        for i in reversed(range(len(self.z))):
            self.mlp.activations[i].backward(above, self.z[i], self.h[i])
            below = self.grad if i == 0 else self.h[i - 1]
            self.product(self.h[i], self.mlp.weights[i], None, below)
            above = below
        return self.grad

    def energy(self) -> Tensor:
        self.forward()
        out = self.h[-1].new_empty(self.n_rows, 1)
        return self.product(self.h[-1], self.mlp.weights[-1].t(), self.mlp.biases[-1], out)

    def advance(
        self, x: Tensor, a: Tensor, b: Tensor, seed: int, chains: Tensor, first_steps: Tensor, energy: Tensor,
        first_bad: Tensor,
    ) -> None:  # fmt: skip
        """All steps of one tile; x, energy and first_bad are written."""
        n, dim = x.shape
        steps = a.shape[1]
        self.x.copy_(_padded(x, self.n_rows))
        bad_at = first_bad.new_full((self.n_rows,), -1)
        frozen = bad_at >= 0
        any_frozen = False
        for t in range(steps):
            i = t % self.noise_steps
            if i == 0:
                ahead = torch.arange(t, min(t + self.noise_steps, steps), device=x.device)[:, None]
                noise = self.noise[: len(ahead) * n]
                rows = chains.expand(len(ahead), n).reshape(-1)
                normal(seed, Stream.LANGEVIN, rows, (first_steps + ahead).reshape(-1), dim, dtype=x.dtype, out=noise)
            grad = self.gradient()
            if self.rule.grad_clip is not None:
                grad.clamp_(-self.rule.grad_clip, self.rule.grad_clip)
            _add_product(self.x, grad, _padded(a[:, t, None], self.n_rows), -1.0, out=self.moved)
            moved = self.moved[:n]  # padding needs no noise
            _add_product(moved, noise[i * n : (i + 1) * n].flatten(1)[:, :dim], b[:, t, None], 1.0, out=moved)
            # A sum is finite only if all its terms are: one cheap pass clears the tile, and what it can't
            # clear (a sum may overflow by itself) goes to the exact test.
            if any_frozen or not bool(self.moved.sum().isfinite()):
                bad_at[~self.moved.isfinite().all(dim=1) & ~frozen] = t
                frozen = bad_at >= 0
                any_frozen = bool(frozen.any())
            if self.rule.clamp is not None:
                self.moved.clamp_(*self.rule.clamp)
            if any_frozen:
                self.moved[frozen] = self.x[frozen]
            self.x, self.moved = self.moved, self.x
        x.copy_(self.x[:n])
        energy.copy_(self.energy()[:n, 0])
        first_bad.copy_(bad_at[:n])


def _add_product(x: Tensor, v: Tensor, c: Tensor, sign: float, *, out: Tensor) -> None:
    """out = x + sign c v, for c (n, 1) or (1, 1): a number is faster than a broadcast tensor."""
    if len(c) == 1 and len(x) > 1:
        torch.add(x, v, alpha=sign * c.item(), out=out)
    else:
        torch.addcmul(x, v, c, value=sign, out=out)


def _padded(v: Tensor, n_rows: int) -> Tensor:
    """Rows repeated up to n_rows; a single row (of coefficients that all chains share) is left to broadcast."""
    if len(v) == n_rows or (v.ndim == 2 and len(v) == 1):
        return v
    return torch.cat([v, v[-1:].expand(n_rows - len(v), *v.shape[1:])])
