"""``fastebm bench``: this machine, beside the loops that people write and the peers."""

from __future__ import annotations

import argparse
from typing import Any

from ..bench import run as suite

_WORDS = """Time fastebm, the loops that people write and the peers that are installed (pip install "fastebm[bench]") on
the same problems, each checked first. Without --cases a quick set, of some minutes."""


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
