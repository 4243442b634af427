"""Parallel tempering: chains at several temperatures that exchange their states, so that the coldest crosses barriers.

A chain is a ladder of R rungs. Rung r has the density exp(-E(x_r) / T_r), with 1 = T_0 < ... < T_{R-1}, and the ladder
has the product of these. A step moves each rung by the inner sampler, with the energy E / T_r. Then it tries to swap
the states of neighbouring rungs i and j = i + 1:

log a = (1 / T_i - 1 / T_j) (E(x_i) - E(x_j)),   x_i <-> x_j if log u <= log a,   u ~ U(0, 1]

Even and odd pairs alternate: i = 0, 2, ... and i = 1, 3, ... So states travel along the ladder in one direction, not by
a random walk, and the swaps of a step do not interact. Both moves leave the product invariant.

temperatures="auto": with the mean rejection rates r_i of the swaps, Lambda_k = r_0 + ... + r_{k-1} is the communication
barrier between T_0 and T_k. New temperatures cut it into equal parts, so that all pairs swap at the same rate.

Sources: Geyer 1991; Earl & Deem 2005; Okabe et al. 2001 (even and odd pairs); Syed, Bouchard-Cote, Deligiannidis &
Doucet 2022, "Non-reversible parallel tempering: a scalable highly parallel MCMC scheme" (algorithm 4 is the ladder).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..box import Bounds
from ..rng import Noise, Stream
from ..scalars import checked_integer, plain_number
from ..targets.base import View
from ..targets.remembered import Point
from .adaptation import DualAveraging, windows
from .base import Info, Sampler, once, rows_of, value_at
from .tempering import checked_temperatures, for_temperatures, step_factors, tempered, with_inner

__all__ = ["ParallelTempering", "ParallelTemperingState"]

# Rungs of an "auto" ladder.
_N_TEMPERATURES = 8


class ParallelTemperingState(NamedTuple):
    """x: (n, dim), the states at temperature 1. energy: (n,) E(x). rungs: (n, R, dim), the states at all temperatures.

    energies: (n, R) E of the rungs. gradients: (n, R, dim) dE/dx. Neither is divided by the temperature.
    """

    x: Tensor
    energy: Tensor
    rungs: Tensor
    energies: Tensor
    gradients: Tensor


class _Proposal(NamedTuple):
    """For the warm-up. acceptance: (n, R) of the inner moves, or None. swap_acceptance, swaps: (n, R - 1)."""

    acceptance: Tensor | None
    swap_acceptance: Tensor
    swaps: Tensor


@dataclass(frozen=True, eq=False)
class ParallelTempering(Sampler):
    """Parallel tempering (replica exchange): the chain at temperature 1 swaps states with chains at higher ones.

        ParallelTempering(MALA(0.1), (1.0, 2.0, 4.0, 8.0))

    The top of this file states the swap (Geyer 1991). It helps where modes of exp(-E) are separated by barriers that
    the inner sampler does not cross. At the highest temperature it should cross them easily. Good ladders swap about
    half of the time (``SampleInfo.swap_acceptance``; Syed et al. 2022). One step costs R steps of the inner sampler, in
    one batch. Energies, acceptance and samples are those of temperature 1. Chains stay independent of each other.

    Args:
        sampler: moves each rung: Langevin, MALA or another sampler of single chains. At temperature T its step size is
            multiplied by the rung's factor. Its clips apply to the gradient of E / T.
        temperatures: 1 = T_0 < ... < T_{R-1}, R >= 2. "auto": a warm-up of all chains together finds the ladder.
        swap_every: number of steps between swaps, >= 1. Each pair is tried at every second swap.
        n_temperatures: R for "auto". None: 8.
        max_temperature: T_{R-1} for "auto", which keeps it. > 1, and needed there.
        factors: step size of each rung, over that at temperature 1. None: sqrt(T) for lengths, so T for a step size in
            squared units. A warm-up adapts them, where it adapts the inner step size.
        clamp: bounds (lo, hi) of all rungs, in place of the inner sampler's; or None, to keep those.

    A new chain has all rungs at its start. Until the hot rungs have their laws, swaps bias x, even if the starts have
    the law exp(-E). A resumed chain goes on with its rungs, unless its state was changed, as by
    on_nonfinite="reinit": then all start there. So does a rung outside the bounds. If a rung is no longer finite, or
    its energy is NaN or -inf, the whole chain stops, and ``on_nonfinite`` decides what follows. A swap never moves a
    state of energy +inf to a lower temperature. Pools store x alone, so each draw starts new ladders, with
    their bias: take many steps per draw there.

    Raises:
        TypeError, ValueError: a setting is wrong. The message states the requirement, the value and the likely fix.
    """

    sampler: Any
    temperatures: Sequence[float] | str
    swap_every: int = 1
    n_temperatures: int | None = None
    max_temperature: float | None = None
    factors: Sequence[float] | None = None
    clamp: Bounds | None = None

    scheduled: ClassVar[tuple[str, ...]] = ("sampler",)
    carries: ClassVar[tuple[str, ...]] = ("rungs",)
    recomputes: ClassVar[tuple[str, ...]] = ("x", "energy", "energies", "gradients")

    def __post_init__(self) -> None:
        inner, clamp = with_inner("ParallelTempering", self.sampler, self.clamp)
        self._set(sampler=inner, clamp=clamp)
        self._set(swap_every=checked_integer("swap_every", self.swap_every, least=1))
        if isinstance(self.temperatures, str):
            self._check_auto()
        else:
            if (self.n_temperatures, self.max_temperature) != (None, None):
                raise ValueError('n_temperatures and max_temperature are for temperatures="auto", not for given ones')
            self._set(temperatures=checked_temperatures(self.temperatures))
        if self.factors is not None:
            self._set(factors=self._checked_factors(self.factors))

    def _set(self, **settings: Any) -> None:
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def _check_auto(self) -> None:
        if self.temperatures != "auto":
            raise ValueError(f'temperatures must be numbers or "auto", got {self.temperatures!r}')
        n = _N_TEMPERATURES if self.n_temperatures is None else self.n_temperatures
        self._set(n_temperatures=checked_integer("n_temperatures", n, least=2))
        highest = plain_number(self.max_temperature)
        if isinstance(highest, bool) or not isinstance(highest, (int, float)) or not 1 < highest < math.inf:
            raise ValueError(
                'temperatures="auto" needs max_temperature, a finite number > 1 at which the inner sampler crosses all '
                f"barriers, got {highest!r}"
            )
        self._set(max_temperature=float(highest))
        values = (getattr(self.sampler, name) for name in self.sampler.scheduled)
        if any(isinstance(value, Tensor) and value.ndim == 1 for value in values):
            raise ValueError('temperatures="auto" needs an inner sampler without schedules: give it numbers')

    def _checked_factors(self, factors: Any) -> tuple[float, ...]:
        try:
            checked = tuple(float(plain_number(v)) for v in factors)
        except (TypeError, ValueError):
            raise TypeError(f"factors must be numbers, one per temperature, or None, got {factors!r}") from None
        if len(checked) != len(self.ladder) or checked[0] != 1.0 or not all(0 < v < math.inf for v in checked):
            raise ValueError(
                f"factors must be one finite number > 0 for each of the {len(self.ladder)} temperatures, the first 1, "
                f"got {checked}"
            )
        return checked

    # -- what the driver reads --------------------------------------------------------------------------------------

    @property
    def ladder(self) -> tuple[float, ...]:
        """The temperatures. Those of "auto" are equal factors apart until a warm-up has tuned them."""
        if not isinstance(self.temperatures, str):
            return tuple(self.temperatures)
        assert self.n_temperatures is not None
        assert self.max_temperature is not None
        between = (self.max_temperature ** (r / (self.n_temperatures - 1)) for r in range(1, self.n_temperatures - 1))
        return (1.0, *between, self.max_temperature)

    @property
    def rows_per_chain(self) -> int:
        """The number of temperatures."""
        return len(self.ladder)

    @property
    def exact(self) -> bool:  # type: ignore[override]  # as the inner sampler is
        """Whether the inner sampler is exact. Then the ladder is."""
        return bool(self.sampler.exact)

    @property
    def reports(self) -> Mapping[str, float | Tensor]:  # type: ignore[override]
        """What the inner sampler reports, at temperature 1; the gradients of all rungs; and the swaps."""
        none = torch.zeros(len(self.ladder) - 1, device="cpu")
        return {**self.sampler.reports, "gradients": math.nan, "swap_acceptance": none, "swaps": none}

    @property
    def step_size(self) -> Any:
        """The step size at temperature 1."""
        return self.sampler.step_size

    @property
    def temperature(self) -> Any:
        """The inner sampler's temperature, which multiplies all others: 1 if it samples exp(-E)."""
        return getattr(self.sampler, "temperature", 1.0)

    # -- steps ------------------------------------------------------------------------------------------------------

    def init(self, target: View, x: Tensor, noise: Noise, *, rungs: Tensor | None = None) -> ParallelTemperingState:
        """Evaluate all rungs. rungs: (n, R, dim) of the part before, or None: all start at x."""
        k = len(self.ladder)
        start = x[:, None].expand(-1, k, -1)
        if rungs is None:
            rungs = start
        elif rungs.shape[1] != k:
            raise ValueError(
                f"these chains have {rungs.shape[1]} temperatures, and the sampler {k}: go on with as many, or pass "
                "init=result.x to start new ladders"
            )
        else:
            rungs = torch.where((rungs[:, 0] == x).all(dim=1)[:, None, None], rungs, start)
            if target.frozen is not None:  # they may have changed since
                rungs = torch.where(target.frozen[:, None], start, rungs)
        rows = target.repeated(k)
        flat = rungs.flatten(0, 1)
        if rows.box is not None:
            flat = torch.where(rows.box.contains(flat)[:, None], flat, start.flatten(0, 1))
        energy, gradient = rows.value_and_gradient(flat)
        rungs = flat.view(-1, k, x.shape[1])
        return _state(rungs, energy.view(-1, k), gradient.view_as(rungs))

    def step(
        self, target: View, state: ParallelTemperingState, noise: Noise, t: int
    ) -> tuple[ParallelTemperingState, Info]:
        """Move all rungs, then swap pairs of them."""
        if isinstance(self.temperatures, str):
            raise ValueError(
                'temperatures="auto" are found in a warm-up: sample(energy, sampler, warmup=500, ...), whose '
                "result.sampler has them"
            )
        rungs, energies = state.rungs, state.energies
        n, k, dim = rungs.shape
        beta = once(target, "beta", self, lambda: _inverse(self.ladder, rungs))
        betas = once(target, "betas", self, lambda: beta.repeat(n))
        inner = once(target, "inner", self, lambda: for_temperatures(self.sampler, self._factors(), n, t, rungs.device))
        start = Point(rungs.flatten(0, 1), energies.flatten(), state.gradients.flatten(0, 1))
        view, known = tempered(target.repeated(k), betas, start)
        noises = noise.copies(k)
        moved, info = inner.step(view, inner.init(view, start.x, noises), noises, t)
        _, energy, gradient = known.after(moved.x)
        moved_rungs, energies = moved.x.view(n, k, dim), energy.view(n, k)

        finite = info.finite if info.finite is None else info.finite.view(n, k).all(dim=1)
        if not float(energies.min()) > -math.inf:  # also if one is NaN
            sound = (energies > -math.inf).all(dim=1)
            finite = sound if finite is None else finite & sound
        log_accept = _log_accept(beta, energies) / value_at(self.temperature, t, rungs.device)
        swaps = self._tried(noise.first_steps + t)
        u = noises.uniform(Stream.TEMPERING, t).view(n, k)[:, :-1]
        swapped = swaps & (u.log() <= log_accept)  # never for NaN, the difference of two energies of +inf
        order = _order(swapped)
        new = _state(*(_reordered(v, order) for v in (moved_rungs, energies, gradient.view(n, k, dim))))
        new = new if finite is None else rows_of(finite, new, state)
        chance = torch.where(swaps & ~log_accept.isnan(), log_accept.clamp(max=0.0).exp(), 0.0)

        def averaged() -> Mapping[str, Tensor | float]:
            counted = info.averaged()
            cold = {name: v.view(n, k)[:, 0] if isinstance(v, Tensor) else v for name, v in counted.items()}
            each = counted.get("gradients", 1)
            gradients = each.view(n, k).sum(dim=1) if isinstance(each, Tensor) else each * k
            return {**cold, "gradients": gradients, "swap_acceptance": chance, "swaps": swaps}

        def last() -> Mapping[str, Tensor]:
            return {name: v.view(n, k)[:, 0] for name, v in info.last().items()}

        acceptance = None if info.acceptance is None else info.acceptance.view(n, k)
        cold = None if acceptance is None else acceptance[:, 0]
        return new, Info(finite, averaged, last, cold, _Proposal(acceptance, chance, swaps))

    def _tried(self, steps: Tensor) -> Tensor:
        """Which pairs each chain tries to swap after these lifetime steps: (n, R - 1) bool."""
        done = steps[:, None] + 1
        turn, pair = done // self.swap_every, torch.arange(len(self.ladder) - 1, device=steps.device)
        return (done % self.swap_every == 0) & ((turn + pair) % 2 == 1)

    def _factors(self) -> tuple[float, ...]:
        return step_factors(self.sampler, self.ladder) if self.factors is None else tuple(self.factors)

    def adaptation(self, steps: int) -> _WarmUp | None:
        """Adapt what the inner sampler adapts, a step size for each rung, and the temperatures if they are "auto"."""
        auto = isinstance(self.temperatures, str)
        if auto and not windows(steps):
            raise ValueError(f'temperatures="auto" needs a longer warm-up than {steps} steps: 200 or more')
        inner = self.sampler.adaptation(steps)
        return None if inner is None and not auto else _WarmUp(self, steps, inner)


class _WarmUp:
    """The ``Adaptation`` (base.py) of a ladder.

    The inner sampler's own adaptation learns from the rung at temperature 1. The factor of every other rung is found by
    dual averaging of the rung's acceptance rate. New temperatures are set at the ends of windows that double in length.
    """

    def __init__(self, ladder: ParallelTempering, steps: int, inner: Any) -> None:
        self.steps, self.inner, self.t = steps, inner, 0
        self.ends = windows(steps) if isinstance(ladder.temperatures, str) else []
        factors = ladder._factors()
        self.sampler = replace(
            ladder, temperatures=ladder.ladder, n_temperatures=None, max_temperature=None, factors=factors
        )
        self.factors = []
        if inner is not None:
            self.factors = [DualAveraging(v, ladder.sampler.target_acceptance) for v in factors[1:]]
        self._forget()

    def _forget(self) -> None:
        self.rejected = self.tried = np.zeros(len(self.sampler.ladder) - 1)

    def update(self, old: Any, new: Any, info: Info, active: Tensor | None) -> None:
        """Learn from one step."""
        self.t += 1
        proposal = info.proposal
        if active is not None:
            proposal = type(proposal)(*(None if v is None else v[active] for v in proposal))
        last = self.t >= self.steps
        if self.inner is not None:
            self.inner.update(old, Point(new.x, new.energy, new.gradients[:, 0]), info, active)
            if len(proposal.acceptance) > 0:
                means = proposal.acceptance.double().mean(dim=0).tolist()
                for factor, mean in zip(self.factors, means[1:], strict=True):
                    factor.update(mean)
            found = (factor.final if last else factor.step_size for factor in self.factors)
            self.sampler = replace(self.sampler, sampler=self.inner.sampler, factors=(1.0, *found))
        if self.ends and self.t <= self.ends[-1]:
            tried, accepted = (v.double().sum(dim=0).cpu().numpy() for v in (proposal.swaps, proposal.swap_acceptance))
            self.tried, self.rejected = self.tried + tried, self.rejected + tried - accepted
            if self.t in self.ends and self.tried.all():
                self._retune()

    def _retune(self) -> None:
        """Cut the barrier into equal parts, and start again from the step sizes that fit the new temperatures."""
        rates = self.rejected / self.tried
        rates = np.maximum(rates, 0.01 * rates.max() + 1e-9)  # the barrier increases, also where nothing is rejected
        barrier = np.concatenate([[0.0], rates.cumsum()])
        before = np.log(self.sampler.ladder)
        after = np.interp(np.linspace(0.0, barrier[-1], len(barrier)), barrier, before)
        ladder = (1.0, *np.exp(after[1:-1]).tolist(), self.sampler.ladder[-1])
        # A factor that was a power of the temperature stays that power.
        found = [1.0, *(factor.final for factor in self.factors)] if self.factors else self.sampler.factors
        assert found is not None
        factors = (1.0, *np.exp(np.interp(after, before, np.log(found)))[1:].tolist())
        self.sampler = replace(self.sampler, temperatures=ladder, factors=factors)
        for factor, value in zip(self.factors, factors[1:], strict=False):  # without an adaptation there are none
            factor.restart(value)
        self._forget()


def _state(rungs: Tensor, energies: Tensor, gradients: Tensor) -> ParallelTemperingState:
    # Copies, not views: the driver writes to the states of chains that start again.
    return ParallelTemperingState(rungs[:, 0].clone(), energies[:, 0].clone(), rungs, energies, gradients)


def _inverse(temperatures: tuple[float, ...], x: Tensor) -> Tensor:
    """(R,) 1 / T in the dtype of x, rounded once."""
    return (1 / torch.tensor(temperatures, dtype=torch.float64, device=x.device)).to(x.dtype)


def _log_accept(beta: Tensor, energies: Tensor) -> Tensor:
    """log a of each pair, (n, R - 1). beta: (R,) 1 / T. energies: (n, R)."""
    return (beta[:-1] - beta[1:]) * (energies[:, :-1] - energies[:, 1:])


def _order(swapped: Tensor) -> Tensor:
    """The row i R + r of all rungs that each rung's new state comes from, (n, R).

    swapped: (n, R - 1), never two neighbours.
    """
    up = swapped.long()
    pad = torch.nn.functional.pad
    n, k = len(swapped), swapped.shape[1] + 1
    here = torch.arange(n * k, device=swapped.device).view(n, k)
    order: Tensor = here + pad(up, (0, 1)) - pad(up, (1, 0))
    return order


def _reordered(v: Tensor, order: Tensor) -> Tensor:
    """(n, R) or (n, R, dim) with its rungs in this order."""
    return v.flatten(0, 1).index_select(0, order.flatten()).view_as(v)
