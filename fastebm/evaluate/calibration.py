"""Whether a classifier is right as often as it is sure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ReliabilityCurve", "calibration_error", "reliability_curve"]


class ReliabilityCurve(NamedTuple):
    """Per bin of the confidence that holds rows: their mean confidence, and the share that is classified right."""

    confidence: list[float]
    accuracy: list[float]


def calibration_error(probabilities: Tensor, labels: Tensor, *, n_bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): the mean over rows of |accuracy - confidence| of their bin.

    Args:
        probabilities: (n, n_classes), rows that sum to 1. labels: (n,) int64.
        n_bins: of equal width over the confidence, the largest probability of a row.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    p = _checked(probabilities, labels)
    return float(multiclass_calibration_error(p, labels, num_classes=p.shape[1], n_bins=n_bins, norm="l1"))


def reliability_curve(probabilities: Tensor, labels: Tensor, *, n_bins: int = 15) -> ReliabilityCurve:
    """Accuracy against confidence in the bins of ``calibration_error``: equal, if the classifier is calibrated."""
    from sklearn.calibration import calibration_curve

    confidence, predicted = _checked(probabilities, labels).max(dim=1)
    # Rounding must not push a sum of probabilities beyond 1, which scikit-learn refuses.
    right, sure = (predicted == labels).cpu().numpy(), confidence.clamp(0.0, 1.0).cpu().numpy()
    accuracy, mean = calibration_curve(right, sure, n_bins=n_bins)
    return ReliabilityCurve(mean.tolist(), accuracy.tolist())


def _checked(probabilities: Tensor, labels: Tensor) -> Tensor:
    p = probabilities.detach().double()
    if p.ndim != 2 or len(p) == 0 or p.shape[1] < 2:
        raise ValueError(f"probabilities must be (n, n_classes) with n >= 1, got shape {tuple(probabilities.shape)}")
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1.0).abs() < 1e-3)).all()):
        raise ValueError("the rows of probabilities must be >= 0 and sum to 1: take the softmax of logits")
    if labels.shape != (len(p),) or labels.is_floating_point():
        raise ValueError(f"labels must be integers ({len(p)},), got {tuple(labels.shape)} {labels.dtype}")
    if not bool(torch.isin(labels, torch.arange(p.shape[1], device=labels.device)).all()):
        raise ValueError(f"labels must be 0 to {p.shape[1] - 1}, got {int(labels.min())} to {int(labels.max())}")
    return p
