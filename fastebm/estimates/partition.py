"""Partition functions and likelihoods by annealed importance sampling, forward and reverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Chains
from ..backends.settle import check_finite
from ..box import Box
from ..driver.run import energies_of
from ..driver.settings import Settings
from ..driver.start import Place, Start
from ..energies import EnergyLike, GaussianEnergy, shape_of
from ..energies.functions import as_module
from ..rng import Stream, draw_seed, uniform
from ..samplers.base import Sampler, checked_sampler
from ..samplers.mala import MALA
from ..scalars import checked_integer
from .ais import AIS
from .ladder import LADDER_STEP, PILOT_CHAINS, PILOT_STEPS, WIDER, Path
from .normal import Normal
from .result import LogPartition

__all__ = ["log_likelihood", "log_partition"]

# The forward run is made in so many parts, each with its own mean acceptance.
_PARTS = 20


def log_partition(
    energy: EnergyLike,
    base: GaussianEnergy | None = None,
    *,
    input_size: int | Sequence[int] | None = None,
    sampler: Any = None,
    n_temperatures: int = 1000,
    n_chains: int = 1024,
    samples: Tensor | None = None,
    labels: Tensor | int | None = None,
    condition: Tensor | None = None,
    seed: int | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> LogPartition:
    """Estimate log Z, the logarithm of the integral of exp(-E), with its error and a bracket around it.

        >>> energy = fastebm.GaussianEnergy(0.0, torch.tensor([1.0, 2.0]))
        >>> fastebm.log_partition(energy, seed=0)     # truth: log(2 pi * 1 * 2) = 2.5310
        LogPartition(log Z = 2.53..., upper bound 2.53..., ...)

    Annealed importance sampling (Neal 2001) moves chains from a base with known Z_0 to the energy, along (1 - b) E_0 +
    b E with b from 0 to 1, and weighs them. Their mean weight is an unbiased estimate of Z. Reverse AIS moves chains
    back from samples of the energy, which gives an upper bound (Burda, Grosse & Salakhutdinov 2015; Grosse, Ghahramani
    & Adams 2015). Step sizes and temperatures are tuned by pilot runs, whose states are not used otherwise.

    The estimate is only as good as the overlap of base and energy: all chains may miss a mode that is far outside the
    base or far narrower, and neither error nor bracket then shows it (unless ``samples`` come from it). Warnings report
    small effective sample sizes, chains that do not move and bounds far apart.

    Args:
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1), such that exp(-E) can be integrated
            over the sampler's clamp.
        base: a ``GaussianEnergy``, cut off at the clamp. None: one fitted to the mean and the standard deviations (1.5
            times as wide) of a pilot run of the sampler on the energy.
        input_size: number of dims or shape of one state, if neither energy, base nor samples tell it.
        sampler: an exact sampler. Its clamp bounds the states. Unless its target_acceptance is None, step size and
            scale are adapted at each temperature. None: ``MALA(0.1)``.
        n_temperatures: number of temperatures b, >= 2, with one transition at each. The variance of the log weights is
            about inversely proportional to it.
        n_chains: number of chains, >= 2. The standard error is inversely proportional to its root.
        samples: (n, *shape) draws of exp(-E), n >= 2, where reverse chains start. The upper bound is as good as they
            are. None: the ends of the forward chains, drawn by their weights and moved on.
        labels: the class whose partition function is computed, for an energy that takes labels. One int.
        condition: (*shape_of_condition,), in place of labels: one condition for all chains.
        seed: 64-bit seed. None: drawn from torch's global CPU generator.
        backend: "auto", "torch" or "reference".
        device: where to sample. None: the device of samples or energy.

    Raises:
        TypeError, ValueError: an argument is wrong. The message states the requirement, the value and the likely fix.
        NonFiniteError: the energy of some chains is NaN or -inf. Without them the estimate would be biased.
    """
    energy, sampler = as_module(energy), _checked(MALA(0.1) if sampler is None else sampler)
    n_temperatures = checked_integer("n_temperatures", n_temperatures, least=2)
    n_chains = checked_integer("n_chains", n_chains, least=2)
    if base is not None and not isinstance(base, GaussianEnergy):
        raise TypeError(f"base must be a GaussianEnergy, whose log Z is known, or None, got {type(base).__name__}")
    if input_size is None and samples is None and base is not None:
        input_size = shape_of(base)
    one_label, one_condition = _one_row(labels, condition)
    place = Start(
        energy, input_size, ("n_chains", n_chains), samples, one_label, one_condition, None, None, None, 0, 0, device,
        states="samples",
    ).place()  # fmt: skip
    if samples is not None:
        _check_samples(samples, sampler.box)
    path = Path(
        energy, place.shape, sampler, one_label, one_condition, draw_seed(seed),
        Settings(backend, on_nonfinite="ignore"),
    )  # fmt: skip
    return _estimate(path, place, base, samples, n_temperatures, n_chains)


def log_likelihood(
    energy: EnergyLike,
    x: Tensor,
    log_z: LogPartition | float | None = None,
    *,
    labels: Tensor | int | None = None,
    condition: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Log densities log p(x) = -E(x) - log Z of states, (n,) float64, in nats. Outside the clamp: -inf.

    Args:
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1).
        x: (n, *shape) states.
        log_z: from ``log_partition``, or a number. None: estimated here, with the options. The clamp is that of a
            ``LogPartition`` or of the option ``sampler``; with a number there is none.
        labels, condition: the one class or condition of all states, as for ``log_partition``.
        options: those of ``log_partition``.

    Raises:
        TypeError, ValueError, NonFiniteError: as for ``log_partition``.
    """
    energy = as_module(energy)
    one_label, one_condition = _one_row(labels, condition)
    place = Start(
        energy, None, ("n", 0), x, None, None, None, None, None, 0, 0, options.get("device"), states="x"
    ).place()
    if log_z is None:
        log_z = log_partition(energy, input_size=place.shape, labels=labels, condition=condition, **options)
    elif options:
        raise TypeError(f"log_z is given, so {', '.join(options)} would have no effect: leave them out")
    flat = x.detach().flatten(1).to(place.dtype)
    path = Path(energy, place.shape, Sampler(), one_label, one_condition, 0, Settings())
    value = energies_of(
        energy, path.chains(flat, 0), path.sampler, shape=place.shape, settings=path.settings
    ).double()  # fmt: skip
    if not isinstance(log_z, LogPartition):
        return -value - float(log_z)
    likelihood = -value - log_z.log_z
    if log_z.clamp is not None:
        inside = log_z.clamp.on(flat.shape[1], dtype=flat.dtype, device=flat.device).contains(flat)
        likelihood = likelihood.masked_fill(~inside, -math.inf)
    return likelihood


def _estimate(
    path: Path, place: Place, base: GaussianEnergy | None, samples: Tensor | None, n_temperatures: int, n_chains: int
) -> LogPartition:
    """Pilots, forward AIS, reverse AIS."""
    dim, box, device = math.prod(place.shape), path.sampler.box, place.device
    numbers = torch.arange(max(n_chains, PILOT_CHAINS), device=device)
    pilots = numbers[: min(n_chains, PILOT_CHAINS)]
    known = None if samples is None else samples.detach().reshape(len(samples), dim).to(place.dtype)
    start = None if base is None else _normal(base, place, box)
    tuned, std = path.sampler, None
    if start is None or path.sampler.adaptation(1) is not None:
        x = None if start is None else start.draw(path.seed, pilots, 0)
        x = x if known is None else known[pilots % len(known)]
        if x is None and box is not None and not _finite(box):
            raise ValueError(f"the clamp {box} has an infinite side: pass base= (a GaussianEnergy) or samples=")
        tuned, mean, std = path.pilot(x, len(pilots), device)
        if start is None:
            start = Normal(mean.to(place.dtype), (WIDER * std).to(place.dtype), box)
    ais = path.ladder(start, tuned, std, n_temperatures, start.draw(path.seed, pilots, LADDER_STEP), LADDER_STEP)
    chains = path.chains(start.draw(path.seed, numbers[:n_chains], PILOT_STEPS), PILOT_STEPS)
    chains, acceptance = path.run(ais, chains, parts=_PARTS)
    assert chains.carried is not None
    log_weights = chains.carried["log_weight"] + start.log_z
    if not bool((log_weights > -math.inf).any()):
        raise ValueError("the energy is +inf at all draws of the base: pass a base= that covers where it is finite")
    if known is None:
        chains = _resampled(path, ais, chains, max(1, n_temperatures // 10))
    else:
        chains = path.chains(known, int(chains.first_steps[0]))
    chains, _ = path.run(ais.reversed(), chains)
    assert chains.carried is not None
    result = LogPartition.of(
        log_weights, chains.carried["log_weight"] - start.log_z, torch.tensor(ais.betas, dtype=torch.float64),
        torch.tensor(acceptance, dtype=torch.float64), box, inherits=known is None,
    )  # fmt: skip
    result.warn(stacklevel=3)
    return result


def _resampled(path: Path, ais: AIS, chains: Chains, steps: int) -> Chains:
    """Chains at ends of the forward chains, drawn by their weights (systematic resampling) and moved on at b = 1."""
    assert chains.carried is not None
    n, step = len(chains.x), int(chains.first_steps[0])
    shares = torch.softmax(chains.carried["log_weight"], dim=0).cumsum(dim=0)
    u = uniform(path.seed, Stream.AIS, chains.numbers[:1], step, 1, dtype=torch.float64)[0]
    places = (torch.arange(n, device=u.device) + u) / n
    rows = torch.searchsorted(shares, places).clamp(max=n - 1)
    still = AIS(ais.base, (1.0,) * (steps + 1), (ais.samplers[-1],) * (steps + 1), ais.clamp)
    moved, _ = path.run(still, path.chains(chains.x[rows], step))
    return moved._replace(carried=None)


def _normal(base: GaussianEnergy, place: Place, box: Box | None) -> Normal:
    """The base on the states' device and in their dtype."""
    base.check_shape(place.shape)
    mean, std = (v.detach().expand(place.shape).flatten().to(place.device, place.dtype) for v in (base.mean, base.std))
    return Normal(mean, std, box)


def _finite(box: Box) -> bool:
    return all(bool(torch.as_tensor(bound).isfinite().all()) for bound in box)


def _checked(sampler: Any) -> Any:
    """Check that a sampler can move the chains between updates of their weights."""
    sampler, name = checked_sampler(sampler), type(sampler).__name__
    if not sampler.exact:
        raise ValueError(
            f"log_partition needs an exact sampler, whose steps leave exp(-E) invariant, and {name} has no accept "
            "test, which would bias the weights: use MALA(0.1), for example"
        )
    if sampler.coupled or sampler.carries:
        raise ValueError(f"log_partition needs a sampler of single states, such as MALA(0.1), got {name}")
    if tensors := [name for name in sampler.scheduled if isinstance(getattr(sampler, name), Tensor)]:
        raise ValueError(f"{', '.join(tensors)} must be a number in log_partition, which adapts it to each temperature")
    return sampler


def _one_row(labels: Tensor | int | None, condition: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """One label, (1,), or one condition, (1, ...), for all chains."""
    if labels is not None:
        value = torch.as_tensor(labels)
        if value.numel() != 1:
            raise ValueError(
                f"labels must be one class, as log Z differs between classes, got shape {tuple(value.shape)}: call it "
                "for each class"
            )
        labels = value.reshape(1)
    if condition is not None and not isinstance(condition, Tensor):
        raise TypeError(f"condition must be a tensor, one condition for all chains, got {type(condition).__name__}")
    return labels, None if condition is None else condition[None]


def _check_samples(samples: Tensor, box: Box | None) -> None:
    """Check the draws of exp(-E) from which reverse chains start."""
    if len(samples) < 2:
        raise ValueError(f"samples must be (n, *shape) with n >= 2, got shape {tuple(samples.shape)}")
    check_finite(samples, "samples")
    if box is not None:
        flat = samples.detach().flatten(1)
        outside = ~box.on(flat.shape[1], dtype=flat.dtype, device=flat.device).contains(flat)
        if bool(outside.any()):
            raise ValueError(
                f"samples must lie within the sampler's clamp {box}, and {int(outside.sum())} of {len(flat)} do not"
            )
