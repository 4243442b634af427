"""A file's columns of numbers in memory, and how the file was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_LABELS", "Layout", "Table"]

# A column of words with more different values than this does not hold labels.
MAX_LABELS = 20


@dataclass(frozen=True)
class Layout:
    """How a file was read. Reading the same file with it gives the same values.

    positions: of the columns that are kept, from 0, in the order of the states. label: position of the column of
    labels; value: the label of the rows to train on, or None for all rows. The other fields are for text: header:
    whether the first line holds names. separator: " " is any white space. skip: comment lines before the first line.
    """

    positions: tuple[int, ...] = ()
    header: bool | None = None
    separator: str | None = None
    decimal: str = "."
    skip: int = 0
    label: int | None = None
    value: str | None = None


@dataclass(frozen=True, eq=False)
class Table:
    """A file's columns of numbers.

    columns: their names. x: (n, d) float64, NaN where a value is missing. place: where a row is in the file, in words.
    notes: decisions made for the user, one line each. labels: (n,) words, if there is a column of labels.
    kept: (n,) numbers of the rows in the file; None: all.
    """

    columns: tuple[str, ...]
    x: NDArray[np.float64]
    place: Callable[[int], str]
    layout: Layout
    notes: tuple[str, ...]
    labels: NDArray[np.str_] | None = None
    kept: NDArray[np.int64] | None = None

    @property
    def numbers(self) -> NDArray[np.int64]:
        """(n,) numbers of the rows in the file, from 0."""
        return np.arange(len(self.x)) if self.kept is None else self.kept

    def rows(self, kept: NDArray[np.bool_]) -> Table:
        """The table of some rows only. kept: (n,)."""
        at = np.flatnonzero(kept)
        labels = None if self.labels is None else self.labels[at]
        return dataclasses.replace(
            self, x=self.x[at], labels=labels, place=lambda row: self.place(int(at[row])), kept=self.numbers[at]
        )
