"""Where the chains of a pool start, also when they are reinitialised; and checks of states that the user passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..box import Bounds, Box, uniform_states
from ..rng import Stream, normal, words

__all__ = ["LAWS", "Start", "Starts", "checked_states", "scaled"]

LAWS = ("uniform", "gaussian")

# (seed, stream, chains (n,), steps (n,)) -> (n, *shape): the arguments that noise.uniform and noise.normal take too.
Start = Callable[[int, Stream, Tensor, Tensor], Tensor]

# Bytes of states that are checked at once, so that many states need little memory.
_CHECKED_BYTES = 2**25


class Starts:
    """The ``init`` of a ``ChainPool``, with everything that it depends on.

    Attributes:
        kind: what ``init`` is, in words; saved pools have it.
        early: whether states may be computed long before they are needed. Not with a callable, which may depend on
            anything that changes meanwhile.
    """

    def __init__(
        self, init: str | Tensor | Start, seed: int, shape: Sequence[int], clamp: Bounds | None, device: torch.device
    ) -> None:
        self.seed, self.shape, self.clamp, self.device = seed, tuple(shape), clamp, device
        self.dim = math.prod(shape)
        self.early = isinstance(init, str | Tensor)
        if isinstance(init, str):
            if init not in LAWS:
                raise ValueError(f"init must be {', '.join(LAWS)}, a tensor of states or a callable, got {init!r}")
            self.kind = init
        elif isinstance(init, Tensor):
            init = checked_states("init", init, self.shape, clamp)
            if not 1 <= len(init) < 2**31:
                raise ValueError(f"init must have 1 to 2**31 - 1 rows, got {len(init)}")
            self.kind = f"{len(init)} rows of data"
        elif callable(init):
            self.kind = "a callable"
        else:
            raise TypeError(f"init must be a name, a tensor of states or a callable, got {type(init).__name__}")
        self.init: str | Tensor | Start = init
        if self.kind == "uniform":  # raises if the clamp is infinite
            uniform_states(seed, Stream.INITIAL, torch.zeros(0, dtype=torch.int64), 0, self.dim, clamp=clamp)

    def states(self, stream: Stream, chains: Tensor, steps: Tensor) -> Tensor:
        """States of starting chains, (n, dim): pure functions of seed, stream, chain and step."""
        init = self.init
        if isinstance(init, Tensor):
            w0, w1, _, _ = (w[:, 0] for w in words(self.seed, stream, chains, steps, 1))
            return init[scaled(len(init), w0, w1).to(init.device)].to(self.device, torch.float32)
        if init == "uniform":
            return uniform_states(self.seed, stream, chains, steps, self.dim, clamp=self.clamp)
        if isinstance(init, str):
            x = normal(self.seed, stream, chains, steps, self.dim)
        else:
            x = init(self.seed, stream, chains, steps)
            if not isinstance(x, Tensor) or x.shape != (len(chains), *self.shape):
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"init must return a tensor {(len(chains), *self.shape)}, got {got}")
            x = x.detach().reshape(len(chains), self.dim).to(self.device, torch.float32)
            if not bool(x.isfinite().all()):
                raise ValueError("init must return finite states, got NaN or inf")
        box = Box.of(self.clamp)
        return x if box is None else box.on(self.dim, device=self.device).clamp(x)


def checked_states(name: str, x: Tensor, shape: tuple[int, ...], clamp: Bounds | None) -> Tensor:
    """(n, *shape) states as (n, dim), if they are finite and within the clamp, also in float32."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor of states, got {got}")
    if x.ndim < 2 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} must be (n, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    dim = math.prod(shape)
    x = x.detach().reshape(len(x), dim)
    lo, hi = (Box.of(clamp) or Box(-math.inf, math.inf)).on(dim, device=x.device)
    for part in torch.split(x, max(1, _CHECKED_BYTES // (4 * dim))):
        part = part.float()
        good = part.isfinite() & (part >= lo) & (part <= hi)
        if not bool(good.all()):
            if not bool(part.isfinite().all()):
                raise ValueError(f"{name} must be finite in float32, got NaN or inf")
            raise ValueError(
                f"{name} must lie within the pool's clamp {clamp}, got values from {float(part.min()):g} to "
                f"{float(part.max()):g}: scale them"
            )
    return x


def scaled(n: int, w0: Tensor, w1: Tensor) -> Tensor:
    """floor(n * w / 2**64) for the 64-bit word w = (w0, w1). It fits int64 because n < 2**31."""
    return (w0 * n + ((w1 * n) >> 32)) >> 32
