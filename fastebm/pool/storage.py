"""Where a pool's states lie between calls: as which numbers, in which memory. They move in float32.

bfloat16 and uint8 round at random, up or down with the probabilities that keep the mean:

    stored = floor(v + u),   v = x in units of the last place (bfloat16), or of a level: 255 (x - lo) / (hi - lo)

To the nearest, a chain that drifts by less than half a unit between two calls would stand still for ever. u has 8 bits
of Philox, centred, (byte + 1/2) / 256: so what is already a stored value stays what it is, and the mean is as near as
with 8 bits more in store.
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

# Blocks of the pool's stream, past those of a restart's state: dims < 2**25 leave room for both.
_ROUNDING_BLOCK = 0x800000

# Bytes of the float32 states that are worked on at once where all chains are: enough for every core or SM, and little
# beside the pool.
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}

# Counters worked on at once on a CPU, as in rng.py.
_COUNTERS = 32768


class Storage:
    """(n, dim) states as ``dtype``, on the device where they move, in host memory, or in a file mapped into memory.

    Args:
        box: bounds of the states, or None; for uint8 it is the range of the 256 levels.
        device: where states move. home: where they lie; None: there. Host memory is pinned for a GPU.
        file: a new file to map; None: none.
        seed, first_chain: of the rounding; row i is the chain first_chain + i.
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
            raise ValueError(f"storage_file is mapped into host memory: leave storage_device out, got {home}")
        if file is not None and os.path.exists(file):
            raise ValueError(f"storage_file must not exist, as the pool overwrites it: delete {file}, or name another")
        checked_device(home)
        self.bounds = self.checked_bounds(box)
        self.data = self._mapped(Path(file), n) if file is not None else self._empty(n, home)

    def checked_bounds(self, box: Box | None) -> Box | None:
        """Where states move; an error if they can't be stored."""
        bounds = None if box is None else box.on(self.dim, device=self.device)
        if self.dtype == torch.uint8:
            width = math.inf if bounds is None else bounds.hi - bounds.lo
            if not bool(torch.as_tensor(width).isfinite().all()):
                raise ValueError(
                    f"storage_dtype=torch.uint8 has 256 levels on the clamp: it needs finite bounds, got {box}"
                )
        return bounds

    def _empty(self, n: int, home: torch.device) -> Tensor:
        return torch.empty(
            n, self.dim, dtype=self.dtype, device=home, pin_memory=home.type == "cpu" and self.device.type == "cuda"
        )

    def _mapped(self, file: Path, n: int) -> Tensor:
        size = n * self.dim
        n_bytes, free = size * self.dtype.itemsize, shutil.disk_usage(file.parent).free
        if n_bytes > free:  # a page that finds no room when it is written to ends the process
            raise OSError(errno.ENOSPC, f"states take {n_bytes:,} bytes, and the disk has {free:,} left", str(file))
        data = torch.from_file(str(file), shared=True, size=max(size, 1), dtype=self.dtype)
        return data[:size].view(n, self.dim)

    def spare(self) -> Tensor:
        """As much memory again, of the same kind; no page of it is used before it is written."""
        if self.folder is None:
            return self._empty(len(self.data), self.data.device)
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".pool-")
        os.close(handle)
        try:
            return self._mapped(Path(name), len(self.data))
        finally:
            os.unlink(name)  # the mapping keeps it

    # -- the numbers --------------------------------------------------------------------------------------------

    def decoded(self, stored: Tensor) -> Tensor:
        """float32 states; they may share the memory of ``stored``."""
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
        """x (n, dim) as it is stored; the rounding belongs to the chain and its lifetime step."""
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
        """(n,) int64 global chain numbers of some rows."""
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
        """States of some rows, (n, dim) float32 where they move. For a slice maybe the stored ones themselves."""
        if isinstance(rows, slice):
            return self.decoded(self.data[rows].to(self.device))
        return self.decoded(self.data.index_select(0, rows.to(self.data.device)).to(self.device))

    def write(self, rows: slice, x: Tensor, steps: Tensor) -> None:
        """steps: (n,) lifetime steps that the states have then."""
        self.data[rows].copy_(self.encoded(x, rows, steps))

    def writing(self, rows: Tensor, x: Tensor, steps: Tensor) -> Callable[[], object]:
        """What writes some rows, when all that can fail is done. steps: (n,) lifetime steps that they have then."""
        stored, home = self.encoded(x, rows, steps).to(self.data), rows.to(self.data.device)
        return lambda: self.data.index_copy_(0, home, stored)

    def rewrite(self, parts: Sequence[slice], move: Callable[[slice, Tensor], Tensor]) -> None:
        """Each part read, moved and written back, one after another.

        States of a GPU that lie on the host come and go while others move, in two streams beside the current one, so
        three parts at most are on the way.

        Args:
            move: rows and their states -> the new ones, ``encoded``. When it raises, all parts that it returned before
                are written.
        """
        if self.device.type != "cuda" or self.data.device.type != "cpu":
            for rows in parts:
                self.data[rows].copy_(move(rows, self.read(rows)))
            return
        here = torch.cuda.current_stream(self.device)
        coming, going = (torch.cuda.Stream(self.device) for _ in "12")  # type: ignore[no-untyped-call]
        pinned = self.data.is_pinned()
        landed: tuple[slice, Tensor] | None = None  # of a file: in pinned memory, once ``going`` is done

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
