"""Progress of a command on the terminal, and the signals that end it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "Signals"]

# Without a terminal there are lines in place of a bar: seconds until the first line, and between later ones.
FIRST_LINE, LINE_EVERY = 2.0, 30.0


class Progress:
    """Shows what the command does, on stderr: a bar on a terminal, otherwise a line now and then.

    is_shown: false on all processes but the first.
    """

    def __init__(self, is_shown: bool = True) -> None:
        self.is_shown = is_shown
        self.is_terminal = is_shown and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        self.words: str | None = None
        self.nonfinite = self.first = 0
        self.started = self.next_line = 0.0
        self.timer = threading.Timer(0.0, lambda: None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.timer.cancel()
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self.is_shown:
            self.close()
            print(f"fastebm: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def noting_warnings(self) -> Iterator[None]:
        """Warnings become notes."""
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, *_, **__: self.note(str(message))
            yield

    def train(self, row: dict[str, float], steps: int) -> None:
        """Show a finished step of training. row: its line of metrics.jsonl."""
        step = int(row["step"])
        self.nonfinite += int(row["nonfinite"])
        shown = "energy_gap" if "energy_gap" in row else "loss"
        speed = "chain_steps_per_second" if "chain_steps_per_second" in row else "rows_per_second"
        work = speed.removesuffix("_per_second").replace("_", "-")
        detail = f"{shown.removeprefix('energy_')} {row[shown]:+.3f}, {row[speed] / 1e3:.0f}k {work}/s"
        if self.nonfinite > 0:
            detail += f", {self.nonfinite} chains started again (not finite)"
        self.show("", step, steps, detail, always=step == steps or self.words != "")

    def show(self, words: str, done: int = 0, total: int = 0, detail: str = "", *, always: bool = False) -> None:
        """Show what is being done, and how much of it is finished.

        total: 0 if unknown. detail: what else to show. always: print a line even if none is due.
        """
        if not self.is_shown:
            return
        now = time.monotonic()
        if begins := words != self.words:
            self.close()
            self.words, self.first, self.started, self.next_line = words, done, now, now + FIRST_LINE
        if self.is_terminal:
            self._draw(words, done, total, detail, begins)
        elif always or now >= self.next_line:
            self._line(now, done, total, detail)
        elif begins:  # a timer prints the first line if there is no other call by then
            self.timer = threading.Timer(FIRST_LINE, self._line, (now, done, total, detail))
            self.timer.daemon = True
            self.timer.start()

    def _line(self, now: float, done: int, total: int, detail: str) -> None:
        self.timer.cancel()
        self.next_line = now + LINE_EVERY
        parts = [f"step {done}/{total}" if total else "", detail]
        if self.first < done < total:
            parts.append(f"{(now - self.started) / (done - self.first) * (total - done):.0f} s left")
        print(": ".join(filter(None, (self.words, _joined(parts)))), file=sys.stderr, flush=True)

    def _draw(self, words: str, done: int, total: int, detail: str, begins: bool) -> None:
        if total == 0:
            if begins:
                print(f"{words} ...", end="", file=sys.stderr, flush=True)
            return
        if self.bar is None:
            self.bar = tqdm(
                total=total, initial=self.first, desc=words or None, unit="step", dynamic_ncols=True, leave=False
            )
        self.bar.set_postfix_str(detail, refresh=False)
        self.bar.update(done - self.bar.n)


def _joined(parts: list[str]) -> str:
    """step 3/9: gap +1, 5 s left"""
    step, *others = parts
    return ": ".join(filter(None, (step, ", ".join(filter(None, others)))))


class Signals:
    """Context in which the first SIGINT and the first SIGTERM are only noted. A second one raises KeyboardInterrupt.

    They are counted apart because on Ctrl-C torchrun also sends SIGTERM to its processes.
    """

    def __init__(self) -> None:
        self.number = 0
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: it was not set from Python
                signal.signal(number, handler)

    def arrived(self) -> bool:
        return self.number != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            raise KeyboardInterrupt
        self._seen.add(number)
        self.number = self.number or number
