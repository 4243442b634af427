"""Text files: how they are laid out (comments, separator, names), and parsing by pandas.

pandas does not detect these reliably: it may guess a letter as the separator, and takes any first line for names.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .table import Layout

__all__ = ["MARKS", "TEXT", "decoded", "detect", "numbered_lines", "parse", "without_comments"]

TEXT = (".csv", ".tsv", ".txt")

# What may separate the cells, and what it is called in errors.
MARKS = {"\t": "tabs", ";": "semicolons", "|": "'|'", ",": "commas", " ": "spaces"}

# Lines that the layout is detected from.
_N_LINES = 50

# A cell of a row of values, as opposed to a name: a number, true or false, or a mark for a missing value.
_VALUE = re.compile(
    r"([+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|true|false|-?nan|<?na>?|n/a|null|none|\?|)", re.I
)


def decoded(path: Path) -> str:
    """The text of a file, with "\\n" at the end of every line."""
    with open(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = path.read_text(encoding, errors="replace")
    if "\ufffd" in text or "\0" in text:  # undecodable bytes; or UTF-16 without its byte order mark
        raise ValueError(f"{path} is not text in UTF-8: save it as UTF-8")
    return text


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of the lines that are not blank."""
    return ((i, line) for i, line in enumerate(io.StringIO(text), 1) if line.strip(" \n"))


def detect(path: Path, text: str, header: bool | None, notes: list[str]) -> Layout:
    """Detect comments, the separator and names from the first lines."""
    lines = itertools.dropwhile(lambda line: line[1].startswith("#"), numbered_lines(text))
    head = [(number, line.strip(" \n")) for number, line in itertools.islice(lines, _N_LINES)]
    if not head:
        raise ValueError(f"{path} has no rows: it needs lines of numbers")
    if next(numbered_lines(text))[1].startswith("#"):
        notes.append("the lines at the top that begin with # are skipped")
    texts = [line for _, line in head]
    try:
        tables = {mark: [*csv.reader(texts, delimiter=mark, skipinitialspace=True)] for mark in MARKS}
    except csv.Error as error:  # a cell of more than 131,072 characters
        raise ValueError(f"{path} is not a table of numbers: {error}") from None

    def lines_alike(mark: str) -> float:
        """Lines with the most common number of cells. One cell per line is a table too, if no mark does better."""
        width, count = Counter(map(len, tables[mark])).most_common(1)[0]
        return count if width > 1 else 0.5 * (mark == ",")

    separator = max(MARKS, key=lines_alike)
    if separator not in ",\t":
        notes.append(f"the columns are separated by {MARKS[separator]}")
    first = [cell.strip() for cell in tables[separator][0]]
    return Layout((), _is_header(first, header, notes), separator, skip=head[0][0] - 1)


def _is_header(first: list[str], header: bool | None, notes: list[str]) -> bool:
    """Whether the first line holds names: it has a word in it, or counts from 0 or 1 as pandas names columns."""
    if header is None:
        numbers = first if first[0] else first[1:]  # an index has no name
        counts = bool(numbers) and any(numbers == [str(i + start) for i in range(len(numbers))] for start in (0, 1))
        header = counts or not all(map(_VALUE.fullmatch, first))
        if header and any(cell and _VALUE.fullmatch(cell) for cell in first):
            shown = ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
            notes.append(f"the first line ({shown}) is taken as the names of the columns: --no-header makes it a row")
    if not header:
        last = f" to {len(first) - 1}" if len(first) > 1 else ""
        notes.append(f"no line of names was found, so columns are called 0{last}: --header makes one of the first line")
    elif twice := [name for name, count in Counter(filter(None, first)).items() if count > 1]:
        notes.append(f"duplicate names are numbered, such as {twice[0] + '.1'!r}")
    return header


def without_comments(text: str, layout: Layout) -> str:
    """The text with blank lines in place of its comments: pandas skips those, and still counts them in its errors.

    Its own skiprows would take a quotation mark in a comment for the start of a cell.
    """
    return "\n" * layout.skip + text.split("\n", layout.skip)[-1]


def parse(path: Path, text: str, layout: Layout) -> Any:
    """Parse text by pandas. A line with too many cells is an error; one with too few has missing values."""
    import pandas as pd

    options = {"index_col": False, "skipinitialspace": True, "na_values": ["?"], "low_memory": False}
    if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1):  # later versions read every float exactly
        options["float_precision"] = "round_trip"
    separator, header = r"\s+" if layout.separator == " " else layout.separator, 0 if layout.header else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.StringIO(text), sep=separator, header=header, decimal=layout.decimal, **options)
        if layout.separator != " " or not frame.iloc[:, -1].isna().any():
            return frame
        # The cells after an empty one would be shifted.
        why = "between spaces no cell may be empty, and the last of a row is"
    except pd.errors.ParserWarning:
        why = "the first row has more than the line of names"
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        why = str(error).strip().removeprefix("Error tokenizing data. C error: ")
    raise ValueError(
        f"{path}: every line must have as many cells, separated by {MARKS[layout.separator or ',']}: {why} (decimal "
        "commas need another separator, such as ;)"
    )
