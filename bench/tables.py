"""Tables of README.md and docs/ made from bench/results/: every number in them comes from a committed row.

python bench/tables.py            rewrite the tables
python bench/tables.py --check    exit 1 if one is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from fastebm.bench.rows import RESULTS, read

ROOT = Path(__file__).parent.parent


def _read(name: str) -> list[dict[str, str]]:
    return read(RESULTS / name)


def _table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _span(rows: list[dict[str, str]], name: str, digits: int) -> str:
    """The range over rows, as one number if it rounds to one."""
    low, high = (f"{f(float(row[name]) for row in rows):.{digits}f}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


def digits() -> str:
    rows = _read("digits.csv")
    first = rows[0]
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
    table = _table(
        ["measure (held-out digits)", f"{len(rows)} seeds"],
        [[str(text), _span(rows, str(name), int(places))] for text, name, places in body],
    )
    return (
        f"{table}\n\nMeasured by `python bench/digits.py` on {first['cores']} cores of {first['cpu']}, "
        f"torch {first['torch']}, {first['date']}, commit {first['commit']} (`bench/results/digits.csv`)."
    )


def resources() -> str:
    rows = _read("resources.csv")
    first = rows[0]
    body = []
    for row in rows:
        if row["refused"]:
            continue
        rates = [f"{float(row[name]) / 1e9:.2f}" for name in ("issue_bound", "roofline")]
        body.append(
            [
                f"{row['architecture']}, {row['machine']}",
                row["case"],
                row["precision"],
                f"{row['regime']}, {row['block_chains']} x {row['block_dim']}, {row['warps']} warps",
                row["registers"],
                f"{int(row['shared_bytes']) // 1024} of {int(row['shared_limit']) // 1024}",
                f"{row['spill_loads']} + {row['spill_stores']}",
                f"{float(row['warp_instructions_per_chain_step']):.0f}",
                *rates,
                row["binds"],
            ]
        )
    table = _table(
        [
            "GPU",
            "energy",
            "precision",
            "tile (chains x dims)",
            "registers",
            "shared KiB",
            "spills (loads + stores)",
            "instructions a chain-step",
            "issue bound",
            "roofline",
            "binds",
        ],
        body,
    )
    refused: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["refused"]:
            refused.setdefault(row["architecture"], {}).setdefault(row["case"], []).append(row["precision"])
    lines = "\n".join(
        f"- {architecture}: " + "; ".join(f"{case} at {', '.join(precisions)}" for case, precisions in cases.items())
        for architecture, cases in refused.items()
    )
    return (
        f"{table}\n\nRefused, because a block has too little shared memory (there PyTorch computes the gradient, and "
        "one kernel does noise, update and clamp):"
        f"\n\n{lines}\n\nCompiled by triton {first['triton']}, {first['date']}, commit {first['commit']} "
        "(`bench/results/resources.csv`, which has more columns and the reason for each refusal). Rates are in "
        "1e9 chain-steps/s, computed and not measured."
    )


# file, marker, and what stands between <!-- marker --> and <!-- /marker -->
TABLES: list[tuple[str, str, Callable[[], str]]] = [
    ("README.md", "digits", digits),
    ("docs/performance.md", "resources", resources),
]


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for file, marker, make in TABLES:
        path = ROOT / file
        old = path.read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
        table = make().replace("\\", r"\\")
        new, found = pattern.subn(rf"\1{table}\n\2", old)
        if found != 1:
            raise SystemExit(f"{file} must hold the marks <!-- {marker} --> and <!-- /{marker} --> once, found {found}")
        if new != old:
            stale.append(f"{file}: {marker}")
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print("out of date, run python bench/tables.py:", *stale, sep="\n  ")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
