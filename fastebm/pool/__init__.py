"""Persistent chains."""

from .pool import ChainPool, PoolCall, PoolStats

__all__ = ["ChainPool", "PoolCall", "PoolStats"]
