"""langevin_sample while a CUDA graph is captured: shown without a GPU, by a CPU that says it is capturing."""

import pytest
import torch
from compiled_calls import LABELS, every_term
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastebm import MLPEnergy, langevin_sample
from fastebm.backends import op

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class NoWaiting(TorchDispatchMode):
    """Fails on operations that wait for a GPU: values read, shapes that depend on values, copies from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "lift_fresh"), name
        masks = [i for i in args[1] if i is not None] if name in ("index", "index_put", "index_put_") else []
        assert not any(i.dtype == torch.bool for i in masks), name
        return func(*args, **(kwargs or {}))


class Wrapper(nn.Module):
    """An MLP inside another module."""

    def __init__(self):
        super().__init__()
        self.inner = MLPEnergy(3, (8,))

    def forward(self, x):
        return self.inner(x)


class NoKernel:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def captured(monkeypatch):
    """Makes fastebm believe that this CPU is a GPU that captures. Kernels do nothing: their interpreter reads values.

    Internal names are replaced because no CPU captures. test_gpu_graphs.py captures on a GPU.
    """
    pytest.importorskip("triton")
    from fastebm import tracing
    from fastebm.backends import fused
    from fastebm.driver import langevin_sample, run

    for module in (tracing, langevin_sample, run, op):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    monkeypatch.setattr(fused.resident, "langevin_resident", NoKernel())
    monkeypatch.setattr(fused.update, "langevin_update", NoKernel())
    return NoWaiting()


CAPTURED = {
    "mlp": (lambda: MLPEnergy(3, (8,), spectral_norm=True), {}),
    "sum": (every_term, {"labels": LABELS}),
    "module": (lambda: nn.Sequential(MLPEnergy(3, (8,)), nn.Softplus()), {}),
    "wrapper": (Wrapper, {}),
}


@pytest.mark.parametrize(
    "options", [{"x": True}, {"x": False, "clamp": (-torch.rand(3), 1.0)}], ids=["init", "uniform start"]
)
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_call_waits_for_nothing(name, options, captured, monkeypatch):
    make, given = CAPTURED[name]
    given = dict(given, **options)
    given.update({"init": torch.randn(5, 3)} if given.pop("x") else {"batch_size": 5})
    given.update(step_size=torch.rand(4), noise_scale=torch.rand(5, 1), frozen=torch.rand(5, 3) < 0.5, steps=4)
    tensors = {"seed": torch.tensor([3]), "first_step": torch.tensor([7]), "out": torch.empty(5, 3)}
    energy = make()
    with captured:
        _, info = langevin_sample(
            energy, 3, backend="triton", on_nonfinite="ignore", return_info=True, **given, **tensors
        )
    assert info.path == ("autograd" if name == "module" else "resident")
    with pytest.raises(ValueError, match="only kernels can run"):
        langevin_sample(energy, 3, backend="torch", on_nonfinite="ignore", **given, **tensors)
    with pytest.raises(ValueError, match="nothing can wait"):
        langevin_sample(energy, 3, backend="triton", **given, **tensors)


def test_captured_calls_that_could_not_be_replayed_are_refused(captured):
    options = {"backend": "triton", "batch_size": 5, "steps": 4, "step_size": 0.1, "on_nonfinite": "ignore"}
    for seed in (None, 0):
        with pytest.raises(ValueError, match="each replay repeat the same noise"):
            langevin_sample(MLPEnergy(3, (8,)), seed=seed, **options)
    with pytest.raises(ValueError, match="every tensor must be on cpu, got one on meta"):
        langevin_sample(MLPEnergy(3, (8,)), seed=torch.tensor([3], device="meta"), **options)
