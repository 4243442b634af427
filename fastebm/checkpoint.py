"""Named tensors and plain values in one safetensors file: written whole or not at all, checked when read.

safetensors finds a truncated file but sums no bytes, so a flipped bit would load silently. The file's own
SHA-256, taken with 64 zeros in its place, stands first in the metadata. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["read", "write", "write_atomically"]

_VERSION = 1
_NO_DIGEST = "0" * 64


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors by name, and values that JSON can hold, over whatever is at ``path``."""
    from safetensors.torch import save  # an optional package

    # The digest comes first, so that the first 64 zeros of the file are its place.
    metadata = {"fastebm": json.dumps({"sha256": _NO_DIGEST, "version": _VERSION, "values": dict(values)})}
    # Copies: safetensors takes no tensors that share memory.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    data = save(copies, metadata)
    digest = hashlib.sha256(data).hexdigest()
    write_atomically(path, data.replace(_NO_DIGEST.encode(), digest.encode(), 1))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the values that ``write`` wrote.

    Raises:
        ValueError: the file is truncated, altered, foreign, or of another version; it names the file.
        OSError: it can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"{path} is truncated, or no safetensors file")
    try:
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]["fastebm"]
        header = json.loads(metadata)
        digest, version, values = header["sha256"], header["version"], header["values"]
        zeroed = data.replace(digest.encode(), _NO_DIGEST.encode(), 1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged, or was not written by fastebm") from None
    if version != _VERSION:
        raise ValueError(f"{path} has format version {version}, and this fastebm reads {_VERSION}")
    if len(digest) != 64 or hashlib.sha256(zeroed).hexdigest() != digest:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was saved with it")
    try:
        return load(data), values
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file so that, whatever happens, either the old or the new one is there whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on disk only once its folder is; Windows can't open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
