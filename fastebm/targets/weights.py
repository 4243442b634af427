"""The weight that a Linear layer uses, plain or under spectral or weight norm, and checks of its layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..tracing import operator
from .operations import NotAnMLP

__all__ = ["check_affine", "effective_weight"]


def effective_weight(name: str, layer: nn.Linear) -> Tensor:
    """The weight that the forward pass of ``layer`` uses, under parametrizations or under the older hook-based norms.

    Args:
        name: the layer, for an error.

    Raises:
        NotAnMLP: the weight is computed in any other way.
    """
    hooks = list(layer._forward_pre_hooks.values())
    norm = hooks[0] if len(hooks) == 1 and isinstance(hooks[0], (SpectralNorm, WeightNorm)) else None
    if hooks and (norm is None or norm.name != "weight"):
        raise NotAnMLP(f"{name} has a forward pre-hook, which may change what it computes")
    if torch.compiler.is_compiling():
        return _traced_weight(name, layer, norm)
    if isinstance(norm, SpectralNorm):
        return norm.compute_weight(layer, do_power_iteration=False).detach()
    if isinstance(norm, WeightNorm):
        return norm.compute_weight(layer).detach()  # type: ignore[no-any-return]
    for key in ("weight", "bias"):
        if isinstance(getattr(type(layer), key, None), property) and not is_parametrized(layer, key):
            raise NotAnMLP(f"{name} has a {key} that its class computes")
    for of_tensor in layer.parametrizations.values() if is_parametrized(layer) else ():  # type: ignore[operator]
        for parametrization in of_tensor:  # the forward of a user's class may do anything
            if type(parametrization).__module__ != parametrizations.__name__:
                kind = type(parametrization).__name__
                raise NotAnMLP(f"{name} has a parametrization that is none of PyTorch's ({kind})")
    return layer.weight


def check_affine(where: str, weight: Tensor, bias: Tensor | None) -> None:
    """Require dense tensors of shapes (out, in) and (out,): kernels read their memory directly."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        raise NotAnMLP(f"{where} has weight and bias of shapes {shapes}, not (out, in) and (out,)")
    for value in (weight, bias) if not torch.compiler.is_compiling() else ():
        if value is not None and (type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided):
            raise NotAnMLP(f"{where} has weights of a kind of their own ({type(value).__name__}, {value.layout})")


@operator("normalised_weight", "(Tensor weight, Tensor u, Tensor? v, int dim) -> Tensor")
def _normalised_weight(weight: Tensor, u: Tensor, v: Tensor | None, dim: int) -> Tensor:
    """The weight under spectral norm in eval mode (u, v: the singular vectors), or weight norm (u: g; v: None)."""
    if v is None:
        return torch._weight_norm(weight, u, dim)
    matrix = weight.movedim(dim, 0).flatten(1)
    return weight / torch.vdot(u, torch.mv(matrix, v))


def _traced_weight(name: str, layer: nn.Linear, hook: SpectralNorm | WeightNorm | None) -> Tensor:
    """``effective_weight`` in a compiled call, which must never trace the power iteration of training mode."""
    if isinstance(hook, SpectralNorm):
        return _normalised_weight(layer.weight_orig, layer.weight_u, layer.weight_v, hook.dim)  # type: ignore[no-any-return]
    if isinstance(hook, WeightNorm):
        return _normalised_weight(layer.weight_v, layer.weight_g, None, hook.dim)  # type: ignore[no-any-return]
    if is_parametrized(layer, "bias"):
        raise NotAnMLP(f"{name} has a parametrized bias, which can't be compiled in whole")
    if not is_parametrized(layer, "weight"):
        return layer.weight
    of_weight: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    norm = of_weight[0]
    if len(of_weight) == 1 and isinstance(norm, _SpectralNorm):
        return _normalised_weight(of_weight.original, norm._u, norm._v, norm.dim)  # type: ignore[no-any-return]
    if len(of_weight) == 1 and isinstance(norm, _WeightNorm):
        return _normalised_weight(of_weight.original1, of_weight.original0, None, norm.dim)  # type: ignore[no-any-return]
    raise NotAnMLP(f"{name} has a parametrization that can't be compiled in whole ({type(norm).__name__})")
