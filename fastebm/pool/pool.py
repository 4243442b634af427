"""ChainPool: persistent chains, whose states and counters are kept between calls.

Persistent contrastive divergence (Younes 1999; Tieleman 2008) and the replay buffer of IGEBM draw a batch of chains,
reinitialise a few, advance them, and write them back.

This file has the public class. draws.py decides which chains are drawn, and starts.py where chains start; storage.py
holds the states, and records.py all else that is known of each chain; moves.py moves drawn chains, and sweep.py all of
them; buffer.py adds states, state.py checks saved ones, and processes.py talks to other processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import Advanced
from ..box import Bounds, Box
from ..devices import checked_device, named_device
from ..driver.arguments import state_shape
from ..driver.settings import Settings
from ..energies.functions import EnergyLike
from ..rng import Stream, draw_seed
from ..samplers.base import Sampler, for_chains
from ..scalars import plain_number
from ..threads import outside_inference
from .arguments import asked_labels, checked_condition, checked_int, checked_labels, checked_probability, with_clamp
from .buffer import checked_added, prepared, replaced
from .draws import Draw, Draws
from .moves import PoolCall, chains_of, move, outside_graphs, put, take
from .processes import Processes
from .records import Records
from .starts import LAWS, Start, Starts
from .state import VERSION, checked, plain_clamp, saved_clamp
from .stats import PoolStats, statistics
from .storage import Storage
from .sweep import Sweep, progress_bar

__all__ = ["ChainPool", "PoolCall", "PoolStats"]

_OTHER_CALLS = "used another batch_size or steps, or made other calls before"


class ChainPool:
    """A pool of persistent chains, on one device or sharded over processes.

    Chain i is always row i. Its noise depends on the pool's seed, its number i and its own step counter alone, so a
    chain moves in the same way whatever the batch, the chunks or the number of processes (for energies with a
    closed-form gradient; PyTorch's own matrix products may round differently in another batch). Which chains are drawn
    and reinitialised depends on the number of the draw. A pool that was saved and loaded continues bit for bit.

    Args:
        n_chains: >= 1, over all processes.
        input_size: dims or shape of one state.
        clamp: (lo, hi), each a number or a tensor of one state's shape. Chains start and stay within it. None: only the
            sampler's own clamp applies.
        seed: 64-bit seed of all random numbers of the pool. None: drawn from torch's global CPU generator (of the first
            process, if there are several).
        device: where chains move.
        reinit_prob: probability in [0, 1] that a drawn chain is reinitialised.
        init: where chains start, also when they are reinitialised. "uniform": on the clamp, or on [-1, 1] without one.
            "gaussian": N(0, I), clamped. A tensor (m, *shape), m < 2**31: one of its rows. A callable
            (seed, stream, chains, steps) -> (n, *shape), clamped: chains are (n,) int64 global numbers; stream and
            steps, (n,) int64, tell the starts of one chain apart. The pool is reproducible if the callable is a pure
            function of these, as ``noise.uniform`` and ``noise.normal`` are.
        labels: (n_chains,) integers, the class of each chain, passed to the energy beside the states. None: no labels.
        condition: (n_chains, ...), instead of labels: anything else that each chain is conditioned on (a noise level,
            attributes, a measurement, an image). None: no condition.
        storage_dtype: dtype of the states between calls: torch.float32, torch.bfloat16, or torch.uint8 (256 levels on
            the clamp). The last two use stochastic rounding, which keeps the mean (storage.py). Chains always move in
            float32, and ``sample`` returns the states before rounding.
        storage_device: where states lie between calls: the device, or "cpu" (pinned memory for a GPU). None: the
            device.
        storage_file: a file to hold the states instead, which must not exist. ".RANK" is added if there are several
            processes. It is working memory, not a saved pool: for that use ``state_dict``.
        process_group: of torch.distributed. Each process holds one slice of the chains, ``first_chain`` to
            ``first_chain + n_local - 1``, and all processes make the same calls. None: this process holds all chains.

    Memory: n_local states and 28 bytes per chain, plus 8 with labels or the size of the condition, plus 8 for ``last``
    after ``advance``. Building, ``advance`` and ``load_state_dict`` take at most about ten chunks of float32 states
    more: 320 MiB on a CPU, 2.5 GiB on a GPU. ``sample`` takes about ten times the states of its batch.
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
            self.n_chains = checked_int("n_chains", n_chains, "an int in [1, 2**31)", 1, 2**31 - 1)
            self.shape = state_shape(input_size)
            self._dim = math.prod(self.shape)
            self.reinit_prob = reinit_prob
            self.clamp, drawn = Box.of(clamp), draw_seed(seed)
            self.first_chain, end = self._processes.share(self.n_chains)
            self.n_local = end - self.first_chain
        seeds = self._processes.gather((seed is None, drawn))
        self.seed = seeds[0][1] if all(is_drawn for is_drawn, _ in seeds) else drawn
        with self._processes.together():
            starts = Starts(init, self.seed, self.shape, self.clamp, self.device)
            self._draws = Draws(starts, self.n_chains, self.first_chain, self.n_local)
            if labels is not None and condition is not None:
                raise ValueError("a pool takes labels= or condition=, got both: leave one out")
            self._records = records = Records.of_new_chains(self.n_local, self.device)
            if labels is not None:
                records.labels = self._local_labels(labels)
            if condition is not None:
                records.condition = self._local_condition(condition)
        arguments = (self.n_chains, self.shape, self.clamp, self.seed, starts.kind, self.reinit_prob, storage_dtype)
        self._processes.agree(None, arguments, differ="built theirs with other arguments or another seed")
        with ExitStack() as undo:
            with self._processes.together():
                file = self._processes.own(storage_file)
                self._storage = Storage(
                    self.n_local, self._dim, dtype=storage_dtype, box=self.clamp, device=self.device,
                    home=storage_device, file=file, seed=self.seed, first_chain=self.first_chain,
                )  # fmt: skip
                if file is not None:
                    undo.callback(os.unlink, file)
                with progress_bar("start", self.n_local, None, self._processes.rank == 0) as bar:
                    for rows in self._storage.parts():
                        steps = records.steps[rows]
                        x = starts.states(Stream.INITIAL, self._storage.chains(rows), steps)
                        self._storage.write(rows, x, steps)
                        bar.update(rows.stop - rows.start)
            undo.pop_all()

    def __len__(self) -> int:
        return self.n_chains

    def __repr__(self) -> str:
        here = "" if self._processes.size == 1 else f" ({self.n_local} of them here)"
        return f"ChainPool({len(self)} chains of shape {self.shape} on {self.device}{here}, {self.draws} draws)"

    # -- properties of each chain of this process ---------------------------------------------------------------

    @property
    @outside_inference
    def states(self) -> Tensor:
        """(n_local, *shape) float32. With float32 storage the pool's own memory, otherwise a copy."""
        stored = self._storage.data
        x = stored if stored.dtype == torch.float32 else self._storage.decoded(stored)
        return x.reshape(self.n_local, *self.shape)

    @property
    def steps(self) -> Tensor:
        """(n_local,) int64: lifetime steps, which count the noise. A reinit does not reset them. Not a copy."""
        return self._records.steps

    @property
    @outside_inference
    def ages(self) -> Tensor:
        """(n_local,) int64: steps since the chain last started."""
        return self._records.steps - self._records.started

    @property
    def energies(self) -> Tensor:
        """(n_local,) float32: E of the state after the chain last moved, with the weights of that call. Not a copy.

        NaN for chains that have not moved yet and for added states.
        """
        return self._records.energy

    @property
    def reinits(self) -> Tensor:
        """(n_local,) int32: how often the chain started again. Not a copy.

        Counts random reinits of drawn chains, reinits of non-finite chains, and states replaced by ``add``.
        """
        return self._records.reinits

    @property
    def nonfinite(self) -> Tensor:
        """(n_local,) int32: how often the chain started again because it was not finite. Not a copy."""
        return self._records.nonfinite

    @property
    def reinit_prob(self) -> float:
        """Probability in [0, 1] that a drawn chain is reinitialised. May be set between calls."""
        return self._reinit_prob

    @reinit_prob.setter
    def reinit_prob(self, value: float) -> None:
        self._reinit_prob = checked_probability("reinit_prob", value)

    @property
    def labels(self) -> Tensor | None:
        """(n_local,) int64 labels of this process' chains, not a copy; or None.

        Set it to the labels of all chains, (n_chains,) integers, or to None.
        """
        return self._records.labels

    @labels.setter
    @outside_inference
    def labels(self, labels: Tensor | None) -> None:
        self._records.labels = None if labels is None else self._local_labels(labels)
        if labels is not None:
            self._records.condition = None

    @property
    def condition(self) -> Tensor | None:
        """(n_local, ...) condition of this process' chains, not a copy; or None.

        Set it to the condition of all chains, (n_chains, ...), or to None.
        """
        return self._records.condition

    @condition.setter
    @outside_inference
    def condition(self, condition: Tensor | None) -> None:
        self._records.condition = None if condition is None else self._local_condition(condition)
        if condition is not None:
            self._records.labels = None

    # -- calls that move chains ---------------------------------------------------------------------------------

    @outside_inference
    def sample(
        self,
        energy: EnergyLike,
        batch_size: int,
        sampler: Sampler,
        steps: int,
        *,
        labels: Tensor | None = None,
        backend: str = "auto",
        precision: str | None = None,
        cuda_graph: bool = False,
        on_nonfinite: str = "raise",
    ) -> tuple[Tensor, Tensor]:
        """Draw distinct chains, reinitialise a few, advance them, write them back.

        All processes draw the same chains. Each moves those that it holds, which may be none.

        Args:
            batch_size: number of chains to draw, over all processes.
            sampler: settings such as ``Langevin``. Tensors with one value per chain are in the order of the batch.
            labels: (batch_size,) integers: draw chains with these labels, in this order, for instance the labels of a
                batch of data. Chains of a label are equally likely. This sorts all chains of the pool.
            on_nonfinite: what to do with chains that become non-finite. "raise"; "reinit": reinitialise them, leave all
                others as they are, and count them in ``last.nonfinite`` and ``nonfinite``; "ignore": keep their last
                finite state.
            backend, precision, cuda_graph: as for ``langevin_sample``.

        Returns:
            samples (n, *shape) and their energies (n,), of the drawn chains of this process: n is batch_size without
            a process_group. ``last`` has their numbers and labels, and counts of reinits and non-finite chains.

        Raises:
            ValueError, NonFiniteError: as for ``langevin_sample``, on every process. The pool is then unchanged.
        """
        settings = Settings(backend, precision, cuda_graph, on_nonfinite)
        return outside_graphs(self._sample, energy, batch_size, sampler, steps, labels, settings)

    def _sample(
        self, energy: EnergyLike, batch_size: int, sampler: Sampler, steps: int, labels: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        storage, records = self._storage, self._records
        batch_size, steps = plain_number(batch_size), plain_number(steps)
        wanted = None if labels is None else asked_labels(labels, batch_size, self.labels, self._processes)
        call = "sample", self.draws, self.added, self.reinit_prob, batch_size, steps
        with self._processes.together(call, differ=_OTHER_CALLS) as counts:
            checked_int("batch_size", batch_size, f"an int in [1, {len(self)}], the pool's size", 1, len(self))
            sampler = with_clamp(sampler, self.clamp, self._dim)
            draw = self._next_draw(batch_size, wanted)
            if draw.places is not None:
                sampler = for_chains(sampler, draw.places, batch_size)
            x, before = take(draw, storage, records)
            chains = chains_of(x, draw.rows, before, storage, records)
            done, bad = move(energy, chains, sampler, steps, self._draws.starts, settings)
            after = before + steps
            again = bad if settings.on_nonfinite == "reinit" else bad[:0]
            put_back = put(draw, storage, records, before, after, done)
            record_reinits = records.reinit(draw.rows[again], after[again], nonfinite=True)
            samples = done.x.reshape(len(done.x), *self.shape)
            counts += [len(draw.reinit), len(bad)]
        # From here on nothing can fail, so the pool never holds half a draw.
        put_back()
        record_reinits()
        self.draws += 1
        self.last = PoolCall(chains.numbers, chains.labels, counts[0], counts[1], chains.condition)
        return samples, done.energy

    def _next_draw(self, batch_size: int, wanted: tuple[Tensor, Tensor] | None = None) -> Draw:
        if wanted is None:
            return self._draws.draw(self.draws, batch_size, self.reinit_prob)
        return self._draws.matching(self.draws, *wanted, self.reinit_prob)

    @outside_inference
    def advance(
        self,
        energy: EnergyLike,
        sampler: Sampler,
        steps: int,
        *,
        chunk_size: int | None = None,
        progress: bool | None = None,
        backend: str = "auto",
        precision: str | None = None,
        cuda_graph: bool = False,
        on_nonfinite: str = "raise",
    ) -> None:
        """Move all chains in place, chunk by chunk, with no random reinits.

        The size of the chunks does not change the result.

        With on_nonfinite="raise" and more than one chunk, the old states are kept until the end, which takes as much
        memory again (beside ``storage_file`` if there is one). They are put back if a chain is not finite or the call
        is interrupted. "reinit" and "ignore" keep no copy: after an interruption some chunks have moved and others have
        not, as ``steps`` shows.

        Args:
            sampler: as for ``sample``. Tensors with one value per chain have n_chains rows.
            chunk_size: chains per chunk. None: as many as take 32 MiB on a CPU or 256 MiB on a GPU.
            progress: whether to show a bar on stderr, from the first process. None: on a terminal, if the call takes
                more than two seconds.
            backend, precision, cuda_graph, on_nonfinite: as for ``sample``.

        Raises:
            ValueError, NonFiniteError: as for ``sample``.
        """
        settings = Settings(backend, precision, cuda_graph, on_nonfinite)
        outside_graphs(self._advance, energy, sampler, steps, chunk_size, progress, settings)

    def _advance(
        self, energy: EnergyLike, sampler: Sampler, steps: int, chunk_size: int | None, progress: bool | None,
        settings: Settings,
    ) -> None:  # fmt: skip
        storage, records = self._storage, self._records
        steps = plain_number(steps)

        def agree(error: Exception | None, n_nonfinite: int) -> int:
            call = "advance", self.draws, self.added, steps
            (total,) = self._processes.agree(error, call, (n_nonfinite,), differ=_OTHER_CALLS)
            return total

        def move_rows(rows: slice, x: Tensor) -> tuple[Advanced, Tensor]:
            chains = chains_of(x, rows, records.steps[rows], storage, records)
            part = for_chains(sampler, chains.numbers, len(self))
            return move(energy, chains, part, steps, self._draws.starts, settings)

        with Sweep(storage, records, agree) as sweep:
            labels, condition = (None if v is None else v.clone() for v in (self.labels, self.condition))
            numbers = storage.chains(slice(0, self.n_local))
            sampler = with_clamp(sampler, self.clamp, self._dim)
            parts = storage.parts(chunk_size)
            if settings.on_nonfinite == "raise" and len(parts) > 1:
                sweep.keep_for_undo()
            with progress_bar(f"{steps} steps", self.n_local, progress, self._processes.rank == 0) as bar:
                sweep.run(parts, move_rows, steps, reinit=settings.on_nonfinite == "reinit", on_chunk=bar.update)
        self.last = PoolCall(numbers, labels, 0, sweep.n_nonfinite, condition)

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
        """Replace the states of some chains by given ones, from which these chains then go on.

        The first n_chains states that are ever added replace the chains in order. After that "fifo" continues from the
        first chain, and so replaces the oldest state. "reservoir" keeps a uniform sample of all states that were ever
        added (Algorithm R; Vitter 1985), provided that every call uses it. All processes pass the same samples, and
        each keeps those of its own chains.

        Args:
            samples: (n, *shape), finite and within the clamp.
            labels: (n,) integers, required if the pool has labels.
            condition: (n, ...), required if the pool has a condition.
            policy: "fifo" or "reservoir".

        Raises:
            TypeError, ValueError: bad arguments. The pool is then unchanged.
        """
        with self._processes.together():
            x, values = checked_added(samples, labels, condition, policy, self._draws.starts, self._records)
        call = "add", self.draws, self.added, len(x), policy
        self._processes.agree(None, call, differ=_OTHER_CALLS)
        chains = replaced(policy, self.seed, self.added, len(x), len(self), self.device)
        overwrite = prepared(x, values, chains, self._storage, self._records)
        # From here on nothing can fail.
        overwrite()
        self.added += len(x)

    # -- statistics, save and resume ----------------------------------------------------------------------------

    @outside_inference
    def stats(self) -> PoolStats:
        """Statistics of all chains on all processes; every process must call it. States are not read.

        Memory: about 40 bytes per chain of this process, and with several processes about 30 per chain of the pool.
        """
        records = self._records
        return statistics(
            len(self), self.draws, records.energy, self.ages, records.reinits, records.nonfinite, self._processes
        )

    @outside_inference
    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs, except the rows or the callable of ``init``.

        Tensors have one row per chain of this process: "x" (n_local, dim) as stored, "steps", "started", "energy",
        "reinits", "nonfinite", and "labels" and "condition" if there are any. All other values are plain numbers,
        strings and lists, and equal on all processes.

        Args:
            copy: False: return the pool's own tensors. This takes no memory, but they change when chains move.
        """
        tensors = self._tensors()
        return {
            **({k: t.clone() for k, t in tensors.items()} if copy else tensors),
            **{name: None for name in ("labels", "condition") if name not in tensors},
            "n_chains": len(self),
            "draws": self.draws,
            "added": self.added,
            "seed": self.seed,
            "shape": list(self.shape),
            "clamp": plain_clamp(self.clamp),
            "reinit_prob": self.reinit_prob,
            "init": self._draws.starts.kind,
            "storage_dtype": str(self._storage.dtype).removeprefix("torch."),
            "version": VERSION,
        }

    @outside_inference
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the saved pool, on this pool's device and in its memory.

        The tensors have the rows of this process' chains, whatever the number of processes was when they were saved.
        All processes must call it. If one of them cannot load its state, no pool changes.

        Raises:
            TypeError, ValueError: missing entries, or another version, size, shape or storage_dtype, or impossible
                values. The pool is then unchanged.
        """
        with self._processes.together(("load_state_dict",), differ=_OTHER_CALLS):
            state = checked(state, self.state_dict(copy=False))
            box = Box.of(saved_clamp(state["clamp"]))
            bounds = self._storage.checked_bounds(box)
            init = state["init"] if state["init"] in LAWS else self._draws.starts.init
            starts = Starts(init, draw_seed(state["seed"]), self.shape, box, self.device)
            draws = Draws(starts, len(self), self.first_chain, self.n_local)
            given = (state["labels"], state["condition"])
            labels, condition = (None if v is None else torch.empty_like(v, device=self.device) for v in given)
        # From here on nothing can fail, so the pool never becomes half of another.
        self._records.labels, self._records.condition = labels, condition
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self.seed, self.clamp, self.reinit_prob = starts.seed, box, state["reinit_prob"]
        self.draws, self.added = state["draws"], state["added"]
        self._draws, self._storage.seed, self._storage.bounds = draws, self.seed, bounds
        self.last = None

    # -- parts --------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return {"x": self._storage.data, **self._records.tensors()}

    def _local_labels(self, labels: Tensor) -> Tensor:
        return self._local(checked_labels(labels, len(self), "chain"))

    def _local_condition(self, condition: Tensor) -> Tensor:
        return self._local(checked_condition(condition, len(self)))

    def _local(self, values: Tensor) -> Tensor:
        """A copy of this process' rows of values for all chains."""
        return values[self.first_chain : self.first_chain + self.n_local].detach().to(self.device, copy=True)
