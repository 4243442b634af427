"""Measures of an energy and of its samples. They take arrays, tensors and modules, and only the seeds they are given.

two_sample.py    samples against data: random forest, MMD, precision and recall, shares of classes
stein.py         samples against an energy, by its gradient
features.py      samples against data, by the features of a classifier that is trained on the spot
likelihood.py    held-out rows under an energy, and under a kernel density estimate; bits per dim
detection.py     outliers by energy
calibration.py   classifiers: confidence against accuracy
robustness.py    classifiers: accuracy under attack
rows.py          sets of states as arrays
"""

from .calibration import ReliabilityCurve, calibration_error, reliability_curve
from .detection import auroc, baseline_aurocs, fpr_at_tpr
from .features import Judge, frechet_distance, inception_score, train_judge
from .likelihood import (
    HeldOut,
    bits_per_dim,
    held_out_likelihood,
    kernel_density,
    log_z_by_quadrature,
    uniform_in_cells,
)
from .robustness import pgd_accuracy, pgd_attack
from .stein import SteinDiscrepancy, kernel_stein_discrepancy
from .two_sample import (
    ManifoldShares,
    class_shares,
    knn_accuracy,
    manifold_shares,
    median_bandwidths,
    mmd_squared,
    two_sample_accuracy,
)

__all__ = [
    "HeldOut",
    "Judge",
    "ManifoldShares",
    "ReliabilityCurve",
    "SteinDiscrepancy",
    "auroc",
    "baseline_aurocs",
    "bits_per_dim",
    "calibration_error",
    "class_shares",
    "fpr_at_tpr",
    "frechet_distance",
    "held_out_likelihood",
    "inception_score",
    "kernel_density",
    "kernel_stein_discrepancy",
    "knn_accuracy",
    "log_z_by_quadrature",
    "manifold_shares",
    "median_bandwidths",
    "mmd_squared",
    "pgd_accuracy",
    "pgd_attack",
    "reliability_curve",
    "train_judge",
    "two_sample_accuracy",
    "uniform_in_cells",
]
