"""How well objectives learn: `fastebm train` and `fastebm evaluate` by objective, one row per run.

    python bench/quality.py --list                     the runs of each group
    python bench/quality.py planes                     every objective on moons and checkerboard: an hour
    python bench/quality.py planes-best                the three best on all planes, with three seeds: half an hour
    python bench/quality.py digits mnist jem           images

Writes quality.csv into --out. Rows have the command's options, the measures of evaluation.json and summary.json that
the group shows, and the wall-clock seconds of training as a process. Rows of the same options and seed in the file are
replaced.

- log_likelihood: of held-out rows, in nats of states. In the plane Z is by quadrature, and a noise-conditional energy
  has the likelihood of its probability-flow ODE. kernel_density: that of a density estimate on all training rows, with
  a cross-validated bandwidth.
- two_sample: accuracy of a random forest at telling samples from held-out rows; 0.5 is best.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastebm.bench import rows

from fastebm.data.sets import load
from fastebm.data.toys import TOYS
from fastebm.evaluate.likelihood import kernel_density

# All but those that need classes, and InfoNCE, which has energies of pairs only.
OF_PLANES = (
    "pcd", "cd", "hinge", "cooperative", "diffusion_recovery", "dsm", "multi_dsm", "vp_dsm", "ssm", "esm",
    "energy_discrepancy", "nce", "ranking_nce", "flow_contrastive",
)  # fmt: skip
BEST = ("nce", "ranking_nce", "energy_discrepancy")

# Measures of evaluation.json by name, each as (column, measure, value).
COLUMNS = (
    ("two_sample", "two_sample", "accuracy"),
    ("log_likelihood", "quadrature", "mean"),
    ("log_likelihood", "flow", "mean"),
    ("likelihood_lower", "likelihood", "lower"),
    ("likelihood_upper", "likelihood", "upper"),
    ("bits_per_dim_upper", "likelihood", "bits_per_dim_upper"),
    ("bits_per_dim", "flow", "bits_per_dim"),
    ("frechet_distance", "judge", "judge_frechet_distance"),
    ("frechet_distance_of_train", "judge", "judge_frechet_distance_of_train"),
    ("samples_of_their_class", "judge", "judge_accuracy_of_samples"),
    ("accuracy", "calibration", "accuracy"),
    ("calibration_error", "calibration", "calibration_error"),
    ("accuracy_linf_0.1", "robustness", "accuracy_linf_0.1"),
    ("accuracy_l2_0.5", "robustness", "accuracy_l2_0.5"),
)


@dataclass(frozen=True)
class Case:
    """A run: `fastebm train data --objective objective --seed seed`, and further options. measures: of evaluate."""

    data: str
    objective: str
    measures: tuple[str, ...]
    seed: int = 0
    options: tuple[str, ...] = ()


PLANE, IMAGES = ("two_sample", "quadrature", "flow"), ("two_sample", "judge", "likelihood", "flow")
GROUPS: dict[str, list[Case]] = {
    "planes": [Case(data, objective, PLANE) for objective in OF_PLANES for data in ("moons", "checkerboard")],
    "planes-best": [Case(data, objective, PLANE, seed) for objective in BEST for data in TOYS for seed in range(3)],
    "digits": [Case("digits", objective, IMAGES) for objective in ("pcd", "multi_dsm", "diffusion_recovery")],
    "mnist": [
        Case("mnist5k", "pcd", IMAGES),
        Case("mnist5k", "pcd", IMAGES, options=("--model", "conv")),
        Case("mnist5k", "multi_dsm", IMAGES),
        Case("mnist5k", "diffusion_recovery", IMAGES),
    ],
    "jem": [
        Case("digits", "jem", (*IMAGES, "detection", "calibration", "robustness")),
        Case("digits", "jem", ("detection", "calibration", "robustness"), options=("--set", "objective.weight=0")),
    ],
}


def measure(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        fastebm = [sys.executable, "-m", "fastebm"]
        options = ["--objective", case.objective, "--seed", str(case.seed), *case.options]
        started = time.perf_counter()
        subprocess.run([*fastebm, "train", case.data, *options, "--out", str(out)], check=True)
        wall = time.perf_counter() - started
        subprocess.run([*fastebm, "evaluate", str(out), "--measures", *case.measures], check=True)
        summary = json.loads((out / "summary.json").read_text())
        measures = json.loads((out / "evaluation.json").read_text())["measures"]
        config = json.loads((out / "config.json").read_text())
    found = {name: measures[of][value] for name, of, value in COLUMNS if value in measures.get(of, {})}
    found |= {k: v for k, v in measures.get("detection", {}).items() if k.startswith("auroc")}
    row = {"data": case.data, "objective": case.objective, "options": " ".join(case.options), "seed": case.seed}
    row |= {name: config[name] for name in ("model", "sampler", "steps")} | found
    if case.data in TOYS:
        row["kernel_density"] = kde(case.data, case.seed)
    return row | {"threads": summary["threads"], "wall_seconds": wall}


@cache
def kde(name: str, seed: int) -> float:
    data = load(name, seed)
    densities, _ = kernel_density(data.train.numpy(), data.test.numpy(), max_rows=len(data.train), seed=seed)
    return float(densities.mean())


def listed() -> Iterator[str]:
    for group, cases in GROUPS.items():
        yield f"{group}: {len(cases)} runs"
        for case in cases:
            yield " ".join(["   ", case.data, case.objective, f"seed {case.seed}", *case.options])


def main(argv: Sequence[str] | None = None) -> int:
    parser = rows.script(__doc__)
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS], default=[], metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--objectives", nargs="+", metavar="NAME", help="only runs of these objectives")
    parser.add_argument("--list", action="store_true", help="print the runs of each group, and do nothing")
    rows.add_out(parser)
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(listed()))
        return 0
    common = rows.provenance()
    for group in arguments.groups or GROUPS:
        for case in GROUPS[group]:
            if arguments.objectives and case.objective not in arguments.objectives:
                continue
            row = rows.rounded(measure(case))
            print(row, flush=True)
            rows.replace(arguments.out / "quality.csv", [{**row, **common}], ("data", "objective", "options", "seed"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
