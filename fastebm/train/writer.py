"""Writing checkpoints (``checkpoint.py``): by any number of processes, in the background, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pool.processes import Processes
from .atomic import naming, sha256_of, sync_folder, write_new
from .checkpoint import MANIFEST, VERSION, folder_name, name_newest, rows_file, sealed, steps_in

__all__ = ["BACKGROUND_BYTES", "Writer", "copied", "write_tensors"]

# Up to this size, rows are copied and written while training goes on. Larger ones are written at once: a copy of them
# might not fit in memory.
BACKGROUND_BYTES = 2**30

# Checkpoints to keep: the newest, and the one before in case that is damaged.
_N_KEPT = 2


class Writer:
    """Writes the checkpoints of one folder, one at a time.

    All processes make the same calls, with the same values; only ``ready`` may differ between them.

    Memory: a copy of the shared tensors, and of this process' rows if they have at most ``BACKGROUND_BYTES``. Larger
    rows on a GPU are copied to the host while they are written.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self._step: int | None = None  # of the checkpoint that is being written
        self._thread = threading.Thread()
        self._files: dict[str, Any] = {}  # those that this process has written: size and sum
        self._values: Mapping[str, Any] = {}
        self._error: BaseException | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and is not finished."""
        return self._step is not None

    @property
    def ready(self) -> bool:
        """Whether a checkpoint is pending and this process has written its files, so that ``finish`` is quick."""
        return self.pending and not self._thread.is_alive()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the background thread. A process on its own also finishes what it began, even after an error."""
        if self._thread.is_alive():
            self._thread.join()
        if self.processes.size == 1:
            self.finish()

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        rows: Mapping[str, Tensor],
        values: Mapping[str, Any],
    ) -> None:
        """Begin to write a checkpoint of the present state: later changes of the tensors are not in it.

        Args:
            tensors: file -> name -> tensor, the same on all processes.
            rows: name -> rows of this process, (n, ...). Those of the next process follow.
            values: what JSON can hold. Those of the first process are written.

        Raises:
            OSError, RuntimeError: this checkpoint, or the one begun before, can't be written.
        """
        self.finish()
        is_first = self.processes.rank == 0
        in_background = sum(t.nbytes for t in rows.values()) <= BACKGROUND_BYTES
        self._step, self._values, self._error, self._files = step, values, None, {}
        with self._together():
            n_rows = {len(t) for t in rows.values()}
            if len(n_rows) > 1:
                raise ValueError(f"tensors of rows must all have the same number of rows, got {sorted(n_rows)}")
            rows = copied(rows) if in_background else rows
            shared = {file: copied(named) for file, named in tensors.items()} if is_first else {}
            if is_first:
                self.folder.mkdir(exist_ok=True)
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir()

        def write() -> None:
            try:
                for file, named in shared.items():
                    self._files[f"{file}.safetensors"] = write_tensors(self._temporary / f"{file}.safetensors", named)
                name = rows_file(self.processes.rank)
                self._files[name] = {**write_tensors(self._temporary / name, rows), "rows": max(n_rows, default=0)}
            except BaseException as error:  # KeyboardInterrupt as well: only whole files may be published
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        if in_background:
            self._thread.start()
        else:
            write()
            if isinstance(self._error, KeyboardInterrupt):
                raise self._error

    def finish(self) -> None:
        """Wait until all processes have written their files, and make them the newest checkpoint.

        Raises:
            OSError: this process could not write. RuntimeError: another one could not. The previous checkpoint stays.
        """
        if self._step is None:
            return
        if self._thread.is_alive():
            self._thread.join()
        with self._together():
            if self._error is not None:
                raise self._error
        files = {name: file for part in self.processes.gather(self._files) for name, file in part.items()}
        step = self._step
        try:
            with self._together():
                if self.processes.rank == 0:
                    self._publish(step, files)
        finally:
            self._step = None

    @property
    def _temporary(self) -> Path:
        return self.folder / f"{folder_name(self._step or 0)}.tmp"

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Like ``Processes.together``. After an error nothing is pending, and nothing of it is left on the disk."""
        try:
            with self.processes.together():
                yield
        except Exception as error:
            step, temporary = self._step, self._temporary
            self._step = None
            if self.processes.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                text = f"{error.strerror or error}: the checkpoint of step {step} is not written, the one before stays"
                raise OSError(error.errno, text, error.filename) from error
            raise

    def _publish(self, step: int, files: Mapping[str, Any]) -> None:
        """Rename the folder, make LATEST name it, and delete older checkpoints."""
        target, temporary = self.folder / folder_name(step), self._temporary
        body = {"version": VERSION, "step": step, "files": files, "values": self._values}
        write_new(temporary / MANIFEST, sealed(body))
        sync_folder(temporary)
        steps = steps_in(self.folder)
        if step in steps:  # the run went on from an earlier checkpoint and came here again
            _set_aside(target)
        temporary.rename(target)
        sync_folder(self.folder)
        name_newest(target)
        kept = [s for s in sorted({*steps, step}) if s <= step][-_N_KEPT:]
        with contextlib.suppress(OSError):  # what can't be deleted now is deleted after the next checkpoint
            for s in steps:
                if s not in kept:
                    _set_aside(self.folder / folder_name(s))
            for left in self.folder.glob("*.tmp"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a new safetensors file; it is on the disk when this returns. Returns its size and SHA-256."""
    from safetensors import SafetensorError  # an optional package
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        # The library reports a full disk by an error of its own, with the system's number in its text.
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except KeyError as error:
        raise ValueError(f"safetensors can't hold {error}") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library's files are private, whatever the umask
    with naming(path), open(path, "r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256_of(file)}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint that will be deleted: a folder with the name of a checkpoint must be whole."""
    trash = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(trash, ignore_errors=True)  # left by a process that was killed while deleting it
    folder.rename(trash)
