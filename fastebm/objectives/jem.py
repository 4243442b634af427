"""The joint energy model (Grathwohl et al. 2020): a classifier f whose logits are also energies,

loss = mean -log softmax(f(x))_y  +  weight (mean E(x) - mean E(samples)),   E(x) = -log sum_c exp f(x)_c

so that f models p(y | x) p(x). The samples come from chains on E(x); or, if the pool has labels, from chains on
E(x, y) = -f(x)_y with the labels of the batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..box import Bounds
from ..energies import ClassifierEnergy
from ..energies.classifier import checked_logits
from ..energies.conditions import unwrapped
from ..energies.eval_mode import reading
from ..pool import ChainPool
from ..samplers.base import Sampler
from ..scalars import checked_number
from .base import Draws, Loss, calls_of, mean_energies
from .contrastive_divergence import contrastive_divergence_loss
from .negatives import ChainObjective, energies_of_both

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
        self.weight = checked_number("weight", weight, positive=False)
        self.reg_alpha = checked_number("reg_alpha", reg_alpha, positive=False)

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        """labels: (n,) int64."""
        model = unwrapped(energy)
        if not isinstance(model, ClassifierEnergy):
            raise TypeError(f"JEM trains a classifier: wrap it, as ClassifierEnergy(classifier), got {type(model)}")
        if labels is None:
            raise ValueError("JEM trains a classifier: pass labels=, the class of each row")
        _check_labels(labels, model, batch)
        n, of_chains = draws.n_rows, labels if self.pool is not None and self.pool.labels is not None else None
        samples = self.negatives(energy, batch, of_chains, draws, n).x
        # One forward pass of the energy, which DistributedDataParallel sees, has the logits on its way.
        with calls_of([model.classifier]) as calls:
            real, negative = energies_of_both(energy, batch, samples)
        logits = calls[-1][1][: len(batch)]
        cross_entropy = nn.functional.cross_entropy(logits, labels.long(), reduction="sum") / n
        loss = cross_entropy + self.weight * contrastive_divergence_loss(real, negative, self.reg_alpha, batch_size=n)
        metrics = {
            "cross_entropy": cross_entropy.detach(),
            "accuracy": (logits.argmax(dim=1) == labels).sum() / n,
            **mean_energies(real, negative, n),
        }
        return Loss(loss, metrics, samples)


def _check_labels(labels: Tensor, model: ClassifierEnergy, batch: Tensor) -> None:
    """Check that labels are in [0, C). What the classifier makes of one row tells C."""
    if len(labels) == 0:
        return
    with reading(model):
        n_classes = checked_logits(model.classifier(batch[:1]), batch[:1]).shape[1]
    low, high = labels.min(), labels.max()
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"labels of {n_classes} classes must be 0 to {n_classes - 1}, got {low} to {high}: drop others"
        )
