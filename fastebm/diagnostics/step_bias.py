"""The step-size bias of Langevin dynamics without an accept test, from the acceptance that MALA would have.

A Langevin step of step_size h at temperature T is MALA's proposal for exp(-E / T) at step_size h T. The Metropolis test
would accept all of these proposals only if the steps had no bias. What an acceptance means is known if exp(-E / T) is a
Gaussian with precisions lambda_i. With u_i = h T lambda_i, in the law that the Langevin steps have:

variance of x_i = 1 / (lambda_i (1 - u_i / 4)),   correlation of x_i and y_i = 1 - u_i / 2
log a           = -sum_i (u_i lambda_i / 8) (y_i^2 - x_i^2)
s^2             = variance of log a = sum_i u_i^3 / (16 (1 - u_i / 4))
E min(1, a)     = 1/2 + exp(s^2 / 2) Phi(-s)

The mean of log a is 0, because (x, y) and (y, x) have the same law. The last line takes log a as normal, as it is for
many dims. So an acceptance gives u, and u the excess of the variance, u / (4 - u), if k dims have the same u and the
others none. With k = 1 a single stiff dim has all of the error. (The first two lines follow from y = (1 - u / 2) x +
sqrt(u / lambda) xi; log a is that of samplers/mala.py.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..driver.result import SampleResult
from ..driver.run import run_chains
from ..driver.settings import Settings
from ..energies import SumEnergy
from ..samplers.langevin import Langevin
from ..samplers.mala import MALA

__all__ = ["excess_variance", "mala_acceptance", "one_number"]

# Proposals to average over: the standard error of the acceptance is then at most 0.03.
_PROPOSALS = 256


def mala_acceptance(result: SampleResult, rows: Tensor) -> float | None:
    """Mean acceptance probability of Langevin's steps in a Metropolis test, from states of these chains.

    None for another sampler or noise_first, and without one temperature > 0. With a schedule the last step size counts.
    """
    sampler: Any = result.sampler
    assert result.trajectory is not None
    temperature = one_number(result.info.temperature, result.trajectory.shape[1])
    # With noise_first the stored states lack the noise of the next step, so they are not MALA's.
    if not isinstance(sampler, Langevin) or sampler.noise_first or not temperature:
        return None
    step = sampler.step_size
    step = step[-1] if isinstance(step, Tensor) and step.ndim == 1 else step
    mala = MALA(step * temperature, preconditioner=sampler.preconditioner)
    x = result.trajectory.detach().flatten(2)
    energy = result.energy
    if temperature != 1:
        energy = SumEnergy([energy], torch.tensor([1 / temperature], device=x.device))
    draws = x.shape[1]
    k = min(draws, -(-_PROPOSALS // max(1, len(rows))))
    found = []
    for i in range(k):
        chains = result.state.chains
        # All chains, because an energy may hold one measurement per chain.
        chains = chains._replace(x=x[:, draws - 1 - i * draws // k], first_steps=chains.first_steps + i, carried=None)
        settings = Settings(on_nonfinite="ignore")
        done, _ = run_chains(energy, chains, mala, 1, shape=result.x.shape[1:], settings=settings, telemetry=True)
        assert done.telemetry is not None
        found.append(float(done.telemetry["acceptance"][rows].double().mean()))
    return sum(found) / k


def one_number(value: float | Tensor, draws: int) -> float | None:
    """A setting as a number, if it is the same for all chains and in the steps of the call's last states; or None."""
    if not isinstance(value, Tensor):
        return value
    # At least so many of the last steps led to stored states; those before them may be of the warm-up.
    value = (value[-draws:] if value.ndim == 1 else value).flatten()
    return float(value[0]) if bool((value == value[0]).all()) else None


def excess_variance(acceptance: float, dims: int) -> float:
    """The relative excess of the variances of a Gaussian at this acceptance, if so many dims share the error."""
    low, high = 0.0, 4.0
    for _ in range(50):  # the acceptance falls as u grows
        u = (low + high) / 2
        low, high = (u, high) if _acceptance(u, dims) > acceptance else (low, u)
    return low / (4 - low)


def _acceptance(u: float, dims: int) -> float:
    """The mean acceptance on a Gaussian of so many dims with the same u < 4."""
    s = math.sqrt(dims * u**3 / (16 - 4 * u))
    # Phi(-s) = erfc(s / sqrt 2) / 2; beyond s = 30 both factors leave the range of floats
    return 0.5 + 0.5 * math.exp(s * s / 2) * math.erfc(s / math.sqrt(2)) if s < 30 else 0.5
