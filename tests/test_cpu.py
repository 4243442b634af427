"""Numba's kernels beside plain PyTorch, and what a process is like in which they run, are kept, or can't be had."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from fastebm.kernels import cpu as kernels
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastebm
from fastebm import langevin_sample, threads
from fastebm import rng as noise
from fastebm.backends import Advanced, choose, cpu
from fastebm.energies import ACTIVATIONS
from fastebm.pool import copies, draws, moves
from fastebm.rng import Stream
from fastebm.threads import share

STEP = {"step_size": 0.1, "noise_scale": 0.3, "seed": 5}


@pytest.fixture
def plain(monkeypatch):
    """A function without Numba: plain PyTorch's result of the same call."""

    def result(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "why_not", lambda: "off for this test")
            return function(*arguments, **options)

    return result


@pytest.fixture(params=["OpenMP's threads", "Python's threads"])
def team(request, monkeypatch):
    """Where work is shared by each."""
    if request.param == "Python's threads":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("no GOMP_parallel here")


def mlp(dim, widths=(32, 16), **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fastebm.build(dim, hidden_sizes=widths, **options)


class Square(nn.Module):
    """No MLP: E(x) = |x - c|^4 / 4."""

    def __init__(self, dim):
        super().__init__()
        self.centre = nn.Parameter(torch.linspace(-0.5, 0.5, dim))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return (x - self.centre).flatten(1).square().sum(dim=1).square() / 4


# -- the noise -------------------------------------------------------------------------------------------------

CHAINS = torch.tensor([0, 1, 2**32 - 1, 2**32, 5 * 2**40 + 3, 2**63 - 1])
STEPS = torch.tensor([0, 1, 2, 2**31, 2**32 - 1, 7])


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize(("n_blocks", "first_block"), [(1, 0), (7, 0xFFFFF0), (1024, 0), (1500, 3)])
def test_words_are_those_of_pytorch(plain, stream, n_blocks, first_block):
    for steps in (STEPS, 11):
        arguments = (2**63 + 17, stream, CHAINS, steps, n_blocks, first_block)
        for ours, theirs in zip(noise.words(*arguments), plain(noise.words, *arguments), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 784])
def test_bytes_are_those_of_pytorch(plain, n):
    arguments = (5, Stream.POOL, CHAINS, STEPS, n, 0x800000)
    ours = noise.random_bytes(*arguments)
    assert torch.equal(ours, plain(noise.random_bytes, *arguments))
    words = noise.words(*arguments[:-2], (n + 15) // 16, 0x800000)
    for i in range(n):
        assert torch.equal(ours[:, i].long(), (words[i // 4 % 4][:, i // 16] >> (8 * (i % 4))) & 0xFF)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    """Random123's, through the kernel itself."""
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    signed = (c1 << 32 | c0) - (2**64 if c1 >> 31 else 0)
    out = torch.zeros(4)
    w, _, _ = kernels.scratch(0)
    kernels.load("update.draw")(
        kernels.WORDS, 0, 1, 1, c3 & 0xFFFFFF, 1, c3 >> 24, low, high, torch.tensor([signed]), torch.tensor([c2]), 1,
        torch.zeros(1, dtype=torch.int64), w, w, out, None, None, None, 0, 0, None, None, 0, 0, None, 0, 0, 0.0, 0.0,
    )  # fmt: skip
    assert (out.view(torch.int32).long() & 0xFFFFFFFF).tolist() == [int(word, 16) for word in expected.split()]


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 16, 63, 4097, 5000])
def test_numbers_are_those_of_pytorch(plain, dim):
    arguments = (3, Stream.MOMENTUM, CHAINS, STEPS, dim)
    assert torch.equal(noise.uniform(*arguments), plain(noise.uniform, *arguments))
    exact = noise.normal(*arguments, dtype=torch.float64)
    assert (noise.normal(*arguments) - exact).abs().max() < 1e-6
    assert (plain(noise.normal, *arguments) - exact).abs().max() < 2e-6  # PyTorch's own


def test_normals_of_many_words():
    """The tails and every quarter of the circle are met among a million."""
    x = noise.normal(9, Stream.LANGEVIN, torch.arange(1000), 0, 1000)
    exact = noise.normal(9, Stream.LANGEVIN, torch.arange(1000), 0, 1000, dtype=torch.float64)
    assert x.abs().max() > 4.5
    assert (x - exact).abs().max() < 1.5e-6


def test_draws_do_not_depend_on_threads_or_rows(team):
    chains = torch.arange(40_000)
    whole = noise.normal(1, Stream.LANGEVIN, chains, 0, 5)
    for n in (2, 3):
        with threads.threads(n):
            assert torch.equal(noise.normal(1, Stream.LANGEVIN, chains, 0, 5), whole)
    for rows in (slice(0, 1), slice(37, 300), slice(39_990, 40_000)):
        assert torch.equal(noise.normal(1, Stream.LANGEVIN, chains[rows], 0, 5), whole[rows])


# -- activations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 8, 37])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_and_slopes(name, width):
    """At most twice as far from float64 as PyTorch's float32, and a few units of the last place."""
    rule = ACTIVATIONS[name]
    parameter = {"softplus": 2.0, "elu": 0.7}.get(name, rule.default)
    z = torch.cat(
        [torch.linspace(-30, 30, 4000), torch.linspace(-1, 1, 4000), torch.tensor([0.0, -0.0, 1e-30, -90, 90])]
    )
    z = z[: len(z) // width * width].reshape(-1, width)
    slope, value, bias, head = z.clone(), torch.empty_like(z), torch.zeros(width), torch.ones(1, width)
    kernels.load(f"mlp.up_{name}")(slope, value, len(z), width, width, bias, parameter, head, None, 0, None, 0, 0, None)
    for ours, of in ((value, 0), (slope, 1)):
        truth, theirs = (
            (
                rule.forward(x, parameter, torch.empty_like(x)),
                rule.backward(torch.ones_like(x), x, parameter, torch.empty_like(x)),
            )[of]
            for x in (z.double(), z)
        )
        allowed = 2 * (theirs - truth).abs().max() + 4 * 2**-24 * truth.abs().clamp(min=1.0)
        kinks = (z == 0) if name in ("relu", "leaky_relu", "elu") else torch.zeros_like(z, dtype=torch.bool)
        assert bool(((ours - truth).abs() <= allowed)[~kinks].all()), (ours - truth).abs().max()


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_what_is_not_finite_stays_so(name):
    """A NaN in the weights must not become a number on the way."""
    z = torch.full((1, 8), torch.nan)
    value = torch.empty_like(z)
    kernels.load(f"mlp.up_{name}")(z, value, 1, 8, 8, torch.zeros(8), 1.0, torch.ones(1, 8), None, 0, None, 0, 0, None)
    assert value.isnan().all()


# -- whole calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "dim"), [(mlp, 3), (mlp, 40), (Square, 7)])
def test_default_call_is_numbas(plain, make, dim):
    energy, options = make(dim), {"input_size": dim, "batch_size": 150, "steps": 6, "clamp": (-1.0, 1.0), **STEP}
    x, info = langevin_sample(energy, return_info=True, **options)
    y, without = plain(langevin_sample, energy, return_info=True, **options)
    assert (info.backend, info.kernels, without.kernels) == ("torch", "numba", "torch")
    assert (x - y).abs().max() < 1e-5
    assert torch.equal(x, langevin_sample(energy, **options))  # the kernel that tells nothing, with the same bits


@pytest.mark.parametrize("widths", [(1,), (5, 1), (1, 1, 7), (130, 3)])
@pytest.mark.parametrize("dim", [1, 4, 5, 9])
def test_narrow_layers(plain, dim, widths):
    options = {"batch_size": 70, "steps": 4, **STEP}
    x = langevin_sample(mlp(dim, widths), **options)
    assert (x - plain(langevin_sample, mlp(dim, widths), **options)).abs().max() < 1e-5


def test_float64_and_the_reference_are_pytorchs():
    for energy, options in ((mlp(3).double(), {}), (mlp(3), {"backend": "reference"}), (Square(3).double(), {})):
        _, info = langevin_sample(energy, 3, steps=1, return_info=True, **options, **STEP)
        assert info.kernels == "torch"


def test_states_that_an_energy_keeps_stay_what_they_were():
    energy = Square(5)
    x0 = torch.zeros(4, 5)
    trajectory = langevin_sample(energy, init=x0, steps=6, return_trajectory=True, **STEP)
    kept = [x.detach() for x in energy.seen if x.requires_grad]
    assert len(kept) == 6
    assert torch.equal(torch.stack(kept, dim=1)[:, 1:], trajectory[:, :-1])


def test_trackers_of_modules_may_look():
    with FlopCounterMode(display=False) as counter:
        langevin_sample(nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1), nn.Linear(3, 1)), 4, steps=2, **STEP)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("energy", [mlp(6), Square(6)], ids=["mlp", "module"])
def test_inference_mode_and_no_grad_change_nothing(energy):
    x = langevin_sample(energy, 6, steps=3, **STEP)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            assert torch.equal(langevin_sample(energy, 6, steps=3, **STEP), x)


def test_products_in_bf16(monkeypatch):
    """Where the machine multiplies bf16, and it is asked for; any machine can, slowly."""
    energy, options = mlp(20, (64, 64)), {"batch_size": 90, "steps": 4, "return_info": True, **STEP}
    x, info = langevin_sample(energy, **options)
    assert info.precision == "ieee"
    monkeypatch.setattr(choose, "multiplies_bf16", lambda: True)
    y, info = langevin_sample(energy, precision="bf16", **options)
    assert info.precision == "bf16"
    assert 1e-6 < (x - y).abs().max() < 1e-2
    assert langevin_sample(energy, **options)[1].precision == "ieee"


def test_without_the_librarys_product_the_steps_go_through_python(monkeypatch):
    energy, options = mlp(20, (64, 64)), {"batch_size": 90, "steps": 4, **STEP}
    x = langevin_sample(energy, **options)
    monkeypatch.setattr(cpu, "_sgemm", lambda: None)
    assert (langevin_sample(energy, **options) - x).abs().max() < 1e-5


def test_products_of_few_rows_have_the_same_bits(monkeypatch):
    """What ``rounds_alike`` has found out is so."""
    energy, options = mlp(50, (96, 33)), {"batch_size": 400, "steps": 4, **STEP}
    x = langevin_sample(energy, **options)
    monkeypatch.setattr(cpu, "rounds_alike", lambda *shape: False)
    assert torch.equal(langevin_sample(energy, **options), x)


def test_kernels_refuse_what_they_would_misread():
    kernel = kernels.load("mlp.softmax")
    z, bias = torch.zeros(4, 8), torch.zeros(8)
    for bad in (z.double(), z.t(), bias.expand(8, 8).t(), torch._neg_view(z)):
        with pytest.raises(TypeError, match="a kernel takes f32s"):
            kernel.prepared(bad, 4, 8, 8, bias, 1.0)


def test_a_gradient_that_is_still_to_be_negated():
    """As PyTorch leaves it of an imaginary part that was conjugated."""

    class Conjugated(nn.Module):
        def forward(self, x):
            return torch.complex(torch.zeros_like(x), x).conj().imag.sum(dim=1)  # -x

    x = langevin_sample(Conjugated(), init=torch.zeros(1, 1), steps=1, step_size=0.2, noise_scale=0.0, seed=0)
    assert x.item() == pytest.approx(0.1)


@pytest.mark.parametrize(("chains", "steps"), [(CHAINS, STEPS[:2]), (CHAINS[None], STEPS), (CHAINS, STEPS[:0])])
def test_numbers_of_counters_that_do_not_fit(chains, steps):
    for draw in (noise.uniform, noise.normal, noise.words):
        with pytest.raises(ValueError, match=r"chains must be \(n,\), and steps a number or \(n,\)"):
            draw(1, Stream.POOL, chains, steps, 5)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("make", [mlp, Square])
def test_pytorchs_defaults_change_nothing(make, clip):
    """A default dtype or device of the caller's is not that of what kernels work in."""
    energy, init = make(40), torch.rand(300, 40)
    options = {"init": init, "steps": 3, "grad_clip": clip, **STEP}
    pool = {"storage_dtype": torch.uint8, "clamp": (0.0, 1.0), "device": "cpu", "seed": 0}
    rule = fastebm.Langevin(step_size=0.1, noise_scale=0.3)
    expected = langevin_sample(energy, **options)
    float_pool = {"init": lambda *counter: noise.uniform(*counter, 40), "reinit_prob": 0.0, "device": "cpu", "seed": 0}
    drawn = [fastebm.ChainPool(50, 40, **p).sample(energy, 8, rule, 3)[0] for p in (pool, float_pool)]
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(langevin_sample(energy, **options), expected)
        for p, x in zip((pool, float_pool), drawn, strict=True):
            assert torch.equal(fastebm.ChainPool(50, 40, **p).sample(energy, 8, rule, 3)[0], x)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(langevin_sample(energy, **options), expected)


# -- pools -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "probability"),
    [(10_000, 128, 0.05), (256, 128, 0.5), (1000, 1, 1.0), (2**31 - 1, 2000, 0.0), (5000, 2500, 0.3), (2, 1, 0.2)],
)
def test_drawn_chains_and_restarts_are_those_of_pytorch(plain, n, k, probability):
    arguments = 2**63 + 5, 2**31 + 7, 9, n, k, probability, torch.device("cpu")
    chains, restarts = draws._drawn(*arguments)
    assert all(len(row.unique()) == k for row in chains)
    for ours, theirs in zip((chains, restarts), plain(draws._drawn, *arguments), strict=True):
        assert torch.equal(ours, theirs)


def tensors_of(pool):
    return {name: value for name, value in pool.state_dict().items() if isinstance(value, torch.Tensor)}


def rows_that_share_memory(seed, stream, chains, steps):
    return noise.uniform(seed, stream, chains, steps, 1).expand(-1, 6)


@pytest.fixture
def small_parts(monkeypatch):
    """Threads share the copies of a few chains. -> How many threads each call had."""
    seen = []

    def counted(call, n_threads):
        seen.append(n_threads)
        threads.together(call, n_threads)

    monkeypatch.setattr(copies, "_NUMBERS_PER_THREAD", 8)
    monkeypatch.setattr(copies, "_NUMBERS_AT_ONCE", 20)
    monkeypatch.setattr(copies, "together", counted)
    copies._spares.cache_clear()
    with threads.threads(3):
        yield seen
    copies._spares.cache_clear()


@pytest.mark.parametrize("batch_size", [1, 17, 400])  # the last sorts keys
@pytest.mark.parametrize("init", ["uniform", rows_that_share_memory, torch.linspace(0, 1, 60).reshape(10, 6)])
def test_pools_are_those_of_pytorch(plain, team, small_parts, init, batch_size):
    """All that is kept of every chain, after draws, restarts and states put back."""

    def kept():
        pool = fastebm.ChainPool(500, 6, clamp=(0.0, 1.0), seed=3, reinit_prob=0.3, init=init)
        for i in range(70):  # more than are worked out at once
            draw = pool._next_draw(batch_size)
            x, before = moves.take(draw, pool._storage, pool._records)
            energies = x.sum(dim=1)
            done = Advanced((x + 0.01 * i).clamp(0, 1), energies, energies)
            moves.put(draw, pool._storage, pool._records, before, before + i, done)()
            pool.draws += 1
        return tensors_of(pool)

    ours, n_calls = kept(), len(small_parts)
    theirs = plain(kept)
    assert n_calls == len(small_parts) == 140
    assert (max(small_parts) > 1) == (batch_size > 1)
    assert ours["reinits"].sum() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_pool_in_several_threads_keeps_its_memory_whole(small_parts):
    """Which chains a call gets is then anybody's guess, but all that is written is right."""
    energy, rule = mlp(6), fastebm.Langevin(0.1, 0.005)
    pool = fastebm.ChainPool(500, 6, seed=3, clamp=(0.0, 1.0))

    def work(batch_size, interrupted):
        for _ in range(40):
            pool.sample(energy, batch_size, rule, 3)

    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        share([3, 11, 200, 400], work, 4)
    finally:
        sys.setswitchinterval(interval)
    assert ((pool.steps % 3 == 0) & (pool.steps <= 4 * 40 * 3)).all()
    assert (pool.states.isfinite() & (pool.states >= 0) & (pool.states <= 1)).all()
    assert (pool.reinits <= 4 * 40).all()


def test_a_graph_of_states_that_have_moved_is_refused():
    pool, w = fastebm.ChainPool(50, 6), torch.ones(6, requires_grad=True)
    loss = (pool.states @ w).sum()
    pool.sample(mlp(6), 8, fastebm.Langevin(0.1, 0.005), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_pool_of_inference_mode_and_one_after_it():
    copies._spares.cache_clear()
    energy, rule, found = mlp(6), fastebm.Langevin(0.1, 0.005), []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            pool = fastebm.ChainPool(50, 6, seed=1)
            found.append(pool.sample(energy, 8, rule, 2)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copied_pool_moves_chains_of_its_own(copied_by):
    energy, rule = mlp(6), fastebm.Langevin(0.1, 0.005)
    pool, same = (fastebm.ChainPool(50, 6, seed=1) for _ in range(2))
    pool.sample(energy, 8, rule, 2)  # what it keeps for the next draw is copied too
    same.sample(energy, 8, rule, 2)
    copied = copied_by(pool)
    before = tensors_of(copied)
    pool.sample(energy, 8, rule, 2)
    torch.testing.assert_close(tensors_of(copied), before, rtol=0, atol=0, equal_nan=True)
    for other in (same, copied):
        assert torch.equal(other.sample(energy, 8, rule, 2)[0], pool.states[pool.last.chains])
        assert torch.equal(other.states, pool.states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_energies_of_another_dtype(dtype):
    """A module may put out what is not the states' dtype."""

    class Other(Square):
        def forward(self, x):
            return super().forward(x).to(dtype)

    pool = fastebm.ChainPool(50, 6, seed=1)
    _, energies = pool.sample(Other(6), 8, fastebm.Langevin(0.01, 0.005), 2)
    assert energies.dtype == pool.energies.dtype == torch.float32
    assert torch.equal(pool.energies[pool.last.chains], energies)
    assert (energies - Square(6)(pool.states[pool.last.chains])).abs().max() < (1e-6 if dtype == torch.float64 else 0.1)


# -- threads ---------------------------------------------------------------------------------------------------


def threads_of_a_new_one():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_pytorchs_threads_are_left_as_they_were(team, n):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n)
        for make in (mlp, Square):
            langevin_sample(make(40), 40, batch_size=2000, steps=2, **STEP)
            assert torch.get_num_threads() == n
            assert threads_of_a_new_one() == n
        with pytest.raises(ZeroDivisionError):
            share(range(8), lambda item, interrupted: item // 0, n)
        assert torch.get_num_threads() == n
        assert threads_of_a_new_one() == n
    finally:
        torch.set_num_threads(before)


def test_shared_work_is_done_once_each_and_stops_at_an_error(team):
    done = []
    share(range(100), lambda item, interrupted: done.append(item), 3)
    assert sorted(done) == list(range(100))
    started = threading.Barrier(2, timeout=60)

    def work(item, interrupted):
        started.wait()
        if item == 0:
            raise KeyboardInterrupt
        while not interrupted():
            pass

    with pytest.raises(KeyboardInterrupt):
        share(range(50), work, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch has another OpenMP")
def test_work_is_shared_by_the_threads_that_pytorch_has_already():
    """Both work at once, and the next call finds the same two."""
    both = threading.Barrier(2, timeout=60)
    seen = set()

    def work(item, interrupted):
        both.wait()
        seen.add(threading.get_native_id())

    share(range(2), work, 2)
    before = seen.copy()
    share(range(2), work, 2)
    assert len(before) == 2
    assert seen == before


def test_numbers_drawn_in_several_threads_at_once(team):
    chains = torch.arange(30_000)
    expected = [noise.normal(seed, Stream.LANGEVIN, chains, 0, 5) for seed in range(3)]
    found = {}
    drawers = [
        threading.Thread(target=lambda s=seed: found.update({s: noise.normal(s, Stream.LANGEVIN, chains, 0, 5)}))
        for seed in range(3)
    ]
    with threads.threads(3):
        for thread in drawers:
            thread.start()
        for thread in drawers:
            thread.join()
    assert all(torch.equal(found[seed], x) for seed, x in enumerate(expected))


def test_calls_in_several_threads_at_once(team):
    energy = mlp(40)
    expected = langevin_sample(energy, batch_size=300, steps=5, **STEP)
    found = [None] * 4

    def call(i):
        found[i] = langevin_sample(energy, batch_size=300, steps=5, **STEP)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(x, expected) for x in found)


# -- processes -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, fastebm
torch.manual_seed(0)
energy = fastebm.build(3, hidden_sizes=(8, 8))
options = {"step_size": 0.1, "noise_scale": 0.3, "seed": 1, "return_info": True}
x, info = fastebm.langevin_sample(energy, batch_size=5, steps=3, **options)
print(info.kernels, "numba" in sys.modules, x.double().sum().item())
"""


def run(script=SCRIPT, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


def result(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out.split()


@pytest.mark.slow
def test_the_cache_is_filled_used_and_mended(tmp_path):
    """Two processes at once find none; a later one loads it without Numba; a damaged file is made anew."""
    folder = {"NUMBA_CACHE_DIR": str(tmp_path / "new")}
    both = [run(**folder), run(**folder)]
    first, second = map(result, both)
    assert first == second
    assert first[:2] == ["numba", "True"]
    later = result(run(**folder))
    assert later == ["numba", "False", first[2]]
    files = sorted((tmp_path / "new").iterdir())
    assert files
    assert not [file for file in files if file.suffix != ".kernel"]
    draw = next(file for file in files if file.name.startswith("update.draw"))
    whole = draw.read_bytes()
    draw.write_bytes(whole[:-100] + bytes(100))
    assert result(run(**folder))[2] == first[2]
    assert kernels._read(draw) is not None


@pytest.mark.slow
def test_without_a_folder_to_keep_them_in(tmp_path):
    nowhere = tmp_path / "file"
    nowhere.touch()
    where = {"NUMBA_CACHE_DIR": str(nowhere / "a"), "XDG_CACHE_HOME": str(nowhere / "b")}
    assert result(run(**where))[:2] == ["numba", "True"]


@pytest.mark.slow
def test_without_numba():
    without = "import sys; sys.modules['numba'] = None" + SCRIPT
    found = result(run(without))
    assert found[0] == "torch"
    assert float(found[2]) == pytest.approx(float(result(run())[2]), abs=1e-4)
    assert result(run(NUMBA_DISABLE_JIT="1"))[0] == "torch"


THREADS = """
import threading, torch, fastebm
from fastebm.backends import cpu
seen, advance = set(), cpu._Tile.advance
cpu._Tile.advance = lambda *arguments: seen.add(threading.get_ident()) or advance(*arguments)
torch.manual_seed(0)
energy = fastebm.build(40, hidden_sizes=(32, 32))
x = fastebm.langevin_sample(energy, batch_size=2000, steps=20, step_size=0.1, noise_scale=0.3, seed=1)
print(torch.get_num_threads(), len(seen), x.numpy().tobytes().hex()[:4000])
"""


@pytest.mark.slow
def test_omp_num_threads_says_how_many_work():
    one, two = (result(run(THREADS, OMP_NUM_THREADS=n)) for n in "12")
    assert one[:2] == ["1", "1"]
    assert two[0] == "2"
    assert int(two[1]) <= 2
    assert one[2] == two[2]


FORKED = """
import os, numpy, torch, fastebm
torch.set_num_threads(2)
torch.manual_seed(0)
energy = fastebm.build(40, hidden_sizes=(32, 32))
rule = fastebm.Langevin(step_size=0.1, noise_scale=0.3)

def sample():
    x = fastebm.langevin_sample(energy, batch_size=600, steps=4, step_size=0.1, noise_scale=0.3, seed=1)
    pool = fastebm.ChainPool(40_000, 40, seed=1)
    pool.labels = torch.from_numpy(numpy.arange(40_000))
    pool.labels = None
    pool.sample(energy, 1200, rule, 2)
    pool.advance(energy, rule, 1)
    pool.load_state_dict(pool.state_dict())
    pool.add(x.clamp(-1, 1))
    assert pool.stats().n_chains == len(pool.ages) == 40_000
    return [v.numpy() for v in (x, pool.states)]  # PyTorch's own operations on many numbers would hang

x = sample()
child = os.fork()
if child == 0:
    os._exit(0 if all(map(numpy.array_equal, sample(), x)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), all(map(numpy.array_equal, sample(), x)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_samples_too():
    """Its parent's threads did not come along."""
    assert result(run(FORKED)) == ["0", "True"]
