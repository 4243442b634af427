"""Storage of a pool's states between calls: their dtype, and the memory they lie in. Chains move in float32.

bfloat16 and uint8 use stochastic rounding, up or down with probabilities that keep the mean:

    stored = floor(v + u),   v = x in units of the last place (bfloat16) or in levels 255 (x - lo) / (hi - lo) (uint8)

With rounding to nearest, a chain that drifts by less than half a unit between two calls would never move. The uniform u
has 8 bits of Philox, centred: (byte + 1/2) / 256. So a value that is already a stored one does not change, and the mean
is as exact as if 8 more bits were stored.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..box import Box
from ..devices import checked_device, named_device
from ..rng import Stream, random_bytes
from .arguments import checked_int

__all__ = ["Storage"]

_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)

# Blocks of the pool's random stream, above the blocks of a new state: both fit as long as dim < 2**25.
_ROUNDING_BLOCK = 0x800000

# Bytes of float32 states in a chunk, when all chains of the pool are visited: enough to keep all cores or SMs busy,
# and little memory beside the pool.
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}

# Random counters whose numbers are drawn at once on a CPU: they stay in a core's cache.
_COUNTERS = 32768


class Storage:
    """(n, dim) states in a dtype, on the device where they move, in host memory, or in a memory-mapped file.

    Args:
        box: bounds of the states, or None. uint8 needs it: it is the range of the 256 levels.
        device: where states move.
        home: where states lie: the device, or the CPU (pinned memory for a GPU). None: the device.
        file: a new file to lie in instead, or None.
        seed: of the rounding.
        first_chain: row i is chain first_chain + i.
    """

    def __init__(
        self,
        n: int,
        dim: int,
        *,
        dtype: torch.dtype,
        box: Box | None,
        device: torch.device,
        home: torch.device | str | None = None,
        file: str | os.PathLike[str] | None = None,
        seed: int,
        first_chain: int = 0,
    ) -> None:
        self.device, self.seed, self.first_chain = device, seed, first_chain
        self.dim, self.dtype = dim, dtype
        self.folder = None if file is None else Path(file).parent
        home = named_device(device if home is None and file is None else "cpu" if home is None else home)
        if dtype not in _DTYPES:
            raise ValueError(f"storage_dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        if home.type not in ("cpu", device.type):
            raise ValueError(f"storage_device must be the pool's device, {device}, or cpu, got {home}")
        if file is not None and home.type != "cpu":
            raise ValueError(f"storage_file lies in host memory: leave storage_device out, got {home}")
        if file is not None and os.path.exists(file):
            raise ValueError(
                f"storage_file must not exist, as the pool would overwrite it: delete {file} or choose another"
            )
        checked_device(home)
        self.bounds = self.checked_bounds(box)
        self.data = self._mapped(Path(file), n) if file is not None else self._empty(n, home)

    def checked_bounds(self, box: Box | None) -> Box | None:
        """The box on the device where states move. Raises if the states cannot be stored within it."""
        bounds = None if box is None else box.on(self.dim, device=self.device)
        if self.dtype == torch.uint8:
            width = math.inf if bounds is None else bounds.hi - bounds.lo
            if not bool(torch.as_tensor(width).isfinite().all()):
                raise ValueError(
                    f"storage_dtype=torch.uint8 has 256 levels on the clamp, which must be finite, got {box}"
                )
        return bounds

    def _empty(self, n: int, home: torch.device) -> Tensor:
        return torch.empty(
            n, self.dim, dtype=self.dtype, device=home, pin_memory=home.type == "cpu" and self.device.type == "cuda"
        )

    def _mapped(self, file: Path, n: int) -> Tensor:
        size = n * self.dim
        n_bytes, free = size * self.dtype.itemsize, shutil.disk_usage(file.parent).free
        if n_bytes > free:  # writing to a page without space on the disk would kill the process
            raise OSError(errno.ENOSPC, f"states take {n_bytes:,} bytes, and the disk has {free:,} left", str(file))
        data = torch.from_file(str(file), shared=True, size=max(size, 1), dtype=self.dtype)
        return data[:size].view(n, self.dim)

    def spare(self) -> Tensor:
        """As much memory again, of the same kind. Its pages take no memory before they are written."""
        if self.folder is None:
            return self._empty(len(self.data), self.data.device)
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".pool-")
        os.close(handle)
        try:
            return self._mapped(Path(name), len(self.data))
        finally:
            os.unlink(name)  # the file lives on until it is unmapped

    # -- conversion --------------------------------------------------------------------------------------------

    def decoded(self, stored: Tensor) -> Tensor:
        """float32 states. May share the memory of ``stored``."""
        if self.dtype == torch.float32:
            return stored
        x = stored.float()
        if self.bounds is None:
            return x
        lo, hi = self.bounds
        if self.dtype == torch.uint8:
            x.mul_((hi - lo) / 255).add_(lo)
        return x.clamp_(lo, hi)  # type: ignore[arg-type]

    def encoded(self, x: Tensor, rows: slice | Tensor, steps: Tensor) -> Tensor:
        """x (n, dim) in the stored dtype. The rounding is a function of the chain and its lifetime step."""
        if self.dtype == torch.float32:
            return x
        out = torch.empty_like(x, dtype=self.dtype)
        chains = self.chains(rows)
        n_blocks = (self.dim + 15) // 16
        size = max(1, _COUNTERS // n_blocks) if x.device.type == "cpu" else max(1, len(x))
        for i in range(0, len(x), size):
            part = slice(i, i + size)
            noise = random_bytes(self.seed, Stream.POOL, chains[part], steps[part], self.dim, _ROUNDING_BLOCK)
            out[part] = self._rounded(x[part], noise)
        return out

    def _rounded(self, x: Tensor, noise: Tensor) -> Tensor:
        if self.dtype == torch.uint8:
            lo, hi = self.bounds  # type: ignore[misc]
            v = (x - lo).mul_(255 / (hi - lo)).add_(noise.float().add_(0.5).mul_(1 / 256))
            return v.clamp_(0, 255).to(torch.uint8)  # truncates
        largest = torch.finfo(torch.bfloat16).max
        bits = x.clamp(-largest, largest).view(torch.int32)
        bits += (noise.to(torch.int32) << 8) + 128
        return bits.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)

    # -- rows ---------------------------------------------------------------------------------------------------

    def chains(self, rows: slice | Tensor) -> Tensor:
        """(n,) int64 global chain numbers of these rows."""
        if isinstance(rows, Tensor):
            return rows + self.first_chain
        return torch.arange(self.first_chain + rows.start, self.first_chain + rows.stop, device=self.device)

    def parts(self, chunk_size: int | None = None) -> list[slice]:
        """All rows, in chunks. None: chunks of ``_CHUNK_BYTES``."""
        if chunk_size is None:
            chunk_size = max(1, _CHUNK_BYTES["cpu" if self.device.type == "cpu" else "cuda"] // (4 * self.dim))
        n, chunk_size = len(self.data), checked_int("chunk_size", chunk_size, "an int >= 1 or None", 1, 2**63)
        return [slice(i, min(i + chunk_size, n)) for i in range(0, n, chunk_size)]

    def read(self, rows: slice | Tensor) -> Tensor:
        """States of these rows, (n, dim) float32, on the device where they move. A slice may give the stored memory."""
        if isinstance(rows, slice):
            return self.decoded(self.data[rows].to(self.device))
        return self.decoded(self.data.index_select(0, rows.to(self.data.device)).to(self.device))

    def write(self, rows: slice, x: Tensor, steps: Tensor) -> None:
        """steps: (n,) lifetime steps of the states x."""
        self.data[rows].copy_(self.encoded(x, rows, steps))

    def writing(self, rows: Tensor, x: Tensor, steps: Tensor) -> Callable[[], object]:
        """Prepare to write distinct rows. The returned function writes, and cannot fail. steps: as for ``write``."""
        stored, home = self.encoded(x, rows, steps).to(self.data), rows.to(self.data.device)
        return lambda: self.data.index_copy_(0, home, stored)

    def rewrite(self, parts: Sequence[slice], move: Callable[[slice, Tensor], Tensor]) -> None:
        """Read, move and write back each part in turn.

        If states move on a GPU and lie on the host, two more CUDA streams copy the next part to the device and the last
        one back while a part moves. So at most three parts are on the device.

        Args:
            move: (rows, states) -> new states, ``encoded``. When it raises, all parts that it returned before are
                written.
        """
        if self.device.type != "cuda" or self.data.device.type != "cpu":
            for rows in parts:
                self.data[rows].copy_(move(rows, self.read(rows)))
            return
        here = torch.cuda.current_stream(self.device)
        coming, going = (torch.cuda.Stream(self.device) for _ in "12")  # type: ignore[no-untyped-call]
        pinned = self.data.is_pinned()
        landed: tuple[slice, Tensor] | None = None  # a part in pinned memory that still has to be copied to the file

        def fetch(rows: slice) -> Tensor:
            with torch.cuda.stream(coming):
                part = self.data[rows] if pinned else self.data[rows].pin_memory()
                return part.to(self.device, non_blocking=True)

        def land() -> None:
            going.synchronize()
            if landed is not None:
                self.data[landed[0]].copy_(landed[1])

        ahead = fetch(parts[0]) if parts else None
        try:
            for i, rows in enumerate(parts):
                here.wait_stream(coming)
                stored: Tensor = ahead  # type: ignore[assignment]
                stored.record_stream(here)
                ahead = fetch(parts[i + 1]) if i + 1 < len(parts) else None
                done = move(rows, self.decoded(stored))
                land()
                landed = None
                going.wait_stream(here)
                with torch.cuda.stream(going):
                    target = self.data[rows] if pinned else torch.empty_like(done, device="cpu", pin_memory=True)
                    target.copy_(done, non_blocking=True)
                    done.record_stream(going)
                landed = None if pinned else (rows, target)
        finally:
            land()
