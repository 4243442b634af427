"""A trained run, applied to rows in the units of its data: their energies, compared with the training rows'."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..data.info import DataInfo
from ..data.sets import reload
from ..words import listed
from .apply import energies_of, features_of, fresh_samples, train_energies
from .folder import ENERGIES, SUMMARY, load_model, located
from .models import row_energy
from .recipe import TrainConfig

__all__ = ["TrainedRun", "load"]

# Rows are in other units if more than this share of their cells lies beyond the range of the training rows. Of the
# malignant rows of breast_cancer 10 % do, of the largest 20 of them 34 %, of its rows when standardised 69 %.
_MOST_OUTSIDE = 0.5

# With fewer rows, centres and spreads of columns do not show whether these are standardised.
_FEW = 10

# Rows within the range are still taken for standardised if at least _SURELY_FAR of them have a higher energy than 99 %
# of the training rows. In both cases fewer than _NOT_FAR of them may have, once they are read as standardised.
_SURELY_FAR, _NOT_FAR = 0.9, 0.5


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """What ``load`` returns.

    Args:
        model: the energy of states (n, dim), as ``langevin_sample`` and pools take it; with labels= or condition= if
            its kind (``config.model``) takes these. For images, states are values in [0, 1]; for rows,
            ``(x - data.offset) / data.scale`` within ``data.clamp``.
        config: all hyper-parameters. data: the data set and its units.
        train_energies: (n_train,) sorted energies of the training rows; none for energies of pairs.
    """

    model: nn.Module
    config: TrainConfig
    train_energies: NDArray[np.float32]

    @property
    def data(self) -> DataInfo:
        return self.config.data

    def energy(self, x: Any, *, check_units: bool = True) -> Tensor:
        """Energies of rows in the units of the data: the higher, the less likely.

        Values beyond the range of the chains (``outside``) are clamped to it: the energy has learned nothing about
        what is further out.

        Args:
            x: (n, d) rows, or (n, height, width) images in [0, 1]: a tensor, an array, or a DataFrame, whose columns
                are found by name.
            check_units: refuse rows that are clearly in other units, such as standardised rows if the run was trained
                on raw ones.

        Returns:
            (n,) float32.

        Raises:
            ValueError: the rows have another shape, are not finite, or are in other units.
        """
        rows = self._rows(x)
        e = self._energies(self._states(rows))
        if check_units and self.data.kind != "images" and len(rows) > 0:
            self._check_units(rows, e)
        return e

    def percentile(self, energies: ArrayLike) -> NDArray[np.float64]:
        """For each energy, the percentage of training rows whose energy is no higher. 100: unlike all of them.

        The model was fitted to the training rows, so among similar new rows somewhat more than 5 % are above 95.
        """
        e = np.asarray(energies, np.float32)
        found = 100.0 * np.searchsorted(self.train_energies, e, side="right") / len(self.train_energies)
        return np.where(np.isnan(e), np.nan, found)

    def outside(self, x: Any) -> NDArray[np.int64]:
        """(n,) For each row, the number of columns that lie beyond the range of the chains.

        The range is that of the training rows and a tenth more, but at most five standard deviations.
        """
        n: NDArray[np.int64] = self._outside(self._rows(x)).sum(axis=1)
        return n

    def sample(self, n: int, *, steps: int | None = None, seed: int = 0) -> NDArray[Any]:
        """New samples in the units of the data, from chains that start in uniform noise: (n, *data.shape).

        Args:
            steps: Langevin steps; None: as many as in the run's report.
        """
        samples, _ = fresh_samples(self.model, self.config, n, dim=self.data.dim, steps=steps, seed=seed)
        return self.data.to_data(samples)

    def features(self, x: Any) -> Tensor:
        """Features of rows by a run of infonce: (n, feature_size), of length 1. x: as for ``energy``.

        Raises:
            ValueError: the run trained an energy of rows, which has no features.
        """
        if self.config.model != "pair":
            raise ValueError(f"the run trained an energy of rows by {self.config.objective}: features are infonce's")
        return features_of(self.model, self._states(self._rows(x)))

    def _energies(self, states: Tensor) -> Tensor:
        return energies_of(row_energy(self.model, self.config), states)

    def _rows(self, x: Any) -> NDArray[np.float64]:
        """Checked rows, (n, dim), in the units of the data."""
        data = self.data
        if hasattr(x, "columns") and data.columns:
            names = {str(name): name for name in x.columns}
            if missing := [name for name in data.columns if name not in names]:
                raise ValueError(
                    f"the run was trained on columns that are not there: {listed(missing)}; there are "
                    f"{listed([*names])}"
                )
            x = x[[names[name] for name in data.columns]]
        rows = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, np.float64)
        if rows.ndim < 2 or rows.shape[1:] not in (data.shape, (data.dim,)):
            shape = " or ".join(f"(n, {', '.join(map(str, s))})" for s in dict.fromkeys([data.shape, (data.dim,)]))
            mistake = ""
            if rows.shape in (data.shape, (data.dim,)):
                mistake = ": of one row make x[None]"
            elif rows.ndim == 2 and not hasattr(x, "columns"):
                mistake = ": was an index or a label left in, or a column left out?"
            raise ValueError(f"rows must be {shape}, as those of {data.name}, got shape {rows.shape}{mistake}")
        rows = rows.reshape(len(rows), data.dim)
        if not (finite := np.isfinite(rows)).all():
            bad = np.flatnonzero(~finite.all(axis=1))
            raise ValueError(f"rows must be finite, got NaN or inf in {len(bad)} of {len(rows)} (first: {bad[0]})")
        if data.kind == "images" and len(rows) > 0 and not 0.0 <= rows.min() <= rows.max() <= 1.0:
            most = data.levels if rows.max() <= (data.levels or 0) else 255
            levels = f": divide grey levels by {most}" if rows.min() >= 0 else ": (x + 1) / 2 maps [-1, 1] there"
            raise ValueError(f"images must be in [0, 1], got values from {rows.min():g} to {rows.max():g}{levels}")
        return rows

    def _outside(self, rows: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(n, dim): which values lie beyond the range of the chains."""
        if self.data.kind == "images":
            return np.zeros(rows.shape, np.bool_)
        scores = (rows - self.data.offset) / self.data.scale
        lo, hi = self.data.clamp
        return (scores < lo) | (scores > hi)

    def _states(self, rows: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(rows).float() if self.data.kind == "images" else self.data.to_states(rows)

    def _check_units(self, rows: NDArray[np.float64], e: Tensor) -> None:
        data = self.data
        mean, deviation = np.array(data.offset), np.array(data.deviation)
        outside = self._outside(rows)
        was_standardised = bool((np.abs(mean) < 0.1).all() and (np.abs(deviation - 1.0) < 0.1).all())
        is_raw = was_standardised and _is_raw(rows)
        if outside.mean() <= _MOST_OUTSIDE and self._share_far(e) < _SURELY_FAR and not is_raw:
            return
        j = int(outside.mean(axis=0).argmax())
        where = (
            f"in column {data.columns[j]!r} the median is {np.median(rows[:, j]):g}, and the training rows have mean "
            f"{mean[j]:g} and standard deviation {deviation[j]:g}"
        )
        way_out = "check_units=False (fastebm score --no-check-units) scores them as they are"
        raw = rows * deviation + mean
        could_be_raw = not was_standardised and self._outside(raw).mean() <= _MOST_OUTSIDE
        if could_be_raw and self._share_far(self._energies(self._states(raw))) < _NOT_FAR:
            raise ValueError(
                f"these rows seem to be standardised, and the run was trained on values as they are: {where}; give "
                f"rows in its units ({way_out})"
            )
        if outside.mean() > _MOST_OUTSIDE or is_raw:
            guess = (
                "the run was trained on standardised columns: standardise these by the same means and deviations"
                if was_standardised
                else "are they standardised, in other units, or in another order?"
            )
            raise ValueError(
                f"{outside.mean():.0%} of the cells are beyond anything that the run was trained on: {where}; {guess} "
                f"({way_out})"
            )

    def _share_far(self, energies: Tensor) -> float:
        """The share of these energies above those of 99 % of the training rows."""
        return float((energies > float(np.quantile(self.train_energies, 0.99))).double().mean())


def _is_raw(rows: NDArray[np.float64]) -> bool:
    """Whether most columns clearly do not have mean 0 and standard deviation 1."""
    is_far = np.abs(np.median(rows, axis=0)) > 5.0
    is_odd = is_far | (rows.std(axis=0) < 0.1)
    return len(rows) >= _FEW and bool(is_far.any()) and float(is_odd.mean()) > 0.5


def load(run: str | os.PathLike[str]) -> TrainedRun:
    """Load the trained energy of a run folder of ``fastebm train``, for rows in the units of its data.

        run = fastebm.load("runs/measurements")
        run.energy(rows)                        # (n,) the higher, the less likely
        run.percentile(run.energy(rows))        # among the training rows
        run.sample(1000)                        # new rows

    Args:
        run: the folder, or a checkpoint in it, checkpoints/step-N.

    Raises:
        ValueError: this is no run, it is damaged, or it has not ended and its data are gone.
    """
    model, config = load_model(run)
    out, path = located(run)
    kept = out / ENERGIES
    # The saved energies are of the end of the run: not of a run that is still training, nor of an earlier checkpoint.
    if config.model == "pair":
        energies = np.empty(0, np.float32)
    elif kept.exists() and (out / SUMMARY).exists() and located(out)[1].resolve() == path.resolve():
        try:
            energies = np.load(kept, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{kept} is damaged ({error}): delete it, and it is computed from the data") from None
    else:
        energies = train_energies(row_energy(model, config), reload(config.data, config.seed))
    return TrainedRun(model, config, energies)
