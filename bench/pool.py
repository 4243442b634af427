"""What a pool of persistent chains costs: drawing and writing back, steps, a training step, memory.

    python bench/pool.py                 10k, 100k and 1M chains of 784 dims: minutes, and about 15 GB of memory
    python bench/pool.py --quick         1k and 10k chains, fewer steps: a minute

Writes pool.csv into --out, one row per number of chains and contestant. Rows in the file with the same number of
chains, steps and device are replaced. The contestants are those of ``training.py``, on one recipe (fastebm's pool, the
list of the tutorials, the buffers of torchebm and ebmkit), and fastebm with states stored in 8 bits. The batch is that
of the UvA tutorial: 128 images of 28 x 28. All contestants and sizes take turns.

- draw and write-back: draw a batch, with reinits, and write it back without moving it. ROUND of them are timed
  together, since fastebm computes that many draws at once. The row has the time of one.
- chain-steps/s: draw, K steps, write-back.
- training step: the same, then loss, gradients, Adam.
- memory: peak of a separate process over some training steps, less its memory before the chains were made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastebm.bench.rows import add_out, provenance, replace, rounded, script

ROUND = 64
UINT8 = "fastebm-uint8"
MEASURES = ("draw_and_write", "sample", "training_step")
SECONDS, QUICK_SECONDS = 240.0, 20.0

Row = dict[str, Any]


def trainers() -> dict[str, Callable[..., Any]]:
    import torch
    from fastebm.bench.training import TRAINERS, fastebm_pool

    return {**TRAINERS, UINT8: partial(fastebm_pool, storage_dtype=torch.uint8)}


def race(cases: dict[int, Any], device: Any, seconds: float) -> list[Row]:
    """One row per case and contestant: first the correctness gate, then timing in turns."""
    import torch
    from fastebm.bench.clock import interleaved, quartiles
    from fastebm.bench.problem import Missing
    from fastebm.bench.training import TUTORIAL, gate, real_batches, row_of

    rows: dict[tuple[int, str], Row] = {}
    runs: dict[tuple[int, str, str], Callable[[], object]] = {}
    for n, case in cases.items():
        data = real_batches(case, device)
        for name, make in trainers().items():
            row = rows[n, name] = row_of(case, device=device.type, contestant=name, status="ok", note="")
            try:
                if name != UINT8:  # the same code apart from the rounding, which would fail the gate
                    row |= gate(case, make, device)
                    if row["correct"] == "no":
                        row |= {"status": "FAILED", "note": "failed its gate: not timed"}
                        continue
                row |= memory(name, n, case.steps, device.type)
                trainer = make(case, device)
            except Missing as why:
                row |= {"status": "missing", "note": str(why)}
                continue
            batches = itertools.cycle(data)
            runs[n, name, "draw_and_write"] = partial(draws_and_writes, trainer)
            runs[n, name, "sample"] = trainer.sample
            runs[n, name, "training_step"] = lambda trainer=trainer, batches=batches: trainer.step(next(batches))
    for run in runs.values():
        run()
    times = interleaved(runs, seconds, device, rounds=100)
    first = min(cases)
    for (n, name, measure), t in times.items():
        share = ROUND if measure == "draw_and_write" else 1
        q1, median, q3 = (value / share for value in quartiles(t))
        row = rows[n, name]
        row |= {f"{measure}_seconds": median, f"{measure}_q1": q1, f"{measure}_q3": q3, "rounds": len(t)}
    for (n, name), row in rows.items():
        if row["status"] != "ok":
            continue
        row["chain_steps_per_s"] = row["batch_size"] * row["steps"] / row["sample_seconds"]
        row["times_list"] = rows[n, TUTORIAL]["draw_and_write_seconds"] / row["draw_and_write_seconds"]
        row["times_smallest"] = row["training_step_seconds"] / rows[first, name]["training_step_seconds"]
    torch.manual_seed(0)
    return list(rows.values())


def draws_and_writes(trainer: Any) -> None:
    for _ in range(ROUND):
        trainer.put(trainer.draw())


def memory(name: str, n: int, steps: int, device: str) -> Row:
    """Peak memory of a separate process, in bytes, less its memory before the chains were made.

    peak_bytes: on the device of the chains; host_bytes: in the process. On a CPU they are the same.
    """
    command = [sys.executable, "-m", "fastebm.bench.pool", "--memory", name, str(n), str(steps), device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {"note": "memory: " + (done.stderr.strip().splitlines() or ["no error message"])[-1][:300]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(name: str, n: int, steps: int, device: str) -> Row:
    """``memory`` of this process."""
    import dataclasses

    import torch
    from fastebm.bench.cases import POOL
    from fastebm.bench.training import real_batches

    case = dataclasses.replace(next(iter(POOL.values())), n_chains=n, steps=steps)
    home = torch.device(device)

    warm = trainers()[name](dataclasses.replace(case, n_chains=2 * case.batch_size), home)
    data = real_batches(case, home)
    warm.step(data[0])
    del warm
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if home.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = trainers()[name](case, home)
    for batch in data[:3]:
        trainer.step(batch)
    host_bytes = _resident("VmHWM") - before
    peak = torch.cuda.max_memory_allocated() if home.type == "cuda" else host_bytes
    return {"state_bytes": n * case.dim * 4, "peak_bytes": peak, "host_bytes": host_bytes}


def _resident(name: str) -> int:
    """Bytes, from /proc of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    parser.add_argument("--quick", action="store_true", help="small pools, fewer steps")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU cores (default: all)")
    parser.add_argument("--seconds", type=float, help=f"of timing (default: {SECONDS:g}, quick {QUICK_SECONDS:g})")
    add_out(parser)
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)  # called by memory() in a process of its own
    arguments = parser.parse_args(argv)
    if arguments.memory:
        name, n, steps, device = arguments.memory
        print(json.dumps(measure_memory(name, int(n), int(steps), device)))
        return 0

    import torch
    from fastebm.bench.cases import POOL, QUICK_POOL
    from fastebm.bench.run import on_threads

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases, seconds = (QUICK_POOL, QUICK_SECONDS) if arguments.quick else (POOL, SECONDS)
    seconds = seconds if arguments.seconds is None else arguments.seconds
    with on_threads(arguments.threads) as threads:
        common = provenance("torchebm", "ebmkit")
        found = [{"threads": threads, **row, **common} for row in race(cases, device, seconds)]
    replace(arguments.out / "pool.csv", map(rounded, found), ("n_chains", "steps", "device"))
    for row in found:
        print(brief(row))
    return 1 if any(row["status"] == "FAILED" for row in found) else 0


def brief(row: Row) -> str:
    who = f"{row['n_chains']:,} chains, {row['contestant']}"
    if row["status"] != "ok":
        return f"{who}: {row['status']}: {row['note'][:120]}"
    peak = f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else row["note"]
    return (
        f"{who}: draw and write-back {1e6 * row['draw_and_write_seconds']:.0f} us ({row['times_list']:.3g} x list), "
        f"{row['chain_steps_per_s']:.3g} chain-steps/s, training step {1e3 * row['training_step_seconds']:.3g} ms "
        f"({row['times_smallest']:.2f} of the smallest pool's), peak memory {peak}"
    )


if __name__ == "__main__":
    sys.exit(main())
