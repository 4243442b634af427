"""Record one step as a CUDA graph and replay it for the other steps of the call.

Each call records anew. So changes to the module between calls (moved parameters, hooks, Python numbers) take effect
without any check. The warm-up steps before the recording are steps of the call itself, so recording costs one pass
through the step's Python code and no extra gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

__all__ = ["CudaRecorder", "Recorder", "run_steps"]

# Steps before the recording, in which libraries choose kernels and allocate workspaces. PyTorch's examples use 3 too.
WARM_UP = 3

# With fewer steps the recording costs more time than it saves.
MIN_STEPS = 16


class Recorder(Protocol):
    """The device-specific part of recording. A protocol, so that tests can run without a GPU."""

    def aside(self) -> AbstractContextManager[None]:
        """A context for the steps before the recording: they run on the recorder's stream."""

    def without_waiting(self) -> AbstractContextManager[None]:
        """A context in which any operation that synchronises with the device raises RuntimeError."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record the device work of a step without running it, and return a function that replays it.

        Raises:
            RuntimeError: the step can't be recorded.
        """


def run_steps(
    step: Callable[[], None], steps: int, recorder: Recorder | None, after: Callable[[int], None]
) -> str | None:
    """Run ``step`` ``steps`` times, and ``after(t)``, which is not recorded, after step t.

    A step that raises must not have changed any state. Returns "recorded" or the reason why not; None without a
    recorder.
    """
    done, outcome, replay = 0, None, step
    if recorder is not None and steps < MIN_STEPS:
        outcome = f"fewer than {MIN_STEPS} steps do not repay it"
    elif recorder is not None:
        outcome = "recorded"
        with recorder.aside():
            for t in range(WARM_UP - 1):
                step()
                after(t)
            done = WARM_UP - 1
            try:
                # A failed recording leaves torch 2.11's allocator in capture mode, so look for synchronisation first.
                with recorder.without_waiting():
                    step()
                after(done)
                done += 1
            except RuntimeError as error:
                outcome = f"a step waits for the device ({error})"
        if outcome == "recorded":
            try:
                replay = recorder.record(step)
            except RuntimeError as error:
                outcome = f"the recording failed ({error})"
    for t in range(done, steps):
        replay()
        after(t)
    return outcome


_kept = threading.local()


def stream_beside(device: torch.device) -> torch.cuda.Stream:
    """A side stream, one per thread and device. Reused, because cuBLAS keeps about 64 MiB for each stream."""
    streams: dict[int, torch.cuda.Stream] = _kept.__dict__.setdefault("streams", {})
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in streams:
        streams[index] = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
    return streams[index]


class CudaRecorder:
    """Records on a side stream, because CUDA can't capture the default stream."""

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
        # Not torch.cuda.graph(), which empties the allocator's cache each time.
        with self.aside():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph.replay
