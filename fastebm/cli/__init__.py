"""The command ``fastebm``, one file per subcommand.

Exit status: 0 done; 1 the computation failed; 2 bad input; 128 + n ended by signal n. Every error is a single line.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import torch

from . import bench, evaluate, info, sample, score, train
from .options import Parser, rank, version

__all__ = ["main"]

_WORDS = "Langevin sampling and training of energy-based models in PyTorch."
_OUT_OF_MEMORY = "out of memory: take fewer chains (-n, --batch-size, --pool-size) or smaller --hidden-sizes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = Parser(prog="fastebm", description=_WORDS)
    parser.add_argument("--version", action="version", version=f"fastebm {version('fastebm')}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for command in (train, sample, score, evaluate, info, bench):
        command.add(commands)
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            commands.choices[arguments.command].refuse(unknown)
        status: int = arguments.run(arguments)
        return status
    except (torch.OutOfMemoryError, MemoryError):
        return _fail(_OUT_OF_MEMORY, 1)
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except RuntimeError as error:  # chains that exploded
        return _fail(_OUT_OF_MEMORY if "can't allocate memory" in str(error) else error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)


def _fail(error: BaseException | str, status: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    who = "fastebm" if rank() == 0 else f"fastebm (process {rank()})"
    print(f"{who}: error: {' '.join(text.split())}", file=sys.stderr)
    return status
