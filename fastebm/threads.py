"""PyTorch's threads: how many an operation may use."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["survives_fork", "threads"]

_Function = TypeVar("_Function", bound=Callable[..., object])

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Operations within use n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def survives_fork(function: _Function) -> _Function:
    """In a process that was forked, on one thread: OpenMP's do not survive, and an operation would wait for them for
    ever. (PyTorch's own operations do.)"""

    @functools.wraps(function)
    def call(*arguments: object, **options: object) -> object:
        # torch.compile can't trace a change of threads
        if not _forked or torch.compiler.is_compiling():
            return function(*arguments, **options)
        with threads(1):
            return function(*arguments, **options)

    return call  # type: ignore[return-value]
