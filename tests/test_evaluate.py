"""Measures on data whose AUROC, accuracy and classes are known."""

import math

import numpy as np
import pytest

from fastebm import evaluate


def test_auroc_of_known_orders():
    assert evaluate.auroc([0.0, 1.0], [2.0, 3.0]) == 1.0
    assert evaluate.auroc([2.0, 3.0], [0.0, 1.0]) == 0.0
    assert evaluate.auroc([0.0, 2.0], [1.0, 3.0]) == 0.75  # three of the four pairs
    assert evaluate.auroc([1.0], [1.0, 1.0, 1.0]) == 0.5  # ties are half


def test_auroc_of_two_gaussians():
    """P(N(d, 1) > N(0, 1)) = Phi(d / sqrt(2)); within 5 standard errors of the estimate."""
    rng = np.random.default_rng(0)
    n, d = 20_000, 1.0
    expected = 0.5 * (1 + math.erf(d / 2))
    error = math.sqrt(expected * (1 - expected) / n)  # an upper bound
    assert abs(evaluate.auroc(rng.normal(size=n), rng.normal(d, size=n)) - expected) < 5 * error


def test_auroc_needs_both_sides():
    with pytest.raises(ValueError, match="got 3 inliers and 0 outliers"):
        evaluate.auroc([1.0, 2.0, 3.0], [])


def test_two_sample_accuracy_of_equal_and_of_separate_sets():
    rng = np.random.default_rng(1)
    real, same, far = rng.normal(size=(200, 4)), rng.normal(size=(300, 4)), rng.normal(size=(250, 4)) + [20, 0, 0, 0]
    assert evaluate.two_sample_accuracy(real, far, n_trees=20) == 1.0
    # 400 rows a repeat: a standard error of 0.025 at most, and rows in common between repeats.
    assert abs(evaluate.two_sample_accuracy(real, same, n_trees=20) - 0.5) < 0.1


def test_two_sample_accuracy_of_a_half_overlap():
    """Uniform on [0, 1] and on [0.5, 1.5]: the best classifier is right 3 times in 4."""
    rng = np.random.default_rng(2)
    real, fake = rng.uniform(size=(500, 1)), rng.uniform(0.5, 1.5, size=(500, 1))
    accuracy = evaluate.two_sample_accuracy(real, fake, n_trees=20, n_repeats=1)
    # The forest guesses in the overlap, where nothing can be learnt, so it is right 3 times in 4 as well.
    assert abs(accuracy - 0.75) < 0.07


def test_two_sample_accuracy_uses_equal_numbers():
    """Nine samples for every datum: calling everything a sample would be right in 90%, were they not cut down."""
    rng = np.random.default_rng(3)
    accuracy = evaluate.two_sample_accuracy(rng.normal(size=(60, 2)), rng.normal(size=(540, 2)), n_trees=20)
    assert accuracy < 0.7


def test_two_sample_accuracy_is_a_function_of_its_seed():
    rng = np.random.default_rng(4)
    real, fake = rng.normal(size=(50, 3)), rng.normal(0.5, size=(80, 3))
    first, again, other = (evaluate.two_sample_accuracy(real, fake, n_trees=10, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_two_sample_accuracy_refuses_too_few_rows():
    with pytest.raises(ValueError, match="at least 5 rows a side, got 4 and 9"):
        evaluate.two_sample_accuracy(np.zeros((4, 2)), np.zeros((9, 2)))


def test_class_shares_count_the_classes_and_the_missing_ones():
    rng = np.random.default_rng(5)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]])
    labels = np.repeat(np.arange(4), 25)
    train = centres[labels] + rng.normal(size=(100, 2))
    samples = centres[[0] * 6 + [1] * 3 + [3]] + rng.normal(size=(10, 2))
    assert evaluate.class_shares(train, labels, samples) == [0.6, 0.3, 0.0, 0.1]


def test_images_need_not_be_flat():
    x = np.stack([np.zeros((3, 3)), np.ones((3, 3))]).repeat(10, axis=0)
    labels = np.repeat([0, 1], 10)
    assert evaluate.class_shares(x, labels, x[:15]) == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(ValueError, match=r"got shape \(5,\)"):
        evaluate.class_shares(np.zeros(5), np.zeros(5, int), x)
