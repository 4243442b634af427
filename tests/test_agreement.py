"""All paths are one computation: reference, torch tiles and Triton kernels agree step by step, given one noise.

Tolerances are measured. With the float64 reference as truth, a path may be off by twice what plain PyTorch is
off at the same precision, plus rounding:

    error <= 2 (error of plain PyTorch) + 2 steps ulp(scale),   scale = max |x| + max |a g|

A step rounds the state three times (a product, two sums: half an ulp each) and takes a noise value that is right
to about 2 ulp of its own, smaller, scale: 2 ulp in all. Errors of the gradient are in the measured part, which is
taken over 64 chains or more, so that one lucky chain is no yardstick.

Uninitialised memory holds NaN throughout, and kernels get their states between two guards.
"""

import itertools
from dataclasses import replace

import pytest
import runs
import torch
from fastebm.bench.problem import halves
from fastebm.kernels.triton.launch import SHARED_MEMORY, Launch, block, choose_launch, shared_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastebm import Activation, Langevin, MLPEnergy
from fastebm.backends import Chains
from fastebm.backends.choose import interpreted
from fastebm.energies import ACTIVATIONS
from fastebm.rng import Stream, normal
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe
from fastebm.targets.mlp import NotAnMLP, read_mlp

SEED = 0x9E3779B97F4A7C15
YARDSTICK = 64
ULP = torch.finfo(torch.float32).eps
REGIMES = ("resident", "streaming")
IN_MEMORY = tuple(f"{regime} in memory" for regime in REGIMES)
KINKED = ("relu", "leaky_relu")  # their slopes jump at 0, where rounding alone may choose the side


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """torch.empty and its kin give NaN, or the largest integer: what nobody writes fails."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def make_energy(dim, widths, activation="silu", *, bias=True, spectral_norm=False):
    """An MLP whose gradient is of the state's size: behind PyTorch's initial weights a wrong one would hide."""
    parameter = {"leaky_relu": 0.2, "softplus": 1.5}.get(activation, 0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        energy = MLPEnergy(dim, widths, Activation(activation, parameter), spectral_norm=spectral_norm)
        for p in energy.parameters():
            p.mul_(3.0)
    if not bias:
        for layer in energy:
            if isinstance(layer, nn.Linear):
                layer.bias = None
    return energy.eval()


def make_rule(n_chains, steps, *, step_form="number", noise_form="number", **options):
    forms = {
        "number": lambda lo, hi: hi,
        "schedule": lambda lo, hi: torch.linspace(lo, hi, steps),
        "per_chain": lambda lo, hi: torch.linspace(lo, hi, n_chains).reshape(-1, 1),
        "none": lambda lo, hi: 0.0,
    }
    return Langevin(forms[step_form](0.1, 0.5), forms[noise_form](0.3, 0.7), **options)


def start(n_chains, dim, device="cpu"):
    """States, and counters that use all their bits: chain numbers about 2^33, lifetime steps of all ages."""
    x = torch.randn(n_chains, dim, generator=torch.Generator().manual_seed(1)).to(device)
    numbers = (torch.arange(n_chains) * 3 + 2**33 - 50).to(device)
    first_steps = (torch.arange(n_chains) % 5 * 1000).to(device)
    return x, {"seed": SEED, "numbers": numbers, "first_steps": first_steps}


def first_rows(n, x, rule, counters):
    """The first n chains of a case."""
    values = {
        name: v[:n] if isinstance(v := getattr(rule, name), torch.Tensor) and v.ndim == 2 else v
        for name in ("step_size", "noise_scale")
    }
    counters = {k: v[:n] if isinstance(v, torch.Tensor) else v for k, v in counters.items()}
    return x[:n].clone(), replace(rule, **values), counters


def first_steps_of(rule, steps):
    """The rule of the first steps of a run."""
    values = {
        name: v[:steps] if isinstance(v := getattr(rule, name), torch.Tensor) and v.ndim == 1 else v
        for name in ("step_size", "noise_scale")
    }
    return replace(rule, **values)


# counters: all that a chain has beside its state, with labels and frozen coordinates too; asked: thin, telemetry


def advance_reference(energy, x, rule, steps, counters, dtype=torch.float32, **asked):
    return runs.by_definition(
        Energy(energy, x.shape[1:], dtype), Chains(x.flatten(1).to(dtype), **counters), rule, steps, **asked
    )


def advance_torch(energy, x, rule, steps, counters, **asked):
    description = describe(energy, labels="labels" in counters)
    return runs.closed_form(description, Chains(x.clone(), **counters), rule, steps, **asked)


def advance_fused(energy, x, rule, steps, counters, regime, precision="ieee", chunk=32, warps=4, **asked):
    """The fused kernel on a state between two guards; None where the GPU at hand has no room for it.

    regime: "resident" or "streaming"; with " in memory", as on sm_90 at bf16x3.
    """
    in_memory, regime = regime.endswith(" in memory"), regime.removesuffix(" in memory")
    description = describe(energy, labels="labels" in counters)
    block_dim = block(description.dim) if regime == "resident" else min(chunk, block(description.dim))
    launch = Launch(regime, 64, block_dim, warps, 1, in_memory=in_memory)  # with four warps each has chains of its own
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability()
        limit = SHARED_MEMORY.get(10 * major + minor, 101376)
        if shared_bytes(launch, description.dim, description.networks, precision) > limit:
            return None
    guarded = torch.full((x.numel() + 256,), torch.nan, device=x.device)
    inner = guarded[128 : 128 + x.numel()].view(x.shape).copy_(x)
    done = runs.fused_mlp(
        description, Chains(inner, **counters), rule, steps, precision=precision, launch=launch, **asked
    )
    assert guarded[:128].isnan().all()
    assert guarded[128 + x.numel() :].isnan().all()
    return done


def largest(values):
    return float(values.abs().max()) if values.numel() > 0 else 0.0


def where_the_gradient_is_taken(state, t, rule, steps, counters):
    """The state of step t in float64, with the noise and its clamp where they come first."""
    if not rule.noise_first:
        return state
    _, b = (c.expand(-1, steps) for c in rule.coefficients(len(state), steps, dtype=state.dtype, device=state.device))
    ages, dim = counters["first_steps"] + t, state.shape[1]
    noise = normal(counters["seed"], Stream.LANGEVIN, counters["numbers"], ages, dim, dtype=state.dtype)
    noisy = state + b[:, t, None] * noise
    if rule.clamp_noise and rule.clamp is not None:
        noisy = noisy.clamp(*rule.box.on(dim, dtype=state.dtype, device=state.device))
    return noisy if counters.get("frozen") is None else torch.where(counters["frozen"], state, noisy)


class Truth:
    """The float64 trajectory of a case, and what plain float32 PyTorch makes of it."""

    def __init__(self, energy, x, rule, steps, counters):
        self.states = [x.flatten(1).double()]
        for t in range(1, steps + 1):
            self.states.append(advance_reference(energy, x, first_steps_of(rule, t), t, counters, torch.float64).x)
        seen = [where_the_gradient_is_taken(self.states[t], t, rule, steps, counters) for t in range(steps)]
        self.seen = [*seen, self.states[-1]]
        exact, labels = Energy(energy, x.shape[1:], torch.float64), counters.get("labels")
        self.energy = exact(self.states[-1], labels)
        gradients = [exact.gradient(state, labels) for state in self.seen]
        self.sure = self._away_from_kinks(energy)
        a, _ = rule.coefficients(len(x), steps)
        scale = max(map(largest, (*self.states, *self.seen))) + (largest(a) if steps else 0) * max(
            map(largest, gradients)
        )
        plain = advance_reference(energy, x, rule, steps, counters)
        self.rounding = 2 * steps * ULP * scale
        self.tolerance = 2 * largest((plain.x - self.states[-1])[self.sure]) + self.rounding
        # an energy sums terms of about 1, and the state's own error moves it by |dE/dx|_1 times that
        slope = float(gradients[-1].abs().sum(dim=1).max())
        self.energy_tolerance = (
            2 * largest((plain.energy - self.energy)[self.sure])
            + 2 * ULP * max(1.0, largest(self.energy))
            + self.rounding * slope / x[0].numel() ** 0.5
        )

    def _away_from_kinks(self, energy):
        """Chains for which rounding can't choose the side of a kink."""
        sure = torch.ones(len(self.states[0]), dtype=torch.bool, device=self.states[0].device)
        try:
            description = describe(energy).to(sure.device, torch.float64)
        except NotAnMLP:
            return sure
        for mlp, h in itertools.product(description.mlps, self.seen):
            for weight, bias, activation in zip(mlp.weights[:-1], mlp.biases[:-1], mlp.activations, strict=True):
                z = nn.functional.linear(h, weight, bias)
                if activation.name in KINKED:
                    sure &= z.abs().amin(dim=1) > 3e-5
                h = activation.forward(z, torch.empty_like(z))
        return sure

    def check(self, done):
        n = len(done.x)
        sure = self.sure[:n]
        assert done.x.isfinite().all()
        assert done.energy.isfinite().all()
        assert torch.equal(done.first_bad, torch.full_like(done.first_bad, -1))
        if sure.any():
            assert largest((done.x - self.states[-1][:n])[sure]) <= self.tolerance
            assert largest((done.energy - self.energy[:n])[sure]) <= self.energy_tolerance


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
    energy = make_energy(dim, widths, activation, bias=bias, spectral_norm=spectral_norm).to(device)
    n_all = max(n_chains, YARDSTICK)
    rule = make_rule(n_all, steps, step_form=step_form, noise_form=noise_form, grad_clip=grad_clip, clamp=clamp)
    x, counters = start(n_all, dim, device)
    truth = Truth(energy, x, rule, steps, counters)
    x, rule, counters = first_rows(n_chains, x, rule, counters)
    truth.check(advance_torch(energy, x, rule, steps, counters))
    if (done := advance_fused(energy, x, rule, steps, counters, regime)) is not None:
        truth.check(done)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("dim", "widths", "activation"), [(3, [7], "softplus"), (40, [20, 33], "silu"), (5, [9, 8, 7], "tanh")]
)
def test_every_step_of_a_run(device, dim, widths, activation, regime):
    """Not its end only: after each number of steps, none included."""
    energy = make_energy(dim, widths, activation).to(device)
    rule = make_rule(YARDSTICK, 3, step_form="schedule", noise_form="per_chain")
    x, counters = start(YARDSTICK, dim, device)
    for steps in range(4):
        truth = Truth(energy, x, first_steps_of(rule, steps), steps, counters)
        arguments = energy, x, first_steps_of(rule, steps), steps, counters
        truth.check(advance_torch(*arguments))
        truth.check(advance_fused(*arguments, regime))


@pytest.mark.parametrize("regime", [*REGIMES, *IN_MEMORY])
@pytest.mark.parametrize("half", [0, 1])
def test_each_layer_has_an_activation_of_its_own(device, regime, half):
    """All there are, in two networks."""
    names = sorted(ACTIVATIONS)[half::2]
    parameters = {"leaky_relu": 0.2, "elu": 1.0, "softplus": 1.5}
    layers = list(make_energy(40, [20, 17, 16, 12, 9]))
    for i, name in enumerate(names):
        layers[2 * i + 1] = ACTIVATIONS[name].module(parameters.get(name, 0.0))
    energy = nn.Sequential(*layers).to(device)
    assert [activation.name for activation in describe(energy).mlps[0].activations] == names
    x, counters = start(YARDSTICK, 40, device)
    rule = make_rule(YARDSTICK, 2)
    truth = Truth(energy, x, rule, 2, counters)
    truth.check(advance_torch(energy, x, rule, 2, counters))
    truth.check(advance_fused(energy, x, rule, 2, counters, regime))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_slope_at_zero(device, activation):
    """Without biases, x = 0 puts every unit on the kink: all paths take the same side of it."""
    energy = make_energy(5, [6, 7], activation, bias=False).to(device)
    x, counters = start(YARDSTICK, 5, device)
    x.zero_()
    rule = make_rule(YARDSTICK, 1)
    expected = advance_reference(energy, x, rule, 1, counters, torch.float64).x
    done = [advance_fused(energy, x, rule, 1, counters, regime).x for regime in REGIMES]
    for moved in (advance_torch(energy, x, rule, 1, counters).x, *done):
        torch.testing.assert_close(moved.double(), expected, rtol=0, atol=8 * ULP * largest(expected))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter, about what is meant
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("clamp", [None, (-3.0, 3.0)])
def test_exploding_chains_freeze(device, regime, clamp):
    """Chains that leap to infinity, or whose gradient is NaN, stay where they were; others never notice."""
    steps, n_chains = 3, 70
    energy = make_energy(37, [20, 11]).to(device)
    with torch.no_grad():
        energy[0].weight.abs_()  # so that a huge x > 0 makes infinity, and not this or that by the order of sums
    x, counters = start(n_chains, 37, device)
    noise = torch.full((n_chains, 1), 0.5)
    calm = advance_reference(energy, x, Langevin(1.0, noise, clamp=clamp), steps, counters).x
    noise[::9] = 3e38
    x[1::9] = 3e38
    exploding = torch.zeros(n_chains, dtype=torch.bool, device=device)
    exploding[::9] = exploding[1::9] = True
    rule = Langevin(1.0, noise, clamp=clamp)
    for done in (
        advance_reference(energy, x, rule, steps, counters),
        advance_torch(energy, x, rule, steps, counters),
        advance_fused(energy, x, rule, steps, counters, regime),
    ):
        assert torch.equal(done.first_bad, torch.where(exploding, 0, -1).int())
        assert torch.equal(done.x[exploding], x[exploding])
        torch.testing.assert_close(done.x[~exploding], calm[~exploding], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("clamp", [None, (-1e38, torch.inf)])
def test_chains_explode_at_different_steps(device, regime, clamp):
    """A random walk towards float32's end: each chain stops at the last state before it."""
    steps, n_chains = 8, 70
    energy = make_energy(37, [20, 11]).to(device)
    with torch.no_grad():
        energy[0].weight *= 1e-10  # or a sum of terms might overflow, or not, by the order of its terms
    x, counters = start(n_chains, 37, device)
    rule = Langevin(0.25, torch.linspace(0.2e38, 1e38, n_chains).reshape(-1, 1), clamp=clamp)
    expected = advance_reference(energy, x, rule, steps, counters)
    assert len(expected.first_bad.unique()) >= 3
    for done in (
        advance_torch(energy, x, rule, steps, counters),
        advance_fused(energy, x, rule, steps, counters, regime),
    ):
        assert torch.equal(done.first_bad, expected.first_bad)
        assert done.x.isfinite().all()
        assert largest(done.x / 1e38 - expected.x / 1e38) <= 4 * steps * ULP * largest(expected.x / 1e38)


# -- precisions --------------------------------------------------------------------------------------------


def plain_product(a, w, precision):
    """a @ w in float32 of rounded operands, without the product of the two low halves."""
    a, w = (halves(v, precision, in_kernel=v is a, on_gpu=not interpreted()) for v in (a, w))
    return sum(a[i] @ w[j] for i in range(len(a)) for j in range(len(w)) if i + j < 2)


def plain_energy_and_gradient(mlp, x, precision):
    """E and dE/dx by plain PyTorch at a precision; the head is not a matrix product, and not rounded."""
    h, zs = x, []
    for weight, bias, activation in zip(mlp.weights[:-1], mlp.biases[:-1], mlp.activations, strict=True):
        zs.append(plain_product(h, weight.t(), precision) + bias)
        h = activation.forward(zs[-1], torch.empty_like(zs[-1]))
    energy = (h @ mlp.weights[-1].t() + mlp.biases[-1]).squeeze(1)
    g = mlp.weights[-1].expand_as(h)
    for weight, z, activation in zip(reversed(mlp.weights[:-1]), reversed(zs), reversed(mlp.activations), strict=True):
        g = plain_product(activation.backward(g, z, torch.empty_like(z)), weight, precision)
    return energy, g


def check_precision(device, energy, n_chains, precision, regime, **launch):
    """One step of gradient descent, and the energy at its start."""
    mlp = read_mlp(energy.to(device))
    x, counters = start(n_chains, mlp.dim, device)
    rule = Langevin(2.0, 0.0)
    plain_energy, plain_gradient = plain_energy_and_gradient(mlp, x, precision)
    exact_energy = Energy(energy, (mlp.dim,), torch.float64)(x.double())
    exact = advance_reference(energy, x, rule, 1, counters, torch.float64).x

    moved = advance_fused(energy, x, rule, 1, counters, regime, precision, **launch)
    stayed = advance_fused(energy, x, rule, 0, counters, regime, precision, **launch)
    scale = largest(x) + largest(exact - x)
    assert largest(moved.x - exact) <= 2 * largest(x - plain_gradient - exact) + 2 * ULP * scale
    assert torch.equal(stayed.x, x)
    assert largest(stayed.energy - exact_energy) <= 2 * largest(plain_energy - exact_energy) + 2 * ULP * max(
        1.0, largest(exact_energy)
    )


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize(
    ("dim", "widths", "activation"),
    [(2, [50, 20], "silu"), (63, [100], "tanh"), (100, [64, 33, 20], "softplus"), (1, [17, 16], "silu")],
)
def test_precisions(device, dim, widths, activation, precision, regime):
    check_precision(device, make_energy(dim, widths, activation), 130, precision, regime)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "widths"), [(1024, [512]), (1000, [512, 10])])
def test_wide(device, dim, widths):
    """At bf16x3, for which sm_90 has room; at full precision it has none."""
    energy = make_energy(dim, widths).to(device)
    x, counters = start(YARDSTICK, dim, device)
    rule = make_rule(YARDSTICK, 2)
    Truth(energy, x, rule, 2, counters).check(advance_torch(energy, x, rule, 2, counters))
    chosen = choose_launch(dim, (tuple(widths),), "bf16x3", 90)
    assert (chosen.regime, chosen.block_chains, chosen.num_warps, chosen.in_memory) == ("streaming", 64, 4, True)
    chunk = 256 if interpreted() else chosen.block_dim  # the interpreter pays for turns of the loop
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


@pytest.mark.parametrize("clamp", [None, (-1.0, 0.7)])
@pytest.mark.parametrize(
    ("step_form", "noise_form"), [("number", "per_chain"), ("schedule", "number"), ("per_chain", "schedule")]
)
@pytest.mark.parametrize(
    ("energy", "shape"),
    [(convolution(), (2, 5, 7)), *[(Wells(), (dim,)) for dim in (1, 3, 63, 1500)]],
    ids=["conv", "dim1", "dim3", "dim63", "dim1500"],
)
def test_fused_update(device, energy, shape, step_form, noise_form, clamp):
    steps, n_chains = 3, 70 if len(shape) > 1 or shape[0] < 1024 else 5  # wide ones are a program a chain
    rule = make_rule(n_chains, steps, step_form=step_form, noise_form=noise_form, clamp=clamp, grad_clip=0.8)
    energy = energy.to(device)
    x, counters = start(n_chains, torch.Size(shape).numel(), device)
    truth = Truth(energy, x.reshape(n_chains, *shape), rule, steps, counters)
    module = Energy(energy, shape, torch.float32)
    truth.check(runs.fused_module(module, Chains(x.clone(), **counters), rule, steps))
