"""Functions as energies: they are called like modules, and the modules that they call are treated like the user's."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn

import fastebm
from fastebm import (
    ChainPool,
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    Negative,
    SumEnergy,
    build_energy_fn,
    langevin_sample,
    why_not_fused,
)
from fastebm.energies.functions import as_module

pytestmark = pytest.mark.usefixtures("seeded")
RULE = Langevin(0.05)
N, DIM = 6, 3


def bowl(x):
    return x.flatten(1).square().sum(1) / 2


class Bowl(nn.Module):
    def forward(self, x):
        return bowl(x)


class Model(nn.Module):
    """With dropout and running statistics, which eval mode turns off."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, 1))
        self.to(dtype)

    def forward(self, x):
        return self.net(x)

    def energy(self, x):
        return self.net(x)[:, 0]

    def scaled(self, x, scale):
        return scale * self.net(x)[:, 0]


class Plain:
    """An object that holds a module, but is not one."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)[:, 0]

    def energy(self, x):
        return self.net(x)[:, 0]


def sample(energy, **options):
    options = {"init": torch.linspace(-1, 1, N * DIM).reshape(N, DIM), "steps": 3, "seed": 0, **options}
    return langevin_sample(energy, RULE, **options)


MODEL = Model()


def by_name(x):
    return MODEL(x)[:, 0]


def through_another(x):
    return by_name(x)


def of_another(net, x):
    return net(x)[:, 0]


# name -> makes a function that calls a model, in the dtype of the model
FUNCTIONS = {
    "method": lambda m: m.energy,
    "partial of a method": lambda m: functools.partial(m.scaled, scale=1.0),
    "partial of a partial": lambda m: functools.partial(functools.partial(m.scaled), scale=1.0),
    "partial of a module": lambda m: functools.partial(m),
    "partial with a module": lambda m: functools.partial(of_another, m),
    "partial with a module by name": lambda m: functools.partial(lambda x, net: net(x)[:, 0], net=m),
    "functional_call": lambda m: functools.partial(torch.func.functional_call, m, {}),
    "closure": lambda m: lambda x: m(x)[:, 0],
    "closure of a method": lambda m: (lambda e: lambda x: e(x))(m.energy),
    "inner function": lambda m: lambda x: (lambda y: m(y)[:, 0])(x),
    "vmap": lambda m: torch.func.vmap(lambda x: m(x[None])[0, 0]),
    "object": Plain,
    "method of an object": lambda m: Plain(m).energy,
    "function with a hold on it": lambda m: functools.wraps(by_name)(lambda x: m.net(x).squeeze(1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_is_the_module_that_it_calls(name, dtype, untouched):
    """It runs in eval mode, its parameters are found, and its mode is restored."""
    model = Model(dtype).train()
    function = FUNCTIONS[name](model)
    with untouched(model):
        found, info = sample(function, return_info=True)
        expected, expected_info = sample(model, return_info=True)
        assert langevin_sample(function, DIM, RULE, steps=1, batch_size=2, seed=0).dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(info.energies, expected_info.energies)
    assert info.path == "autograd"


@pytest.mark.parametrize("function", [by_name, through_another, lambda x: by_name(x)])
def test_modules_that_are_global_variables_are_found(function, untouched):
    MODEL.train()
    with untouched(MODEL):
        assert torch.equal(sample(function), sample(MODEL))


def test_float64_is_float64_end_to_end():
    model = Model()
    x = torch.randn(N, DIM, dtype=torch.float64)
    found = sample(model.energy, init=x)
    assert torch.equal(found, sample(model, init=x))
    assert torch.equal(found, sample(copy.deepcopy(model).double(), init=x))


def test_what_is_only_named_like_a_module_is_not_taken_for_it():
    class Holder:
        MODEL = staticmethod(bowl)

    holder = Holder()
    assert list(as_module(lambda x: holder.MODEL(x)).children()) == []
    assert list(as_module(torch.sum).children()) == []
    models = [MODEL]
    assert list(as_module(lambda x: models[0](x)[:, 0]).children()) == []  # as documented


# -- wherever an energy is taken --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_every_backend_takes_functions(backend, device):
    home = device if backend == "triton" else "cpu"
    x = torch.linspace(-1, 1, N * DIM, device=home).reshape(N, DIM)
    for function in (bowl, lambda x: bowl(x)[:, None]):
        assert torch.equal(sample(function, backend=backend, init=x), sample(Bowl(), backend=backend, init=x))


def test_pools_take_functions():
    pools = [ChainPool(20, DIM, seed=0) for _ in range(2)]
    for pool, energy in zip(pools, (bowl, Bowl()), strict=True):
        pool.sample(energy, N, RULE, 2)
        pool.advance(energy, RULE, 2, chunk_size=7)
    assert torch.equal(pools[0].states, pools[1].states)
    assert torch.equal(pools[0].energies, pools[1].energies)


def test_sums_and_heads_take_functions():
    x, model = torch.randn(N, DIM), Model().eval()
    torch.testing.assert_close(fastebm.energy(bowl, x), bowl(x))
    torch.testing.assert_close(Negative(bowl)(x), -bowl(x))
    total = SumEnergy([bowl, model.energy, GaussianEnergy()], [2.0, 1.0, 1.0])
    torch.testing.assert_close(total(x), 3 * bowl(x) + model.energy(x))
    assert {p.shape for p in total.parameters()} == {p.shape for p in model.parameters()}
    net = nn.Linear(DIM, 4)
    classifier = ClassifierEnergy(lambda x: net(x))
    assert torch.equal(classifier(x), ClassifierEnergy(net)(x))
    assert torch.equal(
        sample(classifier, labels=torch.arange(N) % 4), sample(ClassifierEnergy(net), labels=torch.arange(N) % 4)
    )
    assert torch.equal(build_energy_fn(torch.relu, DIM)(x) * 0, torch.zeros(N, 1))
    twin = copy.deepcopy(SumEnergy([model.energy]))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert bool(twin(x).any())  # the method of the copy


def test_why_not_fused_says_that_it_is_a_function():
    for energy, name in ((bowl, "bowl"), (Model().energy, "Model.energy"), (functools.partial(bowl), "bowl")):
        assert f"the energy is the function {name}, and only modules are read; autograd's" in why_not_fused(energy)
    assert "energies.0 is" not in why_not_fused(SumEnergy([bowl]))
    assert "is the function bowl" in why_not_fused(SumEnergy([MLPEnergy(DIM, (8,)), bowl]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_in_torch_compile_they_run_uncompiled():
    torch._dynamo.reset()
    x = torch.randn(N, DIM)

    def moved(x):
        return langevin_sample(bowl, RULE, init=x, steps=2, seed=0) + 1

    assert torch.equal(torch.compile(moved, backend="eager")(x), moved(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="langevin_sample compiles in whole for MLP energies only"):
        torch.compile(moved, backend="eager", fullgraph=True)(x)


def test_compiled_functions_are_energies():
    torch._dynamo.reset()
    x = torch.randn(N, DIM)
    torch.testing.assert_close(sample(torch.compile(bowl, backend="eager"), init=x), sample(bowl, init=x))


# -- labels and conditions --------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    def forward(self, x, sigma):
        return bowl(x) / sigma.square()

    def of_class(self, x, labels=None):
        return bowl(x) if labels is None else bowl(x - labels[:, None])


def named(x, sigma):
    return bowl(x) / sigma.square()


def misnamed(x, width):
    return named(x, width)


def two(x, width, height):
    return named(x, width) + 0 * height


def test_conditions_go_by_the_names_of_a_function_s_arguments():
    sigma, labels = torch.linspace(0.5, 1.5, N), torch.arange(N)
    expected = sample(Conditioned(), condition=sigma)
    for function in (named, misnamed, lambda x, sigma: named(x, sigma), functools.partial(misnamed)):
        assert torch.equal(sample(function, condition=sigma), expected)
    assert torch.equal(sample(functools.partial(two, height=1.0), condition=sigma), expected)
    of_class = sample(Conditioned().of_class, labels=labels)
    assert torch.equal(of_class, sample(lambda x, y: bowl(x - y[:, None]), labels=labels))
    assert torch.equal(sample(Conditioned().of_class), sample(bowl))
    with pytest.raises(
        ValueError, match=r"lambda> takes \(cond, context\) besides x, and which of them is the condition"
    ):
        sample(lambda x, cond, context: bowl(x), condition=sigma)
    with pytest.raises(ValueError, match=r"condition= was given, and bowl takes x only"):
        sample(bowl, condition=sigma)
    with pytest.raises(ValueError, match=r"labels= was given, and .*sum takes x only"):
        sample(torch.sum, labels=labels)


def test_a_function_may_name_its_argument():
    def function(x, height, width):
        return named(x, width) + 0 * (height or 0)

    function.condition_argument = "width"
    bound = functools.partial(function, height=None)
    bound.condition_argument = "width"
    sigma = torch.linspace(0.5, 1.5, N)
    assert torch.equal(sample(bound, condition=sigma), sample(named, condition=sigma))
    function.condition_argument = "depth"
    with pytest.raises(ValueError, match=r"condition_argument is 'depth', and .*function has no argument"):
        sample(function, condition=sigma)


# -- what is not an energy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "match"),
    [
        (MLPEnergy, r"got the class MLPEnergy: are its parentheses missing, as in MLPEnergy\(\.\.\.\)\?"),
        (nn.Sequential, "got the class Sequential: are its parentheses missing"),
        ("runs/digits", r"got 'runs/digits': the energy of a run folder is fastebm\.load\(RUN\)\.model"),
        (torch.zeros(4, 3), r"got Tensor \(4, 3\): it is the first argument"),
        (torch.zeros(4, 3).numpy(), r"got ndarray \(4, 3\): it is the first argument"),
        (None, "got NoneType: is a return missing"),
        ((Bowl(), 3), r"got tuple of Bowl, int: pass one of them, or their sum, SumEnergy\(\[\.\.\.\]\)"),
        ([Bowl()], "got list of Bowl: pass one of them"),
        (3, "got int$"),
    ],
)
def test_what_is_no_energy_is_refused_with_the_likely_mistake(energy, match):
    x = torch.zeros(4, 3)
    pool = ChainPool(10, DIM, seed=0)
    for call in (
        lambda: langevin_sample(energy, DIM),
        lambda: langevin_sample(energy, RULE, init=x),
        lambda: why_not_fused(energy),
        lambda: fastebm.energy(energy, x),
        lambda: pool.sample(energy, 4, RULE, 2),
        lambda: pool.advance(energy, RULE, 2),
    ):
        with pytest.raises(TypeError, match=f"^energy must be an nn.Module or a function .*{match}"):
            call()
    with pytest.raises(TypeError, match=r"^classifier must be an .* or a function"):
        ClassifierEnergy(energy)
    for build in (lambda: SumEnergy([energy]), lambda: Negative(energy), lambda: SumEnergy([Bowl(), energy])):
        with pytest.raises(TypeError, match=r"^each energy of a sum must be an .* or a function"):
            build()


def test_states_and_energy_the_wrong_way_round():
    with pytest.raises(TypeError, match="states to start from are init="):
        langevin_sample(torch.zeros(4, 3), bowl)


@pytest.mark.parametrize("energies", [MLPEnergy(DIM, (8,)), bowl, Bowl(), 3])
def test_a_sum_takes_a_list(energies):
    """Iterating over an MLPEnergy gives its layers, which are not energies."""
    with pytest.raises(TypeError, match=r"a SumEnergy takes a list of energies, as in SumEnergy\(\[f, g\]\), got"):
        SumEnergy(energies)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: bowl(x).sum(), "one number for the whole batch; drop the mean"),
        (lambda x: bowl(x).detach(), r"is there a detach\(\)"),
        (lambda x: x.square().sum(1), r"a state has shape \(2, 3\); sum over all dims of it"),
        (lambda: 0, "does not take states of shape .*takes 0 positional arguments"),
        (lambda x, scale: scale * bowl(x), "does not take states of shape .*missing 1 required positional argument"),
    ],
)
def test_what_a_function_returns_is_checked_too(function, match):
    with pytest.raises(ValueError, match=match):
        langevin_sample(function, (2, 3), RULE)


def test_signatures_of_all_takers_say_so():
    for taker, name in ((langevin_sample, "energy"), (why_not_fused, "energy"), (ChainPool.sample, "energy")):
        assert inspect.signature(taker).parameters[name].annotation == "EnergyLike"
