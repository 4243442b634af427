"""Pools of persistent chains: ``ChainPool``."""

from .pool import ChainPool, PoolCall, PoolStats

__all__ = ["ChainPool", "PoolCall", "PoolStats"]
