"""Self-sufficient result rows: each names its machine, versions, commit and date.

Scripts write them into runs/, which git ignores, unless --out names another folder.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# resolved: the folder may be reached through a link (on_gpu.sh)
RESULTS = Path(__file__).resolve().parent / "results"


def script(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a script, with the script's docstring as its help."""
    # no abbreviations: a mistyped option must not start a run
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_out(
    parser: argparse._ActionsContainer, default: str = "runs/bench", committed: str | None = "bench/results"
) -> None:
    """Add ``--out FOLDER``, the same in every script. committed: the folder of the files that git tracks, if any."""
    tracked = f"; {committed} holds the committed files" if committed else ""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        metavar="FOLDER",
        help=f"where to write (default: {default}{tracked})",
    )


def provenance(*peers: str) -> dict[str, Any]:
    """Machine, versions (of ``peers`` too), commit and date of this run.

    COMMIT in the environment names the commit: a copy of the tree may lie outside any checkout, or inside another one.
    """
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "fastebm", *peers)},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write(path: Path, rows: Iterable[Mapping[str, Any]], common: Mapping[str, Any] | None = None) -> None:
    """Write rows as CSV. Each has its own columns, then ``common``, by default the provenance of this run.

    Rows may have different columns. If a row lacks a column, its cell is empty.
    """
    common = provenance() if common is None else common
    rows = [{**row, **common} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in common))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, *common], lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def replace(path: Path, rows: Iterable[Mapping[str, Any]], same: tuple[str, ...]) -> None:
    """Merge rows into a file: they replace the rows with the same values in the columns ``same``.

    Rows have their provenance already.
    """

    def grouped(some: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
        groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for row in some:
            groups.setdefault(tuple(str(row.get(name)) for name in same), []).append(row)
        return groups

    groups = grouped(read(path) if path.exists() else []) | grouped(rows)  # a group that is in the file keeps its place
    write(path, [row for group in groups.values() for row in group], common={})


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with floats of six digits: no clock is more precise."""
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def most_threads(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """For each case and device, only the rows with the most threads."""
    rows = list(rows)
    most: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["case"], row["device"]
        most[key] = max(most.get(key, 0), int(row["threads"]))
    return [row for row in rows if int(row["threads"]) == most[row["case"], row["device"]]]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        # virtual machines may hide the model's name; family and model number identify the generation
        return f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # fastebm may run from a checkout that is not installed
        return __import__(name).__version__ if name == "fastebm" else "absent"


def _commit() -> str:
    """The commit, with a + if tracked files other than results differ from it; "unknown" outside a checkout."""
    if named := os.environ.get("COMMIT"):
        return named
    here = RESULTS.parent.parent
    if not (here / "pyproject.toml").exists():  # installed: a repository around it would be a different one
        return "unknown"
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"]
        changed = subprocess.run(status, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")
