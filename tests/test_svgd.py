"""SVGD: a dense float64 implementation, the moments of a Gaussian, and which particles interact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastebm import SVGD, ClassifierEnergy, GaussianEnergy, MLPEnergy, SumEnergy, sample
from fastebm.samplers import svgd

pytestmark = pytest.mark.usefixtures("seeded")


def mixture(x):
    terms = [math.log(w) - (x - m).square().sum(dim=1) / 2 for w, m in ((0.3, -1.5), (0.7, 1.5))]
    return -torch.logsumexp(torch.stack(terms), dim=0)


def dense(x, energy, step_size, steps, bandwidth=None):
    """Liu & Wang's algorithm 1, pair by pair, with gradients of the kernel by autograd."""
    n = len(x)
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        distances = torch.stack([(x[i] - x[j]).norm() for i in range(n) for j in range(i)]) if n > 1 else torch.ones(1)
        h = float(distances.median()) ** 2 / math.log(n) if bandwidth is None else bandwidth
        phi = torch.zeros_like(x)
        for i in range(n):
            for j in range(n):
                other = x[j].clone().requires_grad_()
                k = torch.exp(-(other - x[i]).square().sum() / h)
                (slope,) = torch.autograd.grad(k, other)
                phi[i] += (-k.detach() * gradient[j] + slope) / n
        x = x + step_size * phi
    return x


@pytest.mark.parametrize("bandwidth", [None, 0.5])
def test_it_is_the_algorithm(bandwidth):
    init = torch.randn(12, 3, dtype=torch.float64)
    expected = dense(init, mixture, 0.3, 4, bandwidth)
    found = sample(mixture, SVGD(0.3, bandwidth), init=init, steps=4)
    assert found.x.dtype == torch.float64
    torch.testing.assert_close(found.x, expected, rtol=1e-10, atol=1e-10)
    far = init + 1e3  # distances between close particles far from 0
    in_single = sample(lambda x: mixture(x - 1e3), SVGD(0.3, bandwidth), init=far.float(), steps=4).x
    torch.testing.assert_close(in_single.double() - 1e3, expected, rtol=0, atol=2e-3)


MUTANTS = {
    "no repulsion": lambda x, gradient, bandwidth, of: of(x, gradient, bandwidth) - of(x, 0 * gradient, bandwidth),
    "half of the gradient": lambda x, gradient, bandwidth, of: of(x, gradient / 2, bandwidth),
    "twice the bandwidth": lambda x, gradient, bandwidth, of: of(x, gradient, 2 * (bandwidth or 0.5)),
}


def moments(n=200):
    """Mean and standard deviation of particles that represent a Gaussian, from a start elsewhere."""
    energy = GaussianEnergy(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.5]))
    x = sample(energy, SVGD(0.5), init=torch.randn(n, 2) * 0.1 + 3, steps=600).x
    return x.mean(dim=0), x.std(dim=0)


def test_moments_of_a_gaussian():
    mean, std = moments()
    torch.testing.assert_close(mean, torch.tensor([1.0, -2.0]), rtol=0, atol=1e-2)
    torch.testing.assert_close(std, torch.tensor([1.0, 0.5]), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_rejected(name, monkeypatch):
    right = svgd._direction
    monkeypatch.setattr(svgd, "_direction", lambda x, gradient, bandwidth: MUTANTS[name](x, gradient, bandwidth, right))
    with pytest.raises(AssertionError):
        test_it_is_the_algorithm(0.5)


def test_the_order_of_the_particles_does_not_matter():
    energy, init = SumEnergy([MLPEnergy(4, (16,)), GaussianEnergy()]), torch.randn(100, 4)
    order = torch.randperm(100)
    x = sample(energy, SVGD(0.2), init=init, steps=10).x
    torch.testing.assert_close(sample(energy, SVGD(0.2), init=init[order], steps=10).x, x[order], rtol=1e-4, atol=1e-5)


def test_no_random_number_is_used():
    init = torch.randn(20, 2)
    a, b = (sample(mixture, SVGD(0.2), init=init, steps=5, seed=seed).x for seed in (1, 2))
    assert torch.equal(a, b)


def test_one_particle_descends():
    init = torch.full((1, 2), 3.0)
    x = sample(GaussianEnergy(), SVGD(0.1), init=init, steps=10).x
    torch.testing.assert_close(x, init * 0.9**10)


def test_particles_in_one_place():
    """Distances of 0 do not count for the median."""
    init = torch.cat([torch.zeros(30, 2), torch.ones(4, 2)])
    x = sample(GaussianEnergy(), SVGD(0.1), init=init, steps=5).x
    assert bool(x.isfinite().all())
    torch.testing.assert_close(x[:30], x[:1].expand(30, 2))
    still = sample(GaussianEnergy(), SVGD(0.1), init=torch.ones(34, 2), steps=1).x
    torch.testing.assert_close(still, torch.full((34, 2), 0.9))


# -- which particles interact ---------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    def forward(self, x, condition):
        return (x - condition).square().sum(dim=1) / 2


def classifier():
    return ClassifierEnergy(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))


LABELS = torch.arange(60) % 3
TARGETS = {
    "labels": lambda: (SumEnergy([classifier(), GaussianEnergy()]), {"labels": LABELS}),
    "condition": lambda: (Conditioned(), {"condition": LABELS[:, None].float().repeat(1, 3)}),
    "frozen values": lambda: (mixture, {"frozen": torch.tensor([False, True, False])}),
    "frozen coordinates": lambda: (mixture, {"frozen": torch.eye(3, dtype=torch.bool)[LABELS]}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_particles_with_other_targets_do_not_interact(name):
    energy, given = TARGETS[name]()
    init = torch.randn(60, 3)
    init[:, 1] = LABELS.float()
    if name == "frozen coordinates":
        init[torch.eye(3, dtype=torch.bool)[LABELS]] = 0.5
    together = sample(energy, SVGD(0.2), init=init, steps=5, **given).x
    for label in range(3):
        rows = LABELS == label
        alone = sample(
            energy, SVGD(0.2), init=init[rows], steps=5,
            **{k: v[rows] if len(v) == 60 else v for k, v in given.items()},
        ).x  # fmt: skip
        torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-6)


def test_a_particle_that_stops_acts_on_no_other():
    energy = lambda x: x.square().sum(dim=1) / 2 + torch.where(x[:, 0] > 5, math.nan, 0.0) * x[:, 0]  # noqa: E731
    init = torch.randn(40, 2)
    init[7, 0] = 6.0
    others = torch.arange(40) != 7
    result = sample(energy, SVGD(0.2), init=init, steps=6, on_nonfinite="ignore")
    assert (result.info.first_bad_step >= 0).nonzero().flatten().tolist() == [7]
    assert torch.equal(result.x[7], init[7])
    alone = sample(energy, SVGD(0.2), init=init[others], steps=6)
    torch.testing.assert_close(result.x[others], alone.x, rtol=1e-5, atol=1e-6)
    shown = sample(energy, SVGD(0.2), init=init, steps=6, on_nonfinite="ignore", progress=True)
    assert torch.equal(shown.x, result.x)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0,), ValueError, "step_size must be finite and > 0, got 0.0"),
        (("1",), TypeError, "step_size must be a float or a tensor, got str"),
        ((0.1, 0.0), ValueError, "bandwidth must be a finite number > 0 or None, got 0.0"),
        ((0.1, "median"), ValueError, "bandwidth must be a finite number > 0 or None, got 'median'"),
        ((0.1, None, (1.0, 0.0)), ValueError, "clamp needs lo < hi"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        SVGD(*arguments)


def test_too_many_particles():
    with pytest.raises(ValueError, match=r"at most 20,000 may have the same target, got 20,001: use fewer chains"):
        sample(GaussianEnergy(), SVGD(0.1), 1, n_chains=20_001, steps=1)
