"""Measures of an energy on laws with a known answer: Stein discrepancies, likelihoods, quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.special import logsumexp
from torch import nn

import fastebm
from fastebm import GaussianEnergy, MLPEnergy, evaluate


def stein_sum(x, score, c, b):
    """The mean of u over pairs of two rows, and over all pairs, by derivatives of the kernel in float64 autograd."""

    def u(p, q, sp, sq):
        def kernel(p, q):
            return (c * c + (p - q).square().sum()) ** b

        dp, dq = torch.func.grad(kernel, 0)(p, q), torch.func.grad(kernel, 1)(p, q)
        trace = torch.func.jacrev(torch.func.grad(kernel, 0), 1)(p, q).trace()
        return sp @ sq * kernel(p, q) + sp @ dq + sq @ dp + trace

    pairs = torch.stack(
        [torch.stack([u(x[i], x[j], score[i], score[j]) for j in range(len(x))]) for i in range(len(x))]
    )
    return float((pairs.sum() - pairs.trace()) / (len(x) * (len(x) - 1))), float(pairs.mean())


@pytest.mark.parametrize(("c", "exponent"), [(1.0, -0.5), (2.0, -0.3)])
def test_stein_discrepancy_by_its_definition(c, exponent, monkeypatch, untouched):
    torch.manual_seed(0)
    model = MLPEnergy(3, (8,), dropout=0.5).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    score = -torch.autograd.grad(model.eval()(leaf).sum(), leaf)[0]
    unbiased, mean = stein_sum(x, score, c, exponent)
    with untouched(model.train(), x):
        found = evaluate.kernel_stein_discrepancy(model, x, c=c, exponent=exponent)
    assert found.unbiased == pytest.approx(unbiased, rel=1e-10)
    assert found.root == pytest.approx(math.sqrt(mean), rel=1e-10)
    monkeypatch.setattr("fastebm.evaluate.stein._PAIRS", 15)  # two rows at once
    assert evaluate.kernel_stein_discrepancy(model, x, c=c, exponent=exponent) == pytest.approx(found, rel=1e-10)


def test_stein_discrepancy_of_a_shifted_gaussian():
    """For draws of N(m, I) and the energy of N(0, I), KSD^2 = |m|^2 E k(x, x'), where |x - x'|^2 / 2 is chi-squared."""
    rng = np.random.default_rng(1)
    n, dim = 3000, 3
    x = torch.from_numpy(rng.normal(size=(n, dim)))
    energy = GaussianEnergy(0.0, torch.ones(dim))
    # Degenerate at m = 0: the error of the U-statistic falls like 1 / n, and E u(x, x) = E|s|^2 - 2 b d = 6.
    exact = evaluate.kernel_stein_discrepancy(energy, x)
    assert abs(exact.unbiased) < 5 * 6 / n
    assert exact.root == pytest.approx(math.sqrt(6 / n), rel=0.5)

    mean_kernel = integrate.quad(lambda s: (1 + 2 * s) ** -0.5 * stats.chi2(dim).pdf(s), 0, math.inf)[0]
    shift = torch.tensor([0.6, 0.0, -0.8])
    shifted = evaluate.kernel_stein_discrepancy(energy, x + shift)
    assert shifted.unbiased == pytest.approx(mean_kernel, abs=5 * 0.025)  # the deviation over 12 seeds
    assert shifted.root**2 == pytest.approx(shifted.unbiased, abs=0.01)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(1, 2), {}, r"\(n, \*shape\) with n >= 2, floating-point, got \(1, 2\)"),
        (torch.zeros(5, 2).long(), {}, "torch.int64"),
        (torch.full((5, 2), math.nan), {}, "samples must be finite, and 5 rows are not"),
        (torch.zeros(5, 2), {"c": 0.0}, "c must be finite and > 0, got 0"),
        (torch.zeros(5, 2), {"exponent": -1.0}, r"exponent must be in \(-1, 0\), got -1.0"),
    ],
)
def test_stein_discrepancy_refuses(x, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.kernel_stein_discrepancy(GaussianEnergy(0.0, [1.0, 1.0]), x, **options)


# -- likelihoods --------------------------------------------------------------------------------------------


def test_quadrature_of_a_gaussian_and_of_its_part_in_a_box():
    energy = GaussianEnergy([0.5, -1.0], [0.75, 1.5]).double()
    assert evaluate.log_z_by_quadrature(energy, (-20.0, 20.0)) == pytest.approx(
        math.log(2 * math.pi * 1.125), abs=1e-10
    )
    inside = [np.diff(stats.norm(m, s).cdf([-1.0, 2.0]))[0] for m, s in ((0.5, 0.75), (-1.0, 1.5))]
    expected = math.log(2 * math.pi * 1.125 * math.prod(inside))
    assert evaluate.log_z_by_quadrature(energy, (-1.0, 2.0), panels=4) == pytest.approx(expected, abs=1e-10)
    box = torch.tensor([-1.0, -math.inf]), torch.tensor([2.0, 1.0])
    with pytest.raises(ValueError, match="finite bounds"):
        evaluate.log_z_by_quadrature(energy, box)
    narrow = torch.tensor([-1.0, -30.0]), torch.tensor([2.0, 30.0])  # one pair of bounds per dim
    assert evaluate.log_z_by_quadrature(energy, narrow) == pytest.approx(
        math.log(2 * math.pi * 1.125 * inside[0]), abs=1e-9
    )


def test_quadrature_does_not_overflow():
    """exp(1000) is infinite, and its logarithm is not."""
    energy = nn.Sequential(nn.Linear(2, 1))
    nn.init.zeros_(energy[0].weight)
    nn.init.constant_(energy[0].bias, -1000.0)
    assert evaluate.log_z_by_quadrature(energy, (0.0, 2.0)) == pytest.approx(1000 + math.log(4))


@pytest.mark.parametrize(
    ("panels", "nodes", "error"), [(0, 8, ValueError), (4, 0, ValueError), (4, 2.5, TypeError), (True, 8, TypeError)]
)
def test_quadrature_refuses(panels, nodes, error):
    with pytest.raises(error, match="must be"):
        evaluate.log_z_by_quadrature(GaussianEnergy(0.0, [1.0, 1.0]), (0.0, 1.0), panels=panels, nodes=nodes)


def test_held_out_likelihood_of_a_gaussian():
    """The mean over rows of the exact log density, within the bracket and the errors of log Z."""
    mean, std = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.7, 1.5, 1.0])
    energy = GaussianEnergy(mean, std)
    log_z = fastebm.log_partition(energy, n_temperatures=100, n_chains=256, seed=0)
    x = mean + std * torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    exact = stats.norm(mean, std).logpdf(x).sum(1)
    found = evaluate.held_out_likelihood(energy, x, log_z)
    assert found.upper == pytest.approx(exact.mean(), abs=5 * log_z.standard_error)
    assert found.lower == pytest.approx(exact.mean(), abs=5 * log_z.upper_error)
    assert (found.upper_error, found.lower_error) == (log_z.lower_error, log_z.upper_error)
    assert found.upper - found.lower == pytest.approx(log_z.upper - log_z.lower)
    assert found.standard_error == pytest.approx(exact.std() / math.sqrt(500), rel=0.01)
    assert found.n_outside == 0


def test_held_out_rows_outside_the_clamp_are_counted():
    energy = GaussianEnergy(0.0, [1.0, 1.0])
    log_z = fastebm.log_partition(
        energy, sampler=fastebm.MALA(0.5, clamp=(-1.0, 1.0)), n_temperatures=20, n_chains=64, seed=0
    )
    x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.0, 1.5]])
    assert evaluate.held_out_likelihood(energy, x, log_z).n_outside == 1
    with pytest.raises(ValueError, match="got 3 rows, 0 inside it"):
        evaluate.held_out_likelihood(energy, x + 5.0, log_z)


def test_kernel_density_of_a_gaussian():
    """The estimate loses a little against the truth: with 1,000 rows in the plane, a few hundredths of a nat."""
    rng = np.random.default_rng(2)
    train, x = rng.normal(size=(1000, 2)), rng.normal(size=(500, 2))
    log_density, bandwidth = evaluate.kernel_density(train, x)
    truth = stats.norm.logpdf(x).sum(1)
    assert 0 < (truth - log_density).mean() < 0.1
    assert 0.1 < bandwidth < 0.6  # Scott's rule: 0.32
    scaled, wider = evaluate.kernel_density(10 * train, 10 * x)
    assert scaled == pytest.approx(log_density - 2 * math.log(10), abs=1e-6)
    assert wider == pytest.approx(10 * bandwidth)


@pytest.mark.parametrize("dim", [30, 784])
def test_kernel_density_by_its_definition(dim):
    """Far from 0, and in a dim where scikit-learn's KernelDensity is wrong by hundreds of nats."""
    rng = np.random.default_rng(3)
    train, x = 1e3 + rng.normal(size=(200, dim)), 1e3 + rng.normal(size=(50, dim))
    log_density, h = evaluate.kernel_density(train, x)
    kernels = stats.norm.logpdf(x[:, None], train, h).sum(2)
    assert log_density == pytest.approx(logsumexp(kernels, axis=1) - math.log(200), abs=1e-8)

    # The bandwidth is the best in cross-validation: that of the two other ends is worse.
    def of_held_out(bandwidth):
        return logsumexp(stats.norm.logpdf(x[:, None], train, bandwidth).sum(2), axis=1).mean()

    assert of_held_out(h) > max(of_held_out(h / 2), of_held_out(2 * h))


def test_kernel_density_refuses():
    with pytest.raises(ValueError, match="needs at least 3 rows in the first set, got 2"):
        evaluate.kernel_density(np.zeros((2, 2)), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="states of one dim, got 2 and 3"):
        evaluate.kernel_density(np.zeros((9, 2)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="all training rows are equal"):
        evaluate.kernel_density(np.full((9, 2), 0.1), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="max_rows must be >= 3, got 2"):
        evaluate.kernel_density(np.zeros((9, 2)), np.zeros((4, 2)), max_rows=2)


@pytest.mark.parametrize("clamp", [None, (0.0, 1.0)])
def test_bits_per_dim_of_the_uniform_density(clamp):
    """On [0, 1] with 4 levels up from 0, the cells of 0 and 4 are half as wide. Without a clamp the cells cover
    [-1/8, 9/8], so that the uniform density on it gives every level log2(5) bits."""
    k = torch.arange(5).repeat(3, 1)
    states, volumes = evaluate.uniform_in_cells(k, 4, torch.Generator().manual_seed(0), clamp)
    assert torch.equal((states * 4).round(), k.float())
    log_density = torch.full((3,), 5 * math.log(1.0 if clamp else 4 / 5), dtype=torch.float64)
    bits = evaluate.bits_per_dim(log_density, volumes, 5)
    expected = (3 * math.log2(4) + 2 * math.log2(8)) / 5 if clamp else math.log2(5)
    assert bits.tolist() == pytest.approx([expected] * 3)
    if clamp:
        assert ((states >= 0) & (states <= 1)).all()


def test_states_are_uniform_in_their_cells():
    k = torch.tensor([[0, 2]]).expand(4000, 2)
    states, _ = evaluate.uniform_in_cells(k, 2, torch.Generator().manual_seed(0), (0.0, 1.0))
    for column, lo, hi in ((0, 0.0, 0.25), (1, 0.75, 1.0)):
        assert stats.kstest(states[:, column], stats.uniform(lo, hi - lo).cdf).pvalue > 1e-5


def test_bits_per_dim_refuses():
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(4,\)"):
        evaluate.bits_per_dim(torch.zeros(3), torch.zeros(4), 5)
    with pytest.raises(ValueError, match="lie outside the clamp"):
        evaluate.uniform_in_cells(torch.tensor([[0, 4]]), 4, torch.Generator(), (0.0, 0.5))
    for level in (9, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="levels_of_rows must be integers 0 to 4, got"):
            evaluate.uniform_in_cells(torch.tensor([[0, level]]), 4, torch.Generator())
    with pytest.raises(ValueError, match="levels must be >= 1, got 0"):
        evaluate.uniform_in_cells(torch.tensor([[0]]), 0, torch.Generator())
    with pytest.raises(ValueError, match="dim must be >= 1, got 0"):
        evaluate.bits_per_dim(torch.zeros(3), torch.zeros(3), 0)
