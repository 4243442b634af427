"""The objectives of ``fastebm train --objective NAME``, each with the models that it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ..data.dataset import Data
from ..objectives import ContrastiveDivergence, Objective
from ..pool import ChainPool
from .options import Entry, built
from .samplers import build_sampler

if TYPE_CHECKING:
    from .recipe import TrainConfig

__all__ = ["OBJECTIVES", "Place", "build_objective"]


class Place(NamedTuple):
    """What an objective is built from, and where: the processes of process_group share its chains."""

    config: TrainConfig
    data: Data
    device: torch.device
    process_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class ObjectiveEntry(Entry):
    """models: names of the models that it trains, the default first. samplers: likewise, for its chains in training and
    for fresh samples. chains: whether it has chains in training. pool: whether these persist."""

    models: tuple[str, ...] = ("mlp",)
    samplers: tuple[str, ...] = ("langevin",)
    chains: bool = False
    pool: bool = False


def _chains(place: Place) -> dict[str, Any]:
    """The arguments of all objectives that draw their negatives by chains."""
    config = place.config
    return {
        "sampler": build_sampler(config, config.langevin_steps),
        "steps": config.langevin_steps,
        "reg_alpha": config.reg_alpha,
        "backend": config.backend,
        "on_nonfinite": config.on_nonfinite,
        "seed": config.seed,
    }


_CHAINS = ("sampler", "steps", "pool", "reg_alpha", "backend", "on_nonfinite", "seed")


def _pool(place: Place) -> ChainPool:
    config = place.config
    return ChainPool(
        config.pool_size,
        place.data.dim,
        clamp=config.clamp,
        seed=config.seed,
        device=place.device,
        reinit_prob=config.reinit_prob,
        process_group=place.process_group,
    )


def _cd(place: Place, **options: Any) -> Objective:
    return ContrastiveDivergence(**_chains(place), **options)


def _pcd(place: Place, **options: Any) -> Objective:
    return ContrastiveDivergence(**_chains(place), pool=_pool(place), **options)


_MOVES = ("langevin", "mala", "hmc", "underdamped")

OBJECTIVES: Mapping[str, ObjectiveEntry] = {
    "pcd": ObjectiveEntry(
        "contrastive divergence with persistent chains", _pcd, ContrastiveDivergence, _CHAINS, samplers=_MOVES,
        chains=True, pool=True,
    ),
    "cd": ObjectiveEntry(
        "contrastive divergence, with chains from the data", _cd, ContrastiveDivergence, _CHAINS, samplers=_MOVES,
        chains=True,
    ),
}  # fmt: skip


def build_objective(place: Place) -> Objective:
    """The objective of a run. Initial weights of its own are those of the seed; the global generator stays."""
    config = place.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        entry = OBJECTIVES[config.objective]
        objective: Objective = built("objective", config.objective, entry, place, options=config.objective_options)
    return objective.to(place.device)
