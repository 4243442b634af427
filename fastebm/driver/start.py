"""The start of a sampling call: checks the arguments that describe its chains, and creates them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import Chains
from ..box import Bounds, uniform_states
from ..devices import checked_device
from ..energies import first_tensor
from ..rng import Stream, draw_seed
from .arguments import (
    check_init,
    checked_count,
    checked_first_steps,
    checked_frozen,
    on_device_or_plain,
    seed_tensor,
    shape_of_states,
)

__all__ = ["Place", "Start"]


class Place(NamedTuple):
    """Number of chains, shape of one state, device and dtype."""

    n_chains: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype


@dataclass(eq=False)
class Start:
    """The arguments of a sampling call that describe its chains. ``fastebm.sample`` documents them.

    n_chains: name of the argument, for errors, and its value. Used if there is no init.
    states: name of the argument that init is, for errors.
    """

    energy: nn.Module
    input_size: int | Sequence[int] | None
    n_chains: tuple[str, int]
    init: Tensor | None
    labels: Tensor | None
    condition: Tensor | None
    frozen: Tensor | None
    seed: int | Tensor | None
    generator: torch.Generator | None
    first_chain: int
    first_step: int | Tensor
    device: torch.device | str | None
    states: str = "init"

    def place(self) -> Place:
        """Check the arguments; nothing is drawn yet."""
        self.first_chain = checked_count("first_chain", self.first_chain)
        self.seed, self.first_step = on_device_or_plain(self.seed), on_device_or_plain(self.first_step)
        parameter = first_tensor(self.energy)
        if self.init is None:
            n_chains = checked_count(*self.n_chains)
            shape = shape_of_states(self.energy, self.input_size, self.labels is not None, self.states)
            known = torch.device("cpu") if parameter is None else parameter.device
            device = known if self.device is None else checked_device(self.device)
            double = parameter is not None and parameter.dtype == torch.float64
        else:
            check_init(self.init, self.input_size, self.device, self.states)
            n_chains, shape, device = len(self.init), tuple(self.init.shape[1:]), self.init.device
            double = self.init.dtype == torch.float64
        if self.first_chain + n_chains > 2**63:
            raise ValueError(
                f"chain numbers are 63-bit: first_chain + n_chains must be <= 2**63, got {self.first_chain}"
            )
        return Place(n_chains, shape, device, torch.float64 if double else torch.float32)

    def chains(self, place: Place, steps: int, clamp: Bounds | None) -> Chains:
        """The chains at their start. Without init they are uniform on clamp; without a seed one is drawn here.

        While torch.compile traces, the seed is a tensor, and the states are what the operator of backends/op.py takes.
        """
        n_chains, shape, device, dtype = place
        numbers = torch.arange(self.first_chain, self.first_chain + n_chains, device=device)
        first_steps = checked_first_steps(self.first_step, steps, numbers)
        compiling, dim = torch.compiler.is_compiling(), math.prod(shape)
        if compiling or isinstance(self.seed, Tensor):
            seed: int | Tensor = seed_tensor(self.seed, device)
        else:
            seed = draw_seed(self.seed, self.generator)
        if compiling:
            x = torch.empty(n_chains, 0, dtype=dtype, device=device) if self.init is None else self.init
        elif self.init is None:
            x = uniform_states(seed, Stream.INITIAL, numbers, 0, dim, clamp=clamp, dtype=dtype)
        else:
            x = self.init if self.init.ndim == 2 else self.init.detach().reshape(n_chains, dim)
        frozen = checked_frozen(self.frozen, n_chains, shape, device)
        return Chains(x, seed, numbers, first_steps, self.labels, frozen, self.condition)
