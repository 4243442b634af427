"""The user's own files for tests: writing them, and what is read or refused."""

import io
import json
import warnings

import numpy as np
import pytest
import torch

from fastebm.data import files
from fastebm.data.info import DataInfo
from fastebm.data.sets import reload
from fastebm.data.tables import load_array
from fastebm.train.recipe import TrainConfig, recipe

N = 60
LABELS = ["red", "blue", "green"] * (N // 3)
DATES = [f"2024-01-{1 + i % 28:02d}" for i in range(N)]


def normal_table():
    """Columns of scales far apart."""
    return np.random.default_rng(0).normal([0.0, 5.0, 1e9], [1.0, 1e-3, 2.0], (N, 3))


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def rows(*columns, separator=",", end="\n"):
    """Lines of cells, as they are given."""
    return "".join(separator.join(map(str, row)) + end for row in zip(*columns, strict=True))


def read(path, **options):
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


def refusal(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError) as error:  # noqa: PT011 (callers look at the words)
            load_array(path, **options)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def floats(n, d=None, seed=0):
    """Numbers that no one takes for a header or an index."""
    return np.random.default_rng(seed).normal(size=n if d is None else (n, d))
