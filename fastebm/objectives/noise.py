"""Noise distributions for noise-contrastive objectives: laws with a density that is known and samples that are cheap.

The density must be positive wherever the data's is (Gutmann & Hyvarinen 2012, section 2.4). The closer the noise is to
the data, the less noise is needed.

Parameters are float64 buffers, and densities are computed in float64: the log-density of an image is a sum of hundreds
of terms, and an objective takes differences of such sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributions, nn

from ..scalars import checked_integer
from .base import Draws

__all__ = ["GaussianNoise", "MixtureNoise", "NoiseDistribution", "UniformNoise", "Values", "checked_values"]

Values = float | Sequence[Any] | Tensor


class NoiseDistribution(nn.Module):
    """A distribution of states with a known density.

    Args:
        shape: of one state.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of states: (n, *shape) -> (n,), in the dtype of x."""
        raise NotImplementedError(f"{type(self).__name__} defines no log_prob")

    def sample(self, draws: Draws, copies: int) -> Tensor:
        """``copies`` states per row of the batch: (n, copies, *shape), a function of the objective's random numbers."""
        raise NotImplementedError(f"{type(self).__name__} defines no sample")

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless states have this shape."""
        if tuple(shape) != self.shape:
            name = type(self).__name__
            raise ValueError(f"this {name} is of states of shape {self.shape}, and the batch's have {tuple(shape)}")


class UniformNoise(NoiseDistribution):
    """Uniform on low <= x <= high in every coordinate.

    Args:
        low: numbers of one state's shape.
        high: > low, in the same form or one number for all coordinates.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Values, high: Values) -> None:
        low = checked_values("low", low)
        high = checked_values("high", high, low.shape)
        if not bool((low < high).all()):
            raise ValueError(f"uniform noise needs low < high in every coordinate, got {low} and {high}")
        super().__init__(low.shape)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def log_prob(self, x: Tensor) -> Tensor:
        """-log of the volume, or -inf outside: (n, *shape) -> (n,)."""
        self.check_shape(x.shape[1:])
        # The bounds are rounded as x is: float32 data may lie on a bound that float32 doesn't have.
        inside = ((x >= self.low.to(x.dtype)) & (x <= self.high.to(x.dtype))).flatten(1).all(dim=1)
        return torch.where(inside, -(self.high - self.low).log().sum(), -torch.inf).to(x.dtype)

    def sample(self, draws: Draws, copies: int) -> Tensor:
        u = draws.uniforms(copies)
        # Clamped, since rounding to the dtype of the batch may pass a bound.
        low, high = self.low.to(u.dtype), self.high.to(u.dtype)
        return torch.lerp(low, high, u).clamp(low, high)


class GaussianNoise(NoiseDistribution):
    """A normal distribution.

    Args:
        mean: numbers of one state's shape.
        std: > 0, of every coordinate, in the same form or one number for all. Or:
        covariance: of the flattened state, (dim, dim), positive definite.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Values, *, std: Values | None = None, covariance: Tensor | None = None) -> None:
        mean = checked_values("mean", mean)
        super().__init__(mean.shape)
        if (std is None) == (covariance is None):
            raise ValueError("Gaussian noise takes std= or covariance=, one of the two")
        self.register_buffer("mean", mean.flatten())
        if std is not None:
            self.register_buffer("scale", checked_values("std", std, mean.shape, positive=True).flatten())
        else:
            self.register_buffer("scale", _cholesky(checked_values("covariance", covariance), mean.numel()))

    @classmethod
    def fit(cls, x: Tensor, *, reg_covar: float = 1e-6) -> GaussianNoise:
        """The normal distribution with the mean and the covariance of rows of data, (n, *shape), n > 1.

        reg_covar: added to the variances, > 0 if a coordinate is constant, as pixels on the edge are.
        """
        rows = x.flatten(1).to(torch.float64)
        covariance = torch.cov(rows.T).reshape(rows.shape[1], -1)
        covariance.diagonal().add_(reg_covar)
        return cls(rows.mean(0).reshape(x.shape[1:]), covariance=covariance)

    def log_prob(self, x: Tensor) -> Tensor:
        """(n, *shape) -> (n,)."""
        self.check_shape(x.shape[1:])
        if self.scale.ndim == 1:
            law = distributions.Normal(self.mean, self.scale, validate_args=False)
            return _log_prob(law, x, self.mean).sum(dim=1).to(x.dtype)
        joint = distributions.MultivariateNormal(self.mean, scale_tril=self.scale, validate_args=False)
        return _log_prob(joint, x, self.mean).to(x.dtype)

    def sample(self, draws: Draws, copies: int) -> Tensor:
        z = draws.normal(copies)
        rows = z.flatten(2).to(self.mean.dtype)
        rows = rows * self.scale if self.scale.ndim == 1 else rows @ self.scale.T
        return (self.mean + rows).to(z.dtype).reshape(z.shape)


class MixtureNoise(NoiseDistribution):
    """A mixture of normal distributions.

    Args:
        weights: (n_components,), > 0; divided by their sum.
        means: (n_components, *shape).
        covariances: (n_components, dim, dim) of the flattened states, positive definite.
    """

    weights: Tensor
    means: Tensor
    scales: Tensor

    def __init__(self, weights: Values, means: Values, covariances: Values) -> None:
        weights, means = checked_values("weights", weights, positive=True), checked_values("means", means)
        covariances = checked_values("covariances", covariances)
        if weights.ndim != 1 or len(means) != len(weights) or len(covariances) != len(weights):
            shapes = ", ".join(str(tuple(v.shape)) for v in (weights, means, covariances))
            raise ValueError(f"weights, means and covariances need one row per component, got shapes {shapes}")
        super().__init__(means.shape[1:])
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("scales", _cholesky(covariances, self.means.shape[1]))

    @classmethod
    def fit(cls, x: Tensor, n_components: int, *, reg_covar: float = 1e-6, seed: int = 0) -> MixtureNoise:
        """The mixture of the highest likelihood of rows of data, (n, *shape), that scikit-learn finds.

        reg_covar: added to the variances. seed: of its start, k-means.
        """
        from sklearn.mixture import GaussianMixture

        n_components = checked_integer("n_components", n_components, least=1, most=len(x))
        rows = x.flatten(1).double().cpu().numpy()
        found = GaussianMixture(n_components, reg_covar=reg_covar, random_state=seed).fit(rows)
        means = torch.from_numpy(found.means_).reshape(-1, *x.shape[1:])
        return cls(torch.from_numpy(found.weights_), means, torch.from_numpy(found.covariances_))

    def log_prob(self, x: Tensor) -> Tensor:
        """(n, *shape) -> (n,)."""
        self.check_shape(x.shape[1:])
        components = distributions.MultivariateNormal(self.means, scale_tril=self.scales, validate_args=False)
        choice = distributions.Categorical(self.weights, validate_args=False)
        mixture = distributions.MixtureSameFamily(choice, components, validate_args=False)
        return _log_prob(mixture, x, self.means).to(x.dtype)

    def sample(self, draws: Draws, copies: int) -> Tensor:
        u, z = draws.uniform(copies).flatten().to(self.weights.dtype), draws.normal(copies)
        component = torch.searchsorted(self.weights.cumsum(0)[:-1], u.contiguous())
        rows = z.flatten(0, 1).flatten(1).to(self.means.dtype)
        for k, (mean, scale) in enumerate(zip(self.means, self.scales, strict=True)):
            chosen = component == k
            rows[chosen] = mean + rows[chosen] @ scale.T
        return rows.to(z.dtype).reshape(z.shape)


def checked_values(name: str, values: Any, shape: Sequence[int] | None = None, *, positive: bool = False) -> Tensor:
    """Finite numbers as a float64 tensor of its own.

    Args:
        shape: one number, or numbers of this shape, are expanded to it. None: any shape.
        positive: all must be > 0.
    """
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numbers, got {values!r}") from None
    if not bool(tensor.isfinite().all()) or (positive and not bool((tensor > 0).all())):
        raise ValueError(f"{name} must be finite{' and > 0' if positive else ''}, got {tensor}")
    if shape is None:
        return tensor
    if tensor.ndim > 0 and tensor.shape != tuple(shape):
        raise ValueError(f"{name} must be a number or have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    return tensor.expand(tuple(shape)).clone()


def _cholesky(covariance: Tensor, dim: int) -> Tensor:
    """The lower triangular factor of covariance matrices, (..., dim, dim)."""
    if covariance.shape[-2:] != (dim, dim):
        raise ValueError(f"a covariance of {dim} dims has shape ({dim}, {dim}), got {tuple(covariance.shape)}")
    std = covariance.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    # Fits are symmetric up to rounding.
    if bool(((covariance - covariance.mT).abs() > 1e-5 * std[..., :, None] * std[..., None, :]).any()):
        raise ValueError("a covariance must be symmetric: average it with its transpose, (c + c.mT) / 2")
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance)
    if bool((info != 0).any()):
        raise ValueError("a covariance must be positive definite; fit adds reg_covar to the variances")
    return factor


def _log_prob(law: distributions.Distribution, x: Tensor, parameter: Tensor) -> Tensor:
    """The log-density of states, computed in the dtype of the law's parameters."""
    return law.log_prob(x.flatten(1).to(parameter.dtype))
