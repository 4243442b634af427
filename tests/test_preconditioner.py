"""Langevin's preconditioner: the law on a Gaussian, honoured on every path, and never taken by a kernel."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from laws import double, standard_normal
from torch import nn

from fastebm import (
    ChainPool,
    ContrastiveDivergence,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    SumEnergy,
    langevin_sample,
    sample,
)
from fastebm.rng import Noise
from fastebm.samplers import langevin
from fastebm.targets.base import View

pytestmark = pytest.mark.usefixtures("seeded")

ALPHA = 1e-6  # of each test of a law
N = 20_000
MATRIX = np.array([[1.5, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.8]])
C = np.array([0.5, 1.0, 2.5])


class Quadratic(nn.Module):
    def forward(self, x):
        return ((x @ torch.tensor(MATRIX, dtype=x.dtype)) * x).sum(dim=1) / 2


def stationary_covariance(step_size, c):
    """b^2 [aP (2I - aP)]^-1 in the coordinates y = x / sqrt(C), whose precision is P = sqrt(C) MATRIX sqrt(C)."""
    root = np.diag(np.sqrt(c))
    a, precision = step_size / 2, root @ MATRIX @ root
    return root @ (step_size * np.linalg.inv(a * precision @ (2 * np.eye(3) - a * precision))) @ root


def law(step_size, c):
    """The least p-value of the stationary law, times the number of tests."""
    preconditioner = None if c is None else torch.tensor(c)
    x = sample(Quadratic(), Langevin(step_size, preconditioner=preconditioner), init=torch.zeros(N, 3),
               steps=round(30 / step_size), seed=4).x  # fmt: skip
    covariance = stationary_covariance(step_size, np.ones(3) if c is None else c)
    p = standard_normal(np.linalg.solve(np.linalg.cholesky(covariance), double(x).T).T)
    return min(p) * len(p)


@pytest.mark.parametrize("c", [None, C], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("step_size", [0.8, 0.4])
def test_stationary_law_of_a_gaussian(step_size, c):
    assert law(step_size, c) > ALPHA


MUTANTS = {
    "noise without sqrt(C)": (
        Noise, "normal",
        lambda self, stream, t, draw=Noise.normal: draw(self, stream, t) / torch.tensor(C).float().sqrt(),
    ),
    "drift without C": (View, "gradient", lambda self, x, of=View.gradient: of(self, x) / torch.tensor(C).float()),
    "C squared": (langevin, "diagonal_at", lambda name, value, x, at=langevin.diagonal_at: at(name, value, x) ** 2),
    "no C": (langevin, "diagonal_at", lambda name, value, x: torch.ones(3)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_rejects_mutants(name, monkeypatch):
    monkeypatch.setattr(*MUTANTS[name])
    assert law(0.8, C) < ALPHA


@pytest.mark.parametrize("c", [np.ones(3), C], ids=["plain", "preconditioned"])
def test_the_bias_is_of_first_order(c):
    """By the formula, which the samples above have."""
    coarse, fine = (stationary_covariance(step, c) - np.linalg.inv(MATRIX) for step in (0.02, 0.01))
    np.testing.assert_allclose(coarse, 2 * fine, rtol=0, atol=0.02 * np.abs(coarse).max())


# -- every path -----------------------------------------------------------------------------------------------------

MLP = lambda: SumEnergy([MLPEnergy(3, (8,)), GaussianEnergy()])  # noqa: E731
OPTIONS = {
    "plain": {},
    "clips": {"grad_clip": 0.8, "grad_norm_clip": 1.0},
    "clamp": {"clamp": (-0.8, 0.8)},
    "noise first": {"noise_first": True, "clamp": (-0.8, 0.8), "clamp_noise": True, "grad_clip": 0.8},
    "schedule": {"noise_scale": torch.linspace(1.0, 0.1, 6)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [MLP, Quadratic], ids=["mlp", "autograd"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_number_is_a_factor_of_the_step_size(backend, make, options):
    energy, c = make(), 1.7
    given = {"input_size": 3, "steps": 6, "seed": 1, "backend": backend}
    frozen = torch.tensor([False, True, False])
    expected, told = langevin_sample(energy, rule=Langevin(0.2 * c, **{"noise_scale": 1.0, **options}), frozen=frozen,
                                     return_info=True, **given)  # fmt: skip
    for value in (c, torch.tensor(c), torch.full((3,), c)):
        rule = Langevin(0.2, preconditioner=value, **options)
        found, info = langevin_sample(energy, rule=rule, frozen=frozen, return_info=True, **given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(info.clipped, told.clipped)
        torch.testing.assert_close(info.clamped, told.clamped)
        torch.testing.assert_close(info.grad_norm, told.grad_norm, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sample(energy, rule, frozen=frozen, **given).x, found, rtol=0, atol=0)


def test_a_diagonal_is_the_formula():
    """In float64, with both clips before C."""
    x, c = torch.randn(5, 3, dtype=torch.float64), torch.tensor(C)
    rule = Langevin(0.3, 0.0, grad_clip=0.7, grad_norm_clip=1.0, preconditioner=c)
    gradient = (x @ torch.tensor(MATRIX)).clamp(-0.7, 0.7)
    gradient = gradient * (1 / gradient.norm(dim=1, keepdim=True)).clamp(max=1.0)
    expected = x - 0.15 * c * gradient
    torch.testing.assert_close(langevin_sample(Quadratic(), rule, init=x, steps=1), expected, rtol=1e-12, atol=1e-12)


def test_no_fused_kernel_takes_it_and_the_reason_is_said(device):
    for make in (MLP, Quadratic):
        info = sample(make(), Langevin(0.1, preconditioner=2.0), 3, steps=1).info
        assert info.why_not_fused is not None
        assert info.backend == "torch"
    with pytest.raises(ValueError, match=r"can't run: Langevin with a preconditioner has no fused kernel"):
        sample(Quadratic(), Langevin(0.1, preconditioner=2.0), 3, steps=1, backend="triton", device=device)
    assert "Langevin with a preconditioner has no fused kernel" in (
        sample(MLP(), Langevin(0.1, preconditioner=2.0), 3, steps=1).info.why_not_fused
    )
    assert "with a preconditioner" not in sample(MLP(), Langevin(0.1), 3, steps=1).info.why_not_fused


@pytest.mark.parametrize("position", ["input_size", "rule"])
def test_a_compiled_call_honours_it(position):
    """It runs uncompiled: the operator of a compiled call has no preconditioner."""
    energy, rule = MLPEnergy(3, (8,)), Langevin(0.1, preconditioner=torch.tensor(C))

    def f(x):
        return langevin_sample(energy, init=x, steps=3, seed=1, **{position: rule})

    x = torch.randn(4, 3)
    torch._dynamo.reset()
    found = torch.compile(f, backend="eager")(x)
    assert torch.equal(found, f(x))
    assert not torch.equal(found, langevin_sample(energy, dataclasses.replace(rule, preconditioner=None), init=x,
                                                  steps=3, seed=1))  # fmt: skip
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without a preconditioner"):
        torch.compile(f, backend="eager", fullgraph=True)(x)


def test_pools_and_objectives_honour_it():
    """A number is a factor of the step size there too."""
    states = []
    for rule in (Langevin(0.2, preconditioner=1.7), Langevin(0.34)):
        torch.manual_seed(0)
        energy, pool = MLP(), ChainPool(100, 3, seed=1, clamp=(-1.0, 1.0))
        pool.sample(energy, 40, rule, 5)
        pool.advance(energy, rule, 5)
        loss = ContrastiveDivergence(rule, steps=4, pool=pool)(energy, torch.zeros(40, 3))
        states += [pool.states.clone(), loss.loss.detach()]
    torch.testing.assert_close(states[0], states[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[1], states[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Langevin(0.1, preconditioner=0.0), ValueError, "preconditioner must be finite and > 0, got 0.0"),
        (lambda: Langevin(0.1, preconditioner="1"), TypeError, "preconditioner must be None, a number or a tensor"),
        (lambda: Langevin(0.1, preconditioner=torch.tensor([1.0, -1.0])), ValueError, "got a tensor with -1.0"),
        (
            lambda: langevin_sample(MLPEnergy(3, (8,)), Langevin(0.1, preconditioner=torch.ones(2)), steps=1),
            ValueError,
            "preconditioner must be a number or have one value for each of the 3 dims",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()
