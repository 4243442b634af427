"""Calls whose steps run in the first layer of an MLP energy: what they take, report and carry is that of the others."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastebm import (
    HMC,
    MALA,
    ChainPool,
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    NonFiniteError,
    SumEnergy,
    UnderdampedLangevin,
    langevin_sample,
    sample,
)
from fastebm.backends import tiles
from fastebm.energies import energy as energy_of
from fastebm.samplers.collapsed import CollapsedHMC
from fastebm.samplers.collapsed_langevin import CollapsedLangevin

pytestmark = pytest.mark.usefixtures("seeded", "often_put_together")

DIM, CHAINS = 600, 70
SAMPLERS = {
    "HMC": lambda **given: HMC(0.2, 3, **given),
    "MALA": lambda **given: MALA(0.1, **given),
    "Langevin": lambda **given: Langevin(0.1, **given),
    "UnderdampedLangevin": lambda **given: UnderdampedLangevin(0.2, **given),
}
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
exact = pytest.mark.parametrize("make", [SAMPLERS["HMC"], SAMPLERS["MALA"]], ids=["HMC", "MALA"])


def plain():
    return MLPEnergy(DIM, (32, 16)), {}


def confined():
    return SumEnergy([MLPEnergy(DIM, (32, 16), "tanh"), GaussianEnergy(0.3, 1.1), nn.Linear(DIM, 1)]), {}


def labelled():
    classifier = ClassifierEnergy(nn.Sequential(nn.Linear(DIM, 24), nn.Tanh(), nn.Linear(24, 3)))
    return SumEnergy([classifier, GaussianEnergy()]), {"labels": torch.arange(CHAINS) % 3}


ENERGIES = {"plain": plain, "confined": confined, "labels": labelled}
every_energy = pytest.mark.parametrize("name", ENERGIES)


@pytest.fixture
def ordinary(monkeypatch):
    """``ordinary(f, ...)`` calls f(...) where no steps run in the first layer."""
    from fastebm.driver import run

    def result(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(run, "collapses", lambda *_: False)
            return function(*arguments, **options)

    return result


def same(a, b, rows=slice(None)):
    """Whether two results of ``sample`` have the same bits."""
    reports = [getattr(r.info, name) for r in (a, b) for name in r.info.sampler.reports]
    half = len(reports) // 2
    pairs = [(a.x, b.x), (a.energies, b.energies), *zip(reports[:half], reports[half:], strict=True)]
    if a.trajectory is not None:
        pairs.append((a.trajectory, b.trajectory))
    return all(torch.equal(v.nan_to_num(7.0), w[rows].nan_to_num(7.0)) for v, w in pairs)


def assert_same_reports(found, expected):
    """What two results report is the same up to rounding."""
    assert torch.equal(found.info.first_bad_step, expected.info.first_bad_step)
    for name in found.info.sampler.reports:
        reports = (getattr(r.info, name) for r in (found, expected))
        torch.testing.assert_close(*reports, rtol=1e-3, atol=1e-3, equal_nan=True)


@every_energy
@every_sampler
def test_reports_are_those_of_the_ordinary_path(make, name, ordinary):
    energy, given = ENERGIES[name]()
    options = {"n_chains": CHAINS, "steps": 20, "thin": 5, "seed": 4, **given}
    found = sample(energy, make(), DIM, **options)
    expected = ordinary(sample, energy, make(), DIM, **options)
    assert (found.info.path, expected.info.path) == ("collapsed", "tiles")
    torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.trajectory, expected.trajectory, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.energies, expected.energies, rtol=1e-5, atol=1e-3)
    assert_same_reports(found, expected)
    assert torch.equal(found.trajectory[:, -1], found.x)


@pytest.mark.parametrize("first", [1, 8, 9, 19])
@every_energy
@every_sampler
def test_going_on_is_as_if_it_had_not_stopped(make, name, first):
    energy, given = ENERGIES[name]()
    options = {"n_chains": CHAINS, "seed": 8, **given}
    whole = sample(energy, make(), DIM, steps=24, **options)
    start = sample(energy, make(), DIM, steps=first, **options)
    then = sample(energy, make(), init=start, steps=24 - first)
    assert then.info.path == "collapsed"
    assert torch.equal(then.x, whole.x)
    assert torch.equal(then.energies, whole.energies)


@every_energy
@every_sampler
def test_other_chains_threads_and_progress_change_no_bits(make, name, monkeypatch):
    energy, given = ENERGIES[name]()
    options = {"steps": 35, "thin": 5, "seed": 7}
    whole = sample(energy, make(), DIM, n_chains=CHAINS, **options, **given)
    for rows in (slice(0, 1), slice(3, 69), slice(64, CHAINS)):
        part = sample(
            energy, make(), DIM, n_chains=rows.stop - rows.start, first_chain=rows.start, **options,
            **{k: v[rows] for k, v in given.items()},
        )  # fmt: skip
        assert same(part, whole, rows)
    shown = sample(energy, make(), DIM, n_chains=CHAINS, progress=True, **options, **given)
    assert torch.equal(shown.trajectory, whole.trajectory)
    assert torch.equal(shown.energies, whole.energies)
    for report in make().reports:
        torch.testing.assert_close(getattr(shown.info, report), getattr(whole.info, report))
    parts = [slice(0, 64), slice(64, CHAINS)]
    monkeypatch.setattr(tiles, "tiles", lambda *_: parts)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        split = sample(energy, make(), DIM, n_chains=CHAINS, **options, **given)
    finally:
        torch.set_num_threads(before)
    assert same(split, whole)


# -- weights that change ------------------------------------------------------------------------------------------


def optimizer_step(energy):
    optimizer = torch.optim.SGD(energy.parameters(), 5.0)
    energy(torch.randn(8, DIM)).mean().backward()
    optimizer.step()


def write(factor, first=False):
    """Writes that no version counter sees."""

    def change(energy):
        for p in list(energy.parameters())[: 1 if first else None]:
            p.data.mul_(factor)

    return change


CHANGES = {
    "optimizer": optimizer_step, "data": write(1.2), "first weight": write(1.2, first=True),
    "a little": write(1 + 3e-4), "first weight, a little": write(1 + 3e-4, first=True),
}  # fmt: skip
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def without_carried(result):
    """The result as from a sampler that carries nothing but x, and a momentum."""
    chains = result.state.chains
    kept = {name: v for name, v in chains.carried.items() if name == "momentum"} or None
    return replace(result, state=result.state._replace(chains=chains._replace(carried=kept)))


@every_change
@every_sampler
def test_changed_weights_are_never_stale(make, change):
    """Chains go on as if they carried nothing that belongs to the old weights, bit for bit."""
    energy, _ = confined()
    start = sample(energy, make(), DIM, n_chains=CHAINS, steps=5, seed=1)
    change(energy)
    then = sample(energy, make(), init=start, steps=20)
    fresh = sample(energy, make(), init=without_carried(start), steps=20)
    assert then.info.path == "collapsed"
    assert same(then, fresh)
    torch.testing.assert_close(then.energies, energy_of(energy, then.x).detach(), rtol=1e-5, atol=1e-3)


@every_change
def test_pools_and_langevin_sample_see_changed_weights(change):
    energy, _ = confined()
    init = torch.randn(CHAINS, DIM)
    pool = ChainPool(CHAINS, DIM, seed=3, reinit_prob=0.0)
    for _ in range(2):
        for sampler in (HMC(0.2, 3), Langevin(0.1)):
            x, energies = pool.sample(energy, 20, sampler, 3)
            torch.testing.assert_close(energies, energy_of(energy, x).detach(), rtol=1e-5, atol=1e-3)
        samples, info = langevin_sample(energy, Langevin(0.1), init=init, steps=3, seed=1, return_info=True)
        again = langevin_sample(copy.deepcopy(energy), Langevin(0.1), init=init, steps=3, seed=1)
        assert info.path == "collapsed"
        assert torch.equal(samples, again)
        change(energy)


# -- settings -----------------------------------------------------------------------------------------------------


def settings_of(name):
    """Settings that the first layer has coefficients for, by the name of a sampler."""
    each, schedule = torch.linspace(0.05, 0.3, CHAINS)[:, None], torch.linspace(0.3, 0.05, 20)
    diagonal = torch.linspace(0.5, 2.0, DIM)
    return {
        "HMC": [HMC(each, 3), HMC(schedule, 3), HMC(0.2, 3, mass=2.0), HMC(0.2, 3, mass=diagonal)],
        "MALA": [MALA(each), MALA(schedule), MALA(0.1, 2.0), MALA(0.1, diagonal)],
        "Langevin": [
            Langevin(each, 1 + each), Langevin(schedule, 1 + schedule), Langevin(0.1, preconditioner=2.0),
            Langevin(0.1, preconditioner=diagonal), Langevin(0.1, 0.0),
        ],
        "UnderdampedLangevin": [
            UnderdampedLangevin(each, 1 + each, noise_scale=each), UnderdampedLangevin(schedule, mass=2.0),
            UnderdampedLangevin(0.2, splitting="OBABO"),
        ],
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_settings_by_step_chain_and_dim(name, ordinary):
    energy, _ = plain()
    for sampler in settings_of(name):
        options = {"n_chains": CHAINS, "steps": 20, "seed": 3}
        found = sample(energy, sampler, DIM, **options)
        expected = ordinary(sample, energy, sampler, DIM, **options)
        assert (found.info.path, expected.info.path) == ("collapsed", "tiles")
        torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)


NOT_TAKEN = {
    "a clamp": lambda: (plain()[0], Langevin(0.1, clamp=(-1.0, 1.0)), {}),
    "an elementwise clip": lambda: (plain()[0], Langevin(0.1, grad_clip=0.1), {}),
    "a clip of the norm": lambda: (plain()[0], Langevin(0.1, grad_norm_clip=0.1), {}),
    "noise first": lambda: (plain()[0], Langevin(0.1, noise_first=True), {}),
    "frozen coordinates": lambda: (plain()[0], HMC(0.2, 3), {"frozen": torch.arange(DIM) < 5}),
    "an anisotropic Gaussian": lambda: (
        SumEnergy([plain()[0], GaussianEnergy(0.0, torch.linspace(1, 2, DIM))]), HMC(0.2, 3), {},
    ),
    "a mass and a Gaussian": lambda: (confined()[0], HMC(0.2, 3, mass=torch.linspace(1, 2, DIM)), {}),
    "a clamp that reflects": lambda: (plain()[0], UnderdampedLangevin(0.2, clamp=(-1.0, 1.0)), {}),
    "few dims": lambda: (MLPEnergy(8, (32, 16)), HMC(0.2, 3), {}),
    "the reference": lambda: (plain()[0], HMC(0.2, 3), {"backend": "reference"}),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_where_it_is_not_taken(case):
    energy, sampler, options = case()
    dim = 8 if case is NOT_TAKEN["few dims"] else DIM
    found = sample(energy, sampler, dim, n_chains=5, steps=2, seed=1, **options)
    assert found.info.path == ("autograd" if "backend" in options else "tiles")


@pytest.mark.parametrize("name", ["plain", "confined"])
@every_sampler
def test_no_steps_no_chains_and_one_chain(make, name):
    energy, _ = ENERGIES[name]()
    init = torch.randn(4, DIM)
    still = sample(energy, make(), init=init, steps=0)
    assert still.info.path == "collapsed"
    assert torch.equal(still.x, init)
    torch.testing.assert_close(still.energies, energy_of(energy, init).detach(), rtol=1e-5, atol=1e-4)
    assert sample(energy, make(), DIM, n_chains=0, steps=3).x.shape == (0, DIM)
    assert sample(energy, make(), DIM, n_chains=1, steps=3, seed=1).x.isfinite().all()
    assert torch.equal(
        sample(energy, make(), init=still, steps=3).x,
        sample(energy, make(), init=init, steps=3, seed=still.info.seed).x,
    )


@every_sampler
def test_float64_results_and_other_paths_go_on(make, ordinary):
    """A result of one path is continued by another: with other coordinates frozen, another energy, another width."""
    energy, _ = confined()
    start = sample(energy, make(), DIM, n_chains=CHAINS, steps=5, seed=1)
    there = ordinary(sample, energy, make(), DIM, n_chains=CHAINS, steps=5, seed=1)
    for first, second in ((start, there), (there, start)):
        torch.testing.assert_close(
            sample(energy, make(), init=first, steps=5).x, ordinary(sample, energy, make(), init=second, steps=5).x,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    frozen = torch.arange(DIM) < 5
    held = sample(energy, make(), init=start, frozen=frozen, steps=5)
    assert held.info.path == "tiles"
    assert torch.equal(held.x[:, frozen], start.x[:, frozen])
    other = MLPEnergy(DIM, (40,), "gelu")
    moved = sample(other, make(), init=start, steps=5)
    expected = ordinary(sample, other, make(), init=there, steps=5)
    assert moved.info.path == "collapsed"
    torch.testing.assert_close(moved.x, expected.x, rtol=1e-4, atol=1e-4)
    double = sample(energy.double(), make(), init=start.x.double(), steps=20, seed=1)
    exact = sample(energy, make(), init=start.x.double(), steps=20, seed=1, backend="reference")
    assert (double.info.path, double.info.kernels) == ("collapsed", "torch")
    torch.testing.assert_close(double.x, exact.x, rtol=1e-10, atol=1e-10)


@exact
def test_after_a_warmup(make, ordinary):
    energy, _ = plain()
    options = {"n_chains": CHAINS, "warmup": 30, "seed": 2}
    whole = sample(energy, make(), DIM, steps=20, **options)
    first = sample(energy, make(), DIM, steps=9, **options)
    then = sample(energy, init=first, steps=11)
    assert then.info.path == "collapsed"
    assert torch.equal(then.x, whole.x)
    assert torch.equal(then.energies, whole.energies)


@exact
def test_ends_outside_a_clamp_are_rejected(make, ordinary):
    energy, _ = confined()
    sampler = make(clamp=(-2.5, torch.linspace(1.5, 3.5, DIM)))
    options = {"init": torch.zeros(CHAINS, DIM), "steps": 6, "seed": 3, "thin": 1}
    found, expected = sample(energy, sampler, **options), ordinary(sample, energy, sampler, **options)
    assert found.info.path == "collapsed"
    torch.testing.assert_close(found.trajectory, expected.trajectory, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.info.acceptance, expected.info.acceptance, rtol=1e-3, atol=1e-3)
    assert bool((found.x >= -2.5).all())
    assert bool((found.x <= sampler.box.hi).all())
    assert 0 < float(found.info.acceptance.mean()) < 0.9
    with pytest.warns(UserWarning, match="accepted next to none"):
        stuck = sample(energy, make(clamp=(-1e-3, 1e-3)), init=torch.full((CHAINS, DIM), 1e-3), steps=20, seed=3)
    assert torch.equal(stuck.x, torch.full((CHAINS, DIM), 1e-3))  # on a bound
    assert sample(energy, init=stuck, steps=2).info.path == "collapsed"


def test_compiled_calls_have_the_same_bits(fresh_compiler):
    energy, init = plain()[0], torch.randn(CHAINS, DIM)

    def call(x):
        return langevin_sample(energy, Langevin(0.1), init=x, steps=20, seed=5)

    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(init), call(init))


# -- chains that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, math.nan])
@every_sampler
def test_weights_that_are_not_finite(make, value, ordinary):
    """A label whose logit is not finite spoils the chains of this label."""
    energy, given = labelled()
    with torch.no_grad():
        energy.energies[0].classifier[2].weight[1, 3] = value
    options = {"n_chains": CHAINS, "steps": 4, "seed": 3, "thin": 2, **given}
    with pytest.raises(NonFiniteError, match="because the energy's weights are not"):
        sample(energy, make(), DIM, **options)
    options["on_nonfinite"] = "ignore"
    found, expected = sample(energy, make(), DIM, **options), ordinary(sample, energy, make(), DIM, **options)
    assert found.info.path == "collapsed"
    assert torch.equal(found.info.first_bad_step >= 0, given["labels"] == 1)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.trajectory, expected.trajectory, rtol=1e-4, atol=1e-4)
    assert_same_reports(found, expected)


@every_sampler
def test_steps_that_overflow(make, ordinary):
    """In some chains, at once or later. Sizes of states are compared relative to the chain."""
    energy, sizes = plain()[0], torch.ones(CHAINS, 1, dtype=torch.float64)
    sizes[::14], sizes[7::14] = 3e38, 1e42
    sampler = replace(make(), step_size=make().step_size * sizes)
    options = {"n_chains": CHAINS, "steps": 5, "seed": 3, "thin": 1, "on_nonfinite": "ignore"}
    found, expected = sample(energy, sampler, DIM, **options), ordinary(sample, energy, sampler, DIM, **options)
    assert found.info.path == "collapsed"
    assert bool((found.info.first_bad_step >= 0).any()) or bool((found.info.divergences > 0).any())
    largest = expected.trajectory.abs().amax(dim=(1, 2), keepdim=True)
    assert bool(((found.trajectory - expected.trajectory).abs() <= 1e-4 * largest).all())
    assert_same_reports(found, expected)


@every_sampler
def test_chains_that_start_again(make):
    """With "reinit" the chains of one label start again in each call, and go on as from fresh states."""
    energy, given = labelled()
    with torch.no_grad():
        energy.energies[0].classifier[2].weight[1, 3] = math.nan
    options = {"n_chains": CHAINS, "seed": 3, "on_nonfinite": "reinit", **given}
    lost = given["labels"] == 1
    kept = sample(energy, make(), DIM, steps=3, **{**options, "on_nonfinite": "ignore"})
    found = sample(energy, make(), DIM, steps=3, **options)
    assert torch.equal(found.x[~lost], kept.x[~lost])
    assert float(found.x[lost].abs().max()) <= 1.0
    assert torch.equal(found.info.first_bad_step >= 0, lost)
    with torch.no_grad():
        energy.energies[0].classifier[2].weight[1, 3] = 0.3
    then, fresh = (sample(energy, make(), init=r, steps=3) for r in (found, without_carried(found)))
    assert bool((then.info.first_bad_step < 0).all())
    assert torch.equal(then.x[lost], fresh.x[lost])
    assert bool((then.x[lost] != found.x[lost]).any())


@exact
def test_divergences_are_counted_as_on_the_ordinary_path(make, ordinary):
    """Along a steep wall of the energy some trajectories diverge."""
    energy, _ = plain()
    with torch.no_grad():
        energy[-1].weight.mul_(3e4)
    options = {"init": 0.1 * torch.randn(CHAINS, DIM), "steps": 3, "seed": 5}
    found, expected = sample(energy, make(), **options), ordinary(sample, energy, make(), **options)
    assert found.info.path == "collapsed"
    torch.testing.assert_close(found.info.divergences, expected.info.divergences)
    assert 0 < float((found.info.divergences > 0).double().mean())


@exact
def test_walls_are_never_entered(make, ordinary):
    """An energy of +inf is rejected, and is no divergence."""
    energy = nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        for p in energy.parameters():
            p.zero_()
        energy[0].weight[0, 0], energy[0].bias[0] = 1.0, -1.0
        energy[2].weight[0, 0], energy[4].weight[0, 0] = 1e38, 1e38
    options = {"init": torch.zeros(CHAINS, DIM), "steps": 20, "seed": 5, "on_nonfinite": "ignore"}
    found, expected = sample(energy, make(), **options), ordinary(sample, energy, make(), **options)
    assert found.info.path == "collapsed"
    torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
    assert_same_reports(found, expected)
    assert float(found.x[:, 0].max()) <= 1.0
    assert float(found.info.acceptance.mean()) < 0.95
    assert float(found.info.divergences.max()) == 0.0


def test_a_warmup_that_finds_a_mass_is_the_ordinary_one(ordinary):
    """In float64 the two differ by rounding alone: step size, mass and states."""
    torch.manual_seed(0)
    energy, init = MLPEnergy(400, (48, 32)).double(), 2 * torch.rand(70, 400, dtype=torch.float64) - 1
    sampler = HMC(0.02, 5, clamp=(-3.0, 3.0))
    options = {"init": init, "warmup": 60, "steps": 3, "seed": 1}
    ours = sample(energy, sampler, **options)
    theirs = ordinary(sample, energy, sampler, **options)
    assert (ours.info.path, theirs.info.path) == ("collapsed", "tiles")
    assert isinstance(ours.info.sampler.mass, torch.Tensor)
    for a, b in (
        (ours.x, theirs.x),
        (ours.info.sampler.mass, theirs.info.sampler.mass),
        (torch.tensor(ours.info.step_size), torch.tensor(theirs.info.step_size)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: HMC(0.1, mass=1.0), lambda: MALA(0.1, 1.0)])
def test_a_gaussian_term_may_be_added_between_calls(make, ordinary):
    """Chains carry |y|^2 where there is one."""
    torch.manual_seed(0)
    net = MLPEnergy(256, (16, 8))
    energy = SumEnergy([net, GaussianEnergy()])
    before = sample(net, make(), 256, n_chains=6, steps=5, seed=0)
    ours = sample(energy, init=before, steps=2)
    theirs = ordinary(sample, energy, init=before, steps=2)
    assert (before.info.path, ours.info.path, theirs.info.path) == ("collapsed", "collapsed", "tiles")
    torch.testing.assert_close(ours.info.energies, energy(ours.x).detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.info.acceptance, theirs.info.acceptance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-4, atol=1e-4)


def test_a_warmup_that_goes_on_puts_states_together(monkeypatch):
    """Parts of a result would be put together elsewhere with a new mass."""
    starts = []
    init = CollapsedHMC.init
    monkeypatch.setattr(
        CollapsedHMC, "init", lambda *args, **carried: starts.append(init(*args, **carried)) or starts[-1]
    )
    energy = MLPEnergy(256, (16, 8))
    before = sample(energy, HMC(0.1), 256, n_chains=4, steps=5, seed=0)
    sample(energy, HMC(0.1), init=before, warmup=3, steps=1)
    of_warmup = starts[1]
    assert before.state.chains.carried["a"].abs().sum() > 0
    assert of_warmup.a.abs().sum() == 0
    torch.testing.assert_close(of_warmup.base, before.x)


def test_a_warmup_of_no_chains():
    result = sample(MLPEnergy(256, (16, 8)), HMC(0.1), 256, n_chains=0, warmup=10, steps=2)
    assert result.x.shape == (0, 256)


def test_a_step_of_langevin_in_plain_pytorch_masks_nothing(monkeypatch):
    """A mask of finite chains would make each step compute its telemetry."""
    seen = []
    step = CollapsedLangevin.step
    monkeypatch.setattr(CollapsedLangevin, "step", lambda *args: seen.append(step(*args)) or seen[-1])
    energy = MLPEnergy(256, (16, 8)).double()
    result = sample(energy, Langevin(0.1), init=torch.zeros(5, 256, dtype=torch.float64), steps=3, seed=0)
    assert result.info.path == "collapsed"
    assert [info.finite for _, info in seen] == [None] * 3
