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
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise, Stream
from ..scalars import number_or_tensor, plain_number
from ..targets.base import View
from .base import Info, checked_coefficient, settled, value_at

__all__ = ["NOISE_SCALE", "STEP_SIZE", "Langevin", "LangevinState", "checked_langevin"]

# What the original design starts from, Edifice's: for networks on images, whose gradients are small.
STEP_SIZE, NOISE_SCALE = 10.0, 0.005


class LangevinState(NamedTuple):
    """x: (n_chains, dim)."""

    x: Tensor


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

    exact: ClassVar[bool] = False
    reports: ClassVar[Mapping[str, float]] = {"grad_norm": math.nan, "clipped": 0.0, "clamped": 0.0}

    def __post_init__(self) -> None:
        if self.noise_scale is None:
            object.__setattr__(self, "noise_scale", NOISE_SCALE if self.step_size is None else 1.0)
        if self.step_size is None:
            object.__setattr__(self, "step_size", STEP_SIZE)
        for name in ("step_size", "noise_scale"):
            object.__setattr__(self, name, checked_coefficient(name, getattr(self, name), positive=name == "step_size"))
        for name in ("grad_clip", "grad_norm_clip"):
            bound = plain_number(getattr(self, name))
            object.__setattr__(self, name, bound)
            if bound is not None and not (_is_number(bound) and bound > 0):
                raise ValueError(f"{name} must be a number > 0 or None, got {bound!r}")
        object.__setattr__(self, "clamp", Box.of(self.clamp))
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
        drift, noise_std = plain_number(drift), number_or_tensor(noise_std)
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
        return cls(2.0 * number_or_tensor(step_size), noise_scale, **options)

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
    def box(self) -> Box | None:
        """The clamp."""
        return self.clamp  # type: ignore[return-value]  # made one when this was built

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
        """Drift and noise std of chain i at step t, each (1 or n_chains, 1 or steps)."""
        # made on the device: a copy from the host would wait for it
        drift, noise_std = (
            c.to(dtype) if isinstance(c, Tensor) else torch.full((1, 1), c, dtype=dtype, device=device)
            for c in self.drift_and_noise(n_chains, steps, device=device)
        )
        return drift, noise_std

    def drift_and_noise(self, n_chains: int, steps: int, *, device: Any) -> tuple[float | Tensor, float | Tensor]:
        """``coefficients`` in float64, or two numbers that are the same for all chains and steps."""
        if not isinstance(self.step_size, Tensor) and not isinstance(self.noise_scale, Tensor):
            return _drift_and_noise(self.step_size, self.noise_scale)
        step_size, noise_scale = (
            _as_matrix(name, value, n_chains, steps, device)
            for name, value in (("step_size", self.step_size), ("noise_scale", self.noise_scale))
        )
        return _drift_and_noise(step_size, noise_scale)

    def clip(self, grad: Tensor) -> Tensor:
        """The gradient, (n_chains, dim), within grad_clip and then within grad_norm_clip."""
        if self.grad_clip is not None:
            grad = grad.clamp(-self.grad_clip, self.grad_clip)
        if self.grad_norm_clip is not None:
            norm = grad.square().sum(dim=1, keepdim=True).sqrt()
            grad = grad * (self.grad_norm_clip / norm).clamp(max=1.0)  # of norm 0: times 1
        return grad

    # -- one step -----------------------------------------------------------------------------------------

    def init(self, target: View, x: Tensor, noise: Noise) -> LangevinState:
        """A chain carries its state alone."""
        return LangevinState(x)

    def step(self, target: View, state: LangevinState, noise: Noise, t: int) -> tuple[LangevinState, Info]:
        """The update that this file begins with."""
        x, xi = state.x, noise.normal(Stream.LANGEVIN, t)
        at_t = (value_at(c, t, x.device) for c in (self.step_size, self.noise_scale))
        drift, noise_std = (c.to(x.dtype) if isinstance(c, Tensor) else c for c in _drift_and_noise(*at_t))
        noisy = None
        if self.noise_first:
            x, noisy = settled(target, x, _plus(x, xi, noise_std), target.box if self.clamp_noise else None)
        grad = target.gradient(x)
        clipped = self.clip(grad)
        moved = _plus(x, clipped, -drift)
        if not self.noise_first:
            moved = _plus(moved, xi, noise_std)
        new, finite = settled(target, x, moved, target.box)
        if noisy is not None:  # a chain that its noise has stopped is not moved by its drift
            new, finite = torch.where(noisy[:, None], new, x), noisy if finite is None else noisy & finite

        def telemetry() -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
            counted = {"clipped": (clipped != grad).any(dim=1), "clamped": (new != target.held(x, moved)).any(dim=1)}
            return counted, {"grad_norm": grad.square().sum(dim=1).sqrt()}

        return LangevinState(new), Info(finite, telemetry)


def _drift_and_noise(step_size: Any, noise_scale: Any) -> tuple[Any, Any]:
    """(step_size / 2, sqrt(step_size) noise_scale), of numbers or float64 tensors."""
    root = step_size.sqrt() if isinstance(step_size, Tensor) else math.sqrt(step_size)
    return step_size / 2, root * noise_scale


def _plus(x: Tensor, v: Tensor, c: float | Tensor) -> Tensor:
    """x + c v, in one pass; c: a number, () or (n_chains, 1)."""
    return torch.addcmul(x, v, c) if isinstance(c, Tensor) else torch.add(x, v, alpha=c)


def checked_langevin(rule: object) -> Langevin:
    """For langevin_sample: the rule, or an error with the likely mistake."""
    if isinstance(rule, Langevin):
        return rule
    hint = ""
    if isinstance(rule, (type, MethodType)):
        hint = ": are its parentheses missing, as in Langevin(0.1)?"
    elif isinstance(rule, (int, float)):
        hint = ": a step size alone is Langevin(0.1), and numbers of chains and steps have names (batch_size=, steps=)"
    elif callable(getattr(rule, "step", None)):
        hint = f": fastebm.sample runs a {type(rule).__name__}"
    raise TypeError(f"the rule must be a Langevin, got {rule!r}{hint}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


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
