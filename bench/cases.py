"""What the benchmarks run, as data: energies, numbers of chains, the numbers of a step. Nothing here measures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# x' = clamp(x - DRIFT dE/dx + NOISE_STD xi). The speed does not depend on them. These values keep the chains of every
# energy finite, and let them reach the bounds sometimes, so that a contestant that does not clamp is detected.
DRIFT = 0.05
NOISE_STD = 0.3
CLAMP = (-1.0, 1.0)


@dataclass(frozen=True)
class Case:
    """``steps`` Langevin steps of ``n_chains`` chains: x' = clamp(x - drift dE/dx + noise_std xi).

    kind: "mlp": SiLU layers dim -> widths -> 1. "conv": a square image of dim pixels, one 3x3 convolution of
    stride 2 and a SiLU for each of ``widths`` channels, and a Linear. "gaussian", "mixture": laws known in closed
    form (problem.py); ``steps`` is the number of steps between two kept draws.
    """

    dim: int
    widths: tuple[int, ...]
    n_chains: int
    steps: int = 60
    kind: str = "mlp"
    drift: float = DRIFT
    noise_std: float = NOISE_STD
    clamp: tuple[float, float] | None = CLAMP

    @property
    def energy(self) -> str:
        layers = f"{self.dim}-{list(self.widths)}" if self.widths else f"{self.dim}"
        return layers if self.kind == "mlp" else f"{self.kind} {layers}"

    @property
    def name(self) -> str:
        return f"{self.energy} x {self.n_chains}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one state, as the energy takes it."""
        side = math.isqrt(self.dim)
        return (1, side, side) if self.kind == "conv" else (self.dim,)


@dataclass(frozen=True)
class TrainingCase:
    """A training step by persistent contrastive divergence: ``batch_size`` of ``n_chains`` chains move ``steps`` steps.

    The energy is the MLP dim -> widths -> 1. A drawn chain starts again with probability ``restart_prob``.
    """

    n_chains: int
    dim: int = 64  # as in `fastebm train digits`
    widths: tuple[int, ...] = (128, 128)
    batch_size: int = 256
    steps: int = 60
    restart_prob: float = 0.05
    drift: float = DRIFT
    noise_std: float = NOISE_STD
    clamp: tuple[float, float] = CLAMP

    @property
    def energy(self) -> str:
        return f"{self.dim}-{list(self.widths)}"


@dataclass(frozen=True)
class SamplingCase:
    """Samplers on one law: ``n_chains`` chains, ``draws`` kept states per chain and round.

    kind: "gaussian" (condition number 100, random directions), "banana", "mixture" (two modes), "mlp" (a trained MLP
    plus a quadratic term), or "random mlp" (with random weights): see sampling_targets.py.
    length: the typical length of one step. Samplers without an accept test take such steps; the others start their
    search for a step size there.
    warmup: steps in which contestants adapt themselves. 0: none does, and all take steps of ``length``.
    seeds: the whole comparison is repeated with so many seeds, an odd number, and each contestant's median counts.
    n_leapfrog: of HMC, for all libraries: with the step sizes that they find, about a quarter period of the widest
    coordinate.
    unit_mass: of HMC, for all libraries. Else a library's own adaptation, if it has one, finds the mass.
    """

    kind: str
    dim: int
    n_chains: int
    length: float
    n_leapfrog: int
    draws: int = 100
    warmup: int = 400
    widths: tuple[int, ...] = ()
    only: tuple[str, ...] = ()  # samplers that take part; none: all
    seeds: int = 1
    unit_mass: bool = False

    @property
    def energy(self) -> str:
        return f"{self.kind} {self.dim}" + (f"-{list(self.widths)}" if self.widths else "")


# A toy, a small table, digits in grey, small photographs in colour.
TOY, TABLE, DIGITS, PHOTOGRAPHS = (2, (128, 128)), (64, (128, 128)), (784, (256, 128)), (3072, (512, 512))
ENERGIES = (TOY, TABLE, DIGITS, PHOTOGRAPHS)

# First the size of a training batch and a saturated device; then a middle size, and one that is bound by latency.
CHAINS = (4_096, 1_048_576, 65_536, 256)

# Most important first, since a benchmark may run out of time before the end.
CASES = (
    *(Case(*energy, n) for n in CHAINS[:2] for energy in (TOY, TABLE, DIGITS)),
    Case(*PHOTOGRAPHS, CHAINS[0]),
    *(Case(*energy, n) for n in CHAINS[2:] for energy in ENERGIES),
    Case(*PHOTOGRAPHS, CHAINS[1]),
)

# For a visit to a GPU: a saturated device, the size of a training batch, and a million chains, for which few steps
# suffice.
GPU_CASES = (
    *(Case(*energy, 65_536) for energy in (TABLE, DIGITS, TOY)),
    *(Case(*energy, 4_096) for energy in (TABLE, DIGITS)),
    *(Case(*energy, 1_048_576, steps=10) for energy in (TABLE, DIGITS)),
)

# The same logic in seconds, in Triton's interpreter: one energy per regime of the fused kernel.
DRY_CASES = (Case(3, (16,), 70, 2), Case(130, (16, 16), 66, 2))

# -- the suite of run.py: what is typed on the command line -> the case ----------------------------------------

CONV = (784, (16, 32))  # on the images of digits
_NAMES = {TOY: "toy", TABLE: "table", DIGITS: "digits", PHOTOGRAPHS: "photographs", CONV: "conv28"}

# Temperature 1, so noise_std^2 = 2 drift, and no clamp: the laws are then known.
EFFICIENCY = {
    kind: Case(dim, (), 256, steps=10, kind=kind, drift=drift, noise_std=math.sqrt(2 * drift), clamp=None)
    for kind, dim, drift in (("gaussian", 16, 0.05), ("mixture", 2, 0.2))
}


def _key(case: Case) -> str:
    return f"{_NAMES.get((case.dim, case.widths), case.kind)}-{case.n_chains}"


# Steps of chains. In addition to CASES: energies that are not MLPs, whose gradient is PyTorch's, and cases of the quick
# set, of some tenths of a second per run.
STEPS = {
    _key(case): case
    for case in (
        *(*CASES, Case(*PHOTOGRAPHS, 512), Case(*CONV, 256, kind="conv")),
        *(replace(case, n_chains=1_024, steps=60) for case in EFFICIENCY.values()),
        *(Case(*TOY, 1_024), Case(*TABLE, 1_024), Case(*PHOTOGRAPHS, 64), Case(*CONV, 64, kind="conv")),
    )
}

# For the README's table of a CPU, and for breakdown.py: many chains, the batch of a training step, other modules.
SHOWN = (
    *("toy-4096", "table-4096", "digits-4096", "photographs-512"),
    *("toy-256", "table-256", "digits-256"),
    *("conv28-256", "gaussian-1024", "mixture-1024"),
)

TRAINING = {
    **{f"pcd-{n}": TrainingCase(n) for n in (10_000, 100_000, 1_000_000)},
    "pcd-digits-10000": TrainingCase(10_000, *DIGITS),
}

# For pool.py: the batch and image size of image tutorials.
POOL = {n: TrainingCase(n, *DIGITS, batch_size=128) for n in (10_000, 100_000, 1_000_000)}
QUICK_POOL = {n: TrainingCase(n, *DIGITS, batch_size=128, steps=10) for n in (1_000, 10_000)}

COMPILATION = {f"compile-{name}": Case(*energy, 1_024) for energy, name in ((TABLE, "table"), (DIGITS, "digits"))}

SAMPLING = {
    "sampling-gaussian": SamplingCase("gaussian", 32, 64, 0.06, 10),
    # Now and then a chain of any library stays in a tail for long, which costs most of the effective samples.
    "sampling-banana": SamplingCase("banana", 2, 64, 0.1, 6, seeds=5),
    "sampling-mlp": SamplingCase("mlp", 64, 64, 0.2, 3, widths=(128, 128)),
    "sampling-mixture": SamplingCase("mixture", 2, 64, 0.5, 3),
}
MANY_CHAINS = 1_024
SAMPLING |= {
    f"{key}-{MANY_CHAINS}": replace(SAMPLING[key], n_chains=MANY_CHAINS, draws=50, only=("NUTS", "ChEESHMC"))
    for key in ("sampling-gaussian", "sampling-mlp")
}

# 784 dims, and a mass that is the same for all coordinates: HMC's steps are taken in the first layer.
SAMPLING["sampling-mlp-784"] = SamplingCase(
    "mlp", 784, 1_024, 0.2, 10, draws=20, widths=DIGITS[1], only=("HMC",), unit_mass=True
)


def _fixed(sampler: str, dim: int, widths: tuple[int, ...], n_chains: int) -> SamplingCase:
    """For collapsed.py: steps of one size, at which a similar share of proposals is accepted for any number of dims."""
    length = dim ** (-1 / 4 if sampler == "HMC" else -1 / 6)
    return SamplingCase("random mlp", dim, n_chains, length, 20, 1, 0, widths, (sampler,), unit_mass=True)


# Steps in the first layer of an MLP, beside ordinary ones and peers; and HMC against the number of dims.
COLLAPSED = {
    **{
        f"collapsed-{sampler}-{_NAMES[energy]}": _fixed(sampler, *energy, n_chains)
        for sampler, energy, n_chains in (
            ("HMC", TABLE, 1_024), ("HMC", DIGITS, 1_024), ("HMC", PHOTOGRAPHS, 512),
            ("MALA", DIGITS, 1_024), ("UnderdampedLangevin", DIGITS, 1_024), ("Langevin", DIGITS, 1_024),
        )
    },
    **{f"collapsed-dims-{dim}": _fixed("HMC", dim, PHOTOGRAPHS[1], 256) for dim in (64, 256, 784, 1_536, 3_072)},
}  # fmt: skip

SUITE: dict[str, Case | TrainingCase | SamplingCase] = {
    **STEPS, **TRAINING, **EFFICIENCY, **COMPILATION, **SAMPLING, **COLLAPSED,
}  # fmt: skip

# Some minutes on two cores; one case per kind of energy.
QUICK = (
    *("toy-1024", "table-1024", "digits-256", "photographs-64", "conv28-64"),
    *("pcd-10000", "gaussian", "mixture", "compile-table"),
)
