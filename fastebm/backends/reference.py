"""The definition of correct: K Langevin steps in plain PyTorch, for any energy, on any device.

Every other path is compared with this one. Read it as documentation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..energies import Energy
from ..langevin import Langevin
from ..noise import Stream, normal
from . import Advanced

__all__ = ["advance"]


def advance(
    energy: Energy, x: Tensor, rule: Langevin, steps: int, *, seed: int, chains: Tensor, first_steps: Tensor
) -> Advanced:
    """x: (n_chains, dim); chains, first_steps: (n_chains,) int64 global numbers and lifetime steps."""
    n_chains, dim = x.shape
    a, b = (c.expand(-1, steps) for c in rule.coefficients(n_chains, steps, dtype=x.dtype, device=x.device))
    first_bad = torch.full((n_chains,), -1, dtype=torch.int32, device=x.device)
    for t in range(steps):
        noise = normal(seed, Stream.LANGEVIN, chains, first_steps + t, dim, dtype=x.dtype)
        moved = rule.update(x, energy.gradient(x), noise, a[:, t, None], b[:, t, None])
        bad = ~moved.isfinite().all(dim=1)  # tested before the clamp, which would turn infinity into a bound
        first_bad[bad & (first_bad < 0)] = t
        if rule.clamp is not None:
            moved = moved.clamp(*rule.clamp)
        x = torch.where((first_bad < 0)[:, None], moved, x)
    return Advanced(x, energy(x), first_bad)
