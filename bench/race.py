"""One case, all contestants: gate, warm-up, interleaved runs, rows. A wrong result has no speed.

A row's status: "ok"; "missing": what it needs is not here; "FAILED": its result is wrong; "error": it broke;
"skipped": it would take longer than the budget. Only "ok" has times. The time of one that FAILED is in
``untrusted_seconds`` only, and enters no ratio.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from fastebm.bench.cases import Case
from fastebm.bench.clock import MIN_ROUNDS, interleaved, past_share, quartiles, seconds_of
from fastebm.bench.contestants import Contestant, Run, is_ours
from fastebm.bench.limits import Rates, Yardstick, flops_per_chain_step, rates
from fastebm.bench.problem import (
    GATE_STEPS,
    LAW_ALPHA,
    MM_BF16,
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

from fastebm import langevin_sample
from fastebm.backends.choose import choose

CORRECTNESS = ("correct", "error", "allowed", "error_over_allowed", "law_p")
TIMED = ("rounds", "seconds", "seconds_q1", "seconds_q3", "chain_steps_per_s", "untrusted_seconds")
RATIOS = ("eager_seconds", "times_eager", "peer", "peer_seconds", "times_peer")
LIMIT = ("limit_seconds", "of_limit", "flops_per_chain_step", "product_rate", "normal_rate", "normals_by", "bandwidth")


def row_of(case: Case, **columns: Any) -> dict[str, Any]:
    """The columns that define the case, followed by ``columns``."""
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
    error_over_allowed: the larger of the two comparisons of states.
    """
    allowed = p.allowed(contestant.precision)
    row: dict[str, Any] = {"correct": "no", "allowed": allowed, "law_p": ""}
    with matmul(contestant.precision), torch.random.fork_rng(devices=[p.device] if p.device.type == "cuda" else []):
        torch.manual_seed(NOISE_SEED)
        moved = contestant.prepare(p, 1, 0.0)()
        row["error"] = largest(moved[p.rows].flatten(1) - p.descent)
        row["error_over_allowed"] = row["error"] / allowed
        correct = moved.shape == p.x0.shape and row["error"] <= allowed  # NaN compares false
        del moved
        if correct and contestant.ours:
            moved = contestant.prepare(p, GATE_STEPS, p.case.noise_std)()
            over = largest(moved[p.rows].flatten(1) - p.noisy) / allowed_with_noise(p.case, allowed)
            row["error_over_allowed"] = max(row["error_over_allowed"], over)
            correct = over <= 1
        elif correct:
            row["law_p"] = _law_p(contestant, law_case(p.case), p.device, p.dry)
            correct = row["law_p"] >= LAW_ALPHA
    return row | {"correct": "yes" if correct else "no"}


def allowed_with_noise(case: Case, allowed: float) -> float:
    """The error allowed after GATE_STEPS steps with fastebm's noise, from that of one step without noise."""
    return GATE_STEPS * (2 * allowed + NOISE_ERROR * case.noise_std)


@lru_cache(maxsize=64)
def _law_p(contestant: Contestant, case: Case, device: torch.device, dry: bool) -> float:
    """The p-value of a ``law_case``. Cached: once per energy, since it does not depend on the number of chains."""
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
    until: float = math.inf,
    lost: Iterable[str] = (),
    underway: Callable[[str], None] = lambda key: None,
    found: Callable[[dict[str, Any]], None] = lambda row: None,
    dry: bool = False,
) -> list[dict[str, Any]]:
    """Time the contestants that pass their gate. Returns one row per contestant.

    On a CPU the runs of all are interleaved. On a GPU each contestant is interleaved with the eager loop alone, so that
    its row is complete early, and no captured graph keeps memory that another needs.

    Args:
        yardsticks: interleaved with the contestants, for the columns of LIMIT.
        seconds: for the timed runs, which are at least MIN_ROUNDS per contestant.
        budget: seconds for the case, shared equally by the contestants that are timed.
        until: Unix time after which no contestant begins; the others get no row.
        lost: keys of contestants that have killed a process before.
        underway: called with the key of what runs next.
        found: called with each row when its contestant is done. The columns about peers need all rows, and come later.
    """
    here = _Race(Problem(case, device, dry=dry), set(lost), underway)
    contestants = list(contestants)
    results = here.results = {c: _blank(case, c, device) for c in contestants}
    eager = next((c for c in contestants if (c.name, c.precision) == ("eager", "float32")), None)
    groups = [[c] for c in contestants] if device.type == "cuda" else [contestants]
    times: dict[Contestant, list[float]] = {}
    done: list[Contestant] = []
    for group in groups:
        if time.time() > until:
            break
        here.make_ready(group, budget)
        runs: dict[Any, Callable[[], object]] = {c: here.ready[c] for c in (eager, *group) if c in here.ready}
        if any(c in runs for c in group):
            for y in yardsticks:
                y.run()
            underway(f"{case.name}, all" if len(group) > 1 else key_of(case, group[0]))
            runs |= {y: y.run for y in yardsticks}
            new = interleaved(runs, seconds / len(groups), device, until=until)
            times |= {c: new[c] for c in group if c in new}
            here.add_times(group, new, eager)
            if yardsticks:
                at_most, flops = rates(new), flops_per_chain_step(here.p)
                for c in group:
                    if results[c]["seconds"]:
                        results[c] |= _limits(case, at_most, flops, c.precision, results[c]["seconds"])
        for c in group:
            if c is not eager:
                here.ready.pop(c, None)
            done.append(c)
            found(results[c])
    right = {c: statistics.median(t) for c, t in times.items() if results[c]["status"] == "ok"}
    beside = beside_peers({(c.name, c.precision): median for c, median in right.items()})
    for c in right:
        results[c] |= beside[c.name, c.precision]
    return [results[c] for c in done]


class _Race:
    """The contestants of one race: their rows, and the runs of those that are ready to be timed."""

    def __init__(self, p: Problem, lost: set[str], underway: Callable[[str], None]) -> None:
        self.p, self.lost, self.underway = p, lost, underway
        self.results: dict[Contestant, dict[str, Any]] = {}
        self.ready: dict[Contestant, Run] = {}

    def attempt(self, c: Contestant, prepare: Callable[[], Any]) -> Any:
        """The result of prepare(), or None, with the reason in the contestant's row."""
        key, row = key_of(self.p.case, c), self.results[c]
        if key in self.lost:
            row |= {"status": "error", "note": "its process died"}
            return None
        self.underway(key)
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
            if self.p.device.type == "cuda" and not context_is_lost():
                torch.cuda.empty_cache()
        return None

    def make_ready(self, group: list[Contestant], budget: float) -> None:
        """Put each contestant through its gate, then warm up those that fit the budget."""
        p, results = self.p, self.results
        for c in group:
            row = results[c]
            row |= self.attempt(c, lambda c=c: gate(p, c)) or {}
            if row["correct"] == "no":
                row |= {"status": "FAILED", "note": "failed its gate: its time is not to be trusted"}
            if c.ours and row["correct"] == "yes":
                row["note"] = path_of(p, c) or ""
        timed = [c for c in group if results[c]["status"] in ("ok", "FAILED")]
        share = budget / max(1, len(timed))
        for c in timed:
            if (why := self.attempt(c, lambda c=c: _hopeless(p, c, share))) is not None:
                results[c] |= {"status": "skipped", "note": why}
            elif results[c]["status"] in ("ok", "FAILED"):
                run = self.attempt(c, lambda c=c: _ready(p, c, share))
                if isinstance(run, str):
                    results[c] |= {"status": "skipped", "note": run}
                elif run is not None:
                    self.ready[c] = run

    def add_times(self, group: list[Contestant], new: Mapping[Any, list[float]], eager: Contestant | None) -> None:
        """Columns of TIMED, and those of RATIOS about the eager loop, if that passed its gate."""
        beside = new.get(eager) if eager is not None and self.results[eager]["status"] == "ok" else None
        for c in group:
            if c in new:
                self.results[c] |= _timed(self.p.case, new[c], self.results[c]["status"], beside)
            elif c in self.ready:
                self.results[c] |= {"status": "missing", "note": "out of memory beside the others"}


def key_of(case: Case, c: Contestant) -> str:
    return f"{case.name}, {c.name} {c.precision}"


def path_of(p: Problem, c: Contestant) -> str | None:
    """The path that a contestant of fastebm takes; None if its name says it."""
    if c.name == "fastebm":  # asked from a call, since the path depends on the number of chains
        precision = "bf16" if c.precision == MM_BF16 else None
        return langevin_sample(
            p.energy, init=p.x0, steps=1, precision=precision, on_nonfinite="ignore", return_info=True
        )[1].path
    if c.name not in ("fastebm-triton", "fastebm-graph"):
        return None
    return choose(p.energy, p.device, torch.float32, "triton", c.precision).path


def _blank(case: Case, c: Contestant, device: torch.device) -> dict[str, Any]:
    row = row_of(case, device=device.type, contestant=c.name, precision=c.precision, status="ok")
    return row | dict.fromkeys((*CORRECTNESS, *TIMED, *RATIOS, *LIMIT, "note"), "")


def _timed(case: Case, times: list[float], status: str, eager: list[float] | None) -> dict[str, Any]:
    """The columns of TIMED, and those of RATIOS about the eager loop, whose runs were interleaved."""
    q1, median, q3 = quartiles(times)
    if status == "FAILED":
        return {"rounds": len(times), "untrusted_seconds": median}
    new: dict[str, Any] = {"rounds": len(times), "seconds": median, "seconds_q1": q1, "seconds_q3": q3}
    new["chain_steps_per_s"] = case.n_chains * case.steps / median
    if eager is not None:
        seconds = statistics.median(eager)
        new |= {"eager_seconds": seconds, "times_eager": seconds / median}
    return new


# The higher, the more exact the products. A peer must be at least as exact as the contestant compared with it.
EXACTNESS = {"float32": 3, "ieee": 3, "bf16x3": 3, "tf32": 2, MM_BF16: 1, "bf16": 1}


def beside_peers(seconds: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], dict[str, Any]]:
    """The columns of RATIOS about peers, for each (contestant, precision) of a case.

    The peer is the fastest contestant that is not of fastebm and no less exact: bf16x3 is compared with float32 only.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (name, precision), own in seconds.items():
        peers = {
            key: other for key, other in seconds.items()
            if not is_ours(key[0]) and EXACTNESS[key[1]] >= EXACTNESS[precision]
        }  # fmt: skip
        peer = min(peers, key=lambda key: peers[key], default=None)
        found[name, precision] = (
            {}
            if peer is None
            else {"peer": " ".join(peer), "peer_seconds": peers[peer], "times_peer": peers[peer] / own}
        )
    return found


def _limits(case: Case, found: Rates, flops: float, precision: str, seconds: float) -> dict[str, Any]:
    """The columns of LIMIT."""
    chain_steps = case.n_chains * case.steps
    limit = found.limit_seconds(flops * chain_steps, case.dim * chain_steps, precision)
    values = (limit, limit / seconds, flops, found.products(precision), found.normals, found.normals_by)
    return dict(zip(LIMIT, (*values, found.bandwidth), strict=True))


def _hopeless(p: Problem, c: Contestant, share: float) -> str | None:
    """Why not even one whole run fits its share, estimated from a run of one step, with the cost of a call in it."""
    if share == math.inf:
        return None
    with matmul(c.precision):
        run = c.prepare(p, 1, 0.0)
        run()
        estimate = p.case.steps * min(seconds_of(run, p.device) for _ in range(2))
    return past_share(1, estimate, share)


def _ready(p: Problem, c: Contestant, share: float) -> Run | str:
    """The run of a contestant, warmed up; or why its rounds would not fit its share of the budget."""
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
    """Whether a CUDA error persists, so that this process can do nothing more on the GPU."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# -- before it starts ----------------------------------------------------------------------------------------


def left_out(case: Case, contestants: Iterable[Contestant], device: torch.device, why: str) -> list[dict[str, Any]]:
    """The rows of a case that is skipped."""
    common = dict.fromkeys((*CORRECTNESS, *TIMED, *RATIOS, *LIMIT), "") | {"status": "skipped", "note": why}
    return [row_of(case, device=device.type, contestant=c.name, precision=c.precision, **common) for c in contestants]


def why_not(case: Case, n_contestants: int, found: Rates, budget: float, memory: float) -> str | None:
    """Why a case can't fit ``budget`` seconds and ``memory`` bytes, by lower bounds of both; None if it may."""
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
    """A row as one line of text."""
    name = f"{row['contestant']} {row['precision']}"
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['note'][:120]}"
    ratio = f"{row['times_eager']:.2f} x eager" if row["times_eager"] else "no eager to compare with"
    limit = f", {100 * row['of_limit']:.0f}% of the limit" if row["of_limit"] else ""
    return f"{name}: {row['chain_steps_per_s']:.3g} chain-steps/s, {ratio}{limit}"
