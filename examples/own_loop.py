"""Persistent contrastive divergence in your own training loop: any nn.Module, any data, a pool of chains.

python examples/own_loop.py
"""

import math

import torch
from torch import nn

import fastebm


class RadialEnergy(nn.Module):
    """Not an MLP, so its gradient comes from autograd: the radius is a third input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([x, x.norm(dim=1, keepdim=True)], dim=1))


def ring(n: int, generator: torch.Generator) -> torch.Tensor:
    """Points about a circle of radius 1."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    radius = 1 + 0.1 * torch.randn(n, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def main(iterations: int = 400) -> float:
    """Trains, and returns the mean radius of the pool's chains: 1 on the ring, 1.15 if they were uniform."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    energy = RadialEnergy()
    pool = fastebm.ChainPool(2_000, 2, clamp=(-1.5, 1.5), seed=0)  # starts uniform; 5 % of each draw are reinitialised
    sampler = fastebm.Langevin.ula(step_size=0.01)  # temperature 1: the energy becomes -log p
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3, betas=(0.0, 0.999))
    for i in range(iterations):
        real = ring(200, generator)
        samples, _ = pool.sample(energy, len(real), sampler, steps=20)
        loss = fastebm.contrastive_divergence_loss(energy(real), energy(samples))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (i + 1) % 100 == 0:
            print(f"{i + 1:4d}  loss {loss.item():+.3f}  mean radius {pool.states.norm(dim=1).mean():.3f}")
    pool.advance(energy, sampler, steps=100)  # all chains, in chunks
    radius = pool.states.norm(dim=1)
    print(f"radius of {len(pool)} chains: {radius.mean():.3f} +- {radius.std():.3f} (the ring's: 1.000 +- 0.100)")
    return radius.mean().item()


if __name__ == "__main__":
    main()
