"""The command ``fastebm``, and ``python -m fastebm``."""

import signal
import sys


def main() -> int:
    """Import the command, which takes seconds (PyTorch), and run it."""
    # Until then Ctrl-C ends the process at once, rather than with a traceback of whatever was being imported.
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
