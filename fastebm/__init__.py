"""fastebm: fast Langevin sampling and training of energy-based models in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.choose import why_not_fused as why_not_fused
    from .backends.settle import NonFiniteError as NonFiniteError
    from .diagnostics.diagnose import Diagnosis as Diagnosis
    from .diagnostics.diagnose import diagnose as diagnose
    from .driver.info import SampleInfo as SampleInfo
    from .driver.langevin_sample import langevin_sample as langevin_sample
    from .driver.result import SampleResult as SampleResult
    from .driver.sample import sample as sample
    from .energies import Activation as Activation
    from .energies import ClassConditionalEnergy as ClassConditionalEnergy
    from .energies import ClassifierEnergy as ClassifierEnergy
    from .energies import ConvEnergy as ConvEnergy
    from .energies import GaussianEnergy as GaussianEnergy
    from .energies import MLPEnergy as MLPEnergy
    from .energies import Negative as Negative
    from .energies import NoiseConditionalEnergy as NoiseConditionalEnergy
    from .energies import PairEnergy as PairEnergy
    from .energies import ResNetEnergy as ResNetEnergy
    from .energies import SumEnergy as SumEnergy
    from .energies import build as build
    from .energies import build_energy_fn as build_energy_fn
    from .energies import energy as energy
    from .estimates import FlowLikelihood as FlowLikelihood
    from .estimates import LogPartition as LogPartition
    from .estimates import flow_likelihood as flow_likelihood
    from .estimates import log_likelihood as log_likelihood
    from .estimates import log_partition as log_partition
    from .estimates import probability_flow as probability_flow
    from .objectives import *  # noqa: F403
    from .pool import ChainPool as ChainPool
    from .pool import PoolCall as PoolCall
    from .pool import PoolStats as PoolStats
    from .samplers import *  # noqa: F403
    from .train.scoring import TrainedRun as TrainedRun
    from .train.scoring import load as load
    from .train.trainer import Trainer as Trainer

__version__ = "0.1.0"

# Public names by the module that defines them. The packages samplers and objectives list their own public names in
# their __init__.py.
_PUBLIC = {
    "backends.choose": ["why_not_fused"],
    "backends.settle": ["NonFiniteError"],
    "diagnostics.diagnose": ["Diagnosis", "diagnose"],
    "driver.info": ["SampleInfo"],
    "driver.langevin_sample": ["langevin_sample"],
    "driver.result": ["SampleResult"],
    "driver.sample": ["sample"],
    "energies": [
        "Activation", "ClassConditionalEnergy", "ClassifierEnergy", "ConvEnergy", "GaussianEnergy", "MLPEnergy",
        "Negative", "NoiseConditionalEnergy", "PairEnergy", "ResNetEnergy", "SumEnergy", "build", "build_energy_fn",
        "energy",
    ],
    "estimates": [
        "FlowLikelihood", "LogPartition", "flow_likelihood", "log_likelihood", "log_partition", "probability_flow",
    ],
    "pool": ["ChainPool", "PoolCall", "PoolStats"],
    "train.scoring": ["TrainedRun", "load"],
    "train.trainer": ["Trainer"],
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name or a submodule at its first use.

    Importing PyTorch takes seconds, and the command must react to Ctrl-C before that (``__main__``).
    """
    if name == "__all__":
        return sorted([*(public for names in _PUBLIC.values() for public in names), *_registered()])
    home = next((home for home, names in _PUBLIC.items() if name in names), None)
    if home is not None:
        globals()[name] = found = getattr(import_module(f".{home}", __name__), name)
        return found
    if not name.startswith("_"):
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        if (home := _registered().get(name)) is not None:
            globals()[name] = found = getattr(import_module(f".{home}", __name__), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _registered() -> dict[str, str]:
    """The public names of the packages samplers and objectives, each with its package."""
    return {name: home for home in ("samplers", "objectives") for name in import_module(f".{home}", __name__).__all__}


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
