"""Devices by name: errors say that a device is missing, or what was probably meant, before anything happens."""

import pytest
import torch

from fastebm import ChainPool, GaussianEnergy, MLPEnergy, langevin_sample, why_not_fused
from fastebm.devices import checked_device, named_device

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is asked for one")


def calls(device):
    energy = MLPEnergy(2, (8,))
    return [
        lambda: checked_device(device),
        lambda: langevin_sample(energy, device=device, steps=1),
        lambda: langevin_sample(GaussianEnergy(), 2, device=device, steps=1),
        lambda: ChainPool(10, 2, device=device),
    ]


ABSENT = [
    pytest.param("cuda", "PyTorch finds no CUDA device here", marks=without_cuda),
    pytest.param("cuda:7", "PyTorch finds no CUDA device here", marks=without_cuda),
    pytest.param(torch.device("cuda", 1), "PyTorch finds no CUDA device here", marks=without_cuda),
    pytest.param(0, "device 'cuda:0' is not here", marks=without_cuda),
    pytest.param("cuda:99", "device 'cuda:99' is not here"),
    ("hpu", "device 'hpu' is not here: PyTorch .* finds no device of this kind here; leave the device out"),
    ("xpu:1", "device 'xpu:1' is not here"),
]
if not torch.backends.mps.is_available():
    ABSENT.append(("mps", "device 'mps' is not here"))


@pytest.mark.parametrize(("device", "match"), ABSENT)
def test_a_device_that_is_not_here(device, match):
    for call in calls(device):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("gpu", r"got 'gpu': did you mean 'cuda'\?"),
        ("GPU:1", r"did you mean 'cuda:1'\?"),
        ("CUDA", r"did you mean 'cuda'\?"),
        ("cuda1", r"did you mean 'cuda:1'\?"),
        ("Cpu", r"did you mean 'cpu'\?"),
        ("auto", "leave it out, and a device is chosen"),
        ("banana", "another name of PyTorch's, got 'banana'$"),
        ("", "got ''$"),
        (-1, "got -1$"),
    ],
)
def test_a_name_that_means_nothing(name, match):
    more = [
        lambda: why_not_fused(MLPEnergy(2, (8,)), name),
        lambda: langevin_sample(MLPEnergy(2, (8,)), init=torch.zeros(3, 2), device=name),
        lambda: ChainPool(10, 2, storage_device=name),
    ]
    for call in [*calls(name), *more]:
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("device", [2.5, True, ["cuda"]])
def test_what_is_no_name(device):
    for call in calls(device):
        with pytest.raises(TypeError, match=r"device must be a torch\.device or a name"):
            call()


def test_those_that_are_here():
    for device in ("cpu", torch.device("cpu"), "cpu:0", "meta"):
        assert checked_device(device) == named_device(device) == torch.device(device)
    assert langevin_sample(MLPEnergy(2, (8,)), device="cpu", steps=1, batch_size=3).shape == (3, 2)


@pytest.mark.parametrize(("n", "words"), [(1, "there is 1 CUDA device here"), (2, "there are 2 CUDA devices here")])
def test_an_index_that_is_too_large(n, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    assert checked_device("cuda") == torch.device("cuda")
    assert checked_device(f"cuda:{n - 1}") == torch.device("cuda", n - 1)
    with pytest.raises(ValueError, match=words):
        checked_device(f"cuda:{n}")


@without_cuda
def test_the_build_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="a build without CUDA"):
        checked_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ValueError, match=r"a build of CUDA 12\.8"):
        checked_device("cuda")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_compiled_call_takes_a_device():
    torch._dynamo.reset()
    energy, options = MLPEnergy(2, (8,)), {"batch_size": 3, "steps": 1, "seed": 0}
    function = torch.compile(lambda: langevin_sample(energy, device="cpu", **options), fullgraph=True, backend="eager")
    assert torch.equal(function(), langevin_sample(energy, **options))
