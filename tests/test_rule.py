"""A rule as an argument of langevin_sample; what the defaults are, and what is said where they do not fit."""

import inspect
import math
import warnings

import pytest
import torch
from torch import nn

from fastebm import ChainPool, GaussianEnergy, Langevin, MLPEnergy, NonFiniteError, SumEnergy, langevin_sample

pytestmark = pytest.mark.usefixtures("seeded")
ADVICE = r"step_size = 10 and noise_scale = 0\.005 are defaults, .* langevin_sample\(energy, Langevin\(0\.1\)\)"


def gaussian() -> GaussianEnergy:
    return GaussianEnergy([1, -2], [0.5, 2])


# -- the numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "numbers"),
    [
        ((), {}, (10.0, 0.005)),
        ((), {"clamp": (0, 1)}, (10.0, 0.005)),
        ((0.1,), {}, (0.1, 1.0)),
        ((), {"step_size": 0.1}, (0.1, 1.0)),
        ((10.0,), {}, (10.0, 1.0)),
        ((10.0, 0.005), {}, (10.0, 0.005)),
        ((), {"noise_scale": 0.3}, (10.0, 0.3)),
        ((0.1, 0.0), {}, (0.1, 0.0)),
    ],
)
def test_the_temperature_is_1_beside_a_step_size_of_one_s_own(arguments, options, numbers):
    rule = Langevin(*arguments, **options)
    assert (rule.step_size, rule.noise_scale) == numbers
    assert rule.is_default == (numbers == (10.0, 0.005))
    assert type(rule)(rule.step_size, rule.noise_scale).is_default == rule.is_default


def test_a_schedule_is_a_step_size_of_one_s_own():
    rule = Langevin(torch.tensor([0.2, 0.1]))
    assert rule.noise_scale == 1.0
    assert not rule.is_default
    assert not Langevin(10.0, torch.tensor([[0.005], [0.005]])).is_default
    assert Langevin.ula(0.3).noise_scale == Langevin(0.3).noise_scale


def test_the_defaults_of_a_call_are_those_of_the_original_design():
    parameters = inspect.signature(langevin_sample).parameters
    assert [parameters[name].default for name in ("step_size", "noise_scale")] == [10.0, 0.005]
    energy, x = MLPEnergy(3, (8,)), torch.randn(5, 3)
    plain = langevin_sample(energy, init=x, seed=0, steps=3)
    assert torch.equal(plain, langevin_sample(energy, Langevin(), init=x, seed=0, steps=3))
    assert torch.equal(plain, langevin_sample(energy, Langevin.edifice(), init=x, seed=0, steps=3))
    _, info = langevin_sample(energy, init=x, seed=0, steps=3, step_size=0.1, return_info=True)
    assert info.temperature == 0.005**2


def test_samples_of_a_gaussian_have_its_mean_and_the_variance_of_the_chain():
    """At curvature 1/s^2 the chain's stationary variance is s^2 / (1 - step / 4 s^2), and its mean the Gaussian's."""
    step, n = 0.1, 20_000
    x = langevin_sample(gaussian(), Langevin(step), batch_size=n, steps=1500, seed=0)
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    variance = std**2 / (1 - step / (4 * std**2))
    assert (1 - step / (2 * 4.0)) ** 1500 < 1e-8  # what is left of the start
    # five standard errors, of the mean and of the variance of normal numbers
    assert bool(((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all())
    assert bool(((x.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / n)).all())


# -- where a rule may stand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gaussian, lambda: MLPEnergy(2, (8,))])
def test_all_ways_to_pass_a_rule_are_the_same_call(make):
    energy, rule = make(), Langevin(0.1, clamp=(-1.0, 2.0), grad_clip=0.5, noise_first=True, clamp_noise=True)
    options = {"batch_size": 5, "steps": 4, "seed": 3}
    names = ("step_size", "noise_scale", "clamp", "grad_clip", "noise_first", "clamp_noise")
    expected = langevin_sample(energy, 2, **{name: getattr(rule, name) for name in names}, **options)
    for arguments, given in (
        ((rule,), {}),
        ((2, rule), {}),
        (((2,), rule), {}),
        ((None, rule), {}),
        ((), {"rule": rule}),
        ((2,), {"rule": rule}),
        ((), {"rule": rule, "input_size": 2}),
        ((rule,), {"step_size": 10.0, "noise_scale": 0.005, "clamp": None}),  # as a wrapper passes its own defaults on
    ):
        assert torch.equal(langevin_sample(energy, *arguments, **given, **options), expected)
    x = torch.randn(5, 2).clamp(-1, 2)
    expected = langevin_sample(energy, init=x, seed=3, **{name: getattr(rule, name) for name in names})
    assert torch.equal(langevin_sample(energy, rule, init=x, seed=3), expected)
    assert torch.equal(langevin_sample(energy, 2, rule, init=x, seed=3), expected)


def test_a_rule_may_have_a_value_per_step_and_per_chain():
    step, noise = torch.linspace(0.2, 0.1, 4), torch.rand(5, 1)
    options = {"batch_size": 5, "steps": 4, "seed": 3}
    expected = langevin_sample(gaussian(), step_size=step, noise_scale=noise, **options)
    assert torch.equal(langevin_sample(gaussian(), Langevin(step, noise), **options), expected)


@pytest.mark.parametrize(
    "given",
    [
        {"step_size": 0.2},
        {"step_size": torch.tensor(10.0)},
        {"noise_scale": 1.0},
        {"clamp": (0.0, 1.0)},
        {"grad_clip": 1.0},
        {"grad_norm_clip": 1.0, "noise_first": True},
        {"clamp_noise": True},
    ],
)
def test_options_beside_a_rule_are_named(given):
    for arguments in ((Langevin(0.1),), (2, Langevin(0.1))):
        with pytest.raises(TypeError) as caught:
            langevin_sample(gaussian(), *arguments, **given)
        names = ", ".join(f"{name}=" for name in given)
        assert str(caught.value).startswith(f"a rule holds {names} itself: give it there")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((Langevin,), "must be a Langevin, got <class .*parentheses missing"),
        ((2, Langevin), "must be a Langevin, got <class .*parentheses missing"),
        ((Langevin.jem,), "must be a Langevin, got <bound method .*parentheses missing"),
        ((2, 0.1), r"must be a Langevin, got 0.1: a step size alone is Langevin\(0.1\)"),
        ((2, 60), "got 60: .* numbers of chains and steps have names"),
        ((Langevin(0.1), Langevin(0.1)), "a rule is passed once, got two"),
    ],
)
def test_what_is_no_rule_is_refused_with_the_likely_mistake(arguments, match):
    with pytest.raises(TypeError, match=match):
        langevin_sample(gaussian(), *arguments)


def test_other_places_say_so_too():
    with pytest.raises(TypeError, match=r"got Langevin: a whole sampler is passed as rule="):
        langevin_sample(gaussian(), step_size=Langevin(0.1))
    pool = ChainPool(10, 2, seed=0)
    for rule in (0.1, Langevin, None):
        for call in (
            lambda rule=rule: pool.sample(gaussian(), 5, rule, 2),
            lambda r=rule: pool.advance(gaussian(), r, 2),
        ):
            with pytest.raises(TypeError, match="the sampler must be a Langevin or another sampler of fastebm, got"):
                call()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_rule_in_a_compiled_call():
    torch._dynamo.reset()
    energy, x = MLPEnergy(2, (8,)), torch.randn(4, 2)
    given = Langevin(torch.rand(4, 1) + 0.1, clamp=(-1.0, torch.ones(2)), grad_clip=0.5)
    options = {"seed": 3, "steps": 3}

    def built_within(x):
        return langevin_sample(energy, Langevin(0.1), init=x, **options)

    def passed_in(x, rule):
        return langevin_sample(energy, 2, rule, init=x, **options)

    def beside(x):
        return langevin_sample(energy, given, init=x, step_size=0.5)

    whole = {"fullgraph": True, "backend": "eager"}
    assert torch.equal(torch.compile(built_within, **whole)(x), built_within(x))
    assert torch.equal(torch.compile(passed_in, **whole)(x, given), passed_in(x, given))
    assert torch.equal(torch.compile(passed_in, **whole)(x, Langevin(0.3)), passed_in(x, Langevin(0.3)))
    with pytest.raises(Exception, match="a rule holds step_size= itself"):
        torch.compile(beside, **whole)(x)
    # no MLP: it runs uncompiled, with the rule
    function = torch.compile(
        lambda: langevin_sample(gaussian(), Langevin(0.1), batch_size=4, **options), backend="eager"
    )
    assert torch.equal(function(), langevin_sample(gaussian(), Langevin(0.1), batch_size=4, **options))


# -- a Gaussian's own shape -------------------------------------------------------------------------------------


class Other(nn.Module):
    def forward(self, x):
        return x.flatten(1).square().sum(1)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (gaussian, (2,)),
        (lambda: GaussianEnergy([0.5]), (1,)),
        (lambda: GaussianEnergy(0.0, torch.ones(2, 3)), (2, 3)),
        (lambda: GaussianEnergy([[1.0], [2.0]], [1.0, 2.0, 3.0]), (2, 3)),
        (lambda: SumEnergy([gaussian(), GaussianEnergy(), Other()]), (2,)),
        (lambda: SumEnergy([SumEnergy([Other(), gaussian()], [0.1, 1.0])]), (2,)),
        (lambda: SumEnergy([gaussian(), MLPEnergy(2, (8,))]), (2,)),
    ],
)
def test_a_gaussian_tells_the_shape_of_a_state(make, shape):
    assert langevin_sample(make(), Langevin(0.01), batch_size=3, steps=1).shape == (3, *shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianEnergy(),
        lambda: SumEnergy([GaussianEnergy(), Other()]),
        lambda: SumEnergy([GaussianEnergy([0.0]), Other()]),  # a number, as a list
        lambda: SumEnergy([gaussian(), GaussianEnergy([1.0, 2.0, 3.0])]),
    ],
)
def test_what_tells_no_shape_asks_for_it(make):
    with pytest.raises(ValueError, match="pass input_size= or init=: the energy does not tell"):
        langevin_sample(make(), Langevin(0.1))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("a",), TypeError, "mean must be a number, or numbers of one state's shape, got 'a'"),
        (([[1.0], [1.0, 2.0]],), TypeError, "mean must be a number, or numbers"),
        (([],), ValueError, "mean must be finite, got tensor"),
        ((0.0, None), TypeError, "std must be a number"),
        (([1.0, 2.0], [1.0, 2.0, 3.0]), ValueError, r"one state's shape, got shapes \(2,\) and \(3,\)"),
    ],
)
def test_what_is_no_gaussian_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        GaussianEnergy(*arguments)


# -- where the defaults do not suit -----------------------------------------------------------------------------


def test_an_explosion_under_the_defaults_says_what_they_are_for():
    for rule in ((), (Langevin(),), (Langevin(clamp=(-math.inf, 1e30)),)):
        with pytest.raises(NonFiniteError, match=ADVICE):
            langevin_sample(gaussian(), 2, *rule, init=torch.zeros(4, 2))
    pool = ChainPool(10, 2, seed=0)
    with pytest.raises(NonFiniteError, match=ADVICE):
        pool.sample(gaussian(), 5, Langevin(), 60)
    with pytest.raises(NonFiniteError, match=r"\. noise_scale = 0\.005 is a default, of a recipe"):
        langevin_sample(gaussian(), 2, step_size=11.0)
    with pytest.raises(NonFiniteError) as caught:
        langevin_sample(gaussian(), Langevin(11.0))
    assert "default" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_so_does_one_in_a_compiled_call():
    torch._dynamo.reset()
    energy = MLPEnergy(2, (8,))
    with torch.no_grad():
        energy[2].weight.fill_(1e38)
    x = torch.randn(4, 2)
    with pytest.raises(NonFiniteError, match=ADVICE):
        torch.compile(lambda x: langevin_sample(energy, init=x), fullgraph=True, backend="eager")(x)


def warned(*arguments, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        langevin_sample(*arguments, seed=0, **options)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("energy", "clamp"),
    [
        (GaussianEnergy(), (-3.0, 3.0)),
        (GaussianEnergy(0.5, [0.3, 0.4]), (0.0, 1.0)),
        (GaussianEnergy(), (torch.tensor([-1.0, -2.0]), 2.0)),
        (Other(), (-3.0, 3.0)),
        (nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 1)), (-3.0, 3.0)),
    ],
)
@pytest.mark.parametrize("steps", [7, 60])
def test_a_clamp_that_hides_too_large_a_step_is_told(energy, clamp, steps):
    if isinstance(energy, nn.Sequential):  # sum_d log(2 cosh(4 x_d)): a bowl
        with torch.no_grad():
            energy[0].weight.copy_(torch.tensor([[8.0, 0.0], [-8.0, 0.0], [0.0, 8.0], [0.0, -8.0]]))
            energy[0].bias.zero_()
            energy[2].weight.fill_(1.0)
    (message,) = warned(energy, 2, clamp=clamp, steps=steps)
    assert "from one bound of the clamp to the other" in message
    assert "are defaults" in message
    assert warned(energy, 2, Langevin(0.01, clamp=clamp), steps=steps) == []
    assert warned(energy, 2, Langevin(clamp=clamp), steps=steps, return_trajectory=True) == [message]
    assert warned(energy, 2, clamp=clamp, steps=0) == []
    assert warned(energy, 2, clamp=clamp, steps=steps, batch_size=0) == []


class Slope(nn.Module):
    """Steep, towards the upper bound in half of the dims and the lower one in the others: images of black and white."""

    def forward(self, x):
        return 100 * (x[:, ::2].sum(1) - x[:, 1::2].sum(1))


@pytest.mark.parametrize("energy", [Slope(), GaussianEnergy([9.0, -9.0] * 4), MLPEnergy(8, (16,))])
def test_states_that_stay_on_the_bounds_are_no_fault(energy):
    x = torch.randint(2, (20, 8)).float()
    assert warned(energy, init=x, clamp=(0.0, 1.0)) == []
    assert warned(energy, init=x, clamp=(0.0, 1.0), frozen=torch.ones(8, dtype=torch.bool)) == []


def test_half_of_the_coordinates_are_not_most():
    half = GaussianEnergy(0.0, [1.0, 100.0])  # the second hardly moves
    x = torch.tensor([[3.0, 0.0]] * 5)
    assert warned(half, init=x, clamp=(-3.0, 3.0)) == []
    assert len(warned(GaussianEnergy(0.0, [1.0, 100.0, 1.0]), init=x[:, [0, 1, 0]], clamp=(-3.0, 3.0))) == 1


def test_a_pool_is_silent():
    pool = ChainPool(10, 2, clamp=(-3.0, 3.0), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.sample(GaussianEnergy(), 5, Langevin(), 7)
        pool.advance(GaussianEnergy(), Langevin(), 7)


def test_the_look_at_the_bounds_leaves_the_samples_and_the_generator(monkeypatch):
    def sample():
        torch.manual_seed(0)
        x = langevin_sample(GaussianEnergy(), 2, batch_size=4, steps=7, clamp=(-3.0, 3.0))
        return x, torch.get_rng_state()

    with pytest.warns(UserWarning, match="too large"):
        looked = sample()
    monkeypatch.setattr("fastebm.driver.langevin_sample._warn_of_jumps", lambda *arguments: None)
    assert all(map(torch.equal, looked, sample()))
