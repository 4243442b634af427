"""Every path of a Langevin run under one call, ``advance``, and the energies and chains that its tests share."""

import itertools
from dataclasses import replace

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import SHARED_MEMORY, Launch, block, shared_bytes
from torch import nn

from fastebm import Activation, ClassifierEnergy, GaussianEnergy, Langevin, MLPEnergy, SumEnergy
from fastebm.backends import Chains
from fastebm.energies import ACTIVATIONS
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

SEED = 0x9E3779B97F4A7C15
YARDSTICK = 64
ULP = torch.finfo(torch.float32).eps
REGIMES = ("resident", "streaming")
IN_MEMORY = tuple(f"{regime} in memory" for regime in REGIMES)
FAST_PATHS = ("torch", "products", *REGIMES)  # a chain's bits do not depend on the batch
PATHS = ("reference", "update", *FAST_PATHS)
BACKENDS = ("reference", "torch", "triton")
every_path = pytest.mark.parametrize("path", PATHS)


def seldom(paths, often):
    """Each path. Those that are not in ``often`` are slow tests, since the interpreter takes many seconds for them."""
    marked = [pytest.param(path, marks=[] if path in often else pytest.mark.slow) for path in paths]
    return pytest.mark.parametrize("path", marked)


every_backend = pytest.mark.parametrize("backend", BACKENDS)
CLASSES = 3


def make_mlp(dim, widths, activation="silu", *, bias=True, spectral_norm=False):
    """An MLP whose gradient is as large as the state. PyTorch's initial weights would hide a wrong gradient."""
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


def make_sampler(n_chains, steps, *, step_form="number", noise_form="number", **options):
    forms = {
        "number": lambda lo, hi: hi,
        "schedule": lambda lo, hi: torch.linspace(lo, hi, steps),
        "per_chain": lambda lo, hi: torch.linspace(lo, hi, n_chains).reshape(-1, 1),
        "none": lambda lo, hi: 0.0,
    }
    return Langevin(forms[step_form](0.1, 0.5), forms[noise_form](0.3, 0.7), **options)


def start(n_chains, dim, device="cpu"):
    """States, and counters that use more than 32 bits: chain numbers near 2^33, and steps that differ by chain."""
    x = torch.randn(n_chains, dim, generator=torch.Generator().manual_seed(1)).to(device)
    numbers = (torch.arange(n_chains) * 3 + 2**33 - 50).to(device)
    first_steps = (torch.arange(n_chains) % 5 * 1000).to(device)
    return x, {"seed": SEED, "numbers": numbers, "first_steps": first_steps}


def first_rows(n, x, sampler, counters):
    """The same run for its first n chains alone."""
    values = {
        name: v[:n] if isinstance(v := getattr(sampler, name), torch.Tensor) and v.ndim == 2 else v
        for name in ("step_size", "noise_scale")
    }
    counters = {k: v[:n] if isinstance(v, torch.Tensor) else v for k, v in counters.items()}
    return x[:n].clone(), replace(sampler, **values), counters


def first_steps_of(sampler, steps):
    """The same sampler with schedules of the first steps only."""
    values = {
        name: v[:steps] if isinstance(v := getattr(sampler, name), torch.Tensor) and v.ndim == 1 else v
        for name in ("step_size", "noise_scale")
    }
    return replace(sampler, **values)


# counters: the fields of Chains after the state: seed, numbers, first_steps, labels, frozen. asked: thin, telemetry


def advance_reference(energy, x, sampler, steps, counters, dtype=torch.float32, **asked):
    return runs.by_definition(
        Energy(energy, x.shape[1:], dtype), Chains(x.flatten(1).to(dtype), **counters), sampler, steps, **asked
    )


def advance_torch(energy, x, sampler, steps, counters, **asked):
    description = describe(energy, labels="labels" in counters)
    return runs.closed_form(description, Chains(x.clone(), **counters), sampler, steps, **asked)


def launch_at(regime, description, device, precision="ieee", chunk=32, warps=4):
    """A launch at which each of four warps has its own chains; None if this GPU has too little shared memory.

    regime: "resident" or "streaming"; with " in memory", the kernel that sm_90 runs at bf16x3.
    """
    in_memory, regime = regime.endswith(" in memory"), regime.removesuffix(" in memory")
    block_dim = block(description.dim) if regime == "resident" else min(chunk, block(description.dim))
    launch = Launch(regime, 64, block_dim, warps, 1, in_memory=in_memory)
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        limit = SHARED_MEMORY.get(10 * major + minor, 101376)
        if shared_bytes(launch, description.dim, description.networks, precision) > limit:
            return None
    return launch


def advance_fused(energy, x, sampler, steps, counters, regime, precision="ieee", chunk=32, warps=4, **asked):
    """The fused kernel at ``launch_at`` on a state between two guards of NaN; None if there is no launch."""
    description = describe(energy, labels="labels" in counters)
    if (launch := launch_at(regime, description, x.device, precision, chunk, warps)) is None:
        return None
    guarded = torch.full((x.numel() + 256,), torch.nan, device=x.device)
    inner = guarded[128 : 128 + x.numel()].view(x.shape).copy_(x)
    done = runs.fused_mlp(
        description, Chains(inner, **counters), sampler, steps, precision=precision, launch=launch, **asked
    )
    assert guarded[:128].isnan().all()
    assert guarded[128 + x.numel() :].isnan().all()
    return done


def largest(values):
    return float(values.abs().max()) if values.numel() > 0 else 0.0


def advance(path, energy, x, sampler, steps, counters, **asked):
    """Any path, on what ``start`` or ``begin`` returns. "streaming" and "eight warps" take chunks of 16 dims."""
    if path == "reference":
        return advance_reference(energy, x.clone(), sampler, steps, counters, **asked)
    if path == "torch":
        return advance_torch(energy, x, sampler, steps, counters, **asked)
    chains = Chains(x.clone(), **counters)
    if path == "update":
        return runs.fused_module(Energy(energy, x.shape[1:], torch.float32), chains, sampler, steps, **asked)
    if path == "products":
        description = describe(energy, labels="labels" in counters)
        return runs.fused_products(description, chains, sampler, steps, **asked)
    if path == "eight warps":
        return advance_fused(energy, x, sampler, steps, counters, "streaming", chunk=16, warps=8, **asked)
    return advance_fused(energy, x, sampler, steps, counters, path, chunk=16, **asked)


def network(dim, widths, outputs=1, activation="silu", seed=0):
    """Like ``make_mlp``, with any number of outputs."""
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
    """An MLP with a head. With terms, the sum of all: one weight is negative, and the last two terms are nested."""
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
    """(1, dim), (n_chains, dim) or None."""
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
    """dE/dx in float64, 0 for frozen coordinates."""
    grad = Energy(energy, x.shape[1:], torch.float64).gradient(x.double(), counters.get("labels"))
    return grad if counters.get("frozen") is None else grad.masked_fill(counters["frozen"], 0.0)


def same_bits(done, expected, rows=slice(None)):
    """Whether everything that two paths return is equal. NaN equals NaN: a gradient norm after no steps."""
    pairs = [
        *zip(done[:4], expected[:4], strict=True),
        *zip((done.telemetry or {}).values(), (expected.telemetry or {}).values(), strict=True),
    ]
    return all((a is None) == (b is None) and (a is None or bits_equal(a, b[rows])) for a, b in pairs)


def bits_equal(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
