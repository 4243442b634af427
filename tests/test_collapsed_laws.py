"""Exact laws of samplers whose steps run in the first layer of an MLP energy, and mutants that they reject.

E(x) = f(e . y) + |y|^2 / (2 s^2),  y = x - m,  e a unit vector and f an MLP. So t = e . y has the density
exp(-f(t) - t^2 / (2 s^2)), by quadrature, and the other dims are Gaussian. Langevin moves t by t' = t - drift (f'(t)
+ t / s^2) + noise_std xi, so its law after each number of steps follows by quadrature too.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import runs
import torch
from laws import standard_normal
from scipy import stats
from torch import nn

from fastebm import HMC, MALA, GaussianEnergy, Langevin, SumEnergy
from fastebm.backends import Chains, cpu_collapsed
from fastebm.samplers import collapsed
from fastebm.samplers.collapsed_langevin import CollapsedLangevin
from fastebm.targets.collapsed import Collapsed, FirstLayer
from fastebm.targets.description import describe

N, DIM, STEPS, STD = 20_000, 9, 6, 0.8
ALPHA = 1e-5  # of all laws together
MEAN = torch.linspace(-1, 1, DIM)
AXES = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
SAMPLERS = {"HMC": HMC(0.55, 3), "MALA": MALA(0.5), "Langevin": Langevin(0.5)}
GRID = np.linspace(-6 * STD, 6 * STD, 1201)


def make_energy(factor=1.0):
    """factor: of the first weight."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(DIM, 10), nn.Tanh(), nn.Linear(10, 6), nn.SiLU(), nn.Linear(6, 1))
        for p in model.parameters():
            p.mul_(3.0)
        along = 2 * torch.randn(10, 1)
        model[0].weight.copy_(factor * along * AXES[0].float())
        model[0].bias.sub_(factor * along[:, 0] * (AXES[0].float() @ MEAN))  # so that f sees t
    return SumEnergy([model, GaussianEnergy(MEAN, STD)])


def of_grid(energy):
    """E and dE/dt on GRID, along e."""
    t = torch.tensor(GRID).requires_grad_()
    value = energy.double()(MEAN.double() + t[:, None] * AXES[0])
    (slope,) = torch.autograd.grad(value.sum(), t)
    energy.float()
    return value.detach().numpy(), slope.numpy()


def cumulative(density):
    """The distribution function on GRID."""
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return total / total[-1]


def exact_law(energy):
    """Distribution function of t under exp(-E)."""
    value, _ = of_grid(energy)
    return cumulative(np.exp(value.min() - value))


def law_of_langevin(energy, drift, noise_std):
    """Distribution function of t after STEPS steps from t = 0, and the deviation of the other dims."""
    _, slope = of_grid(energy)
    moved = GRID - drift * slope
    kernel = stats.norm.pdf(GRID[:, None], moved, noise_std) * (GRID[1] - GRID[0])
    density = stats.norm.pdf(GRID, np.interp(0.0, GRID, moved), noise_std)
    for _ in range(STEPS - 1):
        density = kernel @ density
    kept = 1 - drift / STD**2
    return cumulative(density), noise_std * math.sqrt(sum(kept ** (2 * i) for i in range(STEPS)))


def least_p(name, energy=None, factor=1.0):
    """The least p-value of the law, times the number of tests. energy: which was made with this factor."""
    energy, sampler = energy or make_energy(factor), SAMPLERS[name]
    if sampler.exact:  # from the law itself, which each step must leave as it is
        law, std = exact_law(energy), STD
        generator = np.random.default_rng(1)
        along = torch.tensor(np.interp(generator.random(N), law, GRID))
        others = torch.tensor(generator.normal(0.0, STD, (N, DIM - 1)))
    else:
        law, std = law_of_langevin(energy, sampler.step_size / 2, sampler.step_size**0.5)
        along, others = torch.zeros(N).double(), torch.zeros(N, DIM - 1).double()
    x = (MEAN + torch.cat([along[:, None], others], dim=1) @ AXES).float()
    chains = Chains(x, 7, torch.arange(N), torch.zeros(N, dtype=torch.int64))
    done = runs.collapsed(describe(energy), chains, sampler, STEPS, kernels="numba")
    y = ((done.x.double() - MEAN) @ AXES.T).numpy()
    p = [stats.kstest(y[:, 0], lambda t: np.interp(t, GRID, law)).pvalue, *standard_normal(y[:, 1:] / std)]
    return min(p) * len(p)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_law_is_exact(name):
    assert least_p(name) > ALPHA / 6


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_law_is_that_of_changed_weights(name):
    """Weights are written through .data between two runs, which no version counter sees."""
    energy = make_energy()
    least_p(name, energy)
    other = make_energy(0.4)
    assert least_p(name, other) > ALPHA / 6
    for p, new in zip(energy.parameters(), other.parameters(), strict=True):
        p.data.copy_(new.data)
    assert least_p(name, energy) == least_p(name, other)


# -- mutants ------------------------------------------------------------------------------------------------------

FAST = cpu_collapsed._Collapsed  # what a CPU runs in float32
ZERO = torch.zeros(1)


def stale_gram(patch):
    patch.setattr(FirstLayer, "gram", FirstLayer(describe(make_energy(0.7))).gram)


def changed(owner, name, change):
    """A mutant: the result of a method, changed."""
    own = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda self, *given: change(own(self, *given), *given))


def without_alpha(patch):
    own = FAST.arrived
    patch.setattr(
        FAST,
        "arrived",
        lambda self, *starts: own(self, *starts[:-1], starts[-1]._replace(alpha_1=0 * starts[-1].alpha_1)),
    )


def kicks_without_the_gaussian(patch):
    def leap(self, leaps, own=FAST._leap):
        for call in self.leaps:
            call.aim(curvature=0)
        own(self, leaps)

    patch.setattr(FAST, "_leap", leap)


def slopes_without_a(patch):
    own = Collapsed._project
    patch.setattr(Collapsed, "_project", lambda self, base, a: own(self, base, 0 * a))


def a_without_the_gaussian(patch):
    class Step(cpu_collapsed._Step):
        def __init__(self, target, coefficients, chains):
            super().__init__(target, coefficients, chains)
            for call in self.pushes:
                call.aim(shrunk=ZERO)

    patch.setattr(cpu_collapsed, "_Step", Step)


def square_of_the_start(patch):
    own = collapsed._squares
    patch.setattr(collapsed, "_squares", lambda layer, old, *rest: (old.square, own(layer, old, *rest)[1]))


# The samplers whose law rejects each mutant.
MUTANTS = {
    "G of earlier weights": (stale_gram, ["HMC", "MALA", "Langevin"]),
    "momentum not projected": (changed(FAST, "momenta", lambda vq, *given: (vq[0], 0 * vq[1])), ["HMC", "MALA"]),
    "no Gaussian term in kicks": (kicks_without_the_gaussian, ["HMC", "MALA"]),
    "no Gaussian term": (
        changed(CollapsedLangevin, "_drift", lambda drift, *given: drift._replace(shrunk=0 * drift.shrunk)),
        ["Langevin"],
    ),
    "no Gaussian term in a": (a_without_the_gaussian, ["Langevin"]),
    "wrong sign of a W": (
        lambda patch: patch.setattr(
            Collapsed, "put_together", lambda self, base, a, own=Collapsed.put_together: own(self, base, -a)
        ),
        ["HMC", "MALA", "Langevin"],
    ),
    "alpha dropped": (without_alpha, ["HMC", "MALA"]),
    "pull not updated": (lambda patch: patch.setattr(FAST, "_pull", lambda self: None), ["HMC", "MALA"]),
    "no kinetic energy of B": (
        changed(FAST, "arrived", lambda end, *given: end._replace(of_b=0 * end.of_b)), ["HMC", "MALA"]
    ),
    "|y|^2 of the start": (square_of_the_start, ["HMC", "MALA"]),
    "slopes without a": (slopes_without_a, ["Langevin"]),
}  # fmt: skip


@pytest.mark.parametrize(("mutant", "name"), [(m, name) for m, (_, names) in MUTANTS.items() for name in names])
def test_the_law_rejects_mutants(mutant, name, monkeypatch):
    MUTANTS[mutant][0](monkeypatch)
    assert least_p(name) < ALPHA / 6
