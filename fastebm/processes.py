"""What the processes of a sharded pool tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .sampling import NonFiniteError

__all__ = ["Processes"]

# Numbers that processes tell each other at the end of a call.
_MESSAGE = 10

_T = TypeVar("_T")


class Processes:
    """The processes of a group, each with a share of the chains; without a group this one alone.

    All make the same calls. Whatever ends in an error on one ends in one on all, before anything has changed.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.rank, self.world = group, 0, 1
        self.device = torch.device("cpu")
        if group is not None:
            if not (dist.is_available() and dist.is_initialized()):
                raise ValueError("process_group needs torch.distributed.init_process_group() first")
            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("this process is not in process_group: only its members build the pool")
            if dist.get_backend(group) == "nccl":
                self.device = device

    def share(self, n: int) -> tuple[int, int]:
        """First chain of this process, and of the next."""
        return n * self.rank // self.world, n * (self.rank + 1) // self.world

    def own(self, file: str | os.PathLike[str] | None) -> str | None:
        """The name of this process' part of a file."""
        return None if file is None else os.fspath(file) if self.world == 1 else f"{os.fspath(file)}.{self.rank}"

    def total(self, values: Tensor) -> Tensor:
        """Sums over all processes."""
        if self.world == 1:
            return values
        values_there = values.to(self.device, copy=True)
        dist.all_reduce(values_there, group=self.group)
        return values_there.to(values.device)

    def agree(
        self, error: Exception | None, same: Sequence[int], counts: Sequence[int] = (), *, what: str
    ) -> tuple[int, ...]:
        """Sums of counts, if no process has an error and ``same`` is the same on all. The caller raises its own error.

        Args:
            what: the other processes did, if not.
        """
        if self.world == 1:
            return tuple(counts)
        mine = [0] * _MESSAGE
        if error is not None:
            mine[0] = 1 if isinstance(error, NonFiniteError) else 2
        else:
            mine[1 : 1 + len(same) + len(counts)] = [*same, *counts]
        message = torch.tensor(mine, device=self.device)
        messages = [torch.empty_like(message) for _ in range(self.world)]
        dist.all_gather(messages, message, group=self.group)
        told = torch.stack(messages).tolist()
        if error is not None:
            return tuple(counts)
        for kind, code in ((RuntimeError, 2), (NonFiniteError, 1)):
            if ranks := [str(rank) for rank, row in enumerate(told) if row[0] == code]:
                raise kind(f"stopped by an error of process {', '.join(ranks)}, which tells it; this pool is unchanged")
        if any(row[1 : 1 + len(same)] != mine[1 : 1 + len(same)] for row in told):
            raise ValueError(f"the processes of a pool must make the same calls, and some {what}")
        columns = slice(1 + len(same), 1 + len(same) + len(counts))
        return tuple(sum(column) for column in zip(*(row[columns] for row in told), strict=True))

    def together(
        self, work: Callable[[], tuple[_T, tuple[int, ...]]], same: Sequence[int], *, what: str
    ) -> tuple[_T, tuple[int, ...]]:
        """What work returns here, and the sums of its counts; or an error on every process."""
        try:
            result, counts = work()
        except Exception as error:
            self.agree(error, (), what=what)
            raise
        return result, self.agree(None, same, counts, what=what)
