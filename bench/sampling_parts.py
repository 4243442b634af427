"""Where the time of a sampler's step goes, on the laws and with the settings of sampling.py.

    python bench/sampling_parts.py       some minutes; writes sampling_parts.csv into --out

Clocks run within the steps of ``fastebm.sample``:

- gradients: in evaluations of the energy.
- numbers: in draws of random numbers.
- loop: outside the sampler's steps: the call, the loop, states that are stored, averages of what steps report.

The same call without clocks is the whole. What is left of it is the sampler's own: moves, accept tests, trees. A
sampler with a fused run (backends/table.py) is timed as a whole only: breakdown.py has the parts of such a run.

In the same rounds run the steps of the same sampler by its peers, and a plain loop of torch.autograd.grad ("eager"),
which tells what as many gradients would take there. The fastest round of each counts, since noise only slows a machine
down.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from fastebm.bench.breakdown import fastest
from fastebm.bench.cases import SAMPLING, SamplingCase
from fastebm.bench.problem import NOISE_SEED, Missing
from fastebm.bench.rows import add_out, provenance, rounded, script, write
from fastebm.bench.run import PEERS, on_threads
from fastebm.bench.sampling import GRADIENTS, eager_gradients
from fastebm.bench.sampling_contestants import CONTESTANTS
from fastebm.bench.sampling_targets import Target

import fastebm
from fastebm import SampleResult
from fastebm.backends.table import FUSED_RUNS

SECONDS = 3.0  # of timed runs per law and sampler, or three rounds
PEERS_DRAWS = 25  # of a peer's run, whose time per draw does not depend on their number
LIBRARIES = ("fastebm", "ebmkit", "blackjax")
SAMPLERS = tuple(c.sampler for c in CONTESTANTS if c.library == "fastebm")

Row = dict[str, Any]


# -- clocks within a run -------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Seconds in some calls. results: how many of them computed tensors, if ``Clocked`` counts them."""

    seconds: float = 0.0
    results: int = 0

    def of(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call the method."""
        start = perf_counter()
        found = method(*arguments, **options)
        self.seconds += perf_counter() - start
        return found


class Clocked:
    """A target (targets/base.py) or random numbers (rng.py), with a clock on all methods, and on those of its parts."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            found = self._clock.of(value, *arguments, **options)
            if isinstance(found, type(self._inner)):
                return Clocked(found, self._clock)
            self._clock.results += 1
            return found

        return call


class Tile:
    """Clocks on chains that move together, on one thread."""

    def __init__(self, target: Any, noise: Any) -> None:
        self.step, self.gradients, self.numbers = Clock(), Clock(), Clock()
        self.target = replace(target, target=Clocked(target.target, self.gradients))
        self.noise = Clocked(noise, self.numbers)


def clocked(result: SampleResult, steps: int, thin: int) -> tuple[dict[str, float], SampleResult]:
    """Go on from a result with clocks: the number of gradients and the seconds of each part, per step."""
    kind, tiles = type(result.sampler), dict[Any, Tile]()

    def step(self: Any, target: Any, state: Any, noise: Any, t: int) -> Any:
        if noise not in tiles:
            tiles[noise] = Tile(target, noise)
        tile = tiles[noise]
        return tile.step.of(kind.step, self, tile.target, state, tile.noise, t)

    made = type(kind.__name__, (kind,), {"step": step})  # a class of its own, which has no fused run
    sampler = made(**{f.name: getattr(result.sampler, f.name) for f in fields(result.sampler)})
    whole = Clock()
    new = whole.of(continued, replace(result, info=replace(result.info, sampler=sampler)), steps, thin)
    at_once = min(len(tiles), torch.get_num_threads())  # as each thread takes its own tiles
    inside, gradients, numbers = (
        sum(getattr(tile, name).seconds for tile in tiles.values()) / at_once
        for name in ("step", "gradients", "numbers")
    )
    parts = {"gradients_seconds": gradients, "numbers_seconds": numbers, "loop_seconds": whole.seconds - inside}
    taken = sum(tile.gradients.results for tile in tiles.values()) / len(tiles)
    return {"gradients": taken / steps, **{name: value / steps for name, value in parts.items()}}, new


def continued(result: SampleResult, steps: int, thin: int) -> SampleResult:
    """Go on from a result, which stays as it is."""
    return fastebm.sample(result.energy, init=result, steps=steps, thin=thin)


# -- rows ----------------------------------------------------------------------------------------------------------


def rows_of(key: str, case: SamplingCase, sampler: str, seconds: float = SECONDS) -> list[Row]:
    """One row per library that has the sampler, fastebm first. Gradients and seconds are per step of all chains."""
    ours, *peers = (c for c in CONTESTANTS if c.sampler == sampler and c.library in LIBRARIES)
    p, few = Target(case), Target(replace(case, draws=min(case.draws, PEERS_DRAWS)))
    result, steps = ours.prepare.started(p), case.draws * ours.thin
    of_parts = [clocked(result, steps, ours.thin)[0]]
    fused = (type(result.sampler), result.info.path, result.info.kernels) in FUSED_RUNS
    rows: dict[str, Row] = {"fastebm": {"steps": steps, "gradients": of_parts[0]["gradients"]}}
    runs: dict[str, Callable[[], object]] = {"fastebm": partial(continued, result, steps, ours.thin)}
    if not fused:
        runs["parts"] = lambda: of_parts.append(clocked(result, steps, ours.thin)[0])
    torch.manual_seed(NOISE_SEED)
    for c in peers:
        try:
            runs[c.library] = draw = c.prepare(few, c.thin)
        except Missing:
            continue
        rows[c.library] = {"steps": few.case.draws * c.thin, "gradients": draw().gradients / c.thin}
    # fastebm evaluates copies of chains together, such as those of a ladder, and ebmkit one after another
    eager = {"fastebm": p.x0.repeat(result.sampler.rows_per_chain, 1), "ebmkit": p.x0}
    runs |= {f"{library} eager": partial(eager_gradients, p, x) for library, x in eager.items()}

    found = fastest(runs, seconds)
    for library, row in rows.items():
        row["seconds"] = found[library] / row["steps"]
        if library in eager:
            row["eager_seconds"] = row["gradients"] * found[f"{library} eager"] / GRADIENTS
    if not fused:
        row = rows["fastebm"]
        row |= {name: min(parts[name] for parts in of_parts) for name in of_parts[0]}
        row["own_seconds"] = row["seconds"] - sum(row[f"{part}_seconds"] for part in ("gradients", "numbers", "loop"))
    about = {"case": key, "energy": case.energy, "n_chains": case.n_chains, "threads": torch.get_num_threads()}
    return [rounded({**about, "sampler": sampler, "library": library, **row}) for library, row in rows.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    add_out(parser)
    arguments = parser.parse_args(argv)
    rows = []
    with on_threads(None):
        for key, case in SAMPLING.items():
            for sampler in () if case.only else SAMPLERS:
                rows += rows_of(key, case, sampler)
    for row in rows:
        print(*row.values())
    write(arguments.out / "sampling_parts.csv", rows, provenance(*PEERS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
