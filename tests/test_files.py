"""The user's own files: which columns and rows are kept, and every way in which a file can be no data.

A wrong result without a word is the worst fault, so each test holds the values, or the words of the error, or both.
"""

import dataclasses
import json
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from own_files import DATES, LABELS, N, floats, normal_table, npy, read, refusal, rows, write

from fastebm.data import files
from fastebm.data.sets import reload
from fastebm.data.table import Layout
from fastebm.data.tables import load_array
from fastebm.train.recipe import TrainConfig


@pytest.fixture
def table():
    return normal_table()


@pytest.fixture
def frame(table):
    return pd.DataFrame(table, columns=["height", "weight", "salary"])


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (range(7, N + 7), "counts the rows, as an index does"),
        ([7.5] * N, "holds '7.5' in every row"),
        (["x"] * N, "holds 'x' in every row"),
        ([None] * N, "is empty"),
        (LABELS, "holds words ('red', 'blue', 'green'), which --label extra takes for classes"),
        ([chr(97 + i // 26) + chr(97 + i % 26) for i in range(N)], "holds words ('aa', 'ab', 'ac', ... (60 in all))"),
        ([*LABELS[:-1], None], "holds words"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_of_no_use_are_left_out_and_this_is_said(tmp_path, frame, column, why, suffix):
    table, path = frame.assign(extra=column), tmp_path / f"x.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    columns, values, notes = read(path)
    assert columns == ("height", "weight", "salary")
    np.testing.assert_array_equal(values, frame)
    assert len(notes) == 1
    assert f"column 'extra' {why}" in notes[0]
    assert notes[0].endswith(", so it is left out: --columns keeps what it names")
    if "counts" in why:
        assert read(path, columns=["extra", "height"])[0] == ("extra", "height")
    else:
        assert "'extra'" in refusal(path, columns=["extra", "height"])


@pytest.mark.parametrize(
    "column", [DATES, ["5 kg", "3 kg"] * 30, ["a1", "b2"] * 30, [*floats(N - 1), "oops"], ["  ", "no"] * 30]
)
def test_words_that_may_be_numbers_or_dates_are_never_left_out(tmp_path, frame, column):
    path = tmp_path / "x.csv"
    frame.assign(extra=column).to_csv(path, index=False, quoting=1)
    assert "columns must hold numbers, and these do not: 'extra'" in refusal(path)


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
        assert words in refusal(path, label=label)
    with pytest.raises(ValueError, match="name the same column, 'kind'"):
        load_array(path, label="kind", columns=["kind", "height"])


def test_columns_are_chosen_by_name(tmp_path, frame):
    table = frame.assign(date=DATES, **{"colour of hair": [f"no. {i % 3}" for i in range(N)]})
    table.to_csv(tmp_path / "x.csv", index=False)
    path = tmp_path / "x.csv"
    message = refusal(path)
    assert "'date' ('2024-01-01' in line 2), 'colour of hair' ('no. 0' in line 2): mend such cells" in message
    assert "or leave those columns out by --drop date 'colour of hair' (--columns names those to keep)" in message
    assert read(path, drop=["date", "colour of hair"])[0] == ("height", "weight", "salary")
    columns, values, _ = read(path, columns=["salary", "height"])
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
    path = write(tmp_path / "x.csv", "a,b,a\n" + rows([words[1 - i] for i in x], floats(N), floats(N)))
    columns, values, notes = read(path)
    assert columns == tuple(pd.read_csv(path).columns) == ("a", "b", "a.1")
    np.testing.assert_array_equal(values, np.c_[x, floats(N), floats(N)])
    assert notes == ["duplicate names are numbered, such as 'a.1'", "false and true are read as 0 and 1 in 'a'"]
    assert read(path, columns=["a.1"])[0] == ("a.1",)


@pytest.mark.parametrize("word", ["", "NA", "nan", "N/A", "null", "None", "?", "#N/A", "<NA>", "  "])
@pytest.mark.parametrize("decimal", [".", ","])
def test_rows_with_missing_values_are_left_out_while_they_are_few(tmp_path, frame, word, decimal):
    text = frame.astype(object)
    text.iloc[[3, 7], 1] = np.nan
    text.iloc[0, 2] = np.nan
    path = write(tmp_path / "x.csv", text.to_csv(index=False, sep=";", decimal=decimal, na_rep=word))
    told = "missing values in 'weight' (2 of 60, first line 5), 'salary' (1 of 60, first line 2)"
    notes = read(path)[2]
    assert notes[-1] == f"{told}: 3 rows left out"
    points = load_array(path)
    assert len(points.train) + len(points.test) == 57
    text.iloc[10:14, 0] = np.nan
    write(path, text.to_csv(index=False, sep=";", decimal=decimal, na_rep=word))
    message = refusal(path)
    assert "first line 2), 12% of the rows: fill them in" in message
    assert "delete such rows, or leave such columns out by --drop height weight salary" in message
    frame = frame.drop(columns="height").assign(height=floats(N))
    write(path, text.assign(height=frame["height"]).to_csv(index=False, sep=";", decimal=decimal, na_rep=word))
    np.testing.assert_array_equal(read(path, drop=["weight", "salary"])[1], frame[["height"]])


CELLS = ["oops", "1..5", "5 kg", "€3", "12%", "3-4", "2024-01-01", "yes", "1e", "True", "<0.5", "-", "1_000", "0x1F"]


@pytest.mark.parametrize("cell", [*CELLS, "inf", "-inf", "Infinity"])
def test_one_cell_that_is_no_number_is_named(tmp_path, cell):
    path = write(tmp_path / "x.csv", "a,b\n" + rows(["1.5"] * 9 + [cell] + ["2.5"] * 50, floats(N)))
    told = f"'a' ('{cell}' in line 11)" if cell in CELLS else "infinite values in 'a' (1 of 60, first line 11)"
    assert told in refusal(path)


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**53) - 1, -(2**63)])
def test_whole_numbers_that_float64_rounds_are_refused(tmp_path, number):
    path = write(tmp_path / "x.csv", "user,x\n" + rows([1, number, *range(N - 2)], floats(N)))
    message = refusal(path)
    assert f"'user' ('{number}', which float64 rounds, in line 3)" in message
    assert "--drop user" in message
    array = np.full((N, 2), number, np.uint64 if number >= 2**63 else np.int64)
    assert f"'0' ('{number}', which float64 rounds, in row 0)" in refusal(write(tmp_path / "x.npy", npy(array)))


def test_values_are_those_that_python_reads(tmp_path):
    cells = ["0.1", "1e-5", "1E5", "+3", "-0", ".5", "5.", "007", " 1 ", "5e-324", "9007199254740993.0"]
    cells += [repr(float(v)) for v in floats(N) * 10.0 ** np.arange(-30, 30)]
    path = write(tmp_path / "x.csv", "a,b\n" + rows(cells, floats(len(cells))))
    np.testing.assert_array_equal(files.read(path).x[:, 0], [float(cell) for cell in cells])


def test_npy_and_csv_of_the_same_values_are_the_same_data(tmp_path, table):
    points = load_array(write(tmp_path / "x.npy", npy(table)))
    named = load_array(write(tmp_path / "named.csv", "\ufeffheight, weight,salary\n\n" + rows(*table.T)))
    assert torch.equal(named.train, points.train)
    assert torch.equal(named.test, points.test)
    assert (len(points.train), len(points.test)) == (48, 12)
    assert points.info.columns == ("0", "1", "2")
    assert points.info.name == str(tmp_path / "x.npy")
    assert not torch.equal(load_array(tmp_path / "x.npy", seed=1).test, points.test)


@pytest.mark.parametrize("dtype", ["f4", "f2", "i2", "u1", ">f8", ">i4", "u8"])
def test_any_real_numbers_will_do(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 100, (2, N)).astype(dtype).T  # in Fortran's order
    columns, values, notes = read(write(tmp_path / "x.NPY", npy(array)))
    assert columns == ("0", "1")
    np.testing.assert_array_equal(values, array.astype(float))
    assert notes == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.npy", npy(np.zeros((N, 4, 4))), "got shape (60, 4, 4): x.reshape(len(x), -1) makes it (60, 16)"),
        ("x.npy", npy(np.zeros((N, 28, 28), np.uint8)), "x.reshape(len(x), -1) makes it (60, 784)"),
        ("x.npy", npy(np.zeros(N)), "got shape (60,): x.reshape(-1, 1) makes it one column"),
        ("x.npy", npy(np.zeros(())), "got shape ()"),
        ("x.npy", npy(np.zeros((N, 0))), "got shape (60, 0)"),
        ("x.npy", npy(np.zeros((0, 5))), "has 0 rows: it needs 50"),
        ("x.npy", npy(np.zeros((N, 2), complex)), "must hold real numbers, got dtype complex128"),
        ("x.npy", npy(np.full((N, 2), "1.5")), "must hold real numbers, got dtype <U3"),
        ("x.npy", npy(np.zeros(N, [("a", float)])), "must hold real numbers, got dtype [('a', '<f8')]"),
        ("x.npy", npy(np.full((N, 2), None), allow_pickle=True), "not an array of numbers in NumPy's .npy format"),
        ("x.npy", npy(np.full((N, 2), np.nan)), "missing values in '0' (60 of 60, first row 0), '1' (60"),
        ("x.npy", npy(np.ones((N, 2)))[:-8], "not an array of numbers"),
        ("x.npz", b"PK", "data must be text (.csv, .tsv, .txt), .parquet or .npy, got {path}: decompress it, or read"),
        ("x.csv.gz", b"", "decompress it"),
        ("x.csv", b"", "has no rows: it needs lines of numbers"),
        ("x.csv", b"a,b\n", "has 0 rows: it needs 50"),
        ("x.csv", b"1,2.5\n" * 49, "has 49 rows: it needs 50"),
        ("x.csv", b"1,2.5\n" * 49 + b",2\n", "has 49 rows without missing values: it needs 50"),
        ("x.csv", "a,b\n" + rows([8] * N, [7] * N), "nothing varies among the training rows in 'a', 'b'"),
        ("x.csv", "a,b\n" + rows(floats(N), [f"{i}e306" for i in range(N)]), "too large or too close"),
    ],
)
def test_what_is_no_data_is_refused_in_words(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    assert message.format(path=path) in refusal(path)


def test_parquet_is_read_as_csv_is(tmp_path, frame):
    path = tmp_path / "x.parquet"
    frame["count"] = np.random.default_rng(0).integers(0, 9, N).astype(np.int16)
    frame["flag"] = np.random.default_rng(1).random(N) < 0.5
    frame.to_parquet(path)
    columns, values, notes = read(path)
    assert columns == ("height", "weight", "salary", "count", "flag")
    np.testing.assert_array_equal(values, frame.astype(float))
    assert notes == ["false and true are read as 0 and 1 in 'flag'"]
    # An index with a name is a column; one without is left out, and said.
    frame.drop(columns="flag").sample(frac=1, random_state=0).to_parquet(path)
    assert read(path)[2] == ["the index, which has no name, is left out"]
    frame.drop(columns="flag").set_index("height").to_parquet(path)
    assert read(path)[0] == ("height", "weight", "salary", "count")


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
    assert message in refusal(tmp_path / "x.parquet")
    np.testing.assert_array_equal(read(tmp_path / "x.parquet", drop=["extra"])[1], frame)


def test_parquet_needs_pyarrow_and_parquet(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", b"a,b\n1,2\n")
    assert "can't be read as Parquet" in refusal(path)
    with pytest.raises(ValueError, match="--header and --no-header are for text files"):
        load_array(path, header=True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'needs pyarrow: pip install "fastebm\[parquet\]"'):
        load_array(path)


def test_a_file_is_needed_unchanged_to_go_on(tmp_path, table):
    path = write(tmp_path / "x.npy", npy(table))
    points = load_array(path, seed=3)
    assert torch.equal(reload(points.info, seed=3).train, points.train)
    for changed, words in (
        (table + 1.0, "has changed since the run began"),
        (table[:, :2], "column 2 was read before"),
    ):
        write(path, npy(changed))
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
        ("x.csv", "0,1,2\n" + rows(*floats(N, 3).T), ("column 1", "column 2", "column 3")),
        ("x.csv", rows(range(N), *floats(N, 2).T), ("column 1", "column 2", "column 3")),
        ("x.csv", "#a,b,c\n" + rows(*floats(N, 3).T), ("#a", "b", "c")),
        ("x.csv", "a,,c\n" + rows(range(N), *floats(N, 2).T), ("a", "column 2", "c")),
        ("x.npy", npy(floats(N, 3)), ("column 0", "column 1", "column 2")),
    ],
)
def test_runs_of_earlier_versions_read_what_they_read(tmp_path, name, data, columns):
    """Without a layout: every column, and names where the first line had no number."""
    path = write(tmp_path / name, data)
    x = files.read(path, layout=Layout((0, 1, 2), name == "x.csv" and "a" in columns[0], ",")).x
    assert len(x) == N + (data[:6] == "0,1,2\n")  # which was a row
    info = load_array(write(tmp_path / "same.npy", npy(x))).info
    config = TrainConfig(data=dataclasses.replace(info, name=str(path), columns=columns, layout=None), clamp=info.clamp)
    old = json.loads(json.dumps(config.to_dict()))
    assert "layout" not in old["data"]
    assert TrainConfig.from_dict(old) == config
    points = reload(TrainConfig.from_dict(old).data, 0)
    assert points.info == config.data
    assert torch.equal(points.train, load_array(tmp_path / "same.npy", info=info).train)
