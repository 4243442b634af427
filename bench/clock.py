"""The clock: interleaved runs (A B C A B C ...), medians and quartiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

MIN_ROUNDS, ROUNDS = 3, 15


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run. On a GPU by CUDA events, from an idle device on, so that the host's time is included."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    runs: Mapping[Any, Callable[[], object]],
    seconds: float,
    device: torch.device,
    rounds: int = ROUNDS,
    until: float = math.inf,
) -> dict[Any, list[float]]:
    """Time runs in rounds, A B C A B C ...: at least MIN_ROUNDS, then as many as fit ``seconds``.

    A run that runs out of memory is dropped, and has no times in the result.

    Args:
        until: Unix time after which no round but the first begins.
    """
    times: dict[Any, list[float]] = {key: [] for key in runs}
    end = time.monotonic() + seconds
    for i in range(rounds):
        if (i >= MIN_ROUNDS and time.monotonic() > end) or (i > 0 and time.time() > until):
            break
        for key, run in runs.items():
            if key in times:
                try:
                    times[key].append(seconds_of(run, device))
                except torch.OutOfMemoryError:
                    del times[key]
                    torch.cuda.empty_cache()
    return times


def past_share(runs: int, seconds: float, share: float) -> str | None:
    """Why so many runs of about ``seconds`` do not fit the share of the budget; None if they do."""
    if runs * seconds <= share:
        return None
    return f"{runs} runs of about {seconds:.3g} s would pass its share of the budget, {share:.3g} s"


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile."""
    if len(times) < 2:
        return (times[0],) * 3
    q1, q2, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return q1, q2, q3
