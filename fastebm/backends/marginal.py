"""Langevin dynamics with noise in an MLP's first layer: a step costs the same for any number of dims.

With the notation of targets/collapsed.py, let W^T = Q R, (dim, k) and (k, width), Q^T Q = I and k <= width. The MLP
sees y = x - m only through z = y Q, since y W^T = z R. The Langevin dynamics of z are those of an MLP energy of k dims
with the first weight R^T, because xi Q ~ N(0, I). The rest of y, p = y - z Q^T, feels the Gaussian term c |p|^2 / 2
alone. Steps with drifts a_t and noise of standard deviations b_t turn it into

p' = S p + sqrt(V) (zeta - zeta Q Q^T),   S = prod_t (1 - a_t c),   V = sum_t b_t^2 prod_{s > t} (1 - a_s c)^2

with zeta ~ N(0, I). So p is drawn only where a state is kept. The law of all kept states is exact. Their numbers are
not those of the ordinary steps, and depend on which states are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..rng import Noise, Stream
from ..samplers.langevin import Langevin
from ..targets.collapsed import FirstLayer, is_isotropic, width_of
from ..targets.description import Description
from . import Advanced, Chains
from .tiles import energies, multiplied

__all__ = ["applies", "run"]


def applies(sampler: Any, chains: Chains, description: Description) -> bool:
    """Whether a run draws its noise in the first layer: if asked for, possible, and narrower than x."""
    if not isinstance(sampler, Langevin) or not sampler.marginal_noise:
        return False
    plain = sampler.unbounded and sampler.preconditioner is None and chains.frozen is None
    return plain and is_isotropic(description) and width_of(description) < description.dim


def run(
    description: Description, chains: Chains, sampler: Langevin, steps: int, *,
    inner: Callable[[Description, Chains], Advanced], thin: int = 0, telemetry: bool = False,
) -> Advanced:  # fmt: skip
    """Run the steps.

    Args:
        description: the energy on the chains' device and in their dtype.
        inner: runs these steps on another energy and chains, with ``thin`` and ``telemetry``.
    """
    if steps == 0:
        return inner(description, chains)
    layer = FirstLayer(description)
    q, _ = layer.basis
    y = chains.x if layer.mean is None else chains.x - layer.mean
    z = multiplied(y, q)
    rest = y - multiplied(z, q.t())
    done = inner(layer.reduced(), chains._replace(x=z))
    noise = Noise(chains.seed, chains.numbers, chains.first_steps, y.shape[1], dtype=y.dtype, steps=steps).part(
        1, of=2
    )  # other blocks of the stream than those of z

    def whole(z: Tensor, rest: Tensor) -> Tensor:
        y = multiplied(z, q.t()) + rest
        return y if layer.mean is None else y + layer.mean

    trajectory = y.new_empty(len(y), steps // thin, y.shape[1]) if thin else None
    # The states that are kept, and, for the norm of the last gradient, the one before the last step.
    times = {*range(0, steps + 1, thin or steps), steps, *([steps - 1] if layer.curvature != 0.0 else [])}
    before = rest
    for start, stop in pairwise(sorted(times)):
        shrunk, variance = _over(sampler, layer.curvature, start, stop, steps, done.first_bad)
        zeta = noise.normal(Stream.LANGEVIN, stop - 1)
        zeta = zeta - multiplied(multiplied(zeta, q), q.t())
        rest = shrunk.to(y.dtype) * rest + variance.sqrt().to(y.dtype) * zeta
        before = rest if stop == steps - 1 else before
        if trajectory is not None and done.trajectory is not None and stop % thin == 0:
            trajectory[:, stop // thin - 1] = whole(done.trajectory[:, stop // thin - 1], rest)
    x, named = whole(done.x, rest), done.telemetry
    if named is not None:
        norm = torch.linalg.vector_norm(before, dim=1) * layer.curvature
        named = {**named, "grad_norm": torch.hypot(named["grad_norm"], norm)}
    energy = energies(description, x, chains.labels)
    return done._replace(x=x, energy=energy, trajectory=trajectory, telemetry=named, report=None)


def _over(
    sampler: Langevin, curvature: float, start: int, stop: int, steps: int, first_bad: Tensor
) -> tuple[Tensor, Tensor]:
    """S and V of the steps from start to stop - 1, (1 or n, 1) float64. A chain that stopped moves no more."""
    drifts, noise_stds = sampler.coefficients(len(first_bad), steps, dtype=torch.float64, device=first_bad.device)
    shrunk, variance = torch.ones_like(drifts[:, :1]), torch.zeros_like(drifts[:, :1])
    some_stop = bool((first_bad >= 0).any())
    for t in range(start, stop):
        kept = 1 - drifts[:, min(t, drifts.shape[1] - 1), None] * curvature
        added = noise_stds[:, min(t, noise_stds.shape[1] - 1), None] ** 2
        if some_stop:
            moves = ((first_bad < 0) | (t < first_bad))[:, None]
            kept, added = torch.where(moves, kept, 1.0), torch.where(moves, added, 0.0)
        shrunk, variance = shrunk * kept, variance * kept**2 + added
    return shrunk, variance
