"""What only a GPU can tell, in one visit to a bare machine; `bash bench/on_gpu.sh` runs it.

    python bench/gpu.py visit --stages NAME[=SECONDS] ...   under five minutes; writes into --out, by default runs/gpu
    python bench/gpu.py rows FOLDER [FOLDER ...]            gpu.csv and gpu_sweep.csv from what visits brought back
    python bench/gpu.py launch NAME                         one small launch, for tools that watch a process

A visit may end at any moment, so each result is written at once, as a line of rows.jsonl: one JSON object with what was
measured, the job, its status, and machine, versions, commit and date. Without a CUDA device a visit writes nothing.

Stages run in forks of a process that has imported torch and triton but never touched CUDA. A kernel that loses the
CUDA context, or a process that dies or hangs, costs only its own job: a new fork goes on with the next one.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastebm.bench import launches, rows
from fastebm.bench.cases import DRY_CASES, GPU_CASES, NOISE_STD, Case
from fastebm.bench.contestants import CONTESTANTS, Contestant, fastebm_at
from fastebm.bench.problem import GATE_STEPS, Missing, Problem, law_case, matmul
from fastebm.bench.race import beside_peers, brief, context_is_lost, key_of, race

from fastebm.backends.choose import interpreted

Row = dict[str, Any]

MAX_RESTARTS = 8

# The tests of a stage, without those that need no GPU or take minutes on it.
TESTS = {
    "tests-a": (
        ["tests/test_gpu.py"],
        "precision or noise or bits or update or auto or words or normals",
    ),
    "tests-b": (
        ["tests/test_gpu.py", "tests/test_agreement.py", "tests/test_laws.py", "tests/test_invariance.py"],
        # "ieee" products take up to 97 s each to compile
        "not any_architecture and not test_every_precision_against and not bits_do_not_depend and not noise_of_the",
    ),
}
DRY_TESTS = (["tests/test_gpu.py", "tests/test_langevin.py"], "test")

# Contestants for a CPU would only take the others' time.
ON_GPU = tuple(c for c in CONTESTANTS if c.name not in ("fastebm", "fastebm-reference"))

# Run first, in all cases: ours, and what came closest.
FIRST = tuple(
    c for c in ON_GPU if c.name in ("eager", "fastebm-triton", "fastebm-graph", "compile+graph", "closed-form+graph")
)


def device() -> torch.device:
    """Only for forks: CUDA can't be used in a fork of a process that has touched it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- results -----------------------------------------------------------------------------------------------------


class Journal:
    """rows.jsonl, shared by all processes: a line is written in one call, so it is whole or absent."""

    def __init__(self, out: Path, common: Row) -> None:
        self.path, self.common = out / "rows.jsonl", common

    def add(self, what: str, job: str, row: Row) -> None:
        whole = {"what": what, "job": job, **rows.rounded(row), **self.common}
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, (json.dumps(whole) + "\n").encode())
        os.close(file)
        if not (what.startswith("tests") and row["status"] in ("passed", "skipped")):
            print(f"[{what}] {told(what, job, row)}", flush=True)

    def done(self, what: str) -> set[str]:
        return {row["job"] for row in read(self.path) if row["what"] == what}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def told(what: str, job: str, row: Row) -> str:
    """A row as one line."""
    if "contestant" in row and row["status"] != "FAILED":
        return f"{job}: {brief(row)}"
    kept = {k: v for k, v in rows.rounded(row).items() if v not in ("", None) and k not in ("kernel", "n_chains")}
    note = str(kept.pop("note", ""))[-600:]
    return f"{job}: " + " ".join(f"{k}={v}" for k, v in kept.items() if what != "tests") + (f" {note}" if note else "")


# -- forks ---------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A function that does jobs in a fork. It tells each before it begins (``underway``), and skips the lost."""

    what: str
    name: str
    work: Callable[[Worker], None]
    journal: Journal
    folder: Path
    pid: int = 0
    lost: list[str] = field(default_factory=list)

    def underway(self, job: str) -> None:
        (self.folder / f"{self.name}.job").write_text(job)

    def start(self) -> None:
        self.underway("")
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                # a fork must not outlive the process that waits for it
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                self.work(self)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def ended(self, why: str) -> str:
        """A row for the job under way, if there was one; its name."""
        job = (self.folder / f"{self.name}.job").read_text()
        if job:
            self.lost.append(job)
            self.journal.add(self.what, job, {"status": "error", "note": why})
        return job


def run(workers: Sequence[Worker], until: float) -> None:
    """All workers at once. One that dies goes on after the job that it died in; at ``until`` all are killed."""
    running = list(workers)
    for worker in running:
        worker.start()
    while running:
        time.sleep(0.05)
        for worker in list(running):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid == 0:
                if time.time() > until:
                    stop(worker)
                    worker.ended("out of time")
                    running.remove(worker)
                continue
            code = os.waitstatus_to_exitcode(status)
            if code == 0 or not worker.ended(f"its process died (status {code}); see errors.log"):
                running.remove(worker)
            elif len(worker.lost) <= MAX_RESTARTS:
                worker.start()
            else:
                running.remove(worker)


def stop(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    os.waitpid(worker.pid, 0)


def claimed(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Take and yield the names that no other process has taken: work shared by any number of processes."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        try:
            os.close(os.open(folder / str(i), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield name


# -- the visit -----------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    out: Path
    work: Path
    dry: bool
    journal: Journal
    warmers: list[Worker] = field(default_factory=list)

    def worker(self, what: str, name: str, work: Callable[[Worker], None]) -> Worker:
        return Worker(what, f"{what}-{name}", work, self.journal, self.work)

    # Each stage is given the Unix time at which it ends.

    def shipped(self, until: float) -> None:
        """One process per kernel: they compile side by side."""
        kernels = launches.DRY_SHIPPED if self.dry else launches.SHIPPED
        numbers = launches.DRY_CHECKED_CHAINS if self.dry else launches.CHECKED_CHAINS

        def work(kernel: launches.Kernel, worker: Worker) -> None:
            for n in numbers:
                self.job(worker, f"{kernel.name} x {n}", lambda n=n: launches.check(kernel, n, device(), self.dry))

        # On two cores more processes would only wait for each other.
        at_once = min(len(kernels), os.cpu_count() or 1)
        for first in range(0, len(kernels), at_once):
            run([self.worker("shipped", k.name, functools.partial(work, k)) for k in kernels[first : first + at_once]],
                until)  # fmt: skip

    def alone(self, until: float) -> None:
        kernels = launches.DRY_SHIPPED if self.dry else launches.SHIPPED
        numbers = launches.DRY_TIMED_CHAINS if self.dry else launches.TIMED_CHAINS

        def work(worker: Worker) -> None:
            for n in numbers:
                for kernel in kernels:
                    if kernel.precision is not None or n <= 65_536:  # more chains would take seconds per call
                        time_it = functools.partial(launches.time_alone, kernel, n, device(), 0.3, self.dry)
                        self.job(worker, f"{kernel.name} x {n}", time_it)

        self.pause(True)
        run([self.worker("alone", "all", work)], until)
        self.pause(False)

    def tests(self, what: str, until: float) -> None:
        from fastebm.bench.gpu_tests import run_tests

        files, wanted = DRY_TESTS if self.dry else TESTS[what]
        n = 1 if self.dry else max(1, (os.cpu_count() or 1) - 2)

        def work(worker: Worker) -> None:
            def report(test: str, row: Row) -> None:
                self.journal.add(what, test, row)

            # a test that loses the CUDA context must not cost the next tests theirs
            run_tests(files, wanted, self.work / f"{what}-claims", worker.underway, report, context_is_lost)

        run([self.worker(what, str(k), work) for k in range(n)], until)

    def timings(self, until: float) -> None:
        def work(worker: Worker) -> None:
            for contestants in (FIRST, ON_GPU):
                for case in DRY_CASES if self.dry else GPU_CASES:
                    done = self.journal.done("timings")
                    left = [c for c in contestants if key_of(case, c) not in done]
                    if not left or time.time() > until:
                        continue
                    eager = ON_GPU[0]  # timed in turns with each
                    race(
                        case, left if eager in left else [eager, *left], device(), lost=worker.lost, dry=self.dry,
                        seconds=0.5 if self.dry else 0.3 * len(left), until=until - 10, underway=worker.underway,
                        found=lambda row, case=case: self.add_timing(case, row),
                    )  # fmt: skip
                    worker.underway("")

        run([self.worker("timings", "all", work)], until)

    def add_timing(self, case: Case, row: Row) -> None:
        job = f"{case.name}, {row['contestant']} {row['precision']}"
        if job not in self.journal.done("timings"):
            self.journal.add("timings", job, row)

    def profile(self, until: float) -> None:
        kernels = launches.DRY_SHIPPED[:2] if self.dry else [launches.SHIPPED[0], launches.SHIPPED[2]]

        def work(worker: Worker) -> None:
            for kernel in kernels:
                worker.underway(kernel.name)
                text = launches.profile_table(kernel, 70 if self.dry else 4096, device(), self.dry)
                with (self.out / "profile.txt").open("a") as file:
                    file.write(text + "\n")
                self.journal.add("profile", kernel.name, {"status": "ok", "note": ""})
            worker.underway("")

        run([self.worker("profile", "all", work)], until)

    def watched(self, until: float) -> None:
        """compute-sanitizer on small launches, and ncu on two kernels, each in a separate process."""
        python = [sys.executable, __file__, "launch"]
        nothing = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that memcheck sees each tensor's end
        two = [launches.SHIPPED[0].name, launches.SHIPPED[2].name]
        counters = ["--set", "detailed", "--clock-control", "none", "--kernel-name", "regex:langevin", "--launch-count"]
        tools = [
            *((f"memcheck {name}", ["compute-sanitizer", "--tool", "memcheck"], name, "small") for name in two),
            *((f"racecheck {name}", ["compute-sanitizer", "--tool", "racecheck"], name, "small") for name in two),
            *((f"ncu {name}", ["ncu", *counters, "1"], name, "large") for name in two),
        ]

        def work(worker: Worker) -> None:
            for job, tool, name, size in tools:
                if job in worker.lost or job in self.journal.done("watched"):
                    continue
                worker.underway(job)
                command = [*tool, *python, name, "--size", size]
                environ = {**os.environ, **(nothing if size == "small" else {})}
                left = max(1.0, until - time.time() - 2)
                try:
                    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=left)
                    text, status = done.stdout + done.stderr, "ok" if done.returncode == 0 else "error"
                except FileNotFoundError:
                    text, status = f"{tool[0]} is not installed", "missing"
                except subprocess.TimeoutExpired as error:
                    text, status = f"out of time: {(error.stdout or b'').decode(errors='replace')}", "error"
                with (self.out / "watched.txt").open("a") as file:
                    file.write(f"===== {job} =====\n{text}\n")
                errors = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", text)
                self.journal.add("watched", job, {"status": status, "note": "; ".join(errors) or text[-200:]})
            worker.underway("")

        run([self.worker("watched", "all", work)], until)

    def sweep(self, until: float) -> None:
        def work(worker: Worker) -> None:
            problems: dict[Case, Problem] = {}
            for job in launches.sweep_jobs(device(), self.dry):
                case, precision, launch = job
                if case not in problems:
                    problems[case] = Problem(case, device(), dry=self.dry)
                time_it = functools.partial(launches.sweep_one, problems[case], precision, launch)
                self.job(worker, launches.job_name(job), time_it)

        run([self.worker("sweep", "all", work)], until)

    def job(self, worker: Worker, name: str, work: Callable[[], Row]) -> None:
        """Do the work and journal it, unless that is done already or a process died of it."""
        if name in worker.lost or name in self.journal.done(worker.what):
            return
        worker.underway(name)
        try:
            row = work()
        except Exception as error:
            traceback.print_exc()
            row = {"status": "error", "note": f"{type(error).__name__}: {error}"[:1000]}
        self.journal.add(worker.what, name, row)
        worker.underway("")
        if context_is_lost():
            raise RuntimeError("the CUDA context is lost")

    # -- compilation during the stages that do not time --

    def warm(self, jobs: Callable[[], list[tuple[str, Callable[[], object]]]], processes: int) -> None:
        """Compile what later stages time, in separate processes, which are paused while a stage times."""
        folder = self.work / "warm-claims"

        def work(worker: Worker) -> None:
            # each process compiles by itself: more would only take the others' cores
            torch._inductor.config.compile_threads = 1
            todo = dict(jobs())
            for name in claimed(folder, todo):
                if name in worker.lost:
                    continue
                worker.underway(name)
                started = time.monotonic()
                try:
                    todo[name]()
                    row: Row = {"status": "ok", "seconds": time.monotonic() - started}
                except Missing as why:
                    row = {"status": "missing", "note": str(why)}
                except Exception as error:
                    row = {"status": "error", "note": f"{type(error).__name__}: {error}"[:300]}
                    traceback.print_exc()
                self.journal.add("warm", name, row)
                worker.underway("")
                if context_is_lost():
                    raise RuntimeError("the CUDA context is lost")

        self.warmers = [self.worker("warm", str(k), work) for k in range(processes)]
        for worker in self.warmers:
            worker.start()

    def pause(self, paused: bool) -> None:
        for worker in self.warmers:
            if os.waitpid(worker.pid, os.WNOHANG)[0] == 0:
                os.kill(worker.pid, signal.SIGSTOP if paused else signal.SIGCONT)
            else:
                self.warmers = [w for w in self.warmers if w is not worker]

    def end_of_warming(self) -> None:
        for worker in self.warmers:
            if os.waitpid(worker.pid, os.WNOHANG)[0] == 0:
                stop(worker)
                worker.ended("stopped: later stages compile what is left")
        self.warmers = []


def timed_kernels(dry: bool) -> list[tuple[str, Callable[[], object]]]:
    """What the race compiles, in the order of its cases."""
    found: dict[str, Callable[[], object]] = {}

    def prepare(c: Contestant, case: Case, steps: Sequence[int]) -> None:
        p = Problem(case, device(), dry=dry)
        with matmul(c.precision):
            for n in steps:
                c.prepare(p, n, NOISE_STD)()

    for case in DRY_CASES[:1] if dry else GPU_CASES:
        for c in ON_GPU:
            if c.name in ("compile+graph", "autotuned+graph"):
                if c.name == "autotuned+graph" and case != GPU_CASES[0]:
                    continue
                few = Case(case.dim, case.widths, 512)
                found.setdefault(f"{case.energy} {c.name} {c.precision}", functools.partial(prepare, c, few, [1]))
            elif c.name in ("jax", "blackjax"):
                # XLA compiles for a number of chains and steps
                work = [(law_case(case), [GATE_STEPS]), (case, [1, case.steps])]
                for of, steps in work:
                    found.setdefault(
                        f"{of.name} {c.name} {c.precision} {steps}", functools.partial(prepare, c, of, steps)
                    )
        if not dry:
            few, tf32 = Case(case.dim, case.widths, 64), Contestant("", "tf32", fastebm_at("triton", "tf32"))
            found.setdefault(f"{case.energy} fused tf32", functools.partial(prepare, tf32, few, [1]))
    # Inductor's and the kernels' first: they are few, and their rows come first
    return sorted(found.items(), key=lambda item: "jax" in item[0])


def swept_kernels(dry: bool) -> list[tuple[str, Callable[[], object]]]:
    jobs = {}
    for job in launches.sweep_jobs(device(), dry):
        case, precision, launch = job
        jobs[f"{case.energy} {precision} {launch}"] = functools.partial(launches.compile_job, job, device())
    return list(jobs.items())


# Seconds that each may take; a stage that ends early leaves its time to the next.
STAGES = {
    "shipped": 75,
    "alone": 35,
    "tests-a": 70,
    "timings": 90,
    "profile": 15,
    "tests-b": 130,
    "watched": 75,
    "sweep": 80,
}

WARMED = ("timings", "sweep")  # stages whose kernels take long to compile


def visit(asked: Sequence[tuple[str, float]], out: Path, budget: float, dry: bool) -> int:
    """asked: stages, and the seconds of each, which are stretched or shrunk to fill the budget."""
    start, stages = time.time(), [name for name, _ in asked]
    with tempfile.TemporaryDirectory() as folder:
        here = Visit(out, Path(folder), dry, Journal(out, {}))
        path = Path(folder) / "environment.json"  # not in out yet: without a CUDA device a visit leaves nothing
        environ = functools.partial(write_environment, path, stages, budget)
        run([here.worker("environment", "all", lambda worker: environ())], start + 60)
        if not path.exists():
            print("no environment could be read; see errors.log", file=sys.stderr)
            return 70
        environment = json.loads(path.read_text())
        if not dry and environment["capability"] is None:
            print("no CUDA device", file=sys.stderr)
            return 69
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / "environment.json")
        here.journal.common = {name: environment[name] for name in PROVENANCE}
        cores = os.cpu_count() or 1
        warmers = 1 if dry else max(1, cores * 3 // 8)
        warmed = [{"timings": timed_kernels, "sweep": swept_kernels}[name] for name in stages if name in WARMED]
        if warmed:
            here.warm(lambda: [job for jobs in warmed for job in jobs(dry)], warmers)
        total, spent = sum(seconds for _, seconds in asked), 0.0
        for name, seconds in asked:
            spent += seconds
            until = start + budget * spent / total
            if name in (*WARMED, "profile"):
                here.end_of_warming()
            method = getattr(here, name, None) or functools.partial(here.tests, name)
            began = time.time()
            method(until)
            print(f"[{time.time() - start:.0f} s] {name} took {time.time() - began:.0f} s", flush=True)
        here.end_of_warming()
    found = read(out / "rows.jsonl")
    bad = [row for row in found if row["status"] in ("FAILED", "failed", "error") and row["what"] != "warm"]
    print(f"{len(found)} rows, {len(bad)} of them wrong or failed; {time.time() - start:.0f} s")
    for row in bad:
        print(f"  {row['what']}: {row['job']}: {row['status']} {str(row.get('note', ''))[:160]}")
    return 1 if bad else 0


# -- the environment -----------------------------------------------------------------------------------------------

PROVENANCE = ("cpu", "cores", "gpu", "python", "torch", "triton", "numpy", "fastebm", "jax", "torchebm", "ebmkit",
              "blackjax", "commit", "date", "driver", "cuda")  # fmt: skip


def nvidia_smi(query: str | None = None) -> str:
    options = [] if query is None else [f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def write_environment(path: Path, stages: Sequence[str], budget: float) -> None:
    """The machine, the packages, the state of the clocks, and the visit's arguments."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    there = torch.cuda.is_available()
    clocks = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.total,persistence_mode"
    content = {
        **rows.provenance("jax", "torchebm", "ebmkit", "blackjax"),
        "driver": nvidia_smi("driver_version"),
        "cuda": torch.version.cuda or "none",
        "capability": launches.capability(device()),
        "device": str(torch.cuda.get_device_properties(0)) if there else "none",
        "interpreted": interpreted(),
        "stages": list(stages),
        "budget_seconds": budget,
        clocks: nvidia_smi(clocks),
        "nvidia_smi": nvidia_smi().splitlines(),
        "packages": dict(sorted(found.items())),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


# -- result files --------------------------------------------------------------------------------------------------


def write_rows(folders: Sequence[Path], out: Path) -> int:
    """gpu.csv (shipped kernels, their times alone, the race) and gpu_sweep.csv; of a job measured twice, the last."""
    found: dict[tuple[str, str], Row] = {}
    for folder in folders:
        for row in read(folder / "rows.jsonl"):
            found[row["what"], row["job"]] = row
    for name, kinds in (("gpu", ("shipped", "alone", "timings")), ("gpu_sweep", ("sweep",))):
        kept = [row for kind in kinds for row in found.values() if row["what"] == kind]
        for case in {(row["energy"], row["n_chains"]) for row in kept if row["what"] == "timings" and "energy" in row}:
            timed = {
                (row["contestant"], row["precision"]): row for row in kept
                if row["what"] == "timings" and row["status"] == "ok" and (row["energy"], row["n_chains"]) == case
            }  # fmt: skip
            for key, columns in beside_peers({key: float(row["seconds"]) for key, row in timed.items()}).items():
                timed[key].update(rows.rounded(columns))
        if kept:
            common = [*PROVENANCE]
            last = [
                {k: v for k, v in row.items() if k not in common} | {k: row.get(k, "") for k in common} for row in kept
            ]
            rows.write(out / f"{name}.csv", last, common={})
            print(f"{out / name}.csv: {len(kept)} rows")
    tests = [row for row in found.values() if row["what"].startswith("tests")]
    for status in ("passed", "skipped", "failed", "error"):
        print(f"tests {status}: {sum(row['status'] == status for row in tests)}")
    return 0


def stage(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"no stage is called {name!r}; there are {', '.join(STAGES)}")
    return name, float(seconds or STAGES[name])


def main(argv: Sequence[str] | None = None) -> int:
    parser = rows.script(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_visit = commands.add_parser("visit", allow_abbrev=False)
    of_visit.add_argument(
        "--stages", nargs="+", type=stage, required=True, metavar="NAME[=SECONDS]", help=", ".join(STAGES)
    )
    rows.add_out(of_visit, "runs/gpu", committed=None)
    of_visit.add_argument("--budget", type=float, default=285.0, metavar="SECONDS", help="default: 285")
    of_visit.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU, kernels in the interpreter")
    of_rows = commands.add_parser("rows", allow_abbrev=False)
    of_rows.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="the --out of a visit")
    rows.add_out(of_rows)
    of_launch = commands.add_parser("launch", allow_abbrev=False)
    of_launch.add_argument("name", choices=[kernel.name for kernel in launches.SHIPPED])
    of_launch.add_argument("--size", choices=("small", "large"), default="small")
    args = parser.parse_args(argv)
    if args.command == "rows":
        return write_rows(args.folders, args.out)
    if args.command == "launch":
        kernel = next(kernel for kernel in launches.SHIPPED if kernel.name == args.name)
        launches.launch_once(kernel, *((70, 3) if args.size == "small" else (65_536, 10)))
        return 0
    if not (args.budget > 0 and math.isfinite(args.budget)):
        parser.error(f"--budget must be > 0 seconds, got {args.budget:g}")
    return visit(args.stages, args.out, args.budget, args.dry)


if __name__ == "__main__":
    sys.exit(main())
