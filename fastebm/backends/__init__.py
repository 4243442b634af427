"""Backends: ways to advance chains by K Langevin steps. Each module has one function ``advance``.

reference.py    the definition of correct: plain PyTorch, autograd, any energy
cpu.py          the fast path on a CPU: library products and autograd, and Numba's kernels for all else
torch_tiles.py  the closed-form gradient of MLP energies in plain PyTorch, where those do not run
fused.py        the fused Triton kernel for MLP energies, and the fused update for all others
choose.py       which of them runs, and why not the fused one
run.py          the start, an MLP energy on the path that was chosen, and chains that are not finite
graphs.py       a step recorded as a CUDA graph and replayed
op.py           all of a call as one operator of torch.library; compiling.py: what a compiled call does with it
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Advanced", "Chains", "Telemetry"]


class Chains(NamedTuple):
    """What ``advance`` moves, and where each chain stands in the noise's counter.

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
        """Of ``beside``: "labels" or "condition", the word that it was given by."""
        return "condition" if self.labels is None else "labels"

    @property
    def beside(self) -> Tensor | None:
        """What the energy takes beside x."""
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


class Telemetry(NamedTuple):
    """What happened to each chain, all (n_chains,).

    grad_norm: |dE/dx| before clips, over the coordinates that are not frozen, where the last step took it.
    clipped, clamped: the fraction of steps in which a clip changed the gradient, or the clamp the state (with
    noise_first: the clamp after the gradient).
    """

    grad_norm: Tensor
    clipped: Tensor
    clamped: Tensor

    def averaged(self, steps: int) -> None:
        """In place: numbers of steps become fractions of them, and after none there is no norm."""
        if steps == 0:
            self.grad_norm.fill_(torch.nan)
        self.clipped.div_(max(steps, 1))
        self.clamped.div_(max(steps, 1))


class Advanced(NamedTuple):
    """What ``advance`` returns.

    x: (n_chains, dim) last finite states. energy: (n_chains,) E at x. first_bad: (n_chains,) int32, the first
    step of this call whose new state was not finite, before the clamp; -1 if all were. trajectory: (n_chains,
    steps // thin, dim) states after every thin-th step, if thin > 0 was asked for. telemetry: if asked for.
    cuda_graph: "recorded", or why no step was, in words, if that was asked for. report: one number on the device, not 0
    if any chain is not finite (first_bad or energy), from backends that tell.
    """

    x: Tensor
    energy: Tensor
    first_bad: Tensor
    trajectory: Tensor | None = None
    telemetry: Telemetry | None = None
    cuda_graph: str | None = None
    report: Tensor | None = None

    @classmethod
    def blank(cls, x: Tensor, steps: int, thin: int, telemetry: bool) -> Advanced:
        """To be filled in: of chains x, that are moved in place, no energy is known and none was bad."""
        n_chains, dim = x.shape
        return cls(
            x,
            x.new_empty(n_chains),
            torch.full((n_chains,), -1, dtype=torch.int32, device=x.device),
            x.new_empty(n_chains, steps // thin, dim) if thin else None,
            Telemetry(*x.new_zeros(3, n_chains)) if telemetry else None,
        )
