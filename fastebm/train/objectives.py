"""The objectives of ``fastebm train --objective NAME``, each with the models that it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ..data.dataset import Data
from ..energies import MLPEnergy
from ..objectives import (
    JEM,
    ContrastiveDivergence,
    CooperativeTraining,
    CouplingFlow,
    DenoisingScoreMatching,
    DiffusionRecoveryLikelihood,
    EnergyDiscrepancy,
    ExactScoreMatching,
    FlowContrastiveEstimation,
    GaussianNoise,
    HingeLoss,
    InfoNCE,
    MixtureNoise,
    MultiLevelDenoisingScoreMatching,
    NoiseContrastiveEstimation,
    NoiseDistribution,
    Objective,
    RandomAffine,
    RankingNoiseContrastiveEstimation,
    SlicedScoreMatching,
    UniformNoise,
    VariancePreservingScoreMatching,
)
from ..pool import ChainPool
from .options import Entry, built, options_of
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
    for fresh samples. chains: whether it has chains in training. pool: whether these persist. negatives: the
    option that says how many negatives a row of data has. None: one."""

    models: tuple[str, ...] = ("mlp",)
    samplers: tuple[str, ...] = ("langevin",)
    chains: bool = False
    pool: bool = False
    negatives: str | None = None

    def rows(self, options: Mapping[str, Any]) -> int:
        """States whose energies are computed for each row of data."""
        if self.negatives is None:
            return 2
        n = options.get(self.negatives, options_of(self)[self.negatives].default)
        return 1 + n if isinstance(n, int) else 2  # the objective itself will refuse it


def _chains(place: Place) -> dict[str, Any]:
    """The arguments of all objectives that draw their negatives by chains."""
    config = place.config
    return {
        "sampler": build_sampler(config, config.langevin_steps),
        "steps": config.langevin_steps,
        "backend": config.backend,
        "on_nonfinite": config.on_nonfinite,
        "seed": config.seed,
    }


# What ``_chains`` and the settings of a run say.
_CHAINS = ("sampler", "steps", "pool", "reg_alpha", "backend", "on_nonfinite", "clamp", "seed", "generator")


def _pool(place: Place) -> ChainPool:
    """Persistent chains. Those of a class-conditional energy have classes, in the shares of the data."""
    config, labels = place.config, None
    if config.model == "conditional" and place.data.classes is not None:
        labels = place.data.classes[torch.arange(config.pool_size) % len(place.data.classes)]
    return ChainPool(
        config.pool_size,
        place.data.dim,
        clamp=config.clamp,
        seed=config.seed,
        device=place.device,
        reinit_prob=config.reinit_prob,
        labels=labels,
        process_group=place.process_group,
    )


def _cd(place: Place, **options: Any) -> Objective:
    return ContrastiveDivergence(
        **_chains(place), reg_alpha=place.config.reg_alpha, clamp=place.config.clamp, **options
    )


def _pcd(place: Place, **options: Any) -> Objective:
    return ContrastiveDivergence(**_chains(place), reg_alpha=place.config.reg_alpha, pool=_pool(place), **options)


def _hinge(place: Place, **options: Any) -> Objective:
    if place.process_group is not None:
        raise ValueError("the objective hinge pairs each row with a chain: train it by one process, without torchrun")
    return HingeLoss(**_chains(place), pool=_pool(place), **options)


def _jem(place: Place, **options: Any) -> Objective:
    return JEM(**_chains(place), reg_alpha=place.config.reg_alpha, pool=_pool(place), **options)


def _cooperative(
    place: Place, *, latent_dim: int = 8, generator_sizes: Sequence[int] = (128, 128), **options: Any
) -> Objective:
    generator = MLPEnergy(latent_dim, generator_sizes, place.config.activation, outputs=place.data.dim)
    return CooperativeTraining(
        generator, **_chains(place), reg_alpha=place.config.reg_alpha, clamp=place.config.clamp, latent_dim=latent_dim,
        **options,
    )  # fmt: skip


def _recovery(place: Place, **options: Any) -> Objective:
    config = place.config
    return DiffusionRecoveryLikelihood(
        reg_alpha=config.reg_alpha, on_nonfinite=config.on_nonfinite, seed=config.seed, **options
    )


def _noise(place: Place, noise: str, n_components: int, reg_covar: float) -> NoiseDistribution:
    """Noise of a known density, fitted to the data."""
    states = place.data.states
    if noise == "gaussian":
        return GaussianNoise.fit(states, reg_covar=reg_covar)
    if noise == "mixture":
        return MixtureNoise.fit(states, n_components, reg_covar=reg_covar, seed=place.config.seed % 2**32)
    if noise == "uniform":
        lo, hi = place.data.info.clamp
        return UniformNoise(torch.full((place.data.dim,), lo), torch.full((place.data.dim,), hi))
    raise ValueError(f"objective.noise must be gaussian, mixture or uniform, got {noise!r}")


def _nce(
    place: Place, *, noise: str = "mixture", n_components: int = 10, reg_covar: float = 1e-3, **options: Any
) -> Objective:
    found = _noise(place, noise, n_components, reg_covar)
    return NoiseContrastiveEstimation(found, seed=place.config.seed, **options)


def _ranking_nce(
    place: Place, *, noise: str = "mixture", n_components: int = 10, reg_covar: float = 1e-3, **options: Any
) -> Objective:
    found = _noise(place, noise, n_components, reg_covar)
    return RankingNoiseContrastiveEstimation(found, seed=place.config.seed, **options)


def _flow_contrastive(place: Place, **options: Any) -> Objective:
    states = place.data.states
    # A pixel that is always white has no spread of its own.
    flow = CouplingFlow(states.mean(0), states.std(0).clamp(min=0.05 * float(states.std())), **options)
    return FlowContrastiveEstimation(flow, seed=place.config.seed)


def _infonce(place: Place, **options: Any) -> Objective:
    info = place.data.info
    augment = RandomAffine(info.shape) if info.kind == "images" else None
    return InfoNCE(augment=augment, seed=place.config.seed, **options)


def _esm(place: Place, **options: Any) -> Objective:
    ExactScoreMatching.check_dim(place.data.dim)
    return ExactScoreMatching(seed=place.config.seed, **options)


def _seeded(make: Callable[..., Objective]) -> Callable[..., Objective]:
    """An objective that needs nothing of the run but its seed."""
    return lambda place, **options: make(seed=place.config.seed, **options)


_PLAIN = ("mlp", "conv", "resnet", "conditional")
_MOVES = ("langevin", "mala", "hmc", "underdamped")
_OF_NOISE = ("annealed", "predictor_corrector", "probability_flow")
_FRESH = ("hmc", "mala", "langevin", "underdamped", "tempering")


def _with_chains(words: str, build: Callable[..., Objective], of: Any, **options: Any) -> ObjectiveEntry:
    return ObjectiveEntry(
        words, build, of, _CHAINS, **{"models": _PLAIN, "samplers": _MOVES, "chains": True, **options}
    )


def _without(words: str, build: Callable[..., Objective], of: Any, **options: Any) -> ObjectiveEntry:
    return ObjectiveEntry(
        words, build, of, ("noise", "augment", "sigma_0", "seed"), **{"models": _PLAIN, "samplers": _FRESH, **options}
    )


OBJECTIVES: Mapping[str, ObjectiveEntry] = {
    "pcd": _with_chains("contrastive divergence with persistent chains", _pcd, ContrastiveDivergence, pool=True),
    "cd": _with_chains("contrastive divergence, chains from the data", _cd, ContrastiveDivergence),
    "hinge": _with_chains("margin between data and chains", _hinge, HingeLoss, pool=True),
    "jem": _with_chains("classifier and density of its inputs", _jem, JEM, models=("classifier",), pool=True),
    "cooperative": _with_chains("with a generator that starts the chains", _cooperative, CooperativeTraining),
    "diffusion_recovery": ObjectiveEntry(
        "recovery of data from more noise", _recovery, DiffusionRecoveryLikelihood,
        ("reg_alpha", "on_nonfinite", "seed"), models=("noise_conditional",), samplers=("recovery",),
    ),
    "dsm": _without("denoising score matching", _seeded(DenoisingScoreMatching), DenoisingScoreMatching),
    "multi_dsm": _without(
        "denoising at several noise levels", _seeded(MultiLevelDenoisingScoreMatching),
        MultiLevelDenoisingScoreMatching, models=("noise_conditional",), samplers=_OF_NOISE,
    ),
    "vp_dsm": _without(
        "denoising along a variance-preserving diffusion", _seeded(VariancePreservingScoreMatching),
        VariancePreservingScoreMatching, models=("noise_conditional",), samplers=_OF_NOISE,
    ),
    "ssm": _without("sliced score matching", _seeded(SlicedScoreMatching), SlicedScoreMatching),
    "esm": _without("exact score matching, in few dims", _esm, ExactScoreMatching),
    "energy_discrepancy": _without(
        "data against perturbed data", _seeded(EnergyDiscrepancy), EnergyDiscrepancy, negatives="n_negatives"
    ),
    "nce": _without("data against noise, with log Z", _nce, NoiseContrastiveEstimation, negatives="noise_ratio"),
    "ranking_nce": _without(
        "each row against its noise", _ranking_nce, RankingNoiseContrastiveEstimation, negatives="n_noise"
    ),
    "flow_contrastive": ObjectiveEntry(
        "data against a flow that learns too", _flow_contrastive, CouplingFlow, ("mean", "std"), _PLAIN[:3], _FRESH
    ),
    "infonce": _without(
        "features by which a row is found again", _infonce, InfoNCE, models=("pair",), samplers=("none",)
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
