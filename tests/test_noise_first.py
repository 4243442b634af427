"""Langevin with the noise before the gradient: the field's published loops, every option, and chains that explode.

Each path is compared with the loops as they were published, written out here, with the same noise. Where the drift
leaves a coordinate at a bound, the order shows: noise added last is in the result, noise added first is not.
"""

import math
from dataclasses import replace

import pytest
import runs
import torch
from compiled_calls import compiled
from paths import (
    CLASSES,
    FAST_PATHS,
    IN_MEMORY,
    PATHS,
    REGIMES,
    advance,
    begin,
    bits_equal,
    largest,
    make_energy,
    network,
    per_dim_bounds,
    same_bits,
)
from torch import nn
from truth import check_agreement

from fastebm import ChainPool, GaussianEnergy, Langevin, NonFiniteError, SumEnergy, langevin_sample
from fastebm.backends import Chains
from fastebm.rng import Stream, normal
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

DIM, N, STEPS = 19, 40, 5
NUMBA = ("numba", "numba autograd")
SELDOM = [pytest.param(path, marks=pytest.mark.slow) for path in (*IN_MEMORY, "eight warps")]
every_path = pytest.mark.parametrize("path", [*PATHS, *NUMBA])
every_path_and_place = pytest.mark.parametrize("path", [*PATHS, *NUMBA, *SELDOM])


def moved(path, energy, x, rule, steps, counters, **asked):
    """``advance``, with Numba's kernels too."""
    if path not in NUMBA:
        return advance(path, energy, x, rule, steps, counters, **asked)
    if x.is_cuda:
        pytest.skip("Numba's kernels are for a CPU")
    chains = Chains(x.clone(), **counters)
    if path == "numba":
        return runs.cpu_mlp(describe(energy, labels="labels" in counters), chains, rule, steps, **asked)
    return runs.cpu_module(Energy(energy, x.shape[1:], torch.float32), chains, rule, steps, **asked)


# -- as published ---------------------------------------------------------------------------------------------------


def igebm(gradient, x, noises, proj_norm=0.0):
    """Du & Mordatch 2019: ebm_code_release/train.py, with step_lr 10 and proj_norm_type "li"."""
    for noise in noises:
        x = x + 0.005 * noise
        grad = gradient(x)
        if proj_norm > 0:
            grad = grad.clamp(-proj_norm, proj_norm)
        x = x - 10.0 * grad
        x = x.clamp(0.0, 1.0)
    return x


def uva(gradient, x, noises):
    """The UvA Deep Learning tutorial 8, Deep Energy Models: Sampler.generate_samples."""
    for noise in noises:
        x = x + 0.005 * noise
        x = x.clamp(-1.0, 1.0)
        grad = gradient(x)
        grad = grad.clamp(-0.03, 0.03)
        x = x - 10.0 * grad
        x = x.clamp(-1.0, 1.0)
    return x


def jem(gradient, x, noises):
    """Grathwohl et al. 2020: JEM/train_wrn_ebm.py. The gradient first, and no clamp."""
    for noise in noises:
        x = x - 1.0 * gradient(x) + 0.01 * noise
    return x


PUBLISHED = {
    "igebm": (igebm, Langevin.igebm(clamp=(0.0, 1.0))),
    "igebm, proj_norm": (lambda *a: igebm(*a, proj_norm=0.02), Langevin.igebm(clamp=(0.0, 1.0), grad_clip=0.02)),
    "uva": (uva, Langevin.uva()),
    "jem": (jem, Langevin.jem()),
}
every_recipe = pytest.mark.parametrize("recipe", PUBLISHED)


def published_case(recipe, device="cpu"):
    """An energy for which steps of 10 dE/dx leave some coordinates within the bounds, and states."""
    energy = SumEnergy([network(DIM, [20, 11])], [0.3 if recipe == "jem" else 0.04]).to(device)
    x, counters = begin(N, DIM, device)
    return energy, x.clamp(-1.0, 1.0) if recipe == "uva" else x.clamp(0.0, 1.0), counters


def as_published(recipe, energy, x, counters):
    """The published loop, in float64."""
    exact = Energy(energy, x.shape[1:], torch.float64)
    noises = [
        normal(
            counters["seed"], Stream.LANGEVIN, counters["numbers"], counters["first_steps"] + t, x.shape[1],
            dtype=torch.float64,
        )
        for t in range(STEPS)
    ]  # fmt: skip
    return PUBLISHED[recipe][0](exact.gradient, x.double(), noises)


@every_recipe
@every_path_and_place
def test_every_path_is_the_published_loop(device, path, recipe):
    energy, x, counters = published_case(recipe, device)
    done = moved(path, energy, x, PUBLISHED[recipe][1], STEPS, counters)
    torch.testing.assert_close(done.x.double(), as_published(recipe, energy, x, counters), rtol=0, atol=1e-5)


@every_recipe
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_published_loop_in_float64(backend, recipe):
    rule = PUBLISHED[recipe][1]
    energy, x, _ = published_case(recipe)
    counters = {"seed": 3, "numbers": torch.arange(N), "first_steps": torch.full((N,), 7)}
    expected = as_published(recipe, energy, x, counters)
    found = langevin_sample(energy.double(), init=x.double(), seed=3, first_step=7, backend=backend, **options(rule))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def options(rule):
    """Called through ``langevin_sample``."""
    names = ("step_size", "noise_scale", "grad_clip", "clamp", "noise_first", "clamp_noise")
    return {"steps": STEPS, **{name: getattr(rule, name) for name in names}}


@pytest.mark.parametrize("recipe", ["igebm", "igebm, proj_norm", "uva"])
def test_the_order_is_seen_in_these_cases(recipe):
    """The cases have coordinates at the bounds and between, and the other order is far outside the tolerance."""
    rule = PUBLISHED[recipe][1]
    energy, x, counters = published_case(recipe)
    expected = as_published(recipe, energy, x, counters)
    lo, hi = rule.clamp
    assert 0.1 < float(((expected == lo) | (expected == hi)).float().mean()) < 0.9
    other = replace(rule, noise_first=False, clamp_noise=False)
    assert largest(moved("reference", energy, x, other, STEPS, counters).x - expected) > 0.01
    flipped = replace(rule, clamp_noise=not rule.clamp_noise)
    assert largest(moved("reference", energy, x, flipped, STEPS, counters).x - expected) > 1e-4


@every_recipe
def test_the_published_loop_in_a_compiled_call(recipe):
    energy, x, _ = published_case(recipe)
    counters = {"seed": 3, "numbers": torch.arange(N), "first_steps": torch.zeros(N, dtype=torch.int64)}

    def sample(x):
        return langevin_sample(energy, init=x, seed=3, **options(PUBLISHED[recipe][1]))

    found = compiled(sample, "eager")(x)
    assert torch.equal(found, sample(x))
    torch.testing.assert_close(found.double(), as_published(recipe, energy, x, counters), rtol=0, atol=1e-5)


@every_recipe
@pytest.mark.parametrize("call", ["sample", "advance"])
def test_the_published_loop_in_a_pool(recipe, call):
    """With one clamp for pool and sampler, and a step size per chain."""
    rule = PUBLISHED[recipe][1]
    energy, x, _ = published_case(recipe)
    pool = ChainPool(N, DIM, clamp=rule.clamp, seed=3, init=x, reinit_prob=0.0)
    pool.advance(energy, rule, 2)
    before, n = pool.states.clone(), N if call == "advance" else 9
    each = replace(rule, step_size=torch.full((n, 1), rule.step_size))
    if call == "sample":
        found, _ = pool.sample(energy, n, each, STEPS)
        chains = pool.last.chains
    else:
        pool.advance(energy, each, STEPS, chunk_size=16)
        found, chains = pool.states, torch.arange(N)
    counters = {"seed": 3, "numbers": chains, "first_steps": torch.full((n,), 2)}
    expected = as_published(recipe, energy, before[chains], counters)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


# -- every option ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "terms", "clamp", "clamp_noise"),
    [
        pytest.param("class", ("gaussian", "linear"), "dims", True, marks=pytest.mark.slow),
        ("logsumexp", (), "numbers", False),
        pytest.param("scalar", ("linear",), "none", True, marks=pytest.mark.slow),
        pytest.param("class", ("gaussian",), "dims", False, marks=pytest.mark.slow),
        pytest.param("logsumexp", ("linear",), "numbers", True, marks=pytest.mark.slow),
        pytest.param("scalar", (), "mixed", False, marks=pytest.mark.slow),
    ],
)
def test_all_options_at_once(device, head, terms, clamp, clamp_noise):
    """Includes telemetry."""
    check_agreement(
        device, (*FAST_PATHS, *IN_MEMORY, "update", *NUMBA), energy=make_energy(DIM, head=head, terms=terms), dim=DIM,
        classes=CLASSES if head == "class" else None, n_chains=33, steps=4, thin=2, step_form="schedule",
        noise_form="per_chain", clamp=clamp, frozen=None if clamp == "none" else "chains",
        sampler={"grad_clip": 0.3, "grad_norm_clip": 0.9, "noise_first": True, "clamp_noise": clamp_noise}, move=moved,
    )  # fmt: skip


@every_path
def test_no_steps(device, path):
    """A schedule of no steps has no coefficients."""
    energy = make_energy(DIM, [9]).to(device)
    x, counters = begin(6, DIM, device)
    for schedule in (torch.zeros(0), 0.3):
        rule = Langevin(1.0, schedule, clamp=(-0.1, 0.1), noise_first=True, clamp_noise=True)
        done = moved(path, energy, x, rule, 0, counters, telemetry=True)
        assert torch.equal(done.x, x)
        assert (done.first_bad == -1).all()
        assert done.telemetry["grad_norm"].isnan().all()
        exact = Energy(energy, (DIM,), torch.float64)(x.double())
        torch.testing.assert_close(done.energy.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", [*FAST_PATHS, *NUMBA[:1]])
def test_bits_do_not_depend_on_the_batch(device, path):
    energy = make_energy(DIM, [20, 11], head="class", terms=("gaussian",)).to(device)
    x, counters = begin(66, DIM, device, classes=CLASSES, frozen="chains")
    x *= 2.0
    steps = torch.linspace(0.1, 0.5, 66)[:, None]

    def run(rows):
        rule = Langevin(
            steps[rows], 0.7, clamp=per_dim_bounds(DIM), grad_norm_clip=1.0, noise_first=True, clamp_noise=True
        )
        own = {k: v if k == "seed" else v[rows] for k, v in counters.items()}
        return moved(path, energy, x[rows].contiguous(), rule, 2, own, thin=1, telemetry=True)

    whole = run(slice(None))
    rows = torch.randperm(66, generator=torch.Generator().manual_seed(2))[:65]
    assert same_bits(run(rows), whole, rows)
    # outside of the bounds too
    assert torch.equal(whole.x[counters["frozen"]], x[counters["frozen"]])


@every_path
def test_a_trajectory_is_the_run_at_each_step(device, path):
    """Its states are those after the gradient, without the next step's noise."""
    energy = make_energy(DIM, [9]).to(device)
    x, counters = begin(20, DIM, device)
    schedule = torch.linspace(0.1, 0.5, 3)
    whole = moved(path, energy, x, Langevin(schedule, 0.5, noise_first=True), 3, counters, thin=1)
    assert torch.equal(whole.trajectory[:, -1], whole.x)
    for t in (1, 2):
        rule = Langevin(schedule[:t], 0.5, noise_first=True)
        assert torch.equal(moved(path, energy, x, rule, t, counters).x, whole.trajectory[:, t - 1])


# -- chains that explode --------------------------------------------------------------------------------------------


def check_like_the_reference(path, energy, x, rule, steps, counters):
    """Compare states, first bad steps and telemetry with the reference, whose result is returned."""
    expected = moved("reference", energy, x, rule, steps, counters, thin=1, telemetry=True)
    done = moved(path, energy, x, rule, steps, counters, thin=1, telemetry=True)
    assert torch.equal(done.first_bad, expected.first_bad)
    assert done.x.isfinite().all()
    torch.testing.assert_close(done.trajectory, expected.trajectory, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(done.x, expected.x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(done.telemetry["clipped"], expected.telemetry["clipped"])
    torch.testing.assert_close(done.telemetry["clamped"], expected.telemetry["clamped"])
    torch.testing.assert_close(done.telemetry["grad_norm"], expected.telemetry["grad_norm"], rtol=1e-4, atol=1e-4)
    return expected


@every_path
@pytest.mark.parametrize(
    ("bounds", "clamp_noise"),
    [
        ((-0.5, 0.5), False),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param((-0.5, 0.5), True, marks=pytest.mark.slow),
        ("dims", True),
        pytest.param("dims", False, marks=pytest.mark.slow),
    ],
)
def test_noise_that_is_infinite(device, path, bounds, clamp_noise):
    """At the first step, a later one, or never. The chain stops at the state before the noise, at the noise's step."""
    energy = SumEnergy([make_energy(DIM, [9]), GaussianEnergy(0.1, 2.0)], [0.01, 0.01]).to(device)
    x, counters = begin(12, DIM, device, frozen="chains")
    counters["frozen"][::4] = True  # nothing free, so nothing explodes
    clamp = per_dim_bounds(DIM) if bounds == "dims" else bounds
    rule = {"clamp": clamp, "grad_clip": 0.004, "noise_first": True, "clamp_noise": clamp_noise}
    each = torch.full((12, 1), 0.5)
    each[::2] = 3e38
    row = torch.arange(12, device=device)
    for at, noise, bad in ((0, each, row % 4 == 2), (1, torch.tensor([0.5, 3e38, 0.5]), row % 4 > 0)):
        expected = check_like_the_reference(path, energy, x, Langevin(100.0, noise, **rule), 3, counters)
        assert torch.equal(expected.first_bad, torch.where(bad, at, -1).int())
        before = x if at == 0 else expected.trajectory[:, at - 1]
        assert torch.equal(expected.x[bad], before[bad])


@every_path
@pytest.mark.parametrize("clamp_noise", [False, True])
def test_a_drift_that_is_infinite(device, path, clamp_noise):
    """At step 1, for some chains, which stop at the state after this step's noise."""
    energy = SumEnergy([make_energy(DIM, [9])], [1.0]).to(device)
    x, counters = begin(24, DIM, device)
    noise_std = torch.tensor([0.5, 0.7, 0.6])
    steps = torch.tensor([[0.3, 3.0e38, 0.3]])[0]
    rule = Langevin(
        steps, noise_std / steps.sqrt(), clamp=(-1.0, 1.25), noise_first=True, clamp_noise=clamp_noise
    )  # fmt: skip
    energy.energies[0][-1].weight.data *= 1.7  # so that the largest gradients of some chains exceed what float32 holds
    expected = check_like_the_reference(path, energy, x, rule, 3, counters)
    bad = expected.first_bad == 1
    assert 0 < int(bad.sum()) < 24
    assert (expected.first_bad[~bad] == -1).all()
    noisy = expected.trajectory[:, 0] + noise_std[1] * normal(
        counters["seed"], Stream.LANGEVIN, counters["numbers"], counters["first_steps"] + 1, DIM
    )
    noisy = noisy.clamp(-1.0, 1.25) if clamp_noise else noisy
    assert largest(noisy) > 1.3 or clamp_noise
    torch.testing.assert_close(expected.x[bad], noisy[bad], rtol=0, atol=1e-6)
    torch.testing.assert_close(expected.trajectory[:, 1][bad], noisy[bad], rtol=0, atol=1e-6)


@every_path
def test_noise_far_beyond_the_bounds_and_a_drift_farther_still(device, path):
    """Each is finite in float32, their sum is not, and the clamp would hide that."""
    body = nn.Sequential(nn.Linear(DIM, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        body[0].weight.fill_(1e-10)
        body[0].bias.fill_(1.0)
        body[2].weight.fill_(-0.25e10)  # dE/dx is -1 or 0
        body[2].bias.zero_()
    x, counters = begin(64, DIM, device)
    # chains with some noise of 3.3 to 3.7 standard deviations, and 0.9e38 is one; of more, a radius may be infinite
    numbers = torch.arange(8192, device=device)
    noise = normal(counters["seed"], Stream.LANGEVIN, numbers, torch.ones_like(numbers), 20)
    radius = noise.unflatten(1, (10, 2)).square().sum(dim=2).sqrt().amax(dim=1)
    far = (radius < 3.7) & (noise[:, :DIM].amax(dim=1) > 3.3)
    counters.update(numbers=torch.cat([numbers[far][:32], numbers[radius < 2.5][:32]]), first_steps=numbers[:64] * 0)
    steps = torch.tensor([1.0, 1.2e38])
    rule = Langevin(steps, torch.tensor([0.0, 0.9e38]) / steps.sqrt(), clamp=(-1.0, 1.0), noise_first=True)
    expected = moved("reference", body.to(device), x, rule, 2, counters)
    done = moved(path, body, x, rule, 2, counters)
    assert torch.equal(done.first_bad, expected.first_bad)
    assert largest((done.x - expected.x) / 1e38) < 1e-5
    bad = expected.first_bad == 1
    assert 0 < int(bad.sum()) < 32
    assert float(expected.x[bad].amax(dim=1).min()) > 2.9e38  # where the noise led
    assert largest(expected.x[~bad]) == 1.0


@every_path_and_place
@pytest.mark.parametrize("clamp", [pytest.param(None, marks=pytest.mark.slow), (-1e38, math.inf), "far"])
def test_chains_explode_at_different_steps(device, path, clamp):
    """A random walk towards float32's largest number; one clamp puts chains near it, and noise takes them beyond."""
    energy = make_energy(DIM, [9]).to(device)
    with torch.no_grad():
        energy[0].weight *= 1e-10  # else whether a sum overflows may depend on the order of its terms
    x, counters = begin(24, DIM, device)
    scales = torch.linspace(0.1e38, 2e38, 24)[:, None]
    if clamp == "far":
        clamp = (torch.where(torch.arange(DIM) == 17, 3.39e38, -math.inf), torch.full((DIM,), math.inf))
        scales /= 40
    rule = Langevin(0.25, scales, clamp=clamp, noise_first=True)
    expected = moved("reference", energy, x, rule, 6, counters, thin=1, telemetry=True)
    assert len(expected.first_bad.unique()) >= 3
    done = moved(path, energy, x, rule, 6, counters, thin=1, telemetry=True)
    assert torch.equal(done.first_bad, expected.first_bad)
    assert largest((done.trajectory - expected.trajectory) / 1e38) < 1e-4
    torch.testing.assert_close(done.telemetry["clamped"], expected.telemetry["clamped"])


@pytest.mark.parametrize("path", ["torch", "numba", *REGIMES, *SELDOM])
def test_exploding_neighbours_change_nothing(device, path):
    energy = make_energy(DIM, [20, 11], terms=("gaussian",)).to(device)
    x, counters = begin(70, DIM, device)
    calm = torch.arange(70) % 3 > 0
    noise = torch.full((70, 1), 0.7)
    wild = noise.clone()
    wild[~calm] = 2e38
    alone, beside = (
        moved(path, energy, x, Langevin(0.3, scale, noise_first=True), 2, counters, thin=1, telemetry=True)
        for scale in (noise, wild)
    )
    for a, b in zip([*alone[:4], *alone.telemetry.values()], [*beside[:4], *beside.telemetry.values()], strict=True):
        assert bits_equal(a[calm], b[calm])
    assert (beside.first_bad[~calm] >= 0).any()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("energy", [network(3, [9]), nn.Sequential(network(3, [9]), nn.Softplus())])
def test_a_call_raises_keeps_or_starts_anew(backend, device, energy):
    home = device if backend == "triton" else "cpu"
    noise = torch.tensor([[0.1], [3e38], [0.2], [3e38]])
    init = torch.full((4, 3), 0.25, device=home)
    given = {
        "init": init, "steps": 2, "step_size": 100.0, "noise_scale": noise, "clamp": (-0.5, 0.5), "noise_first": True,
        "clamp_noise": True, "seed": 1, "backend": backend,
    }  # fmt: skip
    energy = energy.to(home)
    with pytest.raises(NonFiniteError, match=r"2 of 4 chains are not finite \(first at step 0 of 2"):
        langevin_sample(energy, **given)
    kept, info = langevin_sample(energy, on_nonfinite="ignore", return_info=True, **given)
    assert torch.equal(kept[1::2], init[1::2])
    assert info.first_bad_step.tolist() == [-1, 0, -1, 0]
    fresh = langevin_sample(energy, on_nonfinite="reinit", **given)
    assert torch.equal(fresh[::2], kept[::2])
    assert len(fresh[1::2].unique()) == 6
