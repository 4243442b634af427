"""Modules as people write them that are read as MLPs, and that reading leaves no trace."""

import argparse
import gc
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
from user_modules import DIM, LABELS, Images, Layers, N, Optional, Usual, assert_same, body, mlp, sampled, with_forward

from fastebm import (
    Activation,
    GaussianEnergy,
    MLPEnergy,
    Negative,
    SumEnergy,
    langevin_sample,
    why_not_fused,
)
from fastebm.energies import energy as energy_of

pytestmark = pytest.mark.usefixtures("seeded")


# -- what is read ------------------------------------------------------------------------------------------------


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


class OtherImages(Images):
    def forward(self, images):
        return self.net(torch.flatten(images, start_dim=1)).view(images.shape[0]) * 2


class Parameters(nn.Module):
    """Weights that do not belong to a layer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, DIM) / 3)
        self.b = nn.Parameter(torch.randn(8))
        self.v = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return -0.5 * F.linear(F.elu(F.linear(x, self.w, self.b), alpha=1.5), weight=self.v)


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
    "an MLPEnergy inside": lambda: with_forward(lambda self, x: -self.inner(x), inner=MLPEnergy(DIM, (5, 4)))(),
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
    """Nothing that was read is cached."""
    model = Parent()
    before, _ = sampled(model, "auto")
    model.scale = -3
    assert_same(model, path="tiles")
    assert not torch.allclose(sampled(model, "auto")[0], before)


def test_reading_disturbs_no_other_thread():
    """While a module is read, other threads can call any module."""
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


# -- reading leaves nothing behind -------------------------------------------------------------------------------------


def test_nothing_of_a_reading_stays():
    """No symbols or numbers stay in the module or in its class."""

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
    model = with_forward(drawn)()
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

    assert_same(with_forward(forward, settings=settings)(), path="tiles")


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


# -- networks that return -E --------------------------------------------------------------------------------------


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
