"""The result of ``fastebm.sample``: states, their report, and what is needed to continue the chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..backends import Chains
from .info import SampleInfo

__all__ = ["ChainState", "SampleResult"]


class ChainState(NamedTuple):
    """All that a later call needs to continue the chains.

    chains: states, seed, chain numbers, lifetime steps, labels or condition, frozen coordinates, and what the sampler's
    state has besides x.
    energies: (n_chains,) E of the states, or None before the first step.
    stopped: (n_chains,) bool, chains that stopped because they were not finite, or None.
    """

    chains: Chains
    energies: Tensor | None = None
    stopped: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SampleResult:
    """The result of ``fastebm.sample``.

    Attributes:
        x: (n_chains, *shape) last states.
        trajectory: (n_chains, steps // thin, *shape) every thin-th state after the warm-up. None with thin=0.
        energies: (n_chains,) E of x.
        info: a ``SampleInfo``. Its averages exclude the warm-up.
        state: what ``sample(..., init=result)`` needs to continue the chains.
        energy: the energy that was sampled.
    """

    x: Tensor
    trajectory: Tensor | None
    energies: Tensor
    info: SampleInfo
    state: ChainState
    energy: nn.Module

    @property
    def sampler(self) -> Any:
        """The sampler of the last step, with the values that the warm-up adapted. Continue with it."""
        return self.info.sampler
