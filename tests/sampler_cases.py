"""All samplers as ``test_samplers.py`` checks them: one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastebm import (
    HMC,
    MALA,
    NUTS,
    SVGD,
    ChEESHMC,
    Langevin,
    ParallelTempering,
    TemperedTransitions,
    UnderdampedLangevin,
)

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A sampler with step sizes that suit energies whose coordinates have a standard deviation of about 1.

    make: takes keywords of the sampler, such as clamp.
    settled: steps after which a chain from a uniform start in [-2, 2] has the law of a 2-D MLP energy.
    by_rounding: the largest fraction of chains that rounding may send another way, because an accept test decides.
    """

    make: Callable[..., Any]
    settled: int = 100
    by_rounding: float = 0.02


CASES = {
    "ChEESHMC": Case(lambda **given: ChEESHMC(0.3, **{"trajectory_length": 1.0, **given})),
    "HMC": Case(lambda **given: HMC(0.3, 3, **given)),
    "Langevin": Case(lambda **given: Langevin(0.1, **given)),
    "Langevin with a preconditioner": Case(lambda **given: Langevin(0.1, preconditioner=1.5, **given)),
    "MALA": Case(lambda **given: MALA(0.5, **given)),
    "NUTS": Case(lambda **given: NUTS(0.5, 6, **given), settled=25),
    "SVGD": Case(lambda **given: SVGD(0.1, **given)),
    "UnderdampedLangevin": Case(lambda **given: UnderdampedLangevin(0.3, **given)),
    "UnderdampedLangevin with two O": Case(lambda **given: UnderdampedLangevin(0.3, splitting="OBABO", **given)),
    "ParallelTempering": Case(lambda **given: ParallelTempering(MALA(0.5), (1, 1.7, 3), **given), settled=40),
    "ParallelTempering, Langevin": Case(
        lambda **given: ParallelTempering(Langevin(0.1), (1, 3), swap_every=2, **given)
    ),
    "ParallelTempering, HMC": Case(lambda **given: ParallelTempering(HMC(0.3, 3), (1, 2), **given), settled=40),
    "TemperedTransitions": Case(lambda **given: TemperedTransitions(MALA(0.5), (1, 1.3, 1.7), **given), settled=30),
}
