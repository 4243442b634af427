"""`fastebm train` on each data set with its defaults, measured: one process and one row per run.

    python bench/recipes.py                         every set once, digits with three seeds: 25 minutes
    python bench/recipes.py moons --seeds 0 1 2     a minute or two per run; mnist5k takes seven

Writes recipes.csv into --out. Rows have the held-out measures of summary.json, the AUROC of `fastebm score` on a CSV of
held-out rows and known outliers, and the wall-clock seconds of `fastebm train` as a process. Rows of the same set and
seed in the file are replaced, others stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastebm.bench import rows

from fastebm.data.sets import SETS, load
from fastebm.evaluate import auroc

SEEDS = {"digits": (0, 1, 2)}


def run(name: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "fastebm", "train", name, "--seed", str(seed), "--out", str(out)]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        wall = time.perf_counter() - started
        summary = json.loads((out / "summary.json").read_text())
        scored = auroc_of_score(name, seed, out)
    measures = {k: v for k, v in summary.items() if k.startswith("auroc")}
    if "class_shares" in summary:
        measures |= {"classes_present": summary["classes_present"], "least_class_share": min(summary["class_shares"])}
    measured = ("two_sample_accuracy", "chain_steps", "backend", "path", "threads", "seconds")
    return {"data": name, "seed": seed, **{k: summary[k] for k in measured}, "wall_seconds": wall, **measures, **scored}


def auroc_of_score(name: str, seed: int, out: Path) -> dict[str, float]:
    """`fastebm score` on held-out rows and outliers, as a CSV in the units of the data: by name of the outliers."""
    data, measures = load(name, seed), {}
    for kind, outliers in getattr(data, "outliers", {}).items():
        x = data.info.to_data(torch.cat([data.test, outliers]))
        frame = pd.DataFrame(x, columns=data.info.columns)
        frame.to_csv(out.parent / "rows.csv", index=False)
        command = [sys.executable, "-m", "fastebm", "score", str(out), str(out.parent / "rows.csv")]
        subprocess.run([*command, "--out", str(out.parent / "scores.csv")], check=True)
        energies = pd.read_csv(out.parent / "scores.csv").set_index("row")["energy"]
        n = len(data.test)
        measures[f"auroc_{kind}_by_score"] = auroc(energies[energies.index < n], energies[energies.index >= n])
    return measures


def main(argv: Sequence[str] | None = None) -> int:
    parser = rows.script(__doc__)
    parser.add_argument("data", nargs="*", choices=[[], *SETS], default=[], metavar="DATASET", help=", ".join(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: 0, for digits 0 1 2")
    rows.add_out(parser)
    arguments = parser.parse_args(argv)
    common = rows.provenance()
    for name in arguments.data or SETS:
        for seed in arguments.seeds or SEEDS.get(name, (0,)):
            row = rows.rounded(run(name, seed))
            print({k: row[k] for k in ("data", "seed", "two_sample_accuracy", "wall_seconds")}, flush=True)
            rows.replace(arguments.out / "recipes.csv", [{**row, **common}], ("data", "seed"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
