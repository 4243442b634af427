"""The figure of docs/samplers.md, trajectories.png: one chain of each sampler on the mixture of sampling_targets.py.

python bench/trajectories.py               into runs/bench: seconds
python bench/trajectories.py --out docs    into docs/

Every chain starts in the left mode and takes GRADIENTS gradients, from a fixed seed. Nothing is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastebm.bench.cases import SAMPLING
from fastebm.bench.rows import add_out, script
from fastebm.bench.sampling_contestants import FRICTION, TEMPERATURES
from fastebm.bench.sampling_targets import Target
from torch import Tensor

import fastebm
from fastebm.plot import WIDTH, blank, png

GRADIENTS, SEED = 240, 3
LIMITS = (-6.0, 6.0), (-3.6, 3.6)


def samplers(length: float) -> dict[str, tuple[Any, int]]:
    """Title -> a sampler whose steps have this length, and its gradients per step."""
    mala = fastebm.MALA(4 * length**2)
    return {
        "Langevin": (fastebm.Langevin(length**2), 1),
        "MALA": (mala, 1),
        "HMC": (fastebm.HMC(length, n_leapfrog=4), 4),
        "UnderdampedLangevin": (fastebm.UnderdampedLangevin(length, friction=FRICTION), 1),
        "ParallelTempering": (fastebm.ParallelTempering(mala, TEMPERATURES), len(TEMPERATURES)),
    }


def path_of(p: Target, sampler: Any, gradients_per_step: int) -> Tensor:
    """(steps + 1, 2): the states of one chain, from the middle of the left mode on."""
    start = torch.tensor([[-float(p.energy.means[:, 0].max()), 0.0]])
    steps = GRADIENTS // gradients_per_step
    result = fastebm.sample(p.energy, sampler, init=start, steps=steps, thin=1, seed=SEED)
    return torch.cat([start, result.trajectory[0]])


def figure_of(p: Target) -> Any:
    """One panel per sampler: density in grey, the path, and its states."""
    figure = blank(WIDTH, 5.2, f"One chain of each sampler, {GRADIENTS} gradients, from the left mode")
    x, y = np.linspace(*LIMITS[0], 160), np.linspace(*LIMITS[1], 100)
    grid = torch.tensor(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2), dtype=torch.float32)
    density = (-p.values(grid)).exp().reshape(len(y), len(x)).numpy()
    for i, (name, (sampler, gradients)) in enumerate(samplers(p.case.length).items()):
        axes = figure.add_subplot(2, 3, i + 1)
        axes.contourf(x, y, density, levels=8, cmap="Greys", alpha=0.6)
        path = path_of(p, sampler, gradients).numpy()
        axes.plot(*path.T, "-", color="#0072B2", linewidth=0.6)
        axes.plot(*path.T, "o", color="#0072B2", markersize=2.2)
        axes.plot(*path[0], "s", color="#D55E00", markersize=6)
        axes.set(xlim=LIMITS[0], ylim=LIMITS[1], aspect="equal")
        axes.set_title(f"{name}: {len(path) - 1} steps", fontsize=10)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = script(__doc__)
    add_out(parser, committed="docs")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "trajectories.png"
    path.write_bytes(png(figure_of(Target(SAMPLING["sampling-mixture"]))))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
