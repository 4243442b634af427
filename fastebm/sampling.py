"""langevin_sample: check the input, choose a backend, run it, look at what came back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backends import Advanced, reference, torch_tiles
from .backends.choose import Choice, choose
from .energies import Energy
from .langevin import Langevin
from .mlp import NotAnMLP, evaluating, read_mlp
from .noise import Stream, draw_seed, uniform

__all__ = ["NonFiniteError", "SampleInfo", "advance_chains", "langevin_sample", "state_shape", "uniform_states"]

ON_NONFINITE = ("raise", "reinit", "ignore")


class NonFiniteError(RuntimeError):
    """Some chains left the finite numbers, and ``on_nonfinite="raise"``."""


@dataclass(frozen=True, eq=False)
class SampleInfo:
    """What a sampling call did.

    backend: "triton", "torch" or "reference". path: what ran in it ("resident" or "streaming": the fused
    kernel; "tiles": closed-form gradient; "autograd"). why_not_fused: why the fused kernel did not run, or
    None. precision: of the matrix products. seed: reproduces the call. temperature: implied, noise_scale^2.
    energies: (n_chains,) E of the returned states. first_bad_step: (n_chains,) int32, first step of this call
    whose new state was not finite; -1 if none.
    """

    backend: str
    path: str
    why_not_fused: str | None
    precision: str
    seed: int
    temperature: float | Tensor
    energies: Tensor
    first_bad_step: Tensor


def langevin_sample(
    energy: nn.Module,
    input_size: int | Sequence[int] | None = None,
    *,
    batch_size: int = 32,
    steps: int = 60,
    step_size: float | Tensor = 10.0,
    noise_scale: float | Tensor = 0.005,
    init: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    grad_clip: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_chain: int = 0,
    first_step: int = 0,
    backend: str = "auto",
    precision: str | None = None,
    device: torch.device | str | None = None,
    on_nonfinite: str = "raise",
    out: Tensor | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SampleInfo]:
    """Samples of exp(-E/T) by K steps of Langevin dynamics, T = noise_scale^2:

        x' = clamp(x - (step_size/2) clip(dE/dx) + sqrt(step_size) noise_scale xi),   xi ~ N(0, I)

    The energy runs in eval mode and is left as it was. The same weights, start, seed and precision give the
    same bits a chain, whatever else is in the batch, on one kind of device.

    Args:
        energy: maps (batch, *shape) to (batch,) or (batch, 1). MLPs take the fused kernel on CUDA.
        input_size: dims or shape of one state; may be left out with ``init``, or when the energy is an MLP.
        batch_size: number of chains, >= 0, when there is no ``init``.
        steps: >= 0; 0 returns the start.
        step_size: > 0: a float, a (steps,) schedule, or (n_chains, 1) for a value a chain.
        noise_scale: >= 0, in the same three forms; 0 is gradient descent.
        init: (n_chains, *shape) start, floating point. float64 is computed in float64 (and not by the fused
            kernel); everything else in float32, which is what comes back. None: uniform on the clamp range,
            or on [-1, 1] without one.
        clamp: (lo, hi), or None.
        grad_clip: elementwise bound on the gradient, or None.
        seed: 64-bit seed of the noise. None: drawn from ``generator``, or from torch's global CPU generator.
        first_chain: global number of the first chain; part of the noise's counter.
        first_step: lifetime step number of the first step; likewise.
        backend: "auto", "triton", "torch" or "reference".
        precision: of the fused kernel's products: "bf16x3" (the default), "tf32", "bf16" or "ieee". The
            other paths always compute in full.
        device: where to sample when there is no ``init``; None: where the energy is.
        on_nonfinite: "raise", "reinit" (start those chains anew) or "ignore" (return their last finite state).
        out: (n_chains, *shape) tensor to write the samples to; may be ``init`` itself.
        return_info: also return a ``SampleInfo``.

    Returns:
        (n_chains, *shape) samples, or (samples, SampleInfo).

    Raises:
        TypeError, ValueError: for bad input: the rule, the value, the way out. Nothing is changed then.
        NonFiniteError: chains that exploded, with what to try.
    """
    rule = Langevin(step_size, noise_scale, grad_clip, clamp)
    if not isinstance(energy, nn.Module):
        raise TypeError(f"energy must be a torch.nn.Module, got {type(energy).__name__}")
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
    steps = _count("steps", steps)
    first_chain, first_step = _count("first_chain", first_chain), _count("first_step", first_step)
    if first_step + steps > 2**32:
        raise ValueError(f"step numbers are 32-bit: first_step + steps must be <= 2**32, got {first_step + steps}")
    parameter = next(energy.parameters(), None)
    if init is None:
        n_chains, shape = _count("batch_size", batch_size), _shape(energy, input_size)
        device = torch.device(device if device is not None else "cpu" if parameter is None else parameter.device)
        dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
    else:
        _check_init(init, input_size, device)
        n_chains, shape, device = len(init), init.shape[1:], init.device
        dtype = torch.float64 if init.dtype == torch.float64 else torch.float32
    if first_chain + n_chains > 2**63:
        raise ValueError(f"chain numbers are 63-bit: first_chain + n_chains must be <= 2**63, got {first_chain}")
    if out is not None:
        _check_out(out, (n_chains, *shape), dtype, device)

    seed = draw_seed(seed, generator)
    chains = torch.arange(first_chain, first_chain + n_chains, device=device)
    dim = math.prod(shape)
    if init is None:
        x = uniform_states(seed, Stream.INITIAL, chains, 0, dim, clamp=rule.clamp, dtype=dtype)
    else:
        x = init.detach().reshape(n_chains, dim)
    samples, info = advance_chains(
        energy,
        x,
        rule,
        steps,
        shape=shape,
        seed=seed,
        chains=chains,
        first_steps=torch.full_like(chains, first_step),
        backend=backend,
        precision=precision,
        on_nonfinite=on_nonfinite,
    )
    samples = samples.reshape(n_chains, *shape)
    if out is not None:
        samples = out.copy_(samples)
    return (samples, info) if return_info else samples


def advance_chains(
    energy: nn.Module,
    x: Tensor,
    rule: Langevin,
    steps: int,
    *,
    shape: Sequence[int],
    seed: int,
    chains: Tensor,
    first_steps: Tensor,
    backend: str = "auto",
    precision: str | None = None,
    on_nonfinite: str = "raise",
) -> tuple[Tensor, SampleInfo]:
    """The checked core of ``langevin_sample``: chains with numbers and ages of their own.

    Args:
        x: (n_chains, dim) start, left as it is. shape: of one state as the energy takes it.
        chains, first_steps: (n_chains,) int64 global chain numbers and lifetime step numbers.

    Returns:
        (n_chains, dim) states and a ``SampleInfo``.
    """
    steps = _count("steps", steps)
    parameter = next(energy.parameters(), None)
    if parameter is not None and not _same_device(parameter.device, x.device):
        raise ValueError(f"the energy is on {parameter.device} and the chains on {x.device}: move one with .to(...)")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # a private, contiguous copy: backends work in place
    x = x.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
    with evaluating(energy), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        choice = choose(energy, x.device, dtype, backend, precision)
        if choice.mlp is not None and choice.mlp.dim != x.shape[1]:
            raise ValueError(f"the energy takes {choice.mlp.dim} dims, and the chains have {x.shape[1]}")
        module = Energy(energy, shape, dtype)
        if len(x) > 0 and (choice.mlp is None or len(shape) > 1):
            _check_takes(module, x[:1])
        done = _run(choice, module, x, rule, steps, seed=seed, chains=chains, first_steps=first_steps)
        bad = (done.first_bad >= 0) | ~done.energy.isfinite()
        # the call's one device sync
        if on_nonfinite != "ignore" and bool(bad.any()):
            if on_nonfinite == "raise":
                raise NonFiniteError(_diagnosis(energy, done, bad, rule, steps))
            fresh = uniform_states(
                seed, Stream.POOL, chains[bad], first_steps[bad] + steps, x.shape[1], clamp=rule.clamp, dtype=dtype
            )
            done.x[bad] = fresh
            done.energy[bad] = module(fresh)
    info = SampleInfo(
        backend=choice.backend,
        path=choice.path,
        why_not_fused=choice.why_not_fused,
        precision=choice.precision,
        seed=seed,
        temperature=rule.temperature,
        energies=done.energy,
        first_bad_step=done.first_bad,
    )
    return done.x, info


def uniform_states(
    seed: int,
    stream: Stream,
    chains: Tensor,
    steps: Tensor | int,
    dim: int,
    *,
    clamp: tuple[float, float] | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """States uniform on the clamp range, or on [-1, 1] without one: (n_chains, dim)."""
    lo, hi = clamp or (-1.0, 1.0)
    if not (math.isfinite(lo) and math.isfinite(hi)):
        raise ValueError(f"there is no uniform start on an infinite clamp range {(lo, hi)}: pass init=")
    # The clamp is for u = 1, and for lo + (hi - lo), which may round past hi.
    return (uniform(seed, stream, chains, steps, dim, dtype=dtype) * (hi - lo) + lo).clamp_(lo, hi)


def _run(
    choice: Choice,
    energy: Energy,
    x: Tensor,
    rule: Langevin,
    steps: int,
    *,
    seed: int,
    chains: Tensor,
    first_steps: Tensor,
) -> Advanced:
    if choice.backend == "triton":
        from .backends import fused  # only here: it imports triton

        if choice.launch is None:
            return fused.advance_module(energy, x, rule, steps, seed=seed, chains=chains, first_steps=first_steps)
        return fused.advance_mlp(
            choice.mlp.to(x.device, x.dtype),  # type: ignore[union-attr]
            x,
            rule,
            steps,
            seed=seed,
            chains=chains,
            first_steps=first_steps,
            precision=choice.precision,
            launch=choice.launch,
        )
    if choice.mlp is not None:
        mlp = choice.mlp.to(x.device, x.dtype)
        return torch_tiles.advance(mlp, x, rule, steps, seed=seed, chains=chains, first_steps=first_steps)
    return reference.advance(energy, x, rule, steps, seed=seed, chains=chains, first_steps=first_steps)


def _diagnosis(energy: nn.Module, done: Advanced, bad: Tensor, rule: Langevin, steps: int) -> str:
    """What went wrong, and what to try."""
    n_bad, n_chains = int(bad.sum()), len(bad)
    broken = [name for name, p in energy.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        return f"{n_bad} of {n_chains} chains are not finite, because the energy's weights are not: {', '.join(broken)}"
    where = "the energy of a finite state is not finite"
    if bool((done.first_bad >= 0).any()):
        first = int(done.first_bad[done.first_bad >= 0].min())
        where = f"first at step {first} of {steps}"
    size = float(done.x[bad].abs().max())
    step = (
        f"{rule.step_size:g}" if isinstance(rule.step_size, (int, float)) else f"up to {float(rule.step_size.max()):g}"
    )
    return (
        f"{n_bad} of {n_chains} chains are not finite ({where}; last finite max |x| = {size:.3g}; step_size = {step}). "
        "Try a smaller step_size, grad_clip=, clamp=, or an energy with bounded gradients (spectral_norm=True); "
        'on_nonfinite="reinit" starts such chains anew, "ignore" keeps their last finite state.'
    )


def _check_takes(energy: Energy, x: Tensor) -> None:
    """One state through the energy, so that a shape it does not take is told in words before any chain moves."""
    try:
        energy(x)
    except RuntimeError as error:
        shape = ", ".join(str(size) for size in energy.shape)
        raise ValueError(f"the energy does not take states of shape (n_chains, {shape}): {error}") from error


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return value


def _shape(energy: nn.Module, input_size: int | Sequence[int] | None) -> tuple[int, ...]:
    if input_size is None:
        try:
            return (read_mlp(energy).dim,)
        except NotAnMLP as error:
            raise ValueError(
                f"pass input_size= or init=: the energy does not tell its input's shape ({error})"
            ) from None
    return state_shape(input_size)


def state_shape(input_size: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one state, from its number of dims or the shape itself."""
    if not isinstance(input_size, (int, Sequence)):
        raise TypeError(f"input_size must be an int or a shape, got {input_size!r}")
    shape = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    if not shape or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in shape):
        raise ValueError(f"input_size must be an int >= 1 or a shape of such ints, got {input_size!r}")
    return shape


def _check_init(init: Tensor, input_size: int | Sequence[int] | None, device: torch.device | str | None) -> None:
    if not isinstance(init, Tensor):
        raise TypeError(f"init must be a tensor, got {type(init).__name__}")
    if not init.is_floating_point():
        raise TypeError(f"init must be floating point (float32, float64 or half), got {init.dtype}: use init.float()")
    if init.ndim < 2 or math.prod(init.shape[1:]) == 0:
        raise ValueError(f"init must be (n_chains, *shape) with at least one dim, got shape {tuple(init.shape)}")
    if input_size is not None:
        shape = (input_size,) if isinstance(input_size, int) else tuple(input_size)
        if shape != tuple(init.shape[1:]):
            raise ValueError(f"input_size {input_size!r} and init of shape {tuple(init.shape)} disagree: leave one out")
    if device is not None and not _same_device(torch.device(device), init.device):
        raise ValueError(f"init is on {init.device} and device={device}: move one, or leave device= out")
    finite = init.isfinite()
    if not bool(finite.all()):
        rows = (~finite).flatten(1).any(dim=1).nonzero().flatten()
        raise ValueError(
            f"init must be finite, got NaN or inf in {len(rows)} of {len(init)} chains (first: {int(rows[0])})"
        )


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if tuple(out.shape) != shape or out.dtype != dtype or not _same_device(device, out.device):
        raise ValueError(
            f"out must be a {shape} tensor of {dtype} on {device}, got {tuple(out.shape)}, {out.dtype}, {out.device}"
        )
    if out.requires_grad:
        raise ValueError("out must not require grad: samples carry none")
