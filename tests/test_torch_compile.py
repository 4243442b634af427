"""langevin_sample inside torch.compile: the same bits, current weights, and nothing is compiled twice."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from compiled_calls import LABELS, OPTIONS, Counting, classifier, compiled, every_compiler, every_term, same
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from fastebm import (
    Activation,
    ChainPool,
    Langevin,
    MLPEnergy,
    NonFiniteError,
    SumEnergy,
    contrastive_divergence_loss,
    langevin_sample,
)

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


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


@every_compiler
@pytest.mark.parametrize(
    "name",
    # other quick tests compile plain MLPs
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("spectral", "old norms"))) for n in energies()],
)
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


def test_reinitialised_chains_and_frozen_coordinates():
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
    energy(torch.randn(8, 2)).sum().backward()  # its forward pass runs a power iteration too
    optimiser.step()
    check()
    energy.load_state_dict({k: v + 0.1 for k, v in energy.state_dict().items()}, assign=True)
    check()
    energy[0].parametrizations.weight.original.data = torch.randn(16, 2)
    check()
    assert counting.n == 1


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
    same(g(others[0]), f(others[0]))  # same structure: another module, in another mode
    assert counting.n == n


def test_a_hook_added_later_is_seen():
    energy = MLPEnergy(2, (8,))

    def f():
        return langevin_sample(energy, 2, batch_size=4, seed=3, **OPTIONS)

    g = torch.compile(f, backend="aot_eager")
    # by default torch.compile assumes that hooks do not change
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
    if backend == "aot_eager":  # inductor has its own generator, unless config.fallback_random is set
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
        step_size = torch.tensor(step)  # each new value of a float would be compiled again
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
    with pytest.raises(Exception, match="batch_size must be >= 0"):  # torch._dynamo wraps errors raised while tracing
        f()


def bf16_autocast():
    return torch.autocast("cpu", torch.bfloat16)


@every_compiler
@pytest.mark.parametrize(
    ("context", "inside"),
    [
        (torch.no_grad, True),
        (torch.inference_mode, False),
        (bf16_autocast, True),
        pytest.param(torch.no_grad, False, marks=pytest.mark.slow),
        pytest.param(torch.inference_mode, True, marks=pytest.mark.slow),
        pytest.param(bf16_autocast, False, marks=pytest.mark.slow),
    ],
)
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
def test_calls_that_can_not_be_traced_run_uncompiled(case):
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


def test_tensors_of_seed_and_step_outside_of_compile():
    energy = MLPEnergy(3, (8,))
    expected = langevin_sample(energy, batch_size=4, seed=2**63 + 1, first_step=12, **OPTIONS)
    seed, step = torch.tensor(1 - 2**63), torch.tensor([12])
    same(langevin_sample(energy, batch_size=4, seed=seed, first_step=step, **OPTIONS), expected)
    same(
        compiled(lambda s, t: langevin_sample(energy, batch_size=4, seed=s, first_step=t, **OPTIONS))(seed, step),
        expected,
    )


FORKED = """
import os, torch, fastebm
energy, x = fastebm.MLPEnergy(3, (16,)), torch.randn(5, 3)

def f(x):
    return fastebm.langevin_sample(energy, init=x, seed=3, steps=5, step_size=0.1)

expected = f(x)
if (child := os.fork()) == 0:
    found = torch.compile(f, fullgraph=True, backend="eager")(x)
    os._exit(0 if torch.equal(found, expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_compiles_too():
    """After a fork, work is shared by other threads, in code that torch.compile can't trace."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=300)
