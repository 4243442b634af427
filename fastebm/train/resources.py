"""Before a run: which device it uses, whether it fits in memory, and how many CPU threads are fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import torch
from torch import nn

from ..data.dataset import Data
from ..devices import checked_device
from ..threads import fastest
from .models import build_model
from .objectives import OBJECTIVES, Place, build_objective
from .recipe import TrainConfig

__all__ = ["check_memory", "resolve_device", "seconds_of_a_step"]


def resolve_device(name: str) -> torch.device:
    """The device with this name; "auto" is a GPU if there is one.

    Raises:
        ValueError: this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = checked_device(name)
    if device.type == "meta":
        raise ValueError("device 'meta' holds no values: name another")
    return device


def check_memory(config: TrainConfig, dim: int, device: torch.device) -> None:
    """Refuse a run that can't fit in memory. Later, the system would end the process without a word.

    Raises:
        ValueError: it says what takes how much.
    """
    with torch.device("meta"):
        model = build_model(config)
    # The weights, their gradient, Adam's two moments, their average, and a copy that is being written to disk.
    weights = 6 * sum(p.numel() for p in model.parameters())
    objective = OBJECTIVES[config.objective]
    pool = 2 * config.pool_size * dim * objective.pool
    # Of data and negatives, and the gradients of all numbers.
    batch = 2 * objective.rows(config.objective_options) * config.batch_size * _numbers_per_row(model, config, dim)
    gib, there = [4 * n / 2**30 for n in (weights, pool, batch)], _memory(device) / 2**30
    if sum(gib) > there:
        raise ValueError(
            f"training needs some {sum(gib):,.0f} GiB, and {device} has {there:,.0f}: {gib[0]:,.1f} for the weights "
            f"of the {config.model} (hidden_sizes {config.hidden_sizes}), {gib[1]:,.1f} for a pool_size of "
            f"{config.pool_size:,}, and {gib[2]:,.1f} for a batch_size of {config.batch_size:,}: take less"
        )


def _numbers_per_row(model: nn.Module, config: TrainConfig, dim: int) -> int:
    """Numbers that the layers of a model compute for one row, and the row's own. model: without values."""
    sizes = [dim]
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [leaf.register_forward_hook(lambda _, __, out: sizes.append(out.numel())) for leaf in leaves]
    x = torch.empty(1, dim, device="meta")
    conditions = {"noise_conditional": (x[:, 0],), "pair": (x,)}
    model(x, *conditions.get(config.model, ()))
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def _memory(device: torch.device) -> float:
    """Bytes that a device has, or that this process may use; inf if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    known = [math.inf]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit_of_container in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):
            known.append(int(Path(limit_of_container).read_text()))
    return min(known)


def seconds_of_a_step(config: TrainConfig, data: Data, threads: int) -> dict[int, float]:
    """Seconds of a training step on the CPU, by number of threads up to this, the best first (``threads.fastest``).

    The steps train a model of their own, so a run is not affected.
    """
    model, device = build_model(config), torch.device("cpu")
    # A small pool is as fast as a large one. Chains that explode are the run's business.
    small = dataclasses.replace(config, pool_size=config.batch_size, on_nonfinite="reinit")
    objective = build_objective(Place(small, data, device))
    real, labels = data.batch(config.batch_size, config.dequantisation, torch.Generator().manual_seed(config.seed))

    def step() -> None:
        objective(model, real, labels=labels if config.n_classes > 0 else None).loss.backward()

    return fastest(step, threads)
