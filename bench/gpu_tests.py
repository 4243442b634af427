"""Run tests on a GPU machine in any number of processes, which report each result at once. For gpu_visit.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastebm.bench.gpu_workers import claimed

ROOT = Path(__file__).resolve().parent.parent
LOST = 9  # exit status of a process whose CUDA context is lost


class Shared:
    """pytest plugin: runs the tests that no other process has claimed, one after the other."""

    def __init__(
        self,
        claims: Path,
        underway: Callable[[str], None],
        report: Callable[[str, dict[str, Any]], None],
        lost: Callable[[], bool],
    ) -> None:
        self.claims, self.underway, self.report, self.lost = claims, underway, report, lost

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.report(f"collecting {report.nodeid}", {"status": "error", "note": report.longreprtext[-2000:]})

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for name in claimed(self.claims, items):
            self.underway(name)
            # no next item: module fixtures are torn down after each test, since the next one may run elsewhere
            items[name].config.hook.pytest_runtest_protocol(item=items[name], nextitem=None)
            if self.lost():
                pytest.exit("the CUDA context is lost", returncode=LOST)
            self.underway("")
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            row = {"status": report.outcome, "seconds": report.duration, "note": ""}
            if not report.passed:
                row["note"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[-3000:]
            self.report(report.nodeid, row)


def run_tests(
    files: list[str],
    wanted: str,
    claims: Path,
    underway: Callable[[str], None],
    report: Callable[[str, dict[str, Any]], None],
    lost: Callable[[], bool],
) -> None:
    """Run the tests of ``files`` that ``-k wanted`` selects and no other process has claimed.

    Raises:
        RuntimeError: the CUDA context is lost.
    """
    # cuBLAS is deterministic only with this set; tests that poison fresh memory turn determinism on
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.chdir(ROOT)
    claims.mkdir(exist_ok=True)
    # not the project's own options, which are for a terminal
    options = ["-o", "addopts=", "-m", "not slow", "-k", wanted]
    options += ["-p", "no:cacheprovider", "-p", "no:terminal", "--rootdir", str(ROOT)]
    status = pytest.main([*options, *files], plugins=[Shared(claims, underway, report, lost)])
    if status == LOST:
        raise RuntimeError("the CUDA context is lost")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        report("pytest itself", {"status": "error", "note": f"{status!r}; see errors.log"})
