"""Names of before, until pools and training use the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..backends import Advanced, Chains
from ..backends.choose import Choice
from ..backends.settle import NonFiniteError
from ..box import uniform_states
from ..energies import EnergyLike
from .arguments import check_integers, state_shape
from .info import SampleInfo
from .langevin_sample import langevin_sample
from .run import run_chains
from .settings import ON_NONFINITE, Settings


def advance_chains(
    energy: EnergyLike, chains: Chains, sampler: Any, steps: int, *, shape: Sequence[int], backend: str = "auto",
    precision: str | None = None, on_nonfinite: str = "raise", cuda_graph: bool = False,
) -> tuple[Advanced, Choice]:  # fmt: skip
    settings = Settings(backend, precision, cuda_graph, on_nonfinite)
    return run_chains(energy, chains, sampler, steps, shape=shape, settings=settings)


__all__ = [
    "ON_NONFINITE", "NonFiniteError", "SampleInfo", "advance_chains", "check_integers", "langevin_sample",
    "state_shape", "uniform_states",
]  # fmt: skip
