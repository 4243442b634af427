"""An energy at every noise level: exp(-E(x, sigma)) is the data's density blurred by noise of standard deviation sigma.

E(x, sigma) = |x - D(x, sigma)|^2 / (2 sigma^2),
D(x, sigma) = c_skip x + c_out F(c_in x, features of log sigma)

c_skip = sd^2 / (sigma^2 + sd^2),   c_out = sigma sd / sqrt(sigma^2 + sd^2),   c_in = 1 / sqrt(sigma^2 + sd^2)

with a network F and the standard deviation sd of the data. D is a denoiser with the preconditioning of Karras et al.
(2022). An energy that is the residual of a denoiser was proposed by Salimans & Ho (2021). If F = 0, exp(-E) is a
Gaussian in x whose score is that of Gaussian data at large sigma.

Variance-preserving energies take a time t in (0, 1]: exp(-E(x, t)) is the density of alpha x_0 + sigma xi, which is
that of x / alpha at the noise level sigma / alpha, up to a factor (Song et al. 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..scalars import checked_integer, plain_number
from .conditions import condition_parameter
from .functions import EnergyLike, as_module

__all__ = ["NoiseConditionalEnergy", "checked_betas", "variance_preserving"]


class NoiseConditionalEnergy(nn.Module):
    """E(x, sigma) of a network F that denoises: the top of this file states the formula.

        NoiseConditionalEnergy(MLPEnergy(2 + 5, (128, 128), outputs=2))
        NoiseConditionalEnergy(ConvEnergy((28, 28), outputs=784, condition_size=5))

    ``MultiLevelDenoisingScoreMatching`` trains it, or with ``betas`` ``VariancePreservingScoreMatching``.
    ``AnnealedLangevin``, ``PredictorCorrector`` and ``probability_flow`` sample it.

    Args:
        network: F, with one output per dim of the state. If its forward takes a condition, it gets the features of the
            noise level there, (batch, n_features). Otherwise they are appended to the flat state, so it takes
            (batch, dim + n_features).
        sigma_data: sd, the standard deviation of the data's coordinates, > 0. Its order of magnitude is enough.
        n_frequencies: k >= 0. The features are u = log(sigma) / 4, and sin and cos of u, 2 u, ..., 2^(k - 1) u: so
            n_features is 1 + 2 k.
        betas: (beta_min, beta_max) of a variance-preserving energy, as in (0.1, 20.0): the condition is then the time
            t in (0, 1]. None: the condition is sigma.

    Raises:
        TypeError, ValueError: a setting is wrong, or the network or the condition does not fit the states.
    """

    def __init__(
        self,
        network: EnergyLike,
        sigma_data: float = 0.5,
        *,
        n_frequencies: int = 2,
        betas: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.network = as_module(network, "network")
        sigma_data = plain_number(sigma_data)
        if isinstance(sigma_data, bool) or not isinstance(sigma_data, (int, float)) or not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be a finite number > 0, got {sigma_data!r}")
        self.sigma_data = float(sigma_data)
        self.n_frequencies = checked_integer("n_frequencies", n_frequencies, least=0)
        self.betas = None if betas is None else checked_betas(betas)
        self._takes_condition = condition_parameter(self.network, "condition") is not None

    @property
    def n_features(self) -> int:
        """Number of features of the noise level that the network gets."""
        return 1 + 2 * self.n_frequencies

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """States (batch, *shape), and their sigma (or t), (batch,) or (batch, 1), > 0 -> (batch,)."""
        if condition.shape not in ((len(x),), (len(x), 1)) or not condition.is_floating_point():
            raise ValueError(
                f"condition must be ({len(x)},) noise levels, one per state, got {tuple(condition.shape)} "
                f"{condition.dtype}: one level for all is torch.full((len(x),), sigma)"
            )
        sigma, flat = condition.reshape(-1, 1), x.flatten(1)
        if self.betas is not None:
            alpha, sigma = variance_preserving(sigma, self.betas)
            flat, sigma = flat / alpha, sigma / alpha
        variance = sigma**2 + self.sigma_data**2
        output = self._output((flat / variance.sqrt()).reshape(x.shape), self._features(sigma))
        if output.shape != flat.shape:
            raise ValueError(
                f"the network must return one number per dim, {tuple(flat.shape)}, got {tuple(output.shape)}: build it "
                f"with outputs={flat.shape[1]}"
            )
        # (x - D) / sigma, without a difference of numbers that are nearly the same at small sigma
        residual = (sigma / variance) * flat - (self.sigma_data / variance.sqrt()) * output
        return residual.square().sum(dim=1) / 2

    def _features(self, sigma: Tensor) -> Tensor:
        """(batch, 1) -> (batch, n_features)."""
        u = sigma.log() / 4
        angles = [2.0**k * u for k in range(self.n_frequencies)]
        return torch.cat([u, *(f(angle) for angle in angles for f in (torch.sin, torch.cos))], dim=1)

    def _output(self, x: Tensor, features: Tensor) -> Tensor:
        if self._takes_condition:
            output: Tensor = self.network(x, condition=features)
            return output
        inputs = torch.cat([x.flatten(1), features], dim=1)
        try:
            output = self.network(inputs)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the network does not take states and features of the noise level, {tuple(inputs.shape)}: build it "
                f"for {inputs.shape[1] - self.n_features} + {self.n_features} inputs ({error})"
            ) from error
        return output


def variance_preserving(t: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """alpha(t) and sigma(t) of the variance-preserving diffusion (Song et al. 2021), alpha^2 + sigma^2 = 1.

    log alpha = -(beta_min t + (beta_max - beta_min) t^2 / 2) / 2
    """
    low, high = betas
    log_alpha = -(low * t + (high - low) * t**2 / 2) / 2
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


def checked_betas(betas: tuple[float, float]) -> tuple[float, float]:
    """Check (beta_min, beta_max)."""
    values = tuple(map(plain_number, betas)) if isinstance(betas, (tuple, list)) else ()
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not numbers or not 0 < values[0] <= values[1] < math.inf:
        raise ValueError(f"betas must be (beta_min, beta_max) with 0 < beta_min <= beta_max, got {betas!r}")
    return float(values[0]), float(values[1])
