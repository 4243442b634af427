"""Checks of a table before training: problems that would make it useless, and findings that a person should know."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..words import listed
from .table import MAX_LABELS, Table

__all__ = ["complete", "findings", "flattened"]

# All but a few values of a column must spread over this many standard deviations. The Langevin noise of a table is 0.2
# per step: structure 200 times finer is lost in it, which is an error; 20 times finer is hard to learn, a note.
_NO_ROOM, _LITTLE_ROOM = 1e-3, 1e-2

# The largest share of a column's rows that counts as a few far values. A mark for missing values can be this common.
_MAX_FAR = 0.1

# The largest share of rows that is left out for missing values. With more, the rest may be a biased selection.
_MAX_MISSING = 0.1

# A column of labels has at least this many rows per value.
_ROWS_PER_LABEL = 10

# A column has heavy tails if its middle 99 % are this many times as wide as its middle half. A normal distribution has
# 3.8, an exponential 4.8, a log-normal of sigma 1 has 9, Student's t with 2 degrees of freedom 12.
_HEAVY = 10.0

# A far value that occurs at least this often is no chance.
_OFTEN = 3

# Up to this share, equal rows are not reported.
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
    where = _holes(path, table, np.isnan(table.x), "missing values", "").removeprefix(f"{path}: ")
    n = int(is_missing.sum())
    note = f"{where}: {n:,} row{'s' * (n > 1)} left out"
    return dataclasses.replace(table.rows(~is_missing), notes=(*table.notes, note))


def _holes(
    path: Path, table: Table, is_bad: NDArray[np.bool_], what: str, ways: str, rows: NDArray[np.bool_] | None = None
) -> str:
    """The message about columns with bad values: how many, where, and the ways to go on (if any)."""
    found = [j for j in range(len(table.columns)) if is_bad[:, j].any()]
    columns = []
    for j in found[:5]:
        bad = np.flatnonzero(is_bad[:, j])
        columns.append(f"{table.columns[j]!r} ({len(bad):,} of {len(table.x):,}, first {table.place(int(bad[0]))})")
    more = f", ... ({len(found)} columns in all)" if len(found) > 5 else ""
    words = f"{path}: {what} in {', '.join(columns)}{more}"
    if not ways:
        return words
    share = "" if rows is None else f", {rows.mean():.0%} of the rows"
    return f"{words}{share}: {ways}, or leave such columns out by --drop {shlex.join(table.columns[j] for j in found)}"


def findings(table: Table) -> tuple[str, ...]:
    """What a person should know before training on these complete rows, one line each."""
    return (*_kinds(table), *_equal_rows(table))


def _kinds(table: Table) -> Iterator[str]:
    """One line per kind of odd column, with the names of those columns."""
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
        yield (
            f"there are whole numbers in {listed(whole)}: samples will lie between them, by which a random forest "
            "tells them"
        )
    if marks:
        yield (
            f"far from all others, and again and again, is {', '.join(marks)}: a mark for missing values? empty such "
            "cells"
        )
    if heavy:
        yield (
            f"there are heavy tails in {listed(heavy)}: values beyond 5 standard deviations count as 5; the logarithm "
            "of such a column is learnt better"
        )


def _mark(values: NDArray[np.float64], found: NDArray[np.float64]) -> float | None:
    """The smallest or largest value, if it occurs often and lies further out than the range of all others.

    found: the distinct values, sorted.
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
    """Notes about columns whose values a few far ones squeeze together. If they can't be told apart, that is an error.

    A column is scaled by its standard deviation, which a single huge value can dominate. What counts is how far from
    the median the other values reach, in standard deviations. Left out are values equal to the median (many tables are
    mostly zeros), the furthest hundredth, and repetitions of a value among these, such as -9999 for a missing one.
    A log-normal column of sigma 2 then reaches 2.5 deviations, a Cauchy column of 10,000 rows 0.6; one in a hundred
    of those reaches only 0.01.

    Raises:
        ValueError: the values of a column can't be told apart.
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
        what = (
            f"column {name!r}: {values[row]:g} in {table.place(row)} lies so far out that {n_near:,} of "
            f"{len(values):,} rows are within {reach:.1g} standard deviations of the median"
        )
        ways = f"mend or delete such rows, take the logarithm, or --drop {shlex.quote(name)}"
        if reach < _NO_ROOM:
            raise ValueError(f"{path}: {what}, where they can't be told apart: {ways}")
        notes.append(f"{what}: if that is no true value, {ways}")
    return notes
