"""Instructions in the machine code of a kernel (SASS): which a warp executes in one step, and the FLOPs in them."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise


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
    """Successors of each instruction, by index. A branch for a diverged warp (BRA.DIV) counts as never taken.

    A call in code that never returns is a branch: ptxas writes some jumps so. After any other call, code continues.
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
    """Natural loops, {header: its instructions}, found by their back edges."""
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
            if state[i]:  # unreachable code belongs to no loop
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


def executed(code: list[tuple[int, str]], chunks: int, *, steps: bool = True, whole: int = 0) -> Counter[str]:
    """Instructions that one warp executes in one step, by opcode. With steps=False, in the whole kernel.

    The step loop is the largest outermost loop. Of its inner loops, one with tensor-core products and stores of the
    state is the loop over chunks, executed ``chunks`` times; one with products but no store is the rehearsal, which
    normal runs skip; others (waits) count once. Of the remaining paths from the loop's header back to it, the longest
    counts. (On sm_100 one warp issues the products of all, so counting them for each is a little too much.)

    A kernel without steps counts as a loop from its end to its start. It has no rehearsal: all products are in loops
    over chunks.

    whole: the chunks of whole states (reduced.py), over which all inner loops with loads run but one. That has
    ``chunks`` leapfrog steps, and in one of these the loops within it run.
    """
    leads = flow(code)
    names = [opcode(text) for _, text in code]
    if not steps:
        leads = [successors or [0] for successors in leads]
    loops = find_loops(leads)
    top = {h: body for h, body in loops.items() if not any(body < other for other in loops.values())}
    if not top:
        raise ValueError("no loop found")

    def tensors(body: set[int]) -> bool:
        return any(is_tensor(names[i]) for i in body)

    def passes(header: int, times: int = 1, depth: int = 0) -> Counter[str]:
        inside = {h: body for h, body in loops.items() if body < loops[header]}
        inner = {h: body for h, body in inside.items() if not any(body < other for other in inside.values())}
        counts: dict[int, Counter[str]] = {}
        ways: dict[int, list[int]] = {}
        members = set(loops[header])
        for h, body in inner.items():
            tensor = tensors(body)
            stores = any(names[i].startswith("STG") for i in body)
            members -= body - {h}
            if tensor and not stores and steps and not whole:
                members.discard(h)
                continue
            within = times * (chunks if tensor else 1)
            if whole and (depth > 0 or not any(part < body and tensors(part) for part in loops.values())):
                loads = any(names[i].startswith("LDG") for i in body)
                within = whole if tensor or loads else times
            counts[h] = passes(h, within, depth + 1)
            ways[h] = [j for i in body for j in leads[i] if j not in body]
        for i in members:
            counts.setdefault(i, Counter({names[i]: times}))
            ways.setdefault(i, leads[i])

        # The longest path from each instruction back to the header. Inner loops are collapsed, so there is no cycle.
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

    total = passes(max(top, key=lambda h: len(top[h])))
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
