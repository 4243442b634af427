"""Sums of energies and classes: exact laws of the states, as in test_laws.py."""

import math

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import Launch
from laws import double, standard_normal, two_sided
from paths import CLASSES, REGIMES, advance, network
from scipy import stats
from torch import nn

from fastebm import ClassifierEnergy, GaussianEnergy, Langevin, SumEnergy
from fastebm.backends import Chains
from fastebm.targets.description import describe

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

ALPHA = 1e-5
FEW = 100_000 if torch.cuda.is_available() else 4096
MEAN, STD = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.8, 1.0, 1.5])
EPS, STEPS_OF_LAW = 1.0, 48


def by(path):
    """A run on this path, by few large programs: in the interpreter a program costs the same at any size."""

    def run(energy, x0, sampler, steps, labels):
        counters = {
            "seed": 21,
            "numbers": torch.arange(len(x0)),
            "first_steps": torch.zeros(len(x0), dtype=torch.int64),
        }
        if labels is not None:
            counters["labels"] = labels
        if path not in REGIMES:
            return advance(path, energy, x0, sampler, steps, counters).x
        description = describe(energy, labels=labels is not None)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        chains = Chains(x0.to(device), **{k: v if k == "seed" else v.to(device) for k, v in counters.items()})
        launch = Launch(path, 64 if device == "cuda" else 4096, 16, 4, 1)
        done = runs.fused_mlp(
            description.to(torch.device(device), torch.float32), chains, sampler, steps, precision="ieee", launch=launch
        )
        return done.x.cpu()

    return run


LAW_PATHS = (
    pytest.param("torch", 100_000, marks=pytest.mark.slow),
    ("resident", FEW),
    pytest.param("streaming", FEW, marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("path", "n_chains"), LAW_PATHS)
def test_stationary_law_of_a_gaussian_term(path, n_chains):
    """With drift eps/2 and noise std sqrt(eps) the variance is s^2 / (1 - eps / (4 s^2)), and not s^2."""
    energy = SumEnergy([network(3, [4]), GaussianEnergy(MEAN, STD)], [0.0, 1.0])
    contraction = 1 - EPS / (2 * STD.double() ** 2)
    assert contraction.abs().max() ** (2 * STEPS_OF_LAW) < 1e-9
    x = by(path)(energy, torch.zeros(n_chains, 3), Langevin.ula(EPS), STEPS_OF_LAW, None).double() - MEAN
    stationary = STD.double() ** 2 / (1 - EPS / (4 * STD.double() ** 2))
    assert min(p := standard_normal(double(x / stationary.sqrt()))) > ALPHA / len(LAW_PATHS) / 2 / len(p)
    total = float((x / STD).square().sum())
    assert stats.chi2.sf(total, 3 * n_chains) < 1e-20, "the test could not tell s^2 from it"


@pytest.mark.parametrize(("path", "n_chains"), LAW_PATHS)
def test_law_of_each_class(path, n_chains):
    """Logits w_y x + b_y and a Gaussian: label y has the Gaussian's law with its mean moved by s^2 w_y."""
    body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, CLASSES))
    with torch.no_grad():
        body[0].weight.copy_(torch.eye(3))
        body[0].bias.fill_(1e3)  # every ReLU is on, so that the network is affine
        body[2].weight.copy_(torch.tensor([[1.0, 0.0, -0.5], [-1.0, 0.7, 0.0], [0.3, -0.6, 0.4]]))
        body[2].bias.copy_(torch.tensor([0.1, -0.2, 5.0]))
        slopes = body[2].weight.double()
    energy, steps = SumEnergy([ClassifierEnergy(body), GaussianEnergy(MEAN, STD)]), 6
    labels = torch.arange(n_chains) * 5 % CLASSES
    x = by(path)(energy, torch.zeros(n_chains, 3), Langevin.ula(EPS), steps, labels).double()
    contraction, variance = 1 - EPS / (2 * STD.double() ** 2), STD.double() ** 2
    target = MEAN + variance * slopes[labels]
    mean = target - contraction**steps * target
    spread = EPS * (1 - contraction ** (2 * steps)) / (1 - contraction**2)
    w = double((x - mean) / spread.sqrt())
    p = standard_normal(w)
    p += [
        two_sided(w[labels == y][:, j].sum() / math.sqrt(int((labels == y).sum())))
        for y in range(CLASSES)
        for j in range(3)
    ]
    assert min(p) > ALPHA / len(LAW_PATHS) / 2 / len(p)
    wrong = double((x - mean.roll(1, 0)) / spread.sqrt())
    assert min(standard_normal(wrong)) < 1e-20, "the test could not tell the labels apart"
