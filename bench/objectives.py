"""Objectives beside those of the same name in ebmkit: what they learn in the plane, and the seconds per step.

    python bench/objectives.py                        all objectives, on moons and checkerboard: half an hour
    python bench/objectives.py dsm nce --seeds 0 1    some of them, with more seeds

Both libraries train the same network from the same start on the same batches, with the same optimiser and the same
settings of the objective. They take turns, so that both are timed under the same conditions. Only their random numbers
differ. Writes objectives.csv into --out; rows of the same data, objective, seed and library in the file are replaced.

- log_likelihood: mean over held-out rows, in nats, of the trained energy, with Z by quadrature. A noise-conditional
  energy is taken at its lowest level.
- kernel_density: the same of a kernel density estimate with a cross-validated bandwidth.
- seconds_per_step: median over blocks of steps.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastebm.bench import rows
from torch import Tensor, nn

import fastebm
from fastebm.data.dataset import Data
from fastebm.data.sets import load
from fastebm.evaluate.likelihood import kernel_density, log_z_by_quadrature

DATA = ("moons", "checkerboard")
STEPS, BLOCK, BATCH = 2000, 50, 256
WIDTHS = (128, 128, 128)

# States have a standard deviation of 4 (fastebm/data/info.py).
SIGMA = 0.4
SIGMAS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
CHAINS, CHAIN_STEPS, DRIFT, NOISE_STD, REINIT, REGULARISER = 10_000, 20, 0.01125, 0.15, 0.02, 1e-3
RECOVERY_STEPS, RECOVERY_SCALE = 20, 0.3
NOISE_RATIO = 4
DISCREPANCY, NEGATIVES = 1.0, 16


@dataclass(frozen=True)
class Case:
    """An objective in both libraries. ours, theirs: from the data and a seed. conditional: E(x, sigma)."""

    ours: Callable[[Data, int], nn.Module]
    theirs: Callable[[Data], nn.Module]
    learning_rate: float = 2e-3
    conditional: bool = False
    samples: bool = False


def libraries() -> list[str]:
    """Those that are installed."""
    return ["fastebm", *(["ebmkit"] if importlib.util.find_spec("ebm") else [])]


def _their_losses() -> Any:
    from ebm import losses

    return losses


def _our_pcd(data: Data, seed: int) -> nn.Module:
    pool = fastebm.ChainPool(CHAINS, data.dim, clamp=data.info.clamp, seed=seed, reinit_prob=REINIT)
    sampler = fastebm.Langevin.from_drift_and_noise(DRIFT, NOISE_STD)
    return fastebm.ContrastiveDivergence(sampler, CHAIN_STEPS, pool=pool, reg_alpha=REGULARISER, seed=seed)


def _their_pcd(data: Data) -> nn.Module:
    import ebm

    lo, hi = data.info.clamp
    init = lambda size: torch.rand(size) * (hi - lo) + lo  # noqa: E731
    buffer = ebm.ReplayBuffer(CHAINS, (data.dim,), reinit_prob=REINIT, init_fn=init)
    sampler = ebm.LangevinDynamics(DRIFT, CHAIN_STEPS, noise_scale=NOISE_STD, clamp=(lo, hi))
    return ebm.ContrastiveDivergence(sampler, buffer, energy_reg=REGULARISER)


def _noise_of(data: Data) -> torch.distributions.Distribution:
    mean, covariance = data.train.mean(0), data.train.T.cov()
    return torch.distributions.MultivariateNormal(mean, covariance)


CASES = {
    "pcd": Case(_our_pcd, _their_pcd, 5e-3, samples=True),
    "dsm": Case(
        lambda _, seed: fastebm.DenoisingScoreMatching(SIGMA, seed=seed),
        lambda _: _their_losses().DenoisingScoreMatching(SIGMA),
    ),
    "multi_dsm": Case(
        lambda _, seed: fastebm.MultiLevelDenoisingScoreMatching(SIGMAS, seed=seed),
        lambda _: _their_losses().MultiSigmaDenoisingScoreMatching(torch.tensor(SIGMAS)),
        conditional=True,
    ),
    "ssm": Case(
        lambda _, seed: fastebm.SlicedScoreMatching(seed=seed), lambda _: _their_losses().SlicedScoreMatching()
    ),
    "esm": Case(lambda _, seed: fastebm.ExactScoreMatching(seed=seed), lambda _: _their_losses().ExactScoreMatching()),
    "nce": Case(
        lambda data, seed: fastebm.NoiseContrastiveEstimation(
            fastebm.GaussianNoise.fit(data.train), noise_ratio=NOISE_RATIO, seed=seed
        ),
        lambda data: _their_losses().NoiseContrastiveEstimation(_noise_of(data), NOISE_RATIO),
    ),
    "energy_discrepancy": Case(
        lambda _, seed: fastebm.EnergyDiscrepancy(DISCREPANCY, NEGATIVES, seed=seed),
        lambda _: _their_losses().EnergyDiscrepancy(math.sqrt(DISCREPANCY), NEGATIVES),
    ),
    "diffusion_recovery": Case(
        lambda _, seed: fastebm.DiffusionRecoveryLikelihood(
            SIGMAS, RECOVERY_STEPS, step_scale=RECOVERY_SCALE, seed=seed
        ),
        # ebmkit's step moves by (its scale) s^2 dE/dx, and ours by half of (our scale s)^2 dE/dx
        lambda _: _their_losses().DiffusionRecoveryLikelihood(
            torch.tensor(SIGMAS), RECOVERY_STEPS, RECOVERY_SCALE**2 / 2
        ),
        conditional=True,
        samples=True,
    ),
}


class Run:
    """One library's training: its model, optimiser and clock."""

    def __init__(self, library: str, case: Case, data: Data, start: nn.Module, seed: int) -> None:
        self.model = copy.deepcopy(start)
        self.energy = self.model
        if library == "ebmkit" and not case.conditional:  # it takes energies of (n,)
            from ebm import EnergyModel

            self.energy = EnergyModel(self.model)
        self.objective = case.ours(data, seed) if library == "fastebm" else case.theirs(data)
        parameters = [*self.model.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.Adam(parameters, case.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, STEPS)
        self.seconds: list[float] = []

    def block(self, batches: Sequence[Tensor]) -> None:
        begun = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            self.objective(self.energy, batch).loss.backward()
            self.optimizer.step()
            self.schedule.step()
        self.seconds.append((time.perf_counter() - begun) / len(batches))


def start_of(case: Case, data: Data, seed: int) -> nn.Module:
    """The network of both libraries, with its first weights."""
    torch.manual_seed(seed)
    if not case.conditional:
        return fastebm.MLPEnergy(data.dim, WIDTHS)
    features = 5  # of the noise level, as NoiseConditionalEnergy gives them to its network
    network = fastebm.MLPEnergy(data.dim + features, WIDTHS, outputs=data.dim)
    return fastebm.NoiseConditionalEnergy(network, float(data.train.std()))


def log_likelihood(model: nn.Module, case: Case, data: Data) -> float:
    def energy(x: Tensor) -> Tensor:
        return fastebm.energy(model, x, condition=torch.full((len(x),), SIGMAS[-1], dtype=x.dtype))

    with torch.no_grad():
        model = model.double()
        of_states = energy if case.conditional else functools.partial(fastebm.energy, model)
        e = of_states(data.test.double())
        return -float(e.mean()) - log_z_by_quadrature(of_states, data.info.clamp)


def measure(name: str, set_name: str, seed: int) -> list[dict[str, Any]]:
    case, data = CASES[name], load(set_name, seed)
    start = start_of(case, data, seed)
    runs = {library: Run(library, case, data, start, seed) for library in libraries()}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS // BLOCK):
        batches = [data.batch(BATCH, 0.0, generator)[0] for _ in range(BLOCK)]
        for run in runs.values():
            run.block(batches)
    densities, _ = kernel_density(data.train, data.test, seed=seed)
    return [
        {
            "data": set_name,
            "objective": name,
            "seed": seed,
            "library": library,
            "samples": case.samples,
            "steps": STEPS,
            "log_likelihood": log_likelihood(run.model, case, data),
            "kernel_density": float(densities.mean()),
            "seconds_per_step": statistics.median(run.seconds),
            "threads": torch.get_num_threads(),
        }
        for library, run in runs.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = rows.script(__doc__)
    names = ", ".join(CASES)
    parser.add_argument("objectives", nargs="*", choices=[[], *CASES], default=[], metavar="NAME", help=names)
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA, metavar="DATASET", help=", ".join(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="default: 0")
    rows.add_out(parser)
    arguments = parser.parse_args(argv)
    common = rows.provenance("ebmkit")
    for name in arguments.objectives or CASES:
        for set_name in arguments.data:
            for seed in arguments.seeds:
                new = [rows.rounded(row) for row in measure(name, set_name, seed)]
                for row in new:
                    print({k: v for k, v in row.items() if k not in ("samples", "steps", "threads")}, flush=True)
                same = ("data", "objective", "seed", "library")
                rows.replace(arguments.out / "objectives.csv", [{**row, **common} for row in new], same)
    return 0


if __name__ == "__main__":
    sys.exit(main())
