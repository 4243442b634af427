"""The tables of README.md and docs/ from bench/results/: every number in them comes from a committed row.

python bench/tables.py --write    rewrite the tables of README.md and docs/: seconds
python bench/tables.py --check    write nothing; exit status 1 if a table is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from fastebm.bench import markdown, tables_cpu, tables_gpu
from fastebm.bench.markdown import none_yet, rows_of, source_of, spread, table_of
from fastebm.bench.rows import script

# -- bench/recipes.py --------------------------------------------------------------------------------------------


def digits() -> str:
    rows = [row for row in rows_of("recipes.csv") if row["data"] == "digits"]
    if not rows:
        return none_yet("recipes.py")
    body = [
        [
            "classifier two-sample accuracy, test digits against fresh samples (0.5 is perfect)",
            "two_sample_accuracy",
            2,
        ],
        ["AUROC of the energy, test digits against uniform noise", "auroc_uniform", 3],
        ["... against pixel-shuffled test digits", "auroc_shuffled", 3],
        ["... against test digits rotated by 90°", "auroc_rotated", 3],
        ["... against inverted test digits", "auroc_inverted", 3],
        ["classes present among 1,000 fresh samples (k-NN)", "classes_present", 0],
        ["whole job, seconds", "wall_seconds", 0],
    ]
    table = table_of(
        ["measure (held-out digits)", f"{len(rows)} seeds"],
        [[str(text), spread(rows, str(name), int(places))] for text, name, places in body],
    )
    return f"{table}\n\n{source_of(rows, 'python bench/recipes.py digits', 'recipes.csv')}"


def recipes() -> str:
    """Every data set, seed 0."""
    rows = [row for row in rows_of("recipes.csv") if row["seed"] == "0"]
    if not rows:
        return none_yet("recipes.py")
    body = []
    for row in rows:
        known = {k.removeprefix("auroc_"): v for k, v in row.items() if k.startswith("auroc_") and v}
        aurocs = ", ".join(f"{name.replace('_', ' ')} {float(value):.3f}" for name, value in known.items())
        numbers = [
            f"{float(row['two_sample_accuracy']):.2f}",
            aurocs,
            f"{float(row['wall_seconds']):.0f}",
            row["threads"],
        ]
        body.append([row["data"], *numbers])
    headings = ["data", "two-sample accuracy", "AUROC of the energy, held-out rows against", "seconds", "threads"]
    return f"{table_of(headings, body)}\n\n{source_of(rows, 'python bench/recipes.py', 'recipes.csv')}"


# -- bench/partition.py ------------------------------------------------------------------------------------------


def partition() -> str:
    rows = rows_of("partition.csv")
    if not rows:
        return none_yet("partition.py")
    first = rows[0]
    columns = ("near", "covered", "bracketed")
    errors = ("mean_error", "max_error", "standard_error")
    body = [
        [row["law"], row["dim"], *(row[name] for name in columns), *(f"{float(row[name]):.3f}" for name in errors)]
        + [f"{float(row['ess']):.0f}", f"{float(row['seconds']):.1f}"]
        for row in sorted(rows, key=lambda row: (int(row["dim"]), row["law"]))
    ]
    headings = ["law", "dims", "within 0.05 nats", "within its 95 % interval", "truth between the bounds"]
    headings += ["mean error", "largest", "standard error", "ESS", "seconds"]
    return (
        f"{table_of(headings, body)}\n\nOf {first['seeds']} seeds; {int(first['chains']):,} chains, "
        f"{int(first['temperatures']):,} temperatures, one thread. "
        f"{source_of(rows, 'python bench/partition.py', 'partition.csv')}"
    )


# -- the command -------------------------------------------------------------------------------------------------

# file, marker, and what stands between <!-- marker --> and <!-- /marker -->
TABLES: list[tuple[str, str, Callable[[], str]]] = [
    ("README.md", "digits", digits),
    ("README.md", "gpu", tables_gpu.gpu),
    ("README.md", "speed", tables_cpu.speed),
    ("docs/training.md", "recipes", recipes),
    ("docs/performance.md", "resources", tables_gpu.resources),
    ("docs/performance.md", "precision", tables_gpu.precision),
    ("docs/performance.md", "steps", tables_cpu.steps),
    ("docs/performance.md", "cores", tables_cpu.cores),
    ("docs/performance.md", "breakdown", tables_cpu.breakdown),
    ("docs/performance.md", "breakdown-threads", tables_cpu.breakdown_threads),
    ("docs/performance.md", "breakdown-pools", tables_cpu.breakdown_pools),
    ("docs/performance.md", "breakdown-first-calls", tables_cpu.breakdown_first_calls),
    ("docs/performance.md", "collapsed", tables_cpu.collapsed),
    ("docs/performance.md", "training", tables_cpu.training),
    ("docs/performance.md", "pool", tables_cpu.pool),
    ("docs/performance.md", "efficiency", tables_cpu.efficiency),
    ("docs/performance.md", "compilation", tables_cpu.compilation),
    ("docs/samplers.md", "bias", tables_cpu.bias),
    ("docs/samplers.md", "sampling", tables_cpu.sampling),
    ("docs/samplers.md", "partition", partition),
    ("docs/samplers.md", "sampling-parts", tables_cpu.sampling_parts),
    ("docs/performance.md", "gpu-kernels", tables_gpu.gpu_kernels),
    ("docs/performance.md", "gpu-race", tables_gpu.gpu_race),
    ("docs/performance.md", "gpu-sweep", tables_gpu.gpu_sweep),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    # required: the bare command must not rewrite files by surprise
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--write", action="store_true", help="rewrite the tables")
    either.add_argument("--check", action="store_true", help="name the tables that are out of date, and write nothing")
    arguments = parser.parse_args(argv)
    stale = []
    for file, marker, make in TABLES:
        path = markdown.ROOT / file
        old = path.read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
        text = make().replace("\\", r"\\")
        new, found = pattern.subn(rf"\1{text}\n\2", old)
        if found != 1:
            raise SystemExit(f"{file} must hold the marks <!-- {marker} --> and <!-- /{marker} --> once, found {found}")
        if new != old:
            stale.append(f"{file}: {marker}")
            if arguments.write:
                path.write_text(new, encoding="utf-8")
    if arguments.check and stale:
        print("out of date, run python bench/tables.py --write:", *stale, sep="\n  ")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
