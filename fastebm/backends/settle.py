"""What becomes of chains that are not finite, and the checks of starts and labels that need their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..box import uniform_states
from ..rng import Stream
from . import Advanced, Chains

__all__ = ["NonFiniteError", "check_classes", "check_finite", "settle"]

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


def settle(
    done: Advanced,
    chains: Chains,
    sampler: Any,
    steps: int,
    weights: Callable[[], Mapping[str, Tensor]],
    energy: Callable[[Tensor, Tensor | None], Tensor],
    on_nonfinite: str,
    start: Tensor | None = None,
) -> None:
    """Raise for chains that are not finite, or reinitialise them in place. The call's one device sync.

    weights: by name, for the error. energy: of new states and their conditions. start: the caller's states, if
    ``done.report`` covers them and they have not been tested yet.
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
        raise NonFiniteError(_diagnosis(weights(), done, bad, sampler, steps))
    condition, chains = chains.given, chains.rows(bad)
    after, last = chains.first_steps + steps, done.x[bad]
    fresh = uniform_states(
        chains.seed, Stream.POOL, chains.numbers, after, last.shape[1], clamp=sampler.box, dtype=last.dtype
    )
    if chains.frozen is not None:
        fresh = torch.where(chains.frozen, last, fresh)
    done.x[bad] = fresh
    # of all chains: an energy may know how many it is given, and go by what each is conditioned on
    done.energy[bad] = energy(done.x, condition)[bad]


def _diagnosis(weights: Mapping[str, Tensor], done: Advanced, bad: Tensor, sampler: Any, steps: int) -> str:
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
    step_size = getattr(sampler, "step_size", None)
    step = ""
    if step_size is not None:
        number = f"up to {float(step_size.max()):g}" if isinstance(step_size, Tensor) else f"{step_size:g}"
        step = f"; step_size = {number}"
    clips = [f"{name}=" for name in ("grad_clip", "clamp") if hasattr(sampler, name)]
    advice = getattr(sampler, "advice", "")
    return (
        f"{n_bad} of {n_chains} chains are not finite ({where}; last finite max |x| = {size:.3g}{step}). "
        f"{f'{advice}. ' if advice else ''}"
        f"Try a smaller step_size, {', '.join(clips)}, or an energy with bounded gradients (spectral_norm=True); "
        'on_nonfinite="reinit" starts such chains anew, "ignore" keeps their last finite state.'
    )
