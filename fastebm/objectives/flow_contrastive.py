"""Flow contrastive estimation (Gao et al. 2020): noise-contrastive estimation whose noise learns.

The noise is a normalising flow q. The energy, with its log Z, and the flow play a game on one value function,

    V = mean log sigmoid(l(data)) + mean log sigmoid(-l(samples)),    l(x) = -E(x) - log Z - log q(x).

The energy maximises V: it tells data from the flow's samples. The flow minimises V, by its density and by its samples
alike. Both have their optimum where the energy and the flow are the density of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Draws
from .flow import CouplingFlow
from .noise_contrastive import NoiseContrastiveEstimation

__all__ = ["FlowContrastiveEstimation"]


class FlowContrastiveEstimation(NoiseContrastiveEstimation):
    """Flow contrastive estimation: the energy, log Z and the flow learn together, from one loss.

        objective = FlowContrastiveEstimation(CouplingFlow(data.mean(0), data.std(0)))

    The loss is -V. Its gradient is that of -V for the energy's weights and ``log_z``, and that of V for the flow's
    weights (``noise``, parameters of the objective): one optimiser minimises all of them.

    Metrics and samples: as for ``NoiseContrastiveEstimation``. An accuracy of 1/2 means that the flow has caught up.

    Args:
        flow: the noise. Its layers may be trained before, by maximum likelihood.
        seed: see ``Objective``.
    """

    noise: CouplingFlow

    def __init__(self, flow: CouplingFlow, *, seed: int | None = None) -> None:
        if not isinstance(flow, CouplingFlow):
            raise TypeError(f"flow must be a CouplingFlow, got {flow!r}")
        super().__init__(flow, seed=seed)

    def _rows(self, batch: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        samples, log_q_samples = self.noise(draws.normal())
        log_q = torch.stack([self.noise.log_prob(batch), log_q_samples], 1)
        # All that the loss knows of the flow passes through here, so reversal here makes the flow descend on V.
        return torch.stack([batch, _reversed(samples)], 1), _reversed(log_q)


def _reversed(x: Tensor) -> Tensor:
    """x itself, whose gradient has the other sign (2x - x is exact)."""
    return 2.0 * x.detach() - x
