"""A run, applied to new rows in the units of its data: fastebm.load and fastebm score."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits

import fastebm
from fastebm import evaluate
from fastebm.cli import main
from fastebm.data.sets import load, reload
from fastebm.data.tables import load_array
from fastebm.energies import energy
from fastebm.train.loop import train
from fastebm.train.recipe import TrainConfig, recipe

pytestmark = pytest.mark.usefixtures("few_trees")

FEW = ["--set", "fresh_steps=20", "n_fresh=30", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def tumours(tmp_path_factory):
    """A CSV as people have it: an index, an id, the measurements in their units, and a label."""
    bunch = load_breast_cancer(as_frame=True)
    frame = bunch.data.copy()
    frame.insert(0, "id", np.random.default_rng(0).permutation(10**6)[: len(frame)])
    frame["diagnosis"] = bunch.target.map({0: "malignant", 1: "benign"})
    path = tmp_path_factory.mktemp("scoring") / "tumours.csv"
    frame.to_csv(path)
    return path, frame


@pytest.fixture(scope="module")
def run(tumours):
    """Trained by the command on the benign rows of the file."""
    path, _ = tumours
    out = path.parent / "run"
    options = ["--drop", "id", "--label", "diagnosis=benign", "--steps", "150"]
    assert main(["train", "--data", str(path), *options, *FEW, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    options = ["--steps", "2", "--hidden-sizes", "8", "--batch-size", "16"]
    assert main(["train", "digits", *options, *FEW, "--out", str(out)]) == 0
    return out


def test_malignant_rows_are_found_by_a_file_in_its_own_units(run, tumours, capsys):
    path, frame = tumours
    out = run.parent / "scores.csv"
    capsys.readouterr()
    assert main(["score", str(run), str(path), "--out", str(out), "--label", "diagnosis=benign"]) == 0
    scores = pd.read_csv(out)
    assert list(scores) == ["row", "energy", "percentile", "columns_outside"]
    assert sorted(scores["row"]) == list(range(len(frame)))
    assert (np.diff(scores["energy"]) <= 0).all()  # the most unlikely first
    assert scores["percentile"].between(0, 100).all()
    in_order = scores.set_index("row").sort_index()["energy"]
    is_malignant = frame["diagnosis"] == "malignant"
    auroc = evaluate.auroc(in_order[~is_malignant], in_order[is_malignant])
    assert auroc > 0.9
    printed = capsys.readouterr().out.splitlines()
    assert f"AUROC of the energy, diagnosis=benign against the others: {auroc:.3f}" in printed[-1]
    top = int(scores["row"][0])
    assert f"row {top} (line {top + 2}): energy {scores['energy'][0]:.4g}, above 100.0 %" in printed[1]


def test_scores_are_the_measures_of_the_run(run, tumours):
    """The held-out rows and the malignant ones, in the file's units, have the AUROC that training told."""
    _, frame = tumours
    trained = fastebm.load(run)
    points = reload(trained.data, trained.config.seed)
    test = trained.data.to_data(points.test)
    malignant = frame.loc[frame["diagnosis"] == "malignant", list(trained.data.columns)]
    auroc = evaluate.auroc(trained.energy(test), trained.energy(malignant))
    assert auroc == pytest.approx(json.loads((run / "summary.json").read_text())["auroc_label=malignant"], abs=1e-6)
    assert np.allclose(trained.train_energies, np.sort(energy(trained.model, points.train)), atol=1e-4)


def test_energies_of_arrays_tensors_and_frames_are_those_of_states(run, tumours):
    _, frame = tumours
    trained = fastebm.load(run)
    rows = frame[list(trained.data.columns)]
    x = rows.to_numpy()
    e = trained.energy(x)
    assert (e.shape, e.dtype) == ((len(x),), torch.float32)
    assert torch.equal(e, trained.energy(torch.from_numpy(x)))
    assert torch.equal(e, trained.energy(frame[frame.columns[::-1]]))  # by name, whatever else is there
    assert torch.equal(e, energy(trained.model, trained.data.to_states(x)))
    assert trained.energy(x[:0]).shape == (0,)
    outside = trained.outside(x)
    lo, hi = trained.data.clamp
    scores = (x - trained.data.offset) / trained.data.scale
    assert np.array_equal(outside, ((scores < lo) | (scores > hi)).sum(1))
    assert 0 < outside.max() < 30
    percentiles = trained.percentile(trained.train_energies)
    assert percentiles[-1] == 100.0
    assert percentiles[0] == pytest.approx(100 / len(percentiles))
    assert np.array_equal(trained.percentile([-np.inf, np.nan, np.inf]), [0, np.nan, 100], equal_nan=True)
    samples = trained.sample(7, steps=3)
    assert samples.shape == (7, 30)
    assert np.array_equal(samples, trained.sample(7, steps=3))


def test_rows_in_other_units_are_refused_in_words(run, tumours):
    _, frame = tumours
    trained = fastebm.load(run)
    rows = frame[list(trained.data.columns)]
    benign = rows[frame["diagnosis"] == "benign"]
    standard = (rows - benign.mean()) / benign.std()
    for x in (standard, standard.iloc[[19]], standard[frame["diagnosis"] == "benign"], standard[:40] * 0.9):
        with pytest.raises(ValueError, match="these rows seem to be standardised") as error:
            trained.energy(x)
        assert "and the training rows have mean" in str(error.value)
    for x in (standard[:1], rows * 1000, rows[rows.columns[::-1]].set_axis(rows.columns, axis=1), rows + 1e4):
        with pytest.raises(ValueError, match="beyond anything that the run was trained on: in column '") as error:
            trained.energy(x)
        assert "are they standardised, in other units, or in another order?" in str(error.value)
    assert trained.energy(rows * 1000, check_units=False).shape == (569,)
    # None of these is a matter of units.
    for x in (
        rows,
        rows[frame["diagnosis"] == "malignant"],
        rows[:1],
        benign.iloc[[3]],
        rows.nlargest(20, "mean area"),
    ):
        assert trained.energy(x).shape == (len(x),)


@pytest.mark.parametrize("kind", ["rows of a plane", "rows of a table"])
def test_a_run_on_standardised_rows_refuses_raw_ones(tmp_path, kind):
    rng = np.random.default_rng(0)
    mean, deviation = [[50.0, 3.0], [50.0, 3.0, -7.0]][kind == "rows of a table"], 2.0
    raw = rng.normal(mean, deviation, (400, len(mean)))
    standard = (raw - raw.mean(0)) / raw.std(0)
    np.save(tmp_path / "x.npy", standard)
    points = load_array(tmp_path / "x.npy")
    config = TrainConfig(**{**recipe(points), "steps": 3, "n_fresh": 20, "fresh_steps": 2, "hidden_sizes": (8,)})
    train(config, tmp_path / "run", data=points)
    trained = fastebm.load(tmp_path / "run")
    assert trained.energy(standard).isfinite().all()
    with pytest.raises(ValueError, match="was trained on standardised columns: standardise these by the same means"):
        trained.energy(raw)


def test_bad_rows_are_refused_in_words(run, digits):
    trained, images = fastebm.load(run), fastebm.load(digits)
    for x, words in (
        (np.zeros((5, 31)), r"rows must be \(n, 30\), .* got shape \(5, 31\): was an index or a label left in"),
        (np.zeros(30), r"got shape \(30,\): of one row make x\[None\]"),
        (np.full((3, 30), np.nan), "rows must be finite, got NaN or inf in 3 of 3"),
        (pd.DataFrame({"mean radius": [1.0]}), "columns that are not there: 'mean texture'"),
    ):
        with pytest.raises(ValueError, match=words):
            trained.energy(x)
    levels = load_digits().images
    assert torch.equal(images.energy(levels[:9] / 16), images.energy(levels[:9].reshape(9, 64) / 16))
    for x, words in (
        (levels, r"images must be in \[0, 1\], got values from 0 to 16: divide grey levels by 16"),
        (levels * 15.9375, r"values from 0 to 255: divide grey levels by 255"),
        (levels / 8 - 1, r"got values from -1 to 1: \(x \+ 1\) / 2 maps"),
        (levels[0], r"rows must be \(n, 8, 8\) or \(n, 64\), .*: of one row make x\[None\]"),
    ):
        with pytest.raises(ValueError, match=words):
            images.energy(x)


def test_rows_that_are_nearly_all_unlike_the_training_rows_are_said(run, tumours, tmp_path, capsys):
    _, frame = tumours
    other = frame.copy()
    other[list(frame.columns[1:12])] *= 1000  # a third of the columns: too few to refuse the rows
    other.to_csv(tmp_path / "x.csv")
    assert main(["score", str(run), str(tmp_path / "x.csv")]) == 0
    assert "nearly all of them: is a column in other units" in capsys.readouterr().out


def test_images_are_scored_from_npy(digits, tmp_path, capsys):
    levels = load_digits().images
    np.save(tmp_path / "x.npy", levels[:20] / 16)
    assert main(["score", str(digits), str(tmp_path / "x.npy"), "--out", str(tmp_path / "s.csv")]) == 0
    assert "(image " in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "s.csv")) == 20
    np.save(tmp_path / "y.npy", levels)
    assert main(["score", str(digits), str(tmp_path / "y.npy")]) == 2
    assert "divide grey levels by 16" in capsys.readouterr().err


def test_columns_are_found_by_name_or_in_their_order(run, tumours, tmp_path, capsys):
    path, frame = tumours
    columns = list(fastebm.load(run).data.columns)
    reference = tmp_path / "reference.csv"
    assert main(["score", str(run), str(path), "--out", str(reference)]) == 0
    for name, write in {
        "shuffled.csv": lambda path: frame[columns[::-1]].to_csv(path, index=False),
        "semicolons.csv": lambda path: frame.to_csv(path, sep=";", decimal=","),
        "x.parquet": lambda path: frame.to_parquet(path),
        "x.npy": lambda path: np.save(path, frame[columns]),
        "nameless.csv": lambda path: frame[columns].to_csv(path, index=False, header=False),
    }.items():
        write(tmp_path / name)
        capsys.readouterr()
        assert main(["score", str(run), str(tmp_path / name), "--out", str(tmp_path / "s.csv")]) == 0
        assert ("are taken in their order" in capsys.readouterr().err) == (name in ("x.npy", "nameless.csv"))
        pd.testing.assert_frame_equal(pd.read_csv(reference), pd.read_csv(tmp_path / "s.csv"))
    frame.drop(columns="mean area").to_csv(tmp_path / "x.csv")
    assert main(["score", str(run), str(tmp_path / "x.csv")]) == 2
    assert "has no column 'mean area'" in capsys.readouterr().err
    assert main(["score", str(run), str(tmp_path / "tumour.csv"), "--out", str(tmp_path / "s.csv")]) == 2
    assert "tumour.csv: No such file or directory" in capsys.readouterr().err


def test_rows_with_missing_values_are_left_out_and_keep_their_numbers(run, tumours, tmp_path, capsys):
    _, frame = tumours
    holes = frame.copy()
    holes.loc[[2, 5], "mean area"] = np.nan
    holes.to_csv(tmp_path / "x.csv")
    assert main(["score", str(run), str(tmp_path / "x.csv"), "--out", str(tmp_path / "s.csv")]) == 0
    assert "missing values in 'mean area' (2 of 569, first line 4): 2 rows left out" in capsys.readouterr().err
    scores = pd.read_csv(tmp_path / "s.csv").set_index("row")["energy"]
    assert {*range(569)} - {*scores.index} == {2, 5}
    whole = fastebm.load(run).energy(frame)
    np.testing.assert_allclose(scores, whole[scores.index.to_numpy()], rtol=1e-5)


def test_a_run_scores_where_its_data_are_not(run, tumours, tmp_path):
    path, _ = tumours
    kept = fastebm.load(run)
    moved = path.with_name("moved.csv")
    path.rename(moved)
    try:
        assert np.array_equal(fastebm.load(run).train_energies, kept.train_energies)
        (run / "train_energies.npy").rename(tmp_path / "kept.npy")
        with pytest.raises(ValueError, match=r"tumours\.csv, which the run is trained on, is gone"):
            fastebm.load(run)
    finally:
        moved.rename(path)
    computed = fastebm.load(run).train_energies
    np.testing.assert_array_equal(computed, kept.train_energies)
    # Of an earlier checkpoint they are those of its own weights.
    first = fastebm.load(run / "checkpoints" / "step-00000000")
    assert not np.allclose(first.train_energies, kept.train_energies)
    assert first.percentile(first.train_energies[[-1]]) == 100
    (run / "train_energies.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"train_energies\.npy is damaged .*: delete it"):
        fastebm.load(run)
    (tmp_path / "kept.npy").rename(run / "train_energies.npy")


def test_a_toy_scores_in_its_units(tmp_path):
    points = load("moons")
    config = TrainConfig(**{**recipe(points), "steps": 2, "n_fresh": 20, "fresh_steps": 2, "hidden_sizes": (8,)})
    train(config, tmp_path / "run", data=points)
    trained = fastebm.load(tmp_path / "run")
    assert torch.equal(
        trained.energy(points.info.to_data(points.test)),
        energy(trained.model, points.info.to_states(points.info.to_data(points.test))),
    )
