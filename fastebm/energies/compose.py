"""Sums of energies, and questions that may have to be asked of each term: shape, condition, number of classes."""

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
from .images import ImageEnergy
from .noise_conditional import NoiseConditionalEnergy
from .pair import PairEnergy

__all__ = ["Negative", "SumEnergy", "n_classes", "shape_of", "takes_condition"]


class SumEnergy(nn.Module):
    """E(x) = sum_k w_k E_k(x): a product of experts (Hinton 2002); with w_k < 0 a negation (Du et al. 2020).

    MLPs and classifiers on the same x, a ``GaussianEnergy`` and an nn.Linear with one output run in one fused
    kernel together.

    Args:
        energies: modules or functions, (batch, *shape) -> (batch,) or (batch, 1).
        weights: one number per energy; None: all 1. Stored as a buffer, ``weights``.
    """

    weights: Tensor

    def __init__(self, energies: Iterable[EnergyLike], weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        # iterating over an nn.Sequential would give its layers
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
                f"a SumEnergy has one weight per energy, got {len(self.weights)} for {len(self.energies)}: build a"
                " new one"
            )

    def forward(self, x: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """(batch, *shape), and labels (batch,) or another condition for the terms that take one -> (batch,)."""
        condition_kind, condition = ("labels", labels) if labels is not None else ("condition", condition)
        self.check_weights()
        terms = []
        for term in self.energies:
            takes = condition is not None and takes_condition(term, condition_kind, in_sum=True)
            # a copy for each term, since a term may write to its input
            value = values_of(term, x.clone(), None, condition if takes else None, condition_kind)
            terms.append(value.reshape(len(x)))
        return torch.stack(terms).mul(self.weights[:, None]).sum(dim=0)


class Negative(SumEnergy):
    """E(x) = -f(x), for a network f that returns -E, as in the UvA tutorial and in JEM.

    It is ``SumEnergy([f], [-1.0])``, so an MLP keeps the fused kernel.
    """

    def __init__(self, energy: EnergyLike) -> None:
        super().__init__([energy], [-1.0])


def shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one state, known if the energy is, or contains, an energy of images, or a ``GaussianEnergy`` with a
    mean or std of that shape; otherwise None."""
    model = unwrapped(model)
    if isinstance(model, ImageEnergy):
        return model.shape
    for cls, inner in ((ClassifierEnergy, "classifier"), (NoiseConditionalEnergy, "network"), (PairEnergy, "encoder")):
        if isinstance(model, cls):
            return shape_of(getattr(model, inner))
    if isinstance(model, nn.Sequential) and len(model) > 0:
        return shape_of(model[0])
    if isinstance(model, GaussianEnergy):
        return np.broadcast_shapes(model.mean.shape, model.std.shape) or None
    if isinstance(model, SumEnergy):
        # a mean or std of one element may be broadcast to any shape
        shapes = {shape for e in model.energies if (shape := shape_of(e)) is not None and math.prod(shape) > 1}
        return shapes.pop() if len(shapes) == 1 else None
    return None


def takes_condition(model: nn.Module, condition_kind: str = "labels", *, in_sum: bool = False) -> bool:
    """Whether forward takes labels, or another condition, besides x; for a sum, whether any term does.

    Args:
        condition_kind: "labels" or "condition".
        in_sum: the model is one term of a sum, so the condition may be meant for another term.

    Raises:
        ValueError: it is ambiguous which argument is meant (conditions.py).
    """
    inner = unwrapped(model)
    if isinstance(inner, SumEnergy):
        return any(takes_condition(term, condition_kind, in_sum=True) for term in inner.energies)
    return condition_parameter(inner, condition_kind, in_sum=in_sum) is not None


def n_classes(model: nn.Module, x: Tensor) -> int | None:
    """The number of classes of a classifier, or the smallest one in a sum; None if there is no classifier.

    Args:
        x: states on which classifiers are evaluated, to count their logits.
    """
    model = unwrapped(model)
    if isinstance(model, SumEnergy):
        return min((n for e in model.energies if (n := n_classes(e, x)) is not None), default=None)
    if not isinstance(model, ClassifierEnergy):
        return None
    dtype = next(model.parameters(), x).dtype
    return checked_logits(model.classifier(x.to(dtype, copy=True)), x).shape[1]
