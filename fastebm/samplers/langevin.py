"""The update rule and its conventions: one definition of each.

g  = dE/dx(x)                                                  one chain's own energy
g  = clip(g, -grad_clip, grad_clip)                            only if grad_clip is given
g  = g min(1, grad_norm_clip / |g|)                            only if grad_norm_clip is given
x' = x - (step_size / 2) g + sqrt(step_size) noise_scale xi
x' = clamp(x', lo, hi)                                         only if clamp is given

With noise_first a step is two half-steps, the noise before the gradient, as in IGEBM's and the UvA tutorial's loops:

y  = x + sqrt(step_size) noise_scale xi
y  = clamp(y, lo, hi)                                          only if clamp_noise, and if clamp is given
g  = dE/dx(y), clipped as above
x' = clamp(y - (step_size / 2) g, lo, hi)

Without a clamp the states y are those of the chain above. With one they are not: x' has no noise in coordinates that
the drift leaves at a bound.

A state is tested for finiteness after each update and before its clamp, so with noise_first after each half. A chain
whose next state is not finite stays at its last finite one, which is y where the second half fails.

Frozen coordinates stay what they are, whatever the bounds; their gradient counts as 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..scalars import plain_number
from ..tracing import readable

__all__ = ["NOISE_SCALE", "STEP_SIZE", "Langevin", "checked_rule"]


Bounds = tuple[float | Tensor, float | Tensor]

# What the original design starts from, Edifice's: for networks on images, whose gradients are small.
STEP_SIZE, NOISE_SCALE = 10.0, 0.005


@dataclass(frozen=True, eq=False)
class Langevin:
    """How a Langevin chain moves: x' = clamp(x - a clip(g(x)) + b xi), with drift a and noise std b; or, with
    noise_first, x' = clamp(y - a clip(g(y))) from y = x + b xi.

        a = step_size / 2,   b = sqrt(step_size) * noise_scale,   temperature T = b^2 / (2 a) = noise_scale^2.

    The chain targets exp(-E/T) as step_size goes to 0 (Roberts & Tweedie 1996; Welling & Teh 2011).

    ``Langevin(0.1)`` targets exp(-E): beside a step size of your own the temperature is 1, unless noise_scale says
    otherwise. ``Langevin()`` is ``Langevin.edifice()``, a recipe for networks on images, whose gradients are small: at
    a temperature of 2.5e-5 it is all but gradient descent, and its step is too large for an energy such as x^2 / 2.

    Args:
        step_size: > 0. A float, a (steps,) tensor (a schedule) or a (n_chains, 1) tensor (one value per chain).
            None: 10, as in Edifice.
        noise_scale: >= 0, in the same three forms. 0 is gradient descent. None: 1 beside a step_size that is given,
            0.005 (Edifice's) beside one that is not.
        grad_clip: elementwise bound on the gradient, > 0, or None.
        clamp: (lo, hi) with lo < hi, applied last, or None. Each a number, or a tensor of one state's shape (or
            one value per dim): bounds of their own for every dim. Infinite bounds are one-sided clamps.
        grad_norm_clip: bound on the Euclidean norm of each chain's gradient, > 0, or None. After grad_clip.
        noise_first: whether the noise comes before the gradient, as in IGEBM's and the UvA tutorial's loops.
        clamp_noise: with noise_first, whether the clamp is applied to y too.

    Raises:
        TypeError, ValueError: with the rule, the value received and the way out.
    """

    step_size: float | Tensor = None  # type: ignore[assignment]  # never None once it is built
    noise_scale: float | Tensor = None  # type: ignore[assignment]
    grad_clip: float | None = None
    clamp: Bounds | None = None
    grad_norm_clip: float | None = None
    noise_first: bool = False
    clamp_noise: bool = False

    def __post_init__(self) -> None:
        if self.noise_scale is None:
            object.__setattr__(self, "noise_scale", NOISE_SCALE if self.step_size is None else 1.0)
        if self.step_size is None:
            object.__setattr__(self, "step_size", STEP_SIZE)
        for name in ("step_size", "noise_scale"):
            object.__setattr__(
                self, name, _checked_coefficient(name, getattr(self, name), positive=name == "step_size")
            )
        for name in ("grad_clip", "grad_norm_clip"):
            bound = plain_number(getattr(self, name))
            object.__setattr__(self, name, bound)
            if bound is not None and not (_is_number(bound) and bound > 0):
                raise ValueError(f"{name} must be a number > 0 or None, got {bound!r}")
        if self.clamp is not None:
            object.__setattr__(self, "clamp", _checked_bounds(self.clamp))
        for name in ("noise_first", "clamp_noise"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.clamp_noise and not self.noise_first:
            raise ValueError(
                "clamp_noise=True clamps the state between the noise and the gradient, and needs noise_first=True"
            )

    # -- conventions ------------------------------------------------------------------------------------

    @classmethod
    def from_drift_and_noise(cls, drift: float, noise_std: float | Tensor, **options: Any) -> Langevin:
        """x' = x - drift g + noise_std xi: the form in which most papers state their numbers.

        noise_std may be a schedule or have one value per chain, as noise_scale.
        """
        drift, noise_std = plain_number(drift), _as_tensor(noise_std)
        if not (_is_number(drift) and drift > 0):
            raise ValueError(f"drift must be a number > 0, got {drift!r}")
        return cls(2.0 * drift, noise_std / math.sqrt(2.0 * drift), **options)

    @classmethod
    def ula(cls, step_size: float, temperature: float = 1.0, **options: Any) -> Langevin:
        """The unadjusted Langevin algorithm at a temperature: a = step/2, b = sqrt(step T) (Roberts & Tweedie 1996)."""
        temperature = plain_number(temperature)
        if not (_is_number(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be a number >= 0, got {temperature!r}")
        return cls(step_size, math.sqrt(temperature), **options)

    @classmethod
    def torchebm(cls, step_size: float, noise_scale: float = 1.0, **options: Any) -> Langevin:
        """torchebm, BlackJAX and posteriors: a = eta, b = sqrt(2 eta) noise_scale."""
        return cls(2.0 * _as_tensor(step_size), noise_scale, **options)

    @classmethod
    def edifice(cls, **options: Any) -> Langevin:
        """Edifice's default: step_size 10, noise_scale 0.005, so a = 5, b = 0.0158."""
        return cls(STEP_SIZE, NOISE_SCALE, **options)

    @classmethod
    def igebm(cls, **options: Any) -> Langevin:
        """IGEBM (Du & Mordatch 2019): a = 10, b = 0.005, the noise first.

        Their code also has clamp=(0.0, 1.0), and its argument proj_norm is grad_clip.
        """
        return cls.from_drift_and_noise(10.0, 0.005, **{"noise_first": True, **options})

    @classmethod
    def uva(cls, **options: Any) -> Langevin:
        """The UvA Deep Learning tutorial 8, Deep Energy Models (Lippe 2022): a = 10, b = 0.005, the noise first.

        Gradients are clipped at 0.03, and states clamped to (-1, 1), noisy ones too. Their network puts out -E:
        ``Negative(network)`` is its energy.
        """
        published = {"grad_clip": 0.03, "clamp": (-1.0, 1.0), "noise_first": True, "clamp_noise": True}
        return cls.from_drift_and_noise(10.0, 0.005, **{**published, **options})

    @classmethod
    def jem(cls, **options: Any) -> Langevin:
        """JEM (Grathwohl et al. 2020): a = 1, b = 0.01."""
        return cls.from_drift_and_noise(1.0, 0.01, **options)

    @property
    def temperature(self) -> float | Tensor:
        """Implied temperature T = noise_scale^2, of the form that noise_scale has."""
        return self.noise_scale**2

    @property
    def advice(self) -> str:
        """For an error or a warning: which of its numbers are defaults, which may not be meant. Else nothing."""
        values = (("step_size", self.step_size, STEP_SIZE), ("noise_scale", self.noise_scale, NOISE_SCALE))
        names = [f"{name} = {value:g}" for name, value, default in values if _is_number(value) and value == default]
        if not names:
            return ""
        are = "are defaults" if len(names) > 1 else "is a default"
        return (
            f"{' and '.join(names)} {are}, of a recipe for networks on images, whose gradients are small; for samples "
            "of exp(-E) pass a rule with a step size of your own, as in langevin_sample(energy, Langevin(0.1))"
        )

    @property
    def is_default(self) -> bool:
        """Whether step and noise are those of ``Langevin()``."""
        both = (self.step_size, self.noise_scale)
        return all(map(_is_number, both)) and both == (STEP_SIZE, NOISE_SCALE)

    # -- the arithmetic ---------------------------------------------------------------------------------

    def coefficients(
        self, n_chains: int, steps: int, *, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """(a, b), each (1 or n_chains, 1 or steps): drift coefficient and noise std of chain i at step t."""
        # made on the device: a copy from the host would wait for it
        a, b = (
            c.to(dtype) if isinstance(c, Tensor) else torch.full((1, 1), c, dtype=dtype, device=device)
            for c in self.drift_and_noise(n_chains, steps, device=device)
        )
        return a, b

    def drift_and_noise(self, n_chains: int, steps: int, *, device: Any) -> tuple[float | Tensor, float | Tensor]:
        """``coefficients`` in float64, or as a number each that is the same for all chains and steps."""
        if not isinstance(self.step_size, Tensor) and not isinstance(self.noise_scale, Tensor):
            return self.step_size / 2, math.sqrt(self.step_size) * self.noise_scale
        step_size, noise_scale = (
            _as_matrix(name, value, n_chains, steps, device)
            for name, value in (("step_size", self.step_size), ("noise_scale", self.noise_scale))
        )
        return step_size / 2, step_size.sqrt() * noise_scale

    def bounds(
        self, dim: int, *, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> tuple[float, float] | tuple[Tensor, Tensor] | None:
        """The clamp as two numbers, or as two (dim,) tensors if any bound is a tensor.

        Raises:
            ValueError: bounds of another number of dims.
        """
        if self.clamp is None:
            return None
        lo, hi = self.clamp
        if isinstance(lo, float) and isinstance(hi, float):
            return lo, hi
        rows = []
        for name, bound in (("lo", lo), ("hi", hi)):
            if not isinstance(bound, Tensor):
                # made on the device: a copy from the host would wait for it
                rows.append(torch.full((dim,), bound, dtype=dtype, device=device))
                continue
            if bound.ndim > 0 and bound.numel() != dim:
                raise ValueError(
                    f"clamp's {name} must be a number or have one value for each of the {dim} dims, "
                    f"got shape {tuple(bound.shape)}"
                )
            rows.append(bound.detach().flatten().to(device, dtype).expand(dim).contiguous())
        return rows[0], rows[1]

    def clip(self, grad: Tensor) -> Tensor:
        """The gradient, (n_chains, dim), within grad_clip and then within grad_norm_clip."""
        if self.grad_clip is not None:
            grad = grad.clamp(-self.grad_clip, self.grad_clip)
        if self.grad_norm_clip is not None:
            norm = grad.square().sum(dim=1, keepdim=True).sqrt()
            grad = grad * (self.grad_norm_clip / norm).clamp(max=1.0)  # of norm 0: times 1
        return grad

    def update(self, x: Tensor, grad: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """x before the clamp: x - a clip(grad) + b noise. All (n_chains, dim); a and b broadcast."""
        return x - a * self.clip(grad) + b * noise


def checked_rule(rule: object) -> Langevin:
    """An error with the likely mistake if it is none."""
    if isinstance(rule, Langevin):
        return rule
    hint = ""
    if isinstance(rule, (type, MethodType)):
        hint = ": are its parentheses missing, as in Langevin(0.1)?"
    elif isinstance(rule, (int, float)):
        hint = ": a step size alone is Langevin(0.1), and numbers of chains and steps have names (batch_size=, steps=)"
    raise TypeError(f"the rule must be a Langevin, got {rule!r}{hint}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _as_tensor(value: Any) -> Any:
    """An array as a tensor; a number of any kind as Python's."""
    value = plain_number(value)
    return torch.as_tensor(value) if isinstance(value, np.ndarray) else value


def _checked_bounds(clamp: Any) -> Bounds:
    try:
        lo, hi = (v if isinstance(v, Tensor) else float(v) for v in map(_as_tensor, clamp))
    except (TypeError, ValueError):
        raise TypeError(f"clamp must be a pair (lo, hi) of numbers or tensors, or None, got {clamp!r}") from None
    if isinstance(lo, float) and isinstance(hi, float):
        if not lo < hi:  # NaN fails too; an infinite bound is a one-sided clamp
            raise ValueError(f"clamp needs lo < hi, got {(lo, hi)}")
        return lo, hi
    for name, bound in (("lo", lo), ("hi", hi)):
        if isinstance(bound, Tensor) and not bound.is_floating_point():
            raise TypeError(f"clamp's {name} must be a number or a floating-point tensor, got {bound.dtype}")
    tensors = [bound for bound in (lo, hi) if isinstance(bound, Tensor)]
    sizes = {bound.numel() for bound in tensors if bound.ndim > 0}
    if len(sizes) > 1:
        raise ValueError(f"clamp's lo and hi must have as many values each, got {sorted(sizes)}")
    if not all(readable(bound.device) for bound in tensors):
        return lo, hi  # a compiled call looks when it runs (backends/op.py); a captured one can't
    flat = [bound.flatten() if isinstance(bound, Tensor) else bound for bound in (lo, hi)]
    good = torch.as_tensor(flat[0] < flat[1])
    if not bool(good.all()):
        raise ValueError(f"clamp needs lo < hi in every dim, which fails in {int((~good).sum())} of {good.numel()}")
    return lo, hi


def _checked_coefficient(name: str, value: Any, *, positive: bool) -> float | Tensor:
    rule = f"{name} must be finite and {'> 0' if positive else '>= 0'}"
    # a tensor without dims stays where it is: a captured call may read it there
    value = value if isinstance(value, Tensor) else _as_tensor(value)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.ndim > 2 or (value.ndim == 2 and value.shape[1] != 1):
            raise ValueError(
                f"{name} must be a float, a (steps,) tensor or a (n_chains, 1) tensor, got shape {tuple(value.shape)}"
            )
        if not readable(value.device):
            return value  # a compiled call looks when it runs (backends/op.py); a captured one can't
        # One reduction for all three faults: NaN fails every comparison.
        good = torch.isfinite(value) & ((value > 0) if positive else (value >= 0))
        if not bool(good.all()):
            raise ValueError(f"{rule}, got a tensor with {value[~good].flatten()[0].item()}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = ": a whole rule is passed as rule=" if isinstance(value, Langevin) else ""
        raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}{hint}")
    elif not ((value > 0 if positive else value >= 0) and value < math.inf):
        raise ValueError(f"{rule}, got {value}")
    checked: float | Tensor = value
    return checked


def _as_matrix(name: str, value: float | Tensor, n_chains: int, steps: int, device: Any) -> Tensor:
    """float64: (1, 1) for a number, (1, steps) for a schedule, (n_chains, 1) for one value per chain."""
    if not isinstance(value, Tensor):
        # made on the device: a copy from the host would wait for it
        return torch.full((1, 1), float(value), dtype=torch.float64, device=device)
    value = value.detach().to(device, torch.float64)
    if value.ndim == 0:
        return value.reshape(1, 1)
    if value.ndim == 1:
        if len(value) != steps:
            raise ValueError(
                f"a {name} schedule must have one entry per step: got {len(value)} entries for {steps} steps"
            )
        return value.reshape(1, steps)
    if value.shape[0] not in (1, n_chains):
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit {n_chains} chains; use ({n_chains}, 1)")
    return value
