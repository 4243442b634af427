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
from ..scalars import checked_integer
from ..targets.autograd import Energy
from .rows import checked_pair

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
    panels, nodes = checked_integer("panels", panels, least=1), checked_integer("nodes", nodes, least=1)
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
    """Log densities of rows under a Gaussian kernel density estimate of training rows: (n,), and its bandwidth, the
    best of eight in cross-validation on the training rows.

    Distances are computed once for all bandwidths, so 2,000 rows of 784 dims take a second. There, scikit-learn's
    KernelDensity takes half a minute, and is off by hundreds of nats.

    Args:
        train, x: (n_train, dim) and (n, dim). max_rows: a subset of so many training rows is used; the time goes with
            its square. seed: of the subset and the folds.
    """
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.model_selection import KFold

    n_folds = checked_integer("n_folds", n_folds, least=2)
    max_rows = checked_integer("max_rows", max_rows, least=n_folds)
    rows, x = checked_pair("kernel_density", train, x, least=n_folds, least_of_second=1)
    rows = rows[np.random.default_rng(seed).permutation(len(rows))[:max_rows]]
    # The distances of scikit-learn lose digits far from 0.
    x, rows = x - rows.mean(axis=0), rows - rows.mean(axis=0)
    if not np.ptp(rows, axis=0).any():
        raise ValueError("all training rows are equal, so no bandwidth fits them")
    bandwidths = _FACTORS * rows.std(axis=0).mean() * len(rows) ** (-1.0 / (rows.shape[1] + 4))

    def log_density(squared: NDArray[Any], h: float) -> NDArray[Any]:
        """From the squared distances to all kernels, (n, n_kernels) -> (n,)."""
        log_sum = torch.from_numpy(squared / (-2.0 * h**2)).logsumexp(1)
        log_n, log_volume = math.log(squared.shape[1]), rows.shape[1] * math.log(h * math.sqrt(2.0 * math.pi))
        result: NDArray[Any] = (log_sum - log_n - log_volume).numpy()
        return result

    squared = euclidean_distances(rows, squared=True)
    folds = list(KFold(n_folds, shuffle=True, random_state=seed % 2**32).split(rows))
    scores = [sum(log_density(squared[np.ix_(out, within)], h).sum() for within, out in folds) for h in bandwidths]
    best = float(bandwidths[np.argmax(scores)])
    blocks = pairwise_distances_chunked(x, rows, reduce_func=lambda d, _: log_density(d, best), squared=True)
    return np.concatenate(list(blocks)), best


def uniform_in_cells(
    levels_of_rows: Tensor, levels: int, generator: torch.Generator, clamp: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """States drawn uniformly from the cells of integer grey levels, to bound the probability of the levels.

    The cell of level k is (k - 1/2, k + 1/2) / levels, cut off at the clamp.

    Args:
        levels_of_rows: (n, dim), integers 0 .. levels, in any dtype. levels: >= 1.
        clamp: (lo, hi) of the density's states, or None for a density on all of R^dim.

    Returns:
        (n, dim) float32 states, and (n,) float64: the log of the volume of each row's cell.
    """
    k, levels = levels_of_rows.double(), checked_integer("levels", levels, least=1)
    if not bool(((k >= 0) & (k <= levels) & (k == k.round())).all()):
        raise ValueError(f"levels_of_rows must be integers 0 to {levels}, got {float(k.min()):g} to {float(k.max()):g}")
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
    return -(log_likelihoods.double() + log_volumes) / (checked_integer("dim", dim, least=1) * math.log(2.0))
