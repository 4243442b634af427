"""Threads: how many PyTorch's operations may use, and work that is shared among some."""

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
    _pool, _pool_lock = None, threading.Lock()  # its threads did not come along


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Operations within use n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Fewer threads are taken where they save more than this: what a measurement of a few calls can tell from chance.
_GAIN = 1.1

# Seconds that all threads are timed for, unless they are clearly slower, by _CLEAR. A process that was idle has both
# cores for some time before the other has its share: in a shorter test two threads looked faster, and were 10 times
# slower.
_TIMED, _CLEAR, _ROUNDS = 1.0, 2.0, 3


def fastest(work: Callable[[], object], most: int) -> dict[int, float]:
    """Mean seconds that ``work`` takes, by number of threads: ``most``, half of them, ... and one. The number to take
    is the first.

    Where another process is busy on the cores, each of PyTorch's operations waits for the thread that shares a core
    with it: two threads have been 3 to 30 times slower than one.
    """
    numbers = [most]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    total, rounds = dict.fromkeys(numbers, 0.0), 0
    work()  # kernels are compiled, memory is taken
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
    """``work`` on every item, by n_threads threads at most, this one among them; PyTorch's operations within use one
    thread each. For work that spends its time without Python's lock.

    work: takes an item, and a function that tells whether to stop early: another has raised, which is raised here.
    """
    left, lock, stop = iter(items), threading.Lock(), threading.Event()
    before = torch.get_num_threads()
    errors: list[BaseException] = []

    def take(_: object = None) -> None:
        try:
            # For this thread; but PyTorch also takes it as the number for threads that are yet to start, so it is put
            # back to what the caller had, not to what a new thread finds.
            torch.set_num_threads(1)
            while not stop.is_set():
                with lock:
                    item = next(left, None)
                if item is None:
                    return
                work(item, stop.is_set)
        except BaseException as error:  # none may leave a function that C calls
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
    """One call of a kernel by n_threads threads at once, which take their parts of its work by a counter: like
    ``share``, but without Python between them, so that a few microseconds of work pay."""
    if n_threads > 1 and not _forked and (in_parallel := _openmp()) is not None:
        in_parallel(call.kernel.run, call.block, n_threads, 0)
    elif n_threads > 1:
        share(range(n_threads), lambda _, interrupted: call(), n_threads)
    else:
        call()


class Team:
    """Calls of kernels, each made once by n_threads threads at most, ``together``. To be run any number of times, by
    one caller at a time."""

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
    """Things to work with, each for one caller at a time, which are quicker to use again than to make.

    Not kept by ``threading.local``: a thread of OpenMP loses that whenever Python returns to C in it, and a view of a
    tensor that goes away then has Python's state of the thread freed twice.
    """

    def __init__(self, make: Callable[[], _Item]) -> None:
        self._make, self._left = make, list[_Item]()

    def take(self) -> _Item:
        try:
            return self._left.pop()
        except IndexError:
            return self._make()

    def give(self, *items: _Item) -> None:
        """Back; after an error they may be lost as well."""
        self._left.extend(items)


_TeamFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """``GOMP_parallel``, which runs a function on the threads of PyTorch's own OpenMP library. They start at once, and
    no thread of ours fits beside them: after an operation they wait for the next by spinning, for milliseconds.

    None where there is no function of that name (macOS, Windows).
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):
        return None
    parallel.argtypes, parallel.restype = [_TeamFunction, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


def _submit(work: Callable[[], None]) -> Future[None] | None:
    """None where no thread can be started any more: at the end of the process."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="fastebm")
        try:
            return _pool.submit(work)
        except RuntimeError:
            return None


def survives_fork(function: _Function) -> _Function:
    """In a process that was forked, on one thread: OpenMP's do not survive, and an operation would wait for them for
    ever. PyTorch's operations on many numbers do, where no one sees to it."""

    @functools.wraps(function)
    def call(*arguments: object, **options: object) -> object:
        # torch.compile can't trace a change of threads
        if not _forked or torch.compiler.is_compiling():
            return function(*arguments, **options)
        with threads(1):
            return function(*arguments, **options)

    return call  # type: ignore[return-value]


def outside_inference(function: _Function) -> _Function:
    """``survives_fork``; and tensors that are made within are no inference tensors, even inside torch.inference_mode:
    they can be kept, and changed in place at any time."""
    guarded = survives_fork(function)

    @functools.wraps(function)
    def call(*arguments: object, **options: object) -> object:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return guarded(*arguments, **options)
        with torch.inference_mode(False), torch.no_grad():
            return guarded(*arguments, **options)

    return call  # type: ignore[return-value]
