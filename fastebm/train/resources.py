"""Before a run: which device it uses, whether it fits in memory, and how many CPU threads are fastest."""

from __future__ import annotations

import contextlib
import math
import os
from itertools import pairwise
from pathlib import Path

import torch

from ..data.dataset import Data
from ..devices import checked_device
from ..objectives import ContrastiveDivergence
from ..threads import fastest
from .recipe import TrainConfig, build_model

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
    sizes = (dim, *config.hidden_sizes, 1)
    # The weights, their gradient, Adam's two moments, their average, and a copy that is being written to disk.
    weights = 6 * sum(n_in * n_out + n_out for n_in, n_out in pairwise(sizes))
    pool, batch = 2 * config.pool_size * dim, 4 * config.batch_size * sum(sizes)
    gib, there = [4 * n / 2**30 for n in (weights, pool, batch)], _memory(device) / 2**30
    if sum(gib) > there:
        raise ValueError(
            f"training needs some {sum(gib):,.0f} GiB, and {device} has {there:,.0f}: {gib[0]:,.1f} for the weights "
            f"of hidden_sizes {config.hidden_sizes}, {gib[1]:,.1f} for a pool_size of {config.pool_size:,}, and "
            f"{gib[2]:,.1f} for a batch_size of {config.batch_size:,}: take less"
        )


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
    model = build_model(config, data.dim)
    real = data.batch(config.batch_size, config.dequantisation, torch.Generator().manual_seed(config.seed))
    objective = ContrastiveDivergence(
        config.sampler(config.langevin_steps),
        config.langevin_steps,
        reg_alpha=config.reg_alpha,
        backend=config.backend,
        on_nonfinite="ignore",
    )

    def step() -> None:
        with torch.random.fork_rng(devices=[]):  # the chains' noise is seeded from the global generator
            objective(model, real).loss.backward()

    return fastest(step, threads)
