"""The kernel that evaluates an MLP energy, and samplers whose own steps run on it (path "evaluation").

Tolerances are those of test_agreement.py: the error against float64 may be twice that of plain PyTorch, plus rounding.
"""

import pytest
import runs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import (
    CLASSES,
    IN_MEMORY,
    REGIMES,
    ULP,
    YARDSTICK,
    begin,
    largest,
    launch_at,
    make_energy,
    make_mlp,
    start,
)
from sampler_cases import CASES
from test_samplers import ENERGIES, per_chain
from truth import Truth, cases, plain_energy_and_gradient

from fastebm import HMC, MALA, NUTS, GaussianEnergy, Langevin, MLPEnergy, SumEnergy, sample
from fastebm.backends import Advanced, Chains
from fastebm.energies import ACTIVATIONS
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe
from fastebm.targets.mlp import read_mlp

pytestmark = pytest.mark.usefixtures("seeded", "poisoned_memory")

# the last: the columns of a chain belong to several warps, and states are read in another order
LAUNCHES = [*REGIMES, *IN_MEMORY, "eight warps"]


def target_of(energy, x, labels=None, regime="resident", precision="ieee"):
    """The energy as a target on the kernel; None if this GPU has too little shared memory."""
    description = describe(energy, labels=labels is not None)
    regime, warps = ("streaming", 8) if regime == "eight warps" else (regime, 4)
    launch = launch_at(regime, description, x.device, precision, warps=warps)
    numbers = torch.arange(len(x), device=x.device)
    chains = Chains(x, 0, numbers, numbers, labels)
    return None if launch is None else runs.evaluation(description, chains, precision=precision, launch=launch)


def check(energy, x, counters, regime, n=None):
    """Each method, for the first n states. The truth is gradient descent, whose step of size 2 subtracts dE/dx."""
    descent, labels = Langevin(2.0, 0.0), counters.get("labels")
    at_start, moved = (Truth(energy, x, descent, steps, counters) for steps in (0, 1))
    x, labels = x[:n], None if labels is None else labels[:n]
    if (target := target_of(energy, x, labels, regime)) is None:
        return
    first_bad = torch.full((len(x),), -1, dtype=torch.int32, device=x.device)
    value, gradient = target.value_and_gradient(x)
    at_start.check(Advanced(x, value, first_bad))
    for there in (x - gradient, x - target.gradient(x)):
        moved.check(Advanced(there, target.value(there), first_bad))


# -- the kernel ----------------------------------------------------------------------------------------------------


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), regime=st.sampled_from(LAUNCHES))
def test_any_energy(device, case, regime):
    """Networks of one to three hidden layers, each activation and head, sums with Gaussian and linear terms."""
    n, energy = case["n_chains"], case["energy"].to(device)
    x, counters = begin(max(n, YARDSTICK), case["dim"], device, classes=case["classes"])
    check(energy, x, counters, regime, n)


@pytest.mark.parametrize("regime", [*REGIMES, IN_MEMORY[1]])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_each_activation(device, activation, regime):
    energy = make_mlp(5, [9, 8], activation).to(device)
    check(energy, *start(YARDSTICK, 5, device), regime)


@pytest.mark.parametrize(
    ("dim", "widths", "head", "terms", "regime"),
    [
        (1, (3,), "scalar", ("slope",), "resident"),
        (128, (20, 17, 16, 9), "logsumexp", ("gaussian",), "resident"),
        (129, (33, 20), "class", ("gaussian", "linear", "mlp"), "streaming"),
        (800, (20,), "scalar", ("classifier", "wide gaussian"), "streaming in memory"),
        (783, (65, 9), "scalar", (), "streaming"),
    ],
)
def test_sizes(device, dim, widths, head, terms, regime):
    energy = make_energy(dim, widths, head=head, terms=terms).to(device)
    x, counters = begin(YARDSTICK, dim, device, classes=CLASSES if head == "class" else None)
    check(energy, x, counters, regime)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize(("dim", "widths", "regime"), [(2, [50, 20], "resident"), (63, [100, 20], "streaming")])
def test_precisions(device, dim, widths, regime, precision):
    energy = make_mlp(dim, widths).to(device)
    x, _ = start(YARDSTICK, dim, device)
    if (target := target_of(energy, x, regime=regime, precision=precision)) is None:
        pytest.skip("too little shared memory")
    exact = Energy(energy, (dim,), torch.float64)
    expected = exact(x.double()), exact.gradient(x.double())
    plain = plain_energy_and_gradient(read_mlp(energy), x, precision)
    for found, near, value in zip(target.value_and_gradient(x), plain, expected, strict=True):
        assert largest(found - value) <= 2 * largest(near - value) + 2 * ULP * max(1.0, largest(value))


@pytest.mark.parametrize(
    ("regime", "precision"),
    [(regime, "bf16x3") for regime in LAUNCHES] + [pytest.param(r, "ieee", marks=pytest.mark.slow) for r in LAUNCHES],
)
def test_a_state_does_not_depend_on_the_others(device, regime, precision):
    energy = make_energy(37, (20, 11), head="class", terms=("gaussian", "linear")).to(device)
    x, counters = begin(150, 37, device, classes=CLASSES)
    labels = counters["labels"]
    if (target := target_of(energy, x, labels, regime, precision)) is None:
        pytest.skip("too little shared memory")
    value, gradient = target.value_and_gradient(x)
    for rows in (slice(149, 150), slice(3, 67), slice(5, 140)):
        part = target_of(energy, x[rows], labels[rows], regime, precision).value_and_gradient(x[rows])
        assert torch.equal(part[0], value[rows])
        assert torch.equal(part[1], gradient[rows])
    twice = target.repeated(2).value_and_gradient(x.repeat_interleave(2, dim=0))
    assert torch.equal(twice[0], value.repeat_interleave(2))
    assert torch.equal(twice[1], gradient.repeat_interleave(2, dim=0))


def test_states_of_any_layout(device):
    """Columns of a matrix, and rows that are not aligned."""
    energy = make_mlp(5, [9]).to(device)
    x, _ = start(70, 5, device)
    target = target_of(energy, x)
    value, gradient = target.value_and_gradient(x)
    for same in (x.t().contiguous().t(), torch.cat([x.new_zeros(1), x.flatten()])[1:].view(70, 5)):
        found = target.value_and_gradient(same)
        assert torch.equal(found[0], value)
        assert torch.equal(found[1], gradient)


@pytest.mark.parametrize("regime", REGIMES)
def test_no_states(device, regime):
    x = torch.empty(0, 5, device=device)
    value, gradient = target_of(make_mlp(5, [9]).to(device), x, regime=regime).value_and_gradient(x)
    assert (value.shape, gradient.shape) == ((0,), (0, 5))


def test_more_states_than_one_launch_takes(device, monkeypatch):
    energy = make_mlp(20, [9]).to(device)
    x, _ = start(300, 20, device)
    whole = target_of(energy, x, regime="streaming").value_and_gradient(x)
    monkeypatch.setattr("fastebm.backends.evaluation.CHAINS_AT_ONCE", 128)
    parts = target_of(energy, x, regime="streaming").value_and_gradient(x)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


# -- samplers on it ------------------------------------------------------------------------------------------------

OWN_STEPS = {name: case for name, case in CASES.items() if name != "Langevin"}
own_steps = pytest.mark.parametrize("case", list(OWN_STEPS.values()), ids=list(OWN_STEPS))
N, DIM = 70, 5


def energy_and_options(name, device, n=N):
    energy, given = ENERGIES[name]()
    return energy.to(device), {"n_chains": n, "seed": 6, **{key: value[:n].to(device) for key, value in given.items()}}


@pytest.mark.parametrize("name", [pytest.param("mlp", marks=pytest.mark.slow), "labels"])
@own_steps
def test_every_sampler_agrees_with_the_reference(device, case, name):
    energy, options = energy_and_options(name, device)
    found = sample(energy, case.make(), DIM, steps=2, backend="triton", **options)
    assert (found.info.backend, found.info.path, found.info.kernels) == ("triton", "evaluation", "triton")
    assert found.info.precision == "bf16x3"
    assert found.info.why_not_fused.endswith(
        "has no fused kernel; its own steps run in PyTorch, and one launch computes energy and gradient of all chains"
    )
    truth = sample(energy.double(), case.make(), DIM, steps=2, backend="reference", **options)
    near = (found.x - truth.x).abs().amax(dim=1) < 1e-4
    assert int((~near).sum()) <= case.by_rounding * N
    torch.testing.assert_close(found.energies[near].double(), truth.energies[near], rtol=1e-4, atol=1e-4)


@per_chain
def test_other_chains_change_no_bits_of_a_run(device, case):
    energy, options = energy_and_options("labels", device)
    whole = sample(energy, case.make(), DIM, steps=1, backend="triton", **options)
    mine = {**options, "n_chains": 60, "labels": options["labels"][7:67]}
    part = sample(energy, case.make(), DIM, steps=1, backend="triton", first_chain=7, **mine)
    assert torch.equal(part.x, whole.x[7:67])
    assert torch.equal(part.energies, whole.energies[7:67])


def test_a_resumed_call_and_a_warmup(device):
    """A warm-up takes the same path. The call ends with the same bits whether it was resumed or not."""
    energy, options = energy_and_options("mlp", device, 20)
    options |= {"backend": "triton"}
    whole = sample(energy, HMC(0.3, 2), DIM, warmup=4, steps=3, **options)
    first = sample(energy, HMC(0.3, 2), DIM, warmup=4, steps=1, **options)
    then = sample(energy, init=first, steps=2, backend="triton")
    assert whole.info.path == then.info.path == "evaluation"
    assert torch.equal(then.x, whole.x)
    assert torch.equal(then.energies, whole.energies)


def test_bounds_and_frozen_coordinates(device):
    energy, options = energy_and_options("mlp", device, 20)
    init = torch.full((20, DIM), 0.2, device=device)
    frozen = torch.tensor([True, False, False, False, True], device=device)
    del options["n_chains"]
    x = sample(energy, MALA(0.5, clamp=(-0.1, 0.5)), init=init, frozen=frozen, steps=5, backend="triton", **options).x
    assert torch.equal(x[:, frozen], init[:, frozen])
    assert float(x.min()) >= -0.1
    assert float(x.max()) <= 0.5
    assert bool((x[:, ~frozen] != init[:, ~frozen]).any())


def test_a_weight_that_changes_between_calls_counts(device):
    energy = MLPEnergy(DIM, (8,)).to(device)
    options = {"init": torch.ones(3, DIM, device=device), "steps": 1, "seed": 1, "backend": "triton"}
    before = sample(energy, MALA(0.5), **options)
    energy[0].weight.data.mul_(2.0)  # changes no version counter
    after = sample(energy, MALA(0.5), **options)
    torch.testing.assert_close(after.energies, energy(after.x)[:, 0].detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(after.energies, before.energies)


@pytest.mark.parametrize("precision", ["bf16", None])
def test_an_exact_sampler_multiplies_as_exactly_as_bf16x3(device, precision):
    energy, options = energy_and_options("mlp", device, 20)
    options |= {"steps": 2, "backend": "triton"}
    expected, before = sample(energy, MALA(0.5), DIM, **options).x, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = sample(energy, MALA(0.5), DIM, precision=precision, **options)
        rounded = sample(energy, CASES["UnderdampedLangevin"].make(), DIM, precision=precision, **options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.info.precision == "bf16x3"
    assert torch.equal(found.x, expected)
    assert rounded.info.precision == "bf16"  # it has no accept test


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter warns of the overflow
def test_chains_that_are_not_finite(device):
    """A chain far outside overflows, is reported, and changes no other."""
    energy = SumEnergy([MLPEnergy(2, (8,)), GaussianEnergy()]).to(device)
    init = torch.zeros(70, 2, device=device)
    calm = sample(energy, NUTS(0.3, 2), init=init, steps=1, seed=1, backend="triton")
    init[::7] = 3e38
    options = {"init": init, "steps": 1, "seed": 1, "backend": "triton", "on_nonfinite": "ignore"}
    found = sample(energy, NUTS(0.3, 2), **options)
    assert (found.info.first_bad_step >= 0).nonzero().flatten().tolist() == list(range(0, 70, 7))
    others = found.info.first_bad_step < 0
    assert torch.equal(found.x[others], calm.x[others])


def test_no_cuda_graph_holds_its_steps(device, monkeypatch):
    energy, options = energy_and_options("mlp", device, 20)
    options |= {"steps": 1, "backend": "triton", "on_nonfinite": "ignore"}
    info = sample(energy, MALA(0.5), DIM, cuda_graph=True, **options).info
    assert info.cuda_graph == "steps in plain PyTorch wait for the device"
    monkeypatch.setattr("fastebm.driver.run.capturing", lambda device: True)
    with pytest.raises(ValueError, match=r"only kernels can run, and this call would wait: MALA has no fused kernel"):
        sample(energy, MALA(0.5), DIM, **options)


def test_an_energy_that_does_not_fit(device, monkeypatch):
    """It runs as before, on tiles."""
    energy, options = energy_and_options("mlp", device, 20)
    monkeypatch.setattr("fastebm.kernels.triton.launch.choose_launch", lambda *arguments: "too wide")
    with pytest.raises(ValueError, match=r"can't run: MALA has no fused kernel"):
        sample(energy, MALA(0.5), DIM, steps=1, backend="triton", **options)
