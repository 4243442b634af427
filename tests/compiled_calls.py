"""Energies and checks for tests of langevin_sample inside torch.compile."""

import pytest
import torch
from torch import nn

from fastebm import Activation, ClassifierEnergy, GaussianEnergy, MLPEnergy, SumEnergy

OPTIONS = {"step_size": 0.1, "noise_scale": 0.5, "steps": 5}

# inductor takes up to half a minute per test
every_compiler = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


class Counting:
    """A torch.compile backend that counts compilations."""

    def __init__(self, inner="aot_eager"):
        self.inner, self.n = torch._dynamo.lookup_backend(inner), 0

    def __call__(self, graph, inputs):
        self.n += 1
        return self.inner(graph, inputs)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def same(a, b):
    assert torch.equal(a, b), (a - b).abs().max()


def classifier():
    torch.manual_seed(2)
    return ClassifierEnergy(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)))


def every_term(labels=False):
    """A sum of every kind of term that has a closed form, nested sums included."""
    torch.manual_seed(3)
    terms = [MLPEnergy(3, (8, 4), Activation("leaky_relu", 0.2)), classifier(), GaussianEnergy(0.5, 2.0)]
    terms += [GaussianEnergy(torch.randn(3), torch.rand(3) + 1), nn.Linear(3, 1), nn.Linear(3, 1, bias=False)]
    return SumEnergy([*terms, SumEnergy([MLPEnergy(3, (8,)), nn.Linear(3, 1)], [0.3, 0.2])], torch.rand(7) + 0.1)


LABELS = torch.tensor([0, 4, 1, 1, 2])
