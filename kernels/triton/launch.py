"""Regime, tile, warps and stages of the fused kernel for an architecture.

The choice never depends on the number of chains: that would change the order of sums, and with it a chain's bits.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
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
MAX_RESIDENT_DIM = 128

# Dims of a chunk of whole states (reduced.py).
CHUNK_DIM = 32


@dataclass(frozen=True)
class Launch:
    """One configuration of the fused kernel.

    regime: "resident" (weights and state on the chip for all steps) or "streaming" (W_1 and the state in L2).
    block_chains: chains per program. block_dim: the padded dim, or the dims of one streamed chunk.
    both_orders: resident weights lie in shared memory twice, once transposed.
    in_memory: keep what a step needs again in memory, not in registers: the state (resident) or the first layer's
    slopes (streaming). For own_chains only.
    lean: save registers: hoist nothing out of loops, delay no sums (wgmma with triton 3.6).
    """

    regime: str
    block_chains: int
    block_dim: int
    num_warps: int
    num_stages: int
    both_orders: bool = False
    in_memory: bool = False
    lean: bool = False

    @property
    def own_chains(self) -> bool:
        """Whether each warp has 16 chains of the tile to itself, and all columns."""
        return self.block_chains == 16 * self.num_warps


def block(n: int) -> int:
    """n rounded up to a power of two, at least 16: what a tensor-core tile takes."""
    return max(16, 1 << (n - 1).bit_length())


Networks = tuple[tuple[int, ...], ...]


def shared_bytes(
    launch: Launch, dim: int, networks: Networks, precision: str, capability: int = 90, *, exact: bool = False,
    reduced: bool = False,
) -> int:  # fmt: skip
    """An upper bound of the shared memory that a configuration takes (tests compare it with compiled kernels).

    exact: in the kernel of samplers with an accept test (hmc.py); reduced: with whole states (reduced.py).
    """
    # bf16x3 keeps two bf16 halves. wgmma (9.x) and tcgen05 (10.x) transpose 16-bit operands only, so 4-byte ones lie in
    # both orders.
    weight_bytes = {"bf16": 2, "bf16x3": 4}.get(precision, 8 if capability // 10 in (9, 10) else 4)
    # hmc.py multiplies by a weight in two places, which without wgmma may take it in different orders.
    if launch.both_orders or (exact and capability // 10 not in (9, 10)):
        weight_bytes *= 2
    chains_of_sizes = [[launch.block_dim, *(block(w) for w in widths)] for widths in networks]
    weights = sum(n_in * n_out for sizes in chains_of_sizes for n_in, n_out in pairwise(sizes)) * weight_bytes
    # One operand of the tile while it changes layouts, or, streaming, one per network that all chunks use, at bf16x3 in
    # two halves. A warp of mma.sync that has all columns (both_orders) keeps its operands in registers.
    as_held = launch.regime == "streaming" and launch.own_chains and precision in ("bf16", "bf16x3")
    operand_bytes = {"bf16": 2, "bf16x3": 4 if as_held else 2}.get(precision, 4)
    operand = (
        0 if launch.both_orders and not exact else launch.block_chains * sum(map(max, chains_of_sizes)) * operand_bytes
    )
    # The state or its noise while it changes layouts; not if stored as threads hold it, unless rows are no multiple of
    # 16 bytes or a layer is so narrow that threads share its columns.
    as_held = as_held and dim % 4 == 0 and all(w > 32 for widths in networks for w in widths)
    noise = 0 if as_held else launch.block_chains * launch.block_dim * 4
    # eight warps of mma.sync: weights while they change layouts
    turning = 8192 if launch.num_warps == 8 and launch.block_chains < 64 else 0
    most = operand + noise + turning
    if reduced:  # a chunk of Q, one of the states, and the operand that all chunks multiply
        of_chunk = 4 * CHUNK_DIM * (launch.block_dim + launch.block_chains)
        most = max(most, of_chunk + 4 * launch.block_chains * launch.block_dim)
    return weights + most + 2048


def wide_descriptors() -> bool:
    """Whether this triton computes wgmma's descriptors in 64 bits, as 3.6 does and 3.9 does not.

    Hoisted out of a loop, those of a chunk take two registers each; 32-bit ones the compiler computes where used.
    """
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # no kernel runs, but why_not_fused may be asked
        return False
    return tuple(int(part) for part in version.split(".")[:2]) < (3, 9)


def choose_launch(dim: int, networks: Networks, precision: str, capability: int | None) -> Launch | str:
    """The configuration for an architecture, or the reason why there is none.

    networks: the widths of each MLP's layers, from the first hidden one up.
    capability: 90 for sm_90 and so on; None for the interpreter, which has no shared memory to run out of.
    """
    candidates = _candidates(dim, networks, precision, capability)
    if capability is None:
        return candidates[0]
    limit = SHARED_MEMORY.get(capability, SHARED_MEMORY[86])

    def need(launch: Launch, precision: str) -> int:
        return shared_bytes(launch, dim, networks, precision, capability)

    for launch in candidates:
        if need(launch, precision) <= limit:
            return launch
    fitting = [
        p for p in PRECISIONS if any(need(launch, p) <= limit for launch in _candidates(dim, networks, p, capability))
    ]
    widths = " + ".join(str(list(widths)) for widths in networks)
    return (
        f"hidden widths {widths} at precision {precision!r} need "
        f"{min(need(launch, precision) for launch in candidates) // 1024} KiB of shared memory, and a block on "
        f"sm_{capability} has {limit // 1024} KiB" + (f" (precision {fitting[0]!r} would fit)" if fitting else "")
    )


def why_no_accept_test(
    launch: Launch, dim: int, networks: Networks, precision: str, capability: int | None, *, reduced: bool = False
) -> str | None:
    """Why a launch that fits does not for samplers with an accept test, or None. reduced: with whole states."""
    if capability is None:
        return None
    need, limit = (
        shared_bytes(launch, dim, networks, precision, capability, exact=True, reduced=reduced),
        SHARED_MEMORY.get(capability, SHARED_MEMORY[86]),
    )
    if need <= limit:
        return None
    return f"steps with an accept test need {need // 1024} KiB of shared memory, and a block has {limit // 1024} KiB"


def _candidates(dim: int, networks: Networks, precision: str, capability: int | None) -> list[Launch]:
    """Configurations in order of preference: without spills, then with fewest instructions (bench/resources.py)."""
    family = None if capability is None else capability // 10
    mma_sync, wgmma = family in (8, 12), family == 9
    # wgmma finds an operand in shared memory by descriptors; at bf16x3 these are so many that registers run short.
    in_memory = wgmma and precision == "bf16x3"
    # Numbers (units as below) of triton 3.6 on sm_90 with lean and without: 64-[128, 128] at bf16 107 (0) and
    # 112 (27 + 17); 784-[256, 128] at bf16x3 1,358 (4 + 3) and 1,505 (514 + 293). With 3.9 lean only costs: 1,643 (0)
    # and 1,597 (0).
    lean = wgmma and precision in ("bf16", "bf16x3") and wide_descriptors()
    tile = Launch("resident", 64, block(dim), 4, 1, in_memory=in_memory, lean=lean and precision == "bf16")
    # Eight warps of mma.sync take all chains of a small tile and an eighth of the columns each, so that weights and
    # sums fit in their registers. On a layer with fewer than 64 columns they would repeat each other's work.
    eight = all(width > 32 for widths in networks for width in widths)

    # Numbers are for networks [128, 128]: warp-instructions per chain-step (spill loads + stores per warp and step).
    if dim > MAX_RESIDENT_DIM:
        tiles = []
    elif mma_sync and eight and precision != "bf16":
        # sm_80, eight warps here and four below. 2 dims: bf16x3 399 (0), 276 (1133 + 269); tf32 280 (0), 203 (5 + 0).
        # 64 dims: bf16x3 377 (0), 366 (228 + 145); tf32 265 (0), 273 (117 + 64).
        # Two halves of every weight leave room for half the chains.
        tiles = [Launch("resident", 16 if precision == "bf16x3" else 32, max(64, block(dim)), 8, 1), tile]
    elif mma_sync and dim > 32:
        # each of four warps has a quarter of the columns, for which the state must be wide enough
        tiles = [replace(tile, block_chains=32)]
    elif mma_sync and precision != "bf16x3":
        # a warp has all columns of 16 chains; a state this narrow leaves shared memory for weights in both orders
        tiles = [replace(tile, both_orders=True), tile]
    elif wgmma and eight and precision == "tf32" and dim > 32:
        # wgmma takes 4-byte weights in both orders and an operand of twice the size: 208 (89 + 47) streaming, which is
        # what fits. A tile of 32 is too small for it, so this is mma.sync: 264 (0).
        tiles = [Launch("resident", 32, block(dim), 8, 1)]
    else:
        tiles = [tile]

    if wgmma and precision == "bf16":
        # Two blocks of four warps to a multiprocessor are faster than one of eight, which has fewer instructions: on an
        # H200 1.09 times at 65,536 chains (bench/results/gpu_sweep.csv). 784-[256, 128] of triton 3.6 and 3.9, lean
        # 892 (9 + 4) and 931 (0), else 861 (44 + 3) and 1,114 (1095 + 286); one of eight 890 (0) and 847 (0).
        chunks, lean = [(64, 32, 4), (64, 16, 4)], True
    elif wgmma:
        chunks = [(128, 32, 8), (64, 32, 4), (64, 16, 4)]
    elif mma_sync and dim > 32:
        # 784-[256, 128] at bf16 on sm_80: 1,545 (0) with eight warps, some 130 fewer with four, which spill
        chunks = [(32, 64, 8 if eight else 4), (32, 32, 4)]
    else:
        chunks = [(64, 64, 4), (64, 32, 4)]
    return tiles + [
        Launch("streaming", chains, min(dims, block(dim)), warps, 1, in_memory=in_memory, lean=lean)
        for chains, dims, warps in chunks
    ]
