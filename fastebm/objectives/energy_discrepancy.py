"""Energy discrepancy (Schroder, Ou, Lim, Li, Vollmer & Duncan 2023): contrast data with perturbed data, without chains.

    y = x + sqrt(t) xi,   x_j = y + sqrt(t) xi_j,   j = 1 .. M
    loss = mean log( w / M + 1/M sum_j exp(E(x) - E(x_j)) )

As M grows this estimates E[E(x)] - E[E_t(y)], where exp(-E_t) is exp(-E) blurred by the same noise. For every t > 0 its
minimum is the law of the data: for t -> 0 it is score matching, and for t -> infinity maximum likelihood.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..energies import energy as energies_of
from ..scalars import checked_integer, checked_number
from .base import Draws, Loss, Objective, mean_energies

__all__ = ["EnergyDiscrepancy"]


class EnergyDiscrepancy(Objective):
    """Energy discrepancy: needs neither chains nor gradients with respect to states (Schroder et al. 2023).

        objective = EnergyDiscrepancy(t=0.25, n_negatives=16)

    Each row is compared with n_negatives perturbed copies of it, in one forward pass. The top of this file states the
    loss. The copies, (n n_negatives, *shape), are returned as the samples. Metrics: ``energy_real`` and
    ``energy_samples``, the mean energies of data and copies.

    Args:
        t: variance of each of the two perturbations, > 0, in squared units of the state. sqrt(t) is about the distance
            over which energies are compared: modes further apart get the wrong weights, and a large t needs many
            negatives.
        n_negatives: M, perturbed copies per row, >= 1.
        w: stabiliser, >= 0. It bounds the loss from below, at log(w / M). With few negatives w = 0 diverges.
        seed: of the perturbations: see ``Objective``.
    """

    def __init__(self, t: float, n_negatives: int = 16, *, w: float = 1.0, seed: int | None = None) -> None:
        super().__init__(seed=seed)
        self.t = checked_number("t", t, positive=True)
        self.n_negatives = checked_integer("n_negatives", n_negatives, least=1)
        self.w = checked_number("w", w, positive=False)

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        """labels: for an energy that takes them."""
        n, m, std = draws.n_rows, self.n_negatives, math.sqrt(self.t)
        centres = batch + std * draws.normal()
        negatives = (centres[:, None] + std * draws.normal(copies=m)).flatten(0, 1)
        if labels is not None:
            labels = torch.cat([labels, labels.repeat_interleave(m, dim=0)])
        energies = energies_of(energy, torch.cat([batch, negatives]), labels=labels)
        real, negative = energies[: len(batch)], energies[len(batch) :].reshape(-1, m)
        log_w = math.log(self.w) if self.w > 0 else -math.inf
        exponents = torch.cat([real[:, None] - negative, torch.full_like(real[:, None], log_w)], dim=1)
        loss = (exponents.logsumexp(dim=1) - math.log(m)).sum() / n
        return Loss(loss, mean_energies(real, negative, n), negatives)
