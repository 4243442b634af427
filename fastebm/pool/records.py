"""What a pool records of each chain besides its state: step counters, last energy, reinits, label or condition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Records"]


@dataclass(eq=False)
class Records:
    """One row for each of the (n,) chains of this process.

    steps: int64, lifetime steps. started: int64, lifetime step at which the chain last started. energy: float32, at
    the state where the chain last stopped; NaN if unknown. reinits: int32, how often the chain was reinitialised.
    nonfinite: int32, how often because it was not finite. labels: int64, or None. condition: (n, ...), or None.
    """

    steps: Tensor
    started: Tensor
    energy: Tensor
    reinits: Tensor
    nonfinite: Tensor
    labels: Tensor | None = None
    condition: Tensor | None = None

    @classmethod
    def of_new_chains(cls, n: int, device: torch.device) -> Records:
        return cls(
            steps=torch.zeros(n, dtype=torch.int64, device=device),
            started=torch.zeros(n, dtype=torch.int64, device=device),
            energy=torch.full((n,), math.nan, dtype=torch.float32, device=device),
            reinits=torch.zeros(n, dtype=torch.int32, device=device),
            nonfinite=torch.zeros(n, dtype=torch.int32, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that are not None, by name. Not copies."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def reinit(self, rows: Tensor, steps: Tensor, *, nonfinite: bool = False) -> Callable[[], None]:
        """Prepare to record that chains start again. The returned function writes, and cannot fail.

        Args:
            rows: distinct.
            steps: (len(rows),) lifetime steps at which they start.
            nonfinite: whether they were not finite.
        """
        if len(rows) == 0:
            return _nothing
        one = torch.ones_like(rows, dtype=torch.int32)

        def write() -> None:
            self.started.index_copy_(0, rows, steps)
            self.reinits.index_add_(0, rows, one)
            if nonfinite:
                self.nonfinite.index_add_(0, rows, one)

        return write


def _nothing() -> None:
    pass
