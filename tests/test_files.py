"""The user's own files: what is read, what is said of it, and every way in which a file can be no data.

A wrong result without a word is the worst fault, so each test holds the values, or the words of the error, or both.
"""

import bz2
import dataclasses
import functools
import gzip
import io
import json
import lzma
import pickle
import re
import signal
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from fastebm import cli, evaluate, files
from fastebm.cli import main
from fastebm.data import DataInfo, load_array, reload
from fastebm.recipe import TrainConfig, recipe

N = 60


@pytest.fixture
def table():
    """Columns of scales far apart."""
    return np.random.default_rng(0).normal([0.0, 5.0, 1e9], [1.0, 1e-3, 2.0], (N, 3))


@pytest.fixture
def frame(table):
    return pd.DataFrame(table, columns=["height", "weight", "salary"])


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def _rows(*columns, separator=",", end="\n"):
    """Lines of cells, as they are given."""
    return "".join(separator.join(map(str, row)) + end for row in zip(*columns, strict=True))


def _read(path, **options):
    """(names, values, notes) of a file by load_array, the rows sorted by the first column."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        points = load_array(path, **options)
    assert all(warning.category is UserWarning for warning in caught)
    notes = [str(warning.message).removeprefix(f"{path.name}: ") for warning in caught]
    # What a resumed run reads is the same, and says nothing more.
    info = DataInfo.from_dict(json.loads(json.dumps(TrainConfig(**recipe(points)).to_dict()))["data"])
    assert info == points.info
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = reload(info, 0)
    assert torch.equal(again.train, points.train)
    assert again.info == points.info
    table = files.read(path, layout=info.layout)
    assert table.columns == points.info.columns
    return points.info.columns, table.x, notes


def _refusal(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError) as error:  # noqa: PT011 (callers look at the words)
            load_array(path, **options)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def _floats(n, d=None, seed=0):
    """Numbers that no one takes for a header or an index."""
    return np.random.default_rng(seed).normal(size=n if d is None else (n, d))


# -- the first line -----------------------------------------------------------------------------------------


NUMBERS_AS_NAMES = {
    "pandas' 0, 1, 2": [0, 1, 2],
    "from 1": [1, 2, 3],
    "a slice's 3, 4, 5": [3, 4, 5],
    "two columns": [0, 1],
    "years": [2019, 2020, 2021, 2022],
    "wavelengths": [400, 410, 425],
    "wavelengths with decimals": [400.5, 410.5, 420.25, 430.0, 440.5, 450.5, 460.5, 471.0],
    "twenty": list(range(20)),
    "a float index": [0.0, 1.0, 2.0],
    "columns put side by side": [0, 1, 0, 1],
    "two years": [2019, 2020],
    "above true and false": [0.5, 0.25],
}


@pytest.mark.parametrize("names", NUMBERS_AS_NAMES.values(), ids=NUMBERS_AS_NAMES.keys())
@pytest.mark.parametrize("index", [False, True])
def test_numbers_in_the_first_line_are_names_and_this_is_said(tmp_path, names, index):
    x = _floats(N, len(names)) > 0 if names[0] == 0.5 else _floats(N, len(names))
    pd.DataFrame(x, columns=names).to_csv(tmp_path / "x.csv", index=index)
    columns, values, notes = _read(tmp_path / "x.csv")
    np.testing.assert_array_equal(values, x)
    assert columns[:2] == tuple(map(str, names[:2]))
    assert any("is taken as the names of the columns: --no-header reads it as a row" in note for note in notes)
    assert any("counts the rows, so it is taken for an index and left out" in note for note in notes) == index


@pytest.mark.parametrize("names", [[0, 1, 2], [1, 2, 3, 4], [7, 8, 9]])
def test_consecutive_integers_are_names_above_integers_too(tmp_path, names):
    x = np.random.default_rng(0).integers(0, 50, (N, len(names)))
    pd.DataFrame(x, columns=names).to_csv(tmp_path / "x.csv", index=False)
    columns, values, notes = _read(tmp_path / "x.csv")
    np.testing.assert_array_equal(values, x)
    assert columns == tuple(map(str, names))
    assert "--no-header" in notes[0]
    _, values, notes = _read(tmp_path / "x.csv", header=False)
    np.testing.assert_array_equal(values, [names, *x])
    assert "--header takes its first line as one" in notes[0]


ROWS_WITHOUT_NAMES = {
    "floats": _floats((N), 3),
    "integers": np.random.default_rng(5).integers(10, 90, (N, 4)),
    "one column": np.round(_floats((N), 1), 2),
    "rising rows": np.cumsum(np.abs(_floats(N, 9)) + 0.1, axis=1),
    "numbers with an exponent": 1e-30 * _floats(N, 2),
    "true and false": np.random.default_rng(4).random((N, 3)) < 0.5,
    "one true or false": np.random.default_rng(5).random((N, 1)) < 0.5,
    "zeros and ones": np.random.default_rng(4).integers(0, 2, (N, 5)),
}


@pytest.mark.parametrize("x", ROWS_WITHOUT_NAMES.values(), ids=ROWS_WITHOUT_NAMES.keys())
@pytest.mark.parametrize("index", [False, True])
def test_a_first_line_of_data_is_data_and_the_lack_of_names_is_said(tmp_path, x, index):
    pd.DataFrame(x).to_csv(tmp_path / "x.csv", index=index, header=False)
    columns, values, notes = _read(tmp_path / "x.csv")
    np.testing.assert_array_equal(values, x)
    assert columns == tuple(str(i + index) for i in range(x.shape[1]))
    assert "no line of names" in notes[0]
    assert any("read as 0 and 1" in note for note in notes) == (x.dtype == bool)
    assert any("taken for an index and left out" in note for note in notes) == index
    if index:
        _, values, _ = _read(tmp_path / "x.csv", columns=[str(i) for i in range(x.shape[1] + 1)])
        np.testing.assert_array_equal(values, np.c_[np.arange(N), x])


WORDS_AS_NAMES = ["a,b", "a,2", "id,2019", "1st,x", '"height, cm",weight', " x , y ", "x;y,z", "_a,#", "°C,µ"]


@pytest.mark.parametrize("line", WORDS_AS_NAMES)
def test_a_word_above_numbers_is_a_name(tmp_path, line):
    x = _floats(N, 2)
    path = _write(tmp_path / "x.csv", line + "\n" + _rows(*x.T))
    columns, values, notes = _read(path)
    np.testing.assert_array_equal(values, x)
    expected = next(iter(pd.read_csv(io.StringIO(line), skipinitialspace=True).columns))
    assert columns[0] == expected.strip()
    assert (notes == []) == (not any(cell.isdigit() for cell in line.split(",")))


LABELS = ["red", "blue", "green"] * (N // 3)
DATES = [f"2024-01-{1 + i % 28:02d}" for i in range(N)]


@pytest.mark.parametrize(
    ("column", "example"),
    [
        (LABELS, "'red'"), (DATES, "'2024-01-01'"), (["$5.20"] * N, r"'\$5.20'"), (["50%"] * N, "'50%'"),
        (["12:30"] * N, "'12:30'"), (["1 234"] * N, "'1 234'"), (["0x1F"] * N, "'0x1F'"), (["1_000"] * N, "'1_000'"),
    ],
)  # fmt: skip
def test_a_line_of_data_with_text_is_no_line_of_names(tmp_path, column, example):
    x = _floats(N, 2)
    path = _write(tmp_path / "x.csv", _rows(*x.T, column))
    assert re.search(rf"not: '2' \({example} in line 1 and 59 more\)", _refusal(path))
    columns, values, _ = _read(path, drop=["2"])
    assert columns == ("0", "1")
    np.testing.assert_array_equal(values, x)


@pytest.mark.parametrize(
    "text",
    [
        "name,5,7\n" + _rows([f"person {chr(97 + i % 26)}{i}" for i in range(N)], range(N), range(7, N + 7)),
        "1,2,red\n" + _rows(range(5, N + 5), [3, 4] * (N // 2), LABELS),
        "0\n" + _rows(range(1, N + 1)),
        "0,1\n" + _rows(range(1, N + 1), [4, 6] * (N // 2)),
        "1,2,3\n" + _rows(range(2, N + 2), [4, 6] * (N // 2), _floats(N)),
        "x1,5.5\n" + _rows([f"x{i + 2}" for i in range(N)], _floats(N)),
    ],
)
def test_what_may_be_names_or_a_row_is_asked(tmp_path, text):
    path = _write(tmp_path / "x.csv", text)
    assert "line 1 " in (message := _refusal(path))
    assert "may be names or a row: say so by --header or --no-header" in message
    drop = ["0"] if text[0].isalpha() else ["2"] if "red" in text else []
    _, values, _ = _read(path, header=False, drop=drop)
    assert len(values) == N + 1


# -- the index ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda frame: frame.to_csv(),
        lambda frame: frame.to_csv(sep=";"),
        lambda frame: frame.set_axis(range(1, N + 1)).to_csv(),
        lambda frame: frame.set_axis(range(100, N + 100)).to_csv(),
        lambda frame: frame.reset_index(names="Unnamed: 0").to_csv(index=False),
        lambda frame: frame.reset_index(names="Unnamed: 0").to_csv(),  # read and written once more
        lambda frame: "height,weight,salary\n" + frame.to_csv(header=False),  # R names no rows
        lambda frame: frame.to_csv(quoting=1),
        lambda frame: frame.to_csv(sep="\t"),
    ],
)
def test_an_unnamed_index_is_left_out_and_this_is_said(tmp_path, frame, write):
    path = _write(tmp_path / "x.csv", write(frame))
    columns, values, notes = _read(path)
    assert columns == ("height", "weight", "salary")
    np.testing.assert_array_equal(values, frame)
    assert any("'Unnamed: 0' has no name and counts the rows" in note for note in notes)
    columns, values, _ = _read(path, columns=["Unnamed: 0", "salary"])
    assert columns == ("Unnamed: 0", "salary")
    np.testing.assert_array_equal(values[:, 1], frame["salary"])
    assert _read(path, drop=["Unnamed: 0", "height"])[0] == ("weight", "salary")


def test_an_unnamed_column_that_may_be_an_index_is_asked_or_said(tmp_path, frame):
    shuffled = frame.sample(frac=1, random_state=0)
    path = _write(tmp_path / "x.csv", shuffled.to_csv())
    assert "--drop 'Unnamed: 0' leaves it out, --columns 'Unnamed: 0' height weight salary keeps it" in _refusal(path)
    np.testing.assert_array_equal(_read(path, drop=["Unnamed: 0"])[1], shuffled)
    path = _write(tmp_path / "x.csv", frame.set_axis(_floats(N)).to_csv())
    columns, _, notes = _read(path)
    assert columns == ("Unnamed: 0", "height", "weight", "salary")
    assert notes == ["column 1 has no name, and is called 'Unnamed: 0'"]
    path = _write(tmp_path / "x.csv", frame.set_axis(LABELS).to_csv())
    message = _refusal(path)
    assert "these are not: 'Unnamed: 0' ('red' in line 2 and 59 more): mend such cells, or leave" in message
    assert "by --drop 'Unnamed: 0'" in message
    path = _write(tmp_path / "x.csv", frame.set_axis(pd.MultiIndex.from_product([range(6), range(10)])).to_csv())
    assert "column 'Unnamed: 0' has no name and holds whole numbers, as an index may" in _refusal(path)
    assert _read(path, drop=["Unnamed: 0", "Unnamed: 1"])[0] == ("height", "weight", "salary")
    # With a name it is the user's own column; that it rises is said.
    path = _write(tmp_path / "x.csv", frame.to_csv(index_label="id"))
    columns, _, notes = _read(path)
    assert columns == ("id", "height", "weight", "salary")
    assert notes == [
        "column 'id' holds whole numbers that rise from row to row, as an index or a time does: --drop id leaves it out"
    ]


def test_a_lone_counting_column_is_kept(tmp_path):
    columns, values, notes = _read(_write(tmp_path / "x.csv", _rows(range(5, N + 5))))
    assert columns == ("0",)
    assert values[:, 0].tolist() == list(range(5, N + 5))
    assert "rise from row to row" in notes[-1]


# -- separators, decimals, encodings ------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " ", "   "])
@pytest.mark.parametrize("header", [True, False])
def test_separators_are_found(tmp_path, table, separator, end, header):
    names = separator.join(["height", "weight", "salary"]) + end if header else ""
    path = _write(tmp_path / "x.csv", names + _rows(*table.T, separator=separator, end=end) + end)
    columns, values, notes = _read(path)
    assert columns == (("height", "weight", "salary") if header else ("0", "1", "2"))
    np.testing.assert_array_equal(values, table)
    assert any("separated by" in note for note in notes) == (separator != ",")


@pytest.mark.parametrize(
    "write",
    [
        lambda frame: frame.to_csv(sep=";", decimal=",", index=False),
        lambda frame: frame.to_csv(sep="\t", decimal=",", index=False),
        lambda frame: frame.to_csv(sep="|", decimal=",", index=False),
        lambda frame: frame.to_csv(sep=" ", decimal=",", index=False),
        lambda frame: frame.to_csv(sep=",", decimal=",", index=False),  # pandas puts quotes around
        lambda frame: frame.to_csv(sep=";", decimal=","),
        lambda frame: frame.to_csv(sep=";", decimal=",", quoting=1, index=False),
        lambda frame: "sep=;\n" + frame.to_csv(sep=";", decimal=",", index=False),
    ],
)
def test_decimal_commas_are_read_and_said(tmp_path, frame, write):
    frame["count"] = np.random.default_rng(0).integers(0, 9, N)
    frame.iloc[0, 0] = 1e-7  # with an exponent
    columns, values, notes = _read(_write(tmp_path / "x.csv", write(frame)))
    assert columns == ("height", "weight", "salary", "count")
    np.testing.assert_array_equal(values, frame)
    assert "decimal commas are read as decimal points" in notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_rows(["1.234,5"] * N, ["2,5"] * N, separator=";"), "'1.234,5' in line 1"),
        (_rows(['"1,234.5"'] * N, _floats(N)), "'1,234.5' in line 1"),
        (_rows(['"1,234"'] * N, [2.5] * N), "'1,234' in column '0', line 1, may be a thousand or a decimal comma"),
        (_rows(["12,345", "1,5"] * 30, ["1.5"] * N, separator=";"), "decimal commas, and these are not: '1' ('1.5' in"),
        (_rows(["1,234"] * N, ["123,456"] * N, separator="\t"), "may be a thousand or a decimal comma"),
        (_rows(["1'234"] * N, ["5,5"] * N, separator=";"), '("1\'234" in line 1 and 59 more)'),
        (
            "x\n" + _rows(["1,5"] * N),
            "line 2 has 2, the line of names has 1 (separated by commas): decimal commas need",
        ),
        ("x,y\n" + _rows(["1,5"] * N, ["2,5"] * N), "line 2 has 4, the line of names has 2"),
    ],
)
def test_thousands_and_mixed_decimals_are_named(tmp_path, text, message):
    assert message in _refusal(_write(tmp_path / "x.csv", text))


def test_three_decimals_between_semicolons_are_said(tmp_path):
    """Where each cell with a point might be a thousand: 1.234 in a European hand."""
    for cells, said in (
        (["1.234", "12.345", "7"], True),
        (["1.234", "0.345", "7"], False),
        (["1.5", "2.5", "7"], False),
    ):
        for separator in ";,":
            path = _write(
                tmp_path / "x.csv",
                "a,b\n".replace(",", separator) + _rows(cells * 20, _floats(N) > 0, separator=separator),
            )
            _, values, notes = _read(path)
            assert values[0, 0] == float(cells[0])
            note = "'1.234' in column 'a' is read as a decimal, not as a thousand"
            assert (note in notes) == (said and separator == ";")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x,zip\n" + _rows(_floats(N), [f"{i * 997 % 100_000:05d}" for i in range(N)]), "'00000' in column 'zip'"),
        (_rows([f"{v:.5f}".replace(".", ",") for v in 1 + np.abs(_floats(N))]), "in column '1'"),
        ("t;x\n" + _rows([f"{i % 24:02d}" for i in range(N)], _floats(N), separator=";"), "'00' in column 't'"),
    ],
)
def test_whole_numbers_that_begin_with_0_are_said(tmp_path, text, code):
    _, _, notes = _read(_write(tmp_path / "x.csv", text))
    assert any(code in note and "is read as a whole number, though it begins with 0" in note for note in notes)


def test_texts_in_other_encodings(tmp_path, table):
    text = "größe,µ,salary\n" + _rows(*table.T)
    for encoding, said in (
        ("utf-8", 0), ("utf-8-sig", 0), ("utf-16", 0), ("latin-1", 1), ("cp1252", 1),
    ):  # fmt: skip
        columns, values, notes = _read(_write(tmp_path / "x.csv", text.encode(encoding)))
        assert columns == ("größe", "µ", "salary")
        np.testing.assert_array_equal(values, table)
        assert len(notes) == said, notes
    assert "no text in UTF-8: it holds zero bytes" in _refusal(_write(tmp_path / "x.csv", text.encode("utf-16-le")))
    assert "zero bytes" in _refusal(_write(tmp_path / "x.csv", _npy(table)))
    assert "UTF-16 and is none" in _refusal(_write(tmp_path / "x.csv", b"\xff\xfe1,2\n,"))


@pytest.mark.parametrize(
    ("name", "pack"), [("x.csv.gz", gzip.compress), ("x.TSV.bz2", bz2.compress), ("x.txt.xz", lzma.compress)]
)
def test_packed_text(tmp_path, table, name, pack):
    data = pack(("a\tb\tc\n" + _rows(*table.T, separator="\t")).encode())
    columns, values, _ = _read(_write(tmp_path / name, data))
    assert columns == ("a", "b", "c")
    np.testing.assert_array_equal(values, table)
    for damaged in (data[:-20], b"1,2\n" * N):
        assert "can't be read" in _refusal(_write(tmp_path / name, damaged))


@pytest.mark.parametrize("separator", [",", " ", "\t", ";"])
@pytest.mark.parametrize("comments", [True, False])
def test_what_numpy_writes(tmp_path, table, separator, comments):
    header = separator.join(["height", "weight", "salary"])
    np.savetxt(
        tmp_path / "x.txt", table, delimiter=separator, header=f"made today\n{header}" if comments else "", fmt="%.17g"
    )
    columns, values, notes = _read(tmp_path / "x.txt")
    assert columns == (("height", "weight", "salary") if comments else ("0", "1", "2"))
    np.testing.assert_array_equal(values, table)
    assert any("names of the columns are taken from the comment" in note for note in notes) == comments


def test_comments_that_are_no_names(tmp_path, table):
    rows = _rows(*table.T)
    for comment in ("# by Ann\n", "#\n", "# 1.5,2.5,3.5\n", "# a,b\n", "\n# a,b,c,d\n\n"):
        columns, values, _ = _read(_write(tmp_path / "x.csv", comment + rows))
        assert columns == ("0", "1", "2")
        np.testing.assert_array_equal(values, table)
    columns, values, _ = _read(_write(tmp_path / "x.csv", "# u,v,w\na,b,c\n" + rows))
    assert columns == ("a", "b", "c")
    np.testing.assert_array_equal(values, table)


def test_blank_lines_quotes_and_commas_at_the_end(tmp_path, table):
    quoted = "".join(",".join(f'"{cell!r}"' for cell in row) + "\n\n   \n" for row in table.tolist())
    columns, values, notes = _read(_write(tmp_path / "x.csv", '\n"a","b, ""c""\nand d", e\n' + quoted))
    assert columns == ("a", 'b, "c"\nand d', "e")
    np.testing.assert_array_equal(values, table)
    assert notes == []
    columns, values, notes = _read(_write(tmp_path / "x.csv", "a,b,c,\n" + _rows(*table.T, [""] * N)))
    assert columns == ("a", "b", "c")
    np.testing.assert_array_equal(values, table)
    assert notes == ["column 4 has neither a name nor values, and is left out"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n" + "1,2\n" * 70 + "3\n", "line 72 has 1, the line of names has 2"),
        ("a,b\n" + "1,2\n" * 70 + "3,4,5\n1,2\n", "line 72 has 3, the line of names has 2"),
        ("1.5,2\n" + "1,2\n" * 300 + "\n3\n", "line 303 has 1, the first line has 2"),
        ("a,b,c\n" + "1,2\n" * 70, "line 2 has 2, the line of names has 3"),
        ("Measured today\n\na,b\n" + "1,2\n" * 70, "line 3 has 2, the line of names has 1"),
        ("a;b\n" + "1;2\n" * 70 + "# end\n", "line 72 has 1, the line of names has 2 (separated by semicolons)"),
        ("a b\n" + "1 2\n" * 70 + "1 2 3\n", "line 72 has 3, the line of names has 2 (separated by spaces)"),
        ('a,b\n"x\ny",2\n' + "1,2\n" * 70 + "3\n", "line 74 has 1"),
        ("a,b\n" + "1,2\n" * 70 + '"3,4\n', "a quote is opened in line 72 and never closed"),
        ("a,b\n1\n" + "1,2\n" * 70, "line 2 has 1, the line of names has 2"),
        ("a,b\n" + "1,2,\n" * 70, "line 2 has 3, the line of names has 2"),
        (
            "<html>\n" + "<p>hi, there</p>\n" * 70,
            "line 2 has 2, the line of names has 1 (separated by commas): mend it",
        ),
    ],
)
def test_uneven_lines_are_named(tmp_path, text, message):
    path = _write(tmp_path / "x.csv", text)
    assert message in _refusal(path)
    # Not even where the cells that lack would have been left out.
    if "b\n" in text[:4]:
        assert message in _refusal(path, drop=["b"])


# -- columns ------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path, frame):
    frame.insert(1, "date", DATES)
    frame["colour of hair"] = LABELS
    frame.to_csv(tmp_path / "x.csv", index=False)
    return tmp_path / "x.csv"


def test_columns_are_chosen_by_name(mixed, frame):
    message = _refusal(mixed)
    assert "'date' ('2024-01-01' in line 2 and 59 more), 'colour of hair' ('red' in line 2 and 59 more)" in message
    assert "or leave those columns out by --drop date 'colour of hair' (--columns names those to keep)" in message
    columns, values, _ = _read(mixed, drop=["date", "colour of hair"])
    assert columns == ("height", "weight", "salary")
    np.testing.assert_array_equal(values, frame[list(columns)])
    columns, values, _ = _read(mixed, columns=["salary", "height"])
    assert columns == ("salary", "height")
    np.testing.assert_array_equal(values, frame[list(columns)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ["Date"]}, "has no column 'Date' (did you mean 'date'?): --drop takes names of 'height', 'date'"),
        ({"columns": ["hieght"]}, "did you mean 'height'?): --columns takes"),
        ({"columns": ["7"]}, "has no column '7': --columns takes names of"),
        ({"columns": ["height", "height"]}, "--columns names 'height' twice"),
        ({"drop": ["height", "date", "weight", "salary", "colour of hair"]}, "--drop leaves no column"),
        ({"columns": ["height"], "drop": ["date"]}, "give one of the two"),
    ],
)
def test_columns_that_are_not_there_are_named(mixed, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_array(mixed, **options)
    assert message in str(error.value)


def test_a_counting_column_without_a_name_tells_numbers_above_the_others_are_names(tmp_path):
    x = np.random.default_rng(0).integers(0, 50, (N, 2))
    for names in ([2019, 2024], [7, 3], [0.5, 0.25]):
        pd.DataFrame(x, columns=names).to_csv(tmp_path / "x.csv")
        columns, values, notes = _read(tmp_path / "x.csv")
        assert columns == tuple(map(str, names))
        np.testing.assert_array_equal(values, x)
        assert "is taken as the names of the columns" in notes[0]


def test_a_cell_of_a_book_is_no_traceback(tmp_path):
    path = _write(tmp_path / "x.csv", "a,b\n" + "1,2\n" * 60 + "x" * 200_000 + ",1\n")
    with pytest.raises(ValueError, match="field larger than field limit"):
        load_array(path)


def test_names_that_come_again_are_numbered_as_pandas_does(tmp_path, table):
    path = _write(tmp_path / "x.csv", "a,b,a\n" + _rows(*table.T))
    columns, values, notes = _read(path)
    assert columns == tuple(pd.read_csv(path).columns) == ("a", "b", "a.1")
    np.testing.assert_array_equal(values, table)
    assert notes == ["names that come again are numbered: 'a.1'"]
    assert _read(path, columns=["a.1"])[0] == ("a.1",)


@pytest.mark.parametrize("words", [("True", "False"), ("true", "false"), ("TRUE", "FALSE")])
def test_booleans_are_0_and_1_and_this_is_said(tmp_path, words):
    x = np.random.default_rng(0).integers(0, 2, N)
    path = _write(tmp_path / "x.csv", "flag,x\n" + _rows([words[1 - i] for i in x], _floats(N)))
    _, values, notes = _read(path)
    np.testing.assert_array_equal(values[:, 0], x)
    assert notes == ["false and true are read as 0 and 1 in 'flag'"]


@pytest.mark.parametrize("word", ["", "NA", "nan", "NaN", "N/A", "null", "None", "?", "-", ".", "#N/A", "<NA>", "  "])
@pytest.mark.parametrize("decimal", [".", ","])
def test_missing_values_are_named(tmp_path, frame, word, decimal):
    text = frame.astype(object)
    text.iloc[[3, 7], 1] = np.nan
    text.iloc[0, 2] = np.nan
    path = _write(tmp_path / "x.csv", text.to_csv(index=False, sep=";", decimal=decimal, na_rep=word))
    message = _refusal(path)
    assert "missing values in 'weight' (2 of 60, first line 5), 'salary' (1 of 60, first line 2)" in message
    assert "fill them in, delete such rows, or leave such columns out by --drop weight salary" in message
    np.testing.assert_array_equal(_read(path, drop=["weight", "salary"])[1], frame[["height"]])


@pytest.mark.parametrize("word", ["inf", "-inf", "Infinity", "1e999", "-INF", "+inf"])
def test_infinite_values_are_named(tmp_path, word):
    path = _write(tmp_path / "x.csv", "a,b\n" + _rows(["1.5"] * 9 + [word] + ["2.5"] * 50, _floats(N)))
    assert "infinite values in 'a' (1 of 60, first line 11)" in _refusal(path)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("oops", "'a' ('oops' in line 11)"), ("1..5", "'1..5'"), ("5 kg", "'5 kg'"), ("€3", "'€3'"), ("12%", "'12%'"),
        ("1.2.3", "'1.2.3'"), ("3-4", "'3-4'"), ("1/2", "'1/2'"), ("2024-01-01", "'2024-01-01'"), ("yes", "'yes'"),
        ("1e", "'1e'"), ("True", "'True'"), ("<0.5", "'<0.5'"),
    ],
)  # fmt: skip
def test_one_cell_of_text_is_named(tmp_path, cell, message):
    path = _write(tmp_path / "x.csv", "a,b\n" + _rows(["1.5"] * 9 + [cell] + ["2.5"] * 50, _floats(N)))
    assert message in _refusal(path)


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**53) - 1, 10**25 + 1, 1234567890123456789])
def test_whole_numbers_that_float64_rounds_are_refused(tmp_path, number):
    path = _write(tmp_path / "x.csv", "user,x\n" + _rows([number, *range(N - 1)], _floats(N)))
    message = _refusal(path)
    assert f"column 'user' holds whole numbers beyond 2**53, which float64 rounds ({number} in line 2)" in message
    assert "--drop user" in message
    assert _read(path, drop=["user"])[0] == ("x",)
    if -(2**63) <= number < 2**64:
        dtype = np.uint64 if number >= 2**63 else np.int64
        array = np.stack([np.arange(N, dtype=dtype), np.full(N, number, dtype)], 1)
        assert f"({number} in row 0)" in _refusal(_write(tmp_path / "x.npy", _npy(array)))


def test_values_are_those_that_python_reads(tmp_path):
    cells = [
        "0.1",
        "1e-5",
        "1E5",
        "+3",
        "-0",
        ".5",
        "5.",
        "007",
        " 1 ",
        "4.9406564584124654e-324",
        "9007199254740993.0",
    ]
    cells += [repr(float(v)) for v in _floats(N) * 10.0 ** np.arange(-30, 30)]
    path = _write(tmp_path / "x.csv", "a,b\n" + _rows(cells, _floats(len(cells))))
    np.testing.assert_array_equal(files.read(path).x[:, 0], [float(cell) for cell in cells])


# -- a value that leaves the others no room -------------------------------------------------------------------


def _with(values, **cells):
    for row, value in cells.items():
        values[int(row[1:])] = value
    return values


_RNG = np.random.default_rng(3)
FLATTENED = {
    "1e12 among ones": _with(_RNG.normal(size=200), r7=1e12),
    "a lost decimal point": _with(_RNG.normal(2.0, 0.1, 100), r0=2.1e6),
    "two of them": _with(_RNG.normal(size=500), r3=1e8, r9=-1e8),
    "-9999 and wider": _with(_RNG.normal(0, 1e-3, 300), **{f"r{i}": -9999.0 for i in range(0, 300, 20)}),
    "1e20 where it is missing": _with(_RNG.normal(size=1000), **{f"r{i}": 1e20 for i in range(0, 1000, 50)}),
    "milliseconds among seconds": _with(_RNG.uniform(1.7e9, 1.7e9 + 1e3, 400), r5=1.7e12),
    "a tiny column": _with(1e-15 * _RNG.normal(size=80), r79=1.0),
    "mostly zeros, and one": _with(np.where(_RNG.random(1000) < 0.9, 0, _RNG.normal(size=1000)), r11=-3e7),
    "the last of many": _with(_RNG.normal(size=20_000), r19999=1e7),
}


@pytest.mark.parametrize("column", FLATTENED.values(), ids=FLATTENED.keys())
def test_a_value_that_flattens_its_column_is_named(tmp_path, column):
    path = _write(tmp_path / "x.csv", "good,bad one\n" + _rows(_RNG.normal(size=len(column)), column))
    message = _refusal(path)
    row = int(abs(column - np.median(column)).argmax())
    assert f"column 'bad one': {column[row]:g} in line {row + 2} lies so far out" in message
    assert "mend or delete such rows, take the logarithm, or --drop 'bad one'" in message
    assert len(_read(path, columns=["good"])[1]) == len(column)


def test_a_value_that_leaves_little_room_is_said(tmp_path):
    column = _with(_RNG.normal(size=1000), r4=1e4)
    _, values, notes = _read(_write(tmp_path / "x.npy", _npy(np.stack([column, _floats(1000)], 1))))
    assert values[4, 0] == 1e4
    assert len(notes) == 1
    assert "column '0': 10000 in row 4 lies so far out" in notes[0]
    assert "if that is no true value, mend or delete" in notes[0]


def _zeros(values, share):
    return np.where(np.random.default_rng(7).random(len(values)) < share, 0.0, values)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [60, 1000, 30_000])
def test_heavy_tails_and_rare_values_are_no_faults(tmp_path, n, seed):
    rng = np.random.default_rng(seed)
    columns = {
        "lognormal 2": rng.lognormal(0, 2, n),
        "lognormal 3": rng.lognormal(0, 3, n),
        "counts with a Cauchy tail": np.floor(np.abs(rng.standard_cauchy(n))),
        "Pareto 1.1": rng.pareto(1.1, n),
        "t of 2 degrees": rng.standard_t(2, n),
        "95% zeros": _zeros(1.0 + rng.poisson(3, n), 0.95),
        "95% zeros and lognormal": _zeros(rng.lognormal(0, 2, n), 0.95),
        "99% zeros": _zeros(rng.lognormal(0, 1, n), 0.99),
        "rare ones": _with(np.zeros(n), r7=1.0),
        "two clusters": np.where(rng.random(n) < 0.3, 1e6, 0.0) + rng.normal(size=n),
        "a few at 20 sigma": _with(rng.normal(size=n), r3=20.0, r5=-20.0),
        "a year, a money": rng.choice([1e3, 1e4, 1e5, 1e6], n),
        "far from zero": 1e9 + rng.normal(size=n),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from fastebm.data import _flattened

        table = files.Table(tuple(columns), np.stack([*columns.values()], 1), str, files.Layout(()), ())
        notes = _flattened(tmp_path, table)
    assert caught == []
    assert notes == []


def test_bundled_tables_are_no_faults(tmp_path):
    from sklearn import datasets

    for load in (datasets.load_breast_cancer, datasets.load_wine, datasets.load_iris, datasets.load_diabetes):
        frame = load(as_frame=True).frame
        frame.to_csv(tmp_path / "x.csv", index=False)
        columns, values, notes = _read(tmp_path / "x.csv")
        assert columns == tuple(frame.columns)
        np.testing.assert_array_equal(values, frame)
        assert notes == []


# -- .npy ---------------------------------------------------------------------------------------------------


def test_npy_and_csv_of_the_same_values_are_the_same_data(tmp_path, table):
    np.save(tmp_path / "x.npy", table)
    points = load_array(tmp_path / "x.npy")
    named = load_array(_write(tmp_path / "named.csv", "\ufeffheight, weight ,salary\n\n" + _rows(*table.T)))
    assert torch.equal(named.train, points.train)
    assert torch.equal(named.test, points.test)
    assert named.info.sha256 == points.info.sha256
    assert (len(points.train), len(points.test)) == (48, 12)
    assert points.info.columns == ("0", "1", "2")
    assert named.info.columns == ("height", "weight", "salary")
    assert points.info.name == str(tmp_path / "x.npy")
    assert not torch.equal(load_array(tmp_path / "x.npy", seed=1).test, points.test)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, np.uint8, ">f8", ">i4", np.int64, np.uint64])
def test_any_real_numbers_will_do(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 100, (2, N)).astype(dtype).T  # in Fortran's order
    columns, values, notes = _read(_write(tmp_path / "x.NPY", _npy(array)))
    assert columns == ("0", "1")
    np.testing.assert_array_equal(values, array.astype(float))
    assert notes == []
    np.testing.assert_array_equal(_read(tmp_path / "x.NPY", columns=["1"])[1], array[:, 1:].astype(float))


def test_booleans_and_indices_of_an_array_are_said(tmp_path):
    x = np.random.default_rng(0).random((N, 3)) < 0.5
    _, values, notes = _read(_write(tmp_path / "x.npy", _npy(x)))
    np.testing.assert_array_equal(values, x)
    assert notes == ["false and true are read as 0 and 1 in '0', '1', '2'"]
    _, values, notes = _read(_write(tmp_path / "x.npy", _npy(np.c_[np.arange(N), _floats(N)])))
    assert values.shape == (N, 2)
    assert "column '0' holds whole numbers that rise" in notes[0]


_RECORDS = np.zeros(N, [("a", float), ("b", int)])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.npy", _npy(np.zeros((N, 4, 4))), "got shape (60, 4, 4): reshape(len(x), -1) makes it (60, 16)"),
        ("x.npy", _npy(np.zeros((N, 2, 3, 4))), "got shape (60, 2, 3, 4): reshape(len(x), -1) makes it (60, 24)"),
        ("x.npy", _npy(np.zeros((N, 28, 28), np.uint8)), "reshape(len(x), -1) makes it (60, 784)"),
        ("x.npy", _npy(np.zeros(N)), "got shape (60,): reshape(-1, 1) makes it one column"),
        ("x.npy", _npy(np.zeros(())), "got shape ()"),
        ("x.npy", _npy(np.zeros((N, 0))), "got shape (60, 0)"),
        ("x.npy", _npy(np.zeros((0, 5))), "has 0 rows: it needs 50"),
        ("x.npy", _npy(np.zeros((N, 2), complex)), "got dtype complex128: np.hstack([x.real, x.imag]) makes real"),
        ("x.npy", _npy(np.full((N, 2), "1.5")), "got dtype <U3: x.astype(float) makes real numbers"),
        ("x.npy", _npy(np.full((N, 2), b"1.5")), "got dtype |S3: x.astype(float) makes real numbers"),
        ("x.npy", _npy(np.zeros((N, 2), "M8[s]")), "got dtype datetime64[s]: x.astype(float) makes real numbers"),
        ("x.npy", _npy(_RECORDS), "got a structured array of the fields 'a', 'b': np.lib.recfunctions"),
        ("x.npy", _npy(np.full((N, 2), None), allow_pickle=True), "holds Python objects, which are never read: save"),
        ("x.npy", _npy(np.full((N, 2), np.inf)), "infinite values in '0' (60 of 60, first row 0), '1' (60"),
        ("x.npy", _npy(np.full((N, 2), np.nan)), "missing values in '0' (60 of 60, first row 0), '1' (60"),
        ("x.npy", pickle.dumps([1]), "no array of numbers in NumPy's .npy format"),
        ("x.npy", b"", "no array of numbers"),
        ("x.npy", b"1,2\n" * N, "no array of numbers"),
        ("x.npy", _npy(np.ones((N, 2)))[:-8], "no array of numbers"),
        ("x.npz", b"PK", 'got {path}: np.save("x.npy", np.load(FILE)[NAME]) makes one of an array in it'),
        ("x.pt", b"PK", "torch.load(FILE).numpy()"),
        ("x.xlsx", b"PK", "save the sheet as CSV"),
        ("x.pkl", b"", "pickles are never read"),
        ("x.json", b"", "read it with pandas, then to_csv"),
        ("x.csv.zip", b"PK", "unzip it"),
        ("x.csv.zst", b"", "data must be a file of CSV or other text (.csv, .tsv, .txt, .dat, .data; also .gz"),
        ("x", b"", "Parquet (.parquet) or .npy, got {path}"),
        ("x.csv", b"", "has no rows: it needs lines of numbers"),
        ("x.csv", b"\n\n  \n", "has no rows"),
        ("x.csv", b"# a,b\n", "has no rows"),
        ("x.csv", b"a,b\n", "has 0 rows: it needs 50"),
        ("x.csv", b"1,2.5\n" * 49, "has 49 rows: it needs 50"),
        ("x.csv", "a,b\n" + _rows(_floats(N), [7] * N), "nothing varies among the training rows in 'b'"),
        ("x.csv", "a,b\n" + _rows(_floats(N), [f"{i}e306" for i in range(N)]), "too large or too close"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_refused_in_words(tmp_path, name, data, message):
    path = _write(tmp_path / name, data)
    assert message.format(path=path) in _refusal(path)


# -- Parquet ------------------------------------------------------------------------------------------------


def test_parquet_is_read_as_csv_is(tmp_path, frame):
    path = tmp_path / "x.parquet"
    frame["count"] = np.random.default_rng(0).integers(0, 9, N).astype(np.int16)
    frame["flag"] = np.random.default_rng(1).random(N) < 0.5
    frame.to_parquet(path)
    columns, values, notes = _read(path)
    assert columns == ("height", "weight", "salary", "count", "flag")
    np.testing.assert_array_equal(values, frame.astype(float))
    assert notes == ["false and true are read as 0 and 1 in 'flag'"]
    assert _read(path, drop=["flag", "count"])[0] == ("height", "weight", "salary")
    assert "has no column 'wight' (did you mean 'weight'?)" in _refusal(path, columns=["wight"])
    # An index with a name is a column; one without is left out, and said.
    frame.drop(columns="flag").sample(frac=1, random_state=0).to_parquet(path)
    assert _read(path)[2] == ["the index, which has no name, is left out"]
    frame.drop(columns="flag").set_index("height").to_parquet(path)
    assert _read(path)[0] == ("height", "weight", "salary", "count")
    frame[["height"]].reset_index(names="Unnamed: 0").to_parquet(path)
    columns, _, notes = _read(path)
    assert columns == ("height",)
    assert "taken for an index and left out" in notes[0]


def _put(column):
    return lambda frame: frame.assign(extra=column)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put(pd.to_datetime(DATES)), "'extra' ('2024-01-01"),
        (_put(LABELS), "'extra' ('red' in row 0 and 59 more)"),
        (_put(pd.Categorical(LABELS)), "'extra' ('red' in row 0 and 59 more)"),
        (_put([[1.0, 2.0]] * N), "'extra' ('[1. 2.]' in row 0 and 59 more)"),
        (_put([1.5, None] * 30), "missing values in 'extra' (30 of 60, first row 1)"),
        (_put(pd.array([1, None] * 30, "Int64")), "missing values in 'extra' (30 of 60, first row 1)"),
        (_put([None] * N), "missing values in 'extra' (60 of 60, first row 0)"),
        (_put([2**53 + 1] * N), "beyond 2**53, which float64 rounds (9007199254740993 in row 0)"),
        (_put(pd.to_datetime(DATES).tz_localize("UTC")), "'extra' ('2024-01-01"),
        (_put(pd.array(["a", None] * 30, "string")), "'extra' ('a' in row 0 and 29 more)"),
    ],
)
def test_columns_of_parquet_that_are_not_numbers_are_named(tmp_path, frame, change, message):
    change(frame).to_parquet(tmp_path / "x.parquet")
    assert message in _refusal(tmp_path / "x.parquet")
    np.testing.assert_array_equal(_read(tmp_path / "x.parquet", drop=["extra"])[1], frame)


def test_parquet_needs_pyarrow_and_parquet(tmp_path, frame, monkeypatch):
    path = _write(tmp_path / "x.parquet", b"a,b\n1,2\n")
    assert "can't be read as Parquet" in _refusal(path)
    with pytest.raises(ValueError, match="--header and --no-header are for text files"):
        load_array(path, header=True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match='reading Parquet needs pyarrow: pip install "pyarrow"'):
        load_array(path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    frame.to_csv(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r'reading text files needs pandas: pip install "fastebm\[cli\]"'):
        load_array(tmp_path / "x.csv")


# -- runs ---------------------------------------------------------------------------------------------------


def test_a_file_is_needed_unchanged_to_go_on(tmp_path, table):
    path = _write(tmp_path / "x.npy", _npy(table))
    points = load_array(path, seed=3)
    again = reload(points.info, seed=3)
    assert torch.equal(again.train, points.train)
    assert again.info == points.info
    table[0, 0] += 1.0
    _write(path, _npy(table))
    with pytest.raises(ValueError, match=r"x\.npy has changed since the run began"):
        reload(points.info, seed=3)
    _write(path, _npy(table[:, :2]))
    with pytest.raises(ValueError, match="has 2 columns, and column 2 was read before"):
        reload(points.info, seed=3)
    path.unlink()
    with pytest.raises(ValueError, match=r"x\.npy, which the run is trained on, is gone"):
        reload(points.info, seed=3)
    with pytest.raises(FileNotFoundError):
        load_array(path)


@pytest.mark.parametrize(
    ("name", "data", "columns"),
    [
        ("x.csv", "0,1,2\n" + _rows(*_floats(N, 3).T), ("column 1", "column 2", "column 3")),
        ("x.csv", _rows(range(N), *_floats(N, 2).T), ("column 1", "column 2", "column 3")),
        ("x.csv", "a,,c\n" + _rows(range(N), *_floats(N, 2).T), ("a", "column 2", "c")),
        ("x.npy", _npy(_floats(N, 3)), ("column 0", "column 1", "column 2")),
    ],
)
def test_runs_of_earlier_versions_read_what_they_read(tmp_path, name, data, columns):
    """Without a layout: every column, and names where the first line had no number."""
    path = _write(tmp_path / name, data)
    layout = files.Layout((0, 1, 2), name == "x.csv" and columns[0] == "a", ",")
    x = files.read(path, layout=layout).x
    assert len(x) == N + (data[:6] == "0,1,2\n")  # which was a row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.save(tmp_path / "same.npy", x)
        info = load_array(tmp_path / "same.npy").info
    config = TrainConfig(data=dataclasses.replace(info, name=str(path), columns=columns, layout=None), clamp=info.clamp)
    old = json.loads(json.dumps(config.to_dict()))
    assert "layout" not in old["data"]
    assert TrainConfig.from_dict(old) == config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points = reload(TrainConfig.from_dict(old).data, 0)
    assert points.info == config.data
    assert torch.equal(points.train, load_array(tmp_path / "same.npy", info=info).train)


# -- the command --------------------------------------------------------------------------------------------

SMALL = ["--steps", "3", "--batch-size", "16", "--hidden-sizes", "8", "4", "--device", "cpu"]


@pytest.fixture
def few_fresh_steps(monkeypatch):
    monkeypatch.setattr(cli, "recipe", lambda data: {**recipe(data), "fresh_steps": 5, "n_fresh": 30})
    small = functools.partial(evaluate.two_sample_accuracy, n_trees=3, n_repeats=1)
    monkeypatch.setattr(evaluate, "two_sample_accuracy", small)


def _error(capsys, *arguments, status=2):
    """The last line that a bad command prints on stderr; those before it are notes."""
    assert main([str(a) for a in arguments]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    *notes, last = printed.err.splitlines()
    assert last.startswith("fastebm: error: ")
    assert not any("error" in note for note in notes)
    return last


PANDAS_WRITES = {
    "as is": ({}, [], 1),
    "without index": ({"index": False}, [], 0),
    "without header": ({"index": False, "header": False}, [], 1),
    "without header, with index": ({"header": False}, [], 2),
    "semicolons and decimal commas": ({"sep": ";", "decimal": ",", "index": False}, [], 2),
    "tabs": ({"sep": "\t", "index": False}, [], 1),
    "names of numbers": ({"index": False, "header": [0, 1, 2]}, [], 1),
}


@pytest.mark.parametrize(("options", "arguments", "notes"), PANDAS_WRITES.values(), ids=PANDAS_WRITES.keys())
def test_train_on_what_pandas_writes(tmp_path, frame, monkeypatch, capsys, options, arguments, notes):
    """To the first step: the rows that it is given, and a line for each decision."""
    seen = {}

    def train(config, out, *, data, **_):
        seen.update(config=config, data=data)
        raise RuntimeError("enough seen")

    monkeypatch.setattr(cli, "train", train)
    frame.to_csv(tmp_path / "x.csv", **options)
    assert main(["train", "--data", str(tmp_path / "x.csv"), *arguments, *SMALL, "--out", str(tmp_path / "run")]) == 1
    *told, last = capsys.readouterr().err.splitlines()
    assert last == "fastebm: error: enough seen"
    assert all(line.startswith("fastebm: x.csv: ") for line in told)
    assert len(told) == notes, told
    np.save(tmp_path / "x.npy", frame)
    same = load_array(tmp_path / "x.npy")
    assert torch.equal(seen["data"].train, same.train)
    assert seen["config"].data.sha256 == same.info.sha256


def test_a_table_of_dates_and_text_from_training_to_samples(tmp_path, frame, few_fresh_steps, monkeypatch, capsys):
    frame.insert(0, "date", DATES)
    frame["colour"] = LABELS
    frame.loc[3, "weight"] = np.nan
    frame.to_csv(tmp_path / "people.csv", sep=";", decimal=",")
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", "people.csv", *SMALL]
    assert "'date' ('2024-01-01' in line 2 and 59 more), 'colour' ('red'" in _error(capsys, *command)
    message = _error(capsys, *command, "--drop", "date", "colour")
    assert "missing values in 'weight' (1 of 60, first line 5)" in message
    assert list(tmp_path.iterdir()) == [tmp_path / "people.csv"]
    assert main([*command, "--columns", "salary", "height"]) == 0
    printed = capsys.readouterr()
    assert "fastebm: people.csv: decimal commas are read as decimal points\n" in printed.err
    assert "AUROC against held-out rows: uniform" in printed.out
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("people-")
    recorded = json.loads((out / "config.json").read_text())["data"]
    assert recorded["columns"] == ["salary", "height"]
    assert recorded["name"] == str(tmp_path / "people.csv")
    assert recorded["layout"] == {"positions": [4, 2], "header": True, "separator": ";", "decimal": ","}
    assert len(recorded["sha256"]) == 64

    monkeypatch.chdir("/")
    assert main(["sample", str(out), "-n", "50", "--out", str(tmp_path / "x.npy")]) == 0
    capsys.readouterr()
    x = np.load(tmp_path / "x.npy")
    assert x.shape == (50, 2)
    rows = frame[["salary", "height"]]
    assert (abs(x.mean(0) - rows.mean()) < 2 * rows.std()).all()


def test_a_table_makes_no_picture(tmp_path, frame, few_fresh_steps, capsys):
    frame.to_csv(tmp_path / "x.csv", index=False)
    assert main(["train", "--data", str(tmp_path / "x.csv"), *SMALL, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    message = _error(capsys, "sample", tmp_path / "run", "--out", tmp_path / "x.png")
    assert "samples of 3 dims make no picture: give --out a name that ends in .npy" in message


def test_a_run_on_a_file_resumes_by_its_folder(tmp_path, frame, few_fresh_steps, monkeypatch, capsys):
    data, out = tmp_path / "x.csv", tmp_path / "run"
    frame.to_csv(data, header=[0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(cli._Signals, "arrived", lambda self: setattr(self, "number", signal.SIGINT) or True)
        command = ["train", "--data", str(data), "--drop", "1", *SMALL, "--out", str(out)]
        assert main(command) == 128 + signal.SIGINT
    err = capsys.readouterr().err
    assert "(, 0, 1, ...) is taken as the names of the columns" in err
    assert f"to go on: fastebm train --resume {out}\n" in err
    assert f"is trained on {data}, not on moons" in _error(capsys, "train", "moons", "--resume", out)
    assert "leave out --data" in _error(capsys, "train", "--data", data, "--resume", out)
    assert "leave out --columns" in _error(capsys, "train", "--resume", out, "--columns", "0")
    assert "leave out --header" in _error(capsys, "train", "--resume", out, "--no-header")
    data.rename(tmp_path / "y.csv")
    assert "x.csv, which the run is trained on, is gone" in _error(capsys, "train", "--resume", out)
    (tmp_path / "y.csv").rename(data)
    assert main(["train", "--resume", str(out)]) == 0
    assert "fastebm: x.csv" not in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["data"]["columns"] == ["0", "2"]
    assert (out / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moons", "--columns", "x"], "--columns is for --data FILE: leave it out, or name a file"),
        (["--columns", "x", "y", "moons"], "--columns is for --data FILE"),
        (["digits", "--drop", "0"], "--drop is for --data FILE"),
        (["moons", "--no-header"], "--header is for --data FILE"),
        (["--data", "x.csv", "--columns", "a", "--drop", "b"], "give one of the two"),
        (["--data", "x.csv", "--drop", "hieght"], "has no column 'hieght' (did you mean 'height'?)"),
        (["--data", "x.csv", "--no-header"], "'height'"),
        (["--data", "x.xlsx"], "save the sheet as CSV"),
    ],
)
def test_bad_choices_are_one_clear_line(tmp_path, frame, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    frame.to_csv("x.csv", index=False)
    assert message in _error(capsys, "train", *arguments)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.csv"]
