"""Modules that are not MLPs, though at a few points they may have the values of one: autograd computes them."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from user_modules import DIM, Layers, Usual, body, mlp, sampled, with_forward

from fastebm import (
    GaussianEnergy,
    SumEnergy,
    why_not_fused,
)

pytestmark = pytest.mark.usefixtures("seeded")


class RunningMaximum(Usual):
    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return super().forward(x)


class Counts(Usual):
    """Its energy changes with every call."""

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
    """It differs from an MLP only far away."""

    def forward(self, x):
        return super().forward(x.clamp(-1e6, 1e6))


class OnlyHere(Usual):
    """It differs from an MLP only on a small set."""

    def forward(self, x):
        return super().forward(x) + 5.0 * (x[:, 0] - 0.2).abs().clamp(max=0.1)


class Branches(Usual):
    def forward(self, x):
        out = super().forward(x)
        return out if float(x.detach().sum()) > 1e9 else 2 * out + x.square().sum(1)


class Straight(Usual):
    """A straight-through gradient."""

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
    """Random numbers of NumPy, which no tensor operation shows."""

    def forward(self, x):
        return super().forward(x) * (1.0 + 0.0 * np.random.rand())  # noqa: NPY002


class TensorScale(Usual):
    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) / self.temperature


class Reshapes(Usual):
    """A sum of energies of pairs of dims."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2)

    def forward(self, x):
        return self.net(x.reshape(-1, 2)).view(x.shape[0], -1).sum(1)


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
    """A subclass with its own arithmetic."""

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
    "clamps its weights": with_forward(clamps_weights),
    "normalises its weights": with_forward(normalises_weights),
    "other weights": with_forward(other_weights),
    "swapped weights": with_forward(swapped_weights, spare=lambda: torch.ones(8, DIM)),
    "drops out": with_forward(drops),
    "asks isinstance": with_forward(by_instance),
    "asks in a helper": with_forward(by_helper),
    "asks for an attribute": with_forward(by_attribute),
    "catches an error": with_forward(catches),
    "catches that of a tensor": with_forward(catches_a_tensor, plain=lambda: torch.full((8, DIM), 0.1)),
    "catches that of a number": with_forward(catches_a_number),
    "iterator": with_forward(iterates, numbers=lambda: itertools.repeat(0.5)),
    "schedule": with_forward(schedules, schedule=lambda: Schedule()),
    "tensor that halves": with_forward(halves_a_tensor, beta=lambda: torch.tensor(2.0)),
    "autograd function": with_forward(reverses),
    "autograd function by name": with_forward(reverses_by_name),
    "counts in its class": with_forward(counts_in_the_class),
    "subclass of tensors": subclass_weight,
    "one bias for all": one_bias,
    "call of its own": lambda: nn.Sequential(CallImpl(DIM, 4), nn.SiLU(), nn.Linear(4, 1)),
}


def hooked_average():
    model = AveragedModel(Usual())
    model.register_forward_hook(lambda m, i, out: 2 * out)
    return model


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_modules_use_autograd(make):
    model = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    public = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    assert why_not_fused(model).startswith("not an MLP that can be read")
    # the module was not called or changed to find that out
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
