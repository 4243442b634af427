"""Samplers, one file each. A sampler is a frozen dataclass with the methods ``init`` and ``step`` (base.py).

This is the registry: every sampler imported here is public, as ``fastebm.NAME``.
"""

from .langevin import Langevin as Langevin
from .mala import MALA as MALA
from .parallel_tempering import ParallelTempering as ParallelTempering
from .tempered_transitions import TemperedTransitions as TemperedTransitions

__all__ = sorted(name for name in globals() if name[0].isupper())
