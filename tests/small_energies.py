"""Small energies for tests of langevin_sample: MLPs, and modules that are not MLPs."""

import torch
from torch import nn

import fastebm
from fastebm import MLPEnergy

DIM = 3


class Of(nn.Module):
    """E(x) = f(x): not recognised as an MLP."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f, self.weight = f, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.f(self.weight * x)


def quadratic() -> nn.Module:
    return Of(lambda x: 0.5 * x.flatten(1).square().sum(1))


def mlp() -> nn.Module:
    """An MLP with everything that a call must leave unchanged: dropout, spectral norm's buffers, mixed modes."""
    model = MLPEnergy(DIM, (9, 8), "silu", dropout=0.3, spectral_norm=True).train()
    model[3].eval()
    return model


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 1)
    )


STEP = {"step_size": 0.1, "noise_scale": 0.3, "seed": 5}


def seeded_mlp(dim, widths=(32, 16), **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fastebm.build(dim, hidden_sizes=widths, **options)


class Square(nn.Module):
    """E(x) = |x - c|^4 / 4: not an MLP. It keeps each x that it is called with."""

    def __init__(self, dim):
        super().__init__()
        self.centre = nn.Parameter(torch.linspace(-0.5, 0.5, dim))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return (x - self.centre).flatten(1).square().sum(dim=1).square() / 4


class Beyond(nn.Module):
    """A Gaussian whose energy is this number beyond 1."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return torch.where((x > 1.0).any(dim=1), x.sum(dim=1) * 0 + self.number, x.square().sum(dim=1) / 2)
