"""An MLP energy as samplers see it, by a Triton kernel: one launch for energy and gradient of all states."""

from __future__ import annotations

from copy import copy
from functools import partial

import torch
from torch import Tensor

from ..kernels.triton import evaluate
from ..kernels.triton.launch import Launch
from ..targets.closed_form import repeated_labels
from ..targets.description import Description
from . import Chains
from .fused import CHAINS_AT_ONCE, aligned, compiled_for, prepare, slopes_scratch

__all__ = ["Evaluation"]


class Evaluation:
    """A ``Target`` (targets/base.py) for an MLP energy and the states of one call, for which it copies the weights.

    The results of a state do not depend on the other states.

    Args:
        chains: their device and labels.
        precision, launch: as ``Choice`` has them.
    """

    def __init__(self, description: Description, chains: Chains, *, precision: str, launch: Launch) -> None:
        x, self.labels, self.launch = chains.x, chains.labels, launch
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            self.prepared, places = prepare(description, 0, precision, launch, x.device)
        self.constants = {**places, **compiled_for(description, launch, precision), "OWN_CHAINS": launch.own_chains}
        if launch.regime == "streaming":
            self.constants |= {"IN_MEMORY": launch.in_memory, "LEAN": launch.lean}
        else:
            self.constants["BOTH_ORDERS"] = launch.both_orders
        self.scratch = partial(slopes_scratch, description, launch, precision, x.device)

    def value(self, x: Tensor) -> Tensor:
        """E(x), (n,)."""
        energy = x.new_empty(len(x))
        self._launch(energy, None, x)
        return energy

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx, (n, dim)."""
        gradient = x.new_empty(x.shape)
        self._launch(None, gradient, x)
        return gradient

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and dE/dx."""
        energy, gradient = x.new_empty(len(x)), x.new_empty(x.shape)
        self._launch(energy, gradient, x)
        return energy, gradient

    def repeated(self, k: int) -> Evaluation:
        """The energy of k copies of each chain."""
        copies = copy(self)
        copies.labels = repeated_labels(self.labels, k)
        return copies

    def _launch(self, energy: Tensor | None, gradient: Tensor | None, x: Tensor) -> None:
        """Write the energies, (n,), the gradients, (n, dim), or both."""
        block_chains = self.launch.block_chains
        n_tiles = -(-len(x) // block_chains)
        if n_tiles == 0:
            return
        given = energy, gradient, aligned(x), self.labels, self.prepared, len(x)
        # Triton launches on the current device, which may not be x's.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            if self.launch.regime == "resident":
                evaluate.evaluate_resident[(n_tiles,)](*given, **self.constants)
                return
            at_once = min(n_tiles, CHAINS_AT_ONCE // block_chains)
            slopes = None if gradient is None else self.scratch(at_once * block_chains)
            for first in range(0, n_tiles, at_once):
                evaluate.evaluate_streaming[(min(at_once, n_tiles - first),)](*given, first, slopes, **self.constants)
