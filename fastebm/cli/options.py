"""What the commands share: the parser and its errors, types of arguments, and the number of threads."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..backends.choose import BACKENDS
from ..data.sets import SETS
from ..threads import threads
from ..words import did_you_mean
from .progress import Progress

__all__ = [
    "Parser",
    "Threads",
    "add_device",
    "add_threads",
    "check_writable",
    "count",
    "flat",
    "need",
    "on_threads",
    "positive",
    "rank",
    "sizes",
    "version",
]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with a suggestion for a misspelled name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.exit(2, f"fastebm: error: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with an error about arguments that this command does not have."""
        option = next((word.split("=")[0] for word in unknown if word.startswith("-")), "")
        near = did_you_mean(option, self._option_string_actions) if option else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")


def add_device(command: argparse.ArgumentParser, default: str) -> None:
    """Add --device and --backend."""
    note = " (default: auto)" if default == argparse.SUPPRESS else ""
    command.add_argument("--device", default=default, help=f'"auto", "cpu", "cuda", "cuda:1", ...{note}')
    command.add_argument(
        "--backend", choices=BACKENDS, default=default, help=f"implementation that runs the chains{note}"
    )


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads", type=positive, default=argparse.SUPPRESS, metavar="N",
        help="CPU threads (default: all, or fewer if these are faster in a measurement of the first steps, as on a "
        "busy machine)",
    )  # fmt: skip


@contextmanager
def on_threads(n: int | None) -> Iterator[None]:
    """Run PyTorch with n threads; None: with as many as before."""
    cores = os.cpu_count() or 1
    if n is not None and n > cores:
        raise ValueError(f"--threads must be at most {cores}, the cores of this machine, got {n}")
    with threads(n or torch.get_num_threads()):
        yield


# Time the threads again if the median of the last _N_STEPS steps takes _SLOW times as long as when they were timed.
_SLOW, _N_STEPS = 2.5, 10


class Threads:
    """Chooses the number of CPU threads for a long computation, and chooses again if its steps become slow.

    Args:
        measure: takes the number of all threads, and returns seconds per step by number (``threads.fastest``).
        progress: where a choice of fewer threads is noted.
    """

    def __init__(self, measure: Callable[[int], dict[int, float]], progress: Progress) -> None:
        self._measure, self._progress = measure, progress
        self._all = torch.get_num_threads()
        self._recent: deque[float] = deque(maxlen=_N_STEPS)
        self._pause = 2.0  # seconds until the next measurement; doubled each time
        self._choose()

    def _choose(self) -> None:
        seconds = self._measure(self._all)
        self.n, everyone = next(iter(seconds)), seconds[self._all]
        self._expected, self._measured_at = seconds[self.n], time.monotonic()
        torch.set_num_threads(self.n)
        if self.n < self._all:
            self._progress.note(
                f"{self.n} thread{'s' * (self.n > 1)} of {self._all}, because with {self._all} a step takes "
                f"{everyone / self._expected:.1f} times as long on this machine now (--threads sets it)"
            )

    def watch(self, seconds: float) -> None:
        """Call after each step with the seconds that it took."""
        self._recent.append(seconds)
        if len(self._recent) < _N_STEPS or time.monotonic() < self._measured_at + self._pause:
            return
        if self.n > 1 and statistics.median(self._recent) > _SLOW * self._expected:
            self._pause *= 2
            self._recent.clear()
            self._choose()


def count(text: str) -> int:
    """An int >= 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be an int in [0, 2**32), got {text!r}")
    return value


def positive(text: str) -> int:
    """An int >= 1."""
    if (value := count(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return value


def sizes(text: str) -> list[int]:
    """Widths: "256" or "256,128"."""
    if text in SETS:  # the option has swallowed the data set after it
        raise argparse.ArgumentTypeError(f"takes numbers: name the data set before it, as in fastebm train {text} ...")
    return [positive(part) for part in text.split(",")]


def flat(sizes: list[list[int]]) -> tuple[int, ...]:
    return tuple(size for part in sizes for size in part)


def rank() -> int:
    """The rank of this process under torchrun, or 0. Only the first process prints; errors are printed by all."""
    return int(os.environ.get("RANK", "0"))


def check_writable(out: Path, suffixes: Sequence[str]) -> None:
    """Refuse an --out that can't be written, before any work is done."""
    if out.suffix.lower() not in suffixes:
        *others, last = suffixes
        names = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"--out must end in {names}, got {out}{did_you_mean(out.suffix, suffixes)}")
    folder = out.parent
    if not folder.is_dir():
        raise ValueError(f"--out can't be written: {out}, because there is no folder {folder}: make it first")
    if out.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if out.is_dir() else f"you may not write to the folder {folder}"
        raise ValueError(f"--out can't be written: {out}, because {why}")


def version(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "not installed"


def need(*modules: str) -> None:
    """Refuse a command whose packages are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'this command needs {", ".join(missing)}: pip install "fastebm[cli]"')
