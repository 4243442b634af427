"""Trajectories in the first layer of an MLP energy on a CPU, in float32: Numba kernels around BLAS, without Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import cpu as kernels
from ..rng import Noise, Stream, drawing, seed_words
from ..samplers.langevin import Langevin
from ..targets.closed_form import matrix, padded_rows
from ..targets.collapsed import Arrival, Collapsed, Drift, End, FirstLayer, Leaps
from . import Chains
from .blas import matrix_product
from .cpu import Scratch, Update
from .cpu_mlp import NetworkCalls, Program, Weights

__all__ = ["collapsed"]


class _Collapsed(Collapsed):
    """``Collapsed`` by prepared calls.

    A layer's slopes overwrite its preactivations. So s lies in ``z`` for an MLP of one hidden layer, else in ``h``.
    """

    def __init__(self, layer: FirstLayer, weights: list[Weights], n_chains: int, labels: Tensor | None) -> None:
        super().__init__(layer, n_chains, labels)
        self.t = torch.zeros(1, dtype=torch.int64, device="cpu")
        pairs = zip(weights, self.networks, strict=True)
        networks = [NetworkCalls(w, network, self.labels) for w, network in pairs]
        found = [calls.slopes(self.u[:, block]) for calls, block in zip(networks, layer.blocks, strict=True)]
        self.places = [where for _, where in found]
        self.total = self.x.new_empty(self.n_rows)
        self.energy_calls = [calls.energy(self.total, k > 0) for k, calls in enumerate(networks)]
        self.gradient_calls, at_u = ([call for calls, _ in found for call in calls[k]] for k in range(2))
        leap = kernels.load("leapfrog.leap")
        self.leaps = [
            leap.prepared(
                *[None] * 4, n_chains, s, *(v[:, block] for v in (self.pull, self.a, self.b, self.u, self.q, self.z)),
                self.n_rows, s.shape[1], self.a.stride(0), None, None, 0, 0, self.curvature, self.t,
            )
            for s, block in zip(self.places, layer.blocks, strict=True)
        ]  # fmt: skip
        products = [
            matrix_product(s, layer.gram[block], self.pull, add=k > 0)
            for k, (s, block) in enumerate(zip(self.places, layer.blocks, strict=True))
        ]
        self.pull_calls = [call for calls in products for call in calls]
        calls = [*self.leaps, *at_u, *self.pull_calls]
        self.program = Program(calls, calls, self.t)
        self.scale = self.x.new_ones(self.x.shape[1]) if layer.scale is None else layer.scale.contiguous()
        self.scratch = Scratch(self.x.shape[1])
        self.step: _Step | None = None
        self.draw: tuple[Noise, Program, Tensor, Tensor] | None = None
        self.gaps = layer.width > sum(where.shape[1] for where in self.places)  # columns between blocks, which stay 0
        self.exponential = any(network.mlp.head == "logsumexp" for network in self.networks)

    def _load(self, u: Tensor, q: Tensor, slopes: Tensor, pull: Tensor) -> None:
        """As ``Collapsed`` has it: the first leapfrog step reads them where they are."""
        for call, block in zip(self.leaps, self.layer.blocks, strict=True):
            call.aim(u_0=u[:, block], q_0=q[:, block], s_0=slopes[:, block], pull_0=pull[:, block])
        self.start_of_leaps = u, q, slopes, pull  # the calls have their addresses

    def slopes(self) -> Tensor:
        """As ``Collapsed`` has it."""
        slopes = torch.zeros_like(self.h) if self.gaps else torch.empty_like(self.h)
        for where, block in zip(self.places, self.layer.blocks, strict=True):
            slopes[:, block] = where
        return slopes

    def _pull(self) -> None:
        for call in self.pull_calls:
            call()

    def _leap(self, leaps: Leaps) -> None:
        kicks, drifts = (
            column if column.shape[1] == 1 else padded_rows(column.t(), self.n_rows).t().contiguous()
            for column in (leaps.kicks, leaps.drifts)
        )
        for call in self.leaps:
            call.aim(kicks=kicks, drifts=drifts, rows=kicks.shape[1], n_leapfrog=leaps.n_leapfrog)
        self.kept = kicks, drifts  # the calls have their addresses
        last = leaps.n_leapfrog - 1
        self.program.run(0, last)
        self.t.fill_(last)
        for call in self.leaps:
            call()

    def _kick(self, leaps: Leaps, t: int = -1) -> None:
        self.t.fill_(leaps.n_leapfrog)
        for call in self.leaps:
            call()

    def momenta(self, noise: Noise, stream: Stream, t: int) -> tuple[Tensor, Tensor]:
        """As ``Collapsed`` has it, without Python between the draw and the product."""
        if self.draw is None or self.draw[0] is not noise:
            (n, dim), chains, steps = (self.n_chains, self.x.shape[1]), noise.chains, noise.first_steps.contiguous()
            v = self.x.new_zeros(self.n_rows, -(-dim // 4) * 4)[:, :dim]  # whole blocks of random numbers
            q = matrix(self.n_rows, self.layer.width, v)
            arguments = seed_words(noise.seed), int(stream), chains.contiguous(), steps, 0, v.stride(0) // 4, v
            w, r, _ = self.scratch.draw
            draw = drawing(kernels.NORMAL, slice(0, n), (w, r), *arguments)
            draw.aim(t=self.t)
            calls = [draw, *matrix_product(v, self.layer.scaled.t(), q)]
            self.draw = noise, Program(calls, calls, self.t), v[:n], q[:n]
        _, program, v, q = self.draw
        program.run(t, t + 1)
        return v, q

    def arrived(self, base: Tensor, a: Tensor, u: Tensor, v: Tensor, q: Tensor, end: End, leaps: Leaps) -> Arrival:
        """As ``Collapsed`` has it, in one pass."""
        (n, dim), width = v.shape, self.layer.width
        there, a_there, sums = matrix(n, dim, v), torch.empty_like(a), v.new_empty(5, n)
        kernels.load("leapfrog.arrive")(
            n, dim, width, base, base.stride(0), v, v.stride(0), self.scale, a, u, q, *end[:4], *leaps[2:],
            len(leaps.gamma), self.curvature, there, there.stride(0), a_there, sums,
        )  # fmt: skip
        of_a, of_b, vv, vy, sizes = sums.unbind()
        return Arrival(there, a_there, of_a, of_b, vv, vy, sizes.amax())

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        y = x if self.layer.mean is None else x - self.layer.mean
        self.z[: len(y)] = self.projected(y)
        return self.energy(self._evaluate()[: len(y)], y.square().sum(dim=1).double())

    def stepped(
        self, base: Tensor, a: Tensor, coefficients: Drift, noise: Noise, t: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As ``Collapsed`` has it: noise and update of base in one pass, unless each dim has its own scale."""
        if self.layer.scale is not None:
            return super().stepped(base, a, coefficients, noise, t)
        self._project(base, a)
        if self.step is None or self.step.coefficients is not coefficients:
            self.step = _Step(self, coefficients, Chains(base, noise.seed, noise.chains, noise.first_steps))
        return self.step.run(self._padded(base, self.x), self._padded(a, self.a), t)

    def _differentiate(self) -> None:
        for call in self.gradient_calls:
            call()

    def _evaluate(self) -> Tensor:
        if self.exponential:  # its gradient overwrites the logits
            u = self.z.clone()
            value = super()._evaluate()
            self.z.copy_(u)
            self._differentiate()
            return value
        self._differentiate()
        for call in self.energy_calls:
            call()
        return self.total.clone()


class _Step:
    """A step of Langevin dynamics from u in ``z``: the gradient's calls, noise and update of base, and that of a.

    coefficients: the last such of the run. chains: of any states.
    """

    def __init__(self, target: _Collapsed, coefficients: Drift, chains: Chains) -> None:
        self.coefficients, self.blocks, self.gaps = coefficients, target.layer.blocks, target.gaps
        drift, noise_std, shrunk = coefficients
        n, width = len(chains.x), target.layer.width
        self.first_bad = torch.empty(n, dtype=torch.int32, device="cpu")
        # Between its products, base is updated by x' = x - (drift c) x + noise_std xi.
        update = Update(chains, Langevin(1.0), (-shrunk, noise_std), self.first_bad, False, target.t)
        self.update = update.call(None, target.x, target.x, 0, n, target.scratch)
        push = kernels.load("update.push")
        self.pushes = [
            push.prepared(s, None, None, n, s.shape[1], width, drift, shrunk, len(drift), self.first_bad, target.t)
            for s in target.places
        ]
        calls = [*target.gradient_calls, self.update, *self.pushes]
        self.program = Program(calls, calls, target.t)

    def run(self, base: Tensor, a: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The next base and a, and a mask of the finite ones or None. base, a: with padding rows."""
        n = len(self.first_bad)
        new_base, new_a = matrix(len(base), base.shape[1], base), matrix(len(a), a.shape[1], a)
        new_base[n:] = 0.0
        if self.gaps:
            new_a.zero_()
        new_a[n:] = 0.0
        self.update.aim(new=new_base, x=base, grad=base)
        for push, block in zip(self.pushes, self.blocks, strict=True):
            push.aim(a=a[:, block], new=new_a[:, block])
        self.first_bad.fill_(-1)
        self.program.run(t, t + 1)
        finite = None if int(self.first_bad.max()) < 0 else self.first_bad < 0
        return new_base[:n], new_a[:n], finite


def collapsed(layer: FirstLayer) -> Callable[[int, Tensor | None], Collapsed]:
    """A function (n_chains, labels) -> the target of these chains."""
    weights = [
        Weights(mlp, float(scale), torch.float32) for mlp, scale in zip(layer.mlps, layer.scales, strict=True)
    ]  # fmt: skip
    return lambda n_chains, labels: _Collapsed(layer, weights, n_chains, labels)
