"""Apply a trained energy: fresh samples, energies of rows, and its landscape in the plane."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.dataset import Data
from ..data.info import DataInfo
from ..driver.info import SampleInfo
from ..driver.result import SampleResult
from ..driver.sample import sample
from ..energies import energy
from ..samplers import AnnealedLangevin, Langevin, PredictorCorrector
from ..samplers.base import Sampler, for_steps
from ..threads import survives_fork
from .models import exploding, row_energy
from .recipe import TrainConfig
from .samplers import build_sampler

__all__ = [
    "MAX_STEPS_PER_CALL",
    "energies_of",
    "features_of",
    "fresh_labels",
    "fresh_samples",
    "landscape",
    "train_energies",
]

# Rows whose energies are computed at once.
_ROWS_PER_CALL = 65536

# Fresh chains have numbers beyond those of any pool (fewer than 2**31), so that they never share its noise.
_FIRST_FRESH_CHAIN = 2**31

# Sampling is split into calls of about this many seconds, and at most this many steps, to report progress in between.
_SECONDS_PER_CALL, MAX_STEPS_PER_CALL = 0.5, 50

# Cells per side of the grid on which an energy in the plane is drawn.
_GRID = 256


@survives_fork
def fresh_samples(
    model: nn.Module,
    config: TrainConfig,
    n: int,
    *,
    dim: int,
    steps: int | None = None,
    seed: int = 0,
    backend: str | None = None,
    on_steps: Callable[[int, int], None] = lambda done, steps: None,
) -> tuple[Tensor, SampleInfo]:
    """Samples from chains that start in uniform noise, independent of the data and of the pool.

    Args:
        steps: None: config.fresh_steps. seed: of the starts and the noise. backend: None: config.backend.
        on_steps: called with the steps done and their total: first with 0, then about every half second. An exception
            raised in it ends the sampling.

    Returns:
        (n, dim) samples, and what ran.
    """
    steps = config.fresh_steps if steps is None else steps
    model = exploding(model) if config.model == "noise_conditional" else model
    sampler = build_sampler(config, steps)
    if sampler is None:
        row_energy(model, config)  # this says why there is nothing to sample
    if not isinstance(sampler, Sampler):
        on_steps(0, 1)
        x = sampler(model, n, seed)
        on_steps(1, 1)
        return x, sample(row_energy(model, config), Langevin(1.0), init=x, steps=0, seed=seed).info
    if isinstance(sampler, (AnnealedLangevin, PredictorCorrector)):
        steps = len(sampler.levels)  # type: ignore[arg-type]  # __post_init__ made it a tensor
    warmup = steps // 2 if sampler.adaptation(steps) is not None else 0  # which finds the step size
    labels = fresh_labels(config, n)

    def advance(part: Any, **options: Any) -> SampleResult:
        return sample(model, part, backend=backend or config.backend, **options)

    on_steps(0, steps)
    start = for_steps(sampler, 0, warmup)
    result = advance(
        start, input_size=dim, n_chains=n, steps=0, warmup=warmup, labels=labels, seed=seed,
        first_chain=_FIRST_FRESH_CHAIN,
    )  # fmt: skip
    sampler = result.sampler if warmup > 0 else sampler
    done, n_steps = warmup, 1
    while done < steps:
        started = time.perf_counter()
        end = min(done + n_steps, steps)
        result = advance(for_steps(sampler, done, end), init=result, steps=end - done)
        done = end
        on_steps(done, steps)
        n_steps = int(n_steps * _SECONDS_PER_CALL / (time.perf_counter() - started))
        n_steps = min(max(n_steps, 1), MAX_STEPS_PER_CALL)
    return result.x, result.info


def fresh_labels(config: TrainConfig, n: int) -> Tensor | None:
    """The classes of n fresh samples, (n,), if they are drawn by class: each in turn, so as many chains of each."""
    return torch.arange(n) % config.n_classes if config.model == "conditional" else None


def energies_of(model: nn.Module, states: Tensor) -> Tensor:
    """(n, dim) states on any device -> (n,) energies on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([energy(model, part.to(device)).cpu() for part in torch.split(states, _ROWS_PER_CALL)])


def features_of(model: nn.Module, states: Tensor) -> Tensor:
    """(n, dim) states on any device -> (n, feature_size) features of a ``PairEnergy``, on the CPU."""
    device, features = next(model.parameters()).device, cast("Any", model).features
    with torch.no_grad():
        return torch.cat([features(part.to(device)).cpu() for part in torch.split(states, _ROWS_PER_CALL)])


def train_energies(model: nn.Module, data: Data) -> NDArray[np.float32]:
    """Energies of the training rows, sorted: (n_train,)."""
    return np.sort(energies_of(model, data.states).float().numpy())


def landscape(model: nn.Module, info: DataInfo) -> tuple[NDArray[Any], NDArray[Any]]:
    """An energy in the plane, on a grid over the box of the chains, in the units of the data.

    Returns:
        (n + 1, 2) edges of the cells in x and in y, and (n, n) energies at their centres, y first.
    """
    edges = torch.linspace(*info.clamp, _GRID + 1, dtype=torch.float64)
    centres = 0.5 * (edges[1:] + edges[:-1])
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    states = torch.stack([x, y], -1).reshape(-1, 2).float()
    e = energies_of(model, states)
    return info.to_data(torch.stack([edges, edges], 1)), e.reshape(_GRID, _GRID).numpy()
