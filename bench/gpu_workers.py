"""Jobs in forks of one process, and the journal of their results: the machinery of a visit to a GPU (gpu_visit.py).

The parent has imported torch and triton but never touched CUDA. A kernel that loses the CUDA context, or a process
that dies or hangs, costs only its own job: a new fork goes on with the next one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastebm.bench import rows
from fastebm.bench.race import brief

Row = dict[str, Any]

ROWS = "rows.jsonl"  # the file of results in a visit's folder
MAX_RESTARTS = 8

# -- results -----------------------------------------------------------------------------------------------------


class Journal:
    """rows.jsonl, which all processes append to. Each line is one write, so it is complete or absent."""

    def __init__(self, out: Path, common: Row) -> None:
        self.path, self.common = out / ROWS, common

    def add(self, what: str, job: str, row: Row) -> None:
        whole = {"what": what, "job": job, **rows.rounded(row), **self.common}
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, (json.dumps(whole) + "\n").encode())
        os.close(file)
        if not (what.startswith("tests") and row["status"] in ("passed", "skipped")):
            print(f"[{what}] {line_of(what, job, row)}", flush=True)

    def done(self, what: str) -> set[str]:
        return {row["job"] for row in read(self.path) if row["what"] == what}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def line_of(what: str, job: str, row: Row) -> str:
    """A row as one line of text."""
    if "contestant" in row and row["status"] != "FAILED":
        return f"{job}: {brief(row)}"
    kept = {k: v for k, v in rows.rounded(row).items() if v not in ("", None) and k not in ("kernel", "n_chains")}
    note = str(kept.pop("note", ""))[-600:]
    return f"{job}: " + " ".join(f"{k}={v}" for k, v in kept.items() if what != "tests") + (f" {note}" if note else "")


# -- forks ---------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A function that does jobs in a fork. It names each job before it begins (``underway``), and skips lost ones.

    lost: jobs during which an earlier fork died.
    """

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
        """Journal the job that was under way when the process ended, if there was one. Returns its name, or ""."""
        job = (self.folder / f"{self.name}.job").read_text()
        if job:
            self.lost.append(job)
            self.journal.add(self.what, job, {"status": "error", "note": why})
        return job


def run(workers: Sequence[Worker], until: float) -> None:
    """Run all workers at once until the time ``until``, when those left are killed.

    A worker that dies is started again, and goes on after the job that it died in.
    """
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
    """Yield the names that no other process has claimed: work shared by any number of processes."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        try:
            os.close(os.open(folder / str(i), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield name
