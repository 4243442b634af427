"""One case, all contestants: gate, warm-up, runs in turns, rows. A wrong result has no speed.

A row's status: "ok"; "missing": what it needs is not here; "FAILED": its result is wrong; "error": it broke;
"skipped": it would take longer than the budget. Only "ok" has times.
"""

from __future__ import annotations

import math
import statistics
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from fastebm.bench.cases import Case
from fastebm.bench.clock import MIN_ROUNDS, interleaved, past_share, quartiles, seconds_of
from fastebm.bench.contestants import Contestant, Run
from fastebm.bench.limits import Rates, Yardstick, flops_per_chain_step, rates
from fastebm.bench.problem import (
    GATE_STEPS,
    LAW_ALPHA,
    NOISE_ERROR,
    NOISE_SEED,
    Missing,
    Problem,
    largest,
    law_case,
    law_p_value,
    law_problem,
    matmul,
)
from torch import Tensor

from fastebm.backends.choose import choose

CORRECTNESS = ("correct", "error", "allowed", "law_p")
TIMED = ("rounds", "seconds", "seconds_q1", "seconds_q3", "chain_steps_per_s")
RATIOS = ("eager_seconds", "times_eager", "peer", "peer_seconds", "times_peer")
LIMIT = ("limit_seconds", "of_limit", "flops_per_chain_step", "product_rate", "normal_rate", "normals_by", "bandwidth")


def row_of(case: Case, **columns: Any) -> dict[str, Any]:
    """All that defines the case, before a contestant's own columns."""
    return {
        "energy": case.energy,
        "kind": case.kind,
        "dim": case.dim,
        "widths": " ".join(map(str, case.widths)),
        "n_chains": case.n_chains,
        "steps": case.steps,
        "drift": case.drift,
        "noise_std": case.noise_std,
        "clamp": "" if case.clamp is None else "{} {}".format(*case.clamp),
        **columns,
    }


# -- the gate ------------------------------------------------------------------------------------------------


def gate(p: Problem, contestant: Contestant) -> dict[str, Any]:
    """The columns of CORRECTNESS.

    error: of one step without noise, against float64. law_p: of GATE_STEPS steps with noise against the reference's
    law (``law_p_value``); fastebm's own noise is known, and its very states are compared instead.
    """
    allowed = p.allowed(contestant.precision)
    row: dict[str, Any] = {"correct": "no", "allowed": allowed, "law_p": ""}
    with matmul(contestant.precision), torch.random.fork_rng(devices=[p.device] if p.device.type == "cuda" else []):
        torch.manual_seed(NOISE_SEED)
        moved = contestant.prepare(p, 1, 0.0)()
        row["error"] = largest(moved[p.rows].flatten(1) - p.descent)
        correct = moved.shape == p.x0.shape and row["error"] <= allowed  # NaN compares false
        del moved
        if correct and contestant.ours:
            moved = contestant.prepare(p, GATE_STEPS, p.case.noise_std)()
            noisy = largest(moved[p.rows].flatten(1) - p.noisy)
            correct = noisy <= GATE_STEPS * (2 * allowed + NOISE_ERROR * p.case.noise_std)
        elif correct:
            row["law_p"] = _law_p(contestant, law_case(p.case), p.device, p.dry)
            correct = row["law_p"] >= LAW_ALPHA
    return row | {"correct": "yes" if correct else "no"}


@lru_cache(maxsize=64)
def _law_p(contestant: Contestant, case: Case, device: torch.device, dry: bool) -> float:
    """Of a ``law_case``: once an energy, as it does not depend on the number of chains."""
    p = law_problem(case, device, dry)
    torch.manual_seed(NOISE_SEED)
    return law_p_value(contestant.prepare(p, GATE_STEPS, case.noise_std)().flatten(1), p.copies)


# -- the race ------------------------------------------------------------------------------------------------


def race(
    case: Case,
    contestants: Iterable[Contestant],
    device: torch.device,
    *,
    yardsticks: Sequence[Yardstick] = (),
    seconds: float = 6.0,
    budget: float = math.inf,
    lost: Iterable[str] = (),
    underway: Callable[[str], None] = lambda key: None,
    dry: bool = False,
) -> list[dict[str, Any]]:
    """One row a contestant.

    Args:
        yardsticks: timed in turns with the contestants, for the columns of LIMIT.
        seconds: for the timed runs, which are at least MIN_ROUNDS each.
        budget: seconds for the case; each contestant that is right may take an equal share of it.
        lost: keys of those that have killed a process before. underway: told what runs.
    """
    p = Problem(case, device, dry=dry)
    results: dict[Contestant, dict[str, Any]] = {}
    for c in contestants:
        row = row_of(case, device=device.type, contestant=c.name, precision=c.precision, status="ok")
        results[c] = row | dict.fromkeys((*CORRECTNESS, *TIMED, *RATIOS, *LIMIT, "note"), "")

    def prepared(c: Contestant, prepare: Callable[[], Any]) -> Any:
        """What prepare() gives, or None, with the reason in the contestant's row."""
        key, row = f"{case.name}, {c.name} {c.precision}", results[c]
        if key in lost:
            row |= {"status": "error", "note": "its process died"}
            return None
        underway(key)
        try:
            return prepare()
        except Missing as why:
            row |= {"status": "missing", "note": str(why)}
        except torch.OutOfMemoryError:
            row |= {"status": "missing", "note": "out of memory"}
        except Exception as error:
            row |= {"status": "error", "note": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
            if context_is_lost():
                raise
        finally:
            if device.type == "cuda" and not context_is_lost():
                torch.cuda.empty_cache()
        return None

    for c, row in results.items():
        row |= prepared(c, lambda c=c: gate(p, c)) or {}
        if row["correct"] == "no":
            row |= {"status": "FAILED", "note": "failed its gate: not timed"}
        if c.name == "fastebm-triton" and row["correct"] == "yes":
            row["note"] = choose(p.energy, p.device, torch.float32, "triton", c.precision).path
    correct = [c for c, row in results.items() if row["status"] == "ok"]
    share = budget / max(1, len(correct))
    for c in correct:
        if (why := prepared(c, lambda c=c: _hopeless(p, c, share))) is not None:
            results[c] |= {"status": "skipped", "note": why}
    right = [c for c, row in results.items() if row["status"] == "ok"]
    yardstick = [c for c in right if (c.name, c.precision) == ("eager", "float32")]

    # A captured graph keeps its memory: where that is much, each is timed by itself, next to eager.
    groups = [right]
    if device.type == "cuda" and 40 * p.x0.nbytes > torch.cuda.get_device_properties(0).total_memory:
        alone = [c for c in right if "graph" in c.name]
        groups = [[c for c in right if c not in alone], *([*yardstick, c] for c in alone)]
    for group in groups:
        runs: dict[Any, Callable[[], object]] = {}
        for c in group:
            if isinstance(run := prepared(c, lambda c=c: _ready(p, c, share)), str):
                results[c] |= {"status": "skipped", "note": run}
            elif run is not None:
                runs[c] = run
        for y in yardsticks:
            y.run()
        underway(f"{case.name}, all")
        times = interleaved({**runs, **{y: y.run for y in yardsticks}}, seconds / len(groups), device)
        for c in runs:
            if c not in times:
                results[c] |= {"status": "missing", "note": "out of memory beside the others"}
        own = {c: times[c] for c in runs if c in times}
        for c, columns in _timed(case, own).items():
            results[c] |= columns
        if yardsticks:
            found, flops = rates(times), flops_per_chain_step(p)
            for c in own:
                results[c] |= _limits(case, found, flops, c.precision, results[c]["seconds"])
        del runs, times
    return list(results.values())


def _timed(case: Case, times: dict[Contestant, list[float]]) -> dict[Contestant, dict[str, Any]]:
    """The columns of TIMED and RATIOS. The peer is the fastest contestant that is not fastebm's."""
    medians = {c: statistics.median(t) for c, t in times.items()}
    eager = next((s for c, s in medians.items() if (c.name, c.precision) == ("eager", "float32")), None)
    peers = {c: s for c, s in medians.items() if not c.ours}
    peer = min(peers, key=lambda c: peers[c]) if peers else None
    found: dict[Contestant, dict[str, Any]] = {}
    for c, t in times.items():
        q1, median, q3 = quartiles(t)
        row = found[c] = {"rounds": len(t), "seconds": median, "seconds_q1": q1, "seconds_q3": q3}
        row["chain_steps_per_s"] = case.n_chains * case.steps / median
        if eager is not None:
            row |= {"eager_seconds": eager, "times_eager": eager / median}
        if peer is not None:
            row |= {"peer": f"{peer.name} {peer.precision}", "peer_seconds": peers[peer]}
            row["times_peer"] = peers[peer] / median
    return found


def _limits(case: Case, found: Rates, flops: float, precision: str, seconds: float) -> dict[str, Any]:
    """The columns of LIMIT."""
    chain_steps = case.n_chains * case.steps
    limit = found.limit_seconds(flops * chain_steps, case.dim * chain_steps, precision)
    values = (limit, limit / seconds, flops, found.products(precision), found.normals, found.normals_by)
    return dict(zip(LIMIT, (*values, found.bandwidth), strict=True))


def _hopeless(p: Problem, c: Contestant, share: float) -> str | None:
    """Why not even one whole run is begun, from the time of one step: which has all that a call costs in it."""
    if share == math.inf:
        return None
    with matmul(c.precision):
        run = c.prepare(p, 1, 0.0)
        run()
        estimate = p.case.steps * min(seconds_of(run, p.device) for _ in range(2))
    return past_share(1, estimate, share)


def _ready(p: Problem, c: Contestant, share: float) -> Run | str:
    """A contestant that has passed its gate, warmed up; or why its rounds would pass its share of the budget."""
    with matmul(c.precision):
        run = c.prepare(p, p.case.steps, p.case.noise_std)
        seconds = seconds_of(run, p.device)
        if past_share(MIN_ROUNDS, seconds, share) is not None:  # the first run may have compiled
            seconds = seconds_of(run, p.device)
    if (why := past_share(MIN_ROUNDS, seconds, share)) is not None:
        return why

    def with_precision() -> Tensor:
        with matmul(c.precision):
            return run()

    return with_precision


def context_is_lost() -> bool:
    """A CUDA error that stays: nothing more can be done in this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# -- before it starts ----------------------------------------------------------------------------------------


def left_out(case: Case, contestants: Iterable[Contestant], device: torch.device, why: str) -> list[dict[str, Any]]:
    """The rows of a case that is not run."""
    common = dict.fromkeys((*CORRECTNESS, *TIMED, *RATIOS, *LIMIT), "") | {"status": "skipped", "note": why}
    return [row_of(case, device=device.type, contestant=c.name, precision=c.precision, **common) for c in contestants]


def why_not(case: Case, n_contestants: int, found: Rates, budget: float, memory: float) -> str | None:
    """Why a case can't be run in ``budget`` seconds and ``memory`` bytes, from below: no contestant is that fast."""
    needed = 4 * case.n_chains * (6 * case.dim + 4 * sum(case.widths))  # state, gradient, noise, layers and their own
    if needed > memory:
        return f"it needs about {needed / 2**30:.3g} GiB of memory, and {memory / 2**30:.3g} are free"
    p = Problem(replace(case, n_chains=1), torch.device("cpu"))
    chain_steps = case.n_chains * case.steps
    least = found.limit_seconds(flops_per_chain_step(p) * chain_steps, case.dim * chain_steps, "float32")
    total = n_contestants * (1 + MIN_ROUNDS) * least
    if total > budget:
        return (
            f"{n_contestants} contestants would take {total:,.0f} s even at the machine's limit, and its budget is "
            f"{budget:,.0f} s"
        )
    return None


def brief(row: dict[str, Any]) -> str:
    """A row in a line."""
    name = f"{row['contestant']} {row['precision']}"
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['note'][:120]}"
    ratio = f"{row['times_eager']:.2f} x eager" if row["times_eager"] else "no eager to compare with"
    limit = f", {100 * row['of_limit']:.0f}% of the limit" if row["of_limit"] else ""
    return f"{name}: {row['chain_steps_per_s']:.3g} chain-steps/s, {ratio}{limit}"
