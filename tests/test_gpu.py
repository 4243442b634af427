"""Tests that need a GPU: sizes, memory, streams, and every shipped precision at the shipped launches.

test_gpu_graphs.py needs one too. All other tests run on the GPU of a machine that has one.
"""

import os
from pathlib import Path

import pytest
import runs
import torch
from paths import ULP, largest, make_mlp
from torch import nn
from truth import plain_energy_and_gradient

from fastebm import (
    HMC,
    MALA,
    NUTS,
    ChainPool,
    GaussianEnergy,
    Langevin,
    NonFiniteError,
    SumEnergy,
    langevin_sample,
    sample,
    why_not_fused,
)
from fastebm.backends import Chains
from fastebm.backends.choose import launch_for
from fastebm.rng import Stream, normal, philox4x32
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe
from fastebm.targets.mlp import read_mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEED = 0x9E3779B97F4A7C15
ARCHITECTURES = [(2, [128, 128]), (64, [128, 128]), (784, [256, 128])]

# The GPU's log2 has an error of 2^-22, and the radius of the noise is a root of it: worst for a radius near 0.
NOISE_ERROR = 1e-3


def need_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.0f} are free")


def fits(energy, precision):
    """Skip the test if this GPU has too little shared memory: no other reason is accepted."""
    why_not = why_not_fused(energy, precision=precision)
    if why_not is not None:
        assert "shared memory" in why_not
        pytest.skip(why_not)


def start(n_chains, dim):
    return torch.randn(n_chains, dim, generator=torch.Generator().manual_seed(1)).cuda()


# -- which path runs, and its error ---------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "widths"), ARCHITECTURES)
def test_auto_is_the_fused_kernel(dim, widths):
    energy = make_mlp(dim, widths).cuda()
    fits(energy, "bf16x3")
    x, info = langevin_sample(energy, batch_size=100, steps=2, step_size=0.1, seed=0, return_info=True)
    assert x.is_cuda
    assert x.shape == (100, dim)
    assert (info.backend, info.why_not_fused, info.precision) == ("triton", None, "bf16x3")
    assert (
        info.path == ("resident" if dim <= 2 else "streaming") or dim == 64
    )  # at 64 dims it depends on the shared memory


def test_auto_for_another_module_is_the_fused_update():
    energy = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(2 * 4, 1)).cuda()
    x, info = langevin_sample(energy, (1, 4, 4), batch_size=10, steps=2, step_size=0.1, seed=0, return_info=True)
    assert x.shape == (10, 1, 4, 4)
    assert (info.backend, info.path) == ("triton", "autograd")
    assert "Conv2d" in info.why_not_fused


# "ieee" products of these widths take minutes to compile, so a small energy is used.
@pytest.mark.parametrize(
    ("dim", "widths", "precision"),
    [*((*a, precision) for a in ARCHITECTURES for precision in ("bf16x3", "tf32", "bf16")), (5, [16, 16], "ieee")],
)
def test_every_precision_against_float64(dim, widths, precision):
    """The error of a gradient step is at most twice that of plain PyTorch with operands of the same precision."""
    energy = make_mlp(dim, widths).cuda()
    fits(energy, precision)
    x = start(300, dim)
    options = {"seed": SEED, "backend": "triton", "precision": precision}
    exact = x.double() - Energy(energy, (dim,), torch.float64).gradient(x.double())
    if precision == "ieee":
        gradient = Energy(energy, (dim,), torch.float32).gradient(x)
    else:
        _, gradient = plain_energy_and_gradient(read_mlp(energy), x, precision)
    allowed = 2 * largest(x - gradient - exact) + 2 * ULP * (largest(x) + largest(exact - x))
    moved, info = langevin_sample(
        energy, init=x, steps=1, step_size=2.0, noise_scale=0.0, return_info=True, **options
    )  # fmt: skip
    assert info.precision == precision
    assert info.path in ("resident", "streaming")
    assert largest(moved - exact) <= allowed

    # a few small steps with noise: differences must not grow
    sampler, steps = Langevin(0.1, 1.0, clamp=(-2.0, 2.0)), 3
    chains = Chains(x.double(), SEED, torch.arange(300, device="cuda"), torch.full((300,), 7, device="cuda"))
    truth = runs.by_definition(Energy(energy, (dim,), torch.float64), chains, sampler, steps)
    moved = langevin_sample(
        energy, init=x, steps=steps, step_size=0.1, noise_scale=1.0, clamp=(-2.0, 2.0), first_step=7, **options
    )
    b = 0.1**0.5
    assert largest(moved - truth.x) <= steps * (2 * allowed + b * NOISE_ERROR)


# -- one evaluation of an energy -------------------------------------------------------------------------------------


def evaluation(energy, x, precision):
    """The energy as a target, at the launch that a sampler without a fused kernel would take."""
    description = describe(energy)
    launch = launch_for(description, precision, x.device)
    if isinstance(launch, str):
        assert "shared memory" in launch
        pytest.skip(launch)
    numbers = torch.arange(len(x), device=x.device)
    return runs.evaluation(description, Chains(x, 0, numbers, numbers), precision=precision, launch=launch)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize(("dim", "widths"), ARCHITECTURES)
def test_every_precision_against_float64_of_an_evaluation(dim, widths, precision):
    """The error is at most twice that of plain PyTorch with operands of the same precision."""
    energy, x = make_mlp(dim, widths).cuda(), start(300, dim)
    target, exact = evaluation(energy, x, precision), Energy(energy, (dim,), torch.float64)
    value, gradient = exact(x.double()), exact.gradient(x.double())
    plain_value, plain_gradient = plain_energy_and_gradient(read_mlp(energy), x, precision)
    of_values = 2 * largest(plain_value - value) + 2 * ULP * largest(value)
    of_gradients = 2 * largest(plain_gradient - gradient) + 2 * ULP * largest(gradient)
    both = target.value_and_gradient(x)
    for found in (both[0], target.value(x)):
        assert largest(found - value) <= of_values
    for found in (both[1], target.gradient(x)):
        assert largest(found - gradient) <= of_gradients


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
@pytest.mark.parametrize(("dim", "widths"), ARCHITECTURES)
def test_bits_do_not_depend_on_the_batch_of_an_evaluation(dim, widths, precision):
    energy, x = make_mlp(dim, widths).cuda(), start(20_000, dim)
    whole = evaluation(energy, x, precision).value_and_gradient(x)
    for first, n in ((0, 20_000), (0, 1), (1, 64), (77, 10_001)):
        rows = slice(first, first + n)
        part = evaluation(energy, x[rows], precision).value_and_gradient(x[rows])
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1], whole[1][rows])


@pytest.mark.parametrize(("dim", "widths"), ARCHITECTURES)
def test_auto_for_a_sampler_without_a_fused_kernel(dim, widths):
    """Its own steps, which agree with float64 as long as no accept test goes the other way by rounding."""
    energy, x = make_mlp(dim, widths).cuda(), start(300, dim)
    evaluation(energy, x, "bf16x3")
    found = sample(energy, NUTS(0.05, 3), init=x, steps=2, seed=0)
    assert (found.info.backend, found.info.path, found.info.precision) == ("triton", "evaluation", "bf16x3")
    truth = sample(energy.double(), NUTS(0.05, 3), init=x.double(), steps=2, seed=0, backend="reference")
    near = (found.x - truth.x).abs().amax(dim=1) < 1e-2
    assert float(near.float().mean()) > 0.95


@pytest.mark.parametrize("precision", ["bf16x3", "bf16", "tf32"])
@pytest.mark.parametrize(("dim", "widths"), ARCHITECTURES[:2])
def test_every_precision_of_mala_and_hmc(dim, widths, precision):
    """The proposal, the energy there and the accept test, and equal bits for a part of the chains."""
    energy = make_mlp(dim, widths).cuda()
    x, options = start(300, dim), {"seed": SEED, "backend": "triton", "precision": precision}
    shown = sample(energy, MALA(0.02), init=x, steps=1, **options)
    if shown.info.path == "evaluation":
        assert "shared memory" in shown.info.why_not_fused
        pytest.skip(shown.info.why_not_fused)
    assert (shown.info.path, shown.info.precision) == ("resident", precision)
    truth = sample(energy.double(), MALA(0.02), init=x.double(), steps=1, seed=SEED, backend="reference")
    energy.float()
    moved, should = ((v.x != x).any(dim=1) for v in (shown, truth))
    assert int((moved != should).sum()) <= 3
    both = moved & should
    assert int(both.sum()) > 200
    _, gradient = plain_energy_and_gradient(read_mlp(energy), x, precision)
    exact = Energy(energy, (dim,), torch.float64).gradient(x.double())
    noise = 0.02**0.5 * NOISE_ERROR
    assert largest((shown.x - truth.x)[both]) <= 0.02 * largest(gradient - exact) + noise + 4 * ULP * largest(x)
    value = Energy(energy, (dim,), torch.float64)(shown.x.double())
    plain, _ = plain_energy_and_gradient(read_mlp(energy), shown.x, "bf16x3" if precision == "bf16" else precision)
    assert largest(shown.energies - value) <= 2 * largest(plain - value) + 2 * ULP * largest(value)

    whole = sample(energy, HMC(0.1, 5), init=x, steps=4, **options)
    assert 0.5 < float(whole.info.acceptance.mean()) < 1
    part = sample(energy, HMC(0.1, 5), init=x[70:], steps=4, first_chain=70, **options)
    assert torch.equal(part.x, whole.x[70:])
    assert torch.equal(part.energies, whole.energies[70:])


@pytest.mark.parametrize("precision", ["bf16x3", "bf16", "tf32"])
@pytest.mark.parametrize("sampler", [MALA(0.02, clamp=(-6.0, 6.0)), HMC(0.05, 4)], ids=["MALA", "HMC"])
def test_every_precision_in_the_first_layer(sampler, precision):
    """One step against float64, in which only gradients are rounded to bf16. Equal bits for a part of the chains."""
    energy = SumEnergy([make_mlp(784, (64, 64)), GaussianEnergy(0.3, 2.0)]).cuda()
    x, options = start(300, 784), {"backend": "triton", "precision": precision}
    shown = sample(energy, sampler, init=x, steps=1, seed=SEED, **options)
    if shown.info.path == "evaluation" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(shown.info.why_not_fused)
    assert (shown.info.path, shown.info.precision) == ("collapsed", precision)
    truth = sample(energy.double(), sampler, init=x.double(), steps=1, seed=SEED, backend="reference")
    energy.float()
    moved, should = ((v.x != x).any(dim=1) for v in (shown, truth))
    assert int((moved != should).sum()) <= 3
    both = moved & should
    assert int(both.sum()) > 200
    difference = shown.info.acceptance - truth.info.acceptance  # rounded products with Q would raise it
    assert abs(float(difference.mean())) < 0.01
    rounded = {"bf16": 2**-8, "tf32": 2**-10, "bf16x3": 2**-14}[precision]
    others = {"bf16": 2**-14}.get(precision, rounded)
    gradient = Energy(energy, (784,), torch.float64).gradient(x.double())
    noise = 0.2 * NOISE_ERROR  # both take steps of about this length
    error = 0.02 * rounded * largest(gradient) + others * largest(x) + noise
    assert largest((shown.x - truth.x)[both]) <= error
    value = Energy(energy, (784,), torch.float64)(shown.x.double())
    assert largest(shown.energies - value) <= others * largest(value)

    whole = sample(energy, sampler, init=x, steps=4, seed=SEED, **options)
    assert 0.5 < float(whole.info.acceptance.mean()) < 1
    part = sample(energy, sampler, init=x[70:], steps=4, first_chain=70, seed=SEED, **options)
    assert torch.equal(part.x, whole.x[70:])
    assert torch.equal(part.energies, whole.energies[70:])
    resumed = sample(energy, sampler, init=shown, steps=3, **options)
    assert torch.equal(resumed.x, whole.x)


# -- noise --------------------------------------------------------------------------------------------------


def test_words_are_the_same_on_both_devices():
    generator = torch.Generator().manual_seed(0)
    counter = tuple(torch.randint(2**32, (4, 10_000), generator=generator))
    on_cpu = philox4x32(counter, (123, 2**32 - 1))
    on_cuda = philox4x32(tuple(c.cuda() for c in counter), (123, 2**32 - 1))
    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert torch.equal(a, b.cpu())


def test_normals_in_pytorch_agree_on_both_devices():
    chains = torch.arange(10_000) + 2**33
    a = normal(SEED, Stream.LANGEVIN, chains, 5, 63)
    b = normal(SEED, Stream.LANGEVIN, chains.cuda(), 5, 63)
    # a radius of at most 6.77, times the rounding of an angle below 2 pi, 4.8e-7
    torch.testing.assert_close(b.cpu(), a, rtol=0, atol=4e-6)


@pytest.mark.parametrize(("dim", "widths"), [*ARCHITECTURES, (3, [16]), (63, [16])])
def test_noise_of_the_kernel_is_the_documented_noise(dim, widths):
    """With E = 0 and a start at 0, x' is the noise."""
    energy = make_mlp(dim, widths).cuda()
    with torch.no_grad():
        for p in energy.parameters():
            p.zero_()
    zero = torch.zeros(4096, dim, device="cuda")
    xi = langevin_sample(
        energy, init=zero, steps=1, step_size=1.0, noise_scale=1.0, seed=SEED, first_chain=2**33, first_step=11,
        backend="triton",
    )  # fmt: skip
    expected = normal(SEED, Stream.LANGEVIN, torch.arange(4096) + 2**33, 11, dim, dtype=torch.float64)
    error = xi.cpu() - expected
    assert largest(error) <= NOISE_ERROR
    assert float((error**2).mean()) ** 0.5 <= 4e-6


# -- size and memory ----------------------------------------------------------------------------------------


def test_past_2_to_the_31_elements():
    """4 M chains of 784 dims: rows at both ends and around element 2^31 equal those of small runs."""
    need_memory(50)
    n_chains, dim, k = 4 * 2**20, 784, 70
    assert n_chains * dim > 2**31
    energy = make_mlp(dim, [256, 128]).cuda()
    init = torch.rand(n_chains, dim, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    options = {"steps": 2, "step_size": 0.1, "noise_scale": 1.0, "seed": SEED, "backend": "triton", "return_info": True}
    samples, info = langevin_sample(energy, init=init, **options)
    assert info.path == "streaming"
    for first in (0, 2**31 // dim - k // 2, n_chains - k):
        few, few_info = langevin_sample(energy, init=init[first : first + k], first_chain=first, **options)
        assert torch.equal(samples[first : first + k], few)
        assert torch.equal(info.energies[first : first + k], few_info.energies)
        assert not torch.equal(few, init[first : first + k])


class Halves:
    """E = |x|^2 / 2 as a target, without the copies that autograd would make."""

    def gradient(self, x, labels):
        return x

    def __call__(self, x, labels):
        return x[:, 0]


def test_the_fused_update_past_2_to_the_31_elements():
    need_memory(24)
    dim, k = 784, 70
    n_chains = 2**31 // dim + 100
    init = torch.rand(n_chains, dim, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    sampler, numbers = Langevin(0.1, 1.0), torch.arange(n_chains, device="cuda")
    ages = torch.zeros_like(numbers)
    rows = [slice(first, first + k) for first in (0, n_chains - 100 - k // 2, n_chains - k)]
    few = [runs.fused_module(Halves(), Chains(init[r].clone(), SEED, numbers[r], ages[r]), sampler, 3).x for r in rows]
    moved = runs.fused_module(Halves(), Chains(init, SEED, numbers, ages), sampler, 3).x
    for r, expected in zip(rows, few, strict=True):
        assert torch.equal(moved[r], expected)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize(("dim", "widths"), ARCHITECTURES)
def test_bits_do_not_depend_on_the_batch(dim, widths, precision):
    """At the shipped launches: many tiles, and sizes around the edges of one."""
    energy = make_mlp(dim, widths).cuda()
    fits(energy, precision)
    x = start(20_000, dim)
    options = {"steps": 5, "step_size": 0.1, "noise_scale": 1.0, "seed": SEED, "precision": precision}
    whole = langevin_sample(energy, init=x, **options)
    assert torch.equal(langevin_sample(energy, init=x, **options), whole)
    for first, n in ((0, 1), (0, 63), (1, 64), (5, 65), (77, 10_001)):
        part = langevin_sample(energy, init=x[first : first + n], first_chain=first, **options)
        assert torch.equal(part, whole[first : first + n])


def test_memory_stays_flat_over_1000_calls():
    energy = make_mlp(64, [128, 128]).cuda()
    starts = [start(n, 64) for n in (1, 63, 4096)]

    def call(i):
        langevin_sample(energy, init=starts[i % 3], steps=1 + i % 7, step_size=0.1, noise_scale=1.0, seed=i)

    def memory():
        torch.cuda.synchronize()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return (
            torch.cuda.memory_allocated(),
            torch.cuda.max_memory_allocated(),
            torch.cuda.memory_reserved(),
            pages * os.sysconf("SC_PAGE_SIZE"),
        )

    for i in range(63):
        call(i)
    *before, resident_before = memory()
    for i in range(1000):
        call(i)
    *after, resident_after = memory()
    assert after == before
    assert resident_after - resident_before < 2**26  # less than 64 KiB per call


# -- streams and devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [False, True], ids=["mlp", "module"])
def test_a_side_stream(other):
    """Sampling runs on the caller's stream: after the work that makes its start, and before what reads its result."""
    dim = 64
    energy = make_mlp(dim, [128, 128]).cuda()
    if other:  # not an MLP: the fused update
        energy = nn.Sequential(nn.LayerNorm(dim, device="cuda"), *energy).eval()
        assert why_not_fused(energy) is not None
    x = start(4096, dim)
    options = {"steps": 20, "step_size": 0.1, "noise_scale": 1.0, "seed": SEED, "on_nonfinite": "ignore"}
    expected = langevin_sample(energy, init=x, **options)
    big = torch.randn(4096, 4096, device="cuda") / 64
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.full_like(x, 100.0)
        for _ in range(50):  # tens of milliseconds of work before the start is there
            big = (big @ big).clamp(-1, 1)
        late.copy_(x)
        moved = langevin_sample(energy, init=late, **options).clone()
    side.synchronize()
    if other:  # cuBLAS guarantees the same bits on one stream only
        torch.testing.assert_close(moved, expected, rtol=0, atol=0.05)
    else:
        assert torch.equal(moved, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("other", [False, True], ids=["mlp", "module"])
def test_a_device_that_is_not_the_current_one(other):
    energy = make_mlp(64, [128, 128])
    if other:
        energy = nn.Sequential(nn.LayerNorm(64), *energy).eval()
    x = start(100, 64)
    options = {"steps": 3, "step_size": 0.1, "noise_scale": 1.0, "seed": SEED}
    expected = langevin_sample(energy.to("cuda:0"), init=x.to("cuda:0"), **options)
    moved = langevin_sample(energy.to("cuda:1"), init=x.to("cuda:1"), **options)
    assert moved.device == torch.device("cuda:1")
    torch.testing.assert_close(moved.cpu(), expected.cpu(), rtol=0, atol=1e-3)


# -- pools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("home", ["pinned", "file"])
def test_a_pool_on_the_host_moves_as_one_on_the_gpu(home, dtype, tmp_path):
    """Chunks are copied in two streams while others move, which must not change a bit."""
    energy, sampler = make_mlp(64, [128, 128]).cuda(), Langevin(0.05, 0.3)
    there = {"storage_device": "cpu"} if home == "pinned" else {"storage_file": tmp_path / "pool"}
    options = {"clamp": (-1.0, 1.0), "seed": SEED, "device": "cuda", "storage_dtype": dtype, "reinit_prob": 0.3}
    near, far = ChainPool(10_000, 64, **options), ChainPool(10_000, 64, **options, **there)
    assert far.state_dict(copy=False)["x"].is_pinned() == (home == "pinned")
    for _ in range(5):
        near.advance(energy, sampler, 3)
        far.advance(energy, sampler, 3, chunk_size=700, on_nonfinite="reinit")
        a, b = near.sample(energy, 500, sampler, 2), far.sample(energy, 500, sampler, 2)
        assert a[0].is_cuda
        assert b[0].is_cuda
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    near.add(a[0])
    far.add(b[0].cpu())
    assert near.stats() == far.stats()
    other = ChainPool(10_000, 64, **options)
    other.load_state_dict(far.state_dict())
    for key, value in near.state_dict().items():
        theirs = other.state_dict()[key]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(7.0), theirs.nan_to_num(7.0)), key
        else:
            assert value == theirs, key


def test_a_pool_on_the_host_takes_little_gpu_memory():
    need_memory(8)
    energy, sampler = make_mlp(784, [256, 128]).cuda(), Langevin(0.05, 0.3)
    pool = ChainPool(500_000, 784, clamp=(0.0, 1.0), device="cuda", storage_device="cpu", storage_dtype=torch.uint8)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pool.advance(energy, sampler, 2, chunk_size=20_000, on_nonfinite="reinit")
    assert torch.cuda.max_memory_allocated() - before < 14 * 20_000 * 784 * 4
    assert pool.steps.tolist() == [2] * 500_000


def test_a_failed_advance_puts_a_pool_on_the_host_back():
    class Trap(nn.Module):
        def forward(self, x):
            return (x.square().sum(1) / 2).masked_fill(x[:, 0] > 100, torch.nan)

    pool, twin = (ChainPool(5_000, 8, seed=0, device="cuda", storage_device="cpu") for _ in range(2))
    for p in (pool, twin):
        p.states[4_200] = 1000.0
    with pytest.raises(NonFiniteError):
        pool.advance(Trap(), Langevin(0.1, 0.1), 2, chunk_size=300)
    assert torch.equal(pool.states, twin.states)
    assert pool.steps.tolist() == [0] * 5_000
