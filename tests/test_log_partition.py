"""Partition functions: the truth where it is known, honest errors, bounds on both sides, and refusals in words."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

import fastebm.estimates.ais as ais_module
import fastebm.estimates.partition as partition
from fastebm import (
    HMC,
    MALA,
    NUTS,
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    LogPartition,
    MLPEnergy,
    NonFiniteError,
    SumEnergy,
    langevin_sample,
    log_likelihood,
    log_partition,
)
from fastebm.box import Box
from fastebm.driver.settings import Settings
from fastebm.energies.functions import as_module
from fastebm.estimates.ais import AIS
from fastebm.estimates.ladder import Path
from fastebm.estimates.normal import Normal
from fastebm.estimates.result import log_mean_exp
from fastebm.targets.mixed import Mixed

pytestmark = pytest.mark.usefixtures("seeded")

ALPHA = 1e-6  # of each test of a law
Z = float(stats.norm.isf(ALPHA / 2))
BASE = GaussianEnergy(torch.zeros(2), 1.3)
FIXED = MALA(1.0, target_acceptance=None)  # saves the pilot on the energy


class Mixture(nn.Module):
    """Gaussians with a known log Z: E = -log sum_k w_k N(x; m_k, s^2) - log_z."""

    log_z = -3.0

    def __init__(self, dim, s=0.7):
        super().__init__()
        self.means, self.s, self.dim = torch.zeros(3, dim), s, dim
        self.means[0, 0], self.means[1, 0], self.means[2, 1] = 3.0, -3.0, 3.0
        self.shares = torch.tensor([0.5, 0.3, 0.2])

    def forward(self, x):
        z = (x[:, None] - self.means.to(x)).square().sum(dim=2) / (2 * self.s**2)
        constant = self.dim / 2 * math.log(2 * math.pi * self.s**2) - self.log_z
        return constant - torch.logsumexp(self.shares.to(x).log() - z, dim=1)

    def draws(self, n):
        component = torch.multinomial(self.shares, n, replacement=True)
        return self.means[component] + self.s * torch.randn(n, self.dim)


def gaussian(dim):
    """An energy with a different mean and std in each dim, and its log Z."""
    std = torch.linspace(0.3, 3.0, dim)
    return GaussianEnergy(torch.linspace(-2.0, 4.0, dim), std), log_z_of(std)


def log_z_of(std):
    return float((std.double().log() + 0.5 * math.log(2 * math.pi)).sum())


def covered(log_weights, truth, groups):
    """Whether 95% intervals of groups of chains cover the truth as often as they say, and that of all chains does."""
    rows = [log_mean_exp(part) for part in log_weights.chunk(groups)]
    inside = sum(abs(log_z - truth) < 1.96 * error for log_z, error, _ in rows)
    log_z, error, _ = log_mean_exp(log_weights)
    return stats.binom(groups, 0.95).cdf(inside) > ALPHA and abs(log_z - truth) < Z * error


# -- the truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_a_gaussian(dim):
    energy, truth = gaussian(dim)
    result = log_partition(energy, n_temperatures=150, n_chains=512, seed=1)
    assert result.standard_error < 0.025
    assert abs(result.log_z - truth) < Z * result.standard_error
    assert abs(result.upper - truth) < Z * result.upper_error
    assert result.lower - 5 * result.lower_error < truth < result.upper + 5 * result.upper_error
    assert 0.4 < float(result.acceptance.min()) < float(result.acceptance.max()) < 0.75


def estimate():
    """A short ladder from a base that is far from the energy: errors of a wrong estimate are large."""
    energy = Mixture(2)
    return log_partition(
        energy, GaussianEnergy(1.0, 2.0), sampler=FIXED, samples=energy.draws(6400), input_size=2, n_temperatures=8,
        n_chains=6400, seed=2,
    )  # fmt: skip


def is_right(result, truth=Mixture.log_z):
    """Of both directions, each on its own: reverse weights estimate Z_0 / Z_1."""
    return covered(result.log_weights, truth, 50), covered(result.reverse_log_weights, -truth, 50)


def test_errors_are_honest_in_both_directions():
    result = estimate()
    assert is_right(result) == (True, True)
    assert result.lower < result.upper + 5 * math.hypot(result.lower_error, result.upper_error)
    assert float(result.log_weights.std()) > 1.0  # not an easy ladder
    assert result.log_weights.dtype == torch.float64
    ess = float(torch.softmax(result.log_weights, 0).square().sum().reciprocal())
    assert result.ess == pytest.approx(ess)


def at_temperature(shift):
    """AIS whose transition at step t has the temperature of step t + shift."""

    def step(self, target, state, noise, t, step=AIS.step):
        def build(start, end, b):
            return Mixed(start, end, self.betas[min(t + 1 + shift, len(self.betas) - 1)])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ais_module, "Mixed", build)
            return step(self, target, state, noise, t)

    return step


def wrong_sign(self, target, state, noise, t, step=AIS.step):
    new, info = step(self, target, state, noise, t)
    return new._replace(log_weight=2 * state.log_weight - new.log_weight), info


def forward_density_only(self, target, state, noise, t, step=AIS.step):
    """Weighs by E_1 alone, without the density of the base."""
    change = self.betas[t + 1] - self.betas[t]
    new, info = step(self, target, state, noise, t)
    return new._replace(log_weight=state.log_weight - change * state.energy.double()), info


MUTANTS = {
    "weights with the wrong sign": lambda patch: patch.setattr(AIS, "step", wrong_sign),
    "without the base's density": lambda patch: patch.setattr(AIS, "step", forward_density_only),
    "without the base's log Z": lambda patch: patch.setattr(
        Normal, "__init__", lambda self, *a, init=Normal.__init__: (init(self, *a), setattr(self, "log_z", 0.0))[0]
    ),
    "transitions one temperature behind": lambda patch: patch.setattr(AIS, "step", at_temperature(-1)),
    "transitions one temperature ahead": lambda patch: patch.setattr(AIS, "step", at_temperature(1)),
    "draws that are not the base's": lambda patch: patch.setattr(
        Normal, "draw", lambda self, *a, draw=Normal.draw: self.mean + 0.6 * (draw(self, *a) - self.mean)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*can't be trusted")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant, monkeypatch):
    """Neither direction survives a wrong weight or transition. The base's draws serve the forward direction only."""
    monkeypatch.setattr(partition, "_PARTS", 1)  # each mutant sees the whole ladder
    MUTANTS[mutant](monkeypatch)
    forward, reverse = is_right(estimate())
    assert not forward
    assert reverse == (mutant == "draws that are not the base's")


def scaled():
    energy = MLPEnergy(2, (16, 16), "tanh")
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(3.0)
    return energy


def trained():
    """By contrastive divergence on a ring: 60 Langevin steps from each batch."""
    energy, angle = MLPEnergy(2, (32, 32)), 2 * math.pi * torch.rand(2000)
    data = torch.stack([angle.cos(), angle.sin()], dim=1) + 0.1 * torch.randn(2000, 2)
    optimizer = torch.optim.Adam(energy.parameters(), 5e-3)
    for step in range(300):
        batch = data[torch.randint(len(data), (256,))]
        samples = langevin_sample(energy, rule=Langevin(0.02, clamp=(-2.0, 2.0)), init=batch, steps=60, seed=step)
        optimizer.zero_grad()
        real, fake = energy(batch), energy(samples)
        (real.mean() - fake.mean() + 0.1 * (real.square() + fake.square()).mean()).backward()
        optimizer.step()
    return energy


@pytest.mark.parametrize("make", [scaled, trained])
def test_an_mlp_in_a_box_by_quadrature(make):
    energy = make()
    lo, hi, n = -2.0, 2.0, 400
    axis = lo + (hi - lo) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    with torch.no_grad():
        values = -energy.double()(torch.cartesian_prod(axis, axis))[:, 0]
    energy.float()
    truth = float(torch.logsumexp(values, 0)) + 2 * math.log((hi - lo) / n)
    assert abs(truth - 2 * math.log(hi - lo)) > 0.5  # not flat
    result = log_partition(energy, sampler=MALA(0.1, clamp=(lo, hi)), n_temperatures=100, n_chains=512, seed=3)
    assert result.standard_error < 0.02
    assert abs(result.log_z - truth) < Z * result.standard_error
    assert abs(result.upper - truth) < Z * result.upper_error
    x = torch.tensor([[0.0, 0.5], [0.0, 2.5]])
    found = log_likelihood(energy, x, result)
    torch.testing.assert_close(found[0], -energy(x)[0, 0].double() - result.log_z, rtol=1e-5, atol=1e-5)
    assert found[1] == -math.inf


@pytest.mark.parametrize("box", [(-1.0, 0.5), (3.0, math.inf), (torch.tensor([6.0, -9.0]), torch.tensor([7.0, -8.0]))])
def test_a_base_is_cut_off_at_bounds(box):
    """The base alone: its draws follow the truncated law, and its log Z is that of the law."""
    mean, std, box = torch.tensor([0.5, 0.0]), torch.tensor([1.0, 2.0]), Box.of(box)
    base = Normal(mean, std, box)
    lo, hi = (torch.as_tensor(bound).expand(2).double() for bound in box)
    x = base.draw(1, torch.arange(20_000), 0)
    truth = 0.0
    for d in range(2):
        a, b = (float((bound[d] - mean[d]) / std[d]) for bound in (lo, hi))
        law = stats.truncnorm(a, b, float(mean[d]), float(std[d]))
        assert stats.kstest(x[:, d].numpy(), law.cdf).pvalue > ALPHA
        m = float(lo[d])
        truth += -((m - float(mean[d])) ** 2) / (2 * float(std[d]) ** 2) - float(law.logpdf(m))
    assert base.log_z == pytest.approx(truth, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*can't be trusted")  # the bounds are log 2 apart
def test_a_hard_wall_has_weight_0():
    """Without a clamp: half of the base's draws have the energy +inf. Reverse chains never see that half."""
    wall = lambda x: torch.where(x[:, 0] > 0, x.square().sum(dim=1) / 2, math.inf)  # noqa: E731
    truth = math.log(2 * math.pi) - math.log(2)
    result = log_partition(
        wall, GaussianEnergy(0.0, 1.3), input_size=2, sampler=FIXED, n_temperatures=20,
        n_chains=4096, seed=1,
    )  # fmt: skip
    assert result.upper - truth == pytest.approx(math.log(2), abs=0.2)
    assert 0.4 < float((result.log_weights == -math.inf).float().mean()) < 0.6
    assert abs(result.log_z - truth) < Z * result.standard_error


@pytest.mark.parametrize("sampler", [HMC(0.5, target_acceptance=None), NUTS(0.5, target_acceptance=None)])
def test_other_exact_samplers(sampler):
    energy, truth = gaussian(2)
    base = GaussianEnergy(torch.tensor([-1.0, 2.0]), 1.5)
    result = log_partition(energy, base, sampler=sampler, n_temperatures=40, n_chains=256, seed=1)
    assert abs(result.log_z - truth) < Z * result.standard_error
    assert abs(result.upper - truth) < Z * result.upper_error


def test_labels_and_conditions():
    """Each class has its own log Z: that of logit_c(x) = -|x|^2 / 2 + c."""
    energy = ClassifierEnergy(Classes())
    for label in (0, 2):
        result = log_partition(energy, BASE, labels=label, sampler=FIXED, n_temperatures=30, n_chains=128, seed=1)
        assert result.log_z == pytest.approx(math.log(2 * math.pi) + label, abs=0.1)
    noisy = lambda x, sigma: (x.square().sum(dim=1) / sigma[:, 0].square()) / 2  # noqa: E731
    result = log_partition(
        noisy, BASE, condition=torch.tensor([1.5]), sampler=FIXED, n_temperatures=30, n_chains=128, seed=1
    )
    assert result.log_z == pytest.approx(math.log(2 * math.pi * 2.25), abs=0.1)
    x = torch.randn(5, 2)
    torch.testing.assert_close(
        log_likelihood(noisy, x, 1.0, condition=torch.tensor([1.5])), -(x.square().sum(1) / 4.5).double() - 1.0
    )


class Classes(nn.Module):
    def forward(self, x):
        return -x.square().sum(dim=1, keepdim=True) / 2 + torch.arange(3).to(x)


def test_log_likelihood_estimates_log_z():
    energy, x = GaussianEnergy(0.0, torch.tensor([1.0, 2.0])), torch.randn(4, 2)
    options = {"sampler": FIXED, "base": BASE, "n_temperatures": 50, "n_chains": 128, "seed": 4}
    result = log_partition(energy, **options)
    assert torch.equal(log_likelihood(energy, x, **options), log_likelihood(energy, x, result))
    torch.testing.assert_close(log_likelihood(energy, x, result), -energy(x).double() - result.log_z)
    assert log_likelihood(energy, x[:0], result).shape == (0,)
    with pytest.raises(TypeError, match="x must be floating point"):
        log_likelihood(energy, x.long(), result)
    with pytest.raises(TypeError, match="log_z is given, so seed would have no effect"):
        log_likelihood(energy, x, result, seed=1)


# -- the noise contract --------------------------------------------------------------------------------------------


def path_of(energy, labels=None):
    return Path(energy, (3,), MALA(0.3), labels, None, 1, Settings(on_nonfinite="ignore"))


@pytest.mark.parametrize("name", ["mlp", "autograd"])
def test_other_chains_and_parts_change_no_bits(name):
    energy = SumEnergy([MLPEnergy(3, (16, 8)), GaussianEnergy()]) if name == "mlp" else GaussianEnergy(0.3, 1.2)
    base, path = Normal(torch.zeros(3), torch.ones(3), None), path_of(energy)
    betas = tuple(torch.linspace(0, 1, 31).tolist())
    ais = AIS(base, betas, (MALA(0.3),) * 31)
    chains = path.chains(base.draw(1, torch.arange(130), 0), 0)
    whole, rates = path.run(ais, chains)
    parts, _ = path.run(ais, chains, parts=7)
    assert 0.5 < rates[0] < 1
    assert torch.equal(parts.x, whole.x)
    assert torch.equal(parts.carried["log_weight"], whole.carried["log_weight"])
    for rows in (slice(0, 1), slice(3, 70), slice(64, 130)):
        some, _ = path.run(ais, chains.rows(rows))
        assert torch.equal(some.x, whole.x[rows])
        assert torch.equal(some.carried["log_weight"], whole.carried["log_weight"][rows])


def test_the_same_seed_gives_the_same_bits():
    energy, options = GaussianEnergy(0.5, 1.0), {"base": BASE, "n_temperatures": 20, "n_chains": 64}
    first, again, other = (log_partition(energy, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first.log_weights, again.log_weights)
    assert torch.equal(first.reverse_log_weights, again.reverse_log_weights)
    assert not torch.equal(first.log_weights, other.log_weights)


def test_one_gradient_per_transition():
    """A new temperature at the same states needs no new evaluation of the energy."""
    calls = []

    def energy(x):
        calls.append(len(x))
        return x.square().sum(dim=1) / 2

    base = Normal(torch.zeros(3), torch.ones(3), None)
    path = path_of(as_module(energy))
    path.run(AIS(base, (0.0, 0.5, 0.8, 1.0), (MALA(0.3),) * 4), path.chains(torch.randn(5, 3), 0))
    assert len(calls) == 1 + 3


# -- energies and estimates that are not to be trusted -------------------------------------------------------------


def test_warnings_say_what_is_wrong():
    energy = Mixture(2)
    fixed = {"sampler": FIXED, "n_chains": 200, "input_size": 2, "seed": 1}
    with pytest.warns(UserWarning, match=r"effective sample size is .* of 200 chains.*Use more temperatures"):
        log_partition(energy, GaussianEnergy(10.0, 0.5), n_temperatures=3, **fixed)
    with pytest.warns(UserWarning, match="chains hardly move in"):
        log_partition(
            energy, GaussianEnergy(0.0, 2.0), **fixed | {"sampler": MALA(5000.0, target_acceptance=None)},
            n_temperatures=50,
        )  # fmt: skip
    far = torch.cat([energy.draws(100), torch.tensor([20.0, 0.0]).expand(100, 2) + torch.randn(100, 2)])
    hidden = lambda x: torch.minimum(energy(x), ((x - torch.tensor([20.0, 0.0])) ** 2).sum(1) / 2 + 4)  # noqa: E731
    with pytest.warns(UserWarning, match=r"the bounds are .* nats apart"):
        log_partition(hidden, GaussianEnergy(0.0, 1.0), samples=far, n_temperatures=100, **fixed)


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_an_energy_that_is_no_number_raises(number):
    energy = lambda x: torch.where(x[:, 0] > 2, number, x.square().sum(dim=1) / 2)  # noqa: E731
    with pytest.raises(NonFiniteError, match=r"chains of the annealed run are not finite, first at b = .*clamp="):
        log_partition(
            energy, GaussianEnergy(), sampler=FIXED, input_size=2, n_temperatures=10,
            n_chains=500, seed=1,
        )  # fmt: skip


def test_a_pilot_that_is_not_finite_raises():
    flat = lambda x: 0 * x.sum(dim=1)  # noqa: E731
    with pytest.raises(
        NonFiniteError, match=r"64 of 64 chains of the pilot run .* If exp\(-E\) has no finite integral"
    ):
        log_partition(flat, input_size=2, n_chains=64, seed=1)


G, TWO = GaussianEnergy(), {"input_size": 2}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: log_partition(G, **TWO, n_temperatures=1), ValueError, "n_temperatures must be >= 2, got 1"),
        (lambda: log_partition(G, **TWO, n_chains=1.5), TypeError, "n_chains must be an int, got 1.5"),
        (lambda: log_partition(G, **TWO, n_chains=1), ValueError, "n_chains must be >= 2, got 1"),
        (lambda: log_partition(G, MLPEnergy(2), **TWO), TypeError, "base must be a GaussianEnergy"),
        (
            lambda: log_partition(G, GaussianEnergy(torch.zeros(3)), **TWO),
            ValueError,
            r"a GaussianEnergy has a mean of shape \(3,\), and the chains' states have \(2,\)",
        ),
        (lambda: log_partition(G, **TWO, sampler=Langevin(0.1)), ValueError, "Langevin has no accept test"),
        (lambda: log_partition(G, **TWO, sampler=MALA), TypeError, "are its parentheses missing"),
        (
            lambda: log_partition(G, **TWO, sampler=MALA(torch.full((5,), 0.1))),
            ValueError,
            "step_size must be a number in log_partition",
        ),
        (
            lambda: log_partition(G, samples=torch.tensor([[0.0], [2.0]]), sampler=MALA(0.1, clamp=(-1, 1))),
            ValueError,
            r"samples must lie within the sampler's clamp \(-1.0, 1.0\), and 1 of 2 do not",
        ),
        (lambda: log_partition(G, samples=torch.tensor([[0.0], [math.nan]])), ValueError, "samples must be finite"),
        (
            lambda: log_partition(G, **TWO, sampler=MALA(0.1, clamp=(0, math.inf))),
            ValueError,
            "has an infinite side: pass base=",
        ),
        (
            lambda: log_partition(G, GaussianEnergy(500.0), **TWO, sampler=MALA(0.1, clamp=(-1, 1))),
            ValueError,
            "a Gaussian base must have mass within the clamp",
        ),
        (lambda: log_partition(G), ValueError, "pass input_size= or samples="),
        (lambda: log_partition(G, **TWO, labels=torch.tensor([0, 1])), ValueError, "labels must be one class"),
        (lambda: log_partition(G, **TWO, condition=3.0), TypeError, "condition must be a tensor"),
        (
            lambda: log_partition(lambda x: x.detach().sum(1), GaussianEnergy(), **TWO),
            ValueError,
            "does not depend on x through differentiable operations",
        ),
        (
            lambda: log_partition(lambda x: x.sum(1) * 0 + math.inf, GaussianEnergy(), **TWO, sampler=FIXED),
            ValueError,
            "is \\+inf at all draws of the base",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_it_reads_well():
    result = log_partition(G, BASE, sampler=FIXED, n_temperatures=20, n_chains=64, seed=1)
    assert isinstance(result, LogPartition)
    assert repr(result).startswith("LogPartition(log Z = 1.8")
    assert "of 64 chains, 20 temperatures, acceptance 0." in repr(result)


def test_float64_is_float64():
    energy = GaussianEnergy(0.0, torch.ones(2)).double()
    result = log_partition(energy, BASE, sampler=FIXED, n_temperatures=20, n_chains=64, seed=1)
    assert abs(result.log_z - math.log(2 * math.pi)) < Z * result.standard_error


# -- long ones -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_95_percent_of_seeds():
    """Pilots included: within 0.05 nats, and within 95% intervals as often as they say."""
    energy, truth = gaussian(2)
    near = inside = 0
    for seed in range(40):
        result = log_partition(energy, n_temperatures=100, n_chains=128, seed=seed)
        near += abs(result.log_z - truth) < 0.05
        inside += abs(result.log_z - truth) < 1.96 * result.standard_error
    assert near >= 38
    assert stats.binom(40, 0.95).cdf(inside) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "n_temperatures", "n_chains", "groups"), [(2, 200, 256, 100), (16, 600, 256, 100), (64, 1000, 1024, 16)]
)
@pytest.mark.parametrize("make", [gaussian, lambda dim: (Mixture(dim), Mixture.log_z)], ids=["gaussian", "mixture"])
def test_95_percent_of_groups_of_chains(make, dim, n_temperatures, n_chains, groups):
    """Each group of chains is an estimate of its own, with the same pilots. In 64 dims it has the default size."""
    energy, truth = make(dim)
    result = log_partition(
        energy, input_size=dim, n_temperatures=n_temperatures, n_chains=groups * n_chains, seed=1
    )  # fmt: skip
    estimates = [log_mean_exp(part)[0] for part in result.log_weights.chunk(groups)]
    assert sum(abs(log_z - truth) < 0.05 for log_z in estimates) >= int(0.95 * groups)
    assert covered(result.log_weights, truth, groups)
    assert abs(result.upper - truth) < Z * result.upper_error
