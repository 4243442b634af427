"""Runs of the command for tests: the options of a tiny run, and the line that a bad command ends with."""

from fastebm.cli import main
from fastebm.train import checkpoint

SMALL = ["--steps", "3", "--batch-size", "16", "--hidden-sizes", "8", "4", "--device", "cpu"]
SMALL += ["--set", "fresh_steps=5", "n_fresh=30", "--threads", "1"]


def newest(run):
    return checkpoint.Saved(checkpoint.newest(run / "checkpoints"))


def error(capsys, *arguments, status=2):
    """The line that a bad command ends with on stderr; there is none but of progress before it."""
    try:
        assert main([str(a) for a in arguments]) == status
    except SystemExit as exit:  # argparse's
        assert exit.code == status  # noqa: PT017
    printed = capsys.readouterr()
    assert printed.out == ""
    *progress, line = printed.err.splitlines()
    assert line.startswith("fastebm: error: ")
    assert all(told.startswith(("reading ", "timing ")) for told in progress)  # on a busy machine
    return line
