"""The result of ``fastebm.log_partition``."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor

from ..box import Box

__all__ = ["LogPartition", "log_mean_exp"]

# Below these an estimate is reported as unreliable. With an effective sample size of 10, the mean of the weights has a
# relative error of a third, and its own estimate of that error is poor.
_LEAST_ESS, _LEAST_SHARE, _LEAST_ACCEPTANCE = 10.0, 0.03, 0.02

# A gap between the bounds is reported if it exceeds this many standard errors and this many nats.
_GAP_ERRORS, _GAP = 5.0, 0.1


@dataclass(frozen=True, eq=False, repr=False)
class LogPartition:
    """An estimate of log Z = log of the integral of exp(-E), with its error and a bracket. In nats.

    Attributes:
        log_z: log of the mean of the weights of forward AIS. The mean itself is an unbiased estimate of Z. So its
            logarithm is a stochastic lower bound: it is below log Z in expectation, and above log Z + c with a
            probability of at most exp(-c) (Grosse, Ghahramani & Adams 2015).
        standard_error: of log_z, by the delta method: the standard deviation of the weights, relative to their mean,
            over the root of the number of chains. It is too small if a few weights dominate: see ess.
        upper: log Z_0 - log of the mean of the weights of reverse AIS: a stochastic upper bound, if its chains start
            at draws of exp(-E). By default they start at the ends of the forward chains, so it is only as good as
            these: a mode that forward chains miss is missing here too. Pass ``samples=`` to find it. If E
            is +inf at some draws of the base, it is too high by minus the log of the share of the others: use a clamp.
        upper_error: its standard error, computed likewise. Without ``samples=`` that of log_z is added (as a square),
            because the starts inherit it: the share of each mode among them is that of the forward weights.
        ess: effective sample size of the forward weights, (sum w)^2 / sum w^2, from 1 to n_chains (Kong 1992).
        log_weights: (n_chains,) float64, of forward AIS, with log Z_0: log_z is the logarithm of their mean.
        reverse_log_weights: (n_chains or len(samples),) float64, of reverse AIS, with log Z_0. Minus upper is the
            logarithm of their mean.
        betas: (n_temperatures,) float64, the ladder from 0 to 1.
        acceptance: mean acceptance probability in consecutive parts of equal length of the forward ladder.
        clamp: the bounds of the states, outside of which the density is 0, or None.
    """

    log_z: float
    standard_error: float
    upper: float
    upper_error: float
    ess: float
    log_weights: Tensor
    reverse_log_weights: Tensor
    betas: Tensor
    acceptance: Tensor
    clamp: Box | None

    @classmethod
    def of(
        cls, log_weights: Tensor, reverse_log_weights: Tensor, betas: Tensor, acceptance: Tensor, clamp: Box | None, *,
        inherits: bool,
    ) -> LogPartition:  # fmt: skip
        """The estimate from the weights of both directions. inherits: reverse chains start at forward ends."""
        log_z, error, ess = log_mean_exp(log_weights)
        minus_upper, upper_error, _ = log_mean_exp(reverse_log_weights)
        upper_error = math.hypot(upper_error, error) if inherits else upper_error
        return cls(
            log_z, error, -minus_upper, upper_error, ess, log_weights, reverse_log_weights, betas, acceptance, clamp
        )

    @property
    def lower(self) -> float:
        """The stochastic lower bound: log_z."""
        return self.log_z

    @property
    def lower_error(self) -> float:
        """Its standard error."""
        return self.standard_error

    def __repr__(self) -> str:
        return (
            f"LogPartition(log Z = {self.log_z:.4f} ± {self.standard_error:.4f}, upper bound {self.upper:.4f} ± "
            f"{self.upper_error:.4f}, ESS {self.ess:.0f} of {len(self.log_weights)} chains, "
            f"{len(self.betas)} temperatures, acceptance {self.acceptance.min():.2f} to {self.acceptance.max():.2f})"
        )

    def warn(self, *, stacklevel: int) -> None:
        """Warn if the estimate can't be trusted."""
        n, doubts = len(self.log_weights), []
        if self.ess < max(_LEAST_ESS, _LEAST_SHARE * n):
            doubts.append(f"the effective sample size is {self.ess:.1f} of {n} chains, so few weights decide")
        if (low := self.acceptance < _LEAST_ACCEPTANCE).any():
            place = int(low.nonzero()[0]) / len(low)
            doubts.append(
                f"chains hardly move in {int(low.sum())} of {len(low)} parts of the ladder (first near b = "
                f"{self.betas[int(place * len(self.betas))]:.2g}): their acceptance is {self.acceptance[low].min():.2g}"
            )
        gap = self.upper - self.lower
        if gap > max(_GAP, _GAP_ERRORS * math.hypot(self.lower_error, self.upper_error)):
            doubts.append(f"the bounds are {gap:.2f} nats apart, far above their standard errors")
        if doubts:
            warnings.warn(
                f"log Z = {self.log_z:.2f} can't be trusted: {'; '.join(doubts)}. Use more temperatures "
                "(n_temperatures=), or a base that covers the energy's samples (base=)",
                stacklevel=stacklevel + 1,
            )


def log_mean_exp(log_weights: Tensor) -> tuple[float, float, float]:
    """Log of the mean weight, its standard error by the delta method, and the effective sample size.

    log_weights: (n,) float64, n >= 2.
    """
    n = len(log_weights)
    top = log_weights.max()
    w = (log_weights - top).exp()
    mean = w.mean()
    ess = w.sum().square() / w.square().sum()
    return float(top + mean.log()), float(w.std() / mean / math.sqrt(n)), float(ess)
