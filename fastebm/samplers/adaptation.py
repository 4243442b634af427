"""Warm-up: adapt the step size and a diagonal scale of a sampler, from all chains together.

The step size follows Nesterov's dual averaging of the acceptance rate (Hoffman & Gelman 2014, section 3.2). The scale
s_i of coordinate i is learnt in windows that double in length, as in Stan (Stan Reference Manual, "HMC algorithm
parameters"). The first and the last steps adapt the step size alone. At the end of a window, over its chains and steps,

s_i^2 = min(var(x_i), sqrt(var(x_i) / var(dE/dx_i)))            in all windows but the last two
s_i^2 = var(x_i)                                                in the last two

The root minimises the Fisher divergence between the law of x_i / s_i and N(m, 1) (Seyboldt, Carlson & Carpenter 2026,
arXiv:2603.18845). For a Gaussian with a diagonal covariance it is exact for any states, since dE/dx_i is then
(x_i - m_i) / s_i^2. So it helps before chains have their law. Chains that are stuck where E is steep make it smaller,
and the variance larger. For the law itself, var(x_i) var(dE/dx_i) >= 1 (by parts, E[(x_i - m_i) dE/dx_i] = 1; then
Cauchy and Schwarz), so the root is at most the variance. The minimum is for states that break the inequality, as
those of a flat energy within bounds do. Once chains have their law, the variance is the better scale for some that are
no Gaussians, such as a mixture. It has two windows, so that the last one tunes everything else to such a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .base import Info

__all__ = ["DualAveraging", "Scale", "WarmUp", "total", "tunable", "windows"]

_ROWS_AT_ONCE = 16384


class DualAveraging:
    """Finds the step size at which the mean acceptance probability is ``target``.

    gamma, t0 and kappa are those of Hoffman & Gelman 2014.
    """

    gamma, t0, kappa = 0.05, 10.0, 0.75

    def __init__(self, step_size: float, target: float) -> None:
        self.target = target
        self.restart(step_size)

    def restart(self, step_size: float) -> None:
        """Start again from this step size.

        The search is centred there. (Stan centres it on ten times the start. With the mean over many chains the search
        is quick from anywhere, and a last phase that starts far off would need more steps.)
        """
        self.mu, self.t, self.error = math.log(step_size), 0, 0.0
        self.log_step = self.log_mean = self.mu

    def update(self, acceptance: float) -> None:
        """Learn from a step's mean acceptance probability."""
        self.t += 1
        weight = 1 / (self.t + self.t0)
        self.error = (1 - weight) * self.error + weight * (self.target - acceptance)
        log_step = self.mu - math.sqrt(self.t) / self.gamma * self.error
        # Bounded, so that exp stays finite while everything or nothing is accepted.
        self.log_step = min(max(log_step, -60.0), 60.0)
        decay = self.t**-self.kappa
        self.log_mean = decay * self.log_step + (1 - decay) * self.log_mean

    @property
    def step_size(self) -> float:
        """The step size to use while adapting."""
        return math.exp(self.log_step)

    @property
    def final(self) -> float:
        """The averaged step size, to be used after the warm-up."""
        return math.exp(self.log_mean)


class Variance:
    """The variance of each coordinate over the rows seen so far, in float64 (Chan, Golub & LeVeque 1983)."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares = 0, torch.zeros((), device="cpu"), torch.zeros((), device="cpu")

    def update(self, v: Tensor) -> None:
        """Add these rows, (n, dim) with n >= 1."""
        v = v.double()
        mean = total(v) / len(v)
        squares = total((v - mean).square())
        n, delta = self.n + len(v), mean - self.mean
        self.squares = self.squares + squares + delta.square() * (self.n * len(v) / n)
        self.mean = self.mean + delta * (len(v) / n)
        self.n = n

    @property
    def value(self) -> Tensor:
        """(dim,) float64, of two rows or more."""
        return self.squares / (self.n - 1)


class Scale:
    """The squared scale of each coordinate, from the states seen so far and the gradients there."""

    def __init__(self) -> None:
        self.states, self.gradients = Variance(), Variance()
        self.moved = torch.zeros((), dtype=torch.bool, device="cpu")

    def update(self, old: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Add the states x to which chains moved from the states ``old``, and dE/dx there, (n, dim) each."""
        if len(x) == 0:
            return
        self.moved = self.moved | (old != x).any(dim=0)
        self.states.update(x)
        self.gradients.update(gradient)

    def squared(self, *, by_gradients: bool) -> Tensor | None:
        """s^2, (dim,) float64, shrunk towards 1e-3 as in Stan. None before two states, or if nothing moved.

        by_gradients: by the minimum at the top of this file, or else the variance.

        Coordinates that never moved, because they are frozen, get the geometric mean of the others. So they do not
        count where the step size and the length of trajectories are fitted to a new scale.
        """
        n = self.states.n
        if n < 2 or not bool(self.moved.any()):
            return None
        squared = self.states.value
        if by_gradients:
            squared = squared / (squared * self.gradients.value).sqrt().clamp(min=1.0)  # the minimum, never x / 0
        shrunk: Tensor = squared * (n / (n + 5)) + 1e-3 * (5 / (n + 5))
        return torch.where(self.moved, shrunk, shrunk[self.moved].log().mean().exp())


def total(v: Tensor) -> Tensor:
    """The sum over the rows. Its bits do not depend on the number of threads.

    Those of ``v.sum(dim=0)`` do, where it is a single number from more than 32,767.
    """
    return torch.stack([part.sum(dim=0) for part in torch.split(v, _ROWS_AT_ONCE)]).sum(dim=0)


def tunable(sampler: Any) -> bool:
    """Whether a warm-up tunes the sampler: it has a target_acceptance, and its step_size is one number."""
    step_size = sampler.step_size
    return sampler.target_acceptance is not None and not (isinstance(step_size, Tensor) and step_size.ndim > 0)


def windows(steps: int, *, least: int = 25) -> list[int]:
    """The steps after which the scale is updated: the ends of windows that double in length."""
    first, last = _edges(steps)
    ends, size, t = [], least, first
    while t + size <= last:
        if t + 3 * size > last:  # the next window would not fit, so this one takes the rest
            size = last - t
        t += size
        ends.append(t)
        size *= 2
    return ends


def _edges(steps: int) -> tuple[int, int]:
    """The steps between which the scale is learnt. After a new scale, the step size needs some 50 steps."""
    return int(0.15 * steps), steps - max(int(0.1 * steps), min(50, int(0.4 * steps)))


class WarmUp:
    """The ``Adaptation`` (base.py) of a sampler with a step size and, if it is free, a diagonal scale.

    Args:
        sampler: ``tunable``: its step_size is a number, and its target_acceptance a mean acceptance probability.
        steps: of the warm-up.
        scaled: maps a sampler and s^2, (dim,), to the sampler with that scale. None: there is no scale to adapt. Else
            states have a field gradient, (n, dim) dE/dx.
        power: step_size is in units of the state to this power.
    """

    def __init__(
        self, sampler: Any, steps: int, scaled: Callable[[Any, Tensor], Any] | None = None, *, power: int = 2
    ) -> None:
        self.sampler, self.steps, self.scaled, self.power = sampler, steps, scaled, power
        self.log_scale = 0.0  # mean log s^2
        self.step_size = DualAveraging(float(sampler.step_size), sampler.target_acceptance)
        self.ends = windows(steps) if scaled is not None else []
        self.first, _ = _edges(steps)
        self.scale, self.t = Scale(), 0

    def update(self, old: Any, new: Any, info: Info, active: Tensor | None) -> None:
        """Learn from one step."""
        assert info.acceptance is not None
        self.t += 1
        kept: Any = slice(None) if active is None else active
        acceptance = info.acceptance[kept]
        if len(acceptance) > 0:
            self.step_size.update(float(total(acceptance.double())) / len(acceptance))
        if self.scaled is not None and self.ends and self.first < self.t <= self.ends[-1]:
            self.scale.update(old.x[kept], new.x[kept], new.gradient[kept])
            by_gradients = self.t in self.ends[:-2]
            if self.t in self.ends and (squared := self.scale.squared(by_gradients=by_gradients)) is not None:
                self.sampler = self.scaled(self.sampler, squared)
                self.scale = Scale()
                # Start from steps of the same length in the state's units, in the geometric mean over the coordinates.
                log_scale = float(squared.log().mean())
                factor = math.exp((self.log_scale - log_scale) * self.power / 2)
                self.log_scale = log_scale
                self.step_size.restart(self.step_size.final * factor)
        step = self.step_size.final if self.t >= self.steps else self.step_size.step_size
        self.sampler = replace(self.sampler, step_size=step)
