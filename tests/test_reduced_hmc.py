"""HMC and MALA in one Triton launch, with steps in the dims that an MLP's first layer sees, against the reference.

Tolerances are those of test_fused_hmc.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from fastebm.kernels.triton.launch import block
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import (
    HEADS,
    YARDSTICK,
    advance_reference,
    begin,
    largest,
    make_mlp,
    per_dim_bounds,
    same_bits,
    start,
)
from test_collapsed import TERMS, make_energy
from test_fused_hmc import (
    DIAGONALS,
    LAUNCHES,
    STEPS,
    advance_fused,
    check,
    first_chains,
    gaussian,
    make_sampler,
    mutate,
)

from fastebm import HMC, MALA, NUTS, GaussianEnergy, MLPEnergy, NonFiniteError, SumEnergy, sample
from fastebm.backends import fused_hmc
from fastebm.backends.choose import reduced_launch
from fastebm.energies import ACTIVATIONS
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

pytestmark = pytest.mark.usefixtures("poisoned_memory", "seeded")


advance_reduced = partial(advance_fused, reduced=True)


# -- agreement -----------------------------------------------------------------------------------------------------


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dim=st.sampled_from([5, 32, 33, 64, 70]) | st.integers(1, 100),
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
    launch=st.sampled_from(sorted(LAUNCHES)),
)
def test_any_architecture(
    device, dim, widths, activation, head, terms, n_chains, steps, n_leapfrog, form, diagonal, clamp, launch
):
    energy = make_energy(dim, widths, activation, head, terms, bias=True).to(device)
    if any(kind.startswith("gaussian") for kind in terms) and diagonal == "dims":
        diagonal = "number"
    n_all = max(n_chains, YARDSTICK)
    bounds = {"none": None, "numbers": (-2.0, 1.5), "dims": per_dim_bounds(dim)}[clamp]
    sampler = make_sampler(n_leapfrog, n_all, steps, dim, form=form, diagonal=diagonal, clamp=bounds)
    x, counters = begin(n_all, dim, device, classes=3 if head == "class" else None)
    x = x if bounds is None else x.clamp(*bounds)
    few, part, kept = first_chains(n_chains, x, sampler, counters)
    asked = {"thin": 1, "telemetry": True}
    check(advance_reduced(energy, few, part, steps, kept, launch=launch, **asked), energy, x, sampler, steps, counters,
          **asked)  # fmt: skip


# -- precisions and bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16x3", pytest.param("tf32", marks=pytest.mark.slow), "bf16"])
def test_precisions(device, precision):
    """Only gradients are rounded to bf16, so ends and energies have the error of bf16x3 everywhere else."""
    energy = SumEnergy([make_mlp(70, [33, 20]), GaussianEnergy(0.3, 2.0)]).to(device)
    x, counters = start(YARDSTICK, 70, device)
    sampler = MALA(0.02)
    done = advance_reduced(energy, x, sampler, 1, counters, precision)
    exact = advance_reference(energy, x, sampler, 1, counters, torch.float64)
    moved, should = (((v.x - x) != 0).any(dim=1) for v in (done, exact))
    assert int((moved != should).sum()) <= 1
    assert (moved & should).sum() > YARDSTICK / 2
    gradient = Energy(energy, (70,), torch.float64).gradient(x.double())
    rounded = {"bf16": 2**-8, "tf32": 2**-10, "bf16x3": 2**-14}[precision]
    others = {"bf16": 2**-14}.get(precision, rounded)
    assert largest((done.x - exact.x)[moved & should]) <= 0.02 * rounded * largest(gradient) + others * largest(exact.x)
    value = Energy(energy, (70,), torch.float64)(done.x.double())
    assert largest(done.energy - value) <= others * largest(value)


@pytest.mark.slow
@pytest.mark.parametrize("n_leapfrog", [0, 2])
def test_other_chains_change_no_bits(device, n_leapfrog):
    energy = make_energy(40, [9], "silu", "class", ("gaussian about a mean",), bias=True).to(device)
    x, counters = begin(80, 40, device, classes=3)
    sampler = make_sampler(n_leapfrog, 80, 2, 40, form="chain")
    asked = {"thin": 1, "telemetry": True}
    whole = advance_reduced(energy, x, sampler, 2, counters, "bf16x3", **asked)
    for rows in (slice(0, 1), slice(3, 80)):
        part = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in counters.items()}
        each = replace(sampler, step_size=sampler.step_size[rows])
        assert same_bits(advance_reduced(energy, x[rows], each, 2, part, "bf16x3", **asked), whole, rows)


@pytest.mark.slow
def test_scratch_that_launches_share_changes_no_bits(device, monkeypatch):
    energy = SumEnergy([make_mlp(40, [9]), GaussianEnergy()]).to(device)
    x, counters = start(130, 40, device)
    whole = advance_reduced(energy, x, HMC(0.3, 2), 2, counters, telemetry=True)
    monkeypatch.setattr("fastebm.backends.fused_hmc.CHAINS_AT_ONCE", 128)
    assert same_bits(advance_reduced(energy, x, HMC(0.3, 2), 2, counters, telemetry=True), whole)


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(HMC(0.2, 3), marks=pytest.mark.slow), MALA(torch.linspace(0.05, 0.2, 4))], ids=["HMC", "MALA"],
)  # fmt: skip
def test_going_on_is_as_if_it_had_not_stopped(device, sampler):
    energy = SumEnergy([MLPEnergy(130, (16,)), GaussianEnergy()]).to(device)
    options = {"n_chains": 20, "seed": 8, "backend": "triton"}
    whole = sample(energy, sampler, 130, steps=4, **options)
    assert (whole.info.backend, whole.info.path, whole.info.why_not_fused) == ("triton", "collapsed", None)
    first, then = sampler, sampler
    if isinstance(sampler, MALA):
        first, then = MALA(sampler.step_size[:1]), MALA(sampler.step_size[1:])
    resumed = sample(energy, then, init=sample(energy, first, 130, steps=1, **options), steps=3, backend="triton")
    assert torch.equal(resumed.x, whole.x)
    assert torch.equal(resumed.energies, whole.energies)


@pytest.mark.slow
def test_weights_that_change_between_calls(device):
    """Q and R are made anew in each call, also after writes that no version counter sees."""
    mlp = make_mlp(40, [9]).to(device)
    x, counters = start(YARDSTICK, 40, device)
    for change in (lambda p: None, lambda p: p.data.mul_(-2.0), lambda p: p.add_(0.1)):
        with torch.no_grad():
            change(mlp[0].weight)
        check(advance_reduced(mlp, x, HMC(0.2, 3), 2, counters), mlp, x, HMC(0.2, 3), 2, counters)


@pytest.mark.parametrize("place", [pytest.param("head", marks=pytest.mark.slow), "first"])
def test_weights_that_are_not_finite_move_no_chain(device, place):
    energy, x = make_mlp(130, [9]).to(device), torch.randn(5, 130, device=device)
    with torch.no_grad():
        (energy[0] if place == "first" else energy[-1]).weight[0, 3] = math.nan
    for backend in ("triton", "auto"):
        found = sample(energy, HMC(0.1, 2), init=x, steps=2, seed=1, backend=backend, on_nonfinite="ignore")
        assert found.info.path == "collapsed"
        assert torch.equal(found.x, x)
        assert found.energies.isnan().all()


def test_products_with_q_are_never_rounded_to_tf32(device, monkeypatch):
    """The interpreter does not round operands to tf32, as tensor cores do."""
    seen = []

    def layers_of(*arguments, **options):
        seen.append(arguments[2])
        return layers_of_fused(*arguments, **options)

    layers_of_fused = fused_hmc.layers_of
    monkeypatch.setattr(fused_hmc, "layers_of", layers_of)
    energy = make_mlp(40, [9]).to(device)
    x, counters = start(5, 40, device)
    for precision in ("tf32", "bf16", "bf16x3"):
        advance_reduced(energy, x, MALA(0.1), 0, counters, precision)
    assert seen == ["bf16x3", "tf32"] + ["bf16x3", "bf16x3"] * 2  # of Q, and of energies


# -- which run it is -----------------------------------------------------------------------------------------------


def path_of(energy, sampler, **options):
    info = sample(energy, sampler, 130, n_chains=3, steps=1, seed=1, backend="triton", **options).info
    assert (info.why_not_fused is None) == (info.path in ("collapsed", "resident"))
    return info.path, info.precision


@pytest.mark.slow
def test_where_it_runs(device):
    mlp, gaussian = MLPEnergy(130, (8,)).to(device), GaussianEnergy()
    energy, each = SumEnergy([mlp, gaussian]).to(device), torch.linspace(0.5, 2, 130)
    assert path_of(energy, MALA(0.1, clamp=(-1.0, 1.0)), precision="bf16") == ("collapsed", "bf16")
    assert path_of(mlp, HMC(0.1, 1, mass=each)) == ("collapsed", "bf16x3")
    assert path_of(energy, HMC(0.1, 1), warmup=1) == ("collapsed", "bf16x3")
    # something acts on single coordinates
    for sampler, options in ((HMC(0.1, 1, mass=each), {}), (MALA(0.1), {"frozen": each < 1})):
        assert path_of(energy, sampler, **options)[0] == "evaluation"
    uneven = SumEnergy([mlp, GaussianEnergy(0.0, each)]).to(device)
    assert path_of(uneven, HMC(0.1, 1))[0] == "evaluation"
    # no kernel, no narrower, and too wide for one
    assert path_of(energy, NUTS(0.1, 1))[0] == "evaluation"
    for width in (130, 140):
        assert path_of(MLPEnergy(130, (width,)).to(device), MALA(0.1))[0] == "evaluation"


def test_only_where_the_reduced_energy_fits(monkeypatch):
    for capability, precision, widths, fits in (
        (90, "bf16x3", (128, 128), True), (90, "tf32", (128, 128), False), (90, "bf16x3", (256, 128), False),
        (80, "bf16x3", (128, 128), False), (80, "bf16x3", (64, 64), True), (90, "bf16x3", (129,), False),
    ):  # fmt: skip
        monkeypatch.setattr("fastebm.backends.choose.interpreted", lambda: False)
        monkeypatch.setattr("fastebm.backends.choose._capability", lambda _, capability=capability: capability)
        found = reduced_launch(describe(MLPEnergy(784, widths)), precision, torch.device("cuda"))
        assert (found is not None) == fits
        assert found is None or (found.regime, found.block_dim) == ("resident", block(widths[0]))


# -- bad energies --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter warns of the overflow
@pytest.mark.parametrize(
    ("n_leapfrog", "clamp"), [pytest.param(0, (-3.3e38, 3.3e38), marks=pytest.mark.slow), (3, None)]
)
def test_chains_explode_at_different_steps(device, n_leapfrog, clamp):
    """Where all tanh are saturated the gradient is 0, so chains walk to float32's largest number at random."""
    energy = make_mlp(40, [3], "tanh").to(device)
    with torch.no_grad():
        energy[0].weight *= 1e-3
    x, counters = start(70, 40, device)
    x, h = x * 1e30, torch.linspace(0.1e38, 1e38, 70)[:, None] / max(n_leapfrog, 1)
    sampler = MALA(h.double() ** 2, clamp=clamp) if n_leapfrog == 0 else HMC(h, n_leapfrog, clamp=clamp)
    done = advance_reduced(energy, x, sampler, 6, counters)
    expected = advance_reference(energy, x, sampler, 6, counters)
    same = done.first_bad == expected.first_bad
    assert len(expected.first_bad.unique()) >= 3
    assert int((~same).sum()) <= 2  # z, which has the length of x, may overflow a step before the largest coordinate
    assert (done.first_bad < expected.first_bad)[~same].all()
    torch.testing.assert_close((done.x / 1e37)[same], (expected.x / 1e37)[same], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(done.energy[same], expected.energy[same])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("n_leapfrog", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_divergences(device, n_leapfrog):
    """In the dims that the MLP sees and in the others, and where a trajectory overflows."""
    energy = SumEnergy([MLPEnergy(8, (4,)), GaussianEnergy()]).to(device)
    x, (_, counters) = 40 * torch.randn(200, 8, device=device), start(200, 8, device)
    h = torch.linspace(1.6, 2.5, 200)[:, None]
    h[::9] = 1e37
    sampler = MALA(h.double() ** 2) if n_leapfrog == 0 else HMC(h, n_leapfrog)
    done = advance_reduced(energy, x, sampler, 1, counters, telemetry=True)
    expected = advance_reference(energy, x, sampler, 1, counters, telemetry=True)
    diverged = expected.telemetry["divergences"] == 1
    assert torch.equal(done.telemetry["divergences"] == 1, diverged)
    assert torch.equal(done.first_bad, expected.first_bad)
    torch.testing.assert_close(done.x, expected.x, rtol=1e-4, atol=1e-4)
    assert (diverged[::9]).all()
    assert 0.1 < float(diverged.float().mean()) < 0.9


def test_energies_that_are_not_finite(device):
    """A chain that meets NaN stops, and the call raises for it."""
    energy, x = MLPEnergy(130, (8,)).to(device), torch.zeros(5, 130, device=device)
    for bad in (math.nan, math.inf):
        x[2, 129] = bad
        with pytest.raises(ValueError, match="init must be finite, got NaN or inf in 1 of 5 chains"):
            sample(energy, HMC(0.1, 2), init=x, steps=2, backend="triton")
    with torch.no_grad():
        energy[-1].bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="5 of 5 chains are not finite, because the energy's weights are not"):
        sample(energy, HMC(0.1, 2), init=torch.zeros(5, 130, device=device), steps=2, backend="triton")


# -- laws ----------------------------------------------------------------------------------------------------------


def gaussian_in_nine_dims(sampler, steps):
    """The MLP sees four of them."""
    return gaussian(sampler, steps, 0.5, torch.full((9,), 0.7), reduced=True)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [(HMC(0.9, 3), 6), pytest.param(MALA(0.3), 8, marks=pytest.mark.slow)], ids=["HMC", "MALA"],
)  # fmt: skip
def test_a_gaussian_stays_what_it_is(sampler, steps):
    fits, acceptance = gaussian_in_nine_dims(sampler, steps)
    assert fits
    assert 0.3 < acceptance < 0.95


MUTANTS = {
    "no momentum outside": ("reduced", "leaps.beta * v +", "0.0 * v +"),
    "no Gaussian term outside": ("reduced", "moved += leaps.alpha_1 * y", "moved += 0.0 * y"),
    "no kinetic energy outside": ("hmc", "gained += last_gain", "gained += 0.0 * last_gain"),
    "no energy outside": ("hmc", "0.5 * curvature * square", "0.5 * curvature * tl.sum(x * x, axis=1)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_rejects_mutants(mutant, monkeypatch, tmp_path):
    mutate(*MUTANTS[mutant], monkeypatch, tmp_path)
    assert not gaussian_in_nine_dims(HMC(0.9, 3), 6)[0]
