"""The torch path as compiled code: one step of a block of chains, its elementwise work fused by torch.compile around
the library's products. Plain PyTorch source; a C++ compiler is needed, and some 20 seconds for the first call of an
architecture (the code is kept on disk).

Blocks have one of two numbers of rows, and the smaller one only where products are found to round alike; widths are
padded so that no row starts within a vector: bits do not depend on the batch. Threads work inside a block, as compiled
code holds Python's lock.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..description import Description
from ..langevin import Langevin
from ..mlp import MLP, Activation
from ..noise import Stream, traceable_normal
from . import Advanced, Chains
from .torch_tiles import Evaluator, padded_rows, rounds_alike, rows_of_products, stride, tile_rows

__all__ = ["CannotCompile", "advance", "multiplies_bf16", "pays"]

# Seconds of uncompiled work on one core that compiling must stand against: it takes some 20 seconds at first, and
# halves the rest.
_WORTH = 120.0

# Rows of a block for calls with half a tile of chains and less, such as the batches of PCD: padded to a whole tile they
# would take as long.
_FEW_ROWS = 256

# Columns or rows of a weight up to which its product is written out in sums, which become part of the loops before and
# after: at 2-[128,128] a step takes 0.92 of its time with the library's products.
_FEW_DIMS = 4


class CannotCompile(Exception):
    """Why the code could not be compiled; nothing has moved."""


def pays(description: Description, n_chains: int, steps: int) -> bool:
    """Whether a call is long enough, at 80 GFLOP/s, 12 ns a normal and 2 ns an activation a core.

    Never in a process that another one started: compiled code has threads, which may not survive a fork.
    """
    if multiprocessing.parent_process() is not None:
        return False
    flops = sum(4 * w.numel() for mlp in description.mlps for w in mlp.weights)
    units = sum(width for mlp in description.mlps for width in mlp.widths)
    return n_chains * steps * (flops / 80e9 + description.dim * 12e-9 + units * 2e-9) >= _WORTH


def multiplies_bf16() -> bool:
    """The CPU has instructions for bf16 products (AVX-512 BF16); without them they are slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


class _Plan(NamedTuple):
    """What is compiled into a step: all but the tensors, and which of those there are."""

    dim: int
    layers: tuple[tuple[tuple[Activation, ...], str], ...]  # of each network, the activations and the head
    there: tuple[bool, ...]
    grad_clip: float | None
    grad_norm_clip: float | None
    telemetry: bool


def advance(
    description: Description,
    chains: Chains,
    rule: Langevin,
    steps: int,
    *,
    precision: str,
    thin: int = 0,
    telemetry: bool = False,
) -> Advanced:
    """chains.x: float32 on a CPU, moved in place. precision: "ieee" or "bf16"."""
    x = chains.x
    n_chains, dim = x.shape
    a, b = (c.expand(-1, steps) for c in rule.coefficients(n_chains, steps, device=x.device))
    done = Advanced.blank(x, steps, thin, telemetry)
    mlps = [_aligned(mlp) for mlp in description.scaled_heads()]
    operand = torch.bfloat16 if precision == "bf16" else torch.float32
    constants = _constants(description, mlps, chains.seed, rule, operand)
    layers = tuple((mlp.activations, mlp.head) for mlp in mlps)
    n_rows = _block_rows(n_chains, dim, mlps, operand)
    evaluator = Evaluator(description, n_rows, rows_of_products(x.device))
    for first in range(0, n_chains, n_rows):
        rows = slice(first, min(first + n_rows, n_chains))
        n = rows.stop - first
        block = chains.rows(torch.arange(first, first + n_rows).clamp_(max=n_chains - 1))
        a_rows, b_rows = (padded_rows(c[rows] if len(c) > 1 else c, n_rows) for c in (a, b))
        tensors = [*constants, block.numbers, block.first_steps, block.labels, block.frozen]
        plan = _Plan(
            dim, layers, tuple(v is not None for v in tensors), rule.grad_clip, rule.grad_norm_clip, telemetry
        )  # fmt: skip
        given = [v for v in tensors if v is not None]
        state, bad_at = _columns(block.x, stride(dim)), torch.full((n_rows,), -1, dtype=torch.int32)
        at, a_steps, b_steps = torch.tensor(0), a_rows.t()[..., None], b_rows.t()[..., None]  # (steps, rows or 1, 1)
        step: Callable[..., list[Tensor]] | None = None
        norm, clipped, clamped = state.new_full((n_rows,), torch.nan), state.new_zeros(n_rows), state.new_zeros(n_rows)
        for t in range(steps):
            arguments = [*given, state, bad_at, at.fill_(t), a_steps[t], b_steps[t]]
            step = step or _compiled(plan, arguments)
            state, bad_at, *told = step(*arguments)
            if telemetry:
                norm = told[0]
                clipped += told[1]
                clamped += told[2]
            if done.trajectory is not None and (t + 1) % thin == 0:
                done.trajectory[rows, t // thin] = state[:n, :dim]
        done.x[rows] = state[:n, :dim]
        done.energy[rows] = evaluator.energy(state[:, :dim], block.labels)[:n]
        done.first_bad[rows] = bad_at[:n]
        if done.telemetry is not None:
            shares = (norm, clipped / max(steps, 1), clamped / max(steps, 1))
            for values, value in zip(done.telemetry, shares, strict=True):
                values[rows] = value[:n]
    return done


def _block_rows(n_chains: int, dim: int, mlps: list[MLP], operand: torch.dtype) -> int:
    most = tile_rows(dim, torch.device("cpu"))
    if n_chains > max(_FEW_ROWS, most // 2):
        return most

    def alike(n_in: int, n_out: int, transposed: bool) -> bool:
        few = rows_of_products(torch.device("cpu"))
        sizes = (_FEW_ROWS, most) if min(n_in, n_out) > _FEW_DIMS else ()
        return all(rounds_alike(n_in, n_out, transposed, few, rows, operand) for rows in sizes)

    for mlp in mlps:
        products = mlp.weights if mlp.head == "logsumexp" else mlp.weights[:-1]
        for i, (n_out, n_in) in enumerate(w.shape for w in products):
            # as ``_constants`` lays out the first weight
            if not (alike(n_in, n_out, i > 0) and alike(n_out, n_in, i == 0)):
                return most
    return _FEW_ROWS


def _aligned(mlp: MLP) -> MLP:
    """The same function with widths padded by zeros to strides at which the library rounds all rows alike (see
    ``torch_tiles.matrix``); classes that are not there have no probability."""
    n_classes = len(mlp.weights[-1])
    sizes = [stride(n) for n in (mlp.dim, *mlp.widths)] + [stride(n_classes) if mlp.head == "logsumexp" else n_classes]
    weights, biases = [], []
    for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        more = sizes[i + 1] - len(weight)
        weights.append(nn.functional.pad(weight, (0, sizes[i] - weight.shape[1], 0, more)))
        if more > 0:
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            bias = nn.functional.pad(bias, (0, more), value=-torch.inf if i == len(mlp.activations) else 0.0)
        biases.append(bias)
    return replace(mlp, weights=tuple(weights), biases=tuple(biases))


def _columns(x: Tensor, n: int) -> Tensor:
    """x with zeros up to n columns."""
    return x if x.shape[1] == n else nn.functional.pad(x, (0, n - x.shape[1]))


def _constants(
    description: Description, mlps: list[MLP], seed: int | Tensor, rule: Langevin, operand: torch.dtype
) -> list[Tensor | None]:
    """The tensors that all blocks share, in the order in which ``_step`` takes them."""
    tensors: list[Tensor | None] = []
    assert description.scales is not None  # it is not bare
    for mlp, scale in zip(mlps, description.scales, strict=True):
        first, *others = (w.to(operand) for w in mlp.weights)
        # The way down to few dims is a slow product in the library (fivefold at 2) unless the weight is laid out so.
        tensors += [first.t().contiguous().t(), *others, *mlp.biases, scale]
    tensors += [description.curvature, description.mean, description.linear]
    bounds = rule.bounds(description.dim) or (None, None)
    tensors += [None if bound is None else torch.as_tensor(bound, dtype=torch.float32) for bound in bounds]
    words = [int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF]
    return [*tensors, torch.tensor(words)]


_code: dict[Any, Callable[..., list[Tensor]]] = {}


def _compiled(plan: _Plan, arguments: list[Tensor]) -> Callable[..., list[Tensor]]:
    """``_step`` as code for tensors of these shapes, made once in a process.

    Not by torch.compile: its guards would look at every argument anew in each step, for as long as a product takes.
    """
    key = (plan, tuple((v.shape, v.stride(), v.dtype) for v in arguments), torch.get_num_threads())
    if key not in _code:
        try:
            graph = make_fx(partial(_step, plan))(*arguments)
            _code[key] = torch._inductor.compile(graph, list(arguments))
        except Exception as error:
            raise CannotCompile(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return _code[key]


def _step(plan: _Plan, *arguments: Tensor) -> list[Tensor]:
    """``reference.advance``'s step, without buffers: new state, first bad step(, and what a Telemetry adds up)."""
    *given, padded, bad_at, at, a, b = arguments
    left = iter(given)
    tensors: Iterator[Any] = iter([next(left) if there else None for there in plan.there])
    networks = [
        _Network(list(islice(tensors, len(acts) + 1)), list(islice(tensors, len(acts) + 1)), acts, head, next(tensors))
        for acts, head in plan.layers
    ]
    curvature, mean, linear, lo, hi, key, numbers, first_steps, labels, frozen = tensors

    x, grad = padded[:, : plan.dim], _gradient(networks, padded, labels)[:, : plan.dim]
    if curvature is not None:
        grad = grad + curvature * (x - mean)
    if linear is not None:
        grad = grad + linear
    if frozen is not None:
        grad = grad.masked_fill(frozen, 0.0)
    clipped = grad
    if plan.grad_clip is not None:
        clipped = clipped.clamp(-plan.grad_clip, plan.grad_clip)
    if plan.grad_norm_clip is not None:
        norm = clipped.square().sum(dim=1, keepdim=True).sqrt()
        clipped = clipped * (plan.grad_norm_clip / norm).clamp(max=1.0)
    noise = traceable_normal(key, Stream.LANGEVIN, numbers, first_steps + at, plan.dim)
    moved = x - a * clipped + b * noise
    if frozen is not None:
        moved = torch.where(frozen, x, moved)
    finite = (moved * 0.0).sum(dim=1) == 0.0  # 0 * inf is NaN
    bad_at = torch.where((bad_at < 0) & ~finite, at.to(torch.int32), bad_at)
    alive = bad_at < 0
    new = moved if lo is None else moved.clamp(lo, hi)
    if frozen is not None:
        new = torch.where(frozen, x, new)
    state = _columns(torch.where(alive[:, None], new, x), padded.shape[1])
    if not plan.telemetry:
        return [state, bad_at]
    any_clipped, any_clamped = torch.ne(clipped, grad).any(dim=1), torch.ne(new, moved).any(dim=1)
    return [state, bad_at, grad.square().sum(dim=1).sqrt(), alive & any_clipped, alive & any_clamped]


class _Network(NamedTuple):
    """An MLP with its weight in the head, as ``Description.scaled_heads`` gives it; weights as they are multiplied."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    activations: tuple[Activation, ...]
    head: str
    scale: Tensor


def _gradient(networks: list[_Network], x: Tensor, labels: Tensor | None) -> Tensor:
    """dE/dx of the MLPs in closed form: (n_rows, dim)."""
    grad: Tensor | None = None
    for network in networks:
        h, slopes = x, []
        layers = zip(network.weights[:-1], network.biases[:-1], network.activations, strict=True)
        for weight, bias, activation in layers:
            h, slope = activation.value_and_slope(_product(h, weight.t(), bias))
            slopes.append(slope)
        head = network.weights[-1]
        if network.head == "scalar":
            above = head.float() * slopes[-1]
        elif network.head == "class":
            above = head.float()[labels] * slopes[-1]
        else:
            share = torch.softmax(_product(h, head.t(), network.biases[-1]), dim=1) * -network.scale
            above = _product(share, head, None) * slopes[-1]
        for weight, slope in zip(reversed(network.weights[1:-1]), reversed(slopes[:-1]), strict=True):
            above = _product(above, weight, None) * slope
        part = _product(above, network.weights[0], None)
        grad = part if grad is None else grad + part
    return x.new_zeros(x.shape) if grad is None else grad


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias, in float32 but for the operands."""
    n_in, n_out = weight.shape
    if min(n_in, n_out) <= _FEW_DIMS:
        wide = weight.to(x.dtype)
        if n_in <= n_out:
            out = sum((x[:, i, None] * wide[i] for i in range(1, n_in)), x[:, 0, None] * wide[0])
        else:
            out = torch.stack([(x * wide[:, i]).sum(dim=1) for i in range(n_out)], dim=1)
    else:
        out = torch.mm(x.to(weight.dtype), weight).to(x.dtype)
    # A difference, for the compiler makes addmm of a sum, which copies the bias to every row in a pass of its own;
    # this is fused with what follows.
    return out if bias is None else out - -bias
