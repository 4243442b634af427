"""Measures of classifiers on cases with a known answer: calibration, accuracy under attack, and the judge."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastebm import evaluate
from fastebm.evaluate.features import Judge

N = 20_000


@pytest.fixture(scope="module")
def calibrated():
    """Two classes, with labels drawn from the probabilities themselves."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(N, generator=generator, dtype=torch.float64)
    labels = (torch.rand(N, generator=generator, dtype=torch.float64) < p).long()
    return torch.stack([1 - p, p], 1), labels


def test_a_calibrated_classifier_has_no_error(calibrated):
    """Of the 15 bins, the 8 above 1/2 hold rows, at least N / 15 each. An accuracy has a standard error of at most
    0.5 / sqrt(rows), and the mean of its absolute error is 0.8 of that."""
    p, labels = calibrated
    error = 0.5 / math.sqrt(N / 15)
    assert evaluate.calibration_error(p, labels) < 2 * error
    curve = evaluate.reliability_curve(p, labels)
    assert len(curve.confidence) == 8
    assert np.abs(np.subtract(*curve)).max() < 5 * error


def test_a_classifier_that_is_too_sure_has_the_error_of_its_shift(calibrated):
    """Confidence c becomes c + 0.3 (1 - c): all bins are off to one side, by 0.3 (1 - mean c) = 0.3 / 4 on average."""
    p, labels = calibrated
    top, which = p.max(1)
    top = top + 0.3 * (1 - top)
    shifted = torch.where(torch.arange(2) == which[:, None], top[:, None], 1 - top[:, None])
    assert evaluate.calibration_error(shifted, labels) == pytest.approx(0.075, abs=5 * 0.5 / math.sqrt(N))
    curve = evaluate.reliability_curve(shifted, labels)
    assert np.greater(curve.confidence[:-2], curve.accuracy[:-2]).all()


def test_calibration_by_hand():
    """Two bins: confidences 0.6 and 0.7, one of two right; 0.9, right. (|0.65 - 0.5| 2 + |0.9 - 1|) / 3."""
    p = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.1, 0.9]])
    labels = torch.tensor([0, 0, 1])
    assert evaluate.calibration_error(p, labels, n_bins=4) == pytest.approx(0.4 / 3, abs=1e-6)
    curve = evaluate.reliability_curve(p, labels, n_bins=4)
    assert curve.confidence == pytest.approx([0.65, 0.9])
    assert curve.accuracy == [0.5, 1.0]


def test_a_confidence_of_1_is_in_the_last_bin():
    """Ten rows with a confidence of 1, nine of them right, and ten with 0.94: |0.97 - 0.95| of one bin."""
    p = torch.tensor([[1.0, 0.0]] * 10 + [[0.94, 0.06]] * 10)
    labels = torch.tensor([0] * 9 + [1] + [0] * 10)
    above = p.double()
    above[0, 0] += 1e-7  # by rounding
    for rows in (p, above):
        assert evaluate.calibration_error(rows, labels) == pytest.approx(0.02, abs=1e-7)
        curve = evaluate.reliability_curve(rows, labels)
        assert curve.confidence == pytest.approx([0.97], abs=1e-7)
        assert curve.accuracy == [0.95]


@pytest.mark.parametrize(("confidence", "bins"), [((0.5, 0.51), 2), ((0.51, 0.75), 1), ((0.75, 0.76), 2)])
def test_bins_hold_their_upper_edge(confidence, bins):
    p = torch.tensor([[c, 1 - c] for c in confidence], dtype=torch.float64)
    assert len(evaluate.reliability_curve(p, torch.zeros(2).long(), n_bins=4).confidence) == bins


def test_the_error_is_the_mean_distance_of_the_curve():
    generator = torch.Generator().manual_seed(6)
    p = (3 * torch.randn(1000, 5, generator=generator)).softmax(1)
    labels = torch.randint(5, (1000,), generator=generator)
    confidence, predicted = p.double().max(1)
    error = 0.0
    for i in range(10):
        held = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        error += abs(float((confidence - (predicted == labels).double())[held].sum())) / 1000
    assert evaluate.calibration_error(p, labels, n_bins=10) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        (torch.ones(3, 2), torch.zeros(3).long(), "must be >= 0 and sum to 1: take the softmax of logits"),
        (torch.tensor([[1.5, -0.5]]), torch.zeros(1).long(), "must be >= 0 and sum to 1"),
        (torch.full((3, 2), 0.5), torch.zeros(2).long(), r"labels must be integers \(3,\), got \(2,\) torch.int64"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1, 2]), "labels must be 0 to 1, got 0 to 2"),
        (torch.full((3, 2), 0.5), torch.zeros(3).bool(), r"labels must be integers \(3,\), got \(3,\) torch.bool"),
        (torch.full((3,), 0.5), torch.zeros(3).long(), r"must be \(n, n_classes\) with n >= 1, got shape \(3,\)"),
        (torch.full((3, 2), math.nan), torch.zeros(3).long(), "must be >= 0 and sum to 1"),
    ],
)
def test_calibration_refuses(p, labels, message):
    for measure in (evaluate.calibration_error, evaluate.reliability_curve):
        with pytest.raises(ValueError, match=message):
            measure(p, labels)
        with pytest.raises(ValueError, match="n_bins must be >= 1, got 0"):
            measure(p, labels, n_bins=0)


# -- accuracy under attack ----------------------------------------------------------------------------------


def linear(w):
    """Two classes by the sign of w.x."""
    layer = nn.Linear(len(w), 2, bias=False)
    layer.weight.data = torch.stack([torch.zeros(len(w)), torch.tensor(w)])
    return layer


@pytest.mark.parametrize(("norm", "dual"), [("linf", 7.0), ("l2", 5.0)])
def test_the_attack_on_a_linear_classifier_is_the_worst_there_is(norm, dual):
    """w.x can change by epsilon times the dual norm of w, and no more: so rows within that distance are lost."""
    w = [3.0, 4.0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 2, generator=generator)
    score = x @ torch.tensor(w)
    labels = (score > 0).long()
    for epsilon in (0.05, 0.3):
        expected = float((score.abs() > epsilon * dual).double().mean())
        accuracy = evaluate.pgd_accuracy(linear(w), x, labels, epsilon=epsilon, norm=norm)
        assert accuracy == pytest.approx(expected, abs=0.004)  # two rows on the edge, by rounding
    assert evaluate.pgd_accuracy(linear(w), x, labels, epsilon=0.0, norm=norm) == 1.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 3)])
def test_the_attack_stays_within_epsilon_and_the_clamp(norm, shape, seeded, untouched):
    dim = math.prod(shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(dim, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
    x, labels = torch.rand(40, *shape), torch.arange(40) % 3
    with untouched(model, x):
        attacked = evaluate.pgd_attack(model, x, labels, epsilon=0.2, norm=norm, clamp=(0.0, 1.0))
    moved = (attacked - x).flatten(1)
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert (size <= 0.2 + 1e-6).all()
    assert (size > 0.1).any()
    assert ((attacked >= 0) & (attacked <= 1)).all()

    model.eval()
    losses = [nn.functional.cross_entropy(model(v), labels).item() for v in (x, attacked)]
    assert losses[1] > losses[0]
    again, other = (
        evaluate.pgd_attack(model, x, labels, epsilon=0.2, norm=norm, clamp=(0.0, 1.0), seed=s) for s in (0, 1)
    )
    assert torch.equal(attacked, again)
    assert not torch.equal(attacked, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ({"epsilon": -1.0}, "epsilon must be finite and >= 0, got -1.0"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"step_size": math.inf}, "step_size must be finite and > 0, got inf"),
        ({"step_size": 0.0}, "step_size must be finite and > 0, got 0"),
        ({"clamp": (0.0, 0.5)}, r"x must lie within the clamp \(0.0, 0.5\), got values from 0.0 to 1.0"),
    ],
)
def test_the_attack_refuses(options, message):
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match=message):
        evaluate.pgd_accuracy(linear([1.0, 1.0]), x, torch.tensor([0, 1]), **{"epsilon": 0.1, **options})
    with pytest.raises(ValueError, match=r"labels must be integers \(2,\), got \(3,\)"):
        evaluate.pgd_accuracy(linear([1.0, 1.0]), x, torch.tensor([0, 1, 1]), epsilon=0.1)
    with pytest.raises(ValueError, match="labels must be 0 to 1, got -1 to 5"):
        evaluate.pgd_accuracy(linear([1.0, 1.0]), x, torch.tensor([-1, 5]), epsilon=0.1)


# -- the judge ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bars():
    """Images 8 x 8 in four classes: a bright bar in one of four places, in noise."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(400) % 4
    x = 0.3 * torch.rand(400, 8, 8, generator=generator)
    x += (torch.arange(8)[:, None] // 2 == labels[:, None, None]).float().expand(400, 8, 8)
    return x, labels


@pytest.fixture(scope="module")
def judge(bars):
    x, labels = bars
    return evaluate.train_judge(x[:300], labels[:300], epochs=30)


def test_the_judge_knows_the_classes(judge, bars):
    x, labels = bars
    assert judge.accuracy(x[300:], labels[300:]) == 1.0
    assert judge.accuracy(x[300:], (labels[300:] + 1) % 4) == 0.0
    assert judge.accuracy(x[300:].flatten(1), labels[300:]) == 1.0  # flat rows as well
    assert judge.features(x).shape == (400, 64)
    assert torch.allclose(judge.probabilities(x), judge(x).softmax(1))
    assert not any(p.requires_grad for p in judge.parameters())


def test_the_judge_is_a_function_of_its_seed(judge, bars):
    x, labels = bars
    before = torch.get_rng_state()
    again, other = (evaluate.train_judge(x[:300], labels[:300], epochs=30, seed=s) for s in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again(x), judge(x))
    assert not torch.equal(other(x), judge(x))


def test_a_judge_of_rows_that_are_no_images():
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(200) % 2
    x = 100.0 + 10.0 * torch.randn(200, 3, generator=generator) + 200.0 * labels[:, None]  # of any scale
    judge = evaluate.train_judge(x[:100], labels[:100], epochs=10)
    assert judge.accuracy(x[100:], labels[100:]) == 1.0


def test_inception_score_and_distance_see_missing_classes(judge, bars):
    x, labels = bars
    all_four, two = x[:200], x[labels < 2][:200]
    assert evaluate.inception_score(judge.probabilities(all_four)) == pytest.approx(4.0, abs=0.1)
    assert evaluate.inception_score(judge.probabilities(two)) == pytest.approx(2.0, abs=0.1)
    features = [judge.features(v) for v in (x[200:], all_four, two)]
    near, far = (evaluate.frechet_distance(features[0], f) for f in features[1:])
    assert far > 20 * near


def test_inception_score_by_hand():
    assert evaluate.inception_score(torch.eye(5).repeat(2, 1)) == pytest.approx(5.0)
    assert evaluate.inception_score(torch.full((4, 5), 0.2)) == pytest.approx(1.0)
    # p(y) = (0.5, 0.5), and each row has KL = log 2 - H(0.9, 0.1)
    expected = 2 * 0.9**0.9 * 0.1**0.1
    assert evaluate.inception_score(torch.tensor([[0.9, 0.1], [0.1, 0.9]])) == pytest.approx(expected)
    with pytest.raises(ValueError, match="rows that sum to 1"):
        evaluate.inception_score(torch.ones(3, 5))


def test_frechet_distance_by_formula():
    """The sets have exactly these means and covariances, which commute in the first case and do not in the second."""
    rng = np.random.default_rng(5)

    def exactly(mean, covariance, n=50):
        x = rng.normal(size=(n, len(mean)))
        x -= x.mean(0)
        whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
        return whitened @ np.linalg.cholesky(covariance).T + mean

    a, b = exactly([0, 0], np.diag([1.0, 4.0])), exactly([3, -4], np.diag([9.0, 1.0]))
    assert evaluate.frechet_distance(a, b) == pytest.approx(25 + (3 - 1) ** 2 + (1 - 2) ** 2, rel=1e-9)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)

    from scipy.linalg import sqrtm

    s, t = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    expected = np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert evaluate.frechet_distance(exactly([1, 1], s), exactly([1, 1], t, 70)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_frechet_distance_does_not_depend_on_the_origin(offset):
    """Rows that far from 0 are rounded by 1e-9, a part in 1e9 of their deviation, and the distance by as much."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 8)), rng.normal(size=(500, 8))
    expected = evaluate.frechet_distance(a, b)
    assert evaluate.frechet_distance(a + offset, b + offset) == pytest.approx(expected, abs=1e-7)
    for few in (a, a[:5]):  # fewer rows than dims too
        assert 0.0 <= evaluate.frechet_distance(few + offset, few + offset) < 1e-12


def test_the_judge_refuses(seeded):
    x, labels = torch.rand(10, 4), torch.arange(10) % 2
    with pytest.raises(ValueError, match=r"labels must be integers \(10,\), one per row, got \(9,\)"):
        evaluate.train_judge(x, labels[:9])
    with pytest.raises(ValueError, match="at least two classes"):
        evaluate.train_judge(x, torch.zeros(10).long())
    with pytest.raises(ValueError, match=r"states of 4 numbers do not have the shape \(3, 3\)"):
        evaluate.train_judge(x, labels, (3, 3))
    with pytest.raises(ValueError, match="finite states"):
        evaluate.train_judge(x.log() / 0, labels)
    judge = Judge((2, 2), 2)
    with pytest.raises(ValueError, match=r"takes states \(n, \*\(2, 2\)\) or flat, n >= 1, got \(10, 5\)"):
        judge.features(torch.rand(10, 5))
    with pytest.raises(ValueError, match=r"labels must be \(10,\), one per sample, got \(9,\)"):
        judge.accuracy(x, labels[:9])
    with pytest.raises(ValueError, match="frechet_distance compares states of one dim, got 2 and 3"):
        evaluate.frechet_distance(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="at least 2 rows in the first set, got 1"):
        evaluate.frechet_distance(np.zeros((1, 2)), np.zeros((5, 2)))
