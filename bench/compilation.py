"""What compilation adds to the first call: in a process with empty caches, and in a second one that finds them full.

    python bench/run.py --cases 'compile-*'                                all of it, with rows: some minutes
    python bench/compilation.py CASE CONTESTANT PRECISION DEVICE THREADS   one process: up to a minute

The second is what run.py starts for each process. It prints the seconds of the first call and of a later one as JSON,
and writes no file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

from fastebm.bench.cases import COMPILATION, Case
from fastebm.bench.rows import script

# Folders that are empty for the first process and full for the second. By default JAX caches only compilations of over
# a second.
CACHES = (
    *("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
    "JAX_COMPILATION_CACHE_DIR",
)
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
SECONDS = ("first_call_seconds", "second_process_seconds", "later_call_seconds")
COLUMNS = (*SECONDS, "first_call_more", "second_process_more", "note")

# The default call of fastebm, and peers that compile.
WAYS = {
    "cpu": (("fastebm", "float32"), ("jax", "float32"), ("compile", "float32")),
    "cuda": (("fastebm-triton", "bf16x3"), ("jax", "float32"), ("compile", "float32")),
}


def first_calls(key: str, name: str, precision: str, device: str, threads: int) -> dict[str, Any]:
    """Seconds to prepare and call a contestant for the first time in this process, and seconds of a later call."""
    import torch
    from fastebm.bench.clock import seconds_of
    from fastebm.bench.contestants import CONTESTANTS
    from fastebm.bench.problem import Missing, Problem, matmul

    case = COMPILATION[key]
    p = Problem(case, torch.device(device))
    torch.set_num_threads(threads)
    contestant = next(c for c in CONTESTANTS if (c.name, c.precision) == (name, precision))
    try:
        with matmul(precision):
            start = time.perf_counter()
            run = contestant.prepare(p, case.steps, case.noise_std)
            run()
            if p.device.type == "cuda":
                torch.cuda.synchronize()
            first = time.perf_counter() - start
            return {"first": first, "later": min(seconds_of(run, p.device) for _ in range(3))}
    except Missing as why:
        return {"missing": str(why)}


def measure(
    key: str, contestants: Iterable[tuple[str, str]], device: str, threads: int, limit: float = 300.0
) -> Iterable[dict[str, Any]]:
    """One row per (name, precision): two processes, one after the other, with a cache folder of their own.

    first_call_seconds: from preparing to the end of the first run; importing the contestant's packages counts, except
    torch and fastebm. second_process_seconds: the same with the caches that the first process left. later_call_seconds:
    a warm call. first_call_more, second_process_more: seconds beyond a later call.
    """
    case: Case = COMPILATION[key]
    for name, precision in contestants:
        row: dict[str, Any] = {"energy": case.energy, "n_chains": case.n_chains, "steps": case.steps}
        row |= {"device": device, "contestant": name, "precision": precision, "status": "ok"}
        row |= dict.fromkeys(COLUMNS, "")
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, **KEEP_ALL, **{c: os.path.join(folder, c) for c in CACHES}}
            command = [sys.executable, "-m", "fastebm.bench.compilation", key, name, precision, device, str(threads)]
            found = []
            for _ in range(2):
                try:
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
                except subprocess.TimeoutExpired:
                    row |= {"status": "skipped", "note": f"not done after {limit:.0f} s"}
                    break
                if done.returncode != 0:
                    row |= {"status": "error", "note": (done.stderr.strip().splitlines() or ["no message"])[-1][:500]}
                    break
                found.append(json.loads(done.stdout.splitlines()[-1]))
                if "missing" in found[-1]:
                    row |= {"status": "missing", "note": found[-1]["missing"]}
                    break
        if row["status"] == "ok":
            row |= {"first_call_seconds": found[0]["first"], "second_process_seconds": found[1]["first"]}
            row["later_call_seconds"] = later = min(f["later"] for f in found)
            row |= {"first_call_more": found[0]["first"] - later, "second_process_more": found[1]["first"] - later}
        yield row


def brief(row: dict[str, Any]) -> str:
    name = f"{row['contestant']} {row['precision']}"
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['note'][:120]}"
    times = [f"{row[column]:.3g} s" for column in SECONDS]
    return f"{name}: first call {times[0]}, in a second process {times[1]}, later {times[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    parser.add_argument("case", choices=list(COMPILATION))
    parser.add_argument("contestant")
    parser.add_argument("precision")
    parser.add_argument("device", choices=list(WAYS))
    parser.add_argument("threads", type=int)
    a = parser.parse_args(argv)
    from fastebm.bench.contestants import CONTESTANTS

    if (a.contestant, a.precision) not in (there := [(c.name, c.precision) for c in CONTESTANTS]):
        names = ", ".join(" ".join(contestant) for contestant in there)
        parser.error(f"no contestant is called '{a.contestant} {a.precision}'; there are {names}")
    print(json.dumps(first_calls(a.case, a.contestant, a.precision, a.device, a.threads)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
