"""Matrix products as prepared calls: of BLAS' sgemm, from the library that PyTorch uses, or else of PyTorch.

Their bits do not depend on the number of rows: see targets/closed_form.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import cpu as kernels
from ..kernels.cpu import Call
from ..targets.closed_form import product, rounds_alike, rows_of_products

__all__ = ["matrix_product"]


def matrix_product(a: Tensor, w: Tensor, out: Tensor, *, add: bool = False) -> list[Callable[[], object]]:
    """The calls that compute out (+)= a @ w."""
    if w.dtype != a.dtype:

        def in_bf16() -> None:
            narrow = product(a.to(w.dtype), w, None, torch.empty_like(out, dtype=w.dtype))
            _ = out.add_(narrow) if add else out.copy_(narrow)

        return [in_bf16]
    if (sgemm := _sgemm()) is None:
        return [lambda: product(a, w, None, out, add=add)]
    few, many = rows_of_products(a.device), len(a)
    if not rounds_alike(_multiply, *w.shape, _is_transposed(w), few, many, a.dtype):
        many = few
    return [_gemm(sgemm, a[i : i + many], w, out[i : i + many], add) for i in range(0, len(a), many)]


def _is_transposed(w: Tensor) -> bool:
    """Whether the columns of w are contiguous."""
    return w.stride(0) == 1 and w.stride(1) >= len(w)


def _gemm(sgemm: int, a: Tensor, w: Tensor, out: Tensor, add: bool) -> Call:
    """The call of BLAS' sgemm that computes out (+)= a @ w."""
    (n, n_in), n_out = a.shape, out.shape[1]
    transposed = _is_transposed(w)
    # BLAS requires a stride of at least the row length, even for a single row.
    w_stride = max(w.stride(1), n_in) if transposed else max(w.stride(0), n_out)
    letters = int.from_bytes(b"TN" if transposed else b"NN", "little")
    call = kernels.load("program.gemm").prepared(
        sgemm, w.data_ptr(), a.data_ptr(), out.data_ptr(), letters, n_out, n, n_in, 1.0, w_stride, a.stride(0),
        float(add), out.stride(0),
    )  # fmt: skip
    call.kept = a, w, out
    return call


def _multiply(a: Tensor, w: Tensor, out: Tensor) -> None:
    sgemm = _sgemm()
    assert sgemm is not None  # only called if there is one
    _gemm(sgemm, a, w, out, False)()


@cache
def _sgemm() -> int | None:
    """The address of sgemm in the BLAS library that PyTorch uses, or None if it is not found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            address = ctypes.cast(ctypes.CDLL(str(folder / name)).sgemm_, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        # Test that it is sgemm: on small integers, its result is exact.
        a, w, out = (
            torch.arange(n, dtype=torch.float32, device="cpu").reshape(shape)
            for n, shape in ((6, (2, 3)), (12, (3, 4)), (8, (2, 4)))
        )
        if address is not None:
            expected = out + a @ w
            _gemm(address, a, w, out, True)()
            return address if torch.equal(out, expected) else None
    return None
