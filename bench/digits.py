"""The main job, measured: `fastebm train digits` for a few seeds, in processes of their own.

    python bench/digits.py [--seeds 0 1 2] [--out bench/results/digits.csv]

Writes one row a seed: the held-out measures of summary.json and the whole process' wall-clock seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastebm.bench import rows

MEASURES = (
    "auroc_uniform",
    "auroc_shuffled",
    "auroc_rotated",
    "auroc_inverted",
    "two_sample_accuracy",
    "classes_present",
    "chain_steps",
    "seconds",
    "backend",
    "threads",
)


def run(seed: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "fastebm", "train", "digits", "--seed", str(seed), "--out", str(out)]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        wall = time.perf_counter() - started
        summary = json.loads((out / "summary.json").read_text())
    least = min(summary["class_shares"])
    return {
        "seed": seed,
        **{name: summary[name] for name in MEASURES},
        "least_class_share": least,
        "wall_seconds": round(wall, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "digits.csv")
    args = parser.parse_args()
    results = [run(seed) for seed in args.seeds]
    rows.write(args.out, results)
    for row in results:
        print({key: row[key] for key in ("seed", "two_sample_accuracy", "least_class_share", "wall_seconds")})


if __name__ == "__main__":
    main()
