"""The columns of a file as pandas has read it: which are kept, which one holds labels, and their numbers."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..words import did_you_mean, listed
from .table import MAX_LABELS, Layout
from .text import MARKS

__all__ = ["has_decimal_commas", "kept_positions", "labels_of", "numbers_of", "with_label"]

_DECIMAL_COMMA = r"\s*[+-]?\d*,?\d+([eE][+-]?\d+)?\s*"
_THOUSANDS = r"\s*[+-]?[1-9]\d{0,2},\d{3}\s*"  # 1,234 may also have a decimal comma

# A column of consecutive whole numbers is an index if it has at least this many rows; in fewer it may be chance.
_MIN_INDEX = 10

_EXACT = 2.0**53  # float64 holds every whole number below


def labels_of(cells: Any) -> NDArray[np.str_]:
    """Labels as words: whole numbers without a point, "" for a missing one."""
    return np.array(["" if cell != cell else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells])


def with_label(path: Path, frame: Any, layout: Layout, label: str) -> Layout:
    """The layout with the column and value of a --label, NAME or NAME=VALUE."""
    names = list(frame.columns)
    name, value = (label, None) if label in names or "=" not in label else label.rsplit("=", 1)
    if name not in names:
        raise ValueError(f"{path} has no column {name!r}{did_you_mean(name, names)}: it has {listed(names, 20)}")
    position = names.index(name)
    found = Counter(labels_of(frame.iloc[:, position]).tolist())
    if value is None and len(found) > max(MAX_LABELS, len(frame) // 10):
        raise ValueError(
            f"{path}: column {name!r} has {len(found):,} values, too many for classes: --drop leaves it out"
        )
    if value is not None:
        if value not in found:
            values = [word for word, _ in found.most_common()]
            near = did_you_mean(value, values)
            raise ValueError(f"{path}: no row has {value!r} in column {name!r}{near}: there are {listed(values, 10)}")
        if len(found) == 1:
            raise ValueError(f"{path}: every row has {value!r} in column {name!r}: --drop {shlex.quote(name)} will do")
    return dataclasses.replace(layout, label=position, value=value)


def kept_positions(
    path: Path, frame: Any, layout: Layout, columns: Sequence[str], drop: Sequence[str], notes: list[str]
) -> tuple[int, ...]:
    """Positions of the columns to keep: those named by ``columns``, or else all useful ones not named by ``drop``."""
    names = list(frame.columns)
    if columns and drop:
        raise ValueError("--columns keeps the columns that it names, --drop leaves them out: give one of the two")
    if unknown := [name for name in (*columns, *drop) if name not in names]:
        is_list = "," in unknown[0] and all(part.strip() in names for part in unknown[0].split(","))
        near = ": names are separated by spaces" if is_list else did_you_mean(unknown[0], names)
        raise ValueError(f"{path} has no column {unknown[0]!r}{near}: it has {listed(names, 20)}")
    if len(set(columns)) < len(columns):
        raise ValueError(f"--columns takes each name once, got {shlex.join(columns)}")
    kept = [names.index(name) for name in columns or names if name not in drop]
    if layout.label in kept:
        if columns:
            raise ValueError(f"--columns and --label name the same column, {names[layout.label]!r}: leave one out")
        kept.remove(layout.label)
    if not kept:
        what = "--drop" if drop else "--label"
        raise ValueError(f"{what} leaves no column of {path}: it has {listed(names, 20)}")
    if columns:
        return tuple(kept)
    why_not = {i: why for i in kept if (why := _useless(frame.iloc[:, i])) is not None}
    if len(why_not) == len(kept):  # keep all: the error about their cells says more than "no column is left"
        why_not.clear()
    for i, why in why_not.items():
        kept.remove(i)
        notes.append(f"column {names[i]!r} {why}, so it is left out: --columns keeps what it names")
    for i in kept:
        if names[i].startswith("Unnamed: "):
            way_out = f"--drop {shlex.quote(names[i])} leaves it out"
            notes.append(f"column {names[i]!r} has no name and does not count the rows, so it is kept: {way_out}")
    return tuple(kept)


def _useless(cells: Any) -> str | None:
    """Why a column is of no use, in words; None if it is of use."""
    from pandas.api.types import is_bool_dtype, is_integer_dtype, is_numeric_dtype

    values = cells.dropna()
    if values.empty:
        return "is empty"
    if len(values) == len(cells) and values.nunique() == 1:
        return f"holds {str(labels_of(values.iloc[:1])[0])!r} in every row"
    if (
        is_integer_dtype(cells)
        and len(cells) >= _MIN_INDEX
        and (np.diff(cells.to_numpy(np.float64, na_value=np.nan)) == 1).all()
    ):
        return "counts the rows, as an index does"
    if is_numeric_dtype(cells) or is_bool_dtype(cells):
        return None
    words = values.astype(str)
    # Words with digits may be numbers in another notation, or dates: those are an error, not left out in silence.
    if words.str.contains(r"\d").any() or words.str.fullmatch(r"\s*").any():
        return None
    found = words.value_counts().index
    label = f", which --label {shlex.quote(str(cells.name))} takes for classes" if len(found) <= MAX_LABELS else ""
    return f"holds words ({listed([str(word)[:40] for word in found], 3)}){label}"


def has_decimal_commas(path: Path, frame: Any, place: Callable[[int], str]) -> bool:
    """Whether a column holds numbers with commas, at least one of which can't separate thousands.

    Raises:
        ValueError: in a column of such numbers, every comma may separate thousands.
    """
    unclear = []
    for name, cells in frame.select_dtypes(exclude=["number", "bool"]).items():
        words = cells.dropna().astype(str)
        commas = words[words.str.contains(",")]
        if commas.empty or not words.str.fullmatch(_DECIMAL_COMMA).all():
            continue
        if not commas.str.fullmatch(_THOUSANDS).all():
            return True
        unclear.append(f"{commas.iloc[0]!r} in column {name!r}, {place(commas.index[0])}")
    if unclear:
        raise ValueError(f"{path}: {unclear[0]}, may be a thousand or have a decimal comma: write 1234 or 1.234")
    return False


def numbers_of(
    path: Path, frame: Any, layout: Layout, place: Callable[[int], str], notes: list[str]
) -> NDArray[np.float64]:
    """The columns of a frame as (n, d) float64; missing values are NaN.

    Raises:
        ValueError: a column is not of numbers. The error names a cell, and the likely cause.
    """
    import pandas as pd
    from pandas.api.types import infer_dtype, is_bool_dtype, is_numeric_dtype

    x = np.empty(frame.shape)
    bad = {}
    for j, (name, cells) in enumerate(frame.items()):
        is_whole = infer_dtype(cells) == "integer"  # also beyond 64 bits, where they are Python objects
        if is_whole or is_numeric_dtype(cells) or cells.isna().all():
            x[:, j] = cells.to_numpy(np.float64, na_value=np.nan)
            is_bad = (np.abs(x[:, j]) >= _EXACT) & is_whole
        else:
            words = cells.astype(str).str.translate(str.maketrans(",.", ".,") if layout.decimal == "," else {})
            is_word = (pd.to_numeric(words, errors="coerce").isna() & cells.notna()).to_numpy(bool)
            is_bad = is_word if is_word.any() else cells.notna().to_numpy()
        if is_bad.any():
            row = int(is_bad.argmax())
            rounded = ", which float64 rounds," if is_whole else ""
            bad[name] = f"{name!r} ({str(cells.iloc[row])[:40]!r}{rounded} in {place(row)})"
    if bad:
        raise ValueError(_not_numbers(path, bad, layout.decimal))
    if booleans := [name for name, cells in frame.items() if is_bool_dtype(cells)]:
        notes.append(f"false and true are read as 0 and 1 in {listed(booleans)}")
    return x


def _not_numbers(path: Path, bad: dict[str, str], decimal: str) -> str:
    """The error for columns that are not of numbers. bad: name -> name, cell and place in words."""
    guess = ""
    # A cell with a separator in it may be a whole row.
    if marks := [mark for mark in ";\t|" if any(repr(mark)[1:-1] in cell for cell in bad.values())]:
        guess = f" (is {MARKS[marks[0]]} what separates the cells?)"
    if any(re.search(r"'[+-]?\d{1,3}([.,' ]\d{3})+([.,]\d+)?'", cell) for cell in bad.values()):
        guess = " (are there marks between thousands? write 1234.5)"
    cells = ", ".join([*bad.values()][:5]) + ", ..." * (len(bad) > 5)
    commas = " with decimal commas" if decimal == "," else ""
    return (
        f"{path}: columns must hold numbers{commas}, and these do not: {cells}{guess}: "
        f"mend such cells, or leave those columns out by --drop {shlex.join(bad)} (--columns names those to keep)"
    )
