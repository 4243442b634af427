"""``fastebm bench``: time fastebm on this machine against PyTorch loops and other packages."""

from __future__ import annotations

import argparse
from typing import Any

from ..bench import run as suite

_WORDS = """Time fastebm, plain PyTorch loops and the installed peers (pip install "fastebm[bench]") on the same
problems. Each is checked for correctness first. Without --cases a quick set runs, which takes some minutes."""


def add(commands: Any) -> None:
    command = commands.add_parser(
        "bench", help="time fastebm against PyTorch loops and peers", description=_WORDS,
        formatter_class=argparse.HelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=_bench)
    suite.add_arguments(command)


def _bench(arguments: argparse.Namespace) -> int:
    status: int = suite.run(arguments, quick=arguments.cases is None)
    return status
