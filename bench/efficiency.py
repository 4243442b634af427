"""Effective samples per second, on known laws: what a user waits for.

Chains start in the stationary law; every ``steps`` steps their states are kept. The effective sample size is
arviz-stats' bulk ESS (Vehtari et al. 2021) of the coordinate that mixes worst. All contestants run the same chain in
law, so their ESS per step should agree: the rows have it, so that a fault would show.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fastebm.bench.cases import Case
from fastebm.bench.clock import MIN_ROUNDS, interleaved, past_share, seconds_of
from fastebm.bench.contestants import Contestant, Run
from fastebm.bench.problem import NOISE_SEED, Gaussian, Missing, Problem, matmul
from fastebm.bench.race import gate, row_of
from torch import Tensor

DRAWS = 50  # per round
# Largest deviation of a moment from the law, in Monte-Carlo standard errors. (4.9 is 1e-6, two-sided, for one normal.)
DEVIATION = 5.5
COLUMNS = ("correct", "error", "allowed", "law_p", "deviation", "draws", "ess", "ess_per_step", "seconds")
RATIOS = ("ess_per_s", "times_eager", "note")


def moments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Functions of the states and their exact means: f (..., k) of x (..., dim), and (k,).

    Gaussian: every coordinate (0) and its square (the chain's own variance, step size and all). Mixture: every
    coordinate, and the sign of the first, which identifies the mode (all 0, by symmetry).
    """
    x = x.double()
    if isinstance(p.energy, Gaussian):
        variance = p.energy.stationary_covariance(p.case.drift, p.case.noise_std).diagonal()
        return torch.cat([x, x.square()], dim=-1), torch.cat([torch.zeros_like(variance), variance])
    f = torch.cat([x, x[..., :1].sign()], dim=-1)
    return f, torch.zeros(f.shape[-1], dtype=torch.float64)


def worst_deviation(p: Problem, x: Tensor, ess: Callable[[Any], Any]) -> float:
    """Largest |mean f - exact| in its standard errors, std f / sqrt(ESS of f); x: (chains, draws, dim)."""
    deviation, error = deviations(*moments(p, x), ess)
    return float((deviation / error).max())


def deviations(f: Tensor, exact: Tensor, ess: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """|mean f - exact| and its standard error std f / sqrt(ESS of f), both in units of std f; f: (chains, draws, k)."""
    scale = f.flatten(0, 1).std(dim=0)
    return (f.mean(dim=(0, 1)) - exact).abs() / scale, torch.as_tensor(ess(f.numpy())).rsqrt()


def effective_sizes() -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """(bulk ESS, ESS of the mean): (chains, draws, k) -> (k,), by arviz-stats."""
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        raise Missing("arviz-stats is not installed") from None
    return tuple(  # type: ignore[return-value]
        lambda x, method=method: array_stats.ess(x, chain_axis=0, draw_axis=1, method=method)
        for method in ("bulk", "mean")
    )


def draws_of(p: Problem, run: Run, n: int) -> Callable[[], Tensor]:
    """A function that continues its own chains for n runs: (n, chains, dim), the states after each run."""
    kept = torch.empty(n, *p.x0.shape)
    state = p.x0.clone()

    def draw() -> Tensor:
        p.x0.copy_(state)  # a run starts at p.x0, and each contestant has its own chains
        for i in range(n):
            p.x0.copy_(run())
            kept[i] = p.x0
        state.copy_(p.x0)
        return kept

    return draw


def race(
    case: Case,
    contestants: Iterable[Contestant],
    device: torch.device,
    *,
    seconds: float = 6.0,
    budget: float = math.inf,
    draws: int = DRAWS,
) -> list[dict[str, Any]]:
    """One row per contestant: the gate, then interleaved rounds of ``draws`` kept states; the ESS is of all rounds.

    Args:
        seconds: for the timed rounds.
        budget: seconds that the minimum number of rounds of one contestant may take.
    """
    p = Problem(case, device)
    results: dict[Contestant, dict[str, Any]] = {}
    runs: dict[Contestant, Callable[[], object]] = {}
    rounds: dict[Contestant, list[Tensor]] = {}
    for c in contestants:
        row = results[c] = row_of(case, device=device.type, contestant=c.name, precision=c.precision, status="ok")
        row |= dict.fromkeys((*COLUMNS, *RATIOS), "")
        try:
            bulk, of_mean = effective_sizes()
            row |= gate(p, c)
            if row["correct"] == "no":
                row |= {"status": "FAILED", "note": "failed its gate: not timed"}
                continue
            with matmul(c.precision):
                run = c.prepare(p, case.steps, case.noise_std)
                run()
                estimate = min(seconds_of(run, device) for _ in range(3))
            if (why := past_share(MIN_ROUNDS * draws, estimate, budget)) is not None:
                row |= {"status": "skipped", "note": why}
                continue
            rounds[c], runs[c] = [], _kept(rounds, c, draws_of(p, run, draws))
        except Missing as why:
            row |= {"status": "missing", "note": str(why)}
        except Exception as error:
            row |= {"status": "error", "note": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
    torch.manual_seed(NOISE_SEED)
    times = interleaved(runs, seconds, device)
    for c, t in times.items():
        row, x = results[c], torch.cat(rounds[c]).transpose(0, 1).contiguous()
        ess, total = float(bulk(x.double().numpy()).min()), sum(t)
        row |= {"deviation": worst_deviation(p, x, of_mean), "draws": x.shape[1], "ess": ess, "seconds": total}
        row |= {"ess_per_step": ess / (case.n_chains * case.steps * x.shape[1]), "ess_per_s": ess / total}
        if not row["deviation"] <= DEVIATION:
            row |= {"status": "FAILED", "correct": "no", "ess_per_s": "", "note": "its draws do not follow the law"}
    eager = next((r["ess_per_s"] for c, r in results.items() if c.name == "eager" and r["status"] == "ok"), None)
    for row in results.values():
        if eager is not None and row["status"] == "ok":
            row["times_eager"] = row["ess_per_s"] / eager
    return list(results.values())


def _kept(rounds: dict[Contestant, list[Tensor]], c: Contestant, draw: Callable[[], Tensor]) -> Callable[[], object]:
    return lambda: rounds[c].append(draw().clone())


def brief(row: dict[str, Any]) -> str:
    name = f"{row['contestant']} {row['precision']}"
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['note'][:120]}"
    ratio = f", {row['times_eager']:.2f} x eager" if row["times_eager"] else ""
    return f"{name}: {row['ess_per_s']:.3g} effective samples/s{ratio} ({row['ess_per_step']:.2g} per chain-step)"
