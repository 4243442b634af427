"""Pictures of a run. They are drawn from given numbers: nothing here samples or measures.

Figures are made without pyplot, so nothing global in matplotlib changes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "WIDTH",
    "bin_edges",
    "blank",
    "chains_figure",
    "difference",
    "encoded",
    "energies_figure",
    "legend",
    "log_ticks",
    "marginals_figure",
    "mosaic",
    "plane_figure",
    "png",
    "samples_figure",
    "training_figure",
]

# The same colour for the same thing in every picture, from Okabe & Ito's palette for colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_REAL, _SAMPLES, _OTHER, _QUIET = "#0072B2", "#D55E00", "#009E73", "#666666"

# Inches. Most pictures are 1,500 dots wide; a README's column shrinks them to 830, where 10 points are 11 dots.
WIDTH = 10.0

# Inches. At most 2,000 dots, the width of a large window.
_MAX_WIDTH = 13.3

# Energies this far above the lowest are drawn white: at temperature 1 such states are e^10 times less likely.
_DEPTH = 10.0

# More histograms in one picture, five in a row, would be illegible.
_MAX_MARGINALS = 30

# Traces in one panel: more would hide each other.
_MAX_TRACES = len(_COLOURS)

_RANK_BINS = 20

# Rows of a heat map that have at least a dot each.
_MAX_NEAREST = 200

# Values closer than this fraction of their range count as equal, since states are rounded to float32.
_SAME = 1e-6


def blank(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title. Its layout makes room for what is drawn in it. width, height: in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    if title:
        points = 12.0 * max(1.0, width / WIDTH)  # a wider picture is scaled down more
        lines = [_wrapped(line, round(120.0 * width / points)) for line in title.split("\n")]
        figure.suptitle("\n".join(lines), fontsize=points, parse_math=False)
    return figure


def _wrapped(text: str, width: int, max_lines: int | None = None) -> str:
    """The text in lines of at most ``width`` characters."""
    return textwrap.fill(text, width, max_lines=max_lines, placeholder="…")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    return encoded(figure, "png")


def encoded(figure: Figure, kind: str) -> bytes:
    """The figure as a file. kind: "png", "jpg" or "pdf"."""
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=150)
    return data.getvalue()


def mosaic(images: NDArray[Any], columns: int, gap: int = 1) -> NDArray[Any]:
    """(n, height, width) -> one image. Gaps and missing images are NaN, which imshow leaves blank."""
    n, height, width = images.shape
    rows = -(-n // columns)
    out = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap), np.nan)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        out[top : top + height, left : left + width] = image
    return out


def samples_figure(panels: Mapping[str, ArrayLike], *, title: str = "") -> Figure:
    """Grids of images side by side. panels: title -> (n, height, width) in [0, 1], 1 is black."""
    grids = []
    for images in panels.values():
        images = np.asarray(images)
        if images.ndim != 3 or len(images) == 0:
            raise ValueError(f"a panel is (n, height, width) with n >= 1, got shape {images.shape}")
        grids.append(mosaic(images, math.ceil(math.sqrt(len(images)))))
    rows, across = grids[0].shape
    width = min(len(grids) * max(across * 0.05, 3.6), _MAX_WIDTH)  # at least 7 dots per pixel, while there is room
    figure = blank(width, width / len(grids) * rows / across + (0.52 if title else 0.28), title)
    for axes, name, grid in zip(figure.subplots(1, len(grids), squeeze=False)[0], panels, grids, strict=True):
        # imshow smooths by itself if pixels would be, say, two or three dots wide in turn.
        axes.imshow(grid, cmap="gray_r", vmin=0.0, vmax=1.0)
        axes.set_facecolor("#B8CCDD")  # the gaps
        axes.set_title(name, fontsize=10.0 * max(1.0, width / WIDTH))
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def plane_figure(
    panels: Mapping[str, ArrayLike],
    landscape: tuple[NDArray[Any], NDArray[Any]],
    columns: Sequence[str] = ("x", "y"),
    *,
    over: bool = False,
    title: str = "",
) -> Figure:
    """Points in the plane beside the landscape of an energy, or over it.

    Args:
        panels: title -> (n, 2), first data and then samples.
        landscape: (m + 1, 2) edges of its cells in x and in y, and (m, m) energies of the cells, y first.
        over: draw the points over the landscape.
    """
    edges, energies = landscape
    names = list(panels) if over else [*panels, "Energy"]
    colours = dict(zip(panels, (_REAL, _SAMPLES), strict=False))
    figure = blank(6.4 if over else WIDTH, 5.4 if over else 4.0, title)
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        if over or name not in panels:
            mesh = axes.pcolormesh(
                edges[:, 0], edges[:, 1], energies - energies.min(), cmap="Blues_r", vmin=0.0, vmax=_DEPTH,
                rasterized=True,
            )  # fmt: skip
            figure.colorbar(mesh, ax=axes, shrink=0.8, extend="max", label="E − min E (nats)")
        if name in panels:
            x = np.asarray(panels[name])
            # Over the energy, a white rim sets the points off from the dark blue.
            for colour, size in [("white", 6.0), (_SAMPLES, 4.0)] if over else [(colours[name], 2.5)]:
                # Points on the edge of the box are ordinary samples: do not cut them in half.
                axes.plot(
                    x[:, 0], x[:, 1], ".", color=colour, markersize=size, markeredgewidth=0, clip_on=False, zorder=3
                )
        axes.set_title(_wrapped(name, 30), fontsize=10)
        axes.set_xlabel(_wrapped(columns[0], 30, 2), parse_math=False)
        axes.set_xlim(edges[0, 0], edges[-1, 0])
        axes.set_ylim(edges[0, 1], edges[-1, 1])
        axes.set_box_aspect(1)
    figure.axes[0].set_ylabel(_wrapped(columns[1], 30, 2), parse_math=False)
    return figure


def marginals_figure(
    sets: Mapping[str, ArrayLike], columns: Sequence[str], bounds: ArrayLike, *, title: str = ""
) -> Figure:
    """Normalised histograms, one panel per column.

    If there are too many columns, those are shown where the two sets have the largest Kolmogorov-Smirnov statistic.

    Args:
        sets: name -> (n, dim) values, first data and then samples.
        bounds: (2, dim), the clamp of the chains. It is drawn where samples lie on it.
    """
    values = {name: np.asarray(x, np.float64) for name, x in sets.items()}
    bounds = np.asarray(bounds)
    shown = list(range(len(columns)))
    if len(columns) > _MAX_MARGINALS:
        furthest = np.argsort([-difference(*(x[:, i] for x in values.values())) for i in shown], kind="stable")
        shown = sorted(furthest[:_MAX_MARGINALS].tolist())
        title += (
            f"\nthe {len(shown)} of {len(columns)} columns where samples differ most from data (Kolmogorov-Smirnov)"
        )
    across = min(4 if len(shown) <= 12 else 5, len(shown))
    down = -(-len(shown) // across)
    figure = blank(WIDTH if across > 1 else 6.4, (1.7 if down > 1 else 2.6) * down + 1.0, title.strip())
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for i, axes in zip(shown, grid, strict=False):
        for (name, x), colour in zip(values.items(), _COLOURS, strict=False):
            _histogram(axes, x[:, i], colour, name)
        for bound in bounds[:, i]:
            if any((x[:, i] == bound).any() for x in values.values()):
                axes.axvline(bound, color=_QUIET, linestyle=":", linewidth=1.0, label="bound of the chains")
        axes.set_xlabel(_wrapped(columns[i], 26, 2), fontsize=9, parse_math=False)
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=4)
        axes.ticklabel_format(scilimits=(-3, 5), useMathText=True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_offset_text().set_fontsize(8)
        _tidy(axes)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.supylabel("density", fontsize=10)
    legend(figure)
    return figure


def difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The Kolmogorov-Smirnov statistic: the largest distance between the two empirical distribution functions."""
    at = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def energies_figure(
    energies: Mapping[str, ArrayLike], close_up: Sequence[str] = (), *, title: str = "Energies: lower is likelier"
) -> Figure:
    """Normalised histograms of energies, name -> (n,): all on one axis, and those named in close_up on another."""
    values = {name: np.asarray(e, np.float64).ravel() for name, e in energies.items()}
    colours = dict(zip(values, _COLOURS, strict=False))
    panels = {"All": list(values), **({"Close up": list(close_up)} if close_up else {})}
    figure = blank(WIDTH, 4.4, title)
    for axes, (name, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for k in shown:
            _histogram(axes, values[k], colours[k], k)
        axes.set(title=name, xlabel="energy E(x) (nats)", ylabel="density (per nat)")
        _tidy(axes)
    legend(figure)
    return figure


def _histogram(axes: Any, x: NDArray[Any], colour: str, label: str) -> None:
    """A normalised histogram. The bins depend on the number of its values: see ``bin_edges``."""
    edges = bin_edges(x)
    axes.hist(x, edges, density=True, color=colour, alpha=0.3)
    axes.hist(x, edges, density=True, color=colour, histtype="step", linewidth=1.3, label=label)


def bin_edges(x: NDArray[Any]) -> NDArray[Any]:
    """Edges of histogram bins by the rule of Freedman & Diaconis (1981), but at most 2 sqrt(n) bins.

    Too many bins show modes that are not there: for 71 normal values, 30 bins show a second hump in 58 % of cases,
    these bins in 5 %. Of two modes that are six deviations apart, they show both in 90 %.

    If the values are multiples of a step, such as integers, each bin holds equally many of them and ends halfway
    between two. Bins for a single value are half as wide as a step, as there is nothing in between.
    """
    lo, hi, n = float(x.min()), float(x.max()), len(x)
    if lo == hi:
        return np.array([lo - 0.5, lo + 0.5])
    spread = hi - lo
    lower, upper = np.percentile(x, (25, 75))
    width = max(2.0 * (upper - lower) / n ** (1 / 3), spread / (2.0 * math.sqrt(n)))
    n_bins = math.ceil(spread / width)
    gaps = np.diff(np.unique(x))
    n_steps = round(spread / float(gaps[gaps > _SAME * spread].min()))
    step = spread / n_steps
    steps = (x - lo) / step
    if np.abs(steps - steps.round()).max() > 0.01:
        return np.linspace(lo, hi, n_bins + 1)
    if n_steps < 2 * n_bins:
        return lo + step * (np.arange(2 * n_steps + 2) / 2.0 - 0.25)
    return lo + step * (np.round(np.linspace(0.0, n_steps + 1, n_bins + 1)) - 0.5)


def training_figure(metrics: Sequence[Mapping[str, float]], *, title: str = "Training") -> Figure:
    """Curves over the steps of a run: energies and their gap, or else the loss and the learning rate; the norm of the
    gradient, and the speed."""
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    if not metrics:
        raise ValueError("there is no step to draw")
    columns = {key: np.array([row[key] for row in metrics], np.float64) for key in metrics[0]}
    step = columns["step"]
    figure = blank(WIDTH, 6.6, title)
    (energies, gap), (norm, speed) = figure.subplots(2, 2, sharex=True)

    if "energy_gap" in columns:
        _curve(energies, step, columns["energy_real"], _REAL, "energy of real data")
        _curve(energies, step, columns["energy_samples"], _SAMPLES, "energy of samples")
        energies.set(title="Mean energies", ylabel="energy (nats)")
        _curve(gap, step, columns["energy_gap"], _OTHER)
        gap.axhline(0.0, color=_QUIET, linewidth=0.8)
        gap.set(title="Energy gap: samples minus real", ylabel="energy (nats)")
    else:
        _curve(energies, step, columns["loss"], _OTHER)
        energies.set(title="Loss", ylabel="loss")
        _curve(gap, step, columns["learning_rate"], _OTHER)
        gap.set(title="Learning rate", ylabel="learning rate")
    _curve(norm, step, columns["grad_norm"], _OTHER)
    norm.set(title="Gradient norm before clipping", xlabel="step", ylabel="norm")
    if (columns["grad_norm"] > 0).any():
        norm.set_yscale("log")
        log_ticks(norm.yaxis, StrMethodFormatter("{x:g}"))
    rate = "chain_steps_per_second" if "chain_steps_per_second" in columns else "rows_per_second"
    _curve(speed, step, columns[rate], _OTHER)
    speed.set(title="Speed", xlabel="step", ylabel=f"{rate.removesuffix('_per_second').replace('_', '-')} / s")
    speed.set_ylim(bottom=0.0)
    speed.yaxis.set_major_formatter(EngFormatter())
    for axes in (energies, gap, norm, speed):
        _tidy(axes)
    legend(figure)
    return figure


def _curve(axes: Any, step: NDArray[Any], value: NDArray[Any], colour: str, label: str | None = None) -> None:
    """Every step as a faint line, and a running mean on top."""
    around = len(step) // 120
    window = 2 * around + 1
    if window > 1:
        axes.plot(step, value, color=colour, linewidth=0.6, alpha=0.3)
        value = np.convolve(value, np.ones(window) / window, mode="valid")
        label = label and f"{label}, mean of {window} steps"
    marker = "o" if len(value) == 1 else ""  # a line with one point is invisible
    axes.plot(step[around : around + len(value)], value, color=colour, linewidth=1.6, marker=marker, label=label)


def chains_figure(rows: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], *, title: str = "") -> Figure:
    """A row of panels per quantity: traces of a few chains, ranks of all chains, autocorrelation.

    A rank is the place of a state among the states of all chains. In equilibrium every chain has each rank equally
    often. The panel is a histogram per chain, as in Vehtari et al. 2021, with colours for heights.

    Args:
        rows: name -> (n_chains, draws) values, and autocorrelations (lags,).
    """
    figure = blank(WIDTH, 2.3 * len(rows) + 0.8, title)
    grid = figure.subplots(len(rows), 3, squeeze=False, width_ratios=(1.5, 1, 1))
    for (name, (values, correlation)), (trace, ranks, lags) in zip(rows.items(), grid, strict=True):
        n, draws = values.shape
        order = np.argsort(np.argsort(values, axis=None, kind="stable"), kind="stable").reshape(n, draws)
        by_rank = np.argsort(order.mean(axis=1), kind="stable")
        shown = np.unique(by_rank[np.linspace(0, n - 1, min(n, _MAX_TRACES)).astype(int)])
        for i, colour in zip(shown, _COLOURS, strict=False):
            trace.plot(np.arange(1, draws + 1), values[i], color=colour, linewidth=0.7, alpha=0.8)
        trace.set_ylabel(_wrapped(name, 20, 2), parse_math=False)
        bins = min(_RANK_BINS, draws)
        heights = [np.histogram(order[i], bins, (0, n * draws))[0] * bins / draws for i in by_rank]
        mesh = ranks.imshow(
            heights, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto", extent=(0, 1, n + 0.5, 0.5),
            interpolation="nearest" if n <= _MAX_NEAREST else "antialiased",
        )  # fmt: skip
        figure.colorbar(mesh, ax=ranks, ticks=[0, 1, 2], extend="max")
        ranks.yaxis.get_major_locator().set_params(integer=True)
        lags.axhline(0.0, color=_QUIET, linewidth=0.8)
        zero = np.flatnonzero(correlation < 0.05)
        # Few pairs of states are further apart than half of a chain: their correlation is noise.
        last = min(len(correlation) // 2 + 1, max(20, 3 * int(zero[0] if len(zero) else len(correlation))))
        lags.plot(np.arange(last), correlation[:last], color=_REAL, linewidth=1.6)
        lags.set_ylim(min(-0.1, float(correlation[:last].min())), 1.05)
        for axes in (trace, lags):
            _tidy(axes)
        if trace in grid[0]:
            trace.set_title(f"Traces of {len(shown)} of {n} chains", fontsize=10)
            ranks.set_title("Frequency of ranks (1 is even)", fontsize=10)
            lags.set_title("Autocorrelation", fontsize=10)
        ranks.set_ylabel("chain, by mean rank")
        if trace in grid[-1]:
            trace.set_xlabel("draw")
            ranks.set_xlabel("rank / number of states")
            lags.set_xlabel("lag (draws)")
    return figure


def log_ticks(axis: Any, formatter: Any) -> None:
    """Readable ticks for a logarithmic axis: 1, 2, 5, 10, ...; within a single decade, those of a linear axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    lo, hi = axis.get_view_interval()
    if hi < 10.0 * lo:
        axis.set_major_locator(MaxNLocator(6))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if hi < 1e3 * lo else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(formatter)


def legend(figure: Figure, columns: int = 3) -> None:
    """One legend for all axes, below them, where it hides nothing."""
    there = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(there.values(), there.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _tidy(axes: Any) -> None:
    axes.grid(True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
