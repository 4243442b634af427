"""Single launches of the kernels: correctness, resources and time. For gpu.py, on a GPU.

shipped   each shipped kernel against float64 over all chains, run twice with equal bits
alone     the same kernels with nothing beside them: time of the kernel and of a whole call
samplers  HMC and MALA, whose steps have a kernel, and NUTS, whose energies have one, against library products
sweep     other launches of the fused kernel, checked against float64, then timed interleaved with the shipped one
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from fastebm.bench.cases import DIGITS, NOISE_STD, TABLE, TOY, Case
from fastebm.bench.clock import interleaved, quartiles, seconds_of
from fastebm.bench.problem import GATE_STEPS, SEED, Problem, largest
from fastebm.bench.race import allowed_with_noise, context_is_lost, row_of
from fastebm.kernels.triton.launch import SHARED_MEMORY, Launch, block, choose_launch, shared_bytes
from torch import Tensor

import fastebm
from fastebm import HMC, MALA, NUTS, Langevin, SampleResult, langevin_sample
from fastebm.backends import Chains, fused
from fastebm.backends.choose import choose
from fastebm.backends.evaluation import Evaluation
from fastebm.targets.description import describe

Row = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """precision: of a fused kernel; None for library products at full precision."""

    dim: int
    widths: tuple[int, ...]
    precision: str | None
    kind: str = "mlp"

    @property
    def name(self) -> str:
        return f"{self.case(1).energy} {self.precision or 'float32'}"

    def case(self, n_chains: int, steps: int = GATE_STEPS) -> Case:
        return Case(self.dim, self.widths, n_chains, steps, kind=self.kind)


# Both regimes of the fused kernel, an MLP too wide for either (library products, fused update), and a module that
# is not an MLP (autograd, fused update). The last two run the same update kernel, at two dims.
SHIPPED = (
    *(Kernel(*energy, precision) for energy in (TABLE, DIGITS, TOY) for precision in ("bf16x3", "bf16")),
    Kernel(64, (1024, 1024), None),
    Kernel(256, (16, 32), None, "conv"),
)
DRY_SHIPPED = (Kernel(3, (16,), "bf16x3"), Kernel(130, (16, 16), "bf16"), Kernel(16, (4,), None, "conv"))

CHECKED_CHAINS, DRY_CHECKED_CHAINS = (300, 20_000), (70,)
TIMED_CHAINS, DRY_TIMED_CHAINS = (65_536, 4_096, 1_048_576), (70,)


def sample(p: Problem, precision: str | None, steps: int, noise_std: float, **options: Any) -> Any:
    rule = p.rule(noise_std)
    return langevin_sample(
        p.energy, init=p.x0, steps=steps, step_size=rule.step_size, noise_scale=rule.noise_scale, clamp=rule.clamp,
        seed=SEED, backend="triton", precision=precision, **options,
    )  # fmt: skip


# -- shipped ---------------------------------------------------------------------------------------------------


def check(kernel: Kernel, n_chains: int, device: torch.device, dry: bool) -> Row:
    """One step without noise and GATE_STEPS with, all chains against float64; twice, with equal bits."""
    p = Problem(kernel.case(n_chains), device, dry=dry, gate_rows=n_chains)
    started = time.monotonic()
    sample(p, kernel.precision, 1, 0.0, on_nonfinite="ignore")
    if device.type == "cuda":
        torch.cuda.synchronize()
    first_call = time.monotonic() - started
    moved, info = sample(p, kernel.precision, 1, 0.0, on_nonfinite="ignore", return_info=True)
    allowed = p.allowed(kernel.precision or "float32")
    error = largest(moved.flatten(1) - p.descent)
    noisy = [sample(p, kernel.precision, GATE_STEPS, NOISE_STD, on_nonfinite="ignore") for _ in range(2)]
    noisy_error, noisy_allowed = largest(noisy[0].flatten(1) - p.noisy), allowed_with_noise(p.case, allowed)
    same_bits = torch.equal(*noisy)
    n_bad = int((info.first_bad_step >= 0).sum())
    evaluation = evaluated(kernel, p)
    right = error <= allowed and noisy_error <= noisy_allowed and n_bad == 0
    if info.path != "autograd":  # the gradient is PyTorch's, and cuDNN is not bitwise reproducible
        right = right and same_bits
    if evaluation:
        right = right and evaluation["evaluation_error"] <= allowed and evaluation["evaluation_same_bits"] == "yes"
    return {
        "kernel": kernel.name,
        "n_chains": n_chains,
        "path": info.path,
        "status": "ok" if right else "FAILED",
        "error": error,
        "allowed": allowed,
        "noisy_error": noisy_error,
        "noisy_allowed": noisy_allowed,
        "same_bits": "yes" if same_bits else "no",
        "n_nonfinite": n_bad,
        "energy_error": energy_error(p, moved, info.energies),
        "first_call_seconds": first_call,
        **evaluation,
        **launched(kernel, device),
        **as_loaded(device),
    }


def energy_error(p: Problem, x: Tensor, energies: Tensor) -> float:
    """Error of the energies of x against float64, relative to the largest energy."""
    with torch.no_grad():
        exact = p.double_energy(x.flatten(1).double()).flatten()
    return largest(energies - exact) / largest(exact)


def evaluated(kernel: Kernel, p: Problem) -> Row:
    """Of the kernel that evaluates the energy: the error of a step by its gradient, and of its energies at the start.

    Alone and together, which are different kernels. Empty for a path without one.
    """
    choice = choose(p.energy, p.device, torch.float32, "triton", kernel.precision)
    if choice.launch is None:
        return {}
    target = Evaluation(choice.description, chains_at(p.x0), precision=choice.precision, launch=choice.launch)
    value, gradient = target.value_and_gradient(p.x0)
    gradients, values = (gradient, target.gradient(p.x0)), (value, target.value(p.x0))
    same_bits = all(map(torch.equal, target.value_and_gradient(p.x0), (value, gradient)))
    return {
        "evaluation_error": max(largest(p.descended(p.x0, g)[p.rows] - p.descent) for g in gradients),
        "evaluation_energy_error": max(energy_error(p, p.x0, v) for v in values),
        "evaluation_same_bits": "yes" if same_bits else "no",
    }


def launched(kernel: Kernel, device: torch.device) -> Row:
    """The shipped launch's fields; empty for a path without one."""
    p = Problem(kernel.case(1), device)
    launch = choose(p.energy, device, torch.float32, "triton", kernel.precision).launch
    return {} if launch is None else asdict(launch)


def as_loaded(device: torch.device) -> Row:
    """Registers, spilled words and shared memory of the largest Langevin kernel that this process loaded."""
    if device.type != "cuda":
        return {}
    from fastebm.kernels.triton import resident, streaming, update

    functions = (resident.langevin_resident, streaming.langevin_streaming, update.langevin_update)
    loaded = [k for f in functions for cache in f.device_caches.values() for k in cache[0].values()]
    taken = [(k.n_regs, k.n_spills, k.metadata.shared) for k in loaded if getattr(k, "n_regs", 0)]
    registers, spills, shared = max(taken, default=("", "", ""))
    return {"registers": registers, "spills": spills, "shared_bytes": shared, "kernels_loaded": len(loaded)}


# -- alone -----------------------------------------------------------------------------------------------------


def time_alone(kernel: Kernel, n_chains: int, device: torch.device, seconds: float, dry: bool) -> Row:
    """Median times of a whole call and of its kernels on the GPU."""
    steps = 2 if dry else 10 if n_chains > 100_000 or kernel.precision is None else 60
    p = Problem(kernel.case(n_chains, steps), device, dry=dry)
    run = partial(sample, p, kernel.precision, steps, NOISE_STD)
    calls: list[float] = []
    end = time.monotonic() + seconds
    run()
    while len(calls) < 3 or (len(calls) < 30 and time.monotonic() < end):
        calls.append(seconds_of(run, device))
    call = statistics.median(calls)
    row = {"kernel": kernel.name, "n_chains": n_chains, "steps": steps, "status": "ok", "call_seconds": call}
    row["rounds"] = len(calls)
    row["call_chain_steps_per_s"] = n_chains * steps / call
    if device.type == "cuda":
        row |= (on_gpu := gpu_times(run))
        if kernel.precision is not None:  # the update kernel alone is a small part of a step
            row["kernel_chain_steps_per_s"] = n_chains * steps / on_gpu["kernel_seconds"]
    return row


def gpu_times(run: Callable[[], object], times: int = 3) -> Row:
    """Of one call, by CUPTI: seconds in Langevin kernels and in all others, and the number of the others."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    found = [e for e in profiler.key_averages() if e.device_time_total > 0]
    ours = [e for e in found if "langevin" in e.key]
    others = [e for e in found if "langevin" not in e.key]
    return {
        "kernel_seconds": sum(e.device_time_total for e in ours) / times / 1e6,
        "other_seconds": sum(e.device_time_total for e in others) / times / 1e6,
        "other_kernels": sum(e.count for e in others) / times,
    }


def profile_table(kernel: Kernel, n_chains: int, device: torch.device, dry: bool) -> str:
    """torch.profiler's table of one whole call."""
    from torch.profiler import ProfilerActivity, profile

    p = Problem(kernel.case(n_chains, 2 if dry else 60), device, dry=dry)
    run = partial(sample, p, kernel.precision, p.case.steps, NOISE_STD)
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
    return f"{kernel.name}, {n_chains} chains, {p.case.steps} steps\n{table}\n"


# -- samplers --------------------------------------------------------------------------------------------------

# Of DIGITS, with which HMC and MALA take their steps in the first layer.
NARROW_DIGITS = (784, (128, 128))

# A sampler and its steps, on an energy and a number of chains.
Sampled = tuple[str, Any, int, Case]
SAMPLED: tuple[Sampled, ...] = tuple(
    (name, sampler, steps, Case(*energy, n, clamp=None))
    for n in (4_096, 65_536)
    for energy in (TABLE, NARROW_DIGITS, DIGITS)
    for name, sampler, steps in (("HMC", HMC(0.1, 10), 10), ("MALA", MALA(0.01), 60), ("NUTS", NUTS(0.1, 5), 5))
)
DRY_SAMPLED: tuple[Sampled, ...] = tuple(
    (name, sampler, 2, Case(dim, (16,), 70, clamp=None))
    for name, sampler, dim in (("MALA", MALA(0.01), 3), ("HMC", HMC(0.1, 2), 130), ("NUTS", NUTS(0.1, 2), 3))
)
SAME_CHAINS = 0.95  # share of chains that must agree after one step: an accept test may go either way by rounding


def time_sampler(sampled: Sampled, device: torch.device, seconds: float, dry: bool) -> Row:
    """A whole call by backend "triton", and by library products (backend "torch"), in turns."""
    name, sampler, steps, case = sampled
    p = Problem(case, device, dry=dry)

    def run(backend: str, steps: int) -> SampleResult:
        return fastebm.sample(
            p.energy, sampler, init=p.x0, steps=steps, seed=SEED, backend=backend, on_nonfinite="ignore"
        )

    first = {backend: run(backend, 1) for backend in ("triton", "torch")}
    near = (first["triton"].x - first["torch"].x).abs().amax(dim=1) < 0.01
    row = {"sampler": name, "energy": case.energy, "n_chains": case.n_chains, "steps": steps}
    row |= {"path": first["triton"].info.path, "same_chains": float(near.float().mean())}
    if row["same_chains"] < SAME_CHAINS:
        return row | {"status": "FAILED", "note": "the two backends move chains differently: not timed"}
    times = interleaved({backend: partial(run, backend, steps) for backend in first}, seconds, device)
    ours, theirs = (statistics.median(times[backend]) for backend in first)
    row |= {"status": "ok", "rounds": len(times["triton"]), "seconds": ours, "products_seconds": theirs}
    return row | {"chain_steps_per_s": case.n_chains * steps / ours, "times_products": theirs / ours}


# -- sweep -----------------------------------------------------------------------------------------------------

# Tile and warps: a warp has 16 rows of a tensor-core product, and warpgroups (4 warps) 64.
TILES = ((64, 4), (128, 8), (128, 4), (64, 8), (32, 2), (16, 1))


def candidates(case: Case, precision: str, capability: int | None) -> list[Launch]:
    """Launches to try, the shipped one first, then those of one stage. Without those that exceed shared memory."""
    default = choose_launch(case.dim, (case.widths,), precision, capability)
    if isinstance(default, str):
        return []
    tried = []
    if case.dim <= 128:
        tried += [Launch("resident", tile, block(case.dim), warps, 1) for tile, warps in TILES]
    if case.dim > 64:
        chunks = [c for c in (32, 64, 16, 128) if c <= block(case.dim)]
        tried += [
            Launch("streaming", tile, chunk, warps, stages)
            for stages in (1, 2, 3)
            for tile, warps in TILES
            for chunk in chunks
        ]
    tried = [replace(one, lean=default.lean) for one in tried]
    if precision == "bf16x3":
        tried = [replace(one, in_memory=in_memory) for one in tried for in_memory in (False, True)]
    tried = [one for one in tried if not one.in_memory or one.own_chains]
    tried = [replace(default, lean=not default.lean), *tried]
    limit = math.inf if capability is None else SHARED_MEMORY.get(capability, SHARED_MEMORY[86])

    def may_fit(launch: Launch) -> bool:  # shared_bytes is an upper bound
        return shared_bytes(launch, case.dim, (case.widths,), precision, capability or 90) <= 1.25 * limit

    return list(dict.fromkeys(launch for launch in (default, *tried) if may_fit(launch)))


def capability(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


Job = tuple[Case, str, Launch]


def sweep_jobs(device: torch.device, dry: bool) -> list[Job]:
    """Most informative first: 65,536 chains fill every multiprocessor several times over."""
    if dry:
        cases = [(Case(3, (16,), 70, 2), "bf16x3")]
    else:
        cases = [(Case(*e, 65_536), q) for q in ("bf16x3", "bf16") for e in (TABLE, DIGITS, TOY)]
    lists = [[(case, q, launch) for launch in candidates(case, q, capability(device))] for case, q in cases]
    if dry:
        return [job for jobs in lists for job in jobs[:2]]
    # Interleaved: the first of every list before the second of any.
    return [jobs[i] for i in range(max(map(len, lists), default=0)) for jobs in lists if i < len(jobs)]


def job_name(job: Job) -> str:
    case, precision, launch = job
    fields = " ".join(f"{value}" for value in asdict(launch).values())
    return f"{case.name} {precision}: {fields}"


def compile_job(job: Job, device: torch.device) -> None:
    """Fill Triton's cache by moving a few chains one step; a kernel does not depend on the number of chains."""
    case, precision, launch = job
    p = Problem(replace(case, n_chains=64), device)
    advance(p, precision, launch, p.x0.clone(), 1, p.rule(NOISE_STD))


def advance(p: Problem, precision: str, launch: Launch, x: Tensor, steps: int, rule: Langevin) -> Tensor:
    return fused.run_mlp(describe(p.energy), chains_at(x), rule, steps, precision=precision, launch=launch).x


def chains_at(x: Tensor) -> Chains:
    numbers = torch.arange(len(x), device=x.device)
    return Chains(x, SEED, numbers, torch.zeros_like(numbers))


def sweep_one(p: Problem, precision: str, launch: Launch, seconds: float = 0.3) -> Row:
    """One candidate, checked against float64, then timed interleaved with the shipped launch."""
    case, device = p.case, p.device
    default = choose_launch(case.dim, (case.widths,), precision, capability(device))
    columns = {"precision": precision, **asdict(launch), "shipped": "yes" if launch == default else "no"}
    row = row_of(case, **columns, status="ok", error="", allowed="")
    row |= dict.fromkeys(("error_over_allowed", "rounds", "seconds", "seconds_q1", "seconds_q3"), "")
    row |= dict.fromkeys(("chain_steps_per_s", "shipped_seconds", "times_shipped", "untrusted_seconds", "note"), "")
    x = torch.empty_like(p.x0)

    def run(launch: Launch, steps: int, noise_std: float) -> Tensor:
        return advance(p, precision, launch, x.copy_(p.x0), steps, p.rule(noise_std))

    try:
        allowed = p.allowed(precision)
        error = largest(run(launch, 1, 0.0)[p.rows] - p.descent)
        noisy = largest(run(launch, GATE_STEPS, NOISE_STD)[p.rows] - p.noisy)
        over = max(error / allowed, noisy / allowed_with_noise(case, allowed))
        row |= {"error": error, "allowed": allowed, "error_over_allowed": over}
        runs = {True: partial(run, launch, case.steps, NOISE_STD)}
        if launch != default and isinstance(default, Launch):
            runs[False] = partial(run, default, case.steps, NOISE_STD)
        for one in runs.values():
            one()
        times = interleaved(runs, seconds, device)
        q1, median, q3 = quartiles(times[True])
        row["rounds"] = len(times[True])
        if not over <= 1:  # NaN too
            return row | {"status": "FAILED", "untrusted_seconds": median, "note": "failed its gate"}
        shipped = statistics.median(times[launch == default])
        row |= {"seconds": median, "seconds_q1": q1, "seconds_q3": q3}
        row |= {"chain_steps_per_s": case.n_chains * case.steps / median}
        row |= {"shipped_seconds": shipped, "times_shipped": shipped / median}
    except Exception as error:
        does_not_fit = type(error).__name__ == "OutOfResources"
        row |= {"status": "does not fit" if does_not_fit else "error", "note": f"{type(error).__name__}: {error}"[:500]}
        if not does_not_fit:
            traceback.print_exc()
        if context_is_lost():
            raise
    return row


# -- for profilers: compute-sanitizer, ncu ---------------------------------------------------------------------


def launch_once(kernel: Kernel, n_chains: int, steps: int) -> None:
    """One whole call on CUDA and nothing else, with the settings of the cases."""
    p = Problem(kernel.case(n_chains, steps), torch.device("cuda"))
    choice = choose(p.energy, p.device, torch.float32, "triton", kernel.precision)
    advance(p, choice.precision, choice.launch, p.x0.clone(), steps, p.rule(NOISE_STD))
    torch.cuda.synchronize()
