"""Put modules in eval mode for a while, and each submodule back in its own mode afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "reading"]

# Modules in eval mode now: the number of uses under way, and the mode to restore after the last one.
_in_use: dict[nn.Module, tuple[int, bool]] = {}
_lock = threading.Lock()


class _PerThread(threading.local):
    """The modules that an enclosing ``evaluating`` of this thread already holds in eval mode."""

    modules: frozenset[nn.Module] = frozenset()


_per_thread = _PerThread()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode: dropout is off, and spectral norm makes no power iteration. Afterwards each submodule's own mode.

    Uses may nest, and may overlap in several threads. Inside, no other code may set modes or add submodules.
    """
    before = _per_thread.modules
    if module in before:
        yield
        return
    modules = list(module.modules())
    with _lock:
        for m in modules:
            uses, mode = _in_use.get(m, (0, m.training))
            _in_use[m] = (uses + 1, mode)
            if m.training:  # setting a module's attribute is slow
                m.training = False
    _per_thread.modules = before.union(modules)
    try:
        yield
    finally:
        _per_thread.modules = before
        with _lock:
            for m in modules:
                uses, mode = _in_use.pop(m)
                if uses > 1:
                    _in_use[m] = (uses - 1, mode)
                elif m.training is not mode:
                    m.training = mode


@contextmanager
def reading(module: nn.Module) -> Iterator[None]:
    """Eval mode without a graph. In a compiled call it does nothing: no module runs there, and the operators that do
    make no graph."""
    if torch.compiler.is_compiling():
        yield
        return
    with evaluating(module), torch.no_grad():
        yield
