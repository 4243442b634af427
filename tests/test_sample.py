"""fastebm.sample, and the driver behind it: the same chains as langevin_sample, in one go, in parts, or resumed."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import nn

import fastebm
from fastebm import ClassifierEnergy, GaussianEnergy, Langevin, MLPEnergy, NonFiniteError, langevin_sample, sample
from fastebm.backends import table
from fastebm.box import Box
from fastebm.rng import Stream
from fastebm.samplers.base import Info, Sampler, settled

pytestmark = pytest.mark.usefixtures("seeded")

SAMPLER = Langevin(0.3)


class Other(nn.Module):
    """No MLP, so by autograd."""

    def forward(self, x):
        return (x.flatten(1).square().sum(1) / 2 + x.flatten(1).sin().sum(1)).cos() + x.flatten(1).square().sum(1)


ENERGIES = {"mlp": lambda: MLPEnergy(5, (16, 8)), "autograd": Other}
every_energy = pytest.mark.parametrize("energy", list(ENERGIES.values()), ids=ENERGIES)


def same(a, b):
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.energies.nan_to_num(-1), b.energies.nan_to_num(-1))
    assert torch.equal(a.info.first_bad_step, b.info.first_bad_step)


@every_energy
@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "triton"])
def test_langevin_is_langevin_sample(energy, backend):
    energy = energy()
    result = sample(energy, SAMPLER, 5, n_chains=70, steps=12, thin=3, seed=4, backend=backend)
    options = {"batch_size": 70, "steps": 12, "seed": 4, "backend": backend}
    x, info = langevin_sample(energy, 5, SAMPLER, return_info=True, **options)
    (path,) = (langevin_sample(energy, 5, SAMPLER, return_trajectory=True, thin=3, **options),)
    assert torch.equal(result.x, x)
    assert torch.equal(result.trajectory, path)
    assert torch.equal(result.energies, info.energies)
    for name in ("backend", "path", "kernels", "precision", "seed", "temperature", "why_not_fused"):
        assert getattr(result.info, name) == getattr(info, name)
    for name in ("grad_norm", "clipped", "clamped", "first_bad_step"):
        torch.testing.assert_close(getattr(result.info, name), getattr(info, name))
    assert result.info.acceptance is None
    assert result.info.step_size == 0.3


@every_energy
def test_warmup_comes_first_and_is_not_kept(energy):
    energy = energy()
    schedule = torch.linspace(0.5, 0.1, 17)
    sampler = Langevin(schedule, torch.rand(9, 1))
    whole = langevin_sample(energy, 5, sampler, batch_size=9, steps=17, seed=2, return_trajectory=True)
    result = sample(energy, sampler, 5, n_chains=9, warmup=5, steps=12, thin=4, seed=2)
    assert torch.equal(result.trajectory, whole[:, [8, 12, 16]])
    assert torch.equal(result.x, whole[:, -1])
    assert sample(energy, SAMPLER, 5, n_chains=9, warmup=5, steps=12, seed=2).trajectory is None


@every_energy
@pytest.mark.parametrize("progress", [False, True])
def test_going_on_is_as_if_it_had_not_stopped(energy, progress, capsys):
    energy = energy()
    frozen = torch.rand(33, 5) < 0.2
    options = {"n_chains": 33, "seed": 8, "frozen": frozen, "first_chain": 2**40}
    whole = sample(energy, SAMPLER, 5, steps=50, progress=progress, thin=5, **options)
    first = sample(energy, SAMPLER, 5, steps=20, thin=5, **options)
    then = sample(energy, SAMPLER, init=first, steps=30, thin=5)
    same(then, whole)
    assert torch.equal(torch.cat([first.trajectory, then.trajectory], dim=1), whole.trajectory)
    once_more = sample(energy, SAMPLER, init=first, steps=30, thin=5)  # the result is a value: nothing has moved it
    same(once_more, then)
    assert ("steps/s" in capsys.readouterr().err) == progress


def test_labels_and_conditions_go_along():
    energy = ClassifierEnergy(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    labels = torch.arange(12) % 3
    whole = sample(energy, SAMPLER, 5, n_chains=12, steps=9, labels=labels, seed=1)
    first = sample(energy, SAMPLER, 5, n_chains=12, steps=4, labels=labels, seed=1)
    same(sample(energy, SAMPLER, init=first, steps=5), whole)
    other = sample(energy, SAMPLER, init=first, steps=5, labels=(labels + 1) % 3)
    assert not torch.equal(other.x, whole.x)


class Cliff(nn.Module):
    """NaN beyond 2 in the first coordinate."""

    def forward(self, x):
        return x.square().sum(1) / 2 + torch.where(x[:, 0] > 2.0, math.nan, 0.0) * x[:, 0]


@pytest.mark.parametrize("progress", [False, True])
def test_chains_that_stopped_stay_so(progress):
    options = {"n_chains": 200, "seed": 3, "on_nonfinite": "ignore"}
    whole = sample(Cliff(), Langevin(0.5), 2, steps=60, **options)
    bad = whole.info.first_bad_step >= 0
    assert 20 < int(bad.sum()) < 180
    assert int(whole.info.first_bad_step[bad].max()) > 25
    if progress:
        same(sample(Cliff(), Langevin(0.5), 2, steps=60, progress=True, **options), whole)
    first = sample(Cliff(), Langevin(0.5), 2, steps=20, thin=4, **options)
    then = sample(Cliff(), Langevin(0.5), init=first, steps=40, thin=4, on_nonfinite="ignore")
    assert torch.equal(then.x, whole.x)
    stopped = first.info.first_bad_step >= 0
    assert torch.equal(then.trajectory[stopped], first.x[stopped][:, None].expand(-1, 10, -1))
    assert torch.equal(then.energies.nan_to_num(-1), whole.energies.nan_to_num(-1))
    warm = sample(Cliff(), Langevin(0.5), 2, warmup=20, steps=40, **options)
    same(warm, whole)
    with pytest.raises(NonFiniteError, match="of 200 chains are not finite"):
        sample(Cliff(), Langevin(0.5), 2, warmup=20, steps=40, n_chains=200, seed=3)


def test_the_caller_keeps_what_it_had():
    energy = MLPEnergy(5, (8,), dropout=0.5, spectral_norm=True).train()
    before = {name: t.clone() for name, t in energy.state_dict().items()}
    init, state = torch.randn(7, 5), torch.get_rng_state()
    kept = init.clone()
    result = sample(energy, SAMPLER, init=init, steps=5, seed=0)
    assert torch.equal(init, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert energy.training
    assert all(torch.equal(before[name], t) for name, t in energy.state_dict().items())
    assert not result.x.requires_grad
    sample(energy, SAMPLER, init=init, steps=1)
    assert not torch.equal(torch.get_rng_state(), state)  # one seed, drawn from the global generator


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be >= 0, got -1"),
        ({"warmup": 1.5}, TypeError, "warmup must be an int, got 1.5"),
        ({"thin": 4}, ValueError, "thin must divide steps"),
        ({"thin": 2, "on_nonfinite": "reinit"}, ValueError, "a trajectory shows where chains exploded"),
        ({"on_nonfinite": "stop"}, ValueError, "on_nonfinite must be one of raise, reinit, ignore, got 'stop'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"sampler": Langevin}, TypeError, r"got <class .*Langevin'>: are its parentheses missing"),
        ({"sampler": 0.1}, TypeError, r"got 0.1: a step size alone is Langevin\(0.1\)"),
        ({"sampler": Langevin(torch.ones(7))}, ValueError, "step_size schedule must have one entry per step: got 7"),
        ({"sampler": Langevin(torch.ones(7, 1))}, ValueError, r"does not fit 3 chains; use \(3, 1\)"),
        ({"init": torch.zeros(3)}, ValueError, r"init must be \(n_chains, \*shape\)"),
        ({"init": torch.full((3, 5), math.nan)}, ValueError, "init must be finite"),
        ({"frozen": torch.ones(4, dtype=torch.bool)}, ValueError, "frozen must have one state's shape"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "takes x only"),
    ],
)
def test_bad_input(given, error, message):
    options = {"energy": MLPEnergy(5, (8,)), "sampler": SAMPLER, "n_chains": 3, "steps": 6, **given}
    with pytest.raises(error, match=message):
        sample(**options)


@pytest.mark.parametrize("given", [{"seed": 1}, {"first_chain": 4}, {"device": "cpu"}, {"input_size": 5}], ids=str)
def test_a_result_has_its_own_seed_and_numbers(given):
    result = sample(MLPEnergy(5, (8,)), SAMPLER, n_chains=3, steps=1)
    with pytest.raises(ValueError, match=f"its own {next(iter(given))}: leave them out, or pass init=result.x"):
        sample(MLPEnergy(5, (8,)), SAMPLER, init=result, steps=1, **given)


def test_no_steps_and_no_chains():
    energy, init = GaussianEnergy(), torch.randn(4, 3)
    result = sample(energy, SAMPLER, init=init, steps=0)
    assert torch.equal(result.x, init)
    torch.testing.assert_close(result.energies, energy(init))
    assert sample(energy, SAMPLER, 3, n_chains=0, steps=5, thin=1).trajectory.shape == (0, 5, 3)


class Position(NamedTuple):
    x: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Shift(Sampler):
    """The smallest sampler: to the right, by a uniform number per chain, within the bounds."""

    clamp: Box | None = None

    def init(self, target, x, noise):
        return Position(x)

    def step(self, target, state, noise, t):
        moved = state.x + noise.uniform(Stream.METROPOLIS, t)[:, None]
        new, finite = settled(target, state.x, moved, target.box)
        return Position(new), Info(finite)


def test_stopped_chains_when_the_call_that_goes_on_may_not_ignore_them():
    options = {"n_chains": 200, "seed": 3, "steps": 60}
    first = sample(Cliff(), Langevin(0.5), 2, on_nonfinite="ignore", **options)
    stopped = first.info.first_bad_step >= 0
    with pytest.raises(NonFiniteError, match=f"{int(stopped.sum())} of 200 chains of the SampleResult stopped"):
        sample(GaussianEnergy(), Langevin(0.5), init=first, steps=5)
    again = sample(GaussianEnergy(), Langevin(0.5), init=first, steps=0, on_nonfinite="reinit")
    assert torch.equal(again.x[~stopped], first.x[~stopped])
    assert bool((again.x[stopped] != first.x[stopped]).any(dim=1).all())
    assert float(again.x[stopped].abs().max()) <= 1.0
    moved = sample(GaussianEnergy(), Langevin(0.5), init=first, steps=5, on_nonfinite="reinit")
    assert bool((moved.x != again.x).any(dim=1).all())
    kept = sample(GaussianEnergy(), Langevin(0.5), init=first, steps=5, on_nonfinite="ignore")
    assert torch.equal(kept.x[stopped], first.x[stopped])
    torch.testing.assert_close(kept.energies, GaussianEnergy()(kept.x))  # of the energy of this call


@pytest.mark.parametrize("on_nonfinite", ["ignore", "reinit"])
def test_a_bar_changes_nothing(on_nonfinite):
    options = {"n_chains": 200, "seed": 3, "steps": 60, "warmup": 7, "on_nonfinite": on_nonfinite}
    plain, shown = (sample(Cliff(), Langevin(0.5), 2, progress=bar, **options) for bar in (False, True))
    same(plain, shown)
    for name in ("grad_norm", "clipped", "clamped"):
        torch.testing.assert_close(getattr(shown.info, name), getattr(plain.info, name), equal_nan=True)


@pytest.mark.parametrize("progress", [False, True])
def test_errors_count_the_steps_of_the_call(progress):
    class Late(nn.Module):
        def forward(self, x):
            return (-x * torch.where(x > 1.0, math.nan, 1.0))[:, 0]

    with pytest.raises(NonFiniteError, match=r"first at step 5\d of 70"):
        sample(Late(), Langevin(0.04, 0.0), init=torch.zeros(3, 1), warmup=30, steps=40, progress=progress)


def test_results_do_not_change_with_what_was_passed():
    energy = ClassifierEnergy(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    labels, frozen, seed = torch.arange(6) % 3, torch.rand(6, 5) < 0.3, torch.tensor([5])
    first = sample(energy, SAMPLER, 5, n_chains=6, steps=3, labels=labels, frozen=frozen, seed=seed)
    then = sample(energy, SAMPLER, init=first, steps=3)
    labels.zero_()
    frozen.fill_(True)
    seed.add_(1)
    first.x.zero_()
    same(sample(energy, SAMPLER, init=first, steps=3), then)


def test_a_bad_schedule_leaves_the_generator_alone():
    model = MLPEnergy(3, (8,))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="schedule must have one entry per step"):
        sample(model, Langevin(torch.ones(2)), steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match="thin must be an int, got None"):
        sample(model, SAMPLER, steps=3, thin=None)


def test_any_sampler_runs_and_is_resumed():
    energy, init = MLPEnergy(3, (8,)), torch.zeros(70, 3)
    frozen = torch.tensor([False, True, False])
    options = {"init": init, "frozen": frozen, "seed": 3}
    whole = sample(energy, Shift(), steps=12, thin=4, **options)
    assert bool((whole.x[:, 0] > 0).all())
    assert torch.equal(whole.x[:, 0], whole.x[:, 2])
    assert torch.equal(whole.x[:, 1], init[:, 1])
    torch.testing.assert_close(whole.energies, energy(whole.x)[:, 0].detach())
    for backend in ("torch", "reference"):
        torch.testing.assert_close(sample(energy, Shift(), steps=12, backend=backend, **options).x, whole.x)
    same(sample(energy, Shift(), init=sample(energy, Shift(), steps=5, **options), steps=7), whole)
    assert float(sample(energy, Shift(Box(-1.0, 1.0)), steps=12, **options).x.max()) == 1.0


class Moving(NamedTuple):
    x: torch.Tensor
    momentum: torch.Tensor


class Kick(Shift):
    """Forgets its momentum between the parts of a call."""

    def init(self, target, x, noise, momentum=None):
        return Moving(x, torch.zeros_like(x) if momentum is None else momentum)

    def step(self, target, state, noise, t):
        momentum = state.momentum + noise.normal(Stream.MOMENTUM, t)
        return Moving(state.x + 0.01 * momentum, momentum), Info(None)


class Carrying(Kick):
    carries: ClassVar[tuple] = ("momentum",)


def test_states_and_reports_that_would_be_lost_are_refused():
    with pytest.raises(TypeError, match="the state of Kick holds momentum, which would be lost"):
        sample(MLPEnergy(3, (8,)), Kick(), steps=1)

    class Counting(Shift):
        reports: ClassVar[dict] = {"moves": 0.0}

    with pytest.raises(TypeError, match="Counting reports moves, which SampleInfo has no field for"):
        sample(MLPEnergy(3, (8,)), Counting(), steps=1)


@every_energy
def test_what_a_state_carries_goes_on(energy):
    energy, options = energy(), {"n_chains": 150, "seed": 3}
    whole = sample(energy, Carrying(), 5, steps=12, **options)
    first = sample(energy, Carrying(), 5, warmup=2, steps=3, **options)
    same(sample(energy, Carrying(), init=first, steps=7), whole)
    same(sample(energy, init=first, steps=7), whole)  # the sampler of the result
    same(sample(energy, Carrying(), 5, steps=12, progress=True, **options), whole)
    other = sample(energy, SAMPLER, init=first, steps=2)  # another sampler has no use for it
    assert sample(energy, Carrying(), init=other, steps=2).x.isfinite().all()
    assert sample(energy, Carrying(), 5, n_chains=0, steps=2).x.shape == (0, 5)


@dataclasses.dataclass(frozen=True, eq=False)
class Together(Carrying):
    """Chains that interact: all move with the mean gradient."""

    coupled: ClassVar[bool] = True

    def step(self, target, state, noise, t):
        x = state.x - 0.1 * target.gradient(state.x).mean(dim=0)
        return Moving(x, state.momentum), Info(None)


@every_energy
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_coupled_chains_move_together(energy, backend):
    energy = energy()
    result = sample(energy, Together(), 5, n_chains=1200, steps=3, seed=2, backend=backend)
    x = sample(energy, Together(), 5, n_chains=1200, steps=0, seed=2).x
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        x = x - 0.1 * gradient.mean(dim=0)
    torch.testing.assert_close(result.x, x, rtol=1e-4, atol=1e-5)


def test_a_class_that_is_no_sampler_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Half:
        def step(self, target, state, noise, t):
            return state, Info(None)

    with pytest.raises(TypeError, match=r"a sampler of your own is .* a subclass of fastebm.samplers.base.Sampler"):
        sample(MLPEnergy(3, (8,)), Half(), steps=1)
    with pytest.raises(TypeError, match="the sampler must be"):
        sample(MLPEnergy(3, (8,)), steps=1)


def test_a_fused_run_serves_its_own_path_only(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(table.FUSED_RUNS, (Shift, "resident", "triton"), lambda job: pytest.fail("another path"))
    with pytest.raises(ValueError, match=r"Shift has no fused kernel for such energies \(autograd\)"):
        sample(GaussianEnergy(), Shift(), 3, steps=1, backend="triton")
    info = sample(GaussianEnergy(), Shift(), 3, steps=1).info
    assert (info.backend, info.path) == ("torch", "autograd")


def test_public_names():
    assert {"sample", "SampleResult", "Langevin", "langevin_sample"} <= set(fastebm.__all__)
    assert all(getattr(fastebm, name) is not None for name in fastebm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Metropolis'"):
        _ = fastebm.Metropolis
