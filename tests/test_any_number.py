"""Outputs, buffers and numbers of other kinds than expected: accepted, or refused with the reason."""

import numpy as np
import pytest
import torch
from torch import nn
from user_modules import DIM, N, assert_same, mlp, sampled

from fastebm import (
    ClassifierEnergy,
    GaussianEnergy,
    MLPEnergy,
    langevin_sample,
)

pytestmark = pytest.mark.usefixtures("seeded")


class Two(nn.Module):
    """Logits and features, as many networks return them."""

    def __init__(self, out=lambda logits, x: (logits, x)):
        super().__init__()
        self.linear, self.out = nn.Linear(DIM, 3), out

    def forward(self, x):
        return self.out(self.linear(x), x)


@pytest.mark.parametrize("labels", [None, torch.zeros(N, dtype=torch.int64)])
@pytest.mark.parametrize(
    ("out", "got"),
    [
        (lambda logits, x: (logits, x), "tuple"),
        (lambda logits, x: [logits], "list"),
        (lambda logits, x: {"logits": logits}, "dict"),
        (lambda logits, x: logits[:, :, None], r"shape \(5, 3, 1\)"),
        (lambda logits, x: logits[:, 0], r"shape \(5,\)"),
        (lambda logits, x: logits[:2], r"shape \(2, 3\)"),
        (lambda logits, x: None, "NoneType"),
    ],
)
def test_a_classifier_that_returns_something_else(out, got, labels):
    with pytest.raises(
        ValueError, match=f"^a classifier must return a tensor of logits .batch, classes., got {got}: wrap"
    ):
        sampled(ClassifierEnergy(Two(out)), "auto", labels=labels)
    with pytest.raises(ValueError, match=r"an energy maps \(5, \.\.\.\) to \(5,\) or \(5, 1\), got"):
        sampled(Two(out), "auto") if got != r"shape \(5,\)" else sampled(Two(lambda *_: ()), "auto")


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("weight", torch.eye(DIM, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.weight).square().sum(1)


def test_a_parameterless_energy_has_the_dtype_of_its_buffers():
    assert langevin_sample(Buffers(), DIM, steps=1, step_size=0.1).dtype == torch.float64
    assert langevin_sample(GaussianEnergy(torch.zeros(DIM)).double(), DIM, steps=1).dtype == torch.float64
    assert langevin_sample(Buffers().float(), DIM, steps=1, step_size=0.1).dtype == torch.float32
    assert_same(Buffers(), path="autograd")
    with pytest.raises(ValueError, match="the energy is on meta and the chains on cpu: move one"):
        sampled(Buffers().to("meta"), "auto")


WHOLE = [np.int64, np.int32, np.uint8, np.asarray, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int16)]
REAL = [np.float32, np.float64, np.float16, np.asarray, torch.tensor, lambda v: torch.tensor(v).double()]


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_numbers_of_numpy_and_tensors_without_dims(whole, real, backend):
    options = {"batch_size": 4, "steps": 6, "thin": 2, "first_chain": 3, "first_step": 2, "seed": 5}
    numbers = {"step_size": 0.25, "noise_scale": 0.5, "grad_clip": 2.0, "grad_norm_clip": 4.0}
    shared = {"return_trajectory": True, "backend": backend}
    model = mlp()
    expected = langevin_sample(model, DIM, clamp=(-1.0, 0.5), **options, **numbers, **shared)
    found = langevin_sample(
        model, whole(DIM), clamp=(real(-1.0), real(0.5)), **{k: whole(v) for k, v in options.items()},
        **{k: real(v) for k, v in numbers.items()}, **shared,
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_schedules_and_bounds_as_arrays(dtype):
    schedule, per_chain = np.linspace(0.1, 0.2, 4, dtype=dtype), np.linspace(0.1, 1.0, N, dtype=dtype)[:, None]
    bounds = (np.full(DIM, -0.5, dtype), np.linspace(0.5, 1, DIM, dtype=dtype))
    model = mlp()
    for backend in ("auto", "reference"):
        found, info = sampled(model, backend, step_size=schedule, noise_scale=per_chain, clamp=bounds)
        as_tensors = {"step_size": torch.from_numpy(schedule), "noise_scale": torch.from_numpy(per_chain)}
        expected, _ = sampled(model, backend, clamp=tuple(map(torch.from_numpy, bounds)), **as_tensors)
        assert torch.equal(found, expected)
        assert info.temperature.shape == (N, 1)


def test_sizes_of_layers_and_states_as_arrays():
    model = MLPEnergy(np.prod((2, 3)), np.array([4, 5]), dropout=np.float32(0.25))
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [4, 5, 1]
    shape = np.array((2, 3))
    assert langevin_sample(nn.Sequential(nn.Flatten(), model), shape, steps=1).shape == (32, 2, 3)
    assert langevin_sample(nn.Sequential(nn.Flatten(), model), tuple(shape), steps=1).shape == (32, 2, 3)


@pytest.mark.parametrize("bad", [True, np.bool_(True), torch.tensor(True), 2.5, np.float64(2.5), torch.ones(1), "3"])
def test_what_is_no_whole_number_is_refused(bad):
    for name in ("steps", "batch_size", "first_chain", "thin", "first_step", "seed"):
        if name in ("first_step", "seed") and isinstance(bad, torch.Tensor) and bad.ndim == 1:
            continue  # tensors of one element are allowed: they are read on the device
        with pytest.raises((TypeError, ValueError), match=name):
            langevin_sample(mlp(), DIM, **{"steps": 1, name: bad})


@pytest.mark.parametrize("bad", [True, np.bool_(True), "0.1", None, [0.1], np.float32("nan"), torch.tensor(True)])
def test_what_is_no_number_is_refused(bad):
    for name in ("step_size", "noise_scale"):
        with pytest.raises((TypeError, ValueError), match=name):
            langevin_sample(mlp(), DIM, steps=1, **{name: bad})


def test_states_given_as_a_size_are_told_apart():
    with pytest.raises(TypeError, match=r"got Tensor \(5, 6\): states to start from are passed as init="):
        langevin_sample(mlp(), torch.zeros(N, DIM))
    with pytest.raises(TypeError, match=r"input_size must be an int or a shape, got Tensor \(6,\)"):
        langevin_sample(mlp(), torch.zeros(DIM))
