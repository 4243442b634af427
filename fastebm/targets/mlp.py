"""The flat description of an MLP, read out of any nn.Module that is one.

    z_1 = x W_1^T + b_1,   z_{l+1} = act_l(z_l) W_{l+1}^T + b_{l+1},   f(x) = z_{L+1}

    head "scalar":     E(x) = f(x), one output
    head "logsumexp":  E(x) = -log sum_c exp f(x)_c: a classifier as an energy (JEM, Grathwohl et al. 2020)
    head "class":      E(x) = -f(x)_y, one label y per chain

Backends see only this description, so support for a new way to write an MLP belongs here and in forward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..energies.activations import ACTIVATIONS, Activation
from ..energies.eval_mode import reading
from .checks import plain
from .forward import operations
from .operations import ActivationCall, Affine, Flatten, NotAnMLP, Operation, Scale, Squeeze
from .weights import check_affine, effective_weight

__all__ = ["MLP", "NotAnMLP", "read_mlp"]


@dataclass(frozen=True, eq=False)
class MLP:
    """An MLP and its head: "scalar", "logsumexp" or "class".

    weights: L+1 tensors (out, in), as in nn.Linear; the last is the head's, (1 or classes, width).
    biases: L+1 tensors (out,) or None.
    activations: L of them, one after each hidden layer; L >= 1.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[Activation, ...]
    head: str = "scalar"

    @property
    def dim(self) -> int:
        return self.weights[0].shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden widths, from the input to the output."""
        return tuple(w.shape[0] for w in self.weights[:-1])

    def to(self, device: torch.device, dtype: torch.dtype) -> MLP:
        return self._mapped(lambda v: v.to(device, dtype))

    def detached(self) -> MLP:
        return self._mapped(Tensor.detach)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> MLP:
        return MLP(
            tuple(map(function, self.weights)),
            tuple(None if b is None else function(b) for b in self.biases),
            self.activations,
            self.head,
        )

    def output(self, x: Tensor) -> Tensor:
        """f(x): (batch, dim) -> (batch, 1 or classes), without a graph."""
        with torch.no_grad():
            for weight, bias, activation in zip(self.weights[:-1], self.biases[:-1], self.activations, strict=True):
                z = nn.functional.linear(x, weight, bias)
                x = activation.forward(z, torch.empty_like(z))
            return nn.functional.linear(x, self.weights[-1], self.biases[-1])


def read_mlp(module: nn.Module, head: str = "scalar", *, bare: bool = False) -> MLP:
    """Read an MLP with a head out of a module, in eval mode and without changing it.

    Accepted are modules that alternate nn.Linear and a supported activation and end in a Linear, which has one output
    for a scalar head. Biases, spectral norm, weight norm and dropout are supported. The layers may stand in an
    nn.Sequential (nested too), or be called one after another by the forward of any class, as modules or as
    functions, with a flatten before them, and a squeeze, a minus sign or a factor after them. This is decided from
    types and code (forward.py), never from values.

    Args:
        bare: return the parameters themselves, not detached, for a caller that makes no graph. Then no operation is
            dispatched, unless the output is scaled.

    Raises:
        NotAnMLP: naming the layer that does not fit.
    """
    with reading(module):
        mlp = _assembled(operations(module), head)
    # torch 2.13 can't compile a detach under torch.inference_mode; operators let no gradient through anyway
    return mlp if bare or torch.compiler.is_compiling() else mlp.detached()


def _read_activation(op: nn.Module | ActivationCall) -> Activation | None:
    if isinstance(op, ActivationCall):
        if not all(isinstance(value, (int, float, str)) for value in op.options.values()):
            return None
        return _read_activation(op.layer(**op.options))
    for name, kind in ACTIVATIONS.items():
        if plain(op, kind.layer) and (parameter := kind.parameter_of(op)) is not None:
            return Activation(name, parameter)
    return None


def _assembled(operations: list[Operation], head: str) -> MLP:
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    activations: list[Activation] = []
    columns, factor, squeezed = -1, 1.0, False  # columns: of the last operation's output; -1: not known
    for where, op in operations:
        after_linear = len(weights) > len(activations)
        if isinstance(op, Flatten) or (isinstance(op, nn.Flatten) and (op.start_dim, op.end_dim) == (1, -1)):
            width = op.columns if isinstance(op, Flatten) else -1
            if squeezed or (weights and (isinstance(op, nn.Flatten) or width not in (-1, columns))):
                raise NotAnMLP(f"{where} is neither nn.Linear nor a supported activation")
            columns = width if not weights else columns
        elif isinstance(op, Squeeze):
            if not after_linear or columns != 1 or squeezed:
                raise NotAnMLP(f"{where} does not follow a Linear layer with one output")
            squeezed = True
        elif isinstance(op, Scale):
            if op.factor != 1.0 and not after_linear:
                raise NotAnMLP(f"{where} does not follow a Linear layer")
            factor *= op.factor
            if not 1e-12 < abs(factor) < 1e12:  # scaled weights would round differently from scaled outputs
                raise NotAnMLP(f"{where} makes a factor of {factor:g}")
        elif isinstance(op, nn.Module) and (plain(op, nn.Dropout) or plain(op, nn.Identity)):
            pass
        elif squeezed or factor != 1.0:
            raise NotAnMLP(f"{where} follows the output")
        elif isinstance(op, Affine) or (isinstance(op, nn.Linear) and plain(op, nn.Linear)):
            if after_linear:
                activations.append(Activation("identity"))
            weights.append(op.weight if isinstance(op, Affine) else effective_weight(where, op))
            biases.append(op.bias)
            check_affine(where, weights[-1], biases[-1])
            if columns not in (-1, weights[-1].shape[1]):
                raise NotAnMLP(f"{where} takes {weights[-1].shape[1]} columns, and gets {columns}")
            columns = len(weights[-1])
        elif (activation := _read_activation(op)) is not None:
            if not after_linear:
                raise NotAnMLP(f"{where} does not follow a Linear layer")
            activations.append(activation)
        else:
            raise NotAnMLP(f"{where} is neither nn.Linear nor a supported activation ({', '.join(ACTIVATIONS)})")
    if len(weights) < 2:
        raise NotAnMLP("it has no hidden layer: an MLP energy is Linear, activation, ..., Linear")
    if len(activations) == len(weights):
        raise NotAnMLP(f"it ends in an activation ({activations[-1].name}), not in a Linear layer")
    if head == "scalar" and columns != 1:
        raise NotAnMLP(f"its last Linear has {columns} outputs, not one")
    if head != "scalar" and squeezed:
        raise NotAnMLP("a classifier that puts out one logit is no MLP with a head")
    if factor != 1.0:
        bias = biases[-1]
        weights[-1], biases[-1] = weights[-1] * factor, None if bias is None else bias * factor
    return MLP(tuple(weights), tuple(biases), tuple(activations), head)
