"""Drawn chains copied out of a pool and back, on a CPU: each by one kernel on all threads, where PyTorch takes some ten
operations, of which ``index_copy_`` alone takes twice as long."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..kernels import cpu as kernels
from ..threads import Spares, together
from .draws import Draw
from .storage import Storage

__all__ = ["can_copy", "put", "take"]

# Numbers to copy per thread, below which a second thread does not pay for itself.
_NUMBERS_PER_THREAD = 32768

# Numbers that a thread copies before it looks for more.
_NUMBERS_AT_ONCE = 8192


def can_copy(storage: Storage) -> bool:
    """Whether the kernels can copy its states; PyTorch copies those that are not float32, or not on a CPU."""
    here = storage.device.type == storage.data.device.type == "cpu" and storage.dtype == torch.float32
    return here and kernels.why_not() is None


def take(draw: Draw, data: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """States where the chains begin, (n, dim), and their lifetime steps, (n,)."""
    n, dim = draw.rows.shape[0], data.shape[1]
    x = torch.empty(n, dim, dtype=torch.float32, device="cpu")
    before = torch.empty(n, dtype=torch.int64, device="cpu")
    _prepared("pool.take", dim, draw, data, steps, draw.fresh.contiguous(), x, before)()
    return x, before


def put(
    draw: Draw, x: Tensor, before: Tensor, after: Tensor, energies: Tensor, data: Tensor, steps: Tensor, energy: Tensor,
    started: Tensor, reinits: Tensor,
) -> Callable[[], None]:  # fmt: skip
    """What writes a draw back, when all that can fail is done: the last five are the pool's, and become what they are
    after it."""
    if not x.dtype == energies.dtype == torch.float32:  # they come from outside, all else from the pool
        raise TypeError(f"states and energies must be float32, got {x.dtype} and {energies.dtype}")
    kept = data, steps, energy, started, reinits
    arguments = *kept, x.contiguous(), before, after, energies.contiguous()
    run = _prepared("pool.put", data.shape[1], draw, *arguments)

    def write() -> None:
        run()
        # as PyTorch's own operations do: a graph that still needs the old values must not use the new ones
        increment_version([v for v in kept if not v.is_inference()])

    return write


def _prepared(name: str, dim: int, draw: Draw, *arguments: Tensor) -> Callable[[], None]:
    """A run of the kernel. arguments: in the order of the kernel's last ones, contiguous and of the right dtype."""
    n, spares = draw.rows.shape[0], _spares(name, dim)
    call, taken = spares.take()
    taken.zero_()
    addresses = [v.data_ptr() for v in (draw.rows, draw.reinit, *arguments)]
    call.block[_CHANGING:] = [n, draw.reinit.shape[0], *addresses]
    n_threads = min(torch.get_num_threads(), max(1, n * dim // _NUMBERS_PER_THREAD))

    def run() -> None:
        together(call, n_threads)
        spares.give((call, taken))
        kept.clear()  # until here they must not be freed

    kept: list[object] = [draw, arguments]
    return run


_CHANGING = 3  # arguments from here on are set anew in each use, which is quicker than a new call


@cache
def _spares(name: str, dim: int) -> Spares[tuple[kernels.Call, Tensor]]:
    def make() -> tuple[kernels.Call, Tensor]:
        with torch.inference_mode(False):  # or later uses could not set it to 0
            taken = torch.zeros(1, dtype=torch.int64, device="cpu")
        kernel = kernels.load(name)
        rest = [0, 0, *[None] * (len(kernel.kinds) - _CHANGING - 2)]
        return kernel.prepared(dim, max(1, _NUMBERS_AT_ONCE // dim), taken, *rest), taken

    return Spares(make)
