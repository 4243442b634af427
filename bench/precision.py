"""The error of each precision of the fused kernel against float64.

    python bench/precision.py       one or two minutes on a CPU; writes precision.csv into --out

The kernel takes one step of gradient descent, which shows the gradient that it computed. It is compared with the same
arithmetic in plain PyTorch (tests allow the kernel twice that error, plus rounding). Errors are root-mean-square over
256 chains, relative to the root-mean-square of the gradient. Without a GPU the kernel runs in Triton's interpreter,
which truncates where a GPU rounds to bf16, and multiplies tf32 operands in full precision. A separate column has the
error of plain PyTorch with the roundings of a GPU's tensor cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from fastebm.bench.cases import DIGITS, TABLE, TOY, Case
from fastebm.bench.problem import Problem, plain_gradient
from fastebm.bench.rows import add_out, script, write
from fastebm.kernels.triton.launch import PRECISIONS

from fastebm import langevin_sample

N_CHAINS = 256


def rms(v: torch.Tensor) -> float:
    return float(v.double().square().mean().sqrt())


def rows_of(case: Case, device: torch.device) -> list[dict[str, object]]:
    p = Problem(case, device)
    exact = p.gradient(p.x0.double())
    rows: list[dict[str, object]] = []
    assert p.mlp is not None
    for precision in PRECISIONS:
        moved, info = langevin_sample(  # type: ignore[misc]
            p.energy, init=p.x0, steps=1, step_size=2.0, noise_scale=0.0, backend="triton", precision=precision,
            return_info=True,
        )  # fmt: skip
        errors = {
            "kernel_error": p.x0 - moved - exact,
            "plain_error": plain_gradient(p.mlp, p.x0, precision) - exact,
            "plain_error_on_gpu": plain_gradient(p.mlp, p.x0, precision, on_gpu=True) - exact,
        }
        row = {"case": case.energy, "precision": precision, "path": info.path, "device": device.type}
        rows.append(row | {name: f"{rms(error) / rms(exact):.2e}" for name, error in errors.items()})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    add_out(parser)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first launch, which imports triton
    rows = [row for energy in (TOY, TABLE, DIGITS) for row in rows_of(Case(*energy, N_CHAINS), device)]
    for row in rows:
        print(*row.values(), sep="  ")
    write(arguments.out / "precision.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
