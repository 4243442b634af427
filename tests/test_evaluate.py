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


def test_an_infinite_energy_is_above_all_others():
    assert evaluate.auroc([0.0, 1.0], [math.inf, 0.5]) == 0.75
    assert evaluate.auroc([-math.inf, math.inf], [math.inf]) == 0.75  # one tie
    assert evaluate.fpr_at_tpr([0.0, 1.0], [math.inf, 0.5]) == 0.5


@pytest.mark.parametrize("measure", [evaluate.auroc, evaluate.fpr_at_tpr])
def test_detection_refuses(measure):
    with pytest.raises(ValueError, match="got 3 inliers and 0 outliers"):
        measure([1.0, 2.0, 3.0], [])
    with pytest.raises(ValueError, match="0 of inliers and 2 of outliers are NaN"):
        measure([1.0], [math.nan, 0.0, math.nan])
    with pytest.raises(ValueError, match="1 of inliers and 0 of outliers are NaN"):
        measure([math.nan], [0.0])


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
    with pytest.raises(ValueError, match="at least 5 rows in the first set, got 4"):
        evaluate.two_sample_accuracy(np.zeros((4, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="n_folds must be >= 2, got 1"):
        evaluate.two_sample_accuracy(np.zeros((4, 2)), np.zeros((9, 2)), n_folds=1)


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


def test_nearest_neighbours_refuse():
    three, ok, labels = np.zeros((3, 2)), np.zeros((5, 2)), np.arange(5)
    for measure in (evaluate.class_shares, lambda *a, **k: evaluate.knn_accuracy(*a, labels, **k)):
        with pytest.raises(ValueError, match="needs at least 5 rows in the first set, got 3"):
            measure(three, labels[:3], ok)
        with pytest.raises(ValueError, match="got 5 rows of the second set that are not"):
            measure(ok, labels, ok * np.nan)
        with pytest.raises(ValueError, match="k must be >= 1, got 0"):
            measure(ok, labels, ok, k=0)
    with pytest.raises(ValueError, match="labels must be >= 0, got -1"):
        evaluate.class_shares(ok, labels - 1, ok)


def test_fpr_at_tpr_by_hand():
    inliers = np.arange(20.0)  # 19 of 20 pass up to an energy of 18
    assert evaluate.fpr_at_tpr(inliers, [17.0, 18.0, 18.5, 30.0]) == 0.5
    assert evaluate.fpr_at_tpr(inliers, [17.0, 18.0, 18.5, 19.0], tpr=1.0) == 1.0
    assert evaluate.fpr_at_tpr(np.arange(100.0), [93.5, 94.0, 94.5], tpr=0.95) == pytest.approx(2 / 3)
    assert evaluate.fpr_at_tpr(inliers, inliers + 100) == 0.0


def test_fpr_at_tpr_of_two_gaussians():
    """With N(2, 1) as outliers it is Phi(1.645 - 2) = 0.361; within 5 standard errors, of the quantile too."""
    rng = np.random.default_rng(6)
    n = 20_000
    found = evaluate.fpr_at_tpr(rng.normal(size=n), rng.normal(2.0, size=n))
    expected = 0.5 * math.erfc((2.0 - 1.6449) / math.sqrt(2))
    quantile_error = math.sqrt(0.95 * 0.05 / n) / 0.1031  # over the density of N(0, 1) there
    error = math.hypot(math.sqrt(expected * (1 - expected) / n), 0.375 * quantile_error)
    assert abs(found - expected) < 5 * error


def test_fpr_at_tpr_refuses():
    with pytest.raises(ValueError, match=r"tpr must be in \(0, 1\], got 95"):
        evaluate.fpr_at_tpr([1.0], [1.0], tpr=95)


def test_mmd_of_gaussians_has_its_closed_form():
    """For N(0, I) and N(m, I) in d dims: 2 (h^2 / (h^2 + 2))^(d/2) (1 - exp(-|m|^2 / (2 (h^2 + 2)))), for each h."""
    rng = np.random.default_rng(7)
    n, d, h = 2000, 3, 1.5
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    same = evaluate.mmd_squared(x, y, bandwidths=[h])
    assert abs(same) < 5 * 2 / n  # degenerate: of order 1 / n, as k <= 1
    for m in ([1.0, 0.0, 0.0], [1.0, 2.0, 2.0]):
        expected = [
            2 * (s**2 / (s**2 + 2)) ** (d / 2) * -math.expm1(-np.dot(m, m) / (2 * (s**2 + 2))) for s in (h, 2 * h)
        ]
        found = [evaluate.mmd_squared(x, y + m, bandwidths=[s]) for s in (h, 2 * h)]
        assert found == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(n))  # 5 standard errors of a mean of k <= 1
        assert evaluate.mmd_squared(x, y + m, bandwidths=[h, 2 * h]) == pytest.approx(np.mean(found))


def test_mmd_by_its_definition():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(4, 2))

    def k(a, b):
        return math.exp(-((a - b) ** 2).sum() / 2)

    within = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    between = np.mean([k(a, b) for a in x for b in y])
    assert evaluate.mmd_squared(x, y, bandwidths=[1.0]) == pytest.approx(sum(within) - 2 * between, abs=1e-12)


def test_mmd_takes_bandwidths_from_the_data():
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(300, 2)), rng.normal(1.0, size=(200, 2))
    assert evaluate.mmd_squared(1e3 * x, 1e3 * y) == pytest.approx(evaluate.mmd_squared(x, y), rel=1e-6)
    assert evaluate.mmd_squared(x, y) > 0.1


def test_blocks_change_nothing():
    """scikit-learn gives as many rows at once as fit in its working memory: here a few."""
    import sklearn

    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(500, 2)), rng.normal(0.3, size=(400, 2))
    whole = evaluate.mmd_squared(x, y), *evaluate.manifold_shares(x, y)
    with sklearn.config_context(working_memory=0.02):
        assert (evaluate.mmd_squared(x, y), *evaluate.manifold_shares(x, y)) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("measure", [evaluate.mmd_squared, evaluate.manifold_shares, evaluate.two_sample_accuracy])
def test_two_sets_must_fit(measure):
    ok = np.arange(20.0).reshape(10, 2)
    with pytest.raises(ValueError, match="compares states of one dim, got 2 and 3"):
        measure(ok, np.zeros((10, 3)))
    with pytest.raises(ValueError, match="rows in the second set, got 1"):
        measure(ok, ok[:1])
    with pytest.raises(ValueError, match="got 1 rows of the second set that are not"):
        measure(ok, np.where(ok == 3, np.nan, ok))


def test_mmd_refuses_bandwidths():
    ok = np.arange(20.0).reshape(10, 2)
    for bandwidths in ([0.0], [], [1.0, math.nan]):
        with pytest.raises(ValueError, match="bandwidths must be numbers > 0"):
            evaluate.mmd_squared(ok, ok, bandwidths=bandwidths)
    with pytest.raises(ValueError, match="median distance is 0: pass bandwidths="):
        evaluate.mmd_squared(np.zeros((10, 2)), np.zeros((10, 2)))


def test_manifold_shares_by_hand():
    """On a line, with k = 1: data 0, 1, 3, 100 have radii 1, 1, 2, 97; samples 0.5, 0.6, -50 have 0.1, 0.1, 50.5."""
    real, fake = np.array([[0.0], [1], [3], [100]]), np.array([[0.5], [0.6], [-50]])
    shares = evaluate.manifold_shares(real, fake, k=1)
    # Samples: 0.5 is in the balls of 0 and 1, 0.6 too, -50 in none.
    assert shares.precision == pytest.approx(2 / 3)
    assert shares.density == pytest.approx((2 + 2 + 0) / 3)
    # Data: 0 is in the ball [-100.5, 0.5] of -50 alone, the others in none.
    assert shares.recall == 0.25
    # Balls with a sample in them: those of 0 and 1.
    assert shares.coverage == 0.5


def test_manifold_shares_see_lost_and_invented_modes():
    rng = np.random.default_rng(11)
    modes = np.array([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])

    def draws(which, n=900):
        return modes[which][rng.integers(len(which), size=n)] + rng.normal(size=(n, 2))

    real = draws([0, 1])
    same, lost, invented = (evaluate.manifold_shares(real, draws(w)) for w in ([0, 1], [0], [0, 1, 2]))
    # Of the same law nearly all are inside, and a ball is empty if its k nearest rows are all real: 1 in 2^k.
    assert min(same.precision, same.recall) > 0.9
    assert same.coverage == pytest.approx(1 - 2**-3, abs=5 * math.sqrt(0.11 / 900))
    assert same.density == pytest.approx(1.0, abs=0.1)
    assert lost.precision > 0.9
    assert lost.recall == pytest.approx(0.5, abs=0.06)
    assert lost.coverage == pytest.approx(0.5, abs=0.06)
    assert invented.precision == pytest.approx(2 / 3, abs=0.06)
    assert invented.recall > 0.9


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_set_lies_in_its_own_manifold(copies, offset):
    """With five copies of each row all radii are 0, and only an exact distance of 0 is within them."""
    x = np.random.default_rng(12).normal(size=(50, 10)).repeat(copies, axis=0) + offset
    shares = evaluate.manifold_shares(x, x.copy())
    assert (shares.precision, shares.recall, shares.coverage) == (1.0, 1.0, 1.0)
    # A row lies in its own ball, and in those of its copies or, on average, of k others.
    assert shares.density == pytest.approx(copies / 3 if copies > 3 else 4 / 3)


def test_manifold_shares_refuse():
    ok = np.arange(20.0).reshape(10, 2)
    for k, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k must be"):
            evaluate.manifold_shares(ok, ok, k=k)
    with pytest.raises(ValueError, match="at least 4 rows in the second set, got 3"):
        evaluate.manifold_shares(ok, ok[:3])
