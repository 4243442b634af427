"""A Gaussian with independent coordinates, cut off at bounds: its draws, its log Z and its energy.

E_0(x) = sum_d z_d^2 / 2,  z_d = (x_d - mean_d) / std_d,  lo_d <= x_d <= hi_d
Z_0    = prod_d sqrt(2 pi) std_d (Phi(b_d) - Phi(a_d)),   a = (lo - mean) / std,  b = (hi - mean) / std

Phi is the distribution function of a standard normal number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..box import Box
from ..rng import Stream, normal, uniform

__all__ = ["Normal"]


class Normal:
    """A ``Target`` (targets/base.py) with a known log Z, which can be drawn from.

    Args:
        mean, std: (dim,) on the states' device and in their dtype.
        box: bounds of the states, or None.

    Raises:
        ValueError: the Gaussian has no mass within the bounds.
    """

    def __init__(self, mean: Tensor, std: Tensor, box: Box | None) -> None:
        self.mean, self.std, self.box = mean, std, box
        self.a, self.b = torch.full_like(mean, -math.inf).double(), torch.full_like(mean, math.inf).double()
        if box is not None:
            box = box.on(len(mean), dtype=mean.dtype, device=mean.device)
            self.a, self.b = ((bound - mean.double()) / std.double() for bound in box)
        # Phi is precise in its lower tail only, so bounds above the mean are mirrored.
        self.mirrored = self.a > 0
        self.a, self.b = torch.where(self.mirrored, -self.b, self.a), torch.where(self.mirrored, -self.a, self.b)
        below, above = torch.special.log_ndtr(self.a), torch.special.log_ndtr(self.b)
        inside = above + torch.log1p(-(below - above).exp())
        if not bool((inside > math.log(1e-300)).all()):
            raise ValueError(f"a Gaussian base must have mass within the clamp {box}: move its mean or raise its std")
        self.log_z = float((std.double().log() + 0.5 * math.log(2 * math.pi) + inside).sum())

    def draw(self, seed: int, chains: Tensor, step: int) -> Tensor:
        """Independent states, (n, dim). The numbers are those of these chains and this lifetime step."""
        dim, dtype = len(self.mean), self.mean.dtype
        if self.box is None:
            return self.mean + self.std * normal(seed, Stream.AIS, chains, step, dim, dtype=dtype)
        u = uniform(seed, Stream.AIS, chains, step, dim, dtype=dtype).double()
        below, above = torch.special.ndtr(self.a), torch.special.ndtr(self.b)
        z = torch.special.ndtri((below + u * (above - below)).clamp(max=1 - 2**-53))  # finite, also for u = 1
        x = self.mean + self.std * torch.where(self.mirrored, -z, z).to(dtype)
        return self.box.on(dim, dtype=dtype, device=x.device).clamp(x)

    def value(self, x: Tensor) -> Tensor:
        """E_0(x), (n,)."""
        return ((x - self.mean) / self.std).square().sum(dim=1) / 2

    def gradient(self, x: Tensor) -> Tensor:
        """dE_0/dx, (n, dim)."""
        return (x - self.mean) / self.std.square()

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E_0(x) and dE_0/dx."""
        return self.value(x), self.gradient(x)

    def repeated(self, k: int) -> Normal:
        """The energy of k copies of each chain: the same."""
        return self
