"""`fastebm train` on each data set as it comes, measured: in processes of their own, one row a run.

    python bench/recipes.py                         every set once, digits with three seeds
    python bench/recipes.py moons --seeds 0 1 2

Rows have the held-out measures of summary.json and the whole process' wall-clock seconds. Those of other sets and seeds
in the file stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastebm.bench import rows

from fastebm.data import SETS

SEEDS = {"digits": (0, 1, 2)}


def run(name: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "fastebm", "train", name, "--seed", str(seed), "--out", str(out)]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        wall = time.perf_counter() - started
        summary = json.loads((out / "summary.json").read_text())
    measures = {k: v for k, v in summary.items() if k.startswith("auroc")}
    if "class_shares" in summary:
        measures |= {"classes_present": summary["classes_present"], "least_class_share": min(summary["class_shares"])}
    told = ("two_sample_accuracy", "chain_steps", "backend", "path", "threads", "seconds")
    return {"data": name, "seed": seed, **{k: summary[k] for k in told}, "wall_seconds": wall, **measures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", choices=[[], *SETS], default=[], metavar="DATASET")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "recipes.csv")
    arguments = parser.parse_args()
    common = rows.provenance()
    for name in arguments.data or SETS:
        for seed in arguments.seeds or SEEDS.get(name, (0,)):
            row = rows.rounded(run(name, seed))
            print({k: row[k] for k in ("data", "seed", "two_sample_accuracy", "wall_seconds")}, flush=True)
            rows.replace(arguments.out, [{**row, **common}], ("data", "seed"))


if __name__ == "__main__":
    main()
