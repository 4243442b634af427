"""Numba's kernels one by one: noise and activations, compared with plain PyTorch."""

import pytest
import runs
import torch
from fastebm.kernels import cpu as kernels

from fastebm import rng as noise
from fastebm import threads
from fastebm.energies import ACTIVATIONS
from fastebm.rng import Stream

CHAINS = torch.tensor([0, 1, 2**32 - 1, 2**32, 5 * 2**40 + 3, 2**63 - 1])
STEPS = torch.tensor([0, 1, 2, 2**31, 2**32 - 1, 7])


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize(("n_blocks", "first_block"), [(1, 0), (7, 0xFFFFF0), (1024, 0), (1500, 3)])
def test_words_are_those_of_pytorch(without_numba, stream, n_blocks, first_block):
    for steps in (STEPS, 11):
        arguments = (2**63 + 17, stream, CHAINS, steps, n_blocks, first_block)
        for ours, theirs in zip(noise.words(*arguments), without_numba(noise.words, *arguments), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 784])
def test_bytes_are_those_of_pytorch(without_numba, n):
    arguments = (5, Stream.POOL, CHAINS, STEPS, n, 0x800000)
    ours = noise.random_bytes(*arguments)
    assert torch.equal(ours, without_numba(noise.random_bytes, *arguments))
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
    """Those of Random123."""
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert runs.cpu_words(counter, key) == expected


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 16, 63, 4097, 5000])
def test_numbers_are_those_of_pytorch(without_numba, dim):
    arguments = (3, Stream.MOMENTUM, CHAINS, STEPS, dim)
    assert torch.equal(noise.uniform(*arguments), without_numba(noise.uniform, *arguments))
    exact = noise.normal(*arguments, dtype=torch.float64)
    assert (noise.normal(*arguments) - exact).abs().max() < 1e-6
    assert (without_numba(noise.normal, *arguments) - exact).abs().max() < 2e-6  # PyTorch's own


def test_normals_of_many_words():
    """A million numbers reach the tails and every quadrant of the angle."""
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
    """The error is at most twice that of PyTorch's float32, plus a few units in the last place."""
    rule = ACTIVATIONS[name]
    parameter = {"softplus": 2.0, "elu": 0.7}.get(name, rule.default)
    z = torch.cat(
        [torch.linspace(-30, 30, 4000), torch.linspace(-1, 1, 4000), torch.tensor([0.0, -0.0, 1e-30, -90, 90])]
    )
    z = z[: len(z) // width * width].reshape(-1, width)
    value, slope = runs.cpu_activation(name, z, parameter)
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
def test_nan_stays_nan(name):
    """A NaN in the weights must not become a number."""
    value, _ = runs.cpu_activation(name, torch.full((1, 8), torch.nan), 1.0)
    assert value.isnan().all()


def test_kernels_refuse_tensors_that_they_would_misread():
    kernel = kernels.load("mlp.softmax")
    z, bias = torch.zeros(4, 8), torch.zeros(8)
    for bad in (z.double(), z.t(), bias.expand(8, 8).t(), torch._neg_view(z)):
        with pytest.raises(TypeError, match="a kernel takes f32s"):
            kernel.prepared(bad, 4, 8, 8, bias, 1.0)


@pytest.mark.parametrize(("chains", "steps"), [(CHAINS, STEPS[:2]), (CHAINS[None], STEPS), (CHAINS, STEPS[:0])])
def test_counters_of_wrong_shapes_are_refused(chains, steps):
    for draw in (noise.uniform, noise.normal, noise.words):
        with pytest.raises(ValueError, match=r"chains must be \(n,\), and steps a number or \(n,\)"):
            draw(1, Stream.POOL, chains, steps, 5)
