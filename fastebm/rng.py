"""The random numbers of fastebm: counter-based Philox4x32-10.

Every random number is a pure function of (seed, stream, chain, step, dimension), so it does not depend on the device,
on how chains are split into batches or processes, or on what was drawn before. This file is the definition, in
PyTorch. kernels/triton/philox.py and kernels/cpu/philox.py (Numba) compute the same numbers; all three are tested
against the known answers of Random123. On a CPU ``words``, ``uniform`` and ``normal`` use Numba's kernels if they can.

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (chain & 0xffffffff, chain >> 32, step, stream << 24 | block),   block = dim // 4
    u(w)    = (w + 0.5) * 2**-32                                               in float32
    xi0, xi1 = r * (cos t, sin t),   r = sqrt(-2 ln u(w0)),  t = 2 pi u(w1);   xi2, xi3 likewise from w2, w3

Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box & Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import cached_property
from itertools import count, groupby

import torch
from torch import Tensor

from .kernels import cpu as kernels
from .scalars import plain_number
from .threads import Spares, Team

__all__ = [
    "Noise",
    "Stream",
    "draw_seed",
    "normal",
    "philox4x32",
    "random_bytes",
    "seed_words",
    "uniform",
    "words",
]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_FIRST = torch.zeros(1, dtype=torch.int64, device="cpu")  # the kernel adds this step number to ``steps``

# Counters per CPU thread and chunk: the fastest of 4,096 to 131,072 on Zen 4 cores. With fewer, PyTorch's cost per
# operation dominates, or it uses no second thread; with more, the chunk does not fit the cache.
_CHUNK = 65536

# Counters per CPU thread below which a second thread does not pay.
_COUNTERS_PER_THREAD = 8192

# Steps for which a kernel draws at once, if each needs few numbers. Parts keep theirs, so it costs memory.
_AHEAD = 16


class Stream(IntEnum):
    """What a random number is used for. Different uses never share a number, even with the same seed."""

    LANGEVIN = 0
    INITIAL = 1
    POOL = 2
    METROPOLIS = 3
    MOMENTUM = 4
    TEMPERING = 5
    GIBBS = 6
    AIS = 7
    OBJECTIVE = 8
    PROBE = 9


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[int | Tensor, int | Tensor],
    rounds: int = 10,
    *,
    scratch: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors that broadcast together, each holding words in [0, 2**32).
        key: two words, as numbers or (1,) int64 tensors.
        rounds: 10 is the contract; 7 exists for the published known answers.
        scratch: six int64 tensors of the broadcast shape to work in; the result is four of them.

    Returns:
        Four int64 tensors of the broadcast shape, words in [0, 2**32).
    """
    k0, k1 = key
    shape: torch.Size = torch.broadcast_shapes(*(c.shape for c in counter))  # type: ignore[no-untyped-call]
    if scratch is None:
        scratch = [torch.empty(shape, dtype=torch.int64, device=counter[0].device) for _ in range(6)]
    c0, c1, c2, c3, p0, p1 = scratch
    # The first round is separate: it multiplies a counter that is constant along an axis only once per row.
    q0, q1 = counter[0] * _M0, counter[2] * _M1
    c0.copy_(((q1 >> 32) & _MASK) ^ k0 ^ counter[1])
    c2.copy_(((q0 >> 32) & _MASK) ^ k1).bitwise_xor_(counter[3])
    c1.copy_(q1)
    c3.copy_(q0)
    for _ in range(1, rounds):
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        # int64 products wrap, and their low 64 bits are right; c1 and c3 only ever give their low words to
        # an xor, so masking c0 and c2 before the next product is enough.
        torch.mul(c0, _M0, out=p0)
        torch.mul(c2, _M1, out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, p1, c3, p0 = p1, c1, p0, c3
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def words(
    seed: int | Tensor,
    stream: Stream,
    chains: Tensor,
    steps: Tensor | int,
    n_blocks: int,
    first_block: int = 0,
    *,
    scratch: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four random words of each of n_blocks blocks, for each row.

    Args:
        seed: 64-bit integer, or a (1,) int64 tensor, whose value is not read on the host; negative seeds are taken
            modulo 2**64.
        stream: what the numbers are used for.
        chains: (rows,) int64 global chain numbers.
        steps: (rows,) int64 step numbers, or one number for all rows.
        n_blocks, first_block: which blocks of four words; block b holds the words of dims 4 b to 4 b + 3.
        scratch: six int64 work buffers of shape (rows, n_blocks); the result is four of them.

    Returns:
        Four int64 tensors (rows, n_blocks), words in [0, 2**32).
    """
    if scratch is None and _has_kernels(seed, chains):
        w0, w1, w2, w3 = (
            _word_bits(seed, stream, chains, steps, n_blocks, first_block).long().bitwise_and_(_MASK).unbind(2)
        )
        return w0, w1, w2, w3
    rows = chains.reshape(-1, 1)
    seed = seed.to(chains.device) if isinstance(seed, Tensor) else seed
    if not isinstance(steps, Tensor):  # created on the device: a copy from the host would synchronise
        steps = torch.full((1,), steps, dtype=torch.int64, device=chains.device)
    step = steps.to(chains.device, torch.int64).reshape(-1, 1)
    block = torch.arange(first_block, first_block + n_blocks, device=chains.device).reshape(1, -1)
    block = block | (int(stream) << 24)
    counter = (rows & _MASK, (rows >> 32) & _MASK, step & _MASK, block)
    return philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK), scratch=scratch)


def random_bytes(
    seed: int | Tensor, stream: Stream, chains: Tensor, steps: Tensor | int, n: int, first_block: int = 0
) -> Tensor:
    """The bytes of ``words``, 16 per block, the low byte of a word first: (rows, n) uint8."""
    arguments = seed, stream, chains, steps, (n + 15) // 16, first_block
    if _has_kernels(seed, chains):
        return _word_bits(*arguments).view(torch.uint8).flatten(1)[:, :n]
    low = torch.stack(words(*arguments), dim=2)[..., None].view(torch.uint8)[..., :4]
    return low.flatten(1)[:, :n]


def uniform(
    seed: int | Tensor,
    stream: Stream,
    chains: Tensor,
    steps: Tensor | int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers u(w) in (0, 1]: (rows, dim). Word j of block b gives dim 4 b + j. Arguments as for ``words``."""
    out = torch.empty(len(chains), _n_blocks(dim), 4, dtype=dtype, device=chains.device)
    if dtype == torch.float32 and _has_kernels(seed, chains):
        _draw(kernels.UNIFORM, seed, stream, chains, steps, 0, _n_blocks(dim), out)
        return _rows(out, dim)
    _uniform(seed, stream, chains, steps, out)
    return _rows(out, dim)


def _uniform(
    seed: int | Tensor, stream: Stream, chains: Tensor, steps: Tensor | int, out: Tensor, first_block: int = 0
) -> None:
    """``uniform`` by PyTorch operations. out: (rows, n_blocks, 4)."""
    for part, w, (u, _, _) in _chunks(seed, stream, chains, steps, out, first_block):
        for j in range(4):
            part[..., j] = _unit(w[j], u)


def normal(
    seed: int | Tensor,
    stream: Stream,
    chains: Tensor,
    steps: Tensor | int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal numbers: (rows, dim), by Box-Muller.

    The uniforms are float32 for every ``dtype``. So float32 normals are the float64 normals, rounded.

    Args:
        out: optional (rows, n_blocks, 4) buffer of ``dtype``; the result is then a view of it.
        The other arguments are those of ``words``.
    """
    if out is None:
        out = torch.empty(len(chains), _n_blocks(dim), 4, dtype=dtype, device=chains.device)
    if dtype == torch.float32 and out.is_contiguous() and _has_kernels(seed, chains):
        _draw(kernels.NORMAL, seed, stream, chains, steps, 0, _n_blocks(dim), out)
    else:
        _normal(seed, stream, chains, steps, out)
    return _rows(out, dim)


def _normal(
    seed: int | Tensor, stream: Stream, chains: Tensor, steps: Tensor | int, out: Tensor, first_block: int = 0
) -> None:
    """``normal`` by PyTorch operations. out: (rows, n_blocks, 4)."""
    for part, w, (radius, angle, cos) in _chunks(seed, stream, chains, steps, out, first_block):
        for j in (0, 2):
            _unit(w[j], radius).log_().mul_(-2.0).sqrt_()
            _unit(w[j + 1], angle).mul_(2.0 * math.pi)
            torch.mul(radius, torch.cos(angle, out=cos), out=part[..., j])
            torch.mul(radius, angle.sin_(), out=part[..., j + 1])


class Noise:
    """The random numbers of a set of chains, by stream and step.

    It holds the seed, the chain numbers and the lifetime steps, so that samplers need not handle them.

    A sampler that needs more than one set of numbers per step takes them from ``part``: parts use different blocks of
    the same stream. A sampler with several copies of each chain, such as a ladder of temperatures, uses ``copies``.

    Args:
        seed: 64-bit integer, or a (1,) int64 tensor.
        chains: (n,) int64 global chain numbers.
        first_steps: (n,) int64 lifetime step of each chain at step 0 of this call.
        dim: number of dims of a state.
        dtype: of the numbers.
        steps: number of steps of this call. Small draws of several steps are made together, to share PyTorch's cost
            per operation.
        frozen: (1 or n, dim) bool, True at coordinates without noise; or None.
        by_definition: always draw by PyTorch operations, the definition. Otherwise Numba's kernels draw if they can.
        indices: which parts, one for each copy of the chains. Part k has blocks k * n_blocks to (k + 1) * n_blocks - 1
            of a normal draw, and block k of a uniform one.
    """

    def __init__(
        self,
        seed: int | Tensor,
        chains: Tensor,
        first_steps: Tensor,
        dim: int,
        *,
        dtype: torch.dtype,
        steps: int,
        frozen: Tensor | None = None,
        by_definition: bool = False,
        indices: Sequence[int] = (0,),
    ) -> None:
        self.seed, self.chains, self.first_steps, self.dim, self.dtype = seed, chains, first_steps, dim, dtype
        self.steps, self.frozen, self.by_definition, self.indices = steps, frozen, by_definition, tuple(indices)
        # Runs of consecutive parts, each drawn at once: (first part, number of parts).
        place = count()
        runs = [list(run) for _, run in groupby(self.indices, lambda i: i - next(place))]
        self._runs = [(run[0], len(run)) for run in runs]
        # By kind and stream: a first step, and the numbers of each step from there on.
        self._ahead: dict[tuple[int, Stream], tuple[int, tuple[Tensor, ...]]] = {}
        self._parts: dict[tuple[int, ...], Noise] = {}

    @cached_property
    def age(self) -> int | None:
        """The chains' lifetime step at step 0 of this call. None if they differ, or if there are no chains."""
        ages = self.first_steps
        return int(ages[0]) if len(ages) > 0 and bool((ages == ages[0]).all()) else None

    def part(self, k: int, of: int) -> Noise:
        """The k-th of ``of`` sets of numbers for each step, 0 <= k < of. Parts of parts are different sets too.

        A sampler always uses the same ``of``. Part 0 has the numbers of the whole.
        """
        return self._with(tuple(i * of + k for i in self.indices), self.frozen)

    def copies(self, k: int, *, first: int = 0, of: int | None = None) -> Noise:
        """The numbers of k copies of each chain: row i k + r has those of part first + r of chain i.

        of: the number of parts, as for ``part``. None: k.
        """
        frozen = self.frozen
        if frozen is not None and len(frozen) > 1:
            frozen = frozen.repeat_interleave(k, dim=0)
        return self._with(tuple(i * (of or k) + r for i in self.indices for r in range(first, first + k)), frozen)

    def normal(self, stream: Stream, t: int) -> Tensor:
        """Standard normal numbers for step t of the call, (n, dim); 0 at frozen coordinates."""
        return self._at(kernels.NORMAL, stream, t)

    def uniform(self, stream: Stream, t: int) -> Tensor:
        """One uniform number in (0, 1] per chain for step t of the call, (n,)."""
        return self._at(kernels.UNIFORM, stream, t)

    def _with(self, indices: tuple[int, ...], frozen: Tensor | None) -> Noise:
        if indices not in self._parts:
            self._parts[indices] = Noise(
                self.seed, self.chains, self.first_steps, self.dim, dtype=self.dtype, steps=self.steps, frozen=frozen,
                by_definition=self.by_definition, indices=indices,
            )  # fmt: skip
        return self._parts[indices]

    def _kernels(self) -> bool:
        return not self.by_definition and self.dtype == torch.float32 and _has_kernels(self.seed, self.chains)

    def _at(self, kind: int, stream: Stream, t: int) -> Tensor:
        """The numbers for step t: (n, dim) if kind is NORMAL, (n,) if it is UNIFORM."""
        first, ahead = self._ahead.get((kind, stream), (0, ()))
        if not first <= t < first + len(ahead):
            first, ahead = t, self._drawn_ahead(kind, stream, t)
            self._ahead[kind, stream] = first, ahead
        return ahead[t - first]

    def _drawn_ahead(self, kind: int, stream: Stream, first: int) -> tuple[Tensor, ...]:
        """The numbers for some steps from ``first`` on."""
        size = _n_blocks(self.dim) if kind == kernels.NORMAL else 1
        if (max(self.indices) + 1) * size > 1 << 24:
            raise ValueError(f"a step has 2**24 blocks of random numbers: too few for {max(self.indices) + 1} parts")
        rows = len(self.chains) * len(self.indices)
        n_blocks = max(1, rows * size)
        most = min(_COUNTERS_PER_THREAD, _AHEAD * n_blocks) if self._kernels() else _blocks_at_once(self.chains.device)
        steps = max(1, min(most // n_blocks, self.steps - first))
        runs = [self._drawn(kind, stream, first, steps, start * size, n * size) for start, n in self._runs]
        numbers = runs[0] if len(runs) == 1 else torch.cat(runs, dim=2)
        if kind == kernels.UNIFORM:
            return numbers[..., 0].reshape(steps, rows).unbind()
        numbers = numbers.view(steps, rows, 4 * size)[..., : self.dim]
        return (numbers if self.frozen is None else numbers.masked_fill(self.frozen, 0.0)).unbind()

    def _drawn(self, kind: int, stream: Stream, first: int, n_steps: int, first_block: int, n_blocks: int) -> Tensor:
        """The numbers of these blocks for the steps from ``first`` on, (n_steps, n, n_blocks, 4)."""
        later = torch.arange(first, first + n_steps, device=self.chains.device)[:, None]
        # For one step the chain numbers are a view, not a copy: a pool may have millions.
        chains, steps = self.chains.expand(n_steps, -1).flatten(), (self.first_steps + later).flatten()
        out = torch.empty(len(chains), n_blocks, 4, dtype=self.dtype, device=chains.device)
        if self._kernels():
            _draw(kind, self.seed, stream, chains, steps, first_block, n_blocks, out)
        else:
            (_normal if kind == kernels.NORMAL else _uniform)(self.seed, stream, chains, steps, out, first_block)
        return out.view(n_steps, len(self.chains), n_blocks, 4)


def draw_seed(seed: int | None, generator: torch.Generator | None = None) -> int:
    """The seed modulo 2**64, or a random 64-bit seed from ``generator`` (default: torch's global CPU generator)."""
    if seed is not None:
        seed = plain_number(seed)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int or None, got {seed!r}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit 64 bits, got {seed}")
        return seed & 0xFFFFFFFFFFFFFFFF
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
    device = "cpu" if generator is None else generator.device
    low, high = torch.randint(2**32, (2,), generator=generator, device=device).tolist()
    return int(high) << 32 | int(low)


def _blocks_at_once(device: torch.device) -> int:
    """How many blocks of four normals to draw together, so that PyTorch's cost per operation is small."""
    return _CHUNK * torch.get_num_threads() if device.type == "cpu" else 0


def seed_words(seed: int | Tensor) -> tuple[int, int]:
    """The low and the high 32-bit word of a seed. A tensor must be on the CPU."""
    seed = int(seed.numpy().item()) if isinstance(seed, Tensor) else seed  # numpy() is faster than Tensor.item()
    return seed & _MASK, (seed >> 32) & _MASK


def _has_kernels(seed: int | Tensor, chains: Tensor) -> bool:
    """Whether Numba's kernels can draw for these chains. A tracer (torch.compile, fake tensors) needs PyTorch."""
    return (
        all(type(v) is Tensor and v.device.type == "cpu" for v in (seed, chains) if isinstance(v, Tensor))
        and not torch.compiler.is_compiling()
        and kernels.why_not() is None
    )


def _word_bits(
    seed: int | Tensor, stream: Stream, chains: Tensor, steps: Tensor | int, n_blocks: int, first_block: int
) -> Tensor:
    """``words`` as the kernel writes them: the bits of each as int32, (rows, n_blocks, 4)."""
    out = torch.empty(len(chains), n_blocks, 4, dtype=torch.float32, device=chains.device)
    _draw(kernels.WORDS, seed, stream, chains, steps, first_block, n_blocks, out)
    return out.view(torch.int32)


def _draw(
    kind: int, seed: int | Tensor, stream: Stream, chains: Tensor, steps: Tensor | int, first_block: int, n_blocks: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Draw with Numba's kernel on several threads. kind: WORDS, UNIFORM or NORMAL. out: (rows, n_blocks, 4) float32."""
    n = len(chains)
    if n == 0 or n_blocks == 0:
        return
    if not isinstance(steps, Tensor):
        steps = torch.full((1,), steps, dtype=torch.int64, device=chains.device)
    if chains.ndim != 1 or steps.numel() not in (1, n):
        raise ValueError(
            f"chains must be (n,), and steps a number or (n,), got {tuple(chains.shape)} and {tuple(steps.shape)}"
        )
    chains, steps = _int64_rows(chains), _int64_rows(steps)
    n_threads = torch.get_num_threads()
    # More parts than threads: if the machine delays one thread, the others take over its parts.
    n_parts = min(n, -(-n * n_blocks // _COUNTERS_PER_THREAD), 1 if n_threads == 1 else 4 * n_threads)
    size = -(-n // n_parts)
    arguments = seed_words(seed), int(stream), chains, steps, first_block, n_blocks, out
    parts = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    spares = [scratch.take() for _ in parts]
    Team([drawing(kind, part, w, *arguments) for part, w in zip(parts, spares, strict=True)], n_threads)()
    scratch.give(*spares)


def drawing(
    kind: int, rows: slice, spare: tuple[Tensor, Tensor], key: tuple[int, int], stream: int, chains: Tensor,
    steps: Tensor, first_block: int, n_blocks: int, out: Tensor,
) -> kernels.Call:  # fmt: skip
    """Prepare the call of the kernel that draws some rows of out.

    Args:
        spare: buffers from ``scratch``, which no other running call may use.
        steps: (1,) or one per chain, int64.
        out: (len(chains), n_blocks, 4) float32.
    """
    w, r = spare
    return kernels.load("update.draw").prepared(
        kind, rows.start, rows.stop, chains.shape[0], first_block, n_blocks, stream, *key, chains, steps,
        int(steps.shape[0] > 1), _FIRST, w, w if kind == kernels.WORDS else r, out, *_NOT_A_STEP,
    )  # fmt: skip


def _int64_rows(v: Tensor) -> Tensor:
    """Contiguous int64 (n,), as the kernel reads it."""
    # Usually nothing is to be done, and this check is faster than the conversions.
    return v if v.dtype is torch.int64 and v.ndim == 1 and v.is_contiguous() else v.long().flatten().contiguous()


def _scratch() -> tuple[Tensor, Tensor]:
    w, r, _ = kernels.scratch(0)
    return w, r


# Work buffers of draws. Reused buffers are still in the cache, which halves the time of a draw.
scratch = Spares(_scratch)
_NOT_A_STEP = (None, None, None, 0, 0, None, None, 0, 0, None, 0, 0, 0.0, 0.0)


def _rows(out: Tensor, dim: int) -> Tensor:
    """(rows, n_blocks, 4) -> (rows, dim), without the padding of the last block."""
    rows = out.flatten(1)
    return rows if rows.shape[1] == dim else rows[:, :dim]


def _n_blocks(dim: int) -> int:
    return (dim + 3) // 4


def _unit(w: Tensor, out: Tensor) -> Tensor:
    """u(w), rounded to float32 whatever the dtype of ``out``."""
    u = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    return out.copy_(u.copy_(w).add_(0.5).mul_(2.0**-32))


def _chunks(
    seed: int | Tensor, stream: Stream, chains: Tensor, steps: Tensor | int, out: Tensor, first_block: int
) -> Iterator[tuple[Tensor, tuple[Tensor, ...], list[Tensor]]]:
    """Yield (rows of ``out``, their four words, three work buffers of its dtype); the buffers are reused.

    On a CPU a chunk fits the cache; any other device takes all rows at once.
    """
    n_rows, n_blocks, _ = out.shape
    size = n_rows
    if out.device.type == "cpu":
        most = max(1, _blocks_at_once(out.device) // max(1, n_blocks))
        size = -(-n_rows // max(1, -(-n_rows // most)))  # equal chunks: a small last one would use one thread
    ints = torch.empty(6, size, n_blocks, dtype=torch.int64, device=out.device)
    floats = torch.empty(3, size, n_blocks, dtype=out.dtype, device=out.device)
    for i in range(0, n_rows, max(1, size)):
        rows = slice(i, min(i + size, n_rows))
        n = rows.stop - i
        step = steps[rows] if isinstance(steps, Tensor) else steps
        scratch = [t[:n] for t in ints]
        yield (
            out[rows],
            words(seed, stream, chains[rows], step, n_blocks, first_block, scratch=scratch),
            [t[:n] for t in floats],
        )
