"""The time of steps in the first layer of an MLP energy (targets/collapsed.py), beside ordinary steps and peers.

The energies are MLPs with random weights, plus |x|^2 / 2. Contestants are those of sampling_contestants.py, with the
same fixed step size, "fastebm ordinary", without steps in the first layer, and "fastebm marginal", Langevin with
marginal_noise=True. A timed run is a whole call that continues the chains: its time is given per step.

Before it is timed, each contestant takes GATE_STEPS steps of GATE_CHAINS chains of the same case. Their law is compared
with that of ``backends/reference.py`` in float64. Where fastebm's noise is that of the reference, states are compared
too: their error may be twice that of the reference in float32, plus rounding.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from fastebm.bench.cases import SamplingCase
from fastebm.bench.clock import MIN_ROUNDS, interleaved, past_share, quartiles, seconds_of
from fastebm.bench.contestants import is_ours
from fastebm.bench.problem import LAW_ALPHA, NOISE_SEED, ULP, Missing, law_p_value
from fastebm.bench.sampling_contestants import CONTESTANTS, Contestant, Draw, Drawn, Ours
from fastebm.bench.sampling_targets import Target
from torch import Tensor

from fastebm.backends import Chains, collapsed, reference
from fastebm.targets.autograd import Autograd, Energy

STEPS = 60  # of a timed call, of a gradient each
HMC_STEPS, PEERS_HMC_STEPS = 20, 5  # a peer's time per step does not depend on their number
ORDINARY, MARGINAL = "fastebm ordinary", "fastebm marginal"
GATE_STEPS, GATE_CHAINS, GATE_COPIES = 2, 256, 3
# Where a chain's accept draw is within rounding of its acceptance probability, float32 may decide otherwise than
# float64. So an error is that of all chains but the worst of a hundred.
GATE_QUANTILE = 0.99
CPU = torch.device("cpu")
COLUMNS = (
    "status", "path", "correct", "p_value", "error", "allowed", "step_size", "acceptance", "rounds", "seconds",
    "seconds_q1", "seconds_q3", "gradient_seconds", "times_fastebm", "note",
)  # fmt: skip

Row = dict[str, Any]


def race(
    case: SamplingCase, contestants: Iterable[Contestant], *, seconds: float = 6.0, budget: float = math.inf
) -> list[Row]:
    """One row per contestant that has the case's sampler, and takes the same steps.

    seconds, seconds_q1, seconds_q3: of a step of all chains.
    gradient_seconds: of a leapfrog step, or of a step with one gradient.
    times_fastebm: the seconds over those of fastebm.

    Args:
        seconds: for the timed rounds of all.
        budget: seconds that the minimum number of rounds of one contestant may take.
    """
    (sampler,) = case.only
    p, gate = Target(case), Gate(case)
    # steps of others without an accept test need not have the same law at the same step size
    there = [c for c in contestants if c.sampler == sampler and (c.exact or isinstance(c.prepare, Ours))]
    there = [variant for c in there for variant in variants(c)]
    rows = {c.library: row_of(case, c) for c in there}
    runs: dict[str, Callable[[], object]] = {}
    torch.manual_seed(NOISE_SEED)
    for c in there:
        row = rows[c.library]
        try:
            row |= gate.judged(c)
            if row["correct"] == "no":
                row |= {"status": "FAILED", "note": "failed its gate: not timed"}
                continue
            draw = c.prepare(p, row["steps"])
            draw()  # compiles
            if (why := past_share(MIN_ROUNDS, seconds_of(draw, CPU), budget)) is not None:
                row |= {"status": "skipped", "note": why}
                continue
            runs[c.library] = draw
        except Missing as why:
            row |= {"status": "missing", "note": str(why)}
        except Exception as error:
            row |= {"status": "error", "note": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
    for name, times in interleaved(runs, seconds, CPU).items():
        row = rows[name]
        q1, median, q3 = (t / row["steps"] for t in quartiles(times))
        row |= {"rounds": len(times), "seconds": median, "seconds_q1": q1, "seconds_q3": q3}
        row["gradient_seconds"] = median / (row["n_leapfrog"] or 1)
    if "fastebm" in runs:
        for name in runs:
            rows[name]["times_fastebm"] = rows[name]["seconds"] / rows["fastebm"]["seconds"]
    return list(rows.values())


def row_of(case: SamplingCase, c: Contestant) -> Row:
    """The columns that define the case and the contestant, and empty ones for what is measured."""
    steps = STEPS if c.sampler != "HMC" else HMC_STEPS if is_ours(c.library) else PEERS_HMC_STEPS
    return {
        "energy": case.energy, "dim": case.dim, "widths": " ".join(map(str, case.widths)), "n_chains": case.n_chains,
        "device": "cpu", "sampler": c.sampler, "n_leapfrog": case.n_leapfrog if c.sampler == "HMC" else "",
        "steps": steps, "contestant": c.library,
    } | dict.fromkeys(COLUMNS, "") | {"status": "ok"}  # fmt: skip


def variants(c: Contestant) -> list[Contestant]:
    """The contestant, and if it is fastebm's, its other ways to take the same steps."""
    if not isinstance(c.prepare, Ours):
        return [c]
    ours, ways = c.prepare, [c, replace(c, library=ORDINARY, prepare=without_first_layer(c.prepare))]
    if c.sampler == "Langevin":
        marginal = replace(ours, make=lambda case: replace(ours.make(case), marginal_noise=True))
        ways.append(replace(c, library=MARGINAL, prepare=marginal))
    return ways


def without_first_layer(ours: Ours) -> Callable[[Target, int], Draw]:
    """fastebm, where no sampler has a form of its steps in the first layer."""

    def prepare(p: Target, thin: int) -> Draw:
        draw = ours(p, thin)

        def ordinary() -> Drawn:
            with patch.dict(collapsed.FORMS, clear=True):
                return draw()

        return ordinary

    return prepare


class Gate:
    """What a right answer to a case is: GATE_STEPS steps of GATE_CHAINS chains."""

    def __init__(self, case: SamplingCase) -> None:
        self.case = replace(case, n_chains=GATE_CHAINS)
        self.target = Target(self.case)
        (name,) = case.only
        (make,) = (c.prepare.make for c in CONTESTANTS if isinstance(c.prepare, Ours) and c.sampler == name)
        self.sampler = make(self.case)

    def judged(self, c: Contestant) -> Row:
        """The columns of correctness of a contestant."""
        drawn = c.prepare(self.target, GATE_STEPS)()
        x = drawn.x[:, -1]
        found: Row = {"path": drawn.path, "step_size": drawn.step_size, "p_value": law_p_value(x, self.copies)}
        found["acceptance"] = "" if drawn.acceptance is None else drawn.acceptance
        correct = found["p_value"] > LAW_ALPHA
        if is_ours(c.library) and c.library != MARGINAL:
            found |= {"error": self.error(x), "allowed": self.allowed}
            correct = correct and found["error"] <= found["allowed"]
        return found | {"correct": "yes" if correct else "no"}

    def error(self, x: Tensor) -> float:
        """Of states after the steps with fastebm's noise."""
        errors = (x.double() - self.truth).abs().amax(dim=1)
        return float(errors.nan_to_num(nan=math.inf).sort().values[int(GATE_QUANTILE * (len(x) - 1))])

    @cached_property
    def truth(self) -> Tensor:
        """(n, dim) float64."""
        return self._reference(self.target.seed, torch.float64)

    @cached_property
    def allowed(self) -> float:
        """The error that fastebm may have."""
        rounding = 2 * ULP * float(self.truth.abs().max())
        return 2 * self.error(self._reference(self.target.seed, torch.float32)) + rounding

    @cached_property
    def copies(self) -> Tensor:
        """(GATE_COPIES, n, dim) float64: independent runs of the reference."""
        seeds = range(self.target.seed + 1, self.target.seed + 1 + GATE_COPIES)
        return torch.stack([self._reference(seed, torch.float64) for seed in seeds])

    def _reference(self, seed: int, dtype: torch.dtype) -> Tensor:
        target = Autograd(Energy(self.target.energy, (self.case.dim,), dtype))
        chains = torch.arange(GATE_CHAINS)
        at = Chains(self.target.x0.to(dtype), seed, chains, torch.zeros_like(chains))
        return reference.run(target, at, self.sampler, GATE_STEPS).x


def brief(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['contestant']}: {row['status']}: {row['note'][:160]}"
    times = "" if row["times_fastebm"] == "" else f", {row['times_fastebm']:.2f} times as long as fastebm"
    per_step, per_gradient = (f"{1e3 * row[name]:.3g} ms" for name in ("seconds", "gradient_seconds"))
    return f"{row['contestant']} {row['path']}: {per_step} per step, {per_gradient} per gradient{times}"
