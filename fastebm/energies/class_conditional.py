"""An energy of states and classes: a class embedding is projected on the features f of a network.

E(x, y) = -<w + v_y, f(x)> - b_y,   E(x) = -log sum_y exp(-E(x, y))

Source: the projection head of Miyato & Koyama (2018), with a bias per class.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..scalars import checked_integer
from .classifier import ClassifierEnergy
from .functions import EnergyLike, as_module
from .mlp import checked_feature_size

__all__ = ["ClassConditionalEnergy", "Projection"]


class ClassConditionalEnergy(ClassifierEnergy):
    """E(x, y) of a network and an embedding v_y of each class; without labels E(x) = -log sum_y exp(-E(x, y)).

    The top of this file states the formula. It is the ``ClassifierEnergy`` of the logits -E(x, y). The direction w is
    common to all classes: with few rows per class, what they share is learnt from all rows. With an MLP as the trunk it
    has the fused kernels.

        ClassConditionalEnergy(ConvEnergy((28, 28), outputs=128), n_classes=10)

    Args:
        trunk: the network f, (batch, *shape) -> (batch, feature_size), such as an MLPEnergy, ConvEnergy or
            ResNetEnergy with ``outputs=feature_size``.
        n_classes: >= 2.
        feature_size: number of features. None: ``out_features`` of the trunk's last Linear layer.
    """

    def __init__(self, trunk: EnergyLike, n_classes: int, feature_size: int | None = None) -> None:
        trunk = as_module(trunk, "trunk")
        n_classes = checked_integer("n_classes", n_classes, least=2)
        super().__init__(nn.Sequential(trunk, Projection(checked_feature_size(trunk, feature_size), n_classes)))


class Projection(nn.Module):
    """Logits <w + v_y, f> + b_y: a linear layer, whose weight is the sum of two."""

    def __init__(self, feature_size: int, n_classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(feature_size, n_classes)
        self.shared = nn.Linear(feature_size, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        """(n_classes, feature_size)."""
        return self.classes.weight + self.shared.weight

    def forward(self, features: Tensor) -> Tensor:
        """(batch, feature_size) -> (batch, n_classes)."""
        return nn.functional.linear(features, self.weight, self.classes.bias)
