"""Handle chains that are not finite after a run, and check the values of starts and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..box import uniform_states
from ..rng import Stream
from . import Advanced, Chains

__all__ = ["NonFiniteError", "check_classes", "check_finite", "forget", "reinitialised", "settle"]

# Chains tested at a time, so that a large start is never copied as a whole.
_ROWS_AT_ONCE = 4096


class NonFiniteError(RuntimeError):
    """Chains or their energies became NaN or infinite, and ``on_nonfinite="raise"``.

    The message gives the number of chains, the first step, the last finite max |x|, the step size and what to try.
    """


def check_finite(init: Tensor, name: str = "init") -> None:
    """Raise a ValueError if the start, (n_chains, *shape), is not finite."""
    # Fast path without extra memory: a finite sum proves that all terms are finite. Otherwise test each chain, because
    # a sum of finite terms may overflow.
    if bool(init.sum().isfinite()):
        return
    finite = torch.cat([part.isfinite().flatten(1).all(dim=1) for part in torch.split(init, _ROWS_AT_ONCE)])
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten()
        raise ValueError(
            f"{name} must be finite, got NaN or inf in {len(rows)} of {len(init)} chains (first: {int(rows[0])})"
        )


def check_classes(labels: Tensor, n: int) -> None:
    """Raise a ValueError for labels outside [0, n): on a GPU, such an index would break CUDA for the whole process."""
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
    part: tuple[int, int] | None = None,
) -> None:
    """Raise for chains that are not finite, or reinitialise them in ``done``. The one device sync of a call.

    Args:
        weights: returns the energy's weights by name, for the error.
        energy: E of states, (n, dim), and their labels or condition.
        on_nonfinite: "raise", "reinit" or "ignore".
        start: the caller's start if it still has to be tested; ``done.report`` then covers it.
        part: the number of steps before these, and of all steps of the call. None: these are all.

    Raises:
        NonFiniteError: chains are not finite, with on_nonfinite="raise".
        ValueError: the start is not finite.
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
        raise NonFiniteError(_diagnosis(weights(), done, bad, sampler, part or (0, steps)))
    condition, chains = chains.labels_or_condition, chains.rows(bad)
    done.x[bad] = reinitialised(chains._replace(x=done.x[bad], first_steps=chains.first_steps + steps), sampler)
    # Evaluate all chains, because an energy may expect the full batch or pair each chain with its condition.
    done.energy[bad] = energy(done.x, condition)[bad]
    forget(done.carried, bad)


def reinitialised(chains: Chains, sampler: Any) -> Tensor:
    """States from which chains start again after their lifetime steps, (n, dim). Frozen coordinates stay."""
    x = chains.x
    fresh = uniform_states(
        chains.seed, Stream.POOL, chains.numbers, chains.first_steps, x.shape[1], clamp=sampler.box, dtype=x.dtype
    )
    return fresh if chains.frozen is None else torch.where(chains.frozen, x, fresh)


def forget(carried: Mapping[str, Tensor] | None, rows: Tensor) -> None:
    """Mark what these chains carried as unknown, by NaN: they start again. rows: (n,) bool."""
    for value in (carried or {}).values():
        if value.is_floating_point():
            value[rows] = torch.nan


def _diagnosis(weights: Mapping[str, Tensor], done: Advanced, bad: Tensor, sampler: Any, part: tuple[int, int]) -> str:
    """The message of a NonFiniteError: what went wrong, and what to try."""
    n_bad, n_chains = int(bad.sum()), len(bad)
    broken = [name for name, p in weights.items() if not bool(p.isfinite().all())]
    if broken:
        return f"{n_bad} of {n_chains} chains are not finite, because the energy's weights are not: {', '.join(broken)}"
    where, doubt = "the energy of a finite state is not finite", ": is there a log, a root or a division in it?"
    if bool((done.first_bad >= 0).any()):
        first = int(done.first_bad[done.first_bad >= 0].min())
        where = f"first at step {part[0] + first} of {part[1]}"
        at_once = (part[0] + done.first_bad == 0) & ~done.energy.isfinite()  # no step is to blame
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
        'on_nonfinite="reinit" starts such chains again, "ignore" keeps their last finite state.'
    )
