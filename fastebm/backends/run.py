"""What ``langevin_sample`` and the operator of compiled calls have in common: the start, an MLP energy on the path that
was chosen, and what becomes of chains that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..rng import Stream, uniform
from ..samplers.langevin import Bounds, Langevin
from ..targets.description import Description
from ..threads import survives_fork
from ..tracing import readable
from . import Advanced, Chains, cpu, torch_tiles
from .graphs import Recorder

__all__ = [
    "FUSED",
    "NonFiniteError",
    "advance",
    "check_classes",
    "check_finite",
    "energy_of",
    "settle",
    "tells_of_the_start",
    "uniform_states",
]

# Paths that are the fused kernel.
FUSED = ("resident", "streaming")

# Chains that are tested together: of a large start no whole copies are made.
_ROWS_AT_ONCE = 4096


class NonFiniteError(RuntimeError):
    """Some chains left the finite numbers, and ``on_nonfinite="raise"``."""


def check_finite(init: Tensor) -> None:
    """init: (n_chains, *shape)."""
    # A sum is finite only if all its terms are, and takes no memory; one that overflowed by itself is looked into.
    if bool(init.sum().isfinite()):
        return
    finite = torch.cat([part.isfinite().flatten(1).all(dim=1) for part in torch.split(init, _ROWS_AT_ONCE)])
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten()
        raise ValueError(
            f"init must be finite, got NaN or inf in {len(rows)} of {len(init)} chains (first: {int(rows[0])})"
        )


def check_classes(labels: Tensor, n: int) -> None:
    """On a device, a label out of range would end the process' use of it."""
    if bool(((labels < 0) | (labels >= n)).any()):
        raise ValueError(
            f"labels must be in [0, {n}), the energy's classes, got values from {int(labels.min())} to "
            f"{int(labels.max())}"
        )


@survives_fork
def uniform_states(
    seed: int | Tensor,
    stream: Stream,
    chains: Tensor,
    steps: Tensor | int,
    dim: int,
    *,
    clamp: Bounds | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """States uniform on the clamp range, or on [-1, 1] without one: (n_chains, dim)."""
    lo, hi = Langevin(clamp=clamp).bounds(dim, dtype=dtype, device=chains.device) or (-1.0, 1.0)
    width = hi - lo
    known = not isinstance(width, Tensor) or readable(width.device)
    if known and not bool(torch.as_tensor(width).isfinite().all()):
        raise ValueError(f"there is no uniform start on an infinite clamp range {(lo, hi)}: pass init=")
    # The clamp is for u = 1, and for lo + (hi - lo), which may round past hi.
    states = uniform(seed, stream, chains, steps, dim, dtype=dtype).contiguous().mul_(width).add_(lo)
    return states.clamp_(lo, hi)  # type: ignore[arg-type]


@survives_fork  # once more: a compiled call comes here by itself
def advance(
    description: Description,
    chains: Chains,
    rule: Langevin,
    steps: int,
    *,
    path: str,
    precision: str,
    launch: Any,
    recorder: Recorder | None = None,
    thin: int = 0,
    telemetry: bool = False,
) -> Advanced:
    """An MLP energy on a ``Choice``'s path. chains.x is moved in place."""
    options: dict[str, Any] = {"thin": thin, "telemetry": telemetry}
    if path in (*FUSED, "products"):
        from . import fused  # only here: it imports triton
    if path in FUSED:
        return fused.advance_mlp(description, chains, rule, steps, precision=precision, launch=launch, **options)
    x = chains.x
    description = description.to(x.device, x.dtype)
    if path == "tiles" and cpu.why_not(x.device, x.dtype) is None:
        return cpu.advance(description, chains, rule, steps, precision=precision, **options)
    if path == "tiles":
        return torch_tiles.advance(description, chains, rule, steps, **options)
    return fused.advance_products(description, chains, rule, steps, recorder=recorder, **options)


def tells_of_the_start(path: str, steps: int) -> bool:
    """Whether a start that is not finite shows in ``Advanced.report``, and so needs no test, and wait, of its own."""
    return path in FUSED and steps > 0


def energy_of(description: Description) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(n, dim) states, and labels (n,) or None -> (n,)."""

    def energy(x: Tensor, labels: Tensor | None) -> Tensor:
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        whole = description.to(x.device, x.dtype)
        return torch_tiles.advance(whole, Chains(x.clone(), 0, zeros, zeros, labels), Langevin(), 0).energy

    return energy


def settle(
    done: Advanced,
    chains: Chains,
    rule: Langevin,
    steps: int,
    weights: Callable[[], Mapping[str, Tensor]],
    energy: Callable[[Tensor, Tensor | None], Tensor],
    on_nonfinite: str,
    start: Tensor | None = None,
) -> None:
    """Raise for chains that are not finite, or start them anew in place. The call's one device sync.

    weights: by name, for the error. energy: of new states. start: the caller's, if nobody has tested yet that it is
    finite: where ``tells_of_the_start``.
    """
    if done.report is not None and (start is not None or on_nonfinite != "ignore"):
        if not bool(done.report):
            return
        if start is not None:
            check_finite(start)
    if on_nonfinite == "ignore":
        return
    bad = (done.first_bad >= 0) | ~done.energy.isfinite()
    if not bool(bad.any()):
        return
    if on_nonfinite == "raise":
        raise NonFiniteError(_diagnosis(weights(), done, bad, rule, steps))
    conditions, chains = chains.beside, chains.rows(bad)
    ages, last = chains.first_steps + steps, done.x[bad]
    fresh = uniform_states(
        chains.seed, Stream.POOL, chains.numbers, ages, last.shape[1], clamp=rule.clamp, dtype=last.dtype
    )
    if chains.frozen is not None:
        fresh = torch.where(chains.frozen, last, fresh)
    done.x[bad] = fresh
    # of all chains: an energy may know how many it is given, and go by what each is conditioned on
    done.energy[bad] = energy(done.x, conditions)[bad]


def _diagnosis(weights: Mapping[str, Tensor], done: Advanced, bad: Tensor, rule: Langevin, steps: int) -> str:
    """What went wrong, and what to try."""
    n_bad, n_chains = int(bad.sum()), len(bad)
    broken = [name for name, p in weights.items() if not bool(p.isfinite().all())]
    if broken:
        return f"{n_bad} of {n_chains} chains are not finite, because the energy's weights are not: {', '.join(broken)}"
    where, doubt = "the energy of a finite state is not finite", ": is there a log, a root or a division in it?"
    if bool((done.first_bad >= 0).any()):
        first = int(done.first_bad[done.first_bad >= 0].min())
        where = f"first at step {first} of {steps}"
        at_once = (done.first_bad == 0) & ~done.energy.isfinite()  # no step is to blame
        doubt = f", from an energy that is not finite where they start{doubt}" if bool(at_once[bad].all()) else ""
    where += doubt
    size = float(done.x[bad].abs().max())
    step = (
        f"{rule.step_size:g}" if isinstance(rule.step_size, (int, float)) else f"up to {float(rule.step_size.max()):g}"
    )
    return (
        f"{n_bad} of {n_chains} chains are not finite ({where}; last finite max |x| = {size:.3g}; step_size = {step}). "
        f"{f'{rule.advice}. ' if rule.advice else ''}"
        "Try a smaller step_size, grad_clip=, clamp=, or an energy with bounded gradients (spectral_norm=True); "
        'on_nonfinite="reinit" starts such chains anew, "ignore" keeps their last finite state.'
    )
