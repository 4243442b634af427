"""What only a GPU can tell, in one visit to a bare machine; `bash bench/on_gpu.sh` runs it.

    python bench/gpu.py visit --stages NAME[=SECONDS] ...   under five minutes; writes into --out, by default runs/gpu
    python bench/gpu.py rows FOLDER [FOLDER ...]            gpu.csv and others from what visits brought back
    python bench/gpu.py launch NAME                         one small launch, for tools that watch a process

A visit may end at any moment, so each result is written at once, as a line of rows.jsonl: one JSON object with what was
measured, the job, its status, and machine, versions, commit and date. Without a CUDA device a visit writes nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from fastebm.bench import launches, rows
from fastebm.bench.gpu_visit import PROVENANCE, STAGES, visit
from fastebm.bench.gpu_workers import ROWS, Row, read
from fastebm.bench.race import beside_peers


def write_rows(folders: Sequence[Path], out: Path) -> int:
    """Write gpu.csv (shipped kernels, their times alone, the race), gpu_samplers.csv and gpu_sweep.csv.

    The last row of a job counts.
    """
    found: dict[tuple[str, str], Row] = {}
    for folder in folders:
        for row in read(folder / ROWS):
            found[row["what"], row["job"]] = row
    files = {"gpu": ("shipped", "alone", "timings"), "gpu_samplers": ("samplers",), "gpu_sweep": ("sweep",)}
    for name, kinds in files.items():
        kept = [row for kind in kinds for row in found.values() if row["what"] == kind]
        for case in {(row["energy"], row["n_chains"]) for row in kept if row["what"] == "timings" and "energy" in row}:
            timed = {
                (row["contestant"], row["precision"]): row for row in kept
                if row["what"] == "timings" and row["status"] == "ok" and (row["energy"], row["n_chains"]) == case
            }  # fmt: skip
            for key, columns in beside_peers({key: float(row["seconds"]) for key, row in timed.items()}).items():
                timed[key].update(rows.rounded(columns))
        if kept:
            common = [*PROVENANCE]
            last = [
                {k: v for k, v in row.items() if k not in common} | {k: row.get(k, "") for k in common} for row in kept
            ]
            rows.write(out / f"{name}.csv", last, common={})
            print(f"{out / name}.csv: {len(kept)} rows")
    tests = [row for row in found.values() if row["what"].startswith("tests")]
    for status in ("passed", "skipped", "failed", "error"):
        print(f"tests {status}: {sum(row['status'] == status for row in tests)}")
    return 0


def stage(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"no stage is called {name!r}; there are {', '.join(STAGES)}")
    return name, float(seconds or STAGES[name])


def main(argv: Sequence[str] | None = None) -> int:
    parser = rows.script(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_visit = commands.add_parser("visit", allow_abbrev=False)
    of_visit.add_argument(
        "--stages", nargs="+", type=stage, required=True, metavar="NAME[=SECONDS]", help=", ".join(STAGES)
    )
    rows.add_out(of_visit, "runs/gpu", committed=None)
    of_visit.add_argument("--budget", type=float, default=285.0, metavar="SECONDS", help="default: 285")
    of_visit.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU, kernels in the interpreter")
    of_rows = commands.add_parser("rows", allow_abbrev=False)
    of_rows.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="the --out of a visit")
    rows.add_out(of_rows)
    of_launch = commands.add_parser("launch", allow_abbrev=False)
    of_launch.add_argument("name", choices=[kernel.name for kernel in launches.SHIPPED])
    of_launch.add_argument("--size", choices=("small", "large"), default="small")
    args = parser.parse_args(argv)
    if args.command == "rows":
        for folder in args.folders:
            if not (folder / ROWS).exists():
                of_rows.error(f"{folder} holds no {ROWS}: name the folder that a visit wrote into (its --out)")
        return write_rows(args.folders, args.out)
    if args.command == "launch":
        kernel = next(kernel for kernel in launches.SHIPPED if kernel.name == args.name)
        launches.launch_once(kernel, *((70, 3) if args.size == "small" else (65_536, 10)))
        return 0
    if not (args.budget > 0 and math.isfinite(args.budget)):
        parser.error(f"--budget must be > 0 seconds, got {args.budget:g}")
    return visit(args.stages, args.out, args.budget, args.dry)


if __name__ == "__main__":
    sys.exit(main())
