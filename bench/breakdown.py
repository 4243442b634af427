"""Where the time goes on a CPU: the parts of steps, of pools and of first calls.

    python bench/breakdown.py       some minutes; writes breakdown.csv into --out

A profiler does not see into compiled code, so each part runs alone, interleaved with the whole. The fastest round of
each counts, since noise only slows a machine down. The rest is the whole minus its parts. It includes an error: a part
that runs alone may find more or less of its data in cache, and runs at another moment of a noisy machine.

STEPS, the default call on one thread and on all:

- products: the matrix products of an MLP's gradient, on the same tiles as in the call.
- normals: the same number of normal numbers, by the same kernel.
- gradient: PyTorch's, for an energy that is not an MLP.
- call: a call without steps: checks, preparation, the last energies.
- The rest is activations and updates.

POOLS, a batch drawn and written back (``pool.py``):

- draws: which chains, which of them start again, and where.
- take, put: copying their states, and all else that the pool stores per chain, out of it and back.

FIRST CALLS, in a process with an empty cache (``compilation.py``), in chronological order:

- import: of Numba. registries: what Numba sets up before its first function, here an empty one.
- kernels, each under its name. later call: the same call once more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from fastebm.bench.cases import COMPILATION, POOL, SHOWN, STEPS, Case, TrainingCase
from fastebm.bench.clock import interleaved, seconds_of
from fastebm.bench.compilation import CACHES
from fastebm.bench.contestants import CONTESTANTS
from fastebm.bench.pool import ROUND, draws_and_writes
from fastebm.bench.problem import SEED, Problem
from fastebm.bench.rows import add_out, provenance, rounded, script, write
from fastebm.bench.run import on_threads
from fastebm.bench.training import fastebm_pool
from fastebm.kernels import cpu as kernels

from fastebm.backends.cpu import parts_of_update
from fastebm.backends.cpu_mlp import FEW_DIMS
from fastebm.backends.tiles import tiles
from fastebm.pool import copies
from fastebm.pool.draws import Draws
from fastebm.pool.starts import Starts
from fastebm.rng import Stream, drawing, scratch, seed_words
from fastebm.targets.autograd import Energy
from fastebm.threads import Spares, share, threads

SECONDS = 20.0  # of timed runs per case, or three rounds
PROCESSES = 3  # of a first call: the fastest counts

_CPU = torch.device("cpu")

Row = dict[str, Any]
Runs = Mapping[str, Callable[[], object]]

DEFAULT = next(c for c in CONTESTANTS if c.name == "fastebm")


def rows_of(kind: str, key: str, case: Case | TrainingCase, parts: Mapping[str, float], n_threads: int) -> list[Row]:
    """One row per part, the whole first, and the rest. parts: seconds."""
    rest = parts["whole"] - sum(seconds for name, seconds in parts.items() if name != "whole")
    about = {"kind": kind, "case": key, "energy": case.energy, "n_chains": case.n_chains, "steps": case.steps}
    about["threads"] = n_threads
    return [rounded({**about, "part": name, "seconds": value}) for name, value in {**parts, "rest": rest}.items()]


def fastest(runs: Mapping[Any, Callable[[], object]], seconds: float) -> dict[Any, float]:
    for run in runs.values():
        run()
    return {name: min(times) for name, times in interleaved(runs, seconds, _CPU).items()}


# -- steps ---------------------------------------------------------------------------------------------------------


def steps(key: str, case: Case, seconds: float = SECONDS) -> list[Row]:
    """One thread and all threads, in the same rounds."""
    p, counts = Problem(case, _CPU), sorted({1, torch.get_num_threads()})
    runs: dict[tuple[int, str], Callable[[], object]] = {}
    for n in counts:
        with threads(n):
            whole = DEFAULT.prepare(p, case.steps, case.noise_std)
            runs |= {(n, part): partial(_on, n, run) for part, run in {"whole": whole, **parts_of_steps(p)}.items()}
    found = fastest(runs, seconds)
    rows: list[Row] = []
    for n in counts:
        rows += rows_of("steps", key, case, {part: took for (m, part), took in found.items() if m == n}, n)
    return rows


def _on(n: int, run: Callable[[], object]) -> None:
    with threads(n):
        run()


def parts_of_steps(p: Problem) -> Runs:
    """The parts, each to be run alone, with as many threads and tiles as the call has."""
    case, n_threads = p.case, torch.get_num_threads()
    call = DEFAULT.prepare(p, 0, case.noise_std)
    if p.mlp is None:
        parts = parts_of_update(case.n_chains, case.dim, n_threads)
    else:
        parts = tiles(case.n_chains, n_threads)
    rows, n_blocks = parts[0].stop, (case.dim + 3) // 4
    at_once = max(1, kernels.CHUNK // n_blocks)  # rows, as within a step's update
    draws = Spares(partial(draw_of, at_once, n_blocks))

    def draw(call: kernels.Call) -> None:
        for _ in range(-(-rows * case.steps // at_once)):
            call()

    normals = partial(_shared, parts, draws, draw, n_threads)
    if p.mlp is None:
        energy, x = Energy(p.energy, case.shape, torch.float32), p.x0.flatten(1)

        def gradient() -> None:
            with energy.differentiating():
                for _ in range(case.steps):
                    energy.pulled_back(x.detach().requires_grad_())

        return {"normals": normals, "gradient": gradient, "call": call}

    # not the last weight, of one row, nor those of few dims, which are multiplied inside other loops
    hidden = [w for w in p.mlp.weights[:-1] if min(w.shape) > FEW_DIMS]
    ways = [*(w.t() for w in hidden), *reversed(hidden)]  # forward and backward
    operands = Spares(lambda: [(torch.rand(rows, len(w)), w, torch.empty(rows, w.shape[1])) for w in ways])

    def multiply(mine: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        with torch.inference_mode():
            for _ in range(case.steps):
                for a, w, out in mine:
                    torch.mm(a, w, out=out)

    products = partial(_shared, parts, operands, multiply, n_threads)
    return {"products": products, "normals": normals, "call": call}


def _shared(parts: Sequence[slice], tools: Spares[Any], work: Callable[[Any], None], n_threads: int) -> None:
    """Call ``work`` once per part, with one of the tools, on several threads."""

    def take(_: slice, __: object) -> None:
        tool = tools.take()
        work(tool)
        tools.give(tool)

    share(parts, take, n_threads)


def draw_of(rows: int, n_blocks: int) -> kernels.Call:
    """The call of the update's kernel that draws (rows, n_blocks, 4) normal numbers."""
    out = torch.empty(rows, n_blocks, 4)
    counter = seed_words(SEED), int(Stream.LANGEVIN), torch.arange(rows), torch.zeros(1, dtype=torch.int64), 0
    return drawing(kernels.NORMAL, slice(0, rows), scratch.take(), *counter, n_blocks, out)


# -- pools ---------------------------------------------------------------------------------------------------------


def pools(key: str, case: TrainingCase, seconds: float = SECONDS) -> list[Row]:
    """Seconds per draw and write-back; ROUND of them are timed together."""
    found = fastest(parts_of_pools(case), seconds)
    return rows_of("pools", key, case, {name: value / ROUND for name, value in found.items()}, torch.get_num_threads())


def parts_of_pools(case: TrainingCase) -> Runs:
    trainer, n, dim = fastebm_pool(case, _CPU), case.n_chains, case.dim
    ahead = Draws(Starts("uniform", SEED, (dim,), case.clamp, _CPU), n, 0, n)
    drawn = [ahead.draw(i, case.batch_size, case.restart_prob) for i in range(ROUND)]
    numbers, data = itertools.count(ROUND), trainer.states()
    steps, started, reinits = (torch.zeros(n, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.int32))
    energy, energies = torch.zeros(n), torch.zeros(case.batch_size)
    # without reinits: writing the states back changes nothing
    taken = [copies.take(draw._replace(reinit=draw.reinit[:0]), data, steps) for draw in drawn]

    def draws() -> None:
        for i in itertools.islice(numbers, ROUND):
            ahead.draw(i, case.batch_size, case.restart_prob)

    def take() -> None:
        for draw in drawn:
            copies.take(draw, data, steps)

    def put() -> None:
        for draw, (x, before) in zip(drawn, taken, strict=True):
            copies.put(draw, x, before, before, energies, data, steps, energy, started, reinits)

    return {"whole": partial(draws_and_writes, trainer), "draws": draws, "take": take, "put": put}


# -- first calls ---------------------------------------------------------------------------------------------------


def first_calls(key: str, processes: int = PROCESSES) -> list[Row]:
    found = []
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, **dict.fromkeys(CACHES, folder)}
            command = [
                sys.executable,
                "-m",
                "fastebm.bench.breakdown",
                "--first-call",
                key,
                str(torch.get_num_threads()),
            ]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return rows_of(
        "first calls", key, COMPILATION[key], min(found, key=lambda parts: parts["whole"]), torch.get_num_threads()
    )


def parts_of_a_first_call(key: str) -> dict[str, float]:
    """Seconds of each part, in this process."""
    case = COMPILATION[key]
    run = DEFAULT.prepare(Problem(case, _CPU), case.steps, case.noise_std)
    parts = {"import": 0.0, "registries": 0.0}
    load = kernels._load

    def timed(name: str) -> Any:
        start = time.perf_counter()
        kernel = load(name)
        parts[name] = time.perf_counter() - start
        return kernel

    def first() -> None:
        def import_() -> None:
            import numba  # noqa: F401

        def empty() -> None:
            import numba

            numba.cfunc("void(int64)")(lambda block: None)

        parts["import"], parts["registries"] = seconds_of(import_, _CPU), seconds_of(empty, _CPU)
        run()

    kernels._load = timed
    try:
        whole = seconds_of(first, _CPU)
    finally:
        kernels._load = load
    return {"whole": whole, **parts, "later call": min(seconds_of(run, _CPU) for _ in range(3))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    add_out(parser)
    parser.add_argument(
        "--first-call", nargs=2, help=argparse.SUPPRESS
    )  # one process' part, as JSON: see first_calls()
    arguments = parser.parse_args(argv)
    if arguments.first_call:
        key, n_threads = arguments.first_call
        torch.set_num_threads(int(n_threads))
        print(json.dumps(parts_of_a_first_call(key)))
        return 0
    rows = []
    with on_threads(None):
        for key in SHOWN:
            rows += steps(key, STEPS[key])
        for n, case in POOL.items():
            rows += pools(f"pool-{n}", case)
        for key in COMPILATION:
            rows += first_calls(key)
    for row in rows:
        print(*row.values())
    write(arguments.out / "breakdown.csv", rows, provenance("numba"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
