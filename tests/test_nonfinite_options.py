"""Chains that explode, with labels, frozen coordinates, clips and bounds per dim."""

import pytest
import torch
from paths import CLASSES, advance, advance_reference, begin, bits_equal, every_backend, every_path, make_energy, start
from torch import nn

import fastebm
from fastebm import ClassifierEnergy, GaussianEnergy, Langevin, NonFiniteError, SumEnergy, langevin_sample

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

# Slopes of -2^21 in 16 free dims have the norm 2^23, so that after both clips below a step moves each by
# step_size * 2^18. Chains 2, 3 and 4 overflow at steps 3, 1 and 0.
FREE, EXPLODING_STEPS = 16, 7
STEP_SIZES = torch.tensor([[2.0**60], [2.0**72], [2.0**108], [2.0**109], [2.0**110], [1.0]])
FIRST_BAD = [-1, -1, 3, 1, 0, -1]
CLIPS = {"grad_clip": 2.0**20, "grad_norm_clip": 2.0**21}


def slide(dim, label=None):
    """A plane made of powers of two, whose products and sums are exact. With a label, only that class has a slope."""
    model = nn.Sequential(nn.Linear(dim, 4), nn.ReLU(), nn.Linear(4, 1 if label is None else CLASSES))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight.fill_(0.5)
        model[0].bias.fill_(1.0)
        if label is None:
            model[2].weight.fill_(-(2.0**20))
        else:
            model[2].weight[label] = 2.0**20
    return model if label is None else ClassifierEnergy(model)


def exploding_case(device, classes=None):
    """Six chains on 17 dims. Each has another dim frozen."""
    dim, n = FREE + 1, len(STEP_SIZES)
    x, counters = start(n, dim, device)
    x.zero_()
    frozen = torch.zeros(n, dim, dtype=torch.bool, device=device)
    frozen[torch.arange(n), torch.arange(n) * 3 + 1] = True
    x[frozen] = 1e3  # outside the bounds
    counters["frozen"] = frozen
    if classes is not None:
        counters["labels"] = classes.to(device)
    hi = torch.full((dim,), 500.0)
    hi[::2] = torch.inf
    return x, counters, Langevin(STEP_SIZES, 0.0, clamp=(-torch.inf, hi), **CLIPS)


@every_path
def test_exploding_chains_freeze_at_their_last_state_with_every_option(device, path):
    x, counters, sampler = exploding_case(device)
    energy = SumEnergy([slide(FREE + 1), GaussianEnergy(0.0, 1e30)], [1.0, 0.0]).to(device)
    expected = advance_reference(energy, x.clone(), sampler, EXPLODING_STEPS, counters, thin=1, telemetry=True)
    done = advance(path, energy, x, sampler, EXPLODING_STEPS, counters, thin=1, telemetry=True)
    assert done.first_bad.tolist() == FIRST_BAD
    assert torch.equal(done.x, expected.x)
    assert torch.equal(done.trajectory, expected.trajectory)
    assert done.x.isfinite().all()
    assert torch.equal(done.x[counters["frozen"]], x[counters["frozen"]])
    # steps after a chain has stopped are not counted
    lived = torch.tensor([7, 7, 3, 1, 0, 7], device=device)
    torch.testing.assert_close(done.telemetry["clipped"], lived / 7)
    assert 2.0**18 > 500  # the smallest move: every step passes a bound
    torch.testing.assert_close(done.telemetry["clamped"], lived / 7)
    assert torch.equal(done.telemetry["grad_norm"], torch.full((6,), 2.0**23, device=device))


@every_path
def test_only_the_class_that_explodes_does(device, path):
    labels = torch.tensor([1, 0, 1, 1, 2, 1])  # of the three with large steps, one has another class
    x, counters, sampler = exploding_case(device, labels)
    energy = slide(FREE + 1, label=1).to(device)
    done = advance(path, energy, x, sampler, EXPLODING_STEPS, counters, thin=1, telemetry=True)
    assert done.first_bad.tolist() == [-1, -1, 3, 1, -1, -1]
    # its class has no slope, so that it does not move
    assert torch.equal(done.x[4], x[4])
    assert torch.equal(done.trajectory[4], x[4].expand(EXPLODING_STEPS, -1))
    assert done.telemetry["grad_norm"][4] == 0.0
    assert done.telemetry["clipped"][4] == 0.0


@every_path
def test_exploding_neighbours_change_nothing(device, path):
    """Neither states nor trajectory nor telemetry, bit for bit."""
    energy = make_energy(19, [20, 11], head="class", terms=("gaussian", "linear")).to(device)
    x, counters = begin(70, 19, device, classes=CLASSES, frozen="chains")
    counters["frozen"][::3] = False
    sampler = Langevin(0.3, 0.7, clamp=(-torch.inf, torch.full((19,), 1e30)), grad_clip=0.5)
    wild = x.clone()
    wild[::3] = 3e38
    calm = torch.arange(70) % 3 > 0
    alone = advance(path, energy, x, sampler, 2, counters, thin=1, telemetry=True)
    beside = advance(path, energy, wild, sampler, 2, counters, thin=1, telemetry=True)
    for a, b in zip([*alone[:4], *alone.telemetry.values()], [*beside[:4], *beside.telemetry.values()], strict=True):
        assert bits_equal(a[calm], b[calm])
    assert (alone.first_bad == -1).all()
    for row in beside.trajectory[~calm].unbind(1):
        exploded = beside.first_bad[~calm] == 0
        assert torch.equal(row[exploded], wild[~calm][exploded])


@every_path
def test_infinite_steps_leave_frozen_coordinates(device, path):
    """Chains with infinite noise stop where they are. Chains with all coordinates frozen do not explode."""
    energy = make_energy(19, [9]).to(device)
    x, counters = begin(12, 19, device, frozen="chains")
    counters["frozen"][::4] = True
    noise = torch.full((12, 1), 0.5)
    noise[::2] = 3e38
    done = advance(path, energy, x, Langevin(100.0, noise, clamp=(-0.5, 0.5)), 2, counters, thin=1, telemetry=True)
    expected = torch.full((12,), -1, device=device, dtype=torch.int32)
    expected[2::4] = 0
    assert torch.equal(done.first_bad, expected)
    assert torch.equal(done.x[::2], x[::2])
    frozen = counters["frozen"]
    for state in (done.x, *done.trajectory.unbind(1)):
        assert torch.equal(state[frozen], x[frozen])


@every_backend
def test_exploding_chains_raise_or_are_kept_or_reinitialised(backend, home, untouched):
    x, counters, _ = exploding_case(home, torch.tensor([1, 0, 1, 1, 2, 1]))
    labels, frozen = counters["labels"], counters["frozen"]
    energy = slide(FREE + 1, label=1).to(home)
    lo, hi = torch.full((FREE + 1,), -2.0), torch.full((FREE + 1,), 500.0)
    lo[::2] = 1.0
    x[~frozen] = lo.to(home).expand_as(x)[~frozen]
    step_size = STEP_SIZES.clone()
    step_size[2:5] = 2.0**127  # infinite at the first step, for label 1
    options = {
        "init": x, "frozen": frozen, "labels": labels, "steps": EXPLODING_STEPS, "noise_scale": 0.0, "seed": 4,
        "step_size": step_size, "clamp": (lo, hi), "backend": backend,
    }  # fmt: skip
    with (
        untouched(energy, x),
        pytest.raises(NonFiniteError, match=r"2 of 6 chains are not finite \(first at step 0 of 7"),
    ):
        langevin_sample(energy, **options)
    kept, info = langevin_sample(energy, on_nonfinite="ignore", return_info=True, **options)
    bad = info.first_bad_step >= 0
    assert bad.tolist() == [False, False, True, True, False, False]
    assert torch.equal(kept[bad], x[bad])
    fresh, fresh_info = langevin_sample(energy, on_nonfinite="reinit", return_info=True, **options)
    assert torch.equal(fresh_info.first_bad_step, info.first_bad_step)
    assert torch.equal(fresh[~bad], kept[~bad])
    assert torch.equal(fresh[frozen], x[frozen])
    free = ~frozen & bad[:, None]
    within = (fresh >= lo.to(home)) & (fresh <= hi.to(home))
    assert bool(within[free].all())
    assert len(fresh[free].unique()) == int(free.sum())
    assert bool((fresh[free] < 1.0).any())  # each dim starts within its own bounds
    assert bool((fresh[free] > 100.0).any())
    values = fastebm.energy(energy, fresh, labels=labels).detach()
    torch.testing.assert_close(fresh_info.energies[bad], values[bad], rtol=1e-3, atol=1e-3)
    assert torch.equal(langevin_sample(energy, on_nonfinite="reinit", **options), fresh)
