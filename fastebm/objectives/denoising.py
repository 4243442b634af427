"""Denoising score matching (Vincent 2011): the gradient of the energy learns to predict the noise in noisy data.

    x' = alpha x + sigma xi,   xi ~ N(0, I),   loss = mean 1/2 |sigma dE/dx(x') - xi|^2

The minimum is the law of x', of the data with noise: dE/dx = -d log p(x')/dx = E[xi | x'] / sigma. The loss is
Vincent's times sigma^2, so that all noise levels count alike (Song & Ermon 2019): a constant energy has loss dim / 2 at
each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..energies import takes_condition
from ..energies.functions import name_of_forward
from ..energies.noise_conditional import checked_betas, variance_preserving
from ..samplers.annealed import checked_sigmas
from ..scalars import checked_number
from .base import Loss, Objective
from .gradients import input_gradient, with_all_weights

__all__ = ["DenoisingScoreMatching", "MultiLevelDenoisingScoreMatching", "VariancePreservingScoreMatching"]


class _Levels(NamedTuple):
    """The noise of the rows: x' = alpha x + sigma xi, where scale dE/dx(x') is to predict xi. Each (n,).

    condition: the second argument of the energy, (n,), or None.
    """

    alpha: Tensor
    sigma: Tensor
    scale: Tensor
    condition: Tensor | None


class _Denoising(Objective):
    """What denoising objectives share. They differ in the noise levels of the rows."""

    def _levels(self, u: Tensor) -> _Levels:
        """The noise of rows, given a uniform number in [0, 1] for each, (n,)."""
        raise NotImplementedError

    def forward(
        self,
        energy: nn.Module,
        batch: Tensor,
        *,
        labels: Tensor | None = None,
        batch_size: int | None = None,
        first_row: int = 0,
    ) -> Loss:
        """The loss of one batch: see ``Objective``. labels: for an energy that takes them."""
        n = len(batch) if batch_size is None else batch_size
        draws = self.draws(batch, first_row)
        alpha, sigma, scale, condition = self._levels(draws.strata(n))
        if condition is not None and not takes_condition(energy, "condition"):
            raise ValueError(
                f"{type(self).__name__} trains an energy of states and noise levels, and {name_of_forward(energy)} "
                "takes x only: use a noise-conditional energy, forward(x, sigma), or DenoisingScoreMatching"
            )
        noise = draws.normal()
        noisy = _per_row(alpha, batch) * batch + _per_row(sigma, batch) * noise
        _, energies, gradient = input_gradient(energy, noisy, labels=labels, condition=condition)
        error = (_per_row(scale, batch) * gradient - noise).square().sum() / n
        loss = with_all_weights(0.5 * error, energies)
        return Loss(loss, {"noise_error": error.detach() / math.prod(batch.shape[1:])})


class DenoisingScoreMatching(_Denoising):
    """Denoising score matching at one noise level, for any energy of x (Vincent 2011). No chains are run.

        objective = DenoisingScoreMatching(sigma=0.3)

    The energy learns the law of the data with noise of standard deviation sigma. A larger sigma trains more stably and
    blurs more. The top of this file states the loss. Metrics: ``noise_error``, the mean squared error of the noise that
    the energy predicts, per dim; a constant energy has 1.

    Args:
        sigma: standard deviation of the noise, > 0, in units of the state.
        seed: of the noise: see ``Objective``.
    """

    def __init__(self, sigma: float, *, seed: int | None = None) -> None:
        super().__init__(seed=seed)
        self.sigma = checked_number("sigma", sigma, positive=True)

    def _levels(self, u: Tensor) -> _Levels:
        sigma = torch.full_like(u, self.sigma)
        return _Levels(torch.ones_like(u), sigma, sigma, None)


class MultiLevelDenoisingScoreMatching(_Denoising):
    """Denoising score matching at several noise levels, for a noise-conditional energy (Song & Ermon 2019).

        objective = MultiLevelDenoisingScoreMatching(sigmas=[4.0, 2.0, 1.0, 0.5, 0.25])
        loss, metrics, _ = objective(energy, batch)       # energy: forward(x, sigma), sigma (n,)

    E(x, sigma) learns the law of the data with noise of standard deviation sigma. Rows take the levels in equal shares.
    The energy at a small sigma alone learns the weights of separate modes badly: sample and measure it through all
    levels, by ``AnnealedLangevin``, ``PredictorCorrector``, ``probability_flow`` and ``flow_likelihood``.

    With ``sigma_0``, a single energy E(x) learns from all levels (Li, Chen & Sommer 2019):

        loss = mean 1/2 |sigma_0^2 / sigma dE/dx(x') - xi|^2

    In many dims the distance of x' from the data tells its level, and the energy is that of the data with noise
    sigma_0. In few dims it is a mixture of the levels; ``DenoisingScoreMatching`` is exact there.

    Metrics: ``noise_error``, as ``DenoisingScoreMatching`` has it.

    Args:
        sigmas: noise levels, decreasing and > 0, in units of the state: a sequence of numbers or a (n_levels,) tensor
            or array. Usual is a geometric sequence from the largest distance between data to their finest details.
        sigma_0: noise level of a single energy E(x), > 0. None: the energy takes the level as its second argument.
        seed: of the noise and of the levels: see ``Objective``.
    """

    def __init__(
        self, sigmas: Sequence[float] | Tensor, *, sigma_0: float | None = None, seed: int | None = None
    ) -> None:
        super().__init__(seed=seed)
        self.sigmas = checked_sigmas(sigmas)
        self.sigma_0 = None if sigma_0 is None else checked_number("sigma_0", sigma_0, positive=True)

    def _levels(self, u: Tensor) -> _Levels:
        sigmas = torch.tensor(self.sigmas, dtype=u.dtype, device=u.device)
        sigma = sigmas[(u * len(sigmas)).long().clamp(max=len(sigmas) - 1)]  # u may be 1
        if self.sigma_0 is None:
            return _Levels(torch.ones_like(u), sigma, sigma, sigma)
        return _Levels(torch.ones_like(u), sigma, self.sigma_0**2 / sigma, None)


class VariancePreservingScoreMatching(_Denoising):
    """Denoising score matching along the variance-preserving diffusion, for an energy E(x, t) (Song et al. 2021).

        log alpha(t) = -t beta_min / 2 - t^2 (beta_max - beta_min) / 4,   sigma(t)^2 = 1 - alpha(t)^2

    E(x, t) learns the law of x' = alpha(t) x + sigma(t) xi: of the data near t = 0, and of standard normal noise at
    t = 1. The times of the rows divide (t_min, 1] evenly. Data should have a standard deviation of about 1. Metrics:
    ``noise_error``, as ``DenoisingScoreMatching`` has it.

    Args:
        beta_min, beta_max: rate of the diffusion at t = 0 and at t = 1, 0 < beta_min <= beta_max.
        t_min: the first time, in (0, 1). Below it the noise is too small to learn from.
        seed: of the noise and of the times: see ``Objective``.
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-5, seed: int | None = None
    ) -> None:
        super().__init__(seed=seed)
        self.betas = checked_betas((beta_min, beta_max))
        self.t_min = checked_number("t_min", t_min, positive=True)
        if not self.t_min < 1:
            raise ValueError(f"t_min must be in (0, 1), got {t_min}")

    def _levels(self, u: Tensor) -> _Levels:
        t = 1.0 - (1.0 - self.t_min) * u
        alpha, sigma = variance_preserving(t, self.betas)
        return _Levels(alpha, sigma, sigma, t)


def _per_row(values: Tensor, batch: Tensor) -> Tensor:
    """One number per row, (n,), in a shape that broadcasts with the batch, (n, *shape)."""
    return values.reshape(-1, *[1] * (batch.ndim - 1))
