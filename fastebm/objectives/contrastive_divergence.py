"""Contrastive divergence (Hinton 2002), with the energy regulariser of Du & Mordatch (2019)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["contrastive_divergence_loss"]


def contrastive_divergence_loss(
    real_energy: Tensor, neg_energy: Tensor, reg_alpha: float = 0.01, *, batch_size: int | None = None
) -> Tensor:
    """mean E+ - mean E- + reg_alpha (mean E+^2 + mean E-^2), a scalar.

    The first two terms have the gradient of the negative log-likelihood when the negatives follow the model;
    the last keeps energies near zero, whose level the likelihood leaves free.

    Args:
        real_energy: energies of data, (batch,) or (batch, 1).
        neg_energy: energies of samples, (batch,) or (batch, 1), computed anew: ``energy(samples)``. The samples carry
            no gradient, and neither do the energies that a sampler or a pool returns with them.
        reg_alpha: weight of the regulariser, >= 0.
        batch_size: what each side's sums are divided by for its means. None: its own number. Processes that each have
            a part of a batch, or none, give the whole's: their losses then add up to that of the whole.

    Warns:
        UserWarning: only one side has a gradient, so that only half of the loss would be learned from.
    """
    if not reg_alpha >= 0:
        raise ValueError(f"reg_alpha must be >= 0, got {reg_alpha}")
    if batch_size is None and (real_energy.numel() == 0 or neg_energy.numel() == 0):
        raise ValueError("contrastive_divergence_loss needs at least one energy on each side, got an empty tensor")

    sides = {"real_energy": real_energy, "neg_energy": neg_energy}
    without = [name for name, e in sides.items() if e.numel() > 0 and not e.requires_grad]
    if len(without) == 1 and torch.is_grad_enabled() and min(e.numel() for e in sides.values()) > 0:
        phase, argument = ("negative", "samples") if without == ["neg_energy"] else ("positive", "data")
        warnings.warn(
            f"{without[0]} carries no gradient, so the {phase} phase is lost and the loss trains on the other side "
            f"alone: pass energy({argument}), computed anew with gradients, not what a sampler or a pool returned",
            stacklevel=2,
        )

    def mean(values: Tensor) -> Tensor:
        return values.mean() if batch_size is None else values.sum() / batch_size

    regulariser = mean(real_energy.square()) + mean(neg_energy.square())
    return mean(real_energy) - mean(neg_energy) + reg_alpha * regulariser
