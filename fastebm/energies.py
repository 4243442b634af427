"""Energies: the MLP energy, its head on any trunk, classifiers, sums, and how energies of a batch are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .conditions import are_labels, condition_parameter, unwrapped
from .functions import EnergyLike, as_module, name_of_forward
from .mlp import ACTIVATIONS, Activation
from .scalars import plain_number

__all__ = [
    "ClassifierEnergy",
    "Energy",
    "GaussianEnergy",
    "MLPEnergy",
    "Negative",
    "SumEnergy",
    "build",
    "build_energy_fn",
    "energy",
    "first_tensor",
    "n_classes",
    "shape_of",
    "takes_condition",
]


def _layers(sizes: Sequence[int], activation: str | Activation, dropout: float, spectral_norm: bool) -> list[nn.Module]:
    """Linear, activation(, dropout) for each hidden size, then one Linear output."""
    name = activation if isinstance(activation, str) else activation.name
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    parameter = ACTIVATIONS[name].default if isinstance(activation, str) else activation.parameter
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
        if not isinstance(hidden_sizes, (Sequence, np.ndarray)) or isinstance(hidden_sizes, str):
            raise TypeError(f"hidden_sizes must be widths, as in (256, 128), got {hidden_sizes!r}")
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
        feature_size: what the trunk puts out. None: the ``out_features`` of the trunk's last Linear layer.
        hidden_sizes: hidden widths of the head; () for one Linear on the features.

    Returns:
        nn.Sequential(trunk, head), (batch, *shape) -> (batch, 1); it composes further like any module.
    """
    trunk = as_module(trunk, "trunk")
    if feature_size is None:
        linears = [m for m in trunk.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise ValueError("feature_size can't be told from a trunk without a Linear layer: pass feature_size=")
        feature_size = linears[-1].out_features
    return nn.Sequential(
        trunk, nn.Sequential(*_layers([feature_size, *hidden_sizes], activation, dropout, spectral_norm))
    )


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
        logits = _checked_logits(self.classifier(x), x)
        if labels is None:
            return -logits.logsumexp(dim=1)
        if not are_labels(labels):
            raise ValueError(f"a classifier takes labels (batch,), integers, got {tuple(labels.shape)} {labels.dtype}")
        return -logits.gather(1, labels.long()[:, None])[:, 0]


def _checked_logits(logits: object, x: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"a classifier must return a tensor of logits (batch, classes), got {got}: wrap it in a module that "
            "returns its logits alone"
        )
    return logits


class GaussianEnergy(nn.Module):
    """E(x) = sum_d ((x_d - mean_d) / std_d)^2 / 2: a Gaussian base measure, as a term of a ``SumEnergy``.

    Args:
        mean: a number, or a tensor or nested list of one state's shape.
        std: > 0, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[Any] | Tensor = 0.0, std: float | Sequence[Any] | Tensor = 1.0) -> None:
        super().__init__()
        for name, given in (("mean", mean), ("std", std)):
            try:
                value = torch.as_tensor(given, dtype=torch.get_default_dtype()).detach().clone()
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"{name} must be a number, or numbers of one state's shape, got {given!r}") from None
            positive = name != "std" or bool((value > 0).all())
            if value.numel() == 0 or not bool(value.isfinite().all()) or not positive:
                raise ValueError(f"{name} must be finite{' and > 0' if name == 'std' else ''}, got {value}")
            self.register_buffer(name, value)
        try:
            np.broadcast_shapes(self.mean.shape, self.std.shape)
        except ValueError:
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.std.shape)}"
            raise ValueError(
                f"mean and std must each be a number or of one state's shape, got shapes {shapes}"
            ) from None

    def check_shape(self, shape: Sequence[int]) -> None:
        """An error if states of this shape are not what it takes. (A mean for every chain would fit some batches.)"""
        states = (1, *shape)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if any(size not in (1, n) for size, n in zip_longest(reversed(value.shape), reversed(states), fillvalue=1)):
                raise ValueError(
                    f"a GaussianEnergy has a {name} of shape {tuple(value.shape)}, and the chains' states have "
                    f"{tuple(shape)}: give it a number, or one state's shape"
                )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *shape) -> (batch,)."""
        self.check_shape(x.shape[1:])
        return ((x - self.mean) / self.std).flatten(1).square().sum(dim=1) / 2


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
            terms.append(_values(term, x.clone(), None, given if takes else None, kind).reshape(len(x)))
        return torch.stack(terms).mul(self.weights[:, None]).sum(dim=0)


class Negative(SumEnergy):
    """E(x) = -f(x): for a network that puts out -E, as those of the UvA tutorial and of JEM do.

    ``SumEnergy([f], [-1.0])`` under a name of its own, so an MLP takes the fused kernel.
    """

    def __init__(self, energy: EnergyLike) -> None:
        super().__init__([energy], [-1.0])


def first_tensor(model: nn.Module) -> Tensor | None:
    """That tells where a model is, and in which dtype: a parameter, or else a floating-point buffer."""
    parameter = next(model.parameters(), None)
    return next((b for b in model.buffers() if b.is_floating_point()), None) if parameter is None else parameter


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
    return _checked_logits(model.classifier(x.to(dtype, copy=True)), x).shape[1]


def energy(
    model: EnergyLike,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    *,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Energies of a batch: (batch, *shape) -> (batch,), differentiable.

    Args:
        model: a module or a function, (batch, *shape) -> (batch,) or (batch, 1).
        params: parameters (and buffers) by name to use in place of the model's own (torch.func.functional_call).
        labels: (batch,) int64, given to the model beside x; or None.
        condition: (batch, ...), any other thing that it takes beside x; or None.

    Raises:
        ValueError: if the model puts out another shape, or takes no such thing.
    """
    if labels is not None and condition is not None:
        raise ValueError("an energy takes labels= or condition= beside x, got both")
    kind, given = ("condition", condition) if labels is None else ("labels", labels)
    return _values(as_module(model), x, params, given, kind).reshape(len(x))


def _values(
    model: nn.Module, x: Tensor, params: Mapping[str, Tensor] | None, condition: Tensor | None, kind: str
) -> Tensor:
    """(batch,) or (batch, 1), as the model puts them out; () for a batch of one that it squeezes."""
    arguments: tuple[Tensor, ...] = (x,)
    options: dict[str, Tensor] = {}
    if condition is not None:
        parameter = condition_parameter(model, kind)
        if parameter is None:
            raise ValueError(f"{name_of_forward(model)} takes x only, and {kind}= was given")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            arguments = (x, condition)
        else:
            options[parameter.name] = condition
    if params is None:
        value: Any = model(*arguments, **options)
    else:
        value = torch.func.functional_call(model, dict(params), arguments, options)
    n = len(x)
    if not isinstance(value, Tensor) or not (value.shape in ((n,), (n, 1)) or (n == 1 and value.ndim == 0)):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"an energy maps ({n}, ...) to ({n},) or ({n}, 1), got {got}{_mistake(value, x)}")
    if value.is_complex():
        raise ValueError(f"an energy is real, got {value.dtype}: take .real, or .abs(), of what the model puts out")
    if not value.is_floating_point():
        raise ValueError(f"an energy is a floating-point number, got {value.dtype}, which has no gradient")
    return value


def _mistake(value: object, x: Tensor) -> str:
    """The likely one, for an energy of another shape."""
    if value is None:
        return ": is a return missing?"
    if not isinstance(value, Tensor):
        return ": return a tensor, one energy for each state"
    if value.ndim == 0:
        return ": one number for the whole batch; drop the mean() or sum() over the states"
    if value.shape == x.shape:
        return ": one number per coordinate; sum over all dims but the first, as by .flatten(1).sum(1)"
    if len(value) == len(x) and x.ndim > 2:
        shape = tuple(x.shape[1:])
        return f": a state has shape {shape}; sum over all dims of it (or is the number of chains, batch_size=, in it?)"
    if len(value) == len(x) and value.ndim == 2:
        return ": several numbers per state; sum them, or, of a classifier, use ClassifierEnergy"
    return ": the first dim is the batch, and nothing is left of the others"


def _gradient(value: Tensor, x: Tensor) -> Tensor | None:
    """Of the sum of value; None if that does not depend on x."""
    ones = torch.ones_like(value)  # in place of a sum, and of its gradient
    if value.is_cpu and x.is_cpu and type(value) is Tensor and (engine := _engine()) is not None:
        return engine(value, x, ones)
    return torch.autograd.grad(value, x, ones, allow_unused=True)[0]


@cache
def _engine() -> Callable[[Tensor, Tensor, Tensor], Tensor | None] | None:
    """What ``torch.autograd.grad`` calls in the end. Its own Python before that, for arguments of many kinds, is a good
    part of a small energy's gradient. None where PyTorch has another: it is not public."""

    def gradient(value: Tensor, x: Tensor, ones: Tensor) -> Tensor | None:
        found = torch.autograd.Variable._execution_engine.run_backward(
            (value,), (ones,), False, False, (x,), allow_unreachable=True, accumulate_grad=False
        )
        return found[0]

    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(2, device="cpu", requires_grad=True)
            grad = gradient(3 * x, x, torch.ones(2, device="cpu"))
    except (AttributeError, TypeError, RuntimeError):
        return None
    return gradient if grad is not None and grad.tolist() == [3, 3] else None


class Energy:
    """A module as the samplers see it: flat states in, energies or their gradients out, no trace left behind.

    The module is given copies, never memory that the library or the caller keeps: it may write to what it gets.

    Args:
        module: maps (batch, *shape), and a condition if it takes one, to (batch,) or (batch, 1).
        shape: shape of one state; its product is dim.
        dtype: of the states. A module of another floating dtype is computed in this one, through
            torch.func.functional_call, so that a float64 start is float64 end to end.
        kind: of its condition, "labels" or "condition".
    """

    def __init__(self, module: nn.Module, shape: Sequence[int], dtype: torch.dtype, kind: str = "labels") -> None:
        # Gradients of a DistributedDataParallel are for training alone: its forward waits for other processes.
        is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        self.module = module = unwrapped(module) if is_ddp else module
        self.shape, self.kind = tuple(shape), kind
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        cast = any(t.is_floating_point() and t.dtype != dtype for t in tensors.values())
        self._params = (
            {k: t.detach().to(dtype) if t.is_floating_point() else t for k, t in tensors.items()} if cast else None
        )
        self._worked = False

    def __call__(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(n, dim) -> (n,) of x's dtype, without a graph."""
        if len(x) == 0:
            return x.new_empty(0)
        with torch.no_grad():
            return self._evaluated(x, condition).reshape(len(x)).to(x.dtype)

    def gradient(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """dE/dx of each chain: (n, dim). The gradient of the sum, so no chain's is divided by their number."""
        if len(x) == 0:
            return x
        with self.differentiating():
            # an inference tensor can be no leaf
            x = x.clone() if x.is_inference() else x.detach()
            return self.pulled_back(x.requires_grad_(), condition)

    @staticmethod
    @contextmanager
    def differentiating() -> Iterator[None]:
        """Within, graphs are made: sampling inside torch.inference_mode or no_grad still needs those of the energy."""
        with torch.inference_mode(False), torch.enable_grad():
            yield

    def pulled_back(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``gradient`` of a leaf that requires grad, within ``differentiating``: for loops, which enter that once."""
        value = self._evaluated(x, condition)
        if value.requires_grad and (grad := _gradient(value, x)) is not None:
            return grad
        raise ValueError(
            "the energy does not depend on x through differentiable operations "
            "(is there a detach(), an item(), torch.no_grad() or a torch.tensor(...) of its values in its forward?)"
        )

    def _evaluated(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """What the module does not take is told in words the first time, before any chain has moved."""
        given = x.clone()
        # No view that is not needed: each costs as much as the smallest operations of an energy do.
        given = given if len(self.shape) == 1 else given.reshape(len(x), *self.shape)
        try:
            value = _values(
                self.module, given, self._params, None if condition is None else condition.clone(), self.kind
            )
        except (RuntimeError, TypeError, IndexError) as error:
            if self._worked or isinstance(error, torch.OutOfMemoryError):
                raise
            shape = ", ".join(str(size) for size in self.shape)
            beside = "" if condition is None else f" with {self.kind} {tuple(condition.shape)}"
            why = str(error)
            if "numpy()" in why:  # PyTorch says to detach, which loses the gradient
                why = "it turns them into NumPy's arrays, which have no gradient: compute it by operations of PyTorch"
            raise ValueError(f"the energy does not take states of shape (n_chains, {shape}){beside}: {why}") from error
        self._worked = True
        return value
