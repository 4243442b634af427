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
from .base import Draws, Loss, Objective, mean_energies

__all__ = ["InfoNCE"]


class InfoNCE(Objective):
    """InfoNCE of a ``PairEnergy``, whose temperature is part of the energy.

    With several processes the rows of each are contrasted among themselves only, so the loss is that of smaller
    batches, and depends on the number of processes. Labels are not used.

    Metrics: ``accuracy``, the part of the rows that are found again, without ties; ``energy_real`` and
    ``energy_samples``, mean energies of positive and negative pairs. Samples: None.

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

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        if not isinstance(unwrapped(energy), PairEnergy):
            raise TypeError(f"InfoNCE trains a PairEnergy, got {type(unwrapped(energy)).__name__}")
        rows, n = len(batch), draws.n_rows
        if rows == 1:
            raise ValueError(
                "InfoNCE contrasts the rows of a process, so it needs at least 2, got 1: drop the last batch"
            )
        # All pairs by one call of the module: DistributedDataParallel does not see calls of its other methods.
        energies = energy(self._view(batch, draws), self._view(batch, draws), all_pairs=True)
        own = torch.arange(rows, device=batch.device)
        loss = cross_entropy(-energies, own, reduction="sum") / n
        energies = energies.detach()
        real = energies.diagonal()
        others = (energies.sum(dim=1) - real) / max(1, rows - 1)
        found = (energies > real[:, None]).sum(dim=1) == rows - 1  # a tie is not found
        return Loss(loss, {"accuracy": found.sum() / n, **mean_energies(real, others, n)})

    def _view(self, batch: Tensor, draws: Draws) -> Tensor:
        view = batch if self.augment is None else self.augment(batch, draws)
        return view + self.noise_std * draws.normal()
