"""Exact laws: the distribution of the chains after n steps, with no tolerance other than Monte-Carlo error.

A law is a function of a run. It returns p-values, each uniform (or larger) if the run is correct. All tests of this
file together raise a false alarm with probability ALPHA (Bonferroni), and seeds are fixed. The power of the laws is
tested too: each run with one plausible mistake must be rejected by some law.
"""

import math

import numpy as np
import pytest
import runs
import torch
from fastebm.kernels.triton.launch import Launch, block
from laws import counts_follow, double, standard_normal, two_sided
from scipy import stats
from scipy.special import ndtr
from torch import nn

from fastebm import Langevin, MLPEnergy
from fastebm.backends import Chains
from fastebm.rng import Stream, normal
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

ALPHA = 1e-5
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


# -- runs: (energy, x0, sampler, steps, seed) -> states ----------------------------------------------------


def chains(x0, seed):
    numbers = torch.arange(len(x0), device=x0.device)
    return Chains(x0, seed, numbers, torch.zeros_like(numbers))


def by_reference(energy, x0, sampler, steps, seed):
    module = Energy(energy, x0.shape[1:], torch.float32)
    return runs.by_definition(module, chains(x0, seed), sampler, steps).x


def by_torch(energy, x0, sampler, steps, seed):
    return runs.closed_form(describe(energy), chains(x0, seed), sampler, steps).x


def by_triton(regime):
    def run(energy, x0, sampler, steps, seed):

        description = describe(energy)
        # in the interpreter a program costs the same at any size
        launch = Launch(regime, 64 if CUDA else 4096, block(description.dim), 4, 1)
        precision = "bf16x3" if CUDA else "ieee"
        return runs.fused_mlp(description, chains(x0, seed), sampler, steps, precision=precision, launch=launch).x

    return run


def by_fused_update(energy, x0, sampler, steps, seed):

    module = Energy(energy, x0.shape[1:], torch.float32)
    return runs.fused_module(module, chains(x0, seed), sampler, steps).x


FEW = 200_000 if CUDA else 8_192  # chains in the interpreter
MLP_RUNS = {
    "reference": (by_reference, 100_000),
    "torch": (by_torch, 200_000),
    "resident": (by_triton("resident"), FEW),
    "streaming": (by_triton("streaming"), FEW),
}
MODULE_RUNS = {"reference": (by_reference, 200_000), "fused update": (by_fused_update, FEW)}


# -- the laws: (run, n_chains) -> p-values ----------------------------------------------------------------


class Quadratic(nn.Module):
    """E = x^T P x / 2."""

    def __init__(self, precision_matrix):
        super().__init__()
        self.register_buffer("matrix", torch.as_tensor(precision_matrix, dtype=torch.float32))

    def forward(self, x):
        return 0.5 * (x @ self.matrix * x).sum(dim=1)


MATRIX = np.array([[1.5, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.8]])


def whitened(x, mean, covariance):
    return np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T).T


def gaussian_law(run, n_chains, steps=4):
    """With A = I - aP: mean A^n x0, covariance b^2 sum_{i<n} A^2i, at every n."""
    a, b = 0.3, 0.6
    x0 = np.array([1.0, -2.0, 0.5])
    contraction = np.eye(3) - a * MATRIX
    power = np.linalg.matrix_power
    mean = power(contraction, steps) @ x0
    covariance = b**2 * sum(power(contraction, 2 * i) for i in range(steps))
    start = torch.tensor(x0, dtype=torch.float32, device=DEVICE).repeat(n_chains, 1)
    x = run(Quadratic(MATRIX).to(DEVICE), start, Langevin.from_drift_and_noise(a, b), steps, seed=11)
    return standard_normal(whitened(double(x), mean, covariance))


def stationary_law(run, n_chains):
    """After many steps from any start: covariance b^2 [aP (2I - aP)]^-1."""
    a, b = 0.5, 0.6
    covariance = b**2 * np.linalg.inv(a * MATRIX @ (2 * np.eye(3) - a * MATRIX))
    start = torch.zeros(n_chains, 3, device=DEVICE)
    x = run(Quadratic(MATRIX).to(DEVICE), start, Langevin.from_drift_and_noise(a, b), 40, seed=12)
    return standard_normal(whitened(double(x), 0.0, covariance))


def affine_law(run, n_chains):
    """If all ReLUs are on, E is affine with slope w: x_n = x_0 - n a w + b sqrt(n) z."""
    steps, dim, a, b = 6, 5, 0.2, 0.3
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        energy = MLPEnergy(dim, [7, 6], "relu").to(DEVICE)
        linear = list(energy)[::2]
        for layer, bias in zip(linear, (1e2, 1e4), strict=False):
            layer.weight.mul_(2.0)
            layer.bias.fill_(bias)
        w = torch.linalg.multi_dot([layer.weight.double() for layer in reversed(linear)]).squeeze(0)
    x0 = torch.linspace(-1, 1, dim, device=DEVICE)
    x = run(energy, x0.repeat(n_chains, 1), Langevin.from_drift_and_noise(a, b), steps, seed=13)
    return standard_normal(double(x - (x0 - steps * a * w)) / (b * math.sqrt(steps)))


def absolute_value_law(run, n_chains):
    """relu(x) + relu(-x) = |x|: the density after each step by integration, and counts in 40 cells at the end."""
    steps, a, b, x0 = 8, 0.25, 0.5, 1.5
    energy = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).to(DEVICE)
    with torch.no_grad():
        energy[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        energy[2].weight.fill_(1.0)
    # two panels that meet at 0, where the drift jumps; the mass beyond 8 is below 1e-30
    nodes, weights = np.polynomial.legendre.leggauss(80)
    nodes, weights = 4 * nodes + 4, 4 * weights
    nodes, weights = np.concatenate([-nodes[::-1], nodes]), np.concatenate([weights[::-1], weights])
    means = nodes - a * np.sign(nodes)
    transition = stats.norm.pdf(nodes[None, :], means[:, None], b)
    density = stats.norm.pdf(nodes, x0 - a, b)
    for _ in range(steps - 2):
        density = (weights * density) @ transition
    edges = np.linspace(-3.0, 3.5, 39)
    below = (weights * density) @ ndtr((edges[None, :] - means[:, None]) / b)
    start = torch.full((n_chains, 1), x0, device=DEVICE)
    x = double(run(energy, start, Langevin.from_drift_and_noise(a, b), steps, seed=14)).ravel()
    mean = (weights * density) @ means
    variance = (weights * density) @ means**2 + b**2 - mean**2
    counts = np.histogram(x, np.concatenate([[-np.inf], edges, [np.inf]]))[0]
    return [
        counts_follow(counts, np.diff(below, prepend=0.0, append=1.0)),
        two_sided((x.mean() - mean) / math.sqrt(variance / n_chains)),
    ]


LO, HI = -1.0, 0.8


def clamped_law(run, n_chains):
    """A clamped 2-D chain, its bias included: p <- pK on Gauss-Legendre nodes, and an atom at each bound.

    Given x, the coordinates move apart from each other: N(m_j, b^2) on (LO, HI), Phi at LO, 1 - Phi at HI.
    """
    steps, a, b = 5, 0.35, 0.45
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        energy = MLPEnergy(2, [16, 8])
        for p in energy.parameters():
            p.mul_(3.0)
    exact = Energy(energy, (2,), torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(32)
    nodes, weights = (LO + HI + (HI - LO) * nodes) / 2, (HI - LO) / 2 * weights
    points = np.concatenate([[LO], nodes, [HI]])
    grid = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)

    def means(x):
        return x - a * exact.gradient(torch.as_tensor(x)).numpy()

    def onto_points(m):  # (n,) -> (n, points): where one coordinate goes
        inside = weights * stats.norm.pdf(nodes, m[:, None], b)
        return np.concatenate([ndtr((LO - m) / b)[:, None], inside, ndtr((m - HI) / b)[:, None]], axis=1)

    def onto_cells(m, inner):
        edges = np.concatenate([[LO], inner, [HI]])
        cdf = ndtr((edges - m[:, None]) / b)
        return np.concatenate([cdf[:, :1], np.diff(cdf, axis=1), 1 - cdf[:, -1:]], axis=1)

    m = means(grid)
    to_points = [onto_points(m[:, j]) for j in range(2)]
    x0 = np.array([[0.3, -0.5]])
    m0 = means(x0)
    p = np.einsum("ni,nj->ij", onto_points(m0[:, 0]), onto_points(m0[:, 1])).ravel()
    for _ in range(steps - 2):
        p = np.einsum("n,ni,nj->ij", p, *to_points, optimize=True).ravel()
    assert abs(p.sum() - 1) < 1e-9
    inner = np.linspace(LO, HI, 7)[1:-1]
    cells = np.einsum("n,ni,nj->ij", p, *(onto_cells(m[:, j], inner) for j in range(2)), optimize=True)
    last = np.einsum("n,ni,nj->ij", p, *to_points, optimize=True)

    start = torch.tensor(x0, dtype=torch.float32, device=DEVICE).repeat(n_chains, 1)
    sampler = Langevin.from_drift_and_noise(a, b, clamp=(LO, HI))
    x = run(energy.to(DEVICE), start, sampler, steps, seed=15).cpu()
    # the chain holds its bounds in float32
    bounds = torch.tensor([LO, HI])
    cell = 1 + np.digitize(x.numpy(), inner)
    cell[(x == bounds[0]).numpy()] = 0
    cell[(x == bounds[1]).numpy()] = len(inner) + 2
    counts = np.zeros_like(cells)
    np.add.at(counts, (cell[:, 0], cell[:, 1]), 1)
    p_values = [counts_follow(counts, cells)]
    for axis in range(2):
        law, seen = cells.sum(axis=1 - axis), counts.sum(axis=1 - axis)
        p_values += [stats.binomtest(int(seen[i]), n_chains, law[i]).pvalue for i in (0, -1)]
    for f in (lambda u, v: u, lambda u, v: v, lambda u, v: u * v, lambda u, v: u**2, lambda u, v: v**2):
        values = f(points[:, None], points[None, :])
        mean, sample = (last * values).sum(), f(*double(x).T)
        variance = (last * values**2).sum() - mean**2
        p_values.append(two_sided((sample.mean() - mean) / math.sqrt(variance / n_chains)))
    return p_values


MLP_LAWS = [affine_law, absolute_value_law, clamped_law]
MODULE_LAWS = [gaussian_law, stationary_law]
LAWS = [*MLP_LAWS, *MODULE_LAWS]
TESTS = len(MLP_LAWS) * len(MLP_RUNS) + len(MODULE_LAWS) * len(MODULE_RUNS) + 1 + len(LAWS)


def rejected(p_values):
    """At this test's share of ALPHA, divided among its p-values."""
    return min(p_values) < ALPHA / TESTS / len(p_values)


# -- the tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", MLP_RUNS)
@pytest.mark.parametrize("law", MLP_LAWS)
def test_law_of_an_mlp(law, run):
    assert not rejected(law(*MLP_RUNS[run]))


@pytest.mark.parametrize(
    ("law", "run"),
    [
        # 40 steps in the interpreter are slow; gaussian_law holds the same kernel to the law of each step
        pytest.param(law, run, marks=[pytest.mark.slow] * (law is stationary_law and run == "fused update"))
        for law in MODULE_LAWS
        for run in MODULE_RUNS
    ],
)
def test_law_of_a_module(law, run):
    function, n_chains = MODULE_RUNS[run]
    if law is stationary_law:
        n_chains //= 8  # 40 steps
    assert not rejected(law(function, n_chains))


@pytest.mark.slow
def test_bias_is_of_first_order_in_the_step():
    """1-D, E = x^2 / 2: stationary variance 1 / (1 - eps / 4), so halving eps halves its distance from 1."""
    n_chains, p_values, bias, error = 200_000, [], [], []
    for step_size in (0.5, 0.25):
        start = torch.zeros(n_chains, 1, device=DEVICE)
        steps = round(36 / step_size)  # (1 - eps/2)^(2 steps) < 1e-15
        x = double(by_reference(Quadratic([[1.0]]).to(DEVICE), start, Langevin.ula(step_size), steps, 16))
        variance = 1 / (1 - step_size / 4)
        total = float((x**2).sum() / variance)
        p_values.append(2 * min(stats.chi2.cdf(total, n_chains), stats.chi2.sf(total, n_chains)))
        bias.append(float((x**2).mean()) - 1)
        error.append(variance * math.sqrt(2 / n_chains) / bias[-1])
    assert not rejected(p_values)
    order = math.log2(bias[0] / bias[1])
    assert abs(order - 1.1) < 5.5 * math.hypot(*error) / math.log(2) < 0.6  # neither 0 nor 2


# -- power: a run with one mistake is rejected by some law ----------------------------------------------


def clamp(x, bounds):
    return x if bounds is None else x.clamp(*bounds)


# One step of each: x, its gradient, a function of the step number that draws noise, a, b, bounds, step number.
MISTAKES = {
    "noise times sqrt 2": lambda x, g, draw, a, b, c, t: clamp(x - a * g + math.sqrt(2) * b * draw(t), c),
    "half the drift": lambda x, g, draw, a, b, c, t: clamp(x - a / 2 * g + b * draw(t), c),
    "sign of the gradient": lambda x, g, draw, a, b, c, t: clamp(x + a * g + b * draw(t), c),
    "gradient of the mean": lambda x, g, draw, a, b, c, t: clamp(x - a * g / len(x) + b * draw(t), c),
    "clamp before the noise": lambda x, g, draw, a, b, c, t: clamp(x - a * g, c) + b * draw(t),
    "clamp left out": lambda x, g, draw, a, b, c, t: x - a * g + b * draw(t),
    "clamp before the noise too": lambda x, g, draw, a, b, c, t: clamp(clamp(x - a * g, c) + b * draw(t), c),
    "noise reused": lambda x, g, draw, a, b, c, t: clamp(x - a * g + b * draw(0), c),
    "noise of the step before": lambda x, g, draw, a, b, c, t: clamp(x - a * g + b * draw(max(t - 1, 0)), c),
    "one noise for all dims": lambda x, g, draw, a, b, c, t: clamp(x - a * g + b * draw(t)[:, :1], c),
    "one noise for all chains": lambda x, g, draw, a, b, c, t: clamp(x - a * g + b * draw(t)[:1], c),
    "uniform noise": lambda x, g, draw, a, b, c, t: clamp(
        x - a * g + b * math.sqrt(12) * (torch.special.ndtr(draw(t)) - 0.5), c
    ),
    "no noise": lambda x, g, draw, a, b, c, t: clamp(x - a * g, c),
}


def by_steps(step):
    def run(energy, x, sampler, steps, seed):
        chains, dim = torch.arange(len(x), device=x.device), x.shape[1]
        gradient = Energy(energy, (dim,), torch.float32).gradient
        a, b = (float(c) for c in sampler.coefficients(len(x), steps))

        def draw(t):
            return normal(seed, Stream.LANGEVIN, chains, t, dim)

        for t in range(steps):
            x = step(x, gradient(x), draw, a, b, sampler.clamp, t)
        return x

    return run


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_rejected(mistake):
    assert any(rejected(law(by_steps(MISTAKES[mistake]), 8_192)) for law in LAWS)


def test_a_run_without_mistakes_is_not_rejected():
    right = by_steps(lambda x, g, draw, a, b, c, t: clamp(x - a * g + b * draw(t), c))
    assert not any(rejected(law(right, 8_192)) for law in LAWS)
