"""fastebm: fast Langevin sampling and training of energy-based models in PyTorch."""

from .backends.choose import why_not_fused
from .energies import ClassifierEnergy, GaussianEnergy, MLPEnergy, Negative, SumEnergy, build, build_energy_fn, energy
from .langevin import Langevin
from .mlp import Activation
from .objectives import contrastive_divergence_loss
from .pool import ChainPool, PoolCall, PoolStats
from .sampling import NonFiniteError, SampleInfo, langevin_sample

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "ChainPool",
    "ClassifierEnergy",
    "GaussianEnergy",
    "Langevin",
    "MLPEnergy",
    "Negative",
    "NonFiniteError",
    "PoolCall",
    "PoolStats",
    "SampleInfo",
    "SumEnergy",
    "build",
    "build_energy_fn",
    "contrastive_divergence_loss",
    "energy",
    "langevin_sample",
    "why_not_fused",
]
