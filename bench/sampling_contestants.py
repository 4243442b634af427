"""The samplers that are compared: fastebm's, and those of the same names in ebmkit, BlackJAX and torchebm.

A contestant adapts itself to a target and then draws: every call continues its chains, and returns the kept states. All
have the same chains, starts and numbers of draws. Peers without an adaptation get a step size by dual averaging of
their acceptance rate (``tuned``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fastebm.bench.cases import SamplingCase
from fastebm.bench.problem import Missing
from fastebm.bench.sampling_targets import Target
from torch import Tensor

import fastebm
from fastebm.samplers.adaptation import DualAveraging

FRICTION = 1.0  # of underdamped Langevin dynamics, for all
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)  # of parallel tempering, for all
ACCEPTANCE = {"MALA": 0.574, "HMC": 0.8}  # that ``tuned`` aims at: fastebm's defaults
TUNING = 100  # runs of ``tuned``, each of as many steps as TUNING_STEPS
TUNING_STEPS = 4
WINDOW_STEPS = 1_000  # of BlackJAX' window adaptation, its default


class Drawn(NamedTuple):
    """x: (n_chains, draws, dim). gradients: per chain and draw. acceptance: mean probability, None without a test.

    path: of fastebm (``SampleInfo``).
    """

    x: Tensor
    gradients: float
    acceptance: float | None
    step_size: float
    path: str = ""


Draw = Callable[[], Drawn]


@dataclass(frozen=True)
class Contestant:
    """prepare: (target, thin) -> a function that draws ``target.case.draws`` times. thin: steps per kept draw."""

    library: str
    sampler: str
    prepare: Callable[[Target, int], Draw]
    thin: int = 1
    exact: bool = True

    @property
    def name(self) -> str:
        return f"{self.library} {self.sampler}"


def tuned(case: SamplingCase, acceptance: Callable[[float], float], start: float, target: float) -> float:
    """The step size at which ``acceptance`` of a short run is ``target``. If nothing is adapted: ``start``."""
    if case.warmup == 0:
        return start
    search = DualAveraging(start, target)
    for _ in range(TUNING):
        search.update(acceptance(search.step_size))
    return search.final


# -- fastebm -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """``fastebm.sample``, whole calls. make: case -> sampler."""

    make: Callable[[SamplingCase], Any]
    warms_up: bool = True

    def started(self, p: Target) -> fastebm.SampleResult:
        """The chains after the warm-up."""
        warmup = p.case.warmup if self.warms_up else 0
        return fastebm.sample(p.energy, self.make(p.case), init=p.x0, warmup=warmup, steps=0, seed=p.seed)

    def __call__(self, p: Target, thin: int) -> Draw:
        result, steps = self.started(p), p.case.draws * thin

        def draw() -> Drawn:
            nonlocal result
            result = fastebm.sample(p.energy, init=result, steps=steps, thin=thin)
            info = result.info
            gradients = 1.0 if info.gradients is None else float(info.gradients.mean())
            acceptance = None if info.acceptance is None else float(info.acceptance.mean())
            inner = getattr(info.sampler, "sampler", info.sampler)  # of a ladder of temperatures
            return Drawn(result.trajectory, gradients * thin, acceptance, float(inner.step_size), info.path)

        return draw


# -- ebmkit --------------------------------------------------------------------------------------------------


class Counted:
    """An energy for ebmkit that counts its gradients."""

    def __init__(self, values: Callable[[Tensor], Tensor]) -> None:
        self.values, self.gradients = values, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.gradients += x.requires_grad
        return self.values(x)


def ebmkit(name: str) -> Callable[[Target, int], Draw]:
    """One of ebmkit's samplers. Its steps are taken one by one, as its ``sample`` takes them: a second call of that
    would adapt again, and would draw momenta and replicas anew."""

    def prepare(p: Target, thin: int) -> Draw:
        try:
            from ebm import samplers
        except ImportError:
            raise Missing("ebmkit is not installed") from None
        energy, x, length = Counted(p.values), p.x0, p.case.length

        def tuned_at(cls: Any, start: float, target: float, **settings: Any) -> Any:
            def acceptance(step_size: float) -> float:
                nonlocal x
                sampler = cls(step_size, **settings)
                x = sampler.sample(energy, x, steps=TUNING_STEPS)
                return float(sampler.last_accept_rate)

            return cls(tuned(p.case, acceptance, start, target), **settings)

        if name == "MALA" and p.case.warmup > 0:  # ebmkit's step size is half of ours
            sampler = samplers.AdaptiveMALA(length**2 / 2, warmup=p.case.warmup // 2, precondition=True)
            step = lambda x: sampler._transition(energy, x)[0]  # noqa: E731  # its step() leaves the metric out
        else:
            if name == "HMC":  # its mass is 1
                sampler = tuned_at(samplers.HMC, length, ACCEPTANCE["HMC"], leapfrog_steps=p.case.n_leapfrog)
            elif name == "MALA":
                sampler = samplers.MALA(length**2 / 2)
            elif name == "NUTS":
                sampler = samplers.NUTS(length, warmup=p.case.warmup)
            elif name == "UnderdampedLangevin":
                sampler = samplers.UnderdampedLangevin(length, FRICTION)
            else:
                base = tuned_at(samplers.MALA, length**2 / 2, ACCEPTANCE["MALA"])
                sampler = samplers.ParallelTempering(base, TEMPERATURES)
            step = lambda x: sampler.step(energy, x)  # noqa: E731
        x = sampler.sample(energy, x, steps=p.case.warmup)
        acceptances: list[Tensor | None] = []

        def draw() -> Drawn:
            nonlocal x
            before, kept = energy.gradients, []
            acceptances.clear()
            with torch.enable_grad():
                for t in range(p.case.draws * thin):
                    x = step(x).detach()
                    if (t + 1) % thin == 0:
                        kept.append(x)
                        acceptances.append(sampler._last_accept)
            base = getattr(sampler, "base", sampler)
            known = [float(a) for a in acceptances if a is not None]
            gradients = (energy.gradients - before) / p.case.draws
            return Drawn(
                torch.stack(kept, dim=1), gradients, sum(known) / len(known) if known else None, base.step_size
            )

        return draw

    return prepare


# -- torchebm ------------------------------------------------------------------------------------------------


def torchebm_hmc(p: Target, thin: int) -> Draw:
    """torchebm's HamiltonianMonteCarlo, with a unit mass and a step size by ``tuned``."""
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import HamiltonianMonteCarlo
    except ImportError:
        raise Missing("torchebm is not installed") from None

    class Model(BaseModel):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return p.values(x)

    x = p.x0

    def run(step_size: float, steps: int) -> tuple[Tensor, float]:
        nonlocal x
        sampler = HamiltonianMonteCarlo(Model(), step_size=step_size, n_leapfrog_steps=p.case.n_leapfrog)
        kept, report = sampler.sample(x, n_steps=steps, thin=thin, return_trajectory=True, return_diagnostics=True)
        x = kept[:, -1].contiguous()
        return kept, float(report["acceptance_rate"].mean())

    step_size = tuned(p.case, lambda step_size: run(step_size, TUNING_STEPS)[1], p.case.length, ACCEPTANCE["HMC"])

    def draw() -> Drawn:
        kept, acceptance = run(step_size, p.case.draws * thin)
        return Drawn(kept, float((p.case.n_leapfrog + 1) * thin), acceptance, step_size)

    return draw


# -- BlackJAX ------------------------------------------------------------------------------------------------


def blackjax_at(name: str) -> Callable[[Target, int], Draw]:
    """One of BlackJAX' kernels: vmap over chains, one jit of a lax.scan over the draws.

    HMC and NUTS: window adaptation of one chain, as in BlackJAX' guide; all chains then take its values. ChEES-HMC: its
    own adaptation of all chains, with its diagonal mass matrix. MALA, and HMC with a unit mass, have no adaptation, so
    a step size by ``tuned``.
    """

    def prepare(p: Target, thin: int) -> Draw:
        try:
            import blackjax
            import jax
            import optax
        except ImportError:
            raise Missing("blackjax is not installed") from None
        from fastebm.bench.contestants import jax_energy

        total, case = jax_energy(p.energy, "highest"), p.case
        log_density = lambda x: -total(x[None])  # noqa: E731
        keys = iter(jax.random.split(jax.random.key(p.seed), 1_000))
        x0 = jax.numpy.asarray(p.x0.numpy())
        hmc = {"inverse_mass_matrix": jax.numpy.ones(case.dim), "num_integration_steps": case.n_leapfrog}
        if name == "MALA" or (name == "HMC" and case.unit_mass):
            make, start, rest = (
                (blackjax.mala, case.length**2 / 2, {}) if name == "MALA" else (blackjax.hmc, case.length, hmc)
            )
            kernel = lambda step_size: make(log_density, step_size, **rest)  # noqa: E731
            states = jax.vmap(kernel(start).init)(x0)
            run = _blackjax_scan(kernel, TUNING_STEPS, 1)

            def acceptance(step_size: float) -> float:
                nonlocal states
                states, _, found = run(next(keys), states, step_size)
                return float(found[0])

            step_size = tuned(case, acceptance, start, ACCEPTANCE[name])
        elif name == "ChEESHMC":
            adapt = blackjax.chees_adaptation(log_density, case.n_chains, mass_matrix_estimation="diagonal")
            (states, found), _ = adapt.run(next(keys), x0, case.length, optax.adam(0.02), case.warmup)
            step_size, rest = found["step_size"], {k: v for k, v in found.items() if k != "step_size"}
            kernel = lambda step_size: blackjax.dynamic_hmc(log_density, step_size=step_size, **rest)  # noqa: E731
        else:
            make = blackjax.nuts if name == "NUTS" else blackjax.hmc
            fixed = {} if name == "NUTS" else {"num_integration_steps": p.case.n_leapfrog}
            adapt = blackjax.window_adaptation(make, log_density, **fixed)
            (_, found), _ = adapt.run(next(keys), x0[0], WINDOW_STEPS)
            step_size, rest = found["step_size"], {k: v for k, v in found.items() if k != "step_size"}
            kernel = lambda step_size: make(log_density, step_size=step_size, **rest)  # noqa: E731
            states = jax.vmap(kernel(step_size).init)(x0)
        run = _blackjax_scan(kernel, case.draws, thin)

        def draw() -> Drawn:
            nonlocal states
            states, x, (acceptance, gradients) = jax.block_until_ready(run(next(keys), states, step_size))
            return Drawn(torch.from_dlpack(x), float(gradients) * thin, float(acceptance), float(step_size))

        return draw

    return prepare


def _blackjax_scan(kernel: Callable[[Any], Any], draws: int, thin: int) -> Any:
    """(key, states, step_size) -> states, x (n_chains, draws, dim), and means of (acceptance, gradients per step)."""
    import jax

    def step(states: Any, key: Any, step_size: Any) -> Any:
        n = len(jax.tree.leaves(states)[0])
        states, info = jax.vmap(kernel(step_size).step)(jax.random.split(key, n), states)
        gradients = getattr(info, "num_integration_steps", jax.numpy.ones(()))
        return states, (info.acceptance_rate.mean(), gradients.mean())

    @jax.jit
    def run(key: Any, states: Any, step_size: Any) -> Any:
        def one(states: Any, key: Any) -> Any:
            states, means = jax.lax.scan(lambda s, k: step(s, k, step_size), states, jax.random.split(key, thin))
            return states, (states.position, *(m.mean() for m in means))

        states, (x, acceptance, gradients) = jax.lax.scan(one, states, jax.random.split(key, draws))
        return states, x.swapaxes(0, 1), (acceptance.mean(), gradients.mean())

    return run


# -- all of them ---------------------------------------------------------------------------------------------

# A gradient per step: ten steps per kept draw.
THIN = 10


def hmc(case: SamplingCase) -> fastebm.HMC:
    return fastebm.HMC(case.length, n_leapfrog=case.n_leapfrog, mass=1.0 if case.unit_mass else None)


CONTESTANTS = (
    Contestant("fastebm", "Langevin", Ours(lambda case: fastebm.Langevin(case.length**2), False), THIN, exact=False),
    Contestant("fastebm", "MALA", Ours(lambda case: fastebm.MALA(case.length**2)), THIN),
    Contestant("ebmkit", "MALA", ebmkit("MALA"), THIN),
    Contestant("blackjax", "MALA", blackjax_at("MALA"), THIN),
    Contestant("fastebm", "HMC", Ours(hmc)),
    Contestant("ebmkit", "HMC", ebmkit("HMC")),
    Contestant("blackjax", "HMC", blackjax_at("HMC")),
    Contestant("torchebm", "HMC", torchebm_hmc),
    Contestant("fastebm", "NUTS", Ours(lambda case: fastebm.NUTS(case.length))),
    Contestant("ebmkit", "NUTS", ebmkit("NUTS")),
    Contestant("blackjax", "NUTS", blackjax_at("NUTS")),
    Contestant("fastebm", "ChEESHMC", Ours(lambda case: fastebm.ChEESHMC(case.length))),
    Contestant("blackjax", "ChEESHMC", blackjax_at("ChEESHMC")),
    Contestant(
        "fastebm", "UnderdampedLangevin",
        Ours(lambda case: fastebm.UnderdampedLangevin(case.length, friction=FRICTION), False), THIN, exact=False,
    ),
    Contestant("ebmkit", "UnderdampedLangevin", ebmkit("UnderdampedLangevin"), THIN, exact=False),
    Contestant(
        "fastebm", "ParallelTempering",
        Ours(lambda case: fastebm.ParallelTempering(fastebm.MALA(case.length**2), TEMPERATURES)), THIN,
    ),
    Contestant("ebmkit", "ParallelTempering", ebmkit("ParallelTempering"), THIN),
)  # fmt: skip
