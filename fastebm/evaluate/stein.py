"""Kernel Stein discrepancy: how far samples are from exp(-E) / Z, by the gradient of E alone. Z is not needed.

With the score s = -dE/dx and a kernel k,

    KSD^2 = E u(x, x'),   u(x, y) = s(x).s(y) k + s(x).dk/dy + s(y).dk/dx + sum_i d^2k / dx_i dy_i

over independent samples x, x' (Liu, Lee & Jordan 2016; Chwialkowski, Strathmann & Gretton 2016). The kernel is the
inverse multiquadric k = (c^2 + |x - y|^2)^b with -1 < b < 0, whose KSD also detects samples that do not converge
(Gorham & Mackey 2017).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..energies import EnergyLike, first_tensor
from ..energies.eval_mode import evaluating
from ..energies.functions import as_module
from ..scalars import checked_number
from ..targets.autograd import Energy

__all__ = ["SteinDiscrepancy", "kernel_stein_discrepancy"]

# Pairs of states per block: about this many numbers are in memory at once, 8 bytes each, five times.
_PAIRS = 1 << 20


class SteinDiscrepancy(NamedTuple):
    """unbiased: the U-statistic of KSD^2, the mean over pairs of two rows; 0 in expectation for samples of exp(-E), so
    it may be negative. root: KSD by the V-statistic, with each row's pair with itself; never negative, and of order
    1 / sqrt(n) for such samples."""

    unbiased: float
    root: float


def kernel_stein_discrepancy(
    energy: EnergyLike,
    samples: Tensor,
    *,
    c: float = 1.0,
    exponent: float = -0.5,
) -> SteinDiscrepancy:
    """The discrepancy between samples and exp(-E), in float64, with the inverse multiquadric kernel.

    It is blind to the weights of modes that lie far apart, as every measure by the score is (Wenliang & Kanagawa 2020).
    exp(-E) has to vanish at the bounds of the states, if there are any: otherwise KSD is not 0 for its own samples.

    Args:
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1). It takes no condition.
        samples: (n, *shape), n >= 2, independent. They are moved to the energy's device.
        c: > 0, the scale of the kernel in the units of the states. exponent: b, in (-1, 0).
    """
    if samples.ndim < 2 or len(samples) < 2 or not samples.is_floating_point():
        raise ValueError(
            f"samples must be (n, *shape) with n >= 2, floating-point, got {tuple(samples.shape)} {samples.dtype}"
        )
    c = checked_number("c", c, positive=True)
    if not -1.0 < exponent < 0.0:
        raise ValueError(f"exponent must be in (-1, 0), got {exponent}")
    model = as_module(energy)
    like = first_tensor(model)
    x = samples.detach().to(device=None if like is None else like.device, dtype=torch.float64)
    with evaluating(model):
        x, shape = x.flatten(1), x.shape[1:]
        gradient = Energy(model, shape, torch.float64).gradient
        score = torch.cat([-gradient(part) for part in torch.split(x, max(1, _PAIRS // x.shape[1]))])
    for name, values in (("samples", x), ("the energy's gradient at samples", score)):
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).any(1).sum())
            raise ValueError(f"{name} must be finite, and {bad} rows are not")
    n = len(x)
    rows = max(1, _PAIRS // n)
    total = math.fsum(
        float(_stein_kernel(a, b, x, score, c, exponent).sum())
        for a, b in zip(torch.split(x, rows), torch.split(score, rows), strict=True)
    )
    # u(x, x): there, dk/dx = dk/dy = 0, and the sum of second derivatives is -2 b d c^(2b - 2).
    k = c ** (2.0 * exponent)
    itself = float(score.square().sum()) * k - 2.0 * exponent * x.shape[1] * n * k / c**2
    return SteinDiscrepancy((total - itself) / (n * (n - 1)), math.sqrt(max(0.0, total)) / n)


def _stein_kernel(x: Tensor, score_x: Tensor, y: Tensor, score_y: Tensor, c: float, b: float) -> Tensor:
    """u of all pairs: (m, dim) and (n, dim), each with its scores -> (m, n).

    With r = x - y and q = c^2 + |r|^2: dk/dx = 2 b q^(b-1) r = -dk/dy, and the sum of the second derivatives is
    -2 b d q^(b-1) - 4 b (b-1) |r|^2 q^(b-2).
    """
    squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    q = squared + c * c
    # (s(y) - s(x)).r, without the (m, n, dim) array of differences
    along = x @ score_y.T - (y * score_y).sum(1) - (score_x * x).sum(1)[:, None] + score_x @ y.T
    first = 2.0 * b * q.pow(b - 1.0)
    return (
        score_x @ score_y.T * q.pow(b) + first * (along - x.shape[1]) - 4.0 * b * (b - 1.0) * squared * q.pow(b - 2.0)
    )
