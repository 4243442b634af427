"""The figures of docs/performance.md from result rows. Nothing is measured.

speedup.png, throughput.png and roofline.png are made from steps.csv, and dims.png from collapsed.csv.

    python bench/plot.py                          of the committed rows, into runs/bench: seconds
    python bench/plot.py --out docs               the same, into docs/
    python bench/plot.py --results runs/bench     of your own run

Figures show one device: cuda if there are rows of it, unless --device says otherwise.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastebm.bench.rows import RESULTS, add_out, most_threads, read, script

from fastebm.plot import WIDTH, blank, legend, log_ticks, png

# Okabe & Ito's palette, which colour-blind readers can distinguish; fastebm has the strong colours. There are more
# contestants than colours, so each has a mark as well: not as many as colours, or both would repeat together.
OURS = ("#D55E00", "#E69F00", "#A0522D", "#7F3B08")
OTHERS = ("#666666", "#0072B2", "#56B4E9", "#009E73", "#000000", "#BBBBBB", "#CC79A7", "#F0E442", "#117733", "#88CCEE")
MARKS = "osv^DP<>X"

Row = dict[str, Any]


def numbers(rows: Sequence[dict[str, str]]) -> list[Row]:
    """The timed rows with numbers as floats, and a name: the contestant, with its precision if not float32."""
    timed: list[Row] = []
    for row in rows:
        if row["status"] == "ok":
            precision = row.get("precision", "float32")
            name = row["contestant"] + ("" if precision == "float32" else f" {precision}")
            timed.append({k: _float(v) for k, v in row.items()} | {"name": name, "case": row["case"]})
    return timed


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def styles(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """A colour and a mark per contestant, the same in every figure."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    ours = [n for n in names if n.startswith("fastebm")]
    others = [n for n in names if n not in ours]
    return {
        name: {"color": palette[i % len(palette)], "marker": MARKS[i % len(MARKS)]}
        for group, palette in ((ours, OURS), (others, OTHERS))
        for i, name in enumerate(group)
    }


def _figure(height: float, rows: Sequence[Row]) -> Any:
    first = rows[0]
    machine = first["gpu"] if first["device"] == "cuda" else f"{first['threads']:.0f} threads, {first['cpu']}"
    runs = "; ".join(dict.fromkeys(f"{row['date']}, {row['commit']}" for row in rows))
    return blank(WIDTH, height, f"{machine}, torch {first['torch']}\n{runs}")


def speedups(rows: Sequence[Row]) -> Any:
    """Bars: median seconds of the eager loop over a contestant's, one group per case; quartiles of the latter."""
    palette, rows = styles(rows), [row for row in rows if row["times_eager"] != ""]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = _figure(5.4, rows)
    axes = figure.add_subplot()
    width = 0.8 / len(palette)
    for i, (name, style) in enumerate(palette.items()):
        own = [row for row in rows if row["name"] == name]
        x = [cases.index(row["case"]) + (i - len(palette) / 2 + 0.5) * width for row in own]
        y = np.array([row["times_eager"] for row in own])
        ends = np.array([[row["eager_seconds"] / row[q] for q in ("seconds_q3", "seconds_q1")] for row in own]).T
        axes.bar(x, y, width, color=style["color"], label=name)
        axes.errorbar(x, y, abs(ends - y), fmt="none", ecolor="black", elinewidth=0.8)
    axes.axhline(1.0, color="#666666", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
    axes.set_ylabel("times as fast as the eager loop")
    axes.margins(x=0.01)
    legend(figure, columns=5)
    return figure


def throughput(rows: Sequence[Row]) -> Any:
    """Lines: chain-steps/s against the number of chains, one panel per energy that was run with several."""
    from matplotlib.ticker import EngFormatter

    sizes = {row["energy"]: sorted({r["n_chains"] for r in rows if r["energy"] == row["energy"]}) for row in rows}
    energies = [energy for energy in sizes if len(sizes[energy]) > 1] or list(sizes)
    palette = styles(rows)
    columns = min(3, len(energies))
    figure = _figure(1.0 + 3.4 * -(-len(energies) // columns), rows)
    for i, energy in enumerate(energies):
        axes = figure.add_subplot(-(-len(energies) // columns), columns, i + 1)
        for name, style in palette.items():
            own = sorted(
                (r["n_chains"], r["chain_steps_per_s"]) for r in rows if (r["energy"], r["name"]) == (energy, name)
            )
            if own:
                axes.plot(*zip(*own, strict=True), **style, label=name, markersize=5)
        axes.set(xscale="log", yscale="log", xlabel="chains", ylabel="" if i % columns else "chain-steps / s")
        axes.set_title(energy, fontsize=10)
        axes.set_xticks(sizes[energy], [f"{n:,.0f}" for n in sizes[energy]])
        if len(sizes[energy]) > 3:
            axes.tick_params(axis="x", rotation=45)
        axes.set_xticks([], minor=True)
        log_ticks(axes.yaxis, EngFormatter())
    legend(figure, columns=5)
    return figure


def roofline(rows: Sequence[Row]) -> Any:
    """Product FLOP/s against product FLOPs per normal number, under the measured limit 1/(1/P + 1/(x N)).

    P: rate of products (of the precision), N: of normal numbers. Dashed: memory, if a step read and wrote the state
    once (8 bytes per normal number). The rates are medians over the rows.
    """
    from matplotlib.ticker import EngFormatter

    palette = styles(rows)
    rows = [row for row in rows if row["of_limit"] != "" and row["flops_per_chain_step"] > 0]  # a mixture has none
    figure = _figure(6.0, rows)
    axes = figure.add_subplot()
    at = [row["flops_per_chain_step"] / row["dim"] for row in rows]
    x = np.geomspace(min(at) / 2, max(at) * 2, 200)
    normals, bandwidth = (float(np.median([row[k] for row in rows])) for k in ("normal_rate", "bandwidth"))
    top = 0.0
    for precision, style in zip(dict.fromkeys(row["precision"] for row in rows), itertools.cycle(["-", "-.", ":"])):
        products = float(np.median([row["product_rate"] for row in rows if row["precision"] == precision]))
        line = 1 / (1 / products + 1 / (x * normals))
        axes.plot(x, line, style, color="black", linewidth=1.2, label=f"limit: {precision} products and normals")
        top = max(top, products)
    axes.plot(x, x * bandwidth / 8, "--", color="black", linewidth=0.8, label="memory")
    for i, (name, style) in enumerate(palette.items()):
        own = [row for row in rows if row["name"] == name]
        rate = [row["chain_steps_per_s"] * row["flops_per_chain_step"] for row in own]
        own_at = [row["flops_per_chain_step"] / row["dim"] for row in own]
        axes.plot(own_at, rate, linestyle="none", **style, label=name, zorder=3.0 - i / len(palette))  # ours on top
    axes.set(xscale="log", yscale="log", xlabel="product FLOPs per normal number", ylabel="product FLOP/s")
    axes.set_ylim(top=4.0 * top)  # beyond the limit of memory bandwidth
    log_ticks(axes.xaxis, EngFormatter())
    log_ticks(axes.yaxis, EngFormatter())
    legend(figure, columns=5)
    return figure


def dims(rows: Sequence[Row]) -> Any:
    """Lines: the time of a leapfrog step against the number of dims, of the cases that differ in it alone. None if
    there are no such rows."""
    from matplotlib.ticker import StrMethodFormatter

    rows = [row for row in rows if row["case"].startswith("collapsed-dims-")]
    if not rows:
        return None
    figure = _figure(4.4, rows)
    axes = figure.add_subplot()
    for name, style in styles(rows).items():
        own = sorted((row["dim"], 1e3 * row["gradient_seconds"]) for row in rows if row["name"] == name)
        axes.plot(*zip(*own, strict=True), **style, label=name, markersize=5)
    sizes = sorted({row["dim"] for row in rows})
    first = rows[0]
    axes.set(xscale="log", yscale="log", xlabel="dims", ylabel="ms per leapfrog step")
    axes.set_title(f"widths {first['energy'].split('-')[1]}, {first['n_chains']:,.0f} chains", fontsize=10)
    axes.set_xticks(sizes, [f"{n:,.0f}" for n in sizes])
    axes.set_xticks([], minor=True)
    log_ticks(axes.yaxis, StrMethodFormatter("{x:g}"))
    legend(figure, columns=5)
    return figure


FIGURES = {
    "steps.csv": {"speedup": speedups, "throughput": throughput, "roofline": roofline},
    "collapsed.csv": {"dims": dims},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the rows are (default: bench/results)"
    )
    add_out(parser, committed="docs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there are rows of it")
    arguments = parser.parse_args(argv)
    paths = [path for file in FIGURES if (path := arguments.results / file).exists()]
    if not paths:
        names = " or ".join(FIGURES)
        parser.error(f"there is no {names} in {arguments.results}: python bench/run.py --out {arguments.results}")
    found = {path: numbers(most_threads(read(path))) for path in paths}
    devices = {row["device"] for rows in found.values() for row in rows}
    device = arguments.device or ("cuda" if "cuda" in devices else "cpu")
    if device not in devices:
        parser.error(f"{', '.join(map(str, paths))}: no timed row of the device {device}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path, rows in found.items():
        rows = [row for row in rows if row["device"] == device]
        for name, draw in FIGURES[path.name].items() if rows else ():
            if (figure := draw(rows)) is not None:
                (arguments.out / f"{name}.png").write_bytes(png(figure))
                print(arguments.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
