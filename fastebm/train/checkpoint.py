"""Checkpoints of a run: folders that are whole or not there, checked when read, written by any number of processes.

    LATEST                     the name of the newest one
    step-00001200/
        manifest.json          size and SHA-256 of each file, and all values that are no tensors
        NAME.safetensors       tensors that all processes have alike
        rows-0.safetensors     rows of tensors that processes share, a file a process

safetensors sums no bytes, so a flipped bit would load silently. A checkpoint is written as step-00001200.tmp, fsynced
and renamed; then LATEST is replaced, and all but this one and the one before are deleted. Whenever a process dies,
LATEST names a whole one. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pool.processes import Processes

__all__ = ["DamagedError", "Saved", "Writer", "name_newest", "newest", "write_atomically"]

LATEST, MANIFEST = "LATEST", "manifest.json"

_VERSION = 1

# Checkpoints that are kept: the newest one, and one in case it is damaged.
_KEEP = 2

# Rows of up to so many bytes are copied, to be written while chains move; more are written from where they lie.
_BACKGROUND_BYTES = 2**30

# Bytes summed, copied and written at once.
_CHUNK_BYTES = 2**24

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


# -- writing ------------------------------------------------------------------------------------------------


class Writer:
    """Writes the checkpoints of one folder, one at a time, in the background if the rows are few enough to copy.

    Memory: a copy of the other tensors, and of this process' rows if they have at most 1 GiB; 32 MiB beside it.

    Every process makes the same calls; ``ready`` may differ, all else is the same for all.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self._step: int | None = None  # of the checkpoint that is being written
        self._thread = threading.Thread()
        self._files: dict[str, Any] = {}
        self._values: Mapping[str, Any] = {}
        self._error: BaseException | None = None

    @property
    def pending(self) -> bool:
        """A checkpoint was begun and not finished."""
        return self._step is not None

    @property
    def ready(self) -> bool:
        """One is pending, and this process has written its files: ``finish`` waits for no disk here."""
        return self.pending and not self._thread.is_alive()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is written any more afterwards. After an error a process alone still finishes what was begun."""
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
        """Begin to write a checkpoint; what it holds is as it is now.

        Args:
            tensors: file -> name -> tensor, the same on all processes.
            rows: name -> this process' rows, (n, ...); those of the next process follow.
            values: what JSON can hold; the first process' are written.

        Raises:
            OSError, RuntimeError: it can't be written, or the one before couldn't.
        """
        self.finish()
        is_first = self.processes.rank == 0
        in_background = sum(t.nbytes for t in rows.values()) <= _BACKGROUND_BYTES
        self._step, self._values, self._error, self._files = step, values, None, {}
        with self._together():
            n_rows = {len(t) for t in rows.values()}
            if len(n_rows) > 1:
                raise ValueError(f"tensors of rows must have equally many, got {sorted(n_rows)}")
            rows = _copy(rows) if in_background else rows
            shared = {file: _copy(named) for file, named in tensors.items()} if is_first else {}
            if is_first:
                self.folder.mkdir(exist_ok=True)
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir()

        def write() -> None:
            try:
                for file, named in shared.items():
                    self._files[f"{file}.safetensors"] = _write(self._temporary / f"{file}.safetensors", named)
                file = _rows_file(self.processes.rank)
                self._files[file] = {**_write(self._temporary / file, rows), "rows": max(n_rows, default=0)}
            except BaseException as error:  # a KeyboardInterrupt too: only what is written whole is published
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
            OSError: this process could not write. RuntimeError: another one couldn't. The checkpoint before stays.
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
        return self.folder / f"{_name(self._step or 0)}.tmp"

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """As ``Processes.together``; after an error nothing is pending, and the disk has no part of it."""
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
        target, temporary = self.folder / _name(step), self._temporary
        body = {"version": _VERSION, "step": step, "files": files, "values": self._values}
        _write_bytes(temporary / MANIFEST, [_sealed(body)])
        _sync_folder(temporary)
        steps = _steps(self.folder)
        if step in steps:  # done again, after going on from an earlier one
            _set_aside(target)
        temporary.rename(target)
        _sync_folder(self.folder)
        name_newest(target)
        kept = [s for s in sorted({*steps, step}) if s <= step][-_KEEP:]
        with contextlib.suppress(OSError):  # what can't be deleted now is with the next checkpoint
            for s in steps:
                if s not in kept:
                    _set_aside(self.folder / _name(s))
            for left in self.folder.glob("*.tmp"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _rows_file(rank: int) -> str:
    return f"rows-{rank}.safetensors"


def _set_aside(folder: Path) -> None:
    """A checkpoint that will be deleted: renamed first, as what has a checkpoint's name is whole."""
    trash = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(trash, ignore_errors=True)  # of a process that was killed while it deleted it
    folder.rename(trash)


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints of a folder, in order."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


def _sealed(body: Mapping[str, Any]) -> bytes:
    """JSON that holds its own SHA-256."""
    return (json.dumps({"sha256": _sum_of(body), "checkpoint": body}, indent=1) + "\n").encode()


def _sum_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, from where the tensors lie, a chunk at a time; its size and sum."""
    tensors = dict(sorted(tensors.items()))
    header: dict[str, Any] = {}
    end = 0
    for name, t in tensors.items():
        if t.dtype not in _DTYPES:
            raise ValueError(f"a checkpoint holds no {t.dtype}, as {name} is")
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for t in tensors.values():
            flat, size = t.detach().reshape(-1), _CHUNK_BYTES // t.itemsize
            for i in range(0, len(flat), size):
                yield flat[i : i + size].cpu().view(torch.uint8).numpy().data

    return _write_bytes(path, parts())


def _write_bytes(path: Path, parts: Any) -> dict[str, Any]:
    """A new file, on the disk when this returns; its size and sum."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "xb") as file:
            for part in parts:
                digest.update(part)
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # a new name is on disk only once its folder is; Windows can't open folders
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file so that, whatever happens, either the old or the new one is there whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        _write_bytes(temporary, [data])
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


# -- reading ------------------------------------------------------------------------------------------------


def newest(folder: Path) -> Path:
    """The checkpoint that LATEST names.

    Raises:
        DamagedError: it names none.
    """
    path = folder / LATEST
    try:
        name = path.read_bytes()[:64].decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    if not re.fullmatch(r"step-\d{8,}", name) or not (folder / name).is_dir():
        what = "is missing" if not path.exists() else f"names no checkpoint of this folder, got {name!r}"
        raise DamagedError(f"{path} {what}{_way_out(folder, None)}")
    return folder / name


def name_newest(path: Path) -> None:
    """Let LATEST name a checkpoint."""
    write_atomically(path.parent / LATEST, f"{path.name}\n".encode())


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


class Saved:
    """A checkpoint on the disk: ``path``, ``step`` and ``values``. Every file is checked before it is used.

    Raises:
        DamagedError: something is missing, truncated, altered, foreign, or of another version. It names the file, and
            the checkpoint before if there is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = self._bytes(MANIFEST)
        try:
            sealed = json.loads(data)
            body, digest = sealed["checkpoint"], sealed["sha256"]
            version = body["version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._bad(MANIFEST, "is damaged, or was not written by fastebm") from None
        if digest != _sum_of(body):
            raise self._bad(MANIFEST, "is damaged: its SHA-256 is not the one that was saved with it")
        if version != _VERSION:
            raise self._bad(MANIFEST, f"has format version {version}, and this fastebm reads {_VERSION}")
        try:
            self.step: int = body["step"]
            self.values: dict[str, Any] = body["values"]
            self._files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in body["files"].items()}
            self._rows: list[int] = []
            while (name := _rows_file(len(self._rows))) in self._files:
                self._rows.append(int(body["files"][name]["rows"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._bad(MANIFEST, "does not describe a checkpoint") from None

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Name -> tensor of a file that all processes have alike, on the CPU."""
        return self._read(f"{file}.safetensors", lambda opened: {k: opened.get_tensor(k) for k in list(opened.keys())})

    def rows(self, first: int, n: int) -> dict[str, Tensor]:
        """Name -> rows first .. first + n - 1, on the CPU, however many processes wrote them.

        Memory: rows of one file are mapped from it, and take none until they are read; those of several are copied.
        """
        parts: dict[str, list[Tensor]] = {}
        start = 0
        for rank, size in enumerate(self._rows):
            lo, hi = max(first, start), min(first + n, start + size)
            # a process without chains reads no row of the first file, for names and shapes
            if lo < hi or (n == 0 and rank == 0):
                here = slice(lo - start, hi - start) if lo < hi else slice(0, 0)

                def part(opened: Any, here: slice = here, size: int = size) -> dict[str, Tensor]:
                    slices = {name: opened.get_slice(name) for name in list(opened.keys())}
                    if any(s.get_shape()[:1] != [size] for s in slices.values()):
                        raise ValueError(f"it has not the {size} rows that {MANIFEST} tells")
                    return {name: s[here] for name, s in slices.items()}

                found = self._read(_rows_file(rank), part)
                if parts and found.keys() != parts.keys():
                    raise self._bad(_rows_file(rank), "holds other tensors than the files of other processes")
                for name, t in found.items():
                    parts.setdefault(name, []).append(t)
            start += size
        if first + n > start:
            raise self._bad(MANIFEST, f"lists {start} rows, and {first + n} are needed")
        try:
            return {name: ts[0] if len(ts) == 1 else torch.cat(ts) for name, ts in parts.items()}
        except (RuntimeError, TypeError) as error:
            raise self._bad(_rows_file(0), f"and the files of other processes do not fit together: {error}") from None

    def _read(self, name: str, use: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open  # an optional package

        if name not in self._files:
            raise self._bad(MANIFEST, f"lists no {name}")
        size, digest = self._files[name]
        path = self.path / name
        try:
            with open(path, "rb") as file:
                if (found := os.fstat(file.fileno()).st_size) != size:
                    what = "truncated" if found < size else "damaged"
                    raise self._bad(name, f"is {what}: it has {found} bytes, and had {size} when it was saved")
                sums = hashlib.sha256()
                while chunk := file.read(_CHUNK_BYTES):
                    sums.update(chunk)
        except OSError as error:
            raise self._bad(name, self._why(error)) from None
        if sums.hexdigest() != digest:
            raise self._bad(name, "is damaged: its SHA-256 is not the one that was saved")
        try:
            with safe_open(path, framework="pt") as opened:
                return use(opened)
        except (SafetensorError, ValueError) as error:
            raise self._bad(name, f"can't be used: {error}") from None

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise self._bad(name, self._why(error)) from None

    def _why(self, error: OSError) -> str:
        return "is missing" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"

    def _bad(self, name: str, what: str) -> DamagedError:
        step = int(self.path.name.removeprefix("step-")) if re.fullmatch(r"step-\d+", self.path.name) else None
        return DamagedError(f"{self.path / name} {what}{_way_out(self.path.parent, step)}")


def _way_out(folder: Path, step: int | None) -> str:
    """Which other checkpoint is there: that before a step, or the newest."""
    before = [s for s in (_steps(folder) if folder.is_dir() else []) if step is None or s < step]
    if not before:
        return ""
    there = folder / _name(before[-1])
    return f". {there} is there too: name it in place of the run folder to go on from that"
