"""Runs of samplers in the first layer of an MLP energy (targets/collapsed.py), and where they are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..samplers.base import Adaptation, Info
from ..samplers.collapsed import CollapsedHMC, CollapsedMALA, CollapsedPoint, Form
from ..samplers.collapsed_langevin import CollapsedLangevin
from ..samplers.collapsed_underdamped import CollapsedUnderdamped
from ..samplers.hmc import HMC
from ..samplers.langevin import Langevin
from ..samplers.mala import MALA
from ..samplers.underdamped import UnderdampedLangevin
from ..targets.collapsed import Collapsed, End, FirstLayer, Leaps, is_isotropic, width_of
from ..targets.description import Description
from ..threads import share
from . import Advanced, Chains, cpu_collapsed, reference, tiles

__all__ = ["FORMS", "collapses", "run"]

MakeTarget = Callable[[FirstLayer], Callable[[int, Tensor | None], Collapsed]]

# Products with W that a step of a warm-up takes besides: those of y, and of the gradient for the scale.
_ADAPTING = 2

FORMS: dict[type, type[Form]] = {
    HMC: CollapsedHMC,
    MALA: CollapsedMALA,
    Langevin: CollapsedLangevin,
    UnderdampedLangevin: CollapsedUnderdamped,
}


def collapses(
    sampler: Any, chains: Chains, adaptation: Adaptation | None, description: Description, kernels: str
) -> bool:
    """Whether a run of this sampler takes its steps in the first layer.

    It may if nothing acts on single coordinates: no clip, no frozen coordinates, no clamp but the rejection of ends
    outside, and a Gaussian term that is isotropic in the scale of the mass or preconditioner. It does if that is
    faster. This depends on the energy and the sampler alone, or else bits would depend on the batch.

    kernels: "numba", "torch", or "triton": where the reduced energy fits on the chip, its steps are faster than those
    of one that is streamed.
    adaptation: of a warm-up. Only that of HMC does, because it may change the scale, and needs y in each step.
    """
    if type(sampler) not in FORMS or chains.frozen is not None:
        return False
    form = FORMS[type(sampler)](sampler)
    if not form.possible or not is_isotropic(description):
        return False
    scaled = isinstance(form.scale(chains.x), Tensor) or getattr(adaptation, "scaled", None) is not None
    if description.curvature is not None and scaled:
        return False
    width = width_of(description)
    if kernels == "triton":
        return width < description.dim
    saved = form.saved(description.dim, width)
    if adaptation is not None:
        if len(chains.x) == 0:  # they learn nothing
            return False
        saved = saved - _ADAPTING * description.dim * width if type(sampler) is HMC else 0.0
    return saved > 0


def run(
    description: Description, chains: Chains, sampler: Any, steps: int, *, kernels: str, thin: int = 0,
    telemetry: bool = False, carry: bool = True, adaptation: Adaptation | None = None,
) -> Advanced:  # fmt: skip
    """Run the steps. chains.x is modified in place. kernels: "numba" or "torch". carry: as for ``tiles.run``."""

    def layer_of(sampler: Any) -> FirstLayer:
        scale = FORMS[type(sampler)](sampler).scale(chains.x)
        layer = FirstLayer(description, scale if isinstance(scale, Tensor) else None)
        layer.gram  # noqa: B018  # computed here, before threads share it
        return layer

    make: MakeTarget = cpu_collapsed.collapsed if kernels == "numba" else lambda layer: partial(Collapsed, layer)
    options: dict[str, Any] = {"thin": thin, "telemetry": telemetry}
    if adaptation is None:
        form = FORMS[type(sampler)](sampler)
        return tiles.run(chains, form, steps, make_target=make(layer_of(sampler)), carry=carry, **options)
    target = _Together(layer_of(sampler), chains, make)
    warm_up = _WarmUp(adaptation, target, layer_of)
    return reference.run(target, chains, warm_up.sampler, steps, by_definition=False, adaptation=warm_up, **options)


class _Together(Collapsed):
    """``Collapsed`` for all chains at once, tile by tile on all threads, with a scale that may change.

    make: a layer -> a function that maps a number of chains and their labels to their target.
    """

    def __init__(self, layer: FirstLayer, chains: Chains, make: MakeTarget) -> None:
        self.n_chains, self._given, self._ordinary = len(chains.x), chains.labels, None
        self.make, self.parts = make, tiles.tiles(len(chains.x), torch.get_num_threads())
        self.rescale(layer)

    def rescale(self, layer: FirstLayer) -> None:
        """Take another layer, of the same energy."""
        self.layer, make = layer, self.make(layer)
        self.targets = [
            make(rows.stop - rows.start, None if self._given is None else self._given[rows]) for rows in self.parts
        ]

    def put_together(self, base: Tensor, a: Tensor) -> Tensor:
        """y = base + r a W diag(r), (n, dim)."""
        if not self.layer.finite:
            return base
        moved = self._product(a, self.layer.scaled)
        return base + moved if self.layer.scale is None else torch.addcmul(base, moved, self.layer.scale)

    def evaluated(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Collapsed`` has it."""
        value, slopes, pull = self._each(lambda target, rows: target.evaluated(u[rows]))
        return value, slopes, pull

    def followed(self, u: Tensor, q: Tensor, slopes: Tensor, pull: Tensor, leaps: Leaps) -> End:
        """As ``Collapsed`` has it."""
        starts = u, q, slopes, pull

        def follow(target: Collapsed, rows: slice) -> End:
            u, q, slopes, pull = (v[rows] for v in starts)
            return target.followed(u, q, slopes, pull, leaps.rows(rows))

        return End(*self._each(follow))

    def _product(self, v: Tensor, w: Tensor) -> Tensor:
        return tiles.multiplied(v, w)

    def _each(self, function: Callable[[Collapsed, slice], Sequence[Tensor]]) -> list[Tensor]:
        """The results of each tile, joined."""
        found: list[Sequence[Tensor]] = [()] * len(self.parts)

        def work(k: int, interrupted: Callable[[], bool]) -> None:
            with torch.inference_mode():
                found[k] = function(self.targets[k], self.parts[k])

        share(range(len(self.parts)), work, torch.get_num_threads())
        return [torch.cat(column) for column in zip(*found, strict=True)]


class _WarmUp:
    """An ``Adaptation`` of HMC while its steps run in the first layer. layer_of: the layer for a sampler's mass."""

    def __init__(self, inner: Adaptation, target: _Together, layer_of: Callable[[Any], FirstLayer]) -> None:
        self.inner, self.target, self.layer_of = inner, target, layer_of
        self.sampler = CollapsedHMC(inner.sampler, eager=True)

    def update(self, old: CollapsedPoint, new: CollapsedPoint, info: Info, active: Tensor | None) -> None:
        """Learn from one step."""
        mass = self.inner.sampler.mass
        self.inner.update(_Seen(self.target, old), _Seen(self.target, new), info, active)
        if self.inner.sampler.mass is not mass:
            self.target.rescale(self.layer_of(self.inner.sampler))
        self.sampler = CollapsedHMC(self.inner.sampler, eager=True)


class _Seen:
    """A state as an adaptation reads it."""

    def __init__(self, target: _Together, state: CollapsedPoint) -> None:
        self.target, self.state = target, state

    @property
    def x(self) -> Tensor:
        mean = self.target.layer.mean
        return self.state.base if mean is None else self.state.base + mean  # a is 0

    @property
    def gradient(self) -> Tensor:
        return self.target.gradient_from(self.state.base, self.state.a, self.state.slopes)
