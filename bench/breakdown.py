"""Where the time of the default call goes, on one core: python bench/breakdown.py [CASE ...]

Its parts are run alone, in turns with the whole, since a profiler does not see into compiled code:

- products: the library's products of an MLP's gradient, on as many tiles of as many rows.
- normals: as many normal numbers, by ``fastebm.noise``.
- gradient: PyTorch's own, of an energy that is a module.
- rest: the whole without these, which is activations, updates, and what a call costs.

The fastest round of each, as nothing makes a machine too fast. What runs alone may find more of its data in cache, or
less; the rest has that too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from fastebm.bench.cases import SHOWN, STEPS, Case
from fastebm.bench.clock import interleaved
from fastebm.bench.contestants import CONTESTANTS
from fastebm.bench.problem import SEED, Problem
from fastebm.bench.rows import RESULTS, rounded, write
from fastebm.bench.run import on_threads

from fastebm.backends.cpu import FEW_DIMS
from fastebm.backends.torch_tiles import tiles
from fastebm.energies import Energy
from fastebm.noise import Stream, normal

SECONDS = 10.0  # of timed runs a case, or three rounds
PARTS = ("products", "normals", "gradient")

_BLOCKS = 2**16  # of four normals drawn in one call: 1 MiB


def parts_of(p: Problem) -> dict[str, Callable[[], object]]:
    """What of PARTS a run of the case has, each alone."""
    case = p.case
    parts = tiles(case.n_chains, torch.get_num_threads())
    rows, n_blocks = parts[0].stop, (case.dim + 3) // 4
    at_once = max(1, min(case.steps, _BLOCKS // (rows * n_blocks)))  # steps: a call of its own would be most of a few
    numbers = torch.arange(rows).repeat(at_once)
    steps = torch.arange(at_once).repeat_interleave(rows)
    out = torch.empty(len(numbers), n_blocks, 4)

    def normals() -> None:
        for _ in parts:
            for first in range(0, case.steps, at_once):
                n = rows * min(at_once, case.steps - first)
                normal(SEED, Stream.LANGEVIN, numbers[:n], steps[:n] + first, case.dim, out=out[:n])

    if p.mlp is None:
        energy, x = Energy(p.energy, case.shape, torch.float32), p.x0.flatten(1)

        def gradient() -> None:
            for _ in range(case.steps):
                energy.gradient(x)

        return {"normals": normals, "gradient": gradient}

    # The last weight has one row, and those of few dims are multiplied within other loops.
    hidden = [w for w in p.mlp.weights[:-1] if min(w.shape) > FEW_DIMS]
    ways = [*(w.t() for w in hidden), *reversed(hidden)]  # up and down again
    operands = [(torch.rand(rows, len(w)), w, torch.empty(rows, w.shape[1])) for w in ways]

    def products() -> None:
        with torch.inference_mode():
            for _ in range(len(parts) * case.steps):
                for a, w, out in operands:
                    torch.mm(a, w, out=out)

    return {"products": products, "normals": normals}


def row_of(key: str, case: Case, seconds: float = SECONDS) -> dict[str, Any]:
    p = Problem(case, torch.device("cpu"))
    whole = next(c for c in CONTESTANTS if c.name == "fastebm").prepare(p, case.steps, case.noise_std)
    runs = {"whole": whole, **parts_of(p)}
    for run in runs.values():
        run()
    took = {name: min(times) for name, times in interleaved(runs, seconds, p.device).items()}
    spent = {name: took.get(name, 0.0) for name in PARTS}
    return {
        "case": key,
        "energy": case.energy,
        "n_chains": case.n_chains,
        "steps": case.steps,
        "threads": torch.get_num_threads(),
        "seconds": took["whole"],
        **{f"{name}_seconds": value for name, value in spent.items()},
        "rest_seconds": took["whole"] - sum(spent.values()),
    }


def main() -> int:
    rows = []
    with on_threads(1):
        for key in sys.argv[1:] or SHOWN:
            rows.append(rounded(row_of(key, STEPS[key])))
            print(*rows[-1].values(), flush=True)
    write(RESULTS / "breakdown.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
