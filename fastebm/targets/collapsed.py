"""An MLP energy seen through its first layer: a leapfrog step costs the same for any number of dims.

An MLP sees a state x only through x W^T, where W, (width, dim), is its first weight. (For a sum of MLPs, W has the
first weights of all, one below the other.) With s = dE/dz, z the first layer's preactivations, and a Gaussian term
c |x - m|^2 / 2, the gradient is s W + c (x - m). So with y = x - m, every point of a trajectory of HMC (hmc.py) is

y = alpha y_0 + beta v_0 + A W,   v = gamma y_0 + delta v_0 + B W,

four numbers and two matrices, (n, width). The leapfrog steps change these, u = y W^T and q = v W^T, by G = W W^T:

kick of size k    B = B - k (s + c A),   q = q - k (s G + c u),   gamma = gamma - k c alpha,   delta = delta - k c beta
drift of size h   A = A + h B,           u = u + h q,             alpha = alpha + h gamma,     beta = beta + h delta

z is u plus the bias at y = 0. A step takes one product with G in place of two with W. The same numbers give the kinetic
energy and the Gaussian term:

|v|^2 - |v_0|^2 = gamma^2 |y_0|^2 + 2 gamma delta y_0 . v_0 + (delta^2 - 1) |v_0|^2 + B . (q + gamma u_0 + delta q_0)
|y|^2 - |y_0|^2 = (alpha^2 - 1) |y_0|^2 + 2 alpha beta y_0 . v_0 + beta^2 |v_0|^2 + A . (u + alpha u_0 + beta q_0)

With a scale r of each coordinate (h r in place of h, as a diagonal mass has it), the same holds for y / r and W diag(r)
if c = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ..energies.activations import Activation
from ..rng import Noise, Stream
from ..threads import threads
from .closed_form import ClosedForm, Network, matrix, padded_rows, product, rows_of_products
from .description import Description
from .mlp import MLP

__all__ = [
    "Arrival",
    "Collapsed",
    "Drift",
    "End",
    "FirstLayer",
    "Leaps",
    "centred",
    "end_of_leaps",
    "is_isotropic",
    "reduced_sizes",
    "width_of",
]

# The columns of each MLP's first layer start at a multiple of this, as rows do (closed_form.py).
_ALIGNED = 4


class Leaps(NamedTuple):
    """The leapfrog steps of a trajectory. Each tensor has one row, or one per chain.

    kicks, drifts: (n_leapfrog + 1, rows), by step: a kick, then a drift. The last kick has no drift.
    alpha_1, beta, gamma, delta_1: (rows, 1) alpha - 1, beta, gamma and delta - 1 at the end.
    (With alpha itself, its rounding would shrink y in the same way in every step.)
    """

    kicks: Tensor
    drifts: Tensor
    alpha_1: Tensor
    beta: Tensor
    gamma: Tensor
    delta_1: Tensor

    @classmethod
    def of(cls, h: float | Tensor, n_leapfrog: int, curvature: float, like: Tensor) -> Leaps:
        """h: the step, a number or a (n, 1) float64 tensor. curvature: c. like: a tensor of the dtype and device."""
        h = torch.as_tensor(h, dtype=torch.float64, device=like.device).reshape(-1, 1)
        kicks, drifts = [h / 2, *[h] * (n_leapfrog - 1), h / 2], [*[h] * n_leapfrog, torch.zeros_like(h)]
        steps = (torch.stack(column).squeeze(2) for column in (kicks, drifts))
        return cls(*(v.to(like.dtype) for v in (*steps, *end_of_leaps(h, n_leapfrog, curvature))))

    @property
    def n_leapfrog(self) -> int:
        return len(self.kicks) - 1

    def rows(self, rows: slice) -> Leaps:
        """Those of a subset of the chains."""
        if len(self.gamma) == 1:
            return self
        return Leaps(*(v[:, rows] for v in self[:2]), *(v[rows] for v in self[2:]))


def end_of_leaps(h: Any, n_leapfrog: int, curvature: float) -> tuple[Any, Any, Any, Any]:
    """alpha - 1, beta, gamma and delta - 1 at the end of a trajectory. h: a number, or a float64 tensor."""
    zero = h * 0.0
    alpha_1, beta, gamma, delta_1 = zero, zero, zero, zero
    for t in range(n_leapfrog + 1):
        kick, drift = (h / 2 if t in (0, n_leapfrog) else h), (h if t < n_leapfrog else zero)
        gamma, delta_1 = gamma - kick * curvature * (1 + alpha_1), delta_1 - kick * curvature * beta
        alpha_1, beta = alpha_1 + drift * gamma, beta + drift * (1 + delta_1)
    return alpha_1, beta, gamma, delta_1


class End(NamedTuple):
    """The end of a trajectory, in the first layer.

    a, b, q: (n, width) A, B and q, overwritten by the next trajectory. u, slopes, pull: (n, width) u, s and s G.
    value: (n,) the energy without its Gaussian term and constant.
    """

    a: Tensor
    b: Tensor
    q: Tensor
    u: Tensor
    value: Tensor
    slopes: Tensor
    pull: Tensor


class Arrival(NamedTuple):
    """The end of a trajectory from y_0 = base_0 + r a_0 W diag(r), in all dims.

    base, a: y = base + r a W diag(r). of_a, of_b: (n,) A . (u + alpha u_0 + beta q_0), B . (q + gamma u_0 + delta q_0).
    vv, vy: (n,) |v_0|^2 and v_0 . y_0, 0 without a Gaussian term. size: a number that is finite only if base and a are.
    """

    base: Tensor
    a: Tensor
    of_a: Tensor
    of_b: Tensor
    vv: Tensor
    vy: Tensor
    size: Tensor


class Drift(NamedTuple):
    """Coefficients of a step of Langevin dynamics, (1 or n, 1) each: drift, noise_std, and shrunk = -drift c."""

    drift: Tensor
    noise_std: Tensor
    shrunk: Tensor


class FirstLayer:
    """W and G of an energy, for all tiles of a run. They are read from its weights anew in each run.

    Args:
        description: the energy. Its curvature is one number.
        scale: (dim,) r, or None for 1.
    """

    def __init__(self, description: Description, scale: Tensor | None = None) -> None:
        self.description, self.scale = description, scale
        self.centre = centre = centred(description)
        assert centre.scales is not None
        self.mlps, self.scales = centre.scaled_heads(), list(centre.scales)
        like = self.mlps[0].weights[0]
        self.blocks, self.width = _columns([mlp.widths[0] for mlp in self.mlps])
        self.weight = matrix(self.width, description.dim, like).zero_()
        for block, mlp in zip(self.blocks, self.mlps, strict=True):
            self.weight[block] = mlp.weights[0]
        self.mean = None if description.mean is None or not bool(description.mean.any()) else description.mean
        self.curvature = 0.0 if description.curvature is None else float(description.curvature[0])
        self.scaled = self.weight if scale is None else matrix(self.width, description.dim, like)
        if scale is not None:
            torch.mul(self.weight, scale, out=self.scaled)
        # If they are not, every gradient is NaN, and no chain moves.
        self.finite = bool(self.weight.isfinite().all())

    @cached_property
    def gram(self) -> Tensor:
        """G, (width, width)."""
        with threads(1):  # so that its bits do not depend on the number of threads
            return torch.mm(self.scaled, self.scaled.t())

    @cached_property
    def basis(self) -> tuple[Tensor, Tensor]:
        """Q, (dim, k), and R, (k, width), with (W diag(r))^T = Q R, Q^T Q = I and k = min(dim, width)."""
        with threads(1):  # so that its bits do not depend on the number of threads
            q, r = torch.linalg.qr(self.scaled.t())
        return q, r

    def reduced(self) -> Description:
        """The energy at y = z Q^T, as a function of z, (n, k)."""
        _, r = self.basis
        mlps = tuple(
            replace(mlp, weights=(r[:, block].t().contiguous(), *mlp.weights[1:]))
            for mlp, block in zip(self.centre.mlps, self.blocks, strict=True)
        )
        curvature, mean = (None if v is None else v[: len(r)] for v in (self.centre.curvature, self.centre.mean))
        return replace(self.centre, mlps=mlps, curvature=curvature, mean=mean)

    @cached_property
    def mark(self) -> int:
        """A number that changes with W, m and c: a checksum. Chains that carry u and |y|^2 compare it."""
        parts = [self.weight.flatten(), self.weight.new_tensor([self.curvature])]
        parts += [] if self.mean is None else [self.mean]
        return crc32(torch.cat(parts).cpu().numpy().tobytes())


def centred(description: Description) -> Description:
    """The energy as a function of x - m, with its linear term as one more MLP: b x is a layer of one unit."""
    assert description.scales is not None  # the description is not bare
    mlps, scales = description.mlps, description.scales
    if description.linear is not None:
        one = description.linear.new_ones(1, 1)
        mlps = (*mlps, MLP((description.linear[None], one), (None, None), (Activation("identity"),)))
        scales = torch.cat([scales, one[0]])
    mean = description.mean
    if mean is not None and bool(mean.any()):
        mlps = tuple(_shifted(mlp, mean) for mlp in mlps)
    return replace(
        description, mlps=mlps, scales=scales, mean=None if mean is None else torch.zeros_like(mean), linear=None
    )


def _shifted(mlp: MLP, mean: Tensor) -> MLP:
    """The MLP as a function of x - mean."""
    with threads(1):  # so that its bits do not depend on the number of threads
        bias = torch.mv(mlp.weights[0], mean)
    bias = bias if mlp.biases[0] is None else mlp.biases[0] + bias
    return replace(mlp, biases=(bias, *mlp.biases[1:]))


def width_of(description: Description) -> int:
    """The number of units that see x."""
    return sum(mlp.widths[0] for mlp in description.mlps) + (description.linear is not None)


def reduced_sizes(description: Description) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """The dims of ``FirstLayer.reduced``, and its ``Description.networks``. It may be bare."""
    networks = description.networks if description.linear is None else (*description.networks, (1,))
    _, width = _columns([widths[0] for widths in networks])
    return min(description.dim, width), networks


def _columns(widths: Sequence[int]) -> tuple[list[slice], int]:
    """The columns of each MLP's first layer, and their number. Columns in between are 0."""
    blocks, end = [], 0
    for width in widths:
        blocks.append(slice(end, end + width))
        end += -(-width // _ALIGNED) * _ALIGNED
    return blocks, end


def is_isotropic(description: Description) -> bool:
    """Whether the curvature of the energy's Gaussian term is the same for all dims."""
    c = description.curvature
    return c is None or bool((c == c[0]).all())


class Collapsed:
    """A ``Target`` (base.py) for at most one tile of chains, with trajectories in its first layer.

    labels: (n,) int64, one per chain, or None.
    """

    def __init__(self, layer: FirstLayer, n_chains: int, labels: Tensor | None) -> None:
        self.layer, self.n_chains, self._given = layer, n_chains, labels
        like = layer.weight
        few = rows_of_products(like.device)
        self.n_rows = -(-n_chains // few) * few
        self.labels = None if labels is None else padded_rows(labels, self.n_rows)
        # Padding rows hold finite numbers, and their results are not used.
        self.x = matrix(self.n_rows, layer.description.dim, like).zero_()
        self.a, self.b, self.u, self.q, self.z, self.h, self.pull = (
            matrix(self.n_rows, layer.width, like).zero_() for _ in range(7)
        )
        self.networks = [
            Network(mlp, scale, self.n_rows, (self.z[:, block], self.h[:, block]))
            for mlp, scale, block in zip(layer.mlps, layer.scales, layer.blocks, strict=True)
        ]
        self._ordinary: ClosedForm | None = None

    # -- the target, in all dims --------------------------------------------------------------------------

    @property
    def ordinary(self) -> ClosedForm:
        """The same energy without the first layer's space."""
        if self._ordinary is None:
            self._ordinary = ClosedForm(self.layer.description, self.n_chains, self._given)
        return self._ordinary

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        return self.ordinary.value(x)

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        return self.ordinary.gradient(x)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx."""
        return self.ordinary.value_and_gradient(x)

    def repeated(self, k: int) -> ClosedForm:
        """The energy of k copies of each chain."""
        return self.ordinary.repeated(k)

    @property
    def curvature(self) -> float:
        """c."""
        return self.layer.curvature

    # -- to the first layer and back ----------------------------------------------------------------------

    def away(self, x: Tensor) -> Tensor:
        """y = x - m, (n, dim), where the chains start."""
        if self.layer.mean is None:
            return x
        self.start = x, x - self.layer.mean
        return self.start[1]

    def projected(self, y: Tensor) -> Tensor:
        """u = y W^T, (n, width)."""
        return self._product(y, self.layer.weight.t())

    def momenta(self, noise: Noise, stream: Stream, t: int) -> tuple[Tensor, Tensor]:
        """v of step t, (n, dim), and q = v (W diag(r))^T, (n, width). The next step may overwrite them."""
        v = noise.normal(stream, t)
        return v, self._product(v, self.layer.scaled.t())

    def multiplied(self, slopes: Tensor) -> Tensor:
        """s G, (n, width)."""
        return self._product(slopes, self.layer.gram)

    def moved(self, alpha_1: Tensor, y: Tensor, beta: Tensor, v: Tensor) -> Tensor:
        """alpha y + r beta v, (n, dim). alpha_1, beta: (1 or n, 1), alpha - 1 and beta."""
        y = y if self.curvature == 0.0 else torch.addcmul(y, y, alpha_1)  # without curvature alpha is 1
        return torch.addcmul(y, v, beta if self.layer.scale is None else beta * self.layer.scale)

    def put_together(self, base: Tensor, a: Tensor) -> Tensor:
        """y = base + r a W diag(r), (n, dim)."""
        if not self.layer.finite:
            return base
        out = matrix(self.n_rows, base.shape[1], base)
        if self.layer.scale is not None:
            product(self._padded(a, self.u), self.layer.scaled, None, out)
            return torch.addcmul(base, out[: len(base)], self.layer.scale)
        out[len(base) :] = 0.0
        out[: len(base)] = base
        return product(self._padded(a, self.u), self.layer.weight, None, out, add=True)[: len(base)]

    def positions(self, base: Tensor, a: Tensor) -> Tensor:
        """x, (n, dim)."""
        y = self.put_together(base, a)
        if self.layer.mean is None:
            return y
        x, start = self.start
        # x - m + m is rounded. A chain that has not moved stays where it is, such as on a bound.
        return torch.where((y == start).all(dim=1, keepdim=True), x, y + self.layer.mean)

    def momentum(self, leaps: Leaps, y: Tensor, v: Tensor, b: Tensor) -> Tensor:
        """gamma y + delta v + b W diag(r), (n, dim)."""
        return v + leaps.gamma * y + leaps.delta_1 * v + self._product(b, self.layer.scaled)

    def gradient_from(self, base: Tensor, a: Tensor, slopes: Tensor) -> Tensor:
        """dE/dx, (n, dim), at y = base + r a W diag(r), from s there."""
        pulled = slopes if self.curvature == 0.0 else torch.add(slopes, a, alpha=self.curvature)
        return self._product(pulled, self.layer.weight).add_(base, alpha=self.curvature)

    def energy(self, value: Tensor, square: Tensor) -> Tensor:
        """E, (n,), from its part that the first layer determines, and |y|^2 in float64."""
        assert self.layer.description.constant is not None
        value = value + self.layer.description.constant
        return value if self.curvature == 0.0 else (value + square * (self.curvature / 2)).to(value.dtype)

    def _product(self, v: Tensor, w: Tensor) -> Tensor:
        padded = self._padded(v, self.x if v.shape[1] == self.x.shape[1] else self.u)
        return product(padded, w, None, matrix(self.n_rows, w.shape[1], v))[: len(v)]

    def _padded(self, v: Tensor, room: Tensor) -> Tensor:
        """v with padding rows, as it is or in ``room``."""
        if len(v) == self.n_rows and v.stride() == room.stride():
            return v
        room[: len(v)] = v
        return room

    # -- in the first layer -------------------------------------------------------------------------------

    def evaluated(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The energy's part that the first layer determines, (n,), and s and s G, (n, width)."""
        n = len(u)
        self.z[:n] = u
        value = self._evaluate()
        self._pull()
        return value[:n], self.slopes()[:n], self.pull[:n].clone()

    def stepped(
        self, base: Tensor, a: Tensor, coefficients: Drift, noise: Noise, t: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A step of Langevin dynamics from y = base + r a W diag(r): the next base and a, and a mask of the finite
        ones, (n,), or None for all."""
        drift, noise_std, shrunk = coefficients
        self._project(base, a)
        self._differentiate()
        base = self.moved(shrunk, base, noise_std, noise.normal(Stream.LANGEVIN, t))
        new = torch.addcmul(a, self.slopes()[: len(a)], drift, value=-1)
        a = new if self.curvature == 0.0 else new.addcmul_(a, shrunk)
        if math.isfinite((base.sum() + a.sum()).item()):
            return base, a, None
        return base, a, base.isfinite().all(dim=1) & a.isfinite().all(dim=1)

    def slopes_at(self, base: Tensor, a: Tensor) -> Tensor:
        """s, (n, width), at y = base + r a W diag(r)."""
        self._project(base, a)
        self._differentiate()
        return self.slopes()[: len(base)]

    def _project(self, base: Tensor, a: Tensor) -> None:
        """u = y W^T to ``z``, at y = base + r a W diag(r)."""
        product(self._padded(base, self.x), self.layer.weight.t(), None, self.z)
        product(self._padded(a, self.a), self.layer.gram, None, self.z, add=True)

    def followed(self, u: Tensor, q: Tensor, slopes: Tensor, pull: Tensor, leaps: Leaps) -> End:
        """Follow a trajectory. u, q, slopes, pull: (n, width) u_0, q_0, and s and s G there."""
        n = len(u)
        self._load(u, q, slopes, pull)
        self._leap(leaps)
        value = self._evaluate()
        self._pull()
        self._kick(leaps)
        u, pull = self.u[:n].clone(), self.pull[:n].clone()
        return End(self.a[:n], self.b[:n], self.q[:n], u, value[:n], self.slopes()[:n], pull)

    def arrived(self, base: Tensor, a: Tensor, u: Tensor, v: Tensor, q: Tensor, end: End, leaps: Leaps) -> Arrival:
        """The end of the trajectory from base, a, u and the momentum v, q = v W^T, in all dims."""
        there = self.moved(leaps.alpha_1, base, leaps.beta, v)
        a_there = torch.addcmul(end.a + a, a, leaps.alpha_1)
        of_b = (end.b * (end.q + q + leaps.delta_1 * q + leaps.gamma * u)).sum(dim=1)
        of_a = vv = vy = torch.zeros_like(of_b)
        if self.curvature != 0.0:
            of_a = (end.a * (end.u + u + leaps.alpha_1 * u + leaps.beta * q)).sum(dim=1)
            vv, vy = v.square().sum(dim=1), (v * base).sum(dim=1) + (q * a).sum(dim=1)
        return Arrival(there, a_there, of_a, of_b, vv, vy, there.sum() + a_there.sum())

    def _load(self, u: Tensor, q: Tensor, slopes: Tensor, pull: Tensor) -> None:
        """The start of a trajectory to the buffers."""
        for room, v in ((self.u, u), (self.q, q), (self.h, slopes), (self.pull, pull)):
            room[: len(v)], room[len(v) :] = v, 0.0
        self.a.zero_()
        self.b.zero_()

    def slopes(self) -> Tensor:
        """A copy of s, (n_rows, width), where it was computed last."""
        return self.h.clone()

    def _pull(self) -> None:
        """s G to ``pull``, from s where it was computed last."""
        product(self.h, self.layer.gram, None, self.pull)

    def _leap(self, leaps: Leaps) -> None:
        """All but the last kick, and u there to ``z``."""
        for t in range(leaps.n_leapfrog):
            if t > 0:
                self._evaluate()
                self._pull()
            self._kick(leaps, t)
            drift = self._at(leaps.drifts[t])
            self.a.addcmul_(self.b, drift)
            self.u.addcmul_(self.q, drift)
            self.z.copy_(self.u)

    def _kick(self, leaps: Leaps, t: int = -1) -> None:
        kick = self._at(leaps.kicks[t])
        for v, force, y in ((self.b, self.h, self.a), (self.q, self.pull, self.u)):
            v.addcmul_(force, kick, value=-1)
            if self.curvature != 0.0:
                v.addcmul_(y, kick, value=-self.curvature)

    def _differentiate(self) -> None:
        """s to ``h``, at u in ``z``, which it overwrites."""
        self._evaluate()

    def _at(self, rows: Tensor) -> Tensor:
        return padded_rows(rows[:, None], self.n_rows)

    def _evaluate(self) -> Tensor:
        """The energies at u, (n_rows,), and s to ``h``. It overwrites u, in ``z``."""
        values = []
        for network, block in zip(self.networks, self.layer.blocks, strict=True):
            if (bias := network.mlp.biases[0]) is not None:
                self.z[:, block].add_(bias)
            last = network.rise()
            values.append(network.energy(last, self.labels))
            network.slopes(last, self.labels)
        total: Tensor = sum(values[1:], values[0])
        return total
