"""Statistics of one quantity along the chains, by arviz-stats.

Bulk and tail ESS, MCSE of the mean, and R-hat of rank-normalised split chains: Vehtari, Gelman, Simpson, Carpenter &
Buerkner 2021. Nested R-hat: Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman 2024.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["arviz", "autocorrelations", "statistics"]

# The tails: below the 5% and above the 95% quantile, as in Vehtari et al. 2021.
_TAILS = (0.05, 0.95)


def arviz() -> Any:
    """The functions of arviz-stats on arrays.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from arviz_stats.base import array_stats  # type: ignore[attr-defined]
    except ModuleNotFoundError as error:
        raise ImportError(
            'diagnose needs arviz-stats: pip install "fastebm[diagnostics]", with Python 3.11 or later'
        ) from error
    return array_stats


def statistics(values: NDArray[Any], superchains: int | None) -> dict[str, float]:
    """Statistics of (n_chains, draws) values.

    superchains: the number of groups of consecutive chains that shared a start, or None. R-hat compares chains, so it
    is NaN for a single one.
    """
    stats, n = arviz(), len(values)
    # A quantity that is constant in each chain divides by its variance of 0: R-hat is infinite.
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "mean": values.mean(),
            "sd": values.std(ddof=1),
            "mcse": stats.mcse(values, method="mean"),
            "ess_bulk": stats.ess(values, method="bulk"),
            "ess_tail": stats.ess(values, method="tail", prob=_TAILS),
            "rhat": stats.rhat(values, method="rank") if n > 1 else math.nan,
        }
        if superchains is not None:
            groups = np.repeat(np.arange(superchains), n // superchains)
            found["rhat_nested"] = stats.rhat_nested(values, groups, method="rank")
    return {name: float(value) for name, value in found.items()}


def autocorrelations(values: NDArray[Any]) -> NDArray[Any]:
    """Autocorrelation at each lag, (draws,), from all chains (Vehtari et al. 2021, equation 10).

    Chains that disagree are as correlated as if they were parts of one slow chain.
    """
    n = values.shape[1]
    covariance = arviz().autocov(values, axis=1).mean(axis=0)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + (values.mean(axis=1).var(ddof=1) if len(values) > 1 else 0.0)
    correlation: NDArray[Any] = 1 - (within - covariance) / total
    correlation[0] = 1.0
    return correlation
