"""What every training objective takes and returns."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

__all__ = ["Loss", "Objective"]


class Loss(NamedTuple):
    """What an objective returns.

    loss: a scalar, to call ``backward`` on. metrics: named numbers to log: floats, or tensors without dims and
    without gradient. samples: the negatives, (n, *shape), or None if the objective draws none.
    """

    loss: Tensor
    metrics: dict[str, float | Tensor]
    samples: Tensor | None = None


class Objective(Protocol):
    """An ``nn.Module``, since an objective may have parameters of its own."""

    def __call__(self, energy: nn.Module, batch: Tensor, *, batch_size: int | None = None) -> Loss:
        """The loss of one batch.

        Args:
            energy: the model that is trained: (n, *shape) -> (n,) or (n, 1).
            batch: (n, *shape), the data of this process.
            batch_size: rows of the whole batch, if several processes hold a part of it each. Losses and metrics are
                divided by it, so that their sums over the processes are those of the whole batch. None: n.
        """
        ...
