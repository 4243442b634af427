"""langevin_sample: what it leaves alone, and what its options mean."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from paths import every_backend
from small_energies import DIM, conv, mlp, quadratic
from torch import nn

import fastebm
from fastebm import MLPEnergy, langevin_sample
from fastebm.rng import Stream, normal, uniform
from fastebm.targets.autograd import Energy

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

NAN, INF = math.nan, math.inf


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
        init = torch.randn(600, DIM, device=home)  # more than one tile of the torch path
        with untouched(model):
            two = langevin_sample(model, init=init, steps=2, seed=3, backend=backend)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        one = langevin_sample(model, init=init, steps=2, seed=3, backend=backend)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    if backend == "reference":  # a matrix product of the whole batch may be split among threads
        torch.testing.assert_close(one, two)
    else:
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shared", [True, False])
def test_python_threads_at_once(backend, shared):
    """If one call set the model back to train mode during another call, dropout would change its samples."""
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
    """Odd widths too: a matrix product may round a row by its alignment, and so by its place."""
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
def test_a_schedule_equals_its_steps_one_by_one(backend, home, make):
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
def test_one_value_per_chain_is_that_chain_by_itself(backend, home, make):
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
