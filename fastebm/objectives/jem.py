"""The joint energy model (Grathwohl et al. 2020): a classifier f whose logits are also energies,

loss = mean -log softmax(f(x))_y  +  weight (mean E(x) - mean E(samples)),   E(x) = -log sum_c exp f(x)_c

so that f models p(y | x) p(x). The samples come from chains on E(x); or, if the pool has labels, from chains on
E(x, y) = -f(x)_y with the labels of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..box import Bounds
from ..energies import ClassifierEnergy
from ..energies import energy as energies_of
from ..energies.conditions import unwrapped
from ..pool import ChainPool
from ..samplers.base import Sampler
from .base import Loss, calls_of, checked_weight
from .contrastive_divergence import contrastive_divergence_loss
from .negatives import ChainObjective

__all__ = ["JEM"]


class JEM(ChainObjective):
    """Train a classifier and its energy together. The energy is a ``ClassifierEnergy``, and ``labels`` are required.

    Metrics: ``cross_entropy``, ``accuracy``, and the two mean energies, ``energy_real`` and ``energy_samples``.

    Args:
        weight: of contrastive divergence, >= 0.
        pool: as for ``ChainObjective``. A pool with labels has class-conditional chains.
        reg_alpha: weight of the regulariser of ``contrastive_divergence_loss``, >= 0; 0 in the paper.
        sampler, steps, start, clamp, backend, on_nonfinite, seed: see ``ChainObjective``.
    """

    def __init__(
        self,
        sampler: Sampler,
        steps: int,
        *,
        pool: ChainPool | None = None,
        start: str = "data",
        clamp: Bounds | None = None,
        weight: float = 1.0,
        reg_alpha: float = 0.0,
        backend: str = "auto",
        on_nonfinite: str = "raise",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            sampler, steps, pool=pool, start=start, clamp=clamp, backend=backend, on_nonfinite=on_nonfinite, seed=seed
        )
        self.weight, self.reg_alpha = checked_weight("weight", weight), checked_weight("reg_alpha", reg_alpha)

    def forward(
        self,
        energy: nn.Module,
        batch: Tensor,
        *,
        labels: Tensor | None = None,
        batch_size: int | None = None,
        first_row: int = 0,
    ) -> Loss:
        """The loss of one batch: see ``Objective``. labels: (n,) int64."""
        model = unwrapped(energy)
        if not isinstance(model, ClassifierEnergy):
            raise TypeError(f"JEM trains a classifier: wrap it, as ClassifierEnergy(classifier), got {type(model)}")
        if labels is None:
            raise ValueError("JEM trains a classifier: pass labels=, the class of each row")
        n = len(batch) if batch_size is None else batch_size
        of_chains = labels if self.pool is not None and self.pool.labels is not None else None
        samples = self.negatives(energy, batch, of_chains, self.draws(batch, first_row), n, first_row).x
        # One forward pass of the energy, which DistributedDataParallel sees, has the logits on its way.
        with calls_of([model.classifier]) as calls:
            energies = energies_of(energy, torch.cat([batch, samples]))
        real, negative = energies[: len(batch)], energies[len(batch) :]
        logits = calls[-1][1][: len(batch)]
        cross_entropy = nn.functional.cross_entropy(logits, labels, reduction="sum") / n
        loss = cross_entropy + self.weight * contrastive_divergence_loss(real, negative, self.reg_alpha, batch_size=n)
        metrics: dict[str, float | Tensor] = {
            "cross_entropy": cross_entropy.detach(),
            "accuracy": (logits.argmax(dim=1) == labels).sum() / n,
            "energy_real": real.detach().sum() / n,
            "energy_samples": negative.detach().sum() / n,
        }
        return Loss(loss, metrics, samples)
