"""Modules as people write them, and a check that all paths agree on one: shared by the tests of any module."""

import types

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastebm import langevin_sample

DIM, N = 6, 5
LABELS = torch.tensor([0, 1, 1, 0, 1])


def mlp(dim: int = DIM, out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 8), nn.SiLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, out))


def sampled(model, backend, *, shape=(DIM,), **options):
    start = torch.linspace(-1, 1, N * int(np.prod(shape))).reshape(N, *shape)
    defaults = {"steps": 4, "step_size": 0.3, "noise_scale": 0.5, "seed": 3, "init": start}
    return langevin_sample(model, backend=backend, return_info=True, **{**defaults, **options})


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


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(12)

    def forward(self, images):
        return -self.net(images.view(images.size(0), -1)).squeeze()


class Optional(Usual):
    """Labels are optional: without them it is an MLP."""

    def forward(self, x, y=None, *, scale=1.0):
        out = self.net(x).squeeze(1)
        return out if y is None else out + (x - 6.0 * y[:, None] + 3.0).square().sum(1) / 2


def with_forward(forward, **attributes):
    """A ``Layers`` with this forward, and with attributes: a function makes a new one for each module."""

    def make():
        model = type("WithForward", (Layers,), {"forward": forward})()
        for name, value in attributes.items():
            setattr(model, name, value() if isinstance(value, types.FunctionType) else value)
        return model

    return make


def pull(x, y):
    """Towards 6 y - 3."""
    return (x - 6.0 * y[:, None] + 3.0).square().sum(1) / 2


def body(self, x):
    return self.out(F.silu(self.second(F.silu(self.first(x))))).squeeze(-1)
