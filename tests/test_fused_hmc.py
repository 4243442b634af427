"""K steps of HMC and MALA in one Triton launch, against the reference: chains, telemetry, bits, bad energies, laws.

Tolerances are measured. With the float64 reference as truth, an error may be twice that of the float32 reference, plus
2 ulp of each number's scale per leapfrog step. An accept test that is decided by less than that may send a chain
another way, so of the chains of a case one may differ.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import Launch, block, choose_launch, why_no_accept_test
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import cells_of_box, fits_cells, fits_gaussian
from paths import (
    HEADS,
    TERMS,
    ULP,
    YARDSTICK,
    advance_reference,
    begin,
    largest,
    make_energy,
    make_mlp,
    per_dim_bounds,
    same_bits,
    start,
)
from torch import nn
from truth import plain_energy_and_gradient

from fastebm import HMC, MALA, ClassifierEnergy, GaussianEnergy, MLPEnergy, NonFiniteError, SumEnergy, sample
from fastebm.backends import Chains
from fastebm.energies import ACTIVATIONS
from fastebm.rng import Noise, Stream
from fastebm.samplers.hmc import leapfrog
from fastebm.targets.autograd import Autograd, Energy
from fastebm.targets.base import View
from fastebm.targets.collapsed import reduced_sizes
from fastebm.targets.description import describe
from fastebm.targets.mlp import read_mlp
from fastebm.targets.remembered import Point

pytestmark = pytest.mark.usefixtures("poisoned_memory", "seeded")

# Warps with 16 chains each, warps that share chains, and weights in both orders.
LAUNCHES = {
    "own chains": lambda dim: Launch("resident", 64, block(dim), 4, 1),
    "shared chains": lambda dim: Launch("resident", 16, block(dim), 8, 1),
    "both orders": lambda dim: Launch("resident", 64, block(dim), 4, 1, both_orders=True),
}


def advance_fused(
    energy, x, sampler, steps, counters, precision="ieee", launch="own chains", reduced=False, **asked
):  # fmt: skip
    """The fused kernel on a state between two guards of NaN. reduced: in the dims that the first layer sees."""
    guarded = torch.full((x.numel() + 256,), torch.nan, device=x.device)
    inner = guarded[128 : 128 + x.numel()].view(x.shape).copy_(x)
    description = describe(energy, labels="labels" in counters)
    dim = reduced_sizes(description)[0] if reduced else description.dim
    done = runs.fused_hmc(
        description, Chains(inner, **counters), sampler, steps, precision=precision, launch=LAUNCHES[launch](dim),
        reduced=reduced, **asked,
    )  # fmt: skip
    assert guarded[:128].isnan().all()
    assert guarded[128 + x.numel() :].isnan().all()
    return done


def numbers(done):
    """Everything that a run returns about each chain, by name."""
    named = {"x": done.x, "energy": done.energy, **(done.telemetry or {})}
    return named if done.trajectory is None else {**named, "trajectory": done.trajectory.flatten(1)}


def check(done, energy, x, sampler, steps, counters, may_differ=1, **asked):
    """Hold a run of the first chains to the reference of all."""
    exact = advance_reference(energy, x, sampler, steps, counters, torch.float64, **asked)
    plain = advance_reference(energy, x, sampler, steps, counters, **asked)
    n, n_evaluated = len(done.x), steps * getattr(sampler, "n_leapfrog", 1) + 1
    assert torch.equal(done.first_bad, exact.first_bad[:n])
    found, truth, measured = numbers(done), numbers(exact), numbers(plain)
    assert found.keys() == truth.keys()
    alike = torch.ones(n, dtype=torch.bool, device=x.device)
    if steps == 0:
        assert torch.equal(found.pop("x"), x[:n])
        assert all(found.pop(name).isnan().all() for name in (sampler.reports if asked.get("telemetry") else ()))
        assert found.pop("trajectory", x[:0]).numel() == 0
    for name, value in found.items():
        errors = (measured[name] - truth[name]).abs().flatten(1 if value.ndim > 1 else 0)
        errors = errors if errors.ndim == 1 else errors.amax(dim=1)
        usual = errors[errors <= 100 * errors.median() + 100 * ULP]  # plain PyTorch may send a chain another way too
        scale = max(1.0, largest(truth["energy"] if name == "acceptance" else truth[name]))
        error = (value - truth[name][:n]).abs()
        error = error if error.ndim == 1 else error.amax(dim=1)
        alike &= error <= 2 * largest(usual) + 2 * n_evaluated * ULP * scale
    assert int((~alike).sum()) <= may_differ


STEPS = {
    "number": lambda n, steps: 0.3,
    "schedule": lambda n, steps: torch.linspace(0.1, 0.4, steps),
    "chain": lambda n, steps: torch.linspace(0.1, 0.4, n)[:, None],
}
DIAGONALS = {"none": lambda dim: None, "number": lambda dim: 1.7, "dims": lambda dim: torch.linspace(0.5, 2, dim)}


def make_sampler(n_leapfrog, n, steps, dim, *, form="number", diagonal="none", clamp=None):
    """HMC, or MALA if n_leapfrog is 0."""
    step_size, diagonal = STEPS[form](n, steps), DIAGONALS[diagonal](dim)
    if n_leapfrog == 0:
        return MALA(step_size, diagonal, clamp=clamp)
    return HMC(step_size, n_leapfrog, diagonal, clamp=clamp)


def first_chains(n, x, sampler, counters):
    """The same run for its first n chains alone."""
    step_size = sampler.step_size
    if isinstance(step_size, torch.Tensor) and step_size.ndim == 2:
        sampler = replace(sampler, step_size=step_size[:n])
    kept = {k: v if not isinstance(v, torch.Tensor) or len(v) == 1 else v[:n] for k, v in counters.items()}
    return x[:n], sampler, kept


# -- agreement -----------------------------------------------------------------------------------------------------


@settings(max_examples=9, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dim=st.sampled_from([1, 2, 3, 16, 63, 64]) | st.integers(1, 70),
    widths=st.lists(st.sampled_from([1, 3, 16, 17, 33]), min_size=1, max_size=3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    head=st.sampled_from(HEADS),
    terms=st.lists(st.sampled_from(TERMS), max_size=3),
    n_chains=st.sampled_from([1, 7, 64, 65]),
    steps=st.sampled_from([2, 1, 0]),
    n_leapfrog=st.sampled_from([0, 0, 1, 2, 3]),
    form=st.sampled_from(sorted(STEPS)),
    diagonal=st.sampled_from(sorted(DIAGONALS)),
    clamp=st.sampled_from(["none", "numbers", "dims"]),
    frozen=st.sampled_from([None, "dims", "chains"]),
    launch=st.sampled_from(sorted(LAUNCHES)),
)
def test_any_architecture(
    device, dim, widths, activation, head, terms, n_chains, steps, n_leapfrog, form, diagonal, clamp, frozen, launch
):
    classes = 4
    energy = make_energy(dim, widths, activation, head, classes, terms).to(device)
    n_all = max(n_chains, YARDSTICK)
    bounds = {"none": None, "numbers": (-2.0, 1.5), "dims": per_dim_bounds(dim)}[clamp]
    sampler = make_sampler(n_leapfrog, n_all, steps, dim, form=form, diagonal=diagonal, clamp=bounds)
    x, counters = begin(n_all, dim, device, classes=classes if head == "class" else None, frozen=frozen)
    x = x if bounds is None else x.clamp(*bounds)
    few, part, kept = first_chains(n_chains, x, sampler, counters)
    asked = {"thin": 1, "telemetry": True}
    check(advance_fused(energy, few, part, steps, kept, launch=launch, **asked), energy, x, sampler, steps, counters,
          **asked)  # fmt: skip


@pytest.mark.parametrize("n_leapfrog", [0, 4])
def test_every_step_of_a_run(device, n_leapfrog):
    """After 0, 1 and 4 steps, some rejected; without telemetry and trajectory too."""
    energy = make_mlp(5, [20, 33]).to(device)
    x, counters = start(YARDSTICK, 5, device)
    for steps in (0, 1, 4):
        sampler = make_sampler(n_leapfrog, YARDSTICK, steps, 5, form="schedule", clamp=(-3.0, 2.5))
        x = x.clamp(-3.0, 2.5)
        check(advance_fused(energy, x, sampler, steps, counters), energy, x, sampler, steps, counters)
    asked = {"thin": 2, "telemetry": True}
    done = advance_fused(energy, x, sampler, steps, counters, **asked)
    assert 0.1 < float(done.telemetry["acceptance"].mean()) < 0.97
    assert done.trajectory.shape == (YARDSTICK, 2, 5)
    check(done, energy, x, sampler, steps, counters, **asked)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
def test_precisions(device, precision):
    """A proposal has twice the error of plain PyTorch at the precision. At bf16 energies have that of bf16x3."""
    energy = make_mlp(40, [33, 20]).to(device)
    x, counters = start(YARDSTICK, 40, device)
    sampler = MALA(0.02)
    done = advance_fused(energy, x, sampler, 1, counters, precision)
    exact = advance_reference(energy, x, sampler, 1, counters, torch.float64)
    moved, should = (((v.x - x) != 0).any(dim=1) for v in (done, exact))
    assert int((moved != should).sum()) <= 1
    assert (moved & should).sum() > YARDSTICK / 2
    mlp = read_mlp(energy)
    _, gradient = plain_energy_and_gradient(mlp, x, precision)
    of = largest(gradient - Energy(energy, (40,), torch.float64).gradient(x.double()))
    assert largest((done.x - exact.x)[moved & should]) <= 2 * 0.01 * of + 4 * ULP * largest(exact.x)

    plain, _ = plain_energy_and_gradient(mlp, done.x, "bf16x3" if precision == "bf16" else precision)
    value = Energy(energy, (40,), torch.float64)(done.x.double())
    assert largest(done.energy - value) <= 2 * largest(plain - value) + 2 * ULP * largest(value)


# -- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_leapfrog", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_other_chains_change_no_bits(device, n_leapfrog):
    energy = make_energy(5, head="class", terms=("gaussian", "linear")).to(device)
    x, counters = begin(80, 5, device, classes=3, frozen="chains")
    sampler = make_sampler(n_leapfrog, 80, 2, 5, form="chain", diagonal="dims")
    asked = {"thin": 1, "telemetry": True}
    whole = advance_fused(energy, x, sampler, 2, counters, "bf16x3", **asked)
    for rows in (slice(0, 1), slice(3, 80)):
        part = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in counters.items()}
        each = replace(sampler, step_size=sampler.step_size[rows])
        assert same_bits(advance_fused(energy, x[rows], each, 2, part, "bf16x3", **asked), whole, rows)


def test_scratch_that_launches_share_changes_no_bits(device, monkeypatch):
    energy = make_mlp(5, [20]).to(device)
    x, counters = start(130, 5, device)
    whole = advance_fused(energy, x, HMC(0.3, 2), 2, counters, telemetry=True)
    monkeypatch.setattr("fastebm.backends.fused_hmc.CHAINS_AT_ONCE", 128)
    assert same_bits(advance_fused(energy, x, HMC(0.3, 2), 2, counters, telemetry=True), whole)


@pytest.mark.parametrize("sampler", [HMC(0.3, 3), MALA(torch.linspace(0.1, 0.5, 4))], ids=["HMC", "MALA"])
def test_going_on_is_as_if_it_had_not_stopped(device, sampler):
    energy = SumEnergy([MLPEnergy(5, (16,)), GaussianEnergy()]).to(device)
    options = {"n_chains": 20, "seed": 8, "frozen": torch.rand(20, 5) < 0.2, "backend": "triton"}
    whole = sample(energy, sampler, 5, steps=4, **options)
    assert (whole.info.backend, whole.info.path, whole.info.why_not_fused) == ("triton", "resident", None)
    first, then = sampler, sampler
    if isinstance(sampler, MALA):
        first, then = MALA(sampler.step_size[:1]), MALA(sampler.step_size[1:])
    resumed = sample(energy, then, init=sample(energy, first, 5, steps=1, **options), steps=3, backend="triton")
    assert torch.equal(resumed.x, whole.x)
    assert torch.equal(resumed.energies, whole.energies)
    shown = sample(energy, sampler, 5, steps=4, progress=True, **options)
    assert torch.equal(shown.x, whole.x)
    for name in sampler.reports:
        torch.testing.assert_close(getattr(shown.info, name), getattr(whole.info, name))


# -- which run it is -------------------------------------------------------------------------------------------------


def test_after_a_warmup_and_at_bf16(device):
    energy, options = MLPEnergy(3, (8,)).to(device), {"n_chains": 4, "steps": 2, "seed": 1, "backend": "triton"}
    result = sample(energy, HMC(0.3, 2, clamp=(-0.5, 0.5)), precision="bf16", **options)
    assert (result.info.path, result.info.precision) == ("resident", "bf16")
    assert result.info.gradients.tolist() == [2.0] * 4
    for sampler in (HMC(0.3, 2), HMC(0.3, 2, target_acceptance=None)):  # the second is not tuned
        assert sample(energy, sampler, warmup=2, **options).info.path == "resident"


def test_where_it_does_not_fit_its_own_steps_run(device, monkeypatch):
    networks = ((128, 128),)
    for capability, fits in ((80, False), (90, True), (None, True)):
        launch = choose_launch(64, networks, "bf16x3", capability)
        why_not = why_no_accept_test(launch, 64, networks, "bf16x3", capability)
        assert why_not is None if fits else "KiB of shared memory" in why_not
    energy, options = MLPEnergy(3, (8,)).to(device), {"n_chains": 4, "steps": 1, "seed": 1, "backend": "triton"}
    for reason in ("too little memory", None):
        monkeypatch.setattr("fastebm.backends.choose.why_no_accept_test", lambda *_, reason=reason: reason)
        info = sample(energy, HMC(0.3, 2), precision="bf16", **options).info
        assert (info.path, info.precision) == (("evaluation", "bf16x3") if reason else ("resident", "bf16"))
        assert info.why_not_fused is None if reason is None else info.why_not_fused.startswith(f"{reason}; ")


def test_a_start_that_is_not_finite(device):
    energy, x = MLPEnergy(3, (8,), "tanh").to(device), torch.zeros(5, 3, device=device)
    for bad in (math.nan, math.inf):  # E(inf) is finite
        x[2, 1] = bad
        with pytest.raises(ValueError, match="init must be finite, got NaN or inf in 1 of 5 chains"):
            sample(energy, HMC(0.1, 2), init=x, steps=2, backend="triton")


# -- bad energies ----------------------------------------------------------------------------------------------------


def biased(biases):
    """A classifier whose class k adds -biases[k] to E."""
    with torch.no_grad():
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, len(biases)))
        model[-1].bias.copy_(torch.tensor(biases))
    return ClassifierEnergy(model)


@pytest.mark.parametrize("sampler", [HMC(0.3, 2), pytest.param(MALA(0.3), marks=pytest.mark.slow)], ids=["HMC", "MALA"])
def test_energies_that_are_not_finite(device, sampler):
    """E = inf is a wall, where a chain rests; E = -inf and NaN stop a chain at once. Others do not see it."""
    energy = biased([0.0, -math.inf, math.inf, math.nan]).to(device)
    x, counters = begin(70, 2, device, classes=4)
    done = advance_fused(energy, x, sampler, 3, counters, telemetry=True)
    expected = advance_reference(energy, x, sampler, 3, counters, telemetry=True)
    labels = counters["labels"]
    assert torch.equal(done.first_bad, torch.where(labels >= 2, 0, -1).int())
    assert torch.equal(done.first_bad, expected.first_bad)
    assert torch.equal(done.x[labels > 0], x[labels > 0])
    torch.testing.assert_close(done.x, expected.x)
    torch.testing.assert_close(done.energy, expected.energy, equal_nan=True)
    for name, value in expected.telemetry.items():
        torch.testing.assert_close(done.telemetry[name], value, equal_nan=True, rtol=1e-4, atol=1e-4)
    with pytest.raises(NonFiniteError, match="52 of 70 chains are not finite, because the energy's weights are not"):
        sample(energy, sampler, init=x, labels=labels, steps=3, backend="triton")


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter warns of the overflow
@pytest.mark.parametrize(("n_leapfrog", "clamp"), [(0, (-3.3e38, 3.3e38)), (3, None)])
def test_chains_explode_at_different_steps(device, n_leapfrog, clamp):
    """Where all tanh are saturated the gradient is 0, so chains walk to float32's largest number at random."""
    energy = make_mlp(5, [16], "tanh").to(device)
    with torch.no_grad():
        energy[0].weight *= 1e-3
    x, counters = start(70, 5, device)
    x, h = x * 1e30, torch.linspace(0.1e38, 1e38, 70)[:, None] / max(n_leapfrog, 1)
    sampler = MALA(h.double() ** 2, clamp=clamp) if n_leapfrog == 0 else HMC(h, n_leapfrog, clamp=clamp)
    done = advance_fused(energy, x, sampler, 6, counters, telemetry=True)
    expected = advance_reference(energy, x, sampler, 6, counters, telemetry=True)
    assert torch.equal(done.first_bad, expected.first_bad)
    assert len(expected.first_bad.unique()) >= (3 if clamp is None else 2)
    torch.testing.assert_close(done.x / 1e37, expected.x / 1e37)
    torch.testing.assert_close(done.energy, expected.energy)
    for name, value in expected.telemetry.items():
        torch.testing.assert_close(done.telemetry[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("n_leapfrog", [0, 4])
def test_divergences(device, n_leapfrog):
    """Also where a trajectory was fast on its way and is slow at its end, and where it overflows."""
    energy = SumEnergy([MLPEnergy(1, (4,)), GaussianEnergy()]).to(device)
    x, (_, counters) = 120 * torch.randn(200, 1, device=device), start(200, 1, device)
    h = torch.linspace(1.6, 2.5, 200)[:, None]
    h[::9] = 1e37
    sampler = MALA(h.double() ** 2) if n_leapfrog == 0 else HMC(h, n_leapfrog)
    done = advance_fused(energy, x, sampler, 1, counters, telemetry=True)
    expected = advance_reference(energy, x, sampler, 1, counters, telemetry=True)
    diverged = expected.telemetry["divergences"] == 1
    assert torch.equal(done.telemetry["divergences"] == 1, diverged)
    assert torch.equal(done.first_bad, expected.first_bad)
    torch.testing.assert_close(done.x, expected.x, rtol=1e-4, atol=1e-4)
    assert (diverged[::9]).all()
    assert not diverged.all()

    target = View(Autograd(Energy(energy, (1,), torch.float32)))
    noise = Noise(counters["seed"], counters["numbers"], counters["first_steps"], 1, dtype=torch.float32, steps=1)
    momentum = noise.normal(Stream.MOMENTUM, 0)
    end = leapfrog(target, Point(x, *target.value_and_gradient(x)), momentum, h, n_leapfrog or 1)
    slow = (end.momentum.square() - momentum.square()).flatten() / 2 <= 1000
    assert (diverged & slow).any() or n_leapfrog == 0
    assert (diverged & ~slow).any()


# -- laws ------------------------------------------------------------------------------------------------------------

N, ALPHA = 8192, 1e-6
STD = torch.tensor([1.0, 0.5, 2.0])


def gaussian(sampler, steps, mean=0.0, std=STD, **asked):
    """From the law itself, which each step must leave as it is. The MLP adds nothing."""
    mlp = MLPEnergy(len(std), (4,))
    with torch.no_grad():
        mlp[-1].weight.zero_()
    description = describe(SumEnergy([mlp, GaussianEnergy(mean, std)]))
    numbers = torch.arange(N)
    chains = Chains(mean + torch.randn(N, len(std)) * std, 5, numbers, torch.zeros_like(numbers))
    # in the interpreter a program costs the same at any size
    launch = Launch("resident", 4096, 16, 4, 1)
    done = runs.fused_hmc(description, chains, sampler, steps, precision="ieee", launch=launch, telemetry=True, **asked)
    return fits_gaussian(done.x - mean, std, ALPHA), float(done.telemetry["acceptance"].mean())


@pytest.mark.parametrize(("sampler", "steps"), [(HMC(1.2, 3, torch.tensor([2.0, 3.0, 0.5])), 6), (MALA(0.6), 8)])
def test_a_gaussian_stays_what_it_is(sampler, steps):
    fits, acceptance = gaussian(sampler, steps)
    assert fits
    assert 0.3 < acceptance < 0.9


MUTANTS = {
    "accepts always": ("(tl.log(u) <= log_accept)", "(u <= 1.0)"),
    "wrong sign of log a": ("log_accept = energy - end - gained", "log_accept = end - energy + gained"),
    "no kinetic energy": ("log_accept = energy - end - gained", "log_accept = energy - end"),
    "the same momentum in every step": ("chain, step, 0, STREAM", "chain, tl.zeros_like(step), 0, STREAM"),
    "no half step at the end": ("tl.where(i < last, 1.0, 0.5)", "1.0"),
    "no half step at the start": ("moved = v - 0.5 * h", "moved = v - h"),
    "the gradient of before": ("tl.where(accepted[:, None], there,", "tl.where((t < 0) & accepted[:, None], there,"),
}


QUICK = ("accepts always", "wrong sign of log a", "the same momentum in every step")


def mutate(part, right, wrong, monkeypatch, tmp_path):
    """Run the kernel with a change in ``part``, hmc.py or reduced.py."""
    from fastebm.backends import fused_hmc

    modules, folder = {}, Path(fused_hmc.hmc.__file__).parent
    for name in ("reduced", "hmc"):  # the second imports the first
        text = (folder / f"{name}.py").read_text()
        if name == part:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        file = tmp_path / f"mutant_{name}.py"
        file.write_text(text.replace("from .reduced import", "from .mutant_reduced import"))
        spec = importlib.util.spec_from_file_location(f"fastebm.kernels.triton.mutant_{name}", file)
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, modules[name])
        spec.loader.exec_module(modules[name])
    monkeypatch.setattr(fused_hmc, "hmc", modules["hmc"])


@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MUTANTS]
)
def test_the_law_rejects_mutants(mutant, monkeypatch, tmp_path):
    mutate("hmc", *MUTANTS[mutant], monkeypatch, tmp_path)
    assert not gaussian(HMC(1.2, 3, torch.tensor([2.0, 3.0, 0.5])), 6)[0]


@pytest.mark.slow
def test_an_mlp_in_a_box_by_quadrature():
    energy, expected = cells_of_box(MLPEnergy(2, (16, 16), "tanh"))
    numbers = torch.arange(N)
    for sampler, steps in ((HMC(0.4, 4, torch.tensor([2.0, 0.5]), clamp=(-2.0, 2.0)), 40),
                           (MALA(0.5, clamp=(-2.0, 2.0)), 100)):  # fmt: skip
        chains = Chains(4 * torch.rand(N, 2) - 2, 1, numbers, torch.zeros_like(numbers))
        launch = Launch("resident", 4096, 16, 4, 1)
        done = runs.fused_hmc(describe(energy), chains, sampler, steps, precision="ieee", launch=launch)
        assert fits_cells(done.x, expected, ALPHA)
