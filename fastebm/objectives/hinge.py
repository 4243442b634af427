"""The margin loss (the hinge loss of LeCun, Chopra, Hadsell, Ranzato & Huang 2006):

loss = mean_i max(0, margin + E(x_i) - E(y_i)),   x_i a row of data, y_i a sample from chains

A pair whose energies differ by the margin has no gradient, so energies stay bounded without a regulariser. In exchange
the minimum is not the law of the data.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..box import Bounds
from ..pool import ChainPool
from ..samplers.base import Sampler
from ..scalars import checked_number
from .base import Draws, Loss, mean_energies
from .negatives import ChainObjective, energies_of_both

__all__ = ["HingeLoss"]


class HingeLoss(ChainObjective):
    """The margin loss on pairs of a row and a sample, drawn as for ``ContrastiveDivergence``.

    With ``labels`` the energy is E(x, labels), and both of a pair have the same label.

    Metrics: ``energy_real`` and ``energy_samples``, the two mean energies, and ``within_margin``, the share of pairs
    that have a gradient.

    Args:
        margin: >= 0, in units of the energy.
        pool: as for ``ChainObjective``, but each process has one of its own, from which it draws a chain for each of
            its rows.
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
        margin: float = 1.0,
        backend: str = "auto",
        on_nonfinite: str = "raise",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            sampler, steps, pool=pool, start=start, clamp=clamp, backend=backend, on_nonfinite=on_nonfinite, seed=seed
        )
        if pool is not None and pool.n_local < len(pool):
            raise ValueError(
                "HingeLoss pairs each row with a sample on its own process, so it takes no pool that processes share: "
                "build the pool without process_group=, and with another seed on each process"
            )
        self.margin = checked_number("margin", margin, positive=False)

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        n, samples = draws.n_rows, self.negatives(energy, batch, labels, draws, len(batch)).x
        real, negative = energies_of_both(energy, batch, samples, labels=(labels, labels))
        excess = self.margin + real - negative
        metrics = {**mean_energies(real, negative, n), "within_margin": (excess.detach() > 0).sum() / n}
        return Loss(excess.relu().sum() / n, metrics, samples)
