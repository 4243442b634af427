"""langevin_sample: Langevin dynamics by keywords, for a call in place of a loop."""

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
        checked_langevin(input_size)  # an error: of a rule, the parentheses are missing
    if rule is None:
        if step_size is None or noise_scale is None:  # which a rule would put its own numbers for
            raise TypeError("step_size and noise_scale must each be a float or a tensor, got None")
        rule = Langevin(step_size, noise_scale, grad_clip, clamp, grad_norm_clip, noise_first, clamp_noise)
    else:
        checked_langevin(rule)
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
        of_rule = (rule.step_size, rule.noise_scale, *(rule.clamp or ()))
        tensors = (init, labels, condition, frozen, *of_rule, seed, first_step)
        check_capture(on_nonfinite, start.seed, start.first_step, tensors, device)
    chains = start.chains(place, steps, rule.clamp)
    settings = Settings(backend, precision, cuda_graph, on_nonfinite)
    done, choice = run_chains(
        energy, chains, rule, steps, shape=shape, settings=settings, thin=thin, telemetry=return_info,
        check_start=init is not None,
    )  # fmt: skip
    # Not on a GPU: a call would wait for it once more.
    if rule.clamp is not None and rule.is_default and steps > 0 and device.type == "cpu" and readable(device):
        _warn_of_jumps(energy, chains._replace(x=done.x), rule, shape, backend)
    samples = done.x if done.trajectory is None else done.trajectory
    if len(shape) > 1:  # no view that is not needed: torch 2.11 can't compile one under torch.inference_mode
        samples = samples.reshape(*samples.shape[:-1], *shape)
    if out is not None:
        samples = out.copy_(samples)
    return (samples, info_of(choice, done, chains, rule)) if return_info else samples


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
    if rule.box is None:
        return
    lo, hi = rule.box.on(x.shape[1], dtype=x.dtype)
    at_lo, at_hi = x == lo, x == hi
    if 2 * int(torch.count_nonzero(at_lo | at_hi)) <= x.numel():
        return
    descent = replace(rule, noise_scale=0.0)
    settings = Settings(backend, on_nonfinite="ignore")
    done, _ = run_chains(energy, chains, descent, 1, shape=shape, settings=settings)
    n = int(torch.count_nonzero((at_lo & (done.x == hi)) | (at_hi & (done.x == lo))))
    if 2 * n > x.numel():
        warnings.warn(
            f"the step is too large for this energy: it takes {n} of {x.numel()} coordinates from one bound of the "
            f"clamp to the other, so the samples are no samples of exp(-E/T). {rule.advice}",
            stacklevel=4,  # the caller of langevin_sample, which survives_fork wraps
        )
