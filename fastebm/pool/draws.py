"""Which chains of a pool a call draws, which of them are reinitialised, and where those start.

All of it is a pure function of the seed and the number of the draw, so a resumed pool draws the same chains, and
several draws can be computed at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import cpu as kernels
from ..rng import Stream, seed_words, words
from .starts import Starts, scaled

__all__ = ["Draw", "Draws", "draw_distinct"]

# Blocks of the pool's random stream, above the blocks of any state; buffer.py and storage.py use others.
_COIN_BLOCK = 0xFFFFFE
_DRAW_BLOCK = 0xFFFFFF

# Draws are computed ahead for about this many random counters, which fit a core's cache, and at most this many draws.
_AHEAD, _MAX_AHEAD = 32768, 64


class Draw(NamedTuple):
    """One draw: the chains of it that this process holds.

    rows: (n,) rows of the drawn chains. reinit: (m,) ascending indices into ``rows``, of the chains to reinitialise.
    fresh: (m, dim) their new states. places: (n,) where the chains stand in the batch of all processes; None if this
    process holds all chains.
    """

    rows: Tensor
    reinit: Tensor
    fresh: Tensor
    places: Tensor | None


class Draws:
    """The draws of a pool.

    Args:
        n_chains: of the pool.
        first_chain, n_local: the chains that this process holds.
    """

    def __init__(self, starts: Starts, n_chains: int, first_chain: int, n_local: int) -> None:
        self.starts, self.n_chains, self.first_chain, self.n_local = starts, n_chains, first_chain, n_local
        self._ahead: dict[tuple[int, int, float], Draw] = {}

    def draw(self, number: int, batch_size: int, reinit_prob: float) -> Draw:
        """Draw of this number. Some of the next ones are computed with it.

        Its many small operations would otherwise take longer than the rest of a call apart from its steps.
        """
        starts, ahead = self.starts, self._ahead
        if (number, batch_size, reinit_prob) not in ahead:
            per_draw = max(2 * batch_size, round(reinit_prob * batch_size * starts.dim / 32))
            count = min(_MAX_AHEAD, max(1, _AHEAD // per_draw))
            self._ahead = ahead = self._draws(number, count, batch_size, reinit_prob)
        return self._with_starts(ahead[number, batch_size, reinit_prob], number)

    def matching(self, number: int, labels: Tensor, wanted: Tensor, reinit_prob: float) -> Draw:
        """Distinct chains that have the wanted labels, in their order. All chains of a label are equally likely.

        Args:
            labels: (n_chains,) of all chains of the pool.
            wanted: (n,).

        Raises:
            ValueError: the pool has too few chains of a label.
        """
        device = self.starts.device
        numbers = torch.arange(self.n_chains, device=device)
        w0, w1, _, _ = (w[:, 0] for w in words(self.starts.seed, Stream.POOL, numbers, number, 1, _DRAW_BLOCK))
        # All chains sorted by label, and in random order within a label.
        order = torch.argsort((w0 << 31) | (w1 >> 1))
        order = order[torch.argsort(labels[order], stable=True)]
        held = labels[order]
        asked, at = torch.sort(wanted, stable=True)
        first, end = torch.searchsorted(held, asked), torch.searchsorted(held, asked, right=True)
        # The k-th request for a label takes the k-th chain of that label.
        places = first + torch.arange(len(asked), device=device) - torch.searchsorted(asked, asked)
        if bool((places >= end).any()):
            i = int((places >= end).nonzero()[0])
            raise ValueError(
                f"labels asks for {int((asked == asked[i]).sum())} chains of label {int(asked[i])}, and the pool has "
                f"{int(end[i] - first[i])}"
            )
        drawn = torch.empty_like(asked).index_copy_(0, at, order[places])[None]
        reinits = _coins(self.starts.seed, number, drawn, reinit_prob)
        (draw,) = self._local(number, drawn, reinits)
        return self._with_starts(draw, number)

    def _with_starts(self, draw: Draw, number: int) -> Draw:
        """The draw with states of the chains to reinitialise, if they could not be computed ahead."""
        if self.starts.early or len(draw.reinit) == 0:
            return draw
        chains = draw.rows[draw.reinit] + self.first_chain
        return draw._replace(fresh=self.starts.states(Stream.INITIAL, chains, torch.full_like(chains, number + 1)))

    def _draws(self, first: int, count: int, batch_size: int, reinit_prob: float) -> dict[tuple[int, int, float], Draw]:
        """Draws of consecutive numbers, by the arguments of ``draw``."""
        drawn, reinits = _drawn(
            self.starts.seed, first, count, self.n_chains, batch_size, reinit_prob, self.starts.device
        )
        draws = enumerate(self._local(first, drawn, reinits), first)
        return {(number, batch_size, reinit_prob): draw for number, draw in draws}

    def _local(self, first: int, drawn: Tensor, reinits: Tensor) -> list[Draw]:
        """This process' part of consecutive draws. drawn, reinits: (count, batch_size)."""
        starts, device = self.starts, self.starts.device
        count, batch_size = drawn.shape
        rows, sizes = drawn.flatten() - self.first_chain, [batch_size] * count
        draws = torch.arange(count, device=device).repeat_interleave(batch_size)
        reinits = reinits.flatten()
        places: Sequence[Tensor | None] = [None] * count
        if self.n_local < self.n_chains:
            mine = (rows >= 0) & (rows < self.n_local)
            rows, draws, reinits = rows[mine], draws[mine], reinits[mine]
            sizes = torch.bincount(draws, minlength=count).tolist()
            places = torch.split(mine.nonzero().flatten() % batch_size, sizes)
        at = reinits.nonzero().flatten()
        of, again = draws[at], rows[at]
        n_reinits = torch.bincount(of, minlength=count).tolist()
        # New states come from the stream of the first starts, which have step 0: draw d uses step d + 1.
        counter = again + self.first_chain, of + (first + 1)
        fresh = (
            starts.states(Stream.INITIAL, *counter)
            if starts.early
            else torch.empty(len(at), 0, dtype=torch.float32, device=device)
        )
        at -= torch.tensor([0, *itertools.accumulate(sizes[:-1])], device=device)[of]
        parts = torch.split(rows, sizes), torch.split(at, n_reinits), torch.split(fresh, n_reinits), places
        return [Draw(*part) for part in zip(*parts, strict=True)]


def draw_distinct(seed: int, draw: int, n: int, k: int, *, device: torch.device | str | None = None) -> Tensor:
    """k distinct numbers of 0 .. n-1 in random order, (k,) int64. Every ordered choice is equally likely.

    A pure function of (seed, draw, n, k). As in NumPy's Generator.choice, a small part of many numbers comes from
    independent candidates without repeated ones, in O(k log k) whatever n is; a large part from sorting random keys.
    """
    return _distinct(seed, draw, 1, n, k, torch.device("cpu" if device is None else device))[0]


def _drawn(
    seed: int, first: int, count: int, n: int, k: int, reinit_prob: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Consecutive draws: their chains, and whether each is reinitialised. Both (count, k)."""
    if device.type == "cpu" and 2 * k <= n and kernels.why_not() is None:
        bits = (2 * k).bit_length()  # of a hash table that is at most half full
        table = torch.empty(2**bits, dtype=torch.int32, device=device)
        w, _, _ = kernels.scratch(0)
        chains = torch.empty(count, k, dtype=torch.int64, device=device)
        reinits = torch.empty(count, k, dtype=torch.bool, device=device)
        kernels.load("pool.draw")(
            torch.tensor([first], device=device), count, n, k, *seed_words(seed), int(Stream.POOL), _DRAW_BLOCK,
            _COIN_BLOCK, _threshold(reinit_prob), table, bits, w, chains, reinits,
        )  # fmt: skip
        return chains, reinits
    chains = _distinct(seed, first, count, n, k, device)
    return chains, _coins(seed, first, chains, reinit_prob)


def _coins(seed: int, first: int, chains: Tensor, reinit_prob: float) -> Tensor:
    """Whether each drawn chain, (count, k), is reinitialised."""
    count, k = chains.shape
    draws = torch.arange(first, first + count, device=chains.device).repeat_interleave(k)
    coins = words(seed, Stream.POOL, chains.flatten(), draws, 1, _COIN_BLOCK)[0]
    return coins.view(count, k) < _threshold(reinit_prob)


def _threshold(probability: float) -> int:
    """A 32-bit random integer is below it with this probability."""
    return math.ceil(probability * 2**32)


def _distinct(seed: int, first: int, count: int, n: int, k: int, device: torch.device) -> Tensor:
    """``draw_distinct`` of consecutive draws: (count, k)."""

    def keys(size: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(size, device=device).repeat(count)
        draws = torch.arange(first, first + count, device=device).repeat_interleave(size)
        w0, w1, _, _ = words(seed, Stream.POOL, numbers, draws, 1, _DRAW_BLOCK)
        return w0.view(count, size), w1.view(count, size)

    if 2 * k > n:
        w0, w1 = keys(n)
        return torch.argsort((w0 << 31) | (w1 >> 1), dim=1)[:, :k]
    n_candidates = 2 * k  # of which at least 1.26 k are expected to be distinct
    while True:
        candidates = scaled(n, *keys(n_candidates))
        values, order = torch.sort(candidates, dim=1, stable=True)
        is_first = torch.ones_like(values, dtype=torch.bool)
        is_first[:, 1:] = values[:, 1:] != values[:, :-1]
        is_first = torch.empty_like(is_first).scatter_(1, order, is_first)
        place = is_first.cumsum(dim=1)
        if k == 0 or bool((place[:, -1] >= k).all()):
            return candidates[is_first & (place <= k)].view(count, k)
        n_candidates *= 2  # the same candidates first, so a draw does not depend on how many there were
