"""The result of ``fastebm.sample``: states, their report, and what is needed to continue the chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..backends import Chains
from .info import SampleInfo
from .run import energies_of
from .settings import Settings

__all__ = ["ChainState", "SampleResult"]

# The reports that are means per chain, by their names in ArviZ. (Its own "diverging" is one bool per state.)
_ARVIZ_NAMES = {"acceptance": "acceptance_rate", "divergences": "diverging_rate", "gradients": "n_gradients"}


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

    def trajectory_energies(self) -> Tensor:
        """E of each stored state, (n_chains, draws). It evaluates the energy once per state.

        Raises:
            ValueError: no states were stored.
        """
        if self.trajectory is None:
            raise ValueError("the result has no trajectory: sample(..., thin=1) stores the states along the way")
        return energies_of(
            self.energy, self.state.chains, self.sampler, shape=self.x.shape[1:], settings=Settings(),
            along=self.trajectory.detach().flatten(2),
        )  # fmt: skip

    def to_arviz(self) -> Any:
        """The stored states as an xarray.DataTree in ArviZ's format, for its plots and statistics.

        Groups: posterior, with x (chain, draw, *shape); and sample_stats, with lp = -E of each state, (chain, draw),
        and per chain (means over the steps) what the sampler reports of acceptance_rate, diverging_rate and
        n_gradients. lp costs one evaluation of the energy per state.

        Raises:
            ValueError: no states were stored.
            ImportError: arviz-base is not installed.
        """
        try:
            from arviz_base import from_dict
            from xarray import DataArray
        except ModuleNotFoundError as error:
            raise ImportError(
                'to_arviz needs arviz-base: pip install "fastebm[diagnostics]", with Python 3.11 or later'
            ) from error
        lp = -self.trajectory_energies()
        assert self.trajectory is not None  # trajectory_energies raised
        x = self.trajectory.detach().cpu().clone()  # a copy: who changes the tree does not change the result
        groups = {"posterior": {"x": x.numpy()}, "sample_stats": {"lp": lp.cpu().numpy()}}
        tree = from_dict(groups, check_conventions=False)  # which would warn of more chains than draws
        for report, name in _ARVIZ_NAMES.items():
            value = getattr(self.info, report)
            if value is not None:
                tree["sample_stats"][name] = DataArray(value.cpu().clone().numpy(), dims="chain")
        return tree
