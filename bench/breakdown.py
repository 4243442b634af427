"""Where the time of a step goes on a CPU: python bench/breakdown.py

One profiled run a contestant, its time by kind of operation, beside the limit's: what products and normal numbers take
at the rates of ``limits.py``, measured in turns with the contestants. Shares are of the profiled run; the time of a
chain-step is that of runs without a profiler.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from fastebm.bench.cases import STEPS
from fastebm.bench.clock import interleaved
from fastebm.bench.contestants import CONTESTANTS
from fastebm.bench.limits import flops_per_chain_step, rates, yardsticks
from fastebm.bench.problem import MM_BF16, Problem, matmul
from fastebm.bench.rows import RESULTS, rounded, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import fastebm.noise

CASES = ("toy-4096", "table-4096", "digits-4096", "photographs-512")
WAYS = (("eager", "float32"), ("fastebm", "float32"), ("fastebm", MM_BF16))
SECONDS = 20.0  # of timed runs a case

# By name of an operation or of one around it; the first that fits. Compiled code makes the noise where it moves the
# state, so its "noise" has the update and the clamp with it.
NOISE = "fastebm normals"
KINDS = {
    "noise": re.compile(rf"{NOISE}|aten::normal_|aten::randn_like|cpp_fused.*bitwise_xor"),
    "products": re.compile(r"aten::(mm|addmm|addmm_|linear)\b|mkldnn|onednn"),
    "elementwise": re.compile(r"cpp_fused|aten::(?!empty|as_strided|select|slice|view|expand|t\b|transpose|detach)"),
}


def seen_as_one(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Tensor:
        with record_function(NOISE):
            return draw(*args, **kwargs)

    return drawn


def kind_of(event: Any) -> str | None:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next((kind for kind, pattern in KINDS.items() if any(map(pattern.search, names))), None)


def shares(run: Callable[[], object]) -> dict[str, float]:
    """Kind -> its share of the run's time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiled.events():
        if (kind := kind_of(event)) is not None:
            spent[kind] += event.self_cpu_time_total * 1e-6 / seconds
    return {**spent, "rest": max(0.0, 1.0 - sum(spent.values()))}


def rows_of(key: str) -> list[dict[str, Any]]:
    case = replace(STEPS[key], steps=10)
    p = Problem(case, torch.device("cpu"))
    contestants = {(c.name, c.precision): c for c in CONTESTANTS}
    there = [contestants[way] for way in WAYS if way in contestants]
    runs = {c: c.prepare(p, case.steps, case.noise_std) for c in there}

    def with_precision(c: Any) -> Callable[[], object]:
        def run() -> object:
            with matmul(c.precision):
                return runs[c]()

        return run

    ready = {c: with_precision(c) for c in there}
    for run in ready.values():
        run()
    sticks: dict[Any, Callable[[], object]] = {y: y.run for y in yardsticks(p.device, {c.precision for c in there})}
    times = interleaved({**ready, **sticks}, SECONDS, p.device)
    found, flops, chain_steps = rates(times), flops_per_chain_step(p), case.n_chains * case.steps
    rows = []
    for c in there:
        row: dict[str, Any] = {
            "case": key,
            "threads": torch.get_num_threads(),
            "contestant": c.name,
            "precision": c.precision,
            "ns_a_chain_step": 1e9 * statistics.median(times[c]) / chain_steps,
            "limit_products_ns": 1e9 * flops / found.products(c.precision),
            "limit_normals_ns": 1e9 * case.dim / found.normals,
            **shares(ready[c]),
        }
        print(*rounded(row).values(), flush=True)
        rows.append(row)
    return rows


def main() -> int:
    import torch._inductor.config

    torch._inductor.config.cpp.enable_kernel_profile = True  # compiled loops have names
    fastebm.noise.normal = seen_as_one(fastebm.noise.normal)
    write(RESULTS / "breakdown.csv", [rounded(row) for key in sys.argv[1:] or CASES for row in rows_of(key)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
