"""What the commands share: the parser and its words for mistakes, kinds of arguments, and small helpers."""

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
    """Errors are one line, with the name that was probably meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.exit(2, f"fastebm: error: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """An error for words that are no arguments of this command."""
        option = next((word.split("=")[0] for word in unknown if word.startswith("-")), "")
        near = did_you_mean(option, self._option_string_actions) if option else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")


def add_device(command: argparse.ArgumentParser, default: str) -> None:
    """--device and --backend."""
    note = " (default: auto)" if default == argparse.SUPPRESS else ""
    command.add_argument("--device", default=default, help=f'"auto", "cpu", "cuda", "cuda:1", ...{note}')
    command.add_argument("--backend", choices=BACKENDS, default=default, help=f"what advances the chains{note}")


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads", type=positive, default=argparse.SUPPRESS, metavar="N",
        help="CPU threads (default: all, or fewer where a measurement of the first steps finds these faster, as on a "
        "busy machine)",
    )  # fmt: skip


@contextmanager
def on_threads(n: int | None) -> Iterator[None]:
    """PyTorch's operations use n threads; None: as many as before."""
    cores = os.cpu_count() or 1
    if n is not None and n > cores:
        raise ValueError(f"--threads must be at most {cores}, the cores of this machine, got {n}")
    with threads(n or torch.get_num_threads()):
        yield


# A step is slow if it takes so many times what it took when the threads were timed: the median of so many steps.
_SLOW, _STEPS = 2.5, 10


class Threads:
    """The number of CPU threads of a long computation: timed before it, and again if its steps have become slow.

    Args:
        measure: takes the number of all threads; returns seconds of a step by number (``threads.fastest``).
        progress: fewer threads than all are said there.
    """

    def __init__(self, measure: Callable[[int], dict[int, float]], progress: Progress) -> None:
        self._measure, self._progress = measure, progress
        self._all = torch.get_num_threads()
        self._recent: deque[float] = deque(maxlen=_STEPS)
        self._pause = 2.0  # seconds between two measurements, twice as many each time
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
        """Told what a step took."""
        self._recent.append(seconds)
        if len(self._recent) < _STEPS or time.monotonic() < self._measured_at + self._pause:
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
    if text in SETS:  # the option takes all words that follow
        raise argparse.ArgumentTypeError(f"takes numbers: name the data set before it, as in fastebm train {text} ...")
    return [positive(part) for part in text.split(",")]


def flat(sizes: list[list[int]]) -> tuple[int, ...]:
    return tuple(size for part in sizes for size in part)


def rank() -> int:
    """Of torchrun's processes; only the first one talks, but for errors."""
    return int(os.environ.get("RANK", "0"))


def check_writable(out: Path, suffixes: Sequence[str]) -> None:
    """An error if --out can't be written, before any work."""
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
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'this command needs {", ".join(missing)}: pip install "fastebm[cli]"')
