"""Backends: the ways to run K steps of a sampler on many chains.

reference.py    the definition of correct: any sampler on any target, in plain PyTorch
tiles.py        any sampler on an MLP energy, on tiles of chains, one CPU thread per tile
cpu.py          the fast path on a CPU: matrix products or autograd for gradients, Numba kernels for the rest
collapsed.py    samplers in the first layer of an MLP energy
cpu_collapsed.py  the same on a CPU, by Numba kernels
marginal.py     Langevin with its noise in the first layer
cpu_mlp.py      the calls of an MLP's gradient, for cpu.py
blas.py         matrix products as calls of BLAS, for cpu_mlp.py
fused.py        the Triton kernels: all steps in one launch for MLP energies, a fused update for other energies
fused_hmc.py    HMC and MALA of an MLP energy by a Triton kernel, all steps in one launch
evaluation.py   any sampler on an MLP energy that a Triton kernel evaluates
table.py        runs a sampler on a target by the fastest of these
choose.py       chooses the backend, and explains why the fused kernel does not run
settle.py       raises for chains that are not finite, or reinitialises them
graphs.py       records a step as a CUDA graph and replays it
op.py           a whole call as one torch.library operator
compiling.py    langevin_sample under torch.compile, by that operator
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LANGEVIN_TELEMETRY", "Advanced", "Chains", "averaged"]


class Chains(NamedTuple):
    """The chains of a run: their states, and the numbers that determine their noise.

    x: (n_chains, dim) states.
    seed: 64 bits, an int or a (1,) int64 tensor.
    numbers: (n_chains,) int64 global chain numbers.
    first_steps: (n_chains,) int64 lifetime step numbers of the first step.
    labels: (n_chains,) int64, or None.
    frozen: (1 or n_chains, dim) bool, True at coordinates that stay, or None.
    condition: (n_chains, ...) in place of labels, or None. Only autograd's gradient supports it.
    carried: what the sampler's state has besides x, by name: tensors with one row per chain. None: a fresh start.
    stopped: (n_chains,) bool, chains that stopped before, which others must not see move. None: none. (Runs of samplers
    whose chains are independent may move them: the driver puts them back.)
    """

    x: Tensor
    seed: int | Tensor
    numbers: Tensor
    first_steps: Tensor
    labels: Tensor | None = None
    frozen: Tensor | None = None
    condition: Tensor | None = None
    carried: Mapping[str, Tensor] | None = None
    stopped: Tensor | None = None

    @property
    def kind(self) -> str:
        """The keyword of ``labels_or_condition``: "labels" or "condition"."""
        return "condition" if self.labels is None else "labels"

    @property
    def labels_or_condition(self) -> Tensor | None:
        """The energy's argument besides x: the labels, the condition, or None."""
        return self.condition if self.labels is None else self.labels

    def rows(self, rows: slice | Tensor) -> Chains:
        """A subset of the chains. For a slice, the tensors are views."""
        frozen = self.frozen
        return Chains(
            self.x[rows],
            self.seed,
            self.numbers[rows],
            self.first_steps[rows],
            None if self.labels is None else self.labels[rows],
            frozen if frozen is None or len(frozen) == 1 else frozen[rows],
            None if self.condition is None else self.condition[rows],
            None if self.carried is None else {name: value[rows] for name, value in self.carried.items()},
            None if self.stopped is None else self.stopped[rows],
        )


# Rows of the (3, n_chains) telemetry table that the Langevin kernels fill in.
LANGEVIN_TELEMETRY = ("grad_norm", "clipped", "clamped")


def averaged(table: Tensor, steps: int) -> dict[str, Tensor]:
    """Langevin telemetry by name, from a (3, n_chains) table: the last gradient norm, and two counts of steps."""
    norm, clipped, clamped = table
    norm = norm.fill_(torch.nan) if steps == 0 else norm
    return dict(zip(LANGEVIN_TELEMETRY, (norm, clipped / max(steps, 1), clamped / max(steps, 1)), strict=True))


class Advanced(NamedTuple):
    """The result of a run.

    x: (n_chains, dim) last finite states.
    energy: (n_chains,) E at x.
    first_bad: (n_chains,) int32, the first step of this call whose new state was not finite before its clamp; -1: none.
    trajectory: (n_chains, steps // thin, dim) states after every thin-th step. None with thin=0.
    telemetry: tensors with one row per chain, by the names in the sampler's ``reports``. None if not requested.
    cuda_graph: "recorded", or the reason why not. None if not requested.
    report: a scalar on the device, nonzero if any chain is not finite (by first_bad or energy). None from backends
    that do not compute it.
    carried: the fields of the sampler's last state that its ``carries`` names. None if it has none.
    """

    x: Tensor
    energy: Tensor
    first_bad: Tensor
    trajectory: Tensor | None = None
    telemetry: Mapping[str, Tensor] | None = None
    cuda_graph: str | None = None
    report: Tensor | None = None
    carried: Mapping[str, Tensor] | None = None

    @classmethod
    def blank(cls, x: Tensor, steps: int, thin: int, trajectory: Tensor | None = None) -> Advanced:
        """A result to fill in: x itself, uninitialised energies, a trajectory (None: a new one), and first_bad = -1."""
        n_chains, dim = x.shape
        if thin and trajectory is None:
            trajectory = x.new_empty(n_chains, steps // thin, dim)
        return cls(
            x,
            x.new_empty(n_chains),
            torch.full((n_chains,), -1, dtype=torch.int32, device=x.device),
            trajectory,
        )
