"""Processes that share a pool or a run: what they tell each other, and how torchrun's find together."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.settle import NonFiniteError

__all__ = ["TIMEOUT", "Processes", "launched"]

# Seconds that a process waits for the others: far more than they differ by (a write of gigabytes, a compilation), and
# what a run waits at most for a process that hangs. One that died is noticed at once on most networks.
TIMEOUT = 120

# Words of gloo's errors, which have no class of their own.
_NETWORK = re.compile("gloo|closed by peer|reset by peer|broken pipe|timed out", re.IGNORECASE)

_T = TypeVar("_T")


class Processes:
    """The processes of a group, or this one alone: ``rank`` of ``size``. All make the same calls, in the same order.

    Args:
        device: of what they tell each other through nccl. None: the current one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        self._device = torch.device("cpu")
        if group is None:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("process_group needs torch.distributed.init_process_group() first")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in process_group: only its members make this call")
        if dist.get_backend(group) == "nccl":
            self._device = device or torch.device("cuda", torch.cuda.current_device())

    def share(self, n: int) -> tuple[int, int]:
        """First of n things that is this process' part, and first of the next one's."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def own(self, file: str | os.PathLike[str] | None) -> str | None:
        """The name of this process' part of a file."""
        return None if file is None else os.fspath(file) if self.size == 1 else f"{os.fspath(file)}.{self.rank}"

    def total(self, values: Tensor) -> Tensor:
        """Sums over the processes."""
        if self.size == 1:
            return values
        sums = values.to(self._device, copy=True)
        dist.all_reduce(sums, group=self.group)
        return sums.to(values.device)

    def gather(self, value: _T) -> list[_T]:
        """What each process has."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self, same: Sequence[object] = (), *, differ: str = "") -> Iterator[list[int]]:
        """Work that is done on all processes or on none: ``with processes.together(): ...``, and then what can't fail.

        Args:
            same, differ: as for ``agree``.

        Yields:
            A list for two counts at most, which afterwards holds their sums over the processes.

        Raises:
            What ``agree`` does, and what the work does.
        """
        counts: list[int] = []
        try:
            yield counts
        except Exception as error:
            self.agree(error)
            raise
        counts[:] = self.agree(None, same, counts, differ=differ)

    def agree(
        self, error: Exception | None, same: Sequence[object] = (), counts: Sequence[int] = (), *, differ: str = ""
    ) -> list[int]:
        """Sums of counts, if no process has an error and ``same`` is the same on all. The caller raises its own error.

        Args:
            same: what has the same repr on all processes if they make the same call.
            counts: two at most.
            differ: what some processes did, if they don't.

        Raises:
            RuntimeError, or NonFiniteError if it is one: another process has an error. ValueError: they differ.
        """
        if self.size == 1:
            return list(counts)
        severity = 0 if error is None else 1 if isinstance(error, NonFiniteError) else 2
        digest = int.from_bytes(hashlib.sha256(repr(tuple(same)).encode()).digest()[:7], "big")
        told = self._numbers([severity, digest, *counts, *[0] * (2 - len(counts))])
        severities, digests, *columns = zip(*told, strict=True)
        if any(severities):
            texts = self.gather(f"{type(error).__name__}: {error}")
            if error is None:
                kind = NonFiniteError if max(severities) == 1 else RuntimeError
                worst = severities.index(max(severities))
                raise kind(f"process {worst} of {self.size} can't go on: {texts[worst]}")
        elif any(d != digest for d in digests):
            raise ValueError(f"the processes of a group must make the same calls, and some {differ}")
        return [sum(column) for column in columns[: len(counts)]]

    def _numbers(self, mine: list[int]) -> list[list[int]]:
        """What each process has, as fast as it can be told: equally many numbers on all."""
        message = torch.tensor(mine, device=self._device)
        messages = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(messages, message, group=self.group)
        told: list[list[int]] = torch.stack(messages).tolist()
        return told

    @staticmethod
    def lost(error: Exception) -> bool:
        """The error says that another process can't be reached."""
        return isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or _NETWORK.search(str(error)) is not None
        )

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """Errors of the network say what they mean for a run."""
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
