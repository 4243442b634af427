"""The states to diagnose, and cheap statistics of all their coordinates, which find those that mix worst."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..driver.result import SampleResult

__all__ = ["Draws", "draws_of"]

# Split chains need two states each.
_LEAST_DRAWS = 4


@dataclass(frozen=True, eq=False)
class Draws:
    """The stored states of the chains to diagnose.

    x: (n, draws, dim) states.
    rows: (n,) numbers of these chains in the result.
    stopped: number of chains left out because they stopped: they were not finite.
    held: (dim,) bool, coordinates that are frozen in any chain.
    shape: of one state.
    """

    x: Tensor
    rows: Tensor
    stopped: int
    held: Tensor
    shape: tuple[int, ...]

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the two halves of each chain, each (n, 2, dim) float64."""
        n, draws, dim = self.x.shape
        half = draws // 2
        variance, mean = torch.var_mean(self.x[:, : 2 * half].reshape(n, 2, half, dim), dim=2)
        return mean.double(), variance.double()

    @property
    def still(self) -> Tensor:
        """(n,) bool, chains that stayed where they were."""
        mean, variance = self.halves
        return (variance == 0).flatten(1).all(dim=1) & (mean[:, 0] == mean[:, 1]).all(dim=1)

    def worst(self, most: int) -> list[int]:
        """The coordinates that mix worst, at most so many, the worst first. Those that never change are left out.

        They have the largest half * Var(means of half-chains) / mean(variances of half-chains), which is large if the
        chains disagree or are slow: in equilibrium it estimates the autocorrelation time.
        """
        mean, variance = self.halves
        between = mean.flatten(0, 1).var(dim=0) * (self.x.shape[1] // 2)
        within = variance.mean(dim=(0, 1))
        moves = ((between > 0) | (within > 0)) & ~self.held
        slowness = torch.where(moves, between / within, -1.0)
        order = slowness.sort(descending=True, stable=True).indices.tolist()
        return order[: min(most, int(moves.sum()))]

    def name(self, i: int) -> str:
        """The name of coordinate i: x[3], or x[0, 2, 5] for states of three axes."""
        return f"x[{', '.join(str(int(k)) for k in np.unravel_index(i, self.shape))}]"

    def values(self, i: int) -> NDArray[Any]:
        """Coordinate i, (n, draws) float64."""
        return as_array(self.x[:, :, i])


def as_array(x: Tensor) -> NDArray[Any]:
    """A float64 copy on the host."""
    return x.detach().cpu().double().contiguous().numpy()


def draws_of(result: SampleResult, chains: Any) -> Draws:
    """The states of these chains of a result, without those that stopped. chains: a mask, numbers or None (all).

    Raises:
        TypeError, ValueError: no or too few states, or chains that do not exist.
    """
    if not isinstance(result, SampleResult):
        raise TypeError(f"diagnose takes the result of fastebm.sample, got {type(result).__name__}")
    trajectory = result.trajectory
    if trajectory is None:
        raise ValueError("diagnose needs the states along the way: sample(..., thin=1) stores them")
    n, draws = trajectory.shape[:2]
    if draws < _LEAST_DRAWS:
        raise ValueError(
            f"diagnose needs at least {_LEAST_DRAWS} stored states per chain, got {draws}: take more steps, or a "
            "smaller thin"
        )
    rows = _rows(chains, n, trajectory.device)
    bad = result.info.first_bad_step[rows] >= 0
    if bool(bad.all()):
        what = "there are no chains" if len(rows) == 0 else f"all {len(rows)} chains stopped: they were not finite"
        raise ValueError(f"diagnose needs chains, and {what}" + (": use a smaller step_size" if len(rows) else ""))
    rows = rows[~bad]
    frozen = result.state.chains.frozen
    x = trajectory.detach().flatten(2)
    if frozen is None:
        frozen = torch.zeros(1, x.shape[2], dtype=torch.bool, device=x.device)
    held = (frozen if len(frozen) == 1 else frozen[rows]).any(dim=0)
    x = x if len(rows) == n else x[rows]
    return Draws(x, rows, int(bad.sum()), held, tuple(trajectory.shape[2:]))


def _rows(chains: Any, n: int, device: torch.device) -> Tensor:
    """The numbers of the chains to diagnose, (k,) int64."""
    if chains is None:
        return torch.arange(n, device=device)
    given = torch.as_tensor(chains, device=device)
    rows: Tensor = given.nonzero().flatten() if given.dtype == torch.bool else given.long()
    if given.dtype == torch.bool and given.shape != (n,):
        raise ValueError(f"chains must have one bool for each of the {n} chains, got shape {tuple(given.shape)}")
    if given.is_floating_point() and given.numel() > 0:
        raise TypeError(f"chains must be chain numbers or a mask of {n} bools, got {given.dtype}")
    if bool(((rows < 0) | (rows >= n)).any()) or rows.ndim != 1 or len(set(rows.tolist())) < len(rows):
        raise ValueError(f"chains must be different numbers from 0 to {n - 1}, got {chains}")
    return rows
