"""The user's own files: CSV and other text tables, Parquet and .npy, read as columns of numbers.

Conventions are those of pandas. What is decided for the user is said in a note, what can't be decided is an error that
names the option, and ``Layout`` records the decisions, so that a resumed run reads the same values.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import difflib
import functools
import gzip
import importlib.util
import io
import itertools
import lzma
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layout", "Table", "read"]

_TEXT = (".csv", ".tsv", ".txt", ".dat", ".data")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_READ = "CSV or other text (.csv, .tsv, .txt, .dat, .data; also .gz, .bz2 or .xz of them), Parquet (.parquet) or .npy"

# What makes a file that can be read of one that can't.
_WAYS_OUT = {
    ".npz": 'np.save("x.npy", np.load(FILE)[NAME]) makes one of an array in it',
    **dict.fromkeys((".pt", ".pth"), 'np.save("x.npy", torch.load(FILE).numpy()) makes one of a tensor'),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV"),
    **dict.fromkeys((".pkl", ".pickle"), "pickles are never read; frame.to_parquet or np.save makes one"),
    **dict.fromkeys(
        (".feather", ".json", ".jsonl", ".h5", ".hdf5", ".dta", ".sav"), "read it with pandas, then to_csv"
    ),
    ".zip": "unzip it",
}

# Cells without a value: the words that pandas takes for one, and a few that other programs write.
_MISSING = {
    *("", "na", "n/a", "nan", "-nan", "null", "none", "<na>", "#n/a", "#na", "nat", "?", "-", "--", ".", "missing")
}

_NUMBER = {
    mark: re.compile(
        rf"\s*[+-]?(\d+([{mark}]\d*)?|[{mark}]\d+)([eE][+-]?\d+)?\s*|\s*[+-]?inf(inity)?\s*", re.IGNORECASE
    )
    for mark in ".,"
}
_INTEGER = re.compile(r"\s*[+-]?\d+\s*")
# 1,234 may be a thousand or a decimal; 0,123 and 12,34 are decimals.
_THOUSANDS = {mark: re.compile(rf"\s*[+-]?[1-9]\d{{0,2}}([{mark}]\d{{3}})+\s*") for mark in ".,"}
_CODE = re.compile(r"\s*[+-]?0\d+\s*")
_GROUPED = re.compile(r"[+-]?\d[\d.,']*")
_BOOLEANS = {"true": 1.0, "false": 0.0}
_WORDS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "'|'", " ": "spaces"}

# Records that separator and names are found by, enough to see every form that a column's cells take, and the characters
# that these are looked for in: a copy of all of a large file takes longer than the rest.
_SAMPLE, _HEAD = 200, 1_000_000

# float64 holds every whole number up to here, and not all beyond.
_EXACT = 2.0**53


@dataclass(frozen=True)
class Layout:
    """How a file was read: with it the same file gives the same values.

    Args:
        positions: of the file's columns, from 0, those that are kept, in the order of the states.
        header: of text: whether the first line holds names.
        separator: of text: between cells; " " is any white space.
        decimal: of text: "." or ",".
    """

    positions: tuple[int, ...]
    header: bool | None = None
    separator: str | None = None
    decimal: str = "."

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        """From what JSON makes of it."""
        return cls(**{**values, "positions": tuple(values["positions"])})


@dataclass(frozen=True, eq=False)
class Table:
    """A file's columns of numbers.

    columns: their names. x: (n, d) float64, NaN where a value is missing. place: a row's place in the file, in words.
    notes: what was decided for the user, one line each.
    """

    columns: tuple[str, ...]
    x: NDArray[np.float64]
    place: Callable[[int], str]
    layout: Layout
    notes: tuple[str, ...]


@dataclass(eq=False)
class _Raw:
    """Columns as they stand in the file: numbers, or objects of which cells of text are strings."""

    names: list[str]
    columns: Sequence[NDArray[Any]]
    place: Callable[[int], str]
    header: bool | None = None
    separator: str | None = None
    marks: str = ""  # of text: which of ",._" its cells can hold
    notes: list[str] = field(default_factory=list)


def read(
    path: Path,
    *,
    columns: Sequence[str] = (),
    drop: Sequence[str] = (),
    header: bool | None = None,
    layout: Layout | None = None,
) -> Table:
    """A file's columns of numbers.

    Args:
        columns: names of those to keep, in this order; without them all. drop: names of those to leave out.
        header: of text: whether the first line holds names; None: found out.
        layout: of an earlier reading, which is repeated; the other options are not looked at.

    Raises:
        ValueError: the file is of no kind that can be read, or a column is not of numbers.
        OSError: the file can't be opened.
    """
    suffix = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower() if suffix in _OPENERS else suffix
    if suffix in (".npy", ".parquet") and header is not None:
        raise ValueError(f"--header and --no-header are for text files, got {path}")
    if suffix == ".npy":
        raw = _read_npy(path)
    elif suffix == ".parquet":
        raw = _read_parquet(path)
    elif inner in _TEXT:
        raw = _read_text(path, header if layout is None else layout.header, layout)
    else:
        way_out = f": {_WAYS_OUT[inner]}" if inner in _WAYS_OUT else ""
        raise ValueError(f"data must be a file of {_READ}, got {path}{way_out}")
    positions = _positions(path, raw, columns, drop) if layout is None else layout.positions
    if max(positions, default=-1) >= len(raw.names):
        raise ValueError(
            f"{path} has {len(raw.names)} columns, and column {max(positions)} was read before: put it back"
        )
    decimal = (_decimal(path, raw, positions) if layout is None else layout.decimal) if inner in _TEXT else "."
    x = _numbers(path, raw, positions, decimal)
    names = tuple(raw.names[i] for i in positions)
    if decimal == ",":
        raw.notes.append("decimal commas are read as decimal points")
    for name, values in zip(names, x.T, strict=True):
        if len(values) > 2 and (values == np.round(values)).all() and (np.diff(values) > 0).all():
            raw.notes.append(
                f"column {name!r} holds whole numbers that rise from row to row, as an index or a time does: "
                f"--drop {shlex.quote(name)} leaves it out"
            )
    return Table(names, x, raw.place, Layout(positions, raw.header, raw.separator, decimal), tuple(raw.notes))


# -- columns ------------------------------------------------------------------------------------------------


def _positions(path: Path, raw: _Raw, columns: Sequence[str], drop: Sequence[str]) -> tuple[int, ...]:
    """Of the columns to keep; an index that has no name is left out."""
    if columns and drop:
        raise ValueError("--columns keeps the columns that it names, --drop leaves them out: give one of the two")
    for option, chosen in (("--columns", columns), ("--drop", drop)):
        if unknown := [name for name in chosen if name not in raw.names]:
            near = difflib.get_close_matches(unknown[0], raw.names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"{path} has no column {unknown[0]!r}{hint}: {option} takes names of {_list(raw.names, 20)}"
            )
        if twice := [name for name, count in Counter(chosen).items() if count > 1]:
            raise ValueError(f"{option} names {twice[0]!r} twice: once is enough")
    if columns:
        return tuple(raw.names.index(name) for name in columns)
    kept = [i for i, name in enumerate(raw.names) if name not in drop]
    if not kept and raw.names:
        raise ValueError(f"--drop leaves no column of {path}: it has {_list(raw.names, 20)}")
    for i in list(kept):
        name, cells = raw.names[i], raw.columns[i]
        is_unnamed = name.startswith("Unnamed: ")
        if not is_unnamed and not (i == 0 and raw.header is False and name == "0"):
            continue
        if is_unnamed and all(isinstance(cell, str) and not cell.strip() for cell in cells):
            kept.remove(i)
            raw.notes.append(f"column {i + 1} has neither a name nor values, and is left out")
        elif (steps := _steps(cells)) is not None and len(kept) > 1:
            if (steps == 1).all():
                kept.remove(i)
                raw.notes.append(
                    f"column {name!r} has no name and counts the rows, so it is taken for an index and left out: "
                    "--columns keeps what it names"
                )
            elif is_unnamed:
                others = shlex.join(raw.names[j] for j in kept if j != i)
                raise ValueError(
                    f"{path}: column {name!r} has no name and holds whole numbers, as an index may: "
                    f"--drop {shlex.quote(name)} leaves it out, --columns {shlex.quote(name)} {others} keeps it"
                )
        elif is_unnamed:
            raw.notes.append(f"column {i + 1} has no name, and is called {name!r}")
    return tuple(kept)


def _steps(cells: NDArray[Any]) -> NDArray[np.int64] | None:
    """Differences of successive cells, (n - 1,), if all are whole numbers."""
    if cells.dtype.kind not in "iu" and not all(
        isinstance(cell, str) and _INTEGER.fullmatch(cell) and len(cell) < 18 for cell in cells
    ):
        return None
    whole = cells.astype(np.int64)
    return whole[1:] - whole[:-1]


def _list(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (f", ... ({len(names)} in all)" if len(names) > most else "")


# -- numbers ------------------------------------------------------------------------------------------------


def _decimal(path: Path, raw: _Raw, positions: Sequence[int]) -> str:
    """The decimal mark of text: a comma if a cell can be read in no other way."""
    unclear: dict[str, tuple[int, int]] = {}
    points_are_clear = raw.separator == ","  # who writes decimal commas has other separators
    is_plain = "," not in raw.marks and (points_are_clear or "." not in raw.marks)
    for i in () if is_plain else positions:
        for row, cell in enumerate(raw.columns[i]):
            if "," in cell and _NUMBER[","].fullmatch(cell):
                if not _THOUSANDS[","].fullmatch(cell):
                    return ","
                unclear.setdefault(",", (row, i))
            elif not points_are_clear and "." in cell and _NUMBER["."].fullmatch(cell):
                points_are_clear = not _THOUSANDS["."].fullmatch(cell)
                unclear.setdefault(".", (row, i))
    if "," in unclear:
        row, i = unclear[","]
        raise ValueError(
            f"{path}: {raw.columns[i][row]!r} in column {raw.names[i]!r}, {raw.place(row)}, may be a thousand or a "
            "decimal comma: write thousands without a comma, and decimals with a point"
        )
    if "." in unclear and not points_are_clear:
        row, i = unclear["."]
        raw.notes.append(f"{raw.columns[i][row]!r} in column {raw.names[i]!r} is read as a decimal, not as a thousand")
    return "."


def _numbers(path: Path, raw: _Raw, positions: Sequence[int], decimal: str) -> NDArray[np.float64]:
    """The columns at positions, (n, d) float64; missing values are NaN."""
    x = np.empty((len(raw.columns[0]) if raw.columns else 0, len(positions)))
    bad: list[str] = []
    names: list[str] = []
    booleans: list[str] = []
    for j, i in enumerate(positions):
        cells = raw.columns[i]
        if cells.dtype.kind == "b" or _are_booleans(cells):
            booleans.append(raw.names[i])
        wrong = _fill(x[:, j], cells, decimal, "_" in raw.marks)
        if wrong is not None:
            row, count = wrong
            names.append(raw.names[i])
            more = f" and {count - 1:,} more" if count > 1 else ""
            bad.append(f"{raw.names[i]!r} ({str(cells[row])[:40]!r} in {raw.place(row)}{more})")
        elif code := next((cell for cell in cells[:_SAMPLE] if isinstance(cell, str) and _CODE.fullmatch(cell)), None):
            raw.notes.append(
                f"{code.strip()!r} in column {raw.names[i]!r} is read as a whole number, though it begins with 0, "
                "as codes do, and digits behind a decimal comma"
            )
        if wrong is None and (rounded := _inexact(cells, x[:, j])) is not None:
            cell, name = str(cells[rounded]).strip(), raw.names[i]
            raise ValueError(
                f"{path}: column {name!r} holds whole numbers beyond 2**53, which float64 rounds ({cell} "
                f"in {raw.place(rounded)}): --drop {shlex.quote(name)} leaves out an identifier; or subtract an offset"
            )
    if bad:
        mark = " with decimal commas" if decimal == "," else ""
        more = f", ... ({len(bad)} columns in all)" if len(bad) > 5 else ""
        raise ValueError(
            f"{path}: every column must be of plain numbers{mark}, and these are not: {', '.join(bad[:5])}{more}: "
            f"mend such cells, or leave those columns out by --drop {shlex.join(names)} (--columns names those to keep)"
        )
    if booleans:
        raw.notes.append(f"false and true are read as 0 and 1 in {_list(booleans)}")
    return x


def _are_booleans(cells: NDArray[Any]) -> bool:
    return len(cells) > 0 and all(isinstance(cell, str) and cell.strip().lower() in _BOOLEANS for cell in cells)


def _fill(out: NDArray[np.float64], cells: NDArray[Any], decimal: str, slowly: bool) -> tuple[int, int] | None:
    """Write cells (n,) as numbers to out (n,); else the first row that is no number, and how many are none.

    slowly: one by one, as where cells may be 1_000: float() reads that, and no program writes it for a thousand.
    """
    if cells.dtype.kind in "biuf":
        out[:] = cells
        return None
    if cells.dtype.kind != "O":  # dates, and spans of time
        return (0, len(cells)) if len(cells) > 0 else None
    if decimal == "." and not slowly:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            out[:] = cells
            return None
    is_number = _NUMBER[decimal].fullmatch
    booleans = _are_booleans(cells)
    bad: list[int] = []
    for row, cell in enumerate(cells):
        text = cell.strip() if isinstance(cell, str) else ""
        if cell is None or (isinstance(cell, str) and text.lower() in _MISSING):
            out[row] = np.nan
        elif booleans:
            out[row] = _BOOLEANS[text.lower()]
        elif is_number(text):
            out[row] = float(text.replace(",", "."))
        else:
            bad.append(row)
    return (bad[0], len(bad)) if bad else None


def _inexact(cells: NDArray[Any], x: NDArray[np.float64]) -> int | None:
    """The first row whose whole number float64 does not hold."""
    if cells.dtype.kind in "bf":
        return None
    with np.errstate(invalid="ignore"):
        rows = np.flatnonzero((np.abs(x) >= _EXACT) & np.isfinite(x)).tolist()
    is_whole = (lambda cell: _INTEGER.fullmatch(cell)) if cells.dtype.kind == "O" else (lambda cell: True)
    return next((row for row in rows if is_whole(str(cells[row])) and int(cells[row]) != int(x[row])), None)


# -- .npy and Parquet ---------------------------------------------------------------------------------------


def _row(row: int) -> str:
    return f"row {row}"


def _read_npy(path: Path) -> _Raw:
    with open(path, "rb") as file:
        try:
            x = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, MemoryError) as error:
            if "Object arrays" in str(error):
                raise ValueError(
                    f"{path} holds Python objects, which are never read: save x.astype(float) instead"
                ) from None
            raise ValueError(f"{path} is no array of numbers in NumPy's .npy format: {error}") from None
    if x.dtype.names is not None:
        fields = _list(x.dtype.names)
        raise ValueError(
            f"{path} must hold real numbers, got a structured array of the fields {fields}: "
            "np.lib.recfunctions.structured_to_unstructured makes columns of them"
        )
    if x.dtype.kind not in "biuf":
        ways = {
            "c": "np.hstack([x.real, x.imag])",
            "U": "x.astype(float)",
            "S": "x.astype(float)",
            "M": "x.astype(float)",
        }
        way_out = f": {ways[x.dtype.kind]} makes real numbers" if x.dtype.kind in ways else ""
        raise ValueError(f"{path} must hold real numbers, got dtype {x.dtype}{way_out}")
    if x.ndim != 2 or x.shape[1] == 0:
        way_out = ""
        if x.ndim == 1:
            way_out = ": reshape(-1, 1) makes it one column"
        elif x.ndim > 2:
            way_out = f": reshape(len(x), -1) makes it ({x.shape[0]}, {x[:1].size})"
        raise ValueError(f"{path} must hold an array (n, d) with d >= 1, got shape {x.shape}{way_out}")
    return _Raw([str(i) for i in range(x.shape[1])], list(x.T), _row)


def _read_parquet(path: Path) -> _Raw:
    _need("pandas", "Parquet", "fastebm[cli]")
    _need("pyarrow", "Parquet", "pyarrow")
    import pandas as pd
    import pyarrow

    with open(path, "rb") as file:
        try:
            frame = pd.read_parquet(file, engine="pyarrow")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} can't be read as Parquet: {error}") from None
    notes: list[str] = []
    if [name for name in frame.index.names if name is not None]:
        frame = frame.reset_index()  # an index with a name is a column, as to_csv writes it
    elif not isinstance(frame.index, pd.RangeIndex):
        notes.append("the index, which has no name, is left out")
    names = _unique([str(name) for name in frame.columns], notes)
    columns = [_of_frame(frame.iloc[:, i]) for i in range(frame.shape[1])]
    return _Raw(names, columns, _row, notes=notes)


def _of_frame(series: Any) -> NDArray[Any]:
    """A pandas column as numbers if it holds numbers alone, else as objects, of which missing ones are None."""
    if isinstance(series.dtype, np.dtype) and series.dtype.kind != "O":
        return np.asarray(series.to_numpy())
    return np.asarray(series.astype(object).where(series.notna(), None).to_numpy(dtype=object))


def _need(module: str, what: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'reading {what} needs {module}: pip install "{package}"')


# -- text ---------------------------------------------------------------------------------------------------


def _read_text(path: Path, header: bool | None, layout: Layout | None) -> _Raw:
    """Cells of text, by lines; names by the first line, or a comment before it."""
    _need("pandas", "text files", "fastebm[cli]")
    notes: list[str] = []
    text = _decoded(path, notes)
    comments, skipped, declared = _preamble(text)
    body = text.split("\n", skipped)[skipped] if skipped else text
    head = body if len(body) < _HEAD else body[: body.rfind("\n", 0, _HEAD) + 1] or body
    separator = declared or _separator(head) if layout is None or layout.separator is None else layout.separator
    sample = list(itertools.islice(_records(head, separator), _SAMPLE))
    if not sample:
        raise ValueError(f"{path} has no rows: it needs lines of numbers")
    if separator != "," and not (separator == "\t" and ".tsv" in path.suffixes) and len(sample[0][1]) > 1:
        notes.append(f"the columns are separated by {_WORDS.get(separator, repr(separator))}")

    (_, first), rest = sample[0], [cells for _, cells in sample[1:]]
    if header is None:
        header = _is_header(path, first, rest, skipped + sample[0][0], notes)
    names = _names(first, rest) if header else None
    width = len(first if names is None else names)
    if header:
        line = sample[0][0]
        body, skipped = body.split("\n", line)[-1] if len(sample) > 1 else "", skipped + line
    elif comments and (names := _names_of_comment(comments[-1], separator, width)) is not None:
        notes.append(f"the names of the columns are taken from the comment {comments[-1]!r}")
    columns = _cells(path, body, separator, width, skipped, of_names=header)
    if names is None:
        last = f" to {width - 1}" if width > 1 else ""
        notes.append(
            f"the file has no line of names, so columns are called 0{last}: --header takes its first line as one"
        )
        names = [str(i) for i in range(width)]
    else:
        names = _unique([name.strip() or f"Unnamed: {i}" for i, name in enumerate(names)], notes)
    marks = "".join(mark for mark in ",._" if mark in body and (mark != separator or '"' in body))
    return _Raw(names, columns, _lines(body, separator, skipped), header, separator, marks, notes)


def _decoded(path: Path, notes: list[str]) -> str:
    """The file's text, with every line ended by a newline character."""
    opener = _OPENERS.get(path.suffix.lower(), Path.open)
    with cast(IO[bytes], opener(path, "rb")) as file:
        try:
            data = file.read()
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, OSError) as error:
            raise ValueError(f"{path} can't be read: {error}") from None
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        if is_utf16:
            raise ValueError(f"{path} begins like text in UTF-16 and is none: save it in UTF-8") from None
        text = data.decode("latin-1")
        if "\0" not in text:
            notes.append("the text is not in UTF-8, so it is read as Latin-1")
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8: it holds zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _preamble(text: str) -> tuple[list[str], int, str | None]:
    """Comments before the first line, the number of lines up to it, and the separator where Excel's "sep=;" says it."""
    comments: list[str] = []
    declared = None
    number = 0
    for number, line in enumerate(io.StringIO(text)):
        if line.startswith("#"):
            comments.append(line[1:].strip())
        elif match := re.fullmatch(r'"?sep=(.)"?\s*', line, re.IGNORECASE):
            declared = match[1]
        elif line.strip():
            return comments, number, declared
    return comments, number + 1 if text.endswith("\n") else number, declared


def _records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, from 1; cells) of each record that is not blank."""
    lines: Iterator[str] = io.StringIO(text)
    if separator == " ":
        lines = (" ".join(line.split()) + "\n" for line in lines)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        for cells in reader:
            if len(cells) > 1 or (cells and cells[0].strip()):
                yield reader.line_num, cells
    except csv.Error as error:  # a cell of more than 131,072 characters
        raise ValueError(f"line {reader.line_num + 1} of the text is no line of a table: {error}") from None


def _is_number(cell: str) -> bool:
    return any(form.fullmatch(cell) for form in _NUMBER.values())


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in _MISSING


def _separator(text: str) -> str:
    """The separator that cuts lines into as many cells each, and most of them into numbers."""
    best, most = ",", (0.0, 0.0)

    def is_value(cell: str) -> bool:
        # Numbers with thousands too, which are refused, but as cells of their own.
        word = cell.strip().lower()
        return word in _MISSING or word in _BOOLEANS or _is_number(cell) or bool(_GROUPED.fullmatch(word))

    for separator in "\t;|, ":
        cells = [cells for _, cells in itertools.islice(_records(text, separator), _SAMPLE)]
        rows = cells[1:] or cells
        if not rows or max(map(len, rows)) < 2:
            continue
        width, count = Counter(map(len, rows)).most_common(1)[0]
        flat = [cell for row in rows for cell in row]
        numbers = sum(map(is_value, flat)) / len(flat)
        score = (count / len(rows) * numbers, count / len(rows))
        # Blanks also stand within dates and text: they separate only where that leaves numbers alone.
        if width > 1 and score > most and (separator != " " or most == (0.0, 0.0) or numbers == 1.0):
            best, most = separator, score
    return best


def _is_header(path: Path, first: list[str], rest: list[list[str]], line: int, notes: list[str]) -> bool:
    """Whether the first line holds names. What is not plain is noted, and what is open is an error."""
    columns = range(len(first))
    below = [[cells[i] for cells in rest if i < len(cells)] for i in columns]
    number = [_is_number(cell) for cell in first]
    boolean = [cell.strip().lower() in _BOOLEANS for cell in first]
    texts = [i for i, cell in enumerate(first) if not (number[i] or boolean[i] or _is_missing(cell))]
    if not any(number) and not any(boolean):
        return bool(texts)
    shown = ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
    taken = f"the first line ({shown}) is taken as the names of the columns: --no-header reads it as a row"
    unclear = f"{path}: line {line} ({shown}) may be names or a row: say so by --header or --no-header"
    like_names = any(number) and _like_names([(cell, below[i]) for i, cell in enumerate(first) if number[i]])
    like_names |= any(number[i] and below[i] and all(c.strip().lower() in _BOOLEANS for c in below[i]) for i in columns)
    if not texts:
        if any(boolean):
            return False
        # Above an index there may be no name, but every other column has one.
        if not first[0].strip() and all(number[1:]) and _counts(below[0]):
            notes.append(taken)
            return True
        if not like_names or not all(number[1:]) or (not number[0] and first[0].strip()):
            return False
        if number[0] and _counts([first[0], *below[0]]):
            raise ValueError(unclear)  # an index may begin so
        notes.append(taken)
        return True
    comes_again = any(first[i] in below[i] for i in texts)
    if not comes_again and any(below[i] and all(_is_number(c) or _is_missing(c) for c in below[i]) for i in texts):
        notes.append(taken)  # a word above numbers
        return True
    if comes_again or not all(first[i].lstrip()[0].isalpha() for i in texts):  # a word of data, or a date
        if like_names:
            raise ValueError(unclear)
        return False
    if not like_names:
        raise ValueError(unclear)
    notes.append(taken)
    return True


def _like_names(columns: Sequence[tuple[str, list[str]]]) -> bool:
    """Whether numbers in the first line, each with the cells below it, are the names of columns.

    They are if they count up (0, 1, 2 or 2019, 2020, 2021), if they are whole and no number below is, or if they rise
    or fall from column to column, eight at least, and no other line does: wavelengths, say.
    """
    first = [float(cell.replace(",", ".")) for cell, _ in columns]
    are_whole = all(_INTEGER.fullmatch(cell) for cell, _ in columns)
    if all(value == first[0] + i and value.is_integer() for i, value in enumerate(first)) and (
        len(first) > 2 or (are_whole and first[0] in (0.0, 1.0))
    ):
        return True
    rows = list(zip(*(cells for _, cells in columns), strict=False))
    if not rows:
        return False
    # Of 20 rows of data with one decimal each, one in 10 of which is written as a whole number, most show one.
    if are_whole and len(rows) >= 20 and not any(_INTEGER.fullmatch(cell) for row in rows for cell in row):
        return True
    return len(first) >= 8 and _is_monotone([cell for cell, _ in columns]) and not any(map(_is_monotone, rows))


def _is_monotone(cells: Sequence[str]) -> bool:
    if not all(map(_is_number, cells)):
        return False
    steps = np.diff([float(cell.replace(",", ".")) for cell in cells])
    return bool((steps > 0).all() or (steps < 0).all())


def _counts(cells: list[str]) -> bool:
    """Whether whole numbers rise by one from each cell to the next."""
    return (
        len(cells) > 1
        and all(map(_INTEGER.fullmatch, cells))
        and all(int(b) - int(a) == 1 for a, b in itertools.pairwise(cells))
    )


def _names(first: list[str], rest: list[list[str]]) -> list[str]:
    """The first line, with an empty name before it where R wrote none for the names of its rows."""
    is_short = len(first) > 1 and bool(rest) and all(len(cells) == len(first) + 1 for cells in rest)
    is_short = is_short and any(cells[-1].strip() for cells in rest)  # no separators that end the lines
    return ["", *first] if is_short else first


def _names_of_comment(comment: str, separator: str, width: int) -> list[str] | None:
    """The names in the comment above the first line, as numpy.savetxt writes them, if it has as many cells."""
    cells = next((cells for _, cells in _records(comment, separator)), [])
    if width == 1 or len(cells) != width:
        return None
    # A row of numbers that is commented out is no line of names.
    is_row = all(map(_is_number, cells)) and not _like_names([(cell, []) for cell in cells])
    return None if is_row else cells


def _unique(names: list[str], notes: list[str]) -> list[str]:
    """As pandas does: a name that comes again is x.1, then x.2."""
    seen: dict[str, None] = {}
    for name in names:
        new = next(new for k in itertools.count() if (new := f"{name}.{k}" if k else name) not in seen)
        seen[new] = None
    if renamed := [new for new, name in zip(seen, names, strict=True) if new != name]:
        notes.append(f"names that come again are numbered: {_list(renamed)}")
    return list(seen)


def _lines(body: str, separator: str, skipped: int) -> Callable[[int], str]:
    """Row -> its line in the file, in words. Lines are counted at the first call, for errors alone."""

    @functools.cache
    def lines() -> list[int]:
        return [skipped + line for line, _ in _records(body, separator)]

    return lambda row: f"line {lines()[row]}"


def _cells(path: Path, body: str, separator: str, width: int, skipped: int, *, of_names: bool) -> list[NDArray[Any]]:
    """The cells of each column, (n,) objects, all of them strings.

    Raises:
        ValueError: a line has another number of cells, or a quote is never closed.
    """
    import pandas as pd

    if not body.strip():
        return [np.empty(0, object) for _ in range(width)]
    try:
        frame = pd.read_csv(
            io.StringIO(body),
            sep=r"\s+" if separator == " " else separator,
            header=None,
            dtype=object,  # numbers are made of the text here, in the same way by every version of pandas
            keep_default_na=False,
            skipinitialspace=True,
            low_memory=False,
        )
    except pd.errors.ParserError as error:
        if "inside string" in str(error):
            begins = [0, *(line for line, _ in _records(body, separator))][-2] + 1
            raise ValueError(f"{path}: a quote is opened in line {skipped + begins} and never closed") from None
        _require_even(path, body, separator, width, skipped, of_names=of_names)
        raise ValueError(f"{path}: {error}") from None
    cells = [frame.iloc[:, i].to_numpy(dtype=object) for i in range(frame.shape[1])]
    # pandas fills short lines up with nothing.
    if len(cells) != width or any(cell == "" or cell != cell for cell in cells[-1]):
        _require_even(path, body, separator, width, skipped, of_names=of_names)
    return cells


def _require_even(path: Path, body: str, separator: str, width: int, skipped: int, *, of_names: bool) -> None:
    for line, cells in _records(body, separator):
        if len(cells) != width:
            first = "the line of names" if of_names else "the first line"
            hint = "mend it, or delete what is no line of the table"
            if len(cells) == 2 * width and separator == "," and all(map(_is_number, cells)):
                hint = "decimal commas need another separator, such as ;"
            raise ValueError(
                f"{path}: every line must have as many cells: line {skipped + line} has {len(cells)}, {first} has "
                f"{width} (separated by {_WORDS.get(separator, repr(separator))}): {hint}"
            )
