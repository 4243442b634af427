"""The definition of correct: K Langevin steps in plain PyTorch, for any energy, on any device.

Every other path is compared with this one. Read it as documentation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rng import Stream, normals_of_steps
from ..samplers.langevin import Langevin
from ..targets.autograd import Energy
from . import Advanced, Chains, Telemetry

__all__ = ["advance"]


def advance(
    energy: Energy, chains: Chains, rule: Langevin, steps: int, *, thin: int = 0, telemetry: bool = False
) -> Advanced:
    """thin: keep the state after every thin-th step; 0: of none."""
    x, frozen = chains.x, chains.frozen
    n_chains, dim = x.shape
    a, b = (c.expand(-1, steps) for c in rule.coefficients(n_chains, steps, dtype=x.dtype, device=x.device))
    bounds = rule.bounds(dim, dtype=x.dtype, device=x.device)
    noise_bounds = bounds if rule.clamp_noise else None
    first_bad = torch.full((n_chains,), -1, dtype=torch.int32, device=x.device)
    trajectory = x.new_empty(n_chains, steps // thin, dim) if thin else None
    grad_norm, clipped, clamped = x.new_full((n_chains,), torch.nan), x.new_zeros(n_chains), x.new_zeros(n_chains)
    noises = normals_of_steps(
        int(chains.seed), Stream.LANGEVIN, chains.numbers, chains.first_steps, steps, dim, dtype=x.dtype
    )

    def settled(x: Tensor, moved: Tensor, bounds: Any, t: int) -> tuple[Tensor, Tensor]:
        """Where chains that were to go from x to moved are, and (n_chains,) whether the clamp changed that."""
        if frozen is not None:
            moved = torch.where(frozen, x, moved)
        bad = ~moved.isfinite().all(dim=1)  # tested before the clamp, which would turn infinity into a bound
        first_bad[bad & (first_bad < 0)] = t
        alive = first_bad < 0
        new = moved if bounds is None else moved.clamp(*bounds)
        if frozen is not None:
            new = torch.where(frozen, x, new)
        return torch.where(alive[:, None], new, x), alive & (new != moved).any(dim=1)

    for t, noise in enumerate(noises):
        a_t, b_t = a[:, t, None], b[:, t, None]
        if rule.noise_first:
            x, _ = settled(x, x + b_t * noise, noise_bounds, t)
        grad = energy.gradient(x, chains.beside)
        if frozen is not None:
            grad = grad.masked_fill(frozen, 0.0)
        moved = x - a_t * rule.clip(grad) if rule.noise_first else rule.update(x, grad, noise, a_t, b_t)
        x, at_bounds = settled(x, moved, bounds, t)
        grad_norm = grad.square().sum(dim=1).sqrt()
        clipped += (first_bad < 0) & (rule.clip(grad) != grad).any(dim=1)
        clamped += at_bounds
        if trajectory is not None and (t + 1) % thin == 0:
            trajectory[:, t // thin] = x
    told = Telemetry(grad_norm, clipped / max(steps, 1), clamped / max(steps, 1)) if telemetry else None
    return Advanced(x, energy(x, chains.beside), first_bad, trajectory, told)
