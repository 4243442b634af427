"""Set-up and fixtures of all tests. Without a GPU, Triton's interpreter runs the kernels."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

# Set before triton is imported, which reads the variable when it decorates a kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tensors are small, so that a second thread would mostly wait


def patch_language_once() -> None:
    """Save two fifths of the time of Triton's interpreter.

    It patches triton.language once per launch, and again, without effect, for every function that the kernel calls.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()

    def patch_unless_done(function: Callable[..., object]) -> object:
        done = not any(language.core.is_builtin(part.load) for part in (language, language.core))
        return nothing if done else patch(function)

    interpreter._patch_lang = patch_unless_done


def multiply_rows_alone() -> None:
    """In Triton's interpreter, round a row of a matrix product the same way at every place, as tensor cores do.

    On CPUs without AVX-512, OpenBLAS rounds a row by its place in the matrix.
    """
    from triton.runtime import interpreter

    own = ModuleType("numpy")
    own.__dict__.update(vars(numpy))

    def matmul(a: numpy.ndarray, b: numpy.ndarray, dtype: object = None) -> numpy.ndarray:
        if a.ndim != 2 or b.ndim != 2:
            return numpy.matmul(a, b, dtype=dtype)
        return numpy.matmul(a[:, None, :], b, dtype=dtype)[:, 0, :]

    own.matmul = matmul
    interpreter.np = own


if not torch.cuda.is_available() and find_spec("triton"):
    patch_language_once()
    multiply_rows_alone()

settings.register_profile("fastebm", deadline=None, derandomize=True)
settings.load_profile("fastebm")


@pytest.fixture
def seeded() -> Iterator[None]:
    """PyTorch's generator starts from 0, and has its former state after the test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def device() -> str:
    """Where Triton's kernels run: "cuda", or "cpu" in the interpreter if there is no GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def home(backend: str, device: str) -> str:
    """The device on which a test runs its backend: only backend="triton" uses the GPU."""
    return device if backend == "triton" else "cpu"


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, or the largest integer, so that a test fails if an element is never written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def fresh_compiler() -> None:
    """torch.compile has compiled nothing yet, and PyTorch's generator starts from 0."""
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``without_numba(f, ...)`` calls f(...) as on a machine without Numba, so that plain PyTorch computes."""
    from fastebm.kernels import cpu

    def result(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "why_not", lambda: "off for this test")
            return function(*arguments, **options)

    return result


@pytest.fixture(scope="module")
def often_put_together():
    """Chains whose steps run in the first layer are put together every 8 steps, so that short runs see it too."""
    from fastebm.samplers import collapsed, collapsed_langevin, collapsed_underdamped

    with pytest.MonkeyPatch.context() as patch:
        for module in (collapsed, collapsed_langevin, collapsed_underdamped):
            patch.setattr(module, "REFRESHED", 8)
        yield


@pytest.fixture(params=["OpenMP's threads", "Python's threads"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs once with PyTorch's OpenMP threads, and once as on a machine without them."""
    from fastebm import threads

    if request.param == "Python's threads":
        monkeypatch.setattr(threads, "_openmp", lambda: None)  # private, because this machine has OpenMP
    elif threads._openmp() is None:
        pytest.skip("PyTorch has no OpenMP here")


@pytest.fixture
def untouched() -> Callable[..., AbstractContextManager[None]]:
    """``with untouched(model, *tensors):`` asserts that the block changes no bit of them or of the global generator."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    def look(model: nn.Module, tensors: tuple[Tensor, ...]) -> list[object]:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return [
            *(bits(t) for t in (*named.values(), *tensors) if not t.is_meta),
            *(None if p.grad is None else bits(p.grad) for p in model.parameters() if not p.is_meta),
            list(named),
            [m.training for m in model.modules()],
            [p.requires_grad for p in named.values()],
            torch.get_rng_state(),
        ]

    @contextmanager
    def watch(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
        before = look(model, tensors)
        yield
        for old, new in zip(before, look(model, tensors), strict=True):
            assert torch.equal(old, new) if isinstance(old, Tensor) else old == new

    return watch


@pytest.fixture(scope="module")
def few_trees():
    """A report in half a second: most of its time is for the forests, which test_evaluate.py tests."""
    from fastebm import evaluate

    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(evaluate.two_sample_accuracy, n_trees=3, n_repeats=1)
        patch.setattr(evaluate, "two_sample_accuracy", few)
        yield
