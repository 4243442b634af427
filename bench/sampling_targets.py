"""The laws on which samplers are compared: energy, start, and functions of the states whose means are known exactly."""

from __future__ import annotations

from functools import cache

import torch
from fastebm.bench.cases import SamplingCase
from fastebm.bench.problem import SEED, Banana, Gaussian, Mixture, gradient_of, make_energy
from torch import Tensor, nn

from fastebm import GaussianEnergy, MLPEnergy, SumEnergy

CONDITION, DISTANCE = 100.0, 5.0  # of the Gaussian, and between the modes of the mixture
# Of the training by denoising score matching (Vincent 2011), from `blurred` data.
NOISE, TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 0.4, 600, 256, 1e-3
BASE_STD = 2.0  # of the Gaussian term, which makes the trained energy proper


class Target:
    """A law exp(-E) on a CPU, in float32. x0: (n_chains, dim), the start of every contestant's chains.

    seed: of the start, and of the contestants.
    """

    def __init__(self, case: SamplingCase, seed: int = SEED) -> None:
        self.case, self.seed, self.energy = case, seed, energy_of(case.kind, case.dim, case.widths)
        self.x0 = self.start(case.n_chains, torch.Generator().manual_seed(seed))

    def start(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, dim) draws of the law, by which the chains need no burn-in. "mlp": of its training data, close to it.
        "random mlp": of its quadratic term."""
        energy, dim = self.energy, self.case.dim
        z = torch.randn(n, dim, generator=generator)
        if isinstance(energy, Gaussian):
            covariance = torch.linalg.inv(energy.precision.double())
            return z @ torch.linalg.cholesky(covariance).T.float()
        if isinstance(energy, Mixture):
            return z + energy.means[torch.arange(n) % 2]
        if isinstance(energy, Banana):
            return energy.draw(z)
        if self.case.kind == "random mlp":
            return z
        return blurred(z) + NOISE * torch.randn(n, dim, generator=generator)

    def values(self, x: Tensor) -> Tensor:
        """E(x), (n,), as peers in PyTorch take an energy."""
        value: Tensor = self.energy(x)
        return value.reshape(len(x))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Functions of the states and their exact means: f (..., k) of x (..., dim), and (k,), in float64.

        Every coordinate and its square, and for the mixture the sign of the first coordinate, which is its mode. For an
        MLP nothing but Stein's identities is known: E[dE/dx_i] = 0 and E[x_i dE/dx_i] = 1, by parts.
        """
        x, zeros = x.double(), torch.zeros(self.case.dim, dtype=torch.float64)
        if isinstance(self.energy, SumEnergy):
            gradient = torch.cat([gradient_of(self.energy, rows) for rows in x.flatten(0, -2).split(8192)]).reshape(
                x.shape
            )
            return torch.cat([gradient, x * gradient], dim=-1), torch.cat([zeros, zeros + 1])
        if isinstance(self.energy, Gaussian):
            variances = torch.linalg.inv(self.energy.precision.double()).diagonal()
        elif isinstance(self.energy, Banana):
            variances = torch.tensor(self.energy.variances, dtype=torch.float64)
        else:
            variances = 1 + self.energy.means[0].double().square()
            x = torch.cat([x, x[..., :1].sign()], dim=-1)
            return torch.cat([x, x[..., :-1].square()], dim=-1), torch.cat([zeros, zeros[:1], variances])
        return torch.cat([x, x.square()], dim=-1), torch.cat([zeros, variances])


@cache
def energy_of(kind: str, dim: int, widths: tuple[int, ...]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mlp":
            return trained(dim, widths)
        made = {
            "gaussian": lambda: Gaussian(dim, CONDITION),
            "banana": Banana,
            "mixture": lambda: Mixture(dim, DISTANCE),
            "random mlp": lambda: SumEnergy([make_energy("mlp", dim, widths, torch.device("cpu")), GaussianEnergy()]),
        }[kind]()
    return made.eval().requires_grad_(False)


def blurred(z: Tensor) -> Tensor:
    """Standard normals (n, dim) -> training data: curved, and with scales from 0.3 to 1.5."""
    scales = torch.logspace(-0.5, 0.2, z.shape[1])
    return scales * (z + 0.5 * (z.roll(1, dims=1).square() - 1))


def trained(dim: int, widths: tuple[int, ...]) -> nn.Module:
    """A Gaussian plus an MLP, trained by denoising score matching on ``blurred`` data: the same on every call."""
    energy = SumEnergy([MLPEnergy(dim, widths), GaussianEnergy(std=BASE_STD)])
    optimizer = torch.optim.Adam(energy.parameters(), LEARNING_RATE)
    for _ in range(TRAINING_STEPS):
        noise = torch.randn(BATCH_SIZE, dim)
        x = (blurred(torch.randn(BATCH_SIZE, dim)) + NOISE * noise).requires_grad_()
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        loss = (NOISE * gradient - noise).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return energy.eval().requires_grad_(False)
