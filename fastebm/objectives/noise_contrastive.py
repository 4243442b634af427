"""Noise-contrastive estimation: learn a density by telling data from noise of a known density q.

With k noise rows for each row of data, the classifier of Gutmann & Hyvarinen (2010, 2012) has the log-odds

    l(x) = -E(x) - log Z - log q(x) - log k,
    loss = -mean log sigmoid(l(data)) - k mean log sigmoid(-l(noise)),

where log Z is learned: at the minimum, p(x) = exp(-E(x) - log Z) is the density of the data. In the ranking form
(Ma & Collins 2018) each row of data x_0 competes with its own noise rows x_1 .. x_k, and log Z cancels:

    s(x) = -E(x) - log q(x),    loss = -mean log( exp s(x_0) / sum_j exp s(x_j) ).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..energies import energy as energies_of
from ..scalars import checked_integer
from .base import Draws, Loss, Objective, mean_energies
from .noise import NoiseDistribution

__all__ = ["NoiseContrastiveEstimation", "RankingNoiseContrastiveEstimation"]


class _NoiseContrastive(Objective):
    """Rows of data beside rows of noise, their energies and the noise's densities."""

    def __init__(self, noise: NoiseDistribution, n_noise: int, *, seed: int | None = None) -> None:
        super().__init__(seed=seed)
        if not isinstance(noise, NoiseDistribution):
            raise TypeError(f"noise must be a NoiseDistribution, such as GaussianNoise.fit(data), got {noise!r}")
        self.noise, self.n_noise = noise, n_noise

    def _rows(self, batch: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Each row of data followed by its noise rows, and their log-densities: (n, 1 + n_noise, *shape), two dims."""
        with torch.no_grad():
            log_q = self.noise.log_prob(batch)
            if not bool(log_q.isfinite().all()):
                zero = int((~log_q.isfinite()).sum())
                raise ValueError(f"the noise has no density at {zero} of {len(batch)} rows of data: take a wider noise")
            noise = self.noise.sample(draws, self.n_noise)
            log_q_noise = self.noise.log_prob(noise.flatten(0, 1)).reshape(noise.shape[:2])
            return torch.cat([batch[:, None], noise], 1), torch.cat([log_q[:, None], log_q_noise], 1)

    def _energies(self, energy: nn.Module, rows: Tensor, labels: Tensor | None) -> Tensor:
        """Energies of all rows in one forward pass, (n, 1 + n_noise). Noise has the label of its row of data."""
        if labels is not None:
            labels = labels.repeat_interleave(rows.shape[1])
        return energies_of(energy, rows.flatten(0, 1), labels=labels).reshape(rows.shape[:2])


class NoiseContrastiveEstimation(_NoiseContrastive):
    """Noise-contrastive estimation (Gutmann & Hyvarinen 2010): the energy and log Z of the data's density.

        objective = NoiseContrastiveEstimation(GaussianNoise.fit(data), noise_ratio=4)

    ``log_z`` is a parameter of the objective, to be optimised with the energy's weights. In many dims a network alone
    is far from any density at first: start at the noise instead, with an energy that is a network plus a Gaussian.

        base = GaussianEnergy(mean, std)  # as a term of SumEnergy([network, base])
        noise = GaussianNoise(mean, std=std)
        objective = NoiseContrastiveEstimation(noise, log_z=-noise.log_prob(mean[None]).item())

    Metrics: ``accuracy`` of the classifier p(x) > q(x) if data and noise are equally frequent: 1/2 means that the noise
    is like the data; ``log_z``; ``energy_real`` and ``energy_samples``, mean energies of data and noise. Samples: the
    noise, (n noise_ratio, *shape).

    Args:
        noise: density > 0 wherever there is data.
        noise_ratio: noise rows per row of data.
        log_z: where log Z starts.
        seed: see ``Objective``.
    """

    def __init__(
        self, noise: NoiseDistribution, *, noise_ratio: int = 1, log_z: float = 0.0, seed: int | None = None
    ) -> None:
        super().__init__(noise, checked_integer("noise_ratio", noise_ratio, least=1), seed=seed)
        if not math.isfinite(log_z):
            raise ValueError(f"log_z must be finite, got {log_z}")
        self.log_z = nn.Parameter(torch.tensor(float(log_z)))

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        n, (rows, log_q) = draws.n_rows, self._rows(batch, draws)
        energies = self._energies(energy, rows, labels)
        log_ratios = -energies - self.log_z - log_q
        log_odds = log_ratios - math.log(self.n_noise)
        loss = -(logsigmoid(log_odds[:, 0]).sum() + logsigmoid(-log_odds[:, 1:]).sum()) / n
        right = (log_ratios[:, 0] > 0).sum() + (log_ratios[:, 1:] < 0).sum() / self.n_noise
        metrics = {
            "accuracy": right / (2 * n),
            "log_z": self.log_z.detach() * (len(batch) / n),  # so that it adds up over processes, as all metrics do
            **mean_energies(energies[:, 0], energies[:, 1:], n),
        }
        return Loss(loss, metrics, rows[:, 1:].detach().flatten(0, 1))


class RankingNoiseContrastiveEstimation(_NoiseContrastive):
    """The ranking form (Ma & Collins 2018): find the row of data among its noise rows. log Z is not needed.

    Metrics: ``accuracy``, the part of the rows of data that rank first; ``energy_real``, ``energy_samples``. Samples:
    the noise, (n n_noise, *shape).

    Args:
        noise: density > 0 wherever there is data.
        n_noise: noise rows that each row of data competes with. A larger number brings the estimate closer to maximum
            likelihood.
        seed: see ``Objective``.
    """

    def __init__(self, noise: NoiseDistribution, *, n_noise: int = 10, seed: int | None = None) -> None:
        super().__init__(noise, checked_integer("n_noise", n_noise, least=1), seed=seed)

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        n, (rows, log_q) = draws.n_rows, self._rows(batch, draws)
        energies = self._energies(energy, rows, labels)
        scores = -energies - log_q
        loss = -scores.log_softmax(dim=1)[:, 0].sum() / n
        first = scores[:, 0] > scores[:, 1:].amax(dim=1)
        metrics = {"accuracy": first.sum() / n, **mean_energies(energies[:, 0], energies[:, 1:], n)}
        return Loss(loss, metrics, rows[:, 1:].flatten(0, 1))
