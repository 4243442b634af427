"""The samplers of ``fastebm train --sampler NAME``: how chains move in training, and fresh ones afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..estimates import probability_flow
from ..objectives import DiffusionRecoveryLikelihood
from ..rng import Stream, normal
from ..samplers import (
    HMC,
    MALA,
    AnnealedLangevin,
    Langevin,
    ParallelTempering,
    PredictorCorrector,
    UnderdampedLangevin,
)
from .models import noise_range
from .options import Entry, built

if TYPE_CHECKING:
    from .recipe import TrainConfig

__all__ = ["SAMPLERS", "Draw", "build_sampler", "geometric"]

# Samples without chains that could be continued: (model, n, seed) -> (n, dim).
Draw = Callable[[nn.Module, int, int], Tensor]


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


def _tempering(
    config: TrainConfig, steps: int, *, n_temperatures: int = 8, max_temperature: float = 30.0, **options: Any
) -> ParallelTempering:
    """Temperatures in a geometric sequence from 1 on."""
    inner = MALA(2.0 * config.drift, clamp=config.clamp)
    temperatures = geometric("temperatures", 1.0, max_temperature, n_temperatures)
    return ParallelTempering(inner, temperatures, **options)


def _annealed(
    config: TrainConfig, steps: int, *, n_levels: int = 20, step_scale: float = 0.3, **options: Any
) -> AnnealedLangevin:
    """Levels from the largest to the smallest sigma of training. A step is step_scale sigma long."""
    sigmas = _levels(config, n_levels)
    per_level = max(1, steps // n_levels)
    return AnnealedLangevin(sigmas, per_level, (step_scale * sigmas[-1]) ** 2, clamp=config.clamp, **options)


def _predictor_corrector(config: TrainConfig, steps: int, **options: Any) -> PredictorCorrector:
    return PredictorCorrector(_levels(config, max(steps, 2)), clamp=config.clamp, **options)


def _levels(config: TrainConfig, n: int) -> list[float]:
    """Noise levels from the largest to the smallest sigma of training."""
    return geometric("levels", *noise_range(config), n)


def geometric(what: str, first: float, last: float, n: int) -> list[float]:
    """n numbers from the first to the last, each the same multiple of the one before.

    Raises:
        ValueError: n is not an int >= 2. what: of what it is the number, for the error.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"sampler.n_{what} must be an int >= 2, got {n!r}")
    return [first, *(first * (last / first) ** (i / (n - 1)) for i in range(1, n - 1)), last]


def _recovery(config: TrainConfig, steps: int) -> Draw:
    """The levels and steps of training, one after another (Gao et al. 2021)."""
    options = config.objective_options
    objective = DiffusionRecoveryLikelihood(
        options["sigmas"], options["sampler_steps"], step_scale=options.get("step_scale", 0.3), seed=0
    )
    return lambda model, n, seed: objective.sample(model, n, config.data.dim, seed=seed)


def _probability_flow(config: TrainConfig, steps: int, *, rtol: float = 1e-4, atol: float = 1e-4) -> Draw:
    """The probability-flow ODE from noise to data. Its solver chooses its steps."""
    sigma_max, sigma_min = noise_range(config)

    def draw(model: nn.Module, n: int, seed: int) -> Tensor:
        rows = torch.arange(n, device=next(model.parameters()).device)
        noise = sigma_max * normal(seed, Stream.INITIAL, rows, 0, config.data.dim, dtype=torch.float32)
        return probability_flow(model, noise, sigmas=(sigma_min, sigma_max), rtol=rtol, atol=atol)

    return draw


def _none(config: TrainConfig, steps: int) -> None:
    return None


_STEP = ("step_size", "clamp")
_LEVELS = ("sigmas", "steps_per_level", "step_size", "clamp", "levels")

SAMPLERS: Mapping[str, Entry] = {
    "langevin": Entry(
        "Langevin dynamics by drift, noise_std and cooling", _langevin, Langevin, (*_STEP, "noise_scale", "grad_clip")
    ),
    "mala": Entry("Langevin with an accept test", _mala, MALA, _STEP),
    "hmc": Entry("Hamiltonian Monte Carlo", _hmc, HMC, _STEP),
    "underdamped": Entry("Langevin with momentum", _underdamped, UnderdampedLangevin, _STEP),
    "tempering": Entry(
        "MALA at several temperatures",
        _tempering,
        ParallelTempering,
        ("sampler", "temperatures", "n_temperatures", "max_temperature", "factors", "clamp"),
    ),
    "annealed": Entry("Langevin from noise level to noise level", _annealed, AnnealedLangevin, _LEVELS),
    "predictor_corrector": Entry("reverse diffusion and Langevin", _predictor_corrector, PredictorCorrector, _LEVELS),
    "probability_flow": Entry("the probability-flow ODE, without noise", _probability_flow),
    "recovery": Entry("the chains of diffusion_recovery", _recovery),
    "none": Entry("no samples", _none),
}


def build_sampler(config: TrainConfig, steps: int) -> Any:
    """What samples a run's energy in this many steps: a ``Sampler``; or a ``Draw``; or None, for energies of pairs."""
    return built("sampler", config.sampler, SAMPLERS[config.sampler], config, steps, options=config.sampler_options)
