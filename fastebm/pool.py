"""Persistent chains: a pool that keeps the state and the age of every chain between calls.

Persistent contrastive divergence (Younes 1999; Tieleman 2008) and the replay buffer of IGEBM draw a batch of
chains, restart a few, advance them, and put them back where they came from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backends import Advanced, Chains
from .langevin import Langevin
from .noise import Stream, draw_seed, words
from .sampling import advance_chains, state_shape, uniform_states

__all__ = ["ChainPool", "draw_distinct"]

# Blocks of the POOL stream past any state's dims: restarts' states use blocks 0, 1, ...
_COIN_BLOCK = 0xFFFFFE
_DRAW_BLOCK = 0xFFFFFF

_VERSION = 1


class ChainPool:
    """A pool of persistent chains, on one device.

    Chain i is row i for ever, has the global number i in the noise's counter, and counts its own steps. So
    what a chain does depends on its number and age alone, and a resumed pool goes on bit for bit.

    Args:
        n_chains: >= 1.
        input_size: dims or shape of one state.
        clamp: (lo, hi): chains start uniform on it and stay within it. None: they start on [-1, 1], and
            only the sampler's own clamp holds them.
        seed: 64-bit seed of everything random in the pool.
        reinit_prob: probability in [0, 1] that a drawn chain starts anew.
    """

    def __init__(
        self,
        n_chains: int,
        input_size: int | Sequence[int],
        *,
        clamp: tuple[float, float] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        reinit_prob: float = 0.05,
    ) -> None:
        if isinstance(n_chains, bool) or not isinstance(n_chains, int) or not 1 <= n_chains < 2**31:
            raise ValueError(f"n_chains must be an int in [1, 2**31), got {n_chains!r}")
        shape = state_shape(input_size)
        if not 0.0 <= reinit_prob <= 1.0:
            raise ValueError(f"reinit_prob must be in [0, 1], got {reinit_prob!r}")
        self.shape = shape
        self.clamp = Langevin(clamp=clamp).clamp
        self.seed = draw_seed(seed)
        self.reinit_prob = float(reinit_prob)
        self.device = torch.device("cpu" if device is None else device)
        self.draws = 0
        chains = torch.arange(n_chains, device=self.device)
        self._x = uniform_states(self.seed, Stream.INITIAL, chains, 0, math.prod(shape), clamp=self.clamp)
        self._age = torch.zeros(n_chains, dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return len(self._x)

    def __repr__(self) -> str:
        return f"ChainPool({len(self)} chains of shape {self.shape} on {self.device}, {self.draws} draws)"

    @property
    def states(self) -> Tensor:
        """(n_chains, *shape) float32: the states of all chains, not a copy."""
        return self._x.reshape(len(self), *self.shape)

    @property
    def ages(self) -> Tensor:
        """(n_chains,) int64: lifetime steps of all chains, restarts included, not a copy."""
        return self._age

    def sample(
        self,
        energy: nn.Module,
        batch_size: int,
        langevin: Langevin,
        steps: int,
        *,
        backend: str = "auto",
        precision: str | None = None,
        on_nonfinite: str = "raise",
    ) -> tuple[Tensor, Tensor]:
        """Draw distinct chains, restart a few, advance them, write them back.

        Returns:
            samples (batch_size, *shape) and their energies (batch_size,).

        Raises:
            ValueError, NonFiniteError: as ``langevin_sample``; the pool is unchanged then.
        """
        arguments = (energy, batch_size, langevin, steps, backend, precision, on_nonfinite)
        if torch.compiler.is_compiling():
            from .backends import compiling

            done: Advanced = compiling.uncompiled(self._sample, *arguments)
        else:
            done = self._sample(*arguments)
        return done.x.reshape(batch_size, *self.shape), done.energy

    def _sample(
        self, energy: nn.Module, batch_size: int, langevin: Langevin, steps: int, backend: str,
        precision: str | None, on_nonfinite: str,
    ) -> Advanced:  # fmt: skip
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= len(self):
            raise ValueError(f"batch_size must be an int in [1, {len(self)}], the pool's size, got {batch_size!r}")
        if self.clamp is not None:
            if langevin.clamp not in (None, self.clamp):
                raise ValueError(f"the pool clamps to {self.clamp} and the sampler to {langevin.clamp}: use one")
            langevin = dataclasses.replace(langevin, clamp=self.clamp)
        rows = draw_distinct(self.seed, self.draws, len(self), batch_size, device=self.device)
        x, ages = self._x[rows], self._age[rows]
        restart = self._coins(rows, ages) < self.reinit_prob * 2**32
        if bool(restart.any()):
            x[restart] = uniform_states(
                self.seed, Stream.POOL, rows[restart], ages[restart], x.shape[1], clamp=self.clamp
            )
        done, _ = advance_chains(
            energy,
            Chains(x, self.seed, rows, ages),
            langevin,
            steps,
            shape=self.shape,
            backend=backend,
            precision=precision,
            on_nonfinite=on_nonfinite,
        )
        # From here on nothing can fail, so a pool never holds half a draw.
        self._x[rows] = done.x
        self._age[rows] = ages + steps
        self.draws += 1
        return done

    def _coins(self, rows: Tensor, ages: Tensor) -> Tensor:
        return words(self.seed, Stream.POOL, rows, ages, 1, _COIN_BLOCK)[0][:, 0]

    def state_dict(self) -> dict[str, Any]:
        """Tensors "x" (n_chains, dim) and "age" (n_chains,), and plain numbers: all that the pool is."""
        return {
            "x": self._x.clone(),
            "age": self._age.clone(),
            "draws": self.draws,
            "seed": self.seed,
            "shape": list(self.shape),
            "clamp": None if self.clamp is None else list(self.clamp),
            "reinit_prob": self.reinit_prob,
            "version": _VERSION,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the saved pool, on this pool's device. Checked first: a bad state changes nothing.

        Raises:
            ValueError: missing entries, another version, size or shape, or values that are not finite.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"not the state of a ChainPool: it lacks {', '.join(missing)}")
        if state["version"] != _VERSION:
            raise ValueError(f"the pool was saved by version {state['version']}; this one reads {_VERSION}")
        x, age = state["x"], state["age"]
        if not (isinstance(x, Tensor) and isinstance(age, Tensor)):
            raise ValueError(f"x and age must be tensors, got {type(x).__name__} and {type(age).__name__}")
        if tuple(state["shape"]) != self.shape or x.shape != self._x.shape or age.shape != self._age.shape:
            raise ValueError(
                f"the saved pool has {len(x)} chains of shape {tuple(state['shape'])}, "
                f"and this one {len(self)} of shape {self.shape}"
            )
        if not bool(x.isfinite().all()) or bool((age < 0).any()):
            raise ValueError("the saved pool is damaged: states that are not finite, or negative ages")
        draws, reinit_prob = state["draws"], state["reinit_prob"]
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
            raise ValueError(f"the saved pool is damaged: draws must be an int >= 0, got {draws!r}")
        if not isinstance(reinit_prob, float) or not 0.0 <= reinit_prob <= 1.0:
            raise ValueError(f"the saved pool is damaged: reinit_prob must be in [0, 1], got {reinit_prob!r}")
        if state["seed"] is None:
            raise ValueError("the saved pool is damaged: it has no seed")
        seed, clamp = draw_seed(state["seed"]), Langevin(clamp=state["clamp"]).clamp
        # From here on nothing can fail, so a pool never becomes half of another.
        self._x = x.to(self.device, torch.float32, copy=True)
        self._age = age.to(self.device, torch.int64, copy=True)
        self.draws, self.seed, self.clamp, self.reinit_prob = draws, seed, clamp, reinit_prob


def draw_distinct(seed: int, draw: int, n: int, k: int, *, device: torch.device | str | None = None) -> Tensor:
    """k distinct numbers of 0 .. n-1 in random order, (k,) int64: every ordered choice is equally likely.

    A pure function of (seed, draw, n, k). As in NumPy's Generator.choice, few of many come from independent
    candidates without the repeated ones, in O(k log k) whatever n is; many from sorting a random key each.
    """
    device = torch.device("cpu" if device is None else device)
    if 2 * k > n:
        w0, w1, _, _ = _draw_words(seed, draw, n, device)
        return torch.argsort((w0 << 31) | (w1 >> 1))[:k]
    n_candidates = 2 * k  # of which at least 1.26 k are expected to differ
    while True:
        w0, w1, _, _ = _draw_words(seed, draw, n_candidates, device)
        candidates = (w0 * n + ((w1 * n) >> 32)) >> 32  # floor(n * w / 2**64): n < 2**31 keeps it in int64
        values, order = torch.sort(candidates, stable=True)
        is_first = torch.ones_like(values, dtype=torch.bool)
        is_first[1:] = values[1:] != values[:-1]
        distinct = candidates[torch.empty_like(is_first).index_copy_(0, order, is_first)]
        if len(distinct) >= k:
            return distinct[:k]
        n_candidates *= 2


def _draw_words(seed: int, draw: int, n: int, device: torch.device) -> tuple[Tensor, ...]:
    numbers = torch.arange(n, device=device)
    return tuple(w[:, 0] for w in words(seed, Stream.POOL, numbers, draw, 1, _DRAW_BLOCK))
