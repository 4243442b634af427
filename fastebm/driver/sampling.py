"""langevin_sample: check the input, choose a backend, run it, look at what came back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import Advanced, Chains, cpu, reference, run
from ..backends.choose import Choice, choose
from ..backends.graphs import CudaRecorder
from ..backends.run import NonFiniteError, uniform_states
from ..devices import checked_device, named_device
from ..energies import first_tensor, n_classes, shape_of, takes_condition
from ..energies.conditions import are_labels
from ..energies.eval_mode import evaluating
from ..energies.functions import EnergyLike, as_module, name_of_forward
from ..rng import Stream, draw_seed
from ..samplers.langevin import NOISE_SCALE, STEP_SIZE, Bounds, Langevin, checked_rule
from ..scalars import plain_number
from ..targets.autograd import Energy
from ..targets.description import check_shape, describe
from ..targets.mlp import NotAnMLP
from ..threads import survives_fork
from ..tracing import capturing, readable

__all__ = ["NonFiniteError", "SampleInfo", "advance_chains", "langevin_sample", "state_shape", "uniform_states"]

ON_NONFINITE = ("raise", "reinit", "ignore")

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class SampleInfo:
    """What a sampling call did.

    backend: "triton", "torch" or "reference". path: what ran in it ("resident" or "streaming": the fused
    kernel; "tiles" or "products": closed-form gradient; "autograd"). kernels: what noise, update and activations
    were computed by: "triton", "numba" or "torch" (plain PyTorch). why_not_fused: why the fused kernel did not run,
    and what did; or None. precision: of the matrix products. seed: reproduces the call (a tensor, where it was one or
    the call is compiled). temperature: implied, noise_scale^2. cuda_graph: with ``cuda_graph=True``, "recorded" or in
    words why no step was; else None.

    All others are (n_chains,). energies: E of the last states. first_bad_step: int32, first step of this call
    whose new state was not finite; -1 if none. grad_norm: |dE/dx| before clips, over the coordinates that are not
    frozen, where the last step took the gradient; NaN after no step. clipped: the fraction of steps in which a clip
    changed the gradient. clamped: in which the clamp changed the state: with noise_first, the clamp after the gradient.
    """

    backend: str
    path: str
    kernels: str
    why_not_fused: str | None
    precision: str
    seed: int | Tensor
    temperature: float | Tensor
    cuda_graph: str | None
    energies: Tensor
    first_bad_step: Tensor
    grad_norm: Tensor
    clipped: Tensor
    clamped: Tensor


@survives_fork
def langevin_sample(
    energy: EnergyLike,
    input_size: int | Sequence[int] | Langevin | None = None,
    rule: Langevin | None = None,
    *,
    batch_size: int = 32,
    steps: int = 60,
    step_size: float | Tensor = STEP_SIZE,
    noise_scale: float | Tensor = NOISE_SCALE,
    init: Tensor | None = None,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
    frozen: Tensor | None = None,
    clamp: Bounds | None = None,
    grad_clip: float | None = None,
    grad_norm_clip: float | None = None,
    noise_first: bool = False,
    clamp_noise: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_chain: int = 0,
    first_step: int | Tensor = 0,
    backend: str = "auto",
    precision: str | None = None,
    device: torch.device | str | None = None,
    on_nonfinite: str = "raise",
    cuda_graph: bool = False,
    return_trajectory: bool = False,
    thin: int = 1,
    out: Tensor | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SampleInfo]:
    """Samples of exp(-E/T) by K steps of Langevin dynamics, T = noise_scale^2:

        x' = clamp(x - (step_size/2) clip(dE/dx) + sqrt(step_size) noise_scale xi),   xi ~ N(0, I)

    For samples of exp(-E) pass a rule, ``langevin_sample(energy, Langevin(0.1))``, with a step small beside 4 / the
    largest curvature of E. The defaults of step_size and noise_scale are for something else: Edifice's recipe for
    networks on images, whose gradients are small. At T = 2.5e-5 it all but descends, and on x^2 / 2 it explodes.

    The energy runs in eval mode and is left as it was. The same weights, start, seed and precision give the
    same bits for each chain, whatever else is in the batch, on one kind of device.

    Args:
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1). MLPs, a ``ClassifierEnergy`` of one
            and a ``SumEnergy`` of them take the fused kernel on CUDA. Of a network f that puts out -E: ``Negative(f)``.
            Modules that a function calls are found, and run in eval mode too (``functions.py`` says where).
        input_size: dims or shape of one state; may be left out with ``init``, or when the energy tells: an MLP, or a
            ``GaussianEnergy`` with a mean of that shape. The rule may stand in its place.
        rule: a ``Langevin``, in place of step_size, noise_scale, clamp, both clips, noise_first and clamp_noise.
        batch_size: number of chains, >= 0, when there is no ``init``.
        steps: >= 0; 0 returns the start.
        step_size: > 0: a float, a (steps,) schedule, or (n_chains, 1) for one value per chain.
        noise_scale: >= 0, in the same three forms; 0 is gradient descent.
        init: (n_chains, *shape) start, floating point. float64 is computed in float64 (and not by the fused
            kernel); everything else in float32, which is what comes back. None: uniform on the clamp range,
            or on [-1, 1] without one.
        labels: (n_chains,) integers, each chain's class, for an energy that takes them beside x, as an argument named
            ``labels``, ``y``, ``label``, ``condition`` or the like: with a ``ClassifierEnergy``, samples of p(x | y).
            None: E(x) alone. A module may name the argument by itself: ``condition_argument = "NAME"``.
        condition: (n_chains, ...), in place of labels, what each chain is conditioned on: a noise level, attributes, a
            measurement, an image. Floating point is converted to the states' dtype. The gradient is autograd's then.
        frozen: bool, of one state's shape or (n_chains, *shape): coordinates that stay as they start, whatever
            the clamp (inpainting, conditional sampling).
        clamp: (lo, hi), or None. Each a number, or a tensor of one state's shape.
        grad_clip: elementwise bound on the gradient, or None.
        grad_norm_clip: bound on the Euclidean norm of each chain's gradient, after grad_clip, or None.
        noise_first: add the noise before the gradient is taken, as IGEBM and the UvA tutorial do: see ``Langevin``.
        clamp_noise: with noise_first, clamp the state after the noise too, as the UvA tutorial does.
        seed: 64-bit seed of the noise. None: drawn from ``generator``, or from torch's global CPU generator. An
            int64 tensor of one element is read on the device, when the call runs (or a CUDA graph of it).
        first_chain: global number of the first chain; part of the noise's counter.
        first_step: lifetime step number of the first step, likewise. An int64 tensor of one element or of
            (n_chains,) is read on the device.
        backend: "auto", "triton", "torch" or "reference".
        precision: of the fused kernel's products: "bf16x3" (about 16 bits of mantissa), "tf32", "bf16" or "ieee"
            (full float32: exact, and slow). None: "bf16x3", or "bf16" after
            ``torch.set_float32_matmul_precision("medium")``. The other paths compute in full.
        device: where to sample when there is no ``init``; None: where the energy is.
        on_nonfinite: "raise", "reinit" (start those chains anew) or "ignore" (return their last finite state).
        cuda_graph: where a step is several launches (an energy that is no MLP, or too wide an MLP), record one step as
            a CUDA graph and replay it. For energies whose forward does the same work on the device each time, whatever
            x is: what it does on the host is done for the first steps only. Where nothing can be recorded, and for
            fewer than 16 steps, the steps run one by one, and ``SampleInfo.cuda_graph`` says why.
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
    compiling = torch.compiler.is_compiling()
    if compiling:
        from ..backends import compiling as compiled  # takes seconds to import

        if not compiled.can_compile(energy, labels, condition, backend, generator):
            return compiled.uncompiled(  # type: ignore[no-any-return]
                langevin_sample, energy, input_size, rule, batch_size=batch_size, steps=steps, step_size=step_size,
                noise_scale=noise_scale, init=init, labels=labels, condition=condition, frozen=frozen, clamp=clamp,
                grad_clip=grad_clip, grad_norm_clip=grad_norm_clip, noise_first=noise_first, clamp_noise=clamp_noise,
                seed=seed, generator=generator, first_chain=first_chain, first_step=first_step, backend=backend,
                precision=precision, device=device, on_nonfinite=on_nonfinite, cuda_graph=cuda_graph,
                return_trajectory=return_trajectory, thin=thin, out=out, return_info=return_info,
            )  # fmt: skip
    if isinstance(input_size, Langevin):
        if rule is not None:
            raise TypeError("a rule is passed once, got two: leave one out")
        input_size, rule = None, input_size
    elif isinstance(input_size, (type, MethodType)):
        checked_rule(input_size)  # an error: of a rule, the parentheses are missing
    if rule is None:
        if step_size is None or noise_scale is None:  # which a rule would put its own numbers for
            raise TypeError("step_size and noise_scale must each be a float or a tensor, got None")
        rule = Langevin(step_size, noise_scale, grad_clip, clamp, grad_norm_clip, noise_first, clamp_noise)
    else:
        checked_rule(rule)
        _check_nothing_beside(
            ("step_size", step_size, STEP_SIZE), ("noise_scale", noise_scale, NOISE_SCALE), ("clamp", clamp, None),
            ("grad_clip", grad_clip, None), ("grad_norm_clip", grad_norm_clip, None),
            ("noise_first", noise_first, False), ("clamp_noise", clamp_noise, False),
        )  # fmt: skip
    energy = as_module(energy)
    steps, first_chain = _count("steps", steps), _count("first_chain", first_chain)
    seed, first_step = _on_device_or_plain(seed), _on_device_or_plain(first_step)
    thin = _checked_thin(thin, steps, return_trajectory, on_nonfinite)
    parameter = first_tensor(energy)
    if init is None:
        n_chains, shape = _count("batch_size", batch_size), _shape(energy, input_size, labels is not None)
        known = torch.device("cpu") if parameter is None else parameter.device
        device = known if device is None else checked_device(device)
        dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
    else:
        _check_init(init, input_size, device)
        n_chains, shape, device = len(init), init.shape[1:], init.device
        dtype = torch.float64 if init.dtype == torch.float64 else torch.float32
    if first_chain + n_chains > 2**63:
        raise ValueError(f"chain numbers are 63-bit: first_chain + n_chains must be <= 2**63, got {first_chain}")
    if out is not None:
        _check_out(out, (n_chains, *((steps // thin,) if thin else ()), *shape), dtype, device)
    if capturing(device):
        of_rule = (rule.step_size, rule.noise_scale, *(rule.clamp or ()))
        tensors = (init, labels, condition, frozen, *of_rule, seed, first_step)
        check_capture(on_nonfinite, seed, first_step, tensors, device)
    dim = math.prod(shape)
    numbers = torch.arange(first_chain, first_chain + n_chains, device=device)
    first_steps = _checked_first_steps(first_step, steps, numbers)
    seed = _seed_tensor(seed, device) if compiling or isinstance(seed, Tensor) else draw_seed(seed, generator)
    if compiling:
        x = torch.empty(n_chains, 0, dtype=dtype, device=device) if init is None else init
    elif init is None:
        x = uniform_states(seed, Stream.INITIAL, numbers, 0, dim, clamp=rule.clamp, dtype=dtype)
    else:
        x = init if init.ndim == 2 else init.detach().reshape(n_chains, dim)
    frozen = _checked_frozen(frozen, n_chains, tuple(shape), device)
    chains = Chains(x, seed, numbers, first_steps, labels, frozen, condition)
    done, info = advance_chains(
        energy,
        chains,
        rule,
        steps,
        shape=shape,
        backend=backend,
        precision=precision,
        on_nonfinite=on_nonfinite,
        cuda_graph=cuda_graph,
        thin=thin,
        telemetry=return_info,
        check_start=init is not None,
    )
    # Not on a GPU: a call would wait for it once more.
    if rule.clamp is not None and rule.is_default and steps > 0 and device.type == "cpu" and readable(device):
        _warn_of_jumps(energy, chains._replace(x=done.x), rule, shape, backend)
    samples = done.x if done.trajectory is None else done.trajectory
    if len(shape) > 1:  # no view that is not needed: torch 2.11 can't compile one under torch.inference_mode
        samples = samples.reshape(*samples.shape[:-1], *shape)
    if out is not None:
        samples = out.copy_(samples)
    return (samples, info) if info is not None else samples


@survives_fork
def advance_chains(
    energy: EnergyLike,
    chains: Chains,
    rule: Langevin,
    steps: int,
    *,
    shape: Sequence[int],
    backend: str = "auto",
    precision: str | None = None,
    on_nonfinite: str = "raise",
    cuda_graph: bool = False,
    thin: int = 0,
    telemetry: bool = False,
    check_start: bool = False,
) -> tuple[Advanced, SampleInfo | None]:
    """The checked core of ``langevin_sample``: chains with numbers and ages of their own, which are left as they are.

    Args:
        shape: of one state as the energy takes it.
        thin: keep the state after every thin-th step; 0: of none.
        telemetry: also return a ``SampleInfo``.
        check_start: whether states may not be finite, which is then a ValueError.

    While torch.compile traces, chains.x is as ``backends/op.py`` takes it, and chains.seed a tensor.
    """
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
    energy, steps = as_module(energy), _count("steps", steps)
    x = chains.x
    parameter = first_tensor(energy)
    if parameter is not None and not _same_device(parameter.device, x.device):
        raise ValueError(f"the energy is on {parameter.device} and the chains on {x.device}: move one with .to(...)")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    chains = _checked_beside(energy, chains, dtype)
    if torch.compiler.is_compiling():
        from ..backends import compiling

        choice, done = compiling.advance(
            energy, chains, rule, steps, shape=shape, dtype=dtype, backend=backend,
            precision=precision, on_nonfinite=on_nonfinite, thin=thin, telemetry=telemetry,
        )  # fmt: skip
        if cuda_graph:
            done = done._replace(cuda_graph="a compiled call records nothing by itself")
    else:
        choice, done = _advance(
            energy, chains, rule, steps, shape, dtype, backend, precision,
            on_nonfinite, cuda_graph, thin, telemetry, check_start,
        )  # fmt: skip
    if done.telemetry is None:
        return done, None
    info = SampleInfo(
        backend=choice.backend,
        path=choice.path,
        kernels=choice.kernels,
        why_not_fused=choice.why_not_fused,
        precision=choice.precision,
        seed=chains.seed,
        temperature=rule.temperature,
        cuda_graph=done.cuda_graph,
        energies=done.energy,
        first_bad_step=done.first_bad,
        grad_norm=done.telemetry.grad_norm,
        clipped=done.telemetry.clipped,
        clamped=done.telemetry.clamped,
    )
    return done, info


def _advance(
    energy: nn.Module, chains: Chains, rule: Langevin, steps: int, shape: Sequence[int], dtype: torch.dtype,
    backend: str, precision: str | None, on_nonfinite: str, cuda_graph: bool, thin: int, telemetry: bool,
    check_start: bool,
) -> tuple[Choice, Advanced]:  # fmt: skip
    device = chains.x.device
    start = chains.x if check_start and readable(device) else None
    with evaluating(energy), torch.no_grad(), torch.autocast(device.type, enabled=False):
        condition = None if chains.beside is None else chains.kind
        choice = choose(energy, device, dtype, backend, precision, condition=condition)
        if start is not None and not run.tells_of_the_start(choice.path, steps):
            run.check_finite(start)
            start = None
        # a private, contiguous copy: backends work in place
        x = chains.x.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        chains = chains._replace(x=x)
        if capturing(device) and choice.backend != "triton":
            raise ValueError(
                f"while a CUDA graph is captured only kernels can run, and this call would wait: {choice.why_not_fused}"
            )
        description = choice.description
        if description is not None:
            check_shape(energy, description, shape)
        module = Energy(energy, shape, x.dtype, chains.kind)
        if len(x) > 0 and readable(device):
            if description is not None and len(shape) > 1:
                # Its layers alone do not tell whether it takes images. Of an MLP two states tell as much as all.
                module(x[:2], None if chains.labels is None else chains.labels[:2] * 0)
            if (given := chains.beside) is not None and are_labels(given):
                n = n_classes(energy, x.reshape(len(x), *shape)) if description is None else description.n_classes
                if n is not None:
                    run.check_classes(given, n)
        why_not_recorded = _why_not_recorded(choice, device) if cuda_graph else None
        recorder = CudaRecorder(device) if cuda_graph and why_not_recorded is None else None
        energy_of: Callable[[Tensor, Tensor | None], Tensor] = module
        if description is not None:
            done = run.advance(
                description, chains, rule, steps, path=choice.path, precision=choice.precision, launch=choice.launch,
                recorder=recorder, thin=thin, telemetry=telemetry,
            )  # fmt: skip
            energy_of = run.energy_of(description)
        elif choice.backend == "triton":
            from ..backends import fused  # only here: it imports triton

            done = fused.advance_module(module, chains, rule, steps, recorder=recorder, thin=thin, telemetry=telemetry)
        elif choice.kernels == "numba":
            done = cpu.advance_module(module, chains, rule, steps, thin=thin, telemetry=telemetry)
        else:
            done = reference.advance(module, chains, rule, steps, thin=thin, telemetry=telemetry)
        if why_not_recorded is not None:
            done = done._replace(cuda_graph=why_not_recorded)
        run.settle(
            done, chains, rule, steps, lambda: dict(energy.named_parameters()), energy_of, on_nonfinite, start
        )  # fmt: skip
    return choice, done


def _check_nothing_beside(*options: tuple[str, object, object]) -> None:
    """options: names, values and defaults of what a rule holds too."""
    given = [
        name
        for name, value, default in options
        if value is not default and not (isinstance(value, (int, float)) and value == default)
    ]
    if given:
        names, inside = (", ".join(f"{name}{end}" for name in given) for end in ("=", "=..."))
        raise TypeError(f"a rule holds {names} itself: give it there, as in Langevin({inside}), or leave it out here")


def _warn_of_jumps(energy: nn.Module, chains: Chains, rule: Langevin, shape: Sequence[int], backend: str) -> None:
    """Of default numbers that are too large for the energy, which a clamp hides: most coordinates jump from one bound
    to the other in each step. That many lie on a bound is no fault by itself: pixels do.

    chains: after their steps.
    """
    x = chains.x
    lo, hi = rule.bounds(x.shape[1], dtype=x.dtype) or (-math.inf, math.inf)
    at_lo, at_hi = x == lo, x == hi
    if 2 * int(torch.count_nonzero(at_lo | at_hi)) <= x.numel():
        return
    descent = replace(rule, noise_scale=0.0)
    done, _ = advance_chains(energy, chains, descent, 1, shape=shape, backend=backend, on_nonfinite="ignore")
    n = int(torch.count_nonzero((at_lo & (done.x == hi)) | (at_hi & (done.x == lo))))
    if 2 * n > x.numel():
        warnings.warn(
            f"the step is too large for this energy: it takes {n} of {x.numel()} coordinates from one bound of the "
            f"clamp to the other, so the samples are no samples of exp(-E/T). {rule.advice}",
            stacklevel=4,  # the caller of langevin_sample, which survives_fork wraps
        )


def _why_not_recorded(choice: Choice, device: torch.device) -> str | None:
    if choice.path in run.FUSED:
        return "all steps are one launch of the fused kernel"
    if choice.backend != "triton":
        return "steps in plain PyTorch wait for the device"
    if device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    return "a CUDA graph is captured already" if capturing(device) else None


def check_capture(
    on_nonfinite: str, seed: object, first_step: object, tensors: Sequence[object], device: torch.device
) -> None:
    """What a call must be like to be captured. tensors: all that it was given, and maybe other things."""
    where = "while a CUDA graph is captured"
    if on_nonfinite != "ignore":
        raise ValueError(f'{where} nothing can wait for the device: pass on_nonfinite="ignore", not {on_nonfinite!r}')
    if not (isinstance(seed, Tensor) or isinstance(first_step, Tensor)):
        raise ValueError(
            f"{where} the seed and the step would be frozen, and each replay repeat the same noise: pass seed= or "
            "first_step= as an int64 tensor on the device, and change it between replays"
        )
    for value in tensors:
        if isinstance(value, Tensor) and value.device.type != device.type:
            raise ValueError(f"{where} every tensor must be on {device}, got one on {value.device}")


def check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")


def _checked_beside(energy: nn.Module, chains: Chains, dtype: torch.dtype) -> Chains:
    """With contiguous labels of int64, or a contiguous condition, of the states' dtype if it is floating point."""
    labels, condition, numbers = chains.labels, chains.condition, chains.numbers
    if labels is not None and condition is not None:
        raise ValueError("an energy takes labels= or condition= beside x, got both: leave one out")
    kind, given = chains.kind, chains.beside
    if given is None:
        return chains
    if labels is not None:
        check_integers("labels", labels)
    elif not isinstance(condition, Tensor):
        raise TypeError(f"condition must be a tensor (n_chains, ...), got {type(condition).__name__}")
    fits = given.shape == numbers.shape if labels is not None else given.shape[:1] == numbers.shape
    if not fits or not _same_device(given.device, numbers.device):
        shape = f"({len(numbers)},)" if labels is not None else f"({len(numbers)}, ...)"
        raise ValueError(
            f"{kind} must be {shape}, one per chain, on {numbers.device}, got {tuple(given.shape)} on {given.device}"
        )
    if not takes_condition(energy, kind):
        raise ValueError(
            f"{kind}= was given, and {name_of_forward(energy)} takes x only, or nothing that is named for it: "
            f'wrap a classifier in ClassifierEnergy, name the argument "{kind}", set condition_argument = "NAME" on '
            f"the module, or leave {kind}= out"
        )
    if labels is not None:
        return chains._replace(labels=labels.to(torch.int64).contiguous())
    given = given.detach()
    return chains._replace(condition=(given.to(dtype) if given.is_floating_point() else given).contiguous())


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


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """(1,) int64: the given seed, or a fresh one, drawn where the chains are so that no one waits for it."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"a seed tensor must be one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}")
        return seed.reshape(1)
    if seed is None:
        low, high = torch.randint(2**32, (2,), device=device)
        drawn: Tensor = high << 32 | low
        return drawn.reshape(1)
    seed = draw_seed(seed)
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


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


def _on_device_or_plain(value: Any) -> Any:
    """A tensor of int64 stays one: it is read on the device, when the call runs."""
    return value if isinstance(value, Tensor) and value.dtype == torch.int64 else plain_number(value)


def _count(name: str, value: int) -> int:
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return value


def _shape(energy: nn.Module, input_size: int | Sequence[int] | None, labels: bool) -> tuple[int, ...]:
    if input_size is not None:
        return state_shape(input_size)
    try:
        return (describe(energy, labels=labels, bare=True).dim,)
    except NotAnMLP as error:
        if (told := shape_of(energy)) is not None:
            return told
        raise ValueError(f"pass input_size= or init=: the energy does not tell its input's shape ({error})") from None


def state_shape(input_size: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one state, from its number of dims or the shape itself."""
    size: Any = plain_number(input_size)
    states = "states to start from are passed as init=, (n_chains, *shape)"
    if isinstance(size, (Tensor, np.ndarray)) and (size.ndim > 1 or isinstance(size, Tensor) or size.dtype.kind == "f"):
        raise TypeError(f"input_size must be an int or a shape, got {_short(size)}: {states}")
    if not isinstance(size, (int, Sequence, np.ndarray)) or isinstance(size, str):
        raise TypeError(f"input_size must be an int or a shape, got {_short(input_size)}")
    shape = (size,) if isinstance(size, int) else tuple(map(plain_number, size))
    if not shape or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in shape):
        hint = f": {states}" if any(isinstance(s, (float, Sequence)) for s in shape) else ""
        raise ValueError(f"input_size must be an int >= 1 or a shape of such ints, got {_short(input_size)}{hint}")
    return shape


def _short(value: object) -> str:
    """For an error, without the values of a tensor."""
    return f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else repr(value)


def _check_init(init: Tensor, input_size: int | Sequence[int] | None, device: torch.device | str | None) -> None:
    if not isinstance(init, Tensor):
        raise TypeError(f"init must be a tensor, got {type(init).__name__}")
    if not init.is_floating_point():
        raise TypeError(f"init must be floating point (float32, float64 or half), got {init.dtype}: use init.float()")
    if init.ndim < 2 or math.prod(init.shape[1:]) == 0:
        raise ValueError(f"init must be (n_chains, *shape) with at least one dim, got shape {tuple(init.shape)}")
    if input_size is not None and state_shape(input_size) != tuple(init.shape[1:]):
        raise ValueError(f"input_size {input_size!r} and init of shape {tuple(init.shape)} disagree: leave one out")
    if device is not None and not _same_device(named_device(device), init.device):
        raise ValueError(f"init is on {init.device} and device={device}: move one, or leave device= out")


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
