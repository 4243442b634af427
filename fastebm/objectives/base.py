"""What every training objective takes and returns, and its random numbers.

An objective is a module that maps an energy and a batch to a loss. Its random numbers are functions of (seed, number of
the call, row of the batch) by Philox (``fastebm/rng.py``). So a run that is resumed repeats them, and processes that
share a batch draw what one process would draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import rng
from ..energies.conditions import are_labels
from ..rng import Noise, Stream, draw_seed
from ..scalars import checked_integer

__all__ = ["Draws", "Loss", "Objective", "calls_of", "mean_energies"]

# Draws of one call, at most: each takes a step number of its own, and step numbers have 32 bits.
_DRAWS_PER_CALL = 16


class Loss(NamedTuple):
    """What an objective returns.

    loss: a scalar, to call ``backward`` on. metrics: named numbers to log: floats, or tensors without dims and
    without gradient. samples: the negatives, (n, *shape), or None if the objective draws none.
    """

    loss: Tensor
    metrics: dict[str, float | Tensor]
    samples: Tensor | None = None


class Objective(nn.Module):
    """The base class of objectives: a module, since an objective may have parameters of its own.

    Args:
        seed: 64-bit seed of the random numbers. None: drawn from torch's global CPU generator.
    """

    def __init__(self, *, seed: int | None = None) -> None:
        super().__init__()
        self.seed, self.calls = draw_seed(seed), 0

    def forward(
        self,
        energy: nn.Module,
        batch: Tensor,
        *,
        labels: Tensor | None = None,
        batch_size: int | None = None,
        first_row: int = 0,
    ) -> Loss:
        """The loss of one batch.

        Args:
            energy: the model that is trained: (n, *shape) -> (n,) or (n, 1). It may be wrapped in
                DistributedDataParallel, so its weights get their gradient from one forward pass per call.
            batch: (n, *shape), the data of this process.
            labels: (n,) int64, the classes of the rows, for an energy or an objective that takes them.
            batch_size: rows of the whole batch, if several processes hold a part of it each. Losses and metrics are
                divided by it, so that their sums over the processes are those of the whole batch. None: n.
            first_row: the number of this process' first row in the whole batch.

        Raises:
            TypeError, ValueError: an argument is wrong. The call is then not counted, and no chain of a pool moves.
        """
        draws = self.draws(batch, first_row, _checked_rows(batch, labels, batch_size, first_row))
        loss = self.loss_of(energy, batch, labels, draws)
        self.calls += 1
        return loss

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        """What a subclass defines: the loss of one batch, as ``forward`` says. The arguments are checked.

        Sums over rows are divided by ``draws.n_rows``.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss_of")

    def draws(self, batch: Tensor, first_row: int = 0, n_rows: int | None = None) -> Draws:
        """The random numbers of the next call, of which this does not count as one."""
        return Draws(self.seed, self.calls, batch, first_row, n_rows)

    def get_extra_state(self) -> Tensor:
        """The seed and the number of calls, in ``state_dict``: (2,) int64."""
        return torch.tensor([self.seed - (self.seed >> 63 << 64), self.calls], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        seed, self.calls = state.tolist()
        self.seed = draw_seed(seed)


class Draws:
    """The random numbers of one call of an objective. Every method call gives new ones.

    Args:
        seed: the objective's. call: the number of the call, from 0.
        batch: (n, *shape): numbers have its shape, dtype and device. first_row: its first row's number.
        n_rows: rows of the whole batch, of all processes. None: those up to the end of this part.
    """

    def __init__(self, seed: int, call: int, batch: Tensor, first_row: int = 0, n_rows: int | None = None) -> None:
        self._seed, self._step, self._end = seed, call * _DRAWS_PER_CALL, (call + 1) * _DRAWS_PER_CALL
        self.first_row, self.n_rows = first_row, first_row + len(batch) if n_rows is None else n_rows
        self._rows = torch.arange(first_row, first_row + len(batch), device=batch.device)
        self._shape, self._dtype = batch.shape[1:], batch.dtype
        self._dim = math.prod(self._shape)

    def normal(self, copies: int | None = None, *, shape: Sequence[int] | None = None) -> Tensor:
        """Standard normal numbers: (n, *shape), or (n, copies, *shape). shape: None: that of a row of the batch."""
        shape = self._shape if shape is None else shape
        noise = self._noise(math.prod(shape))
        if copies is None:
            return noise.normal(Stream.OBJECTIVE, 0).reshape(-1, *shape)
        return noise.copies(copies).normal(Stream.OBJECTIVE, 0).reshape(-1, copies, *shape)

    def uniform(self, copies: int | None = None) -> Tensor:
        """One number in (0, 1] per row: (n,), or (n, copies)."""
        if copies is None:
            return self._noise(self._dim).uniform(Stream.OBJECTIVE, 0)
        return self._noise(self._dim).copies(copies).uniform(Stream.OBJECTIVE, 0).reshape(-1, copies)

    def uniforms(self, copies: int | None = None) -> Tensor:
        """Numbers in (0, 1]: (n, *shape), or (n, copies, *shape)."""
        shape = self._shape if copies is None else (copies, *self._shape)
        n_each, step = math.prod(shape), self._next_step()
        numbers = rng.uniform(self._seed, Stream.OBJECTIVE, self._rows, step, n_each, dtype=self._dtype)
        return numbers.reshape(-1, *shape)

    def strata(self) -> Tensor:
        """One number in [0, 1] per row, (n,), float32 at least: those of the whole batch divide [0, 1] evenly.

        Row i has u + p_i / n_rows modulo 1, with u uniform and the same for all rows: so each number is uniform, and a
        mean over the batch varies less than with independent ones (Kingma et al. 2021). p is a random permutation,
        without which numbers would follow the order of the rows, as of classes in sorted data.
        """
        rows = torch.arange(self.n_rows, device=self._rows.device)
        keys, *_ = rng.words(self._seed, Stream.OBJECTIVE, rows, self._next_step(), 1)
        places = keys[:, 0].argsort(stable=True)[self._rows]
        numbers = (places.double() / self.n_rows + self.seed() / 2**64) % 1.0
        return numbers.to(torch.promote_types(self._dtype, torch.float32))

    def seed(self) -> int:
        """A 64-bit seed for a sampler. It does not depend on the rows, so it is the same on all processes."""
        row = torch.zeros(1, dtype=torch.int64, device="cpu")
        low, high, *_ = (int(w) for w in rng.words(self._seed, Stream.OBJECTIVE, row, self._next_step(), 1))
        return high << 32 | low

    def _noise(self, dim: int) -> Noise:
        first_steps = torch.full_like(self._rows, self._next_step())
        return Noise(self._seed, self._rows, first_steps, dim, dtype=self._dtype, steps=1)

    def _next_step(self) -> int:
        if self._step == self._end:
            raise RuntimeError(f"a call of an objective has {_DRAWS_PER_CALL} draws: take copies of one")
        self._step += 1
        return self._step - 1


@contextmanager
def calls_of(modules: Iterable[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of each call of these modules inside the block, in order.

    A loss that needs what a network computes on its way takes it from here: one forward pass of the whole energy,
    through its DistributedDataParallel if it has one, is then enough. Compiled modules run as they were written, since
    one that was compiled earlier would not see the hooks.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, inputs: Any, output: Tensor) -> None:
        calls.append((inputs[0], output))

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.compiler.set_stance("force_eager") if handles else nullcontext():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def mean_energies(real: Tensor, samples: Tensor, n: int) -> dict[str, float | Tensor]:
    """The metrics of the two mean energies. real: (m,); samples: (m,), or (m, copies); n: rows of the whole batch."""
    copies = math.prod(samples.shape[1:])
    return {"energy_real": real.detach().sum() / n, "energy_samples": samples.detach().sum() / (n * copies)}


def _checked_rows(batch: Tensor, labels: Tensor | None, batch_size: int | None, first_row: int) -> int:
    """Check a batch and its place in the whole one, and return the number of rows of that."""
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        got = str(batch.dtype) if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"a batch must be a floating-point tensor (n, *shape), got {got}: pass batch.float()")
    rows = len(batch)
    if batch_size is not None:
        rows = checked_integer("batch_size, the rows over all processes,", batch_size, least=max(1, rows))
    elif rows == 0:
        raise ValueError("a batch must have rows, got 0: a process without any passes batch_size=, the rows of all")
    checked_integer("first_row", first_row, least=0, most=rows - len(batch))
    if labels is not None and not (isinstance(labels, Tensor) and are_labels(labels) and len(labels) == len(batch)):
        got = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be ({len(batch)},) integers, the class of each row, got {got}")
    return rows
