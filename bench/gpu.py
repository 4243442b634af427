"""Timings and launch sweeps on one GPU; `bash bench/on_gpu.sh` runs all of it.

    python bench/gpu.py timings --out FOLDER [--until UNIX_TIME] [--dry]
    python bench/gpu.py sweep   --out FOLDER ...
    python bench/gpu.py warm    --number K --of N ...       compile kernels ahead, into Triton's cache
    python bench/gpu.py environment --out FOLDER

All contestants of a case move the same start by the same rule, each with its own fastest noise. A speed-up is
written only where the contestant of that row, and eager autograd, have passed their gate on that very case.

Each part works in a child process: a kernel that loses the CUDA context, or a killed process, costs its own row.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import rows
import torch
from cases import CASES, DRIFT, DRY_CASES, ENERGIES, NOISE_STD, Case
from fastebm.kernels.launch import SHARED_MEMORY, Launch, block, choose_launch, shared_bytes
from torch import Tensor

from fastebm import Langevin, MLPEnergy, langevin_sample
from fastebm.backends import Chains, fused, reference
from fastebm.backends.choose import choose, interpreted
from fastebm.description import describe
from fastebm.energies import Energy
from fastebm.mlp import MLP, read_mlp

SEED = 1
ULP = torch.finfo(torch.float32).eps
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FUSED_PRECISIONS = ("bf16x3", "tf32", "bf16")
GATE_STEPS = 3
GATE_ROWS = 128  # at the start, in the middle and at the end
# The kernel's fast noise: the special-function unit is 2^-22 off in log2, and r is the root of that (tests/test_noise).
NOISE_ERROR = 1e-3
ROUNDS = 15
MAX_RESTARTS = 8

Run = Callable[[], Tensor]


class Missing(Exception):
    """Why a contestant does not take part."""


# -- the problem, its truth and the allowed error -------------------------------------------------------------


@cache
def make_energy(dim: int, widths: tuple[int, ...]) -> MLPEnergy:
    """An energy whose gradient is of the state's size: behind PyTorch's initial weights a wrong one would hide."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        energy = MLPEnergy(dim, widths)
        for p in energy.parameters():
            p.mul_(3.0)
    return energy.to(DEVICE).eval().requires_grad_(False)


@dataclass
class Problem:
    case: Case
    device: torch.device = DEVICE
    dry: bool = False
    energy: MLPEnergy = field(init=False)
    x0: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.energy = make_energy(self.case.dim, self.case.widths)
        generator = torch.Generator(self.device).manual_seed(SEED)
        self.x0 = torch.randn(self.case.n_chains, self.case.dim, generator=generator, device=self.device)

    @cached_property
    def mlp(self) -> MLP:
        return read_mlp(self.energy)

    @cached_property
    def rows(self) -> Tensor:
        """Chains that the gate looks at."""
        n, k = self.case.n_chains, GATE_ROWS
        middle = max(0, (n - k) // 2)
        picks = [*range(min(k, n)), *range(middle, min(middle + k, n)), *range(max(0, n - k), n)]
        return torch.tensor(sorted(set(picks)), device=self.device)

    @cached_property
    def descent(self) -> Tensor:
        """The gate's chains in float64 after one step without noise: the energy gradient, and nothing else."""
        x = self.x0[self.rows].double()
        return x - DRIFT * Energy(self.energy, (self.case.dim,), torch.float64).gradient(x)

    @cached_property
    def noisy(self) -> Tensor:
        """The gate's chains in float64 after GATE_STEPS steps with fastebm's noise."""
        x = self.x0[self.rows].double()
        module = Energy(self.energy, (self.case.dim,), torch.float64)
        rule = Langevin.from_drift_and_noise(DRIFT, NOISE_STD)
        chains = Chains(x, SEED, self.rows, torch.zeros_like(self.rows))
        return reference.advance(module, chains, rule, GATE_STEPS).x

    def allowed(self, precision: str) -> float:
        """Twice the error of plain PyTorch at a precision, after one step without noise, plus rounding."""
        x = self.x0[self.rows]
        plain = x - DRIFT * plain_gradient(self.mlp, x, precision)
        scale = largest(x) + largest(self.descent - x)
        return 2 * largest(plain - self.descent) + 2 * ULP * scale


def largest(values: Tensor) -> float:
    return float(values.abs().max())


def truncated(values: Tensor, bits: int) -> Tensor:
    return (values.contiguous().view(torch.int32) & -(1 << bits)).view(torch.float32)


def halves(values: Tensor, precision: str, *, in_kernel: bool) -> tuple[Tensor, ...]:
    """An operand as a precision multiplies it: a sum of terms, each exact in float32.

    Weights are rounded on the host. In the kernel, bf16x3 cuts the high half off and rounds the rest, and tensor
    cores drop the low bits of tf32; the interpreter cuts wherever a GPU rounds to bf16, and keeps all of tf32.
    """
    if precision in ("ieee", "float32"):
        return (values,)
    if precision == "tf32":
        return (values if interpreted() else truncated(values, 13),)
    cut = in_kernel and (interpreted() or precision == "bf16x3")
    rounded = truncated(values, 16) if cut else values.bfloat16().float()
    if precision == "bf16":
        return (rounded,)
    rest = values - rounded
    return rounded, truncated(rest, 16) if in_kernel and interpreted() else rest.bfloat16().float()


def plain_gradient(mlp: MLP, x: Tensor, precision: str) -> Tensor:
    """dE/dx by plain PyTorch with operands rounded as documented for a precision; sums in float32."""

    def product(a: Tensor, w: Tensor) -> Tensor:
        a_terms, w_terms = halves(a, precision, in_kernel=True), halves(w, precision, in_kernel=False)
        terms = [a_terms[i] @ w_terms[j] for i in range(len(a_terms)) for j in range(len(w_terms)) if i + j < 2]
        return torch.stack(terms).sum(dim=0)

    h, zs = x, []
    for weight, bias, activation in zip(mlp.weights[:-1], mlp.biases[:-1], mlp.activations, strict=True):
        z = product(h, weight.t())
        zs.append(z if bias is None else z + bias)
        h = activation.forward(zs[-1], torch.empty_like(zs[-1]))
    g = mlp.weights[-1].expand_as(h)
    for weight, z, activation in zip(reversed(mlp.weights[:-1]), reversed(zs), reversed(mlp.activations), strict=True):
        g = product(activation.backward(g, z, torch.empty_like(z)), weight)
    return g


# -- contestants: (problem, steps, noise_std) -> a function that runs it ------------------------------------


def eager(p: Problem, steps: int, noise_std: float) -> Run:
    """What people write today: autograd, torch.randn, a Python loop."""

    def run() -> Tensor:
        x = p.x0
        for _ in range(steps):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(p.energy(x).sum(), x)
            x = x.detach().sub(grad, alpha=DRIFT).add_(torch.randn_like(grad), alpha=noise_std)
        return x

    return run


@cache
def compiled_step(energy: MLPEnergy, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, noise_std: Tensor) -> Tensor:
        grad = torch.func.grad(lambda x: energy(x).sum())(x)
        return x - DRIFT * grad + noise_std * torch.randn_like(x)

    return torch.compile(step, backend=backend, fullgraph=True)  # type: ignore[return-value]


def compiled(p: Problem, steps: int, noise_std: float) -> Run:
    """The step under torch.compile (one graph: gradient, noise, update), in a Python loop."""
    # A dry run has no time to compile for real.
    step = compiled_step(p.energy, "eager" if p.dry else "inductor")
    std = torch.tensor(noise_std, device=p.device)
    # One compilation serves every number of chains: the products are cuBLAS's either way, and the rest is elementwise.
    torch._dynamo.maybe_mark_dynamic(p.x0, 0)

    def run() -> Tensor:
        x = p.x0
        with torch.no_grad():
            for _ in range(steps):
                x = step(x, std)
        return x

    return run


def graphed(prepare: Callable[[Problem, int, float], Run]) -> Callable[[Problem, int, float], Run]:
    """A whole loop of another contestant, captured in one CUDA graph."""

    def prepared(p: Problem, steps: int, noise_std: float) -> Run:
        if p.device.type != "cuda":
            raise Missing("CUDA graphs need a CUDA device")
        loop = prepare(p, steps, noise_std)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            prepare(p, 2, noise_std)()  # libraries set themselves up outside the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x = loop()

        def run() -> Tensor:
            graph.replay()
            return x

        return run

    return prepared


def jax_scan(p: Problem, steps: int, noise_std: float) -> Run:
    """jit of lax.scan over the steps."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
    except ImportError:
        raise Missing("jax is not installed") from None
    if p.device.type == "cuda" and jax.default_backend() != "gpu":
        raise Missing("this jax has no CUDA backend")
    tf32 = p.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    jnp, precision = jax.numpy, "tensorfloat32" if tf32 else "highest"
    layers = [(jnp.asarray(w.cpu().numpy()), jnp.asarray(b.cpu().numpy())) for w, b in _layers(p.mlp)]

    def total(x: Any) -> Any:
        for weight, bias in layers[:-1]:
            x = jax.nn.silu(jnp.dot(x, weight.T, precision=precision) + bias)
        return (x @ layers[-1][0].T + layers[-1][1]).sum()

    @jax.jit
    def loop(x: Any, key: Any) -> Any:
        def step(x: Any, key: Any) -> Any:
            return x - DRIFT * jax.grad(total)(x) + noise_std * jax.random.normal(key, x.shape), None

        return jax.lax.scan(step, x, jax.random.split(key, steps))[0]

    start, key = jax.dlpack.from_dlpack(p.x0), jax.random.key(SEED)
    return lambda: torch.from_dlpack(jax.block_until_ready(loop(start, key)))


def _layers(mlp: MLP) -> list[tuple[Tensor, Tensor]]:
    return [(w, w.new_zeros(len(w)) if b is None else b) for w, b in zip(mlp.weights, mlp.biases, strict=True)]


def fastebm_at(precision: str) -> Callable[[Problem, int, float], Run]:
    """langevin_sample with the fused kernel, as users call it: its checks and its copy are in the time."""

    def prepared(p: Problem, steps: int, noise_std: float) -> Run:
        why_not = choose(p.energy, p.device, torch.float32, "triton", precision).why_not_fused
        if why_not is not None:
            raise Missing(why_not)
        rule = Langevin.from_drift_and_noise(DRIFT, noise_std)
        options = {"step_size": rule.step_size, "noise_scale": rule.noise_scale, "seed": SEED, "precision": precision}

        def run() -> Tensor:
            return langevin_sample(p.energy, init=p.x0, steps=steps, backend="triton", **options)  # type: ignore

        return run

    return prepared


def fastebm_update(p: Problem, steps: int, noise_std: float) -> Run:
    """What fastebm does for an energy it has no fused kernel for: autograd, then noise and update in one launch."""
    rule = Langevin.from_drift_and_noise(DRIFT, noise_std)
    energy = Energy(p.energy, (p.case.dim,), torch.float32)
    numbers = torch.arange(p.case.n_chains, device=p.device)
    ages = torch.zeros_like(numbers)
    return lambda: fused.advance_module(energy, Chains(p.x0.clone(), SEED, numbers, ages), rule, steps).x


@dataclass(frozen=True)
class Contestant:
    name: str
    precision: str  # of the matrix products
    prepare: Callable[[Problem, int, float], Run]

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastebm")


CONTESTANTS = (
    Contestant("eager", "float32", eager),
    *(Contestant("fastebm", precision, fastebm_at(precision)) for precision in FUSED_PRECISIONS),
    Contestant("fastebm update", "float32", fastebm_update),
    Contestant("graph", "float32", graphed(eager)),
    Contestant("compile", "float32", compiled),
    Contestant("compile+graph", "float32", graphed(compiled)),
    Contestant("jax", "float32", jax_scan),
    Contestant("eager", "tf32", eager),
    Contestant("compile+graph", "tf32", graphed(compiled)),
    Contestant("jax", "tf32", jax_scan),
)


@contextmanager
def matmul(precision: str) -> Iterator[None]:
    """Matrix products of PyTorch in tf32, or not (on CUDA)."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# -- gate and clock -----------------------------------------------------------------------------------------


def gate(p: Problem, contestant: Contestant) -> dict[str, Any]:
    """Error of one step without noise against float64; for fastebm also of GATE_STEPS steps with its noise."""
    allowed = p.allowed(contestant.precision)
    with matmul(contestant.precision):
        moved = contestant.prepare(p, 1, 0.0)()
        error = largest(moved[p.rows] - p.descent)
        correct = moved.shape == p.x0.shape and error <= allowed  # NaN compares false
        del moved
        if correct and contestant.ours:
            moved = contestant.prepare(p, GATE_STEPS, NOISE_STD)()
            noisy = largest(moved[p.rows] - p.noisy)
            correct = noisy <= GATE_STEPS * (2 * allowed + NOISE_ERROR * NOISE_STD)
    return {"correct": "yes" if correct else "no", "error": error, "allowed": allowed}


def seconds_of(run: Callable[[], object]) -> float:
    """By CUDA events, from an idle GPU to the end of the work, the host's share between them included."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(runs: dict[Any, Callable[[], object]], seconds: float, rounds: int = ROUNDS) -> dict[Any, list[float]]:
    """A B C A B C ...: at least 3 rounds, then as many as fit. One that runs out of memory drops out, with no times."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    end = time.monotonic() + seconds
    for i in range(rounds):
        if i >= 3 and time.monotonic() > end:
            break
        for key, run in runs.items():
            if times.get(key) is not None:
                try:
                    times[key].append(seconds_of(run))
                except torch.OutOfMemoryError:
                    del times[key]
                    torch.cuda.empty_cache()
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return (times[0],) * 3
    q1, q2, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return q1, q2, q3


def row_of(case: Case, **columns: Any) -> dict[str, Any]:
    return {
        "energy": case.energy,
        "dim": case.dim,
        "widths": " ".join(map(str, case.widths)),
        "n_chains": case.n_chains,
        "steps": case.steps,
        **columns,
    }


TIMED = ("correct", "error", "allowed", "rounds", "seconds", "seconds_q1", "seconds_q3", "chain_steps_per_s")


def time_case(
    case: Case,
    contestants: Iterable[Contestant] = CONTESTANTS,
    *,
    lost: Iterable[str] = (),
    underway: Callable[[str], None] = lambda key: None,
    seconds: float = 6.0,
    dry: bool = False,
) -> list[dict[str, Any]]:
    """One row a contestant. lost: keys of those that have killed a process before; underway: told what runs."""
    p = Problem(case, dry=dry)
    results: dict[Contestant, dict[str, Any]] = {}
    for c in contestants:
        row = row_of(case, contestant=c.name, precision=c.precision, status="ok", **dict.fromkeys(TIMED, ""))
        results[c] = row | {"eager_seconds": "", "times_eager": "", "note": ""}

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
            if CUDA and not context_is_lost():
                torch.cuda.empty_cache()
        return None

    for c, row in results.items():
        row |= prepared(c, lambda c=c: gate(p, c)) or {}
        if row["correct"] == "no":
            row |= {"status": "wrong", "note": "failed its gate: not timed"}
        if c.name == "fastebm" and row["correct"] == "yes":
            row["note"] = choose(p.energy, p.device, torch.float32, "triton", c.precision).path
    right = [c for c, row in results.items() if row["correct"] == "yes"]
    yardstick = [c for c in right if (c.name, c.precision) == ("eager", "float32")]

    # A captured graph keeps its memory: where that is much, each is timed by itself, next to eager.
    groups = [right]
    if CUDA and 40 * p.x0.nbytes > torch.cuda.get_device_properties(0).total_memory:
        alone = [c for c in right if "graph" in c.name]
        groups = [[c for c in right if c not in alone], *([*yardstick, c] for c in alone)]
    for group in groups:
        runs = {c: run for c in group if (run := prepared(c, lambda c=c: ready(p, c))) is not None}
        underway(f"{case.name}, all")
        times = interleaved(runs, seconds / len(groups))
        eager_seconds = [statistics.median(times[c]) for c in yardstick if c in times]
        for c in runs:
            if c not in times:
                results[c] |= {"status": "missing", "note": "out of memory beside the others"}
                continue
            q1, median, q3 = quartiles(times[c])
            results[c] |= {"rounds": len(times[c]), "seconds": median, "seconds_q1": q1, "seconds_q3": q3}
            results[c]["chain_steps_per_s"] = case.n_chains * case.steps / median
            if eager_seconds:
                results[c] |= {"eager_seconds": eager_seconds[0], "times_eager": eager_seconds[0] / median}
        del runs
    return list(results.values())


def ready(p: Problem, c: Contestant) -> Run:
    """A contestant that has passed its gate, warmed up."""
    with matmul(c.precision):
        run = c.prepare(p, p.case.steps, NOISE_STD)
        run()
    return _within(c.precision, run)


def _within(precision: str, run: Run) -> Run:
    def with_precision() -> Tensor:
        with matmul(precision):
            return run()

    return with_precision


def context_is_lost() -> bool:
    """A CUDA error that stays: nothing more can be done in this process."""
    if not CUDA:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# -- the sweep ----------------------------------------------------------------------------------------------

# Tile and warps: a warp has 16 rows of a tensor-core product, and warpgroups (4 warps) 64.
TILES = ((64, 4), (128, 4), (128, 8), (32, 2), (64, 8), (16, 1))


def candidates(case: Case, precision: str, capability: int | None) -> list[Launch]:
    """Launches to try, the shipped one first. Those that can't fit in shared memory are left out."""
    default = choose_launch(case.dim, (case.widths,), precision, capability)
    if isinstance(default, str):
        return []
    tried = [default]
    if case.dim <= 128:
        tried += [Launch("resident", tile, block(case.dim), warps, 1) for tile, warps in TILES]
    if case.dim > 64:
        chunks = [c for c in (64, 32, 128) if c <= block(case.dim)]
        tried += [
            Launch("streaming", tile, chunk, warps, stages)
            for stages in (1, 2, 3)
            for chunk in chunks
            for tile, warps in TILES
        ]
    limit = math.inf if capability is None else SHARED_MEMORY.get(capability, SHARED_MEMORY[86])

    def may_fit(launch: Launch) -> bool:  # shared_bytes estimates from above
        return shared_bytes(launch, (case.widths,), precision, capability or 90) <= 1.25 * limit

    return list(dict.fromkeys(launch for launch in tried if may_fit(launch)))


def capability() -> int | None:
    if not CUDA:
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def sweep_jobs(dry: bool) -> list[tuple[Case, str, Launch]]:
    """(case, precision, launch), the most telling first: near the shipped launch, a saturated device."""
    if dry:
        cases = [(case, "bf16x3") for case in DRY_CASES[:1]]
    else:
        # 65,536 chains fill every streaming multiprocessor several times over, and fit beside anything
        cases = [(Case(*e, n), q) for n in (65_536, 4_096) for q in ("bf16x3", "bf16", "tf32") for e in ENERGIES]
    lists = [[(case, q, launch) for launch in candidates(case, q, capability())] for case, q in cases]
    if dry:
        return [job for jobs in lists for job in jobs[:2]]
    # In turns: the first of every list before the second of any.
    return [jobs[i] for i in range(max(map(len, lists), default=0)) for jobs in lists if i < len(jobs)]


def sweep_one(p: Problem, precision: str, launch: Launch, seconds: float = 0.5) -> dict[str, Any]:
    """One candidate, held to float64 and then timed in turns with the shipped launch."""
    case = p.case
    default = choose_launch(case.dim, (case.widths,), precision, capability())
    columns = {"precision": precision, **asdict(launch), "shipped": "yes" if launch == default else "no"}
    row = row_of(case, **columns, status="ok", **dict.fromkeys(TIMED, ""))
    row |= {"shipped_seconds": "", "times_shipped": "", "note": ""}
    # few chains: enough steps that the kernel is timed, and not its launch
    steps = row["steps"] = 10 * case.steps if 1024 <= case.n_chains <= 4096 else case.steps
    x = torch.empty_like(p.x0)
    numbers = torch.arange(case.n_chains, device=p.device)
    chains = Chains(x, SEED, numbers, torch.zeros_like(numbers))
    description = describe(p.energy)

    def advance(launch: Launch, steps: int, noise_std: float) -> Tensor:
        rule = Langevin.from_drift_and_noise(DRIFT, noise_std)
        return fused.advance_mlp(description, chains, rule, steps, precision=precision, launch=launch).x

    try:
        allowed = p.allowed(precision)
        error = largest(advance_from(p, x, lambda: advance(launch, 1, 0.0))[p.rows] - p.descent)
        noisy = largest(advance_from(p, x, lambda: advance(launch, GATE_STEPS, NOISE_STD))[p.rows] - p.noisy)
        correct = error <= allowed and noisy <= GATE_STEPS * (2 * allowed + NOISE_ERROR * NOISE_STD)
        row |= {"correct": "yes" if correct else "no", "error": error, "allowed": allowed}
        if not correct:
            return row | {"status": "wrong"}
        runs = {True: lambda: advance(launch, steps, NOISE_STD)}
        if launch != default:
            runs[False] = lambda: advance(default, steps, NOISE_STD)  # type: ignore[arg-type]
        for run in runs.values():
            run()
        times = interleaved(runs, seconds)
        q1, median, q3 = quartiles(times[True])
        shipped = statistics.median(times[launch == default])
        row |= {"rounds": len(times[True]), "seconds": median, "seconds_q1": q1, "seconds_q3": q3}
        row |= {"chain_steps_per_s": case.n_chains * steps / median}
        row |= {"shipped_seconds": shipped, "times_shipped": shipped / median}
    except Exception as error:
        does_not_fit = type(error).__name__ == "OutOfResources"
        row |= {"status": "does not fit" if does_not_fit else "error", "note": f"{type(error).__name__}: {error}"[:500]}
        if not does_not_fit:
            traceback.print_exc()
        if context_is_lost():
            raise
    return row


def advance_from(p: Problem, x: Tensor, advance: Run) -> Tensor:
    x.copy_(p.x0)
    return advance()


def warm(part: int, parts: int, until: float, dry: bool) -> int:
    """Compile this part's share of all kernels, shipped ones first, by moving a few chains one step."""
    # the number of chains is no part of a kernel
    kernels = {(case.dim, case.widths, q, launch): (case, q, launch) for case, q, launch in reversed(sweep_jobs(dry))}
    jobs = list(reversed(kernels.values()))
    rule = Langevin.from_drift_and_noise(DRIFT, NOISE_STD)
    for energy in [] if dry else ENERGIES[part::parts]:  # the timings find these in torch.compile's cache
        compiled(Problem(Case(*energy, 512)), 1, NOISE_STD)()
    for i, (case, precision, launch) in enumerate(jobs):
        if i % parts != part:
            continue
        if time.time() > until:
            print(f"warm {part}: {len(jobs[i::parts])} kernels left to compile", file=sys.stderr)
            break
        numbers = torch.arange(64, device=DEVICE)
        chains = Chains(torch.zeros(64, case.dim, device=DEVICE), SEED, numbers, numbers)
        description = describe(make_energy(case.dim, case.widths))
        try:
            fused.advance_mlp(description, chains, rule, 1, precision=precision, launch=launch)
        except Exception as error:  # the sweep will say so in its row
            print(f"warm {part}: {case.energy} {precision} {launch}: {type(error).__name__}", file=sys.stderr)
        if context_is_lost():
            return 1
    return 0


# -- parts: a child that works and writes, a parent that goes on where a child died ----------------------------


class Journal:
    """rows.jsonl: finished rows, each with its job; lost.txt: what a process died of; underway.txt: what runs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows_at, self.lost_at, self.underway_at = (folder / n for n in ("rows.jsonl", "lost.txt", "underway.txt"))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.rows_at.read_text().splitlines()] if self.rows_at.exists() else []

    def done(self) -> set[str]:
        return {row["job"] for row in self.rows()}

    def lost(self) -> list[str]:
        return self.lost_at.read_text().splitlines() if self.lost_at.exists() else []

    def underway(self, key: str) -> None:
        self.underway_at.write_text(key)

    def add(self, job: str, rows: Iterable[dict[str, Any]]) -> None:
        with self.rows_at.open("a") as file:
            file.writelines(json.dumps({"job": job, **row}) + "\n" for row in rows)
        self.underway("")

    def bury(self) -> str:
        """What was under way when a process died, from now on among the lost."""
        key = self.underway_at.read_text() if self.underway_at.exists() else ""
        if key:
            with self.lost_at.open("a") as file:
                file.write(key + "\n")
        return key


def timings_child(journal: Journal, until: float, dry: bool) -> None:
    for case in DRY_CASES if dry else CASES:
        if case.name in journal.done():
            continue
        if time.time() > until - (0 if dry else 10):
            break
        if f"{case.name}, all" in journal.lost():
            journal.add(case.name, [row_of(case, status="error", note="its process died while all were timed")])
            continue
        started = time.time()
        journal.underway(f"{case.name}, all")
        seconds = 0.5 if dry else min(6.0, (until - started) / 2)
        rows = time_case(case, lost=journal.lost(), underway=journal.underway, dry=dry, seconds=seconds)
        journal.add(case.name, rows)
        print(f"{case.name}: {time.time() - started:.0f} s", *map(brief, rows), sep="\n  ", flush=True)


def brief(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['contestant']} {row['precision']}: {row['status']} {row['note'][:120]}"
    ratio = f"{row['times_eager']:.1f} x eager" if row["times_eager"] else "no eager to compare with"
    return f"{row['contestant']} {row['precision']}: {row['chain_steps_per_s']:.3g} chain-steps/s, {ratio}"


def sweep_child(journal: Journal, until: float, dry: bool) -> None:
    problems: dict[Case, Problem] = {}
    done, lost = journal.done(), journal.lost()
    for case, precision, launch in sweep_jobs(dry):
        job = f"{case.name}, {precision}, {launch}"
        if time.time() > until:
            break
        if job in done:
            continue
        if job in lost:
            row = row_of(case, precision=precision, **asdict(launch), status="error", note="its process died")
            journal.add(job, [row])
            continue
        journal.underway(job)
        if case not in problems:
            problems[case] = Problem(case, dry=dry)
        journal.add(job, [sweep_one(problems[case], precision, launch)])


def expected_jobs(part: str, dry: bool) -> list[str]:
    if part == "timings":
        return [case.name for case in (DRY_CASES if dry else CASES)]
    return [f"{case.name}, {precision}, {launch}" for case, precision, launch in sweep_jobs(dry)]


def supervise(part: str, out: Path, until: float, dry: bool) -> int:
    """Run a part's child until all is done, the time is over, or it keeps dying; then write the CSV."""
    journal = Journal(out / f".{part}")
    status = 0
    for _ in range(1 + MAX_RESTARTS):
        command = [sys.executable, __file__, part, "--child", "--out", str(out), "--until", str(until)]
        try:
            child = subprocess.run([*command, *(["--dry"] if dry else [])], timeout=max(1.0, until + 15 - time.time()))
        except subprocess.TimeoutExpired:
            print(f"{part}: out of time in {journal.bury() or 'no job'}", file=sys.stderr)
            break
        if child.returncode == 0:
            break
        key = journal.bury()
        print(f"{part}: a process died (status {child.returncode}) in {key or 'no job'}", file=sys.stderr)
        status = 1
        if not key or time.time() > until:
            break
    found = journal.rows()
    left_out = [job for job in expected_jobs(part, dry) if job not in journal.done()]
    found += [{"job": job, "status": "left out", "note": "no time was left"} for job in left_out]
    write(out / f"{part}.csv", found)
    for path in (journal.rows_at, journal.lost_at, journal.underway_at):
        path.unlink(missing_ok=True)
    (out / f".{part}").rmdir()
    wrong = [row for row in found if row["status"] in ("error", "wrong")]
    print(f"{part}: {len(found)} rows, {len(wrong)} wrong or failed, {len(left_out)} left out for time")
    for row in wrong:
        print(f"{part}: {row['job']} {row.get('contestant', '')} {row['status']}: {row['note'][:200]}", file=sys.stderr)
    return 1 if wrong or status else 0


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """CSV of rows that need not have the same columns, each with machine, versions, commit and date."""
    common = provenance()
    found = [{**{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}, **common} for row in found]
    columns = list(dict.fromkeys(name for row in found for name in row if name not in common))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, *common], lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(found)


def provenance() -> dict[str, Any]:
    """rows.provenance, and the GPU's. COMMIT in the environment names the commit where there is no checkout."""
    common = rows.provenance()
    if common["commit"] == "unknown":
        common["commit"] = os.environ.get("COMMIT", "unknown")
    gpu = torch.cuda.get_device_name() if CUDA else "none"
    return {**common, "gpu": gpu, "driver": nvidia_smi("driver_version"), "cuda": torch.version.cuda or "none"}


def nvidia_smi(query: str | None = None) -> str:
    options = [] if query is None else [f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def environment(out: Path, notes: list[str]) -> None:
    """environment.json: the machine, the packages, the state of its clocks, and the notes (name=value) given."""
    import importlib.metadata

    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    properties = torch.cuda.get_device_properties(0) if CUDA else None
    clocks = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.total,persistence_mode"
    content = {
        **provenance(),
        **dict(note.split("=", 1) for note in notes),
        "device": str(properties),
        "capability": capability(),
        "interpreted": interpreted(),
        "nvidia_smi": nvidia_smi().splitlines(),
        clocks: nvidia_smi(clocks),
        "packages": dict(sorted(found.items())),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("timings", "sweep", "warm", "environment"))
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "gpu")
    parser.add_argument("--until", type=float, default=math.inf, help="Unix time at which to stop")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU, kernels in the interpreter")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--note", action="append", default=[], help="name=value, for environment.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "environment":
        environment(args.out, args.note)
        return 0
    if args.part == "warm":
        return warm(args.number, args.of, args.until, args.dry)
    if args.child:
        child = timings_child if args.part == "timings" else sweep_child
        child(Journal(args.out / f".{args.part}"), args.until, args.dry)
        return 0
    return supervise(args.part, args.out, args.until, args.dry)


if __name__ == "__main__":
    sys.exit(main())
