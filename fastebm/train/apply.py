"""Apply a trained energy: fresh samples, energies of rows, and its landscape in the plane."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.dataset import Data, Images
from ..data.info import DataInfo
from ..driver.info import SampleInfo
from ..driver.langevin_sample import langevin_sample
from ..energies import energy
from ..threads import survives_fork
from .recipe import TrainConfig

__all__ = ["MAX_STEPS_PER_CALL", "energies_of", "fresh_samples", "landscape", "train_energies"]

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
    sampler = config.sampler(steps)

    def advance(**options: Any) -> tuple[Tensor, SampleInfo]:
        return langevin_sample(  # type: ignore[return-value]
            model,
            step_size=sampler.step_size,
            grad_clip=sampler.grad_clip,
            clamp=sampler.clamp,
            seed=seed,
            first_chain=_FIRST_FRESH_CHAIN,
            backend=backend or config.backend,
            return_info=True,
            **options,
        )

    x, info = advance(input_size=dim, batch_size=n, steps=0)
    done, n_steps = 0, 1
    on_steps(done, steps)
    while done < steps:
        started = time.perf_counter()
        noise_scale = sampler.noise_scale[done : done + n_steps]  # type: ignore[index]
        x, info = advance(init=x, steps=len(noise_scale), noise_scale=noise_scale, first_step=done)
        done += len(noise_scale)
        on_steps(done, steps)
        n_steps = int(n_steps * _SECONDS_PER_CALL / (time.perf_counter() - started))
        n_steps = min(max(n_steps, 1), MAX_STEPS_PER_CALL)
    return x, info


def energies_of(model: nn.Module, states: Tensor) -> Tensor:
    """(n, dim) states on any device -> (n,) energies on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([energy(model, part.to(device)).cpu() for part in torch.split(states, _ROWS_PER_CALL)])


def train_energies(model: nn.Module, data: Data) -> NDArray[np.float32]:
    """Energies of the training rows, sorted: (n_train,)."""
    states = data.train / data.levels if isinstance(data, Images) else data.train
    return np.sort(energies_of(model, states).float().numpy())


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
