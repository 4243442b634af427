"""The negatives of objectives whose samples come from chains: where chains start, and how they move."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..box import Bounds, Box, uniform_states
from ..driver.arguments import checked_count
from ..driver.sample import sample
from ..driver.settings import Settings
from ..energies import energy as energies_of
from ..pool import ChainPool
from ..pool.arguments import with_clamp
from ..rng import Stream
from ..samplers.base import Sampler, checked_sampler
from .base import Draws, Objective

__all__ = ["ChainObjective", "Negatives", "energies_of_both", "inner", "joined"]

_Both = tuple[Tensor | None, Tensor | None]  # of the data, and of the samples


class Negatives(NamedTuple):
    """x: (m, *shape), the last states of m chains. labels: (m,) int64, or None."""

    x: Tensor
    labels: Tensor | None


class ChainObjective(Objective):
    """The base class of objectives whose negatives come from chains.

    Args:
        sampler: how chains move.
        steps: sampler steps per call, >= 0.
        pool: chains that go on from call to call; as many are drawn as the batch has rows. With ``labels`` it must be
            a pool with labels: the chains that are drawn have those of the batch. None: chains start anew in each call.
        start: without a pool: "data", the batch; or "noise", uniform on the sampler's clamp, or on [-1, 1] without one.
        clamp: without a pool: (lo, hi) that chains start and stay within, as a pool's. None: only the sampler's own.
        backend, on_nonfinite: as for ``langevin_sample``.
        seed: of the chains that start anew: see ``Objective``. A pool has a seed of its own.
    """

    def __init__(
        self,
        sampler: Sampler,
        steps: int,
        *,
        pool: ChainPool | None = None,
        start: str = "data",
        clamp: Bounds | None = None,
        backend: str = "auto",
        on_nonfinite: str = "raise",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.sampler, self.steps = checked_sampler(sampler), checked_count("steps", steps)
        if start not in ("data", "noise"):
            raise ValueError(f'start must be "data" or "noise", got {start!r}')
        if pool is not None and (start != "data" or clamp is not None):
            raise ValueError("start= and clamp= are for chains without a pool: a pool has its own init= and clamp=")
        Settings(backend, on_nonfinite=on_nonfinite).check()
        self.pool, self.start, self.clamp = pool, start, Box.of(clamp)
        self.backend, self.on_nonfinite = backend, on_nonfinite

    @property
    def box(self) -> Box | None:
        """The bounds of the chains, or None."""
        clamp = self.clamp if self.pool is None else self.pool.clamp
        return self.sampler.box if clamp is None else clamp

    def clamped(self, x: Tensor) -> Tensor:
        """The states within the bounds. x: (n, *shape), or (n, dim)."""
        if self.box is None:
            return x
        rows = x.flatten(1)
        return self.box.on(rows.shape[1], dtype=x.dtype, device=x.device).clamp(rows).reshape(x.shape)

    def negatives(
        self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws, n_drawn: int
    ) -> Negatives:
        """Chains moved under the energy. Arguments: those of ``Objective.loss_of``.

        n_drawn: chains to draw from a pool. If several processes share it, each gets those of its chains that were
            drawn: more or fewer than its batch has rows.
        """
        if self.pool is not None:
            if labels is None and self.pool.labels is not None:
                raise ValueError("the pool's chains have labels: pass labels=, or build the pool without")
            if labels is not None:  # a pool asks for the labels of the whole batch, the same on all processes
                labels = self.pool._processes.concatenated(labels)
            x, _ = self.pool.sample(
                inner(energy), n_drawn, self.sampler, self.steps, labels=labels, backend=self.backend,
                on_nonfinite=self.on_nonfinite,
            )  # fmt: skip
            last = self.pool.last
            return Negatives(x.to(batch.dtype), None if labels is None or last is None else last.labels)
        init, seed = batch, draws.seed()
        if self.start == "noise":
            chains = torch.arange(draws.first_row, draws.first_row + len(batch), device=batch.device)
            dim = math.prod(batch.shape[1:])
            noise = uniform_states(seed, Stream.INITIAL, chains, 0, dim, clamp=self.box, dtype=batch.dtype)
            init = noise.reshape(batch.shape)
        return Negatives(self.moved(energy, init, labels, seed, draws.first_row), labels)

    def moved(self, energy: nn.Module, init: Tensor, labels: Tensor | None, seed: int, first_row: int) -> Tensor:
        """The states of new chains after their steps, in the dtype of init: (n, *shape), chains first_row and on."""
        x = sample(
            inner(energy), with_clamp(self.sampler, self.clamp, math.prod(init.shape[1:])), init=init, labels=labels,
            steps=self.steps, seed=seed, first_chain=first_row, backend=self.backend, on_nonfinite=self.on_nonfinite,
        ).x  # fmt: skip
        return x.to(init.dtype)  # chains in half precision have float32 states


def energies_of_both(
    energy: nn.Module, batch: Tensor, samples: Tensor, *, labels: _Both = (None, None), condition: _Both = (None, None)
) -> tuple[Tensor, ...]:
    """Energies of data and of samples, from one forward pass: DistributedDataParallel allows one per backward pass.

    labels, condition: of the data and of the samples, or None.
    """
    x = torch.cat([batch, samples])
    return energies_of(energy, x, labels=joined(*labels), condition=joined(*condition)).tensor_split([len(batch)])


def joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The rows of both, if there are such."""
    return None if first is None or second is None else torch.cat([first, second])


def inner(energy: nn.Module) -> nn.Module:
    """The module itself: behind DistributedDataParallel nobody sees that it is an MLP."""
    return energy.module if isinstance(energy, nn.parallel.DistributedDataParallel) else energy
