"""What a table's values are like, in words: own data are looked at before training."""

import numpy as np
import pandas as pd
import pytest

from fastebm.cli import main
from fastebm.data import inspection
from fastebm.data.table import Layout, Table
from fastebm.data.tables import load_array

N = 400
RNG = np.random.default_rng(0)


def _table(**columns):
    return Table(tuple(columns), np.stack([*columns.values()], 1).astype(float), str, Layout(), ())


NORMAL = RNG.normal(size=N)
WORDS = {
    "few": "there are few values",
    "whole": "there are whole numbers",
    "rising": "values rise",
    "id": "all differ",
    "mark": "a mark for missing values? empty such cells",
    "heavy": "heavy tails",
}
KINDS = {
    "normal": (NORMAL, set()),
    "uniform": (RNG.random(N), set()),
    "exponential": (RNG.exponential(size=N), set()),
    "bimodal": (np.where(RNG.random(N) < 0.3, 50.0, 0.0) + NORMAL, set()),
    "lognormal 2": (RNG.lognormal(0, 2, N), {"heavy"}),
    "Cauchy": (RNG.standard_cauchy(N), {"heavy"}),
    "Student 1.5": (RNG.standard_t(1.5, N), {"heavy"}),
    "classes": (RNG.integers(0, 3, N), {"few"}),
    "true or false": (RNG.random(N) < 0.5, {"few"}),
    "mostly zero, else one": (RNG.random(N) < 0.02, {"few"}),
    "ages": (RNG.integers(18, 90, N), {"whole"}),
    "heavy counts": (np.floor(RNG.lognormal(3, 2, N)), {"whole", "heavy"}),
    "times": (np.cumsum(RNG.random(N)), {"rising"}),
    "numbers of rows, sorted and thinned": (np.arange(0, 3 * N, 3), {"rising"}),
    "ids in no order": (RNG.permutation(10**6)[:N], {"id"}),
    "-999 for missing": (np.where(RNG.random(N) < 0.05, -999.0, NORMAL), {"mark"}),
    "1e9 for missing ages": (np.where(RNG.random(N) < 0.05, 1e9, RNG.integers(18, 90, N)), {"whole", "mark"}),
    "many zeros": (np.where(RNG.random(N) < 0.6, 0.0, RNG.lognormal(0, 1, N)), set()),
    "halves": (RNG.integers(0, 3, N) / 2, set()),
}


@pytest.mark.parametrize(("values", "kinds"), KINDS.values(), ids=KINDS.keys())
def test_what_a_column_is_like(values, kinds):
    found = inspection.findings(_table(ordinary=NORMAL, odd=values))
    assert {kind for kind, words in WORDS.items() for line in found if words in line} == kinds
    assert all("'odd'" in line and "'ordinary'" not in line for line in found)


def test_copies_of_rows_are_said():
    x = RNG.normal(size=(N, 3))
    x[200:250] = x[:50]
    found = inspection.findings(_table(a=x[:, 0], b=x[:, 1], c=x[:, 2]))
    assert found == ("50 of 400 rows are copies of others: some will be held out and trained on as well",)
    assert inspection.findings(_table(a=np.round(x[:, 0], 1))) == ()  # one column has equal values by nature


def test_a_kind_has_one_line_however_many_columns():
    columns = {f"c{i}": RNG.integers(0, 2, N) for i in range(30)}
    (line, *_) = inspection.findings(_table(**columns, x=NORMAL))
    assert "in 'c0', 'c1', 'c2', 'c3', 'c4', ... (30 in all): a label? --label NAME" in line


def test_the_report_comes_before_training(tmp_path, monkeypatch, capsys):
    """Of a file as people have it: an index, a label, a constant, whole numbers, heavy tails, a missing value."""
    frame = pd.DataFrame({"height": NORMAL, "age": RNG.integers(18, 90, N), "income": RNG.lognormal(0, 2, N)})
    frame["kind"], frame["version"], frame["class"] = ["a", "b"] * (N // 2), 3, RNG.integers(0, 3, N)
    frame.loc[7, "height"] = np.nan
    frame.to_csv(tmp_path / "people.csv")
    monkeypatch.setattr("fastebm.cli.train.train", lambda *_, **__: pytest.fail("it stops before"))
    arguments = ["train", "--data", str(tmp_path / "people.csv"), "--steps", "1", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--set", "reg_alpha=-1"]) == 2  # after the file was read
    *told, error = capsys.readouterr().err.splitlines()
    assert "reg_alpha must be" in error
    assert [line.removeprefix("fastebm: people.csv: ") for line in told if not line.startswith("reading")] == [
        "column 'Unnamed: 0' counts the rows, as an index does, so it is left out: --columns keeps what it names",
        "column 'kind' holds words ('a', 'b'), which --label kind takes for classes, so it is left out: --columns "
        "keeps what it names",
        "column 'version' holds '3' in every row, so it is left out: --columns keeps what it names",
        "missing values in 'height' (1 of 400, first line 9): 1 row left out",
        "there are few values in 'class': a label? --label NAME takes it for one, --drop leaves it out; else samples "
        "will lie between the values, too",
        "there are whole numbers in 'age': samples will lie between them, by which a random forest tells them",
        "there are heavy tails in 'income': values beyond 5 standard deviations count as 5; the logarithm of such a "
        "column is learnt better",
        "319 rows to train on and 80 held out, of 4 columns: height, age, income, class",
    ]


def test_findings_are_kept_with_the_data(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([NORMAL, RNG.integers(0, 3, N)], 1))
    assert "few values in '1'" in load_array(tmp_path / "x.npy").findings[0]
