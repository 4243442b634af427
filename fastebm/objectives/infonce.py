"""InfoNCE (van den Oord, Li & Vinyals 2018): learn features by which a row is found again.

Two views a_i, b_i of each row of a batch are positive pairs, and the views of different rows are negatives:

    loss = -mean_i log( exp(-E(a_i, b_i)) / sum_j exp(-E(a_i, b_j)) ),

the cross-entropy of telling which of the n views b_j belongs to a_i. At the minimum exp(-E(a, b)) is proportional to
p(b | a) / p(b), and log n - loss is a lower bound on the mutual information of the views.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..energies import PairEnergy
from ..energies.conditions import unwrapped
from ..scalars import checked_number
from .base import Draws, Loss, Objective

__all__ = ["InfoNCE"]


class InfoNCE(Objective):
    """InfoNCE of a ``PairEnergy``, whose temperature is part of the energy.

    With several processes the rows of each are contrasted among themselves only, so the loss is that of smaller
    batches, and depends on the number of processes.

    Metrics: ``accuracy``, the part of the rows that are found again; ``energy_real`` and ``energy_samples``, mean
    energies of positive and negative pairs. Samples: None.

    Args:
        augment: (batch, draws) -> a view of each row, of the batch's shape, such as ``RandomAffine`` for images. Its
            random numbers come from ``draws`` (``Draws``). It is called twice. None: the row itself.
        noise_std: >= 0, of the normal noise that is added to each view.
        seed: see ``Objective``.
    """

    def __init__(
        self,
        *,
        augment: Callable[[Tensor, Draws], Tensor] | None = None,
        noise_std: float = 0.2,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.augment, self.noise_std = augment, checked_number("noise_std", noise_std, positive=False)

    def forward(
        self,
        energy: nn.Module,
        batch: Tensor,
        *,
        labels: Tensor | None = None,
        batch_size: int | None = None,
        first_row: int = 0,
    ) -> Loss:
        """The loss of one batch: see ``Objective``."""
        if not isinstance(unwrapped(energy), PairEnergy):
            raise TypeError(f"InfoNCE trains a PairEnergy, got {type(unwrapped(energy)).__name__}")
        rows, n = len(batch), len(batch) if batch_size is None else batch_size
        draws = self.draws(batch, first_row)
        # All pairs by one call of the module: DistributedDataParallel does not see calls of its other methods.
        energies = energy(self._view(batch, draws), self._view(batch, draws), all_pairs=True)
        own = torch.arange(rows, device=batch.device)
        loss = cross_entropy(-energies, own, reduction="sum") / n
        energies = energies.detach()
        real = energies.diagonal()
        others = (energies.sum(dim=1) - real) / max(1, rows - 1)
        metrics: dict[str, float | Tensor] = {
            "accuracy": (energies >= real[:, None]).all(dim=1).sum() / n,
            "energy_real": real.sum() / n,
            "energy_samples": others.sum() / n,
        }
        return Loss(loss, metrics)

    def _view(self, batch: Tensor, draws: Draws) -> Tensor:
        view = batch if self.augment is None else self.augment(batch, draws)
        return view + self.noise_std * draws.normal()
