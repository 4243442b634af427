"""Steps in the first layer of an MLP energy, against the reference in float64, step by step, for many architectures.

The error of a path may be twice that of plain float32, plus rounding. In float64 the two differ by rounding alone.
"""

from __future__ import annotations

import math

import pytest
import runs
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from paths import HEADS, ULP, begin, largest, network
from torch import nn

from fastebm import HMC, MALA, ClassifierEnergy, GaussianEnergy, Langevin, SumEnergy, UnderdampedLangevin
from fastebm.backends import Chains, cpu_collapsed
from fastebm.backends.collapsed import FORMS
from fastebm.energies import ACTIVATIONS
from fastebm.rng import Stream, uniform
from fastebm.targets.autograd import Energy
from fastebm.targets.collapsed import Collapsed, End, FirstLayer, Leaps
from fastebm.targets.description import describe

N_CHAINS = 70  # more than the rows of one product
STEPS = 12

SAMPLERS = {"HMC": HMC, "MALA": MALA, "Langevin": Langevin, "UnderdampedLangevin": UnderdampedLangevin}
TERMS = ("mlp", "classifier", "gaussian", "gaussian about a mean", "linear", "slope")
SPLITTINGS = {1: "BAOAB", 2: "OBABO", 5: "ABOBA"}
FORMS_OF_STEP = ("number", "schedule", "per chain")

# Rounding might turn an accept decision whose margin, relative to the largest energy, is below this.
MARGIN = 3e-6

# Chains that a change of their start sends elsewhere are not compared: where it has grown by this factor, it has met a
# kink of an activation, or turned an accept decision.
MOST = 100

IN_FLOAT64 = 1e-12  # relative to states and energies; measured: 1e-15 to 1e-14


def test_every_form_is_here():
    assert set(SAMPLERS.values()) == set(FORMS)


def term(kind, dim):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {
            "mlp": lambda: network(dim, [7], activation="tanh", seed=2),
            "classifier": lambda: ClassifierEnergy(network(dim, [9, 5], 4, seed=3)),
            "gaussian": lambda: GaussianEnergy(0.0, 1.2),
            "gaussian about a mean": lambda: GaussianEnergy(torch.linspace(-1, 1, dim), 0.8),
            "linear": lambda: nn.Linear(dim, 1),
            "slope": lambda: nn.Linear(dim, 1, bias=False),
        }[kind]()


def make_energy(dim, widths, activation, head, terms, bias):
    model = network(dim, widths, 1 if head == "scalar" else 3, activation)
    if not bias:
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.bias = None
    if head != "scalar":
        model = ClassifierEnergy(model)
    if terms:
        energies = [model, *(term(kind, dim) for kind in terms)]
        model = SumEnergy(energies, [(1.0, 0.7, -0.3, 1.3)[k % 4] for k in range(len(energies))])
    return model.eval()


@st.composite
def cases(draw):
    """Arguments of ``Truth``."""
    dim = draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 63, 257, 784, 1024]) | st.integers(1, 1024))
    width = st.sampled_from([1, 3, 8, 16, 17, 33, 64, 70])
    terms = draw(st.lists(st.sampled_from(TERMS), max_size=4))
    scale = draw(st.sampled_from([None, "number", "dims"]))
    return {
        "dim": dim,
        "widths": draw(st.lists(width, min_size=1, max_size=6)),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "head": draw(st.sampled_from(HEADS)),
        "terms": terms,
        "bias": draw(st.booleans()),
        "step_form": draw(st.sampled_from(FORMS_OF_STEP)),
        "scale": None if scale == "dims" and any(kind.startswith("gaussian") for kind in terms) else scale,
        "n_leapfrog": draw(st.sampled_from([1, 2, 5])),
    }


def steepest(energy, x, labels):
    """About the largest curvature of the energy near the states, by power iteration."""
    exact = Energy(energy, x.shape[1:], torch.float64)
    x = x.double()
    gradient, v = (
        exact.gradient(x, labels),
        torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    )
    for _ in range(6):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-300)
        v = (exact.gradient(x + 1e-4 * v, labels) - gradient) / 1e-4
    return float(torch.linalg.vector_norm(v, dim=1).max())


def make_sampler(name, step_size, steps, *, step_form="number", scale=None, n_leapfrog=5, dim=1):
    values = {
        "number": lambda: step_size,
        "schedule": lambda: torch.linspace(0.3, 1.0, steps) * step_size,
        "per chain": lambda: torch.linspace(0.3, 1.0, N_CHAINS)[:, None] * step_size,
    }[step_form]()
    diagonal = {None: None, "number": 1.3, "dims": torch.linspace(0.6, 1.4, dim)}[scale]
    if name == "HMC":
        return HMC(values, n_leapfrog, mass=None if diagonal is None else 1 / diagonal)
    if name == "UnderdampedLangevin":  # its mass is a number where its steps run in the first layer
        return UnderdampedLangevin(values, mass=None if diagonal is None else 1.3, splitting=SPLITTINGS[n_leapfrog])
    return SAMPLERS[name](values**2, preconditioner=diagonal)


class TooFew(Exception):
    """An energy without a minimum is so large that rounding decides in most chains."""


class Truth:
    """The float64 trajectory of a run, and tolerances from the error of plain float32 PyTorch."""

    def __init__(
        self, name, *, dim, widths, activation="silu", head="scalar", terms=(), bias=True, steps=STEPS, **settings
    ):  # fmt: skip
        # In float64 nothing is rounded where terms are added up.
        self.energy = make_energy(dim, widths, activation, head, terms, bias).double()
        self.description = describe(self.energy, labels=head == "class")
        self.steps = steps
        self.x, self.counters = begin(N_CHAINS, dim, classes=3 if head == "class" else None)
        labels = self.counters.get("labels")
        curvature = max(1.0, steepest(self.energy, self.x, labels))
        step_size = 0.4 / curvature**0.5
        self.sampler = make_sampler(name, step_size, steps, dim=dim, **settings)
        module, asked = Energy(self.energy, (dim,), torch.float64), {"thin": 1, "telemetry": True}
        accepted = Acceptances(self.sampler)
        self.exact = runs.by_definition(
            module, self.chains(torch.float64), self.sampler, steps, adaptation=accepted, **asked
        )  # fmt: skip
        self.scale, energies = max(1.0, largest(self.exact.trajectory)), max(1.0, largest(self.exact.energy))
        self.plain = self.ordinary(self.x, **asked)
        nudge = 256 * ULP * self.scale * torch.where(torch.arange(dim) % 3 == 0, 1, -1)
        moved = (self.ordinary(self.x + nudge, **asked).trajectory - self.plain.trajectory).abs().amax(dim=2)
        # How much a small change of the start has grown, (N_CHAINS, steps).
        self.growth = (moved / largest(nudge)).cummax(dim=1).values.clamp_min(1.0)
        self.sure = accepted.sure(self.chains(torch.float64), MARGIN * energies) & (self.growth[:, -1] < MOST)
        if self.sure.sum() <= 20:
            raise TooFew
        # A step rounds at random. In a W, (width) terms cancel where dims are fewer.
        width = sum(mlp.widths[0] for mlp in self.description.mlps)
        rounding = 2 * (torch.arange(1, steps + 1) * max(1.0, width / dim)) ** 0.5 * ULP * self.scale
        errors = (self.plain.trajectory - self.exact.trajectory)[self.sure].abs().amax(dim=(0, 2))
        self.tolerance = 2 * errors.cummax(dim=0).values + rounding * self.growth
        slope = module.gradient(self.exact.x, labels).abs().sum(dim=1).max() / dim**0.5
        self.energy_tolerance = (
            2 * largest((self.plain.energy - self.exact.energy)[self.sure])
            + 4 * ULP * energies
            + slope * rounding[-1] * self.growth[:, -1]
        )
        # What the telemetry may change by where the state does.
        self.changes = {"acceptance": self.energy_tolerance, "grad_norm": curvature * self.tolerance[:, -1]}

    def chains(self, dtype):
        return Chains(self.x.to(dtype, copy=True), **self.counters)

    def ordinary(self, x, **asked):
        """The run in plain float32."""
        return runs.closed_form(self.description, Chains(x.clone(), **self.counters), self.sampler, self.steps, **asked)

    def check(self, kernels, dtype):
        """Run the steps in the first layer, and compare states, energies and telemetry."""
        done = runs.collapsed(
            self.description, self.chains(dtype), self.sampler, self.steps, kernels=kernels, thin=1, telemetry=True
        )  # fmt: skip
        assert torch.equal(done.first_bad, torch.full((N_CHAINS,), -1, dtype=torch.int32))
        assert torch.equal(done.trajectory[:, -1], done.x)
        tolerance, energy_tolerance = self.tolerance, self.energy_tolerance
        if dtype == torch.float64:
            size = IN_FLOAT64 * max(self.scale, largest(self.exact.energy))
            tolerance, energy_tolerance = size * self.growth, size * self.growth[:, -1]
        error = (done.trajectory - self.exact.trajectory).abs().amax(dim=2)
        assert (error <= tolerance)[self.sure].all()
        assert ((done.energy - self.exact.energy).abs() <= energy_tolerance)[self.sure].all()
        self.check_telemetry(done)

    def check_telemetry(self, done):
        assert done.telemetry.keys() == self.exact.telemetry.keys() == self.sampler.reports.keys()
        for name, exact in self.exact.telemetry.items():
            found = done.telemetry[name]
            assert found.dtype == done.x.dtype
            assert found.isfinite().all()
            size, plain = max(1.0, largest(exact)), largest((self.plain.telemetry[name] - exact)[self.sure])
            tolerance = self.changes.get(name, 0.0) + 2 * plain + 4 * ULP * size
            tolerance = 1e-9 * size if done.x.dtype == torch.float64 else tolerance
            assert ((found - exact).abs() <= tolerance)[self.sure].all(), name


class Acceptances:
    """Looks on, as an adaptation that changes nothing, and keeps the acceptance probabilities."""

    def __init__(self, sampler):
        self.sampler, self.seen = sampler, []

    def update(self, old, new, info, active):
        self.seen.append(info.acceptance)

    def sure(self, chains, margin):
        """Chains none of whose proposals rounding might accept or reject, (n,) bool."""
        sure = torch.ones(len(chains.x), dtype=torch.bool)
        for t, acceptance in enumerate(self.seen if self.sampler.exact else ()):
            u = uniform(chains.seed, Stream.METROPOLIS, chains.numbers, chains.first_steps + t, 1)[:, 0]
            sure &= (u.log() - acceptance.log()).abs() > margin
        return sure


PATHS = [("torch", torch.float32), ("numba", torch.float32), ("torch", torch.float64)]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


@pytest.mark.usefixtures("often_put_together")
@every_sampler
@settings(max_examples=40)
@given(case=cases())
def test_every_step_is_that_of_the_reference(name, case):
    try:
        truth = Truth(name, **case)
    except TooFew:
        reject()
    for path in PATHS:
        truth.check(*path)


LONG = {
    "confined": {"widths": [40, 20], "terms": ["gaussian about a mean"]},
    "free": {"widths": [40, 20, 9], "activation": "tanh"},
    "classes": {"widths": [30], "head": "class", "terms": ["gaussian", "linear"], "activation": "gelu"},
}


@pytest.mark.slow
@pytest.mark.parametrize("energy", LONG)
@every_sampler
def test_rounding_is_bounded_after_1000_steps(name, energy):
    truth = Truth(name, dim=200, steps=1000, **LONG[energy])
    for path in PATHS:
        truth.check(*path)


@pytest.mark.parametrize("rows", [1, N_CHAINS])
@pytest.mark.parametrize(
    ("dim", "term", "scaled"), [(3, "gaussian", False), (257, "gaussian", False), (257, "linear", True)]
)
def test_the_end_of_a_trajectory_is_one_pass(dim, term, scaled, rows):
    """Against plain PyTorch in float64, for chains with and without a step size of their own."""
    description = describe(make_energy(dim, [9, 4], "silu", "scalar", [term], True).double())
    scale = torch.linspace(0.5, 1.5, dim, dtype=torch.float64) if scaled else None
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    exact = Collapsed(FirstLayer(description, scale), N_CHAINS, None)
    width = exact.layer.width
    wide = {name: made(N_CHAINS, dim).float() for name in ("base", "v")}
    narrow = {name: made(N_CHAINS, width).float() for name in ("a", "u", "q")}
    end = End(*(made(N_CHAINS, width).float() for _ in range(4)), *[made(N_CHAINS).float()] * 3)
    h = torch.linspace(0.1, 0.3, rows, dtype=torch.float64)[:, None]
    leaps = Leaps.of(h, 3, exact.curvature, end.u)

    def arrived(target, dtype):
        given = {name: v.to(dtype) for name, v in {**wide, **narrow}.items()}
        return target.arrived(**given, end=End(*(v.to(dtype) for v in end)), leaps=Leaps(*(v.to(dtype) for v in leaps)))

    layer = FirstLayer(description.to(torch.device("cpu"), torch.float32), None if scale is None else scale.float())
    truth, plain = arrived(exact, torch.float64), arrived(Collapsed(layer, N_CHAINS, None), torch.float32)
    target = cpu_collapsed.collapsed(layer)(N_CHAINS, None)
    ours = arrived(target, torch.float32)
    for name, value in truth._asdict().items():
        if name != "size":
            allowed = 2 * largest(getattr(plain, name) - value) + 2 * ULP * largest(value)
            assert largest(getattr(ours, name) - value) <= allowed, name
    assert math.isfinite(ours.size)
    wide["base"][1, 0] = math.nan
    with_nan = arrived(target, torch.float32)
    assert not math.isfinite(with_nan.size)
    others = torch.arange(N_CHAINS) != 1
    assert all(torch.equal(v[others], w[others]) for v, w in zip(with_nan[:-1], ours[:-1], strict=True))
