"""Planes and tables: the user's own file, scikit-learn's table, and toys; split and scaled to states."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files, inspection
from .dataset import Points
from .info import SPREAD, DataInfo
from .table import MAX_LABELS, Layout, Table
from .toys import TOYS

__all__ = ["load_array", "load_breast_cancer", "load_toy"]

# Rows of a toy, to train on and held out: enough not to be memorised by an energy of 17,000 weights.
_N_TRAIN, _N_TEST = 10_000, 2_000

# The share of a table that is held out, up to a number of rows that fixes an AUROC to half a percent.
_TEST_SHARE, _MAX_TEST = 0.2, 10_000

# With fewer rows, a fold of the two-sample test has less than two.
_MIN_ROWS = 50

# Chains are kept within the range of the data and a tenth more, but at most this many standard deviations from the
# mean: in a wider box, chains that start in uniform noise never find the data.
_MAX_SCORE, _MARGIN = 5.0, 1.1


def load_toy(name: str, seed: int, info: DataInfo | None) -> Points:
    """One of TOYS. info: of an earlier load, whose scaling is used."""
    x = TOYS[name][1](_N_TRAIN + _N_TEST, np.random.default_rng(seed))
    return _points(name, ("x", "y"), x, seed, info, n_test=_N_TEST)


def load_breast_cancer(name: str, seed: int, info: DataInfo | None) -> Points:
    """Wisconsin's breast-tumour measurements: 30 columns; 357 benign rows, split, and 212 malignant ones as outliers.

    Training sees benign rows only. Source: Street, Wolberg & Mangasarian 1993.
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
    """Load the user's own table, (n, d) real numbers with n >= 50, from text (CSV, TSV), Parquet or .npy.

    Each decision on the way, such as which line holds names, is a UserWarning. Pickles are never read.

    Args:
        seed: of the split. info: of an earlier load: the values must be the same, and its scaling is used.
        columns: names of the columns to keep, in this order. Without them: all but those that count the rows, are the
            same in every row, or hold words. drop: names of columns to leave out. In a file without names they are
            "0", "1", ...
        header: of text: whether the first line holds names; None: detected.
        label: "NAME": a column of classes, which is left out. "NAME=VALUE": train on the rows with this value; the
            others become outliers, one set per value.

    Raises:
        ValueError, OSError: there is no such file, or it can't be trained on.
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
    table, outliers = _without_outliers(table)
    n, value = len(table.x), table.layout.value
    if n < _MIN_ROWS:
        what = "" if value is None else f" with the label {value!r}"
        what += "" if table.kept is None or value is not None else " without missing values"
        raise ValueError(f"{path} has {n} rows{what}: it needs {_MIN_ROWS} to train on some and hold out others")
    notes = (*table.notes, *inspection.flattened(path, table)) if info is None else ()
    for note in notes:
        warnings.warn(f"{path.name}: {note}", UserWarning, stacklevel=2)
    n_test = min(round(_TEST_SHARE * n), _MAX_TEST)
    return _points(
        str(path), table.columns, table.x, seed, info, n_test=n_test, outliers=outliers, labels=table.labels,
        sha256=sha256, layout=table.layout, findings=inspection.findings(table),
    )  # fmt: skip


def _without_outliers(table: Table) -> tuple[Table, dict[str, NDArray[Any]]]:
    """The rows to train on, and the others by their label. Without the label of the rows to train on: all rows."""
    value, labels = table.layout.value, table.labels
    if labels is None or value is None:
        return table, {}
    others = [word for word in np.unique(labels) if word not in (value, "")]
    outliers = {f"label={word}": table.x[labels == word] for word in others}
    if len(others) > MAX_LABELS:
        outliers = {"other labels": table.x[labels != value]}
    return dataclasses.replace(table.rows(labels == value), labels=None), outliers


def _old_layout(info: DataInfo) -> Layout:
    """How earlier versions read a file: all columns, and without names in the first line they were "column i"."""
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
    """Split rows, and scale them: by info, or else by the mean and deviation of the training rows."""
    n_test = round(_TEST_SHARE * len(x)) if n_test is None else n_test
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    train, test = x[order[n_test:]], x[order[:n_test]]
    if info is None:
        info = dataclasses.replace(_scaling(name, columns, train), sha256=sha256, layout=layout)
    return Points(
        info,
        info.to_states(train),
        info.to_states(test),
        {k: info.to_states(v) for k, v in (outliers or {}).items()},
        None if labels is None else labels[order[n_test:]],
        findings,
    )


def _scaling(name: str, columns: tuple[str, ...], train: NDArray[Any]) -> DataInfo:
    """The scaling and range of states, from the training rows."""
    constant = [column for column, spread in zip(columns, np.ptp(train, axis=0), strict=True) if spread == 0]
    if constant:
        names = ", ".join(map(repr, constant[:5])) + (", ..." if len(constant) > 5 else "")
        raise ValueError(f"{name}: nothing varies among the training rows in {names}: leave such columns out (--drop)")
    kind = "plane" if len(columns) == 2 else "table"
    with np.errstate(all="ignore"):
        offset, scale = train.mean(axis=0), train.std(axis=0) / SPREAD[kind]
        furthest = float(np.abs((train - offset) / scale).max())
    if not (np.isfinite(offset).all() and np.isfinite(scale).all() and math.isfinite(furthest)):
        raise ValueError(f"{name}: values up to {np.abs(train).max():g} are too large or too close to scale")
    bound = min(round(_MARGIN * furthest, 2), _MAX_SCORE * SPREAD[kind])
    return DataInfo(
        name,
        kind,
        (len(columns),),
        (-bound, bound),
        columns=columns,
        offset=tuple(offset.tolist()),
        scale=tuple(scale.tolist()),
    )
