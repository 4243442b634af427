"""The path from the base to the energy: fit a base, tune the ladder, and run chains along it.

All runs of a call use the same chain numbers, at consecutive lifetime steps. So they never share a random number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import Chains
from ..backends.settle import NonFiniteError
from ..driver.run import run_chains
from ..driver.sample import sample
from ..driver.settings import Settings
from .ais import AIS
from .normal import Normal

__all__ = ["LADDER_STEP", "PILOT_CHAINS", "PILOT_STEPS", "WIDER", "Path"]

# The pilot run on the energy itself: it fits the base and finds the sampler's settings.
_WARMUP, PILOT_CHAINS = 300, 256

# The pilot's standard deviations times this are those of the base: it should be wider than the energy's samples, as
# the base of any importance sampling, and a long ladder makes the extra way cheap.
WIDER = 1.5

# The pilot along the ladder: a grid of temperatures, denser near 0, and transitions at each. At b = 0 they are repeated
# until the step size fits.
_GRID, _POWER, _AT_EACH, _REPEATS = 60, 4, 4, 5

# The lifetime steps of the pilots: first the one on the energy, then the one along the ladder.
LADDER_STEP = _WARMUP
PILOT_STEPS = LADDER_STEP + (_GRID + _REPEATS) * _AT_EACH

# How fast the log of the step size follows the acceptance rate, in nats per unit of the rate. The rate falls by about
# a half per nat, so 2 would be Newton's step.
_GAIN = 1.5

# Share of the temperatures that are spread over the grid whatever the energy does there.
_EVEN = 0.1


@dataclass(frozen=True, eq=False)
class Path:
    """An energy, its condition, and the sampler that moves chains towards it.

    shape: of one state. labels, condition: one row for all chains, or None. seed: an int.
    """

    energy: nn.Module
    shape: tuple[int, ...]
    sampler: Any
    labels: Tensor | None
    condition: Tensor | None
    seed: int
    settings: Settings

    def chains(self, x: Tensor, step: int) -> Chains:
        """Chains 0, 1, ... at these states, (n, dim), and this lifetime step."""
        n, device = len(x), x.device
        numbers = torch.arange(n, device=device)
        labels = None if self.labels is None else self.labels.to(device).expand(n)
        condition = self.condition
        condition = None if condition is None else condition.to(device).expand(n, *condition.shape[1:])
        return Chains(x, self.seed, numbers, torch.full_like(numbers, step), labels, condition=condition)

    def pilot(self, x: Tensor | None, n_chains: int, device: torch.device) -> tuple[Any, Tensor, Tensor]:
        """Run the sampler on the energy. Returns it with adapted settings, and the mean and std of its states, (dim,).

        x: (n_chains, dim) where to start, or None: ``fastebm.sample`` decides.
        """
        given = self.chains(torch.empty(n_chains if x is None else len(x), 0, device=device), 0)
        start: dict[str, Any] = {"input_size": self.shape, "n_chains": n_chains, "device": device}
        if x is not None:
            start = {"init": x.reshape(len(x), *self.shape)}
        result = sample(
            self.energy, self.sampler, steps=0, warmup=_WARMUP, labels=given.labels,
            condition=given.condition, seed=self.seed, backend=self.settings.backend, progress=False,
            on_nonfinite="ignore", **start,
        )  # fmt: skip
        bad = (result.info.first_bad_step >= 0) | ~result.energies.isfinite()
        if bool(bad.any()):
            raise NonFiniteError(
                f"{int(bad.sum())} of {len(bad)} chains of the pilot run on the energy are not finite. If exp(-E) has "
                "no finite integral, bound the states by the sampler's clamp=. If the energy is not finite where "
                "chains start, pass a base= or samples= where it is. Else the sampler needs a smaller step_size"
            )
        states = result.x.flatten(1).double()
        return result.sampler, states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)

    def run(self, ais: AIS, chains: Chains, *, parts: int = 1) -> tuple[Chains, list[float]]:
        """Move the chains along a ladder. Returns them with their log weights as ``carried``, and acceptance rates.

        Raises:
            NonFiniteError: chains are not finite. Without them the estimate would be biased.
        """
        steps, rates = len(ais.betas) - 1, []
        edges = [steps * i // parts for i in range(parts + 1)]
        for first, last in pairwise(edges):
            if first == last:
                continue
            done, _ = run_chains(
                self.energy, chains, ais.part(first, last), last - first, shape=self.shape, settings=self.settings,
                telemetry=True,
            )  # fmt: skip
            if bool((bad := done.first_bad >= 0).any()):
                at = ais.betas[first + 1 + int(done.first_bad[bad].min())]
                raise NonFiniteError(
                    f"{int(bad.sum())} of {len(bad)} chains of the annealed run are not finite, first at b = {at:.3g}, "
                    "because the energy or its gradient is NaN or infinite there (an energy of +inf alone has the "
                    "weight 0): bound the states by the sampler's clamp=, or pass a base= that stays where the energy "
                    "is finite"
                )
            assert done.telemetry is not None
            rates.append(float(done.telemetry["acceptance"].double().mean()))
            chains = chains._replace(x=done.x, first_steps=chains.first_steps + (last - first), carried=done.carried)
        return chains, rates

    def ladder(self, base: Normal, tuned: Any, std: Tensor | None, n_temperatures: int, x: Tensor, step: int) -> AIS:
        """A ladder of so many temperatures, tuned by a pilot that starts at the draws x of the base.

        The best density of temperatures is proportional to the standard deviation of E_0 - E_1 at each, for which
        all steps of a ladder add the same variance to the log weights (Gelman & Meng 1998; Grosse, Maddison &
        Salakhutdinov 2013). The step size follows the sampler's target acceptance rate.

        tuned: the sampler with settings for the energy. std: (dim,) of the energy's samples, or None: adapt nothing.
        """
        grid = [(j / _GRID) ** _POWER for j in range(_GRID + 1)]
        at = [self._scaled(tuned, base, std, b) for b in grid]
        goal = getattr(self.sampler, "target_acceptance", None) if std is not None else None
        log_step = 0.0 if goal is None else math.log(tuned.step_size)
        chains, log_steps, spread = self.chains(x, step), [], []
        for j, b in enumerate(grid):
            for _ in range(_REPEATS if j == 0 else 1):
                sampler = at[j] if goal is None else replace(at[j], step_size=math.exp(log_step))
                before = grid[max(j - 1, 0)]
                ais = AIS(base, (before, *[b] * _AT_EACH), (sampler,) * (_AT_EACH + 1), self.sampler.clamp)
                chains, (rate,) = self.run(ais, chains._replace(carried=None))
                log_step += 0.0 if goal is None else _GAIN * (rate - goal)
            if j > 0:
                assert chains.carried is not None
                weights = chains.carried["log_weight"]
                weights = weights[weights.isfinite()] / (b - before)
                spread.append(float(weights.std()) if len(weights) > 1 else 0.0)
            log_steps.append(log_step)
        betas, log_steps = _spaced(grid, [*spread, spread[-1]], log_steps, n_temperatures)
        samplers = [self._scaled(tuned, base, std, b) for b in betas]
        if goal is not None:
            samplers = [replace(s, step_size=math.exp(log)) for s, log in zip(samplers, log_steps, strict=True)]
        return AIS(base, tuple(betas), tuple(samplers), self.sampler.clamp)

    def _scaled(self, tuned: Any, base: Normal, std: Tensor | None, b: float) -> Any:
        """The sampler with the scale of temperature b: that of a Gaussian between base and energy."""
        scaled = None if std is None else getattr(self.sampler.adaptation(_WARMUP), "scaled", None)
        if scaled is None or std is None:
            return tuned
        precision = (1 - b) / base.std.double().square() + b / std.square()
        return scaled(tuned, 1 / precision)


def _spaced(
    grid: Sequence[float], spread: Sequence[float], log_steps: Sequence[float], n_temperatures: int
) -> tuple[list[float], list[float]]:
    """Temperatures with a density proportional to ``spread``, given on a grid, and the step sizes there."""
    b, s = np.asarray(grid), np.asarray(spread)
    way = np.concatenate([[0.0], np.cumsum((s[1:] + s[:-1]) / 2 * np.diff(b))])
    even = np.linspace(0, 1, len(b))
    way = even if way[-1] == 0 else (1 - _EVEN) * way / way[-1] + _EVEN * even
    places = np.linspace(0, 1, n_temperatures)
    betas = np.interp(places, way, b)
    betas[0], betas[-1] = 0.0, 1.0
    return betas.tolist(), np.interp(places, way, log_steps).tolist()
