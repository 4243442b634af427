"""A chain's bits depend on its number, age and start, and not on the batch, its order or the number of threads."""

import os
import subprocess
import sys

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import Launch, block
from paths import make_mlp

from fastebm import Langevin, MLPEnergy, langevin_sample
from fastebm.backends import Chains
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

SEED = 2024
STEPS = 3


def make_chains(n_chains, dim):
    """x, chain numbers, ages, and one step size per chain."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_chains, dim, generator=generator)
    numbers = torch.randperm(10 * n_chains, generator=generator)[:n_chains] + 2**40
    ages = torch.randint(0, 1000, (n_chains,), generator=generator)
    step_size = 0.05 + 0.4 * torch.rand(n_chains, 1, generator=generator)
    return x, numbers, ages, step_size


def on_torch(mlp):
    def run(x, numbers, ages, step_size, steps=STEPS):
        sampler = Langevin(step_size, 0.7, clamp=(-2.0, 2.0))
        return runs.closed_form(mlp, Chains(x.clone(), SEED, numbers, ages), sampler, steps)

    return run


def on_triton(mlp, regime, device, precision):
    block_dim = block(mlp.dim) if regime == "resident" else min(32, block(mlp.dim))
    launch = Launch(regime, 64, block_dim, 4, 1, in_memory=precision == "bf16x3")  # as on sm_90
    mlp = mlp.to(torch.device(device), torch.float32)

    def run(x, numbers, ages, step_size, steps=STEPS):
        sampler = Langevin(step_size, 0.7, clamp=(-2.0, 2.0))
        counters = SEED, numbers.to(device), ages.to(device)
        # a copy, on a CPU too: states are moved in place
        x = x.to(device, copy=True)
        return runs.fused_mlp(mlp, Chains(x, *counters), sampler, steps, precision=precision, launch=launch)

    return run


def on_the_fused_update(device):
    def run(x, numbers, ages, step_size, steps=STEPS):
        sampler = Langevin(step_size, 0.7, clamp=(-2.0, 2.0))
        counters = SEED, numbers.to(device), ages.to(device)
        energy = Energy(Wells(), (x.shape[1],), torch.float32)
        return runs.fused_module(energy, Chains(x.to(device, copy=True), *counters), sampler, steps)

    return run


class Wells(torch.nn.Module):
    """E = sum of x^4/4 - x^2/2: its gradient is elementwise, so that it has no sums whose order could change."""

    def forward(self, x):
        return (x**4 / 4 - x**2 / 2).sum(dim=1)


def same_bits(done, expected, rows=slice(None)):
    # there is no NaN here, so that equal values have equal bits, apart from the sign of zero
    return all(torch.equal(a, b[rows]) for a, b in zip(done[:3], expected[:3], strict=True))


def check_any_batch(run, chains, sizes):
    """All chains at once compared with prefixes of each size, the rest, and a permutation."""
    whole = run(*chains)
    assert same_bits(run(*chains), whole)
    for n in sizes:
        for rows in (slice(n), slice(n, None)):
            part = [c[rows] for c in chains]
            assert same_bits(run(*part), whole, rows), f"chains {rows} alone"
    order = torch.randperm(len(chains[0]), generator=torch.Generator().manual_seed(2))
    assert same_bits(run(*(c[order] for c in chains)), whole, order.to(whole.x.device))


# widths of all residues mod 4: a BLAS may round a row by its alignment, and so by its place in a tile
ARCHITECTURES = [(2, [16, 16]), (1, [5]), (7, [3, 11, 6, 10]), (63, [100, 37, 5]), (784, [256, 128])]


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize(("dim", "widths"), ARCHITECTURES)
def test_any_batch_on_torch(dim, widths, activation):
    sizes = (1, 7, 63, 64, 65, 255, 257, 599)  # around the edges of tiles of 64 and 256 rows
    check_any_batch(on_torch(describe(make_mlp(dim, widths, activation))), make_chains(600, dim), sizes)


@pytest.mark.parametrize("precision", [pytest.param("ieee", marks=pytest.mark.slow), "bf16x3"])
@pytest.mark.parametrize("regime", ["resident", "streaming"])
@pytest.mark.parametrize(("dim", "widths"), [(2, [16, 16]), pytest.param(63, [100, 37, 5], marks=pytest.mark.slow)])
def test_any_batch_on_triton(device, dim, widths, regime, precision):
    run = on_triton(describe(make_mlp(dim, widths)), regime, device, precision)
    check_any_batch(run, make_chains(130, dim), sizes=(65,))


@pytest.mark.parametrize("dim", [1, 63, pytest.param(300, marks=pytest.mark.slow)])
def test_any_batch_of_the_fused_update(device, dim):
    check_any_batch(on_the_fused_update(device), make_chains(70 if dim < 300 else 20, dim), sizes=(9,))


# 3 or 5 threads would split the last two widths within a vector, or within a padded row.
@pytest.mark.parametrize(
    ("dim", "widths", "n_chains"),
    [*((*shape, n) for shape in ARCHITECTURES for n in (1, 255)), (20, [40, 72], 2100), (300, [150, 33], 600)],
)
def test_any_number_of_threads(dim, widths, n_chains):
    run, chains = on_torch(describe(make_mlp(dim, widths))), make_chains(n_chains, dim)
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3, 5):
            torch.set_num_threads(n_threads)
            results.append(run(*chains))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert same_bits(result, results[0])


def paths(device):
    mlp = describe(make_mlp(5, [20, 11]))
    yield "torch", on_torch(mlp)
    for regime in ("resident", "streaming"):
        yield regime, on_triton(mlp, regime, device, "ieee")
    yield "fused update", on_the_fused_update(device)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter, about what is meant
def test_exploding_neighbours_change_nothing(device):
    x, numbers, ages, step_size = make_chains(70, 5)
    wild = x.clone()
    wild[::3] = 3e38
    calm = [i for i in range(70) if i % 3]
    for name, run in paths(device):
        alone, beside = run(x, numbers, ages, step_size), run(wild, numbers, ages, step_size)
        assert (beside.first_bad[::3] >= 0).all(), name
        for a, b in zip(alone[:3], beside[:3], strict=True):
            assert torch.equal(a[calm], b[calm]), name


def test_stopping_between_steps_changes_nothing(device):
    """5 steps in one call are 2 steps and then 3, as in a run that is saved and resumed."""
    x, numbers, ages, step_size = make_chains(20, 5)
    for name, run in paths(device):
        whole = run(x, numbers, ages, step_size, steps=5)
        half = run(x, numbers, ages, step_size, steps=2)
        resumed = run(half.x.cpu(), numbers, ages + 2, step_size, steps=3)
        assert torch.equal(resumed.x, whole.x), name
        assert torch.equal(resumed.energy, whole.energy), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_parts_of_a_public_call(device, backend):
    """first_chain and first_step say which part of a run a call computes."""
    if backend == "torch":
        device = "cpu"
    energy = MLPEnergy(6, [10, 9]).to(device)
    options = {"step_size": 0.3, "noise_scale": 1.0, "seed": 7, "backend": backend}
    whole = langevin_sample(energy, batch_size=70, steps=3, **options)
    parts = []
    for first, n in ((0, 7), (7, 1), (8, 62)):
        half = langevin_sample(energy, batch_size=n, steps=2, first_chain=first, **options)
        parts.append(langevin_sample(energy, init=half, steps=1, first_chain=first, first_step=2, **options))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_chains():
    """Apart from the start and the samples, memory is for tiles. 60,000 chains of 784 dims are 188 MB."""
    # not ru_maxrss, which a process inherits from its parent
    script = """
import torch, fastebm
def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))
energy, options = fastebm.build(784, hidden_sizes=(256, 128)), {"steps": 1, "backend": "torch"}
fastebm.langevin_sample(energy, batch_size=2048, **options)
init = torch.rand(60_000, 784)
before = kilobytes("VmRSS")
samples = fastebm.langevin_sample(energy, init=init, **options)
print((kilobytes("VmHWM") - before) * 1024 - samples.nbytes)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("resident memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True, text=True)
    assert int(done.stdout) < 60e6
