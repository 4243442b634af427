"""What a person sees while a command works, and the signals that end it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Progress", "Signals"]

# Without a terminal to draw a bar on: seconds until the first line of what goes on, and between later ones.
FIRST_LINE, LINE_EVERY = 2.0, 30.0


class Progress:
    """What goes on: a bar on a terminal, a line now and then elsewhere; both on stderr, of the first process."""

    def __init__(self, is_shown: bool = True) -> None:
        self.is_shown = is_shown
        self.is_terminal = is_shown and sys.stderr.isatty()
        self.bar: Any = None
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
        """A line that stays."""
        if self.is_shown:
            self.close()
            print(f"fastebm: {text}", file=sys.stderr, flush=True)

    def train(self, row: dict[str, float], steps: int) -> None:
        """A finished step of training, by its line of metrics.jsonl."""
        step = int(row["step"])
        self.nonfinite += int(row["nonfinite"])
        told = f"gap {row['energy_gap']:+.3f}, {row['chain_steps_per_second'] / 1e3:.0f}k chain-steps/s"
        if self.nonfinite > 0:
            told += f", {self.nonfinite} chains restarted as not finite"
        self.show("", step, steps, told, always=step == steps or self.words != "")

    def show(self, words: str, done: int = 0, total: int = 0, told: str = "", *, always: bool = False) -> None:
        """What goes on, and how much of it is done.

        total: 0 where nobody knows. told: what else there is to say. always: also where no line is due.
        """
        if not self.is_shown:
            return
        now = time.monotonic()
        if begins := words != self.words:
            self.close()
            self.words, self.first, self.started, self.next_line = words, done, now, now + FIRST_LINE
        if self.is_terminal:
            self._draw(words, done, total, told, begins)
        elif always or now >= self.next_line:
            self._line(now, done, total, told)
        elif begins:  # what does not come back here in time has its line all the same
            self.timer = threading.Timer(FIRST_LINE, self._line, (now, done, total, told))
            self.timer.daemon = True
            self.timer.start()

    def _line(self, now: float, done: int, total: int, told: str) -> None:
        self.timer.cancel()
        self.next_line = now + LINE_EVERY
        parts = [f"step {done}/{total}" if total else "", told]
        if self.first < done < total:
            parts.append(f"{(now - self.started) / (done - self.first) * (total - done):.0f} s left")
        print(": ".join(filter(None, (self.words, _joined(parts)))), file=sys.stderr, flush=True)

    def _draw(self, words: str, done: int, total: int, told: str, begins: bool) -> None:
        if total == 0:
            if begins:
                print(f"{words} ...", end="", file=sys.stderr, flush=True)
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=self.first, desc=words or None, unit="step", dynamic_ncols=True, leave=False
            )
        self.bar.set_postfix_str(told, refresh=False)
        self.bar.update(done - self.bar.n)


def _joined(parts: list[str]) -> str:
    """step 3/9: gap +1, 5 s left"""
    step, *others = parts
    return ": ".join(filter(None, (step, ", ".join(filter(None, others)))))


class Signals:
    """While in it, the first SIGINT and the first SIGTERM are only noted; a second one raises KeyboardInterrupt.

    torchrun hands a Ctrl-C that its processes had from the terminal to them once more, as SIGTERM.
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
            if handler is not None:  # None: it was not Python's
                signal.signal(number, handler)

    def arrived(self) -> bool:
        return self.number != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            raise KeyboardInterrupt
        self._seen.add(number)
        self.number = self.number or number
