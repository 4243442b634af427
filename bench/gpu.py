"""Timings and launch sweeps on one GPU; `bash bench/on_gpu.sh` runs all of it.

    python bench/gpu.py timings --out FOLDER [--until UNIX_TIME] [--dry]
    python bench/gpu.py sweep   --out FOLDER ...
    python bench/gpu.py warm    --number K --of N ...       compile kernels ahead, into Triton's cache
    python bench/gpu.py environment --out FOLDER

All contestants of a case move the same start by the same rule, each with its own fastest noise. A speed-up is
written only where the contestant of that row, and eager autograd, have passed their gate on that very case.

Each part works in a child process: a kernel that loses the CUDA context, or a killed process, costs its own row.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fastebm.bench import rows
from fastebm.bench.cases import CASES, DRY_CASES, ENERGIES, NOISE_STD, Case
from fastebm.bench.clock import interleaved, quartiles
from fastebm.bench.contestants import CONTESTANTS, Run, compiled
from fastebm.bench.problem import GATE_STEPS, NOISE_ERROR, SEED, Problem, largest
from fastebm.bench.race import brief, context_is_lost, race, row_of
from fastebm.kernels.launch import SHARED_MEMORY, Launch, block, choose_launch, shared_bytes
from torch import Tensor

from fastebm.backends import Chains, fused
from fastebm.backends.choose import interpreted
from fastebm.description import describe

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MAX_RESTARTS = 8

# Those that a GPU is not for would take the time of the others.
ON_GPU = tuple(c for c in CONTESTANTS if c.name not in ("fastebm-torch", "fastebm-compiled", "fastebm-reference"))


# -- the sweep ----------------------------------------------------------------------------------------------

# Tile and warps: a warp has 16 rows of a tensor-core product, and warpgroups (4 warps) 64.
TILES = ((64, 4), (128, 4), (128, 8), (32, 2), (64, 8), (16, 1))


def candidates(case: Case, precision: str, capability: int | None) -> list[Launch]:
    """Launches to try, the shipped one first. Those that can't fit in shared memory are left out."""
    default = choose_launch(case.dim, (case.widths,), precision, capability)
    if isinstance(default, str):
        return []
    tried = []
    if case.dim <= 128:
        tried += [Launch("resident", tile, block(case.dim), warps, 1) for tile, warps in TILES]
    if case.dim > 64:
        chunks = [c for c in (64, 32, 128) if c <= block(case.dim)]
        tried += [
            Launch("streaming", tile, chunk, warps, stages)
            for stages in (1, 2, 3)
            for chunk in chunks
            for tile, warps in TILES
        ]
    if default.in_memory:
        tried = [replace(default, in_memory=False), *(replace(one, in_memory=one.own_chains) for one in tried)]
    limit = math.inf if capability is None else SHARED_MEMORY.get(capability, SHARED_MEMORY[86])

    def may_fit(launch: Launch) -> bool:  # shared_bytes estimates from above
        return shared_bytes(launch, case.dim, (case.widths,), precision, capability or 90) <= 1.25 * limit

    return list(dict.fromkeys(launch for launch in (default, *tried) if may_fit(launch)))


def capability() -> int | None:
    if not CUDA:
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def sweep_jobs(dry: bool) -> list[tuple[Case, str, Launch]]:
    """(case, precision, launch), the most telling first: near the shipped launch, a saturated device."""
    if dry:
        cases = [(case, "bf16x3") for case in DRY_CASES[:1]]
    else:
        # 65,536 chains fill every streaming multiprocessor several times over, and fit beside anything
        cases = [(Case(*e, n), q) for n in (65_536, 4_096) for q in ("bf16x3", "bf16", "tf32") for e in ENERGIES]
    lists = [[(case, q, launch) for launch in candidates(case, q, capability())] for case, q in cases]
    if dry:
        return [job for jobs in lists for job in jobs[:2]]
    # In turns: the first of every list before the second of any.
    return [jobs[i] for i in range(max(map(len, lists), default=0)) for jobs in lists if i < len(jobs)]


def sweep_one(p: Problem, precision: str, launch: Launch, seconds: float = 0.5) -> dict[str, Any]:
    """One candidate, held to float64 and then timed in turns with the shipped launch."""
    case = p.case
    default = choose_launch(case.dim, (case.widths,), precision, capability())
    columns = {"precision": precision, **asdict(launch), "shipped": "yes" if launch == default else "no"}
    row = row_of(case, **columns, status="ok", correct="", error="", allowed="")
    row |= dict.fromkeys(("rounds", "seconds", "seconds_q1", "seconds_q3", "chain_steps_per_s"), "")
    row |= {"shipped_seconds": "", "times_shipped": "", "note": ""}
    # few chains: enough steps that the kernel is timed, and not its launch
    steps = row["steps"] = 10 * case.steps if 1024 <= case.n_chains <= 4096 else case.steps
    x = torch.empty_like(p.x0)
    numbers = torch.arange(case.n_chains, device=p.device)
    chains = Chains(x, SEED, numbers, torch.zeros_like(numbers))
    description = describe(p.energy)

    def advance(launch: Launch, steps: int, noise_std: float) -> Tensor:
        rule = p.rule(noise_std)
        return fused.advance_mlp(description, chains, rule, steps, precision=precision, launch=launch).x

    try:
        allowed = p.allowed(precision)
        error = largest(advance_from(p, x, lambda: advance(launch, 1, 0.0))[p.rows] - p.descent)
        noisy = largest(advance_from(p, x, lambda: advance(launch, GATE_STEPS, NOISE_STD))[p.rows] - p.noisy)
        correct = error <= allowed and noisy <= GATE_STEPS * (2 * allowed + NOISE_ERROR * NOISE_STD)
        row |= {"correct": "yes" if correct else "no", "error": error, "allowed": allowed}
        if not correct:
            return row | {"status": "FAILED", "note": "failed its gate: not timed"}
        runs = {True: lambda: advance(launch, steps, NOISE_STD)}
        if launch != default:
            runs[False] = lambda: advance(default, steps, NOISE_STD)  # type: ignore[arg-type]
        for run in runs.values():
            run()
        times = interleaved(runs, seconds, DEVICE)
        q1, median, q3 = quartiles(times[True])
        shipped = statistics.median(times[launch == default])
        row |= {"rounds": len(times[True]), "seconds": median, "seconds_q1": q1, "seconds_q3": q3}
        row |= {"chain_steps_per_s": case.n_chains * steps / median}
        row |= {"shipped_seconds": shipped, "times_shipped": shipped / median}
    except Exception as error:
        does_not_fit = type(error).__name__ == "OutOfResources"
        row |= {"status": "does not fit" if does_not_fit else "error", "note": f"{type(error).__name__}: {error}"[:500]}
        if not does_not_fit:
            traceback.print_exc()
        if context_is_lost():
            raise
    return row


def advance_from(p: Problem, x: Tensor, advance: Run) -> Tensor:
    x.copy_(p.x0)
    return advance()


def warm(part: int, parts: int, until: float, dry: bool) -> int:
    """Compile this part's share of all kernels, shipped ones first, by moving a few chains one step."""
    # the number of chains is no part of a kernel
    kernels = {(case.dim, case.widths, q, launch): (case, q, launch) for case, q, launch in reversed(sweep_jobs(dry))}
    jobs = list(reversed(kernels.values()))
    for energy in [] if dry else ENERGIES[part::parts]:  # the timings find these in torch.compile's cache
        compiled(Problem(Case(*energy, 512), DEVICE), 1, NOISE_STD)()
    for i, (case, precision, launch) in enumerate(jobs):
        if i % parts != part:
            continue
        if time.time() > until:
            print(f"warm {part}: {len(jobs[i::parts])} kernels left to compile", file=sys.stderr)
            break
        numbers = torch.arange(64, device=DEVICE)
        chains = Chains(torch.zeros(64, case.dim, device=DEVICE), SEED, numbers, numbers)
        p = Problem(Case(case.dim, case.widths, len(numbers)), DEVICE)
        try:
            fused.advance_mlp(describe(p.energy), chains, p.rule(NOISE_STD), 1, precision=precision, launch=launch)
        except Exception as error:  # the sweep will say so in its row
            print(f"warm {part}: {case.energy} {precision} {launch}: {type(error).__name__}", file=sys.stderr)
        if context_is_lost():
            return 1
    return 0


# -- parts: a child that works and writes, a parent that goes on where a child died ----------------------------


class Journal:
    """rows.jsonl: finished rows, each with its job; lost.txt: what a process died of; underway.txt: what runs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows_at, self.lost_at, self.underway_at = (folder / n for n in ("rows.jsonl", "lost.txt", "underway.txt"))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.rows_at.read_text().splitlines()] if self.rows_at.exists() else []

    def done(self) -> set[str]:
        return {row["job"] for row in self.rows()}

    def lost(self) -> list[str]:
        return self.lost_at.read_text().splitlines() if self.lost_at.exists() else []

    def underway(self, key: str) -> None:
        self.underway_at.write_text(key)

    def add(self, job: str, rows: Iterable[dict[str, Any]]) -> None:
        with self.rows_at.open("a") as file:
            file.writelines(json.dumps({"job": job, **row}) + "\n" for row in rows)
        self.underway("")

    def bury(self) -> str:
        """What was under way when a process died, from now on among the lost."""
        key = self.underway_at.read_text() if self.underway_at.exists() else ""
        if key:
            with self.lost_at.open("a") as file:
                file.write(key + "\n")
        return key


def timings_child(journal: Journal, until: float, dry: bool) -> None:
    for case in DRY_CASES if dry else CASES:
        if case.name in journal.done():
            continue
        if time.time() > until - (0 if dry else 10):
            break
        if f"{case.name}, all" in journal.lost():
            journal.add(case.name, [row_of(case, status="error", note="its process died while all were timed")])
            continue
        started = time.time()
        journal.underway(f"{case.name}, all")
        seconds = 0.5 if dry else min(6.0, (until - started) / 2)
        lost, underway = journal.lost(), journal.underway
        found = race(case, ON_GPU, DEVICE, lost=lost, underway=underway, dry=dry, seconds=seconds)
        journal.add(case.name, found)
        print(f"{case.name}: {time.time() - started:.0f} s", *map(brief, found), sep="\n  ", flush=True)


def sweep_child(journal: Journal, until: float, dry: bool) -> None:
    problems: dict[Case, Problem] = {}
    done, lost = journal.done(), journal.lost()
    for case, precision, launch in sweep_jobs(dry):
        job = f"{case.name}, {precision}, {launch}"
        if time.time() > until:
            break
        if job in done:
            continue
        if job in lost:
            row = row_of(case, precision=precision, **asdict(launch), status="error", note="its process died")
            journal.add(job, [row])
            continue
        journal.underway(job)
        if case not in problems:
            problems[case] = Problem(case, DEVICE, dry=dry)
        journal.add(job, [sweep_one(problems[case], precision, launch)])


def expected_jobs(part: str, dry: bool) -> list[str]:
    if part == "timings":
        return [case.name for case in (DRY_CASES if dry else CASES)]
    return [f"{case.name}, {precision}, {launch}" for case, precision, launch in sweep_jobs(dry)]


def supervise(part: str, out: Path, until: float, dry: bool) -> int:
    """Run a part's child until all is done, the time is over, or it keeps dying; then write the CSV."""
    journal = Journal(out / f".{part}")
    status = 0
    for _ in range(1 + MAX_RESTARTS):
        command = [sys.executable, __file__, part, "--child", "--out", str(out), "--until", str(until)]
        try:
            child = subprocess.run([*command, *(["--dry"] if dry else [])], timeout=max(1.0, until + 15 - time.time()))
        except subprocess.TimeoutExpired:
            print(f"{part}: out of time in {journal.bury() or 'no job'}", file=sys.stderr)
            break
        if child.returncode == 0:
            break
        key = journal.bury()
        print(f"{part}: a process died (status {child.returncode}) in {key or 'no job'}", file=sys.stderr)
        status = 1
        if not key or time.time() > until:
            break
    found = journal.rows()
    left_out = [job for job in expected_jobs(part, dry) if job not in journal.done()]
    found += [{"job": job, "status": "left out", "note": "no time was left"} for job in left_out]
    rows.write(out / f"{part}.csv", map(rows.rounded, found), provenance())
    for path in (journal.rows_at, journal.lost_at, journal.underway_at):
        path.unlink(missing_ok=True)
    (out / f".{part}").rmdir()
    wrong = [row for row in found if row["status"] in ("error", "FAILED")]
    print(f"{part}: {len(found)} rows, {len(wrong)} wrong or failed, {len(left_out)} left out for time")
    for row in wrong:
        print(f"{part}: {row['job']} {row.get('contestant', '')} {row['status']}: {row['note'][:200]}", file=sys.stderr)
    return 1 if wrong or status else 0


def provenance() -> dict[str, Any]:
    """rows.provenance, and the GPU's."""
    common = rows.provenance("jax", "torchebm", "blackjax")
    return {**common, "driver": nvidia_smi("driver_version"), "cuda": torch.version.cuda or "none"}


def nvidia_smi(query: str | None = None) -> str:
    options = [] if query is None else [f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def environment(out: Path, notes: list[str]) -> None:
    """environment.json: the machine, the packages, the state of its clocks, and the notes (name=value) given."""
    import importlib.metadata

    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    properties = torch.cuda.get_device_properties(0) if CUDA else None
    clocks = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.total,persistence_mode"
    content = {
        **provenance(),
        **dict(note.split("=", 1) for note in notes),
        "device": str(properties),
        "capability": capability(),
        "interpreted": interpreted(),
        "nvidia_smi": nvidia_smi().splitlines(),
        clocks: nvidia_smi(clocks),
        "packages": dict(sorted(found.items())),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("timings", "sweep", "warm", "environment"))
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "gpu")
    parser.add_argument("--until", type=float, default=math.inf, help="Unix time at which to stop")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU, kernels in the interpreter")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--note", action="append", default=[], help="name=value, for environment.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "environment":
        environment(args.out, args.note)
        return 0
    if args.part == "warm":
        return warm(args.number, args.of, args.until, args.dry)
    if args.child:
        child = timings_child if args.part == "timings" else sweep_child
        child(Journal(args.out / f".{args.part}"), args.until, args.dry)
        return 0
    return supervise(args.part, args.out, args.until, args.dry)


if __name__ == "__main__":
    sys.exit(main())
