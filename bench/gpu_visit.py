"""A visit to a GPU: its stages, in forks (gpu_workers.py), and the description of the machine."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastebm.bench import launches, rows
from fastebm.bench.cases import DRY_CASES, GPU_CASES, NOISE_STD, Case
from fastebm.bench.contestants import CONTESTANTS, Contestant, fastebm_at
from fastebm.bench.gpu_workers import ROWS, Journal, Row, Worker, claimed, read, run, stop
from fastebm.bench.problem import GATE_STEPS, Missing, Problem, interpreted, law_case, matmul
from fastebm.bench.race import context_is_lost, key_of, race

# The tests of a stage, without those that need no GPU or take minutes on it.
TESTS = {
    "tests-a": (
        ["tests/test_gpu.py", "tests/test_gpu_graphs.py"],
        "precision or noise or bits or update or auto or words or normals",
    ),
    "tests-b": (
        [
            "tests/test_gpu.py",
            "tests/test_gpu_graphs.py",
            "tests/test_agreement.py",
            "tests/test_laws.py",
            "tests/test_invariance.py",
        ],
        # "ieee" products take up to 97 s each to compile
        "not any_architecture and not test_every_precision_against and not bits_do_not_depend and not noise_of_the",
    ),
}
DRY_TESTS = (["tests/test_gpu.py", "tests/test_langevin.py"], "test")

# Contestants that are meant for a CPU would only cost time here.
ON_GPU = tuple(c for c in CONTESTANTS if c.name not in ("fastebm", "fastebm-reference"))

# Timed first, in all cases: fastebm and its closest peers.
FIRST = tuple(
    c for c in ON_GPU if c.name in ("eager", "fastebm-triton", "fastebm-graph", "compile+graph", "closed-form+graph")
)


def device() -> torch.device:
    """To be called in forks only: a process that has touched CUDA can't be forked and use it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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

    # Each stage takes the Unix time at which it must end.

    def shipped(self, until: float) -> None:
        """One process per kernel: they compile side by side."""
        kernels = launches.DRY_SHIPPED if self.dry else launches.SHIPPED
        numbers = launches.DRY_CHECKED_CHAINS if self.dry else launches.CHECKED_CHAINS

        def work(kernel: launches.Kernel, worker: Worker) -> None:
            for n in numbers:
                self.job(worker, f"{kernel.name} x {n}", lambda n=n: launches.check(kernel, n, device(), self.dry))

        # more processes than cores would only wait for each other
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

    def samplers(self, until: float) -> None:
        def work(worker: Worker) -> None:
            for sampled in launches.DRY_SAMPLED if self.dry else launches.SAMPLED:
                name, _, _, case = sampled
                time_it = functools.partial(launches.time_sampler, sampled, device(), 0.5, self.dry)
                self.job(worker, f"{name} {case.name}", time_it)

        self.pause(True)
        run([self.worker("samplers", "all", work)], until)
        self.pause(False)

    def tests(self, what: str, until: float) -> None:
        from fastebm.bench.gpu_tests import run_tests  # only these stages need pytest

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
        python = [sys.executable, "-m", "fastebm.bench.gpu", "launch"]
        nothing = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that memcheck sees the bounds of each tensor
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
        """Do the work and journal it, unless it is done already or an earlier process died in it."""
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
        """Compile what later stages time, in separate processes, which are paused during timings."""
        folder = self.work / "warm-claims"

        def work(worker: Worker) -> None:
            # no compile workers: every process compiles by itself already
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
    """The compilations of the stage ``timings``, in the order of its cases."""
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


# Seconds of each stage. A stage that ends early leaves the rest of its time to the next.
STAGES = {
    "shipped": 75,
    "alone": 35,
    "tests-a": 70,
    "timings": 90,
    "profile": 15,
    "tests-b": 130,
    "samplers": 45,
    "watched": 75,
    "sweep": 80,
}

WARMED = ("timings", "sweep")  # stages whose kernels take long to compile


def visit(asked: Sequence[tuple[str, float]], out: Path, budget: float, dry: bool) -> int:
    """Run stages, and return the exit status.

    Args:
        asked: stages and the seconds of each, which are scaled to fill the budget.
    """
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
    found = read(out / ROWS)
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
    """Write environment.json: the machine, the packages, the state of the clocks, and the visit's arguments."""
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
