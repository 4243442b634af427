"""Checkpoints of a run: what they consist of, and reading them. ``writer.py`` writes them.

    LATEST                     the name of the newest one
    step-00001200/
        manifest.json          size and SHA-256 of each file, and all values that are not tensors
        NAME.safetensors       tensors that are the same on all processes
        rows-0.safetensors     rows of tensors that are split over processes, one file per process

A checkpoint is written as step-00001200.tmp, flushed, and then renamed; LATEST is replaced last. So whenever a
process dies, LATEST names a whole checkpoint. safetensors has no checksums, so a flipped bit would load silently: the
manifest has them. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import sha256_of, write_atomically

__all__ = [
    "LATEST",
    "MANIFEST",
    "VERSION",
    "DamagedError",
    "Saved",
    "folder_name",
    "name_newest",
    "newest",
    "rows_file",
    "sealed",
    "steps_in",
]

LATEST, MANIFEST = "LATEST", "manifest.json"

VERSION = 1


class DamagedError(ValueError):
    """A checkpoint does not hold what was written."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def rows_file(rank: int) -> str:
    return f"rows-{rank}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, sorted."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


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
    """Make LATEST name this checkpoint."""
    write_atomically(path.parent / LATEST, f"{path.name}\n".encode())


def sealed(body: Mapping[str, Any]) -> bytes:
    """A manifest: JSON that holds its own SHA-256."""
    return (json.dumps({"sha256": _digest(body), "checkpoint": body}, indent=1) + "\n").encode()


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Saved:
    """A checkpoint on disk: ``path``, ``step`` and ``values``. Every file is checked before it is used.

    Raises:
        DamagedError: something is missing, truncated, altered, from another program, or of another version. The error
            names the file, and the checkpoint before this one if there is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = self._bytes(MANIFEST)
        try:
            manifest = json.loads(data)
            body, digest = manifest["checkpoint"], manifest["sha256"]
            version = body["version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._bad(MANIFEST, "is damaged, or was not written by fastebm") from None
        if digest != _digest(body):
            raise self._bad(MANIFEST, "is damaged: its SHA-256 is not the one that was saved with it")
        if version != VERSION:
            raise self._bad(MANIFEST, f"has format version {version}, and this fastebm reads {VERSION}")
        try:
            self.step: int = body["step"]
            self.values: dict[str, Any] = body["values"]
            self._files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in body["files"].items()}
            self._n_rows: list[int] = []  # of each process that wrote
            while (name := rows_file(len(self._n_rows))) in self._files:
                self._n_rows.append(int(body["files"][name]["rows"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._bad(MANIFEST, "does not describe a checkpoint") from None

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Name -> tensor, on the CPU, from a file that is the same for all processes."""
        return self._read(f"{file}.safetensors", lambda opened: {k: opened.get_tensor(k) for k in list(opened.keys())})

    def rows(self, first: int, n: int) -> dict[str, Tensor]:
        """Name -> rows first .. first + n - 1, on the CPU, however many processes wrote them.

        Memory: rows of a single file are mapped, and take none until they are read. Rows of several files are copied.
        """
        parts: dict[str, list[Tensor]] = {}
        start = 0
        for rank, size in enumerate(self._n_rows):
            lo, hi = max(first, start), min(first + n, start + size)
            # Without chains of its own, a process reads zero rows of the first file, for the names and shapes.
            if lo < hi or (n == 0 and rank == 0):
                here = slice(lo - start, hi - start) if lo < hi else slice(0, 0)
                found = self._rows_of_file(rank, size, here)
                if parts and found.keys() != parts.keys():
                    raise self._bad(rows_file(rank), "holds other tensors than the files of other processes")
                for name, t in found.items():
                    parts.setdefault(name, []).append(t)
            start += size
        if first + n > start:
            raise self._bad(MANIFEST, f"lists {start} rows, and {first + n} are needed")
        try:
            return {name: ts[0] if len(ts) == 1 else torch.cat(ts) for name, ts in parts.items()}
        except (RuntimeError, TypeError) as error:
            raise self._bad(rows_file(0), f"and the files of other processes do not fit together: {error}") from None

    def _rows_of_file(self, rank: int, size: int, here: slice) -> dict[str, Tensor]:
        def rows(opened: Any) -> dict[str, Tensor]:
            slices = {name: opened.get_slice(name) for name in list(opened.keys())}
            if any(s.get_shape()[:1] != [size] for s in slices.values()):
                raise ValueError(f"it does not have the {size} rows that {MANIFEST} lists")
            return {name: s[here] for name, s in slices.items()}

        return self._read(rows_file(rank), rows)

    def _read(self, name: str, use: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Check the size and sum of a file, and open it."""
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
                sha256 = sha256_of(file)
        except OSError as error:
            raise self._bad(name, _why(error)) from None
        if sha256 != digest:
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
            raise self._bad(name, _why(error)) from None

    def _bad(self, name: str, what: str) -> DamagedError:
        step = int(self.path.name.removeprefix("step-")) if re.fullmatch(r"step-\d+", self.path.name) else None
        return DamagedError(f"{self.path / name} {what}{_way_out(self.path.parent, step)}")


def _why(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"


def _way_out(folder: Path, step: int | None) -> str:
    """Names another checkpoint to go on from: the one before this step, or the newest."""
    before = [s for s in (steps_in(folder) if folder.is_dir() else []) if step is None or s < step]
    if not before:
        return ""
    there = folder / folder_name(before[-1])
    return f". {there} is there too: name it in place of the run folder to go on from that"
