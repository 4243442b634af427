"""The fast path of Langevin steps on a CPU, in float32: Numba kernels (kernels/cpu) around matrix products or autograd.

MLP energies: a tile of chains takes all K steps before the next tile starts, and each thread works on its own tile. No
thread waits for another, and a tile's buffers stay in cache. A step is a list of prepared calls, run without Python.

Other energies: autograd's gradient of all chains at once, then one pass for noise, update and clamp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..box import Box
from ..kernels import cpu as kernels
from ..kernels.cpu import Call
from ..rng import seed_words
from ..samplers.langevin import Langevin
from ..targets.autograd import Energy
from ..targets.base import Target
from ..targets.closed_form import (
    Evaluator,
    matrix,
    padded_rows,
    repeated_labels,
    rows_of_products,
)
from ..targets.description import Description
from ..targets.remembered import Point
from ..threads import Spares, Team, share
from . import Advanced, Chains, averaged
from .cpu_mlp import NetworkCalls, Program, Weights, weights_of
from .tiles import tiles

__all__ = ["Scratch", "Update", "parts_of_update", "run_mlp", "run_module", "why_not"]

# Numbers per thread below which a second thread does not pay off.
_NUMBERS_PER_THREAD = 16_384

# Steps between checks whether another thread has raised, in which case a tile stops.
_STEPS_AT_ONCE = 16


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels do not run for states of this device and dtype; None if they do."""
    if device.type != "cpu":
        return f"Numba's kernels are for a CPU, and the state is on {device}"
    if dtype != torch.float32:
        return f"Numba's kernels compute in float32, and the state is {dtype}"
    reason: str | None = kernels.why_not()
    return reason


# -- the update ----------------------------------------------------------------------------------------------------


class Update:
    """Noise, update and clamp of some chains, with the kernel arguments that are the same in every step.

    coefficients: drift and noise_std. t: (1,) int64, the current step. kind: LANGEVIN, or DRIFT for the drift alone.
    table: the (3, n) telemetry table, or None.
    """

    def __init__(
        self, chains: Chains, sampler: Langevin, coefficients: tuple[Tensor, Tensor], first_bad: Tensor,
        telemetry: bool, t: Tensor, kind: int = kernels.LANGEVIN,
    ) -> None:  # fmt: skip
        n, self.dim = chains.x.shape
        self.t, self.kind = t, kind
        self.table = chains.x.new_zeros(3, n) if telemetry else None
        numbers, first_steps = chains.numbers.contiguous(), chains.first_steps.contiguous()
        drift, noise_std = (c.contiguous() for c in coefficients)
        both = [v for c in (drift, noise_std) for v in (c, c.shape[1] if len(c) > 1 else 0, int(c.shape[1] > 1))]
        lo, hi = Box(-math.inf, math.inf) if sampler.box is None else sampler.box.on(self.dim)
        key, frozen = seed_words(chains.seed), None if chains.frozen is None else chains.frozen.contiguous()
        self.plain = not (
            telemetry or frozen is not None or isinstance(lo, Tensor) or sampler.grad_clip is not None
            or sampler.grad_norm_clip is not None
        )  # fmt: skip
        if self.plain:
            self.kernel = kernels.load("update.draw")
            self.front = [n, 0, (self.dim + 3) // 4, 0, *key, numbers, first_steps, 1, self.t]
            self.back: list[Any] = [first_bad, *both, lo, hi]
        else:
            self.kernel = kernels.load("update.update")
            lo, hi = (torch.as_tensor(bound, dtype=torch.float32, device="cpu") for bound in (lo, hi))
            clips = [math.inf if clip is None else clip for clip in (sampler.grad_clip, sampler.grad_norm_clip)]
            self.front = [n if telemetry else 0, *key, numbers, first_steps, self.t]
            self.back = [first_bad, self.table, frozen, -1 if frozen is None else self.dim if len(frozen) > 1 else 0]
            self.back += [*both, *clips, lo, int(lo.numel() > 1), hi, int(hi.numel() > 1)]

    def call(self, new: Tensor | None, x: Tensor, grad: Tensor | None, first: int, last: int, scratch: Scratch) -> Call:
        """The call that updates chains first to last - 1 from x to new. None: set later by the call's ``aim``."""
        states = [new, x, grad, self.dim, x.stride(0)]
        if self.plain:
            arguments = [self.kind, first, last, *self.front, *scratch.draw, *states, *self.back]
        else:
            arguments = [self.kind, first, last, *self.front, *scratch.draw, *states, *self.back, scratch.clips]
        return self.kernel.prepared(*arguments)


def _updates(
    chains: Chains, sampler: Langevin, coefficients: tuple[Tensor, Tensor], first_bad: Tensor, telemetry: bool
) -> list[Update]:
    """The update of a step or, with noise_first, its two parts: first the noise, with a drift of 0, then the drift.
    The first part multiplies its gradient by 0, so callers pass x in place of one."""
    t = torch.zeros(1, dtype=torch.int64, device="cpu")
    if not sampler.noise_first:
        return [Update(chains, sampler, coefficients, first_bad, telemetry, t)]
    (drift, noise_std), zero = coefficients, torch.zeros(1, 1, dtype=torch.float32, device="cpu")
    noise = Langevin(clamp=sampler.clamp if sampler.clamp_noise else None)
    return [
        Update(chains, noise, (zero, noise_std), first_bad, False, t),
        Update(chains, sampler, (drift, zero), first_bad, telemetry, t, kernels.DRIFT),
    ]


class Scratch:
    """Work buffers of an update, one object per thread."""

    def __init__(self, dim: int) -> None:
        self.draw = kernels.scratch((dim + 3) // 4)
        self.clips = torch.empty(2 * dim, dtype=torch.float32, device="cpu")


# -- an MLP energy -------------------------------------------------------------------------------------------------


def run_mlp(
    description: Description,
    chains: Chains,
    sampler: Langevin,
    steps: int,
    *,
    precision: str = "ieee",
    thin: int = 0,
    telemetry: bool = False,
) -> Advanced:
    """Langevin steps of an MLP energy. chains.x is modified in place. precision: "ieee" or "bf16" operands."""
    x = chains.x
    coefficients = sampler.coefficients(len(x), steps)
    done = Advanced.blank(x, steps, thin)
    table = x.new_zeros(3, len(x)) if telemetry else None
    mlps = weights_of(description, precision)

    few = rows_of_products(x.device)
    idle: dict[int, Spares[_Tile]] = {}  # tiles that no thread uses at the moment, by number of rows

    def begun(rows: slice) -> _Tile:
        here, (drift, noise_std) = chains.rows(rows), (c[rows] if len(c) > 1 else c for c in coefficients)
        updates = _updates(here, sampler, (drift, noise_std), done.first_bad[rows], telemetry)
        n_rows = -(-len(here.x) // few) * few
        with torch.inference_mode():
            make = partial(_Tile, description, mlps, n_rows, here.labels is not None)
            tile = idle.setdefault(n_rows, Spares(make)).take()
            tile.begin(here, updates)
        return tile

    def move(rows: slice, interrupted: Callable[[], bool]) -> None:
        tile = ahead.pop(rows.start, None) or begun(rows)
        with torch.inference_mode():
            tile.run(steps, thin, done, table, rows, interrupted)
        idle[tile.n_rows].give(tile)

    n_threads = torch.get_num_threads()
    parts = tiles(len(x), n_threads)
    # Prepare the first tile of each thread here: preparation is Python code, which the GIL would serialise anyway.
    ahead = {rows.start: begun(rows) for rows in parts[:n_threads]}
    share(parts, move, n_threads)
    return done if table is None else done._replace(telemetry=averaged(table, steps))


class _Tile:
    """Buffers for n_rows chains and the calls of the gradient. Reused for one tile after another."""

    def __init__(self, description: Description, mlps: list[Weights], n_rows: int, with_labels: bool) -> None:
        dim, like = description.dim, mlps[0].heads[0]
        self.n_rows = n_rows
        self.x, self.new, self.grad = (matrix(n_rows, dim, like) for _ in range(3))
        self.labels = torch.empty(n_rows, dtype=torch.int64, device=like.device) if with_labels else None
        self.evaluator = Evaluator(description, n_rows, [weights.mlp for weights in mlps])
        self.scratch = Scratch(dim)
        pairs = zip(mlps, self.evaluator.networks, strict=True)
        networks = self.networks = [NetworkCalls(weights, evaluated, self.labels) for weights, evaluated in pairs]
        d, grad = description, self.grad
        curvature, mean, linear = (None if v is None else v.contiguous() for v in (d.curvature, d.mean, d.linear))
        terms = self.terms = [curvature, mean, int(curvature is not None), linear, int(linear is not None)]
        states = self.x, self.new
        parts = [network.gradients(states, grad, add=k > 0) for k, network in enumerate(networks)]
        if curvature is not None or linear is not None:
            quadratic = kernels.load("mlp.quadratic")
            parts.append([[quadratic.prepared(grad, x, n_rows, dim, grad.stride(0), *terms)] for x in states])
        # the gradients at x and at new
        self.gradients = [[call for part in parts for call in part[k]] for k in range(2)]

    def begin(self, chains: Chains, updates: list[Update]) -> None:
        """Load these chains and their updates, before ``run``."""
        self.n_chains, self.update = len(chains.x), updates[-1]
        self.x.copy_(padded_rows(chains.x, self.n_rows))
        self.new.copy_(self.x)  # padding rows are never updated
        if self.labels is not None and chains.labels is not None:
            self.labels.copy_(padded_rows(chains.labels, self.n_rows))
        rows = 0, self.n_chains, self.scratch
        if len(updates) == 1:
            move = self.update.call(self.new, self.x, self.grad, *rows)
            moves = move, move.again(new=self.x, x=self.new)
            even, odd = ([*gradient, move] for gradient, move in zip(self.gradients, moves, strict=True))
            self.ends = self.new, self.x
        else:
            noise = updates[0].call(self.new, self.x, self.x, *rows)
            even = odd = [noise, *self.gradients[1], self.update.call(self.x, self.new, self.grad, *rows)]
            self.ends = self.x, self.x
        self.program = Program(even, odd, self.update.t)

    def run(
        self, steps: int, thin: int, done: Advanced, table: Tensor | None, rows: slice, interrupted: Callable[[], bool]
    ) -> None:
        """Run all steps, and write these rows of ``done`` and ``table``."""
        n = self.n_chains
        at_once = thin or _STEPS_AT_ONCE
        for first in range(0, steps, at_once):
            if interrupted():
                return
            last = min(first + at_once, steps)
            self.program.run(first, last)
            if done.trajectory is not None:
                done.trajectory[rows, first // thin] = self.ends[(last - 1) % 2][:n]
        x = self.ends[(steps - 1) % 2]
        done.x[rows].copy_(x[:n])
        done.energy[rows].copy_(self.evaluator.energy(x, self.labels)[:n])
        if table is not None and self.update.table is not None:
            table[:, rows] = self.update.table


class _ClosedForm:
    """A ``Target`` (targets/base.py) for an MLP energy and at most one tile of chains, by Numba kernels."""

    def __init__(self, description: Description, mlps: list[Weights], n_chains: int, labels: Tensor | None) -> None:
        few = rows_of_products(torch.device("cpu"))
        self.tile = _Tile(description, mlps, -(-n_chains // few) * few, labels is not None)
        self.tile.x.zero_()
        self._built_from = description, mlps, n_chains, labels
        self.exponential = any(weights.mlp.head == "logsumexp" for weights in mlps)
        self.trajectory: tuple[Call, Program] | None = None
        self.energies: tuple[Tensor, list[Call]] | None = None
        if self.tile.labels is not None and labels is not None:
            self.tile.labels.copy_(padded_rows(labels, self.tile.n_rows))

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        self.tile.x[: len(x)] = x
        return self.tile.evaluator.energy(self.tile.x, self.tile.labels)[: len(x)]

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        self.tile.x[: len(x)] = x
        for call in self.tile.gradients[0]:
            call()
        return self.tile.grad[: len(x)].clone()

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx, from one forward pass unless a head is a logsumexp: its gradient overwrites the logits."""
        if self.exponential:
            return self.value(x), self.gradient(x)
        gradient = self.gradient(x)
        return self._value_after()[: len(x)], gradient

    def leapfrog(self, start: Point, momentum: Tensor, h: Tensor, n_leapfrog: int) -> tuple[Point, Tensor]:
        """``hmc.leapfrog`` without Python between its steps: the end of a trajectory, and the momentum there."""
        tile, v, n = self.tile, self.tile.new, len(start.x)
        tile.x[:n], tile.grad[:n], v[:n] = start.x, start.gradient, momentum
        if self.trajectory is None:
            at = torch.zeros(1, dtype=torch.int64, device="cpu")
            sizes = n, v.shape[1], v.stride(0)
            move = kernels.load("leapfrog.move").prepared(v, tile.grad, tile.x, *sizes, None, 0, 0, at)
            calls = [move, *tile.gradients[0]]
            self.trajectory = move, Program(calls, calls, at)
        move, program = self.trajectory
        h = h.expand(len(h) if h.ndim == 2 else 1, v.shape[1]).contiguous()  # h of each dim: the loop is a vector loop
        move.aim(h=h, h_chain=h.stride(0) if len(h) > 1 else 0, n=n, n_leapfrog=n_leapfrog)
        program.run(0, n_leapfrog)
        x, gradient = tile.x[:n].clone(), tile.grad[:n].clone()
        program.t.fill_(n_leapfrog)
        move()
        value = self.value(x) if self.exponential else self._value_after()[:n]
        return Point(x, value, gradient), v[:n].clone()

    def _value_after(self) -> Tensor:
        """E at the states of the last gradient, which left the activations of the last hidden layer unchanged."""
        if self.energies is None:
            tile, out = self.tile, self.tile.x.new_empty(self.tile.n_rows)
            terms = tile.x, tile.x.shape[1], tile.x.stride(0), *tile.terms
            first, *others = tile.networks
            self.energies = out, [first.energy(out, False, terms), *(network.energy(out, True) for network in others)]
        out, calls = self.energies
        for call in calls:
            call()
        return out + self.tile.evaluator.constant

    def repeated(self, k: int) -> _ClosedForm:
        """The energy of k copies of each chain."""
        description, mlps, n_chains, labels = self._built_from
        return _ClosedForm(description, mlps, k * n_chains, repeated_labels(labels, k))


def closed_form(description: Description, precision: str) -> Callable[[int, Tensor | None], Target]:
    """A function (n_chains, labels) -> the target of these chains."""
    mlps = weights_of(description, precision)
    return lambda n_chains, labels: _ClosedForm(description, mlps, n_chains, labels)


# -- any other energy ----------------------------------------------------------------------------------------------


def parts_of_update(n_chains: int, dim: int, n_threads: int) -> list[slice]:
    """Split the chains among threads; one part if a second thread would not pay off."""
    size = max(1, -(-n_chains // n_threads), _NUMBERS_PER_THREAD // dim)
    return [slice(first, min(first + size, n_chains)) for first in range(0, n_chains, size)]


def run_module(
    energy: Energy, chains: Chains, sampler: Langevin, steps: int, *, thin: int = 0, telemetry: bool = False
) -> Advanced:
    """Langevin steps of any energy with autograd's gradient. chains.x is not modified."""
    n, dim = chains.x.shape
    n_threads = torch.get_num_threads()
    with energy.differentiating():  # allocate in here: inference tensors could not be modified
        x = chains.x.clone()
        done = Advanced.blank(x, steps, thin)
        updates = _updates(chains, sampler, sampler.coefficients(n, steps), done.first_bad, telemetry)
        parts = [(part.start, part.stop, Scratch(dim)) for part in parts_of_update(n, dim, n_threads)]
        calls = [[update.call(None, x, None, *part) for part in parts] for update in updates]
        teams = [Team(of_update, n_threads) for of_update in calls]

        def moved(k: int, x: Tensor, grad: Tensor) -> Tensor:
            new = torch.empty_like(x)  # a new tensor, because the energy may have kept the last one
            for call in calls[k]:
                call.aim(new=new, x=x, grad=grad)
            teams[k]()
            return new

        for t in range(steps if n > 0 else 0):
            updates[0].t.fill_(t)
            if sampler.noise_first:
                x = moved(0, x, x)
            grad = (
                energy.pulled_back(x.detach().requires_grad_(), chains.labels_or_condition).resolve_neg().contiguous()
            )
            x = moved(-1, x, grad)
            if done.trajectory is not None and (t + 1) % thin == 0:
                done.trajectory[:, t // thin] = x
        if (table := updates[-1].table) is not None:
            done = done._replace(telemetry=averaged(table, steps))
    return done._replace(x=x, energy=energy(x, chains.labels_or_condition))
