"""Samplers, one file each: a frozen dataclass with ``init`` and ``step`` (base.py). This is their registry: what is
imported here is public."""

from .langevin import Langevin as Langevin
from .mala import MALA as MALA

__all__ = sorted(name for name in globals() if name[0].isupper())
