"""The MLP energy, and the same layers as the head of any trunk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn
from torch.nn.utils import parametrizations

from ..scalars import checked_integer, plain_number
from .activations import Activation, activation_layer
from .functions import EnergyLike, as_module

__all__ = ["MLPEnergy", "build", "build_energy_fn", "checked_feature_size"]


def _mlp_layers(
    sizes: Sequence[int], activation: str | Activation, dropout: float, spectral_norm: bool, outputs: int = 1
) -> list[nn.Module]:
    """Linear, activation (and dropout) for each hidden size, then a Linear with ``outputs`` units."""
    activation_layer(activation)  # checks it before any weight is drawn
    sizes = [plain_number(size) for size in sizes]
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"layer sizes must be ints >= 1, got {list(sizes)}")
    dropout = plain_number(dropout)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")

    def linear(n_in: int, n_out: int) -> nn.Module:
        layer = nn.Linear(n_in, n_out)
        return parametrizations.spectral_norm(layer) if spectral_norm else layer

    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [linear(n_in, n_out), activation_layer(activation)]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return [*layers, linear(sizes[-1], outputs)]


class MLPEnergy(nn.Sequential):
    """E(x) of a multilayer perceptron: (batch, input_size) -> (batch, outputs).

    Hidden layers are Linear -> activation (-> dropout); the output is Linear. With outputs > 1 it is a network for
    another energy, such as ``ClassifierEnergy(MLPEnergy(784, outputs=10))``, which keeps the fused kernel.

    Args:
        input_size: dimensions of x.
        hidden_sizes: at least one width.
        activation: "silu", "relu", "leaky_relu", "elu", "softplus", "gelu", "gelu_tanh", "tanh", "sigmoid",
            "identity", or an ``Activation`` with its parameter.
        dropout: probability in [0, 1); off while sampling.
        spectral_norm: normalise every Linear layer (Miyato et al. 2018, torch.nn.utils.parametrizations).
        outputs: number of outputs; 1 for an energy, >= 2 for logits or features.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int] = (256, 128),
        activation: str | Activation = "silu",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        outputs: int = 1,
    ) -> None:
        if not isinstance(hidden_sizes, (Sequence, np.ndarray)) or isinstance(hidden_sizes, str):
            raise TypeError(f"hidden_sizes must be widths, as in (256, 128), got {hidden_sizes!r}")
        if len(hidden_sizes) == 0:
            raise ValueError("hidden_sizes must name at least one layer, got none")
        outputs = checked_integer("outputs", outputs, least=1)
        super().__init__(*_mlp_layers([input_size, *hidden_sizes], activation, dropout, spectral_norm, outputs))

    def __getitem__(self, index: Any) -> Any:
        """A layer; for a slice, an nn.Sequential of the same layers."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


def build(
    input_size: int,
    hidden_sizes: Sequence[int] = (256, 128),
    activation: str | Activation = "silu",
    dropout: float = 0.0,
    spectral_norm: bool = False,
    outputs: int = 1,
) -> MLPEnergy:
    """The same as ``MLPEnergy``."""
    return MLPEnergy(input_size, hidden_sizes, activation, dropout, spectral_norm, outputs)


def build_energy_fn(
    trunk: EnergyLike,
    feature_size: int | None = None,
    hidden_sizes: Sequence[int] = (256, 128),
    activation: str | Activation = "silu",
    dropout: float = 0.0,
    spectral_norm: bool = False,
) -> nn.Sequential:
    """The head of ``build`` on top of any module: E(x) = head(trunk(x)).

    Args:
        trunk: (batch, *shape) -> (batch, feature_size).
        feature_size: number of features of the trunk's output. None: ``out_features`` of its last Linear layer.
        hidden_sizes: hidden widths of the head; () for one Linear on the features.

    Returns:
        nn.Sequential(trunk, head), (batch, *shape) -> (batch, 1); it composes further like any module.
    """
    trunk = as_module(trunk, "trunk")
    feature_size = checked_feature_size(trunk, feature_size)
    return nn.Sequential(
        trunk, nn.Sequential(*_mlp_layers([feature_size, *hidden_sizes], activation, dropout, spectral_norm))
    )


def checked_feature_size(trunk: nn.Module, feature_size: int | None) -> int:
    """Number of features that a trunk returns. None: ``out_features`` of its last Linear layer."""
    if feature_size is not None:
        return checked_integer("feature_size", feature_size, least=1)
    linears = [m for m in trunk.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError("a trunk without a Linear layer does not show its number of features: pass feature_size=")
    return linears[-1].out_features
