"""Which backend runs, why the fused kernel does not, and what ``import fastebm`` imports."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastebm import MLPEnergy, langevin_sample, why_not_fused
from fastebm.backends import choose as choosing
from fastebm.backends.choose import choose, interpreted

NO_DEVICE = "Triton's kernels need a CUDA device, and the state is on cpu"
FASTEST = "the closed-form gradient runs instead, by Numba's kernels: the fastest path on a CPU"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def pretend_gpu(monkeypatch, no_interpreter):
    """Decisions about a GPU need only its capability, which is replaced because this machine may have no GPU.

    These tests call ``choose`` itself: why_not_fused would answer that PyTorch finds no GPU.
    """
    return lambda capability: monkeypatch.setattr(choosing, "_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False), (None, False)]
)
def test_the_interpreter_is_on_by_triton_s_variable(value, expected, monkeypatch):
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreted() is expected


@pytest.mark.usefixtures("no_interpreter")
def test_why_not_fused_on_a_cpu():
    energy = MLPEnergy(3, (8,))
    assert why_not_fused(energy) == f"{NO_DEVICE}; {FASTEST}"
    assert why_not_fused(energy, "cpu") == why_not_fused(energy, device=CPU) == why_not_fused(energy)


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is asked about one")
def test_why_not_fused_on_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_not_fused(MLPEnergy(3, (8,)), "cuda") == "PyTorch finds no CUDA device here"


def test_why_not_fused_without_parameters():
    assert why_not_fused(nn.Identity()).startswith("not an MLP that can be read: it has no hidden layer")


def test_why_not_fused_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = 'the interpreter is for tests: it runs only where backend="triton" asks for it'
    assert why_not_fused(MLPEnergy(3, (8,)), "cpu") == f"{reason}; {FASTEST}"
    assert "works on CPU tensors, and the state is on cuda" in why_not_fused(MLPEnergy(3, (8,)), "cuda")


def test_why_not_fused_in_float64():
    assert why_not_fused(MLPEnergy(3, (8,)).double()) == (
        "Triton's kernels keep their state in float32, and this one is torch.float64; the closed-form gradient runs "
        "instead, in plain PyTorch (Numba's kernels compute in float32, and the state is torch.float64)"
    )


def test_why_not_fused_names_the_layer_first():
    energy = nn.Sequential(nn.Linear(3, 8), nn.Mish(), nn.Linear(8, 1)).double()
    assert why_not_fused(energy).startswith("not an MLP that can be read: 1 (Mish) is neither nn.Linear nor")


@pytest.mark.parametrize(
    ("energy", "backend", "instead"),
    [
        (
            nn.Sequential(nn.Linear(3, 1)),
            "auto",
            "slower than an MLP's closed form, and Numba's kernels for the rest of",
        ),
        (MLPEnergy(3, (8,)), "torch", FASTEST),
        (MLPEnergy(3, (8,)), "reference", "the definition of correct, and the slowest path"),
    ],
)
def test_info_names_what_runs_instead(energy, backend, instead):
    _, info = langevin_sample(energy, 3, batch_size=2, steps=1, backend=backend, return_info=True)
    assert instead in info.why_not_fused
    assert f'backend="{backend}" was asked for' in info.why_not_fused or backend == "auto"


def test_why_not_fused_names_what_runs_without_numba(without_numba):
    for energy, path in ((MLPEnergy(3, (8,)), "closed-form"), (nn.Sequential(nn.Linear(3, 1)), "autograd's")):
        found = without_numba(why_not_fused, energy)
        assert f"{path} gradient runs instead" in found
        assert found.endswith("in plain PyTorch (off for this test)")


def test_auto_never_picks_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for energy, path in ((MLPEnergy(3, (8,)), "tiles"), (nn.Sequential(nn.Linear(3, 1)), "autograd")):
        _, info = langevin_sample(energy, 3, batch_size=2, steps=1, return_info=True)
        assert (info.backend, info.path, info.precision) == ("torch", path, "ieee")
        assert info.why_not_fused == why_not_fused(energy)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16", "ieee", None])
def test_a_gpu_takes_the_fused_kernel(pretend_gpu, precision):
    pretend_gpu(90)
    choice = choose(MLPEnergy(64, (128, 128)), CUDA, torch.float32, "auto", precision)
    assert (choice.backend, choice.why_not_fused) == ("triton", None)
    assert choice.path == choice.launch.regime
    assert choice.precision == (precision or "bf16x3")
    assert choice.description.dim == 64


def test_a_gpu_s_choice_of_regime(pretend_gpu):
    pretend_gpu(90)
    assert choose(MLPEnergy(64, (128, 128)), CUDA, torch.float32, "auto", None).path == "resident"
    assert choose(MLPEnergy(784, (256, 128)), CUDA, torch.float32, "auto", None).path == "streaming"


def test_a_gpu_with_another_module_takes_the_fused_update(pretend_gpu):
    pretend_gpu(90)
    choice = choose(nn.Sequential(nn.Linear(3, 1)), CUDA, torch.float32, "auto", None)
    assert (choice.backend, choice.path, choice.description) == ("triton", "autograd", None)
    assert "no hidden layer" in choice.why_not_fused
    assert choice.why_not_fused.endswith("one launch for the rest of a step (cuda_graph=True records both)")


@pytest.mark.parametrize(("dim", "regime"), [(64, "resident"), (784, "streaming")])
def test_a_sampler_without_a_fused_kernel_evaluates_the_energy_in_one_launch(pretend_gpu, dim, regime):
    pretend_gpu(90)
    mine = {"sampler": "MALA", "triton_paths": ()}
    choice = choose(MLPEnergy(dim, (128,)), CUDA, torch.float32, "auto", None, **mine)
    assert (choice.backend, choice.path, choice.kernels, choice.precision) == (
        "triton", "evaluation", "triton", "bf16x3",
    )  # fmt: skip
    assert choice.launch.regime == regime
    assert choice.why_not_fused == (
        "MALA has no fused kernel; its own steps run in PyTorch, and one launch computes energy and gradient of all "
        "chains"
    )
    # a kernel for one regime leaves the other to it
    other = choose(
        MLPEnergy(dim, (128,)), CUDA, torch.float32, "auto", None, sampler="MALA", triton_paths=("products",)
    )
    assert other.path == "evaluation"
    assert f"MALA has no fused kernel for such energies ({regime}); its own steps" in other.why_not_fused
    asked = choose(MLPEnergy(dim, (128,)), CUDA, torch.float32, "torch", None, **mine)
    assert (asked.backend, asked.path, asked.launch) == ("torch", "tiles", None)
    wide = choose(MLPEnergy(dim, (2048, 2048)), CUDA, torch.float32, "auto", None, **mine)
    assert (wide.backend, wide.path, wide.launch) == ("torch", "tiles", None)
    assert "KiB of shared memory" in wide.why_not_fused


def test_widths_that_do_not_fit_are_refused_with_the_bytes(pretend_gpu):
    pretend_gpu(90)
    choice = choose(MLPEnergy(64, (2048, 2048)), CUDA, torch.float32, "auto", None)
    assert choice.backend == "triton"
    assert choice.path == "products"
    assert "need" in choice.why_not_fused
    assert choice.why_not_fused.endswith("by library products (cuda_graph=True records them)")
    assert "KiB of shared memory, and a block on sm_90 has 227 KiB" in choice.why_not_fused


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_precision_that_does_not_fit_names_one_that_does(pretend_gpu, precision):
    pretend_gpu(90)
    energy = MLPEnergy(784, (256, 128))
    refused = choose(energy, CUDA, torch.float32, "auto", precision)
    assert refused.path == "products"
    (offered,) = re.findall(rf"precision '{precision}' need .* \(precision '(\w+)' would fit\)", refused.why_not_fused)
    assert choose(energy, CUDA, torch.float32, "auto", offered).why_not_fused is None


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_an_old_gpu(pretend_gpu, backend):
    pretend_gpu(75)
    reason = "Triton's kernels need compute capability 8.0 or later, and cuda has 7.5"
    energy = MLPEnergy(3, (8,))
    if backend == "triton":
        with pytest.raises(ValueError, match=f'backend="triton" can\'t run: {reason}. Use backend="auto" or "torch"'):
            choose(energy, CUDA, torch.float32, backend, None)
    else:
        choice = choose(energy, CUDA, torch.float32, backend, None)
        instead = "the closed-form gradient runs instead, in plain PyTorch"
        assert (choice.backend, choice.path, choice.why_not_fused) == ("torch", "tiles", f"{reason}; {instead}")


def test_without_the_package_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_fused(MLPEnergy(3, (8,))) == f"the package triton is not installed; {FASTEST}"
    with pytest.raises(ValueError, match="the package triton is not installed"):
        langevin_sample(MLPEnergy(3, (8,)), backend="triton", steps=1)
    assert langevin_sample(MLPEnergy(3, (8,)), steps=1).shape == (32, 3)


@pytest.mark.parametrize(("backend", "precision"), [("cuda", None), ("auto", "fp8"), ("reference", "double")])
def test_unknown_names_are_refused(backend, precision):
    with pytest.raises(ValueError, match="must be one of"):
        langevin_sample(MLPEnergy(3, (8,)), steps=1, backend=backend, precision=precision)


def test_import_brings_in_no_optional_package():
    """Nor does a run on a CPU. Kernels import triton, and the command line imports plots and data sets."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastebm\n"
        "model = fastebm.MLPEnergy(3, (8,))\n"
        "fastebm.langevin_sample(model, steps=1)\n"
        "fastebm.why_not_fused(model)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new & {'triton', 'matplotlib', 'sklearn', 'scipy', 'tqdm', 'safetensors'}))\n"
        "print(torch.get_float32_matmul_precision(), torch.get_default_dtype())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    optional, settings = run.stdout.split("\n")[:2]
    assert optional == ""
    assert settings.split() == ["highest", "torch.float32"]
