"""Predictor-corrector sampling of the variance-exploding diffusion (Song et al. 2021, algorithm 2).

For an energy E(x, sigma), whose exp(-E) is the data's density blurred by Gaussian noise of standard deviation sigma,
and noise levels sigma_1 > ... > sigma_L:

step 1:  x' = x + sigma_1 xi                                                        the start, blurred
step i:  d  = sigma_{i-1}^2 - sigma_i^2
         x' = x - d dE/dx(x, sigma_{i-1}) + sqrt(d) xi                              predictor: reverse diffusion
all:     a  = (2 snr sigma_i)^2
         corrector_steps times:  x' = x - (a / 2) dE/dx(x, sigma_i) + sqrt(a) xi    corrector: Langevin

Song et al. take a / 2 = 2 (snr |xi| / |dE/dx|)^2, with norms averaged over the batch. Here these norms have the values
that they have for noisy data, sqrt(dim) and sqrt(dim) / sigma_i, so that no chain depends on the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..box import Bounds, Box
from ..rng import Noise, Stream
from ..scalars import checked_integer, checked_number
from ..targets.base import View
from .annealed import checked_levels, checked_sigmas
from .base import Info, Sampler, both, rows_of, settled
from .langevin import Langevin, LangevinState

__all__ = ["PredictorCorrector"]


@dataclass(frozen=True, eq=False)
class PredictorCorrector(Sampler):
    """Predictor-corrector sampling, for an energy that takes a noise level: ``energy(x, sigma)``, sigma of (n_chains,).

        sampler = PredictorCorrector(torch.logspace(1, -2, 200))
        sample(energy, sampler, 2, n_chains=1000, steps=200)

    A call takes len(sigmas) steps, and each moves to the next level. The first one adds noise of standard deviation
    sigma_1 to the start, so any start on the scale of the data will do, if sigma_1 is much larger than that. A step
    costs 1 + corrector_steps gradients. The top of this file states the steps (Song et al. 2021, algorithm 2).

    Neither condition= nor labels= is passed. The energies that it reports are those at the last sigma.

    Args:
        sigmas: noise levels, decreasing and > 0: a sequence of numbers or a (n_levels,) tensor or array. Usual is a
            geometric sequence from the largest distance between data to 0.01.
        corrector_steps: Langevin steps at each level, >= 0.
        snr: signal-to-noise ratio of a corrector step, > 0: its step size is (2 snr sigma)^2.
        clamp: bounds (lo, hi) of the states with lo < hi, applied after each move, or None.
        levels: (n_steps,) int64, the index of the level that each step moves to, from the one before it. None: all, in
            order. To take the steps in several calls, pass each its part:
            ``dataclasses.replace(sampler, levels=sampler.levels[:100])``.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    sigmas: Sequence[float] | Tensor
    corrector_steps: int = 1
    snr: float = 0.16
    clamp: Bounds | None = None
    levels: Tensor | None = None

    scheduled: ClassVar[tuple[str, ...]] = ("levels",)
    reports: ClassVar[Mapping[str, float]] = {"grad_norm": math.nan}

    def __post_init__(self) -> None:
        sigmas = checked_sigmas(self.sigmas)
        object.__setattr__(self, "sigmas", sigmas)
        n = checked_integer("corrector_steps", self.corrector_steps, least=0)
        object.__setattr__(self, "corrector_steps", n)
        object.__setattr__(self, "snr", checked_number("snr", self.snr, positive=True))
        object.__setattr__(self, "clamp", Box.of(self.clamp))
        object.__setattr__(self, "levels", checked_levels(self.levels, len(sigmas), 1))

    @property
    def condition(self) -> float:
        """The last sigma, at which energies are reported."""
        return self.sigmas[-1]  # type: ignore[return-value]  # __post_init__ made it a tuple

    def init(self, target: View, x: Tensor, noise: Noise) -> LangevinState:
        """The state is x alone."""
        return LangevinState(x)

    def step(self, target: View, state: LangevinState, noise: Noise, t: int) -> tuple[LangevinState, Info]:
        """Move to the step's noise level, and take the corrector's steps there."""
        assert self.levels is not None  # __post_init__
        level, of = int(self.levels[t]), 1 + self.corrector_steps
        sigma = float(self.sigmas[level])
        if level == 0:
            state, info = _blurred(target, state, sigma * noise.part(0, of).normal(Stream.LANGEVIN, t))
        else:
            before = float(self.sigmas[level - 1])
            # drift d and noise of standard deviation sqrt(d)
            predictor = Langevin(2 * (before**2 - sigma**2), noise_scale=math.sqrt(0.5))
            state, info = predictor.step(target.at(before), state, noise.part(0, of), t)
        corrector, finite = Langevin((2 * self.snr * sigma) ** 2), info.finite
        for k in range(1, of):
            moved, info = corrector.step(target.at(sigma), state, noise.part(k, of), t)
            state = moved if finite is None else rows_of(finite, moved, state)
            finite = both(finite, info.finite)
        return state, Info(finite, last=info.last)


def _blurred(target: View, state: LangevinState, added: Tensor) -> tuple[LangevinState, Info]:
    """The start with noise, and no gradient to report."""
    x, finite = settled(target, state.x, state.x + added, target.box)

    def last() -> Mapping[str, Tensor]:
        return {"grad_norm": x.new_full((len(x),), math.nan)}

    return LangevinState(x), Info(finite, last=last)
