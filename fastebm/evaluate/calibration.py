"""Whether a classifier is right as often as it is sure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..scalars import checked_integer
from .rows import check_labels

__all__ = ["ReliabilityCurve", "calibration_error", "reliability_curve"]


class ReliabilityCurve(NamedTuple):
    """Per bin of the confidence that holds rows: their mean confidence, and the share that is classified right."""

    confidence: list[float]
    accuracy: list[float]


def calibration_error(probabilities: Tensor, labels: Tensor, *, n_bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): the mean over rows of |accuracy - confidence| of their bin.

    Args:
        probabilities: (n, n_classes), rows that sum to 1. labels: (n,) int64.
        n_bins: equal parts ((i - 1) / n_bins, i / n_bins] of the confidence, the largest probability of a row.
    """
    rows, confidence, accuracy = _bins(probabilities, labels, n_bins)
    return float((rows * (accuracy - confidence).abs()).sum() / rows.sum())


def reliability_curve(probabilities: Tensor, labels: Tensor, *, n_bins: int = 15) -> ReliabilityCurve:
    """Accuracy against confidence in the bins of ``calibration_error``: equal, if the classifier is calibrated."""
    _, confidence, accuracy = _bins(probabilities, labels, n_bins)
    return ReliabilityCurve(confidence.tolist(), accuracy.tolist())


def _bins(probabilities: Tensor, labels: Tensor, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each bin that holds rows: their number, mean confidence, and accuracy."""
    n_bins = checked_integer("n_bins", n_bins, least=1)
    p = probabilities.detach().double().cpu()
    if p.ndim != 2 or len(p) == 0 or p.shape[1] < 2:
        raise ValueError(f"probabilities must be (n, n_classes) with n >= 1, got shape {tuple(probabilities.shape)}")
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1.0).abs() < 1e-3)).all()):
        raise ValueError("the rows of probabilities must be >= 0 and sum to 1: take the softmax of logits")
    check_labels(labels, *p.shape)
    confidence, predicted = p.max(dim=1)
    inner_edges = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
    where = torch.bucketize(confidence, inner_edges)
    rows, sure, right = (
        torch.bincount(where, weights, n_bins) for weights in (None, confidence, (predicted == labels.cpu()).double())
    )
    held = rows > 0
    return rows[held], sure[held] / rows[held], right[held] / rows[held]
