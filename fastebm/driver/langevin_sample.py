"""fastebm.langevin_sample: one call in place of a Langevin loop, with the settings as keywords."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import MethodType

import torch
from torch import Tensor, nn

from ..backends import Chains
from ..box import Bounds
from ..energies import EnergyLike
from ..energies.functions import as_module
from ..samplers.langevin import NOISE_SCALE, STEP_SIZE, Langevin, checked_langevin
from ..threads import survives_fork
from ..tracing import capturing, readable
from .arguments import check_capture, check_out, checked_count, checked_thin
from .info import SampleInfo, info_of
from .run import run_chains
from .settings import Settings
from .start import Start

__all__ = ["langevin_sample"]


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
    """Sample exp(-E/T), T = noise_scale^2, by K steps of Langevin dynamics:

        x' = clamp(x - (step_size/2) clip(dE/dx) + sqrt(step_size) noise_scale xi),   xi ~ N(0, I)

    The chains sample exp(-E/T) as step_size goes to 0 (Roberts & Tweedie 1996; Welling & Teh 2011). To sample exp(-E),
    pass a sampler: ``langevin_sample(energy, Langevin(0.1))``. Its step_size must be well below 4 / (largest curvature
    of E). The default step_size and noise_scale are Edifice's, for networks on images, whose gradients are small. At
    their T = 2.5e-5 a step is almost gradient descent, and on an energy such as x^2 / 2 the chains explode.

    The energy runs in eval mode and is left unchanged. On one kind of device, the same weights, start, seed and
    precision give the same bits for each chain, whatever else is in the batch.

    Args:
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1). On CUDA the fused kernel runs MLPs,
            a ``ClassifierEnergy`` of an MLP, and a ``SumEnergy`` of these. For a network f that returns -E, pass
            ``Negative(f)``. Modules that a function calls are found and run in eval mode too (see
            fastebm/energies/functions.py).
        input_size: number of dims or shape of one state. Optional with ``init``, or if the energy defines it: an MLP,
            or a ``GaussianEnergy`` with a mean of that shape. A ``Langevin`` in this place is taken as ``rule``.
        rule: a ``Langevin``. It replaces step_size, noise_scale, clamp, both clips, noise_first and clamp_noise.
            Only a ``Langevin`` has a preconditioner.
        batch_size: number of chains, >= 0. Ignored with ``init``.
        steps: number of steps, >= 0; 0 returns the start.
        step_size: > 0. A float, a (steps,) tensor (a schedule) or a (n_chains, 1) tensor (one value per chain).
        noise_scale: >= 0, in the same three forms; 0 is gradient descent.
        init: (n_chains, *shape) floating-point start. float64 is computed in float64, without the fused kernel;
            every other dtype in float32, which is also returned. None: uniform on the clamp range, or on [-1, 1]
            without a clamp.
        labels: (n_chains,) integers, the class of each chain, for an energy with an argument for them besides x. It is
            recognised by a name such as ``labels``, ``y``, ``label`` or ``condition``, or set by the module attribute
            ``condition_argument = "NAME"``. A ``ClassifierEnergy`` with labels samples p(x | y). None: E(x) alone.
        condition: (n_chains, ...) tensor in place of labels: what each chain is conditioned on, such as a noise level,
            attributes, a measurement or an image. A floating-point one is converted to the states' dtype. The gradient
            is then computed by autograd.
        frozen: bool, of one state's shape or (n_chains, *shape). True marks coordinates that keep their start value,
            even outside the clamp (inpainting, conditional sampling).
        clamp: bounds (lo, hi) of the states, or None. Each a number, or a tensor of one state's shape.
        grad_clip: elementwise bound on the gradient, or None.
        grad_norm_clip: bound on the Euclidean norm of each chain's gradient, applied after grad_clip, or None.
        noise_first: add the noise before the gradient is taken, as IGEBM and the UvA tutorial do: see ``Langevin``.
        clamp_noise: with noise_first, also clamp after the noise, as the UvA tutorial does.
        seed: 64-bit seed of the noise. None: drawn from ``generator``. An int64 tensor of one element is read on the
            device when the call runs, or at each replay of a CUDA graph that contains it.
        generator: source of the seed. None: torch's global CPU generator.
        first_chain: global number of the first chain. Together with seed and step it determines the noise.
        first_step: lifetime step number of the first step, which determines the noise likewise. An int64 tensor of
            one element or of shape (n_chains,) is read on the device.
        backend: "auto", "triton", "torch" or "reference".
        precision: of the fused kernel's products: "bf16x3" (about 16 bits of mantissa), "tf32", "bf16" or "ieee"
            (full float32, slow). None: "bf16x3", or "bf16" after ``torch.set_float32_matmul_precision("medium")``.
            The other paths compute in full float32; on CPUs with AVX-512 BF16 instructions, "bf16" also applies to
            MLPs.
        device: where to sample without ``init``. None: the energy's device.
        on_nonfinite: what to do with chains that are not finite: "raise", "reinit" (start them again) or "ignore"
            (return their last finite state).
        cuda_graph: record one step as a CUDA graph and replay it, if a step takes several launches: for energies other
            than MLPs, and for MLPs too wide for the fused kernel. The energy's forward must do the same work on the
            device at every step, whatever x is; its Python code runs in the first steps only. If recording is not
            possible, or for fewer than 16 steps, the steps run one by one, and ``SampleInfo.cuda_graph`` says why.
        return_trajectory: return the states after every ``thin``-th step instead of the last states.
        thin: a divisor of ``steps``, for ``return_trajectory``.
        out: tensor that receives the samples, of their shape, dtype and device. May be ``init``.
        return_info: also return a ``SampleInfo``.

    Returns:
        Samples, (n_chains, *shape), or (n_chains, steps // thin, *shape) with ``return_trajectory``. With
        ``return_info``, a pair of the samples and a ``SampleInfo``.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing has been changed. The message states the requirement, the
            value and the likely fix.
        NonFiniteError: chains are not finite, with ``on_nonfinite="raise"``. The message says what to try.
    """
    compiling = torch.compiler.is_compiling()
    if compiling:
        from ..backends import compiling as compiled  # takes seconds to import

        if not compiled.can_compile(energy, (input_size, rule), labels, condition, backend, generator):
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
    elif isinstance(input_size, (type, MethodType)) or callable(getattr(input_size, "step", None)):
        checked_langevin(input_size)  # raises: the parentheses of Langevin(...) are missing
    if rule is None:
        if step_size is None or noise_scale is None:  # Langevin would replace None by its defaults
            raise TypeError("step_size and noise_scale must each be a float or a tensor, got None")
        sampler = Langevin(step_size, noise_scale, grad_clip, clamp, grad_norm_clip, noise_first, clamp_noise)
    else:
        sampler = checked_langevin(rule)
        _check_nothing_beside(
            ("step_size", step_size, STEP_SIZE), ("noise_scale", noise_scale, NOISE_SCALE), ("clamp", clamp, None),
            ("grad_clip", grad_clip, None), ("grad_norm_clip", grad_norm_clip, None),
            ("noise_first", noise_first, False), ("clamp_noise", clamp_noise, False),
        )  # fmt: skip
    energy, steps = as_module(energy), checked_count("steps", steps)
    thin = checked_thin(thin, steps, return_trajectory, on_nonfinite)
    start = Start(
        energy, input_size, ("batch_size", batch_size), init, labels, condition, frozen, seed, generator, first_chain,
        first_step, device,
    )  # fmt: skip
    place = start.place()
    shape, device = place.shape, place.device
    if out is not None:
        check_out(out, (place.n_chains, *((steps // thin,) if thin else ()), *shape), place.dtype, device)
    if capturing(device):
        of_sampler = (sampler.step_size, sampler.noise_scale, *(sampler.clamp or ()))
        tensors = (init, labels, condition, frozen, *of_sampler, seed, first_step)
        check_capture(on_nonfinite, start.seed, start.first_step, tensors, device)
    chains = start.chains(place, steps, sampler.clamp)
    settings = Settings(backend, precision, cuda_graph, on_nonfinite)
    done, choice = run_chains(
        energy, chains, sampler, steps, shape=shape, settings=settings, thin=thin, telemetry=return_info,
        check_start=init is not None,
    )  # fmt: skip
    # Not on a GPU, where it would cost one more synchronisation.
    if sampler.clamp is not None and sampler.is_default and steps > 0 and device.type == "cpu" and readable(device):
        _warn_of_jumps(energy, chains._replace(x=done.x), sampler, shape, backend)
    samples = done.x if done.trajectory is None else done.trajectory
    if len(shape) > 1:  # torch 2.11 can't compile an unneeded view under torch.inference_mode
        samples = samples.reshape(*samples.shape[:-1], *shape)
    if out is not None:
        samples = out.copy_(samples)
    return (samples, info_of(choice, done, chains, sampler)) if return_info else samples


def _check_nothing_beside(*options: tuple[str, object, object]) -> None:
    """Raise if a keyword differs from its default although a sampler was passed. options: (name, value, default)."""
    passed = [
        name
        for name, value, default in options
        if value is not default and not (isinstance(value, (int, float)) and value == default)
    ]
    if passed:
        names, inside = (", ".join(f"{name}{end}" for name in passed) for end in ("=", "=..."))
        raise TypeError(f"a rule holds {names} itself: give it there, as in Langevin({inside}), or leave it out here")


def _warn_of_jumps(energy: nn.Module, chains: Chains, sampler: Langevin, shape: Sequence[int], backend: str) -> None:
    """Warn if the default step size is too large for the energy but the clamp hides it.

    The sign is that one more step takes most coordinates from one bound to the other. Coordinates that lie on a bound
    are no sign by themselves: many pixels do. chains: after the call's steps.
    """
    x = chains.x
    if sampler.box is None:
        return
    lo, hi = sampler.box.on(x.shape[1], dtype=x.dtype)
    at_lo, at_hi = x == lo, x == hi
    if 2 * int(torch.count_nonzero(at_lo | at_hi)) <= x.numel():
        return
    descent = replace(sampler, noise_scale=0.0)
    settings = Settings(backend, on_nonfinite="ignore")
    done, _ = run_chains(energy, chains, descent, 1, shape=shape, settings=settings)
    n = int(torch.count_nonzero((at_lo & (done.x == hi)) | (at_hi & (done.x == lo))))
    if 2 * n > x.numel():
        warnings.warn(
            f"the step is too large for this energy: it takes {n} of {x.numel()} coordinates from one bound of the "
            f"clamp to the other, so the samples are no samples of exp(-E/T). {sampler.advice}",
            stacklevel=4,  # the caller of langevin_sample, which survives_fork wraps
        )
