"""Modules as people write them: each is read for what it is, or goes by autograd; the reference is the truth."""

import argparse
import functools
import gc
import itertools
import random
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from fastebm import (
    Activation,
    ChainPool,
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    Negative,
    SumEnergy,
    langevin_sample,
    why_not_fused,
)
from fastebm.energies import energy as energy_of

DIM, N = 6, 5


pytestmark = pytest.mark.usefixtures("seeded")


def mlp(dim: int = DIM, out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 8), nn.SiLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, out))


def sampled(model, backend, *, shape=(DIM,), **options):
    start = torch.linspace(-1, 1, N * int(np.prod(shape))).reshape(N, *shape)
    rule = {"steps": 4, "step_size": 0.3, "noise_scale": 0.5, "seed": 3, "init": start}
    return langevin_sample(model, backend=backend, return_info=True, **{**rule, **options})


def assert_same(model, *, path, shape=(DIM,), **options):
    """All paths, those in Triton's interpreter too, agree with the reference. path: what the default call takes."""
    expected, _ = sampled(model, "reference", shape=shape, **options)
    for backend in ("auto", "torch"):
        found, info = sampled(model, backend, shape=shape, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert info.path == path, info.why_not_fused
    found, info = sampled(model, "triton", shape=shape, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # products of three bf16 parts
    assert info.path == ("resident" if path == "tiles" else path)
    start, _ = sampled(model, "torch", shape=shape, **options, steps=0)
    wide, info = sampled(model, "torch", shape=shape, **options, init=start.double())
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-4)
    assert info.path == path


# -- what is read ------------------------------------------------------------------------------------------------


class Usual(nn.Module):
    """The usual wrapper."""

    def __init__(self, dim=DIM):
        super().__init__()
        self.net = mlp(dim)

    def forward(self, x):
        return self.net(x).squeeze(-1)


class Layers(nn.Module):
    """Layers by name, and activations as functions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(DIM, 8), nn.Linear(8, 7), nn.Linear(7, 1)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        h = F.leaky_relu(self.first(x), 0.2)
        h = F.dropout(self.drop(h), 0.4, training=self.training)
        return self.out(F.softplus(self.second(h), beta=2.0))[:, 0]


class Methods(Layers):
    def forward(self, x):
        return self.out(torch.relu(self.second(self.first(x).tanh()))).flatten()


class Listed(nn.Module):
    """A ModuleList, a loop, and branches on the types of layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(mlp())
        self.seen = []

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if type(layer) is nn.Linear else F.gelu(x, approximate="tanh")
        return x.view(-1)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(12)

    def forward(self, images):
        return -self.net(images.view(images.size(0), -1)).squeeze()


class OtherImages(Images):
    def forward(self, images):
        return self.net(torch.flatten(images, start_dim=1)).view(images.shape[0]) * 2


class Parameters(nn.Module):
    """Weights that are no layer's."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, DIM) / 3)
        self.b = nn.Parameter(torch.randn(8))
        self.v = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return -0.5 * F.linear(F.elu(F.linear(x, self.w, self.b), alpha=1.5), weight=self.v)


class Optional(Usual):
    """Labels are optional: without them it is an MLP."""

    def forward(self, x, y=None, *, scale=1.0):
        out = self.net(x).squeeze(1)
        return out if y is None else out + (x - 6.0 * y[:, None] + 3.0).square().sum(1) / 2


class Parent(Layers):
    def __init__(self):
        super().__init__()
        self.inner = Usual()
        self.scale = 3

    def forward(self, x):
        return self.inner(x) / self.scale


class Normed(Usual):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.net[0])
        nn.utils.parametrizations.weight_norm(self.net[2])


READ = {
    "usual": Usual,
    "layers": Layers,
    "methods": Methods,
    "listed": Listed,
    "parameters": Parameters,
    "optional labels": Optional,
    "wrapper of a wrapper": Parent,
    "norms": Normed,
    "in a Sequential": lambda: nn.Sequential(Usual(), nn.Identity()),
    "an MLPEnergy inside": lambda: told(lambda self, x: -self.inner(x), inner=MLPEnergy(DIM, (5, 4)))(),
    "Negative": lambda: Negative(Usual()),
    "a term of a sum": lambda: SumEnergy([Parent(), GaussianEnergy(0.0, 2.0), Usual()], [0.5, 1.0, -0.5]),
    "an average": lambda: AveragedModel(Usual()),
    "a weight average of a sum": lambda: AveragedModel(SumEnergy([Usual(), GaussianEnergy()])),
}


@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_the_usual_wrappers_take_the_fast_path(make, untouched):
    model = make().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with untouched(model):
        assert_same(model, path="tiles")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [Images, OtherImages])
@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (12,)])
def test_images_take_the_fast_path(make, shape):
    assert_same(make(), path="tiles", shape=shape)


def test_images_that_the_module_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"does not take states of shape \(n_chains, 2, 3\)"):
        sampled(Usual(), "auto", shape=(2, 3))


def test_numbers_of_now_are_read():
    """Nothing of a reading is kept."""
    model = Parent()
    before, _ = sampled(model, "auto")
    model.scale = -3
    assert_same(model, path="tiles")
    assert not torch.allclose(sampled(model, "auto")[0], before)


def test_reading_disturbs_no_other_thread():
    """Modules that others call while one is read are called as ever."""
    model, other, stop, errors = Parent(), mlp(), threading.Event(), []

    def call():
        x = torch.ones(2, DIM)
        expected = other(x)
        while not stop.is_set():
            if not torch.equal(other(x), expected):
                errors.append("another value")

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(100):
        why_not_fused(model)
    stop.set()
    thread.join()
    assert not errors


# -- what is no MLP, though its values at a few points may be one's ------------------------------------------------


class RunningMaximum(Usual):
    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return super().forward(x)


class Counts(Usual):
    """Its energy cools with every call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) / (1 + self.calls)


class Remembers(Usual):
    def forward(self, x):
        self.last = x
        return super().forward(x)


class Logs(Usual):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x)


class Saturates(Usual):
    """Beyond all points at which one would look."""

    def forward(self, x):
        return super().forward(x.clamp(-1e6, 1e6))


class OnlyHere(Usual):
    """Another energy on a small set."""

    def forward(self, x):
        return super().forward(x) + 5.0 * (x[:, 0] - 0.2).abs().clamp(max=0.1)


class Branches(Usual):
    def forward(self, x):
        out = super().forward(x)
        return out if float(x.detach().sum()) > 1e9 else 2 * out + x.square().sum(1)


class Straight(Usual):
    """The gradient passes straight through."""

    def forward(self, x):
        return super().forward(x + (x.round() - x).detach())


class Half(Usual):
    def forward(self, x):
        out = super().forward(x)
        return out + out.detach()


class Skips(Layers):
    def forward(self, x):
        h = F.silu(self.first(x))
        return self.out(F.silu(self.second(h)) + h[:, :7]).squeeze(-1)


class TensorHook(Usual):
    def forward(self, x):
        out = super().forward(x)
        if out.requires_grad:
            out.register_hook(lambda grad: 2 * grad)
        return out


class Autocast(Usual):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Randomised(Usual):
    """By Python's own generator, of which no tensor tells."""

    def forward(self, x):
        return super().forward(x) * (1.0 + 0.0 * np.random.rand())  # noqa: NPY002


class TensorScale(Usual):
    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) / self.temperature


class Reshapes(Usual):
    """Pairs of dims, each with an energy of its own."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2)

    def forward(self, x):
        return self.net(x.reshape(-1, 2)).view(x.shape[0], -1).sum(1)


def told(forward, **attributes):
    """A ``Layers`` with this forward, and attributes."""

    def make():
        model = type("Told", (Layers,), {"forward": forward})()
        for name, value in attributes.items():
            setattr(model, name, value() if isinstance(value, types.FunctionType) else value)
        return model

    return make


def body(self, x):
    return self.out(F.silu(self.second(F.silu(self.first(x))))).squeeze(-1)


def clamps_weights(self, x):
    self.out.weight.data.clamp_(min=0.0)
    return body(self, x)


def normalises_weights(self, x):
    self.first.weight.data = self.first.weight.data / self.first.weight.data.norm(dim=1, keepdim=True)
    return body(self, x)


def other_weights(self, x):
    doubled = {name: 2 * p for name, p in self.first.named_parameters()}
    return self.out(F.silu(self.second(torch.func.functional_call(self.first, doubled, (x,))))).squeeze(-1)


def swapped_weights(self, x):
    kept = self.first._parameters["weight"]
    self.first._parameters["weight"] = self.spare
    value = body(self, x)
    self.first._parameters["weight"] = kept
    return value


def drops(self, x):
    self.drop.train()
    h = self.drop(F.silu(self.first(x)))
    self.drop.eval()
    return self.out(F.silu(self.second(h))).squeeze(-1) * 0 + x.square().sum(1)


def by_instance(self, x):
    return body(self, x) * (3 if isinstance(x, torch.Tensor) else 1)


def by_helper(self, x):
    return body(self, x) * (3 if is_a_tensor(x) else 1)


def is_a_tensor(x):
    return torch.is_tensor(x)


def by_attribute(self, x):
    return body(self, x) * (1 if hasattr(x, "requires_grad") else 3)


def catches(self, x):
    try:
        return body(self, x) * len(x)
    except Exception:
        return body(self, x)


def catches_a_tensor(self, x):
    try:
        return self.out(F.silu(self.second(F.silu(F.linear(x, self.plain))))).squeeze(-1)
    except Exception:
        return body(self, x)


def catches_a_number(self, x):
    try:
        return body(self, x) * float(x.detach().abs().mean() > -1) * 2
    except Exception:
        return body(self, x)


def iterates(self, x):
    return body(self, x) * next(self.numbers)


class Schedule:
    t = 0


def schedules(self, x):
    self.schedule.t += 1
    return body(self, x) / (1 + self.schedule.t)


def halves_a_tensor(self, x):
    self.beta.mul_(0.5)
    return body(self, x) * self.beta


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


reverse = Reversed.apply


def reverses(self, x):
    return self.out(Reversed.apply(F.silu(self.second(F.silu(self.first(x)))))).squeeze(-1)


def reverses_by_name(self, x):
    return self.out(reverse(F.silu(self.second(F.silu(self.first(x)))))).squeeze(-1)


def counts_in_the_class(self, x):
    type(self).calls = getattr(type(self), "calls", 0) + 1
    return body(self, x) / (1 + type(self).calls)


class Scaled(torch.Tensor):
    """A subclass with arithmetic of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(torch.Tensor) if func is F.linear else result


def subclass_weight():
    model = mlp()
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Scaled))
    return model


def one_bias():
    model = mlp()
    model[0].bias = nn.Parameter(torch.full((1,), 1.0))
    return model


class CallImpl(nn.Linear):
    def _call_impl(self, *args, **kwargs):
        return 2 * super()._call_impl(*args, **kwargs)


def replaced_forward():
    model = Usual()
    inner = model.forward
    model.forward = lambda x: 2 * inner(x) + x.square().sum(1)
    return model


def replaced_on_a_layer():
    model = mlp()
    linear = model[2].forward
    model[2].forward = lambda x: 2 * linear(x)
    return model


def replaced_by_partial():
    model = mlp()
    model.forward = functools.partial(lambda x, f: f(x).abs(), f=model.forward)
    return model


def hooked(register, hook, at=None):
    def make():
        model = Usual()
        getattr(model if at is None else model.net[at], register)(hook)
        return model

    return make


OTHERS = {
    "running maximum": RunningMaximum,
    "counts its calls": Counts,
    "remembers": Remembers,
    "logs": Logs,
    "saturates": Saturates,
    "another energy somewhere": OnlyHere,
    "branches": Branches,
    "straight through": Straight,
    "half detached": Half,
    "skips": Skips,
    "hook on a tensor": TensorHook,
    "autocast": Autocast,
    "random": Randomised,
    "tensor scale": TensorScale,
    "reshapes": Reshapes,
    "forward of the instance": replaced_forward,
    "forward of a layer": replaced_on_a_layer,
    "partial": replaced_by_partial,
    "forward hook": hooked("register_forward_hook", lambda m, i, out: 2 * out),
    "hook on a layer": hooked("register_forward_hook", lambda m, i, out: 2 * out, at=1),
    "pre-hook": hooked("register_forward_pre_hook", lambda m, i: (2 * i[0],)),
    "pre-hook on a Linear": hooked("register_forward_pre_hook", lambda m, i: (2 * i[0],), at=2),
    "gradient hook": hooked("register_full_backward_hook", lambda m, gi, go: (3 * gi[0],), at=0),
    "gradient pre-hook": hooked("register_full_backward_pre_hook", lambda m, go: (3 * go[0],), at=2),
    "sum of one that counts": lambda: SumEnergy([Counts(), GaussianEnergy()]),
    "average with a hook": lambda: hooked_average(),
    "clamps its weights": told(clamps_weights),
    "normalises its weights": told(normalises_weights),
    "other weights": told(other_weights),
    "swapped weights": told(swapped_weights, spare=lambda: torch.ones(8, DIM)),
    "drops out": told(drops),
    "asks isinstance": told(by_instance),
    "asks in a helper": told(by_helper),
    "asks for an attribute": told(by_attribute),
    "catches an error": told(catches),
    "catches that of a tensor": told(catches_a_tensor, plain=lambda: torch.full((8, DIM), 0.1)),
    "catches that of a number": told(catches_a_number),
    "iterator": told(iterates, numbers=lambda: itertools.repeat(0.5)),
    "schedule": told(schedules, schedule=lambda: Schedule()),
    "tensor that halves": told(halves_a_tensor, beta=lambda: torch.tensor(2.0)),
    "autograd function": told(reverses),
    "autograd function by name": told(reverses_by_name),
    "counts in its class": told(counts_in_the_class),
    "subclass of tensors": subclass_weight,
    "one bias for all": one_bias,
    "call of its own": lambda: nn.Sequential(CallImpl(DIM, 4), nn.SiLU(), nn.Linear(4, 1)),
}


def hooked_average():
    model = AveragedModel(Usual())
    model.register_forward_hook(lambda m, i, out: 2 * out)
    return model


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_all_else_goes_by_autograd(make):
    model = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    public = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    assert why_not_fused(model).startswith("not an MLP that can be read")
    # Nothing was called or set to find that out.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {key: value for key, value in vars(model).items() if not key.startswith("_")} == public
    assert getattr(model, "seen", []) == []
    found, info = sampled(model, "auto")
    expected, _ = sampled(make_again(make, state), "reference")
    assert info.path == "autograd"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def make_again(make, state):
    """The same model before its first call."""
    model = make()
    model.load_state_dict(state)
    return model


def test_nothing_of_a_reading_stays():
    """Neither symbols nor numbers, in what a module holds and what its class holds; generators are not moved."""

    class Keeps(Layers):
        def forward(self, x):
            self.seen["all"].append(x)
            self.settings.last = x
            type(self).shared = x
            self.note(x)
            return body(self, x)

        def _note(self, x):
            self.noted = x

    model = Keeps()
    model.seen, model.settings, model.note = {"all": []}, types.SimpleNamespace(last=None), model._note
    assert "changes the module" in why_not_fused(model)
    assert model.seen == {"all": []}
    assert model.settings.last is None
    assert not hasattr(model, "noted")
    assert not hasattr(Keeps, "shared")


draw = np.random.rand


@pytest.mark.parametrize(
    "drawn",
    [
        lambda self, x: body(self, x) * np.random.rand(),  # noqa: NPY002
        lambda self, x: body(self, x) * random.random(),
        lambda self, x: body(self, x) * draw(),
        lambda self, x: body(self, x) + x @ torch.randn(DIM),
        lambda self, x: body(self, x) * float(torch.rand(())),
        lambda self, x: F.dropout(body(self, x), 0.5),
    ],
)
def test_reading_moves_no_generator(drawn):
    model = told(drawn)()
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    torch.manual_seed(0)
    assert why_not_fused(model).startswith("not an MLP that can be read")
    assert np.random.rand() == np.random.RandomState(0).rand()  # noqa: NPY002
    assert random.random() == random.Random(0).random()
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))


def test_objects_that_can_not_be_copied_harm_nothing():
    looped, model = [], Layers()
    looped.append(looped)
    model.attribute = looped
    assert "RecursionError" in why_not_fused(model)
    assert sampled(model, "auto")[1].path == "autograd"

    class NeedsArguments(Layers):
        def __new__(cls, size):
            return super().__new__(cls)

        def __init__(self, size):
            super().__init__()

        def forward(self, x):
            return body(self, x)

    assert sampled(NeedsArguments(3), "auto")[1].path == "autograd"


def test_copies_close_no_files(tmp_path):
    class Logging(Layers):
        def __init__(self):
            super().__init__()
            self.file = (tmp_path / "log").open("w")

        def __del__(self):
            self.file.close()

        def forward(self, x):
            return body(self, x)

    model = Logging()
    assert "has a __del__" in why_not_fused(model)
    gc.collect()
    assert not model.file.closed


@pytest.mark.parametrize(
    "settings", [types.SimpleNamespace(scale=2.0), argparse.Namespace(scale=2.0), Activation("relu", 2.0)]
)
def test_settings_are_read(settings):
    def forward(self, x):
        return body(self, x) * getattr(self.settings, "scale", 2.0)

    assert_same(told(forward, settings=settings)(), path="tiles")


def test_a_module_with_a_forward_of_its_own_is_let_go():
    model = Usual()
    model.forward = types.MethodType(Optional.forward, model)
    sampled(model, "auto", labels=LABELS)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "change", [lambda m: m.append(Usual()), lambda m: m.pop(0), lambda m: m.extend([Usual(), Usual()])]
)
def test_sums_with_fewer_or_more_weights_than_energies_are_refused(change):
    model = SumEnergy([Usual(), Usual()], [1.0, 2.0])
    change(model.energies)
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match="a SumEnergy has one weight per energy, got 2 for"):
            sampled(model, backend)


def test_a_global_hook_is_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, out: 2 * out)
    try:
        assert "hook on all modules" in why_not_fused(mlp())
        assert sampled(mlp(), "auto")[1].path == "autograd"
    finally:
        handle.remove()
    assert sampled(mlp(), "auto")[1].path == "tiles"


def test_no_grad_in_a_forward_is_an_error_and_no_gradient_of_ours():
    class Frozen(Usual):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    for backend in ("auto", "torch", "reference"):
        with pytest.raises(ValueError, match="does not depend on x through differentiable operations"):
            sampled(Frozen(), backend)


# -- labels and conditions -----------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 1, 0, 1])


def pull(x, y):
    """Towards 6 y - 3."""
    return (x - 6.0 * y[:, None] + 3.0).square().sum(1) / 2


class ByName(nn.Module):
    def forward(self, x, scale=1.0, label=None):
        return scale * (x.square().sum(1) / 2 if label is None else pull(x, label))


class KeywordOnly(nn.Module):
    def forward(self, x, *, y=None):
        return x.square().sum(1) / 2 if y is None else pull(x, y)


class Required(nn.Module):
    def forward(self, x, digit):
        return pull(x, digit)


class PositionalOnly(nn.Module):
    def forward(self, x, y, /):
        return pull(x, y)


class Told(nn.Module):
    condition_argument = "group"

    def forward(self, x, scale=1.0, group=None):
        return scale * pull(x, group)


class ToldInOptions(nn.Module):
    condition_argument = "group"

    def forward(self, x, **options):
        return pull(x, options["group"])


class Scripted(nn.Module):
    def forward(self, x, labels):
        return (x - 6.0 * labels[:, None] + 3.0).square().sum(1) / 2


class Steps(nn.Module):
    """Two arguments: timesteps are no labels."""

    def forward(self, x, y=None, t=None):
        assert y is None
        return x.square().sum(1) * (1 + t)


class Prior(nn.Module):
    """Its second argument is no label."""

    def forward(self, x, scale=1.0):
        return scale * x.square().sum(1) / 20


class Anything(nn.Module):
    def forward(self, *args, **kwargs):
        return ByName()(*args, **kwargs)


TAKERS = {
    "optional": Optional,
    "by name": ByName,
    "keyword only": KeywordOnly,
    "required": Required,
    "positional only": PositionalOnly,
    "told": Told,
    "told in options": ToldInOptions,
    "script": lambda: torch.jit.script(Scripted()),
    "sum": lambda: SumEnergy([ByName(), Prior()]),
    "sum with a classifier": lambda: SumEnergy([ClassifierEnergy(mlp(out=2)), KeywordOnly(), Prior()]),
    "average": lambda: AveragedModel(KeywordOnly()),
    "compiled": lambda: torch.compile(ByName(), backend="eager"),
    "both": lambda: torch.compile(AveragedModel(SumEnergy([ByName(), Prior()])), backend="eager"),
}


@pytest.mark.parametrize("make", TAKERS.values(), ids=TAKERS)
def test_labels_reach_the_energy(make):
    model = make()
    assert_same(model, path="autograd", labels=LABELS)
    samples, _ = sampled(model, "auto", labels=LABELS, steps=200, step_size=0.1)
    assert (samples[LABELS == 1] > 0.5).all()
    assert (samples[LABELS == 0] < -0.5).all()


@pytest.mark.parametrize("wrap", [AveragedModel, lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
@pytest.mark.parametrize("inside", [lambda m: m, lambda m: SumEnergy([m, GaussianEnergy()])])
def test_wrapped_classifiers_have_their_closed_form(wrap, inside):
    model = inside(wrap(ClassifierEnergy(mlp(out=3))))
    assert_same(model, path="tiles", labels=LABELS)
    assert_same(model, path="tiles")


def test_a_scale_is_no_label():
    """A term without labels is what it is without them."""
    classifier = ClassifierEnergy(mlp(out=2))
    found, _ = sampled(SumEnergy([classifier, Prior()]), "auto", labels=LABELS)
    expected, _ = sampled(SumEnergy([classifier, GaussianEnergy(0.0, 10**0.5)]), "auto", labels=LABELS)
    torch.testing.assert_close(found, expected)


def test_labels_that_shift_x_have_their_effect():
    """The example of the report: class means of -3 and 3."""
    means = sampled(Optional(), "auto", labels=LABELS, steps=300, step_size=0.05, noise_scale=0.0)[0].mean(1)
    torch.testing.assert_close(means, 6.0 * LABELS - 3.0, rtol=0, atol=0.5)


@pytest.mark.parametrize(
    "make", [Prior, mlp, Usual, GaussianEnergy, lambda: SumEnergy([Prior(), mlp()]), lambda: Negative(mlp())]
)
def test_labels_that_nobody_takes_are_refused(make):
    model = make()
    with pytest.raises(ValueError, match=r"labels= was given, and .*\.forward takes x only, or nothing that is named"):
        sampled(model, "auto", labels=LABELS)


def test_a_name_that_is_none_is_refused():
    class Typo(nn.Module):
        condition_argument = "sgima"

        def forward(self, x, sigma=None):
            return x.square().sum(1)

    with pytest.raises(ValueError, match=r"condition_argument is 'sgima', and Typo\.forward has no argument"):
        sampled(Typo(), "auto", condition=torch.ones(N, 1))


def test_what_is_ambiguous_is_refused():
    class Two(nn.Module):
        def forward(self, x, y=None, target=None):
            return x.square().sum(1)

    for model in (Two(), Anything(), SumEnergy([Prior(), Anything()])):
        with pytest.raises(ValueError, match=r"which of them is the labels is not clear: set condition_argument"):
            sampled(model, "auto", labels=LABELS)
        assert sampled(model, "auto")[0].shape == (N, DIM) if not isinstance(model, Anything) else True


class NoiseLevel(nn.Module):
    """Conditional score models: (batch, 1) noise levels."""

    def forward(self, x, sigma):
        assert sigma.dtype == x.dtype
        return (x.square() / sigma.square()).sum(1) / 2


class Measured(nn.Module):
    """An image to condition on."""

    def forward(self, x, image):
        return (x - image.flatten(1)).square().sum(1)


class Attributes(nn.Module):
    def forward(self, x, *, attributes=None):
        return (x - attributes.to(x.dtype) @ torch.ones(4, DIM, dtype=x.dtype)).square().sum(1)


CONDITIONS = {
    "noise level": (NoiseLevel, torch.linspace(0.5, 2.0, N)[:, None]),
    "noise level in float64": (NoiseLevel, torch.linspace(0.5, 2.0, N, dtype=torch.float64)[:, None]),
    "image": (Measured, torch.linspace(-1, 1, N * 6).reshape(N, 2, 3)),
    "attributes": (Attributes, torch.arange(N)[:, None] > torch.arange(4)),
    "integers": (Attributes, torch.arange(N * 4).reshape(N, 4) % 3),
    "labels": (Optional, LABELS),
    "timesteps": (Steps, torch.arange(N)),
    "classes in int32": (lambda: ClassifierEnergy(mlp(out=2)), LABELS.int()),
    "average": (lambda: AveragedModel(NoiseLevel()), torch.linspace(0.5, 2.0, N)[:, None]),
    "a sum": (lambda: SumEnergy([Prior(), NoiseLevel(), mlp()]), torch.linspace(0.5, 2.0, N)[:, None]),
}


@pytest.mark.parametrize(("make", "condition"), CONDITIONS.values(), ids=CONDITIONS)
def test_a_condition_per_chain_reaches_the_energy(make, condition):
    model, kept = make(), condition.clone()
    assert_same(model, path="autograd", condition=condition)
    assert torch.equal(condition, kept)
    one = sampled(model, "auto", condition=condition[:1].expand_as(condition))[0]
    assert torch.equal(one[0], sampled(model, "auto", condition=condition)[0][0])
    assert not torch.allclose(one[1:], sampled(model, "auto", condition=condition)[0][1:])


@pytest.mark.parametrize(
    ("condition", "error", "match"),
    [
        (torch.ones(N + 1, 1), ValueError, r"condition must be \(5, \.\.\.\), one per chain, on cpu, got \(6, 1\)"),
        (torch.ones(()), ValueError, r"condition must be \(5, \.\.\.\)"),
        ([1.0] * N, TypeError, "condition must be a tensor"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(condition, error, match):
    with pytest.raises(error, match=match):
        sampled(NoiseLevel(), "auto", condition=condition)


def test_one_condition_only():
    with pytest.raises(ValueError, match=r"takes labels= or condition= beside x, got both"):
        sampled(Optional(), "auto", labels=LABELS, condition=LABELS)
    with pytest.raises(ValueError, match="a classifier takes labels"):
        sampled(ClassifierEnergy(mlp(out=2)), "auto", condition=torch.ones(N, 1))
    with pytest.raises(ValueError, match=r"condition= was given, and Sequential\.forward takes x only"):
        sampled(mlp(), "auto", condition=torch.ones(N, 1))


# -- energies that write in place ----------------------------------------------------------------------------------


class Shifts(nn.Module):
    def forward(self, x):
        x -= 0.5
        return x.square().sum(1) / 2


class ByData(nn.Module):
    def forward(self, x):
        x.data.mul_(0.5)
        return x.square().sum(1)


class Clamps(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            x.clamp_(-0.5, 0.5)
        return x.square().sum(1)


class Fills(nn.Module):
    def forward(self, x):
        value = x.sum(1).square()
        x[:, 0] = 7.0
        return value


class Normalises(nn.Module):
    def forward(self, x):
        return x.sub_(0.1).div_(0.7).flatten(1).abs().sum(1)


class WritesToLabels(nn.Module):
    def forward(self, x, y):
        value = pull(x, y)
        y.zero_()
        return value


WRITERS = {
    "shifts": Shifts,
    "by data": ByData,
    "clamps": Clamps,
    "fills": Fills,
    "normalises": Normalises,
    "relu in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, 1)),
    "a sum": lambda: SumEnergy([Shifts(), GaussianEnergy(), Fills()]),
    "a classifier": lambda: ClassifierEnergy(nn.Sequential(nn.Hardtanh(-0.3, 0.3, inplace=True), mlp(out=3))),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_energies_that_write_in_place_write_to_copies(make, backend, dtype):
    model, start = make(), torch.linspace(-1, 1, N * DIM, dtype=dtype).reshape(N, DIM)
    kept = start.clone()
    for steps in (0, 1):
        samples, info = langevin_sample(
            model, init=start, steps=steps, step_size=1e-9, noise_scale=0.0, backend=backend, return_info=True
        )
        assert torch.equal(start, kept)
        torch.testing.assert_close(samples, start, rtol=0, atol=1e-7)
        torch.testing.assert_close(info.energies, energy_of(model.to(dtype), start.clone()).detach())
        model.float()
    expected, _ = sampled(model, "reference")
    torch.testing.assert_close(sampled(model, "auto")[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_pools_are_safe_from_them(make):
    pool = ChainPool(8, DIM, seed=0, reinit_prob=0.0)
    kept = pool.states.clone()
    pool.sample(make(), 4, Langevin(1e-9, 0.0), 0)
    pool.advance(make(), Langevin(1e-9, 0.0), 0)
    torch.testing.assert_close(pool.states, kept, rtol=0, atol=0)


def test_labels_are_safe_too():
    labels, pool = LABELS.clone(), ChainPool(N, DIM, seed=0, labels=LABELS)
    for backend in ("auto", "reference"):
        sampled(WritesToLabels(), backend, labels=labels)
    pool.advance(WritesToLabels(), Langevin(0.1, 0.0), 2)
    assert torch.equal(labels, LABELS)
    assert torch.equal(pool.labels, LABELS)


# -- what depends on the batch -------------------------------------------------------------------------------------


class Squeezes(nn.Module):
    """JEM's idiom: a batch of one is squeezed to a number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Unflatten(1, (1, DIM)), nn.Conv1d(1, 2, DIM))
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        return self.head(F.silu(self.conv(x).flatten(1))).squeeze()


class Batchwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM, track_running_stats=False)

    def forward(self, x):
        return self.norm(x).pow(4).sum(1)


class Correlated(nn.Module):
    """The unbiased variance of one state is NaN."""

    def forward(self, x):
        return ((x - x.mean(0)) / x.std(0)).square().sum(1) + x.square().sum(1)


class Held(nn.Module):
    """A measurement for every chain inside the energy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("measured", torch.randn(N, DIM))

    def forward(self, x):
        return (x - self.measured).square().sum(1)


class HeldAsColumn(Held):
    def forward(self, x):
        return super().forward(x)[:, None]


class Interacting(nn.Module):
    """Chains repel each other (Stein, or a repulsive ensemble)."""

    def forward(self, x):
        others = torch.cdist(x, x).square()
        return x.square().sum(1) + torch.exp(-others).sum(1)


class Paired(nn.Module):
    def forward(self, x):
        return (x - x.roll(1, 0)).square().sum(1)


BATCHED = {
    "squeezes": Squeezes,
    "batch statistics": Batchwise,
    "correlated": Correlated,
    "held": Held,
    "held as a column": HeldAsColumn,
    "interacting": Interacting,
    "paired": Paired,
}


@pytest.mark.parametrize("make", BATCHED.values(), ids=BATCHED)
def test_energies_that_know_their_batch_are_given_the_whole(make):
    assert_same(make(), path="autograd")
    pool = ChainPool(N, DIM, seed=0)
    _, energies = pool.sample(make(), N, Langevin(0.01, 1.0), 2)
    assert energies.isfinite().all()


def test_a_batch_of_one_may_be_squeezed_to_a_number():
    for model in (Squeezes(), Images(), Usual()):
        shape = (12,) if isinstance(model, Images) else (DIM,)
        one = torch.randn(1, *shape)
        for backend in ("auto", "reference"):
            samples, info = langevin_sample(model, init=one, steps=2, backend=backend, return_info=True)
            assert samples.shape == one.shape
            assert info.energies.shape == (1,)
        assert langevin_sample(model, init=one[:0], steps=2).shape == (0, *shape)


def test_energies_of_restarted_chains_are_those_of_the_whole_batch():
    class Explodes(Held):
        def forward(self, x):
            return super().forward(x) + torch.where(x[:, 0] > 0.5, torch.inf, 0.0)

    start = torch.zeros(N, DIM)
    start[3] = 0.9
    model = Explodes()
    samples, info = langevin_sample(
        model, init=start, steps=1, step_size=0.01, noise_scale=0.0, clamp=(-0.1, 0.1), on_nonfinite="reinit",
        return_info=True, seed=1,
    )  # fmt: skip
    torch.testing.assert_close(info.energies, model(samples))


# -- outputs, buffers and numbers of other kinds -------------------------------------------------------------------


class Two(nn.Module):
    """Logits and features, as many networks return them."""

    def __init__(self, out=lambda logits, x: (logits, x)):
        super().__init__()
        self.linear, self.out = nn.Linear(DIM, 3), out

    def forward(self, x):
        return self.out(self.linear(x), x)


@pytest.mark.parametrize("labels", [None, torch.zeros(N, dtype=torch.int64)])
@pytest.mark.parametrize(
    ("out", "got"),
    [
        (lambda logits, x: (logits, x), "tuple"),
        (lambda logits, x: [logits], "list"),
        (lambda logits, x: {"logits": logits}, "dict"),
        (lambda logits, x: logits[:, :, None], r"shape \(5, 3, 1\)"),
        (lambda logits, x: logits[:, 0], r"shape \(5,\)"),
        (lambda logits, x: logits[:2], r"shape \(2, 3\)"),
        (lambda logits, x: None, "NoneType"),
    ],
)
def test_a_classifier_that_returns_something_else(out, got, labels):
    with pytest.raises(
        ValueError, match=f"^a classifier must return a tensor of logits .batch, classes., got {got}: wrap"
    ):
        sampled(ClassifierEnergy(Two(out)), "auto", labels=labels)
    with pytest.raises(ValueError, match=r"an energy maps \(5, \.\.\.\) to \(5,\) or \(5, 1\), got"):
        sampled(Two(out), "auto") if got != r"shape \(5,\)" else sampled(Two(lambda *_: ()), "auto")


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("weight", torch.eye(DIM, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.weight).square().sum(1)


def test_a_parameterless_energy_has_the_dtype_of_its_buffers():
    assert langevin_sample(Buffers(), DIM, steps=1, step_size=0.1).dtype == torch.float64
    assert langevin_sample(GaussianEnergy(torch.zeros(DIM)).double(), DIM, steps=1).dtype == torch.float64
    assert langevin_sample(Buffers().float(), DIM, steps=1, step_size=0.1).dtype == torch.float32
    assert_same(Buffers(), path="autograd")
    with pytest.raises(ValueError, match="the energy is on meta and the chains on cpu: move one"):
        sampled(Buffers().to("meta"), "auto")


WHOLE = [np.int64, np.int32, np.uint8, np.asarray, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int16)]
REAL = [np.float32, np.float64, np.float16, np.asarray, torch.tensor, lambda v: torch.tensor(v).double()]


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_numbers_of_numpy_and_tensors_without_dims(whole, real, backend):
    options = {"batch_size": 4, "steps": 6, "thin": 2, "first_chain": 3, "first_step": 2, "seed": 5}
    numbers = {"step_size": 0.25, "noise_scale": 0.5, "grad_clip": 2.0, "grad_norm_clip": 4.0}
    shared = {"return_trajectory": True, "backend": backend}
    model = mlp()
    expected = langevin_sample(model, DIM, clamp=(-1.0, 0.5), **options, **numbers, **shared)
    found = langevin_sample(
        model, whole(DIM), clamp=(real(-1.0), real(0.5)), **{k: whole(v) for k, v in options.items()},
        **{k: real(v) for k, v in numbers.items()}, **shared,
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_schedules_and_bounds_as_arrays(dtype):
    schedule, per_chain = np.linspace(0.1, 0.2, 4, dtype=dtype), np.linspace(0.1, 1.0, N, dtype=dtype)[:, None]
    bounds = (np.full(DIM, -0.5, dtype), np.linspace(0.5, 1, DIM, dtype=dtype))
    model = mlp()
    for backend in ("auto", "reference"):
        found, info = sampled(model, backend, step_size=schedule, noise_scale=per_chain, clamp=bounds)
        as_tensors = {"step_size": torch.from_numpy(schedule), "noise_scale": torch.from_numpy(per_chain)}
        expected, _ = sampled(model, backend, clamp=tuple(map(torch.from_numpy, bounds)), **as_tensors)
        assert torch.equal(found, expected)
        assert info.temperature.shape == (N, 1)


def test_sizes_of_layers_and_states_as_arrays():
    model = MLPEnergy(np.prod((2, 3)), np.array([4, 5]), dropout=np.float32(0.25))
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [4, 5, 1]
    shape = np.array((2, 3))
    assert langevin_sample(nn.Sequential(nn.Flatten(), model), shape, steps=1).shape == (32, 2, 3)
    assert langevin_sample(nn.Sequential(nn.Flatten(), model), tuple(shape), steps=1).shape == (32, 2, 3)


@pytest.mark.parametrize("bad", [True, np.bool_(True), torch.tensor(True), 2.5, np.float64(2.5), torch.ones(1), "3"])
def test_what_is_no_whole_number_is_refused(bad):
    for name in ("steps", "batch_size", "first_chain", "thin", "first_step", "seed"):
        if name in ("first_step", "seed") and isinstance(bad, torch.Tensor) and bad.ndim == 1:
            continue  # tensors of one element are read on the device
        with pytest.raises((TypeError, ValueError), match=name):
            langevin_sample(mlp(), DIM, **{"steps": 1, name: bad})


@pytest.mark.parametrize("bad", [True, np.bool_(True), "0.1", None, [0.1], np.float32("nan"), torch.tensor(True)])
def test_what_is_no_number_is_refused(bad):
    for name in ("step_size", "noise_scale"):
        with pytest.raises((TypeError, ValueError), match=name):
            langevin_sample(mlp(), DIM, steps=1, **{name: bad})


def test_states_given_as_a_size_are_told_apart():
    with pytest.raises(TypeError, match=r"got Tensor \(5, 6\): states to start from are passed as init="):
        langevin_sample(mlp(), torch.zeros(N, DIM))
    with pytest.raises(TypeError, match=r"input_size must be an int or a shape, got Tensor \(6,\)"):
        langevin_sample(mlp(), torch.zeros(DIM))


# -- networks that put out -E --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, Usual, Images, lambda: nn.Sequential(nn.Linear(DIM, 1), nn.Softsign())])
def test_negative(make):
    network = make()
    dim = 12 if isinstance(network, Images) else DIM
    x = torch.randn(N, dim)
    model = Negative(network)
    torch.testing.assert_close(energy_of(model, x), -network(x).reshape(N))
    start, options = torch.randn(N, dim), {"steps": 3, "step_size": 0.2, "noise_scale": 0.0}
    found = langevin_sample(model, init=start, **options)
    for _ in range(3):
        start = start.requires_grad_()
        (grad,) = torch.autograd.grad(-network(start).sum(), start)
        start = (start - 0.1 * grad).detach()
    torch.testing.assert_close(found, start, rtol=1e-4, atol=1e-5)
    assert isinstance(model, SumEnergy)
