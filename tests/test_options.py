"""Heads and sums under every option of the sampler: labels, frozen coordinates, clips, bounds a dim, trajectories.

All paths are held to the float64 reference with the measured tolerances of test_agreement.py; what an option means
is tested apart from that, on every path, reference included.
"""

import itertools
import math

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import Launch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from test_agreement import (
    IN_MEMORY,
    REGIMES,
    ULP,
    YARDSTICK,
    Truth,
    advance_fused,
    advance_reference,
    advance_torch,
    first_rows,
    largest,
    make_rule,
    poisoned_memory,  # noqa: F401 - a fixture of this module too
    start,
)
from test_laws import double, standard_normal, two_sided
from torch import nn

import fastebm
from fastebm import (
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    NonFiniteError,
    SumEnergy,
    langevin_sample,
)
from fastebm.backends import Chains
from fastebm.backends.choose import multiplies_bf16
from fastebm.energies import ACTIVATIONS
from fastebm.rng import Stream, normal
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

# The interpreter computes in NumPy, which warns where a GPU overflows in silence.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

FAST_PATHS = ("torch", "products", *REGIMES)  # these promise bits
PATHS = ("reference", "update", *FAST_PATHS)
BACKENDS = ("reference", "torch", "triton")
every_path = pytest.mark.parametrize("path", PATHS)


def _seldom(paths, often):
    """Each path, those that take many seconds in the interpreter as slow tests."""
    marked = [pytest.param(path, marks=[] if path in often else pytest.mark.slow) for path in paths]
    return pytest.mark.parametrize("path", marked)


every_backend = pytest.mark.parametrize("backend", BACKENDS)
DIM, CLASSES = 5, 3


def advance(path, energy, x, rule, steps, counters, **asked):
    """Any path, from what ``start`` gives; "streaming" in chunks of 16 dims, "eight warps" likewise."""
    if path == "reference":
        return advance_reference(energy, x.clone(), rule, steps, counters, **asked)
    if path == "torch":
        return advance_torch(energy, x, rule, steps, counters, **asked)
    chains = Chains(x.clone(), **counters)
    if path == "update":
        return runs.fused_module(Energy(energy, x.shape[1:], torch.float32), chains, rule, steps, **asked)
    if path == "products":
        description = describe(energy, labels="labels" in counters)
        return runs.fused_products(description, chains, rule, steps, **asked)
    if path == "eight warps":
        return advance_fused(energy, x, rule, steps, counters, "streaming", chunk=16, warps=8, **asked)
    return advance_fused(energy, x, rule, steps, counters, path, chunk=16, **asked)


def network(dim, widths, outputs=1, activation="silu", seed=0):
    """An MLP whose gradient is of the state's size, as make_energy of test_agreement.py."""
    parameter = {"leaky_relu": 0.2, "elu": 1.0, "softplus": 1.5}.get(activation, 0.0)
    sizes, layers = [dim, *widths], []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation].module(parameter)]
        model = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
        for p in model.parameters():
            p.mul_(3.0)
    return model.eval()


def term(kind, dim):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {
            "mlp": lambda: network(dim, [7], activation="tanh", seed=2),
            "classifier": lambda: ClassifierEnergy(network(dim, [9], 4, seed=3)),
            "gaussian": lambda: GaussianEnergy(torch.linspace(-1, 1, dim), torch.linspace(1, 2, dim)),
            "wide gaussian": lambda: GaussianEnergy(0.3, 2.0),
            "linear": lambda: nn.Linear(dim, 1),
            "slope": lambda: nn.Linear(dim, 1, bias=False),
        }[kind]()


TERMS = ("mlp", "classifier", "gaussian", "wide gaussian", "linear", "slope")
HEADS = ("scalar", "logsumexp", "class")


def make_energy(dim, widths=(20, 11), activation="silu", head="scalar", classes=CLASSES, terms=()):
    """An MLP with a head, and if there are terms the sum of all, one weight below 0 and the last two nested."""
    model = network(dim, widths, 1 if head == "scalar" else classes, activation)
    if head != "scalar":
        model = ClassifierEnergy(model)
    if terms:
        energies = [model, *(term(kind, dim) for kind in terms)]
        if len(energies) > 2:
            energies = [*energies[:-2], SumEnergy(energies[-2:], [1.1, 0.4])]
        model = SumEnergy(energies, [(1.0, -0.5, 0.7, 1.3)[k % 4] for k in range(len(energies))])
    return model.eval()


def per_dim_bounds(dim):
    return torch.linspace(-2.0, -0.5, dim), torch.linspace(0.2, 1.5, dim)


def frozen_coordinates(form, n_chains, dim):
    """None, or (1 or n_chains, dim)."""
    if form == "dims":
        return (torch.arange(dim) % 3 == 0)[None]
    if form == "chains":
        return torch.rand(n_chains, dim, generator=torch.Generator().manual_seed(4)) < 0.3
    return None


def begin(n_chains, dim, device="cpu", *, classes=None, frozen=None):
    x, counters = start(n_chains, dim, device)
    if classes is not None:
        counters["labels"] = (torch.arange(n_chains, device=device) * 7 + 1) % classes
    if frozen is not None:
        counters["frozen"] = frozen_coordinates(frozen, n_chains, dim).to(device)
    return x, counters


def free_gradient(energy, x, counters):
    """dE/dx in float64, 0 where frozen."""
    grad = Energy(energy, x.shape[1:], torch.float64).gradient(x.double(), counters.get("labels"))
    return grad if counters.get("frozen") is None else grad.masked_fill(counters["frozen"], 0.0)


def same_bits(done, expected, rows=slice(None)):
    """Everything that a path returns; NaN, which a gradient norm is after no step, equals NaN."""
    pairs = [
        *zip(done[:4], expected[:4], strict=True),
        *zip((done.telemetry or {}).values(), (expected.telemetry or {}).values(), strict=True),
    ]
    return all((a is None) == (b is None) and (a is None or bits_equal(a, b[rows])) for a, b in pairs)


def bits_equal(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


# -- agreement ----------------------------------------------------------------------------------------------------


class Told(Truth):
    """The truth about trajectories and telemetry too, by the formulas of the rule.

    Counts of steps are compared where no bound was nearer than ten times the error there may be.
    """

    def __init__(self, energy, x, rule, steps, counters, thin):
        super().__init__(energy, x, rule, steps, counters)
        self.steps, self.thin, n, dim = steps, thin, *x.shape
        if isinstance(energy, SumEnergy):  # terms that cancel leave their rounding behind
            value = Energy(energy, (dim,), torch.float64)
            sizes = self._sizes_of_terms(energy, self.states[-1], counters.get("labels"))
            assert torch.all(sizes >= value(self.states[-1], counters.get("labels")).abs() * (1 - 1e-9))
            self.energy_tolerance += 4 * ULP * largest(sizes)
        plain = advance_reference(energy, x, rule, steps, counters, thin=1, telemetry=True)
        for t in range(steps):
            error = largest((plain.trajectory[:, t] - self.states[t + 1])[self.sure])
            self.tolerance = max(self.tolerance, 2 * error + self.rounding)

        a, b = (c.expand(-1, steps) for c in rule.coefficients(n, steps, dtype=torch.float64, device=x.device))
        lo, hi = (-torch.inf, torch.inf) if rule.box is None else rule.box.on(dim, dtype=torch.float64, device=x.device)
        self.clipped, self.clamped = (torch.zeros(n, device=x.device) for _ in range(2))
        self.clear = self.sure.clone()
        self.grad_norm, self.norm_tolerance = torch.full((n,), torch.nan, device=x.device), 0.0
        for t in range(steps):
            state = self.seen[t]
            grad = free_gradient(energy, state, counters)
            error = (free_gradient(energy, state + self._scatter(state), counters) - grad)[self.sure]
            near = max(10 * largest(error), 1e-5)
            bounded, clipped = grad, torch.zeros(n, dtype=torch.bool, device=x.device)
            if rule.grad_clip is not None:
                bounded = grad.clamp(-rule.grad_clip, rule.grad_clip)
                clipped = (grad.abs() > rule.grad_clip).any(dim=1)
                self.clear &= ((grad.abs() - rule.grad_clip).abs() > near).all(dim=1)
            if rule.grad_norm_clip is not None:
                norm = torch.linalg.vector_norm(bounded, dim=1)
                clipped = clipped | (norm > rule.grad_norm_clip)
                self.clear &= (norm - rule.grad_norm_clip).abs() > near * dim**0.5
                bounded = bounded * (rule.grad_norm_clip / norm.clamp_min(rule.grad_norm_clip))[:, None]
            moved = state - a[:, t, None] * bounded
            if not rule.noise_first:
                ages = counters["first_steps"] + t
                moved += b[:, t, None] * normal(
                    counters["seed"], Stream.LANGEVIN, counters["numbers"], ages, dim, dtype=torch.float64
                )
            out, edge = (moved < lo) | (moved > hi), torch.minimum((moved - lo).abs(), (moved - hi).abs())
            sharp = edge <= max(10 * self.tolerance, 1e-5)
            if counters.get("frozen") is not None:
                out, sharp = out & ~counters["frozen"], sharp & ~counters["frozen"]
            self.clear &= ~sharp.any(dim=1)
            self.clipped += clipped
            self.clamped += out.any(dim=1)
            self.grad_norm = torch.linalg.vector_norm(grad, dim=1)
            largest_norm = largest(self.grad_norm)
            self.norm_tolerance = float(torch.linalg.vector_norm(error, dim=1).max()) if error.numel() else 0.0
        if steps > 0:
            measured = largest((plain.telemetry["grad_norm"] - self.grad_norm)[self.sure])
            self.norm_tolerance += 2 * measured + 4 * ULP * largest_norm

    def _scatter(self, state):
        """An error that the state may have, of one sign or the other."""
        generator = torch.Generator().manual_seed(5)
        return (torch.randint(0, 2, state.shape, generator=generator) * 2 - 1).to(state) * self.tolerance

    def _sizes_of_terms(self, energy, x, labels):
        if isinstance(energy, SumEnergy):
            pairs = zip(energy.energies, energy.weights.double().abs(), strict=True)
            return sum(weight * self._sizes_of_terms(e, x, labels) for e, weight in pairs)
        return Energy(energy, x.shape[1:], torch.float64)(
            x, labels if isinstance(energy, ClassifierEnergy) else None
        ).abs()

    def check(self, done):
        super().check(done)
        n = len(done.x)
        sure, clear, steps = self.sure[:n], self.clear[:n], max(self.steps, 1)
        assert done.trajectory.shape == (n, self.steps // self.thin, done.x.shape[1])
        for k in range(self.steps // self.thin):
            error = (done.trajectory[:, k] - self.states[(k + 1) * self.thin][:n])[sure]
            assert not error.isnan().any()
            assert largest(error) <= self.tolerance
        norm, clipped, clamped = done.telemetry.values()
        if self.steps == 0:
            assert norm.isnan().all()
        else:
            assert not norm.isnan().any()
            assert largest((norm - self.grad_norm[:n])[sure]) <= self.norm_tolerance
        for share, count in ((clipped, self.clipped), (clamped, self.clamped)):
            assert not share.isnan().any()
            assert largest((share * steps - count[:n])[clear]) <= 4 * ULP * steps


def check_agreement(
    device, paths, *, n_chains, steps, dim, clamp, frozen, classes, step_form, noise_form, thin, rule, energy,
    move=advance,
):  # fmt: skip
    n_all = max(n_chains, YARDSTICK)
    bounds = {
        "none": None, "numbers": (-1.0, 0.7), "dims": per_dim_bounds(dim), "mixed": (-0.8, per_dim_bounds(dim)[1]),
    }[clamp]  # fmt: skip
    rule = make_rule(n_all, steps, step_form=step_form, noise_form=noise_form, clamp=bounds, **rule)
    energy = energy.to(device)
    x, counters = begin(n_all, dim, device, classes=classes, frozen=frozen)
    thin = thin if steps % thin == 0 else 1
    truth = Told(energy, x, rule, steps, counters, thin)
    x, rule, counters = first_rows(n_chains, x, rule, counters)
    for path in paths:
        if (done := move(path, energy, x, rule, steps, counters, thin=thin, telemetry=True)) is not None:
            truth.check(done)


ORDERS = ({}, {"noise_first": True}, {"noise_first": True, "clamp_noise": True})


@st.composite
def cases(draw):
    """Arguments of check_agreement."""
    dim = draw(st.sampled_from([1, 2, 3, 17, 33, 63, 70]) | st.integers(1, 70))
    head, classes = draw(st.sampled_from(HEADS)), draw(st.sampled_from([1, 2, 5, 17]))
    terms = draw(st.lists(st.sampled_from(TERMS), max_size=4))
    return {
        "energy": make_energy(
            dim,
            draw(st.lists(st.sampled_from([1, 3, 16, 17, 33]), min_size=1, max_size=3)),
            draw(st.sampled_from(sorted(ACTIVATIONS))),
            head,
            classes,
            terms,
        ),
        "dim": dim,
        "classes": min(classes, 4 if "classifier" in terms else classes) if head == "class" else None,
        "n_chains": draw(st.sampled_from([1, 7, 63, 64, 65, 130])),
        "steps": draw(st.sampled_from([2, 3, 4, 1, 0])),
        "step_form": draw(st.sampled_from(["number", "schedule", "per_chain"])),
        "noise_form": draw(st.sampled_from(["none", "number", "schedule", "per_chain"])),
        "thin": draw(st.sampled_from([1, 2, 3])),
        "clamp": draw(st.sampled_from(["none", "numbers", "dims", "mixed"])),
        "frozen": draw(st.sampled_from([None, "dims", "chains"])),
        "rule": {
            "grad_clip": draw(st.sampled_from([None, 0.3])),
            "grad_norm_clip": draw(st.sampled_from([None, 0.8, 20.0])),
            **draw(st.sampled_from(ORDERS)),
        },
    }  # fmt: skip


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases(), regime=st.sampled_from([*REGIMES, *IN_MEMORY]))
def test_any_energy_with_any_option(device, case, regime):
    check_agreement(device, ("torch", "products", regime), **case)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases())
def test_many_energies_with_many_options(device, case):
    check_agreement(device, (*FAST_PATHS, *IN_MEMORY), **case)


@pytest.mark.parametrize(
    ("head", "terms"),
    [
        *(pytest.param(head, (), marks=pytest.mark.slow) for head in HEADS),
        pytest.param("scalar", TERMS, marks=pytest.mark.slow),
        pytest.param("scalar", ("gaussian",), marks=pytest.mark.slow),
        pytest.param("class", ("wide gaussian", "classifier", "slope"), marks=pytest.mark.slow),
        pytest.param("logsumexp", ("linear",), marks=pytest.mark.slow),
    ],
)
def test_all_options_at_once(device, head, terms):
    check_agreement(
        device, (*FAST_PATHS, *IN_MEMORY, "eight warps"), energy=make_energy(37, head=head, terms=terms), dim=37,
        classes=CLASSES if head == "class" else None, n_chains=70, steps=4, thin=2, step_form="schedule",
        noise_form="per_chain", clamp="dims", frozen="chains", rule={"grad_clip": 0.3, "grad_norm_clip": 0.9},
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize("regime", REGIMES)
def test_products_of_a_head_are_at_the_precision_that_was_asked_for(device, regime, precision):
    """Steps of gradient descent: within the unit roundoff of the operands, times the four products of a gradient."""
    energy = make_energy(37, head="logsumexp", terms=TERMS).to(device)
    x, counters = start(YARDSTICK, 37, device)
    rule = Langevin(2.0, 0.0)
    exact = advance_reference(energy, x, rule, 1, counters, torch.float64)
    done = advance_fused(energy, x, rule, 1, counters, regime, precision, chunk=16)
    if done is not None:
        roundoff = {"bf16x3": 2.0**-15, "tf32": 2.0**-10, "bf16": 2.0**-7}[precision]
        assert largest(done.x - exact.x) <= 4 * roundoff * largest(exact.x - x)


# -- what the options mean ----------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("frozen", ["dims", "chains"])
@pytest.mark.parametrize("bounds", ["numbers", "dims"])
def test_frozen_coordinates_keep_their_bits_whatever_the_bounds(device, path, frozen, bounds):
    """Outside the clamp too, at every slot of the trajectory; all others move and are within it."""
    dim = 19
    energy = make_energy(dim, [9], terms=("gaussian",)).to(device)
    x, counters = begin(40, dim, device, frozen=frozen)
    x *= 3.0
    frozen = counters["frozen"].expand_as(x)
    lo, hi = (-0.2, 0.3) if bounds == "numbers" else per_dim_bounds(dim)
    rule = Langevin(0.3, 1.0, clamp=(lo, hi))
    done = advance(path, energy, x, rule, 3, counters, thin=1, telemetry=True)
    lo, hi = (torch.as_tensor(v, device=device).expand_as(x) for v in (lo, hi))
    assert ((x < lo) | (x > hi))[frozen].any()
    for state in (done.x, *done.trajectory.unbind(1)):
        assert torch.equal(state[frozen], x[frozen])
        assert ((state >= lo) & (state <= hi))[~frozen].all()
        assert (state != x)[~frozen].all()
    assert (done.first_bad == -1).all()


@every_path
def test_all_coordinates_frozen(device, path):
    """The gradient counts as 0, whose norm no clip divides by."""
    energy = make_energy(DIM).to(device)
    x, counters = start(7, DIM, device)
    counters["frozen"] = torch.ones(1, DIM, dtype=torch.bool, device=device)
    rule = Langevin(0.3, 1.0, clamp=(-0.1, 0.1), grad_clip=0.1, grad_norm_clip=0.1)
    done = advance(path, energy, x, rule, 2, counters, telemetry=True)
    assert torch.equal(done.x, x)
    assert (done.first_bad == -1).all()
    assert [v.abs().sum().item() for v in done.telemetry.values()] == [0.0, 0.0, 0.0]


@every_path
def test_what_would_happen_to_a_frozen_coordinate_never_counts(device, path):
    """Its gradient is infinite: no explosion, no share in the norm, and the others move as if it were not there."""
    dim, far = 19, 17
    base = make_energy(dim, [9])
    std = torch.full((dim,), 1e10)
    std[far] = 1e-18
    energy = SumEnergy([base, GaussianEnergy(0.0, std)]).to(device)
    x, counters = start(6, dim, device)
    x[:, far] = 1e5
    counters["frozen"] = (torch.arange(dim, device=device) == far)[None]
    rule = Langevin(0.3, 0.5, grad_norm_clip=2.0)
    expected = advance_reference(base.to(device), x, rule, 3, counters, telemetry=True)
    done = advance(path, energy, x, rule, 3, counters, telemetry=True)
    assert (done.first_bad == -1).all()
    assert torch.equal(done.x[:, far], x[:, far])
    torch.testing.assert_close(done.x, expected.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(done.telemetry["grad_norm"], expected.telemetry["grad_norm"], rtol=1e-4, atol=1e-4)


@every_path
@pytest.mark.parametrize("frozen", [None, "chains"])
@pytest.mark.parametrize("grad_clip", [None, 0.6])
def test_norm_clip_in_closed_form(device, path, grad_clip, frozen):
    """x' = x - a g min(1, c / |g|), g clipped elementwise before, over the coordinates that are not frozen."""
    dim, norm_clip, a = 19, 1.2, 0.25
    energy = make_energy(dim, [9], head="logsumexp", terms=("gaussian",)).to(device)
    x, counters = begin(40, dim, device, frozen=frozen)
    x *= torch.linspace(0.01, 1.5, 40, device=device)[:, None]
    raw = free_gradient(energy, x, counters)
    grad = raw if grad_clip is None else raw.clamp(-grad_clip, grad_clip)
    norm = torch.linalg.vector_norm(grad, dim=1)
    shrunk = grad * (norm_clip / norm).clamp(max=1.0)[:, None]
    assert 0 < int((norm > norm_clip).sum()) < 40
    if grad_clip is not None:  # the other order is another result
        other = raw * (norm_clip / torch.linalg.vector_norm(raw, dim=1)).clamp(max=1.0)[:, None]
        assert largest(other.clamp(-grad_clip, grad_clip) - shrunk) > 0.01
    rule = Langevin(2 * a, 0.0, grad_clip=grad_clip, grad_norm_clip=norm_clip)
    done = advance(path, energy, x, rule, 1, counters, telemetry=True)
    torch.testing.assert_close(done.x.double(), x - a * shrunk, rtol=0, atol=2e-6)
    # telemetry is about the gradient before both clips
    torch.testing.assert_close(
        done.telemetry["grad_norm"].double(), torch.linalg.vector_norm(raw, dim=1), rtol=1e-5, atol=0
    )
    clipped = norm > norm_clip if grad_clip is None else (norm > norm_clip) | (raw.abs() > grad_clip).any(dim=1)
    assert torch.equal(done.telemetry["clipped"], clipped.float())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_norm_clip_is_exact_in_float64(backend):
    energy = make_energy(DIM, head="logsumexp").double()
    x = torch.randn(9, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad = free_gradient(energy, x, {})
    moved = langevin_sample(
        energy, init=x, steps=1, step_size=2.0, noise_scale=0.0, grad_norm_clip=0.01, backend=backend, seed=0
    )
    torch.testing.assert_close(
        torch.linalg.vector_norm(moved - x, dim=1), torch.full((9,), 0.01, dtype=torch.float64), rtol=1e-10, atol=0
    )
    torch.testing.assert_close((x - moved) / 0.01, nn.functional.normalize(grad), rtol=1e-10, atol=1e-12)


@every_path
def test_bounds_of_a_dim_are_its_own(device, path):
    """Infinite ones are none, and a chain that is driven out ends on its bound, in the second chunk too."""
    dim = 19
    energy = make_energy(dim, [9]).to(device)
    x, counters = start(12, dim, device)
    lo, hi = torch.full((dim,), -torch.inf), torch.full((dim,), torch.inf)
    lo[3], hi[4], lo[17], hi[18] = 0.5, -0.25, 100.0, -100.0
    rule = Langevin(0.3, 0.7)
    free = advance(path, energy, x, rule, 1, counters, telemetry=True)
    done = advance(path, energy, x, Langevin(0.3, 0.7, clamp=(lo, hi)), 1, counters, telemetry=True)
    assert torch.equal(done.x, free.x.clamp(lo.to(device), hi.to(device)))
    assert (done.x[:, 17] == 100.0).all()
    assert (done.x[:, 18] == -100.0).all()
    assert torch.equal(done.telemetry["clamped"], torch.ones(12, device=device))
    assert torch.equal(free.telemetry["clamped"], torch.zeros(12, device=device))


@every_path
def test_bounds_as_numbers_and_as_tensors_are_the_same(device, path):
    energy = make_energy(19, [9]).to(device)
    x, counters = start(12, 19, device)
    numbers, *others = (
        advance(path, energy, x, Langevin(0.3, 0.7, clamp=clamp), 2, counters, telemetry=True)
        for clamp in ((-0.5, 0.7), (torch.full((19,), -0.5), torch.full((19,), 0.7)), (-0.5, torch.full((19,), 0.7)))
    )
    for done in others:
        assert same_bits(done, numbers)


@every_path
def test_a_label_picks_its_row_of_the_head(device, path):
    """The chain of label y moves as one of the energy -f_y, and ends with its value."""
    x, counters = begin(40, 19, device, classes=CLASSES)
    energy = make_energy(19, head="class").to(device)
    rule = Langevin(0.3, 0.5)
    done = advance(path, energy, x, rule, 2, counters, telemetry=True)
    for y in range(CLASSES):
        alone = make_energy(19, head="class").classifier
        last = nn.Linear(alone[-1].in_features, 1)
        last.weight.data, last.bias.data = -alone[-1].weight.data[y : y + 1], -alone[-1].bias.data[y : y + 1]
        alone = nn.Sequential(*alone[:-1], last).to(device)
        bare = {k: v for k, v in counters.items() if k != "labels"}
        expected = advance(path, alone, x, rule, 2, bare, telemetry=True)
        rows = counters["labels"] == y
        assert rows.any()
        torch.testing.assert_close(done.x[rows], expected.x[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(done.energy[rows], expected.energy[rows], rtol=1e-5, atol=1e-5)


@every_path
def test_an_energy_minus_itself_leaves_a_random_walk(device, path):
    body = network(19, [20, 11])
    x, counters = start(40, 19, device)
    rule = Langevin(0.3, 0.5)
    done = advance(path, SumEnergy([body, body], [1.0, -1.0]).to(device), x, rule, 3, counters, telemetry=True)
    _, b = rule.coefficients(1, 1)
    for t in range(3):
        x = x + b.to(device) * normal(
            counters["seed"], Stream.LANGEVIN, counters["numbers"], counters["first_steps"] + t, 19
        )
    torch.testing.assert_close(done.x, x, rtol=0, atol=3e-5)
    assert largest(done.energy) < 1e-4
    assert largest(done.telemetry["grad_norm"]) < 1e-4


@every_path
def test_telemetry_by_hand(device, path):
    """A clip at 1 and bounds at 2 on E = 10 x: every step clips, and clamps from the fourth on."""
    body = network(1, [4])
    energy = SumEnergy([body, nn.Linear(1, 1)], [0.0, 1.0])
    with torch.no_grad():
        energy.energies[1].weight.fill_(-10.0)
    x, counters = start(3, 1, device)
    x.fill_(0.25)
    done = advance(
        path,
        energy.to(device),
        x,
        Langevin(1.0, 0.0, clamp=(-2.0, 2.0), grad_clip=1.0),
        8,
        counters,
        thin=1,
        telemetry=True,
    )
    norm, clipped, clamped = (v.tolist() for v in done.telemetry.values())
    assert norm == [10.0] * 3
    assert clipped == [1.0] * 3
    assert clamped == [5 / 8] * 3
    assert done.trajectory[0, :, 0].tolist() == [0.75, 1.25, 1.75, 2.0, 2.0, 2.0, 2.0, 2.0]


@_seldom(PATHS, often=("reference", "torch", "resident"))
def test_a_trajectory_is_the_run_at_each_step(device, path):
    energy = make_energy(19, [9], head="class", terms=("gaussian",)).to(device)
    x, counters = begin(40, 19, device, classes=CLASSES, frozen="chains")
    schedule = torch.linspace(0.1, 0.5, 6)
    rule = Langevin(schedule, 0.5, clamp=per_dim_bounds(19), grad_norm_clip=1.0)
    bare = advance(path, energy, x, rule, 6, counters)
    assert bare.trajectory is None
    assert bare.telemetry is None
    whole = advance(path, energy, x, rule, 6, counters, thin=1)
    assert whole.trajectory.shape == (40, 6, 19)
    for thin in (1, 2, 3, 6):
        done = advance(path, energy, x, rule, 6, counters, thin=thin, telemetry=thin > 1)
        assert torch.equal(done.trajectory, whole.trajectory[:, thin - 1 :: thin])
        assert torch.equal(done.trajectory[:, -1], done.x)
        # asking for more changes no bits
        assert torch.equal(done.x, bare.x)
        assert torch.equal(done.energy, bare.energy)
    for t in (1, 4):
        rule = Langevin(schedule[:t], 0.5, clamp=per_dim_bounds(19), grad_norm_clip=1.0)
        assert torch.equal(advance(path, energy, x, rule, t, counters).x, whole.trajectory[:, t - 1])


@every_path
@pytest.mark.parametrize("n_chains", [0, 6])
def test_no_steps_or_no_chains(device, path, n_chains):
    energy = make_energy(19, [9], head="class", terms=("gaussian", "linear")).to(device)
    x, counters = begin(n_chains, 19, device, classes=CLASSES, frozen="chains")
    for steps in (0, 2):
        done = advance(path, energy, x, Langevin(0.1, 0.1), steps, counters, thin=2, telemetry=True)
        assert done.trajectory.shape == (n_chains, steps // 2, 19)
        assert {v.shape for v in (done.energy, done.first_bad, *done.telemetry.values())} == {(n_chains,)}
        if steps == 0:
            assert torch.equal(done.x, x)
            assert (done.first_bad == -1).all()
            assert done.telemetry["grad_norm"].isnan().all()
            assert (done.telemetry["clipped"] == 0).all()
            assert (done.telemetry["clamped"] == 0).all()
            exact = Energy(energy, (19,), torch.float64)(x.double(), counters["labels"])
            torch.testing.assert_close(done.energy.double(), exact, rtol=1e-5, atol=1e-5)


@_seldom(FAST_PATHS, often=("torch", "products", "resident"))
def test_bits_do_not_depend_on_the_batch(device, path):
    """Prefixes, the rest and a permutation of chains with labels, masks and coefficients of their own."""
    energy = make_energy(19, [20, 11], head="class", terms=("classifier", "gaussian", "linear")).to(device)
    n = 130
    x, counters = begin(n, 19, device, classes=CLASSES, frozen="chains")

    def run(rows):
        rule = Langevin(
            torch.linspace(0.1, 0.5, n)[:, None][rows], 0.7, clamp=per_dim_bounds(19), grad_clip=0.4, grad_norm_clip=1.0
        )
        own = {k: v if k == "seed" else v[rows] for k, v in counters.items()}
        return advance(path, energy, x[rows].contiguous(), rule, 2, own, thin=1, telemetry=True)

    whole = run(slice(None))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    for rows in (slice(1), slice(1, None), slice(64), slice(65, 129), order):
        assert same_bits(run(rows), whole, rows)


@pytest.mark.parametrize("n_chains", [1, 200, 600])
def test_bits_do_not_depend_on_threads(n_chains):
    energy = make_energy(19, [20, 11], head="class", terms=("classifier", "gaussian", "linear"))
    x, counters = begin(n_chains, 19, classes=CLASSES, frozen="chains")
    rule, before, done = Langevin(0.3, 0.7, clamp=per_dim_bounds(19), grad_norm_clip=1.0), torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            done.append(advance("torch", energy, x, rule, 3, counters, thin=3, telemetry=True))
    finally:
        torch.set_num_threads(before)
    assert same_bits(*done)


# -- the public function --------------------------------------------------------------------------------------------


@pytest.fixture
def home(backend, device):
    return device if backend == "triton" else "cpu"


def images(classes=None):
    """An energy on (2, 3) states."""
    return nn.Sequential(nn.Flatten(), network(6, [9], classes or 1))


@every_backend
def test_trajectory_and_info_of_a_call(backend, home):
    energy = SumEnergy([ClassifierEnergy(images(CLASSES)), GaussianEnergy(torch.ones(2, 3))]).to(home)
    init = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0)).to(home)
    labels = torch.arange(7, device=home, dtype=torch.int32) % CLASSES
    frozen = torch.tensor([[True, False, False], [False, False, True]], device=home)
    options = {
        "init": init, "labels": labels, "frozen": frozen, "steps": 4, "step_size": 0.3, "noise_scale": 0.5, "seed": 1,
        "clamp": (torch.full((2, 3), -0.5), 1.0), "grad_norm_clip": 1.0, "grad_clip": 0.8, "backend": backend,
    }  # fmt: skip
    samples = langevin_sample(energy, **options)
    same, info = langevin_sample(energy, return_info=True, **options)
    assert torch.equal(same, samples)
    assert samples.shape == (7, 2, 3)
    whole = langevin_sample(energy, return_trajectory=True, **options)
    assert whole.shape == (7, 4, 2, 3)
    assert torch.equal(whole[:, -1], samples)
    thinned, told = langevin_sample(energy, return_trajectory=True, thin=2, return_info=True, **options)
    assert torch.equal(thinned, whole[:, 1::2])
    out = torch.full((7, 2, 2, 3), torch.nan, device=home)
    assert langevin_sample(energy, return_trajectory=True, thin=2, out=out, **options) is out
    assert torch.equal(out, thinned)
    assert torch.equal(samples[:, frozen], init[:, frozen])
    assert bool(((samples >= -0.5) & (samples <= 1.0))[:, ~frozen].all())
    # a mask a chain that is the same for all
    masks = frozen.expand(7, 2, 3)
    assert torch.equal(langevin_sample(energy, **{**options, "frozen": masks}), samples)
    for name in ("energies", "first_bad_step", "grad_norm", "clipped", "clamped"):
        assert torch.equal(getattr(info, name), getattr(told, name))
        assert getattr(info, name).shape == (7,)
    expected = fastebm.energy(energy, samples, labels=labels.long()).detach()
    torch.testing.assert_close(info.energies, expected, rtol=1e-4, atol=1e-4)
    before = fastebm.energy(energy, (state := whole[:, -2].clone().requires_grad_()), labels=labels.long()).sum()
    (grad,) = torch.autograd.grad(before, state)
    norm = torch.linalg.vector_norm(grad.masked_fill(frozen, 0.0).flatten(1), dim=1)
    torch.testing.assert_close(info.grad_norm, norm, rtol=1e-3, atol=1e-3)
    assert info.path == {"reference": "autograd", "torch": "tiles", "triton": "resident"}[backend]


@every_backend
def test_conditional_samples_move_with_their_labels(backend, home):
    energy = make_energy(DIM, head="class").to(home)
    init = torch.randn(1, DIM, generator=torch.Generator().manual_seed(0)).to(home).expand(CLASSES, DIM)
    options = {"init": init, "steps": 3, "step_size": 0.3, "noise_scale": 0.0, "seed": 1, "backend": backend}
    labels = torch.arange(CLASSES, device=home)
    samples = langevin_sample(energy, labels=labels, **options)
    turned = langevin_sample(energy, labels=labels.flip(0), **options)
    assert len(samples.unique(dim=0)) == CLASSES
    if backend == "reference":  # plain matrix products round a row by its place
        torch.testing.assert_close(turned, samples.flip(0))
    else:
        assert torch.equal(turned, samples.flip(0))
    plain = langevin_sample(energy, **options)
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))
    assert not torch.equal(plain[0], samples[0])


@every_backend
@pytest.mark.parametrize("make", [lambda: make_energy(DIM), lambda: SumEnergy([GaussianEnergy(torch.zeros(DIM))])])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**63, 2**64 - 3, -2])
def test_a_seed_in_a_tensor_is_the_seed(backend, home, make, seed):
    energy = make().to(home)
    tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=home)
    options = {"batch_size": 5, "steps": 2, "step_size": 0.3, "noise_scale": 1.0, "backend": backend}
    samples = langevin_sample(energy, DIM, seed=seed, **options)
    for form in (tensor, tensor.reshape(()), tensor.reshape(1, 1)):
        drawn, info = langevin_sample(energy, DIM, seed=form, return_info=True, **options)
        assert torch.equal(drawn, samples)
        assert int(info.seed) == int(tensor)
    assert not torch.equal(langevin_sample(energy, DIM, seed=tensor + 1, **options), samples)


@every_backend
@pytest.mark.parametrize("make", [lambda: make_energy(DIM), lambda: SumEnergy([GaussianEnergy(torch.zeros(DIM))])])
def test_first_steps_in_a_tensor(backend, home, make):
    energy, init = make().to(home), torch.randn(6, DIM, generator=torch.Generator().manual_seed(0)).to(home)
    options = {"steps": 2, "step_size": 0.3, "noise_scale": 1.0, "backend": backend, "seed": 3}
    expected = langevin_sample(energy, init=init, first_step=11, **options)
    for form in (torch.tensor(11), torch.tensor([11]), torch.full((6,), 11)):
        assert torch.equal(langevin_sample(energy, init=init, first_step=form.to(home), **options), expected)
    ages = torch.tensor([5, 0, 11, 2**32 - 2, 11, 7])
    each = langevin_sample(energy, init=init, first_step=ages.to(home), **options)
    for i, age in enumerate(ages.tolist()):
        alone = langevin_sample(energy, init=init[i : i + 1], first_chain=i, first_step=age, **options)
        if backend == "reference":  # plain matrix products round a row by the size of the batch
            torch.testing.assert_close(each[i : i + 1], alone)
        else:
            assert torch.equal(each[i : i + 1], alone)


@every_backend
def test_precision_follows_pytorchs_setting(backend, home):
    energy, before = make_energy(DIM).to(home), torch.get_float32_matmul_precision()
    options = {"batch_size": 5, "steps": 1, "step_size": 0.3, "seed": 3, "backend": backend, "return_info": True}
    try:
        for setting, name in (("highest", "bf16x3"), ("high", "bf16x3"), ("medium", "bf16")):
            torch.set_float32_matmul_precision(setting)
            samples, info = langevin_sample(energy, **options)
            asked, same = langevin_sample(energy, precision=name, **options)
            _, other = langevin_sample(energy, precision="tf32", **options)
            assert torch.equal(samples, asked)
            # a CPU with instructions for it multiplies in bf16 where that is what PyTorch is set to
            in_bf16 = backend == "torch" and name == "bf16" and torch.device(home).type == "cpu" and multiplies_bf16()
            assert info.precision == same.precision == (name if backend == "triton" or in_bf16 else "ieee")
            assert other.precision == ("tf32" if backend == "triton" else "ieee")
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_mlp_too_wide_for_the_kernel_takes_library_products(device, monkeypatch):
    energy = make_energy(DIM, head="class", terms=("gaussian",)).to(device)
    options = {
        "init": torch.ones(5, DIM, device=device), "labels": torch.tensor([0, 1, 2, 0, 1], device=device), "steps": 2,
        "step_size": 0.3, "seed": 3, "backend": "triton", "return_info": True,
    }  # fmt: skip
    expected, _ = langevin_sample(energy, precision="ieee", **options)
    monkeypatch.setattr("fastebm.kernels.triton.launch.choose_launch", lambda *arguments: "too wide")
    samples, info = langevin_sample(energy, **options)
    assert (info.backend, info.path, info.precision) == ("triton", "products", "ieee")
    assert info.why_not_fused.startswith("too wide; the closed-form gradient runs instead, by library products")
    torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-5)
    values = fastebm.energy(energy, samples, labels=options["labels"]).detach()
    torch.testing.assert_close(info.energies, values, rtol=1e-5, atol=1e-5)


# -- laws -----------------------------------------------------------------------------------------------------------

ALPHA = 1e-5
FEW = 100_000 if torch.cuda.is_available() else 4096
MEAN, STD = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.8, 1.0, 1.5])
EPS, STEPS_OF_LAW = 1.0, 48


def by(path):
    """On large programs: in the interpreter the cost is a program's, whatever its size."""

    def sampler(energy, x0, rule, steps, labels):
        counters = {
            "seed": 21,
            "numbers": torch.arange(len(x0)),
            "first_steps": torch.zeros(len(x0), dtype=torch.int64),
        }
        if labels is not None:
            counters["labels"] = labels
        if path not in REGIMES:
            return advance(path, energy, x0, rule, steps, counters).x
        description = describe(energy, labels=labels is not None)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        chains = Chains(x0.to(device), **{k: v if k == "seed" else v.to(device) for k, v in counters.items()})
        launch = Launch(path, 64 if device == "cuda" else 4096, 16, 4, 1)
        done = runs.fused_mlp(
            description.to(torch.device(device), torch.float32), chains, rule, steps, precision="ieee", launch=launch
        )
        return done.x.cpu()

    return sampler


LAW_PATHS = (
    pytest.param("torch", 100_000, marks=pytest.mark.slow),
    ("resident", FEW),
    pytest.param("streaming", FEW, marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("path", "n_chains"), LAW_PATHS)
def test_stationary_law_of_a_gaussian_term(path, n_chains):
    """a = eps/2, b = sqrt(eps): variance s^2 / (1 - eps / (4 s^2)), and not s^2."""
    energy = SumEnergy([network(3, [4]), GaussianEnergy(MEAN, STD)], [0.0, 1.0])
    contraction = 1 - EPS / (2 * STD.double() ** 2)
    assert contraction.abs().max() ** (2 * STEPS_OF_LAW) < 1e-9
    x = by(path)(energy, torch.zeros(n_chains, 3), Langevin.ula(EPS), STEPS_OF_LAW, None).double() - MEAN
    stationary = STD.double() ** 2 / (1 - EPS / (4 * STD.double() ** 2))
    assert min(p := standard_normal(double(x / stationary.sqrt()))) > ALPHA / len(LAW_PATHS) / 2 / len(p)
    total = float((x / STD).square().sum())
    assert stats.chi2.sf(total, 3 * n_chains) < 1e-20, "the test could not tell s^2 from it"


@pytest.mark.parametrize(("path", "n_chains"), LAW_PATHS)
def test_law_of_each_class(path, n_chains):
    """Logits w_y x + b_y beside a Gaussian: label y draws from the Gaussian moved by s^2 w_y, at every n."""
    body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, CLASSES))
    with torch.no_grad():
        body[0].weight.copy_(torch.eye(3))
        body[0].bias.fill_(1e3)  # always on: affine
        body[2].weight.copy_(torch.tensor([[1.0, 0.0, -0.5], [-1.0, 0.7, 0.0], [0.3, -0.6, 0.4]]))
        body[2].bias.copy_(torch.tensor([0.1, -0.2, 5.0]))
        slopes = body[2].weight.double()
    energy, steps = SumEnergy([ClassifierEnergy(body), GaussianEnergy(MEAN, STD)]), 6
    labels = torch.arange(n_chains) * 5 % CLASSES
    x = by(path)(energy, torch.zeros(n_chains, 3), Langevin.ula(EPS), steps, labels).double()
    contraction, variance = 1 - EPS / (2 * STD.double() ** 2), STD.double() ** 2
    target = MEAN + variance * slopes[labels]
    mean = target - contraction**steps * target
    spread = EPS * (1 - contraction ** (2 * steps)) / (1 - contraction**2)
    w = double((x - mean) / spread.sqrt())
    p = standard_normal(w)
    p += [
        two_sided(w[labels == y][:, j].sum() / math.sqrt(int((labels == y).sum())))
        for y in range(CLASSES)
        for j in range(3)
    ]
    assert min(p) > ALPHA / len(LAW_PATHS) / 2 / len(p)
    wrong = double((x - mean.roll(1, 0)) / spread.sqrt())
    assert min(standard_normal(wrong)) < 1e-20, "the test could not tell the labels apart"


# -- what is refused ------------------------------------------------------------------------------------------------


class NeedsLabels(nn.Module):
    def forward(self, x, labels):
        return (x.sum(dim=1) - labels).square()


def mlp():
    return MLPEnergy(3, (9, 8), dropout=0.3, spectral_norm=True).train()


def classifier():
    return ClassifierEnergy(network(3, [9], CLASSES)).train()


def whole_sum():
    return SumEnergy([mlp(), classifier(), GaussianEnergy()])


X = torch.linspace(-1, 1, 12).reshape(4, 3)
LABELS = torch.tensor([0, 2, 1, 0])
SOME = torch.tensor([True, False, False])
NAN, INF = math.nan, math.inf

# name: (energy, options, error, message)
BAD = {
    "label negative": (classifier, {"labels": LABELS - 1}, ValueError, r"labels must be in \[0, 3\).* from -1 to 1"),
    "label large": (classifier, {"labels": LABELS + 1}, ValueError, r"labels must be in \[0, 3\).* from 1 to 3"),
    "label of a sum": (whole_sum, {"labels": LABELS + 1}, ValueError, r"labels must be in \[0, 3\).* from 1 to 3"),
    "label of the smaller": (
        lambda: SumEnergy([classifier(), ClassifierEnergy(network(3, [4], 2))]), {"labels": LABELS}, ValueError,
        r"labels must be in \[0, 2\).* from 0 to 2",
    ),
    "labels float": (classifier, {"labels": LABELS.float()}, TypeError, "must be a tensor of integers.*float32"),
    "labels complex": (classifier, {"labels": LABELS + 0j}, TypeError, "must be a tensor of integers.*complex64"),
    "labels bool": (classifier, {"labels": LABELS > 0}, TypeError, "must be a tensor of integers, got torch.bool"),
    "labels list": (classifier, {"labels": [0, 1, 2, 0]}, TypeError, "labels must be a tensor of integers, got list"),
    "labels too few": (classifier, {"labels": LABELS[:3]}, ValueError, r"must be \(4,\), one per chain, .*\(3,\)"),
    "labels a column": (classifier, {"labels": LABELS[:, None]}, ValueError, r"labels must be \(4,\).* got \(4, 1\)"),
    "labels elsewhere": (classifier, {"labels": LABELS.to("meta")}, ValueError, "per chain, on cpu, got .* on meta"),
    "labels for an MLP": (mlp, {"labels": LABELS}, ValueError, r"MLPEnergy.forward takes x only, or .*: wrap a class"),
    "labels for a sum without": (
        lambda: SumEnergy([mlp(), GaussianEnergy()]), {"labels": LABELS}, ValueError, "SumEnergy.forward takes x only",
    ),
    "labels missing": (NeedsLabels, {}, ValueError, r"does not take states of shape \(n_chains, 3\): .*labels"),
    "labels missing in a sum": (
        lambda: SumEnergy([mlp(), NeedsLabels()]), {}, ValueError, "does not take states of shape .n_chains, 3.",
    ),
    "frozen list": (mlp, {"frozen": [True, False, False]}, TypeError, "frozen must be a tensor of bools.* got list"),
    "frozen float": (mlp, {"frozen": SOME.float()}, TypeError, "frozen must be a tensor of bools.* got torch.float32"),
    "frozen dims": (
        mlp, {"frozen": SOME[:2]}, ValueError, r"frozen must have one state's shape \(3,\), or \(4, 3\), got \(2,\)",
    ),
    "frozen chains": (mlp, {"frozen": SOME.expand(3, 3)}, ValueError, r"frozen must .* or \(4, 3\), got \(3, 3\)"),
    "frozen one row": (mlp, {"frozen": SOME[None]}, ValueError, r"frozen must .* or \(4, 3\), got \(1, 3\)"),
    "frozen elsewhere": (mlp, {"frozen": SOME.to("meta")}, ValueError, "frozen is on meta and the chains on cpu"),
    "clamp size": (
        mlp, {"clamp": (torch.zeros(2), 1.0)}, ValueError,
        r"clamp's lo must be a number or have one value for each of the 3 dims, got shape \(2,\)",
    ),
    "clamp size, start drawn": (
        mlp, {"init": None, "clamp": (-1.0, torch.ones(1, 4))}, ValueError, r"clamp's hi must be .* 3 dims.*\(1, 4\)",
    ),
    "clamp sizes": (
        mlp, {"clamp": (torch.zeros(3), torch.ones(2))}, ValueError, r"must have as many values each, got \[2, 3\]",
    ),
    "clamp reversed": (
        mlp, {"clamp": (torch.zeros(3), torch.tensor([1.0, 0.0, 2.0]))}, ValueError, "lo < hi in every dim.* 1 of 3",
    ),
    "clamp NaN": (mlp, {"clamp": (torch.tensor([NAN, 0, NAN]), 1.0)}, ValueError, "lo < hi in every dim.* 2 of 3"),
    "clamp NaN above": (mlp, {"clamp": (-1.0, torch.tensor([1.0, 1.0, NAN]))}, ValueError, "lo < hi .* 1 of 3"),
    "clamp NaN number": (mlp, {"clamp": (torch.zeros(3), NAN)}, ValueError, "lo < hi in every dim.* 3 of 3"),
    "clamp int": (mlp, {"clamp": (torch.zeros(3).long(), 1.0)}, TypeError, "lo must be .* floating-point .*int64"),
    "clamp str": (mlp, {"clamp": ("a", 1.0)}, TypeError, r"clamp must be a pair \(lo, hi\) of numbers or tensors.*'a'"),
    "clamp one": (mlp, {"clamp": 1.0}, TypeError, r"clamp must be a pair \(lo, hi\) of numbers or tensors.*got 1.0"),
    "clamp infinite start": (
        mlp, {"init": None, "clamp": (torch.tensor([-INF, 0.0, 0.0]), 1.0)}, ValueError, "no uniform start on an inf",
    ),
    "noise schedule": (mlp, {"noise_scale": torch.ones(3)}, ValueError, "noise_scale schedule .*3 entries for 2 steps"),
    "step schedule": (classifier, {"step_size": torch.ones(3)}, ValueError, "step_size .* 3 entries for 2 steps"),
    "thin": (
        mlp, {"thin": 3, "return_trajectory": True}, ValueError, "thin must divide steps.* got thin=3, steps=2",
    ),
    "thin zero": (mlp, {"thin": 0, "return_trajectory": True}, ValueError, "thin must divide steps.* got thin=0"),
    "thin negative": (mlp, {"thin": -1, "return_trajectory": True}, ValueError, "thin must be >= 0, got -1"),
    "thin float": (mlp, {"thin": 1.0, "return_trajectory": True}, TypeError, "thin must be an int, got 1.0"),
    "thin bool": (mlp, {"thin": True, "return_trajectory": True}, TypeError, "thin must be an int, got True"),
    "thin alone": (mlp, {"thin": 2}, ValueError, "thin is for return_trajectory=True, got thin=2 without it"),
    "trajectory started anew": (
        mlp, {"return_trajectory": True, "on_nonfinite": "reinit"}, ValueError, 'use on_nonfinite="raise" or "ignore"',
    ),
    "out of samples for a trajectory": (
        mlp, {"return_trajectory": True, "out": torch.zeros(4, 3)}, ValueError, r"must be a \(4, 2, 3\).*\(4, 3\)",
    ),
    "out of a trajectory for samples": (mlp, {"out": torch.zeros(4, 2, 3)}, ValueError, r"must be a \(4, 3\).*2, 3"),
    "out not thinned": (
        mlp, {"return_trajectory": True, "thin": 2, "out": torch.zeros(4, 2, 3)}, ValueError, r"must be a \(4, 1, 3\)",
    ),
    **{
        f"norm clip {value!r}": (
            mlp, {"grad_norm_clip": value}, ValueError, f"grad_norm_clip must be a number > 0 or None, got {value!r}",
        )
        for value in (0, 0.0, -1.0, NAN, INF, True, "1")
    },
    "seed tensor float": (mlp, {"seed": torch.ones(1)}, ValueError, "seed tensor must be one int64 number.*float32"),
    "seed tensor int32": (mlp, {"seed": torch.ones(1).int()}, ValueError, "seed tensor must be one int64 .*int32"),
    "seed tensor long": (mlp, {"seed": LABELS[:2]}, ValueError, r"seed tensor must be one int64 number.*shape \(2,\)"),
    "seed tensor empty": (mlp, {"seed": LABELS[:0]}, ValueError, r"seed tensor must be one int64 number.*shape \(0,\)"),
    "first_step tensor float": (mlp, {"first_step": torch.ones(4)}, ValueError, "first_step tensor must .*float32"),
    "first_step tensor": (mlp, {"first_step": LABELS[:2]}, ValueError, r"int64 number or \(4,\), got .* \(2,\)"),
    "first_step matrix": (mlp, {"first_step": LABELS[:, None]}, ValueError, r"number or \(4,\), got .* \(4, 1\)"),
    "dims of terms": (
        lambda: SumEnergy([mlp(), MLPEnergy(4, (5,))]), {}, ValueError, r"not take states of shape \(n_chains, 3\)",
    ),
    "dims of terms, start drawn": (
        lambda: SumEnergy([mlp(), MLPEnergy(4, (5,))]), {"init": None}, ValueError,
        r"pass input_size= or init=: .*its terms take different numbers of dims",
    ),
    "dims of a Gaussian": (
        lambda: SumEnergy([mlp(), GaussianEnergy(torch.zeros(5))]), {}, ValueError, r"a mean of shape \(5,\)",
    ),
    "a column of means": (  # (4, 3) - (3, 1) would be no error of 3 chains
        lambda: SumEnergy([mlp(), GaussianEnergy(torch.zeros(3, 1))]), {}, ValueError,
        r"a mean of shape \(3, 1\), and the chains' states have \(3,\)",
    ),
    "dims of a sum": (
        lambda: SumEnergy([MLPEnergy(5, (4,)), GaussianEnergy()]), {}, ValueError, "takes 5 dims|not take states",
    ),
    "weights of a sum NaN": (
        lambda: broken(whole_sum()), {}, NonFiniteError, "4 of 4 chains are not finite",
    ),
}  # fmt: skip


def broken(model):
    model.weights[1] = NAN
    return model


@every_backend
@pytest.mark.parametrize(("make", "options", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_words_and_harms_nothing(backend, make, options, error, match, untouched, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("these inputs lie on the CPU, where no kernel runs on a machine with a GPU")
    model = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    options = {"init": X.clone(), "seed": 1, "steps": 2, **options}
    values = itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in options.values())
    tensors = [v for v in values if isinstance(v, torch.Tensor) and not v.is_meta]
    with untouched(model, *tensors), pytest.raises(error, match=match):
        langevin_sample(model, backend=backend, **options)


@every_backend
def test_the_callers_tensors_are_left_bit_for_bit(backend, home, untouched):
    model = whole_sum().to(home)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    init, labels, frozen = X.to(home), LABELS.to(home), SOME.to(home).expand(4, 3)
    bounds, seed, ages = per_dim_bounds(3), torch.tensor([2**62], device=home), torch.tensor([7], device=home)
    schedule = torch.tensor([0.1, 0.2])
    with untouched(model, init, labels, frozen, *bounds, seed, ages, schedule):
        samples = langevin_sample(
            model, init=init, labels=labels, frozen=frozen, clamp=bounds, seed=seed, first_step=ages, steps=2,
            step_size=schedule, noise_scale=1.0, grad_clip=0.5, grad_norm_clip=0.5, backend=backend,
            return_trajectory=True,
        )  # fmt: skip
    assert not samples.requires_grad
    assert samples.shape == (4, 2, 3)


# -- chains that explode --------------------------------------------------------------------------------------------

# Slopes of -2^21 in 16 free dims have the norm 2^23, so that a step after both clips below moves each by
# step_size * 2^18: these overflow never, never, at steps 3, 1 and 0, and never.
FREE, EXPLODING_STEPS = 16, 7
STEP_SIZES = torch.tensor([[2.0**60], [2.0**72], [2.0**108], [2.0**109], [2.0**110], [1.0]])
FIRST_BAD = [-1, -1, 3, 1, 0, -1]
CLIPS = {"grad_clip": 2.0**20, "grad_norm_clip": 2.0**21}


def slide(dim, label=None):
    """Downhill planes by powers of two, whose products and sums are exact; with a label, for that class only."""
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
    """Six chains on 17 dims, each with another one frozen."""
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
    x, counters, rule = exploding_case(device)
    energy = SumEnergy([slide(FREE + 1), GaussianEnergy(0.0, 1e30)], [1.0, 0.0]).to(device)
    expected = advance_reference(energy, x.clone(), rule, EXPLODING_STEPS, counters, thin=1, telemetry=True)
    done = advance(path, energy, x, rule, EXPLODING_STEPS, counters, thin=1, telemetry=True)
    assert done.first_bad.tolist() == FIRST_BAD
    assert torch.equal(done.x, expected.x)
    assert torch.equal(done.trajectory, expected.trajectory)
    assert done.x.isfinite().all()
    assert torch.equal(done.x[counters["frozen"]], x[counters["frozen"]])
    # what a chain did after it had exploded is not counted
    lived = torch.tensor([7, 7, 3, 1, 0, 7], device=device)
    torch.testing.assert_close(done.telemetry["clipped"], lived / 7)
    assert 2.0**18 > 500  # the least move: every step passes a bound
    torch.testing.assert_close(done.telemetry["clamped"], lived / 7)
    assert torch.equal(done.telemetry["grad_norm"], torch.full((6,), 2.0**23, device=device))


@every_path
def test_only_the_class_that_explodes_does(device, path):
    labels = torch.tensor([1, 0, 1, 1, 2, 1])  # of the three that could, one is of another class
    x, counters, rule = exploding_case(device, labels)
    energy = slide(FREE + 1, label=1).to(device)
    done = advance(path, energy, x, rule, EXPLODING_STEPS, counters, thin=1, telemetry=True)
    assert done.first_bad.tolist() == [-1, -1, 3, 1, -1, -1]
    # the flat class: its free coordinates are where they began
    assert torch.equal(done.x[4], x[4])
    assert torch.equal(done.trajectory[4], x[4].expand(EXPLODING_STEPS, -1))
    assert done.telemetry["grad_norm"][4] == 0.0
    assert done.telemetry["clipped"][4] == 0.0


@every_path
def test_exploding_neighbours_change_nothing(device, path):
    """All that is told about a chain, bit for bit."""
    energy = make_energy(19, [20, 11], head="class", terms=("gaussian", "linear")).to(device)
    x, counters = begin(70, 19, device, classes=CLASSES, frozen="chains")
    counters["frozen"][::3] = False
    rule = Langevin(0.3, 0.7, clamp=(-torch.inf, torch.full((19,), 1e30)), grad_clip=0.5)
    wild = x.clone()
    wild[::3] = 3e38
    calm = torch.arange(70) % 3 > 0
    alone = advance(path, energy, x, rule, 2, counters, thin=1, telemetry=True)
    beside = advance(path, energy, wild, rule, 2, counters, thin=1, telemetry=True)
    for a, b in zip([*alone[:4], *alone.telemetry.values()], [*beside[:4], *beside.telemetry.values()], strict=True):
        assert bits_equal(a[calm], b[calm])
    assert (alone.first_bad == -1).all()
    for row in beside.trajectory[~calm].unbind(1):
        exploded = beside.first_bad[~calm] == 0
        assert torch.equal(row[exploded], wild[~calm][exploded])


@every_path
def test_infinite_steps_leave_frozen_coordinates(device, path):
    """Chains whose noise is infinite stop as they are; those with nothing free have nothing to explode."""
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
def test_exploding_chains_raise_are_kept_or_start_anew(backend, home, untouched):
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
    fresh, told = langevin_sample(energy, on_nonfinite="reinit", return_info=True, **options)
    assert torch.equal(told.first_bad_step, info.first_bad_step)
    assert torch.equal(fresh[~bad], kept[~bad])
    assert torch.equal(fresh[frozen], x[frozen])
    free = ~frozen & bad[:, None]
    within = (fresh >= lo.to(home)) & (fresh <= hi.to(home))
    assert bool(within[free].all())
    assert len(fresh[free].unique()) == int(free.sum())
    assert bool((fresh[free] < 1.0).any())  # each dim by its own bounds
    assert bool((fresh[free] > 100.0).any())
    values = fastebm.energy(energy, fresh, labels=labels).detach()
    torch.testing.assert_close(told.energies[bad], values[bad], rtol=1e-3, atol=1e-3)
    assert torch.equal(langevin_sample(energy, on_nonfinite="reinit", **options), fresh)
