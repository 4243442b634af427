"""A classifier as an energy."""

from __future__ import annotations

from torch import Tensor, nn

from .conditions import are_labels
from .functions import EnergyLike, as_module

__all__ = ["ClassifierEnergy", "checked_logits"]


class ClassifierEnergy(nn.Module):
    """A classifier f of C classes as an energy (JEM; Grathwohl et al. 2020), with or without labels:

        E(x) = -log sum_c exp f(x)_c,   E(x, y) = -f(x)_y

    Args:
        classifier: (batch, *shape) -> (batch, C) logits.
    """

    def __init__(self, classifier: EnergyLike) -> None:
        super().__init__()
        self.classifier = as_module(classifier, "classifier")

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, *shape), and labels (batch,) int64 in [0, C) or None -> (batch,)."""
        logits = checked_logits(self.classifier(x), x)
        if labels is None:
            return -logits.logsumexp(dim=1)
        if not are_labels(labels):
            raise ValueError(f"a classifier takes labels (batch,), integers, got {tuple(labels.shape)} {labels.dtype}")
        return -logits.gather(1, labels.long()[:, None])[:, 0]


def checked_logits(logits: object, x: Tensor) -> Tensor:
    """What a classifier returned for x, if it is (batch, classes)."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"a classifier must return a tensor of logits (batch, classes), got {got}: wrap it in a module that "
            "returns its logits alone"
        )
    return logits
