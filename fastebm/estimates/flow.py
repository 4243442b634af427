"""The probability-flow ODE of an energy at every noise level (Song et al. 2021): samples without noise, likelihoods.

It moves a state so that at each level it has the law of the diffusion's states there:

variance exploding,   exp(-E(x, sigma)) the density of x_0 + sigma xi:          dx / d log sigma = sigma^2 dE/dx
variance preserving,  exp(-E(x, t)) that of alpha(t) x_0 + sigma(t) xi:         dx / dt = (beta(t) / 2) (dE/dx - x)

with beta(t) = beta_min + t (beta_max - beta_min). If f is the right side and u the level, the log density follows

log p(x at the data) = log N(x at the noise; 0, std^2) + integral of div f du

(Chen et al. 2018). div f needs the trace of the Hessian of E: exactly, or by Hutchinson's estimate v^T H v with random
signs v, kept over the solution (Grathwohl et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.settle import NonFiniteError, check_finite
from ..driver.arguments import check_init, same_device
from ..energies import EnergyLike, first_tensor, takes_condition
from ..energies.conditions import unwrapped
from ..energies.eval_mode import evaluating
from ..energies.functions import as_module, name_of_forward
from ..energies.noise_conditional import NoiseConditionalEnergy, checked_betas
from ..rng import Stream, draw_seed, uniform
from ..scalars import checked_integer, checked_number, plain_number
from ..targets.autograd import Energy

__all__ = ["FlowLikelihood", "flow_likelihood", "probability_flow"]

# The first time of a variance-preserving diffusion: at 0 the law of the data itself may have no density.
_FIRST_TIME = 1e-3


class FlowLikelihood(NamedTuple):
    """Log-likelihoods of states.

    log_likelihood: (n,) float64, in nats, of the density at the lowest noise level.
    bits_per_dim: (n,) float64, -log_likelihood / (dim log 2). For images of k bits that were scaled to [0, 1], those of
        the integers are k more.
    x: (n, *shape), where the states arrive at the highest noise level.
    """

    log_likelihood: Tensor
    bits_per_dim: Tensor
    x: Tensor


def probability_flow(
    energy: EnergyLike,
    x: Tensor,
    *,
    sigmas: tuple[float, float] | None = None,
    betas: tuple[float, float] | None = None,
    to_noise: bool = False,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Tensor:
    """Move states along the probability-flow ODE, from noise to data: (n, *shape) -> (n, *shape).

        noise = 50.0 * torch.randn(1000, 2)
        samples = fastebm.probability_flow(energy, noise, sigmas=(0.01, 50.0))

    The result is a function of x. Its step sizes fit all rows together, so a row's last digits, within the tolerances,
    depend on the other rows.

    Args:
        energy: a module or function (x, sigma) -> (n,), such as a ``NoiseConditionalEnergy``; with ``betas`` (x, t).
        x: (n, *shape) states. Noise to start from is sigma_max times, or with ``betas`` just, standard normal.
            float64 is computed in float64, every other dtype in float32.
        sigmas: (sigma_min, sigma_max) of a variance-exploding energy.
        betas: (beta_min, beta_max) of a variance-preserving energy, whose time goes from 1 to 0.001. One of the two.
        to_noise: move from data to noise instead. The two directions are inverse to each other.
        rtol, atol: tolerances in (0, 1) of a step of Dormand & Prince's method of order 5 (``torchdiffeq.odeint``), for
            the root mean square over the dims of every row.

    Raises:
        TypeError, ValueError: an argument is wrong, or the energy takes x only.
        NonFiniteError: the gradient of the energy is not finite.
        ImportError: torchdiffeq is not installed.
    """
    flow = _Flow.of(energy, x, sigmas, betas, rtol, atol)
    (moved,) = flow.solved((flow.x,), flow.velocity, to_noise)
    return moved.reshape(x.shape)


def flow_likelihood(
    energy: EnergyLike,
    x: Tensor,
    *,
    sigmas: tuple[float, float] | None = None,
    betas: tuple[float, float] | None = None,
    n_probes: int | None = None,
    seed: int | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> FlowLikelihood:
    """Log-likelihoods of states by the probability-flow ODE, from data to noise.

    They are those of the density at sigma_min, or at the time 0.001. The data's part of the law at the noise end is
    neglected: centre the data, and choose a sigma_max far above their spread. To first order this changes a
    log-likelihood by |mean| |z| / sigma_max, for a row that is |z| standard deviations from the mean.

    Args:
        energy, x, sigmas, betas: as for ``probability_flow``, with data for x.
        n_probes: Hutchinson's estimate by so many probes: an unbiased trace for n_probes backward passes. None: the
            exact trace, for one backward pass per dim.
        seed: 64-bit seed of the probes. None: drawn from torch's global CPU generator.
        rtol, atol: as for ``probability_flow``.

    Raises:
        TypeError, ValueError, NonFiniteError, ImportError: as for ``probability_flow``.
    """
    flow = _Flow.of(energy, x, sigmas, betas, rtol, atol)
    probes = None
    if n_probes is not None:
        probes = _signs(checked_integer("n_probes", n_probes, least=1), flow.x, draw_seed(seed))
    start = (flow.x, flow.x.new_zeros(len(x)))
    end, integral = flow.solved(start, lambda u, x: flow.velocity_and_divergence(u, x, probes), True)
    dim, std = end.shape[1], flow.path.std
    normal = -(end.double() / std).square().sum(dim=1) / 2 - dim * math.log(std * math.sqrt(2 * math.pi))
    log_likelihood = normal + integral.double()
    return FlowLikelihood(log_likelihood, -log_likelihood / (dim * math.log(2)), end.reshape(x.shape))


class _Path(NamedTuple):
    """A diffusion, by a level u that rises from data to noise: dx/du = a x + b dE/dx.

    ends: u at the data and at the noise. std: of the noise. condition: u -> what the energy takes.
    coefficients: u -> (a, b).
    """

    ends: tuple[float, float]
    std: float
    condition: Callable[[Tensor], Tensor]
    coefficients: Callable[[Tensor], tuple[Any, Any]]


def _path_of(sigmas: tuple[float, float] | None, betas: tuple[float, float] | None) -> _Path:
    if (sigmas is None) == (betas is None):
        raise ValueError(
            "pass sigmas=(sigma_min, sigma_max) for an energy of x and sigma, or betas=(beta_min, beta_max) for one of "
            f"x and a time, got {'neither' if sigmas is None else 'both'}"
        )
    if sigmas is not None:
        low, high = _checked_sigmas(sigmas)
        return _Path((math.log(low), math.log(high)), high, torch.exp, lambda u: (0.0, torch.exp(2 * u)))
    assert betas is not None
    first, last = checked_betas(betas)

    def coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
        half = (first + t * (last - first)) / 2
        return -half, half

    return _Path((_FIRST_TIME, 1.0), 1.0, lambda t: t, coefficients)


def _checked_sigmas(sigmas: Any) -> tuple[float, float]:
    values = tuple(map(plain_number, sigmas)) if isinstance(sigmas, (tuple, list)) else ()
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not numbers or not 0 < values[0] < values[1] < math.inf:
        raise ValueError(f"sigmas must be (sigma_min, sigma_max) with 0 < sigma_min < sigma_max, got {sigmas!r}")
    return float(values[0]), float(values[1])


class _Flow(NamedTuple):
    """One call: the energy, its diffusion, the flat states (n, dim), and the tolerances."""

    module: nn.Module
    energy: Energy
    path: _Path
    x: Tensor
    rtol: float
    atol: float

    @classmethod
    def of(
        cls, energy: EnergyLike, x: Tensor, sigmas: tuple[float, float] | None, betas: tuple[float, float] | None,
        rtol: float, atol: float,
    ) -> _Flow:  # fmt: skip
        """Checks the arguments."""
        module, path = as_module(energy), _path_of(sigmas, betas)
        for name, tolerance in (("rtol", rtol), ("atol", atol)):
            if checked_number(name, tolerance, positive=True) >= 1:
                raise ValueError(f"{name} must be in (0, 1), got {tolerance}")
        check_init(x, None, None, "x")
        parameter = first_tensor(module)
        if parameter is not None and not same_device(parameter.device, x.device):
            raise ValueError(f"the energy is on {parameter.device} and x on {x.device}: move one with .to(...)")
        if not takes_condition(module, "condition"):
            raise ValueError(
                f"the flow gives the energy a noise level as its condition, and {name_of_forward(module)} takes x "
                'only, or nothing that is named for it: give it an argument "sigma" (or "t"), a tensor (n,)'
            )
        inner = unwrapped(module)
        if isinstance(inner, NoiseConditionalEnergy) and inner.betas != (
            None if betas is None else checked_betas(betas)
        ):
            raise ValueError(f"the energy was built with betas={inner.betas}, and got betas={betas}: pass the same")
        check_finite(x, "x")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        at_levels = Energy(module, x.shape[1:], dtype, "condition")
        return cls(module, at_levels, path, x.detach().flatten(1).to(dtype), float(rtol), float(atol))

    def solved(
        self, start: tuple[Tensor, ...], field: Callable[[Tensor, Tensor], tuple[Tensor, ...]], to_noise: bool
    ) -> tuple[Tensor, ...]:
        """The state at the other end. field: (u, x) -> its derivative, part by part."""
        odeint = _odeint()
        if len(self.x) == 0:
            return start
        ends = torch.tensor(
            self.path.ends if to_noise else self.path.ends[::-1], dtype=self.x.dtype, device=self.x.device
        )
        with evaluating(self.module), torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
            states = odeint(
                lambda u, state: field(u, state[0]), start, ends, rtol=self.rtol, atol=self.atol, method="dopri5",
                # no step, a first guess included, goes beyond the end: there may be no energy
                options={"step_t": ends, "first_step": abs(float(ends[1] - ends[0])) / 100, "norm": _largest},
            )  # fmt: skip
        return tuple(part[-1] for part in states)

    def velocity(self, u: Tensor, x: Tensor) -> tuple[Tensor]:
        """dx/du."""
        gradient = self.energy.gradient(x, self._condition(u, x))
        return (self._moved(u, x, gradient),)

    def velocity_and_divergence(self, u: Tensor, x: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """dx/du and its divergence, (n,)."""
        gradient, trace = self.energy.gradient_and_trace(x, self._condition(u, x), probes)
        a, b = self.path.coefficients(u)
        return self._moved(u, x, gradient), a * x.shape[1] + b * trace

    def _condition(self, u: Tensor, x: Tensor) -> Tensor:
        return self.path.condition(u).to(x.dtype).expand(len(x))

    def _moved(self, u: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        bad = ~gradient.isfinite().all(dim=1)
        if bool(bad.any()):
            raise NonFiniteError(
                f"the gradient of the energy is not finite in {int(bad.sum())} of {len(x)} rows, at the noise level "
                f"{float(self.path.condition(u)):.3g}: was the energy trained there?"
            )
        a, b = self.path.coefficients(u)
        moved: Tensor = a * x + b * gradient
        return moved


def _signs(n_probes: int, x: Tensor, seed: int) -> Tensor:
    """Random signs, (n_probes, n, dim), of each row's number."""
    rows = torch.arange(len(x), device=x.device)
    numbers = [uniform(seed, Stream.PROBE, rows, k, x.shape[1], dtype=x.dtype) for k in range(n_probes)]
    return torch.stack(numbers).sub_(0.5).sign_()


def _largest(errors: tuple[Tensor, ...]) -> Tensor:
    """The root mean square over dims, per row; of these the largest."""
    return torch.stack([part.reshape(len(part), -1).square().mean(dim=1).max() for part in errors]).max().sqrt()


def _odeint() -> Any:
    try:
        from torchdiffeq import odeint
    except ModuleNotFoundError as error:
        raise ImportError('the probability flow needs torchdiffeq: pip install "fastebm[cli]"') from error
    return odeint
