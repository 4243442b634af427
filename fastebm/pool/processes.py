"""Processes that share a pool or a run: what they exchange, how they fail together, and how torchrun starts them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends.settle import NonFiniteError

__all__ = ["TIMEOUT", "Processes", "launched"]

# Seconds that a process waits for the others. Much longer than the longest pause of a healthy one (writing gigabytes,
# compiling), since a run only waits this long if another process hangs: most networks report a dead one at once.
TIMEOUT = 120

# Gloo raises plain RuntimeErrors, so errors of the network are recognised by their words.
_NETWORK = re.compile("gloo|closed by peer|reset by peer|broken pipe|timed out", re.IGNORECASE)

_T = TypeVar("_T")


class Processes:
    """The processes of a group, or this process alone: process ``rank`` of ``size``.

    All of them must make the same calls in the same order.

    Args:
        group: of torch.distributed. None: this process alone.
        device: GPU through which nccl exchanges values. None: the current one.
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
            raise ValueError("this process is not in process_group: only its members may make this call")
        if dist.get_backend(group) == "nccl":
            self._device = device or torch.device("cuda", torch.cuda.current_device())

    def share(self, n: int) -> tuple[int, int]:
        """First and end of this process' part of n things. Parts differ by at most one in size."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def own(self, file: str | os.PathLike[str] | None) -> str | None:
        """The name of this process' own file: ".RANK" is added if there are several processes."""
        if file is None:
            return None
        return os.fspath(file) if self.size == 1 else f"{os.fspath(file)}.{self.rank}"

    def total(self, values: Tensor) -> Tensor:
        """Sums over the processes."""
        if self.size == 1:
            return values
        sums = values.to(self._device, copy=True)
        dist.all_reduce(sums, group=self.group)
        return sums.to(values.device)

    def copy_first(self, module: nn.Module) -> None:
        """Give a module the state of the first process: parameters, buffers and extra state, which must be a tensor."""
        if self.size > 1:
            first = dist.get_global_rank(self.group, 0)  # type: ignore[arg-type]  # a group: there are several
            state = module.state_dict()
            for tensor in chain(state.values(), module.buffers()):  # buffers that are not in the state too
                value = tensor.detach().to(self._device, copy=True).contiguous()
                dist.broadcast(value, first, group=self.group)
                tensor.detach().copy_(value)
            module.load_state_dict(state)  # the extra state, of which there is a copy in ``state``

    def concatenated(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks. rows: (n, ...), where n may differ."""
        if self.size == 1:
            return rows
        lengths = [n for (n,) in self._numbers([len(rows)])]
        if max(lengths) == 0:
            return rows
        # all_gather needs equal shapes.
        padded = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype, device=self._device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]).to(rows.device)

    def gather(self, value: _T) -> list[_T]:
        """The value of each process, by rank. It is pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self, same: Sequence[object] = (), *, differ: str = "") -> Iterator[list[int]]:
        """Work that must succeed on all processes: ``with processes.together(): work``.

        The block should change nothing that lasts. What follows it runs only if the block succeeded everywhere, and
        should not be able to fail; so all processes change or none does.

        Args:
            same, differ: as for ``agree``.

        Yields:
            A list to which the block may append at most two counts. Afterwards it has their sums over the processes.

        Raises:
            The block's own error, or what ``agree`` raises.
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
        """Check that no process has an error and that all make the same call.

        Args:
            error: of this process, or None. The caller raises it afterwards.
            same: arguments whose repr must be equal on all processes.
            counts: at most two.
            differ: end of the error message for unequal arguments, after "some".

        Returns:
            Sums of the counts over the processes.

        Raises:
            RuntimeError: another process has an error. NonFiniteError: if that is one.
            ValueError: ``same`` differs.
        """
        if self.size == 1:
            return list(counts)
        severity = 0 if error is None else 1 if isinstance(error, NonFiniteError) else 2
        digest = int.from_bytes(hashlib.sha256(repr(tuple(same)).encode()).digest()[:7], "big")
        numbers = self._numbers([severity, digest, *counts, *[0] * (2 - len(counts))])
        severities, digests, *columns = zip(*numbers, strict=True)
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
        """The numbers of each process, as many on each. Faster than ``gather``, as nothing is pickled."""
        message = torch.tensor(mine, device=self._device)
        messages = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(messages, message, group=self.group)
        numbers: list[list[int]] = torch.stack(messages).tolist()
        return numbers

    @staticmethod
    def lost(error: Exception) -> bool:
        """Whether the error means that another process cannot be reached."""
        return isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or _NETWORK.search(str(error)) is not None
        )

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """Turn errors of the network into an error that says how to go on with the run."""
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
    """The group of the processes that torchrun started; None without torchrun, or if it started only one.

    Args:
        device: "auto", "cpu" or "cuda". With GPUs, each process uses the one that torchrun's LOCAL_RANK names.

    Raises:
        ValueError: fewer GPUs than processes. RuntimeError: the others could not be reached within ``TIMEOUT`` seconds.
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
    # Only after success, when all processes have met at the end of ``train``: destroying the group earlier would abort
    # processes that still use it, and after an error some may be gone. The process ends anyway then.
    dist.destroy_process_group()
