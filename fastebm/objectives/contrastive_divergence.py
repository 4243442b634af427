"""Contrastive divergence (Hinton 2002; Tieleman 2008), with the energy regulariser of Du & Mordatch (2019).

loss = mean E(data) - mean E(samples) + reg_alpha (mean E(data)^2 + mean E(samples)^2)
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..driver.sample import sample
from ..energies import energy as energies_of
from ..pool import ChainPool
from ..samplers.base import Sampler
from .base import Loss, Objective

__all__ = ["ContrastiveDivergence", "contrastive_divergence_loss"]


class ContrastiveDivergence(Objective):
    """Contrastive divergence as an objective: it draws the negatives, and returns the loss of a batch.

        objective = ContrastiveDivergence(Langevin.ula(0.01), steps=20, pool=ChainPool(10_000, 2, clamp=(-2, 2)))
        loss, metrics, samples = objective(energy, batch)
        loss.backward()

    Metrics: ``energy_real`` and ``energy_samples``, the two mean energies.

    Args:
        sampler: how chains move.
        steps: sampler steps per call.
        pool: chains that go on from call to call; as many are drawn as the batch has rows. None: chains start at the
            batch (Hinton's CD-k).
        reg_alpha: weight of the regulariser, >= 0.
        backend, on_nonfinite: as for ``langevin_sample``.
        seed: of the chains that start at the batch: see ``Objective``. A pool has a seed of its own.
    """

    def __init__(
        self,
        sampler: Sampler,
        steps: int,
        *,
        pool: ChainPool | None = None,
        reg_alpha: float = 0.01,
        backend: str = "auto",
        on_nonfinite: str = "raise",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.sampler, self.steps, self.pool = sampler, steps, pool
        self.reg_alpha, self.backend, self.on_nonfinite = reg_alpha, backend, on_nonfinite

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
        n = len(batch) if batch_size is None else batch_size
        samples = self._negatives(energy, batch, n, first_row)
        # One forward pass of both: DistributedDataParallel allows one per backward pass.
        energies = energies_of(energy, torch.cat([batch, samples]))
        real, negative = energies[: len(batch)], energies[len(batch) :]
        loss = contrastive_divergence_loss(real, negative, self.reg_alpha, batch_size=n)
        metrics: dict[str, float | Tensor] = {
            "energy_real": real.detach().sum() / n,
            "energy_samples": negative.detach().sum() / n,
        }
        return Loss(loss, metrics, samples)

    def _negatives(self, energy: nn.Module, batch: Tensor, n: int, first_row: int) -> Tensor:
        # The module itself: behind the wrapper nobody sees that it is an MLP.
        model = energy.module if isinstance(energy, nn.parallel.DistributedDataParallel) else energy
        if self.pool is not None:
            return self.pool.sample(
                model, n, self.sampler, self.steps, backend=self.backend, on_nonfinite=self.on_nonfinite
            )[0]
        return sample(
            model, self.sampler, init=batch, steps=self.steps, seed=self.draws(batch).seed(), first_chain=first_row,
            backend=self.backend, on_nonfinite=self.on_nonfinite,
        ).x  # fmt: skip


def contrastive_divergence_loss(
    real_energy: Tensor, neg_energy: Tensor, reg_alpha: float = 0.01, *, batch_size: int | None = None
) -> Tensor:
    """mean E+ - mean E- + reg_alpha (mean E+^2 + mean E-^2), a scalar.

    If the negatives follow the model, the first two terms have the gradient of the negative log-likelihood. The last
    one keeps energies near zero: the likelihood does not depend on their level.

    Args:
        real_energy: energies of data, (batch,) or (batch, 1).
        neg_energy: energies of samples, (batch,) or (batch, 1), computed as ``energy(samples)``. The energies that a
            sampler or a pool returns with its samples carry no gradient, so they can't be used here.
        reg_alpha: weight of the regulariser, >= 0.
        batch_size: what the sums of each side are divided by to give its means. None: the number of its energies.
            Processes that each hold a part of a batch, which may be empty, pass the size of the whole batch: the sum
            of their losses is then the loss of the whole batch.

    Warns:
        UserWarning: one side carries no gradient, so half of the loss would have no effect.
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
            f"alone: pass energy({argument}), computed with gradients, not what a sampler or a pool returned",
            stacklevel=2,
        )

    def mean(values: Tensor) -> Tensor:
        return values.mean() if batch_size is None else values.sum() / batch_size

    regulariser = mean(real_energy.square()) + mean(neg_energy.square())
    return mean(real_energy) - mean(neg_energy) + reg_alpha * regulariser
