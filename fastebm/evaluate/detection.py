"""How well an energy tells outliers from inliers, with "high energy means outlier"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .rows import as_rows

__all__ = ["auroc", "baseline_aurocs", "fpr_at_tpr"]


def auroc(inlier_energies: ArrayLike, outlier_energies: ArrayLike) -> float:
    """Area under the ROC curve of "high energy means outlier": P(E(outlier) > E(inlier)) + P(equal) / 2.

    1 separates perfectly, 0.5 is chance; below 0.5 the outliers are taken for likelier than the inliers.

    Args:
        inlier_energies, outlier_energies: one energy per row, in any shape; infinite ones too.
    """
    from sklearn.metrics import roc_auc_score

    inliers, outliers = _both_sides("auroc", inlier_energies, outlier_energies)
    is_outlier = np.repeat([0, 1], [len(inliers), len(outliers)])
    # scikit-learn refuses an infinite energy, which has a rank like any other.
    _, ranks = np.unique(np.concatenate([inliers, outliers]), return_inverse=True)
    return float(roc_auc_score(is_outlier, ranks))


def fpr_at_tpr(inlier_energies: ArrayLike, outlier_energies: ArrayLike, tpr: float = 0.95) -> float:
    """The share of outliers that pass as inliers when the share ``tpr`` of the inliers does ("FPR at 95 % TPR").

    Rows pass up to the lowest energy of an inlier that lets at least this share of the inliers pass, itself included.
    0 is best; a detector by chance has tpr. Source: Hendrycks & Gimpel 2017; Liang, Li & Srikant 2018.

    Args:
        inlier_energies, outlier_energies: one energy per row, in any shape. tpr: in (0, 1].
    """
    if not 0.0 < tpr <= 1.0:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    inliers, outliers = _both_sides("fpr_at_tpr", inlier_energies, outlier_energies)
    # Less a part in 1e12: 0.95 * 100 must not need 96 rows because of rounding.
    n_passing = max(1, math.ceil(tpr * len(inliers) * (1.0 - 1e-12)))
    return float((outliers <= np.sort(inliers)[n_passing - 1]).mean())


def baseline_aurocs(train: ArrayLike, inliers: ArrayLike, outliers: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """AUROCs of two simple detectors fitted to the same training rows, to compare an energy with.

    They are scikit-learn's isolation forest (Liu, Ting & Zhou 2008) and Mahalanobis distance, with default settings.

    Args:
        train: (n, dim). inliers, outliers: (n_inliers, dim) and (n_outliers, dim).
    """
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.ensemble import IsolationForest

    train, inliers, outliers = as_rows(train), as_rows(inliers), as_rows(outliers)
    forest = IsolationForest(random_state=seed % 2**32).fit(train)
    gaussian = EmpiricalCovariance().fit(train)
    return {
        "isolation_forest": auroc(-forest.score_samples(inliers), -forest.score_samples(outliers)),
        "mahalanobis": auroc(gaussian.mahalanobis(inliers), gaussian.mahalanobis(outliers)),
    }


def _both_sides(measure: str, inliers: ArrayLike, outliers: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    inliers, outliers = (np.asarray(e, np.float64).ravel() for e in (inliers, outliers))
    if len(inliers) == 0 or len(outliers) == 0:
        raise ValueError(
            f"{measure} needs energies on both sides, got {len(inliers)} inliers and {len(outliers)} outliers"
        )
    bad = [int(np.isnan(e).sum()) for e in (inliers, outliers)]
    if any(bad):
        raise ValueError(f"{measure} compares energies, and {bad[0]} of inliers and {bad[1]} of outliers are NaN")
    return inliers, outliers
