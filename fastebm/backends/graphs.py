"""A step recorded once as a CUDA graph and replayed, where that is possible.

One recording serves one call, never two: whatever a module may change between calls (parameters that move to
another place, hooks, numbers on the Python side) is then seen, with nothing to compare. The steps before the
recording are steps that the call has to take anyway, so it costs one pass of Python and no gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

__all__ = ["CudaRecorder", "Recorder", "run_steps"]

# Before the recording: libraries choose their kernels and allocate workspaces (as many as PyTorch's own examples do).
WARM_UP = 3

# Fewer than this would not repay the recording.
MIN_STEPS = 16


class Recorder(Protocol):
    """The device's part of it, apart so that tests need no GPU."""

    def aside(self) -> AbstractContextManager[None]:
        """Where steps before the recording run."""

    def without_waiting(self) -> AbstractContextManager[None]:
        """RuntimeError for whatever waits for the device."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What the step does to the device, to be replayed; does nothing now. RuntimeError where that can't be."""


def run_steps(
    step: Callable[[], None], steps: int, recorder: Recorder | None, after: Callable[[int], None]
) -> str | None:
    """``step`` so many times, each followed by ``after`` of its number, which is not recorded.

    A step that raises must have moved nothing. Returns "recorded", or why not, in words; None without a recorder.
    """
    done, how, replay = 0, None, step
    if recorder is not None and steps < MIN_STEPS:
        how = f"fewer than {MIN_STEPS} steps do not repay it"
    elif recorder is not None:
        how = "recorded"
        with recorder.aside():
            for t in range(WARM_UP - 1):
                step()
                after(t)
            done = WARM_UP - 1
            try:
                # A recording that fails would leave torch 2.11's allocator waiting for its end: find out before.
                with recorder.without_waiting():
                    step()
                after(done)
                done += 1
            except RuntimeError as error:
                how = f"a step waits for the device ({error})"
        if how == "recorded":
            try:
                replay = recorder.record(step)
            except RuntimeError as error:
                how = f"the recording failed ({error})"
    for t in range(done, steps):
        replay()
        after(t)
    return how


_kept = threading.local()


def stream_beside(device: torch.device) -> torch.cuda.Stream:
    """One for each thread and device, kept: cuBLAS has a workspace, some 64 MiB, for every stream that it has seen."""
    streams: dict[int, torch.cuda.Stream] = _kept.__dict__.setdefault("streams", {})
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in streams:
        streams[index] = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
    return streams[index]


class CudaRecorder:
    """The current stream's device, through a stream beside it: what is recorded may not be the default stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = stream_beside(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph(): it empties the allocator's cache each time
        with self.aside():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph.replay
