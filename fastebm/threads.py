"""How many threads PyTorch's operations use, and work shared among threads."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from .kernels import cpu as kernels

__all__ = ["Spares", "Team", "fastest", "outside_inference", "share", "survives_fork", "threads", "together"]

_Function = TypeVar("_Function", bound=Callable[..., object])
_Item = TypeVar("_Item")

_forked = False
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _note_fork() -> None:
    global _forked, _pool, _pool_lock
    _forked = True
    _pool, _pool_lock = None, threading.Lock()  # a fork copies no other threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """PyTorch's operations inside use n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Fewer threads are chosen if they are faster by more than this factor: timings of a few calls vary by less.
_GAIN = 1.1

# Seconds for which all threads are timed, unless they are slower by the factor _CLEAR. A process that was idle gets
# both cores for a while before a busy process gets its share: in a shorter test two threads looked faster, and were
# 10 times slower.
_TIMED, _CLEAR, _ROUNDS = 1.0, 2.0, 3


def fastest(work: Callable[[], object], most: int) -> dict[int, float]:
    """Time ``work`` with ``most`` threads, half of them, ... and one.

    While another process keeps the cores busy, each of PyTorch's operations waits for the thread that shares its core
    with that process: two threads have been 3 to 30 times slower than one.

    Returns:
        Number of threads -> mean seconds. The number to choose is the first key.
    """
    numbers = [most]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    total, rounds = dict.fromkeys(numbers, 0.0), 0
    work()  # warm-up: kernels are compiled, memory is allocated
    while rounds < _ROUNDS or (total[most] < _TIMED and total[most] < _CLEAR * min(total.values())):
        for n in numbers:
            with threads(n):
                started = time.perf_counter()
                work()
                total[n] += time.perf_counter() - started
        rounds += 1
    best = min(numbers, key=lambda n: total[n] * (_GAIN if n < most else 1.0))
    return {n: total[n] / rounds for n in sorted(numbers, key=lambda n: n != best)}


def share(items: Iterable[_Item], work: Callable[[_Item, Callable[[], bool]], None], n_threads: int) -> None:
    """Call ``work`` on every item, on at most n_threads threads including this one.

    It pays for work that releases the GIL. PyTorch's operations inside use one thread each.

    Args:
        work: called with an item and a function that returns whether to stop early, since another call has raised.

    Raises:
        The first exception of any call.
    """
    left, lock, stop = iter(items), threading.Lock(), threading.Event()
    before = torch.get_num_threads()
    errors: list[BaseException] = []

    def take(_: object = None) -> None:
        try:
            # This sets the number for this thread, and also for threads that start later. So it is restored to the
            # caller's number, not to what this thread had.
            torch.set_num_threads(1)
            while not stop.is_set():
                with lock:
                    item = next(left, None)
                if item is None:
                    return
                work(item, stop.is_set)
        except BaseException as error:  # C calls this function, so no exception may leave it
            stop.set()
            errors.append(error)
        finally:
            torch.set_num_threads(before)

    if n_threads == 1:
        take()
    elif not _forked and (in_parallel := _openmp()) is not None:
        in_parallel(_TeamFunction(take), None, n_threads, 0)
    else:
        others = [other for _ in range(n_threads - 1) if (other := _submit(take)) is not None]
        take()
        for other in others:
            if not other.cancel():
                other.result()
    if errors:
        raise errors[0]


def together(call: kernels.Call, n_threads: int) -> None:
    """Run one call of a kernel on n_threads threads, which take parts of its work from a shared counter.

    It is ``share`` without Python in the threads, so that it pays for a few microseconds of work.
    """
    if n_threads > 1 and not _forked and (in_parallel := _openmp()) is not None:
        in_parallel(call.kernel.run, call.block, n_threads, 0)
    elif n_threads > 1:
        share(range(n_threads), lambda _, interrupted: call(), n_threads)
    else:
        call()


class Team:
    """A list of kernel calls that at most n_threads threads share, each call made once.

    It may run any number of times, for one caller at a time.
    """

    def __init__(self, calls: Sequence[kernels.Call], n_threads: int) -> None:
        self._calls, self._n_threads = calls, min(len(calls), n_threads)
        if self._n_threads > 1:
            self._taken = torch.zeros(1, dtype=torch.int64, device="cpu")
            arguments = kernels.listed(calls), len(calls), self._taken
            self._shared = kernels.load("program.share").prepared(*arguments)
            self._shared.kept = arguments, calls

    def __call__(self) -> None:
        if self._n_threads > 1:
            self._taken.zero_()
            together(self._shared, self._n_threads)
        else:
            for call in self._calls:
                call()


class Spares(Generic[_Item]):
    """Reusable objects such as scratch buffers, each used by one caller at a time.

    ``threading.local`` would not do: an OpenMP thread loses it whenever Python returns to C, and a tensor view that is
    freed then makes Python free its thread state twice.
    """

    def __init__(self, make: Callable[[], _Item]) -> None:
        self._make, self._left = make, list[_Item]()

    def take(self) -> _Item:
        try:
            return self._left.pop()
        except IndexError:
            return self._make()

    def give(self, *items: _Item) -> None:
        """Return items. After an error they need not be returned."""
        self._left.extend(items)


_TeamFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """``GOMP_parallel``, which runs a function on the threads of PyTorch's own OpenMP library.

    Those threads start at once. Threads of our own would compete with them: after an operation they spin for
    milliseconds, waiting for the next one.

    Returns:
        None if the library has no function of that name (macOS, Windows).
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):
        return None
    parallel.argtypes, parallel.restype = [_TeamFunction, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


def _submit(work: Callable[[], None]) -> Future[None] | None:
    """Start work in a thread; None if the process is ending and starts no more threads."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="fastebm")
        try:
            return _pool.submit(work)
        except RuntimeError:
            return None


def survives_fork(function: _Function) -> _Function:
    """Decorator: in a forked process, run the function on one thread.

    OpenMP's threads do not survive a fork, and an operation that uses several would wait for them forever.
    """

    @functools.wraps(function)
    def call(*arguments: object, **options: object) -> object:
        # torch.compile can't trace a change of threads
        if not _forked or torch.compiler.is_compiling():
            return function(*arguments, **options)
        with threads(1):
            return function(*arguments, **options)

    return call  # type: ignore[return-value]


def outside_inference(function: _Function) -> _Function:
    """Decorator: ``survives_fork``, and leave torch.inference_mode, with gradients off.

    So the tensors that the function creates are normal tensors, which can be stored, and changed in place later.
    """
    guarded = survives_fork(function)

    @functools.wraps(function)
    def call(*arguments: object, **options: object) -> object:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return guarded(*arguments, **options)
        with torch.inference_mode(False), torch.no_grad():
            return guarded(*arguments, **options)

    return call  # type: ignore[return-value]
