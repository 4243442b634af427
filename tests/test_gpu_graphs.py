"""CUDA graphs and torch.compile on a GPU: replays and compiled calls give the samples of plain calls."""

import pytest
import torch
from paths import make_mlp
from torch import nn

from fastebm import SumEnergy, langevin_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEED = 0x9E3779B97F4A7C15


# -- CUDA graphs and torch.compile ----------------------------------------------------------------------------


def conv():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 64, 1)]
    return nn.Sequential(*layers).cuda(), (1, 8, 8)


def too_wide():
    """An MLP that is too wide for the fused kernel: its closed-form gradient uses library products."""
    return make_mlp(64, [1024, 1024]).cuda(), (64,)


GRAPHED = {
    "resident": lambda: (make_mlp(2, [128, 128]).cuda(), (2,)),
    "streaming": lambda: (make_mlp(784, [256, 128]).cuda(), (784,)),
    "sum": lambda: (SumEnergy([make_mlp(3, [16]), make_mlp(3, [32])], [0.5, 2.0]).cuda(), (3,)),
    "products": too_wide,
    "autograd": conv,
}
IN_GRAPHS = {"steps": 20, "step_size": 0.1, "noise_scale": 1.0, "clamp": (-3.0, 3.0), "on_nonfinite": "ignore"}


def captured(call):
    """A graph of the call, and the tensors that it writes. A first call compiles the kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("given", [True, False], ids=["init", "uniform start"])
@pytest.mark.parametrize("name", GRAPHED)
def test_replays_use_the_current_seed_and_step(name, given):
    energy, shape = GRAPHED[name]()
    seed, step = torch.tensor([SEED - 2**64], device="cuda"), torch.tensor([7], device="cuda")
    start_of = {"init": torch.randn(100, *shape, device="cuda")} if given else {"batch_size": 100}
    options = dict(IN_GRAPHS, **start_of)

    def call(seed=seed, step=step):
        return langevin_sample(energy, shape, seed=seed, first_step=step, return_info=True, **options)

    graph, (moved, info) = captured(call)
    assert (info.backend, info.path) == ("triton", name) or name == "sum"
    seen = []
    for _ in range(3):
        graph.replay()
        expected, expected_info = call(int(seed), int(step))
        if name in ("products", "autograd"):  # cuBLAS guarantees the same bits on one stream only
            torch.testing.assert_close(moved, expected, rtol=0, atol=1e-3)
        else:
            assert torch.equal(moved, expected)
            for field in ("energies", "first_bad_step", "grad_norm", "clipped", "clamped"):
                assert torch.equal(getattr(info, field), getattr(expected_info, field))
        assert not any(torch.equal(moved, before) for before in seen)
        seen.append(moved.clone())
        graph.replay()  # same seed and step, same noise
        torch.testing.assert_close(moved, seen[-1], rtol=0, atol=1e-3 if name in ("products", "autograd") else 0)
        step += 20
        seed += 1


def test_a_graph_can_continue_its_own_chains():
    """With out= and init= the same tensor, and a step counter in the graph, each replay continues the chains."""
    energy, shape = GRAPHED["resident"]()
    x, step = torch.randn(100, *shape, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    first = x.clone()

    def call():
        langevin_sample(energy, init=x, out=x, seed=5, first_step=step, **IN_GRAPHS)
        step.add_(20)

    graph, _ = captured(call)
    x.copy_(first)
    step.zero_()
    for _ in range(3):
        graph.replay()
    options = {k: v for k, v in IN_GRAPHS.items() if k != "steps"}
    assert torch.equal(x, langevin_sample(energy, init=first, seed=5, steps=60, **options))


def test_captures_that_could_not_be_replayed_are_refused():
    energy, _shape = GRAPHED["resident"]()
    x, seed = torch.randn(10, 2, device="cuda"), torch.tensor([3], device="cuda")

    def capture(options):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            seed.add_(0)  # a graph must not be empty
            langevin_sample(energy, init=x, **{**IN_GRAPHS, **options})

    for options, message in [
        ({"on_nonfinite": "raise", "seed": seed}, "nothing can wait"),
        ({"seed": 3}, "each replay repeat the same noise"),
        ({"seed": seed.cpu()}, "every tensor must be on cuda"),
        ({"seed": seed, "backend": "torch"}, "only kernels can run"),
    ]:
        with pytest.raises(ValueError, match=message):
            capture(options)
    torch.cuda.synchronize()
    assert langevin_sample(energy, init=x, seed=3, **IN_GRAPHS).isfinite().all()


@pytest.mark.parametrize("more", [{}, {"return_trajectory": True, "thin": 10}], ids=["last", "trajectory"])
@pytest.mark.parametrize("make", [conv, too_wide])
def test_recorded_steps_are_the_steps(make, more):
    energy, shape = make()
    x, schedule = torch.randn(100, *shape, device="cuda"), torch.linspace(0.1, 0.01, 40)
    options = {"steps": 40, "step_size": schedule, "noise_scale": 1.0, "seed": SEED, "return_info": True, **more}
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        for _ in range(2):  # a recording serves one call: the second has other weights, elsewhere in memory
            expected, expected_info = langevin_sample(energy, init=x, **options)
            found, info = langevin_sample(energy, init=x, cuda_graph=True, **options)
            assert info.cuda_graph == "recorded"
            assert torch.equal(found, expected)
            for field in ("energies", "first_bad_step", "grad_norm", "clipped", "clamped"):
                assert torch.equal(getattr(info, field), getattr(expected_info, field))
            for p in energy.parameters():
                p.data = p.data * 1.1


class Waits(nn.Module):
    """Reads a value of x on the host."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * (1.0 if x.sum().item() > 0 else 0.5)


def test_a_module_that_waits_is_not_recorded():
    energy, shape = conv()
    options = {"steps": 20, "step_size": 0.1, "seed": 1, "batch_size": 100, "return_info": True}
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        expected, _ = langevin_sample(Waits(energy), shape, **options)
        found, info = langevin_sample(Waits(energy), shape, cuda_graph=True, **options)
        assert "waits for the device" in info.cuda_graph
        assert torch.equal(found, expected)
        assert torch.cuda.get_sync_debug_mode() == 0
        _, info = langevin_sample(energy, shape, cuda_graph=True, **options)
        assert info.cuda_graph == "recorded"


def test_memory_stays_flat_over_recordings():
    energy, shape = conv()

    def memory():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for i in range(30):
        if i == 3:
            before = memory()
        langevin_sample(energy, shape, batch_size=100, steps=20, step_size=0.1, seed=i, cuda_graph=True)
    assert memory() == before


@pytest.mark.parametrize("name", GRAPHED)
def test_compiled(name):
    """aot_eager, because inductor needs a C++ compiler."""
    energy, shape = GRAPHED[name]()
    x = torch.randn(100, *shape, device="cuda")

    def f(x):
        return langevin_sample(energy, init=x, seed=3, return_info=True, **IN_GRAPHS)

    found, info = torch.compile(f, fullgraph=name != "autograd", backend="aot_eager")(x)
    expected, expected_info = f(x)
    assert (info.backend, info.path, info.precision) == ("triton", expected_info.path, expected_info.precision)
    if name == "autograd":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    else:
        assert torch.equal(found, expected)
        assert torch.equal(info.energies, expected_info.energies)
