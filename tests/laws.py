"""p-values of samples whose distribution is known exactly."""

import math

import numpy as np
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
