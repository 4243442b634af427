"""The samplers of ``fastebm train --sampler NAME``: how chains move in training, and fresh ones afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..samplers import HMC, MALA, Langevin, UnderdampedLangevin
from ..samplers.base import Sampler
from .options import Entry, built

if TYPE_CHECKING:
    from .recipe import TrainConfig

__all__ = ["SAMPLERS", "build_sampler"]


def _langevin(config: TrainConfig, steps: int, **options: Any) -> Langevin:
    """Whole blocks of langevin_steps, and before them the end of one if it does not divide: see ``TrainConfig``."""
    cooling = round(config.cooling * config.langevin_steps)
    noise = torch.full((config.langevin_steps,), config.noise_std)
    noise[config.langevin_steps - cooling :] *= torch.linspace(1.0, 0.0, cooling + 1)[1:]
    blocks = noise.repeat(-(-steps // config.langevin_steps))
    return Langevin.from_drift_and_noise(
        config.drift, blocks[len(blocks) - steps :], grad_clip=config.grad_clip, clamp=config.clamp, **options
    )


# By default a step is as long as one of Langevin with the same drift: h^2 / 2 = drift for a step of size h in units of
# the state, and h / 2 = drift for MALA.


def _mala(config: TrainConfig, steps: int, *, step_size: float | None = None, **options: Any) -> MALA:
    return MALA(2.0 * config.drift if step_size is None else step_size, clamp=config.clamp, **options)


def _hmc(config: TrainConfig, steps: int, *, step_size: float | None = None, **options: Any) -> HMC:
    return HMC(math.sqrt(2.0 * config.drift) if step_size is None else step_size, clamp=config.clamp, **options)


def _underdamped(
    config: TrainConfig, steps: int, *, step_size: float | None = None, **options: Any
) -> UnderdampedLangevin:
    step = math.sqrt(2.0 * config.drift) if step_size is None else step_size
    return UnderdampedLangevin(step, clamp=config.clamp, **options)


_STEP = ("step_size", "clamp")

SAMPLERS: Mapping[str, Entry] = {
    "langevin": Entry(
        "Langevin dynamics by drift, noise_std and cooling", _langevin, Langevin, (*_STEP, "noise_scale", "grad_clip")
    ),
    "mala": Entry("Langevin with an accept test", _mala, MALA, _STEP),
    "hmc": Entry("Hamiltonian Monte Carlo", _hmc, HMC, _STEP),
    "underdamped": Entry("Langevin with momentum", _underdamped, UnderdampedLangevin, _STEP),
}


def build_sampler(config: TrainConfig, steps: int) -> Sampler:
    """The sampler of a configuration, for this many steps."""
    entry = SAMPLERS[config.sampler]
    sampler: Sampler = built("sampler", config.sampler, entry, config, steps, options=config.sampler_options)
    return sampler
