"""fastebm: fast Langevin sampling and training of energy-based models in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.choose import why_not_fused
    from .driver.sampling import NonFiniteError, SampleInfo, langevin_sample
    from .energies import (
        Activation,
        ClassifierEnergy,
        GaussianEnergy,
        MLPEnergy,
        Negative,
        SumEnergy,
        build,
        build_energy_fn,
        energy,
    )
    from .objectives import ContrastiveDivergence, Loss, contrastive_divergence_loss
    from .pool import ChainPool, PoolCall, PoolStats
    from .samplers.langevin import Langevin
    from .train.scoring import TrainedRun, load

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "ChainPool",
    "ClassifierEnergy",
    "ContrastiveDivergence",
    "GaussianEnergy",
    "Langevin",
    "Loss",
    "MLPEnergy",
    "Negative",
    "NonFiniteError",
    "PoolCall",
    "PoolStats",
    "SampleInfo",
    "SumEnergy",
    "TrainedRun",
    "build",
    "build_energy_fn",
    "contrastive_divergence_loss",
    "energy",
    "langevin_sample",
    "load",
    "why_not_fused",
]

_HOMES = ("energies", "samplers.langevin", "backends.choose", "driver.sampling", "pool", "objectives", "train.scoring")


def __getattr__(name: str) -> Any:
    """A public name, or a module, at its first use: they bring PyTorch, which takes seconds, and the command has
    something to do before that (``__main__``)."""
    if name in __all__:
        for module in (import_module(f".{home}", __name__) for home in _HOMES):
            if name in module.__all__:
                globals()[name] = found = getattr(module, name)
                return found
    elif not name.startswith("_"):
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
