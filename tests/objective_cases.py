"""Objectives and the energies that they train, for the tests that hold for all: see test_objective_cases.py."""

from functools import partial

import torch
from torch import nn

from fastebm import (
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    ExactScoreMatching,
    MLPEnergy,
    MultiLevelDenoisingScoreMatching,
    SlicedScoreMatching,
    VariancePreservingScoreMatching,
)

DIM = 3


class Conditional(nn.Module):
    """An MLP of the state and the noise level."""

    def __init__(self):
        super().__init__()
        self.net = MLPEnergy(DIM + 1, [6, 5])

    def forward(self, x, sigma):
        return self.net(torch.cat([x, sigma[:, None]], dim=1))


def mlp():
    return MLPEnergy(DIM, [6, 5])


# name: an objective, which takes seed=, and an energy that it trains.
OBJECTIVES = {
    "dsm": (partial(DenoisingScoreMatching, 0.3), mlp),
    "multi_dsm": (partial(MultiLevelDenoisingScoreMatching, [2.0, 1.0, 0.1]), Conditional),
    "multi_dsm, one energy": (partial(MultiLevelDenoisingScoreMatching, [2.0, 1.0, 0.1], sigma_0=0.3), mlp),
    "vp_dsm": (VariancePreservingScoreMatching, Conditional),
    "ssm": (partial(SlicedScoreMatching, 2, noise_std=0.1), mlp),
    "ssm, not reduced": (partial(SlicedScoreMatching, projection="gaussian", variance_reduced=False), mlp),
    "esm": (partial(ExactScoreMatching, noise_std=0.1), mlp),
    "energy_discrepancy": (partial(EnergyDiscrepancy, 0.5, 4), mlp),
}
