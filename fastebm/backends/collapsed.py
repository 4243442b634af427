"""Runs of samplers in the first layer of an MLP energy (targets/collapsed.py), and where they are faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..samplers.collapsed import CollapsedHMC, CollapsedMALA, Form
from ..samplers.collapsed_langevin import CollapsedLangevin
from ..samplers.collapsed_underdamped import CollapsedUnderdamped
from ..samplers.hmc import HMC
from ..samplers.langevin import Langevin
from ..samplers.mala import MALA
from ..samplers.underdamped import UnderdampedLangevin
from ..targets.base import Target
from ..targets.collapsed import Collapsed, FirstLayer, is_isotropic, width_of
from ..targets.description import Description
from . import Advanced, Chains, cpu_collapsed, tiles

__all__ = ["FORMS", "collapses", "run"]

FORMS: dict[type, type[Form]] = {
    HMC: CollapsedHMC,
    MALA: CollapsedMALA,
    Langevin: CollapsedLangevin,
    UnderdampedLangevin: CollapsedUnderdamped,
}


def collapses(sampler: Any, chains: Chains, description: Description) -> bool:
    """Whether a run of this sampler takes its steps in the first layer.

    It may if nothing acts on single coordinates: no clip, no frozen coordinates, no clamp but the rejection of ends
    outside, and a Gaussian term that is isotropic in the scale of the mass or preconditioner. It does if that is
    faster. This depends on the energy and the sampler alone, or else bits would depend on the batch.
    """
    if type(sampler) not in FORMS or chains.frozen is not None:
        return False
    form = FORMS[type(sampler)](sampler)
    if not form.possible or not is_isotropic(description):
        return False
    if description.curvature is not None and isinstance(form.scale(chains.x), Tensor):
        return False
    return form.saved(description.dim, width_of(description)) > 0


def run(
    description: Description, chains: Chains, sampler: Any, steps: int, *, kernels: str, thin: int = 0,
    telemetry: bool = False,
) -> Advanced:  # fmt: skip
    """Run the steps. chains.x is modified in place. kernels: "numba" or "torch"."""
    form = FORMS[type(sampler)](sampler)
    scale = form.scale(chains.x)
    layer = FirstLayer(description, scale if isinstance(scale, Tensor) else None)
    make_target: Callable[[int, Tensor | None], Target] = partial(Collapsed, layer)
    if kernels == "numba":
        make_target = cpu_collapsed.collapsed(layer)
    return tiles.run(chains, form, steps, make_target=make_target, thin=thin, telemetry=telemetry)
