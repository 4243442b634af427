"""Held-out measures of an energy and of its samples. They take arrays, and use only the seeds they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["auroc", "baseline_aurocs", "class_shares", "knn_accuracy", "two_sample_accuracy"]


def auroc(inlier_energies: ArrayLike, outlier_energies: ArrayLike) -> float:
    """Area under the ROC curve of "high energy means outlier": P(E(outlier) > E(inlier)) + P(equal) / 2.

    1 separates perfectly, 0.5 is chance; below 0.5 the outliers are taken for likelier than the inliers.

    Args:
        inlier_energies, outlier_energies: one energy per row, in any shape.
    """
    from sklearn.metrics import roc_auc_score

    inliers, outliers = (np.asarray(e, np.float64).ravel() for e in (inlier_energies, outlier_energies))
    if len(inliers) == 0 or len(outliers) == 0:
        raise ValueError(f"auroc needs energies on both sides, got {len(inliers)} inliers and {len(outliers)} outliers")
    is_outlier = np.repeat([0, 1], [len(inliers), len(outliers)])
    return float(roc_auc_score(is_outlier, np.concatenate([inliers, outliers])))


def baseline_aurocs(train: ArrayLike, inliers: ArrayLike, outliers: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """AUROCs of two simple detectors fitted to the same training rows, to compare an energy with.

    They are scikit-learn's isolation forest (Liu, Ting & Zhou 2008) and Mahalanobis distance, with default settings.

    Args:
        train: (n, dim). inliers, outliers: (n_inliers, dim) and (n_outliers, dim).
    """
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.ensemble import IsolationForest

    train, inliers, outliers = _rows(train), _rows(inliers), _rows(outliers)
    forest = IsolationForest(random_state=seed % 2**32).fit(train)
    gaussian = EmpiricalCovariance().fit(train)
    return {
        "isolation_forest": auroc(-forest.score_samples(inliers), -forest.score_samples(outliers)),
        "mahalanobis": auroc(gaussian.mahalanobis(inliers), gaussian.mahalanobis(outliers)),
    }


def two_sample_accuracy(
    real: ArrayLike,
    fake: ArrayLike,
    *,
    n_folds: int = 5,
    n_repeats: int = 3,
    n_trees: int = 100,
    seed: int = 0,
    on_fold: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Accuracy of a random forest at telling samples from real data (two-sample test of Lopez-Paz & Oquab 2017).

    0.5 means that the two are indistinguishable, 1 that they are always told apart. It is the mean over stratified
    cross-validation on equal numbers of both; each repeat draws a new subset of the larger set, new folds and forests.
    Quantise both in the same way first, or the forest detects the dequantisation.

    Args:
        real, fake: (n_real, dim) and (n_fake, dim), at least n_folds rows each.
        on_fold: called before each forest with the number of those done and their total.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold

    real, fake = _rows(real), _rows(fake)
    n = min(len(real), len(fake))
    if n < n_folds:
        raise ValueError(f"two_sample_accuracy needs at least {n_folds} rows a side, got {len(real)} and {len(fake)}")
    rng = np.random.default_rng(seed)
    is_fake = np.repeat([0, 1], n)
    accuracies: list[float] = []
    for _ in range(n_repeats):
        rows = np.concatenate([x[rng.permutation(len(x))[:n]] for x in (real, fake)])
        fold_seed, forest_seed = (int(s) for s in rng.integers(2**31, size=2))
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=fold_seed)
        for fitted, left_out in folds.split(rows, is_fake):
            on_fold(len(accuracies), n_repeats * n_folds)
            forest = RandomForestClassifier(n_trees, random_state=forest_seed).fit(rows[fitted], is_fake[fitted])
            accuracies.append(forest.score(rows[left_out], is_fake[left_out]))
    return float(np.mean(accuracies))


def class_shares(
    train: ArrayLike, labels: Sequence[int] | NDArray[Any], samples: ArrayLike, *, k: int = 5
) -> list[float]:
    """The share of samples that a k-nearest-neighbour classifier assigns to each class 0 .. labels.max().

    Args:
        train: (n, dim), with its (n,) labels. samples: (n_samples, dim).
    """
    from sklearn.neighbors import KNeighborsClassifier

    labels = np.asarray(labels)
    predicted = KNeighborsClassifier(k).fit(_rows(train), labels).predict(_rows(samples))
    counts = np.bincount(predicted, minlength=int(labels.max()) + 1)
    return [float(c) for c in counts / len(predicted)]


def knn_accuracy(train: ArrayLike, labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, *, k: int = 5) -> float:
    """Accuracy of a k-nearest-neighbour classifier on held-out rows: what a set of features is worth.

    Args:
        train, test: (n, dim) and (n_test, dim), with labels (n,) and (n_test,).
    """
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(k).fit(_rows(train), np.asarray(labels))
    return float(classifier.score(_rows(test), np.asarray(test_labels)))


def _rows(x: ArrayLike) -> NDArray[Any]:
    x = np.asarray(x)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"a set of states is (n, dim) with n >= 1, got shape {x.shape}")
    return x.reshape(len(x), -1)
