"""Langevin(..., marginal_noise=True): the law is exact, and all else is as with ordinary noise."""

import pytest
import torch
from laws import standard_normal
from torch import nn

from fastebm import ChainPool, ClassifierEnergy, GaussianEnergy, Langevin, MLPEnergy, SumEnergy, langevin_sample, sample
from fastebm.backends import marginal

DIM, N = 12, 4_000
ALPHA = 1e-6  # per test


def affine():
    """An MLP that is affine where the chains are, because its biases are large, and its gradient."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(DIM, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad():
        mlp[0].bias.fill_(1e3)
        gradient = (mlp[2].weight @ mlp[0].weight)[0].double()
    return mlp, gradient


def standardised(x, start, gradient, step_sizes, curvature=0.0, mean=0.0):
    """x after these steps from ``start``, less its exact mean and over its exact standard deviation."""
    expected, variance = start.double(), 0.0
    for size in step_sizes:
        expected = expected - size / 2 * (gradient + curvature * (expected - mean))
        variance = variance * (1 - size / 2 * curvature) ** 2 + size
    return (x.double() - expected) / variance**0.5


def fits(*z):
    """Whether these numbers, (n, dim) each, are standard normal and independent of each other."""
    p = standard_normal(torch.cat(z, dim=1))
    return min(p) * len(p) > ALPHA


def kept_states(curvature, mean):
    """Two kept states, standardised by their exact law: the second one given the first."""
    mlp, gradient = affine()
    energy = mlp if curvature == 0 else SumEnergy([mlp, GaussianEnergy(mean, curvature**-0.5)])
    x0 = torch.linspace(-1, 1, DIM).expand(N, DIM)
    result = sample(energy, Langevin(0.2, marginal_noise=True), init=x0, steps=6, thin=3, seed=3)
    assert result.info.path == "marginal"
    first, last = result.trajectory.unbind(dim=1)
    assert torch.equal(last, result.x)
    options = gradient, [0.2] * 3, curvature, mean
    return standardised(first, x0, *options), standardised(last, first, *options)


@pytest.mark.parametrize(("curvature", "mean"), [(0.0, 0.0), (1.5, 0.4)])
def test_the_law_of_kept_states_is_exact(curvature, mean):
    assert fits(*kept_states(curvature, mean))


@pytest.mark.parametrize("mutant", ["no noise", "no decay", "half the variance", "the same noise", "noise of all dims"])
def test_mutants_are_rejected(mutant, monkeypatch):
    over, normal, multiplied = marginal._over, marginal.Noise.normal, marginal.multiplied

    def changed(*args):
        shrunk, variance = over(*args)
        if mutant == "no decay":
            return torch.ones_like(shrunk), variance
        return shrunk, variance * {"no noise": 0.0, "half the variance": 0.5}.get(mutant, 1.0)

    monkeypatch.setattr(marginal, "_over", changed)
    if mutant == "the same noise":
        monkeypatch.setattr(marginal.Noise, "normal", lambda self, stream, t: normal(self, stream, 0))
    if mutant == "noise of all dims":  # the projection zeta Q is the one product of noise with Q
        seen = []

        def without(v, w):
            seen.append(w.shape[1] < DIM)
            return multiplied(v, w) * (0.0 if seen[-1] and sum(seen) > 1 else 1.0)

        monkeypatch.setattr(marginal, "multiplied", without)
    assert not fits(*kept_states(1.5, 0.4))


def test_values_per_chain_and_schedules_have_their_own_law():
    mlp, gradient = affine()
    x0, half = torch.zeros(N, DIM), N // 2
    sizes = torch.cat([torch.full((half, 1), 0.1), torch.full((half, 1), 0.4)])
    x = sample(mlp, Langevin(sizes, marginal_noise=True), init=x0, steps=3, seed=1).x
    a, b = (
        standardised(x[rows], x0[:half], gradient, [s] * 3) for rows, s in ((slice(half), 0.1), (slice(half, N), 0.4))
    )
    assert fits(a, b)
    schedule = torch.tensor([0.1, 0.4, 0.2])
    x = sample(mlp, Langevin(schedule, marginal_noise=True), init=x0, steps=3, seed=2).x
    assert fits(standardised(x, x0, gradient, schedule.tolist()))


def energies():
    torch.manual_seed(1)
    mlp = MLPEnergy(40, (8, 6))
    classifier = ClassifierEnergy(nn.Sequential(nn.Linear(40, 9), nn.Tanh(), nn.Linear(9, 3)))
    linear = nn.Linear(40, 1)
    return {
        "mlp": mlp,
        "sum": SumEnergy([mlp, MLPEnergy(40, (7,)), linear, GaussianEnergy(0.3, 1.2)], [1.0, 0.5, 0.2, 1.0]),
        "classifier": classifier,
    }


@pytest.mark.parametrize("kind", ["mlp", "sum", "classifier"])
def test_without_noise_it_is_gradient_descent(kind):
    """The noise is all that differs: energies, gradients and telemetry are those of the ordinary steps."""
    energy, x0 = energies()[kind].double(), torch.randn(9, 40, dtype=torch.float64)
    labels = torch.arange(9) % 3 if kind == "classifier" else None
    options = {"init": x0, "labels": labels, "steps": 7, "seed": 0}
    ordinary = sample(energy, Langevin(0.3, 0.0), **options)
    ours = sample(energy, Langevin(0.3, 0.0, marginal_noise=True), **options)
    assert (ordinary.info.path, ours.info.path) == ("tiles", "marginal")
    for a, b in ((ordinary.x, ours.x), (ordinary.info.energies, ours.info.energies)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ordinary.info.grad_norm, ours.info.grad_norm, rtol=1e-10, atol=1e-10)


def test_energies_and_gradient_norms_belong_to_the_states():
    energy, x0 = energies()["sum"].double(), torch.randn(9, 40, dtype=torch.float64)
    result = sample(energy, Langevin(0.1, marginal_noise=True), init=x0, steps=5, thin=1, seed=0)
    torch.testing.assert_close(result.info.energies, energy(result.x).detach(), rtol=1e-10, atol=1e-10)
    before = result.trajectory[:, -2].requires_grad_()
    (gradient,) = torch.autograd.grad(energy(before).sum(), before)
    torch.testing.assert_close(result.info.grad_norm, gradient.norm(dim=1), rtol=1e-10, atol=1e-10)


def test_bits_do_not_depend_on_the_batch_or_the_threads():
    energy, x0 = energies()["sum"], torch.randn(70, 40)
    rule = Langevin(0.1, marginal_noise=True)
    whole = sample(energy, rule, init=x0, steps=6, thin=3, seed=5)
    part = sample(energy, rule, init=x0[50:], steps=6, thin=3, seed=5, first_chain=50)
    assert torch.equal(whole.trajectory[50:], part.trajectory)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - before if before < 3 else 1)
        again = sample(energy, rule, init=x0, steps=6, thin=3, seed=5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole.trajectory, again.trajectory)
    assert not torch.equal(whole.x[0] - x0[0], whole.x[1] - x0[1])


def test_a_progress_bar_does_not_change_the_states(capsys):
    energy, rule = energies()["mlp"], Langevin(0.1, marginal_noise=True)
    options = {"input_size": 40, "n_chains": 4, "steps": 300, "seed": 5}
    assert torch.equal(sample(energy, rule, progress=True, **options).x, sample(energy, rule, **options).x)


def test_a_chain_that_stops_keeps_its_state():
    mlp, _ = affine()
    sizes = torch.full((6, 1), 0.1)
    sizes[2] = 1e38  # the second step overflows
    energy, rule = SumEnergy([mlp, GaussianEnergy()]), Langevin(sizes, marginal_noise=True)
    result = sample(energy, rule, init=torch.zeros(6, DIM), steps=4, thin=1, seed=0, on_nonfinite="ignore")
    assert result.info.path == "marginal"
    assert result.info.first_bad_step.tolist() == [-1, -1, 1, -1, -1, -1]
    assert result.x.isfinite().all()
    assert torch.equal(result.trajectory[2, 0], result.x[2])


def test_pools_and_langevin_sample_take_it():
    energy = energies()["mlp"]
    rule = Langevin(0.1, marginal_noise=True)
    x, again, ordinary = (
        ChainPool(32, 40, seed=0).sample(energy, 16, sampler, 3)[0] for sampler in (rule, rule, Langevin(0.1))
    )
    assert x.isfinite().all()
    assert torch.equal(x, again)
    assert not torch.equal(x, ordinary)
    _, info = langevin_sample(energy, 40, rule, batch_size=4, steps=3, seed=0, return_info=True)
    assert info.path == "marginal"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"clamp": (-1.0, 1.0)}, {}),
        ({"grad_clip": 0.1}, {}),
        ({"grad_norm_clip": 0.1}, {}),
        ({"noise_first": True}, {}),
        ({"preconditioner": 2.0}, {}),
        ({}, {"frozen": torch.arange(40) == 3}),
        ({}, {"backend": "reference"}),
    ],
)
def test_it_has_no_effect_where_each_state_is_needed(settings, options):
    energy, init = energies()["mlp"], torch.zeros(5, 40)
    with_it, without = (
        sample(energy, Langevin(0.1, marginal_noise=on, **settings), init=init, steps=4, seed=0, **options)
        for on in (True, False)
    )
    assert with_it.info.path == without.info.path != "marginal"
    assert torch.equal(with_it.x, without.x)


def test_it_has_no_effect_on_wide_or_anisotropic_energies():
    wide, stretched = MLPEnergy(6, (8,)), SumEnergy([MLPEnergy(6, (3,)), GaussianEnergy(0.0, torch.arange(1.0, 7.0))])
    for energy in (wide, stretched, lambda x: x.square().sum(dim=1)):
        options = {"init": torch.zeros(5, 6), "steps": 4, "seed": 0}
        a, b = (sample(energy, Langevin(0.1, marginal_noise=on), **options) for on in (True, False))
        assert a.info.path != "marginal"
        assert torch.equal(a.x, b.x)


def test_the_setting_is_a_bool():
    with pytest.raises(TypeError, match="marginal_noise must be True or False, got 1"):
        Langevin(0.1, marginal_noise=1)
