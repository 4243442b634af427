"""Quadratic energies, whose fit to Gaussian data is known, and a fit to convergence."""

import torch
from torch import nn

# Gaussian data: mean and covariance.
MEAN = torch.tensor([0.7, -1.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.5, 0.6], [0.6, 0.8]], dtype=torch.float64)


def gaussian_rows(n, seed=0):
    """Rows of N(MEAN, COVARIANCE), (n, 2) float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T


class Quadratic(nn.Module):
    """E(x) = 1/2 (x - mean)^T P (x - mean) in two dims, from the wrong mean 0 and P = I."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.root = nn.Parameter(torch.eye(2, dtype=torch.float64))

    @property
    def precision(self):
        return self.root @ self.root.T

    def forward(self, x):
        return 0.5 * ((x - self.mean) @ self.root).square().sum(1)


def fit(energy, loss):
    """Minimise loss(), a function of the energy's weights without other randomness, to convergence."""
    optimizer = torch.optim.LBFGS(
        energy.parameters(), max_iter=200, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    assert all(p.grad.abs().max() < 1e-6 for p in energy.parameters())
