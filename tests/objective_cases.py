"""Objectives and the energies that they train, for the tests that hold for all: see test_objective_cases.py."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from fastebm import (
    JEM,
    ChainPool,
    ClassifierEnergy,
    ContrastiveDivergence,
    CooperativeTraining,
    CouplingFlow,
    DenoisingScoreMatching,
    DiffusionRecoveryLikelihood,
    EnergyDiscrepancy,
    ExactScoreMatching,
    FlowContrastiveEstimation,
    GaussianNoise,
    HingeLoss,
    Langevin,
    MixtureNoise,
    MLPEnergy,
    MultiLevelDenoisingScoreMatching,
    NoiseContrastiveEstimation,
    RankingNoiseContrastiveEstimation,
    SlicedScoreMatching,
    VariancePreservingScoreMatching,
)

DIM, ROWS = 3, 12
LABELS = torch.arange(ROWS) % 3  # for energies that are classifiers


class Conditional(nn.Module):
    """An MLP of the state and the noise level."""

    def __init__(self):
        super().__init__()
        self.net = MLPEnergy(DIM + 1, [6, 5])

    def forward(self, x, sigma):
        return self.net(torch.cat([x, sigma[:, None]], dim=1))


def mlp():
    return MLPEnergy(DIM, [6, 5])


def classifier():
    return ClassifierEnergy(MLPEnergy(DIM, [6, 5], outputs=3))


def a_flow(dim, n_layers=3, width=8):
    """A flow that is not the identity, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dim)
        flow = CouplingFlow(torch.full((dim,), 0.5), 1.5, n_layers=n_layers, width=width)
        for p in flow.parameters():
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return flow


def flow_contrastive(seed):
    return FlowContrastiveEstimation(a_flow(DIM), seed=seed)


def cooperative(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = nn.Linear(2, DIM)
    return CooperativeTraining(generator, Langevin(0.1), 2, latent_dim=2, seed=seed)


def on_shared_pool(objective, **options):
    """A way to make the objective, with a pool that all processes share."""

    def make(seed):
        group, labels = dist.group.WORLD if dist.is_initialized() else None, torch.arange(3 * ROWS) % 3
        pool = ChainPool(3 * ROWS, DIM, labels=labels, seed=1, process_group=group)
        return objective(Langevin(0.1), 2, pool=pool, seed=seed, **options)

    return make


GAUSSIAN = GaussianNoise(torch.zeros(DIM), std=1.5)
MIXTURE = MixtureNoise([1.0, 2.0], torch.tensor([[-1.0] * DIM, [1.0] * DIM]), torch.eye(DIM).expand(2, DIM, DIM))

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
    "nce": (partial(NoiseContrastiveEstimation, GAUSSIAN, noise_ratio=2), mlp),
    "ranking_nce": (partial(RankingNoiseContrastiveEstimation, MIXTURE, n_noise=4), mlp),
    "flow_contrastive": (flow_contrastive, mlp),
    "cd": (partial(ContrastiveDivergence, Langevin(0.1), 2), mlp),
    "cd, penalised": (partial(ContrastiveDivergence, Langevin(0.1), 2, start="noise", gradient_penalty=0.3), mlp),
    "cd, classes": (partial(ContrastiveDivergence, Langevin(0.1), 2), classifier),
    "jem": (partial(JEM, Langevin(0.1), 2, weight=0.5), classifier),
    "hinge": (partial(HingeLoss, Langevin(0.5), 2), mlp),
    "cooperative": (cooperative, mlp),
    "diffusion_recovery": (partial(DiffusionRecoveryLikelihood, [2.0, 1.0, 0.5], 2), Conditional),
}

# As above. A call draws the chains of the whole batch, so that only real processes share it.
SHARED_POOLS = {
    "cd, shared pool": (on_shared_pool(ContrastiveDivergence, gradient_penalty=0.1), classifier),
    "jem, shared pool": (on_shared_pool(JEM), classifier),
}
