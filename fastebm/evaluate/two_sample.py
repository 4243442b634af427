"""How far samples are from real data, given draws of both and no density.

two_sample_accuracy     a random forest tells them apart
mmd_squared             distance of kernel means
manifold_shares         precision, recall, density and coverage, by nearest neighbours
class_shares            the share of samples in each class of the data
knn_accuracy            features by the classes of nearest neighbours
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..scalars import checked_integer
from .rows import checked_pair

__all__ = [
    "ManifoldShares",
    "class_shares",
    "knn_accuracy",
    "manifold_shares",
    "median_bandwidths",
    "mmd_squared",
    "two_sample_accuracy",
]

# Bandwidths of mmd_squared, as multiples of the median distance, and the most rows whose distances it is taken of.
_MULTIPLES, _MEDIAN_ROWS = (0.25, 0.5, 1.0, 2.0), 1000


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

    n_folds = checked_integer("n_folds", n_folds, least=2)
    real, fake = checked_pair("two_sample_accuracy", real, fake, least=n_folds)
    n = min(len(real), len(fake))
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


def mmd_squared(real: ArrayLike, fake: ArrayLike, *, bandwidths: Sequence[float] | None = None) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, lemma 6):

        MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),   x, x' real, y, y' fake

    with k the mean of Gaussian kernels exp(-|x - y|^2 / (2 h^2)) over the bandwidths h. Between sets of the same law
    it is 0 in expectation, and so may be negative. Memory is bounded by scikit-learn's ``working_memory``.

    Args:
        real, fake: (n_real, dim) and (n_fake, dim), at least 2 rows each.
        bandwidths: h > 0. None: ``median_bandwidths`` of the two. To compare several sets of samples, pass the same.
    """
    real, fake = checked_pair("mmd_squared", real, fake, least=2)
    h = np.asarray(median_bandwidths(real, fake) if bandwidths is None else bandwidths, np.float64)
    if h.ndim != 1 or len(h) == 0 or not (np.isfinite(h) & (h > 0)).all():
        raise ValueError(f"bandwidths must be numbers > 0, got {bandwidths}")

    def kernels(squared: NDArray[Any], _: int) -> float:
        return float(np.mean([np.exp(-0.5 * squared / s**2).sum() for s in h]))

    def kernel_sum(x: NDArray[Any], y: NDArray[Any]) -> float:
        return float(sum(_per_block(x, y, kernels)))

    n, m = len(real), len(fake)
    # The kernel of a row with itself is 1.
    within = [(kernel_sum(x, x) - len(x)) / (len(x) * (len(x) - 1)) for x in (real, fake)]
    return float(sum(within) - 2.0 * kernel_sum(real, fake) / (n * m))


def median_bandwidths(real: ArrayLike, fake: ArrayLike) -> list[float]:
    """1/4, 1/2, 1 and 2 times the median distance between rows of both sets together, of at most 1,000 of them.

    The median alone is too wide for data with finer details. Arguments as for ``mmd_squared``.
    """
    from sklearn.metrics import pairwise_distances

    rows = np.concatenate(checked_pair("median_bandwidths", real, fake, least=1))
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MEDIAN_ROWS)).round().astype(int)]
    median = float(np.median(pairwise_distances(rows)[np.triu_indices(len(rows), 1)]))
    if median == 0.0:
        raise ValueError("more than half of the rows are equal, so their median distance is 0: pass bandwidths=")
    return [m * median for m in _MULTIPLES]


class ManifoldShares(NamedTuple):
    """See ``manifold_shares``."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_shares(real: ArrayLike, fake: ArrayLike, *, k: int = 3) -> ManifoldShares:
    """Where samples and data lie in each other's manifold: the union of balls around its rows, each of them reaching
    up to the k-th nearest other row of its own set.

    - precision: the share of samples in the manifold of the data. recall: the share of the data in the manifold of the
      samples (Kynkäänniemi et al. 2019).
    - density: the number of balls of the data around a sample, on average, over k; it can exceed 1. coverage: the
      share of the balls of the data with a sample in them (Naeem et al. 2020).

    Args:
        real, fake: (n_real, dim) and (n_fake, dim), more than k rows each. Recall grows with the number of samples:
            take as many of both. For images, features (``train_judge``) are more telling than pixels.
    """
    k = checked_integer("k", k, least=1)
    real, fake = checked_pair("manifold_shares", real, fake, least=k + 1)

    def radii(squared: NDArray[Any], _: int) -> NDArray[Any]:
        """The k-th smallest of each row, without the row's 0 to itself."""
        return np.partition(squared, k, axis=1)[:, k]

    of_real, of_fake = (np.concatenate(_per_block(x, x, radii)) for x in (real, fake))

    def counts(squared: NDArray[Any], start: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Per row of the data in this block: samples in its ball, balls of samples around it; per sample: balls."""
        in_ball = squared <= of_real[start : start + len(squared), None]
        return in_ball.sum(1), (squared <= of_fake).sum(1), in_ball.sum(0)

    parts = list(zip(*_per_block(real, fake, counts), strict=True))
    samples_in_ball, around_real = np.concatenate(parts[0]), np.concatenate(parts[1])
    around_fake = np.sum(parts[2], axis=0)
    return ManifoldShares(
        precision=float((around_fake > 0).mean()),
        recall=float((around_real > 0).mean()),
        density=float(around_fake.mean() / k),
        coverage=float((samples_in_ball > 0).mean()),
    )


def knn_accuracy(train: ArrayLike, labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, *, k: int = 5) -> float:
    """Accuracy of a k-nearest-neighbour classifier on held-out rows: what a set of features is worth.

    Args:
        train, test: (n, dim) and (n_test, dim), with labels (n,) and (n_test,). n >= k.
    """
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(test_labels, _by_neighbours("knn_accuracy", train, labels, test, k)))


def class_shares(
    train: ArrayLike, labels: Sequence[int] | NDArray[Any], samples: ArrayLike, *, k: int = 5
) -> list[float]:
    """The share of samples that a k-nearest-neighbour classifier assigns to each class 0 .. labels.max().

    Args:
        train: (n, dim), with its (n,) labels, n >= k. samples: (n_samples, dim).
    """
    predicted, labels = _by_neighbours("class_shares", train, labels, samples, k), np.asarray(labels)
    if labels.min() < 0:
        raise ValueError(f"labels must be >= 0, got {labels.min()}")
    counts = np.bincount(predicted, minlength=int(labels.max()) + 1)
    return [float(c) for c in counts / len(predicted)]


def _by_neighbours(measure: str, train: ArrayLike, labels: ArrayLike, x: ArrayLike, k: int) -> NDArray[Any]:
    """The classes of rows x by k nearest neighbours in train."""
    from sklearn.neighbors import KNeighborsClassifier

    k = checked_integer("k", k, least=1)
    train, x = checked_pair(measure, train, x, least=k, least_of_second=1)
    predicted: NDArray[Any] = KNeighborsClassifier(k).fit(train, np.asarray(labels)).predict(x)
    return predicted


def _per_block(x: NDArray[Any], y: NDArray[Any], reduce: Callable[[NDArray[Any], int], Any]) -> list[Any]:
    """``reduce(squared distances, first row)`` of each block of rows of x: those to all rows of y.

    They are sums of squared differences, so a distance is the same number wherever it is computed, and that of equal
    rows is 0. ("euclidean", by products of matrices, is neither.)
    """
    from sklearn.metrics import pairwise_distances_chunked

    start, results = 0, []
    for block in pairwise_distances_chunked(x, y, metric="sqeuclidean"):
        results.append(reduce(block, start))
        start += len(block)
    return results
