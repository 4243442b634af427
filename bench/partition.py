"""How right `fastebm.log_partition` is with its defaults, where log Z is known: 100 seeds of each law.

    python bench/partition.py                  all laws and dims, on one thread: half an hour
    python bench/partition.py 64 --seeds 10    those of 64 dims, fewer seeds: two minutes

Writes partition.csv into --out, one row per law and number of dims. Rows of the same law and dims in the file are
replaced.

- near: number of estimates within 0.05 nats of the truth.
- covered: of those within 1.96 standard errors of it, which should be 95 %.
- bracketed: of those whose lower and upper bound, each widened by 1.96 of its standard errors, enclose it.
- mean_error, max_error: of |log_z - truth|. standard_error, ess: means of what the estimates report.
- seconds: median CPU time of one estimate, pilots and both directions.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fastebm.bench import rows
from fastebm.bench.run import on_threads
from fastebm.bench.sampling_targets import energy_of
from torch import nn

from fastebm import GaussianEnergy, LogPartition, log_partition

NEAR, ERRORS = 0.05, 1.96


def gaussian(dim: int) -> tuple[nn.Module, float]:
    """Means from -2 to 4 and standard deviations from 0.3 to 3."""
    std = torch.linspace(0.3, 3.0, dim)
    return GaussianEnergy(torch.linspace(-2.0, 4.0, dim), std), _unit(dim) + float(std.double().log().sum())


def mixture(dim: int) -> tuple[nn.Module, float]:
    """Two Gaussians, 5 standard deviations apart."""
    return energy_of("mixture", dim, ()), _unit(dim) + math.log(2)


def _unit(dim: int) -> float:
    """Log Z of a standard Gaussian."""
    return dim / 2 * math.log(2 * math.pi)


LAWS: dict[str, Callable[[int], tuple[nn.Module, float]]] = {"gaussian": gaussian, "mixture": mixture}
DIMS = (2, 16, 64)


def estimates(energy: nn.Module, dim: int, seeds: int) -> Iterator[tuple[LogPartition, float]]:
    """One estimate per seed, and its CPU seconds."""
    for seed in range(seeds):
        begun = time.process_time()
        result = log_partition(energy, input_size=dim, seed=seed)
        yield result, time.process_time() - begun


def measure(law: str, dim: int, seeds: int) -> dict[str, Any]:
    energy, truth = LAWS[law](dim)
    found, seconds = zip(*estimates(energy, dim, seeds), strict=True)
    errors = [abs(result.log_z - truth) for result in found]
    return {
        "law": law,
        "dim": dim,
        "chains": len(found[0].log_weights),
        "temperatures": len(found[0].betas),
        "seeds": seeds,
        "near": sum(error < NEAR for error in errors),
        "covered": sum(e < ERRORS * result.standard_error for e, result in zip(errors, found, strict=True)),
        "bracketed": sum(
            result.lower - ERRORS * result.lower_error < truth < result.upper + ERRORS * result.upper_error
            for result in found
        ),
        "mean_error": statistics.mean(errors),
        "max_error": max(errors),
        "standard_error": statistics.mean(result.standard_error for result in found),
        "ess": statistics.mean(result.ess for result in found),
        "seconds": statistics.median(seconds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = rows.script(__doc__)
    parser.add_argument("dims", nargs="*", type=int, choices=[[], *DIMS], default=[], metavar="DIM", help=f"{DIMS}")
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="estimates of each case (default: 100)")
    rows.add_out(parser)
    arguments = parser.parse_args(argv)
    common = rows.provenance()
    with on_threads(1):
        for dim in arguments.dims or DIMS:
            for law in LAWS:
                row = rows.rounded(measure(law, dim, arguments.seeds))
                print(row, flush=True)
                rows.replace(arguments.out / "partition.csv", [{**row, **common}], ("law", "dim"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
