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
from ..energies import energy as energies_of
from ..energies.eval_mode import evaluating
from ..energies.functions import EnergyLike, as_module
from ..rng import Stream, draw_seed, normal
from ..samplers.base import Sampler
from ..scalars import checked_integer
from .base import Loss, checked_weight
from .contrastive_divergence import contrastive_divergence_loss
from .negatives import ChainObjective

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
        """The loss of one batch: see ``Objective``. With labels the energy is E(x, labels); the generator has none."""
        n = len(batch) if batch_size is None else batch_size
        draws = self.draws(batch, first_row)
        generated = self.generator(draws.normal(shape=(self.latent_dim,)))
        if generated.shape != batch.shape:
            raise ValueError(f"the generator must return {tuple(batch.shape)}, got {tuple(generated.shape)}")
        revised = self.moved(energy, self.clamped(generated.detach()), labels, draws.seed(), first_row)
        # One forward pass of both: DistributedDataParallel allows one per backward pass.
        both = None if labels is None else torch.cat([labels, labels])
        real, negative = energies_of(energy, torch.cat([batch, revised]), labels=both).chunk(2)
        teaching = (generated - revised).square().sum() / n
        loss = contrastive_divergence_loss(real, negative, self.reg_alpha, batch_size=n) + self.weight * teaching
        metrics: dict[str, float | Tensor] = {
            "energy_real": real.detach().sum() / n,
            "energy_samples": negative.detach().sum() / n,
            "teaching": teaching.detach(),
        }
        return Loss(loss, metrics, revised)

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
