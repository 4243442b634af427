"""Pictures of a run, from numbers that are already there: nothing here samples or measures.

Figures are made without pyplot, so nothing global in matplotlib changes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["encoded", "energies_figure", "marginals_figure", "plane_figure", "png", "samples_figure", "training_figure"]

# One colour a kind in every picture (Okabe & Ito's palette, told apart by colour-blind readers too).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_REAL, _SAMPLES, _OTHER, _QUIET = "#0072B2", "#D55E00", "#009E73", "#666666"


# Energies so far above the lowest are drawn white: at temperature 1 a state is e^10 times less likely there.
_DEPTH = 10.0

# More histograms can't be read in one picture.
_MAX_MARGINALS = 12


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    return encoded(figure, "png")


def encoded(figure: Figure, kind: str) -> bytes:
    """The figure as a file. kind: "png", "jpg" or "pdf"."""
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=150)
    return data.getvalue()


def _mosaic(images: NDArray[Any], columns: int, gap: int = 1) -> NDArray[Any]:
    """(n, height, width) -> one image; gaps and missing images are NaN, which imshow leaves blank."""
    n, height, width = images.shape
    rows = -(-n // columns)
    out = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap), np.nan)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        out[top : top + height, left : left + width] = image
    return out


def samples_figure(panels: Mapping[str, ArrayLike], *, title: str = "", columns: int | None = None) -> Figure:
    """Grids of images side by side: panel title -> (n, height, width) in [0, 1], drawn as ink on paper."""
    grids = []
    for images in panels.values():
        images = np.asarray(images)
        if images.ndim != 3 or len(images) == 0:
            raise ValueError(f"a panel is (n, height, width) with n >= 1, got shape {images.shape}")
        grids.append(_mosaic(images, columns or int(np.ceil(np.sqrt(len(images))))))
    rows, across = grids[0].shape
    width = min(max(across * 0.05, 3.6), 20.0)  # 7 dots or more a pixel, while the picture is not huge
    height = min(max(width * rows / across, 1.0), 40.0)
    figure = _figure(width * len(grids), height + (0.52 if title else 0.28), title)
    for axes, name, grid in zip(figure.subplots(1, len(grids), squeeze=False)[0], panels, grids, strict=True):
        axes.imshow(grid, cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.set_facecolor("#B8CCDD")  # the gaps
        axes.set_title(name, fontsize=10)
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
    """Points in the plane, panel title -> (n, 2), first data and then samples, beside the landscape of an energy; or
    samples over it.

    Args:
        landscape: (m + 1, 2) edges of its cells in x and y, and (m, m) energies in them, y first.
    """
    edges, energies = landscape
    names = list(panels) if over else [*panels, "Energy"]
    colours = dict(zip(panels, [_SAMPLES] if over else [_REAL, _SAMPLES], strict=False))
    figure = _figure(4.6 * len(names), (4.6 if over else 4.2) + (0.4 if title else 0.0), title)  # a scale takes width
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        if over or name not in panels:
            bottom = energies.min()
            mesh = axes.pcolormesh(
                edges[:, 0], edges[:, 1], energies - bottom, cmap="Blues_r", vmin=0.0, vmax=_DEPTH, rasterized=True
            )
            if not over:
                figure.colorbar(mesh, ax=axes, shrink=0.8, extend="max", label="E − min E (nats)")
        if name in panels:
            x = np.asarray(panels[name])
            axes.plot(x[:, 0], x[:, 1], ".", color=colours[name], markersize=2.5, markeredgewidth=0)
        axes.set(title=name, xlabel=columns[0], ylabel=columns[1])
        axes.title.set_fontsize(10)
        axes.set_xlim(edges[0, 0], edges[-1, 0])
        axes.set_ylim(edges[0, 1], edges[-1, 1])
        axes.set_box_aspect(1)
    return figure


def marginals_figure(sets: Mapping[str, ArrayLike], columns: Sequence[str], *, title: str = "") -> Figure:
    """Histograms of area 1, a panel a column (of the first twelve): set -> (n, dim) values."""
    values = {name: np.asarray(x, np.float64) for name, x in sets.items()}
    shown = list(columns)[:_MAX_MARGINALS]
    if len(shown) < len(columns):
        title = f"{title}{chr(10) if title else ''}the first {len(shown)} of {len(columns)} columns"
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = _figure(max(3.2 * across, 6.0), 2.4 * down + 1.0, title)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for i, axes in enumerate(grid):
        if i >= len(shown):
            axes.set_axis_off()
            continue
        edges = np.histogram_bin_edges(np.concatenate([x[:, i] for x in values.values()]), 30).tolist()
        for (name, x), colour in zip(values.items(), _COLOURS, strict=False):
            axes.hist(x[:, i], edges, density=True, color=colour, alpha=0.3)
            axes.hist(x[:, i], edges, density=True, color=colour, histtype="step", linewidth=1.3, label=name)
        axes.set_title(shown[i], fontsize=9)
        axes.set_yticks([])
        _tidy(axes)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(values), frameon=False)
    return figure


def energies_figure(
    energies: Mapping[str, ArrayLike], close_up: Sequence[str] = (), *, title: str = "Energies: lower is likelier"
) -> Figure:
    """Histograms of area 1: name -> (n,) energies, all on one axis, and those named in close_up on another."""
    values = {name: np.asarray(e, np.float64).ravel() for name, e in energies.items()}
    colours = dict(zip(values, _COLOURS, strict=False))
    panels = [("All", list(values), 80), *([("Close up", list(close_up), 40)] if close_up else [])]
    figure = _figure(7.0 * len(panels), 4.2, title)
    for axes, (name, shown, bins) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        edges = np.histogram_bin_edges(np.concatenate([values[k] for k in shown]), bins).tolist()
        for k in shown:
            axes.hist(values[k], edges, density=True, color=colours[k], alpha=0.35)
            axes.hist(values[k], edges, density=True, color=colours[k], histtype="step", linewidth=1.4, label=k)
        axes.set(title=name, xlabel="energy E(x)", ylabel="density")
        axes.legend(frameon=False)
        _tidy(axes)
    return figure


def training_figure(metrics: Sequence[Mapping[str, float]], *, title: str = "Training") -> Figure:
    """Curves of a run, one point a step: energies, their gap, the gradient's norm, and the speed."""
    if not metrics:
        raise ValueError("there is no step to draw")
    columns = {key: np.array([row[key] for row in metrics], np.float64) for key in metrics[0]}
    step = columns["step"]
    figure = _figure(10.0, 6.4, title)
    (energies, gap), (norm, speed) = figure.subplots(2, 2, sharex=True)

    _curve(energies, step, columns["energy_real"], _REAL, "real data")
    _curve(energies, step, columns["energy_samples"], _SAMPLES, "samples of the pool")
    energies.set(title="Mean energies", ylabel="energy")
    energies.legend(frameon=False)
    _curve(gap, step, columns["energy_gap"], _OTHER)
    gap.axhline(0.0, color=_QUIET, linewidth=0.8)
    gap.set(title="Energy gap: samples minus real", ylabel="energy")
    _curve(norm, step, columns["grad_norm"], _OTHER)
    norm.set(title="Gradient norm before clipping", xlabel="step", ylabel="norm")
    if (columns["grad_norm"] > 0).any():
        norm.set_yscale("log")
    _curve(speed, step, columns["chain_steps_per_second"] / 1e3, _OTHER)
    speed.set(title="Speed", xlabel="step", ylabel="thousand chain-steps / s")
    speed.set_ylim(bottom=0.0)
    for axes in (energies, gap, norm, speed):
        _tidy(axes)
    return figure


def _curve(axes: Any, step: NDArray[Any], value: NDArray[Any], colour: str, label: str | None = None) -> None:
    """Every step faintly, and the mean of a sliding window on top."""
    window = max(1, len(step) // 60)
    axes.plot(step, value, color=colour, linewidth=0.6, alpha=0.3)
    smooth = np.convolve(value, np.ones(window) / window, mode="valid")
    axes.plot(step[window - 1 :], smooth, color=colour, linewidth=1.6, label=label)


def _tidy(axes: Any) -> None:
    axes.grid(True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
