"""Langevin: named conventions, the three forms of a coefficient, and which arguments are refused."""

import math

import pytest
import torch

from fastebm import Langevin

# drift, noise std and temperature of each named convention
RECIPES = {
    "default": (Langevin(), 5.0, math.sqrt(10) * 0.005, 2.5e-5),
    "ula": (Langevin.ula(0.1), 0.05, math.sqrt(0.1), 1.0),
    "ula at T": (Langevin.ula(0.1, temperature=0.25), 0.05, math.sqrt(0.1 * 0.25), 0.25),
    "ula at T = 0": (Langevin.ula(0.1, temperature=0.0), 0.05, 0.0, 0.0),
    "torchebm": (Langevin.torchebm(0.1), 0.1, math.sqrt(0.2), 1.0),
    "torchebm with noise": (Langevin.torchebm(0.1, 0.5), 0.1, math.sqrt(0.2) * 0.5, 0.25),
    "edifice": (Langevin.edifice(), 5.0, math.sqrt(10) * 0.005, 2.5e-5),
    "igebm": (Langevin.igebm(), 10.0, 0.005, 1.25e-6),
    "uva": (Langevin.uva(), 10.0, 0.005, 1.25e-6),
    "jem": (Langevin.jem(), 1.0, 0.01, 5e-5),
    "drift and noise": (Langevin.from_drift_and_noise(3.0, 0.6), 3.0, 0.6, 0.06),
    "gradient descent": (Langevin.from_drift_and_noise(3.0, 0.0), 3.0, 0.0, 0.0),
}


@pytest.mark.parametrize(("sampler", "drift", "noise_std", "temperature"), RECIPES.values(), ids=RECIPES)
def test_recipe_table(sampler, drift, noise_std, temperature):
    a, b = sampler.coefficients(4, 7, dtype=torch.float64)
    assert a.shape == b.shape == (1, 1)
    assert a.item() == pytest.approx(drift, rel=1e-12)
    assert b.item() == pytest.approx(noise_std, rel=1e-12)
    assert sampler.temperature == pytest.approx(temperature, rel=1e-12)
    assert sampler.temperature * 2 * a.item() == pytest.approx(b.item() ** 2, rel=1e-12)


@pytest.mark.parametrize(
    "recipe",
    [
        lambda **o: Langevin.ula(0.1, **o),
        lambda **o: Langevin.torchebm(0.1, **o),
        lambda **o: Langevin.from_drift_and_noise(1.0, 0.1, **o),
        Langevin.edifice,
        Langevin.igebm,
        Langevin.uva,
        Langevin.jem,
    ],
)
def test_recipes_pass_their_options_on(recipe):
    sampler = recipe(grad_clip=0.03, clamp=[-1, 2])
    assert sampler.grad_clip == 0.03
    assert sampler.clamp == (-1.0, 2.0)


def test_recipes_set_the_order_of_gradient_and_noise():
    """test_noise_first.py compares what they do with the published code."""
    samplers = Langevin.igebm(), Langevin.uva(), Langevin.jem(), Langevin.edifice(), Langevin.ula(0.1)
    assert [(sampler.noise_first, sampler.clamp_noise) for sampler in samplers] == [
        (True, False),
        (True, True),
        *[(False,) * 2] * 3,
    ]
    assert (Langevin.uva().grad_clip, Langevin.uva().clamp) == (0.03, (-1.0, 1.0))
    other = Langevin.uva(grad_clip=None, clamp=None, clamp_noise=False, noise_first=False)
    assert (other.grad_clip, other.clamp, other.noise_first) == (None, None, False)


def test_a_schedule_and_one_value_per_chain():
    schedule, per_chain = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([[1.0], [2.0]])
    a, b = Langevin(schedule, per_chain).coefficients(2, 3, dtype=torch.float64)
    assert torch.equal(a, schedule.double()[None] / 2)
    assert torch.equal(b, schedule.double().sqrt()[None] * per_chain.double())
    torch.testing.assert_close(Langevin(schedule, per_chain).temperature, per_chain**2)


def test_one_value_as_a_tensor_is_the_value():
    for value in (torch.tensor(0.3), torch.tensor([[0.3]])):
        a, b = Langevin(value, value).coefficients(5, 2)
        expected = Langevin(float(value), float(value)).coefficients(5, 2)
        assert torch.equal(a, expected[0])
        assert torch.equal(b, expected[1])


def test_coefficients_are_computed_in_float64_and_carry_no_gradient():
    step_size = torch.tensor([0.1, 0.7], requires_grad=True)
    a, b = Langevin(step_size, 0.3).coefficients(1, 2)
    assert not a.requires_grad
    assert not b.requires_grad
    exact = step_size.detach().double().sqrt() * 0.3
    assert torch.equal(b[0], exact.float())


class Fixed:
    """Both a target with this gradient and a source of noise with these numbers."""

    box = None

    def __init__(self, gradient, numbers):
        self.gradient, self.normal = lambda x: gradient, lambda stream, t: numbers
        self.held = lambda x, moved: moved


def test_step_is_the_formula():
    x, grad, noise = (torch.tensor([v], dtype=torch.float64) for v in ([1.0, 2.0], [5.0, -0.5], [0.25, 0.25]))
    at = Fixed(grad, noise)
    sampler = Langevin(0.5, 2.0, grad_clip=1.0)
    state, info = sampler.step(at, sampler.init(at, x, at), at, 0)
    expected = [1.0 - 0.25 * 1.0 + math.sqrt(0.5) * 2.0 * 0.25, 2.0 + 0.25 * 0.5 + math.sqrt(0.5) * 2.0 * 0.25]
    assert state.x[0].tolist() == pytest.approx(expected, rel=1e-14)
    assert info.finite is None
    counted, last = info.averaged(), info.last()
    assert (counted["clipped"].item(), counted["clamped"]) == (True, 0.0)
    assert last["grad_norm"].item() == pytest.approx(math.sqrt(25.25))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Langevin(0.0), ValueError, "step_size must be finite and > 0, got 0.0"),
        (lambda: Langevin(-1.0), ValueError, "step_size must be finite and > 0, got -1.0"),
        (lambda: Langevin(math.nan), ValueError, "step_size must be finite and > 0, got nan"),
        (lambda: Langevin(math.inf), ValueError, "step_size must be finite and > 0, got inf"),
        (lambda: Langevin("1"), TypeError, "step_size must be a float or a tensor, got str"),
        (lambda: Langevin(True), TypeError, "step_size must be a float or a tensor, got bool"),
        (lambda: Langevin(torch.tensor([1.0, 0.0])), ValueError, "step_size must be .* > 0, got a tensor with 0.0"),
        (lambda: Langevin(torch.tensor([1.0, math.nan])), ValueError, "got a tensor with nan"),
        (lambda: Langevin(torch.tensor([1])), TypeError, "step_size must be a floating-point tensor, got torch.int64"),
        (lambda: Langevin(torch.ones(2, 3)), ValueError, r"\(n_chains, 1\) tensor, got shape \(2, 3\)"),
        (lambda: Langevin(torch.ones(2, 1, 1)), ValueError, r"got shape \(2, 1, 1\)"),
        (lambda: Langevin(noise_first=1), TypeError, "noise_first must be True or False, got 1"),
        (lambda: Langevin(noise_first=None), TypeError, "noise_first must be True or False, got None"),
        (lambda: Langevin(clamp_noise="no"), TypeError, "clamp_noise must be True or False, got 'no'"),
        (lambda: Langevin(clamp_noise=True), ValueError, "clamp_noise=True .* needs noise_first=True"),
        (lambda: Langevin.uva(noise_first=False), ValueError, "clamp_noise=True .* needs noise_first=True"),
        (lambda: Langevin(1.0, -0.1), ValueError, "noise_scale must be finite and >= 0, got -0.1"),
        (lambda: Langevin(1.0, math.nan), ValueError, "noise_scale must be finite and >= 0, got nan"),
        (lambda: Langevin(1.0, torch.tensor([-1.0])), ValueError, "noise_scale must be .* got a tensor with -1.0"),
        (lambda: Langevin(grad_clip=0.0), ValueError, "grad_clip must be a number > 0 or None, got 0.0"),
        (lambda: Langevin(grad_clip=math.nan), ValueError, "grad_clip must be a number > 0 or None, got nan"),
        (lambda: Langevin(clamp=(1.0, 0.0)), ValueError, r"clamp needs lo < hi, got \(1.0, 0.0\)"),
        (lambda: Langevin(clamp=(1.0, 1.0)), ValueError, r"clamp needs lo < hi, got \(1.0, 1.0\)"),
        (lambda: Langevin(clamp=(math.nan, 1.0)), ValueError, "clamp needs lo < hi"),
        (
            lambda: Langevin(clamp=1.0),
            TypeError,
            r"clamp must be a pair \(lo, hi\) of numbers or tensors, or None, got 1.0",
        ),
        (lambda: Langevin(clamp=(0.0, 1.0, 2.0)), TypeError, "clamp must be a pair"),
        (lambda: Langevin.ula(0.1, temperature=-1.0), ValueError, "temperature must be a number >= 0, got -1.0"),
        (lambda: Langevin.from_drift_and_noise(0.0, 1.0), ValueError, "drift must be a number > 0, got 0.0"),
        (lambda: Langevin.from_drift_and_noise(1.0, -1.0), ValueError, "noise_scale must be finite and >= 0"),
        (lambda: Langevin.torchebm(-0.1), ValueError, "step_size must be finite and > 0"),
        (
            lambda: Langevin(torch.ones(3)).coefficients(2, 4),
            ValueError,
            "a step_size schedule must have one entry per step: got 3 entries for 4 steps",
        ),
        (
            lambda: Langevin(1.0, torch.ones(3, 1)).coefficients(2, 4),
            ValueError,
            r"noise_scale of shape \(3, 1\) does not fit 2 chains; use \(2, 1\)",
        ),
    ],
)
def test_errors_name_the_rule_and_the_value(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3])
def test_the_norm_clip_has_a_derivative(clip):
    """Of clip g / |g| beyond the clip, and of g within it, also where g is 0."""
    slopes = torch.tensor([[0.0, 0.0], [0.3 * clip, 0.4 * clip], [0.6 * clip, -0.79 * clip], [3 * clip, 4 * clip]])
    slopes.requires_grad_()
    clipped = Langevin(0.1, grad_norm_clip=clip).clip(slopes)
    torch.testing.assert_close(clipped, torch.cat([slopes[:3], slopes[3:] / 5]))
    clipped[:, 0].sum().backward()
    expected = torch.tensor([[1.0, 0.0]] * 3 + [[0.2 * (1 - 0.36), -0.2 * 0.48]])
    torch.testing.assert_close(slopes.grad, expected)


def test_one_sided_clamp_is_legal():
    assert Langevin(clamp=(0.0, math.inf)).clamp == (0.0, math.inf)
