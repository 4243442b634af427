"""Time the suite: fastebm, what people write, and peers, on the same problems.

    python bench/run.py                              all cases: an hour or more
    python bench/run.py --quick                      one case of every kind: some minutes; also `fastebm bench`
    python bench/run.py --cases 'table-*' pcd-10000  cases by name, * and ? allowed
    python bench/run.py --contestants eager jax fastebm
    python bench/run.py --list                       names of cases and contestants
    python bench/run.py --cases 'sampling-*' --budget 80          samplers side by side: some ten minutes
    python bench/run.py --cases 'collapsed-*' --budget 80         steps in the first layer: some minutes

Writes steps.csv, training.csv, efficiency.csv, compilation.csv, sampling.csv and collapsed.csv into --out. Rows of the
same case, device and number of threads in these files are replaced, others stay. Exit status: 0; 1 if a contestant
FAILED its gate or broke; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastebm.bench.cases import (
    COLLAPSED,
    COMPILATION,
    EFFICIENCY,
    QUICK,
    SAMPLING,
    STEPS,
    SUITE,
    TRAINING,
    Case,
    SamplingCase,
    TrainingCase,
)
from fastebm.bench.rows import add_out, script

if TYPE_CHECKING:
    import torch
    from fastebm.bench.contestants import Contestant
    from fastebm.bench.limits import Yardstick

# Heavy imports are inside functions: `fastebm --help` needs the arguments only, and JAX must start after on_threads.

PEERS = ("jax", "jaxlib", "torchebm", "ebmkit", "blackjax", "arviz-stats")
BUDGET, QUICK_BUDGET = 300.0, 32.0
Row = dict[str, Any]


# -- arguments -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases by name, * and ? allowed (see --list)")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="contestants by name (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names of cases and contestants, and end")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU cores for every contestant (default: all)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help=f"of timing per case; what takes longer is skipped, and its row says so "
        f"(default: {BUDGET:g}, for the quick set {QUICK_BUDGET:g})",
    )  # fmt: skip
    add_out(parser)


def chosen(patterns: Sequence[str] | None, names: Iterable[str], what: str) -> list[str]:
    """The names that match a pattern, in the order of ``names``. Without patterns: all.

    Raises:
        ValueError: a pattern matches no name. The message lists the names.
    """
    names = list(names)
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no {what} is called {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if patterns is None or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


@contextmanager
def on_threads(n: int | None) -> Iterator[int]:
    """Limit torch's threads, and the cores of this process, which JAX uses; both are restored afterwards."""
    import torch

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if n is not None and not 1 <= n <= len(cores):
        raise ValueError(f"--threads must be from 1 to {len(cores)}, the cores that there are, got {n}")
    n, before = n or len(cores), torch.get_num_threads()
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores[:n])
        torch.set_num_threads(n)
        yield n
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)


# -- the run -------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, quick: bool) -> int:
    """Run the chosen cases. Returns the exit status.

    Raises:
        ValueError: bad arguments.
    """
    import torch
    from fastebm.bench import rows
    from fastebm.bench import sampling_contestants as samplers
    from fastebm.bench.contestants import CONTESTANTS, taking_part
    from fastebm.bench.training import TRAINERS

    everyone = [c.name for c in CONTESTANTS] + list(TRAINERS) + [c.library for c in samplers.CONTESTANTS]
    everyone = list(dict.fromkeys(everyone))
    names = chosen(arguments.cases, SUITE, "case") if arguments.cases or not quick else list(QUICK)
    wanted = set(chosen(arguments.contestants, everyone, "contestant"))
    if arguments.list:
        print("cases:", *(f"  {key}: {describe(key)}" for key in SUITE), sep="\n")
        print("contestants:", *(f"  {name}" for name in everyone), sep="\n")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here")
    if arguments.budget is not None and not arguments.budget > 0:
        raise ValueError(f"--budget must be > 0 seconds, got {arguments.budget:g}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    budget = arguments.budget or (QUICK_BUDGET if quick else BUDGET)
    contestants = [c for c in taking_part(device) if c.name in wanted]

    with on_threads(arguments.threads) as threads:
        say(f"on {device.type}, {threads} threads, {budget:g} s of timing at most for each of: {', '.join(names)}")
        common = rows.provenance(*PEERS)
        runner = Runner(device, threads, budget, contestants, wanted)
        found: dict[str, list[Row]] = {}
        started = time.monotonic()
        for i, key in enumerate(names):
            say(f"[{i + 1}/{len(names)}, {time.monotonic() - started:.0f} s] {key}: {describe(key)}")
            file, new = runner.rows_of(key)
            new = [{"case": key, "threads": threads, **row, **common} for row in new]
            found.setdefault(file, []).extend(new)
            rows.replace(arguments.out / f"{file}.csv", map(rows.rounded, found[file]), ("case", "device", "threads"))
    print_tables(found)
    files = ", ".join(str(arguments.out / f"{file}.csv") for file in found)
    say(f"done in {time.monotonic() - started:.0f} s; rows are in {files}")
    bad = [row for new in found.values() for row in new if row["status"] in ("FAILED", "error")]
    for row in bad:
        say(f"{row['case']}: {row['contestant']} {row.get('precision', '')} {row['status']}: {row['note']}")
    return 1 if bad else 0


def describe(key: str) -> str:
    case = SUITE[key]
    if key in COLLAPSED:
        return f"steps of {case.only[0]}, {case.n_chains} chains, {case.energy}"
    if isinstance(case, SamplingCase):
        return f"samplers, {case.n_chains} chains, {case.draws} draws a round, {case.energy}"
    if isinstance(case, TrainingCase):
        return f"training, {case.batch_size} of {case.n_chains} chains move {case.steps} steps, {case.energy}"
    kind = {**dict.fromkeys(EFFICIENCY, "effective samples"), **dict.fromkeys(COMPILATION, "first calls")}
    return f"{kind.get(key, 'steps')}, {case.n_chains} chains, {case.steps} steps, {case.energy}"


class Runner:
    """Case -> (result file, rows), with progress on the terminal."""

    def __init__(
        self, device: torch.device, threads: int, budget: float, contestants: list[Contestant], wanted: set[str]
    ) -> None:
        self.device, self.threads, self.budget = device, threads, budget
        self.contestants, self.wanted = contestants, wanted  # wanted: names of trainers and of samplers' libraries too
        self._yardsticks: list[Yardstick] | None = None
        self._n_present: int | None = None

    def rows_of(self, key: str) -> tuple[str, list[Row]]:
        from fastebm.bench import collapsed, compilation, efficiency, sampling, training
        from fastebm.bench.sampling_contestants import CONTESTANTS as SAMPLERS

        seconds = self.budget / 4  # the rest is for gates, warm-up, and the least number of rounds
        if key in TRAINING:
            trainers = [name for name in training.TRAINERS if name in self.wanted]
            found = training.race(TRAINING[key], trainers, self.device, seconds=seconds, budget=self.budget)
            return "training", reported(found, training.brief)
        if key in EFFICIENCY:
            found = efficiency.race(EFFICIENCY[key], self.contestants, self.device, seconds=seconds, budget=seconds)
            return "efficiency", reported(found, efficiency.brief)
        samplers = [c for c in SAMPLERS if c.library in self.wanted]
        if key in COLLAPSED:
            found = collapsed.race(COLLAPSED[key], samplers, seconds=seconds, budget=self.budget)
            return "collapsed", reported(found, collapsed.brief)
        if key in SAMPLING:
            found = sampling.race(SAMPLING[key], samplers, seconds=seconds, budget=seconds)
            return "sampling", reported(found, sampling.brief)
        if key in COMPILATION:
            there = {(c.name, c.precision) for c in self.contestants}
            ways = [way for way in compilation.WAYS[self.device.type] if way in there]
            measured = compilation.measure(key, ways, self.device.type, self.threads)
            return "compilation", reported(measured, compilation.brief)
        return "steps", self._steps(STEPS[key], seconds)

    def _steps(self, case: Case, seconds: float) -> list[Row]:
        from fastebm.bench.clock import interleaved
        from fastebm.bench.limits import rates, yardsticks
        from fastebm.bench.race import brief, left_out, race, why_not

        if self._yardsticks is None:
            self._yardsticks = yardsticks(self.device, {c.precision for c in self.contestants} | {"float32"})
            for y in self._yardsticks:
                y.run()
        at_most = rates(interleaved({y: y.run for y in self._yardsticks}, 0.0, self.device))
        why = why_not(case, self._present(), at_most, self.budget, free_memory(self.device))
        if why is not None:
            say(f"  skipped: {why}")
            return left_out(case, self.contestants, self.device, why)
        found = race(
            case, self.contestants, self.device, yardsticks=self._yardsticks, seconds=seconds, budget=self.budget,
            underway=transient,
        )  # fmt: skip
        return reported(found, brief)

    def _present(self) -> int:
        """How many contestants can run here, tried on the smallest case."""
        from fastebm.bench.problem import Missing, Problem

        if self._n_present is None:
            p, self._n_present = Problem(Case(2, (16,), 8), self.device), 0
            for c in self.contestants:
                try:
                    c.prepare(p, 1, 0.0)
                    self._n_present += 1
                except Missing:
                    pass
        return self._n_present


def free_memory(device: torch.device) -> float:
    """Bytes of free memory on the device, inf if unknown."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if not info.exists():
        return float("inf")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return 1024.0 * int(fields["MemAvailable"].split()[0])


# -- messages ---------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def transient(text: str) -> None:
    """Show what is running, on a terminal only, until the next line."""
    if sys.stderr.isatty():
        print(f"\r\033[K  ... {text}", end="", file=sys.stderr, flush=True)


def reported(found: Iterable[Row], brief: Callable[[Row], str]) -> list[Row]:
    """The rows as a list, each printed as soon as it is there."""
    done = []
    for row in found:
        done.append(row)
        say(f"  {brief(row)}")
    return done


_number, _times, _share = "{:.3g}".format, "{:.2f}".format, "{:.0%}".format


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


# file -> heading, column of its rows, format
TABLES: dict[str, list[tuple[str, str, Callable[[Any], str]]]] = {
    "steps": [
        ("chain-steps/s", "chain_steps_per_s", _number),
        ("ms", "seconds", _milliseconds),
        ("first quartile", "seconds_q1", _milliseconds),
        ("third", "seconds_q3", _milliseconds),
        ("x eager", "times_eager", _times),
        ("x best peer", "times_peer", _times),
        ("of limit", "of_limit", _share),
    ],
    "training": [
        ("ms per training step", "seconds", _milliseconds),
        ("first quartile", "seconds_q1", _milliseconds),
        ("third", "seconds_q3", _milliseconds),
        ("x tutorial", "times_tutorial", _times),
    ],
    "efficiency": [
        ("effective samples/s", "ess_per_s", _number),
        ("per chain-step", "ess_per_step", _number),
        ("x eager", "times_eager", _times),
    ],
    "sampling": [
        ("effective samples/s", "ess_per_s", _number),
        ("x ebmkit", "times_ebmkit", _times),
        ("x blackjax", "times_blackjax", _times),
        ("per gradient", "ess_per_gradient", _number),
        ("gradients per draw", "gradients_per_draw", _number),
        ("step size", "step_size", _number),
        ("accepted", "acceptance", _times),
    ],
    "collapsed": [
        ("path", "path", str),
        ("ms per gradient", "gradient_seconds", _milliseconds),
        ("ms per step", "seconds", _milliseconds),
        ("first quartile", "seconds_q1", _milliseconds),
        ("third", "seconds_q3", _milliseconds),
        ("x fastebm's time", "times_fastebm", _times),
    ],
    "compilation": [
        ("first call, s", "first_call_seconds", _number),
        ("second process, s", "second_process_seconds", _number),
        ("later, s", "later_call_seconds", _number),
        ("first, more, s", "first_call_more", _number),
        ("second, more, s", "second_process_more", _number),
    ],
}


def print_tables(found: dict[str, list[Row]]) -> None:
    """Print one table per result file, followed by what was not timed, and why."""
    for file, new in found.items():
        columns = TABLES[file]
        body = [["case", "contestant", *(heading for heading, _, _ in columns)]]
        for row in new:
            if row["status"] == "ok":
                cells = ["" if row[name] == "" else form(row[name]) for _, name, form in columns]
                body.append([row["case"], f"{row['contestant']} {row.get('precision', '')}".strip(), *cells])
        widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
        print()
        for line in body:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for row in new:
            if row["status"] != "ok":
                reasons.setdefault((row["status"], row["contestant"], row["note"]), []).append(row["case"])
        for (status, contestant, note), cases in reasons.items():
            print(f"{status}: {contestant} in {', '.join(cases)}: {note}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        return run(arguments, arguments.quick)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
