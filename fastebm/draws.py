"""Which chains of a pool a call draws, which of them start anew, and where: functions of the number of the draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .noise import Stream, words
from .starts import Starts, scaled

__all__ = ["Draw", "Draws", "draw_distinct"]

# Blocks of the pool's stream past any state's dims: pool.py and storage.py have others.
_COIN_BLOCK = 0xFFFFFE
_DRAW_BLOCK = 0xFFFFFF

# Counters of draws worked out ahead: as many as noise.py has in a cache at once; and draws.
_AHEAD, _MAX_AHEAD = 32768, 64


class Draw(NamedTuple):
    """A draw, as one process has it: rows (n,) of its chains; restart (m,), places among them of those that start
    anew, and their states fresh (m, dim); places (n,) in the batch of all processes, or None if it has all chains."""

    rows: Tensor
    restart: Tensor
    fresh: Tensor
    places: Tensor | None


class Draws:
    """The draws of a pool of n_chains, as the process has them that holds first_chain to first_chain + n_local - 1."""

    def __init__(self, starts: Starts, n_chains: int, first_chain: int, n_local: int) -> None:
        self.starts, self.n_chains, self.first_chain, self.n_local = starts, n_chains, first_chain, n_local
        self._ahead: dict[int, Draw] = {}
        self._ahead_for: tuple[int, float] | None = None

    def draw(self, number: int, batch_size: int, reinit_prob: float) -> Draw:
        """Draws depend on their number alone, so some are worked out at once: one by one, the hundreds of small
        operations of Philox would take longer than all else of a call but its steps."""
        starts = self.starts
        if self._ahead_for != (batch_size, reinit_prob) or number not in self._ahead:
            per_draw = max(2 * batch_size, round(reinit_prob * batch_size * starts.dim / 32))
            count = min(_MAX_AHEAD, max(1, _AHEAD // per_draw))
            self._ahead = self._draws(number, count, batch_size, reinit_prob)
            self._ahead_for = batch_size, reinit_prob
        draw = self._ahead[number]
        if starts.early or len(draw.restart) == 0:
            return draw
        chains = draw.rows[draw.restart] + self.first_chain
        return draw._replace(fresh=starts.states(Stream.INITIAL, chains, torch.full_like(chains, number + 1)))

    def _draws(self, first: int, count: int, batch_size: int, reinit_prob: float) -> dict[int, Draw]:
        starts, device = self.starts, self.starts.device
        drawn = _distinct(starts.seed, first, count, self.n_chains, batch_size, device)
        chains, sizes = drawn.flatten(), [batch_size] * count
        places: list[Tensor | None] = [None] * count
        if self.n_local < self.n_chains:
            mine = (drawn >= self.first_chain) & (drawn < self.first_chain + self.n_local)
            chains, sizes = chains[mine.flatten()], mine.sum(dim=1).tolist()
            places = list(torch.split(mine.nonzero()[:, 1], sizes))
        numbers = torch.arange(first, first + count, device=device)
        numbers = numbers.repeat_interleave(torch.tensor(sizes, device=device))
        coins = words(starts.seed, Stream.POOL, chains, numbers, 1, _COIN_BLOCK)[0][:, 0]
        restart = (coins < reinit_prob * 2**32).nonzero().flatten()
        n_restarts = torch.bincount(numbers[restart] - first, minlength=count).tolist()
        # Restarts are in the stream of first starts, whose step is 0, at the number of the draw, from 1.
        counter = chains[restart], numbers[restart] + 1
        fresh = starts.states(Stream.INITIAL, *counter) if starts.early else torch.empty(len(restart), 0, device=device)
        parts = zip(
            torch.split(chains - self.first_chain, sizes), torch.split(restart, n_restarts),
            torch.split(fresh, n_restarts), places, strict=True,
        )  # fmt: skip
        draws, before = {}, 0
        for number, (rows, at, states, place) in enumerate(parts, first):
            draws[number] = Draw(rows, at - before, states, place)
            before += len(rows)
        return draws


def draw_distinct(seed: int, draw: int, n: int, k: int, *, device: torch.device | str | None = None) -> Tensor:
    """k distinct numbers of 0 .. n-1 in random order, (k,) int64: every ordered choice is equally likely.

    A pure function of (seed, draw, n, k). As in NumPy's Generator.choice, few of many come from independent
    candidates without the repeated ones, in O(k log k) whatever n is; many from sorting a random key each.
    """
    return _distinct(seed, draw, 1, n, k, torch.device("cpu" if device is None else device))[0]


def _distinct(seed: int, first: int, count: int, n: int, k: int, device: torch.device) -> Tensor:
    """``draw_distinct`` of count draws in a row: (count, k)."""

    def keys(size: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(size, device=device).repeat(count)
        draws = torch.arange(first, first + count, device=device).repeat_interleave(size)
        w0, w1, _, _ = words(seed, Stream.POOL, numbers, draws, 1, _DRAW_BLOCK)
        return w0.view(count, size), w1.view(count, size)

    if 2 * k > n:
        w0, w1 = keys(n)
        return torch.argsort((w0 << 31) | (w1 >> 1), dim=1)[:, :k]
    n_candidates = 2 * k  # of which at least 1.26 k are expected to differ
    while True:
        candidates = scaled(n, *keys(n_candidates))
        values, order = torch.sort(candidates, dim=1, stable=True)
        is_first = torch.ones_like(values, dtype=torch.bool)
        is_first[:, 1:] = values[:, 1:] != values[:, :-1]
        is_first = torch.empty_like(is_first).scatter_(1, order, is_first)
        place = is_first.cumsum(dim=1)
        if k == 0 or bool((place[:, -1] >= k).all()):
            return candidates[is_first & (place <= k)].view(count, k)
        n_candidates *= 2  # the same first ones, and more
