"""What langevin_sample refuses of labels, frozen coordinates, bounds, clips and seeds, and what it leaves alone."""

import itertools
import math

import pytest
import torch
from paths import CLASSES, every_backend, network, per_dim_bounds
from torch import nn

from fastebm import ClassifierEnergy, GaussianEnergy, MLPEnergy, NonFiniteError, SumEnergy, langevin_sample

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


class NeedsLabels(nn.Module):
    def forward(self, x, labels):
        return (x.sum(dim=1) - labels).square()


def mlp():
    return MLPEnergy(3, (9, 8), dropout=0.3, spectral_norm=True).train()


def classifier():
    return ClassifierEnergy(network(3, [9], CLASSES)).train()


def whole_sum():
    return SumEnergy([mlp(), classifier(), GaussianEnergy()])


X = torch.linspace(-1, 1, 12).reshape(4, 3)
LABELS = torch.tensor([0, 2, 1, 0])
SOME = torch.tensor([True, False, False])
NAN, INF = math.nan, math.inf

# name: (energy, options, error, message)
BAD = {
    "label negative": (classifier, {"labels": LABELS - 1}, ValueError, r"labels must be in \[0, 3\).* from -1 to 1"),
    "label large": (classifier, {"labels": LABELS + 1}, ValueError, r"labels must be in \[0, 3\).* from 1 to 3"),
    "label of a sum": (whole_sum, {"labels": LABELS + 1}, ValueError, r"labels must be in \[0, 3\).* from 1 to 3"),
    "label of the smaller": (
        lambda: SumEnergy([classifier(), ClassifierEnergy(network(3, [4], 2))]), {"labels": LABELS}, ValueError,
        r"labels must be in \[0, 2\).* from 0 to 2",
    ),
    "labels float": (classifier, {"labels": LABELS.float()}, TypeError, "must be a tensor of integers.*float32"),
    "labels complex": (classifier, {"labels": LABELS + 0j}, TypeError, "must be a tensor of integers.*complex64"),
    "labels bool": (classifier, {"labels": LABELS > 0}, TypeError, "must be a tensor of integers, got torch.bool"),
    "labels list": (classifier, {"labels": [0, 1, 2, 0]}, TypeError, "labels must be a tensor of integers, got list"),
    "labels too few": (classifier, {"labels": LABELS[:3]}, ValueError, r"must be \(4,\), one per chain, .*\(3,\)"),
    "labels a column": (classifier, {"labels": LABELS[:, None]}, ValueError, r"labels must be \(4,\).* got \(4, 1\)"),
    "labels elsewhere": (classifier, {"labels": LABELS.to("meta")}, ValueError, "per chain, on cpu, got .* on meta"),
    "labels for an MLP": (mlp, {"labels": LABELS}, ValueError, r"MLPEnergy.forward takes x only, or .*: wrap a class"),
    "labels for a sum without": (
        lambda: SumEnergy([mlp(), GaussianEnergy()]), {"labels": LABELS}, ValueError, "SumEnergy.forward takes x only",
    ),
    "labels missing": (NeedsLabels, {}, ValueError, r"does not take states of shape \(n_chains, 3\): .*labels"),
    "labels missing in a sum": (
        lambda: SumEnergy([mlp(), NeedsLabels()]), {}, ValueError, "does not take states of shape .n_chains, 3.",
    ),
    "frozen list": (mlp, {"frozen": [True, False, False]}, TypeError, "frozen must be a tensor of bools.* got list"),
    "frozen float": (mlp, {"frozen": SOME.float()}, TypeError, "frozen must be a tensor of bools.* got torch.float32"),
    "frozen dims": (
        mlp, {"frozen": SOME[:2]}, ValueError, r"frozen must have one state's shape \(3,\), or \(4, 3\), got \(2,\)",
    ),
    "frozen chains": (mlp, {"frozen": SOME.expand(3, 3)}, ValueError, r"frozen must .* or \(4, 3\), got \(3, 3\)"),
    "frozen one row": (mlp, {"frozen": SOME[None]}, ValueError, r"frozen must .* or \(4, 3\), got \(1, 3\)"),
    "frozen elsewhere": (mlp, {"frozen": SOME.to("meta")}, ValueError, "frozen is on meta and the chains on cpu"),
    "clamp size": (
        mlp, {"clamp": (torch.zeros(2), 1.0)}, ValueError,
        r"clamp's lo must be a number or have one value for each of the 3 dims, got shape \(2,\)",
    ),
    "clamp size, start drawn": (
        mlp, {"init": None, "clamp": (-1.0, torch.ones(1, 4))}, ValueError, r"clamp's hi must be .* 3 dims.*\(1, 4\)",
    ),
    "clamp sizes": (
        mlp, {"clamp": (torch.zeros(3), torch.ones(2))}, ValueError, r"must have as many values each, got \[2, 3\]",
    ),
    "clamp reversed": (
        mlp, {"clamp": (torch.zeros(3), torch.tensor([1.0, 0.0, 2.0]))}, ValueError, "lo < hi in every dim.* 1 of 3",
    ),
    "clamp NaN": (mlp, {"clamp": (torch.tensor([NAN, 0, NAN]), 1.0)}, ValueError, "lo < hi in every dim.* 2 of 3"),
    "clamp NaN above": (mlp, {"clamp": (-1.0, torch.tensor([1.0, 1.0, NAN]))}, ValueError, "lo < hi .* 1 of 3"),
    "clamp NaN number": (mlp, {"clamp": (torch.zeros(3), NAN)}, ValueError, "lo < hi in every dim.* 3 of 3"),
    "clamp int": (mlp, {"clamp": (torch.zeros(3).long(), 1.0)}, TypeError, "lo must be .* floating-point .*int64"),
    "clamp str": (mlp, {"clamp": ("a", 1.0)}, TypeError, r"clamp must be a pair \(lo, hi\) of numbers or tensors.*'a'"),
    "clamp one": (mlp, {"clamp": 1.0}, TypeError, r"clamp must be a pair \(lo, hi\) of numbers or tensors.*got 1.0"),
    "clamp infinite start": (
        mlp, {"init": None, "clamp": (torch.tensor([-INF, 0.0, 0.0]), 1.0)}, ValueError, "no uniform start on an inf",
    ),
    "noise schedule": (mlp, {"noise_scale": torch.ones(3)}, ValueError, "noise_scale schedule .*3 entries for 2 steps"),
    "step schedule": (classifier, {"step_size": torch.ones(3)}, ValueError, "step_size .* 3 entries for 2 steps"),
    "thin": (
        mlp, {"thin": 3, "return_trajectory": True}, ValueError, "thin must divide steps.* got thin=3, steps=2",
    ),
    "thin zero": (mlp, {"thin": 0, "return_trajectory": True}, ValueError, "thin must divide steps.* got thin=0"),
    "thin negative": (mlp, {"thin": -1, "return_trajectory": True}, ValueError, "thin must be >= 0, got -1"),
    "thin float": (mlp, {"thin": 1.0, "return_trajectory": True}, TypeError, "thin must be an int, got 1.0"),
    "thin bool": (mlp, {"thin": True, "return_trajectory": True}, TypeError, "thin must be an int, got True"),
    "thin alone": (mlp, {"thin": 2}, ValueError, "thin is for return_trajectory=True, got thin=2 without it"),
    "trajectory started anew": (
        mlp, {"return_trajectory": True, "on_nonfinite": "reinit"}, ValueError, 'use on_nonfinite="raise" or "ignore"',
    ),
    "out of samples for a trajectory": (
        mlp, {"return_trajectory": True, "out": torch.zeros(4, 3)}, ValueError, r"must be a \(4, 2, 3\).*\(4, 3\)",
    ),
    "out of a trajectory for samples": (mlp, {"out": torch.zeros(4, 2, 3)}, ValueError, r"must be a \(4, 3\).*2, 3"),
    "out not thinned": (
        mlp, {"return_trajectory": True, "thin": 2, "out": torch.zeros(4, 2, 3)}, ValueError, r"must be a \(4, 1, 3\)",
    ),
    **{
        f"norm clip {value!r}": (
            mlp, {"grad_norm_clip": value}, ValueError, f"grad_norm_clip must be a number > 0 or None, got {value!r}",
        )
        for value in (0, 0.0, -1.0, NAN, INF, True, "1")
    },
    "seed tensor float": (mlp, {"seed": torch.ones(1)}, ValueError, "seed tensor must be one int64 number.*float32"),
    "seed tensor int32": (mlp, {"seed": torch.ones(1).int()}, ValueError, "seed tensor must be one int64 .*int32"),
    "seed tensor long": (mlp, {"seed": LABELS[:2]}, ValueError, r"seed tensor must be one int64 number.*shape \(2,\)"),
    "seed tensor empty": (mlp, {"seed": LABELS[:0]}, ValueError, r"seed tensor must be one int64 number.*shape \(0,\)"),
    "first_step tensor float": (mlp, {"first_step": torch.ones(4)}, ValueError, "first_step tensor must .*float32"),
    "first_step tensor": (mlp, {"first_step": LABELS[:2]}, ValueError, r"int64 number or \(4,\), got .* \(2,\)"),
    "first_step matrix": (mlp, {"first_step": LABELS[:, None]}, ValueError, r"number or \(4,\), got .* \(4, 1\)"),
    "dims of terms": (
        lambda: SumEnergy([mlp(), MLPEnergy(4, (5,))]), {}, ValueError, r"not take states of shape \(n_chains, 3\)",
    ),
    "dims of terms, start drawn": (
        lambda: SumEnergy([mlp(), MLPEnergy(4, (5,))]), {"init": None}, ValueError,
        r"pass input_size= or init=: .*its terms take different numbers of dims",
    ),
    "dims of a Gaussian": (
        lambda: SumEnergy([mlp(), GaussianEnergy(torch.zeros(5))]), {}, ValueError, r"a mean of shape \(5,\)",
    ),
    "a column of means": (  # with 3 chains it would broadcast silently
        lambda: SumEnergy([mlp(), GaussianEnergy(torch.zeros(3, 1))]), {}, ValueError,
        r"a mean of shape \(3, 1\), and the chains' states have \(3,\)",
    ),
    "dims of a sum": (
        lambda: SumEnergy([MLPEnergy(5, (4,)), GaussianEnergy()]), {}, ValueError, "takes 5 dims|not take states",
    ),
    "weights of a sum NaN": (
        lambda: broken(whole_sum()), {}, NonFiniteError, "4 of 4 chains are not finite",
    ),
}  # fmt: skip


def broken(model):
    model.weights[1] = NAN
    return model


@every_backend
@pytest.mark.parametrize(("make", "options", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_a_message_and_changes_nothing(
    backend, make, options, error, match, untouched, device
):
    if backend == "triton" and device == "cuda":
        pytest.skip("these inputs lie on the CPU, where no kernel runs on a machine with a GPU")
    model = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    options = {"init": X.clone(), "seed": 1, "steps": 2, **options}
    values = itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in options.values())
    tensors = [v for v in values if isinstance(v, torch.Tensor) and not v.is_meta]
    with untouched(model, *tensors), pytest.raises(error, match=match):
        langevin_sample(model, backend=backend, **options)


@every_backend
def test_the_callers_tensors_are_left_bit_for_bit(backend, home, untouched):
    model = whole_sum().to(home)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    init, labels, frozen = X.to(home), LABELS.to(home), SOME.to(home).expand(4, 3)
    bounds, seed, ages = per_dim_bounds(3), torch.tensor([2**62], device=home), torch.tensor([7], device=home)
    schedule = torch.tensor([0.1, 0.2])
    with untouched(model, init, labels, frozen, *bounds, seed, ages, schedule):
        samples = langevin_sample(
            model, init=init, labels=labels, frozen=frozen, clamp=bounds, seed=seed, first_step=ages, steps=2,
            step_size=schedule, noise_scale=1.0, grad_clip=0.5, grad_norm_clip=0.5, backend=backend,
            return_trajectory=True,
        )  # fmt: skip
    assert not samples.requires_grad
    assert samples.shape == (4, 2, 3)
