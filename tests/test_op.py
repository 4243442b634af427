"""The operator of torch.library, and langevin_sample inside torch.compile."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from fastebm import (
    ChainPool,
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    NonFiniteError,
    SumEnergy,
    contrastive_divergence_loss,
    langevin_sample,
)
from fastebm.backends import op
from fastebm.energies import Activation
from fastebm.rng import Stream
from fastebm.targets.description import describe

OPTIONS = {"step_size": 0.1, "noise_scale": 0.5, "steps": 5}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
# inductor takes up to half a minute a test
every_compiler = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)


def energies():
    torch.manual_seed(1)
    return {
        "plain": MLPEnergy(2, (16, 9)),
        "dropout": MLPEnergy(2, (16, 9), "elu", dropout=0.3),
        "spectral": MLPEnergy(2, (16, 9), "tanh", spectral_norm=True),
        "weight": nn.Sequential(
            parametrizations.weight_norm(nn.Linear(2, 8)), nn.LeakyReLU(0.2), nn.Linear(8, 1, bias=False)
        ),
        "old norms": nn.Sequential(weight_norm(nn.Linear(2, 8)), nn.GELU("tanh"), spectral_norm(nn.Linear(8, 1))),
        "nested": nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(2, 8), nn.Softplus(2.0)), nn.Linear(8, 1)),
    }


class Counting:
    """A backend that counts how often something was compiled."""

    def __init__(self, inner="aot_eager"):
        self.inner, self.n = torch._dynamo.lookup_backend(inner), 0

    def __call__(self, graph, inputs):
        self.n += 1
        return self.inner(graph, inputs)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def same(a, b):
    assert torch.equal(a, b), (a - b).abs().max()


# -- the operators by themselves


def classifier():
    torch.manual_seed(2)
    return ClassifierEnergy(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)))


def every_term(labels=False):
    """One of all that a description may hold."""
    torch.manual_seed(3)
    terms = [MLPEnergy(3, (8, 4), Activation("leaky_relu", 0.2)), classifier(), GaussianEnergy(0.5, 2.0)]
    terms += [GaussianEnergy(torch.randn(3), torch.rand(3) + 1), nn.Linear(3, 1), nn.Linear(3, 1, bias=False)]
    return SumEnergy([*terms, SumEnergy([MLPEnergy(3, (8,)), nn.Linear(3, 1)], [0.3, 0.2])], torch.rand(7) + 0.1)


def arguments(
    energy=None, x=True, labels=None, frozen=None, rule=None, grads=False, steps=4, thin=0, telemetry=False,
    path="tiles", precision="ieee", on_nonfinite="raise",
):  # fmt: skip
    description = describe(energy or MLPEnergy(3, (8, 4), Activation("leaky_relu", 0.2)), labels=labels is not None)
    n, mlps = 5, description.mlps
    return (
        torch.randn(n, 3 if x else 0),
        torch.tensor([-7]),
        torch.arange(n),
        torch.zeros(n, dtype=torch.int64),
        labels,
        frozen,
        [w.clone().requires_grad_(grads) for mlp in mlps for w in mlp.weights],
        [b if i > 0 else None for mlp in mlps for i, b in enumerate(mlp.biases)],
        op.encode_networks(mlps),
        description.scales,
        description.curvature,
        description.mean,
        description.linear,
        description.constant,
        *op.encode_sampler(rule or Langevin(0.1, 0.3)),
        steps,
        thin,
        telemetry,
        path,
        precision,
        on_nonfinite,
    )


LABELS = torch.tensor([0, 4, 1, 1, 2])
CASES = {
    "plain": {},
    "uniform start": {"x": False, "rule": Langevin(0.1, 0.3, 0.5, (-1.0, 1.0))},
    "a value a chain": {"rule": Langevin(torch.rand(5, 1) + 0.1, torch.rand(4)), "on_nonfinite": "reinit"},
    "gradients": {"on_nonfinite": "ignore", "grads": True},
    "frozen": {"frozen": torch.tensor([[True, False, True]]), "on_nonfinite": "reinit", "telemetry": True},
    "bounds": {"rule": Langevin(0.1, 0.3, None, (-torch.rand(3), 1.0), 0.5), "thin": 2, "telemetry": True},
    "sum": {"energy": every_term(), "thin": 1},
    "labels": {"energy": every_term(), "labels": LABELS},
    "kernel": {"path": "resident", "precision": "bf16x3", "telemetry": True, "thin": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    if case == "kernel":
        pytest.importorskip("triton")
    torch.library.opcheck(torch.ops.fastebm.langevin.default, arguments(**CASES[case]))


@pytest.mark.parametrize("v", [True, False])
def test_opcheck_of_normalised_weights(v):
    w = torch.randn(4, 3)
    u = torch.randn(4) if v else torch.rand(4, 1)
    torch.library.opcheck(torch.ops.fastebm.normalised_weight.default, (w, u, torch.randn(3) if v else None, 0))


def test_the_operator_leaves_its_inputs():
    args = arguments()
    before = copy.deepcopy(args)
    out = torch.ops.fastebm.langevin(*args)
    for old, new in zip(before, args, strict=True):
        if isinstance(old, torch.Tensor):
            same(old, new)
    assert out[0].data_ptr() != args[0].data_ptr()


def test_opcheck_of_gaussian_and_linear_terms():
    zero = torch.zeros(())
    gaussians = [torch.rand(()), torch.tensor(0.5), torch.tensor(2.0), torch.rand(()), torch.randn(3), torch.rand(3)]
    linears = [torch.rand(()), torch.randn(1, 3)]
    for arguments in [(gaussians, linears, [None]), (gaussians[:3], [], []), ([], linears, [torch.randn(1)])]:
        torch.library.opcheck(torch.ops.fastebm.quadratic.default, (*arguments, zero, 3))


def test_networks_round_trip():
    description = describe(every_term(), labels=True)
    mlps = description.mlps
    weights, biases = ([v for mlp in mlps for v in getattr(mlp, name)] for name in ("weights", "biases"))
    again = op._decode_networks(op.encode_networks(mlps), weights, biases)
    assert [(m.activations, m.head) for m in again] == [(m.activations, m.head) for m in mlps]
    for a, b in zip(again, mlps, strict=True):
        assert all(v is w for v, w in zip((*a.weights, *a.biases), (*b.weights, *b.biases), strict=True))


def test_rules_round_trip():
    step, low = torch.rand(4), -torch.rand(3)
    rule = op._decode_sampler(*op.encode_sampler(Langevin(step, 0.3, 0.5, (low, 1.0), 2)))
    assert rule.step_size is step
    assert rule.clamp == (low, 1.0)
    assert (rule.noise_scale, rule.grad_clip, rule.grad_norm_clip) == (0.3, 0.5, 2.0)
    assert (rule.noise_first, rule.clamp_noise) == (False, False)
    assert op._decode_sampler(*op.encode_sampler(Langevin())).clamp is None
    for order in ({"noise_first": True}, {"noise_first": True, "clamp_noise": True}):
        rule = op._decode_sampler(*op.encode_sampler(Langevin(**order)))
        assert {name: getattr(rule, name) for name in order} == order


# -- langevin_sample in torch.compile


@every_compiler
@pytest.mark.parametrize("name", energies())
def test_the_same_bits(name, backend, untouched):
    energy = energies()[name].train()
    x = torch.randn(5, 2)

    def from_init(x):
        return langevin_sample(energy, init=x, seed=3, return_info=True, **OPTIONS)

    def from_noise(energy):
        return langevin_sample(energy, 2, batch_size=7, seed=2**63 + 5, clamp=(-0.5, 0.9), **OPTIONS)

    with untouched(energy, x):
        samples, info = compiled(from_init, backend)(x)
        others = compiled(from_noise, backend)(energy)
    expected, expected_info = from_init(x)
    same(samples, expected)
    same(info.energies, expected_info.energies)
    same(info.first_bad_step, expected_info.first_bad_step)
    for field in ("backend", "path", "precision", "why_not_fused", "temperature"):
        assert getattr(info, field) == getattr(expected_info, field)
    assert int(info.seed) == 3
    assert not samples.requires_grad
    same(others, from_noise(energy))


@every_compiler
@pytest.mark.parametrize("noise_first", [False, True])
def test_the_same_bits_with_every_option(backend, noise_first):
    energy = MLPEnergy(3, (8,)).double()
    steps = torch.linspace(0.1, 0.05, 4)
    noise = torch.rand(6, 1)
    x = torch.randn(6, 3, dtype=torch.float64)

    def f(x, steps, noise):
        return langevin_sample(
            energy, init=x, steps=4, step_size=steps, noise_scale=noise, clamp=(-1, 1), grad_clip=0.1, seed=-1,
            first_chain=7, first_step=2**31, precision="tf32", backend="torch", noise_first=noise_first,
        )  # fmt: skip

    same(compiled(f, backend)(x, steps, noise), f(x, steps, noise))


SUMS = {
    "logsumexp": (classifier, {}),
    "class": (classifier, {"labels": LABELS}),
    "sum": (every_term, {}),
    "sum and labels": (every_term, {"labels": LABELS}),
}


@every_compiler
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "logsumexp")) for n in SUMS])
def test_the_same_bits_of_heads_and_sums(name, backend, untouched):
    make, given = SUMS[name]
    energy, x = make(), torch.randn(5, 3)
    options = dict(OPTIONS, steps=6, seed=3, return_info=True, **given)
    options.update(frozen=torch.rand(5, 3) < 0.3, clamp=(-torch.rand(3), 1.0), grad_norm_clip=0.5)

    def last(x):
        return langevin_sample(energy, init=x, **options)

    def trajectory(x):
        return langevin_sample(energy, init=x, return_trajectory=True, thin=3, **options)

    expected, expected_info = last(x)
    with untouched(energy, x):
        samples, info = compiled(last, backend)(x)
        states, _ = compiled(trajectory, backend)(x)
    same(samples, expected)
    for field in ("energies", "first_bad_step", "grad_norm", "clipped", "clamped"):
        same(getattr(info, field), getattr(expected_info, field))
    assert states.shape == (5, 2, 3)
    same(states, trajectory(x)[0])


@pytest.mark.slow
def test_terms_are_never_stale():
    energy = every_term()
    counting = Counting()
    f = compiled(lambda: langevin_sample(energy, batch_size=4, seed=3, **OPTIONS), counting)
    for _ in range(3):
        same(f(), langevin_sample(energy, batch_size=4, seed=3, **OPTIONS))
        with torch.no_grad():
            for value in (*energy.parameters(), *energy.buffers()):
                value.mul_(1.1)
    assert counting.n == 1


def test_restarted_chains_and_frozen_coordinates():
    energy = SumEnergy([MLPEnergy(3, (8,))], [1e30])
    x, frozen = torch.randn(4, 3), torch.tensor([True, False, False])

    def f(x):
        return langevin_sample(
            energy, init=x, frozen=frozen, seed=0, steps=3, step_size=1e30, on_nonfinite="reinit", return_info=True
        )

    samples, info = compiled(f)(x)
    expected, expected_info = f(x)
    same(samples, expected)
    same(info.energies, expected_info.energies)
    assert bool((info.first_bad_step >= 0).any())
    same(samples[:, 0], x[:, 0])


def test_images():
    energy = nn.Sequential(nn.Flatten(), MLPEnergy(6, (8,)))
    x, frozen = torch.randn(4, 2, 3), torch.rand(2, 3) < 0.5

    def f(x):
        return langevin_sample(energy, init=x, frozen=frozen, seed=0, return_trajectory=True, **OPTIONS)

    same(compiled(f)(x), f(x))


def test_a_pool_runs_uncompiled():
    energy = MLPEnergy(3, (8,))
    pools = ChainPool(10, 3, seed=0), ChainPool(10, 3, seed=0)

    def f(pool):
        return pool.sample(energy, 4, Langevin(0.1, 0.5), 3)[0] + 1

    same(torch.compile(f, backend="aot_eager")(pools[0]), f(pools[1]))
    same(pools[0].states, pools[1].states)


def test_the_same_bits_on_triton():
    pytest.importorskip("triton")
    energy = MLPEnergy(3, (8,))

    def f():
        return langevin_sample(energy, batch_size=5, seed=1, backend="triton", return_info=True, **OPTIONS)

    samples, info = compiled(f)()
    same(samples, f()[0])
    assert (info.backend, info.path, info.precision) == ("triton", "resident", "bf16x3")


@every_compiler
def test_weights_are_never_stale_and_nothing_is_compiled_twice(backend):
    energy = energies()["spectral"]
    counting = Counting(backend)
    f = compiled(lambda: langevin_sample(energy, batch_size=4, seed=3, **OPTIONS), counting)

    def check():
        same(f(), langevin_sample(energy, batch_size=4, seed=3, **OPTIONS))

    check()
    optimiser = torch.optim.SGD(energy.parameters(), lr=0.5)
    energy(torch.randn(8, 2)).sum().backward()  # a power iteration too
    optimiser.step()
    check()
    energy.load_state_dict({k: v + 0.1 for k, v in energy.state_dict().items()}, assign=True)
    check()
    energy[0].parametrizations.weight.original.data = torch.randn(16, 2)
    check()
    assert counting.n == 1


def test_what_a_machine_is_is_a_constant():
    from fastebm.backends import choose as choosing
    from fastebm.backends import compiling  # noqa: F401 (marks them)

    assert choosing._capability._dynamo_marked_constant
    assert choosing._has_triton._dynamo_marked_constant
    assert choosing.default_precision._dynamo_marked_constant

    @torch.compiler.assume_constant_result
    def capability(device):
        assert device == torch.device("cpu")
        torch._dynamo.graph_break()
        return 90

    assert int(compiled(lambda x: x * capability(x.device))(torch.ones(()))) == 90


def test_weights_changed_in_the_same_graph():
    energy = MLPEnergy(2, (8,))

    def f(delta):
        with torch.no_grad():
            for p in energy.parameters():
                p.add_(delta)
        return langevin_sample(energy, batch_size=4, seed=3, **OPTIONS)

    twin = copy.deepcopy(energy)
    samples = compiled(f)(torch.tensor(0.1))
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(torch.tensor(0.1))
    same(samples, langevin_sample(twin, batch_size=4, seed=3, **OPTIONS))


@pytest.mark.slow
def test_structure_is_never_stale():
    def f(energy):
        return langevin_sample(energy, batch_size=4, seed=3, **OPTIONS)

    counting = Counting()
    g = compiled(f, counting)
    energy = MLPEnergy(2, (8,), Activation("leaky_relu", 0.2))
    others = [copy.deepcopy(energy), MLPEnergy(2, (8,), "relu"), MLPEnergy(2, (8, 8)), MLPEnergy(2, (8,), dropout=0.1)]
    for e in [energy, *others]:
        same(g(e), f(e))
    energy[1].negative_slope = 0.7
    same(g(energy), f(energy))
    energy[1] = nn.Tanh()
    same(g(energy), f(energy))
    energy.eval()
    n = counting.n
    same(g(others[0]), f(others[0]))  # neither the module nor its mode matters
    assert counting.n == n


def test_a_hook_added_later_is_seen():
    energy = MLPEnergy(2, (8,))

    def f():
        return langevin_sample(energy, 2, batch_size=4, seed=3, **OPTIONS)

    g = torch.compile(f, backend="aot_eager")
    # Without this setting torch.compile takes hooks to stay what they were, here as everywhere.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        same(g(), f())
        energy[2].register_forward_hook(lambda module, args, out: -out)
        same(g(), f())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fresh_noise_without_a_seed(backend):
    energy = MLPEnergy(2, (8,))

    def f():
        options = {"batch_size": 4, **OPTIONS}
        return langevin_sample(energy, **options), langevin_sample(energy, return_info=True, **options)

    counting = Counting(backend)
    g = compiled(f, counting)
    a, (b, info) = g()
    c, _ = g()
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert counting.n == 1
    same(b, langevin_sample(energy, batch_size=4, seed=int(info.seed), **OPTIONS))
    torch.manual_seed(5)
    first = g()[0]
    torch.manual_seed(5)
    same(g()[0], first)
    if backend == "aot_eager":  # inductor has a generator of its own, unless config.fallback_random
        torch.manual_seed(5)
        same(f()[0], first)


@pytest.mark.slow
def test_seeds_and_sizes_that_vary():
    energy = MLPEnergy(2, (8,))

    def f(seed, x, first_step, step_size):
        return langevin_sample(energy, init=x, seed=seed, steps=3, first_step=first_step, step_size=step_size)

    counting = Counting()
    g = compiled(f, counting)
    for seed, n, first_step, step in [(5, 4, 10, 0.1), (6, 5, 13, 0.2), (7, 6, 16, 0.3), (-8, 7, 19, 0.4)]:
        x = torch.randn(n, 2)
        step_size = torch.tensor(step)  # a float that varies is compiled anew for each value
        same(g(seed, x, first_step, step_size), f(seed, x, first_step, step_size))
    assert counting.n <= 3
    n = counting.n
    for seed in (5, 2**40):
        same(g(torch.tensor(seed), x, 19, step_size), f(seed, x, 19, step_size))
    assert counting.n == n + 1


@pytest.mark.slow
@every_compiler
def test_errors_reach_the_caller(backend):
    energy = MLPEnergy(2, (8,), "softplus")
    with torch.no_grad():
        energy[2].weight.fill_(1e38)

    def f(x, **options):
        return langevin_sample(energy, init=x, seed=0, steps=3, step_size=10.0, **options)

    x = torch.randn(4, 2)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="4 of 4 chains are not finite"):
            compiled(f, backend)(x)
    for on_nonfinite in ("ignore", "reinit"):
        same(compiled(f, backend)(x, on_nonfinite=on_nonfinite), f(x, on_nonfinite=on_nonfinite))
    with pytest.raises(ValueError, match="clamp needs lo < hi in every dim"):
        compiled(lambda lo: f(x, clamp=(lo, 1.0)), backend)(torch.tensor([0.0, 2.0]))
    heads, one = classifier(), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\)"):
        compiled(lambda y: langevin_sample(heads, init=one, labels=y, **OPTIONS), backend)(torch.tensor([5]))
    with pytest.raises(ValueError, match="init must be finite"):
        compiled(f, backend)(x * torch.inf)
    good = MLPEnergy(2, (8,))
    with pytest.raises(ValueError, match="step_size must be finite and > 0"):
        compiled(lambda s: langevin_sample(good, batch_size=4, step_size=s, steps=2), backend)(torch.tensor([0.1, -1]))


def test_errors_of_python_arguments():
    energy = MLPEnergy(2, (8,))
    f = compiled(lambda: langevin_sample(energy, batch_size=-1))
    with pytest.raises(Exception, match="batch_size must be >= 0"):  # torch._dynamo wraps what is raised while tracing
        f()


@every_compiler
@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("inside", [True, False])
def test_in_other_modes(context, inside, backend):
    energy = energies()["spectral"]
    x = torch.randn(5, 2)

    def f(x):
        return langevin_sample(energy, init=x, seed=3, **OPTIONS)

    expected = f(x)

    def g(x):
        with context():
            return f(x)

    if inside:
        same(compiled(g, backend)(x), expected)
    else:
        with context():
            same(compiled(f, backend)(x), expected)


@every_compiler
def test_a_training_step(backend):
    energy = energies()["dropout"].eval()
    twin = copy.deepcopy(energy)
    data = torch.randn(6, 2)

    def loss(energy, data):
        negatives = langevin_sample(energy, init=data, seed=3, **OPTIONS)
        return contrastive_divergence_loss(energy(data), energy(negatives))

    for f, e in ((compiled(loss, backend), energy), (loss, twin)):
        f(e, data).backward()
    for p, q in zip(energy.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_out_may_be_init():
    energy = MLPEnergy(2, (8,))
    x = torch.randn(5, 2)

    def f(x):
        return langevin_sample(energy, init=x, out=x, seed=3, **OPTIONS)

    expected = f(x.clone())
    compiled(f)(x)
    same(x, expected)


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return (x * self.w).cos().sum(1)


@pytest.mark.parametrize("case", ["module", "generator", "reference", "wrapper"])
def test_what_does_not_compile_in_whole_runs_uncompiled(case):
    options = dict(OPTIONS, seed=3)
    energy = MLPEnergy(2, (8,))
    if case == "module":
        energy = Cosine()
    elif case == "wrapper":
        inner = energy

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x)

        energy = Wrapper()
    elif case == "generator":
        options = dict(OPTIONS, generator=torch.Generator())
    else:
        options["backend"] = "reference"

    def f(x):
        return langevin_sample(energy, init=x * 2, **options) + 1

    x = torch.randn(4, 2)
    if case == "generator":
        options["generator"].manual_seed(1)
    found = torch.compile(f, backend="aot_eager")(x)
    if case == "generator":
        options["generator"].manual_seed(1)
    same(found, f(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compiles in whole for MLP energies only"):
        compiled(f)(x)


def test_streams_agree_with_tensor_seeds():
    from fastebm.rng import normal

    chains = torch.arange(5)
    for seed in (3, -3, 2**40):
        same(
            normal(torch.tensor([seed]), Stream.LANGEVIN, chains, 2, 6),
            normal(seed, Stream.LANGEVIN, chains, 2, 6),
        )


# -- CUDA graph capture: the rule, with a device that only says that it captures


def test_capture_rule():
    from fastebm.driver import arguments as sampling

    tensor, cpu = torch.zeros(1, dtype=torch.int64), torch.device("cpu")
    sampling.check_capture("ignore", tensor, 0, (0.1, 0.2, tensor), cpu)
    sampling.check_capture("ignore", 0, tensor, (None, torch.ones(3)), cpu)
    for arguments, message in [
        (("raise", tensor, 0, (), cpu), "nothing can wait for the device"),
        (("ignore", 0, 0, (), cpu), "each replay repeat the same noise"),
        (("ignore", None, 0, (), cpu), "each replay repeat the same noise"),
        (("ignore", tensor, 0, (torch.ones(3),), torch.device("cuda")), "every tensor must be on cuda"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampling.check_capture(*arguments)


class NoWaiting(TorchDispatchMode):
    """Fails where a device would be waited for: values read, shapes that depend on them, copies from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "lift_fresh"), name
        masks = [i for i in args[1] if i is not None] if name in ("index", "index_put", "index_put_") else []
        assert not any(i.dtype == torch.bool for i in masks), name
        return func(*args, **(kwargs or {}))


class Wrapper(nn.Module):
    """An MLP in a class of its own."""

    def __init__(self):
        super().__init__()
        self.inner = MLPEnergy(3, (8,))

    def forward(self, x):
        return self.inner(x)


class NoKernel:
    """Where a GPU's kernel would run."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def captured(monkeypatch):
    """A CPU that takes itself for a GPU that captures; without kernels, whose interpreter reads values."""
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


@pytest.mark.parametrize("options", [{"x": True}, {"x": False, "clamp": (-torch.rand(3), 1.0)}], ids=str)
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


def test_tensors_of_seed_and_step_outside_of_compile():
    energy = MLPEnergy(3, (8,))
    expected = langevin_sample(energy, batch_size=4, seed=2**63 + 1, first_step=12, **OPTIONS)
    seed, step = torch.tensor(1 - 2**63), torch.tensor([12])
    same(langevin_sample(energy, batch_size=4, seed=seed, first_step=step, **OPTIONS), expected)
    same(
        compiled(lambda s, t: langevin_sample(energy, batch_size=4, seed=s, first_step=t, **OPTIONS))(seed, step),
        expected,
    )


def test_a_forked_process_compiles_too(monkeypatch):
    """There a call of PyTorch's threads stands before it, which can't be traced."""
    monkeypatch.setattr("fastebm.threads._forked", True)
    energy, x = MLPEnergy(3, (16,)), torch.randn(5, 3)

    def f(x):
        return langevin_sample(energy, init=x, seed=3, **OPTIONS)

    same(torch.compile(f, fullgraph=True, backend="eager")(x), f(x))
