"""Diffusion recovery likelihood (Gao, Song, Poole, Wu & Kingma 2021), for an energy E(x, sigma) of noisy data.

Noise levels sigma_1 > ... > sigma_L, of which a row gets one of the last L - 1 at random:

x = data + sigma_k xi,   y = x + s xi',   s^2 = sigma_{k-1}^2 - sigma_k^2         so y has the noise of the level before
p(x | y) ~ exp(-E(x, sigma_k) - ||x - y||^2 / (2 s^2))                            x is recovered from y
loss = mean over rows of E(x, sigma_k) - E(x', sigma_k),   x' from Langevin steps on p(. | y) that start at y

The recovery posterior is much closer to a Gaussian than exp(-E) is, so a few steps sample it. The steps have the size
(step_scale s)^2. To generate, start from N(0, sigma_1^2), and sample the posteriors of all levels in turn.

The paper scales states so that their variance stays 1. Here noise is only added: exp(-E(x, sigma)) is then the density
of the data blurred by sigma, as for ``AnnealedLangevin`` and denoising score matching.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..driver.arguments import state_shape
from ..driver.result import SampleResult
from ..driver.sample import sample
from ..driver.settings import Settings
from ..energies import energy as energies_of
from ..energies import first_tensor
from ..rng import Stream, draw_seed, normal
from ..samplers.annealed import checked_sigmas
from ..samplers.langevin import Langevin
from ..scalars import checked_integer, checked_number
from .base import Draws, Loss, Objective, mean_energies
from .contrastive_divergence import contrastive_divergence_loss
from .negatives import energies_of_both, inner

__all__ = ["DiffusionRecoveryLikelihood"]


class DiffusionRecoveryLikelihood(Objective):
    """Train a noise-conditional energy, ``energy(x, sigma)`` with sigma of (n,), by recovering data from more noise.

    Metrics: ``energy_real`` and ``energy_samples``, the two mean energies.

    Args:
        sigmas: at least two noise levels, decreasing and > 0. The first should be much larger than the data's standard
            deviation, so that blurred data are close to N(0, sigma_1^2), and the last smaller than the data's details.
        sampler_steps: Langevin steps per level, >= 1.
        step_scale: > 0. A step has the size (step_scale s)^2, so a chain moves by s in about 1 / step_scale^2 steps.
            Chains explode unless it is well below 2 sigma_k / sigma_{k-1}, for all levels.
        reg_alpha: weight of the regulariser of ``contrastive_divergence_loss``, >= 0; 0 in the paper.
        on_nonfinite: as for ``langevin_sample``.
        seed: see ``Objective``.
    """

    def __init__(
        self,
        sigmas: Sequence[float] | Tensor,
        sampler_steps: int,
        *,
        step_scale: float = 0.3,
        reg_alpha: float = 0.0,
        on_nonfinite: str = "raise",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.sigmas = checked_sigmas(sigmas)
        if len(self.sigmas) < 2:
            raise ValueError(f"sigmas must be two or more noise levels, got {sigmas!r}")
        self.step_scale = checked_number("step_scale", step_scale, positive=True)
        self.sampler_steps = checked_integer("sampler_steps", sampler_steps, least=1)
        Settings(on_nonfinite=on_nonfinite).check()
        self.reg_alpha, self.on_nonfinite = checked_number("reg_alpha", reg_alpha, positive=False), on_nonfinite

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        """labels: refused, as the noise level is the energy's condition."""
        if labels is not None:
            raise ValueError("diffusion recovery gives the energy a noise level as its condition: leave labels= out")
        levels = (draws.uniform() * (len(self.sigmas) - 1)).ceil().long()  # uniform on 1 .. L - 1
        sigma, s = self._noise_of(levels, batch)
        by_row = (-1, *[1] * (batch.ndim - 1))
        x = batch + sigma.reshape(by_row) * draws.normal()
        noisy = x + s.reshape(by_row) * draws.normal()
        samples = self._recovered(energy, noisy, sigma, s, seed=draws.seed(), first_row=draws.first_row).x
        samples = samples.to(batch.dtype)  # chains in half precision have float32 states
        real, negative = energies_of_both(energy, x, samples, condition=(sigma, sigma))
        loss = contrastive_divergence_loss(real, negative, self.reg_alpha, batch_size=draws.n_rows)
        return Loss(loss, mean_energies(real, negative, draws.n_rows), samples)

    def sample(self, energy: nn.Module, n: int, input_size: int | Sequence[int], *, seed: int | None = None) -> Tensor:
        """New samples, at the last noise level: (n, *shape).

        Args:
            input_size: number of dims or shape of one state.
            seed: 64-bit seed. None: drawn from torch's global CPU generator.
        """
        shape, seed, like = state_shape(input_size), draw_seed(seed), first_tensor(energy)
        dtype, device = (torch.float32, torch.device("cpu")) if like is None else (like.dtype, like.device)
        rows = torch.arange(checked_integer("n", n, least=0), device=device)
        x = self.sigmas[0] * normal(seed, Stream.INITIAL, rows, 0, math.prod(shape), dtype=dtype).reshape(n, *shape)
        result: SampleResult | None = None
        for level in range(1, len(self.sigmas)):
            sigma, s = self._noise_of(torch.full_like(rows, level), x)
            result = self._recovered(energy, x, sigma, s, seed=seed, first_row=0, previous=result)
            x = result.x
        return x

    def _noise_of(self, levels: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The noise level of each row, and the standard deviation of the noise between it and the level before."""
        sigmas = torch.tensor(self.sigmas, dtype=like.dtype, device=like.device)
        sigma, before = sigmas[levels], sigmas[levels - 1]
        return sigma, (before.square() - sigma.square()).sqrt()

    def _recovered(
        self, energy: nn.Module, noisy: Tensor, sigma: Tensor, s: Tensor, *, seed: int, first_row: int,
        previous: SampleResult | None = None,
    ) -> SampleResult:  # fmt: skip
        """Chains on the recovery posterior of each row, which start there. previous: whose noise they go on with."""
        sampler = Langevin((self.step_scale * s[:, None]) ** 2, 1.0)
        condition = torch.cat([sigma[:, None], s[:, None], noisy.flatten(1)], dim=1)
        start = {"init": noisy, "seed": seed, "first_chain": first_row} if previous is None else {"init": previous}
        return sample(
            _RecoveryPosterior(inner(energy)), sampler, steps=self.sampler_steps, condition=condition,
            on_nonfinite=self.on_nonfinite, **start,
        )  # fmt: skip


class _RecoveryPosterior(nn.Module):
    """E(x, sigma) + ||x - y||^2 / (2 s^2) as an energy of x. The condition of each chain is (sigma, s, y)."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        sigma, s, noisy = condition[:, 0], condition[:, 1], condition[:, 2:]
        distance = (x.flatten(1) - noisy).square().sum(dim=1)
        return energies_of(self.energy, x, condition=sigma) + distance / (2 * s.square())
