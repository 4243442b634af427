"""Entry point of the command ``fastebm`` and of ``python -m fastebm``."""

import signal
import sys


def main() -> int:
    """Import the command, which takes seconds because of PyTorch, and run it."""
    # During the import, Ctrl-C ends the process at once instead of printing a traceback.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.stderr.isatty():
        print("loading PyTorch ...", end="", file=sys.stderr, flush=True)
    from .cli import main as command

    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, before)
    return command()


if __name__ == "__main__":
    sys.exit(main())
