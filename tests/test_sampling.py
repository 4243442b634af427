"""langevin_sample: what it refuses and how, what it leaves alone, and what its options mean."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import Launch
from torch import nn

import fastebm
from fastebm import Langevin, MLPEnergy, NonFiniteError, langevin_sample
from fastebm.backends import Chains
from fastebm.rng import Stream, normal, uniform
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

DIM = 3
BACKENDS = ["reference", "torch", "triton"]
# The interpreter computes in NumPy, which warns where a GPU overflows in silence.
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
NAN, INF = math.nan, math.inf


@pytest.fixture
def home(backend, device) -> str:
    """Where a backend runs in these tests."""
    return device if backend == "triton" else "cpu"


class Of(nn.Module):
    """E(x) = f(x): an energy that no one can read as an MLP."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f, self.weight = f, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.f(self.weight * x)


def quadratic() -> nn.Module:
    return Of(lambda x: 0.5 * x.flatten(1).square().sum(1))


def mlp() -> nn.Module:
    """In train mode, with all that must be left alone: dropout, spectral norm's buffers, a mixture of modes."""
    model = MLPEnergy(DIM, (9, 8), "silu", dropout=0.3, spectral_norm=True).train()
    model[3].eval()
    return model


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 1)
    )


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
def test_bad_input_is_refused_in_words_and_harms_nothing(backend, make, options, error, match, untouched, device):
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


# -- what is left alone -----------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("make", [mlp, conv, quadratic])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_callers_things_are_left_bit_for_bit(backend, home, make, frozen, untouched):
    model = make().to(home).requires_grad_(not frozen)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    init = torch.randn(5, 1, 8, 8, device=home) if make is conv else torch.randn(5, DIM, device=home)
    init.requires_grad_()
    with untouched(model, init):
        samples = langevin_sample(model, init=init, steps=3, seed=2, backend=backend)
    assert not samples.requires_grad
    assert init.grad is None
    assert samples.data_ptr() != init.data_ptr()
    assert not torch.equal(samples, init)


@every_backend
@pytest.mark.parametrize("make", [mlp, conv])
def test_contexts_of_the_caller_change_nothing(backend, home, make):
    model = make().to(home)
    shape = (1, 8, 8) if make is conv else (DIM,)
    init = torch.randn(5, *shape, device=home)

    def sample() -> torch.Tensor:
        return langevin_sample(model, init=init, steps=3, seed=2, backend=backend)

    plain = sample()
    assert plain.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(sample(), plain)
    with torch.inference_mode():
        assert torch.equal(sample(), plain)
    with torch.autocast(home, dtype=torch.bfloat16):
        assert torch.equal(sample(), plain)


def test_samples_taken_in_inference_mode_are_a_good_start():
    with torch.inference_mode():
        init = langevin_sample(mlp(), batch_size=4, steps=1, seed=0)
    assert langevin_sample(mlp(), init=init, steps=1, seed=0).shape == (4, DIM)


@every_backend
def test_threads_and_modes_with_many_tiles(backend, home, untouched):
    model, before = mlp().to(home), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        init = torch.randn(600, DIM, device=home)  # three tiles of the torch path
        with untouched(model):
            two = langevin_sample(model, init=init, steps=2, seed=3, backend=backend)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        one = langevin_sample(model, init=init, steps=2, seed=3, backend=backend)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    if backend == "reference":  # autograd on the whole batch: a matrix product may split among threads
        torch.testing.assert_close(one, two)
    else:
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shared", [True, False])
def test_python_threads_at_once(backend, shared):
    """Dropout tells: were one call to put the model back in train mode under another, samples would change."""
    torch.manual_seed(0)
    common = mlp().train()
    models = [common] * 8 if shared else [mlp().train() for _ in range(8)]

    def sample(i: int) -> torch.Tensor:
        return langevin_sample(models[i], batch_size=20 + 90 * i, steps=6, seed=i, backend=backend)

    alone = [sample(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(sample, range(8)))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    assert all(m.training for model in models for m in model.modules())


# -- what the options mean --------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("make", [mlp, quadratic])
def test_no_steps_return_the_start(backend, home, make):
    model, init = make().to(home), torch.randn(5, DIM, device=home)
    samples, info = langevin_sample(model, init=init, steps=0, backend=backend, return_info=True)
    assert torch.equal(samples, init)
    assert samples.data_ptr() != init.data_ptr()
    torch.testing.assert_close(info.energies, fastebm.energy(model.eval(), init).detach(), rtol=1e-4, atol=1e-4)
    assert info.first_bad_step.tolist() == [-1] * 5


@every_backend
@pytest.mark.parametrize("make", [mlp, quadratic])
@pytest.mark.parametrize("options", [{"batch_size": 0}, {"init": torch.ones(0, DIM)}])
def test_no_chains_return_an_empty_tensor(backend, home, make, options):
    options = {k: v.to(home) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    samples, info = langevin_sample(make().to(home), DIM, steps=3, backend=backend, return_info=True, **options)
    assert samples.shape == (0, DIM)
    assert info.energies.shape == info.first_bad_step.shape == (0,)


@every_backend
@pytest.mark.parametrize("clamp", [None, (0.2, 0.7)])
def test_uniform_start(backend, home, clamp):
    samples = langevin_sample(
        mlp().to(home), batch_size=500, steps=0, seed=9, first_chain=3, clamp=clamp, backend=backend
    )
    lo, hi = clamp or (-1.0, 1.0)
    u = uniform(9, Stream.INITIAL, torch.arange(3, 503), 0, DIM)
    torch.testing.assert_close(samples.cpu(), lo + (hi - lo) * u)
    assert bool(((samples >= lo) & (samples <= hi)).all())


@pytest.mark.parametrize("clamp", [(0.1, 0.7), (-0.3, 0.9), (1e-3, 1.0), (-1.0, 0.1)])
def test_uniform_start_at_the_largest_uniform_number_is_within_the_clamp(clamp, monkeypatch):
    """u(w) rounds to 1 for w near 2**32, one number in 2**25, and lo + (hi - lo) may round past hi."""
    monkeypatch.setattr("fastebm.box.uniform", lambda *a, dtype, **k: torch.ones(4, DIM, dtype=dtype))
    samples = langevin_sample(mlp(), batch_size=4, steps=0, clamp=clamp)
    assert torch.equal(samples, samples.clamp(*clamp))


@every_backend
def test_dtypes(backend, home):
    model = MLPEnergy(DIM, (9, 8)).to(home)
    init = torch.randn(5, DIM, device=home)
    options = {"steps": 4, "seed": 1, "step_size": 0.1, "noise_scale": 0.5, "backend": backend}
    for half in (torch.float16, torch.bfloat16):
        from_half = langevin_sample(model, init=init.to(half), **options)
        assert from_half.dtype == torch.float32
        assert torch.equal(from_half, langevin_sample(model, init=init.to(half).float(), **options))
        weights = MLPEnergy(DIM, (9, 8)).to(home, half)
        expected = langevin_sample(MLPEnergy(DIM, (9, 8)).to(home), init=init, **options)
        as_float = MLPEnergy(DIM, (9, 8)).to(home)
        as_float.load_state_dict({k: v.float() for k, v in weights.state_dict().items()})
        from_weights = langevin_sample(weights, init=init, **options)
        assert torch.equal(from_weights, langevin_sample(as_float, init=init, **options))
        assert not torch.equal(from_weights, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("make", [lambda: MLPEnergy(DIM, (9, 8)), quadratic])
def test_float64_is_float64_end_to_end(backend, make):
    model, init = make(), torch.randn(5, DIM, dtype=torch.float64)
    options = {"steps": 4, "seed": 1, "step_size": 0.1, "noise_scale": 0.5, "backend": backend}
    samples, info = langevin_sample(model, init=init, return_info=True, **options)
    assert samples.dtype == info.energies.dtype == torch.float64
    assert info.precision == "float64"
    double = model.double()
    x = init
    for t in range(4):
        grad = Energy(double, (DIM,), torch.float64).gradient(x)
        noise = normal(1, Stream.LANGEVIN, torch.arange(5), t, DIM, dtype=torch.float64)
        x = x - 0.05 * grad + math.sqrt(0.1) * 0.5 * noise
    torch.testing.assert_close(samples, x, rtol=1e-12, atol=1e-13)
    assert langevin_sample(double, DIM, steps=1, backend=backend).dtype == torch.float64


@every_backend
@pytest.mark.parametrize("make", [mlp, quadratic])
def test_a_run_split_in_two_is_the_same_run(backend, home, make):
    model, init = make().to(home), torch.randn(7, DIM, device=home)
    options = {"seed": 5, "step_size": 0.2, "noise_scale": 1.0, "backend": backend}
    whole = langevin_sample(model, init=init, steps=10, first_step=3, **options)
    half = langevin_sample(model, init=init, steps=4, first_step=3, **options)
    assert torch.equal(langevin_sample(model, init=half, steps=6, first_step=7, **options), whole)


@every_backend
@pytest.mark.parametrize("make", [mlp, quadratic])
@pytest.mark.parametrize("first_chain", [0, 2**32 - 6])
def test_chains_depend_on_their_numbers_and_not_on_the_batch(backend, home, make, first_chain):
    model, init = make().to(home), torch.randn(10, DIM, device=home)
    options = {"seed": 5, "steps": 6, "step_size": 0.2, "noise_scale": 1.0, "backend": backend}
    whole = langevin_sample(model, init=init, first_chain=first_chain, **options)
    part = langevin_sample(model, init=init[5:], first_chain=first_chain + 5, **options)
    if backend == "reference" and make is mlp:  # plain matrix products round a row by the size of the batch
        torch.testing.assert_close(part, whole[5:])
    else:
        assert torch.equal(part, whole[5:])


@pytest.mark.parametrize(("dim", "widths"), [(3, (9, 8)), (7, (8,)), (15, (5, 7)), (64, (128, 128))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_has_the_same_bits_at_any_place_of_a_tile(dim, widths, dtype):
    """Odd widths: a matrix product may treat rows by their alignment, and so by their place."""
    model, init = MLPEnergy(dim, widths).to(dtype), torch.randn(8, dim, dtype=dtype)
    options = {"seed": 5, "steps": 3, "step_size": 0.1, "noise_scale": 0.5, "backend": "torch"}
    whole = langevin_sample(model, init=init, **options)
    for i in range(8):
        assert torch.equal(langevin_sample(model, init=init[i : i + 1], first_chain=i, **options), whole[i : i + 1])


@every_backend
def test_seeds_and_generators(backend, home):
    model = mlp().to(home)

    def sample(**options):
        return langevin_sample(model, batch_size=4, steps=2, backend=backend, **options)

    assert torch.equal(sample(seed=1), sample(seed=1))
    assert not torch.equal(sample(seed=1), sample(seed=2))
    assert not torch.equal(sample(seed=1), sample(seed=1 + 2**32))
    assert torch.equal(sample(seed=-1), sample(seed=2**64 - 1))
    generator = torch.Generator().manual_seed(3)
    first, second = sample(generator=generator), sample(generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, sample(generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(4)
    drawn, info = sample(return_info=True)
    assert torch.equal(drawn, sample(seed=info.seed))
    torch.manual_seed(4)
    assert torch.equal(drawn, sample())


@every_backend
@pytest.mark.parametrize("make", [mlp, quadratic])
def test_a_schedule_is_its_steps_one_after_another(backend, home, make):
    model, init = make().to(home), torch.randn(7, DIM, device=home)
    step_sizes, noise_scales = torch.tensor([0.3, 0.1, 0.2]), torch.tensor([1.0, 0.0, 0.5])
    x = init
    for t in range(3):
        x = langevin_sample(
            model, init=x, steps=1, first_step=t, seed=1, backend=backend,
            step_size=float(step_sizes[t]), noise_scale=float(noise_scales[t]),
        )  # fmt: skip
    whole, info = langevin_sample(
        model, init=init, steps=3, seed=1, backend=backend,
        step_size=step_sizes, noise_scale=noise_scales, return_info=True,
    )  # fmt: skip
    assert torch.equal(whole, x)
    assert torch.equal(info.temperature, noise_scales**2)


@every_backend
@pytest.mark.parametrize("make", [mlp, quadratic])
def test_a_value_a_chain_is_that_chain_by_itself(backend, home, make):
    model, init = make().to(home), torch.randn(4, DIM, device=home)
    step_sizes, noise_scales = torch.tensor([[0.3], [0.1], [0.2], [1.0]]), torch.tensor([[1.0], [0.0], [0.5], [2.0]])
    options = {"steps": 3, "seed": 1, "backend": backend}
    whole = langevin_sample(model, init=init, step_size=step_sizes, noise_scale=noise_scales, **options)
    for i in range(4):
        alone = langevin_sample(
            model, init=init, step_size=float(step_sizes[i]), noise_scale=float(noise_scales[i]), **options
        )
        assert torch.equal(alone[i], whole[i])


@every_backend
def test_gradient_descent_clip_and_clamp_in_closed_form(backend, home):
    init = torch.tensor([[1.0, -2.0, 0.5]], device=home)
    options = {"noise_scale": 0.0, "backend": backend, "init": init}
    model = quadratic().to(home)
    torch.testing.assert_close(langevin_sample(model, steps=5, step_size=0.5, **options), 0.75**5 * init)
    clipped = langevin_sample(model, steps=1, step_size=0.5, grad_clip=0.6, **options)
    torch.testing.assert_close(clipped, init - 0.25 * torch.tensor([[0.6, -0.6, 0.5]], device=home))
    clamped = langevin_sample(model, steps=1, step_size=0.5, clamp=(-1.0, 0.5), **options)
    torch.testing.assert_close(clamped, torch.tensor([[0.5, -1.0, 0.375]], device=home))
    one_sided = langevin_sample(model, steps=1, step_size=0.5, clamp=(0.0, INF), **options)
    torch.testing.assert_close(one_sided, torch.tensor([[0.75, 0.0, 0.375]], device=home))


@every_backend
def test_clamp_comes_after_the_noise(backend, home):
    samples = langevin_sample(
        mlp().to(home), batch_size=200, steps=1, step_size=1.0, noise_scale=3.0, clamp=(-1.0, 1.0), backend=backend
    )
    at_the_bounds = (samples.abs() == 1.0).float().mean()
    assert samples.abs().max() == 1.0
    assert at_the_bounds > 0.5


@every_backend
@pytest.mark.parametrize("make", [mlp, quadratic])
def test_out_is_bit_equal_to_the_copying_path(backend, home, make):
    model, init = make().to(home), torch.randn(5, DIM, device=home)
    options = {"steps": 3, "seed": 1, "backend": backend}
    expected = langevin_sample(model, init=init, **options)
    out = torch.full((5, DIM), NAN, device=home)
    assert langevin_sample(model, init=init, out=out, **options) is out
    assert torch.equal(out, expected)
    strided = torch.full((5, 2 * DIM), NAN, device=home)
    langevin_sample(model, init=init, out=strided[:, ::2], **options)
    assert torch.equal(strided[:, ::2], expected)
    assert bool(strided[:, 1::2].isnan().all())
    samples, info = langevin_sample(model, init=init, out=init, return_info=True, **options)
    assert samples is init
    assert torch.equal(init, expected)
    torch.testing.assert_close(info.energies, fastebm.energy(model.eval(), init).detach(), rtol=1e-4, atol=1e-4)


@every_backend
def test_out_and_init_are_unchanged_when_chains_explode(backend, home, untouched):
    model, init = Of(lambda x: -x.square().square().sum(1)).to(home), torch.full((3, DIM), 2.0, device=home)
    out = torch.full((3, DIM), NAN, device=home)
    with untouched(model, init, out):
        with pytest.raises(NonFiniteError):
            langevin_sample(model, init=init, out=out, step_size=10.0, steps=6, backend=backend, seed=1)
        with pytest.raises(NonFiniteError):
            langevin_sample(model, init=init, out=init, step_size=10.0, steps=6, backend=backend, seed=1)


@every_backend
@pytest.mark.parametrize("make", [mlp, quadratic])
def test_a_start_of_any_strides(backend, home, make):
    model = make().to(home)
    transposed = torch.randn(DIM, 6, device=home).t()
    options = {"steps": 3, "seed": 1, "backend": backend}
    expected = langevin_sample(model, init=transposed.contiguous(), **options)
    for init in (
        transposed,
        torch.cat([transposed, transposed])[:6],
        torch.stack([transposed, transposed], dim=2)[..., 1],
    ):
        assert torch.equal(langevin_sample(model, init=init, **options), expected)
    row = transposed[:1].contiguous()
    broadcast = langevin_sample(model, init=row.expand(6, DIM), **options)
    assert torch.equal(broadcast, langevin_sample(model, init=row.repeat(6, 1), **options))


@every_backend
def test_images(backend, home):
    model = conv().to(home)
    samples, info = langevin_sample(model, (1, 8, 8), batch_size=5, steps=3, seed=1, backend=backend, return_info=True)
    assert samples.shape == (5, 1, 8, 8)
    assert info.path == "autograd"
    expected = langevin_sample(model.cpu(), (1, 8, 8), batch_size=5, steps=3, seed=1, backend="reference")
    torch.testing.assert_close(samples.cpu(), expected, rtol=1e-4, atol=1e-5)
    channels_last = samples.to(memory_format=torch.channels_last)
    again = langevin_sample(model.to(home), init=channels_last, steps=1, seed=2, backend=backend)
    assert torch.equal(again, langevin_sample(model, init=samples, steps=1, seed=2, backend=backend))


@every_backend
def test_images_through_an_mlp(backend, home):
    flat = MLPEnergy(16, (9,)).to(home)
    model = nn.Sequential(nn.Flatten(), flat)
    samples = langevin_sample(model, (4, 4), batch_size=5, steps=3, seed=1, backend=backend)
    assert samples.shape == (5, 4, 4)
    assert torch.equal(samples.flatten(1), langevin_sample(flat, 16, batch_size=5, steps=3, seed=1, backend=backend))


@every_backend
def test_info(backend, home):
    model = mlp().to(home)
    samples, info = langevin_sample(
        model, batch_size=6, steps=3, seed=-2, noise_scale=0.5, step_size=0.1, backend=backend, return_info=True
    )
    assert info.backend == backend
    assert info.path == {"reference": "autograd", "torch": "tiles", "triton": "resident"}[backend]
    assert info.precision == {"reference": "ieee", "torch": "ieee", "triton": "bf16x3"}[backend]
    asked = None if backend == "triton" else f'backend="{backend}" was asked for'
    assert info.why_not_fused == asked or info.why_not_fused.startswith(asked)
    assert info.seed == 2**64 - 2
    assert info.temperature == 0.25
    assert info.first_bad_step.dtype == torch.int32
    assert info.first_bad_step.tolist() == [-1] * 6
    torch.testing.assert_close(info.energies, fastebm.energy(model.eval(), samples).detach(), rtol=1e-4, atol=1e-4)
    _, other = langevin_sample(quadratic().to(home), DIM, steps=1, backend=backend, return_info=True)
    assert (other.backend, other.path) == (backend, "autograd")
    if backend == "triton":
        assert other.why_not_fused.startswith("not an MLP that can be read: ")


# -- chains that explode ----------------------------------------------------------------------------------------

STEPS = 7
# On the slope below a step moves by step_size * 2**20: these overflow never, never, at steps 3, 1 and 0, and never.
EXPLOSIVE = torch.tensor([[2.0**60], [2.0**70], [2.0**106], [2.0**107], [2.0**108], [1.0]])
FIRST_BAD = [-1, -1, 3, 1, 0, -1]


def slide(dim: int, active: slice = slice(None)) -> nn.Module:
    """A downhill plane with slope -2**21 in the active dims, by weights that every precision represents.

    Products and sums of powers of two are exact, so that all backends must agree bit for bit.
    """
    model = MLPEnergy(dim, (4,), "relu")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight[:, active] = 0.5
        model[0].bias.fill_(1.0)
        model[2].weight.fill_(-(2.0**20))
    return model


def advance(path: str, model: nn.Module, x: torch.Tensor, rule: Langevin, steps: int = STEPS):
    x, n = x.clone(), len(x)
    numbers = torch.arange(n, device=x.device)
    chains = Chains(x, 3, numbers, torch.zeros_like(numbers))
    whole = Energy(model, (x.shape[1],), x.dtype)
    with torch.no_grad():
        if path == "reference":
            return runs.by_definition(whole, chains, rule, steps)
        if path == "torch":
            return runs.closed_form(describe(model), chains, rule, steps)
        if path == "update":
            return runs.fused_module(whole, chains, rule, steps)
        regime, precision = path.split()
        block_dim = 16 if regime == "streaming" else max(16, 1 << (x.shape[1] - 1).bit_length())
        launch = Launch(regime, 16, block_dim, 1, 1, in_memory=precision == "bf16x3")  # as on sm_90
        return runs.fused_mlp(describe(model), chains, rule, steps, precision=precision, launch=launch)


PATHS = ["torch", "update", "resident ieee", "resident bf16x3", "streaming ieee", "streaming bf16x3"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dim", "active", "clamp"),
    [
        (1, "all", None),
        (3, "all", (-1.0, 1.0)),
        (3, "last", None),
        (3, "all", (-(2.0**126), 2.0**126)),
        (40, "all", None),
        pytest.param(40, "last", None, marks=pytest.mark.slow),
        pytest.param(40, "last", (-1.0, 1.0), marks=pytest.mark.slow),
    ],
)
def test_exploding_chains_freeze_as_in_the_reference(path, dim, clamp, active, device):
    """In all dims, or in the last alone: the first chunks are finite, and must not move either."""
    home = "cpu" if path == "torch" else device
    model = slide(dim, slice(None) if active == "all" else slice(dim - 1, dim))
    rule = Langevin(EXPLOSIVE, 0.0, clamp=clamp)
    x = torch.zeros(6, dim)
    expected = advance("reference", model, x, rule)
    assert expected.first_bad.tolist() == (FIRST_BAD if clamp is None else [-1, -1, -1, -1, 0, -1])
    done = advance(path, model.to(home), x.to(home), rule)
    assert torch.equal(done.first_bad.cpu(), expected.first_bad)
    assert torch.equal(done.x.cpu(), expected.x)
    assert bool(done.x.isfinite().all())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dim", [3, 40])
def test_exploding_noise_freezes_as_in_the_reference(path, dim, device):
    home = "cpu" if path == "torch" else device
    rule = Langevin(2.0, torch.logspace(36.5, 38.4, 12, dtype=torch.float64)[:, None])
    x = torch.zeros(12, dim)
    expected = advance("reference", slide(dim), x, rule, 4)
    assert {-1, 0} < set(expected.first_bad.tolist())
    done = advance(path, slide(dim).to(home), x.to(home), rule, 4)
    # Kernels scale the radius of Box and Muller, which may pass float32's end where its sine would have come back.
    early = done.first_bad.cpu() != expected.first_bad
    assert (rule.noise_scale[early, 0] * 2**0.5 * 6.8 > torch.finfo(torch.float32).max).all()
    assert path != "torch" or not early.any()
    torch.testing.assert_close(done.x.cpu()[~early], expected.x[~early], rtol=1e-5, atol=1e33)


@pytest.mark.parametrize("path", ["torch", "update", "resident ieee", "streaming ieee"])
@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0)])
def test_an_infinite_gradient_that_is_clipped_is_no_explosion(path, clamp, device):
    """Padded columns hold zero weights, and 0 * inf is NaN: they must not freeze a chain."""
    home = "cpu" if path == "torch" else device
    model = MLPEnergy(DIM, (4, 4), "relu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1e20 if name.endswith("weight") else 0.0)
    rule = Langevin(1.0, 0.0, grad_clip=0.5, clamp=clamp)
    x = torch.full((4, DIM), 1e-30)
    expected = advance("reference", model, x, rule, 1)
    assert expected.first_bad.tolist() == [-1] * 4
    done = advance(path, model.to(home), x.to(home), rule, 1)
    assert torch.equal(done.first_bad.cpu(), expected.first_bad)
    assert torch.equal(done.x.cpu(), expected.x)


def quartic() -> nn.Module:
    """Falls faster than any step size can follow."""
    return Of(lambda x: -x.square().square().sum(1))


explosions = pytest.mark.parametrize(
    ("make", "options", "first_bad"),
    [
        (lambda: slide(DIM), {"step_size": EXPLOSIVE}, FIRST_BAD),
        (quartic, {"step_size": 10.0}, None),
    ],
    ids=["mlp", "module"],
)


@every_backend
@explosions
def test_exploding_chains_raise_with_advice(backend, home, make, options, first_bad, untouched):
    model, init = make().to(home).train(), torch.linspace(0.0, 2.0, 6, device=home)[:, None].expand(6, DIM)
    with untouched(model, init), pytest.raises(NonFiniteError) as caught:
        langevin_sample(model, init=init, steps=STEPS, noise_scale=0.0, backend=backend, seed=0, **options)
    message = str(caught.value)
    assert "of 6 chains are not finite (first at step" in message
    for word in (
        "last finite max |x| = ",
        "step_size = ",
        "smaller step_size",
        "grad_clip=",
        "clamp=",
        "on_nonfinite=",
    ):
        assert word in message
    if first_bad:
        assert message.startswith("3 of 6 chains are not finite (first at step 0 of 7;")


@every_backend
@explosions
@pytest.mark.parametrize("clamp", [None, (-1e30, 1e30)])
def test_exploding_chains_ignored_or_started_anew(backend, home, make, options, first_bad, clamp):
    model, init = make().to(home), torch.linspace(0.0, 2.0, 6, device=home)[:, None].repeat(1, DIM)
    options = {
        "init": init, "steps": STEPS, "noise_scale": 0.0, "backend": backend, "seed": 4, "return_info": True, **options
    }  # fmt: skip
    if clamp is not None:
        options["clamp"] = clamp
    expected = advance("reference", model.cpu(), init.cpu(), Langevin(options["step_size"], 0.0, clamp=clamp), STEPS)
    bad = expected.first_bad >= 0
    assert bool(bad.any())
    assert not bool(bad.all())
    model.to(home)
    kept, info = langevin_sample(model, on_nonfinite="ignore", **options)
    assert torch.equal(info.first_bad_step.cpu(), expected.first_bad)
    torch.testing.assert_close(kept.cpu(), expected.x)
    fresh, info = langevin_sample(model, on_nonfinite="reinit", **options)
    assert torch.equal(info.first_bad_step.cpu(), expected.first_bad)
    assert torch.equal(fresh.cpu()[~bad], kept.cpu()[~bad])
    assert bool((fresh.cpu()[bad].abs() <= (1.0 if clamp is None else 1e30)).all())
    assert len(fresh.cpu()[bad].unique()) == fresh.cpu()[bad].numel()
    torch.testing.assert_close(info.energies, fastebm.energy(model, fresh).detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(langevin_sample(model, on_nonfinite="reinit", **options)[0], fresh)
