"""Tables of what bench/run.py, sampling_parts.py, pool.py and breakdown.py timed."""

from __future__ import annotations

from collections.abc import Callable

from fastebm.bench import markdown
from fastebm.bench.cases import MANY_CHAINS, SHOWN
from fastebm.bench.markdown import (
    chains_of,
    milliseconds,
    none_yet,
    not_timed,
    number,
    percent,
    ratio,
    rows_of,
    table_of,
    threads_of,
    versions,
)
from fastebm.bench.problem import MM_BF16
from fastebm.bench.rows import most_threads

# -- bench/run.py ------------------------------------------------------------------------------------------------


def runs_of(rows: list[dict[str, str]], name: str, command: str = "run.py") -> str:
    """Where and when the rows were measured: one entry per machine, version and commit."""
    lines = dict.fromkeys(
        f"{row['gpu'] if row.get('device') == 'cuda' else threads_of(row)}, {versions(row)}, {row['date']}, commit "
        f"{row['commit']}"
        for row in rows
    )
    return f"Measured by `python bench/{command}` on {'; '.join(lines)} (`bench/results/{name}`)."


def _timings(name: str, columns: list[tuple[str, str, Callable[[str], str]]], figures: str = "") -> str:
    """The figures, a table of a file's timed rows, and a list of those that were not timed.

    Args:
        columns: heading, column of the file, and format.
    """
    rows = most_threads(rows_of(name))
    if not rows:
        return none_yet("run.py")
    body = [
        [row["case"], f"{row['contestant']} {row.get('precision', '')}".strip()]
        + [form(row[column]) if row.get(column) else "" for _, column, form in columns]
        for row in rows
        if row["status"] == "ok"
    ]
    table = table_of(["case", "contestant", *(heading for heading, _, _ in columns)], body)
    return f"{figures}{table}\n\n{runs_of(rows, name)}{not_timed(rows)}"


def steps() -> str:
    captions = {
        "speedup": "Times the eager loop, with quartiles",
        "throughput": "Chain-steps a second against chains",
        "roofline": "Product FLOP/s under the limit of products and normal numbers",
    }
    there = [(name, text) for name, text in captions.items() if (markdown.ROOT / "docs" / f"{name}.png").exists()]
    figures = "".join(f"![{text}]({name}.png)\n\n" for name, text in there)
    columns = [
        ("chain-steps/s", "chain_steps_per_s", number),
        ("ms", "seconds", milliseconds),
        ("quartile 1", "seconds_q1", milliseconds),
        ("quartile 3", "seconds_q3", milliseconds),
        ("times eager", "times_eager", number),
        ("times the fastest peer", "times_peer", number),
        ("of the limit", "of_limit", percent),
    ]
    return _timings("steps.csv", columns, figures)


def speed() -> str:
    """For the README: the default call on a CPU compared with the eager loop and with the fastest peer."""
    rows = [row for row in most_threads(rows_of("steps.csv")) if row["device"] == "cpu" and row["status"] == "ok"]
    ours, bf16 = (
        {row["case"]: row for row in rows if (row["contestant"], row["precision"]) == ("fastebm", precision)}
        for precision in ("float32", MM_BF16)
    )
    shown = [ours[case] for case in SHOWN if case in ours]
    if not shown:
        return none_yet("run.py")
    headings = ["energy", "chains", "times eager", "fastest peer", "times the fastest peer", "of the limit"]
    body = [
        [
            row["energy"].replace(", ", ","),
            chains_of(row),
            ratio(row["times_eager"]),
            row["peer"].removesuffix(" float32"),
        ]
        + [ratio(row["times_peer"]), percent(row["of_limit"])]
        for row in shown
    ]
    if bf16:
        headings.append('`precision="bf16"`, times eager')
        for line, row in zip(body, shown, strict=True):
            line.append(ratio(bf16[row["case"]]["times_eager"]) if row["case"] in bf16 else "")
    return (
        f"{table_of(headings, body)}\n\nWhole calls of `langevin_sample` with nothing asked for, 60 steps, medians of "
        "interleaved runs. *Times eager*: the eager autograd loop, which counts as a peer too. *Of the limit*: of what "
        f"the machine's products and normal numbers leave. {runs_of(shown, 'steps.csv')}"
    )


def training() -> str:
    columns = [
        ("ms per training step", "seconds", milliseconds),
        ("quartile 1", "seconds_q1", milliseconds),
        ("quartile 3", "seconds_q3", milliseconds),
        ("times the list", "times_tutorial", number),
    ]
    return _timings("training.csv", columns)


def efficiency() -> str:
    columns = [
        ("effective samples/s", "ess_per_s", number),
        ("per chain-step", "ess_per_step", number),
        ("times eager", "times_eager", number),
    ]
    return _timings("efficiency.csv", columns)


def sampling() -> str:
    columns = [
        ("effective samples/s", "ess_per_s", number),
        ("times ebmkit", "times_ebmkit", ratio),
        ("times BlackJAX", "times_blackjax", ratio),
        ("per gradient", "ess_per_gradient", number),
        ("gradients per draw", "gradients_per_draw", number),
        ("eager gradients, of the time", "of_gradients", percent),
        ("step size", "step_size", number),
        ("accepted", "acceptance", ratio),
    ]
    return _timings("sampling.csv", columns)


def collapsed() -> str:
    figure = "![The time of a leapfrog step of HMC against the number of dims](dims.png)\n\n"
    columns = [
        ("energy", "energy", str),
        ("chains", "n_chains", lambda text: f"{int(text):,}"),
        ("path", "path", str),
        ("ms per gradient", "gradient_seconds", milliseconds),
        ("ms per step", "seconds", milliseconds),
        ("quartile 1", "seconds_q1", milliseconds),
        ("quartile 3", "seconds_q3", milliseconds),
        ("of fastebm's time", "times_fastebm", ratio),
    ]
    return _timings("collapsed.csv", columns, figure if (markdown.ROOT / "docs" / "dims.png").exists() else "")


def bias() -> str:
    """The largest error of a known mean, and the cost of fastebm's samplers, on the same laws."""
    rows = [row for row in most_threads(rows_of("sampling.csv")) if row["library"] == "fastebm" and row["ess"]]
    if not rows:
        return none_yet("run.py")
    body = [
        [
            row["energy"],
            row["sampler"],
            row["exact"],
            number(row["bias"]),
            number(str(float(row["bias"]) / float(row["deviation"]))),
            number(row["gradients_per_draw"]),
            number(row["ess_per_gradient"]),
        ]
        for row in rows
        if int(row["n_chains"]) < MANY_CHAINS
    ]
    headings = ["law", "sampler", "exact", "bias", "its standard error", "gradients per draw", "ESS per gradient"]
    return f"{table_of(headings, body)}\n\n{runs_of(rows, 'sampling.csv')}"


def compilation() -> str:
    columns = [
        ("first call, s", "first_call_seconds", number),
        ("in a second process, s", "second_process_seconds", number),
        ("a later call, s", "later_call_seconds", number),
        ("first call, more than a later one", "first_call_more", number),
        ("in a second process, more", "second_process_more", number),
    ]
    return _timings("compilation.csv", columns)


# -- bench/sampling_parts.py -------------------------------------------------------------------------------------

# Columns of the parts of fastebm's step, and of those of its peers that the table shows.
_OURS = ("seconds", "gradients_seconds", "numbers_seconds", "own_seconds", "loop_seconds", "eager_seconds")
_PEERS = {"ebmkit": ("seconds", "eager_seconds"), "blackjax": ("seconds",)}


def sampling_parts() -> str:
    """Microseconds of a step, by part, and of the steps of peers."""
    rows = rows_of("sampling_parts.csv")
    if not rows:
        return none_yet("sampling_parts.py")
    found = {(row["case"], row["sampler"], row["library"]): row for row in rows}

    def cells(key: tuple[str, str, str], columns: tuple[str, ...]) -> list[str]:
        row = found.get(key, {})
        return [f"{1e6 * float(row[name]):,.0f}" if row.get(name) else "" for name in columns]

    body = [
        [row["energy"], row["sampler"], f"{float(row['gradients']):.1f}", *cells((case, sampler, library), _OURS)]
        + [cell for peer, columns in _PEERS.items() for cell in cells((case, sampler, peer), columns)]
        for (case, sampler, library), row in found.items()
        if library == "fastebm"
    ]
    headings = ["law", "sampler", "gradients per step", "step, µs", "gradients", "random numbers", "the sampler's own"]
    headings += ["loop and call", "eager gradients", "ebmkit's step, µs", "its eager gradients", "BlackJAX's step, µs"]
    return f"{table_of(headings, body)}\n\n{runs_of(rows, 'sampling_parts.csv', 'sampling_parts.py')}"


# -- bench/breakdown.py ------------------------------------------------------------------------------------------

# Names of the parts of a step in the tables.
_PARTS = {"products": "products", "normals": "normals", "gradient": "PyTorch's gradient", "call": "call"}

_Breakdown = dict[tuple[str, int], dict[str, float]]


def _breakdown(kind: str) -> tuple[_Breakdown, str]:
    """The seconds of each part, by case and number of threads; and the text below their table."""
    rows = [row for row in rows_of("breakdown.csv") if row["kind"] == kind]
    if not rows:
        return {}, none_yet("breakdown.py")
    found: _Breakdown = {}
    for row in rows:
        found.setdefault((row["case"], int(row["threads"])), {})[row["part"]] = float(row["seconds"])
    first = rows[0]
    return found, (
        f"By `python bench/breakdown.py` on {first['cpu']}, torch {first['torch']}, numba {first['numba']}, "
        f"{first['date']}, commit {first['commit']} (`bench/results/breakdown.csv`)."
    )


def _chain_steps() -> dict[str, int]:
    """Chains times steps of each case of the breakdown."""
    return {row["case"]: int(row["n_chains"]) * int(row["steps"]) for row in rows_of("breakdown.csv")}


def _with_note(headings: list[str], body: list[list[str]], note: str) -> str:
    return f"{table_of(headings, body)}\n\n{note}" if body else note


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


# -- bench/pool.py -----------------------------------------------------------------------------------------------


def pool() -> str:
    rows = rows_of("pool.csv")
    if not rows:
        return none_yet("pool.py")
    columns = [
        ("draw + write-back, us", "draw_and_write_seconds", lambda text: f"{1e6 * float(text):.3g}"),
        ("times the list", "times_list", number),
        ("chain-steps/s", "chain_steps_per_s", number),
        ("ms per training step", "training_step_seconds", milliseconds),
        ("of the smallest pool's", "times_smallest", lambda text: f"{float(text):.2f}"),
        ("peak memory, MiB", "peak_bytes", lambda text: f"{float(text) / 2**20:.0f}"),
    ]
    body = [
        [f"{int(row['n_chains']):,}", row["contestant"]]
        + [form(row[column]) if row.get(column) else "" for _, column, form in columns]
        for row in rows
        if row["status"] == "ok"
    ]
    table = table_of(["chains", "contestant", *(heading for heading, _, _ in columns)], body)
    first = rows[0]
    where = first["gpu"] if first["device"] == "cuda" else threads_of(first)
    return (
        f"{table}\n\n{first['energy']}, batches of {first['batch_size']}, {first['steps']} steps. Measured by "
        f"`python bench/pool.py` on {where}, {versions(first)}, {first['date']}, commit {first['commit']} "
        "(`bench/results/pool.csv`, with quartiles)."
    )
