"""Bounds of states: checking, clamping and uniform starts, for samplers, pools and storage."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rng import Stream, uniform
from .scalars import number_or_tensor
from .threads import survives_fork
from .tracing import readable

__all__ = ["Bounds", "Box", "uniform_states"]

Bounds = tuple[float | Tensor, float | Tensor]


class Box(NamedTuple):
    """The bounds lo <= x <= hi. An infinite bound leaves that side open.

    lo, hi: each a number, or a tensor with one value per dim (or of one state's shape).
    """

    lo: float | Tensor
    hi: float | Tensor

    def __repr__(self) -> str:  # for errors: the pair that the user passed
        return f"({self.lo}, {self.hi})"

    @classmethod
    def of(cls, clamp: Any) -> Box | None:
        """Check a pair (lo, hi) and return it as a box; None stays None.

        Raises:
            TypeError: not a pair of numbers or floating-point tensors.
            ValueError: lo >= hi or NaN in any dim, or two tensors of different sizes.
        """
        if clamp is None:
            return None
        try:
            lo, hi = (v if isinstance(v, Tensor) else float(v) for v in map(number_or_tensor, clamp))
        except (TypeError, ValueError):
            raise TypeError(f"clamp must be a pair (lo, hi) of numbers or tensors, or None, got {clamp!r}") from None
        if isinstance(lo, float) and isinstance(hi, float):
            if not lo < hi:  # NaN fails too
                raise ValueError(f"clamp needs lo < hi, got {(lo, hi)}")
            return cls(lo, hi)
        for name, bound in (("lo", lo), ("hi", hi)):
            if isinstance(bound, Tensor) and not bound.is_floating_point():
                raise TypeError(f"clamp's {name} must be a number or a floating-point tensor, got {bound.dtype}")
        tensors = [bound for bound in (lo, hi) if isinstance(bound, Tensor)]
        sizes = {bound.numel() for bound in tensors if bound.ndim > 0}
        if len(sizes) > 1:
            raise ValueError(f"clamp's lo and hi must have as many values each, got {sorted(sizes)}")
        if not all(readable(bound.device) for bound in tensors):
            return cls(lo, hi)  # a compiled call checks it at run time (backends/op.py); a CUDA-graph capture can't
        flat = [bound.flatten() if isinstance(bound, Tensor) else bound for bound in (lo, hi)]
        good = torch.as_tensor(flat[0] < flat[1])
        if not bool(good.all()):
            raise ValueError(f"clamp needs lo < hi in every dim, which fails in {int((~good).sum())} of {good.numel()}")
        return cls(lo, hi)

    def on(self, dim: int, *, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Box:
        """The bounds for states of ``dim`` dims: two numbers, or two (dim,) tensors if either bound is a tensor.

        Raises:
            ValueError: a bound has another number of values.
        """
        if isinstance(self.lo, float) and isinstance(self.hi, float):
            return self
        rows = []
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
            if not isinstance(bound, Tensor):
                # Created on the device: a copy from the host would synchronise.
                rows.append(torch.full((dim,), bound, dtype=dtype, device=device))
                continue
            if bound.ndim > 0 and bound.numel() != dim:
                raise ValueError(
                    f"clamp's {name} must be a number or have one value for each of the {dim} dims, "
                    f"got shape {tuple(bound.shape)}"
                )
            rows.append(bound.detach().flatten().to(device, dtype).expand(dim).contiguous())
        return Box(rows[0], rows[1])

    def except_at(self, frozen: Tensor | None, dtype: torch.dtype) -> Box:
        """The box with infinite bounds at frozen coordinates, which may lie outside.

        frozen: (1 or n_chains, dim) bool, or None.
        """
        if frozen is None:
            return self
        lo, hi = (torch.as_tensor(bound, dtype=dtype, device=frozen.device) for bound in self)
        return Box(torch.where(frozen, -math.inf, lo), torch.where(frozen, math.inf, hi))

    def clamp(self, x: Tensor) -> Tensor:
        """Clamp states, (n_chains, dim), to the bounds."""
        return x.clamp(self.lo, self.hi)  # type: ignore[arg-type]

    def contains(self, x: Tensor) -> Tensor:
        """Which of the states, (n_chains, dim), lie within the bounds: (n_chains,) bool. NaN is outside."""
        return ((x >= self.lo) & (x <= self.hi)).all(dim=1)

    def equals(self, other: Box, dim: int) -> bool:
        """Whether both boxes have the same bounds for states of ``dim`` dims."""
        if not any(isinstance(v, Tensor) for v in (*self, *other)):
            return tuple(self) == tuple(other)
        rows = (torch.as_tensor(v, dtype=torch.float32).cpu().flatten() for v in (*self, *other))
        lo, hi, other_lo, other_hi = (v.expand(dim) if v.numel() == 1 else v for v in rows)
        return torch.equal(lo, other_lo) and torch.equal(hi, other_hi)


@survives_fork
def uniform_states(
    seed: int | Tensor,
    stream: Stream,
    chains: Tensor,
    steps: Tensor | int,
    dim: int,
    *,
    clamp: Bounds | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """States drawn uniformly on the clamp range, or on [-1, 1] without a clamp: (n_chains, dim).

    Args:
        seed, stream, chains, steps: where the numbers stand in the random stream, as for ``rng.uniform``.

    Raises:
        ValueError: the clamp range is infinite.
    """
    box = Box.of(clamp)
    lo, hi = (-1.0, 1.0) if box is None else box.on(dim, dtype=dtype, device=chains.device)
    width = hi - lo
    known = not isinstance(width, Tensor) or readable(width.device)
    if known and not bool(torch.as_tensor(width).isfinite().all()):
        raise ValueError(f"there is no uniform start on an infinite clamp range {(lo, hi)}: pass init=")
    # Clamp, because u may be 1 and lo + (hi - lo) may round to more than hi.
    states = uniform(seed, stream, chains, steps, dim, dtype=dtype).contiguous().mul_(width).add_(lo)
    return states.clamp_(lo, hi)  # type: ignore[arg-type]
