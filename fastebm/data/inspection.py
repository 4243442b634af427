"""What a table's values are like: what a person should know before training, and what would make it worthless."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..words import listed
from .files import MAX_LABELS, Table

__all__ = ["complete", "findings", "flattened"]

# Standard deviations that all but a few values of a column must reach over. Langevin noise of a table is 0.2 in every
# step: what lies within a 200th of that is lost in it, which is an error, and within a 20th of it hard to learn.
_NO_ROOM, _LITTLE_ROOM = 1e-3, 1e-2

# Of a column's rows, the share that may count as a few far ones; a mark for missing values can be that common.
_MAX_FAR = 0.1

# Of the rows, the share that is left out where values are missing; of more, what is left may be of another kind.
_MAX_MISSING = 0.1

# Rows per value of a column of labels.
_ROWS_PER_LABEL = 10

# The middle 99 % of a heavy-tailed column are so many times as wide as its middle half: of a normal one 3.8, of an
# exponential 4.8, of a logarithmic normal of sigma 1 it is 9, of Student's t with 2 degrees of freedom 12.
_HEAVY = 10.0

# A value that comes less often is a far one by chance.
_OFTEN = 3

# The share of equal rows that is worth a word.
_MANY_EQUAL = 0.01


def complete(path: Path, table: Table) -> Table:
    """The rows without missing values.

    Raises:
        ValueError: too many rows have some, or values are infinite.
    """
    is_missing: NDArray[np.bool_] = np.asarray(np.isnan(table.x).any(axis=1))
    if np.isinf(table.x).any():
        raise ValueError(_holes(path, table, np.isinf(table.x), "infinite values", "mend them, delete such rows"))
    if not is_missing.any():
        return table
    if is_missing.mean() > _MAX_MISSING:
        raise ValueError(
            _holes(path, table, np.isnan(table.x), "missing values", "fill them in, delete such rows", is_missing)
        )
    told = _holes(path, table, np.isnan(table.x), "missing values", "").removeprefix(f"{path}: ")
    n = int(is_missing.sum())
    note = f"{told}: {n:,} row{'s' * (n > 1)} left out"
    return dataclasses.replace(table.rows(~is_missing), notes=(*table.notes, note))


def _holes(
    path: Path, table: Table, is_bad: NDArray[np.bool_], what: str, ways: str, rows: NDArray[np.bool_] | None = None
) -> str:
    """Which columns have bad values, and what to do."""
    found = [j for j in range(len(table.columns)) if is_bad[:, j].any()]
    told = []
    for j in found[:5]:
        bad = np.flatnonzero(is_bad[:, j])
        told.append(f"{table.columns[j]!r} ({len(bad):,} of {len(table.x):,}, first {table.place(int(bad[0]))})")
    more = f", ... ({len(found)} columns in all)" if len(found) > 5 else ""
    words = f"{path}: {what} in {', '.join(told)}{more}"
    if not ways:
        return words
    share = "" if rows is None else f", {rows.mean():.0%} of the rows"
    return f"{words}{share}: {ways}, or leave such columns out by --drop {shlex.join(table.columns[j] for j in found)}"


def findings(table: Table) -> tuple[str, ...]:
    """What a person should know about complete rows before training on them, a line each."""
    return (*_kinds(table), *_equal_rows(table))


def _kinds(table: Table) -> Iterator[str]:
    """Columns by what their values are like; of each kind one note."""
    few, whole, rising, unique, heavy, marks = (list[str]() for _ in range(6))
    for name, values in zip(table.columns, table.x.T, strict=True):
        found = np.unique(values)
        is_whole = bool((values == np.floor(values)).all())
        if len(found) == len(values) and bool((np.diff(values) > 0).all()):
            rising.append(name)
        elif is_whole and len(found) == len(values):
            unique.append(name)
        elif is_whole and len(found) <= min(MAX_LABELS, len(values) // _ROWS_PER_LABEL):
            few.append(name)
        elif is_whole:
            whole.append(name)
        if len(found) > MAX_LABELS and (mark := _mark(values, found)) is not None:
            marks.append(f"{mark:g} in {name!r}")
        elif len(found) > MAX_LABELS and _is_heavy(values):
            heavy.append(name)
    if rising:
        yield f"values rise from row to row in {listed(rising)}: an index or a time? --drop leaves it out"
    if unique:
        yield f"whole numbers that all differ in {listed(unique)}: an id? --drop leaves it out"
    if few:
        yield (
            f"there are few values in {listed(few)}: a label? --label NAME takes it for one, --drop leaves it out; "
            "else samples will lie between the values, too"
        )
    if whole:
        told = "samples will lie between them, by which a random forest tells them"
        yield f"there are whole numbers in {listed(whole)}: {told}"
    if marks:
        told = ", ".join(marks)
        yield f"far from all others, and again and again, is {told}: a mark for missing values? empty such cells"
    if heavy:
        yield (
            f"there are heavy tails in {listed(heavy)}: values beyond 5 standard deviations count as 5; the logarithm "
            "of such a column is learnt better"
        )


def _mark(values: NDArray[np.float64], found: NDArray[np.float64]) -> float | None:
    """The smallest or largest value, if it comes again and again, and is further out than the others reach.

    found: the different values, sorted.
    """
    for end, others in ((found[0], found[1:]), (found[-1], found[:-1])):
        if np.abs(others - end).min() > np.ptp(others) and np.count_nonzero(values == end) >= _OFTEN:
            return float(end)
    return None


def _is_heavy(values: NDArray[np.float64]) -> bool:
    low, first, third, high = np.quantile(values, (0.005, 0.25, 0.75, 0.995))
    return bool(third > first and (high - low) > _HEAVY * (third - first))


def _equal_rows(table: Table) -> Iterator[str]:
    n_equal = len(table.x) - len(np.unique(table.x, axis=0))
    if n_equal > _MANY_EQUAL * len(table.x) and table.x.shape[1] > 1:
        yield f"{n_equal:,} of {len(table.x):,} rows are copies of others: some will be held out and trained on as well"


def flattened(path: Path, table: Table) -> list[str]:
    """Notes of columns that a few far values leave little room in; those that are left none are an error.

    A column is scaled by its standard deviation, which one huge value can make. What counts is how far the others then
    reach: all that are not equal to the median (many tables are mostly zeros), but for the furthest hundredth of them,
    and a value beside these that comes again and again, as -9999 for a missing one does. A logarithmic normal
    of sigma 2 reaches 2.5 deviations so, and a Cauchy column of 10,000 rows 0.6, or in one file of a hundred 0.01.
    """
    notes = []
    for name, values in zip(table.columns, table.x.T, strict=True):
        with np.errstate(all="ignore"):
            deviation, far = float(values.std()), np.abs(values - np.median(values))
        far_others = far[far > 0]
        if not math.isfinite(deviation) or len(far_others) == 0:
            continue
        n_furthest = max(1, len(far_others) // 100)
        edge = np.partition(far_others, -n_furthest)[-n_furthest]
        near = far_others[far_others < edge]
        if len(near) == 0 or len(far_others) - len(near) > _MAX_FAR * len(values):
            continue
        reach = float(near.max()) / deviation
        if reach >= _LITTLE_ROOM:
            continue
        row = int(far.argmax())
        n_near = len(values) - len(far_others) + len(near)
        told = (
            f"column {name!r}: {values[row]:g} in {table.place(row)} lies so far out that {n_near:,} of "
            f"{len(values):,} rows are within {reach:.1g} standard deviations of the median"
        )
        ways = f"mend or delete such rows, take the logarithm, or --drop {shlex.quote(name)}"
        if reach < _NO_ROOM:
            raise ValueError(f"{path}: {told}, where they can't be told apart: {ways}")
        notes.append(f"{told}: if that is no true value, {ways}")
    return notes
