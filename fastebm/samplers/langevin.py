"""Langevin dynamics: the update, and the conversions between the conventions of papers and libraries.

g  = dE/dx(x)                                                  gradient of each chain's own energy
g  = clip(g, -grad_clip, grad_clip)                            only if grad_clip is given
g  = g min(1, grad_norm_clip / |g|)                            only if grad_norm_clip is given
x' = x - (step_size / 2) g + sqrt(step_size) noise_scale xi
x' = clamp(x', lo, hi)                                         only if clamp is given

With a preconditioner C, a diagonal matrix, the drift is (step_size / 2) C g and the noise is
sqrt(step_size C) noise_scale xi, with g clipped as above. As step_size goes to 0, the chain samples the same law for
every C (Roberts & Stramer 2002).

With noise_first the noise is added before the gradient is taken, as in the code of IGEBM and of the UvA tutorial:

y  = x + sqrt(step_size) noise_scale xi
y  = clamp(y, lo, hi)                                          only if clamp_noise, and if clamp is given
g  = dE/dx(y), clipped as above
x' = clamp(y - (step_size / 2) g, lo, hi)

Without a clamp, the states y form the chain of the first version. With a clamp the two versions differ: x' has no noise
in coordinates that the drift pushes onto a bound.

Each state (with noise_first, both y and x') is tested for finiteness before its clamp. A chain whose next state is not
finite stays at its last finite state. That is y if only the drift failed.

Frozen coordinates keep their values, even outside the bounds, and their gradient counts as 0.
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
from .base import (
    Info,
    Sampler,
    check_settings,
    checked_coefficient,
    checked_diagonal,
    diagonal_at,
    plus,
    settled,
    value_at,
)

__all__ = ["NOISE_SCALE", "STEP_SIZE", "Langevin", "LangevinState", "checked_langevin", "drift_and_noise_of"]

# The defaults of Edifice, which suit networks on images: their gradients are small.
STEP_SIZE, NOISE_SCALE = 10.0, 0.005


class LangevinState(NamedTuple):
    """x: (n_chains, dim)."""

    x: Tensor


@dataclass(frozen=True, eq=False)
class Langevin(Sampler):
    """Langevin dynamics without an accept test (the unadjusted Langevin algorithm, ULA):

        x' = clamp(x - drift clip(dE/dx(x)) + noise_std xi),   xi ~ N(0, I)
        drift = step_size / 2,   noise_std = sqrt(step_size) noise_scale

    With noise_first: y = x + noise_std xi, then x' = clamp(y - drift clip(dE/dx(y))).

    The temperature is T = noise_std^2 / (2 drift) = noise_scale^2. As step_size goes to 0, the chain samples exp(-E/T)
    (Roberts & Tweedie 1996; Welling & Teh 2011).

    ``Langevin(0.1)`` samples exp(-E): with an explicit step_size, noise_scale defaults to 1. ``Langevin()`` is
    ``Langevin.edifice()``, a recipe for networks on images, whose gradients are small. At its temperature of 2.5e-5 it
    is almost gradient descent, and its step is too large for an energy such as x^2 / 2.

    Args:
        step_size: > 0. A float, a (steps,) tensor (a schedule) or a (n_chains, 1) tensor (one value per chain).
            None: 10, as in Edifice.
        noise_scale: >= 0, in the same three forms. 0 is gradient descent. None: 1 if step_size is given, else 0.005
            as in Edifice.
        grad_clip: elementwise bound on the gradient, > 0, or None.
        clamp: bounds (lo, hi) of the states with lo < hi, applied last, or None. lo and hi are each a number, or a
            tensor of one state's shape with bounds per dim. An infinite bound leaves that side open.
        grad_norm_clip: bound on the Euclidean norm of each chain's gradient, > 0, or None. Applied after grad_clip.
        noise_first: add the noise before the gradient is taken, as the code of IGEBM and of the UvA tutorial does.
        clamp_noise: with noise_first, clamp y too.
        preconditioner: the diagonal of C: a number, or a tensor of one state's shape, > 0. Best is the variance of each
            coordinate. The drift is multiplied by C and the noise by sqrt(C). None: 1. No fused kernel has it.
        marginal_noise: draw the noise where an MLP energy feels it, in the space of its first layer, and complete the
            states that are kept by one draw of all dims. They have the same law as with noise in each step, and other
            numbers, which depend on which states are kept. A step costs the same for any number of dims. It has no
            effect where each step's state is needed (bounds, clips, noise_first, a preconditioner, frozen coordinates),
            with other energies, with a Gaussian term whose std varies between dims, with first layers as wide as the
            state, in a CUDA graph, and with backend="reference". ``SampleInfo.path`` is "marginal" where it has.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    step_size: float | Tensor = None  # type: ignore[assignment]  # __post_init__ replaces None
    noise_scale: float | Tensor = None  # type: ignore[assignment]
    grad_clip: float | None = None
    clamp: Bounds | None = None
    grad_norm_clip: float | None = None
    noise_first: bool = False
    clamp_noise: bool = False
    preconditioner: float | Tensor | None = None
    marginal_noise: bool = False

    exact: ClassVar[bool] = False
    power: ClassVar[int] = 2
    scheduled: ClassVar[tuple[str, ...]] = ("step_size", "noise_scale")
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
        object.__setattr__(self, "preconditioner", checked_diagonal("preconditioner", self.preconditioner))
        for name in ("noise_first", "clamp_noise", "marginal_noise"):
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
        """From the two numbers of x' = x - drift g + noise_std xi, the form that most papers use.

        noise_std may be a schedule or have one value per chain, like noise_scale.
        """
        drift, noise_std = plain_number(drift), number_or_tensor(noise_std)
        if not (_is_number(drift) and drift > 0):
            raise ValueError(f"drift must be a number > 0, got {drift!r}")
        return cls(2.0 * drift, noise_std / math.sqrt(2.0 * drift), **options)

    @classmethod
    def ula(cls, step_size: float, temperature: float = 1.0, **options: Any) -> Langevin:
        """ULA at temperature T: drift = step_size / 2, noise_std = sqrt(step_size T) (Roberts & Tweedie 1996)."""
        temperature = plain_number(temperature)
        if not (_is_number(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be a number >= 0, got {temperature!r}")
        return cls(step_size, math.sqrt(temperature), **options)

    @classmethod
    def torchebm(cls, step_size: float, noise_scale: float = 1.0, **options: Any) -> Langevin:
        """As in torchebm, BlackJAX and posteriors: drift = step_size, noise_std = sqrt(2 step_size) noise_scale."""
        return cls(2.0 * number_or_tensor(step_size), noise_scale, **options)

    @classmethod
    def edifice(cls, **options: Any) -> Langevin:
        """Edifice's default: step_size 10 and noise_scale 0.005, so drift = 5 and noise_std = 0.0158."""
        return cls(STEP_SIZE, NOISE_SCALE, **options)

    @classmethod
    def igebm(cls, **options: Any) -> Langevin:
        """IGEBM (Du & Mordatch 2019): drift = 10, noise_std = 0.005, noise_first.

        Their code also uses clamp=(0.0, 1.0). Its argument proj_norm is grad_clip here.
        """
        return cls.from_drift_and_noise(10.0, 0.005, **{"noise_first": True, **options})

    @classmethod
    def uva(cls, **options: Any) -> Langevin:
        """UvA Deep Learning tutorial 8, Deep Energy Models (Lippe 2022): drift = 10, noise_std = 0.005, noise_first.

        grad_clip is 0.03, clamp is (-1, 1), and clamp_noise is set. The tutorial's network returns -E, so its energy is
        ``Negative(network)``.
        """
        published = {"grad_clip": 0.03, "clamp": (-1.0, 1.0), "noise_first": True, "clamp_noise": True}
        return cls.from_drift_and_noise(10.0, 0.005, **{**published, **options})

    @classmethod
    def jem(cls, **options: Any) -> Langevin:
        """JEM (Grathwohl et al. 2020): drift = 1, noise_std = 0.01."""
        return cls.from_drift_and_noise(1.0, 0.01, **options)

    @property
    def temperature(self) -> float | Tensor:
        """The implied temperature T = noise_scale^2, in the shape of noise_scale."""
        return self.noise_scale**2

    @property
    def unbounded(self) -> bool:
        """Whether there are no clips and no bounds, and the gradient is taken before the noise."""
        return self.clamp is None and self.grad_clip is None and self.grad_norm_clip is None and not self.noise_first

    @property
    def advice(self) -> str:
        """A hint for errors and warnings if step_size or noise_scale has its default value, else an empty string."""
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
        """Whether step_size and noise_scale are those of ``Langevin()``."""
        both = (self.step_size, self.noise_scale)
        return all(map(_is_number, both)) and both == (STEP_SIZE, NOISE_SCALE)

    # -- the arithmetic ---------------------------------------------------------------------------------

    def coefficients(
        self, n_chains: int, steps: int, *, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """drift and noise_std of chain i at step t: two tensors of shape (1 or n_chains, 1 or steps)."""
        # Created on the device: a copy from the host would synchronise.
        drift, noise_std = (
            c.to(dtype) if isinstance(c, Tensor) else torch.full((1, 1), c, dtype=dtype, device=device)
            for c in self.drift_and_noise(n_chains, steps, device=device)
        )
        return drift, noise_std

    def drift_and_noise(self, n_chains: int, steps: int, *, device: Any) -> tuple[float | Tensor, float | Tensor]:
        """``coefficients`` in float64, or two plain numbers if they are the same for all chains and steps."""
        if not isinstance(self.step_size, Tensor) and not isinstance(self.noise_scale, Tensor):
            return drift_and_noise_of(self.step_size, self.noise_scale)
        check_settings(self, n_chains, steps)
        return drift_and_noise_of(*(_as_matrix(value, device) for value in (self.step_size, self.noise_scale)))

    def clip(self, grad: Tensor) -> Tensor:
        """Apply grad_clip, then grad_norm_clip, to a gradient of shape (n_chains, dim)."""
        if self.grad_clip is not None:
            grad = grad.clamp(-self.grad_clip, self.grad_clip)
        if self.grad_norm_clip is not None:
            # Norms below half the clip count as that: the factor is 1, and at 0 it has a derivative.
            floor = min((self.grad_norm_clip / 2) ** 2, torch.finfo(grad.dtype).eps)
            norm = grad.square().sum(dim=1, keepdim=True).clamp(min=floor).sqrt()
            grad = grad * (self.grad_norm_clip / norm).clamp(max=1.0)
        return grad

    # -- one step -----------------------------------------------------------------------------------------

    def init(self, target: View, x: Tensor, noise: Noise) -> LangevinState:
        """The state is x alone."""
        return LangevinState(x)

    def step(self, target: View, state: LangevinState, noise: Noise, t: int) -> tuple[LangevinState, Info]:
        """One update, as defined at the top of this file."""
        x, xi = state.x, noise.normal(Stream.LANGEVIN, t)
        at_t = (value_at(c, t, x.device) for c in (self.step_size, self.noise_scale))
        drift, noise_std = (c.to(x.dtype) if isinstance(c, Tensor) else c for c in drift_and_noise_of(*at_t))
        c = diagonal_at("preconditioner", self.preconditioner, x)
        if self.preconditioner is not None:
            xi = c**0.5 * xi
        noisy = None
        if self.noise_first:
            x, noisy = settled(target, x, plus(x, xi, noise_std), target.box if self.clamp_noise else None)
        grad = target.gradient(x)
        clipped = self.clip(grad)
        moved = plus(x, clipped if self.preconditioner is None else c * clipped, -drift)
        if not self.noise_first:
            moved = plus(moved, xi, noise_std, out=moved)
        new, finite = settled(target, x, moved, target.box)
        if noisy is not None:  # a chain whose noisy state was not finite does not move at all
            new, finite = torch.where(noisy[:, None], new, x), noisy if finite is None else noisy & finite

        def averaged() -> Mapping[str, Tensor | float]:
            return {
                "clipped": 0.0 if clipped is grad else (clipped != grad).any(dim=1),
                "clamped": 0.0 if target.box is None else (new != target.held(x, moved)).any(dim=1),
            }

        def last() -> Mapping[str, Tensor]:
            return {"grad_norm": grad.square().sum(dim=1).sqrt()}

        return LangevinState(new), Info(finite, averaged, last)


def drift_and_noise_of(step_size: Any, noise_scale: Any) -> tuple[Any, Any]:
    """(step_size / 2, sqrt(step_size) noise_scale) for numbers or float64 tensors."""
    root = step_size.sqrt() if isinstance(step_size, Tensor) else math.sqrt(step_size)
    return step_size / 2, root * noise_scale


def checked_langevin(sampler: object) -> Langevin:
    """Check the argument ``rule`` of langevin_sample. A TypeError names the likely mistake."""
    if isinstance(sampler, Langevin):
        return sampler
    hint = ""
    if isinstance(sampler, (type, MethodType)):
        hint = ": are its parentheses missing, as in Langevin(0.1)?"
    elif isinstance(sampler, (int, float)):
        hint = ": a step size alone is Langevin(0.1), and numbers of chains and steps have names (batch_size=, steps=)"
    elif callable(getattr(sampler, "step", None)):
        hint = f": fastebm.sample runs {type(sampler).__name__}"
    raise TypeError(f"the rule must be a Langevin, got {sampler!r}{hint}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _as_matrix(value: float | Tensor, device: Any) -> Tensor:
    """A float64 tensor: (1, 1) for a number, (1, steps) for a schedule, (n_chains, 1) for one value per chain."""
    if not isinstance(value, Tensor):
        # Created on the device: a copy from the host would synchronise.
        return torch.full((1, 1), float(value), dtype=torch.float64, device=device)
    value = value.detach().to(device, torch.float64)
    return value if value.ndim == 2 else value.reshape(1, -1)
