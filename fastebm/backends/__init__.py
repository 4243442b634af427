"""Backends: ways to run K steps of a sampler on many chains.

reference.py    the definition of correct: any sampler on any target, in plain PyTorch
tiles.py        any sampler on an MLP energy, on tiles of chains shared by threads
cpu.py          a CPU's fast path: library products and autograd, and Numba's kernels for all else
fused.py        the fused Triton kernel for MLP energies, and the fused update for all others
table.py        which of these serves which sampler and target
choose.py       which of them runs, and why not the fused one
settle.py       chains that are not finite
graphs.py       a step recorded as a CUDA graph and replayed
op.py           a whole call as one operator of torch.library; compiling.py: what a compiled call does with it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LANGEVIN_TELEMETRY", "Advanced", "Chains", "averaged"]


class Chains(NamedTuple):
    """The chains of a run, and where each stands in the noise's counter.

    x: (n_chains, dim) states. seed: 64 bits, an int or a (1,) int64 tensor. numbers, first_steps: (n_chains,) int64
    global chain numbers and lifetime steps. labels: (n_chains,) int64, or None. frozen: (1 or n_chains, dim) bool,
    coordinates that stay, or None. condition: (n_chains, ...), in place of labels, or None: not for closed forms.
    """

    x: Tensor
    seed: int | Tensor
    numbers: Tensor
    first_steps: Tensor
    labels: Tensor | None = None
    frozen: Tensor | None = None
    condition: Tensor | None = None

    @property
    def kind(self) -> str:
        """The keyword of ``given``: "labels" or "condition"."""
        return "condition" if self.labels is None else "labels"

    @property
    def given(self) -> Tensor | None:
        """What the energy is given beside x: the labels, the condition, or None."""
        return self.condition if self.labels is None else self.labels

    def rows(self, rows: slice | Tensor) -> Chains:
        """Some of the chains: views for a slice."""
        frozen = self.frozen
        return Chains(
            self.x[rows],
            self.seed,
            self.numbers[rows],
            self.first_steps[rows],
            None if self.labels is None else self.labels[rows],
            frozen if frozen is None or len(frozen) == 1 else frozen[rows],
            None if self.condition is None else self.condition[rows],
        )


# Rows of the tables that the kernels of Langevin steps fill in.
LANGEVIN_TELEMETRY = ("grad_norm", "clipped", "clamped")


def averaged(table: Tensor, steps: int) -> dict[str, Tensor]:
    """Telemetry of Langevin steps by name, from a (3, n_chains) table of the last norm and of two counts of steps."""
    norm, clipped, clamped = table
    norm = norm.fill_(torch.nan) if steps == 0 else norm
    return dict(zip(LANGEVIN_TELEMETRY, (norm, clipped / max(steps, 1), clamped / max(steps, 1)), strict=True))


class Advanced(NamedTuple):
    """What a run returns.

    x: (n_chains, dim) last finite states. energy: (n_chains,) E at x. first_bad: (n_chains,) int32, the first
    step of this call whose new state was not finite, before the clamp; -1 if all were. trajectory: (n_chains,
    steps // thin, dim) states after every thin-th step, if thin > 0 was asked for. telemetry: (n_chains,) numbers by
    name, if asked for: what the sampler's ``Info`` names. cuda_graph: "recorded", or why no step was, in words, if that
    was asked for. report: one number on the device, not 0 if any chain is not finite (first_bad or energy), from
    backends that have it.
    """

    x: Tensor
    energy: Tensor
    first_bad: Tensor
    trajectory: Tensor | None = None
    telemetry: Mapping[str, Tensor] | None = None
    cuda_graph: str | None = None
    report: Tensor | None = None

    @classmethod
    def blank(cls, x: Tensor, steps: int, thin: int) -> Advanced:
        """To be filled in: x itself, no energy yet, and no chain that was bad."""
        n_chains, dim = x.shape
        return cls(
            x,
            x.new_empty(n_chains),
            torch.full((n_chains,), -1, dtype=torch.int32, device=x.device),
            x.new_empty(n_chains, steps // thin, dim) if thin else None,
        )
