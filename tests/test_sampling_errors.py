"""What langevin_sample refuses, and in which words."""

import math

import pytest
import torch
from paths import every_backend
from small_energies import DIM, Of, conv, mlp, quadratic
from torch import nn

from fastebm import MLPEnergy, NonFiniteError, langevin_sample

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

NAN, INF = math.nan, math.inf


def broken_weights(value: float) -> nn.Module:
    model = MLPEnergy(DIM, (9, 8))
    with torch.no_grad():
        model[2].weight[1, 2] = value
    return model


def start(value: float = 0.0) -> torch.Tensor:
    x = torch.linspace(-1, 1, 4 * DIM).reshape(4, DIM)
    x[2, 1] = value
    return x


# -- what is refused --------------------------------------------------------------------------------------------

# name: (energy, options, error, message)
BAD = {
    "init NaN": (mlp, {"init": start(NAN)}, ValueError, r"init must be finite, .* 1 of 4 chains \(first: 2\)"),
    "init inf": (mlp, {"init": start(-INF)}, ValueError, "init must be finite"),
    "init int": (mlp, {"init": torch.ones(4, DIM, dtype=torch.int64)}, TypeError, "init must be floating point.*int64"),
    "init bool": (mlp, {"init": torch.ones(4, DIM, dtype=torch.bool)}, TypeError, "init must be floating point"),
    "init complex": (mlp, {"init": start().to(torch.complex64)}, TypeError, "init must be floating point.*complex64"),
    "init list": (mlp, {"init": [[0.0] * DIM]}, TypeError, "init must be a tensor, got list"),
    "init vector": (mlp, {"init": torch.ones(DIM)}, ValueError, r"init must be \(n_chains, \*shape\).*\(3,\)"),
    "init without dims": (mlp, {"init": torch.ones(4, 0)}, ValueError, r"at least one dim, got shape \(4, 0\)"),
    "init dim": (mlp, {"init": torch.ones(4, DIM + 1)}, ValueError, "the energy .*4"),
    "init image for an MLP": (mlp, {"init": torch.ones(4, DIM, 1)}, ValueError, r"does not take states of shape \(n_"),
    "init against input_size": (mlp, {"input_size": 5, "init": start()}, ValueError, "input_size 5 and init .*disag"),
    "init on another device": (mlp, {"init": start(), "device": "meta"}, ValueError, "init is on cpu and device=meta"),
    "input_size of another dim": (mlp, {"input_size": DIM + 1}, ValueError, "the energy .*4"),
    "input_size zero": (mlp, {"input_size": 0}, ValueError, "input_size must be an int >= 1 or a shape .* got 0"),
    "input_size empty": (mlp, {"input_size": ()}, ValueError, "input_size must be an int >= 1 or a shape"),
    "input_size float": (mlp, {"input_size": 3.0}, TypeError, "input_size must be an int or a shape, got 3.0"),
    "input_size unknown": (quadratic, {}, ValueError, "pass input_size= or init="),
    "steps negative": (mlp, {"steps": -1}, ValueError, "steps must be >= 0, got -1"),
    "steps float": (mlp, {"steps": 2.0}, TypeError, "steps must be an int, got 2.0"),
    "steps bool": (mlp, {"steps": True}, TypeError, "steps must be an int, got True"),
    "chains negative": (mlp, {"batch_size": -1}, ValueError, "batch_size must be >= 0, got -1"),
    "first_chain negative": (mlp, {"first_chain": -1}, ValueError, "first_chain must be >= 0"),
    "first_chain large": (mlp, {"first_chain": 2**63 - 1}, ValueError, "chain numbers are 63-bit"),
    "first_step large": (mlp, {"first_step": 2**32, "steps": 1}, ValueError, "step numbers are 32-bit"),
    "step_size zero": (mlp, {"step_size": 0.0}, ValueError, "step_size must be finite and > 0, got 0.0"),
    "step_size negative": (mlp, {"step_size": -1.0}, ValueError, "step_size must be finite and > 0, got -1.0"),
    "step_size NaN": (mlp, {"step_size": NAN}, ValueError, "step_size must be finite and > 0, got nan"),
    "step_size schedule": (mlp, {"step_size": torch.ones(3), "steps": 2}, ValueError, "3 entries for 2 steps"),
    "step_size a chain": (mlp, {"step_size": torch.ones(3, 1)}, ValueError, r"\(3, 1\) does not fit 32 chains"),
    "noise_scale negative": (mlp, {"noise_scale": -1.0}, ValueError, "noise_scale must be finite and >= 0, got -1.0"),
    "noise_scale NaN": (mlp, {"noise_scale": NAN}, ValueError, "noise_scale must be finite and >= 0, got nan"),
    "clamp empty": (mlp, {"clamp": (1.0, 1.0)}, ValueError, r"clamp needs lo < hi, got \(1.0, 1.0\)"),
    "clamp reversed": (mlp, {"clamp": (1.0, -1.0)}, ValueError, "clamp needs lo < hi"),
    "clamp one-sided start": (mlp, {"clamp": (0.0, INF)}, ValueError, "no uniform start on an infinite clamp range"),
    "grad_clip zero": (mlp, {"grad_clip": 0.0}, ValueError, "grad_clip must be a number > 0 or None, got 0.0"),
    "seed float": (mlp, {"seed": 1.5}, TypeError, "seed must be an int or None, got 1.5"),
    "seed large": (mlp, {"seed": 2**64}, ValueError, "seed must fit 64 bits"),
    "generator": (mlp, {"seed": None, "generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
    "precision": (mlp, {"precision": "fp8"}, ValueError, "precision must be one of bf16x3, .* got 'fp8'"),
    "on_nonfinite": (mlp, {"on_nonfinite": "warn"}, ValueError, "on_nonfinite must be one of raise, .* got 'warn'"),
    "out type": (mlp, {"init": start(), "out": [0.0]}, TypeError, "out must be a tensor, got list"),
    "out shape": (mlp, {"init": start(), "out": torch.zeros(4, 2)}, ValueError, r"out must be a \(4, 3\) tensor"),
    "out dtype": (mlp, {"init": start(), "out": start().double()}, ValueError, "torch.float32 on cpu, got .*float64"),
    "out device": (mlp, {"init": start(), "out": start().to("meta")}, ValueError, "out must be .* meta"),
    "out with grad": (mlp, {"init": start(), "out": start().requires_grad_()}, ValueError, "out must not require grad"),
    "weights NaN": (lambda: broken_weights(NAN), {"init": start()}, NonFiniteError, "weights are not: 2.weight"),
    "weights inf": (lambda: broken_weights(INF), {"init": start()}, NonFiniteError, "weights are not: 2.weight"),
    "energy no energy": (lambda: 3.0, {"init": start()}, TypeError, "energy must be an nn.Module .* float"),
    "energy elsewhere": (
        lambda: mlp().to("meta"), {"init": start()}, ValueError, "the energy is on meta and the chains on cpu",
    ),
    "device elsewhere": (mlp, {"device": "meta"}, ValueError, "the energy is on cpu and the chains on meta"),
    "energy a vector": (lambda: Of(lambda x: x), {"init": start()}, ValueError, r"an energy maps .* got shape \(.*3\)"),
    "energy a sum": (lambda: Of(lambda x: x.sum()), {"init": start()}, ValueError, r"an energy maps .* got shape \(\)"),
    "energy a pair": (lambda: Of(lambda x: (x, x)), {"init": start()}, ValueError, "an energy maps .* got tuple"),
    "energy of other states": (conv, {"input_size": (2, 8, 8)}, ValueError, "not take states of shape .n_chains, 2, 8"),
    "energy detached": (
        lambda: Of(lambda x: x.detach().sum(1)), {"init": start()}, ValueError, "does not depend on x through",
    ),
    "energy NaN": (
        lambda: Of(lambda x: NAN * x.sum(1)), {"init": start()}, NonFiniteError, r"4 of 4 .*at step 0 of 2, from an en",
    ),
    "energy inf": (
        lambda: Of(lambda x: x.sum(1) + INF), {"init": start()}, NonFiniteError,
        "the energy of a finite state is not finite: is there a log",
    ),
    "energy int": (lambda: Of(lambda x: x.long().sum(1)), {"init": start()}, ValueError, "floating-point .*int64"),
    "energy bool": (lambda: Of(lambda x: x[:, 0] > 0), {"init": start()}, ValueError, "floating-point .*bool"),
    "energy None": (lambda: Of(lambda x: None), {"init": start()}, ValueError, "got NoneType: is a return missing"),
    "energy with an item": (
        lambda: Of(lambda x: torch.tensor([float(v.detach().sum()) for v in x])), {"init": start()}, ValueError,
        r"an item\(\)",
    ),
    "energy by NumPy": (
        lambda: Of(lambda x: torch.as_tensor(x.numpy().sum(1))), {"init": start()}, ValueError, "NumPy's arrays",
    ),
    "chains in input_size": (mlp, {"input_size": (64, DIM)}, ValueError, "batch_size="),
    "states as input_size": (mlp, {"input_size": start()}, TypeError, "states to start from are passed as init="),
    "a state as input_size": (mlp, {"input_size": start()[0]}, TypeError, "states to start from are passed as init="),
    "a list of states": (mlp, {"input_size": [[0.5, 1.0, 2.0]]}, ValueError, "states to start from are passed as"),
    "numbers as input_size": (mlp, {"input_size": [0.5, 1.0, 2.0]}, ValueError, "states to start from are passed as"),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize(("make", "options", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_a_message_and_changes_nothing(
    backend, make, options, error, match, untouched, device
):
    if backend == "triton" and device == "cuda":
        pytest.skip("these inputs lie on the CPU, where no kernel runs on a machine with a GPU")
    energy = make()
    model = energy if isinstance(energy, nn.Module) else nn.Identity()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    tensors = [options[name] for name in ("init", "out") if isinstance(options.get(name), torch.Tensor)]
    options = {"seed": 1, "steps": 2, **options}
    with untouched(model, *tensors), pytest.raises(error, match=match):
        langevin_sample(energy, backend=backend, **options)


@pytest.mark.parametrize("name", ["cuda", "Triton", None])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference, got"):
        langevin_sample(mlp(), backend=name)


def test_triton_without_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"can't run: Triton's kernels need a CUDA device, .* on cpu"):
        langevin_sample(mlp(), backend="triton", steps=1)
    assert langevin_sample(mlp(), backend="auto", steps=1, return_info=True)[1].backend == "torch"


def test_triton_in_float64(device):
    with pytest.raises(
        ValueError, match=r"Triton's kernels keep their state in float32, and this one is torch\.float64"
    ):
        langevin_sample(mlp().to(device), init=start().double().to(device), backend="triton", steps=1)
