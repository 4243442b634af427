"""What the benchmarks run, as data: energies, numbers of chains, the rule of a step. Nothing here measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """``steps`` Langevin steps of ``n_chains`` chains on a SiLU MLP energy: dim -> widths -> 1."""

    dim: int
    widths: tuple[int, ...]
    n_chains: int
    steps: int = 60

    @property
    def energy(self) -> str:
        return f"{self.dim}-{list(self.widths)}"

    @property
    def name(self) -> str:
        return f"{self.energy} x {self.n_chains}"


# x' = x - DRIFT dE/dx + NOISE_STD xi. The rate does not depend on them; these keep every energy's chains finite.
DRIFT = 0.05
NOISE_STD = 0.3

# A toy, a small table, digits in grey, small photographs in colour.
TOY, TABLE, DIGITS, PHOTOGRAPHS = (2, (128, 128)), (64, (128, 128)), (784, (256, 128)), (3072, (512, 512))
ENERGIES = (TOY, TABLE, DIGITS, PHOTOGRAPHS)

# A training batch's worth and a saturated device come first; then a middle, and what only latency decides.
CHAINS = (4_096, 1_048_576, 65_536, 256)

# Most important first: a benchmark that runs out of time has left out the end.
CASES = (
    *(Case(*energy, n) for n in CHAINS[:2] for energy in (TOY, TABLE, DIGITS)),
    Case(*PHOTOGRAPHS, CHAINS[0]),
    *(Case(*energy, n) for n in CHAINS[2:] for energy in ENERGIES),
    Case(*PHOTOGRAPHS, CHAINS[1]),
)

# The same logic within seconds, in Triton's interpreter: one energy a regime of the fused kernel.
DRY_CASES = (Case(3, (16,), 70, 2), Case(130, (16, 16), 66, 2))
