"""Tables of README.md and docs/ made from bench/results/: every number in them comes from a committed row.

python bench/tables.py            rewrite the tables
python bench/tables.py --check    exit 1 if one is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from fastebm.bench.rows import RESULTS, most_threads, read

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


def _made(rows: list[dict[str, str]], command: str, name: str) -> str:
    first = rows[0]
    runs = "; ".join(dict.fromkeys(f"{row['date']}, commit {row['commit']}" for row in rows))
    machine = f"{first['cores']} cores of {first['cpu']}"
    return f"Measured by `{command}` on {machine}, torch {first['torch']}, {runs} (`bench/results/{name}`)."


def digits() -> str:
    rows = [row for row in _timed("recipes.csv") if row["data"] == "digits"]
    if not rows:
        return "No rows are committed yet: `python bench/recipes.py` makes them."
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
    return f"{table}\n\n{_made(rows, 'python bench/recipes.py digits', 'recipes.csv')}"


def recipes() -> str:
    """Every data set, seed 0."""
    rows = [row for row in _timed("recipes.csv") if row["seed"] == "0"]
    if not rows:
        return "No rows are committed yet: `python bench/recipes.py` makes them."
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
    return f"{_table(headings, body)}\n\n{_made(rows, 'python bench/recipes.py', 'recipes.csv')}"


def resources() -> str:
    rows = _read("resources.csv")
    cases = [(row["architecture"], row["case"], row["precision"]) for row in rows]
    # both versions of triton beside each other
    rows.sort(key=lambda row: (cases.index((row["architecture"], row["case"], row["precision"])), row["triton"]))
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
                row["triton"],
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
            "triton",
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
    refused: dict[str, dict[str, dict[str, None]]] = {}  # the inner keys are the precisions, each once
    for row in rows:
        if row["refused"]:
            refused.setdefault(row["architecture"], {}).setdefault(row["case"], {})[row["precision"]] = None
    lines = "\n".join(
        f"- {architecture}: " + "; ".join(f"{case} at {', '.join(precisions)}" for case, precisions in cases.items())
        for architecture, cases in refused.items()
    )
    runs = dict.fromkeys(f"triton {row['triton']}, {row['date']}, commit {row['commit']}" for row in rows)
    return (
        f"{table}\n\nRefused, because a block has too little shared memory (there PyTorch computes the gradient, and "
        "one kernel does noise, update and clamp):"
        f"\n\n{lines}\n\nCompiled by {'; '.join(runs)} "
        "(`bench/results/resources.csv`, which has more columns and the reason for each refusal). Rates are in "
        "1e9 chain-steps/s, computed and not measured."
    )


# -- timings of bench/run.py, once rows of a quiet machine are committed -----------------------------------------

_NONE = "No rows are committed yet: `python bench/run.py --out bench/results` makes them."


def _timed(name: str) -> list[dict[str, str]]:
    return _read(name) if (RESULTS / name).exists() else []


def _runs(rows: list[dict[str, str]], name: str) -> str:
    """What was measured, where and when: one line a machine, version and commit."""
    seen = dict.fromkeys(
        (
            row["gpu"] if row["device"] == "cuda" else f"{row['threads']} threads of {row['cpu']}",
            *(row[k] for k in ("torch", "jax", "torchebm", "blackjax", "date", "commit")),
        )
        for row in rows
    )
    lines = [
        f"{machine}, torch {torch}, jax {jax}, torchebm {torchebm}, blackjax {blackjax}, {date}, commit {commit}"
        for machine, torch, jax, torchebm, blackjax, date, commit in seen
    ]
    return f"Measured by `python bench/run.py` on {'; '.join(lines)} (`bench/results/{name}`)."


def _not_timed(rows: list[dict[str, str]]) -> str:
    """Contestants without a time, by reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault((row["contestant"], row["status"], row["note"]), []).append(row["case"])
    lines = [f"- {who}, {status} in {', '.join(cases)}: {note}" for (who, status, note), cases in reasons.items()]
    return "\n\nNot timed:\n\n" + "\n".join(lines) if lines else ""


def _timings(name: str, columns: list[tuple[str, str, Callable[[str], str]]], figures: str = "") -> str:
    """A table of the timed rows of a file, those that were not, and the figures that are there."""
    rows = most_threads(_timed(name))
    if not rows:
        return _NONE
    body = [
        [row["case"], f"{row['contestant']} {row.get('precision', '')}".strip()]
        + [form(row[column]) if row[column] else "" for _, column, form in columns]
        for row in rows
        if row["status"] == "ok"
    ]
    table = _table(["case", "contestant", *(heading for heading, _, _ in columns)], body)
    return f"{figures}{table}\n\n{_runs(rows, name)}{_not_timed(rows)}"


def _number(text: str) -> str:
    return f"{float(text):.3g}"


def _milliseconds(text: str) -> str:
    return f"{1e3 * float(text):.3g}"


def _percent(text: str) -> str:
    return f"{100 * float(text):.0f} %"


def steps() -> str:
    captions = {
        "speedup": "Times the eager loop, with quartiles",
        "throughput": "Chain-steps a second against chains",
        "roofline": "Product FLOP/s under the limit of products and normal numbers",
    }
    there = [(name, text) for name, text in captions.items() if (ROOT / "docs" / f"{name}.png").exists()]
    figures = "".join(f"![{text}]({name}.png)\n\n" for name, text in there)
    columns = [
        ("chain-steps/s", "chain_steps_per_s", _number),
        ("ms", "seconds", _milliseconds),
        ("quartile 1", "seconds_q1", _milliseconds),
        ("quartile 3", "seconds_q3", _milliseconds),
        ("times eager", "times_eager", _number),
        ("times the fastest peer", "times_peer", _number),
        ("of the limit", "of_limit", _percent),
    ]
    return _timings("steps.csv", columns, figures)


def speed() -> str:
    """For the README: the cases of a training batch and more on a CPU, each path of fastebm beside the fastest peer."""
    rows = [row for row in most_threads(_timed("steps.csv")) if row["device"] == "cpu" and row["status"] == "ok"]
    paths = [("fastebm-torch", "float32"), ("fastebm-compiled", "float32"), ("fastebm-compiled", "mm-bf16")]
    body = []
    for case in (
        *("toy-4096", "table-4096", "digits-4096", "photographs-512"),
        *("toy-256", "table-256", "digits-256"),  # the batch of a training step
    ):
        of_case = {(row["contestant"], row["precision"]): row for row in rows if row["case"] == case}
        if not of_case:
            continue
        ours = [of_case.get(path) for path in paths]
        peer = next(iter(of_case.values()))["peer"].removesuffix(" float32")
        eager, best = (float(next(iter(of_case.values()))[k]) for k in ("eager_seconds", "peer_seconds"))
        times = [f"{float(row['times_eager']):.2f}" if row else "" for row in ours]
        limit = f"{100 * float(ours[1]['of_limit']):.0f} %" if ours[1] else ""
        chains, energy = case.split("-")[1], next(iter(of_case.values()))["energy"].replace(" ", "")
        body.append([energy, chains, *times, f"{eager / best:.2f} ({peer})", limit])
    if not body:
        return _NONE
    headings = ("default", "`compile=True`", '`precision="bf16"` too')
    return (
        f"{_table(['energy', 'chains', *headings, 'fastest peer', 'of the limit'], body)}\n\nTimes the eager autograd "
        "loop, 60 steps, medians of interleaved runs. *Of the limit*: with `compile=True`, of what the machine's "
        "products and normal numbers leave. "
        f"{_runs([row for row in rows if row['case'] in ('toy-4096', 'digits-4096')], 'steps.csv')}"
    )


def cores() -> str:
    """The cases that were run on one thread too."""
    rows = [row for row in _timed("steps.csv") if row["device"] == "cpu" and row["status"] == "ok"]
    most = {(row["case"], row["contestant"], row["precision"]): row for row in most_threads(rows)}
    body = []
    for row in rows:
        many = most.get((row["case"], row["contestant"], row["precision"]))
        if many is None or row["threads"] != "1" or many["threads"] == "1":
            continue
        rates = [float(r["chain_steps_per_s"]) for r in (row, many)]
        way = f"{row['contestant']} {row['precision']}"
        body.append([row["case"], way, *(f"{r:.3g}" for r in rates), f"{rates[1] / rates[0]:.2f}"])
    if not body:
        return _NONE
    n = max(int(row["threads"]) for row in most.values())
    return _table(["case", "contestant", "chain-steps/s, 1 thread", f"{n} threads", "times"], body)


def breakdown() -> str:
    rows = _timed("breakdown.csv")
    if not rows:
        return "No rows are committed yet: `python bench/breakdown.py` makes them."
    headings = ["case", "contestant", "ns a chain-step", "products", "noise", "elementwise", "rest", "limit, ns"]
    body = [
        [row["case"], f"{row['contestant']} {row['precision']}", f"{float(row['ns_a_chain_step']):.0f}"]
        + [_percent(row[kind]) for kind in ("products", "noise", "elementwise", "rest")]
        + [f"{float(row['limit_products_ns']):.0f} + {float(row['limit_normals_ns']):.0f}"]
        for row in rows
    ]
    first = rows[0]
    return (
        f"{_table(headings, body)}\n\nBy `python bench/breakdown.py` on {first['threads']} threads of {first['cpu']}, "
        f"torch {first['torch']}, {first['date']}, commit {first['commit']} (`bench/results/breakdown.csv`)."
    )


def training() -> str:
    columns = [
        ("ms a training step", "seconds", _milliseconds),
        ("quartile 1", "seconds_q1", _milliseconds),
        ("quartile 3", "seconds_q3", _milliseconds),
        ("times the list", "times_tutorial", _number),
    ]
    return _timings("training.csv", columns)


def pool() -> str:
    rows = _timed("pool.csv")
    if not rows:
        return _NONE.replace("run.py --out bench/results", "pool.py")
    columns = [
        ("draw + write-back, us", "draw_and_write_seconds", lambda text: f"{1e6 * float(text):.3g}"),
        ("times the list", "times_list", _number),
        ("chain-steps/s", "chain_steps_per_s", _number),
        ("ms a training step", "training_step_seconds", _milliseconds),
        ("of the smallest pool's", "times_smallest", lambda text: f"{float(text):.2f}"),
        ("peak memory, MiB", "peak_bytes", lambda text: f"{float(text) / 2**20:.0f}"),
    ]
    body = [
        [f"{int(row['n_chains']):,}", row["contestant"]]
        + [form(row[column]) if row.get(column) else "" for _, column, form in columns]
        for row in rows
        if row["status"] == "ok"
    ]
    table = _table(["chains", "contestant", *(heading for heading, _, _ in columns)], body)
    first = rows[0]
    where = first["gpu"] if first["device"] == "cuda" else f"{first['threads']} threads of {first['cpu']}"
    return (
        f"{table}\n\n{first['energy']}, batches of {first['batch_size']}, {first['steps']} steps. Measured by "
        f"`python bench/pool.py` on {where}, torch {first['torch']}, torchebm {first['torchebm']}, {first['date']}, "
        f"commit {first['commit']} (`bench/results/pool.csv`, with quartiles)."
    )


def efficiency() -> str:
    columns = [
        ("effective samples/s", "ess_per_s", _number),
        ("a chain-step", "ess_per_step", _number),
        ("times eager", "times_eager", _number),
    ]
    return _timings("efficiency.csv", columns)


def compilation() -> str:
    columns = [
        ("first call, s", "first_call_seconds", _number),
        ("in a second process, s", "second_process_seconds", _number),
        ("a later call, s", "later_call_seconds", _number),
    ]
    return _timings("compilation.csv", columns)


# file, marker, and what stands between <!-- marker --> and <!-- /marker -->
def precision() -> str:
    rows = _read("precision.csv")
    first = rows[0]
    names = ("kernel_error", "plain_error", "plain_error_on_gpu")
    where = "on a GPU" if first["device"] == "cuda" else "in the interpreter"
    table = _table(
        [
            "energy",
            "precision",
            f"kernel, {where}",
            "plain PyTorch, the same roundings",
            "plain PyTorch, tensor cores' roundings",
        ],
        [[row["case"].replace(" ", ""), row["precision"], *(row[name] for name in names)] for row in rows],
    )
    return (
        f"{table}\n\nRoot-mean-square error of the gradient against float64, relative, by `python bench/precision.py`: "
        f"torch {first['torch']}, triton {first['triton']}, {first['date']}, commit {first['commit']} "
        "(`bench/results/precision.csv`)."
    )


TABLES: list[tuple[str, str, Callable[[], str]]] = [
    ("README.md", "digits", digits),
    ("README.md", "speed", speed),
    ("docs/training.md", "recipes", recipes),
    ("docs/performance.md", "resources", resources),
    ("docs/performance.md", "precision", precision),
    ("docs/performance.md", "steps", steps),
    ("docs/performance.md", "cores", cores),
    ("docs/performance.md", "breakdown", breakdown),
    ("docs/performance.md", "training", training),
    ("docs/performance.md", "pool", pool),
    ("docs/performance.md", "efficiency", efficiency),
    ("docs/performance.md", "compilation", compilation),
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
