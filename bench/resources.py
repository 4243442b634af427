"""Registers, shared memory and instructions of every shipped launch configuration, found by compiling it.

No GPU is needed, and nothing is timed.

    python bench/resources.py            compile everything (minutes), write resources.csv into --out
    python bench/resources.py --check    compile everything, compare with bench/results/resources.csv, write nothing;
                                         exit status 1 where the committed rows are better

Rows belong to the version of triton that made them; a run leaves those of other versions alone. Two versions have
committed rows: triton 3.6.0, which torch 2.11 pins, and triton 3.9.0. CONTRIBUTING.md says how to make an environment
for each. Run both with --out bench/results before a change to the kernels or to choose_launch lands.

Counts are read from the machine code (SASS). Rates are computed from the counts and from data sheets, not measured:
upper bounds that only a kernel that never waits would reach.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastebm.bench.cases import ENERGIES
from fastebm.bench.machine_code import executed, is_tensor, parse, tensor_flops
from fastebm.bench.rows import RESULTS, add_out, provenance, read, replace, script
from fastebm.kernels.triton.launch import CHUNK_DIM, SHARED_MEMORY, block

COMMITTED = RESULTS / "resources.csv"
COMPILING = Path(__file__).parent.parent / "tests" / "compiling.py"


@dataclass(frozen=True)
class Machine:
    name: str
    sms: int
    clock: float  # Hz, boost
    bf16: float  # dense tensor-core FLOP/s with float32 sums
    tf32: float


# NVIDIA: A100 data sheet; GA102 whitepaper; Ada whitepaper; H100 data sheet (the H200's SMs are the same); HGX
# B200 data sheet; RTX Blackwell whitepaper. Where a sheet gives no clock for the tensor peak (H100, B200), the
# clock is derived from it: peak / (SMs * FLOPs per SM and clock).
MACHINES = {
    80: Machine("A100 SXM", 108, 1.41e9, 312e12, 156e12),
    86: Machine("RTX 3090", 82, 1.695e9, 71e12, 35.6e12),
    89: Machine("RTX 4090", 128, 2.52e9, 165.2e12, 82.6e12),
    90: Machine("H100 SXM", 132, 1.83e9, 989.4e12, 494.7e12),
    100: Machine("B200", 148, 1.85e9, 2250e12, 1125e12),
    120: Machine("RTX 5090", 170, 2.407e9, 209.5e12, 104.8e12),
}
# CUDA C++ Programming Guide: four schedulers per SM, each issuing one warp instruction per clock; 16 lanes of
# special functions ("Throughput of Native Arithmetic Instructions"); 65,536 registers.
SCHEDULERS, MUFU_LANES, REGISTERS = 4, 16, 65536
# Bytes from L2 per SM and clock: 5,120 over 108 SMs in the A100 whitepaper. Other sheets give none, so it is used for
# all of them. It is the least certain number here.
L2_BYTES = 5120 / 108

PRECISIONS = ("bf16", "bf16x3", "tf32")  # ieee is for tests
RULE = {"clamp": [-1.0, 1.0]}  # numbers for step size and noise, as most recipes have it

TRITON = importlib.metadata.version("triton")

# Spill loads plus stores that a warp may make in a step, by triton, architecture and precision; no limit for what is
# not listed. Rows are committed for these versions of triton. The 16 at bf16 are for the streaming kernel: its launch
# without spills was measured to be slower (kernels/triton/launch.py).
MAY_SPILL = {
    "3.6.0": {("sm_90", "bf16"): 16, ("sm_90", "bf16x3"): 100},
    "3.9.0": {(architecture, precision): 0 for architecture in ("sm_80", "sm_90") for precision in PRECISIONS},
}

# An evaluation has no loop over steps: instructions that one tile spills in all.
EVALUATION_MAY_SPILL = {
    "3.6.0": {("sm_90", "bf16"): 0, ("sm_90", "bf16x3"): 0},
    "3.9.0": {("sm_90", "bf16"): 0, ("sm_90", "bf16x3"): 120},
}

# A step of HMC of LEAPFROG_STEPS leapfrog steps, in which 13,000 to 73,000 instructions are executed.
HMC_MAY_SPILL = {
    "3.6.0": {("sm_90", "bf16"): 0, ("sm_90", "bf16x3"): 510},
    "3.9.0": {("sm_90", "bf16"): 0, ("sm_90", "bf16x3"): 100},
}
LEAPFROG_STEPS = 10

# Of HMC in the dims that the first layer sees, the energies, and the products with Q in a step.
REDUCED = ((784, (128, 128)),)
OF_WHOLE_STATES = 3

# Triton 3.6 only for the architectures that it can compile for: for sm_100 it emits a trap without a step to count.
CAPABILITIES = (80, 90) if TRITON == "3.6.0" else tuple(MACHINES)
# The kernel that evaluates an energy: elsewhere loops over two chunks are unrolled, and would count twice.
EVALUATED_ON = (80, 90)
# Elsewhere the energies that are compiled here do not fit (launch.why_no_accept_test).
ACCEPTED_ON = (90,)

MORE_INSTRUCTIONS = 1.03  # allowed over the committed row: the compiler's scheduling alone may change that much

Row = dict[str, Any]


def all_cases() -> list[Row]:
    return [
        {"kernel": kernel, "capability": capability, "dim": dim, "widths": list(widths), "precision": p, "rule": RULE}
        for kernel, capabilities, energies in (
            ("mlp", CAPABILITIES, ENERGIES), ("evaluate", EVALUATED_ON, ENERGIES), ("hmc", ACCEPTED_ON, ENERGIES),
            ("reduced hmc", ACCEPTED_ON, REDUCED),
        )
        for capability in capabilities
        for dim, widths in energies
        for p in PRECISIONS
    ]  # fmt: skip


def key(row: Row) -> tuple[str, str, str]:
    """Architecture, case and precision of a row of the table, or of a case to compile."""
    if "capability" in row:
        energy = f"{row['dim']}-{row['widths']}".replace(" ", "")
        of_kernel = energy if row["kernel"] == "mlp" else f"{row['kernel']} {energy}"
        return f"sm_{row['capability']}", of_kernel, row["precision"]
    return row["architecture"], row["case"], row["precision"]


# --- a row of the table --------------------------------------------------------------------------------------------


def flops_of(sizes: Sequence[int], precision: str) -> float:
    """FLOPs per chain-step: each product forward and backward, a multiplication and an addition; thrice at bf16x3."""
    return 4 * sum(n_in * n_out for n_in, n_out in pairwise(sizes)) * (3 if precision == "bf16x3" else 1)


def held_precision(precision: str) -> str:
    """Of the energies of an accept test."""
    return "bf16x3" if precision == "bf16" else precision


def flops_of_case(compiled: Row, sizes: Sequence[int]) -> float:
    """FLOPs per chain-step of a compiled case: of HMC, those of its leapfrog steps, of E at the end, and of Q."""
    precision, kernel = compiled["precision"], compiled["kernel"]
    if not kernel.endswith("hmc"):
        return flops_of(sizes, precision)
    held, whole = held_precision(precision), 0.0
    if kernel == "reduced hmc":
        dim, *sizes = sizes
        sizes = [sizes[0], *sizes]  # of R
        whole = OF_WHOLE_STATES * flops_of([dim, sizes[0]], held) / 2
    return LEAPFROG_STEPS * flops_of(sizes, precision) + flops_of(sizes, held) / 2 + whole


def row_of(compiled: Row, sass: str, usage: str) -> Row:
    """The row of a compiled case, from cuobjdump's output."""
    launch, machine = compiled["launch"], MACHINES[compiled["capability"]]
    chains, warps, precision = launch["block_chains"], launch["num_warps"], compiled["precision"]
    kernel = compiled["kernel"]
    evaluates, leaps, reduced = kernel == "evaluate", kernel.endswith("hmc"), kernel == "reduced hmc"
    chunk = CHUNK_DIM if reduced else launch["block_dim"]
    chunks = -(-compiled["dim"] // chunk)
    names = executed(
        parse(sass), LEAPFROG_STEPS if leaps else chunks, steps=not evaluates, whole=chunks if reduced else 0
    )
    bases = Counter[str]()
    for name, count in names.items():
        bases[name.split(".")[0]] += count

    # Sanity check: the counted loop must do the products of one whole step.
    sizes = [chunks * chunk, *(block(w) for w in compiled["widths"])]
    flops = flops_of_case(compiled, sizes)
    counted = tensor_flops(names)
    if counted is not None:
        counted *= warps / chains
        # the compiler drops products whose columns are all padding
        if not flops_of_case(compiled, [compiled["dim"], *compiled["widths"]]) <= counted <= flops:
            raise ValueError(f"{key(compiled)}: the loop has {counted} FLOPs per chain-step, expected {flops}")
        flops = counted

    registers = int(re.findall(r"\bREG:(\d+)", usage)[0])
    shared, limit = compiled["shared"], compiled["limit"]
    per_chain = sum(names.values()) * warps / chains
    mufu = bases["MUFU"] * warps * 32 / chains
    ticks = machine.sms * machine.clock
    rates = {
        "issue": ticks * SCHEDULERS / per_chain,
        "tensor": (machine.tf32 if precision == "tf32" else machine.bf16) / flops,
        "mufu": ticks * MUFU_LANES / mufu,
    }
    # Bytes per chain-step that do not stay on the chip. Of weights: W_1 once per tile; an evaluation loads all, and W_1
    # twice if streaming.
    weights = [n_in * n_out * {"bf16": 2}.get(precision, 4) / chains for n_in, n_out in pairwise(sizes)]
    traffic = sum(weights) if evaluates else 0.0
    if launch["regime"] == "streaming":
        # Slopes in and out: bf16 twice, or once two halves or tf32, or float32 and halves.
        traffic += weights[0] + (16 if launch["in_memory"] else 8) * sizes[1]
    if launch["regime"] == "streaming" or evaluates:
        traffic += 8 * compiled["dim"]  # x in, x or its gradient out
    elif leaps:
        # Position, momentum and gradient: five times in each leapfrog step, eleven times at its start and end.
        traffic += 4 * launch["block_dim"] * (5 * LEAPFROG_STEPS + 11)
        if reduced:  # x twice, its end four times and the new x once; Q for each tile
            traffic += 28 * compiled["dim"] + OF_WHOLE_STATES * weights[0] * (2 if precision == "bf16" else 1)
    elif launch["in_memory"]:
        traffic += 12 * launch["block_dim"]  # the state, written once and read twice
    if traffic > 0:
        rates["l2"] = ticks * L2_BYTES / traffic
    binds = min(rates, key=lambda name: rates[name])
    return {
        **empty_row(compiled),
        "regime": launch["regime"],
        "block_chains": chains,
        "block_dim": launch["block_dim"],
        "warps": warps,
        "stages": launch["num_stages"],
        "registers": registers,
        "shared_bytes": shared,
        # limited by registers (allocated in eights per thread) and shared memory (1 KiB per block is reserved)
        "blocks_per_sm": min(REGISTERS // (-(-registers // 8) * 8 * 32 * warps), (limit + 1024) // (shared + 1024)),
        "loop_instructions": sum(names.values()),
        "tensor_instructions": sum(n for name, n in names.items() if is_tensor(name)),
        "mufu_instructions": bases["MUFU"],
        "spill_loads": bases["LDL"],
        "spill_stores": bases["STL"],
        "warp_instructions_per_chain_step": f"{per_chain:.2f}",
        **{f"{name}_bound": f"{rates[name]:.3g}" if name in rates else "" for name in BOUNDS},
        "roofline": f"{rates[binds]:.3g}",
        "binds": binds,
    }


BOUNDS = ("issue", "tensor", "mufu", "l2")  # chain-steps/s
COUNTED = (
    "regime",
    "block_chains",
    "block_dim",
    "warps",
    "stages",
    "registers",
    "shared_bytes",
    "blocks_per_sm",
    "loop_instructions",
    "tensor_instructions",
    "mufu_instructions",
    "spill_loads",
    "spill_stores",
    "warp_instructions_per_chain_step",
    *(f"{name}_bound" for name in BOUNDS),
    "roofline",
    "binds",
)


def empty_row(compiled: Row) -> Row:
    architecture, case, precision = key(compiled)
    return {
        "architecture": architecture,
        "machine": MACHINES[compiled["capability"]].name,
        "case": case,
        "precision": precision,
        "refused": compiled["refused"] or "",
        "shared_limit": SHARED_MEMORY[compiled["capability"]],
        **dict.fromkeys(COUNTED, ""),
    }


def cuobjdump(option: str, cubin: Path) -> str:
    import triton  # only for its path: no kernel is decorated in this process

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def compile_all(cases: Sequence[Row]) -> list[Row]:
    """Each case's result, see tests/compiling.py; one process per core."""
    # In processes of their own, because TRITON_INTERPRET is read when a kernel is decorated.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_part(part: Sequence[Row]) -> list[Row]:
        done = subprocess.run(
            [sys.executable, COMPILING], input=json.dumps(part), capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            raise RuntimeError(f"compilation failed:\n{done.stderr[-4000:]}")
        return list(json.loads(done.stdout))

    n = min(os.cpu_count() or 1, len(cases))
    results: list[Row] = [{}] * len(cases)
    with ThreadPoolExecutor(n) as pool:
        for i, part in enumerate(pool.map(compile_part, [cases[i::n] for i in range(n)])):
            results[i::n] = part
    return results


def compile_rows(cases: Sequence[Row]) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cubins = [Path(folder) / f"{i}.cubin" for i in range(len(cases))]
        asked = [{**case, "cubin": str(cubin)} for case, cubin in zip(cases, cubins, strict=True)]
        return [
            row_of(compiled, cuobjdump("-sass", cubin), cuobjdump("-res-usage", cubin))
            if compiled["refused"] is None
            else empty_row(compiled)
            for compiled, cubin in zip(compile_all(asked), cubins, strict=True)
        ]


# --- the check -----------------------------------------------------------------------------------------------------


def read_committed() -> dict[tuple[str, str, str], Row]:
    """The committed rows of the installed triton."""
    return {key(row): row for row in read(COMMITTED) if row["triton"] == TRITON}


def over_limit(row: Row) -> str | None:
    if row["refused"] or int(row["shared_bytes"]) <= int(row["shared_limit"]):
        return None
    return f"{row['shared_bytes']} bytes of shared memory, over the limit of {row['shared_limit']}"


def spills(row: Row, triton: str = TRITON) -> str | None:
    limits = MAY_SPILL
    if " " in row["case"]:
        limits = EVALUATION_MAY_SPILL if row["case"].startswith("evaluate") else HMC_MAY_SPILL
    allowed = limits.get(triton, {}).get((row["architecture"], row["precision"]))
    if row["refused"] or allowed is None or int(row["spill_loads"]) + int(row["spill_stores"]) <= allowed:
        return None
    return f"spills: {row['spill_loads']} loads, {row['spill_stores']} stores; {allowed} may be"


def worse(row: Row, committed: Row | None) -> str | None:
    """How a fresh row is worse than the committed one; None if it is not."""
    if committed is None:
        return "no committed row"
    if row["refused"] or committed["refused"]:
        return (
            None
            if row["refused"] == committed["refused"]
            else f"refused: {row['refused']!r}, committed: {committed['refused']!r}"
        )
    new, old = (float(r["warp_instructions_per_chain_step"]) for r in (row, committed))
    return f"{new} instructions per chain-step, {old} committed" if new > old * MORE_INSTRUCTIONS else None


def problems(rows: Iterable[Row]) -> list[str]:
    committed = read_committed()
    if not committed:
        return [
            f"no rows of triton {TRITON} in {COMMITTED.name}: python bench/resources.py --out bench/results adds them"
        ]
    return [
        " ".join(key(row)) + ": " + text
        for row in rows
        for text in (over_limit(row), spills(row), worse(row, committed.get(key(row))))
        if text
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="compare with the committed rows and write nothing")
    add_out(either)
    arguments = parser.parse_args(argv)
    rows = compile_rows(list(all_cases()))
    if arguments.check:
        found = problems(rows)
        print(*found, sep="\n", end="\n" if found else "")
        return 1 if found else 0
    common = provenance()
    replace(arguments.out / "resources.csv", [{**row, **common} for row in rows], same=("triton",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
