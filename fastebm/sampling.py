"""langevin_sample: check the input, choose a backend, run it, look at what came back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .backends import Advanced, Chains, reference, torch_compiled, torch_tiles
from .backends.choose import Choice, choose
from .description import describe
from .energies import Energy, n_classes, takes_labels
from .langevin import Bounds, Langevin
from .mlp import NotAnMLP, evaluating
from .noise import Stream, draw_seed, uniform

__all__ = ["NonFiniteError", "SampleInfo", "advance_chains", "langevin_sample", "state_shape", "uniform_states"]

ON_NONFINITE = ("raise", "reinit", "ignore")


class NonFiniteError(RuntimeError):
    """Some chains left the finite numbers, and ``on_nonfinite="raise"``."""


@dataclass(frozen=True, eq=False)
class SampleInfo:
    """What a sampling call did.

    backend: "triton", "torch" or "reference". path: what ran in it ("resident" or "streaming": the fused
    kernel; "tiles", "compiled" or "products": closed-form gradient; "autograd"). why_not_fused: why the fused kernel
    did not run, or None. precision: of the matrix products. seed: reproduces the call. temperature: implied,
    noise_scale^2.

    All others are (n_chains,). energies: E of the last states. first_bad_step: int32, first step of this call
    whose new state was not finite; -1 if none. grad_norm: |dE/dx| before clips, over the coordinates that are not
    frozen, at the state that the last step started from; NaN after no step. clipped: the fraction of steps in which
    a clip changed the gradient. clamped: in which the clamp changed the state.
    """

    backend: str
    path: str
    why_not_fused: str | None
    precision: str
    seed: int | Tensor
    temperature: float | Tensor
    energies: Tensor
    first_bad_step: Tensor
    grad_norm: Tensor
    clipped: Tensor
    clamped: Tensor


def langevin_sample(
    energy: nn.Module,
    input_size: int | Sequence[int] | None = None,
    *,
    batch_size: int = 32,
    steps: int = 60,
    step_size: float | Tensor = 10.0,
    noise_scale: float | Tensor = 0.005,
    init: Tensor | None = None,
    labels: Tensor | None = None,
    frozen: Tensor | None = None,
    clamp: Bounds | None = None,
    grad_clip: float | None = None,
    grad_norm_clip: float | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_chain: int = 0,
    first_step: int | Tensor = 0,
    backend: str = "auto",
    precision: str | None = None,
    compile: bool | str = "auto",
    device: torch.device | str | None = None,
    on_nonfinite: str = "raise",
    return_trajectory: bool = False,
    thin: int = 1,
    out: Tensor | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SampleInfo]:
    """Samples of exp(-E/T) by K steps of Langevin dynamics, T = noise_scale^2:

        x' = clamp(x - (step_size/2) clip(dE/dx) + sqrt(step_size) noise_scale xi),   xi ~ N(0, I)

    The energy runs in eval mode and is left as it was. The same weights, start, seed and precision give the
    same bits a chain, whatever else is in the batch, on one kind of device.

    Args:
        energy: maps (batch, *shape) to (batch,) or (batch, 1). MLPs, a ``ClassifierEnergy`` of one and a
            ``SumEnergy`` of them take the fused kernel on CUDA.
        input_size: dims or shape of one state; may be left out with ``init``, or when the energy is an MLP.
        batch_size: number of chains, >= 0, when there is no ``init``.
        steps: >= 0; 0 returns the start.
        step_size: > 0: a float, a (steps,) schedule, or (n_chains, 1) for a value a chain.
        noise_scale: >= 0, in the same three forms; 0 is gradient descent.
        init: (n_chains, *shape) start, floating point. float64 is computed in float64 (and not by the fused
            kernel); everything else in float32, which is what comes back. None: uniform on the clamp range,
            or on [-1, 1] without one.
        labels: (n_chains,) integers, each chain's class, for an energy that takes them as its second argument:
            with a ``ClassifierEnergy``, samples of p(x | y). None: E(x) alone.
        frozen: bool, of one state's shape or (n_chains, *shape): coordinates that stay as they start, whatever
            the clamp (inpainting, conditional sampling).
        clamp: (lo, hi), or None. Each a number, or a tensor of one state's shape.
        grad_clip: elementwise bound on the gradient, or None.
        grad_norm_clip: bound on the Euclidean norm of each chain's gradient, after grad_clip, or None.
        seed: 64-bit seed of the noise. None: drawn from ``generator``, or from torch's global CPU generator. An
            int64 tensor of one element is read on the device, when the call runs (or a CUDA graph of it).
        first_chain: global number of the first chain; part of the noise's counter.
        first_step: lifetime step number of the first step, likewise. An int64 tensor of one element or of
            (n_chains,) is read on the device.
        backend: "auto", "triton", "torch" or "reference".
        precision: of the fused kernel's products: "bf16x3" (about 16 bits of mantissa), "tf32", "bf16" or "ieee"
            (full float32: exact, and slow). None: "bf16x3", or "bf16" after
            ``torch.set_float32_matmul_precision("medium")``. The other paths compute in full, but for compiled
            code at "bf16", on a CPU that multiplies it.
        compile: the torch path of an MLP energy on a CPU as code of torch.compile: True, False, or "auto", when the
            call is so long that compiling (10 to 40 seconds, once) pays. Compiled and other code round differently.
        device: where to sample when there is no ``init``; None: where the energy is.
        on_nonfinite: "raise", "reinit" (start those chains anew) or "ignore" (return their last finite state).
        return_trajectory: return the states after every ``thin``-th step in place of the last ones.
        thin: a divisor of ``steps``.
        out: tensor to write the samples to, of their shape; may be ``init`` itself.
        return_info: also return a ``SampleInfo``.

    Returns:
        (n_chains, *shape) samples, or (n_chains, steps // thin, *shape) with ``return_trajectory``; or a pair of
        that and a ``SampleInfo``.

    Raises:
        TypeError, ValueError: for bad input: the rule, the value, the way out. Nothing is changed then.
        NonFiniteError: chains that exploded, with what to try.
    """
    rule = Langevin(step_size, noise_scale, grad_clip, clamp, grad_norm_clip)
    if not isinstance(energy, nn.Module):
        raise TypeError(f"energy must be a torch.nn.Module, got {type(energy).__name__}")
    steps, first_chain = _count("steps", steps), _count("first_chain", first_chain)
    thin = _checked_thin(thin, steps, return_trajectory, on_nonfinite)
    parameter = next(energy.parameters(), None)
    if init is None:
        n_chains, shape = _count("batch_size", batch_size), _shape(energy, input_size, labels is not None)
        device = torch.device(device if device is not None else "cpu" if parameter is None else parameter.device)
        dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
    else:
        _check_init(init, input_size, device)
        n_chains, shape, device = len(init), init.shape[1:], init.device
        dtype = torch.float64 if init.dtype == torch.float64 else torch.float32
    if first_chain + n_chains > 2**63:
        raise ValueError(f"chain numbers are 63-bit: first_chain + n_chains must be <= 2**63, got {first_chain}")
    if out is not None:
        _check_out(out, (n_chains, *((steps // thin,) if thin else ()), *shape), dtype, device)
    dim = math.prod(shape)
    numbers = torch.arange(first_chain, first_chain + n_chains, device=device)
    first_steps = _checked_first_steps(first_step, steps, numbers)
    seed = draw_seed(seed, generator) if not isinstance(seed, Tensor) else _checked_seed(seed)
    if init is None:
        x = uniform_states(int(seed), Stream.INITIAL, numbers, 0, dim, clamp=rule.clamp, dtype=dtype)
    else:
        x = init.detach().reshape(n_chains, dim)
    done, info = advance_chains(
        energy,
        Chains(x, seed, numbers, first_steps, labels, _checked_frozen(frozen, n_chains, tuple(shape), device)),
        rule,
        steps,
        shape=shape,
        backend=backend,
        precision=precision,
        compile=compile,
        on_nonfinite=on_nonfinite,
        thin=thin,
        telemetry=return_info,
    )
    if done.trajectory is not None:
        samples = done.trajectory.reshape(n_chains, steps // thin, *shape)
    else:
        samples = done.x.reshape(n_chains, *shape)
    if out is not None:
        samples = out.copy_(samples)
    return (samples, info) if info is not None else samples


def advance_chains(
    energy: nn.Module,
    chains: Chains,
    rule: Langevin,
    steps: int,
    *,
    shape: Sequence[int],
    backend: str = "auto",
    precision: str | None = None,
    compile: bool | str = "auto",
    on_nonfinite: str = "raise",
    thin: int = 0,
    telemetry: bool = False,
) -> tuple[Advanced, SampleInfo | None]:
    """The checked core of ``langevin_sample``: chains with numbers and ages of their own, which are left as they are.

    Args:
        shape: of one state as the energy takes it.
        thin: keep the state after every thin-th step; 0: of none.
        telemetry: also return a ``SampleInfo``.
    """
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
    steps = _count("steps", steps)
    x = chains.x
    parameter = next(energy.parameters(), None)
    if parameter is not None and not _same_device(parameter.device, x.device):
        raise ValueError(f"the energy is on {parameter.device} and the chains on {x.device}: move one with .to(...)")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # a private, contiguous copy: backends work in place
    x = x.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
    with evaluating(energy), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        choice = choose(energy, x.device, dtype, backend, precision, labels=chains.labels is not None)
        if _wants_compiled(compile, choice, x, steps):
            bf16 = precision == "bf16" and torch_compiled.multiplies_bf16()
            choice = replace(choice, path="compiled", precision="bf16" if bf16 else "ieee")
        description = choice.description
        if description is not None and description.dim != x.shape[1]:
            raise ValueError(f"the energy takes {description.dim} dims, and the chains have {x.shape[1]}")
        module = Energy(energy, shape, dtype)
        labels = _checked_labels(module, chains.labels, x)
        if len(x) > 0 and (description is None or len(shape) > 1):
            _check_takes(module, x[:1], None if labels is None else torch.zeros_like(labels[:1]))
        if len(x) > 0 and labels is not None:
            _check_classes(energy, labels, x[:1].reshape(1, *shape))
        chains = chains._replace(x=x, labels=labels)
        start = x.clone() if on_nonfinite == "reinit" and chains.frozen is not None else x
        try:
            done = _run(choice, module, chains, rule, steps, thin, telemetry)
        except torch_compiled.CannotCompile as error:
            warnings.warn(f"the torch path runs uncompiled: {error}", stacklevel=3)
            choice = replace(choice, path="tiles", precision="ieee")
            done = _run(choice, module, chains, rule, steps, thin, telemetry)
        bad = (done.first_bad >= 0) | ~done.energy.isfinite()
        # the call's one device sync
        if on_nonfinite != "ignore" and bool(bad.any()):
            if on_nonfinite == "raise":
                raise NonFiniteError(_diagnosis(energy, done, bad, rule, steps))
            done.x[bad] = _restarted(chains.rows(bad), start[bad], rule, steps)
            done.energy[bad] = module(done.x[bad], None if chains.labels is None else chains.labels[bad])
    if done.telemetry is None:
        return done, None
    info = SampleInfo(
        backend=choice.backend,
        path=choice.path,
        why_not_fused=choice.why_not_fused,
        precision=choice.precision,
        seed=chains.seed,
        temperature=rule.temperature,
        energies=done.energy,
        first_bad_step=done.first_bad,
        grad_norm=done.telemetry.grad_norm,
        clipped=done.telemetry.clipped,
        clamped=done.telemetry.clamped,
    )
    return done, info


def _restarted(chains: Chains, start: Tensor, rule: Langevin, steps: int) -> Tensor:
    """Fresh states for chains that exploded; frozen coordinates as they started."""
    ages = chains.first_steps + steps
    dim = start.shape[1]
    fresh = uniform_states(
        int(chains.seed), Stream.POOL, chains.numbers, ages, dim, clamp=rule.clamp, dtype=start.dtype
    )
    return fresh if chains.frozen is None else torch.where(chains.frozen, start, fresh)


def uniform_states(
    seed: int,
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
    if not bool(torch.as_tensor(hi - lo).isfinite().all()):
        raise ValueError(f"there is no uniform start on an infinite clamp range {(lo, hi)}: pass init=")
    # The clamp is for u = 1, and for lo + (hi - lo), which may round past hi.
    states = uniform(seed, stream, chains, steps, dim, dtype=dtype) * (hi - lo) + lo
    return states.clamp(lo, hi)  # type: ignore[arg-type]


def _run(
    choice: Choice, energy: Energy, chains: Chains, rule: Langevin, steps: int, thin: int, telemetry: bool
) -> Advanced:
    x = chains.x
    if choice.description is None:
        if choice.backend == "triton":
            from .backends import fused  # only here: it imports triton

            return fused.advance_module(energy, chains, rule, steps, thin=thin, telemetry=telemetry)
        return reference.advance(energy, chains, rule, steps, thin=thin, telemetry=telemetry)
    description = choice.description.to(x.device, x.dtype)
    if choice.backend == "triton":
        from .backends import fused

        if choice.launch is None:
            return fused.advance_products(description, chains, rule, steps, thin=thin, telemetry=telemetry)
        return fused.advance_mlp(
            description,
            chains,
            rule,
            steps,
            precision=choice.precision,
            launch=choice.launch,
            thin=thin,
            telemetry=telemetry,
        )
    if choice.path == "compiled":
        return torch_compiled.advance(
            description, chains, rule, steps, precision=choice.precision, thin=thin, telemetry=telemetry
        )
    return torch_tiles.advance(description, chains, rule, steps, thin=thin, telemetry=telemetry)


def _wants_compiled(compile: bool | str, choice: Choice, x: Tensor, steps: int) -> bool:
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto", got {compile!r}')
    can = choice.path == "tiles" and x.device.type == "cpu" and x.dtype == torch.float32
    if compile is True and not can:
        raise ValueError(
            f"compile=True is for the torch path of an MLP energy, in float32 on a CPU; here {choice.backend!r} would "
            f"take its path {choice.path!r} on {x.device} in {x.dtype}"
        )
    if compile == "auto":
        return can and choice.description is not None and torch_compiled.pays(choice.description, len(x), steps)
    return bool(compile)


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


def _check_takes(energy: Energy, x: Tensor, labels: Tensor | None) -> None:
    """One state through the energy, so that what it does not take is told in words before any chain moves."""
    try:
        energy(x, labels)
    except (RuntimeError, TypeError) as error:
        shape = ", ".join(str(size) for size in energy.shape)
        beside = "" if labels is None else " with labels"
        raise ValueError(f"the energy does not take states of shape (n_chains, {shape}){beside}: {error}") from error


def _checked_labels(energy: Energy, labels: Tensor | None, x: Tensor) -> Tensor | None:
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of integers, got {got}")
    if labels.shape != (len(x),) or not _same_device(labels.device, x.device):
        raise ValueError(
            f"labels must be ({len(x)},), one a chain, on {x.device}, got {tuple(labels.shape)} on {labels.device}"
        )
    if not takes_labels(energy.module):
        raise ValueError(
            f"labels were given, and {type(energy.module).__name__}.forward takes x only: wrap a classifier in "
            "ClassifierEnergy, or leave labels= out"
        )
    return labels.detach().to(torch.int64).contiguous()


def _check_classes(energy: nn.Module, labels: Tensor, x: Tensor) -> None:
    """x: one state. On a device, a label out of range would end the process' use of it."""
    n = n_classes(energy, x)
    if n is not None and bool(((labels < 0) | (labels >= n)).any()):
        raise ValueError(
            f"labels must be in [0, {n}), the energy's classes, got values from {int(labels.min())} to "
            f"{int(labels.max())}"
        )


def _checked_frozen(
    frozen: Tensor | None, n_chains: int, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """(1 or n_chains, dim) bool."""
    if frozen is None:
        return None
    if not isinstance(frozen, Tensor) or frozen.dtype != torch.bool:
        got = frozen.dtype if isinstance(frozen, Tensor) else type(frozen).__name__
        raise TypeError(f"frozen must be a tensor of bools, True where a coordinate stays, got {got}")
    if tuple(frozen.shape) not in (shape, (n_chains, *shape)):
        raise ValueError(
            f"frozen must have one state's shape {shape}, or {(n_chains, *shape)}, got {tuple(frozen.shape)}"
        )
    if not _same_device(frozen.device, device):
        raise ValueError(f"frozen is on {frozen.device} and the chains on {device}: move one with .to(...)")
    rows = 1 if tuple(frozen.shape) == shape else n_chains
    return frozen.reshape(rows, math.prod(shape)).contiguous()


def _checked_thin(thin: int, steps: int, return_trajectory: bool, on_nonfinite: str) -> int:
    """0 where no trajectory is wanted."""
    thin = _count("thin", thin)
    if not return_trajectory:
        if thin != 1:
            raise ValueError(f"thin is for return_trajectory=True, got thin={thin} without it")
        return 0
    if thin < 1 or steps % thin != 0:
        raise ValueError(f"thin must divide steps, so that the last state is kept, got thin={thin}, steps={steps}")
    if on_nonfinite == "reinit":
        raise ValueError('a trajectory shows where chains exploded: use on_nonfinite="raise" or "ignore" with it')
    return thin


def _checked_seed(seed: Tensor) -> Tensor:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"a seed tensor must be one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}")
    return seed.reshape(1)


def _checked_first_steps(first_step: int | Tensor, steps: int, chains: Tensor) -> Tensor:
    """(n_chains,) int64."""
    if not isinstance(first_step, Tensor):
        first_step = _count("first_step", first_step)
        if first_step + steps > 2**32:
            raise ValueError(f"step numbers are 32-bit: first_step + steps must be <= 2**32, got {first_step + steps}")
        return torch.full_like(chains, first_step)
    if first_step.dtype != torch.int64 or (first_step.numel() != 1 and first_step.shape != chains.shape):
        raise ValueError(
            f"a first_step tensor must be one int64 number or ({len(chains)},), got {first_step.dtype} of shape "
            f"{tuple(first_step.shape)}"
        )
    first_steps = first_step.to(chains.device)
    return (first_steps if first_steps.shape == chains.shape else first_steps.reshape(1).expand_as(chains)).contiguous()


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return value


def _shape(energy: nn.Module, input_size: int | Sequence[int] | None, labels: bool) -> tuple[int, ...]:
    if input_size is None:
        try:
            return (describe(energy, labels=labels).dim,)
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
