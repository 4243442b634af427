"""The user's own files: what is read, what is said of it, and every way in which a file can be no data.

A wrong result without a word is the worst fault, so each test holds the values, or the words of the error, or both.
"""

import dataclasses
import io
import json
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from fastebm.data import files
from fastebm.data.info import DataInfo
from fastebm.data.sets import reload
from fastebm.data.table import Layout
from fastebm.data.tables import load_array
from fastebm.train.recipe import TrainConfig, recipe

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
    notes = [str(warning.message).removeprefix(f"{path.name}: ") for warning in caught]
    # What a resumed run reads is the same, and says nothing more.
    info = DataInfo.from_dict(json.loads(json.dumps(TrainConfig(**recipe(points)).to_dict()))["data"])
    assert info == points.info
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = reload(info, 0)
    assert torch.equal(again.train, points.train)
    assert again.info == points.info
    return points.info.columns, files.read(path, layout=info.layout).x, notes


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


LABELS = ["red", "blue", "green"] * (N // 3)
DATES = [f"2024-01-{1 + i % 28:02d}" for i in range(N)]


@pytest.mark.parametrize("names", [[0, 1, 2], [1, 2, 3], [0], [1, 2], list(range(20)), list(range(1, 13))])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("draw", [_floats, lambda n, d: np.random.default_rng(0).integers(0, 50, (n, d))])
def test_consecutive_integers_are_names_and_this_is_said(tmp_path, names, index, draw):
    x = draw(N, len(names))
    pd.DataFrame(x, columns=names).to_csv(tmp_path / "x.csv", index=index)
    columns, values, notes = _read(tmp_path / "x.csv")
    np.testing.assert_array_equal(values, x)
    assert columns == tuple(map(str, names))
    assert "is taken as the names of the columns: --no-header makes it a row" in notes[0]
    if not index:
        _, values, notes = _read(tmp_path / "x.csv", header=False)
        np.testing.assert_array_equal(values, [names, *x])
        assert "--header makes one of the first line" in notes[0]


@pytest.mark.parametrize("line", ["a,b", "a,2", "id,2019", '"height, cm",weight', " x,y", "x;y,z", "°C,µ", "a,"])
def test_a_line_with_a_word_is_of_names(tmp_path, line):
    x = _floats(N, 2)
    columns, values, notes = _read(_write(tmp_path / "x.csv", line + "\n" + _rows(*x.T)))
    np.testing.assert_array_equal(values, x)
    assert columns == tuple(pd.read_csv(io.StringIO(line), skipinitialspace=True).columns)
    assert (len(notes) == 0) == (line[-1] not in "29,")  # that a name is a number or missing is said


ROWS_WITHOUT_NAMES = {
    "floats": _floats(N, 3),
    "integers": np.random.default_rng(5).integers(10, 90, (N, 4)),
    "one column": np.round(_floats(N), 2)[:, None],
    "exponents": 1e-30 * _floats(N, 2),
    "true and false": np.random.default_rng(4).random((N, 3)) < 0.5,
    "one true or false": np.random.default_rng(5).random((N, 1)) < 0.5,
}


@pytest.mark.parametrize("x", ROWS_WITHOUT_NAMES.values(), ids=ROWS_WITHOUT_NAMES.keys())
@pytest.mark.parametrize("index", [False, True])
def test_a_first_line_of_data_is_data_and_the_lack_of_names_is_said(tmp_path, x, index):
    pd.DataFrame(x).to_csv(tmp_path / "x.csv", index=index, header=False)
    columns, values, notes = _read(tmp_path / "x.csv")
    np.testing.assert_array_equal(values, x)
    assert columns == tuple(str(i + index) for i in range(x.shape[1]))
    assert "no line of names was found, so columns are called 0" in notes[0]
    assert any("read as 0 and 1" in note for note in notes) == (x.dtype == bool)
    assert any("counts the rows, as an index does, so it is left out" in note for note in notes) == index


def test_text_in_a_first_line_of_data_is_told_by_its_column(tmp_path):
    x = _floats(N, 2)
    path = _write(tmp_path / "x.csv", _rows(*x.T, DATES))
    assert "'2024-01-01' ('2024-01-02' in line 2)" in _refusal(path)
    assert "'2' ('2024-01-01' in line 1)" in _refusal(path, header=False)
    _, values, notes = _read(path, drop=["2024-01-01"])
    assert len(values) == N - 1
    assert "is taken as the names of the columns: --no-header" in notes[0]
    np.testing.assert_array_equal(_read(path, header=False, drop=["2"])[1], x)


@pytest.mark.parametrize(
    "write",
    [
        lambda frame: frame.to_csv(),
        lambda frame: frame.to_csv(sep=";", decimal=","),
        lambda frame: frame.to_csv(sep="\t"),
        lambda frame: frame.to_csv(quoting=1),
        lambda frame: frame.set_axis(range(1, N + 1)).to_csv(),
        lambda frame: frame.set_axis(range(100, N + 100)).to_csv(),
        lambda frame: frame.reset_index(names="Unnamed: 0").to_csv(index=False),
        lambda frame: frame.reset_index(names="Unnamed: 0").to_csv(),  # read and written once more
    ],
)
def test_an_unnamed_index_is_left_out_and_this_is_said(tmp_path, frame, write):
    path = _write(tmp_path / "x.csv", write(frame))
    columns, values, notes = _read(path)
    assert columns == ("height", "weight", "salary")
    np.testing.assert_array_equal(values, frame)
    assert any("column 'Unnamed: 0' counts the rows, as an index does, so it is left out" in note for note in notes)
    columns, values, _ = _read(path, columns=["Unnamed: 0", "salary"])
    assert columns == ("Unnamed: 0", "salary")
    np.testing.assert_array_equal(values[:, 1], frame["salary"])


@pytest.mark.parametrize("index", [range(N)[::-1], _floats(N), range(0, 2 * N, 2), [1, 1, 2] * 20])
def test_an_unnamed_column_that_does_not_count_is_kept_and_said(tmp_path, frame, index):
    path = _write(tmp_path / "x.csv", frame.set_axis(index).to_csv())
    columns, values, notes = _read(path)
    assert columns == ("Unnamed: 0", "height", "weight", "salary")
    np.testing.assert_array_equal(values, np.c_[index, frame])
    assert "has no name and does not count the rows, so it is kept: --drop 'Unnamed: 0' leaves it out" in notes[0]
    np.testing.assert_array_equal(_read(path, drop=["Unnamed: 0"])[1], frame)


def test_a_lone_column_is_kept(tmp_path, frame):
    path = tmp_path / "x.csv"
    assert _read(_write(path, _rows(range(5, N + 5))))[1][:, 0].tolist() == list(range(5, N + 5))
    # R writes no name above those of its rows: never an index without a word.
    path = _write(path, "height,weight,salary\n" + frame.to_csv(header=False))
    assert "the first row has more than the line of names" in _refusal(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " ", "   "])
@pytest.mark.parametrize("header", [True, False])
def test_separators_are_found(tmp_path, table, separator, end, header):
    names = separator.join(["height", "weight", "salary"]) + end if header else ""
    path = _write(tmp_path / "x.csv", names + _rows(*table.T, separator=separator, end=end) + end)
    columns, values, notes = _read(path)
    assert columns == (("height", "weight", "salary") if header else ("0", "1", "2"))
    np.testing.assert_array_equal(values, table)
    assert any("separated by" in note for note in notes) == (separator not in ",\t")


@pytest.mark.parametrize(
    "options",
    [
        {"sep": ";"}, {"sep": "\t"}, {"sep": "|"}, {"sep": " "}, {"sep": ","}, {"sep": ";", "quoting": 1},
        {"sep": ";", "header": False},
    ],
)  # fmt: skip
def test_decimal_commas_are_read_and_said(tmp_path, frame, options):
    frame["count"] = np.random.default_rng(0).integers(0, 9, N)
    frame.iloc[0, 0] = 1e-7  # with an exponent
    frame.to_csv(tmp_path / "x.csv", decimal=",", index=False, **options)  # with commas, pandas puts quotes around
    columns, values, notes = _read(tmp_path / "x.csv")
    assert columns == (("height", "weight", "salary", "count") if "header" not in options else ("0", "1", "2", "3"))
    np.testing.assert_array_equal(values, frame)
    assert "decimal commas are read as decimal points" in notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a;b\n" + _rows(["1.234,5", "2,5"] * 30, ["2,5", "3,5"] * 30, separator=";"), "'a' ('1.234,5' in line 2)"),
        ("a,b\n" + _rows(['"1,234.5"', "2.5"] * 30, _floats(N)), "'a' ('1,234.5' in line 2)"),
        ("a,b\n" + _rows(['"1,234.5"', "2.5"] * 30, _floats(N)), "(are there marks between thousands? write 1234.5)"),
        ("a;b\n" + _rows(["1.234,5", "2,5"] * 30, ["2,5", "3,5"] * 30, separator=";"), "marks between thousands?"),
        (_rows(['"1,234"'] * N, [2.5] * N), "'1,234' in column '0', line 1, may be a thousand or have a decimal comma"),
        (_rows(["999", "1,234"] * 30, [2] * N, separator=";"), "'1,234' in column '0', line 2, may be a thousand"),
        (_rows(["1,5"] * N, ["1.5"] * N, separator=";"), "with decimal commas, and these are not: '1' ('1.5' in"),
        (_rows(["1,5", "1.5"] * 30, [2] * N, separator=";"), "'0' ('1,5' in line 1)"),
        ("x\n" + _rows(["1,5"] * N), "the first row has more than the line of names (decimal commas need another"),
        ("x,y\n" + _rows(["1,5"] * N, ["2,5"] * N), "the first row has more than the line of names"),
    ],
)
def test_thousands_and_mixed_decimals_are_named(tmp_path, text, message):
    assert message in _refusal(_write(tmp_path / "x.csv", text))


def test_encodings_and_comments(tmp_path, table):
    text = "größe,µ,salary\n" + _rows(*table.T)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        columns, values, notes = _read(_write(tmp_path / "x.csv", text.encode(encoding)))
        assert columns == ("größe", "µ", "salary")
        np.testing.assert_array_equal(values, table)
        assert notes == []
    for data in (text.encode("latin-1"), text.encode("utf-16-le"), _npy(table), b"\xff\xfe1,2\n,"):
        assert "is no text in UTF-8: save it as UTF-8" in _refusal(_write(tmp_path / "x.csv", data))
    np.savetxt(tmp_path / "x.txt", table, delimiter=",", header='by "Ann"\nheight, weight', fmt="%.17g")
    columns, values, notes = _read(tmp_path / "x.txt")
    assert (columns, notes[0]) == (("0", "1", "2"), "the first lines, which begin with #, are passed over")
    np.testing.assert_array_equal(values, table)
    assert "'b' ('x' in line 6)" in _refusal(_write(tmp_path / "x.csv", "# 1\n#\n\na,b\n1,2\n3,x\n" + "5,6\n" * N))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n" + "1,2\n4,5\n3\n" * 70, "missing values in 'b' (70 of 210, first line 4), 33% of the rows: fill"),
        ("a,b\n" + "1,2\n" * 70 + "3,4,5\n1,2\n", "Expected 2 fields in line 72, saw 3"),
        ("#\na b\n" + "1 2\n" * 70 + "1 2 3\n", "separated by spaces: Expected 2 fields in line 73, saw 3"),
        ("a,b\n" + "1,2,3\n" * 70, "the first row has more than the line of names"),
        ("1.5,2\n" + "1,2,3\n" * 70, "Expected 2 fields in line 2, saw 3"),
        ("Measured today\n\na,b\n" + "1,2\n" * 70, "separated by commas: the first row has more than"),
        ("a b c\n" + "1 2 3\n" * 70 + "1  3\n", "between spaces no cell may be empty"),
        ("a,b\n" + "1,2\n" * 70 + '"3,4\n', "EOF inside string starting at row 71"),
        ("a,b\n" + "1,2\n" * 60 + "x" * 200_000 + ",1\n", "'a' ('xxxxxxxxxx"),
        ("x" * 200_000 + "\n" + "1\n" * 60, "is no table of numbers: field larger"),
    ],
)
def test_uneven_lines_are_named(tmp_path, text, message):
    assert message in _refusal(_write(tmp_path / "x.csv", text))


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (range(7, N + 7), "counts the rows, as an index does"),
        ([7.5] * N, "holds '7.5' in every row"),
        (["x"] * N, "holds 'x' in every row"),
        ([None] * N, "is empty"),
        (LABELS, "is of words ('red', 'blue', 'green'), which --label extra takes for classes"),
        ([chr(97 + i // 26) + chr(97 + i % 26) for i in range(N)], "is of words ('aa', 'ab', 'ac', ... (60 in all))"),
        ([*LABELS[:-1], None], "is of words"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_of_no_use_are_left_out_and_this_is_said(tmp_path, frame, column, why, suffix):
    table, path = frame.assign(extra=column), tmp_path / f"x.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    columns, values, notes = _read(path)
    assert columns == ("height", "weight", "salary")
    np.testing.assert_array_equal(values, frame)
    assert len(notes) == 1
    assert f"column 'extra' {why}" in notes[0]
    assert notes[0].endswith(", so it is left out: --columns keeps what it names")
    if "counts" in why:
        assert _read(path, columns=["extra", "height"])[0] == ("extra", "height")
    else:
        assert "'extra'" in _refusal(path, columns=["extra", "height"])


@pytest.mark.parametrize(
    "column", [DATES, ["5 kg", "3 kg"] * 30, ["a1", "b2"] * 30, [*_floats(N - 1), "oops"], ["  ", "no"] * 30]
)
def test_words_that_may_be_numbers_or_dates_are_never_left_out(tmp_path, frame, column):
    path = tmp_path / "x.csv"
    frame.assign(extra=column).to_csv(path, index=False, quoting=1)
    assert "columns must be of numbers, and these are not: 'extra'" in _refusal(path)


def test_labels_are_kept_beside_the_states(tmp_path, frame):
    frame["kind"], frame["class"] = ["good", "bad", "good"] * 20, np.where(frame["height"] < 0, 1.0, 2.0)
    path = tmp_path / "x.csv"
    frame.to_csv(path, index=False)
    points = load_array(path, label="class", drop=["kind"])
    assert points.info.columns == ("height", "weight", "salary")
    is_low = points.info.to_data(points.train)[:, 0] < 0
    assert points.train_labels.tolist() == np.where(is_low, "1", "2").tolist()
    again = reload(points.info, 0)
    assert np.array_equal(again.train_labels, points.train_labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = pd.concat([frame] * 2)  # 80 good rows
        frame.to_csv(path, index=False)
        points = load_array(path, label="kind=good", columns=["height", "weight"])
        assert (len(points.train) + len(points.test), points.train_labels) == (80, None)
        assert {name: len(x) for name, x in points.outliers.items()} == {"label=bad": 40}
        bad = frame.loc[frame["kind"] == "bad", ["height", "weight"]].to_numpy()
        np.testing.assert_allclose(points.outliers["label=bad"], points.info.to_states(bad), atol=1e-6)
        assert torch.equal(reload(points.info, 0).outliers["label=bad"], points.outliers["label=bad"])
    for label, words in (
        ("knd", "has no column 'knd': did you mean kind?"),
        ("kind=Good", "no row has 'Good' in column 'kind': did you mean good?: there are 'good', 'bad'"),
        ("height", "column 'height' has 60 values, too many for classes"),
    ):
        assert words in _refusal(path, label=label)
    with pytest.raises(ValueError, match="name the same column, 'kind'"):
        load_array(path, label="kind", columns=["kind", "height"])


def test_columns_are_chosen_by_name(tmp_path, frame):
    table = frame.assign(date=DATES, **{"colour of hair": [f"no. {i % 3}" for i in range(N)]})
    table.to_csv(tmp_path / "x.csv", index=False)
    path = tmp_path / "x.csv"
    message = _refusal(path)
    assert "'date' ('2024-01-01' in line 2), 'colour of hair' ('no. 0' in line 2): mend such cells" in message
    assert "or leave those columns out by --drop date 'colour of hair' (--columns names those to keep)" in message
    assert _read(path, drop=["date", "colour of hair"])[0] == ("height", "weight", "salary")
    columns, values, _ = _read(path, columns=["salary", "height"])
    assert columns == ("salary", "height")
    np.testing.assert_array_equal(values, frame[list(columns)])
    for options, words in (
        ({"drop": ["Date"]}, "has no column 'Date': did you mean date?: it has 'height', 'weight'"),
        ({"drop": ["height,date"]}, "has no column 'height,date': names are separated by spaces: it has"),
        ({"columns": ["7"]}, "has no column '7'"),
        ({"columns": ["height", "height"]}, "--columns takes each name once"),
        ({"drop": list(table.columns)}, "--drop leaves no column"),
        ({"columns": ["height"], "drop": ["date"]}, "give one of the two"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            load_array(path, **options)
        assert words in str(error.value)


@pytest.mark.parametrize("words", [("True", "False"), ("true", "false"), ("TRUE", "FALSE")])
def test_booleans_and_names_that_come_again_are_said(tmp_path, words):
    x = np.random.default_rng(0).integers(0, 2, N)
    path = _write(tmp_path / "x.csv", "a,b,a\n" + _rows([words[1 - i] for i in x], _floats(N), _floats(N)))
    columns, values, notes = _read(path)
    assert columns == tuple(pd.read_csv(path).columns) == ("a", "b", "a.1")
    np.testing.assert_array_equal(values, np.c_[x, _floats(N), _floats(N)])
    assert notes == ["names that come again are numbered, as 'a.1' is", "false and true are read as 0 and 1 in 'a'"]
    assert _read(path, columns=["a.1"])[0] == ("a.1",)


@pytest.mark.parametrize("word", ["", "NA", "nan", "N/A", "null", "None", "?", "#N/A", "<NA>", "  "])
@pytest.mark.parametrize("decimal", [".", ","])
def test_rows_with_missing_values_are_left_out_while_they_are_few(tmp_path, frame, word, decimal):
    text = frame.astype(object)
    text.iloc[[3, 7], 1] = np.nan
    text.iloc[0, 2] = np.nan
    path = _write(tmp_path / "x.csv", text.to_csv(index=False, sep=";", decimal=decimal, na_rep=word))
    told = "missing values in 'weight' (2 of 60, first line 5), 'salary' (1 of 60, first line 2)"
    notes = _read(path)[2]
    assert notes[-1] == f"{told}: 3 rows left out"
    points = load_array(path)
    assert len(points.train) + len(points.test) == 57
    text.iloc[10:14, 0] = np.nan
    _write(path, text.to_csv(index=False, sep=";", decimal=decimal, na_rep=word))
    message = _refusal(path)
    assert "first line 2), 12% of the rows: fill them in" in message
    assert "delete such rows, or leave such columns out by --drop height weight salary" in message
    frame = frame.drop(columns="height").assign(height=_floats(N))
    _write(path, text.assign(height=frame["height"]).to_csv(index=False, sep=";", decimal=decimal, na_rep=word))
    np.testing.assert_array_equal(_read(path, drop=["weight", "salary"])[1], frame[["height"]])


CELLS = ["oops", "1..5", "5 kg", "€3", "12%", "3-4", "2024-01-01", "yes", "1e", "True", "<0.5", "-", "1_000", "0x1F"]


@pytest.mark.parametrize("cell", [*CELLS, "inf", "-inf", "Infinity"])
def test_one_cell_that_is_no_number_is_named(tmp_path, cell):
    path = _write(tmp_path / "x.csv", "a,b\n" + _rows(["1.5"] * 9 + [cell] + ["2.5"] * 50, _floats(N)))
    told = f"'a' ('{cell}' in line 11)" if cell in CELLS else "infinite values in 'a' (1 of 60, first line 11)"
    assert told in _refusal(path)


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**53) - 1, -(2**63)])
def test_whole_numbers_that_float64_rounds_are_refused(tmp_path, number):
    path = _write(tmp_path / "x.csv", "user,x\n" + _rows([1, number, *range(N - 2)], _floats(N)))
    message = _refusal(path)
    assert f"'user' ('{number}', which float64 rounds, in line 3)" in message
    assert "--drop user" in message
    array = np.full((N, 2), number, np.uint64 if number >= 2**63 else np.int64)
    assert f"'0' ('{number}', which float64 rounds, in row 0)" in _refusal(_write(tmp_path / "x.npy", _npy(array)))


def test_values_are_those_that_python_reads(tmp_path):
    cells = ["0.1", "1e-5", "1E5", "+3", "-0", ".5", "5.", "007", " 1 ", "5e-324", "9007199254740993.0"]
    cells += [repr(float(v)) for v in _floats(N) * 10.0 ** np.arange(-30, 30)]
    path = _write(tmp_path / "x.csv", "a,b\n" + _rows(cells, _floats(len(cells))))
    np.testing.assert_array_equal(files.read(path).x[:, 0], [float(cell) for cell in cells])


def test_npy_and_csv_of_the_same_values_are_the_same_data(tmp_path, table):
    points = load_array(_write(tmp_path / "x.npy", _npy(table)))
    named = load_array(_write(tmp_path / "named.csv", "\ufeffheight, weight,salary\n\n" + _rows(*table.T)))
    assert torch.equal(named.train, points.train)
    assert torch.equal(named.test, points.test)
    assert (len(points.train), len(points.test)) == (48, 12)
    assert points.info.columns == ("0", "1", "2")
    assert points.info.name == str(tmp_path / "x.npy")
    assert not torch.equal(load_array(tmp_path / "x.npy", seed=1).test, points.test)


@pytest.mark.parametrize("dtype", ["f4", "f2", "i2", "u1", ">f8", ">i4", "u8"])
def test_any_real_numbers_will_do(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 100, (2, N)).astype(dtype).T  # in Fortran's order
    columns, values, notes = _read(_write(tmp_path / "x.NPY", _npy(array)))
    assert columns == ("0", "1")
    np.testing.assert_array_equal(values, array.astype(float))
    assert notes == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.npy", _npy(np.zeros((N, 4, 4))), "got shape (60, 4, 4): x.reshape(len(x), -1) makes it (60, 16)"),
        ("x.npy", _npy(np.zeros((N, 28, 28), np.uint8)), "x.reshape(len(x), -1) makes it (60, 784)"),
        ("x.npy", _npy(np.zeros(N)), "got shape (60,): x.reshape(-1, 1) makes it one column"),
        ("x.npy", _npy(np.zeros(())), "got shape ()"),
        ("x.npy", _npy(np.zeros((N, 0))), "got shape (60, 0)"),
        ("x.npy", _npy(np.zeros((0, 5))), "has 0 rows: it needs 50"),
        ("x.npy", _npy(np.zeros((N, 2), complex)), "must hold real numbers, got dtype complex128"),
        ("x.npy", _npy(np.full((N, 2), "1.5")), "must hold real numbers, got dtype <U3"),
        ("x.npy", _npy(np.zeros(N, [("a", float)])), "must hold real numbers, got dtype [('a', '<f8')]"),
        ("x.npy", _npy(np.full((N, 2), None), allow_pickle=True), "no array of numbers in NumPy's .npy format"),
        ("x.npy", _npy(np.full((N, 2), np.nan)), "missing values in '0' (60 of 60, first row 0), '1' (60"),
        ("x.npy", _npy(np.ones((N, 2)))[:-8], "no array of numbers"),
        ("x.npz", b"PK", "data must be text (.csv, .tsv, .txt), .parquet or .npy, got {path}: decompress it, or read"),
        ("x.csv.gz", b"", "decompress it"),
        ("x.csv", b"", "has no rows: it needs lines of numbers"),
        ("x.csv", b"a,b\n", "has 0 rows: it needs 50"),
        ("x.csv", b"1,2.5\n" * 49, "has 49 rows: it needs 50"),
        ("x.csv", b"1,2.5\n" * 49 + b",2\n", "has 49 rows without missing values: it needs 50"),
        ("x.csv", "a,b\n" + _rows([8] * N, [7] * N), "nothing varies among the training rows in 'a', 'b'"),
        ("x.csv", "a,b\n" + _rows(_floats(N), [f"{i}e306" for i in range(N)]), "too large or too close"),
    ],
)
def test_what_is_no_data_is_refused_in_words(tmp_path, name, data, message):
    path = _write(tmp_path / name, data)
    assert message.format(path=path) in _refusal(path)


def test_parquet_is_read_as_csv_is(tmp_path, frame):
    path = tmp_path / "x.parquet"
    frame["count"] = np.random.default_rng(0).integers(0, 9, N).astype(np.int16)
    frame["flag"] = np.random.default_rng(1).random(N) < 0.5
    frame.to_parquet(path)
    columns, values, notes = _read(path)
    assert columns == ("height", "weight", "salary", "count", "flag")
    np.testing.assert_array_equal(values, frame.astype(float))
    assert notes == ["false and true are read as 0 and 1 in 'flag'"]
    # An index with a name is a column; one without is left out, and said.
    frame.drop(columns="flag").sample(frac=1, random_state=0).to_parquet(path)
    assert _read(path)[2] == ["the index, which has no name, is left out"]
    frame.drop(columns="flag").set_index("height").to_parquet(path)
    assert _read(path)[0] == ("height", "weight", "salary", "count")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pd.to_datetime(DATES), "'extra' ('2024-01-01"),
        ([f"no. {i}" for i in range(N)], "'extra' ('no. 0' in row 0)"),
        ([1.5, None] * 30, "missing values in 'extra' (30 of 60, first row 1)"),
        (pd.array([1, None] * 30, "Int64"), "missing values in 'extra' (30 of 60, first row 1)"),
        ([2**53 + 1, 5] * 30, "'extra' ('9007199254740993', which float64 rounds, in row 0)"),
    ],
)
def test_columns_of_parquet_that_are_not_numbers_are_named(tmp_path, frame, column, message):
    frame.assign(extra=column).to_parquet(tmp_path / "x.parquet")
    assert message in _refusal(tmp_path / "x.parquet")
    np.testing.assert_array_equal(_read(tmp_path / "x.parquet", drop=["extra"])[1], frame)


def test_parquet_needs_pyarrow_and_parquet(tmp_path, monkeypatch):
    path = _write(tmp_path / "x.parquet", b"a,b\n1,2\n")
    assert "can't be read as Parquet" in _refusal(path)
    with pytest.raises(ValueError, match="--header and --no-header are for text files"):
        load_array(path, header=True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'needs pyarrow: pip install "fastebm\[parquet\]"'):
        load_array(path)


def test_a_file_is_needed_unchanged_to_go_on(tmp_path, table):
    path = _write(tmp_path / "x.npy", _npy(table))
    points = load_array(path, seed=3)
    assert torch.equal(reload(points.info, seed=3).train, points.train)
    for changed, words in (
        (table + 1.0, "has changed since the run began"),
        (table[:, :2], "column 2 was read before"),
    ):
        _write(path, _npy(changed))
        with pytest.raises(ValueError, match=words):
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
        ("x.csv", "#a,b,c\n" + _rows(*_floats(N, 3).T), ("#a", "b", "c")),
        ("x.csv", "a,,c\n" + _rows(range(N), *_floats(N, 2).T), ("a", "column 2", "c")),
        ("x.npy", _npy(_floats(N, 3)), ("column 0", "column 1", "column 2")),
    ],
)
def test_runs_of_earlier_versions_read_what_they_read(tmp_path, name, data, columns):
    """Without a layout: every column, and names where the first line had no number."""
    path = _write(tmp_path / name, data)
    x = files.read(path, layout=Layout((0, 1, 2), name == "x.csv" and "a" in columns[0], ",")).x
    assert len(x) == N + (data[:6] == "0,1,2\n")  # which was a row
    info = load_array(_write(tmp_path / "same.npy", _npy(x))).info
    config = TrainConfig(data=dataclasses.replace(info, name=str(path), columns=columns, layout=None), clamp=info.clamp)
    old = json.loads(json.dumps(config.to_dict()))
    assert "layout" not in old["data"]
    assert TrainConfig.from_dict(old) == config
    points = reload(TrainConfig.from_dict(old).data, 0)
    assert points.info == config.data
    assert torch.equal(points.train, load_array(tmp_path / "same.npy", info=info).train)
