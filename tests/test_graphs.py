"""Steps recorded and replayed as a CUDA graph: the logic, with a fake recorder that needs no GPU."""

import threading
from contextlib import contextmanager

import pytest
import runs
import torch
from torch import nn

from fastebm import Langevin, MLPEnergy, langevin_sample
from fastebm.backends import Chains, graphs
from fastebm.backends.graphs import MIN_STEPS, WARM_UP, run_steps
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe


class FakeRecorder:
    """Like a CUDA graph: recording a step does not run it, and a replay does."""

    def __init__(self, waits=False, fails=False):
        self.waits, self.fails, self.replays, self.log = waits, fails, 0, []

    @contextmanager
    def aside(self):
        self.log.append("aside")
        yield
        self.log.append("back")

    @contextmanager
    def without_waiting(self):
        self.log.append("no waiting")
        if self.waits:
            raise RuntimeError("called a synchronizing CUDA operation")
        yield

    def record(self, step):
        self.log.append("record")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay():
            self.replays += 1
            step()

        return replay


@pytest.mark.parametrize("steps", [0, 1, MIN_STEPS - 1, MIN_STEPS, 60])
@pytest.mark.parametrize("options", [{}, {"waits": True}, {"fails": True}], ids=str)
def test_every_step_runs_once_and_is_then_checked(steps, options):
    recorder, taken = FakeRecorder(**options), []
    how = run_steps(lambda: taken.append("step"), steps, recorder, taken.append)
    assert taken == [v for t in range(steps) for v in ("step", t)]
    if steps < MIN_STEPS:
        assert "fewer than" in how
        assert recorder.log == []
    elif not options:
        assert (how, recorder.replays) == ("recorded", steps - WARM_UP)
        assert recorder.log == ["aside", "no waiting", "back", "record"]
    else:
        assert ("waits for the device" if "waits" in options else "the recording failed") in how
        assert recorder.replays == 0
        assert ("record" in recorder.log) == ("fails" in options)


def test_errors_of_the_energy_reach_the_caller():
    def step():
        raise ValueError("the energy does not depend on x")

    with pytest.raises(ValueError, match="does not depend"):
        run_steps(step, 60, FakeRecorder(), lambda t: None)


STEPS = MIN_STEPS
RULES = {
    "plain": Langevin(0.1, 0.5),
    "schedule": Langevin(torch.linspace(0.1, 0.01, STEPS), 0.5, clamp=(-1, torch.rand(3)), grad_clip=0.5),
    "one value per chain": Langevin(torch.rand(5, 1) + 0.1, torch.linspace(0.5, 0.1, STEPS), grad_norm_clip=0.3),
    "noise first": Langevin(0.1, 0.5, clamp=(-0.3, 0.4), noise_first=True, clamp_noise=True),
    "explodes": Langevin(torch.logspace(0, 38, STEPS), torch.tensor([[0.1], [1e19], [1e20], [0.2], [1e30]])),
    "explodes, noise first": Langevin(
        torch.logspace(0, 38, STEPS), torch.tensor([[0.1], [1e19], [1e20], [0.2], [1e30]]), noise_first=True
    ),
}


# The interpreter takes seconds a case.
QUICK = (("schedule", "autograd"), ("explodes, noise first", "autograd"), ("schedule", "products"))


@pytest.mark.parametrize(
    ("rule", "path", "options"),
    [
        *(
            pytest.param(rule, path, {}, marks=[] if (rule, path) in QUICK else pytest.mark.slow)
            for path in ("autograd", "products")
            for rule in RULES
        ),
        ("schedule", "autograd", {"waits": True}),
        ("schedule", "products", {"fails": True}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_the_same_bits_as_step_by_step(rule, path, options, device):
    pytest.importorskip("triton")

    torch.manual_seed(0)
    mlp = MLPEnergy(3, (8,)).to(device)
    x, seed = torch.randn(5, 3).to(device), torch.tensor([7], device=device)
    numbers, frozen = torch.arange(5, device=device) + 2**33, torch.rand(5, 3).to(device) < 0.2

    def advance(**more):
        chains = Chains(x.clone(), seed, numbers, numbers * 100 % 997, None, frozen)
        if path == "products":
            return runs.fused_products(describe(mlp), chains, RULES[rule], STEPS, thin=4, telemetry=True, **more)
        energy = Energy(nn.Sequential(mlp, nn.Softplus()).eval(), (3,), torch.float32)
        return runs.fused_module(energy, chains, RULES[rule], STEPS, thin=4, telemetry=True, **more)

    expected, found = advance(), advance(recorder=FakeRecorder(**options))
    assert expected.cuda_graph is None
    assert (found.cuda_graph == "recorded") == (not options)
    for a, b in zip(
        (*found[:4], *found.telemetry.values()), (*expected[:4], *expected.telemetry.values()), strict=True
    ):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert bool((found.first_bad >= 0).any()) == rule.startswith("explodes")


class WaitsOnce(nn.Module):
    """If ``wait``, it waits for the device once, in the last step before the recording."""

    def __init__(self, wait):
        super().__init__()
        self.calls, self.wait = 0, wait

    def forward(self, x):
        self.calls += 1
        if self.wait and self.calls == WARM_UP:
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.cos(x).sum(dim=1)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("noise_first", [False, True])
def test_a_step_that_raises_has_moved_nothing(noise_first, device):
    """With noise_first, half of the step ran before the error and may have stopped chains: it must run again."""
    pytest.importorskip("triton")

    noise = torch.full((STEPS,), 0.5)
    noise[WARM_UP - 1] = 3e38
    rule = Langevin(1.0, noise, noise_first=noise_first)
    x, numbers = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(device), torch.arange(40).to(device)
    expected, found = (
        runs.fused_module(
            Energy(WaitsOnce(wait), (3,), torch.float32), Chains(x.clone(), 7, numbers, numbers), rule, STEPS, thin=1,
            recorder=FakeRecorder() if wait else None,
        )
        for wait in (False, True)
    )  # fmt: skip
    assert "a step waits for the device" in found.cuda_graph
    assert 0 < int((expected.first_bad == WARM_UP - 1).sum()) < 40
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("module", [MLPEnergy(3, (8,)), nn.Sequential(MLPEnergy(3, (8,)), nn.Softplus())])
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_graphs.py has the reasons on a GPU")
def test_why_nothing_is_recorded(backend, module):
    options = {"batch_size": 4, "steps": 20, "step_size": 0.1, "seed": 0, "backend": backend, "return_info": True}
    x, info = langevin_sample(module, 3, cuda_graph=True, **options)
    expected, plain = langevin_sample(module, 3, **options)
    assert torch.equal(x, expected)
    assert plain.cuda_graph is None
    if backend != "triton":
        assert "plain PyTorch" in info.cuda_graph
    elif info.path == "autograd":
        assert "need a CUDA device" in info.cuda_graph
    else:
        assert "one launch" in info.cuda_graph


def test_recordings_of_a_thread_share_one_stream_per_device(monkeypatch):
    """cuBLAS keeps a workspace for each new stream forever: 30 recordings took 2 GB."""
    made = []

    def make(index):
        made.append(index)
        return object()

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(graphs, "_kept", threading.local())  # private: without a GPU there are no streams to count
    names = ("cuda", "cuda:0", "cuda:1")

    def streams():
        return [graphs.CudaRecorder(torch.device(name)).stream for name in names]

    first, again = streams(), streams()
    assert again == first
    assert first[0] is first[1] is not first[2]
    assert made == [0, 1]
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.extend(streams()))  # two captures must not share a stream
    thread.start()
    thread.join()
    assert not set(elsewhere) & set(first)
