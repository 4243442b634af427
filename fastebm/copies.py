"""Drawn chains taken out of a pool and put back, on a CPU: by a kernel on all threads, where PyTorch takes some ten
operations, of which ``index_copy_`` alone takes twice as long."""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import Draw
from .kernels import cpu as kernels
from .storage import Storage
from .threads import together

__all__ = ["Copies", "copies_of"]

# Numbers that one thread copies before a second pays for itself; and before it looks whether there are more.
_PER_THREAD, _TOGETHER = 32768, 8192


def copies_of(storage: Storage) -> Copies | None:
    """None where PyTorch is to copy: states that are not float32, or not on a CPU."""
    here = storage.device.type == storage.data.device.type == "cpu" and storage.dtype == torch.float32
    return _copies(storage.dim) if here else None


def _copies(dim: int) -> Copies | None:
    return Copies(dim) if kernels.why_not() is None else None


class Copies:
    """Of float32 states of so many dims. Calls are made ready once, and each use names all their memory."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        size = max(1, _TOGETHER // dim)
        self._taken = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._take = kernels.load("pool.take").prepared(0, dim, size, *[None] * 8)
        self._put = kernels.load("pool.put").prepared(0, dim, size, *[None] * 12)

    def __reduce__(self) -> tuple[object, ...]:
        return _copies, (self._dim,)  # with a pool that is copied or pickled: addresses are of this object

    def take(self, draw: Draw, data: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """States where the chains begin, (n, dim), and their lifetime steps, (n,)."""
        n = draw.rows.shape[0]
        x, before = data.new_empty(n, self._dim), steps.new_empty(n)
        fresh = draw.fresh.contiguous()
        self._run(
            self._take, n, rows=draw.rows, source=draw.source, fresh=fresh, data=data, steps=steps, x=x, before=before
        )
        return x, before

    def put(
        self, draw: Draw, x: Tensor, before: Tensor, after: Tensor, energies: Tensor, data: Tensor, steps: Tensor,
        energy: Tensor, started: Tensor, restarts: Tensor,
    ) -> None:  # fmt: skip
        """The last five are the pool's, and become what they are after the draw."""
        x, energies = x.contiguous(), energies.contiguous()
        self._run(
            self._put, draw.rows.shape[0], rows=draw.rows, source=draw.source, x=x, before=before, after=after,
            energies=energies, data=data, steps=steps, energy=energy, started=started, restarts=restarts,
        )  # fmt: skip

    def _run(self, call: kernels.Call, n: int, **arguments: Tensor) -> None:
        call.aim(n=n, taken=self._taken.zero_(), **arguments)
        together(call, min(torch.get_num_threads(), max(1, n * self._dim // _PER_THREAD)))
