"""Chains that explode stop at their last finite state, and the call raises, ignores them or reinitialises them."""

import math

import pytest
import runs
import torch
from fastebm.kernels.triton.launch import Launch
from paths import every_backend
from small_energies import DIM, Of
from torch import nn

import fastebm
from fastebm import Langevin, MLPEnergy, NonFiniteError, langevin_sample
from fastebm.backends import Chains
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

NAN, INF = math.nan, math.inf


@every_backend
def test_out_and_init_are_unchanged_when_chains_explode(backend, home, untouched):
    model, init = Of(lambda x: -x.square().square().sum(1)).to(home), torch.full((3, DIM), 2.0, device=home)
    out = torch.full((3, DIM), NAN, device=home)
    with untouched(model, init, out):
        with pytest.raises(NonFiniteError):
            langevin_sample(model, init=init, out=out, step_size=10.0, steps=6, backend=backend, seed=1)
        with pytest.raises(NonFiniteError):
            langevin_sample(model, init=init, out=init, step_size=10.0, steps=6, backend=backend, seed=1)


STEPS = 7

# On the slope below a step moves by step_size * 2**20. Chains 2, 3 and 4 overflow at steps 3, 1 and 0.
EXPLOSIVE = torch.tensor([[2.0**60], [2.0**70], [2.0**106], [2.0**107], [2.0**108], [1.0]])
FIRST_BAD = [-1, -1, 3, 1, 0, -1]


def slide(dim: int, active: slice = slice(None)) -> nn.Module:
    """A plane with slope -2**21 in the active dims, made of weights that every precision represents.

    Products and sums of powers of two are exact, so that all backends agree bit for bit.
    """
    model = MLPEnergy(dim, (4,), "relu")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight[:, active] = 0.5
        model[0].bias.fill_(1.0)
        model[2].weight.fill_(-(2.0**20))
    return model


def advance(path: str, model: nn.Module, x: torch.Tensor, sampler: Langevin, steps: int = STEPS):
    x, n = x.clone(), len(x)
    numbers = torch.arange(n, device=x.device)
    chains = Chains(x, 3, numbers, torch.zeros_like(numbers))
    whole = Energy(model, (x.shape[1],), x.dtype)
    with torch.no_grad():
        if path == "reference":
            return runs.by_definition(whole, chains, sampler, steps)
        if path == "torch":
            return runs.closed_form(describe(model), chains, sampler, steps)
        if path == "update":
            return runs.fused_module(whole, chains, sampler, steps)
        regime, precision = path.split()
        block_dim = 16 if regime == "streaming" else max(16, 1 << (x.shape[1] - 1).bit_length())
        launch = Launch(regime, 16, block_dim, 1, 1, in_memory=precision == "bf16x3")  # as on sm_90
        return runs.fused_mlp(describe(model), chains, sampler, steps, precision=precision, launch=launch)


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
    """They explode in all dims, or in the last alone: then the first chunks are finite and must not move either."""
    home = "cpu" if path == "torch" else device
    model = slide(dim, slice(None) if active == "all" else slice(dim - 1, dim))
    sampler = Langevin(EXPLOSIVE, 0.0, clamp=clamp)
    x = torch.zeros(6, dim)
    expected = advance("reference", model, x, sampler)
    assert expected.first_bad.tolist() == (FIRST_BAD if clamp is None else [-1, -1, -1, -1, 0, -1])
    done = advance(path, model.to(home), x.to(home), sampler)
    assert torch.equal(done.first_bad.cpu(), expected.first_bad)
    assert torch.equal(done.x.cpu(), expected.x)
    assert bool(done.x.isfinite().all())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dim", [3, 40])
def test_exploding_noise_freezes_as_in_the_reference(path, dim, device):
    home = "cpu" if path == "torch" else device
    sampler = Langevin(2.0, torch.logspace(36.5, 38.4, 12, dtype=torch.float64)[:, None])
    x = torch.zeros(12, dim)
    expected = advance("reference", slide(dim), x, sampler, 4)
    assert {-1, 0} < set(expected.first_bad.tolist())
    done = advance(path, slide(dim).to(home), x.to(home), sampler, 4)
    # Kernels scale the radius of Box-Muller before its sine: the radius may overflow where the product would not.
    early = done.first_bad.cpu() != expected.first_bad
    assert (sampler.noise_scale[early, 0] * 2**0.5 * 6.8 > torch.finfo(torch.float32).max).all()
    assert path != "torch" or not early.any()
    torch.testing.assert_close(done.x.cpu()[~early], expected.x[~early], rtol=1e-5, atol=1e33)


@pytest.mark.parametrize("path", ["torch", "update", "resident ieee", "streaming ieee"])
@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0)])
def test_an_infinite_gradient_that_is_clipped_stops_no_chain(path, clamp, device):
    """Padded columns hold zero weights, and 0 * inf is NaN, which must not stop a chain."""
    home = "cpu" if path == "torch" else device
    model = MLPEnergy(DIM, (4, 4), "relu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1e20 if name.endswith("weight") else 0.0)
    sampler = Langevin(1.0, 0.0, grad_clip=0.5, clamp=clamp)
    x = torch.full((4, DIM), 1e-30)
    expected = advance("reference", model, x, sampler, 1)
    assert expected.first_bad.tolist() == [-1] * 4
    done = advance(path, model.to(home), x.to(home), sampler, 1)
    assert torch.equal(done.first_bad.cpu(), expected.first_bad)
    assert torch.equal(done.x.cpu(), expected.x)


def quartic() -> nn.Module:
    """E = -sum of x^4: every chain explodes."""
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
def test_exploding_chains_ignored_or_reinitialised(backend, home, make, options, first_bad, clamp):
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
