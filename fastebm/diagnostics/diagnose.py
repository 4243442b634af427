"""fastebm.diagnose: whether the states of a result can be trusted as samples."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import plot
from ..driver.arguments import checked_count
from ..driver.result import SampleResult
from .advice import advice
from .draws import Draws, as_array, draws_of
from .statistics import arviz, autocorrelations, statistics
from .step_bias import mala_acceptance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Diagnosis", "diagnose"]

# Quantities in the picture: those with the lowest ESS.
_SHOWN = 3

# Columns of the printed table, and their formats.
_FORMATS = {
    "mean": ".3g", "sd": ".3g", "mcse": ".2g", "ess_bulk": ".0f", "ess_tail": ".0f", "rhat": ".3f",
    "rhat_nested": ".3f", "ess_per_second": ".3g",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What ``diagnose`` found. ``print`` it for a table and the warnings.

    Attributes:
        table: columns by name, each a list with one entry per quantity. ``pandas.DataFrame(diagnosis.table)`` works.
            name: a coordinate of the state, as x[3], or "energy". mean, sd, and mcse: Monte-Carlo standard error of the
            mean. ess_bulk, ess_tail: effective draws of all chains together, for the mean and for the 5% and 95%
            quantiles. rhat: of rank-normalised split chains; NaN for one chain. rhat_nested: only with superchains.
            ess_per_second: the lower ESS per second of the steps after the warm-up.
        summary: numbers of the whole call by name: chains, draws (per chain), dims, seconds, acceptance, divergences
            (fraction of steps), swap_acceptance (of the pair of temperatures with the lowest), mala_acceptance (of
            ``Langevin``'s steps in a Metropolis test). Only those that apply.
        warnings: what would mislead, in words. Empty if nothing was found.
        series: (n_chains, draws) values of the quantities in the picture, by name.
    """

    table: Mapping[str, list[Any]]
    summary: Mapping[str, float]
    warnings: list[str]
    series: Mapping[str, NDArray[Any]]

    def __str__(self) -> str:
        names = [name for name in self.table if name != "name"]
        rows = [["", *names]]
        for i, label in enumerate(self.table["name"]):
            rows.append([label, *(format(self.table[name][i], _FORMATS[name]) for name in names)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [", ".join(f"{name} {value:.4g}" for name, value in self.summary.items())]
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        lines.append("warnings:" if self.warnings else "no warnings")
        lines += [textwrap.fill(text, 100, initial_indent="- ", subsequent_indent="  ") for text in self.warnings]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """One picture of the quantities with the lowest ESS: their traces, ranks and autocorrelations.

        path: a file to write, .png, .jpg or .pdf; or None.
        """
        rows = {name: (values, autocorrelations(values)) for name, values in self.series.items()}
        figure = plot.chains_figure(rows, title="The quantities with the lowest ESS")
        if path is not None:
            file = Path(path)
            file.write_bytes(plot.encoded(figure, file.suffix.lstrip(".").lower() or "png"))
        return figure


def diagnose(
    result: SampleResult, *, chains: Any = None, superchains: int | None = None, coordinates: int = 6,
    energy: bool = True,
) -> Diagnosis:  # fmt: skip
    """Diagnose the chains of a result: statistics, and warnings where these states would mislead as samples of exp(-E).

    It looks at ``result.trajectory``, and changes nothing: not the model, the generators or the result.

    Warnings: chains that stopped, never moved or diverged; a temperature other than 1; the step-size bias of
    ``Langevin`` (from a Metropolis test of its steps; that of noise_first and of other samplers without an accept
    test is not measured, and a warning says so); clips and clamps; R-hat; chains that stay in separate regions; few
    effective draws. Chains that all sit in one of several modes look like chains that have explored everything: start
    them far apart.

    Args:
        result: of ``sample(..., thin=1)``, or a larger thin.
        chains: the chains to look at, a mask (n_chains,) or a list of their numbers. None: all. With labels or
            conditions chains sample different laws: diagnose each law by itself.
        superchains: for many short chains, the number of groups of consecutive chains that shared a start, as in
            init=starts.repeat_interleave(128, dim=0) with superchains=len(starts). The groups are compared by nested
            R-hat, to which a chain may contribute a few draws. Chains of a group must share their start: if they do
            not, their means average over starts, and groups agree however short the chains are.
        coordinates: how many coordinates to examine: those that mix worst by a cheap estimate for all.
        energy: examine the energy too. It is evaluated once per stored state.

    Raises:
        TypeError, ValueError: the result has no or too few states, or an argument is wrong.
        ImportError: arviz-stats is not installed.
    """
    arviz()
    coordinates = checked_count("coordinates", coordinates)
    draws = draws_of(result, chains)
    n, n_draws, dim = draws.x.shape
    if superchains is not None:
        _check_superchains(superchains, draws)
    series = {draws.name(i): draws.values(i) for i in draws.worst(coordinates)}
    energies = result.trajectory_energies()[draws.rows] if energy else None
    if energies is not None and bool(energies.isfinite().all()) and bool((energies != energies[0, 0]).any()):
        series["energy"] = as_array(energies)
    rows = [{"name": name, **statistics(values, superchains)} for name, values in series.items()]
    if not rows:
        raise ValueError("there is nothing to diagnose: no coordinate ever changes, or coordinates=0 and energy=False")
    table: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    info = result.info
    ess = [min(pair) for pair in zip(table["ess_bulk"], table["ess_tail"], strict=True)]
    if info.seconds:
        table["ess_per_second"] = [value / info.seconds for value in ess]
    metropolis = mala_acceptance(result, draws.rows)
    swaps = None if info.swap_acceptance is None else as_array(info.swap_acceptance[draws.rows].nanmean(dim=0))
    numbers = {
        "chains": n,
        "draws": n_draws,
        "dims": dim,
        "seconds": info.seconds,
        "acceptance": None if info.acceptance is None else info.acceptance[draws.rows].double().mean(),
        "divergences": None if info.divergences is None else info.divergences[draws.rows].double().mean(),
        "swap_acceptance": None if swaps is None or np.isnan(swaps).all() else np.nanmin(swaps),
        "mala_acceptance": metropolis,
    }
    summary = {name: float(value) for name, value in numbers.items() if value is not None}
    warnings = advice(result, draws, table, energies, metropolis)
    lowest = sorted(range(len(rows)), key=lambda i: ess[i])[:_SHOWN]
    return Diagnosis(table, summary, warnings, {name: series[name] for name in (table["name"][i] for i in lowest)})


def _check_superchains(superchains: int, draws: Draws) -> None:
    superchains, n = checked_count("superchains", superchains), len(draws.rows)
    if superchains < 2 or n % superchains != 0:
        stopped = f" ({draws.stopped} more stopped)" if draws.stopped else ""
        raise ValueError(f"superchains must be at least 2 and divide the {n} chains{stopped}, got {superchains}")
