"""p-values of samples whose distribution is known exactly."""

import math

import numpy as np
import torch
from scipy import stats


def two_sided(z):
    return 2 * stats.norm.sf(abs(z))


def standard_normal(w):
    """p-values of the hypothesis that the entries of w (n_chains, dim) are independent and standard normal."""
    n, dim = w.shape
    total = float((w**2).sum())
    p = [2 * min(stats.chi2.cdf(total, n * dim), stats.chi2.sf(total, n * dim))]
    p += [two_sided(math.sqrt(n) * w[:, i].mean()) for i in range(dim)]
    p += [two_sided((w[:, i] * w[:, j]).sum() / math.sqrt(n)) for i in range(dim) for j in range(i)]
    p += [stats.kstest(w[:, i], "norm").pvalue for i in range(dim)]
    return p


def counts_follow(counts, probabilities):
    """p-value of a chi-square test. Cells with fewer than 10 expected counts are merged."""
    counts, probabilities = np.ravel(counts), np.ravel(probabilities)
    assert abs(probabilities.sum() - 1) < 1e-9
    expected = probabilities * counts.sum()
    small = expected < 10
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] < 10:
        counts[-2], expected[-2] = counts[-2] + counts[-1], expected[-2] + expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


def double(x):
    return x.double().cpu().numpy()


def fits_gaussian(x, std, alpha):
    """Whether independent draws (n, dim) have the law N(0, std^2): each dim, their sum and each square, by Kolmogorov
    and Smirnov's test. alpha: probability of a false alarm."""
    z = (x.double() / std.double()).numpy()
    values = [*z.T, z.sum(1) / math.sqrt(z.shape[1]), *np.square(z).T]
    laws = ["norm"] * (z.shape[1] + 1) + [stats.chi2(1).cdf] * z.shape[1]
    return min(stats.kstest(v, law).pvalue for v, law in zip(values, laws, strict=True)) > alpha / len(values)


CELLS, HALF_WIDTH = 6, 2.0


def cells_of_box(energy):
    """A 2-D energy with weights scaled up, and the probabilities of exp(-E) in 6 x 6 cells of [-2, 2]^2.

    By midpoints of 50 x 50 points per cell.
    """
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(3.0)
    n = 50 * CELLS
    axis = HALF_WIDTH * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    with torch.no_grad():
        weights = torch.exp(-energy.double()(torch.cartesian_prod(axis, axis)).flatten())
    energy.float()
    weights = weights.reshape(CELLS, 50, CELLS, 50).sum(dim=(1, 3))
    probabilities = (weights / weights.sum()).numpy()
    assert probabilities.max() > 5 * probabilities.min()  # not flat
    return energy, probabilities


def fits_cells(x, probabilities, alpha):
    """Whether independent states (n, 2) have these probabilities of cells, by a chi-square test."""
    edges = [[-HALF_WIDTH, HALF_WIDTH]] * 2
    counts, _, _ = np.histogram2d(*x.double().numpy().T, bins=CELLS, range=edges)
    assert counts.sum() == len(x)
    return counts_follow(counts, probabilities) > alpha
