"""Samplers, one file each: a frozen dataclass with ``init`` and ``step`` (base.py). Here is their registry."""

from .langevin import Langevin as Langevin
