"""What every shipped launch configuration takes of a GPU, found by compiling it. No GPU is needed; nothing is timed.

    python bench/resources.py            compile everything (minutes), write resources.csv into --out
    python bench/resources.py --check    compile everything, compare with bench/results/resources.csv, write nothing;
                                         exit status 1 where the committed rows are better

Rows belong to the version of triton that made them, and those of other versions in the file stay. Two versions have
committed rows: triton 3.6.0, which torch 2.11 pins, and triton 3.9.0. CONTRIBUTING.md says how to make an environment
for each. Run both with --out bench/results before a change to the kernels or to choose_launch lands.

Counts are read from the machine code (SASS). Rates are computed from them and from data sheets, not measured:
ceilings that only a kernel that never waits would reach.
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
from fastebm.bench.rows import RESULTS, add_out, provenance, read, replace, script
from fastebm.kernels.triton.launch import SHARED_MEMORY, block

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
# clock is the one that the peak implies: peak / (SMs * FLOPs per SM and clock).
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
# Bytes from L2 per SM and clock: 5,120 over 108 SMs in the A100 whitepaper. Other sheets give none, so this one is
# used for all of them. It is the least certain number here.
L2_BYTES = 5120 / 108

PRECISIONS = ("bf16", "bf16x3", "tf32")  # ieee is for tests
RULE = {"clamp": [-1.0, 1.0]}  # numbers for step size and noise, as most recipes have it

TRITON = importlib.metadata.version("triton")

# Words that a warp may spill in a step, loads and stores, by triton, architecture and precision; what is not named may
# spill. Rows are committed of these versions of triton. The 16 at bf16 are for the streaming kernel:
# its launch without spills was measured to be slower (kernels/triton/launch.py).
MAY_SPILL = {
    "3.6.0": {("sm_90", "bf16"): 16, ("sm_90", "bf16x3"): 100},
    "3.9.0": {(architecture, precision): 0 for architecture in ("sm_80", "sm_90") for precision in PRECISIONS},
}

# Triton 3.6 only for the architectures that it can compile for: for sm_100 it emits a trap, which has no step to count.
CAPABILITIES = (80, 90) if TRITON == "3.6.0" else tuple(MACHINES)

MORE_INSTRUCTIONS = 1.03  # over the committed row: less may be the compiler's scheduling alone

Row = dict[str, Any]


def all_cases() -> list[Row]:
    return [
        {"kernel": "mlp", "capability": capability, "dim": dim, "widths": list(widths), "precision": p, "rule": RULE}
        for capability in CAPABILITIES
        for dim, widths in ENERGIES
        for p in PRECISIONS
    ]


def key(row: Row) -> tuple[str, str, str]:
    """Architecture, case and precision of a row of the table, or of a case to compile."""
    if "capability" in row:
        return f"sm_{row['capability']}", f"{row['dim']}-{row['widths']}".replace(" ", ""), row["precision"]
    return row["architecture"], row["case"], row["precision"]


# --- the machine code ----------------------------------------------------------------------------------------------


def parse(sass: str) -> list[tuple[int, str]]:
    """(address, instruction) of each instruction in the output of ``cuobjdump -sass``."""
    found = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(\S.*?)\s*;", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in found]
    if not code or any(a >= b for (a, _), (b, _) in pairwise(code)):
        raise ValueError("expected the instructions of one function, in the order of their addresses")
    return code


def opcode(text: str) -> str:
    """HMMA.16816.F32.BF16 of "@!P0 HMMA.16816.F32.BF16 R4, ..."."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def flow(code: list[tuple[int, str]]) -> list[list[int]]:
    """Where each instruction leads, by index. A branch for a diverged warp (BRA.DIV) is never taken here.

    A call in code that never returns is a branch: ptxas writes some jumps so. Any other leads on to what follows it.
    """
    index = {address: i for i, (address, _) in enumerate(code)}
    returns = any(opcode(text).startswith("RET") for _, text in code)
    leads = []
    for i, (_, text) in enumerate(code):
        name = opcode(text)
        base = name.split(".")[0]
        if base in ("BRX", "JMP", "JMX"):
            raise ValueError(f"can't follow {text!r}")
        successors = [i + 1] if i + 1 < len(code) else []
        jumps = base == "BRA" or (base == "CALL" and not returns)
        # no @P before, and none within
        if re.match(r"EXIT|RET", text) or (jumps and re.match(r"(BRA|CALL)[.A-Z]*\s+`?\(?0x", text)):
            successors = []
        if jumps and not name.startswith("BRA.DIV"):
            successors.append(index[int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)])
        leads.append(successors)
    return leads


def find_loops(leads: list[list[int]]) -> dict[int, set[int]]:
    """Natural loops: {header: its instructions}, found by the branches back to an instruction on the way to them."""
    back: list[tuple[int, int]] = []
    state = [0] * len(leads)  # 0 new, 1 on the way, 2 done
    stack = [(0, iter(leads[0]))]
    state[0] = 1
    while stack:
        i, rest = stack[-1]
        for j in rest:
            if state[j] == 1:
                back.append((i, j))
            elif state[j] == 0:
                state[j] = 1
                stack.append((j, iter(leads[j])))
                break
        else:
            state[i] = 2
            stack.pop()
    comes_from: list[list[int]] = [[] for _ in leads]
    for i, successors in enumerate(leads):
        for j in successors:
            if state[i]:  # code that nothing leads to belongs to no loop
                comes_from[j].append(i)
    loops: dict[int, set[int]] = {}
    for latch, header in back:
        body = loops.setdefault(header, {header})
        todo = [latch]
        while todo:
            i = todo.pop()
            if i not in body:
                body.add(i)
                todo += comes_from[i]
    return loops


def is_tensor(name: str) -> bool:
    return re.match(r"[A-Z]*MMA", name) is not None


def executed(code: list[tuple[int, str]], chunks: int) -> Counter[str]:
    """Instructions that one warp executes in one step, by opcode.

    The step loop is the largest loop that lies in no other. Among its inner loops, one with tensor-core products
    and stores of the state is the loop over chunks, passed ``chunks`` times; one with products but no store is
    the rehearsal, which a run in normal operation jumps over; others (waits) count once. Of the ways that are
    left from the loop's head back to it, the longest counts (on sm_100 one warp issues the products of all, and
    counting them for each is a little too much).
    """
    leads = flow(code)
    names = [opcode(text) for _, text in code]
    loops = find_loops(leads)
    top = {h: body for h, body in loops.items() if not any(body < other for other in loops.values())}
    if not top:
        raise ValueError("no loop found")

    def one_pass(header: int) -> Counter[str]:
        inside = {h: body for h, body in loops.items() if body < loops[header]}
        inner = {h: body for h, body in inside.items() if not any(body < other for other in inside.values())}
        counts: dict[int, Counter[str]] = {}
        ways: dict[int, list[int]] = {}
        members = set(loops[header])
        for h, body in inner.items():
            tensor = any(is_tensor(names[i]) for i in body)
            stores = any(names[i].startswith("STG") for i in body)
            members -= body - {h}
            if tensor and not stores:
                members.discard(h)
                continue
            trips = chunks if tensor else 1
            counts[h] = Counter({name: n * trips for name, n in one_pass(h).items()})
            ways[h] = [j for i in body for j in leads[i] if j not in body]
        for i in members:
            counts.setdefault(i, Counter([names[i]]))
            ways.setdefault(i, leads[i])

        # The longest way from each instruction back to the header; what is inside has no circle any more.
        longest: dict[int, tuple[int, int | None] | None] = {}
        stack = [header]
        while stack:
            i = stack[-1]
            onward = [j for j in ways[i] if j in members and j != header]
            new = [j for j in onward if j not in longest]
            if new:
                stack += new
                continue
            stack.pop()
            best = (0, None) if header in ways[i] else None
            for j in onward:
                then = longest[j]
                if then is not None and (best is None or then[0] > best[0]):
                    best = (then[0], j)
            longest[i] = None if best is None else (best[0] + counts[i].total(), best[1])
        total: Counter[str] = Counter()
        i: int | None = header
        while i is not None:
            if longest[i] is None:
                raise ValueError("no way through the loop but the rehearsal")
            total += counts[i]
            i = longest[i][1]
        return total

    total = one_pass(max(top, key=lambda h: len(top[h])))
    if any(name.startswith("CALL") for name in total) and any(name.startswith("RET") for name in names):
        raise ValueError("a function is called in the step loop, and its instructions are not counted")
    return total


def tensor_flops(names: Counter[str]) -> float | None:
    """FLOPs of one warp's tensor-core instructions, from the shapes in their names; None where names give none."""
    total = 0.0
    for name, count in names.items():
        if not is_tensor(name):
            continue
        if group := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", name):  # four warps issue one together
            m, n, k = (int(size) for size in group.groups())
            total += 2 * m * n * k / 4 * count
        elif shape := re.match(r"HMMA\.(16)(8)(4|8|16)\.", name):
            m, n, k = (int(size) for size in shape.groups())
            total += 2 * m * n * k * count
        else:
            return None
    return total


def flops_of(sizes: Sequence[int], precision: str) -> float:
    """FLOPs per chain-step: each product forward and backward, a multiplication and an addition; thrice at bf16x3."""
    return 4 * sum(n_in * n_out for n_in, n_out in pairwise(sizes)) * (3 if precision == "bf16x3" else 1)


# --- a row of the table --------------------------------------------------------------------------------------------


def row_of(compiled: Row, sass: str, usage: str) -> Row:
    """The row of a compiled case, given what cuobjdump says of it."""
    launch, machine = compiled["launch"], MACHINES[compiled["capability"]]
    chains, warps, precision = launch["block_chains"], launch["num_warps"], compiled["precision"]
    chunks = -(-compiled["dim"] // launch["block_dim"])
    names = executed(parse(sass), chunks)
    bases = Counter[str]()
    for name, count in names.items():
        bases[name.split(".")[0]] += count

    # What is counted must be the step that the kernel was written to make: all of it, and nothing twice.
    sizes = [chunks * launch["block_dim"], *(block(w) for w in compiled["widths"])]
    flops = flops_of(sizes, precision)
    counted = tensor_flops(names)
    if counted is not None:
        counted *= warps / chains
        # the compiler drops products whose columns are all padding
        if not flops_of([compiled["dim"], *compiled["widths"]], precision) <= counted <= flops:
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
    if launch["regime"] == "streaming":
        weight_bytes = {"bf16": 2}.get(precision, 4)
        # W_1 for a tile; x in and out; slopes in and out: bf16 twice, or once two halves or tf32, or float32 and halves
        slope_bytes = 16 if launch["in_memory"] else 8
        traffic = sizes[0] * sizes[1] * weight_bytes / chains + 8 * compiled["dim"] + slope_bytes * sizes[1]
        rates["l2"] = ticks * L2_BYTES / traffic
    elif launch["in_memory"]:
        rates["l2"] = ticks * L2_BYTES / (12 * launch["block_dim"])  # the state, out once and in twice
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
        # by registers (given out by 8 a thread) and shared memory (1 KiB a block is the system's)
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
    import triton  # only its path is wanted: no kernel is decorated in this process

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def compile_all(cases: Sequence[Row]) -> list[Row]:
    """Each case's result, see tests/compiling.py; one process per core."""
    # in other processes, because TRITON_INTERPRET is read when a kernel is decorated
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
    """The committed rows of this triton."""
    return {key(row): row for row in read(COMMITTED) if row["triton"] == TRITON}


def over_limit(row: Row) -> str | None:
    if row["refused"] or int(row["shared_bytes"]) <= int(row["shared_limit"]):
        return None
    return f"{row['shared_bytes']} bytes of shared memory, over the limit of {row['shared_limit']}"


def spills(row: Row, triton: str = TRITON) -> str | None:
    allowed = MAY_SPILL.get(triton, {}).get((row["architecture"], row["precision"]))
    if row["refused"] or allowed is None or int(row["spill_loads"]) + int(row["spill_stores"]) <= allowed:
        return None
    return f"spills in the step loop: {row['spill_loads']} loads, {row['spill_stores']} stores; {allowed} may be"


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
