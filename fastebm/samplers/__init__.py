"""Samplers, one file each. A sampler is a frozen dataclass with the methods ``init`` and ``step`` (base.py).

This is the registry: every sampler imported here is public, as ``fastebm.NAME``.
"""

from .annealed import AnnealedLangevin as AnnealedLangevin
from .chees import ChEESHMC as ChEESHMC
from .hmc import HMC as HMC
from .langevin import Langevin as Langevin
from .mala import MALA as MALA
from .nuts import NUTS as NUTS
from .parallel_tempering import ParallelTempering as ParallelTempering
from .predictor_corrector import PredictorCorrector as PredictorCorrector
from .svgd import SVGD as SVGD
from .tempered_transitions import TemperedTransitions as TemperedTransitions
from .underdamped import UnderdampedLangevin as UnderdampedLangevin

__all__ = sorted(name for name in globals() if name[0].isupper())
