"""Labels and other conditions: which argument gets them, and which ones are refused."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from user_modules import DIM, LABELS, N, Optional, Usual, assert_same, mlp, pull, sampled

from fastebm import (
    ClassifierEnergy,
    GaussianEnergy,
    Negative,
    SumEnergy,
)

pytestmark = pytest.mark.usefixtures("seeded")


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


class Named(nn.Module):
    condition_argument = "group"

    def forward(self, x, scale=1.0, group=None):
        return scale * pull(x, group)


class NamedInOptions(nn.Module):
    condition_argument = "group"

    def forward(self, x, **options):
        return pull(x, options["group"])


class Scripted(nn.Module):
    def forward(self, x, labels):
        return (x - 6.0 * labels[:, None] + 3.0).square().sum(1) / 2


class Steps(nn.Module):
    """Two arguments: timesteps are not labels."""

    def forward(self, x, y=None, t=None):
        assert y is None
        return x.square().sum(1) * (1 + t)


class Prior(nn.Module):
    """Its second argument is not a label."""

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
    "named": Named,
    "named, in options": NamedInOptions,
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


def test_a_scale_is_not_a_label():
    """A term that takes no labels is unchanged by them."""
    classifier = ClassifierEnergy(mlp(out=2))
    found, _ = sampled(SumEnergy([classifier, Prior()]), "auto", labels=LABELS)
    expected, _ = sampled(SumEnergy([classifier, GaussianEnergy(0.0, 10**0.5)]), "auto", labels=LABELS)
    torch.testing.assert_close(found, expected)


def test_labels_that_shift_x_have_their_effect():
    """Class means of -3 and 3."""
    means = sampled(Optional(), "auto", labels=LABELS, steps=300, step_size=0.05, noise_scale=0.0)[0].mean(1)
    torch.testing.assert_close(means, 6.0 * LABELS - 3.0, rtol=0, atol=0.5)


@pytest.mark.parametrize(
    "make", [Prior, mlp, Usual, GaussianEnergy, lambda: SumEnergy([Prior(), mlp()]), lambda: Negative(mlp())]
)
def test_labels_that_no_energy_takes_are_refused(make):
    model = make()
    with pytest.raises(ValueError, match=r"labels= was given, and .*\.forward takes x only, or nothing that is named"):
        sampled(model, "auto", labels=LABELS)


def test_a_condition_argument_that_does_not_exist_is_refused():
    class Typo(nn.Module):
        condition_argument = "sgima"

        def forward(self, x, sigma=None):
            return x.square().sum(1)

    with pytest.raises(ValueError, match=r"condition_argument is 'sgima', and Typo\.forward has no argument"):
        sampled(Typo(), "auto", condition=torch.ones(N, 1))


def test_an_ambiguous_argument_is_refused():
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
