"""Gradients of energies with respect to states, for losses that are functions of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..energies import energy as energies_of
from ..targets.autograd import NO_GRADIENT

__all__ = ["input_gradient", "with_all_weights"]


def input_gradient(
    energy: nn.Module, x: Tensor, *, labels: Tensor | None = None, condition: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """States, energies and gradients, from one forward pass: x (n, *shape), E(x) (n,) and dE/dx (n, *shape).

    E and dE/dx can be differentiated, with respect to the weights and to the x that is returned, also under
    ``torch.no_grad``. Arguments as for ``fastebm.energies.energy``.

    Raises:
        ValueError: the energy does not depend on x, or cuts the graph.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energies = energies_of(energy, x, labels=labels, condition=condition)
        gradient = None
        if energies.requires_grad:
            (gradient,) = torch.autograd.grad(energies.sum(), x, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(NO_GRADIENT)
    return x, energies, gradient


def with_all_weights(loss: Tensor, energies: Tensor) -> Tensor:
    """A loss of gradients dE/dx, with gradient 0 also for weights that only move the energies' level.

    DistributedDataParallel waits for the gradient of every weight, and dE/dx does not depend on the last bias.
    """
    return loss + 0.0 * energies.sum()
