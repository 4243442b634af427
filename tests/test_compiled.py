"""The torch path as compiled code: it agrees with the reference, its bits do not depend on the batch, and what can't be
compiled runs uncompiled and says so."""

import warnings

import pytest
import torch
from torch import nn

from fastebm import ClassifierEnergy, GaussianEnergy, Langevin, MLPEnergy, SumEnergy, langevin_sample
from fastebm.backends import Chains, reference, torch_compiled, torch_tiles
from fastebm.description import describe
from fastebm.energies import Energy
from fastebm.noise import Stream, normal, traceable_normal

ULP = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def an_energy(dim: int = 5, activation: str = "silu", widths: tuple[int, ...] = (20, 11)) -> nn.Module:
    """One MLP whose gradient is of the state's size."""
    energy = MLPEnergy(dim, widths, activation)
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(3.0)
    return energy


def everything(dim: int = 5) -> nn.Module:
    classifier = nn.Sequential(nn.Linear(dim, 9), nn.Tanh(), nn.Linear(9, 3))
    labelled = ClassifierEnergy(nn.Sequential(nn.Linear(dim, 7), nn.ELU(), nn.Linear(7, 4)))
    terms = [an_energy(dim), ClassifierEnergy(classifier), labelled, GaussianEnergy(0.3, 2.0), nn.Linear(dim, 1)]
    return SumEnergy(terms, [1.0, -0.5, 0.7, 0.4, 0.2])


def sample(energy: nn.Module, n_chains: int = 70, steps: int = 4, **options):
    options = {"step_size": 0.3, "noise_scale": 0.5, "seed": 3, "backend": "torch", "compile": True, **options}
    init = torch.randn(n_chains, 5, generator=torch.Generator().manual_seed(1))
    return langevin_sample(energy, init=init, steps=steps, return_info=True, **options)


def test_traceable_normals_are_the_normals():
    chains = torch.arange(50) * 3 + 2**33
    steps = torch.arange(50) * 7
    seed = 0x9E3779B97F4A7C15
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32])
    for dim in (1, 4, 7):
        ours = traceable_normal(key, Stream.AIS, chains, steps, dim)
        torch.testing.assert_close(ours, normal(seed, Stream.AIS, chains, steps, dim), rtol=0, atol=8 * ULP)


@pytest.mark.parametrize("labels", [pytest.param(False, marks=pytest.mark.slow), True])
def test_agrees_with_the_reference_in_every_option(labels):
    n_chains, steps = 70, 4
    options = {
        "grad_clip": 0.4,
        "grad_norm_clip": 0.6,
        "clamp": (torch.linspace(-1.0, -0.5, 5), 1.0),
        "frozen": torch.rand(n_chains, 5) < 0.2,
        "step_size": torch.linspace(0.1, 0.3, steps),
        "noise_scale": torch.linspace(0.2, 0.5, n_chains).reshape(-1, 1),
        "labels": torch.arange(n_chains) % 3 if labels else None,
    }
    energy = everything()
    expected, told = sample(energy, **{**options, "backend": "reference", "compile": False})
    found, info = sample(energy, **options)
    assert (info.backend, info.path, info.precision) == ("torch", "compiled", "ieee")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(info.energies, told.energies, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(info.grad_norm, told.grad_norm, rtol=1e-4, atol=2e-5)
    assert torch.equal(info.clipped, told.clipped)
    assert torch.equal(info.clamped, told.clamped)


def test_bits_do_not_depend_on_the_batch():
    """Over more than one block, in a block of few rows, in odd widths, and with a neighbour that explodes."""
    energy = an_energy(63, widths=(37, 5))
    n_chains = torch_tiles._TILE_ROWS + 100
    x = torch.randn(n_chains, 63)
    wild = x.clone()
    wild[3] = 3e38
    options = {"steps": 3, "step_size": 0.3, "noise_scale": 0.5, "seed": 3, "backend": "torch", "compile": True}
    options |= {"return_info": True, "on_nonfinite": "ignore", "grad_norm_clip": 2.0}
    whole, info = langevin_sample(energy, init=wild, **options)
    assert info.first_bad_step[3] == 0
    assert torch.equal(whole[3], wild[3])
    for first, last in ((0, 3), (4, 60), (1001, 1700), (2000, n_chains)):
        part, _ = langevin_sample(energy, init=x[first:last], first_chain=first, **options)
        assert torch.equal(part, whole[first:last])


def test_trajectory_and_no_steps():
    energy = an_energy()
    samples, _ = sample(energy)
    trajectory, _ = sample(energy, return_trajectory=True, thin=2)
    assert torch.equal(trajectory[:, -1], samples)
    stayed, info = sample(energy, steps=0)
    torch.testing.assert_close(info.energies, energy(stayed).detach()[:, 0])
    assert info.grad_norm.isnan().all()


@pytest.mark.skipif(not torch_compiled.multiplies_bf16(), reason="no bf16 instructions in this CPU")
def test_bf16_products():
    energy = an_energy()
    exact = sample(energy, compile=False, backend="reference")[0]
    full = sample(energy)[0]
    rounded, info = sample(energy, precision="bf16")
    assert info.precision == "bf16"
    error = (rounded - exact).abs().max()
    assert 10 * (full - exact).abs().max() < error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation",
    ["relu", "leaky_relu", "elu", "softplus", "gelu", "gelu_tanh", "tanh", "sigmoid", "identity"],
)
def test_every_activation(activation):
    energy = an_energy(activation=activation)
    x = torch.randn(70, 5)
    numbers = torch.arange(70)
    rule = Langevin(0.3, 0.5)
    chains = Chains(x.clone(), 3, numbers, torch.zeros_like(numbers))
    expected = reference.advance(Energy(energy, (5,), torch.float32), chains, rule, 3)
    with torch.no_grad():
        done = torch_compiled.advance(describe(energy), chains._replace(x=x.clone()), rule, 3, precision="ieee")
    torch.testing.assert_close(done.x, expected.x, rtol=0, atol=2e-5)
    torch.testing.assert_close(done.energy, expected.energy, rtol=1e-4, atol=2e-5)


def test_what_can_not_be_compiled_runs_and_says_so(monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch_compiled, "_code", {})
    monkeypatch.setattr(torch._inductor, "compile", no_compiler)
    energy = an_energy()
    with pytest.warns(UserWarning, match="runs uncompiled: RuntimeError: no C\\+\\+ compiler found"):
        found, info = sample(energy)
    assert info.path == "tiles"
    assert torch.equal(found, sample(energy, compile=False)[0])


def test_auto_compiles_long_calls_only(monkeypatch):
    description = describe(MLPEnergy(784, (256, 128)))
    assert not torch_compiled.pays(description, 1_000, 60)
    assert torch_compiled.pays(description, 1_000_000, 60)
    monkeypatch.setattr(torch_compiled.multiprocessing, "parent_process", lambda: object())
    assert not torch_compiled.pays(description, 1_000_000, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample(an_energy(), compile="auto")[1].path == "tiles"


def test_bad_wishes():
    with pytest.raises(ValueError, match="compile must be True, False or \"auto\", got 'yes'"):
        sample(an_energy(), compile="yes")
    with pytest.raises(ValueError, match=r"compile=True is for the torch path of an MLP energy.*'autograd'"):
        sample(nn.Sequential(nn.Linear(5, 1)))
    with pytest.raises(ValueError, match=r"compile=True is for the torch path.*float64"):
        langevin_sample(an_energy().double(), 5, steps=1, compile=True)
