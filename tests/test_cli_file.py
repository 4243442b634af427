"""The command and the user's own file, from training to samples."""

import json
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from commands import SMALL, error

from fastebm.cli import main
from fastebm.cli import train as train_command
from fastebm.cli.progress import Signals
from fastebm.data.tables import load_array

pytestmark = pytest.mark.usefixtures("few_trees")


@pytest.fixture
def frame():
    x = np.random.default_rng(0).normal([0.0, 5.0, 1e9], [1.0, 1e-3, 2.0], (60, 3))
    return pd.DataFrame(x, columns=["height", "weight", "salary"])


PANDAS_WRITES = {
    "as is": ({}, 1),
    "without index": ({"index": False}, 0),
    "without header": ({"index": False, "header": False}, 1),
    "without header, with index": ({"header": False}, 2),
    "semicolons and decimal commas": ({"sep": ";", "decimal": ",", "index": False}, 2),
    "tabs": ({"sep": "\t", "index": False}, 0),
    "names of numbers": ({"index": False, "header": [0, 1, 2]}, 1),
}


@pytest.mark.parametrize(("options", "notes"), PANDAS_WRITES.values(), ids=PANDAS_WRITES.keys())
def test_train_on_what_pandas_writes(tmp_path, frame, monkeypatch, capsys, options, notes):
    """To the first step: the rows that it is given, and a line for each decision."""
    seen = {}

    def train(config, out, *, data, **_):
        seen.update(config=config, data=data)
        raise RuntimeError("enough seen")

    monkeypatch.setattr(train_command, "train", train)
    frame.to_csv(tmp_path / "x.csv", **options)
    assert main(["train", "--data", str(tmp_path / "x.csv"), *SMALL, "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err.removeprefix(f"reading {tmp_path / 'x.csv'}\n")  # on a busy machine
    *told, report, last = err.splitlines()
    assert last == "fastebm: error: enough seen"
    assert all(line.startswith("fastebm: x.csv: ") for line in told)
    assert len(told) == notes, told
    assert "x.csv: 48 rows to train on and 12 held out, of 3 columns: " in report
    np.save(tmp_path / "x.npy", frame)
    same = load_array(tmp_path / "x.npy")
    assert torch.equal(seen["data"].train, same.train)
    assert seen["config"].data.sha256 == same.info.sha256


def test_a_table_of_dates_and_text_from_training_to_samples(tmp_path, frame, monkeypatch, capsys):
    frame.insert(0, "date", [f"2024-01-{1 + i % 28:02d}" for i in range(60)])
    frame["colour"] = ["red", "blue", "green"] * 20
    frame["age"] = np.random.default_rng(1).normal(size=60)
    frame.loc[3, "weight"] = np.nan
    frame.to_csv(tmp_path / "people.csv", sep=";", decimal=",")
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", "people.csv", *SMALL]
    assert main(command) == 2
    assert "these do not: 'date' ('2024-01-01' in line 2): mend" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [tmp_path / "people.csv"]
    assert main([*command, "--columns", "salary", "height", "age"]) == 0
    printed = capsys.readouterr()
    assert "fastebm: people.csv: decimal commas are read as decimal points\n" in printed.err
    (out,) = (tmp_path / "runs").iterdir()
    recorded = json.loads((out / "config.json").read_text())["data"]
    assert recorded["columns"] == ["salary", "height", "age"]
    assert list(recorded["layout"].values()) == [[4, 2, 6], True, ";", ",", 0, None, None]
    monkeypatch.chdir("/")
    assert main(["sample", str(out), "-n", "50", "--out", str(tmp_path / "x.npy")]) == 0
    x = np.load(tmp_path / "x.npy")
    assert x.shape == (50, 3)
    rows = frame[recorded["columns"]]
    assert (abs(x.mean(0) - rows.mean()) < 2 * rows.std()).all()
    capsys.readouterr()
    message = error(capsys, "sample", out, "--out", tmp_path / "x.png")
    assert "samples of 3 dims make no picture: give --out a name that ends in .csv" in message


def test_a_run_on_a_file_resumes_by_its_folder(tmp_path, frame, monkeypatch, capsys):
    data, out = tmp_path / "x.csv", tmp_path / "run"
    frame.to_csv(data, header=[0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "arrived", lambda self: setattr(self, "number", signal.SIGINT) or True)
        command = ["train", "--data", str(data), "--drop", "1", *SMALL, "--out", str(out)]
        assert main(command) == 128 + signal.SIGINT
    err = capsys.readouterr().err
    assert "(, 0, 1, ...) is taken as the names of the columns" in err
    assert f"to go on: fastebm train --resume {out}\n" in err
    assert f"is trained on {data}, not on moons" in error(capsys, "train", "moons", "--resume", out)
    assert "leave out --data" in error(capsys, "train", "--data", data, "--resume", out)
    assert "leave out --columns" in error(capsys, "train", "--resume", out, "--columns", "0")
    assert "leave out --header" in error(capsys, "train", "--resume", out, "--no-header")
    data.rename(tmp_path / "y.csv")
    assert "x.csv, which the run is trained on, is gone" in error(capsys, "train", "--resume", out)
    (tmp_path / "y.csv").rename(data)
    assert main(["train", "--resume", str(out)]) == 0
    assert "fastebm: x.csv" not in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["data"]["columns"] == ["0", "2"]
    assert (out / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moons", "--columns", "x"], "--columns is for --data FILE: leave it out, or name a file"),
        (["digits", "--drop", "0"], "--drop is for --data FILE"),
        (["moons", "--no-header"], "--header is for --data FILE"),
        (["--data", "x.csv", "--columns", "a", "--drop", "b"], "give one of the two"),
        (["--data", "x.csv", "--drop", "hieght"], "has no column 'hieght'"),
        (["--data", "x.csv", "--no-header"], "'height'"),
        (["--data", "y.xlsx"], "read it with pandas"),
        (["--data", "x.cvs"], "x.cvs: No such file or directory: did you mean x.csv?"),
        (["--data", "x.csv", "--label", "hieght"], "has no column 'hieght': did you mean height?"),
    ],
)
def test_bad_choices_are_one_clear_line(tmp_path, frame, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    frame.to_csv("x.csv", index=False)
    (tmp_path / "y.xlsx").touch()
    assert message in error(capsys, "train", *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"x.csv", "y.xlsx"}
