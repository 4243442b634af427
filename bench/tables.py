"""The tables of README.md and docs/ from bench/results/: every number in them comes from a committed row.

python bench/tables.py --write    rewrite the tables of README.md, docs/performance.md and docs/training.md: seconds
python bench/tables.py --check    write nothing; exit status 1 if a table is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastebm.bench.cases import SHOWN
from fastebm.bench.problem import MM_BF16
from fastebm.bench.rows import RESULTS, most_threads, read, script

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
        return _none("recipes.py")
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
        return _none("recipes.py")
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
            "instructions per chain-step",
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


# -- timings of bench/run.py -------------------------------------------------------------------------------------


def _none(command: str) -> str:
    return f"No rows are committed yet: `python bench/{command} --out bench/results` makes them."


def _timed(name: str) -> list[dict[str, str]]:
    return _read(name) if (RESULTS / name).exists() else []


def _runs(rows: list[dict[str, str]], name: str) -> str:
    """What was measured, where and when: one line per machine, version and commit."""
    lines = dict.fromkeys(
        f"{row['gpu'] if row['device'] == 'cuda' else _threads(row)}, {_versions(row)}, {row['date']}, commit "
        f"{row['commit']}"
        for row in rows
    )
    return f"Measured by `python bench/run.py` on {'; '.join(lines)} (`bench/results/{name}`)."


def _threads(row: dict[str, str]) -> str:
    return f"{row['threads']} threads of {row['cpu']}"


def _versions(row: dict[str, str], *more: str) -> str:
    """Of torch, of ``more``, and of the peers that were installed."""
    names = ("torch", *more, "jax", "torchebm", "ebmkit", "blackjax")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) not in (None, "", "absent"))


def _not_timed(rows: list[dict[str, str]]) -> str:
    """Contestants without a time, by reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault((row["contestant"], row["status"], row["note"]), []).append(row["case"])
    lines = [f"- {who}, {status} in {', '.join(cases)}: {note}" for (who, status, note), cases in reasons.items()]
    return "\n\nNot timed:\n\n" + "\n".join(lines) if lines else ""


def _timings(name: str, columns: list[tuple[str, str, Callable[[str], str]]], figures: str = "") -> str:
    """The figures, a table of a file's timed rows, and a list of those that were not timed."""
    rows = most_threads(_timed(name))
    if not rows:
        return _none("run.py")
    body = [
        [row["case"], f"{row['contestant']} {row.get('precision', '')}".strip()]
        + [form(row[column]) if row.get(column) else "" for _, column, form in columns]
        for row in rows
        if row["status"] == "ok"
    ]
    table = _table(["case", "contestant", *(heading for heading, _, _ in columns)], body)
    return f"{figures}{table}\n\n{_runs(rows, name)}{_not_timed(rows)}"


def _number(text: str) -> str:
    return f"{float(text):.3g}"


def _milliseconds(text: str) -> str:
    return f"{1e3 * float(text):.3g}"


def _times(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


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
    """For the README: the default call on a CPU beside the eager loop and the fastest contestant that is not ours."""
    rows = [row for row in most_threads(_timed("steps.csv")) if row["device"] == "cpu" and row["status"] == "ok"]
    ours, bf16 = (
        {row["case"]: row for row in rows if (row["contestant"], row["precision"]) == ("fastebm", precision)}
        for precision in ("float32", MM_BF16)
    )
    shown = [ours[case] for case in SHOWN if case in ours]
    if not shown:
        return _none("run.py")
    headings = ["energy", "chains", "times eager", "fastest peer", "times the fastest peer", "of the limit"]
    body = [
        [
            row["energy"].replace(", ", ","),
            _chains(row),
            _times(row["times_eager"]),
            row["peer"].removesuffix(" float32"),
        ]
        + [_times(row["times_peer"]), _percent(row["of_limit"])]
        for row in shown
    ]
    if bf16:
        headings.append('`precision="bf16"`, times eager')
        for line, row in zip(body, shown, strict=True):
            line.append(_times(bf16[row["case"]]["times_eager"]) if row["case"] in bf16 else "")
    return (
        f"{_table(headings, body)}\n\nWhole calls of `langevin_sample` with nothing asked for, 60 steps, medians of "
        "interleaved runs. *Times eager*: the eager autograd loop, which counts as a peer too. *Of the limit*: of what "
        f"the machine's products and normal numbers leave. {_runs(shown, 'steps.csv')}"
    )


# Names of the parts of a step in the tables.
_PARTS = {"products": "products", "normals": "normals", "gradient": "PyTorch's gradient", "call": "call"}

_Breakdown = dict[tuple[str, int], dict[str, float]]


def _breakdown(kind: str) -> tuple[_Breakdown, str]:
    """For each case and number of threads, the seconds of its parts; and the text below a table of them."""
    rows = [row for row in _timed("breakdown.csv") if row["kind"] == kind]
    if not rows:
        return {}, _none("breakdown.py")
    found: _Breakdown = {}
    for row in rows:
        found.setdefault((row["case"], int(row["threads"])), {})[row["part"]] = float(row["seconds"])
    first = rows[0]
    return found, (
        f"By `python bench/breakdown.py` on {first['cpu']}, torch {first['torch']}, numba {first['numba']}, "
        f"{first['date']}, commit {first['commit']} (`bench/results/breakdown.csv`)."
    )


def _chain_steps() -> dict[str, int]:
    """Of each case of the breakdown."""
    return {row["case"]: int(row["n_chains"]) * int(row["steps"]) for row in _timed("breakdown.csv")}


def _with_note(headings: list[str], body: list[list[str]], note: str) -> str:
    return f"{_table(headings, body)}\n\n{note}" if body else note


def cores() -> str:
    """The default call on one thread and on all, in the same rounds."""
    found, note = _breakdown("steps")
    n = max((threads for _, threads in found), default=1)
    sizes = _chain_steps()
    body = []
    for (case, threads), parts in found.items():
        if threads == n > 1 and (case, 1) in found:
            one, all_ = found[case, 1]["whole"], parts["whole"]
            body.append([case, f"{sizes[case] / one:.3g}", f"{sizes[case] / all_:.3g}", f"{one / all_:.2f}"])
    return _with_note(["case", "chain-steps/s, 1 thread", f"{n} threads", "times"], body, note)


def breakdown() -> str:
    found, note = _breakdown("steps")
    sizes = _chain_steps()
    body = []
    for (case, threads), parts in found.items():
        if threads == 1:
            shares = [
                f"{100 * parts[part] / parts['whole']:.0f} %" if part in parts else "" for part in (*_PARTS, "rest")
            ]
            body.append([case, f"{1e9 * parts['whole'] / sizes[case]:.0f}", *shares])
    return _with_note(["case", "ns per chain-step", *_PARTS.values(), "rest"], body, note)


def breakdown_threads() -> str:
    found, note = _breakdown("steps")
    body = []
    for (case, threads), parts in found.items():
        one = found.get((case, 1), {})
        if threads > 1 and one:
            times = [f"{one[part] / parts[part]:.2f}" if part in parts else "" for part in ("whole", *_PARTS)]
            shares = [f"{100 * parts[part] / parts['whole']:.0f} %" for part in ("call", "rest")]
            body.append([case, str(threads), *times, *shares])
    headings = ["case", "threads", "whole", *_PARTS.values(), "the call's share", "the rest's"]
    return _with_note(headings, body, note)


def breakdown_pools() -> str:
    found, note = _breakdown("pools")
    parts = ["whole", "draws", "take", "put", "rest"]
    body = [[case, *(f"{1e6 * seconds[part]:.0f}" for part in parts)] for (case, _), seconds in found.items()]
    return _with_note(["pool", *(f"{part}, us" for part in parts)], body, note)


def breakdown_first_calls() -> str:
    found, note = _breakdown("first calls")
    parts = dict.fromkeys(part for seconds in found.values() for part in seconds)
    body = [[part, *(f"{seconds.get(part, 0.0):.2f}" for seconds in found.values())] for part in parts]
    return _with_note(["part", *(f"{case}, s" for case, _ in found)], body, note)


def training() -> str:
    columns = [
        ("ms per training step", "seconds", _milliseconds),
        ("quartile 1", "seconds_q1", _milliseconds),
        ("quartile 3", "seconds_q3", _milliseconds),
        ("times the list", "times_tutorial", _number),
    ]
    return _timings("training.csv", columns)


def pool() -> str:
    rows = _timed("pool.csv")
    if not rows:
        return _none("pool.py")
    columns = [
        ("draw + write-back, us", "draw_and_write_seconds", lambda text: f"{1e6 * float(text):.3g}"),
        ("times the list", "times_list", _number),
        ("chain-steps/s", "chain_steps_per_s", _number),
        ("ms per training step", "training_step_seconds", _milliseconds),
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
    where = first["gpu"] if first["device"] == "cuda" else _threads(first)
    return (
        f"{table}\n\n{first['energy']}, batches of {first['batch_size']}, {first['steps']} steps. Measured by "
        f"`python bench/pool.py` on {where}, {_versions(first)}, {first['date']}, commit {first['commit']} "
        "(`bench/results/pool.csv`, with quartiles)."
    )


def efficiency() -> str:
    columns = [
        ("effective samples/s", "ess_per_s", _number),
        ("per chain-step", "ess_per_step", _number),
        ("times eager", "times_eager", _number),
    ]
    return _timings("efficiency.csv", columns)


def compilation() -> str:
    columns = [
        ("first call, s", "first_call_seconds", _number),
        ("in a second process, s", "second_process_seconds", _number),
        ("a later call, s", "later_call_seconds", _number),
        ("first call, more than a later one", "first_call_more", _number),
        ("in a second process, more", "second_process_more", _number),
    ]
    return _timings("compilation.csv", columns)


# -- a visit to a GPU --------------------------------------------------------------------------------------------

_NO_VISIT = (
    "No rows are committed yet: `bash bench/on_gpu.sh` and `python bench/gpu.py rows runs/gpu --out bench/results` "
    "make them."
)


def _visited(what: str, name: str = "gpu.csv") -> list[dict[str, str]]:
    return [row for row in _timed(name) if row["what"] == what]


def _of_visit(rows: list[dict[str, str]], name: str = "gpu.csv") -> str:
    first = rows[0]
    runs = "; ".join(dict.fromkeys(f"{row['date']}, commit {row['commit']}" for row in rows))
    return (
        f"Measured by `bash bench/on_gpu.sh` on one {first['gpu']} (driver {first['driver']}, {first['cores']} cores "
        f"of {first['cpu']}), {_versions(first, 'triton')}, {runs} (`bench/results/{name}`)."
    )


def _chains(row: dict[str, str]) -> str:
    return f"{int(row['n_chains']):,}"


def _rate(text: str) -> str:
    return f"{float(text) / 1e9:.3g}"


def gpu() -> str:
    """For the README: of each case and precision, whole calls and captured ones beside eager and the fastest peer."""
    rows = [row for row in _visited("timings") if row["status"] == "ok"]
    if not rows:
        return _NO_VISIT
    cases = list(dict.fromkeys((row["energy"], row["n_chains"]) for row in rows))
    body = []
    for energy, n_chains in cases:
        of_case = {
            (row["contestant"], row["precision"]): row
            for row in rows
            if (row["energy"], row["n_chains"]) == (energy, n_chains)
        }
        for precision in ("bf16x3", "bf16"):
            call, graph = (of_case.get((name, precision)) for name in ("fastebm-triton", "fastebm-graph"))
            if call is None or not call["times_peer"]:
                continue
            chain_steps = float(call["n_chains"]) * float(call["steps"])
            peer = f"{call['peer']}, {_rate(str(chain_steps / float(call['peer_seconds'])))}"
            times = [f"{float(row['times_peer']):.1f}" if row else "" for row in (call, graph)]
            body.append(
                [energy.replace(" ", ""), f"{int(n_chains):,}", precision, _rate(call["chain_steps_per_s"])]
                + [f"{float(call['times_eager']):.1f}", peer, *times]
            )
    headings = [
        "energy",
        "chains",
        "precision",
        "1e9 chain-steps/s",
        "times eager",
        "fastest peer, 1e9/s",
        "times the peer",
    ]
    return (
        f"{_table([*headings, 'captured, times the peer'], body)}\n\nWhole calls of `langevin_sample`; *captured*: "
        "replayed from a CUDA graph. The peer is the fastest whose products are at least as exact: bf16x3 is compared "
        f"with float32 only. {_of_visit(rows)}"
    )


def gpu_kernels() -> str:
    """Shipped kernels: is each right, what does it take, how long does it run alone."""
    checked, alone = _visited("shipped"), [row for row in _visited("alone") if row["status"] == "ok"]
    if not checked or not alone:
        return _NO_VISIT
    body = []
    for row in alone:
        on_gpu, call = (1e3 * float(row[k]) for k in ("kernel_seconds", "call_seconds"))
        seconds = [f"{ms:.3g}" for ms in (on_gpu, call, call - on_gpu)]
        body.append(
            [
                row["kernel"].replace(", ", ","),
                _chains(row),
                row["steps"],
                _rate(row["kernel_chain_steps_per_s"]) if row["kernel_chain_steps_per_s"] else "",
                *seconds,
            ]
        )
    headings = ["energy and precision", "chains", "steps", "1e9 chain-steps/s in the kernel"]
    times = _table([*headings, "kernel, ms", "whole call, ms", "of it beside the kernel, ms"], body)
    body = [
        [row["kernel"].replace(", ", ","), _chains(row), row["path"], row["registers"], row["spills"]]
        + [
            f"{float(row['error']) / float(row['allowed']):.2f}",
            f"{float(row['noisy_error']) / float(row['noisy_allowed']):.2f}",
        ]
        + [row["same_bits"], row["status"]]
        for row in checked
    ]
    headings = ["energy and precision", "chains", "path", "registers", "words spilled", "error, of the allowed"]
    errors = _table([*headings, "three steps with noise", "same bits twice", "status"], body)
    return f"{times}\n\n{errors}\n\n{_of_visit(checked)}"


def gpu_race() -> str:
    rows = [row for row in _visited("timings") if row["status"] in ("ok", "FAILED")]
    if not rows:
        return _NO_VISIT
    body = [
        [row["energy"].replace(" ", ""), _chains(row), row["steps"], f"{row['contestant']} {row['precision']}"]
        + [_milliseconds(row["seconds"] or row["untrusted_seconds"]) + ("" if row["seconds"] else " (FAILED)")]
        + [f"{float(row[k]):.2f}" if row[k] else "" for k in ("times_eager", "times_peer")]
        for row in rows
    ]
    headings = ["energy", "chains", "steps", "contestant", "ms", "times eager", "times the fastest peer"]
    return f"{_table(headings, body)}\n\n{_of_visit(rows)}"


def gpu_sweep() -> str:
    """For each case the shipped launch and the fastest others."""
    rows = [row for row in _visited("sweep", "gpu_sweep.csv") if row["status"] == "ok"]
    if not rows:
        return _NO_VISIT
    body = []
    for case in dict.fromkeys((row["energy"], row["precision"]) for row in rows):
        timed = [row for row in rows if (row["energy"], row["precision"]) == case]
        timed.sort(key=lambda row: -float(row["times_shipped"]))
        shown = [row for i, row in enumerate(timed) if i < 4 or row["shipped"] == "yes"]
        for row in shown:
            launch = f"{row['regime']}, {row['block_chains']} x {row['block_dim']}, {row['num_warps']} warps"
            launch += f", {row['num_stages']} stages" if row["num_stages"] != "1" else ""
            launch += ", in memory" if row["in_memory"] == "True" else ""
            launch += " (shipped)" if row["shipped"] == "yes" else ""
            body.append(
                [
                    case[0].replace(" ", ""),
                    case[1],
                    launch,
                    _rate(row["chain_steps_per_s"]),
                    f"{float(row['times_shipped']):.2f}",
                ]
            )
        body[-1][2] += f"; {len(timed)} tried"
    headings = ["energy", "precision", "launch (chains x dims)", "1e9 chain-steps/s", "times the shipped"]
    return f"{_table(headings, body)}\n\n{int(rows[0]['n_chains']):,} chains. {_of_visit(rows, 'gpu_sweep.csv')}"


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


# file, marker, and what stands between <!-- marker --> and <!-- /marker -->
TABLES: list[tuple[str, str, Callable[[], str]]] = [
    ("README.md", "digits", digits),
    ("README.md", "gpu", gpu),
    ("README.md", "speed", speed),
    ("docs/training.md", "recipes", recipes),
    ("docs/performance.md", "resources", resources),
    ("docs/performance.md", "precision", precision),
    ("docs/performance.md", "steps", steps),
    ("docs/performance.md", "cores", cores),
    ("docs/performance.md", "breakdown", breakdown),
    ("docs/performance.md", "breakdown-threads", breakdown_threads),
    ("docs/performance.md", "breakdown-pools", breakdown_pools),
    ("docs/performance.md", "breakdown-first-calls", breakdown_first_calls),
    ("docs/performance.md", "training", training),
    ("docs/performance.md", "pool", pool),
    ("docs/performance.md", "efficiency", efficiency),
    ("docs/performance.md", "compilation", compilation),
    ("docs/performance.md", "gpu-kernels", gpu_kernels),
    ("docs/performance.md", "gpu-race", gpu_race),
    ("docs/performance.md", "gpu-sweep", gpu_sweep),
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
        path = ROOT / file
        old = path.read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
        table = make().replace("\\", r"\\")
        new, found = pattern.subn(rf"\1{table}\n\2", old)
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
