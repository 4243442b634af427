"""Text files of the user: names, separators, decimal commas, encodings, and what is said of each.

A wrong result without a word is the worst fault, so each test holds the values, or the words of the error, or both.
"""

import io

import numpy as np
import pandas as pd
import pytest
from own_files import DATES, N, floats, normal_table, npy, read, refusal, rows, write


@pytest.fixture
def table():
    return normal_table()


@pytest.fixture
def frame(table):
    return pd.DataFrame(table, columns=["height", "weight", "salary"])


@pytest.mark.parametrize("names", [[0, 1, 2], [1, 2, 3], [0], [1, 2], list(range(20)), list(range(1, 13))])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("draw", [floats, lambda n, d: np.random.default_rng(0).integers(0, 50, (n, d))])
def test_consecutive_integers_are_names_and_this_is_said(tmp_path, names, index, draw):
    x = draw(N, len(names))
    pd.DataFrame(x, columns=names).to_csv(tmp_path / "x.csv", index=index)
    columns, values, notes = read(tmp_path / "x.csv")
    np.testing.assert_array_equal(values, x)
    assert columns == tuple(map(str, names))
    assert "is taken as the names of the columns: --no-header makes it a row" in notes[0]
    if not index:
        _, values, notes = read(tmp_path / "x.csv", header=False)
        np.testing.assert_array_equal(values, [names, *x])
        assert "--header makes one of the first line" in notes[0]


@pytest.mark.parametrize("line", ["a,b", "a,2", "id,2019", '"height, cm",weight', " x,y", "x;y,z", "°C,µ", "a,"])
def test_a_line_with_a_word_is_of_names(tmp_path, line):
    x = floats(N, 2)
    columns, values, notes = read(write(tmp_path / "x.csv", line + "\n" + rows(*x.T)))
    np.testing.assert_array_equal(values, x)
    assert columns == tuple(pd.read_csv(io.StringIO(line), skipinitialspace=True).columns)
    assert (len(notes) == 0) == (line[-1] not in "29,")  # that a name is a number or missing is said


ROWS_WITHOUT_NAMES = {
    "floats": floats(N, 3),
    "integers": np.random.default_rng(5).integers(10, 90, (N, 4)),
    "one column": np.round(floats(N), 2)[:, None],
    "exponents": 1e-30 * floats(N, 2),
    "true and false": np.random.default_rng(4).random((N, 3)) < 0.5,
    "one true or false": np.random.default_rng(5).random((N, 1)) < 0.5,
}


@pytest.mark.parametrize("x", ROWS_WITHOUT_NAMES.values(), ids=ROWS_WITHOUT_NAMES.keys())
@pytest.mark.parametrize("index", [False, True])
def test_a_first_line_of_data_is_data_and_the_lack_of_names_is_said(tmp_path, x, index):
    pd.DataFrame(x).to_csv(tmp_path / "x.csv", index=index, header=False)
    columns, values, notes = read(tmp_path / "x.csv")
    np.testing.assert_array_equal(values, x)
    assert columns == tuple(str(i + index) for i in range(x.shape[1]))
    assert "no line of names was found, so columns are called 0" in notes[0]
    assert any("read as 0 and 1" in note for note in notes) == (x.dtype == bool)
    assert any("counts the rows, as an index does, so it is left out" in note for note in notes) == index


def test_text_in_a_first_line_of_data_is_told_by_its_column(tmp_path):
    x = floats(N, 2)
    path = write(tmp_path / "x.csv", rows(*x.T, DATES))
    assert "'2024-01-01' ('2024-01-02' in line 2)" in refusal(path)
    assert "'2' ('2024-01-01' in line 1)" in refusal(path, header=False)
    _, values, notes = read(path, drop=["2024-01-01"])
    assert len(values) == N - 1
    assert "is taken as the names of the columns: --no-header" in notes[0]
    np.testing.assert_array_equal(read(path, header=False, drop=["2"])[1], x)


@pytest.mark.parametrize(
    "text_of",
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
def test_an_unnamed_index_is_left_out_and_this_is_said(tmp_path, frame, text_of):
    path = write(tmp_path / "x.csv", text_of(frame))
    columns, values, notes = read(path)
    assert columns == ("height", "weight", "salary")
    np.testing.assert_array_equal(values, frame)
    assert any("column 'Unnamed: 0' counts the rows, as an index does, so it is left out" in note for note in notes)
    columns, values, _ = read(path, columns=["Unnamed: 0", "salary"])
    assert columns == ("Unnamed: 0", "salary")
    np.testing.assert_array_equal(values[:, 1], frame["salary"])


@pytest.mark.parametrize("index", [range(N)[::-1], floats(N), range(0, 2 * N, 2), [1, 1, 2] * 20])
def test_an_unnamed_column_that_does_not_count_is_kept_and_said(tmp_path, frame, index):
    path = write(tmp_path / "x.csv", frame.set_axis(index).to_csv())
    columns, values, notes = read(path)
    assert columns == ("Unnamed: 0", "height", "weight", "salary")
    np.testing.assert_array_equal(values, np.c_[index, frame])
    assert "has no name and does not count the rows, so it is kept: --drop 'Unnamed: 0' leaves it out" in notes[0]
    np.testing.assert_array_equal(read(path, drop=["Unnamed: 0"])[1], frame)


def test_a_lone_column_is_kept(tmp_path, frame):
    path = tmp_path / "x.csv"
    assert read(write(path, rows(range(5, N + 5))))[1][:, 0].tolist() == list(range(5, N + 5))
    # R writes no name above those of its rows: never an index without a word.
    path = write(path, "height,weight,salary\n" + frame.to_csv(header=False))
    assert "the first row has more than the line of names" in refusal(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " ", "   "])
@pytest.mark.parametrize("header", [True, False])
def test_separators_are_found(tmp_path, table, separator, end, header):
    names = separator.join(["height", "weight", "salary"]) + end if header else ""
    path = write(tmp_path / "x.csv", names + rows(*table.T, separator=separator, end=end) + end)
    columns, values, notes = read(path)
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
    columns, values, notes = read(tmp_path / "x.csv")
    assert columns == (("height", "weight", "salary", "count") if "header" not in options else ("0", "1", "2", "3"))
    np.testing.assert_array_equal(values, frame)
    assert "decimal commas are read as decimal points" in notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a;b\n" + rows(["1.234,5", "2,5"] * 30, ["2,5", "3,5"] * 30, separator=";"), "'a' ('1.234,5' in line 2)"),
        ("a,b\n" + rows(['"1,234.5"', "2.5"] * 30, floats(N)), "'a' ('1,234.5' in line 2)"),
        ("a,b\n" + rows(['"1,234.5"', "2.5"] * 30, floats(N)), "(are there marks between thousands? write 1234.5)"),
        ("a;b\n" + rows(["1.234,5", "2,5"] * 30, ["2,5", "3,5"] * 30, separator=";"), "marks between thousands?"),
        (rows(['"1,234"'] * N, [2.5] * N), "'1,234' in column '0', line 1, may be a thousand or have a decimal comma"),
        (rows(["999", "1,234"] * 30, [2] * N, separator=";"), "'1,234' in column '0', line 2, may be a thousand"),
        (rows(["1,5"] * N, ["1.5"] * N, separator=";"), "with decimal commas, and these do not: '1' ('1.5' in"),
        (rows(["1,5", "1.5"] * 30, [2] * N, separator=";"), "'0' ('1,5' in line 1)"),
        ("x\n" + rows(["1,5"] * N), "the first row has more than the line of names (decimal commas need another"),
        ("x,y\n" + rows(["1,5"] * N, ["2,5"] * N), "the first row has more than the line of names"),
    ],
)
def test_thousands_and_mixed_decimals_are_named(tmp_path, text, message):
    assert message in refusal(write(tmp_path / "x.csv", text))


def test_encodings_and_comments(tmp_path, table):
    text = "größe,µ,salary\n" + rows(*table.T)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        columns, values, notes = read(write(tmp_path / "x.csv", text.encode(encoding)))
        assert columns == ("größe", "µ", "salary")
        np.testing.assert_array_equal(values, table)
        assert notes == []
    for data in (text.encode("latin-1"), text.encode("utf-16-le"), npy(table), b"\xff\xfe1,2\n,"):
        assert "is not text in UTF-8: save it as UTF-8" in refusal(write(tmp_path / "x.csv", data))
    np.savetxt(tmp_path / "x.txt", table, delimiter=",", header='by "Ann"\nheight, weight', fmt="%.17g")
    columns, values, notes = read(tmp_path / "x.txt")
    assert (columns, notes[0]) == (("0", "1", "2"), "the lines at the top that begin with # are skipped")
    np.testing.assert_array_equal(values, table)
    assert "'b' ('x' in line 6)" in refusal(write(tmp_path / "x.csv", "# 1\n#\n\na,b\n1,2\n3,x\n" + "5,6\n" * N))


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
        ("x" * 200_000 + "\n" + "1\n" * 60, "is not a table of numbers: field larger"),
    ],
)
def test_uneven_lines_are_named(tmp_path, text, message):
    assert message in refusal(write(tmp_path / "x.csv", text))
