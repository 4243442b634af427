"""All samplers as ``test_samplers.py`` checks them: one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastebm import MALA, Langevin, ParallelTempering, TemperedTransitions

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
    "Langevin": Case(lambda **given: Langevin(0.1, **given)),
    "MALA": Case(lambda **given: MALA(0.5, **given)),
    "ParallelTempering": Case(lambda **given: ParallelTempering(MALA(0.5), (1, 1.7, 3), **given), settled=40),
    "ParallelTempering, Langevin": Case(
        lambda **given: ParallelTempering(Langevin(0.1), (1, 3), swap_every=2, **given)
    ),
    "TemperedTransitions": Case(lambda **given: TemperedTransitions(MALA(0.5), (1, 1.3, 1.7), **given), settled=30),
}
