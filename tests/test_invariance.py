"""A chain's bits depend on its number, its age and its start: not on the batch, its order, or the threads."""

import os
import subprocess
import sys

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import Launch, block

from fastebm import Langevin, MLPEnergy, langevin_sample
from fastebm.backends import Chains
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

SEED = 2024
STEPS = 3


def make_mlp(dim, widths, activation="silu"):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        energy = MLPEnergy(dim, widths, activation)
        for p in energy.parameters():
            p.mul_(3.0)
    return describe(energy)


def make_chains(n_chains, dim):
    """x, chain numbers, ages, and a step size and noise scale a chain."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_chains, dim, generator=generator)
    numbers = torch.randperm(10 * n_chains, generator=generator)[:n_chains] + 2**40
    ages = torch.randint(0, 1000, (n_chains,), generator=generator)
    step_size = 0.05 + 0.4 * torch.rand(n_chains, 1, generator=generator)
    return x, numbers, ages, step_size


def on_torch(mlp):
    def run(x, numbers, ages, step_size, steps=STEPS):
        rule = Langevin(step_size, 0.7, clamp=(-2.0, 2.0))
        return runs.closed_form(mlp, Chains(x.clone(), SEED, numbers, ages), rule, steps)

    return run


def on_triton(mlp, regime, device, precision):
    block_dim = block(mlp.dim) if regime == "resident" else min(32, block(mlp.dim))
    launch = Launch(regime, 64, block_dim, 4, 1, in_memory=precision == "bf16x3")  # as on sm_90
    mlp = mlp.to(torch.device(device), torch.float32)

    def run(x, numbers, ages, step_size, steps=STEPS):
        rule = Langevin(step_size, 0.7, clamp=(-2.0, 2.0))
        counters = SEED, numbers.to(device), ages.to(device)
        # a copy, on a CPU too: states are moved in place
        x = x.to(device, copy=True)
        return runs.fused_mlp(mlp, Chains(x, *counters), rule, steps, precision=precision, launch=launch)

    return run


def on_the_fused_update(device):
    def run(x, numbers, ages, step_size, steps=STEPS):
        rule = Langevin(step_size, 0.7, clamp=(-2.0, 2.0))
        counters = SEED, numbers.to(device), ages.to(device)
        energy = Energy(Wells(), (x.shape[1],), torch.float32)
        return runs.fused_module(energy, Chains(x.to(device, copy=True), *counters), rule, steps)

    return run


class Wells(torch.nn.Module):
    """E = sum of x^4/4 - x^2/2: elementwise, so its gradient has no sum that a batch could reorder."""

    def forward(self, x):
        return (x**4 / 4 - x**2 / 2).sum(dim=1)


def same_bits(done, expected, rows=slice(None)):
    # first_bad too; NaN never occurs here, so equal means equal bits, but for the sign of zero
    return all(torch.equal(a, b[rows]) for a, b in zip(done[:3], expected[:3], strict=True))


def check_any_batch(run, chains, sizes):
    """All chains at once against: prefixes of each size, the rest, and a permutation."""
    whole = run(*chains)
    assert same_bits(run(*chains), whole)
    for n in sizes:
        for rows in (slice(n), slice(n, None)):
            part = [c[rows] for c in chains]
            assert same_bits(run(*part), whole, rows), f"chains {rows} alone"
    order = torch.randperm(len(chains[0]), generator=torch.Generator().manual_seed(2))
    assert same_bits(run(*(c[order] for c in chains)), whole, order.to(whole.x.device))


# widths of all residues mod 4: a BLAS may treat a row by its alignment, and so by its place in a tile
ARCHITECTURES = [(2, [16, 16]), (1, [5]), (7, [3, 11, 6, 10]), (63, [100, 37, 5]), (784, [256, 128])]


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize(("dim", "widths"), ARCHITECTURES)
def test_any_batch_on_torch(dim, widths, activation):
    sizes = (1, 7, 63, 64, 65, 255, 257, 599)  # about the edges of tiles of 64 and 256 rows
    check_any_batch(on_torch(make_mlp(dim, widths, activation)), make_chains(600, dim), sizes)


@pytest.mark.parametrize("precision", [pytest.param("ieee", marks=pytest.mark.slow), "bf16x3"])
@pytest.mark.parametrize("regime", ["resident", "streaming"])
@pytest.mark.parametrize(("dim", "widths"), [(2, [16, 16]), pytest.param(63, [100, 37, 5], marks=pytest.mark.slow)])
def test_any_batch_on_triton(device, dim, widths, regime, precision):
    run = on_triton(make_mlp(dim, widths), regime, device, precision)
    check_any_batch(run, make_chains(130, dim), sizes=(65,))


@pytest.mark.parametrize("dim", [1, 63, pytest.param(300, marks=pytest.mark.slow)])
def test_any_batch_of_the_fused_update(device, dim):
    check_any_batch(on_the_fused_update(device), make_chains(70 if dim < 300 else 20, dim), sizes=(9,))


# The last are widths that 3 or 5 threads would split within a vector, or within a padded row.
@pytest.mark.parametrize(
    ("dim", "widths", "n_chains"),
    [*((*shape, n) for shape in ARCHITECTURES for n in (1, 255)), (20, [40, 72], 2100), (300, [150, 33], 600)],
)
def test_any_number_of_threads(dim, widths, n_chains):
    run, chains = on_torch(make_mlp(dim, widths)), make_chains(n_chains, dim)
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
    mlp = make_mlp(5, [20, 11])
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
    """5 steps in one call, and 2 then 3 by the chains' ages: what save and resume rest on."""
    x, numbers, ages, step_size = make_chains(70, 5)
    for name, run in paths(device):
        whole = run(x, numbers, ages, step_size, steps=5)
        half = run(x, numbers, ages, step_size, steps=2)
        resumed = run(half.x.cpu(), numbers, ages + 2, step_size, steps=3)
        assert torch.equal(resumed.x, whole.x), name
        assert torch.equal(resumed.energy, whole.energy), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_parts_of_a_public_call(device, backend):
    """first_chain and first_step name the part of a run that a call is."""
    if backend == "torch":
        device = "cpu"
    energy = MLPEnergy(6, [10, 9]).to(device)
    options = {"step_size": 0.3, "noise_scale": 1.0, "seed": 7, "backend": backend}
    whole = langevin_sample(energy, batch_size=100, steps=4, **options)
    parts = []
    for first, n in ((0, 37), (37, 1), (38, 62)):
        half = langevin_sample(energy, batch_size=n, steps=3, first_chain=first, **options)
        parts.append(langevin_sample(energy, init=half, steps=1, first_chain=first, first_step=3, **options))
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(langevin_sample(energy, batch_size=100, steps=4, **options), whole)
    assert not torch.equal(langevin_sample(energy, batch_size=100, steps=4, **{**options, "seed": 8}), whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork():
    """A child of a process whose OpenMP threads ran would wait for them for ever; in a process of its own to fork."""
    script = """
import os, torch, fastebm
torch.set_num_threads(2)
energy, init = fastebm.MLPEnergy(64, (128,)), torch.rand(2048, 64)
def run():
    options = {"step_size": 0.1, "noise_scale": 1.0, "seed": 1, "backend": "torch"}
    fresh = fastebm.langevin_sample(energy, batch_size=2048, steps=1, **options)
    return fresh, fastebm.langevin_sample(energy, init=init, steps=2, **options)
before = run()
if (child := os.fork()) == 0:
    after = run()
    is_two = torch.get_num_threads() == 2
    torch.set_num_threads(1)
    os._exit(0 if is_two and all(map(torch.equal, before, after)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_chains():
    """Beside the start and the samples: tiles. 60,000 chains of 784 are 188 MB."""
    # VmHWM, not ru_maxrss, which a process inherits from the one that started it
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
