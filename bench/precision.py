"""How far each precision of the fused kernel is from float64: python bench/precision.py

One step of gradient descent of the kernel itself, which gives the gradient that it computed; beside it the same
arithmetic in plain PyTorch (tests hold the kernel to twice that error, plus rounding). Errors are root-mean-square over
256 chains, relative to that of the gradient. Without a GPU the kernel runs in Triton's interpreter, which cuts where a
GPU rounds to bf16 and multiplies tf32 in full: what a GPU's tensor cores make of the same operands stands in a column
of its own, in plain PyTorch.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastebm.bench.cases import DIGITS, TABLE, TOY, Case
from fastebm.bench.problem import Problem, plain_gradient
from fastebm.bench.rows import RESULTS, write
from fastebm.kernels.launch import PRECISIONS

from fastebm import langevin_sample
from fastebm.energies import Energy

N_CHAINS = 256


def rms(v: torch.Tensor) -> float:
    return float(v.double().square().mean().sqrt())


def rows_of(case: Case, device: torch.device) -> list[dict[str, object]]:
    p = Problem(case, device)
    exact = Energy(p.energy, case.shape, torch.float64).gradient(p.x0.double())
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


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for energy in (TOY, TABLE, DIGITS) for row in rows_of(Case(*energy, N_CHAINS), device)]
    for row in rows:
        print(*row.values(), sep="  ")
    write(RESULTS / "precision.csv", rows)


if __name__ == "__main__":
    main()
