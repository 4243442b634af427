"""Log-likelihoods of held-out rows, in nats: under an energy, by two ways to log Z, and of a density to compare with.

held_out_likelihood    by annealed importance sampling, with its bracket, in any number of dims
log_z_by_quadrature    log Z in the plane, to many digits
kernel_density         a kernel density estimate
uniform_in_cells, bits_per_dim     what a density of states says about integer grey levels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..box import Box
from ..energies import EnergyLike, first_tensor
from ..energies.eval_mode import evaluating
from ..energies.functions import as_module
from ..estimates import LogPartition, log_likelihood
from ..targets.autograd import Energy
from .rows import as_rows

__all__ = [
    "HeldOut",
    "bits_per_dim",
    "held_out_likelihood",
    "kernel_density",
    "log_z_by_quadrature",
    "uniform_in_cells",
]

# States whose energies are computed at once.
_AT_ONCE = 1 << 16

# Bandwidths that kernel_density tries, as multiples of Scott's rule (n^(-1 / (d + 4)) times the standard deviation).
_FACTORS = np.geomspace(0.1, 2.0, 8)


@dataclass(frozen=True)
class HeldOut:
    """Mean log-likelihood per row, in nats, between two stochastic bounds.

    Attributes:
        upper, lower: with the lower and the upper bound of log Z (``LogPartition``). ``upper`` is the usual estimate by
            annealed importance sampling, which flatters the energy; ``lower`` can be relied on if reverse AIS can.
        upper_error, lower_error: standard errors of these bounds.
        standard_error: of the mean over rows.
        n_outside: rows outside the clamp, where the density is 0. They are left out: each would make the mean -inf.
    """

    upper: float
    upper_error: float
    lower: float
    lower_error: float
    standard_error: float
    n_outside: int


def held_out_likelihood(energy: EnergyLike, x: Tensor, log_z: LogPartition) -> HeldOut:
    """Mean log p(x) = -E(x) - log Z of held-out states, with the bracket of log Z (``fastebm.log_partition``).

    Args:
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1). x: (n, *shape), n >= 2.
        log_z: of the same energy.
    """
    rows = log_likelihood(energy, x, log_z)
    inside = rows[rows > -math.inf]
    if len(inside) < 2:
        raise ValueError(
            f"held_out_likelihood needs at least 2 rows inside the clamp, got {len(rows)} rows, {len(inside)} inside it"
        )
    mean = float(inside.mean())  # with log_z.lower
    return HeldOut(
        upper=mean,
        upper_error=log_z.lower_error,
        lower=mean - (log_z.upper - log_z.lower),
        lower_error=log_z.upper_error,
        standard_error=float(inside.std()) / math.sqrt(len(inside)),
        n_outside=len(rows) - len(inside),
    )


def log_z_by_quadrature(energy: EnergyLike, clamp: tuple[Any, Any], *, panels: int = 64, nodes: int = 8) -> float:
    """log of the integral of exp(-E) over a box in the plane, by composite Gauss-Legendre quadrature in float64.

    Of an energy that is smooth on the scale of a panel, the error falls like the panel's width to the power of 2 nodes;
    of one with kinks (ReLU), like its square. Compare with half as many panels to see it.

    Args:
        energy: a module or a function, (batch, 2) -> (batch,) or (batch, 1).
        clamp: (lo, hi), finite; numbers or one value per dim.
        panels: per side. nodes: per panel and side. The energy is evaluated at (panels * nodes)^2 states.
    """
    box = Box.of(clamp)
    if box is None or not all(bool(torch.as_tensor(bound).isfinite().all()) for bound in box):
        raise ValueError(f"log_z_by_quadrature needs a clamp with finite bounds, got {clamp}")
    for name, value in (("panels", panels), ("nodes", nodes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    lo, hi = (torch.as_tensor(bound, dtype=torch.float64).expand(2).cpu() for bound in box)
    at, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(nodes))
    unit = ((torch.arange(panels)[:, None] + 0.5 * (at + 1.0)) / panels).flatten()  # places in (0, 1)
    log_w = (0.5 * weights / panels).repeat(panels).log()
    x, y = (lo[i] + (hi[i] - lo[i]) * unit for i in (0, 1))
    states = torch.cartesian_prod(x, y)
    log_weights = (log_w[:, None] + log_w).flatten() + (hi - lo).log().sum()
    model = as_module(energy)
    like = first_tensor(model)
    device = torch.device("cpu") if like is None else like.device
    with evaluating(model):
        evaluate = Energy(model, (2,), torch.float64)
        e = torch.cat([evaluate(part.to(device)).cpu() for part in torch.split(states, _AT_ONCE)])
    return float((log_weights - e).logsumexp(0))


def kernel_density(
    train: ArrayLike, x: ArrayLike, *, n_folds: int = 3, max_rows: int = 2000, seed: int = 0
) -> tuple[NDArray[Any], float]:
    """Log densities of rows under scikit-learn's Gaussian kernel density estimate of training rows: (n,), and its
    bandwidth, the best of eight in cross-validation on the training rows.

    Args:
        train, x: (n_train, dim) and (n, dim). max_rows: a subset of so many training rows is used; the time goes with
            its square. seed: of the subset and the folds.
    """
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.neighbors import KernelDensity

    rows, x = as_rows(train).astype(np.float64), as_rows(x).astype(np.float64)
    if rows.shape[1] != x.shape[1]:
        raise ValueError(f"kernel_density takes rows of one dim, got {rows.shape[1]} and {x.shape[1]}")
    if len(rows) < n_folds or max_rows < n_folds:
        raise ValueError(f"kernel_density needs at least {n_folds} training rows, got {min(len(rows), max_rows)}")
    rows = rows[np.random.default_rng(seed).permutation(len(rows))[:max_rows]]
    deviation = float(rows.std(axis=0).mean())
    if not deviation > 0:
        raise ValueError("all training rows are equal, so no bandwidth fits them")
    scott = deviation * len(rows) ** (-1.0 / (rows.shape[1] + 4))
    folds = KFold(n_folds, shuffle=True, random_state=seed % 2**32)
    search = GridSearchCV(KernelDensity(), {"bandwidth": scott * _FACTORS}, cv=folds).fit(rows)
    return search.best_estimator_.score_samples(x), float(search.best_params_["bandwidth"])


def uniform_in_cells(
    levels_of_rows: Tensor, levels: int, generator: torch.Generator, clamp: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """States drawn uniformly from the cells of integer grey levels, to bound the probability of the levels.

    The cell of level k is (k - 1/2, k + 1/2) / levels, cut off at the clamp.

    Args:
        levels_of_rows: (n, dim), integers 0 .. levels, in any dtype.
        clamp: (lo, hi) of the density's states, or None for a density on all of R^dim.

    Returns:
        (n, dim) float32 states, and (n,) float64: the log of the volume of each row's cell.
    """
    k = levels_of_rows.double()
    lo, hi = (k - 0.5) / levels, (k + 0.5) / levels
    if clamp is not None:
        lo, hi = lo.clamp_min(clamp[0]), hi.clamp_max(clamp[1])
        if not bool((lo < hi).all()):
            raise ValueError(f"the cells of some levels lie outside the clamp {tuple(clamp)}")
    u = torch.rand(k.shape, generator=generator, dtype=torch.float64)
    return (lo + (hi - lo) * u).float(), (hi - lo).log().sum(1)


def bits_per_dim(log_likelihoods: Tensor, log_volumes: Tensor, dim: int) -> Tensor:
    """Bits per dim of integer grey levels, from log densities (n,) at ``uniform_in_cells``: (n,).

    P(k) is the integral of the density over k's cell, so by Jensen's inequality log P(k) >= log volume + E log p(x), x
    uniform in the cell: the mean over rows is an upper bound, in expectation (Theis, van den Oord & Bethge 2016).
    """
    if log_likelihoods.shape != log_volumes.shape:
        shapes = f"{tuple(log_likelihoods.shape)} and {tuple(log_volumes.shape)}"
        raise ValueError(f"bits_per_dim takes a log density and a log volume per row, got shapes {shapes}")
    return -(log_likelihoods.double() + log_volumes) / (dim * math.log(2.0))
