"""Energies: the MLP energy, its head on any trunk, and how energies of a batch are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .mlp import ACTIVATIONS, Activation

__all__ = ["Energy", "MLPEnergy", "build", "build_energy_fn", "energy"]


def _layers(sizes: Sequence[int], activation: str | Activation, dropout: float, spectral_norm: bool) -> list[nn.Module]:
    """Linear, activation(, dropout) for each hidden size, then one Linear output."""
    name = activation if isinstance(activation, str) else activation.name
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    parameter = ACTIVATIONS[name].default if isinstance(activation, str) else activation.parameter
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"layer sizes must be ints >= 1, got {list(sizes)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")

    def linear(n_in: int, n_out: int) -> nn.Module:
        layer = nn.Linear(n_in, n_out)
        return parametrizations.spectral_norm(layer) if spectral_norm else layer

    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [linear(n_in, n_out), ACTIVATIONS[name].module(parameter)]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return [*layers, linear(sizes[-1], 1)]


class MLPEnergy(nn.Sequential):
    """E(x) of a multilayer perceptron: (batch, input_size) -> (batch, 1).

    Hidden layers are Linear -> activation (-> dropout); the output is one Linear unit.

    Args:
        input_size: dimensions of x.
        hidden_sizes: at least one width.
        activation: "silu", "relu", "leaky_relu", "elu", "softplus", "gelu", "gelu_tanh", "tanh", "sigmoid",
            "identity", or an ``Activation`` with its parameter.
        dropout: probability in [0, 1); off while sampling.
        spectral_norm: normalise every Linear layer (Miyato et al. 2018, torch.nn.utils.parametrizations).
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int] = (256, 128),
        activation: str | Activation = "silu",
        dropout: float = 0.0,
        spectral_norm: bool = False,
    ) -> None:
        if len(hidden_sizes) == 0:
            raise ValueError("hidden_sizes must name at least one layer, got none")
        super().__init__(*_layers([input_size, *hidden_sizes], activation, dropout, spectral_norm))

    def __getitem__(self, index: Any) -> Any:
        """A layer; for a slice, an nn.Sequential of the same layers."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


def build(
    input_size: int,
    hidden_sizes: Sequence[int] = (256, 128),
    activation: str | Activation = "silu",
    dropout: float = 0.0,
    spectral_norm: bool = False,
) -> MLPEnergy:
    """An ``MLPEnergy``, under the name of the original design."""
    return MLPEnergy(input_size, hidden_sizes, activation, dropout, spectral_norm)


def build_energy_fn(
    trunk: nn.Module,
    feature_size: int | None = None,
    hidden_sizes: Sequence[int] = (256, 128),
    activation: str | Activation = "silu",
    dropout: float = 0.0,
    spectral_norm: bool = False,
) -> nn.Sequential:
    """The head of ``build`` on top of any module: E(x) = head(trunk(x)).

    Args:
        trunk: (batch, *shape) -> (batch, feature_size).
        feature_size: what the trunk puts out. None: the ``out_features`` of the trunk's last Linear layer.
        hidden_sizes: hidden widths of the head; () for one Linear on the features.

    Returns:
        nn.Sequential(trunk, head), (batch, *shape) -> (batch, 1); it composes further like any module.
    """
    if feature_size is None:
        linears = [m for m in trunk.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise ValueError("feature_size can't be told from a trunk without a Linear layer: pass feature_size=")
        feature_size = linears[-1].out_features
    return nn.Sequential(
        trunk, nn.Sequential(*_layers([feature_size, *hidden_sizes], activation, dropout, spectral_norm))
    )


def energy(model: nn.Module, x: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
    """Energies of a batch: (batch, *shape) -> (batch,), differentiable.

    Args:
        model: maps (batch, *shape) to (batch,) or (batch, 1).
        params: parameters (and buffers) by name to use in place of the model's own (torch.func.functional_call).

    Raises:
        ValueError: if the model puts out another shape.
    """
    value: Any = model(x) if params is None else torch.func.functional_call(model, dict(params), (x,))
    if not isinstance(value, Tensor) or value.shape not in ((len(x),), (len(x), 1)):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"an energy maps ({len(x)}, ...) to ({len(x)},) or ({len(x)}, 1), got {got}")
    return value.reshape(len(x))


class Energy:
    """A module as the samplers see it: flat states in, energies or their gradients out, no trace left behind.

    Args:
        module: maps (batch, *shape) to (batch,) or (batch, 1).
        shape: shape of one state; its product is dim.
        dtype: of the states. A module of another floating dtype is computed in this one, through
            torch.func.functional_call, so that a float64 start is float64 end to end.
    """

    def __init__(self, module: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.module = module
        self.shape = tuple(shape)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        cast = any(t.is_floating_point() and t.dtype != dtype for t in tensors.values())
        self._params = (
            {k: t.detach().to(dtype) if t.is_floating_point() else t for k, t in tensors.items()} if cast else None
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(n, dim) -> (n,), without a graph."""
        with torch.no_grad():
            return energy(self.module, x.reshape(len(x), *self.shape), self._params)

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx of each chain: (n, dim). The gradient of the sum, so no chain's is divided by their number."""
        if len(x) == 0:
            return x
        # Sampling inside torch.inference_mode or no_grad still needs this one graph.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            total = energy(self.module, x.reshape(len(x), *self.shape), self._params).sum()
            (grad,) = torch.autograd.grad(total, x, allow_unused=True) if total.requires_grad else (None,)
        if grad is None:
            raise ValueError(
                "the energy does not depend on x through differentiable operations "
                "(is there a detach() or torch.no_grad() in its forward?)"
            )
        return grad
