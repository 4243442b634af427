"""Numba kernels that copy drawn chains out of a pool and back, on a CPU.

One kernel on all threads replaces about ten PyTorch operations, of which ``index_copy_`` alone takes twice as long.
moves.py calls it, and has the same in PyTorch for pools that are not float32 or not on a CPU.
"""

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

# A further thread pays for itself from about this many numbers per thread.
_NUMBERS_PER_THREAD = 32768

# Numbers that a thread copies before it fetches its next piece of work.
_NUMBERS_AT_ONCE = 8192


def can_copy(storage: Storage) -> bool:
    """Whether the kernels can copy the states: float32 on a CPU, and Numba is usable."""
    on_cpu = storage.device.type == storage.data.device.type == "cpu"
    return on_cpu and storage.dtype == torch.float32 and kernels.why_not() is None


def take(draw: Draw, data: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """As ``moves.take``. data, steps: of the pool."""
    n, dim = draw.rows.shape[0], data.shape[1]
    x = torch.empty(n, dim, dtype=torch.float32, device="cpu")
    before = torch.empty(n, dtype=torch.int64, device="cpu")
    _prepared("pool.take", dim, draw, data, steps, draw.fresh.contiguous(), x, before)()
    return x, before


def put(
    draw: Draw, x: Tensor, before: Tensor, after: Tensor, energies: Tensor, data: Tensor, steps: Tensor, energy: Tensor,
    started: Tensor, reinits: Tensor,
) -> Callable[[], None]:  # fmt: skip
    """As ``moves.put``: the returned function writes. The last five tensors are the pool's, and are changed by it."""
    # The kernel reads raw memory. These two come from the energy; all else is the pool's own.
    if not x.dtype == energies.dtype == torch.float32:
        raise TypeError(f"states and energies must be float32, got {x.dtype} and {energies.dtype}")
    kept = data, steps, energy, started, reinits
    arguments = *kept, x.contiguous(), before, after, energies.contiguous()
    run = _prepared("pool.put", data.shape[1], draw, *arguments)

    def write() -> None:
        run()
        # PyTorch does not see the kernel's writes. With new versions, autograd refuses to use changed values.
        increment_version([v for v in kept if not v.is_inference()])

    return write


def _prepared(name: str, dim: int, draw: Draw, *arguments: Tensor) -> Callable[[], None]:
    """A call of the kernel. arguments: its last arguments in order, contiguous and of the right dtypes."""
    n, spares = draw.rows.shape[0], _spares(name, dim)
    call, taken = spares.take()
    taken.zero_()
    addresses = [v.data_ptr() for v in (draw.rows, draw.reinit, *arguments)]
    call.block[_CHANGING:] = [n, draw.reinit.shape[0], *addresses]
    n_threads = min(torch.get_num_threads(), max(1, n * dim // _NUMBERS_PER_THREAD))

    def run() -> None:
        together(call, n_threads)
        spares.give((call, taken))
        kept.clear()

    kept: list[object] = [draw, arguments]  # the kernel has only addresses: the memory must not be freed before
    return run


# Arguments from this index on differ between uses. Setting them is quicker than preparing a new call.
_CHANGING = 3


@cache
def _spares(name: str, dim: int) -> Spares[tuple[kernels.Call, Tensor]]:
    def make() -> tuple[kernels.Call, Tensor]:
        with torch.inference_mode(False):  # an inference tensor could not be zeroed by later uses
            taken = torch.zeros(1, dtype=torch.int64, device="cpu")
        kernel = kernels.load(name)
        rest = [0, 0, *[None] * (len(kernel.kinds) - _CHANGING - 2)]
        return kernel.prepared(dim, max(1, _NUMBERS_AT_ONCE // dim), taken, *rest), taken

    return Spares(make)
