"""Effective samples per second of samplers: fastebm's and those of peers, on laws whose moments are known.

Every contestant adapts itself first, untimed (sampling_contestants.py). Then rounds of draws are interleaved. The ESS
is arviz-stats' bulk ESS of all rounds' draws, of the coordinate or squared coordinate that mixes worst. It is divided
by the number of rounds times the median seconds of a round.

The draws must follow the law, or they have no speed: known means deviate by less than DEVIATION standard errors. A
sampler without an accept test is biased by its step size: it may deviate by BIAS standard deviations of the law more.

PyTorch's gradient of the energy, for all chains at once, is timed in the same rounds. ``of_gradients`` is its time,
times the gradients of a round, over that of the round: what an eager loop would spend on gradients alone. BlackJAX has
gradients of its own.

A case with several seeds is repeated, and each contestant has the row of its median speed.
"""

from __future__ import annotations

import math
import statistics
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fastebm.bench.cases import SamplingCase
from fastebm.bench.clock import MIN_ROUNDS, interleaved, past_share, quartiles, seconds_of
from fastebm.bench.efficiency import DEVIATION, deviations, effective_sizes
from fastebm.bench.problem import NOISE_SEED, SEED, Missing
from fastebm.bench.sampling_contestants import Contestant, Draw, Drawn
from fastebm.bench.sampling_targets import Target

BIAS = 0.1
GRADIENTS = 50  # timed together
CPU = torch.device("cpu")
COLUMNS = (
    "status", "correct", "deviation", "bias", "step_size", "acceptance", "draws", "ess", "gradients_per_draw",
    "ess_per_gradient", "rounds", "seconds", "seconds_q1", "seconds_q3", "of_gradients", "ess_per_s",
    "times_ebmkit", "times_blackjax", "note",
)  # fmt: skip


def race(
    case: SamplingCase, contestants: Iterable[Contestant], *, seconds: float = 6.0, budget: float = math.inf
) -> list[dict[str, Any]]:
    """One row per contestant that takes part in the case.

    Args:
        seconds: for the timed rounds of all, for each seed.
        budget: seconds that the minimum number of rounds of one contestant may take.
    """
    contestants = [c for c in contestants if not case.only or c.sampler in case.only]
    found = [_race(Target(case, SEED + i), contestants, seconds, budget) for i in range(case.seeds)]
    rows = {c: typical([of_seed[c] for of_seed in found]) for c in contestants}
    speeds = {c: row["ess_per_s"] for c, row in rows.items() if row["status"] == "ok"}
    for c, speed in speeds.items():
        for other, theirs in speeds.items():
            if other.sampler == c.sampler and other.library in ("ebmkit", "blackjax"):
                rows[c][f"times_{other.library}"] = speed / theirs
    return list(rows.values())


def typical(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the median speed, of one contestant's rows with several seeds. One that failed counts for all."""
    failed = [row for row in rows if row["status"] != "ok"]
    return failed[0] if failed else sorted(rows, key=lambda row: row["ess_per_s"])[len(rows) // 2]


def _race(p: Target, contestants: list[Contestant], seconds: float, budget: float) -> dict[Contestant, dict[str, Any]]:
    case, rows = p.case, {c: row_of(p.case, c) for c in contestants}
    drawn: dict[Contestant, list[Drawn]] = {}
    runs: dict[Contestant, Callable[[], object]] = {}
    torch.manual_seed(NOISE_SEED + p.seed)
    for c in contestants:
        try:
            bulk, of_mean = effective_sizes()
            draw = c.prepare(p, c.thin)
            draw()  # compiles
            estimate = seconds_of(draw, CPU)
            if (why := past_share(MIN_ROUNDS, estimate, budget)) is not None:
                rows[c] |= {"status": "skipped", "note": why}
                continue
            drawn[c] = []
            runs[c] = _kept(drawn[c], draw)
        except Missing as why:
            rows[c] |= {"status": "missing", "note": str(why)}
        except Exception as error:
            rows[c] |= {"status": "error", "note": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
    times: dict[Any, list[float]] = interleaved({**runs, None: lambda: eager_gradients(p, p.x0)}, seconds, CPU)
    gradient = statistics.median(times.pop(None)) / GRADIENTS
    for c, t in times.items():
        rows[c] |= summary(p, c, drawn[c], t, bulk, of_mean)
        if rows[c]["status"] == "ok" and c.library != "blackjax":
            rows[c]["of_gradients"] = rows[c]["gradients_per_draw"] * case.draws * gradient / rows[c]["seconds"]
    return rows


def row_of(case: SamplingCase, c: Contestant) -> dict[str, Any]:
    """The columns that define the case and the contestant, and empty ones for what is measured."""
    return {
        "energy": case.energy, "kind": case.kind, "dim": case.dim, "n_chains": case.n_chains, "device": "cpu",
        "contestant": c.name, "library": c.library, "sampler": c.sampler, "exact": "yes" if c.exact else "no",
        "thin": c.thin, "seeds": case.seeds,
    } | dict.fromkeys(COLUMNS, "") | {"status": "ok"}  # fmt: skip


def _kept(drawn: list[Drawn], draw: Draw) -> Callable[[], object]:
    return lambda: drawn.append(draw())


def eager_gradients(p: Target, x: torch.Tensor) -> None:
    """GRADIENTS gradients at x, as a loop in PyTorch takes them."""
    for _ in range(GRADIENTS):
        x = x.detach().requires_grad_()
        torch.autograd.grad(p.values(x).sum(), x)


def summary(
    p: Target, c: Contestant, drawn: list[Drawn], times: list[float], bulk: Callable[[Any], Any],
    of_mean: Callable[[Any], Any],
) -> dict[str, Any]:  # fmt: skip
    """The measured columns of a contestant, without its speed if its draws do not follow the law."""
    x = torch.cat([d.x for d in drawn], dim=1).double()
    deviation, error = deviations(*p.moments(x), of_mean)
    excess = (deviation - (0.0 if c.exact else BIAS)).clamp_min(0.0) / error
    ess = float(bulk(torch.cat([x, x.square()], dim=-1).numpy()).min())
    q1, median, q3 = quartiles(times)
    gradients = statistics.fmean(d.gradients for d in drawn)
    known = [d.acceptance for d in drawn if d.acceptance is not None]
    row: dict[str, Any] = {
        "correct": "yes", "deviation": float((deviation / error).max()), "bias": float(deviation.max()),
        "step_size": drawn[-1].step_size, "acceptance": statistics.fmean(known) if known else "",
        "draws": x.shape[1], "ess": ess, "gradients_per_draw": gradients,
        "ess_per_gradient": ess / (gradients * x.shape[0] * x.shape[1]), "rounds": len(times),
    }  # fmt: skip
    if not float(excess.max()) <= DEVIATION:
        return row | {"status": "FAILED", "correct": "no", "note": "its draws do not follow the law: not timed"}
    speed = ess / (len(times) * median)
    return row | {"seconds": median, "seconds_q1": q1, "seconds_q3": q3, "ess_per_s": speed}


def brief(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        deviation = f" ({row['deviation']:.3g} standard errors off)" if row["deviation"] != "" else ""
        return f"{row['contestant']}: {row['status']}: {row['note'][:160]}{deviation}"
    accepted = "" if row["acceptance"] == "" else f", {row['acceptance']:.2f} accepted"
    gradients = "" if row["of_gradients"] == "" else f" ({row['of_gradients']:.0%} of it eager gradients)"
    return (
        f"{row['contestant']}: {row['ess_per_s']:.3g} effective samples/s, {row['ess_per_gradient']:.2g} per gradient, "
        f"{row['gradients_per_draw']:.3g} gradients per draw, {1e3 * row['seconds']:.3g} ms a round{gradients}, "
        f"step size {row['step_size']:.3g}{accepted}, "
        f"{row['deviation']:.2g} standard errors off"
    )
