"""Trajectories in the first layer of an MLP energy on a CPU, in float32: Numba kernels around BLAS, without Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import cpu as kernels
from ..rng import Noise
from ..samplers.langevin import Langevin
from ..targets.closed_form import matrix, padded_rows
from ..targets.collapsed import Collapsed, Drift, FirstLayer, Leaps
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
        found = [NetworkCalls(w, network, self.labels).slopes() for w, network in pairs]
        self.places = [where for _, where in found]
        self.gradient_calls = [call for calls, _ in found for call in calls]
        leap = kernels.load("leapfrog.leap")
        self.leaps = [
            leap.prepared(
                s, *(v[:, block] for v in (self.a, self.b, self.z, self.u, self.q)), self.n_rows, s.shape[1],
                self.a.stride(0), *[None] * 4, 0, 0, self.curvature, self.t,
            )
            for s, block in zip(self.places, layer.blocks, strict=True)
        ]  # fmt: skip
        self.moves: list[Callable[[], object]] = [
            *self.leaps, *matrix_product(self.a, layer.gram, self.z, add=True)
        ]  # fmt: skip
        calls = [*self.moves, *self.gradient_calls]
        self.program = Program(calls, calls, self.t)
        self.scratch = Scratch(self.x.shape[1])
        self.update: tuple[Drift, kernels.Call, Tensor] | None = None
        self.gaps = layer.width > sum(where.shape[1] for where in self.places)  # columns between blocks, which stay 0
        self.exponential = any(network.mlp.head == "logsumexp" for network in self.networks)

    def _load_slopes(self, slopes: Tensor) -> None:
        for where, block in zip(self.places, self.layer.blocks, strict=True):
            where[: len(slopes)] = slopes[:, block]

    def slopes(self) -> Tensor:
        """As ``Collapsed`` has it."""
        slopes = torch.zeros_like(self.h)
        for where, block in zip(self.places, self.layer.blocks, strict=True):
            slopes[:, block] = where
        return slopes

    def _leap(self, leaps: Leaps) -> None:
        columns = [
            column if column.shape[1] == 1 else padded_rows(column.t(), self.n_rows).t().contiguous()
            for column in (leaps.kicks, leaps.drifts, leaps.alpha_1, leaps.beta)
        ]
        names = ("kicks", "drifts", "alphas_1", "betas")
        for call in self.leaps:
            call.aim(**dict(zip(names, columns, strict=True)), rows=columns[0].shape[1], n_leapfrog=leaps.n_leapfrog)
        self.kept = columns  # the calls have their addresses
        last = leaps.n_leapfrog - 1
        self.program.run(0, last)
        self.t.fill_(last)
        for call in self.moves:
            call()

    def _kick(self, leaps: Leaps, t: int = -1) -> None:
        self.t.fill_(leaps.n_leapfrog)
        for call in self.leaps:
            call()

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        y = x if self.layer.mean is None else x - self.layer.mean
        value, _ = self.evaluated(self.projected(y))
        return self.energy(value, y.square().sum(dim=1).double())

    def stepped(
        self, base: Tensor, a: Tensor, coefficients: Drift, noise: Noise, t: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As ``Collapsed`` has it: noise and update of base in one pass, unless each dim has its own scale."""
        if self.layer.scale is not None:
            return super().stepped(base, a, coefficients, noise, t)
        self._differentiate_at(base, a)
        x, n = self._padded(base, self.x), len(base)
        if self.update is None or self.update[0] is not coefficients:
            # Between its products, base is updated by x' = x - (drift c) x + noise_std xi.
            both = -coefficients.shrunk, coefficients.noise_std
            chains = Chains(base, noise.seed, noise.chains, noise.first_steps)
            first_bad = torch.empty(n, dtype=torch.int32, device="cpu")
            update = Update(chains, Langevin(1.0), both, first_bad, False, self.t)
            self.update = coefficients, update.call(None, x, x, 0, n, self.scratch), first_bad
        _, update, first_bad = self.update
        first_bad.fill_(-1)
        self.t.fill_(t)
        new = matrix(self.n_rows, x.shape[1], x)
        new[n:] = 0.0
        update.aim(new=new, x=x, grad=x)
        update()
        a = self._pushed(a, coefficients.drift, coefficients.shrunk)
        if int(first_bad.max()) < 0 and math.isfinite(a.sum().item()):
            return new[:n], a, None
        return new[:n], a, (first_bad < 0) & a.isfinite().all(dim=1)

    def _pushed(self, a: Tensor, drift: Tensor, shrunk: Tensor) -> Tensor:
        n, new = len(a), matrix(self.n_rows, a.shape[1], a)[: len(a)]
        if self.gaps:
            new.zero_()
        for where, block in zip(self.places, self.layer.blocks, strict=True):
            torch.addcmul(a[:, block], where[:n], drift, value=-1, out=new[:, block])
        return new if self.curvature == 0.0 else new.addcmul_(a, shrunk)

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
        # The gradient leaves the activations of the last hidden layer unchanged.
        values = [network.energy(network.h[-1], self.labels) for network in self.networks]
        return sum(values[1:], values[0])


def collapsed(layer: FirstLayer) -> Callable[[int, Tensor | None], Collapsed]:
    """A function (n_chains, labels) -> the target of these chains."""
    weights = [
        Weights(mlp, float(scale), torch.float32) for mlp, scale in zip(layer.mlps, layer.scales, strict=True)
    ]  # fmt: skip
    return lambda n_chains, labels: _Collapsed(layer, weights, n_chains, labels)
