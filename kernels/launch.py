"""Regime, tile, warps and stages of the fused kernel, from an architecture's dims: never from the number of chains.

A choice that depended on the batch would change the order of sums, and with it the bits of a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

# Bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
SHARED_MEMORY = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
    121: 101376,
}

PRECISIONS = ("bf16x3", "tf32", "bf16", "ieee")

# The state of a resident chain lives in registers: a tile of 64 x 128 already takes 64 of a thread's 255.
_MAX_RESIDENT_DIM = 128


@dataclass(frozen=True)
class Launch:
    """One configuration of the fused kernel.

    regime: "resident" (weights and state on the chip for all steps) or "streaming" (W_1 and the state in L2).
    block_chains: chains a program. block_dim: the padded dim, or the dims of one streamed chunk.
    """

    regime: str
    block_chains: int
    block_dim: int
    num_warps: int
    num_stages: int


def block(n: int) -> int:
    """The power of two, at least 16, that holds n: what a tensor-core tile takes."""
    return max(16, 1 << (n - 1).bit_length())


Networks = tuple[tuple[int, ...], ...]


def shared_bytes(launch: Launch, networks: Networks, precision: str, capability: int = 90) -> int:
    """An upper estimate of the shared memory that a configuration takes (tests hold it to compiled kernels)."""
    # bf16x3 keeps two bf16 halves. wgmma (9.x) transposes 16-bit operands only, so 4-byte ones lie in both orders.
    weight_bytes = {"bf16": 2, "bf16x3": 4}.get(precision, 8 if capability // 10 == 9 else 4)
    chains_of_sizes = [[launch.block_dim, *(block(w) for w in widths)] for widths in networks]
    weights = sum(n_in * n_out for sizes in chains_of_sizes for n_in, n_out in pairwise(sizes)) * weight_bytes
    # One operand of the tile on its way between layouts.
    operand = launch.block_chains * max(map(max, chains_of_sizes)) * (2 if precision in ("bf16", "bf16x3") else 4)
    noise = launch.block_chains * launch.block_dim * 4
    return weights + operand + noise + 1024


def choose_launch(dim: int, networks: Networks, precision: str, capability: int | None) -> Launch | str:
    """The configuration for an architecture, or in words why there is none.

    networks: the widths of each MLP's layers, from the first hidden one up.
    capability: 90 for sm_90 and so on; None for the interpreter, which has no shared memory to run out of.
    """
    candidates = _candidates(dim)
    if capability is None:
        return candidates[0]
    limit = SHARED_MEMORY.get(capability, SHARED_MEMORY[86])

    def need(launch: Launch, precision: str) -> int:
        return shared_bytes(launch, networks, precision, capability)

    for launch in candidates:
        if need(launch, precision) <= limit:
            return launch
    fitting = [p for p in PRECISIONS if any(need(launch, p) <= limit for launch in candidates)]
    widths = " + ".join(str(list(widths)) for widths in networks)
    return (
        f"hidden widths {widths} at precision {precision!r} need "
        f"{min(need(launch, precision) for launch in candidates) // 1024} KiB of shared memory, and a block on "
        f"sm_{capability} has {limit // 1024} KiB" + (f" (precision {fitting[0]!r} would fit)" if fitting else "")
    )


def _candidates(dim: int) -> list[Launch]:
    """The fastest first."""
    resident = [Launch("resident", 64, block(dim), 4, 1)] if dim <= _MAX_RESIDENT_DIM else []
    return resident + [Launch("streaming", 64, min(block_dim, block(dim)), 4, 1) for block_dim in (64, 32)]
