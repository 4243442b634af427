"""The user's own files: text (CSV, TSV), Parquet and .npy, read as columns of numbers.

Each decision that is made for the user becomes a note, and ``Layout`` records it, so that a resumed run reads the same
values. ``text.py`` parses text, ``columns.py`` chooses and converts the columns.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..words import did_you_mean, listed
from .columns import has_decimal_commas, kept_positions, labels_of, numbers_of, with_label
from .table import Layout, Table
from .text import TEXT, decoded, detect, numbered_lines, parse, without_comments

__all__ = ["find", "read", "read_images"]


def read(
    path: Path,
    *,
    columns: Sequence[str] = (),
    drop: Sequence[str] = (),
    header: bool | None = None,
    label: str | None = None,
    layout: Layout | None = None,
    by_position: bool = False,
) -> Table:
    """Read a file's columns of numbers.

    Args:
        columns: names of the columns to keep, in this order. Without them, all useful columns are kept: not those that
            count the rows, are the same in every row, or hold words. drop: names of columns to leave out.
        header: of text: whether the first line holds names; None: detected.
        label: NAME or NAME=VALUE: a column of labels, which is left out, and the label of the rows to train on.
        layout: of an earlier reading, to read the same values. The other options are then ignored.
        by_position: if the file has as many columns as ``columns``, and none of these names, take them in order.

    Raises:
        ValueError: this kind of file can't be read, or a column is not of numbers.
        OSError: the file can't be opened.
    """
    is_text, notes, text = path.suffix.lower() in TEXT, list[str](), ""
    _check_kind(path, header)
    how = layout or Layout()
    if is_text:
        text = decoded(path)
        how = layout or detect(path, text, header, notes)
        text = without_comments(text, how)
        frame = parse(path, text, how)
    else:
        frame = _read_npy(path) if path.suffix.lower() == ".npy" else _read_parquet(path, notes)
    frame.columns = frame.columns.map(str)

    def place(row: int) -> str:
        # Below a cell that holds line breaks, this number is too small.
        lines = itertools.islice(numbered_lines(text), row + bool(how.header), None)
        return f"line {next(lines)[0]}" if is_text else f"row {row}"

    if layout is None:
        if by_position and frame.shape[1] == len(columns) and not {*columns} & {*frame.columns}:
            notes.append(f"it has none of the names {listed(columns)}, so its columns are taken in their order")
            frame.columns = list(columns)
        if label is not None:
            how = with_label(path, frame, how, label)
        how = dataclasses.replace(how, positions=kept_positions(path, frame, how, columns, drop, notes))
        if is_text and has_decimal_commas(path, frame.iloc[:, list(how.positions)], place):
            notes.append("decimal commas are read as decimal points")
            how = dataclasses.replace(how, decimal=",")
            frame = parse(path, text, how).set_axis(frame.columns, axis=1)
    if (last := max(how.positions)) >= frame.shape[1]:
        raise ValueError(f"{path} has {frame.shape[1]} columns, and column {last} was read before: put it back")
    labels = None if how.label is None else labels_of(frame.iloc[:, how.label])
    frame = frame.iloc[:, list(how.positions)]
    x = numbers_of(path, frame, how, place, notes)
    return Table(tuple(map(str, frame.columns)), x, place, how, tuple(notes), labels)


def _check_kind(path: Path, header: bool | None) -> None:
    suffix = path.suffix.lower()
    if suffix not in (*TEXT, ".parquet", ".npy"):
        ways = "decompress it, or read it with pandas, NumPy or PyTorch and save it by to_csv or np.save"
        raise ValueError(f"data must be text ({', '.join(TEXT)}), .parquet or .npy, got {path}: {ways}")
    if suffix not in TEXT and header is not None:
        raise ValueError(f"--header and --no-header are for text files, got {path}")


def find(path: Path) -> Path:
    """The path, if there is such a file.

    Raises:
        ValueError: there is none. The error suggests a similar name.
    """
    if not path.exists():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"{path}: No such file or directory{did_you_mean(path.name, others)}")
    return path


def read_images(path: Path, shape: tuple[int, ...]) -> Table:
    """Images in a .npy, (n, *shape) or (n, dim), as rows."""
    x = _array(path)
    x = x.reshape(len(x), -1) if x.shape[1:] == shape else x
    columns = tuple(map(str, range(math.prod(x.shape[1:]))))
    return Table(columns, x.astype(np.float64), lambda row: f"image {row}", Layout(), ())


def _read_npy(path: Path) -> Any:
    import pandas as pd

    x = _array(path)
    if x.ndim != 2 or x.shape[1] == 0:
        wide = f": x.reshape(len(x), -1) makes it ({len(x)}, {x[:1].size})" if x.ndim > 2 else ""
        way_out = ": x.reshape(-1, 1) makes it one column" if x.ndim == 1 else wide
        raise ValueError(f"{path} must hold an array (n, d) with d >= 1, got shape {x.shape}{way_out}")
    return pd.DataFrame(x.astype(x.dtype.newbyteorder("="), copy=False))


def _array(path: Path) -> NDArray[Any]:
    """An array of real numbers from a .npy. A pickle is never read."""
    with open(path, "rb") as file:
        try:
            x = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, MemoryError) as error:
            raise ValueError(f"{path} is not an array of numbers in NumPy's .npy format: {error}") from None
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{path} must hold real numbers, got dtype {x.dtype}")
    return x


def _read_parquet(path: Path, notes: list[str]) -> Any:
    import pandas as pd

    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f'reading {path} needs pyarrow: pip install "fastebm[parquet]"')
    import pyarrow

    with open(path, "rb") as file:
        try:
            frame = pd.read_parquet(file, engine="pyarrow")
            is_named = any(name is not None for name in frame.index.names)
            if not is_named and not isinstance(frame.index, pd.RangeIndex):
                notes.append("the index, which has no name, is left out")
            return frame.reset_index(drop=not is_named)  # an index with a name is a column, as in to_csv
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} can't be read as Parquet: {error}") from None
