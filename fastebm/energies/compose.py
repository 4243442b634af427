"""Sums of energies, and what a sum or one of its terms takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .base import values_of
from .classifier import ClassifierEnergy, checked_logits
from .conditions import condition_parameter, unwrapped
from .functions import EnergyLike, as_module
from .gaussian import GaussianEnergy

__all__ = ["Negative", "SumEnergy", "n_classes", "shape_of", "takes_condition"]


class SumEnergy(nn.Module):
    """E(x) = sum_k w_k E_k(x): a product of experts (Hinton 2002); with w_k < 0 a negation (Du et al. 2020).

    MLPs and classifiers on the same x, a ``GaussianEnergy`` and an nn.Linear with one output run in one fused
    kernel together.

    Args:
        energies: each a module or a function, (batch, *shape) -> (batch,) or (batch, 1).
        weights: one number each; None: all 1. Kept as a buffer, ``weights``.
    """

    weights: Tensor

    def __init__(self, energies: Iterable[EnergyLike], weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        # an nn.Sequential gives its layers
        if not isinstance(energies, Iterable) or isinstance(energies, nn.Sequential):
            raise TypeError(
                f"a SumEnergy takes a list of energies, as in SumEnergy([f, g]), got {type(energies).__name__}"
            )
        self.energies = nn.ModuleList(as_module(term, "each energy of a sum") for term in energies)
        if len(self.energies) == 0:
            raise ValueError("a SumEnergy needs at least one energy, got none")
        w = torch.ones(len(self.energies)) if weights is None else torch.as_tensor(weights).detach().clone()
        if w.shape != (len(self.energies),) or not bool(w.isfinite().all()):
            raise ValueError(f"weights must be {len(self.energies)} finite numbers, one per energy, got {weights!r}")
        self.register_buffer("weights", w.to(torch.get_default_dtype()))

    def check_weights(self) -> None:
        if len(self.weights) != len(self.energies):
            raise ValueError(
                f"a SumEnergy has one weight per energy, got {len(self.weights)} for {len(self.energies)}: build it"
                " anew"
            )

    def forward(self, x: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """(batch, *shape), and labels (batch,) or another condition for the terms that take them -> (batch,)."""
        kind, given = ("labels", labels) if labels is not None else ("condition", condition)
        self.check_weights()
        terms = []
        for term in self.energies:
            takes = given is not None and takes_condition(term, kind, alone=False)
            # each its own copy: one may write to it
            terms.append(values_of(term, x.clone(), None, given if takes else None, kind).reshape(len(x)))
        return torch.stack(terms).mul(self.weights[:, None]).sum(dim=0)


class Negative(SumEnergy):
    """E(x) = -f(x): for a network that puts out -E, as those of the UvA tutorial and of JEM do.

    ``SumEnergy([f], [-1.0])`` under a name of its own, so an MLP takes the fused kernel.
    """

    def __init__(self, energy: EnergyLike) -> None:
        super().__init__([energy], [-1.0])


def shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """Of one state, as a ``GaussianEnergy`` with a mean or std of that shape tells, alone or in a sum; or None."""
    model = unwrapped(model)
    if isinstance(model, GaussianEnergy):
        return np.broadcast_shapes(model.mean.shape, model.std.shape) or None
    if isinstance(model, SumEnergy):
        # one number may be for all dims of what the other terms take
        told = {shape for e in model.energies if (shape := shape_of(e)) is not None and math.prod(shape) > 1}
        return told.pop() if len(told) == 1 else None
    return None


def takes_condition(model: nn.Module, kind: str = "labels", *, alone: bool = True) -> bool:
    """Whether forward takes labels, or a condition of another kind, beside x; for a sum, whether any term does.

    Args:
        kind: "labels" or "condition". alone: it is no term of a sum, so a condition may be meant for whatever it takes.

    Raises:
        ValueError: it is ambiguous (conditions.py).
    """
    inner = unwrapped(model)
    if isinstance(inner, SumEnergy):
        return any(takes_condition(term, kind, alone=False) for term in inner.energies)
    return condition_parameter(inner, kind, alone=alone) is not None


def n_classes(model: nn.Module, x: Tensor) -> int | None:
    """Labels of a classifier, or of a sum with classifiers, are in [0, n_classes); None if the model does not tell."""
    model = unwrapped(model)
    if isinstance(model, SumEnergy):
        return min((n for e in model.energies if (n := n_classes(e, x)) is not None), default=None)
    if not isinstance(model, ClassifierEnergy):
        return None
    dtype = next(model.parameters(), x).dtype
    return checked_logits(model.classifier(x.to(dtype, copy=True)), x).shape[1]
