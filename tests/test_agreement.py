"""All paths agree step by step, given the same noise: reference, torch tiles and Triton kernels.

Tolerances are measured. With the float64 reference as truth, the error of a path may be twice the error of plain
PyTorch at the same precision, plus rounding:

    error <= 2 (error of plain PyTorch) + 2 steps ulp(scale),   scale = max |x| + max |a g|

A step rounds the state three times (a product and two sums: half an ulp each) and adds noise with an error of about
2 ulp of its own, smaller, scale: 2 ulp in all. The measured part contains the error of the gradient. It is taken over
at least 64 chains, so that it does not depend on one lucky chain.

Uninitialised memory holds NaN, and kernels get their states between two guards.
"""

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import choose_launch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import (
    IN_MEMORY,
    REGIMES,
    ULP,
    YARDSTICK,
    advance_fused,
    advance_reference,
    advance_torch,
    first_rows,
    first_steps_of,
    largest,
    make_mlp,
    make_sampler,
    start,
)
from torch import nn
from truth import Truth, plain_energy_and_gradient

from fastebm import Langevin
from fastebm.backends import Chains
from fastebm.backends.choose import interpreted
from fastebm.energies import ACTIVATIONS
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe
from fastebm.targets.mlp import read_mlp

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dim=st.sampled_from([1, 2, 3, 16, 63, 64, 100]) | st.integers(1, 128),
    widths=st.lists(st.sampled_from([1, 3, 16, 17, 33, 64, 100]), min_size=1, max_size=6),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    spectral_norm=st.booleans(),
    regime=st.sampled_from([*REGIMES, *IN_MEMORY]),
    n_chains=st.sampled_from([1, 7, 63, 64, 65]),
    steps=st.sampled_from([1, 3]),
    step_form=st.sampled_from(["number", "schedule", "per_chain"]),
    noise_form=st.sampled_from(["none", "number", "schedule", "per_chain"]),
    grad_clip=st.none() | st.just(0.3),
    clamp=st.none() | st.just((-1.0, 0.7)),
)
def test_any_architecture(
    device, dim, widths, activation, bias, spectral_norm, regime, n_chains, steps, step_form, noise_form,
    grad_clip, clamp,
):  # fmt: skip
    energy = make_mlp(dim, widths, activation, bias=bias, spectral_norm=spectral_norm).to(device)
    n_all = max(n_chains, YARDSTICK)
    sampler = make_sampler(n_all, steps, step_form=step_form, noise_form=noise_form, grad_clip=grad_clip, clamp=clamp)
    x, counters = start(n_all, dim, device)
    truth = Truth(energy, x, sampler, steps, counters)
    x, sampler, counters = first_rows(n_chains, x, sampler, counters)
    truth.check(advance_torch(energy, x, sampler, steps, counters))
    if (done := advance_fused(energy, x, sampler, steps, counters, regime)) is not None:
        truth.check(done)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("dim", "widths", "activation"), [(3, [7], "softplus"), (40, [20, 33], "silu"), (5, [9, 8, 7], "tanh")]
)
def test_every_step_of_a_run(device, dim, widths, activation, regime):
    """Not only the end of a run: after 0, 1, 2 and 3 steps."""
    energy = make_mlp(dim, widths, activation).to(device)
    sampler = make_sampler(YARDSTICK, 3, step_form="schedule", noise_form="per_chain")
    x, counters = start(YARDSTICK, dim, device)
    for steps in range(4):
        truth = Truth(energy, x, first_steps_of(sampler, steps), steps, counters)
        arguments = energy, x, first_steps_of(sampler, steps), steps, counters
        truth.check(advance_torch(*arguments))
        truth.check(advance_fused(*arguments, regime))


@pytest.mark.parametrize("regime", [*REGIMES, *IN_MEMORY])
@pytest.mark.parametrize("half", [0, 1])
def test_each_layer_has_an_activation_of_its_own(device, regime, half):
    """All activations, in two networks."""
    names = sorted(ACTIVATIONS)[half::2]
    parameters = {"leaky_relu": 0.2, "elu": 1.0, "softplus": 1.5}
    widths = [20, 17, 16, 12, 9, 8, 7, 6][: len(names)]
    layers = list(make_mlp(40, widths))
    for i, name in enumerate(names):
        layers[2 * i + 1] = ACTIVATIONS[name].module(parameters.get(name, 0.0))
    energy = nn.Sequential(*layers).to(device)
    assert [activation.name for activation in describe(energy).mlps[0].activations] == names
    x, counters = start(YARDSTICK, 40, device)
    sampler = make_sampler(YARDSTICK, 2)
    truth = Truth(energy, x, sampler, 2, counters)
    truth.check(advance_torch(energy, x, sampler, 2, counters))
    truth.check(advance_fused(energy, x, sampler, 2, counters, regime))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_slope_at_zero(device, activation):
    """Without biases, x = 0 puts every unit on its kink: all paths take the slope of the same side."""
    energy = make_mlp(5, [6, 7], activation, bias=False).to(device)
    x, counters = start(YARDSTICK, 5, device)
    x.zero_()
    sampler = make_sampler(YARDSTICK, 1)
    expected = advance_reference(energy, x, sampler, 1, counters, torch.float64).x
    done = [advance_fused(energy, x, sampler, 1, counters, regime).x for regime in REGIMES]
    for moved in (advance_torch(energy, x, sampler, 1, counters).x, *done):
        torch.testing.assert_close(moved.double(), expected, rtol=0, atol=8 * ULP * largest(expected))


@pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning"
)  # the interpreter warns of the overflow that is tested
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("clamp", [None, (-3.0, 3.0)])
def test_exploding_chains_freeze(device, regime, clamp):
    """Chains that move to infinity, or whose gradient is NaN, stay where they were. Others are unaffected."""
    steps, n_chains = 3, 70
    energy = make_mlp(37, [20, 11]).to(device)
    with torch.no_grad():
        energy[0].weight.abs_()  # so that a huge x > 0 gives infinity in any order of summation
    x, counters = start(n_chains, 37, device)
    noise = torch.full((n_chains, 1), 0.5)
    calm = advance_reference(energy, x, Langevin(1.0, noise, clamp=clamp), steps, counters).x
    noise[::9] = 3e38
    x[1::9] = 3e38
    exploding = torch.zeros(n_chains, dtype=torch.bool, device=device)
    exploding[::9] = exploding[1::9] = True
    sampler = Langevin(1.0, noise, clamp=clamp)
    for done in (
        advance_reference(energy, x, sampler, steps, counters),
        advance_torch(energy, x, sampler, steps, counters),
        advance_fused(energy, x, sampler, steps, counters, regime),
    ):
        assert torch.equal(done.first_bad, torch.where(exploding, 0, -1).int())
        assert torch.equal(done.x[exploding], x[exploding])
        torch.testing.assert_close(done.x[~exploding], calm[~exploding], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("clamp", [None, (-1e38, torch.inf)])
def test_chains_explode_at_different_steps(device, regime, clamp):
    """A random walk towards float32's largest number: each chain stops at its last finite state."""
    steps, n_chains = 8, 40
    energy = make_mlp(37, [20, 11]).to(device)
    with torch.no_grad():
        energy[0].weight *= 1e-10  # else whether a sum overflows may depend on the order of its terms
    x, counters = start(n_chains, 37, device)
    sampler = Langevin(0.25, torch.linspace(0.2e38, 1e38, n_chains).reshape(-1, 1), clamp=clamp)
    expected = advance_reference(energy, x, sampler, steps, counters)
    assert len(expected.first_bad.unique()) >= 3
    for done in (
        advance_torch(energy, x, sampler, steps, counters),
        advance_fused(energy, x, sampler, steps, counters, regime),
    ):
        assert torch.equal(done.first_bad, expected.first_bad)
        assert done.x.isfinite().all()
        assert largest(done.x / 1e38 - expected.x / 1e38) <= 4 * steps * ULP * largest(expected.x / 1e38)


NETWORKS = [(2, [50, 20], "silu"), (63, [100], "tanh"), (100, [64, 33, 20], "softplus"), (1, [17, 16], "silu")]
QUICK = ((2, "tf32"), (63, "bf16"))


def check_precision(device, energy, n_chains, precision, regime, **launch):
    """One step of gradient descent, and the energy at its start."""
    mlp = read_mlp(energy.to(device))
    x, counters = start(n_chains, mlp.dim, device)
    sampler = Langevin(2.0, 0.0)
    plain_energy, plain_gradient = plain_energy_and_gradient(mlp, x, precision)
    exact_energy = Energy(energy, (mlp.dim,), torch.float64)(x.double())
    exact = advance_reference(energy, x, sampler, 1, counters, torch.float64).x

    moved = advance_fused(energy, x, sampler, 1, counters, regime, precision, **launch)
    stayed = advance_fused(energy, x, sampler, 0, counters, regime, precision, **launch)
    scale = largest(x) + largest(exact - x)
    assert largest(moved.x - exact) <= 2 * largest(x - plain_gradient - exact) + 2 * ULP * scale
    assert torch.equal(stayed.x, x)
    assert largest(stayed.energy - exact_energy) <= 2 * largest(plain_energy - exact_energy) + 2 * ULP * max(
        1.0, largest(exact_energy)
    )


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("dim", "widths", "activation", "precision"),
    [
        # bf16x3 is the default; the others are quick for one network each
        pytest.param(*network, q, marks=[] if q == "bf16x3" or (network[0], q) in QUICK else pytest.mark.slow)
        for network in NETWORKS
        for q in ("bf16x3", "tf32", "bf16")
    ],
)
def test_precisions(device, dim, widths, activation, precision, regime):
    check_precision(device, make_mlp(dim, widths, activation), YARDSTICK + 1, precision, regime)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "widths"), [(1024, [512]), (1000, [512, 10])])
def test_wide(device, dim, widths):
    """At bf16x3, which fits the shared memory of sm_90. Full precision does not."""
    energy = make_mlp(dim, widths).to(device)
    x, counters = start(YARDSTICK, dim, device)
    sampler = make_sampler(YARDSTICK, 2)
    Truth(energy, x, sampler, 2, counters).check(advance_torch(energy, x, sampler, 2, counters))
    chosen = choose_launch(dim, (tuple(widths),), "bf16x3", 90)
    assert (chosen.regime, chosen.block_chains, chosen.num_warps, chosen.in_memory) == ("streaming", 64, 4, True)
    chunk = 256 if interpreted() else chosen.block_dim  # the interpreter is slow at many turns of the loop
    check_precision(device, energy, YARDSTICK, "bf16x3", "streaming in memory", chunk=chunk)


# -- other energies: autograd and the fused update ---------------------------------------------------------


def convolution():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(60, 1)
        ).eval()


class Wells(nn.Module):
    """E = sum of x^4/4 - x^2/2, any dim."""

    def forward(self, x):
        return (x**4 / 4 - x**2 / 2).sum(dim=1)


@pytest.mark.parametrize(
    ("step_form", "noise_form", "clamp"),
    [
        ("number", "per_chain", (-1.0, 0.7)),
        ("schedule", "number", None),
        ("per_chain", "schedule", (-1.0, 0.7)),
        pytest.param("number", "per_chain", None, marks=pytest.mark.slow),
        pytest.param("schedule", "number", (-1.0, 0.7), marks=pytest.mark.slow),
        pytest.param("per_chain", "schedule", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("energy", "shape"),
    [(convolution(), (2, 5, 7)), *[(Wells(), (dim,)) for dim in (1, 3, 63, 1500)]],
    ids=["conv", "dim1", "dim3", "dim63", "dim1500"],
)
def test_fused_update(device, energy, shape, step_form, noise_form, clamp):
    steps, n_chains = 3, 70 if len(shape) > 1 or shape[0] < 1024 else 5  # wide states take one program per chain
    sampler = make_sampler(n_chains, steps, step_form=step_form, noise_form=noise_form, clamp=clamp, grad_clip=0.8)
    energy = energy.to(device)
    x, counters = start(n_chains, torch.Size(shape).numel(), device)
    truth = Truth(energy, x.reshape(n_chains, *shape), sampler, steps, counters)
    module = Energy(energy, shape, torch.float32)
    truth.check(runs.fused_module(module, Chains(x.clone(), **counters), sampler, steps))
