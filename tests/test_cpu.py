"""langevin_sample on a CPU: Numba's kernels compared with plain PyTorch."""

import pytest
import torch
from small_energies import STEP, Square, seeded_mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastebm
from fastebm import langevin_sample
from fastebm import rng as noise
from fastebm.backends import blas, choose


@pytest.mark.parametrize(("make", "dim"), [(seeded_mlp, 3), (seeded_mlp, 40), (Square, 7)])
def test_default_call_runs_numba(without_numba, make, dim):
    energy, options = make(dim), {"input_size": dim, "batch_size": 150, "steps": 6, "clamp": (-1.0, 1.0), **STEP}
    x, info = langevin_sample(energy, return_info=True, **options)
    y, without = without_numba(langevin_sample, energy, return_info=True, **options)
    assert (info.backend, info.kernels, without.kernels) == ("torch", "numba", "torch")
    assert (x - y).abs().max() < 1e-5
    assert torch.equal(x, langevin_sample(energy, **options))  # the kernel without telemetry, with the same bits


@pytest.mark.parametrize("widths", [(1,), (5, 1), (1, 1, 7), (130, 3)])
@pytest.mark.parametrize("dim", [1, 4, 5, 9])
def test_narrow_layers(without_numba, dim, widths):
    options = {"batch_size": 70, "steps": 4, **STEP}
    x = langevin_sample(seeded_mlp(dim, widths), **options)
    assert (x - without_numba(langevin_sample, seeded_mlp(dim, widths), **options)).abs().max() < 1e-5


def test_float64_and_the_reference_run_in_pytorch():
    for energy, options in (
        (seeded_mlp(3).double(), {}),
        (seeded_mlp(3), {"backend": "reference"}),
        (Square(3).double(), {}),
    ):
        _, info = langevin_sample(energy, 3, steps=1, return_info=True, **options, **STEP)
        assert info.kernels == "torch"


def test_states_that_an_energy_keeps_do_not_change():
    energy = Square(5)
    x0 = torch.zeros(4, 5)
    trajectory = langevin_sample(energy, init=x0, steps=6, return_trajectory=True, **STEP)
    kept = [x.detach() for x in energy.seen if x.requires_grad]
    assert len(kept) == 6
    assert torch.equal(torch.stack(kept, dim=1)[:, 1:], trajectory[:, :-1])


def test_flops_can_be_counted():
    with FlopCounterMode(display=False) as counter:
        langevin_sample(nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1), nn.Linear(3, 1)), 4, steps=2, **STEP)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("energy", [seeded_mlp(6), Square(6)], ids=["mlp", "module"])
def test_inference_mode_and_no_grad_change_nothing(energy):
    x = langevin_sample(energy, 6, steps=3, **STEP)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            assert torch.equal(langevin_sample(energy, 6, steps=3, **STEP), x)


def test_products_in_bf16(monkeypatch):
    """Only if precision="bf16" is asked for."""
    energy, options = seeded_mlp(20, (64, 64)), {"batch_size": 90, "steps": 4, "return_info": True, **STEP}
    x, info = langevin_sample(energy, **options)
    assert info.precision == "ieee"
    monkeypatch.setattr(choose, "multiplies_bf16", lambda: True)  # this machine may be without such instructions
    y, info = langevin_sample(energy, precision="bf16", **options)
    assert info.precision == "bf16"
    assert 1e-6 < (x - y).abs().max() < 1e-2
    assert langevin_sample(energy, **options)[1].precision == "ieee"


def test_without_the_matrix_product_of_a_library(monkeypatch):
    energy, options = seeded_mlp(20, (64, 64)), {"batch_size": 90, "steps": 4, **STEP}
    x = langevin_sample(energy, **options)
    monkeypatch.setattr(blas, "_sgemm", lambda: None)  # this machine's PyTorch exports one
    assert (langevin_sample(energy, **options) - x).abs().max() < 1e-5


def test_products_of_few_rows_have_the_same_bits():
    """A matrix library may round a product of few rows differently, which the CPU path must notice."""
    energy, options = seeded_mlp(50, (96, 33)), {"steps": 4, **STEP}
    x = langevin_sample(energy, batch_size=400, **options)
    for first, n in ((0, 1), (3, 2), (16, 16), (100, 37), (399, 1)):
        few = langevin_sample(energy, batch_size=n, first_chain=first, **options)
        assert torch.equal(few, x[first : first + n])


def test_a_lazily_negated_gradient():
    """PyTorch negates the imaginary part of a conjugated tensor lazily."""

    class Conjugated(nn.Module):
        def forward(self, x):
            return torch.complex(torch.zeros_like(x), x).conj().imag.sum(dim=1)  # -x

    x = langevin_sample(Conjugated(), init=torch.zeros(1, 1), steps=1, step_size=0.2, noise_scale=0.0, seed=0)
    assert x.item() == pytest.approx(0.1)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("make", [seeded_mlp, Square])
def test_pytorchs_defaults_change_nothing(make, clip):
    """The caller's default dtype and device do not reach what kernels compute with."""
    energy, init = make(40), torch.rand(300, 40)
    options = {"init": init, "steps": 3, "grad_clip": clip, **STEP}
    pool = {"storage_dtype": torch.uint8, "clamp": (0.0, 1.0), "device": "cpu", "seed": 0}
    sampler = fastebm.Langevin(step_size=0.1, noise_scale=0.3)
    expected = langevin_sample(energy, **options)
    float_pool = {"init": lambda *counter: noise.uniform(*counter, 40), "reinit_prob": 0.0, "device": "cpu", "seed": 0}
    drawn = [fastebm.ChainPool(50, 40, **p).sample(energy, 8, sampler, 3)[0] for p in (pool, float_pool)]
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(langevin_sample(energy, **options), expected)
        for p, x in zip((pool, float_pool), drawn, strict=True):
            assert torch.equal(fastebm.ChainPool(50, 40, **p).sample(energy, 8, sampler, 3)[0], x)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(langevin_sample(energy, **options), expected)
