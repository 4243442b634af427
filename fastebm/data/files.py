"""The user's own files: text (CSV, TSV), Parquet and .npy, read by pandas as columns of numbers.

What is decided for the user is said in a note, and ``Layout`` records it, so that a resumed run reads the same values.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import itertools
import math
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..words import did_you_mean, listed

__all__ = ["MAX_LABELS", "Layout", "Table", "find", "read", "read_images"]

_TEXT = (".csv", ".tsv", ".txt")
_WORDS = {"\t": "tabs", ";": "semicolons", "|": "'|'", ",": "commas", " ": "spaces"}

# What a cell of the first line may be if that is a row: a number, true or false, or nothing.
_VALUE = re.compile(
    r"([+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|true|false|-?nan|<?na>?|n/a|null|none|\?|)", re.I
)
_DECIMAL_COMMA = r"\s*[+-]?\d*,?\d+([eE][+-]?\d+)?\s*"
# Rows from which on a column of consecutive whole numbers is an index and no chance.
_MIN_INDEX = 10

# Words of more kinds than this are no labels.
MAX_LABELS = 20

_EXACT = 2.0**53  # float64 holds every whole number below
_THOUSANDS = r"\s*[+-]?[1-9]\d{0,2},\d{3}\s*"  # or a decimal comma: 1,234


@dataclass(frozen=True)
class Layout:
    """How a file was read: with it the same file gives the same values.

    positions: of the columns that are kept, from 0, in the order of the states. label: of the column of labels; value:
    the label of the rows to train on, None: of all. The others are of text. header: whether the first line holds names.
    separator: " " is any white space. skip: the number of comment lines before the first.
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

    columns: their names. x: (n, d) float64, NaN where a value is missing. place: a row's place in the file, in words.
    notes: what was decided for the user, one line each. labels: (n,) words, of the column of labels if there is one.
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
        """(n,) of the rows in the file, from 0."""
        return np.arange(len(self.x)) if self.kept is None else self.kept

    def rows(self, kept: NDArray[np.bool_]) -> Table:
        """The table of some rows alone. kept: (n,)."""
        at = np.flatnonzero(kept)
        labels = None if self.labels is None else self.labels[at]
        return dataclasses.replace(
            self, x=self.x[at], labels=labels, place=lambda row: self.place(int(at[row])), kept=self.numbers[at]
        )


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
    """A file's columns of numbers.

    Args:
        columns: names of those to keep, in this order; without them all that are of use: not one that counts the rows,
            is the same in every row, or is of words. drop: names of those to leave out.
        header: of text: whether the first line holds names; None: found out.
        label: NAME or NAME=VALUE: a column of labels, which is left out; and the label of the rows to train on.
        layout: of an earlier reading, which is repeated; the other options are not looked at.
        by_position: take all columns for ``columns`` where there are as many, and none has one of these names.

    Raises:
        ValueError: the file is of no kind that can be read, or a column is not of numbers.
        OSError: the file can't be opened.
    """
    suffix, notes = path.suffix.lower(), list[str]()
    is_text = suffix in _TEXT
    how, text = layout or Layout(), ""
    if not is_text and suffix not in (".parquet", ".npy"):
        ways = "decompress it, or read it with pandas, NumPy or PyTorch and save it by to_csv or np.save"
        raise ValueError(f"data must be text ({', '.join(_TEXT)}), .parquet or .npy, got {path}: {ways}")
    if not is_text and header is not None:
        raise ValueError(f"--header and --no-header are for text files, got {path}")
    if is_text:
        text = _decoded(path)
        how = layout or _found(path, text, header, notes)
        # Comments become blank lines, which pandas passes over and counts.
        text = "\n" * how.skip + text.split("\n", how.skip)[-1]
        frame = _parsed(path, text, how)
    else:
        frame = _read_npy(path) if suffix == ".npy" else _read_parquet(path, notes)
    frame.columns = frame.columns.map(str)

    def place(row: int) -> str:
        # The line is too small below a cell that holds line breaks.
        lines = itertools.islice(_lines(text), row + bool(how.header), None)
        return f"line {next(lines)[0]}" if is_text else f"row {row}"

    if layout is None:
        if by_position and frame.shape[1] == len(columns) and not {*columns} & {*frame.columns}:
            notes.append(f"it has none of the names {listed(columns)}, so its columns are taken in their order")
            frame.columns = list(columns)
        if label is not None:
            how = _with_label(path, frame, how, label)
        how = dataclasses.replace(how, positions=_positions(path, frame, how, columns, drop, notes))
        if is_text and _has_decimal_commas(path, frame.iloc[:, list(how.positions)], place):
            notes.append("decimal commas are read as decimal points")
            how = dataclasses.replace(how, decimal=",")
            frame = _parsed(path, text, how).set_axis(frame.columns, axis=1)
    if (last := max(how.positions)) >= frame.shape[1]:
        raise ValueError(f"{path} has {frame.shape[1]} columns, and column {last} was read before: put it back")
    labels = None if how.label is None else _labels(frame.iloc[:, how.label])
    frame = frame.iloc[:, list(how.positions)]
    x = _numbers(path, frame, how, place, notes)
    return Table(tuple(map(str, frame.columns)), x, place, how, tuple(notes), labels)


def _labels(cells: Any) -> NDArray[np.str_]:
    """As words; whole numbers without a point, nothing for a missing one."""
    return np.array(["" if cell != cell else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells])


def _with_label(path: Path, frame: Any, layout: Layout, label: str) -> Layout:
    names = list(frame.columns)
    name, value = (label, None) if label in names or "=" not in label else label.rsplit("=", 1)
    if name not in names:
        raise ValueError(f"{path} has no column {name!r}{did_you_mean(name, names)}: it has {listed(names, 20)}")
    position = names.index(name)
    found = Counter(_labels(frame.iloc[:, position]).tolist())
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


def _positions(
    path: Path, frame: Any, layout: Layout, columns: Sequence[str], drop: Sequence[str], notes: list[str]
) -> tuple[int, ...]:
    """Of the columns to keep; those that are of no use are left out, unless they are named."""
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
    if len(why_not) == len(kept):  # the error of what can't be used says more than that nothing is left
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
    """What is wrong with a column that nobody named, in words; None: it is of use."""
    from pandas.api.types import is_bool_dtype, is_integer_dtype, is_numeric_dtype

    values = cells.dropna()
    if values.empty:
        return "is empty"
    if len(values) == len(cells) and values.nunique() == 1:
        return f"holds {str(_labels(values.iloc[:1])[0])!r} in every row"
    if (
        is_integer_dtype(cells)
        and len(cells) >= _MIN_INDEX
        and (np.diff(cells.to_numpy(np.float64, na_value=np.nan)) == 1).all()
    ):
        return "counts the rows, as an index does"
    if is_numeric_dtype(cells) or is_bool_dtype(cells):
        return None
    words = values.astype(str)
    # A digit may be a number that is written in another way, or a date.
    if words.str.contains(r"\d").any() or words.str.fullmatch(r"\s*").any():
        return None
    found = words.value_counts().index
    label = f", which --label {shlex.quote(str(cells.name))} takes for classes" if len(found) <= MAX_LABELS else ""
    return f"is of words ({listed([str(word)[:40] for word in found], 3)}){label}"


def _has_decimal_commas(path: Path, frame: Any, place: Callable[[int], str]) -> bool:
    """Whether a column of words is of numbers with commas, of which one at least is no thousand."""
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


def _numbers(
    path: Path, frame: Any, layout: Layout, place: Callable[[int], str], notes: list[str]
) -> NDArray[np.float64]:
    """The columns of a frame, (n, d) float64; missing values are NaN."""
    import pandas as pd
    from pandas.api.types import infer_dtype, is_bool_dtype, is_numeric_dtype

    x = np.empty(frame.shape)
    bad = {}
    for j, (name, cells) in enumerate(frame.items()):
        is_whole = infer_dtype(cells) == "integer"  # those beyond 64 bits are objects
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
        # A cell that is a whole row was split by the wrong mark.
        marks_in = [mark for mark in ";\t|" if any(repr(mark)[1:-1] in cell for cell in bad.values())]
        split = f" (is {_WORDS[marks_in[0]]} what separates the cells?)" if marks_in else ""
        if any(re.search(r"'[+-]?\d{1,3}([.,' ]\d{3})+([.,]\d+)?'", cell) for cell in bad.values()):
            split = " (are there marks between thousands? write 1234.5)"
        told = ", ".join([*bad.values()][:5]) + ", ..." * (len(bad) > 5)
        marks = " with decimal commas" if layout.decimal == "," else ""
        raise ValueError(
            f"{path}: columns must be of numbers{marks}, and these are not: {told}{split}: "
            f"mend such cells, or leave those columns out by --drop {shlex.join(bad)} (--columns names those to keep)"
        )
    if booleans := [name for name, cells in frame.items() if is_bool_dtype(cells)]:
        notes.append(f"false and true are read as 0 and 1 in {listed(booleans)}")
    return x


def find(path: Path) -> Path:
    """The path, if there is such a file.

    Raises:
        ValueError: there is none, with the name that was probably meant.
    """
    if not path.exists():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"{path}: No such file or directory{did_you_mean(path.name, others)}")
    return path


def read_images(path: Path, shape: tuple[int, ...]) -> Table:
    """Images of a .npy, (n, *shape) or (n, dim), as rows."""
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
    """Real numbers of a .npy; a pickle is never read."""
    with open(path, "rb") as file:
        try:
            x = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, MemoryError) as error:
            raise ValueError(f"{path} is no array of numbers in NumPy's .npy format: {error}") from None
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
            return frame.reset_index(drop=not is_named)  # with a name it is a column, as to_csv writes it
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} can't be read as Parquet: {error}") from None


def _decoded(path: Path) -> str:
    """The file's text, with every line ended by a newline character."""
    with open(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = path.read_text(encoding, errors="replace")
    if "\ufffd" in text or "\0" in text:  # what was replaced; UTF-16 without its mark
        raise ValueError(f"{path} is no text in UTF-8: save it as UTF-8")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of those that are not blank."""
    return ((i, line) for i, line in enumerate(io.StringIO(text), 1) if line.strip(" \n"))


def _found(path: Path, text: str, header: bool | None, notes: list[str]) -> Layout:
    """Comments, separator and names, by the first 50 lines."""
    lines = itertools.dropwhile(lambda line: line[1].startswith("#"), _lines(text))
    head = [(number, line.strip(" \n")) for number, line in itertools.islice(lines, 50)]
    if not head:
        raise ValueError(f"{path} has no rows: it needs lines of numbers")
    if next(_lines(text))[1].startswith("#"):
        notes.append("the first lines, which begin with #, are passed over")
    texts = [line for _, line in head]
    try:
        tables = {mark: [*csv.reader(texts, delimiter=mark, skipinitialspace=True)] for mark in _WORDS}
    except csv.Error as error:  # a cell of more than 131,072 characters
        raise ValueError(f"{path} is no table of numbers: {error}") from None

    def lines_alike(mark: str) -> float:
        width, count = Counter(map(len, tables[mark])).most_common(1)[0]
        return count if width > 1 else 0.5 * (mark == ",")  # one column needs none

    separator = max(_WORDS, key=lines_alike)
    if separator not in ",\t":
        notes.append(f"the columns are separated by {_WORDS[separator]}")
    first = [cell.strip() for cell in tables[separator][0]]
    return Layout((), _is_header(first, header, notes), separator, skip=head[0][0] - 1)


def _is_header(first: list[str], header: bool | None, notes: list[str]) -> bool:
    """Whether the first line holds names: a word, or integers that count from 0 or 1, an index before them or not."""
    if header is None:
        numbers = first if first[0] else first[1:]
        counts = bool(numbers) and any(numbers == [str(i + start) for i in range(len(numbers))] for start in (0, 1))
        header = counts or not all(map(_VALUE.fullmatch, first))
        if header and any(cell and _VALUE.fullmatch(cell) for cell in first):
            shown = ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
            notes.append(f"the first line ({shown}) is taken as the names of the columns: --no-header makes it a row")
    if not header:
        last = f" to {len(first) - 1}" if len(first) > 1 else ""
        notes.append(f"no line of names was found, so columns are called 0{last}: --header makes one of the first line")
    elif twice := [name for name, count in Counter(filter(None, first)).items() if count > 1]:
        notes.append(f"names that come again are numbered, as {twice[0] + '.1'!r} is")
    return header


def _parsed(path: Path, text: str, layout: Layout) -> Any:
    """Text as pandas reads it; a line of too many cells is an error, and one of too few has missing values."""
    import pandas as pd

    options = {"index_col": False, "skipinitialspace": True, "na_values": ["?"], "low_memory": False}
    if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1):  # later ones read every float exactly
        options["float_precision"] = "round_trip"
    separator, header = r"\s+" if layout.separator == " " else layout.separator, 0 if layout.header else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.StringIO(text), sep=separator, header=header, decimal=layout.decimal, **options)
        if layout.separator != " " or not frame.iloc[:, -1].isna().any():
            return frame
        told = "between spaces no cell may be empty, and the last of a row is"  # those after it would be shifted
    except pd.errors.ParserWarning:
        told = "the first row has more than the line of names"
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        told = str(error).strip().removeprefix("Error tokenizing data. C error: ")
    raise ValueError(
        f"{path}: every line must have as many cells, separated by {_WORDS[layout.separator or ',']}: {told} (decimal "
        "commas need another separator, such as ;)"
    )
