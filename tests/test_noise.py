"""The noise stream: known answers, a second implementation as oracle, and independence of everything else."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastebm.kernels.triton.philox import normals, philox4x32
from fastebm.kernels.triton.step import load_key
from randomgen import Philox
from scipy import stats

from fastebm import rng as noise
from fastebm.rng import Noise, Stream, draw_seed, normal, uniform

# Random123, kat_vectors: (rounds, counter, key, expected).
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, 2**32, 2**63 + 5, 2**64 - 1, -1, -(2**63)]
CHAINS = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**40 + 3]


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@triton.jit
def philox_kernel(counter_ptr, key_ptr, out_ptr, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    c0 = tl.load(counter_ptr + i, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + n + i, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * n + i, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * n + i, mask=inside, other=0).to(tl.uint32)
    k0 = tl.load(key_ptr + i, mask=inside, other=0).to(tl.uint32)
    k1 = tl.load(key_ptr + n + i, mask=inside, other=0).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1, ROUNDS)
    tl.store(out_ptr + i, w0.to(tl.int64), mask=inside)
    tl.store(out_ptr + n + i, w1.to(tl.int64), mask=inside)
    tl.store(out_ptr + 2 * n + i, w2.to(tl.int64), mask=inside)
    tl.store(out_ptr + 3 * n + i, w3.to(tl.int64), mask=inside)


@triton.jit
def normals_kernel(
    out_ptr, chain_ptr, step_ptr, seed_ptr, n, first_block,
    STREAM: tl.constexpr, DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr, BLOCK_DIM: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
    inside = rows < n
    key0, key1 = load_key(seed_ptr)
    chain = tl.load(chain_ptr + rows, mask=inside, other=0)
    step = tl.load(step_ptr + rows, mask=inside, other=0).to(tl.uint32)
    xi = normals(key0, key1, chain, step, first_block, STREAM, DIM, BLOCK_CHAINS, BLOCK_DIM, FAST)
    cols = tl.arange(0, BLOCK_DIM)
    tl.store(out_ptr + rows[:, None] * BLOCK_DIM + cols[None, :], xi, mask=inside[:, None])


def triton_philox(counter: torch.Tensor, key: torch.Tensor, rounds: int, device: str) -> torch.Tensor:
    """counter: (4, n), key: (2, n) -> words (4, n)."""
    n = counter.shape[1]
    out = torch.full_like(counter, -1, device=device)
    philox_kernel[(triton.cdiv(n, 16384),)](counter.to(device), key.to(device), out, n, rounds, 16384)
    return out.cpu()


def triton_normals(
    seed: int, stream: int, chains: torch.Tensor, steps: torch.Tensor, dim: int, device: str, *,
    fast: bool = False, first_block: int = 0,
) -> torch.Tensor:  # fmt: skip
    block_dim = max(4, triton.next_power_of_2(dim))
    out = torch.full((len(chains), block_dim), math.nan, device=device)
    signed = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)
    normals_kernel[(triton.cdiv(len(chains), 16),)](
        out, chains.to(device), steps.to(device), signed, len(chains), first_block, stream, dim, 16, block_dim, fast
    )
    return out.cpu()[:, :dim]


def oracle(counter: list[int], seed: int) -> list[int]:
    """The same four words from an independent implementation, which increments its counter before use."""
    position = sum(word << 32 * i for i, word in enumerate(counter))
    return Philox(counter=(position - 1) % 2**128, key=seed % 2**64, number=4, width=32).random_raw(4).tolist()


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_philox_known_answers(implementation, rounds, counter, key, expected, device):
    counter, key, expected = (torch.tensor(hexadecimal(text))[:, None] for text in (counter, key, expected))
    if implementation == "triton":
        words = triton_philox(counter, key, rounds, device)
    else:
        words = torch.stack(noise.philox4x32(tuple(counter), (int(key[0]), int(key[1])), rounds))
    assert torch.equal(words, expected)


def test_philox_agrees_with_randomgen_on_random_counters(device):
    random = np.random.default_rng(1)
    n_keys, n_each = 20, 500
    counters = random.integers(0, 2**32, (n_keys, n_each, 4))
    keys = random.integers(0, 2**32, (n_keys, 2))
    expected = torch.tensor(
        [[oracle(c, k[0] | k[1] << 32) for c in cs] for cs, k in zip(counters.tolist(), keys.tolist(), strict=True)]
    )
    for i in range(n_keys):
        words = noise.philox4x32(tuple(torch.from_numpy(counters[i]).T), (int(keys[i, 0]), int(keys[i, 1])))
        assert torch.equal(torch.stack(words, dim=1), expected[i])
    columns = torch.from_numpy(counters).reshape(-1, 4).T.contiguous()
    key_columns = torch.from_numpy(keys).repeat_interleave(n_each, dim=0).T.contiguous()
    assert torch.equal(triton_philox(columns, key_columns, 10, device).T, expected.reshape(-1, 4))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [Stream.LANGEVIN, Stream.INITIAL, Stream.AIS])
def test_philox_counter_layout_words_and_dims(seed, stream):
    dim, step = 7, 2**32 - 3
    chains, steps = torch.tensor(CHAINS), torch.full((len(CHAINS),), step)
    uniforms = noise.uniform(seed, stream, chains, steps, dim)
    gaussians = noise.normal(seed, stream, chains, steps, dim, dtype=torch.float64)
    for row, chain in enumerate(CHAINS):
        for block in range(2):
            w = oracle([chain % 2**32, chain >> 32, step, stream << 24 | block], seed)
            u = ((np.array(w).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64)
            for j in range(min(4, dim - 4 * block)):
                assert uniforms[row, 4 * block + j] == u[j]
                trig = math.sin if j % 2 else math.cos
                first = j - j % 2
                xi = math.sqrt(-2.0 * math.log(u[first])) * trig(2.0 * math.pi * u[first + 1])
                assert gaussians[row, 4 * block + j] == pytest.approx(xi, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 16, 63])
def test_philox_normals_agree_between_torch_and_triton(seed, dim, device):
    chains = torch.tensor(CHAINS * 4)
    steps = torch.arange(len(chains)) * 178956971 % 2**32
    expected = noise.normal(seed, Stream.LANGEVIN, chains, steps, dim)
    # r <= 6.77 times an angle below 2 pi, whose last place is 4.8e-7
    torch.testing.assert_close(triton_normals(seed, 0, chains, steps, dim, device), expected, rtol=0, atol=4e-6)
    if device == "cuda":  # the special-function unit: absolute error 2^-22 of log2 is the root of it in r
        fast = triton_normals(seed, 0, chains, steps, dim, device, fast=True)
        torch.testing.assert_close(fast, expected, rtol=0, atol=1e-3)


def test_philox_normals_of_a_later_chunk_of_dims(device):
    chains = torch.tensor(CHAINS)
    steps = torch.zeros_like(chains)
    whole = triton_normals(3, 4, chains, steps, 64, device)
    later = triton_normals(3, 4, chains, steps, 32, device, first_block=8)
    assert torch.equal(whole[:, 32:], later)


@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
def test_numbers_do_not_depend_on_the_rest_of_the_call(draw, monkeypatch):
    chains = torch.arange(40) * 7919
    steps = torch.arange(40) % 3
    whole = draw(11, Stream.LANGEVIN, chains, steps, 13)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(11, Stream.LANGEVIN, chains[order], steps[order], 13), whole[order])
    for dim in range(1, 13):
        assert torch.equal(draw(11, Stream.LANGEVIN, chains, steps, dim), whole[:, :dim])
    for i in (0, 17, 39):
        assert torch.equal(draw(11, Stream.LANGEVIN, chains[i : i + 1], int(steps[i]), 13), whole[i : i + 1])
    for chunk in (1, 3, 20):
        monkeypatch.setattr(noise, "_CHUNK", chunk)
        assert torch.equal(draw(11, Stream.LANGEVIN, chains, steps, 13), whole)


def test_normal_into_a_buffer_is_the_same_and_fills_it():
    chains = torch.arange(5)
    buffer = torch.full((5, 2, 4), math.nan)
    result = noise.normal(1, Stream.MOMENTUM, chains, 3, 7, out=buffer)
    assert torch.equal(result, noise.normal(1, Stream.MOMENTUM, chains, 3, 7))
    assert result.data_ptr() == buffer.data_ptr()
    assert bool(buffer.isfinite().all())


def test_float64_normals_round_to_float32_ones():
    chains = torch.arange(20000)
    double = noise.normal(5, Stream.LANGEVIN, chains, 0, 8, dtype=torch.float64)
    single = noise.normal(5, Stream.LANGEVIN, chains, 0, 8)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=4e-6)
    uniform = noise.uniform(5, Stream.LANGEVIN, chains, 0, 8, dtype=torch.float64)
    assert torch.equal(uniform, noise.uniform(5, Stream.LANGEVIN, chains, 0, 8).double())


def test_no_two_of_seed_stream_chain_step_share_numbers():
    chains = torch.tensor([0, 1, 2**32])
    seen = torch.cat(
        [
            noise.uniform(seed, stream, chains, step, 8).flatten()
            for seed in (0, 1, 2**32, -1)
            for stream in Stream
            for step in (0, 1, 2)
        ]
    )
    # 2304 numbers of 24 bits: a chance pair is likely, two sources that coincide would give 8 at least
    assert len(seen) - len(seen.unique()) < 4


def test_steps_and_seeds_do_not_alias():
    """With seed + step instead of a counter, step 1 of seed 0 would have the noise of step 0 of seed 1."""
    chains = torch.arange(100)
    a = noise.normal(0, Stream.LANGEVIN, chains, 1, 4)
    b = noise.normal(1, Stream.LANGEVIN, chains, 0, 4)
    assert not bool((a == b).any())


def test_normals_have_the_normal_law():
    n_chains, dim = 62500, 16
    x = noise.normal(20240229, Stream.LANGEVIN, torch.arange(n_chains), 0, dim, dtype=torch.float64)
    later = noise.normal(20240229, Stream.LANGEVIN, torch.arange(n_chains), 1, dim, dtype=torch.float64)
    n = x.numel()
    assert n == 10**6
    z = {
        "mean": x.mean() * n**0.5,
        "second moment": (x.square().mean() - 1) * (n / 2) ** 0.5,
        "third moment": (x**3).mean() * (n / 15) ** 0.5,
        "fourth moment": ((x**4).mean() - 3) * (n / 96) ** 0.5,
        "neighbouring dims": (x[:, :-1] * x[:, 1:]).mean() * x[:, 1:].numel() ** 0.5,
        "neighbouring chains": (x[:-1] * x[1:]).mean() * x[1:].numel() ** 0.5,
        "neighbouring steps": (x * later).mean() * n**0.5,
        "squares of the two halves of a draw": ((x[:, ::2].square() - 1) * (x[:, 1::2].square() - 1)).mean()
        * (n / 8) ** 0.5,
    }
    assert max(abs(float(v)) for v in z.values()) < 5, z  # 5 sigma: 6e-7 each
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-6


def test_uniforms_have_the_uniform_law():
    u = noise.uniform(7, Stream.INITIAL, torch.arange(50000), 0, 5)
    assert bool((u > 0).all())
    assert bool((u <= 1).all())
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 1e-6


def test_draw_seed_takes_any_64_bit_int_and_touches_no_generator():
    state = torch.get_rng_state()
    assert [draw_seed(seed) for seed in (0, 5, 2**64 - 1, -1)] == [0, 5, 2**64 - 1, 2**64 - 1]
    assert draw_seed(-(2**63)) == 2**63
    assert torch.equal(torch.get_rng_state(), state)


def test_draw_seed_none_draws_from_the_generator():
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    state = torch.get_rng_state()
    same = generator()
    first, second = draw_seed(None, same), draw_seed(None, same)
    assert draw_seed(None, generator()) == first != second
    assert 0 <= first < 2**64
    assert torch.equal(torch.get_rng_state(), state)


def test_draw_seed_none_draws_from_the_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = draw_seed(None), draw_seed(None)
        torch.manual_seed(3)
        assert draw_seed(None) == first != second
    many = [draw_seed(None, torch.Generator().manual_seed(i)) for i in range(64)]
    assert max(many) >= 2**63  # all 64 bits are drawn
    assert any(seed & 2**31 for seed in many)


@pytest.mark.parametrize(
    ("seed", "generator", "error", "match"),
    [
        (True, None, TypeError, "seed must be an int or None, got True"),
        (1.5, None, TypeError, "seed must be an int or None, got 1.5"),
        ("3", None, TypeError, "seed must be an int or None, got '3'"),
        (2**64, None, ValueError, "seed must fit 64 bits, got 18446744073709551616"),
        (-(2**63) - 1, None, ValueError, "seed must fit 64 bits"),
        (None, 3, TypeError, "generator must be a torch.Generator or None, got 3"),
    ],
)
def test_draw_seed_rejects(seed, generator, error, match):
    with pytest.raises(error, match=match):
        draw_seed(seed, generator)


# -- parts and copies ------------------------------------------------------------------------------------------


def numbers(by_definition=True, dtype=torch.float64, frozen=None, dim=6):
    chains, first = torch.arange(3, 10), torch.arange(7) * 5
    return Noise(11, chains, first, dim, dtype=dtype, steps=4, frozen=frozen, by_definition=by_definition)


def test_part_0_is_the_whole_and_parts_differ():
    noise = numbers()
    assert torch.equal(noise.part(0, 4).normal(Stream.MOMENTUM, 2), noise.normal(Stream.MOMENTUM, 2))
    assert torch.equal(noise.part(0, 4).uniform(Stream.METROPOLIS, 2), noise.uniform(Stream.METROPOLIS, 2))
    parts = [noise.part(k, 4).part(j, 3) for k in range(4) for j in range(3)]
    normals = torch.stack([part.normal(Stream.MOMENTUM, 1) for part in parts])
    uniforms = torch.stack([part.uniform(Stream.METROPOLIS, 1) for part in parts])
    assert len(normals.flatten().unique()) == normals.numel()
    assert len(uniforms.flatten().unique()) == uniforms.numel()


def test_parts_are_blocks_of_the_counter():
    """6 dims take 2 blocks, so part k is dims 8 k to 8 k + 5 of a longer state."""
    noise = numbers()
    whole = normal(11, Stream.LANGEVIN, noise.chains, noise.first_steps + 3, 40, dtype=torch.float64)
    for k in range(5):
        found = noise.part(k, 5).normal(Stream.LANGEVIN, 3)
        assert torch.equal(found, whole[:, 8 * k : 8 * k + 6])
    words = uniform(11, Stream.TEMPERING, noise.chains, noise.first_steps, 20, dtype=torch.float64)
    for k in range(5):
        assert torch.equal(noise.part(k, 5).uniform(Stream.TEMPERING, 0), words[:, 4 * k])


@pytest.mark.parametrize("by_definition", [True, False])
def test_copies_are_parts_side_by_side(by_definition):
    frozen = torch.rand(7, 6) < 0.3
    noise = numbers(by_definition, torch.float32, frozen)
    copies, nested = noise.copies(3), noise.copies(3).part(1, 2)
    assert copies.frozen.shape == (21, 6)
    for r in range(3):
        for many, one in ((copies, noise.part(r, 3)), (nested, noise.part(r, 3).part(1, 2))):
            assert torch.equal(many.normal(Stream.MOMENTUM, 1)[r::3], one.normal(Stream.MOMENTUM, 1))
            assert torch.equal(many.uniform(Stream.METROPOLIS, 1)[r::3], one.uniform(Stream.METROPOLIS, 1))
    some = noise.part(1, 2).copies(2, first=1, of=5).uniform(Stream.METROPOLIS, 1)
    for r in range(2):
        assert torch.equal(some[r::2], noise.part(1, 2).part(1 + r, 5).uniform(Stream.METROPOLIS, 1))


def test_definition_and_kernels_agree_on_parts():
    truth, fast = (numbers(by_definition, torch.float32).copies(4).part(2, 3) for by_definition in (True, False))
    torch.testing.assert_close(fast.normal(Stream.LANGEVIN, 1), truth.normal(Stream.LANGEVIN, 1), rtol=1e-5, atol=1e-6)
    assert torch.equal(fast.uniform(Stream.METROPOLIS, 1), truth.uniform(Stream.METROPOLIS, 1))


def test_too_many_parts_are_refused():
    with pytest.raises(ValueError, match=r"2\*\*24 blocks of random numbers: too few for 16777217 parts"):
        numbers(dim=2).part(2**24, 2**24 + 1).normal(Stream.MOMENTUM, 0)
    many = numbers(dim=8).part(2**23, 2**23 + 1)
    assert many.uniform(Stream.METROPOLIS, 0).shape == (7,)  # one block each
    with pytest.raises(ValueError, match="too few for 8388609 parts"):
        many.normal(Stream.MOMENTUM, 0)
