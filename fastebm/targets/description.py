"""An energy with a closed-form gradient, read out of its module into plain tensors for kernels and the torch path.

    E(x) = sum_k w_k E_k(x) + sum_d [ c_d (x_d - m_d)^2 / 2 + b_d x_d ] + constant,   E_k an MLP with a head

Data flows from the module to its description, then to a backend, which moves the chains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..energies import ClassifierEnergy, GaussianEnergy, SumEnergy, takes_condition
from ..energies.conditions import unwrapped
from ..energies.eval_mode import reading
from ..tracing import operator
from .checks import check_hooks, plain
from .mlp import MLP, NotAnMLP, read_mlp
from .weights import check_affine, effective_weight

__all__ = ["Description", "check_shape", "describe"]


@dataclass(frozen=True, eq=False)
class Description:
    """The tensors of the formula above.

    mlps: at least one, all on the same x.
    scales: (k,), the w_k.
    curvature, mean: (dim,), c and m, or both None.
    linear: (dim,), b, or None.
    constant: ().

    In a *bare* description the parameters are not detached, and ``scales`` and ``constant`` are None if they are 1 and
    0.
    """

    mlps: tuple[MLP, ...]
    scales: Tensor | None
    curvature: Tensor | None
    mean: Tensor | None
    linear: Tensor | None
    constant: Tensor | None

    @property
    def dim(self) -> int:
        return self.mlps[0].dim

    @property
    def n_classes(self) -> int | None:
        """Labels are in [0, n_classes); None if no head takes labels."""
        return min((len(mlp.weights[-1]) for mlp in self.mlps if mlp.head == "class"), default=None)

    @property
    def networks(self) -> tuple[tuple[int, ...], ...]:
        """For each MLP the widths that a kernel computes: the hidden ones, and the classes of a "logsumexp" head."""
        return tuple(
            (*mlp.widths, len(mlp.weights[-1])) if mlp.head == "logsumexp" else mlp.widths for mlp in self.mlps
        )

    def scaled_heads(self) -> tuple[MLP, ...]:
        """The MLPs with their scale w_k, and the minus sign of a "class" head, multiplied into the last layer.

        A "logsumexp" head is not linear in its last layer, so its scale stays separate.
        """
        assert self.scales is not None  # the description is not bare
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
        """A copy on that device, not bare."""

        def moved(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.to(device, dtype)

        whole = self._completed(device, dtype)
        return Description(
            tuple(mlp.to(device, dtype) for mlp in whole.mlps),
            *map(moved, (whole.scales, whole.curvature, whole.mean, whole.linear, whole.constant)),
        )

    def _completed(self, device: torch.device, dtype: torch.dtype) -> Description:
        """The same description, not bare. New tensors have this device and dtype."""
        # created on the device: a copy from the host would synchronise
        return replace(
            self,
            mlps=tuple(mlp.detached() for mlp in self.mlps),
            scales=torch.ones(len(self.mlps), dtype=dtype, device=device) if self.scales is None else self.scales,
            constant=torch.zeros((), dtype=dtype, device=device) if self.constant is None else self.constant,
        )


def describe(module: nn.Module, *, labels: bool = False, bare: bool = False) -> Description:
    """Read an energy, in eval mode and without changing it.

    Accepted are the modules that ``read_mlp`` reads; a ``ClassifierEnergy`` of such a module; and a ``SumEnergy`` of
    these, of ``GaussianEnergy`` terms and of nn.Linear modules with one output.

    Args:
        labels: labels will be passed, so a classifier has the head "class" instead of "logsumexp".
        bare: return a bare description, for a caller that makes no graph. For an MLP or a classifier no operation is
            dispatched then.

    Raises:
        NotAnMLP: naming the part that does not fit.
    """
    with reading(module):
        compiling = torch.compiler.is_compiling()
        one: Tensor | None = None
        if isinstance(unwrapped(module), SumEnergy):
            one = torch.ones((), dtype=_dtype(module), device=_device(module))
        mlps: list[MLP] = []
        scales: list[Tensor] = []
        gaussians: list[Any] = []
        linears: list[Any] = []
        biases: list[Tensor | None] = []
        for scale, term in _terms(module, one):
            if isinstance(term, GaussianEnergy):
                gaussians += [scale, term.mean, term.std]
            elif isinstance(term, nn.Linear):
                linears += [scale, effective_weight("a Linear term", term)]
                biases.append(term.bias)
                check_affine("a Linear term", linears[-1], term.bias)
            elif labels and not isinstance(term, ClassifierEnergy) and takes_condition(term):
                raise NotAnMLP(f"{type(term).__name__} takes labels, and is not a ClassifierEnergy")
            else:
                scales += [] if scale is None else [scale]
                if isinstance(term, ClassifierEnergy):
                    mlps.append(read_mlp(term.classifier, "class" if labels else "logsumexp", bare=True))
                else:
                    mlps.append(read_mlp(term, bare=True))
        if not mlps:
            raise NotAnMLP("none of its terms is an MLP")
        dim = mlps[0].dim
        if any(mlp.dim != dim for mlp in mlps) or any(weight.shape[1] != dim for weight in linears[1::2]):
            raise NotAnMLP("its terms take different numbers of dims")
        for rows in (*gaussians[1::3], *gaussians[2::3]):
            if rows.numel() not in (1, dim):
                raise NotAnMLP(f"a GaussianEnergy has {rows.numel()} dims, and the MLPs have {dim}")
        curvature = mean = linear = constant = None
        if one is not None and (gaussians or linears):
            # zeros on the device: a copy from the host would synchronise
            arguments = (gaussians, linears, biases, torch.zeros((), dtype=one.dtype, device=one.device), dim)
            if compiling:
                *rows, constant = _traced_quadratic(*arguments)
                curvature, mean, linear = (row if row.numel() > 0 else None for row in rows)
            else:
                curvature, mean, linear, constant = _quadratic(*arguments)
        read = Description(tuple(mlps), torch.stack(scales) if scales else None, curvature, mean, linear, constant)
        return read if bare or compiling else read._completed(_device(module), _dtype(module))


def check_shape(module: nn.Module, description: Description, shape: Sequence[int]) -> None:
    """Raise ValueError unless the module takes states (n, *shape): reading it showed the number of dims alone."""
    if description.dim != math.prod(shape):
        hint = ""
        if len(shape) > 1 and math.prod(shape[1:]) == description.dim:
            hint = f": input_size is the shape of one state; {shape[0]} chains are batch_size={shape[0]}"
        raise ValueError(f"the energy takes {description.dim} dims, and the chains have {math.prod(shape)}{hint}")
    for term in module.modules():
        if isinstance(term, GaussianEnergy):
            term.check_shape(shape)


def _terms(module: nn.Module, scale: Tensor | None) -> Iterator[tuple[Tensor | None, nn.Module]]:
    """The terms of nested sums, each with the product of the weights that it stands under.

    Args:
        scale: the weight of the module itself; None for an energy that is not a sum.
    """
    module = unwrapped(module)
    known = (SumEnergy, ClassifierEnergy, GaussianEnergy, nn.Linear)
    cls, name = next((cls for cls in known if isinstance(module, cls)), None), type(module).__name__
    if cls is not None:
        if not plain(module, cls):
            raise NotAnMLP(f"{name} has a forward of its own")
        check_hooks(module, name)
        if isinstance(module, nn.Linear) and module.out_features != 1:
            raise NotAnMLP(f"a Linear term has {module.out_features} outputs, not one")
    if isinstance(module, SumEnergy):
        module.check_weights()
        for k, term in enumerate(module.energies):
            yield from _terms(term, module.weights[k] if scale is None else scale * module.weights[k])
    else:
        yield scale, module


def _quadratic(
    gaussians: list[Tensor], linears: list[Tensor], biases: list[Tensor | None], zero: Tensor, dim: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(curvature, mean, linear, constant) of a sum of Gaussian and linear terms.

    All Gaussians are expanded about the mean m_0 of the first:

        c (x - m)^2 / 2 = c (x - m_0)^2 / 2 + c (m_0 - m) x + c (m_0 - m) ((m_0 - m) / 2 - m_0)

    The lists are flat, since an operator takes no nested ones.

    Args:
        gaussians: scale, mean and std of each Gaussian in turn.
        linears: scale and weight (1, dim) of each linear term in turn.
        biases: the bias (1,) of each linear term, or None.
        zero: a zero of the dtype and device of the result.
    """
    curvature: Tensor | None = None
    mean: Tensor | None = None
    linear: Tensor | None = None
    constant = zero
    for k in range(0, len(gaussians), 3):
        m, std = (v.flatten().expand(dim) for v in gaussians[k + 1 : k + 3])
        c = gaussians[k] / std**2
        if curvature is None or mean is None:
            curvature, mean = c, m
            continue
        shift = c * (mean - m)
        curvature = curvature + c
        linear = shift if linear is None else linear + shift
        constant = constant + (shift * ((mean - m) / 2 - mean)).sum()
    for scale, weight, bias in zip(linears[::2], linears[1::2], biases, strict=True):
        row = scale * weight[0]
        linear = row if linear is None else linear + row
        if bias is not None:
            constant = constant + scale * bias[0]
    return curvature, mean, linear, constant


@operator(
    "quadratic",
    "(Tensor[] gaussians, Tensor[] linears, Tensor?[] biases, Tensor zero, int dim) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _traced_quadratic(
    gaussians: list[Tensor], linears: list[Tensor], biases: list[Tensor | None], zero: Tensor, dim: int
) -> tuple[Tensor, ...]:
    """``_quadratic`` in a compiled call. An operator can't return None: an empty tensor (0,) stands for it."""
    found = _quadratic(gaussians, linears, biases, zero, dim)
    return tuple(zero.new_empty(0) if v is None else v.clone() for v in found)


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
