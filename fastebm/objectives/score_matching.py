"""Score matching without noise: the loss is known up to a constant, through second derivatives of the energy.

    1/2 E |dE/dx + d log p/dx|^2  =  E[ 1/2 |dE/dx|^2 - tr H ] + constant,   H = d^2 E/dx^2      (Hyvarinen 2005)

The trace is exact with the unit vectors e_i as directions v, tr H = sum_i e_i^T H e_i, or estimated with random ones,
E[v^T H v] for E[v v^T] = I (Song et al. 2019). Each v^T H v takes one backward pass through dE/dx.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from ..scalars import checked_integer, checked_number
from .base import Draws, Loss, Objective
from .gradients import input_gradient, with_all_weights

__all__ = ["ExactScoreMatching", "SlicedScoreMatching"]

# A backward pass per dim: an MLP [256, 128] in 64 dims takes 80 times as long as by denoising score matching.
_MOST_DIMS = 100


class _ScoreMatching(Objective):
    """What both objectives share. They differ in the directions v."""

    def __init__(self, noise_std: float, seed: int | None) -> None:
        super().__init__(seed=seed)
        self.noise_std = checked_number("noise_std", noise_std, positive=False)

    def _directions(self, x: Tensor, draws: Draws) -> Tensor:
        """Directions of rows, (k, n or 1, *shape), whose sum over k of v v^T is I on average."""
        raise NotImplementedError

    def _squared(self, gradient: Tensor, directions: Tensor) -> Tensor:
        """The sum of |dE/dx|^2 over the rows."""
        return gradient.square().sum()

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        """labels: for an energy that takes them."""
        noisy = batch + self.noise_std * draws.normal() if self.noise_std > 0 else batch
        directions = self._directions(noisy, draws)
        x, energies, gradient = input_gradient(energy, noisy, labels=labels)
        squared = self._squared(gradient, directions) / draws.n_rows
        trace = _trace(x, gradient, directions) / draws.n_rows
        if self.calls == 0:
            _warn_without_curvature(squared, trace)
        metrics: dict[str, float | Tensor] = {"squared_gradient": squared.detach(), "laplacian": trace.detach()}
        return Loss(with_all_weights(0.5 * squared - trace, energies), metrics)


class SlicedScoreMatching(_ScoreMatching):
    """Sliced score matching: the trace of the Hessian from random directions (Song, Garg, Shi & Ermon 2019).

        objective = SlicedScoreMatching(n_projections=1)

    The energy learns the law of the data, or with ``noise_std`` that of the data with noise. Data on a grid, such as
    grey levels, or near a surface of fewer dims have no finite score, and need noise. The energy must be twice
    differentiable, with an activation such as silu: the second derivatives of relu are 0. The top of this file states
    the loss. Metrics: ``squared_gradient``, mean |dE/dx|^2, and ``laplacian``, mean tr H; they are equal at the optimum
    in expectation.

    Args:
        n_projections: directions per row, >= 1. Each takes a backward pass.
        projection: "rademacher" (entries 1 and -1, the smaller variance) or "gaussian".
        variance_reduced: use |dE/dx|^2 itself, which is known. False: (v . dE/dx)^2, the paper's first form.
        noise_std: standard deviation of the noise on the data, >= 0, in units of the state.
        seed: of the directions and the noise: see ``Objective``.
    """

    def __init__(
        self,
        n_projections: int = 1,
        *,
        projection: str = "rademacher",
        variance_reduced: bool = True,
        noise_std: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(noise_std, seed)
        self.n_projections = checked_integer("n_projections", n_projections, least=1)
        if projection not in ("rademacher", "gaussian"):
            raise ValueError(f"projection must be 'rademacher' or 'gaussian', got {projection!r}")
        self.projection, self.variance_reduced = projection, variance_reduced

    def _directions(self, x: Tensor, draws: Draws) -> Tensor:
        directions = draws.normal(copies=self.n_projections).transpose(0, 1)
        if self.projection == "rademacher":
            directions = 1.0 - 2.0 * (directions < 0).to(x.dtype)
        return directions / math.sqrt(self.n_projections)

    def _squared(self, gradient: Tensor, directions: Tensor) -> Tensor:
        if self.variance_reduced:
            return super()._squared(gradient, directions)
        return (directions * gradient).flatten(2).sum(2).square().sum()


class ExactScoreMatching(_ScoreMatching):
    """Score matching with the exact trace of the Hessian, for few dims (Hyvarinen 2005).

        objective = ExactScoreMatching(noise_std=0.1)

    A call takes a backward pass per dim, so at most 100 dims. Everything else is as in ``SlicedScoreMatching``.

    Args:
        noise_std: standard deviation of the noise on the data, >= 0, in units of the state.
        seed: of the noise: see ``Objective``.
    """

    def __init__(self, *, noise_std: float = 0.0, seed: int | None = None) -> None:
        super().__init__(noise_std, seed)

    @staticmethod
    def check_dim(dim: int) -> None:
        """Raise ValueError if states have too many dims."""
        if dim > _MOST_DIMS:
            raise ValueError(
                f"ExactScoreMatching takes a backward pass per dim, and at most {_MOST_DIMS} dims, got {dim}: use "
                "SlicedScoreMatching, or DenoisingScoreMatching"
            )

    def _directions(self, x: Tensor, draws: Draws) -> Tensor:
        dim = math.prod(x.shape[1:])
        self.check_dim(dim)
        return torch.eye(dim, dtype=x.dtype, device=x.device).reshape(dim, 1, *x.shape[1:])


def _trace(x: Tensor, gradient: Tensor, directions: Tensor) -> Tensor:
    """The sum over rows and directions of v^T H v."""
    # materialize_grads: an energy that is linear in x has no path from its gradient back to x.
    products = [
        torch.autograd.grad(gradient, x, v.expand_as(x), create_graph=True, materialize_grads=True)[0] * v
        for v in directions
    ]
    return torch.stack(products).sum()


def _warn_without_curvature(squared: Tensor, trace: Tensor) -> None:
    if squared != 0 and trace == 0:
        warnings.warn(
            "the energy has gradients and no second derivatives, so score matching only makes it flat: use a smooth "
            "activation, such as silu or softplus in place of relu, or DenoisingScoreMatching",
            stacklevel=5,
        )
