"""What the fused kernel and the torch path compute: an energy read out of its module into plain tensors.

    E(x) = sum_k w_k E_k(x) + sum_d [ c_d (x_d - m_d)^2 / 2 + b_d x_d ] + constant,   E_k an MLP with a head

The flow is: module -> description -> backend -> chains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .energies import ClassifierEnergy, GaussianEnergy, SumEnergy
from .mlp import MLP, NotAnMLP, evaluating, read_mlp

__all__ = ["Description", "describe"]


@dataclass(frozen=True, eq=False)
class Description:
    """mlps: at least one, on the same x. scales: (k,), the w_k.

    curvature, mean: (dim,) c and m, or None both. linear: (dim,) b, or None. constant: ().
    """

    mlps: tuple[MLP, ...]
    scales: Tensor
    curvature: Tensor | None
    mean: Tensor | None
    linear: Tensor | None
    constant: Tensor

    @property
    def dim(self) -> int:
        return self.mlps[0].dim

    @property
    def networks(self) -> tuple[tuple[int, ...], ...]:
        """Of each MLP, the widths of its products' outputs: of the hidden layers, and of a "logsumexp" head."""
        return tuple(
            (*mlp.widths, len(mlp.weights[-1])) if mlp.head == "logsumexp" else mlp.widths for mlp in self.mlps
        )

    def scaled_heads(self) -> tuple[MLP, ...]:
        """The MLPs with w_k, and a class head's sign, in the head; a "logsumexp" head keeps its factor apart."""
        mlps = []
        for mlp, scale in zip(self.mlps, self.scales, strict=True):
            if mlp.head != "logsumexp":
                scale = -scale if mlp.head == "class" else scale
                weight, bias = mlp.weights[-1] * scale, mlp.biases[-1]
                mlp = replace(
                    mlp,
                    weights=(*mlp.weights[:-1], weight),
                    biases=(*mlp.biases[:-1], None if bias is None else bias * scale),
                )
            mlps.append(mlp)
        return tuple(mlps)

    def to(self, device: torch.device, dtype: torch.dtype) -> Description:
        def moved(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.to(device, dtype)

        return Description(
            tuple(mlp.to(device, dtype) for mlp in self.mlps),
            self.scales.to(device, dtype),
            moved(self.curvature),
            moved(self.mean),
            moved(self.linear),
            self.constant.to(device, dtype),
        )


def describe(module: nn.Module, *, labels: bool = False) -> Description:
    """Read an energy, in eval mode and without touching it.

    Accepted: what ``read_mlp`` reads; a ``ClassifierEnergy`` of such a module, which with labels has the "class"
    head; a ``SumEnergy`` of these, of ``GaussianEnergy`` terms and of nn.Linear modules with one output.

    Raises:
        NotAnMLP: naming the part that does not fit.
    """
    with evaluating(module), torch.no_grad():
        one = torch.ones((), dtype=_dtype(module), device=_device(module))
        mlps: list[MLP] = []
        scales: list[Tensor] = []
        gaussians: list[tuple[Tensor, GaussianEnergy]] = []
        linears: list[tuple[Tensor, nn.Linear]] = []
        for scale, term in _terms(module, one):
            if isinstance(term, GaussianEnergy):
                gaussians.append((scale, term))
            elif isinstance(term, nn.Linear):
                linears.append((scale, term))
            else:
                scales.append(scale)
                if isinstance(term, ClassifierEnergy):
                    mlps.append(read_mlp(term.classifier, "class" if labels else "logsumexp"))
                else:
                    mlps.append(read_mlp(term))
        if not mlps:
            raise NotAnMLP("none of its terms is an MLP")
        dim = mlps[0].dim
        if any(mlp.dim != dim for mlp in mlps) or any(layer.in_features != dim for _, layer in linears):
            raise NotAnMLP("its terms take different numbers of dims")
        curvature, mean, linear, constant = _quadratic(gaussians, dim)
        for scale, layer in linears:
            row = scale * layer.weight[0]
            linear = row if linear is None else linear + row
            if layer.bias is not None:
                constant = constant + scale * layer.bias[0]
        return Description(
            tuple(mlps), torch.stack(scales), curvature, mean, linear, torch.as_tensor(constant, device=one.device)
        )


def _terms(module: nn.Module, scale: Tensor) -> Iterator[tuple[Tensor, nn.Module]]:
    """The terms of nested sums with their weights multiplied out."""
    ours = (SumEnergy, ClassifierEnergy, GaussianEnergy)
    if isinstance(module, (*ours, nn.Linear)):
        known = next(cls for cls in (*ours, nn.Linear) if isinstance(module, cls))
        if type(module).forward is not known.forward:
            raise NotAnMLP(f"{type(module).__name__} has a forward of its own")
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotAnMLP(f"{type(module).__name__} has a forward hook, which may change what it computes")
        if isinstance(module, nn.Linear) and module.out_features != 1:
            raise NotAnMLP(f"a Linear term has {module.out_features} outputs, not one")
    if isinstance(module, SumEnergy):
        for k, term in enumerate(module.energies):
            yield from _terms(term, scale * module.weights[k])
    else:
        yield scale, module


def _quadratic(
    gaussians: list[tuple[Tensor, GaussianEnergy]], dim: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | float]:
    """(curvature, mean, linear, constant) of a sum of Gaussian terms, about the first one's mean m_0:

    c (x - m)^2 / 2 = c (x - m_0)^2 / 2 + c (m_0 - m) x + c (m_0 - m) ((m_0 - m) / 2 - m_0)
    """
    curvature: Tensor | None = None
    mean: Tensor | None = None
    linear: Tensor | None = None
    constant: Tensor | float = 0.0
    for scale, term in gaussians:
        rows = [v.flatten() for v in (term.mean, term.std)]
        if any(len(row) not in (1, dim) for row in rows):
            raise NotAnMLP(f"a GaussianEnergy has {max(map(len, rows))} dims, and the MLPs have {dim}")
        m, std = (row.expand(dim) for row in rows)
        c = scale / std**2
        if curvature is None or mean is None:
            curvature, mean = c, m
            continue
        shift = c * (mean - m)
        curvature = curvature + c
        linear = shift if linear is None else linear + shift
        constant = constant + (shift * ((mean - m) / 2 - mean)).sum()
    return curvature, mean, linear, constant


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
