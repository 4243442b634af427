"""``ChainPool.advance``: all chains of this process, chunk by chunk, undone if an error needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..backends import Advanced
from .records import Records
from .storage import Storage

__all__ = ["Sweep", "progress_bar"]

# A bar that was not asked for appears after this many seconds, so that short calls show none.
_BAR_DELAY = 2.0


class Sweep:
    """``with Sweep(...) as sweep:`` around everything in ``advance`` that may fail.

    A chunk has moved as a whole or not at all, whenever an error comes. After ``keep_for_undo`` an error puts back
    all of them.

    Args:
        agree: called once with this process' error, or None, and its number of non-finite chains: before the last chunk
            is written, or after an error. Returns their number over all processes. Raises if another process failed.
    """

    def __init__(self, storage: Storage, records: Records, agree: Callable[[Exception | None, int], int]) -> None:
        self.n_nonfinite = 0
        self._storage, self._records, self._agree_once = storage, records, agree
        self._agreed = False
        self._done: list[slice] = []  # chunks that were written, or are being written
        self._backup: tuple[list[Tensor], Tensor] | None = None

    def __enter__(self) -> Sweep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        self._undo()
        if isinstance(error, Exception):
            self._agree(error)

    def keep_for_undo(self) -> None:
        """Keep the chains as they are now. Takes as much memory as they do, beside ``storage_file`` if there is one."""
        self._backup = [t.clone() for t in self._records.tensors().values()], self._storage.spare()

    def run(
        self, parts: Sequence[slice], move: Callable[[slice, Tensor], tuple[Advanced, Tensor]], steps: int,
        *, reinit: bool, on_chunk: Callable[[int], object],
    ) -> None:  # fmt: skip
        """Move all parts.

        Args:
            move: rows and their states -> as ``moves.move``.
            reinit: whether ``move`` reinitialised the chains that were not finite.
            on_chunk: called with the number of chains of each chunk, for a progress bar.
        """
        storage, records = self._storage, self._records

        def chunk(rows: slice, x: Tensor) -> Tensor:
            done, bad = move(rows, x)
            after = records.steps[rows] + steps
            stored = storage.encoded(done.x, rows, after)
            again = bad if reinit else bad[:0]
            record_reinits = records.reinit(again + rows.start, after[again], nonfinite=True)
            kept_steps, kept_energy = records.steps[rows], records.energy[rows]
            self.n_nonfinite += len(bad)
            if rows == parts[-1]:
                self._agree()
            on_chunk(rows.stop - rows.start)
            if self._backup is not None:
                self._backup[1][rows].copy_(storage.data[rows])
            # From here on nothing can fail.
            self._done.append(rows)
            kept_steps.copy_(after)
            kept_energy.copy_(done.energy)
            record_reinits()
            return stored

        storage.rewrite(parts, chunk)
        if not parts:
            self._agree()

    def _agree(self, error: Exception | None = None) -> None:
        if not self._agreed:
            self._agreed = True
            self.n_nonfinite = self._agree_once(error, self.n_nonfinite)

    def _undo(self) -> None:
        if self._backup is None:
            return
        records, states = self._backup
        for old, new in zip(records, self._records.tensors().values(), strict=True):
            new.copy_(old)
        for rows in self._done:
            self._storage.data[rows].copy_(states[rows])


def progress_bar(description: str, n_chains: int, progress: bool | None, is_first: bool) -> tqdm[Any]:
    """A bar on stderr, over chains, in the first process only. progress=None: on a terminal, after a delay."""
    disable = True if not is_first or progress is False else None if progress is None else False
    return tqdm(
        desc=description, total=n_chains, unit=" chains", unit_scale=True, dynamic_ncols=True, disable=disable,
        delay=_BAR_DELAY if progress is None else 0.0,
    )  # fmt: skip
