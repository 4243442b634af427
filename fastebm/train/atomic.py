"""Files that are either whole or not there, even if the process is killed or the disk is full."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["naming", "sha256_of", "sync_folder", "write_atomically", "write_new"]

# Bytes that are read and hashed at once.
_CHUNK_BYTES = 2**24


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file. Whatever happens, either the old or the new one is there, whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        write_new(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet. It is on the disk when this returns."""
    with naming(path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder: a new or renamed file is on the disk only once its folder is."""
    if os.name == "posix":  # Windows can't open folders
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sha256_of(file: BinaryIO) -> str:
    """The SHA-256 of a file from its current position on."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in every OSError: one raised by a write or a flush does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
