"""Backends: ways to advance chains by K Langevin steps. Each module has one function ``advance``.

reference.py    the definition of correct: plain PyTorch, autograd, any energy
torch_tiles.py  the fast pure-PyTorch path for MLP energies
fused.py        the fused Triton kernel for MLP energies, and the fused update for all others
choose.py       which of them runs, and why not the fused one
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Advanced"]


class Advanced(NamedTuple):
    """What ``advance`` returns.

    x: (n_chains, dim) last finite states. energy: (n_chains,) E at x. first_bad: (n_chains,) int32, the first
    step of this call whose new state was not finite, before the clamp; -1 if all were.
    """

    x: Tensor
    energy: Tensor
    first_bad: Tensor
