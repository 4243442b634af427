"""The processes that train one run together: a group of torch.distributed, made here if torchrun started them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["TIMEOUT", "Team", "launched"]

# Seconds that a process waits for the others: far more than they differ by (a write of gigabytes, a compilation), and
# what a run waits at most for a process that hangs. One that died is noticed at once on most networks.
TIMEOUT = 120

# Words of gloo's errors, which have no class of their own.
_NETWORK = re.compile("gloo|closed by peer|reset by peer|broken pipe|timed out", re.IGNORECASE)

_T = TypeVar("_T")


class Team:
    """The members of a group, or this process alone. All make the same calls, in the same order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        self._device = torch.device("cpu")
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if dist.get_backend(group) == "nccl":
                self._device = torch.device("cuda", torch.cuda.current_device())

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums, group=self.group)
        result: list[float] = sums.tolist()
        return result

    def gather(self, value: _T) -> list[_T]:
        """What each process has."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, work: Callable[[], _T]) -> _T:
        """What work returns here, if it raises nothing on any process.

        Raises:
            Whatever it raises, where it does, and RuntimeError on the other processes.
        """
        try:
            result = work()
        except Exception as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        told: list[str | None] = self.gather(None)
        for rank, text in enumerate(told):
            if text is not None:
                raise RuntimeError(f"process {rank} of {self.size} can't go on: {text}")
        return result

    @staticmethod
    def lost(error: Exception) -> bool:
        """The error says that another process can't be reached."""
        return isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or _NETWORK.search(str(error)) is not None
        )

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """Errors of the network say what they mean."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not self.lost(error):
                raise
            raise RuntimeError(
                f"process {self.rank} of {self.size} lost another one, which ended or was silent for {TIMEOUT} s: "
                f"resume the run from its last checkpoint, with any number of processes ({error})"
            ) from error


@contextmanager
def launched(device: str) -> Iterator[dist.ProcessGroup | None]:
    """The group of the processes that torchrun started; None if it started one, or none.

    Args:
        device: "auto", "cpu", "cuda": GPUs are told apart by torchrun's LOCAL_RANK.

    Raises:
        ValueError: fewer GPUs than processes. RuntimeError: the others can't be reached in ``TIMEOUT`` seconds.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield None
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        n_gpus, n_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if device not in ("auto", "cuda"):
            raise ValueError(f"processes each have a GPU of their own: --device cuda, not {device}")
        if n_gpus < n_here:
            raise ValueError(
                f"{n_here} processes need as many GPUs, and there are {n_gpus}: start fewer (--nproc-per-node), or "
                "take --device cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=TIMEOUT))
    yield dist.group.WORLD
    # Destroying too early aborts the others: all have met at the end of ``train``. Not after an error, when some may be
    # gone; the process ends anyway.
    dist.destroy_process_group()
