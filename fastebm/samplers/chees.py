"""ChEES-HMC: HMC whose trajectory length is adapted, for many chains side by side.

n_t = ceil(h_t trajectory_length / step_size)                   leapfrog steps of step t, the same for all chains
h_t = 1/2, 1/4, 3/4, 1/8, ...                                   base-2 Halton numbers, so the mean of h_t is 1/2

The warm-up maximises ChEES / sqrt(trajectory_length), where ChEES is the change in the estimator of the expected
square (Hoffman, Radul & Sountsov 2021):

ChEES = E[d^2] / 4,   d = |z' - E z'|^2 - |z - E z|^2,          z = M^(1/2) x at the start, z' at the end

It does so by Adam on log(trajectory_length). The gradient is estimated by the mean over the chains of

l d (z' - E z') . v' - d^2 / 8,                                 l = n_t step_size,   v' = M^(-1/2) p at the end

In it and in E z', ends are weighted by their acceptance probabilities. The paper maximises ChEES itself. ChEES hardly
changes once trajectories are long, so with heavy tails the length grew for as long as the warm-up lasted. (Sountsov &
Hoffman 2021 divide by the length. That gave lengths below the best.) Step size and mass are adapted as in HMC. The
length shrinks while too many trajectories end outside of the bounds. The paper has no mass and no bounds,
and aims at a harmonic mean of acceptance probabilities. Here it is the mean, because one trajectory that
diverges or ends outside would make the harmonic mean 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..box import Bounds
from ..rng import Noise
from ..scalars import plain_number
from ..targets.base import View
from ..targets.remembered import Point
from .adaptation import WarmUp, total, tunable
from .base import Info, checked_coefficient, diagonal_at, once, value_at
from .hmc import Hamiltonian, scaled_step, transition, with_mass

__all__ = ["ChEESHMC"]

# Most leapfrog steps of a step, as in the authors' code.
_MOST_LEAPFROG = 1000


@dataclass(frozen=True, eq=False)
class ChEESHMC(Hamiltonian):
    """HMC with varying trajectory lengths, whose scale a warm-up finds from many chains: samples exp(-E) without bias.

    Step t has ceil(h_t trajectory_length / step_size) leapfrog steps, at most 1000, with h_t in (0, 1) (Hoffman, Radul
    & Sountsov 2021). t is the chain's lifetime step number. A warm-up adapts step size, mass and trajectory length:
    ``sample(energy, ChEESHMC(0.1), n_chains=100, warmup=500, steps=1000)``. The values are in ``SampleInfo.sampler``.
    ``SampleInfo.gradients`` is the mean number of gradients per step. The more chains, the better the length.

    Args:
        step_size: > 0, in units of the state if the mass is 1. A float, a (steps,) tensor (a schedule) or a
            (n_chains, 1) tensor (one value per chain). A warm-up adapts a number only.
        trajectory_length: > 0, the largest length of a trajectory, in units of step_size. The mean is half of it. None:
            a warm-up finds it, so there must be one.
        mass: the diagonal of M: a number, or a tensor of one state's shape, > 0. Best is 1 / the variance of each
            coordinate. None: 1, and a warm-up adapts it.
        target_acceptance: mean acceptance probability that the warm-up aims at, in (0, 1). None: adapt nothing.
        clamp: bounds (lo, hi) of the states, or None, as for ``HMC``.

    Trajectories that diverge and energies that are not finite are treated as by ``HMC``.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    step_size: float | Tensor
    trajectory_length: float | None = None
    mass: float | Tensor | None = None
    target_acceptance: float | None = 0.651
    clamp: Bounds | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        length = plain_number(self.trajectory_length)
        if length is not None and not isinstance(length, (int, float)):
            raise TypeError(f"trajectory_length must be a number or None, got {type(length).__name__}")
        if length is not None:
            checked_coefficient("trajectory_length", length, positive=True)
        object.__setattr__(self, "trajectory_length", length)

    def adaptation(self, steps: int) -> WarmUp | None:
        """Adapt step_size, and the mass and trajectory_length if they are None."""
        return _ChEESWarmUp(self, steps, with_mass if self.mass is None else None, power=1) if tunable(self) else None

    def step(self, target: View, state: Point, noise: Noise, t: int) -> tuple[Point, Info]:
        """Follow a trajectory, then accept or reject its end."""
        h = once(target, "h", self, lambda: scaled_step(self, t, state.x))
        return transition(target, state, noise, t, h, self._n_leapfrog(noise, t))

    def _n_leapfrog(self, noise: Noise, t: int) -> int | Tensor:
        """Leapfrog steps at step t: a number if all chains have the same, or else (n_chains,) int64."""
        if self.trajectory_length is None:
            raise ValueError(
                "ChEESHMC has no trajectory_length yet: pass one, or a warm-up, as in sample(energy, ChEESHMC(0.1), "
                "warmup=500, steps=1000), which finds it if step_size is a number and target_acceptance is not None"
            )
        step_size = value_at(self.step_size, t, noise.first_steps.device)
        if noise.age is not None and not isinstance(step_size, Tensor):
            n = math.ceil(halton(noise.age + t) * self.trajectory_length / step_size)
            return min(max(n, 1), _MOST_LEAPFROG)
        ages, where = torch.unique(noise.first_steps + t, return_inverse=True)
        h = torch.tensor([halton(age) for age in ages.tolist()], dtype=torch.float64, device=ages.device)
        lengths = (
            h[where] * self.trajectory_length / (step_size.flatten() if isinstance(step_size, Tensor) else step_size)
        )
        return lengths.ceil().clamp(1, _MOST_LEAPFROG).long()


def halton(step: int) -> float:
    """The base-2 Halton number of step 0, 1, ...: 1/2, 1/4, 3/4, ... in (0, 1)."""
    digits = f"{step + 1:b}"
    return int(digits[::-1], 2) / (1 << len(digits))


class _ChEESWarmUp(WarmUp):
    """A warm-up that adapts trajectory_length too, if it is None.

    In the first steps, until the step size is about right, a trajectory is one leapfrog step.
    """

    # Adam's step in log(trajectory_length), and the decay of its squares. The authors use no momentum either.
    rate, decay = 0.025, 0.95

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.free = self.sampler.trajectory_length is None
        if self.free:
            self.sampler = replace(self.sampler, trajectory_length=self.sampler.step_size)
        self.log_length = self.log_mean = math.log(self.sampler.trajectory_length)
        self.squares, self.n, self.n_averaged = 0.0, 0, 0

    def update(self, old: Any, new: Any, info: Info, active: Tensor | None) -> None:
        """Learn from one step."""
        before, slope = self.sampler, _slope(self.sampler, old.x, info, active) if self.free else 0.0
        super().update(old, new, info, active)
        if self.free:
            masses = (diagonal_at("mass", sampler.mass, old.x) for sampler in (before, self.sampler))
            self._adapt_length(slope, _inside(info, active), *masses)

    def _adapt_length(self, slope: float, inside: float, before: float | Tensor, mass: float | Tensor) -> None:
        """slope: of the criterion. inside: fraction of ends within the bounds. before: the mass in this step."""
        step_size = float(self.sampler.step_size)
        if self.t <= self.first:
            self.log_length = math.log(step_size)
        elif self.t in self.ends:
            # The slowest coordinate determined the length. With the new mass, a coordinate is as fast as any other.
            self.log_length -= math.log(float(torch.as_tensor(before / mass, device="cpu").max())) / 2
            self.n_averaged = 0
        elif inside < (1 + self.step_size.target) / 2:
            # Shorter trajectories end inside. Otherwise the step size would fall without end, which does not help.
            self.log_length -= self.rate
        elif slope != 0 and math.isfinite(slope):
            self.n += 1
            self.squares = self.decay * self.squares + (1 - self.decay) * slope**2
            self.log_length += self.rate * slope / math.sqrt(self.squares / (1 - self.decay**self.n))
        self.log_length = min(max(self.log_length, math.log(step_size)), math.log(_MOST_LEAPFROG * step_size))
        self.n_averaged += 1
        weight = self.n_averaged**-0.5
        self.log_mean = weight * self.log_length + (1 - weight) * self.log_mean
        log_length = self.log_mean if self.t >= self.steps else self.log_length
        self.sampler = replace(self.sampler, trajectory_length=math.exp(log_length))


def _inside(info: Info, active: Tensor | None) -> float:
    """The fraction of ends within the bounds, weighted by the acceptance probabilities that they had without bounds."""
    assert info.acceptance is not None
    chances = torch.stack([info.acceptance, info.proposal.log_accept.clamp(max=0.0).exp().nan_to_num(0.0)])
    accepted, without = (chances if active is None else chances * active).double().sum(dim=1).tolist()
    return accepted / without if without > 0 else 1.0


def _slope(sampler: Any, x: Tensor, info: Info, active: Tensor | None) -> float:
    """The criterion's derivative by log(trajectory_length), from one step of ``sampler`` from x: (n_chains, dim)."""
    if len(x) < 2:
        raise ValueError("ChEESHMC finds its trajectory_length from several chains, got 1: pass trajectory_length=")
    end, weight = info.proposal, info.acceptance
    assert weight is not None
    if active is not None:
        weight = weight * active
    rows = weight > 0  # others need not be finite
    if int(rows.sum()) < 2:
        return 0.0
    root = torch.as_tensor(diagonal_at("mass", sampler.mass, x), dtype=torch.float64, device=x.device) ** 0.5
    z, z_end, v = x[rows] * root, end.x[rows] * root, end.momentum[rows].double()
    weight = weight[rows].double()[:, None]
    weight = weight / total(weight)
    centred = z_end - total(weight * z_end)
    grown = centred.square().sum(dim=1) - (z - total(z) / len(z)).square().sum(dim=1)
    length: float = end.n_leapfrog * float(sampler.step_size)
    slopes = length * grown * (centred * v).sum(dim=1) - grown.square() / 8
    return float(total(weight[:, 0] * slopes))
