"""Cooperative learning by MCMC teaching (Xie, Lu, Gao & Wu 2018): an energy E and a generator g learn together.

z ~ N(0, I),   y = g(z),   y' = y after some steps of the sampler under E
loss = mean E(x) - mean E(y')  +  weight mean ||g(z) - y'||^2

The generator starts the energy's chains, and learns what the chains change. z is the one that made y: no steps infer
it anew from y'.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..box import Bounds
from ..energies.eval_mode import evaluating
from ..energies.functions import EnergyLike, as_module
from ..rng import Stream, draw_seed, normal
from ..samplers.base import Sampler
from ..scalars import checked_integer, checked_number
from .base import Draws, Loss, mean_energies
from .contrastive_divergence import contrastive_divergence_loss
from .negatives import ChainObjective, energies_of_both

__all__ = ["CooperativeTraining"]


class CooperativeTraining(ChainObjective):
    """Train an energy and a generator, whose weights are parameters of this module.

    The first term has a gradient for the energy's weights only, and the second for the generator's only.

    Metrics: ``energy_real`` and ``energy_samples``, the two mean energies, and ``teaching``, the mean of
    ||g(z) - y'||^2.

    Args:
        generator: (n, latent_dim) -> (n, *shape).
        sampler, steps: how chains move, and for how long.
        latent_dim: >= 1.
        weight: of the generator's term, > 0 unless the generator is to stay as it is.
        clamp: (lo, hi) that the chains stay within. None: only the sampler's own.
        reg_alpha: weight of the regulariser of ``contrastive_divergence_loss``, >= 0.
        backend, on_nonfinite: as for ``langevin_sample``.
        seed: of z and of the chains.
    """

    def __init__(
        self,
        generator: EnergyLike,
        sampler: Sampler,
        steps: int,
        *,
        latent_dim: int,
        weight: float = 1.0,
        clamp: Bounds | None = None,
        reg_alpha: float = 0.01,
        backend: str = "auto",
        on_nonfinite: str = "raise",
        seed: int | None = None,
    ) -> None:
        super().__init__(sampler, steps, clamp=clamp, backend=backend, on_nonfinite=on_nonfinite, seed=seed)
        self.generator = as_module(generator, "generator")
        self.latent_dim = checked_integer("latent_dim", latent_dim, least=1)
        self.weight = checked_number("weight", weight, positive=False)
        self.reg_alpha = checked_number("reg_alpha", reg_alpha, positive=False)

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        """With labels the energy is E(x, labels); the generator has none."""
        n = draws.n_rows
        generated = self.generator(draws.normal(shape=(self.latent_dim,)))
        if generated.shape != batch.shape:
            raise ValueError(f"the generator must return {tuple(batch.shape)}, got {tuple(generated.shape)}")
        revised = self.moved(energy, self.clamped(generated.detach()), labels, draws.seed(), draws.first_row)
        real, negative = energies_of_both(energy, batch, revised, labels=(labels, labels))
        teaching = (generated - revised).square().sum() / n
        loss = contrastive_divergence_loss(real, negative, self.reg_alpha, batch_size=n) + self.weight * teaching
        return Loss(loss, {**mean_energies(real, negative, n), "teaching": teaching.detach()}, revised)

    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """What the generator makes of n new z: (n, *shape), without a graph. Chains of the energy may go on from it.

        seed: 64-bit seed of z. None: drawn from torch's global CPU generator.
        """
        like = next(self.generator.parameters(), torch.empty(0))
        rows = torch.arange(checked_integer("n", n, least=0), device=like.device)
        z = normal(draw_seed(seed), Stream.INITIAL, rows, 0, self.latent_dim, dtype=like.dtype)
        with evaluating(self.generator), torch.no_grad():
            generated: Tensor = self.generator(z)
        return generated
