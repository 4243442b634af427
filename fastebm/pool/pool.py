"""Persistent chains: a pool that keeps the state and the story of every chain between calls.

Persistent contrastive divergence (Younes 1999; Tieleman 2008) and the replay buffer of IGEBM draw a batch of
chains, restart a few, advance them, and put them back where they came from.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import Advanced, Chains
from ..box import Bounds
from ..devices import checked_device, named_device
from ..driver.sampling import ON_NONFINITE, advance_chains, check_integers, state_shape
from ..energies.functions import EnergyLike
from ..rng import Stream, draw_seed, words
from ..samplers.langevin import Langevin
from ..samplers.langevin import checked_langevin as checked_rule
from ..scalars import plain_number
from ..threads import outside_inference
from . import copies
from .draws import Draw, Draws
from .processes import Processes
from .starts import LAWS, Start, Starts, checked_states
from .stats import PoolStats, statistics
from .storage import Storage

__all__ = ["ChainPool", "PoolCall", "PoolStats"]

# Block of the pool's stream past any state's dims: draws.py and storage.py have others.
_RESERVOIR_BLOCK = 0xFFFFFD

_VERSION = 2

# float32 states worked on at once where all chains are: enough for every core or SM, and little beside the pool.
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}

# Seconds of a call before its bar shows on a terminal.
_BAR_AFTER = 2.0

_OTHER_CALLS = "called with another batch_size or steps, or after other calls"


@dataclass(frozen=True, eq=False)
class PoolCall:
    """What the last ``sample`` or ``advance`` of a pool did.

    chains: (n,) int64, global numbers of the chains that this process moved, in the order of the samples.
    labels: (n,) int64, theirs, or None. restarted: chains that started anew before they moved. nonfinite: chains that
    left the finite numbers. Both count the chains of all processes. condition: (n, ...), of the moved ones, or None.
    """

    chains: Tensor
    labels: Tensor | None
    restarted: int
    nonfinite: int
    condition: Tensor | None = None


class ChainPool:
    """A pool of persistent chains, on one device or sharded over processes.

    Chain i is row i for ever, has the global number i in the noise's counter, and counts its own steps. So
    how a chain moves depends on its number and its steps alone: not on the batch, the chunks or the number of
    processes (for energies whose gradient is computed in closed form; PyTorch's own products round by the batch). Which
    chains are drawn and restart depends on the number of the draw. A resumed pool goes on bit for bit.

    Args:
        n_chains: >= 1, over all processes.
        input_size: dims or shape of one state.
        clamp: (lo, hi), each a number or a tensor of one state's shape: chains start within it and stay. None: only
            the sampler's own clamp holds them.
        seed: 64-bit seed of everything random in the pool. None: drawn from torch's global CPU generator, of the first
            process if there are several.
        device: where chains move.
        reinit_prob: probability in [0, 1] that a drawn chain starts anew.
        init: where chains start, at first and anew. "uniform": on the clamp, or on [-1, 1] without one. "gaussian":
            N(0, I), clamped. A tensor (m, *shape), m < 2**31: a row of it. A callable (seed, stream, chains, steps) ->
            (n, *shape), clamped, where chains are (n,) int64 global numbers, and stream and steps, (n,) int64, tell
            their starts apart: a pure function of these, as ``noise.uniform`` and ``noise.normal`` are, keeps the pool
            reproducible.
        labels: (n_chains,) integers, each chain's class, given to the energy beside the states. None: none.
        condition: (n_chains, ...), in place of labels: what else each chain is conditioned on (a noise level,
            attributes, a measurement, an image). None: nothing.
        storage_dtype: of the states between calls: torch.float32, torch.bfloat16, or torch.uint8 (256 levels on the
            clamp). The last two round at random, so that the mean is kept (storage.py); chains move in float32, and
            ``sample`` returns what they are before they are rounded.
        storage_device: where states lie between calls, the device or "cpu" (pinned for a GPU). None: the device.
        storage_file: a file to lie in instead, which must not exist; ".RANK" is added where there are processes.
            A place to work, not a way to save: that is ``state_dict``.
        process_group: of torch.distributed. Each process has one slice of the chains, ``first_chain`` and ``n_local``,
            and all make the same calls. None: this process has all chains.

    Memory: n_local states, and 28 bytes per chain; 8 more with labels, or the condition, and 8 for ``last`` after
    ``advance``. Building, ``advance`` and ``load_state_dict`` take some ten times a chunk of float32 states beside it
    at most: 320 MiB on a CPU and 2.5 GiB on a GPU; ``sample`` the same of its batch.
    """

    @outside_inference
    def __init__(
        self,
        n_chains: int,
        input_size: int | Sequence[int],
        *,
        clamp: Bounds | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        reinit_prob: float = 0.05,
        init: str | Tensor | Start = "uniform",
        labels: Tensor | None = None,
        condition: Tensor | None = None,
        storage_dtype: torch.dtype = torch.float32,
        storage_device: torch.device | str | None = None,
        storage_file: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.device = named_device("cpu" if device is None else device)
        self._processes = Processes(process_group, self.device)
        self.draws = self.added = 0
        self.last: PoolCall | None = None
        with self._processes.together():
            checked_device(self.device)
            n_chains = plain_number(n_chains)
            if isinstance(n_chains, bool) or not isinstance(n_chains, int) or not 1 <= n_chains < 2**31:
                raise ValueError(f"n_chains must be an int in [1, 2**31), got {n_chains!r}")
            self.n_chains, self.shape = n_chains, state_shape(input_size)
            self._dim = math.prod(self.shape)
            self.reinit_prob = reinit_prob
            rule = Langevin(clamp=clamp)
            self.clamp, drawn = rule.clamp, draw_seed(seed)
            self.first_chain, last = self._processes.share(n_chains)
            self.n_local = last - self.first_chain
        seeds = self._processes.gather((seed is None, drawn))
        self.seed = seeds[0][1] if all(is_drawn for is_drawn, _ in seeds) else drawn
        with self._processes.together():
            starts = Starts(init, self.seed, self.shape, self.clamp, self.device)
            self._draws = Draws(starts, n_chains, self.first_chain, self.n_local)
            if labels is not None and condition is not None:
                raise ValueError("a pool has labels= or condition=, got both: leave one out")
            self._labels = None if labels is None else self._checked_labels(labels)
            self._condition = None if condition is None else self._checked_condition(condition)
        arguments = (n_chains, self.shape, self.clamp, self.seed, starts.kind, self.reinit_prob, storage_dtype)
        self._processes.agree(None, arguments, differ="built theirs with other arguments or another seed")
        with ExitStack() as undo:
            with self._processes.together():
                file = self._processes.own(storage_file)
                self._storage = Storage(
                    self.n_local, self._dim, dtype=storage_dtype, rule=rule, device=self.device, home=storage_device,
                    file=file, seed=self.seed, first_chain=self.first_chain,
                )  # fmt: skip
                if file is not None:
                    undo.callback(os.unlink, file)
                self._steps = torch.zeros(self.n_local, dtype=torch.int64, device=self.device)
                self._started = torch.zeros_like(self._steps)
                self._restarts, self._nonfinite = (torch.zeros_like(self._steps, dtype=torch.int32) for _ in "12")
                self._energy = torch.full((self.n_local,), math.nan, dtype=torch.float32, device=self.device)
                with self._bar("start", None) as bar:
                    for rows in self._parts(None):
                        steps = self._steps[rows]
                        x = starts.states(Stream.INITIAL, self._storage.chains(rows), steps)
                        self._storage.write(rows, x, steps)
                        bar.update(rows.stop - rows.start)
            undo.pop_all()

    def __len__(self) -> int:
        return self.n_chains

    def __repr__(self) -> str:
        here = "" if self._processes.size == 1 else f" ({self.n_local} of them here)"
        return f"ChainPool({len(self)} chains of shape {self.shape} on {self.device}{here}, {self.draws} draws)"

    # -- what is known of every chain of this process -----------------------------------------------------------

    @property
    @outside_inference
    def states(self) -> Tensor:
        """(n_local, *shape) float32: the pool's own memory, not a copy, where that is float32; else a copy."""
        stored = self._storage.data
        x = stored if stored.dtype == torch.float32 else self._storage.decoded(stored)
        return x.reshape(self.n_local, *self.shape)

    @property
    def steps(self) -> Tensor:
        """(n_local,) int64: lifetime steps, the noise's counter; restarts do not set them back. Not a copy."""
        return self._steps

    @property
    @outside_inference
    def ages(self) -> Tensor:
        """(n_local,) int64: steps since the chain last started."""
        return self._steps - self._started

    @property
    def energies(self) -> Tensor:
        """(n_local,) float32: E of the state when the chain last moved, under the weights of then. Not a copy.

        NaN before that, and for states that were added.
        """
        return self._energy

    @property
    def restarts(self) -> Tensor:
        """(n_local,) int32: how often the chain started anew: drawn to, not finite, or an added state. Not a copy."""
        return self._restarts

    @property
    def nonfinite(self) -> Tensor:
        """(n_local,) int32: how often it started anew because it was not finite. Not a copy."""
        return self._nonfinite

    @property
    def reinit_prob(self) -> float:
        """Probability in [0, 1] that a drawn chain starts anew; may be set between calls."""
        return self._reinit_prob

    @reinit_prob.setter
    def reinit_prob(self, value: float) -> None:
        value = plain_number(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise ValueError(f"reinit_prob must be in [0, 1], got {value!r}")
        self._reinit_prob = float(value)

    @property
    def labels(self) -> Tensor | None:
        """(n_local,) int64, not a copy, or None. To be set to (n_chains,) integers, the labels of all, or None."""
        return self._labels

    @labels.setter
    @outside_inference
    def labels(self, labels: Tensor | None) -> None:
        new = None if labels is None else self._checked_labels(labels)
        self._labels, self._condition = new, None if labels is not None else self._condition

    @property
    def condition(self) -> Tensor | None:
        """(n_local, ...), not a copy, or None. To be set to (n_chains, ...), the conditions of all, or None."""
        return self._condition

    @condition.setter
    @outside_inference
    def condition(self, condition: Tensor | None) -> None:
        new = None if condition is None else self._checked_condition(condition)
        self._condition, self._labels = new, None if condition is not None else self._labels

    # -- calls that move chains ---------------------------------------------------------------------------------

    @outside_inference
    def sample(
        self,
        energy: EnergyLike,
        batch_size: int,
        langevin: Langevin,
        steps: int,
        *,
        labels: Tensor | None = None,
        backend: str = "auto",
        precision: str | None = None,
        cuda_graph: bool = False,
        on_nonfinite: str = "raise",
    ) -> tuple[Tensor, Tensor]:
        """Draw distinct chains, restart a few, advance them, write them back.

        Every process draws the same chains and moves its own of them, which may be none.

        Args:
            batch_size: over all processes.
            langevin: the rule; what it has for each chain is for the batch, in its order.
            labels: (batch_size,) integers: draw chains of these labels, in this order, as for a batch of data that has
                them. Each chain of a label is as likely as the others. It takes a sort of all chains.
            on_nonfinite: "raise"; "reinit" starts those chains anew, as ``init`` says, and leaves all others as they
                are (``last.nonfinite``, ``nonfinite``); "ignore" keeps their last finite state.
            Others as for ``langevin_sample``.

        Returns:
            samples (n, *shape) and their energies (n,), of this process; n is batch_size if it is the only one.
            ``last`` tells their chains and labels, and how many restarted or were not finite.

        Raises:
            ValueError, NonFiniteError: as ``langevin_sample``, on every process; the pool is unchanged then.
        """
        arguments = (energy, batch_size, langevin, steps, labels, backend, precision, cuda_graph, on_nonfinite)
        if torch.compiler.is_compiling():
            from ..backends import compiling

            done: tuple[Tensor, Tensor] = compiling.uncompiled(self._sample, *arguments)
            return done
        return self._sample(*arguments)

    def _sample(
        self, energy: EnergyLike, batch_size: int, langevin: Langevin, steps: int, labels: Tensor | None, backend: str,
        precision: str | None, cuda_graph: bool, on_nonfinite: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options = {"backend": backend, "precision": precision, "cuda_graph": cuda_graph}
        batch_size, steps = plain_number(batch_size), plain_number(steps)
        wanted = None if labels is None else self._wanted(labels, batch_size)
        call = "sample", self.draws, self.added, self.reinit_prob, batch_size, steps
        with self._processes.together(call, differ=_OTHER_CALLS) as counts:
            if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= len(self):
                raise ValueError(f"batch_size must be an int in [1, {len(self)}], the pool's size, got {batch_size!r}")
            rule = self._rule(langevin)
            draw = self._next_draw(batch_size, wanted)
            if draw.places is not None:
                rule = _rule_of(rule, draw.places, batch_size)
            x, before = self._taken(draw)
            done, bad = self._moved(energy, x, draw.rows, before, rule, steps, on_nonfinite, options)
            after = before + steps
            again = bad if on_nonfinite == "reinit" else bad[:0]
            writes = self._put_back(draw, before, after, done), self._restart(draw.rows[again], after[again], True)
            numbers = self._storage.chains(draw.rows)
            of_labels, condition = (None if v is None else v[draw.rows] for v in (self._labels, self._condition))
            samples = done.x.reshape(len(done.x), *self.shape)
            counts += [len(draw.restart), len(bad)]
        # From here on nothing can fail, so a pool never holds half a draw.
        for write in writes:
            write()
        self.draws += 1
        self.last = PoolCall(numbers, of_labels, counts[0], counts[1], condition)
        return samples, done.energy

    def _next_draw(self, batch_size: int, wanted: tuple[Tensor, Tensor] | None = None) -> Draw:
        if wanted is None:
            return self._draws.draw(self.draws, batch_size, self.reinit_prob)
        return self._draws.matching(self.draws, *wanted, self.reinit_prob)

    def _wanted(self, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Labels of all chains, and those that are asked for."""
        with self._processes.together():
            if self._labels is None:
                raise ValueError("labels= draws chains of these labels, and this pool has none: build it with labels=")
            wanted = _labels_of("labels", labels, batch_size, "one for each of batch_size").to(self.device)
            mine = wanted, self._labels
        asked, held = zip(*self._processes.gather(mine), strict=True)
        with self._processes.together():
            if any(not torch.equal(theirs, wanted) for theirs in asked):
                raise ValueError("the processes of a group must make the same calls, and some asked for other labels")
            return torch.cat(held), wanted

    def _taken(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Where the drawn chains begin, and their lifetime steps."""
        if copies.can_copy(self._storage):
            return copies.take(draw, self._storage.data, self._steps)
        x, steps = self._storage.read(draw.rows), self._steps.index_select(0, draw.rows)
        if len(draw.restart) > 0:
            x.index_copy_(0, draw.restart, draw.fresh)
        return x, steps

    def _put_back(self, draw: Draw, before: Tensor, after: Tensor, done: Advanced) -> Callable[[], None]:
        """What writes a draw back, when all that can fail is done."""
        if copies.can_copy(self._storage):
            story = (self._steps, self._energy, self._started, self._restarts)
            return copies.put(draw, done.x, before, after, done.energy, self._storage.data, *story)
        states = self._storage.writing(draw.rows, done.x, after)
        restarted = self._restart(draw.rows[draw.restart], before[draw.restart])
        energies = done.energy.to(self._energy)

        def write() -> None:
            states()
            self._steps.index_copy_(0, draw.rows, after)
            self._energy.index_copy_(0, draw.rows, energies)
            restarted()

        return write

    @outside_inference
    def advance(
        self,
        energy: EnergyLike,
        langevin: Langevin,
        steps: int,
        *,
        chunk_size: int | None = None,
        progress: bool | None = None,
        backend: str = "auto",
        precision: str | None = None,
        cuda_graph: bool = False,
        on_nonfinite: str = "raise",
    ) -> None:
        """Move all chains, without restarts, chunk by chunk; their new states and energies are in the pool.

        Chunks change no bits. With on_nonfinite="raise" and more than one chunk, the states as they were are kept until
        the end (beside ``storage_file`` if there is one), as much memory again: they are put back if a chain is not
        finite, or the call is interrupted. "reinit" and "ignore" need none, and an interrupted call leaves each chain
        either moved or not, as its steps tell.

        Args:
            langevin: the rule; what it has for each chain is for all n_chains.
            chunk_size: chains at once; None: as many as take 32 MiB on a CPU and 256 MiB on a GPU.
            progress: a bar on stderr, of the first process. None: on a terminal, if the call takes seconds.
            Others as for ``sample``.

        Raises:
            ValueError, NonFiniteError: as ``sample``.
        """
        arguments = (energy, langevin, steps, chunk_size, progress, backend, precision, cuda_graph)
        if torch.compiler.is_compiling():
            from ..backends import compiling

            compiling.uncompiled(self._advance, *arguments, on_nonfinite)
        else:
            self._advance(*arguments, on_nonfinite)

    def _advance(
        self, energy: EnergyLike, langevin: Langevin, steps: int, chunk_size: int | None, progress: bool | None,
        backend: str, precision: str | None, cuda_graph: bool, on_nonfinite: str,
    ) -> None:  # fmt: skip
        options = {"backend": backend, "precision": precision, "cuda_graph": cuda_graph}
        steps = plain_number(steps)
        story = tuple(self._story().values())
        before: tuple[Tensor, ...] = ()
        spare: Tensor | None = None
        moved = n_bad = 0
        agreed = False

        def agree(error: Exception | None = None) -> None:
            nonlocal agreed, n_bad
            if not agreed:
                agreed = True
                call = "advance", self.draws, self.added, steps
                (n_bad,) = self._processes.agree(error, call, (n_bad,), differ=_OTHER_CALLS)

        def move(rows: slice, x: Tensor) -> Tensor:
            nonlocal n_bad, moved
            part = _rule_of(rule, self._storage.chains(rows), len(self))
            done, bad = self._moved(energy, x, rows, self._steps[rows], part, steps, on_nonfinite, options)
            after = self._steps[rows] + steps
            stored = self._storage.encoded(done.x, rows, after)
            again = bad if on_nonfinite == "reinit" else bad[:0]
            restarted = self._restart(again + rows.start, after[again], True)
            now = self._steps[rows], self._energy[rows]
            n_bad += len(bad)
            if rows.stop == self.n_local:  # before anything of the last chunk is written
                agree()
            bar.update(rows.stop - rows.start)
            if spare is not None:
                spare[rows].copy_(self._storage.data[rows])
            moved = rows.stop
            now[0].copy_(after)
            now[1].copy_(done.energy)
            restarted()
            return stored

        try:
            labels, condition = (None if v is None else v.clone() for v in (self._labels, self._condition))
            numbers = self._storage.chains(slice(0, self.n_local))
            rule, parts = self._rule(langevin), self._parts(chunk_size)
            if on_nonfinite == "raise" and len(parts) > 1:
                before, spare = tuple(t.clone() for t in story), self._storage.spare()
            with self._bar(f"{steps} steps", progress) as bar:
                self._storage.rewrite(parts, move)
            agree()
        except BaseException as error:
            if spare is not None:
                for old, new in zip(before, story, strict=True):
                    new.copy_(old)
                for rows in parts:
                    if rows.stop <= moved:
                        self._storage.data[rows].copy_(spare[rows])
            if isinstance(error, Exception):
                agree(error)
            raise
        self.last = PoolCall(numbers, labels, 0, n_bad, condition)

    def _moved(
        self, energy: EnergyLike, x: Tensor, rows: slice | Tensor, steps_before: Tensor, rule: Langevin, steps: int,
        on_nonfinite: str, options: Mapping[str, Any],
    ) -> tuple[Advanced, Tensor]:  # fmt: skip
        """Some chains after their steps, and which of them were not finite; the pool is unchanged."""
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
        labels, condition = (None if v is None else v[rows] for v in (self._labels, self._condition))
        chains = Chains(x, self.seed, self._storage.chains(rows), steps_before, labels, condition=condition)
        policy = "ignore" if on_nonfinite == "reinit" else on_nonfinite
        done, _ = advance_chains(energy, chains, rule, steps, shape=self.shape, on_nonfinite=policy, **options)
        if on_nonfinite == "raise":
            return done, steps_before[:0]
        bad = ((done.first_bad >= 0) | ~done.energy.isfinite()).nonzero().flatten()
        if on_nonfinite == "reinit" and len(bad) > 0:
            fresh = self._draws.starts.states(Stream.POOL, chains.numbers[bad], steps_before[bad] + steps)
            # With all others: an energy may know how many it is given.
            again, _ = advance_chains(
                energy, chains._replace(x=done.x.index_copy(0, bad, fresh)), Langevin(), 0, shape=self.shape,
                on_nonfinite="ignore", backend=options["backend"], precision=options["precision"],
            )  # fmt: skip
            done.x.index_copy_(0, bad, again.x[bad])
            done.energy.index_copy_(0, bad, again.energy[bad])
        return done, bad

    def _restart(self, rows: Tensor, steps: Tensor, nonfinite: bool = False) -> Callable[[], None]:
        """What notes that chains started anew, when all that can fail is done. rows: distinct. steps: (n,), then."""
        if len(rows) == 0:
            return _nothing
        one = torch.ones_like(rows, dtype=torch.int32)

        def write() -> None:
            self._started.index_copy_(0, rows, steps)
            self._restarts.index_add_(0, rows, one)
            if nonfinite:
                self._nonfinite.index_add_(0, rows, one)

        return write

    # -- the replay buffer --------------------------------------------------------------------------------------

    @outside_inference
    def add(
        self,
        samples: Tensor,
        labels: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        policy: str = "fifo",
    ) -> None:
        """Put states from outside in place of chains, which then go on from there.

        The first n_chains that are ever added take the chains in order. After that "fifo" goes round, so the oldest
        goes; "reservoir" keeps a uniform choice of all that were ever added (Algorithm R; Vitter 1985), if every call
        has that policy. Processes each pass the same samples, and keep those of their own chains.

        Args:
            samples: (n, *shape), finite and within the clamp.
            labels: (n,) integers, for a pool that has labels. condition: (n, ...), for one that has a condition.
            policy: "fifo" or "reservoir".

        Raises:
            TypeError, ValueError: the pool is unchanged then.
        """
        with self._processes.together():
            if policy not in ("fifo", "reservoir"):
                raise ValueError(f'policy must be "fifo" or "reservoir", got {policy!r}')
            x = checked_states("samples", samples, self.shape, self.clamp)
            for name, given, kept in (("labels", labels, self._labels), ("condition", condition, self._condition)):
                if (given is None) != (kept is None):
                    raise ValueError(
                        f"this pool has no {name}: build it with {name}=, or leave them out"
                        if kept is None
                        else f"this pool has {name}: pass those of the samples"
                    )
            new: Tensor | None = None
            kept = self._labels if self._condition is None else self._condition
            if labels is not None:
                new = _labels_of("labels", labels, len(x), "one per sample")
            elif condition is not None and self._condition is not None:
                new = _condition_of(condition, (len(x), *self._condition.shape[1:]), self._condition.dtype)
        call = "add", self.draws, self.added, len(x), policy
        self._processes.agree(None, call, differ=_OTHER_CALLS)
        numbers = torch.arange(self.added, self.added + len(x), device=self.device)
        rows = numbers % len(self)
        if policy == "reservoir":
            w0, w1, _, _ = (w[:, 0] for w in words(self.seed, Stream.POOL, numbers, 0, 1, _RESERVOIR_BLOCK))
            # floor(u (number + 1)) of 53 bits: products in float64 are the same everywhere
            u = ((w0 << 21) | (w1 >> 11)).double() * 2.0**-53
            chosen = (u * (numbers + 1).double()).long().clamp_(max=numbers)
            rows = torch.where(numbers < len(self), numbers, chosen)
        rows = rows - self.first_chain
        which = _last_of_each(rows, self.n_local)
        rows = rows[which]
        steps = self._steps[rows]
        states = self._storage.writing(rows, x[which.to(x.device)].to(self.device, torch.float32), steps)
        restarted = self._restart(rows, steps)
        values = None if new is None else new.to(self.device)[which]
        # From here on nothing can fail.
        states()
        restarted()
        self._energy.index_fill_(0, rows, math.nan)
        if values is not None and kept is not None:
            kept.index_copy_(0, rows, values)
        self.added += len(x)

    # -- what the pool is like ----------------------------------------------------------------------------------

    @outside_inference
    def stats(self) -> PoolStats:
        """Numbers of all chains, computed where they are and then fetched at once; states are not looked at.

        Memory: some 40 bytes per chain. Processes each get the numbers of all, from a few small sums; every one calls
        it.
        """
        return statistics(
            len(self), self.draws, self._energy, self.ages, self._restarts, self._nonfinite, self._processes.total
        )

    # -- save and resume ----------------------------------------------------------------------------------------

    @outside_inference
    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """All that the pool is, but for the rows or the callable of ``init``.

        Tensors have one row for each chain of this process: "x" (n_local, dim) as they are stored, "steps",
        "started", "energy", "restarts", "nonfinite", and "labels" and "condition" if there are any.
        All else is plain, and the same on all processes.

        Args:
            copy: False: the pool's own memory, which takes no more, and changes when chains move.
        """
        tensors = {"x": self._storage.data, **self._story()}
        return {
            **({k: t.clone() for k, t in tensors.items()} if copy else tensors),
            **{name: None for name in ("labels", "condition") if name not in tensors},
            "n_chains": len(self),
            "draws": self.draws,
            "added": self.added,
            "seed": self.seed,
            "shape": list(self.shape),
            "clamp": None if self.clamp is None else [v.tolist() if isinstance(v, Tensor) else v for v in self.clamp],
            "reinit_prob": self.reinit_prob,
            "init": self._draws.starts.kind,
            "storage_dtype": str(self._storage.dtype).removeprefix("torch."),
            "version": _VERSION,
        }

    def _story(self) -> dict[str, Tensor]:
        story = {
            "steps": self._steps,
            "started": self._started,
            "energy": self._energy,
            "restarts": self._restarts,
            "nonfinite": self._nonfinite,
        }
        given = {"labels": self._labels, "condition": self._condition}
        return {**story, **{name: v for name, v in given.items() if v is not None}}

    @outside_inference
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the saved pool, on this pool's device and in its memory. Checked first: a bad state changes nothing.

        Tensors hold the rows of this process' chains, however many processes there were. With processes, every one
        calls it, and if one can't load, none does.

        Raises:
            ValueError: missing entries, another version, size, shape or storage_dtype, or values that can't be.
        """
        with self._processes.together(("load_state_dict",), differ=_OTHER_CALLS):
            state = {"condition": None, **state}  # states of before there were conditions have none
            rule, starts = self._checked_state(state)
            given = (state["labels"], state["condition"])
            labels, condition = (None if v is None else torch.empty_like(v, device=self.device) for v in given)
            draws, bounds = Draws(starts, len(self), self.first_chain, self.n_local), self._storage.bounds_of(rule)
        # From here on nothing can fail, so a pool never becomes half of another.
        self._labels, self._condition = labels, condition
        for name, target in (("x", self._storage.data), *self._story().items()):
            target.copy_(state[name])
        self.seed, self.clamp, self.reinit_prob = starts.seed, rule.clamp, state["reinit_prob"]
        self.draws, self.added = state["draws"], state["added"]
        self._draws, self._storage.seed, self._storage.bounds = draws, self.seed, bounds
        self.last = None

    def _checked_state(self, state: Mapping[str, Any]) -> tuple[Langevin, Starts]:
        if "version" in state and state["version"] != _VERSION:
            raise ValueError(
                f"the pool was saved by version {state['version']}, and this one reads {_VERSION} only: go on with the "
                "release that saved it, or start a new pool"
            )
        mine = self.state_dict(copy=False)
        missing = sorted(mine.keys() - state.keys())
        if missing:
            raise ValueError(f"not the state of a ChainPool: it lacks {', '.join(missing)}")
        tensors = {"x": self._storage.data, **self._story()}
        for name in ("labels", "condition"):
            tensors.pop(name, None)
        if state["labels"] is not None:
            tensors["labels"] = self._steps
        if (condition := state["condition"]) is not None:
            rows = condition.shape[:1] if isinstance(condition, Tensor) else ()
            if rows != (self.n_local,) or state["labels"] is not None:
                raise ValueError(f"condition must be a tensor ({self.n_local}, ...), and not beside labels")
            tensors["condition"] = condition
        for name in tensors:
            if not isinstance(state[name], Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(state[name]).__name__}")
        theirs = (state["n_chains"], len(state["x"]), tuple(state["shape"]))
        if theirs != (len(self), self.n_local, self.shape) or state["x"].shape != self._storage.data.shape:
            raise ValueError(
                f"the saved pool has {theirs[0]} chains of shape {theirs[2]}, {theirs[1]} of them here, and this one "
                f"{len(self)} of shape {self.shape}, {self.n_local} of them here"
            )
        if state["storage_dtype"] != mine["storage_dtype"]:
            raise ValueError(
                f"the saved pool has storage_dtype {state['storage_dtype']}, and this one {mine['storage_dtype']}: "
                "build it with the same"
            )
        if state["init"] not in (mine["init"], *LAWS):
            raise ValueError(
                f"the chains of the saved pool start from {state['init']}, and of this one from {mine['init']}: build "
                "it with the same init="
            )
        for name, target in tensors.items():
            value = state[name]
            if value.shape != target.shape or value.dtype != target.dtype:
                raise ValueError(
                    f"{name} must be {tuple(target.shape)} of {target.dtype}, got {tuple(value.shape)} of {value.dtype}"
                )
        x = state["x"]
        if x.is_floating_point() and not all(bool(x[rows].isfinite().all()) for rows in self._parts(None)):
            raise ValueError("the saved pool is damaged: states that are not finite")
        counts = [state[name] for name in ("steps", "started", "restarts", "nonfinite")]
        if any(bool((v < 0).any()) for v in counts) or bool((state["started"] > state["steps"]).any()):
            raise ValueError(
                "the saved pool is damaged: negative steps or counts, or chains that started after their last step"
            )
        for name in ("draws", "added"):
            value = state[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"the saved pool is damaged: {name} must be an int >= 0, got {value!r}")
        reinit_prob = state["reinit_prob"]
        if not isinstance(reinit_prob, float) or not 0.0 <= reinit_prob <= 1.0:
            raise ValueError(f"the saved pool is damaged: reinit_prob must be in [0, 1], got {reinit_prob!r}")
        if state["seed"] is None:
            raise ValueError("the saved pool is damaged: it has no seed")
        clamp = state["clamp"]
        if isinstance(clamp, list):
            clamp = tuple(torch.tensor(v) if isinstance(v, list) else v for v in clamp)
        rule = Langevin(clamp=clamp)
        self._storage.bounds_of(rule)
        init = state["init"] if state["init"] in LAWS else self._draws.starts.init
        return rule, Starts(init, draw_seed(state["seed"]), self.shape, rule.clamp, self.device)

    # -- parts --------------------------------------------------------------------------------------------------

    def _rule(self, langevin: Langevin) -> Langevin:
        """With the pool's clamp."""
        langevin = checked_rule(langevin)
        if self.clamp is None:
            return langevin
        if langevin.clamp is not None and not _same_bounds(langevin.clamp, self.clamp, self._dim):
            raise ValueError(f"the pool clamps to {self.clamp} and the sampler to {langevin.clamp}: use one")
        return dataclasses.replace(langevin, clamp=self.clamp)

    def _parts(self, chunk_size: int | None) -> list[slice]:
        """All rows, a chunk at a time."""
        if chunk_size is None:
            kind = "cpu" if self.device.type == "cpu" else "cuda"
            chunk_size = max(1, _CHUNK_BYTES[kind] // (4 * self._dim))
        chunk_size = plain_number(chunk_size)
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size must be an int >= 1 or None, got {chunk_size!r}")
        return [slice(i, min(i + chunk_size, self.n_local)) for i in range(0, self.n_local, chunk_size)]

    def _bar(self, what: str, progress: bool | None) -> Any:
        """tqdm's bar over this process' chains, or what takes its calls."""
        if self._processes.rank > 0 or progress is False or (progress is None and not sys.stderr.isatty()):
            return _NoBar()
        try:
            from tqdm import tqdm  # an optional package
        except ImportError:
            if progress is None:
                return _NoBar()
            raise ValueError('progress=True needs tqdm: pip install "fastebm[cli]"') from None
        delay = _BAR_AFTER if progress is None else 0.0
        return tqdm(desc=what, total=self.n_local, unit=" chains", unit_scale=True, delay=delay, dynamic_ncols=True)

    def _checked_labels(self, labels: Tensor) -> Tensor:
        """Of this process' chains."""
        labels = _labels_of("labels", labels, len(self), "one per chain")
        return labels[self.first_chain : self.first_chain + self.n_local].to(self.device, copy=True)

    def _checked_condition(self, condition: Tensor) -> Tensor:
        """Of this process' chains."""
        condition = _condition_of(condition, (len(self), *getattr(condition, "shape", ())[1:]), None)
        return condition[self.first_chain : self.first_chain + self.n_local].detach().to(self.device, copy=True)


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int) -> None:
        pass


def _labels_of(name: str, labels: Tensor, n: int, rule: str) -> Tensor:
    check_integers(name, labels)
    if labels.shape != (n,):
        raise ValueError(f"{name} must be ({n},), {rule}, got {tuple(labels.shape)}")
    return labels.to(torch.int64)


def _condition_of(condition: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    if not isinstance(condition, Tensor):
        raise TypeError(f"condition must be a tensor, one row per chain, got {type(condition).__name__}")
    if tuple(condition.shape) != shape:
        raise ValueError(f"condition must be {shape}, one row per chain, got {tuple(condition.shape)}")
    if dtype is not None and not torch.can_cast(condition.dtype, dtype):
        raise TypeError(f"condition must be of {dtype}, as that of the pool, got {condition.dtype}")
    return condition if dtype is None else condition.to(dtype)


def _nothing() -> None:
    pass


def _same_bounds(a: Bounds, b: Bounds, dim: int) -> bool:
    if not any(isinstance(v, Tensor) for v in (*a, *b)):
        return a == b
    rows = (torch.as_tensor(v, dtype=torch.float32).cpu().flatten() for v in (*a, *b))
    a_lo, a_hi, b_lo, b_hi = (v.expand(dim) if v.numel() == 1 else v for v in rows)
    return torch.equal(a_lo, b_lo) and torch.equal(a_hi, b_hi)


def _rule_of(rule: Langevin, which: Tensor, n: int) -> Langevin:
    """The rule for some of n chains."""

    def part(name: str) -> float | Tensor:
        value: float | Tensor = getattr(rule, name)
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) == 1:
            return value
        if len(value) != n:  # it might fit the part by chance
            raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit {n} chains; use ({n}, 1)")
        return value[which.to(value.device)]

    return dataclasses.replace(rule, step_size=part("step_size"), noise_scale=part("noise_scale"))


def _last_of_each(rows: Tensor, n: int) -> Tensor:
    """Places of the last of equal rows, for rows in [0, n)."""
    values, order = torch.sort(rows, stable=True)
    is_last = torch.ones_like(values, dtype=torch.bool)
    is_last[:-1] = values[1:] != values[:-1]
    return order[is_last & (values >= 0) & (values < n)]
