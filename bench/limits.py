"""What the machine could do at most, measured in the same rounds as the contestants: products, normals, memory.

The limit of a case is the time of its products' FLOPs at the measured rate of large products of that precision, plus
the time of its normal numbers at the rate of the fastest generator here. Activations and the state's way through
memory are not counted, so it is a lower bound. A contestant that is faster shows that the yardsticks were disturbed, or
that it draws numbers in cache faster than any generator fills a large tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fastebm.bench.problem import MM_BF16, Problem, cpu_multiplies_bf16, matmul
from torch.utils.flop_counter import FlopCounterMode

from fastebm.rng import Stream, normal

# Side of the products' matrices, and numbers drawn or copied at once: large enough to reach the machine's rate, small
# enough for a round to take some tens of milliseconds.
SIDE = {"cpu": 1024, "cuda": 8192}
NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26}
COPIED = {"cpu": 1 << 25, "cuda": 1 << 28}  # floats: past any cache


@dataclass(frozen=True)
class Yardstick:
    """A run that is interleaved with the contestants' and does ``amount`` of ``what`` (FLOPs, normals, bytes)."""

    what: str
    by: str
    amount: float
    run: Callable[[], object]


def yardsticks(device: torch.device, precisions: set[str]) -> list[Yardstick]:
    """A product for each precision that the device has, the normal generators of the contestants, and a copy."""
    operands = {_operands(p)[0] for p in precisions}
    if device.type == "cpu" and not cpu_multiplies_bf16():
        operands.discard("bf16")
    found = [_product(device, precision) for precision in sorted(operands)]
    n = NUMBERS[device.type]
    out = torch.empty(n, device=device)
    found.append(Yardstick("normals", "torch.randn", n, lambda: out.normal_()))
    if device.type == "cpu":  # on a GPU the fused kernel draws its own
        chains = torch.arange(n // 1024)  # of 1,024 dims
        found.append(Yardstick("normals", "fastebm", n, lambda: normal(0, Stream.LANGEVIN, chains, 0, 1024)))
    if (draw := _jax_normals(device, n)) is not None:
        found.append(Yardstick("normals", "jax", n, draw))
    source = torch.empty(COPIED[device.type], device=device)
    target = torch.empty_like(source)
    found.append(Yardstick("bytes", "copy", 2.0 * source.nbytes, lambda: target.copy_(source)))
    return found


def _operands(precision: str) -> tuple[str, int]:
    """The precision of the operands, and the number of products: bf16x3 multiplies three pairs."""
    return {"bf16x3": ("bf16", 3), MM_BF16: ("bf16", 1)}.get(precision, (precision, 1))


def _product(device: torch.device, precision: str) -> Yardstick:
    side = SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, out = torch.randn(side, side, device=device).to(dtype), torch.empty(side, side, device=device, dtype=dtype)

    def run() -> None:
        with matmul(precision):
            torch.mm(a, a, out=out)

    return Yardstick("FLOPs", precision, 2.0 * side**3, run)


def _jax_normals(device: torch.device, n: int) -> Callable[[], object] | None:
    try:
        import jax
    except ImportError:
        return None
    if device.type == "cuda" and jax.default_backend() != "gpu":
        return None
    key, draw = jax.random.key(0), jax.jit(lambda key: jax.random.normal(key, (n,)))
    return lambda: jax.block_until_ready(draw(key))


@dataclass(frozen=True)
class Rates:
    """FLOP/s of products by the operands' precision; the fastest normals/s, and who draws them; bytes/s of a copy."""

    flops: Mapping[str, float]
    normals: float
    normals_by: str
    bandwidth: float

    def products(self, precision: str) -> float:
        """FLOP/s of the case's products at a contestant's precision."""
        operands, products = _operands(precision)
        return self.flops[operands] / products

    def limit_seconds(self, flops: float, normals: float, precision: str) -> float:
        return flops / self.products(precision) + normals / self.normals


def rates(times: Mapping[Any, list[float]]) -> Rates:
    """Rates from the times of yardsticks (other keys are ignored). The fastest round counts: noise only slows down."""
    found = [(y, y.amount / min(t)) for y, t in times.items() if isinstance(y, Yardstick)]
    normals, by = max((rate, y.by) for y, rate in found if y.what == "normals")
    bandwidth = next(rate for y, rate in found if y.what == "bytes")
    return Rates({y.by: rate for y, rate in found if y.what == "FLOPs"}, normals, by, bandwidth)


def flops_per_chain_step(p: Problem) -> int:
    """FLOPs of the matrix products and convolutions in one chain's gradient, as PyTorch counts them; 0 without any."""
    with FlopCounterMode(display=False) as counter:
        p.gradient(p.x0[:1].flatten(1))
    return int(counter.get_total_flops())
