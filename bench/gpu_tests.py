"""Run tests on a machine that has pytest but not every package they use, in parts, within a time.

    python bench/gpu_tests.py --log tests.log --until UNIX_TIME --shards N tests/test_gpu.py ...

A test that loses the CUDA context, or kills its process, costs the tests of its own part nothing: the part goes
on behind it in a new process. Where hypothesis or scipy is missing, what the tests use of it is stood in for
below; a test that needs another missing package is skipped. A package of this project is never stood in for.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
LOST = 9  # exit status of a part whose CUDA context is lost
MAX_RESTARTS = 10
LOG_BYTES = 3_500_000


# -- stand-ins for packages ----------------------------------------------------------------------------------


def hypothesis_standin(seconds: float = 40.0) -> tuple[types.ModuleType, types.ModuleType]:
    """(hypothesis, hypothesis.strategies): random examples from a fixed seed, no shrinking, at most ``seconds``."""

    class Strategy:
        def __init__(self, draw: Callable[[random.Random], Any]) -> None:
            self.draw = draw

        def __or__(self, other: Strategy) -> Strategy:
            return Strategy(lambda r: r.choice((self, other)).draw(r))

    class Settings:
        def __init__(self, max_examples: int = 100, **_: Any) -> None:
            self.max_examples = max_examples

        def __call__(self, test: Any) -> Any:
            test.max_examples = self.max_examples
            return test

        @staticmethod
        def register_profile(name: str, **_: Any) -> None: ...

        load_profile = register_profile

    def given(**strategies: Strategy) -> Callable[[Any], Any]:
        def decorate(test: Any) -> Any:
            @functools.wraps(test)
            def run(**fixtures: Any) -> None:
                draws, end = random.Random(0), time.monotonic() + seconds
                for i in range(run.max_examples):  # type: ignore[attr-defined]
                    example = {name: s.draw(draws) for name, s in strategies.items()}
                    try:
                        test(**fixtures, **example)
                    except Exception as error:
                        error.add_note(f"example {i}: {example}")
                        raise
                    if time.monotonic() > end:
                        print(f"{test.__name__}: time for {i + 1} of {run.max_examples} examples")  # type: ignore[attr-defined]
                        break

            run.max_examples = 100  # type: ignore[attr-defined]
            parameters = inspect.signature(test).parameters
            kept = [p for name, p in parameters.items() if name not in strategies]
            run.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
            return run

        return decorate

    def lists(elements: Strategy, *, min_size: int, max_size: int) -> Strategy:
        return Strategy(lambda r: [elements.draw(r) for _ in range(r.randint(min_size, max_size))])

    strategies = types.ModuleType("hypothesis.strategies")
    strategies.__dict__.update(
        sampled_from=lambda values: Strategy(lambda r: r.choice(list(values))),
        integers=lambda low, high: Strategy(lambda r: r.randint(low, high)),
        booleans=lambda: Strategy(lambda r: r.random() < 0.5),
        none=lambda: Strategy(lambda r: None),
        just=lambda value: Strategy(lambda r: value),
        lists=lists,
    )
    hypothesis = types.ModuleType("hypothesis")
    health = types.SimpleNamespace(function_scoped_fixture=None)
    hypothesis.__dict__.update(given=given, settings=Settings, HealthCheck=health, strategies=strategies)
    return hypothesis, strategies


def scipy_standin() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """(scipy, scipy.stats, scipy.special): p-values of large samples, in float64.

    kstest is Kolmogorov's limit, binomtest the normal one: for the tests' thousands of draws.
    """

    def of(function: Any, *args: Any) -> Any:
        value = function(*(torch.as_tensor(a, dtype=torch.float64) for a in args)).numpy()
        return value if value.ndim else float(value)

    def normal_sf(z: Any) -> Any:
        return of(lambda z: torch.special.erfc(z / math.sqrt(2)) / 2, z)

    def normal_pdf(x: Any, mean: Any, std: float) -> Any:
        return of(lambda x, m: torch.exp(-(((x - m) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi)), x, mean)

    def kstest(sample: Any, law: str) -> Any:
        x = torch.as_tensor(sample, dtype=torch.float64).sort().values
        cdf, n = {"norm": torch.special.ndtr(x), "uniform": x.clamp(0, 1)}[law], len(x)
        i = torch.arange(n, dtype=torch.float64)
        t = math.sqrt(n) * float(torch.maximum((i + 1) / n - cdf, cdf - i / n).max())
        series = sum((-1) ** (k - 1) * math.exp(-2 * (k * t) ** 2) for k in range(1, 101))
        return types.SimpleNamespace(pvalue=min(1.0, 2 * series) if t > 0.2 else 1.0)

    def binomtest(k: int, n: int, p: float) -> Any:
        distance = max(0.0, abs(k - n * p) - 0.5) / math.sqrt(n * p * (1 - p))
        return types.SimpleNamespace(pvalue=min(1.0, 2 * normal_sf(distance)))

    def chi2_cdf(x: float, df: float) -> Any:
        return of(torch.special.gammainc, df / 2, x / 2)

    def chi2_sf(x: float, df: float) -> Any:
        return of(torch.special.gammaincc, df / 2, x / 2)

    stats, special = types.ModuleType("scipy.stats"), types.ModuleType("scipy.special")
    stats.__dict__.update(
        norm=types.SimpleNamespace(sf=normal_sf, pdf=normal_pdf),
        chi2=types.SimpleNamespace(cdf=chi2_cdf, sf=chi2_sf),
        kstest=kstest,
        binomtest=binomtest,
    )
    special.__dict__.update(ndtr=lambda x: of(torch.special.ndtr, x))
    scipy = types.ModuleType("scipy")
    scipy.__dict__.update(stats=stats, special=special)
    return scipy, stats, special


def skipping_standin(name: str) -> types.ModuleType:
    """A module whose every name skips the test that calls it."""

    def skip(*_: Any, **__: Any) -> None:
        pytest.skip(f"the package {name} is not installed")

    def attribute(wanted: str) -> Callable[..., None]:
        if wanted.startswith("__"):  # what Python itself looks for in a module is not there
            raise AttributeError(wanted)
        return skip

    module = types.ModuleType(name)
    module.__getattr__ = attribute  # type: ignore[method-assign]
    return module


def stand_in() -> list[str]:
    """Stand-ins where packages are missing; their names."""
    makers: dict[str, Callable[[], tuple[types.ModuleType, ...]]] = {
        "hypothesis": hypothesis_standin,
        "scipy": scipy_standin,
        "randomgen": lambda: (skipping_standin("randomgen"),),
    }
    missing = [name for name in makers if importlib.util.find_spec(name) is None]
    for name in missing:
        sys.modules.update({module.__name__: module for module in makers[name]()})
    return missing


# -- one part, in a process of its own -----------------------------------------------------------------------


class Part:
    """pytest plugin: every ``of``-th test, from the ``start``-th of those on; stops where the GPU is lost."""

    def __init__(self, number: int, of: int, start: int, progress: Path) -> None:
        self.number, self.of, self.start, self.progress = number, of, start, progress
        self.index = start - 1

    @pytest.hookimpl(trylast=True)  # after -m has had its say
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.number :: self.of][self.start :]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.index += 1
        # in one go: run_all reads it at any moment, and must never find half of it
        written = self.progress.with_suffix(".new")
        written.write_text(f"{self.index} {nodeid}")
        written.replace(self.progress)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # at once: pytest itself tells at the end, which a lost process does not reach
            with self.progress.with_suffix(".failures").open("a") as file:
                file.write(f"----- {report.nodeid} ({report.when}) -----\n{report.longreprtext}\n")

    def pytest_runtest_logfinish(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                pytest.exit(f"the CUDA context is lost: {error}", returncode=LOST)


def run_part(part: Part, files: list[str]) -> int:
    print("stood in for:", ", ".join(stand_in()) or "nothing")
    options = ["-p", "no:cacheprovider", "-vv", "-rfEs", "--tb=short", "--durations=5", "--rootdir", str(ROOT)]
    status = int(pytest.main([*options, *files], plugins=[part]))
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status


# -- all parts -----------------------------------------------------------------------------------------------


def run_all(files: list[str], shards: int, until: float, log: Path) -> int:
    # cuBLAS has a deterministic way only with this set, which tests that poison fresh memory ask for
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        starts, restarts, status = [0] * shards, [0] * shards, [0] * shards

        def launch(k: int) -> subprocess.Popen[bytes]:
            command = [sys.executable, __file__, "--part", str(k), "--shards", str(shards)]
            command += ["--start", str(starts[k]), "--progress", str(work / f"{k}.at"), *files]
            with (work / f"{k}.log").open("ab") as out:
                return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)

        def note(k: int, text: str) -> None:
            with (work / f"{k}.log").open("a") as out:
                out.write(f"\n*** {text}\n")

        running = {k: launch(k) for k in range(shards)}
        while running:
            time.sleep(0.2)
            for k, process in list(running.items()):
                at = work / f"{k}.at"
                index, test = at.read_text().split(" ", 1) if at.exists() else ("-1", "no test yet")
                if process.poll() is None:
                    if time.time() > until:
                        process.kill()
                        process.wait()
                        note(k, f"OUT OF TIME in {test}; what comes behind it in this part was left out")
                        status[k] = status[k] or 1
                        del running[k]
                    continue
                del running[k]
                status[k] = status[k] or process.returncode
                died = process.returncode == LOST or process.returncode < 0
                if died:
                    note(k, f"PROCESS LOST (status {process.returncode}) in {test}")
                if died and restarts[k] < MAX_RESTARTS and int(index) >= starts[k]:
                    restarts[k] += 1
                    starts[k] = int(index) + 1
                    running[k] = launch(k)

        def log_of(k: int) -> str:
            text = (work / f"{k}.log").read_text(errors="replace")
            failures = work / f"{k}.failures"
            return text + (failures.read_text() if "\n*** " in text and failures.exists() else "")

        parts = [log_of(k) for k in range(shards)]
    text = "".join(f"===== part {k + 1} of {shards}: status {status[k]} =====\n{parts[k]}\n" for k in range(shards))
    lines = text.splitlines()
    heads = ("FAILED ", "ERROR ", "*** ", "SKIPPED ")
    inner = (" passed", " failed", " FAILED ", " ERROR ")
    summary = [line for line in lines if line.startswith(heads) or any(word in line for word in inner)]
    text = "\n".join(["===== summary =====", *summary, "", text])
    log.write_text(text if len(text) < LOG_BYTES else text[:LOG_BYTES] + "\n(cut)\n")
    print("\n".join(summary[-40:]))
    return 1 if any(status) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--until", type=float, default=math.inf)
    parser.add_argument("--log", type=Path, default=Path("tests.log"))
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        return run_part(Part(args.part, args.shards, args.start, args.progress), args.files)
    return run_all(args.files, args.shards, args.until, args.log)


if __name__ == "__main__":
    sys.exit(main())
