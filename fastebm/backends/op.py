"""A whole ``langevin_sample`` of an MLP energy as one torch.library operator, ``fastebm::langevin``.

torch.compile does not look inside an operator, so the steps that depend on values (checks, errors, reinitialised
chains) happen in here. Weights are arguments, so compiled code never keeps old ones. Operators take only tensors and
plain constants: ``run`` encodes a call as these, and the operator decodes them.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..box import uniform_states
from ..energies.activations import Activation
from ..rng import Stream
from ..samplers.langevin import Langevin
from ..targets.description import Description
from ..targets.mlp import MLP
from ..tracing import capturing, operator
from . import LANGEVIN_TELEMETRY, Advanced, Chains, cpu, settle, table
from .choose import FUSED, Choice, launch_for
from .collapsed import collapses

__all__ = ["encode_networks", "encode_sampler", "run"]


def encode_networks(mlps: tuple[MLP, ...]) -> str:
    """Heads and activations as a str, such as "scalar silu=0.0 leaky_relu=0.2;logsumexp tanh=0.0"."""
    return ";".join(" ".join([mlp.head, *(f"{a.name}={a.parameter!r}" for a in mlp.activations)]) for mlp in mlps)


def _decode_networks(networks: str, weights: list[Tensor], biases: list[Tensor | None]) -> tuple[MLP, ...]:
    words = [network.split() for network in networks.split(";")]
    ends = accumulate(map(len, words), initial=0)  # one layer per word; the output layer stands for the head
    mlps = []
    for (head, *layers), (first, end) in zip(words, pairwise(ends), strict=True):
        pairs = (layer.split("=") for layer in layers)
        activations = tuple(Activation(name, float(parameter)) for name, parameter in pairs)
        mlps.append(MLP(tuple(weights[first:end]), tuple(biases[first:end]), activations, head))
    return tuple(mlps)


def encode_sampler(
    sampler: Langevin,
) -> tuple[list[float], list[Tensor | None], float | None, float | None, bool, bool]:
    """The sampler as operator arguments.

    The first two lists hold step_size, noise_scale and the bounds of the clamp: each value is in one list, with NaN or
    None in the other. Then grad_clip, grad_norm_clip, noise_first and clamp_noise.
    """
    assert sampler.preconditioner is None  # can_compile
    values = (sampler.step_size, sampler.noise_scale, *(sampler.clamp or ()))
    numbers = [math.nan if isinstance(v, Tensor) else float(v) for v in values]
    tensors = [v if isinstance(v, Tensor) else None for v in values]
    clips = (sampler.grad_clip, sampler.grad_norm_clip)
    grad_clip, norm_clip = (None if clip is None else float(clip) for clip in clips)
    return numbers, tensors, grad_clip, norm_clip, sampler.noise_first, sampler.clamp_noise


def _decode_sampler(
    numbers: list[float], tensors: list[Tensor | None], grad_clip: float | None, grad_norm_clip: float | None,
    noise_first: bool, clamp_noise: bool,
) -> Langevin:  # fmt: skip
    step_size, noise_scale, *clamp = (n if t is None else t for n, t in zip(numbers, tensors, strict=True))
    bounds = (clamp[0], clamp[1]) if clamp else None
    return Langevin(step_size, noise_scale, grad_clip, bounds, grad_norm_clip, noise_first, clamp_noise)


def _fake(  # type: ignore[no-untyped-def]
    x, seed, chains, first_steps, labels, frozen, weights, biases, networks, scales, curvature, mean, linear, constant,
    numbers, tensors, grad_clip, grad_norm_clip, noise_first, clamp_noise, steps, thin, telemetry, path, precision,
    on_nonfinite,
):  # fmt: skip
    n, dim = chains.shape[0], weights[0].shape[1]
    x = x.new_empty((n, dim), dtype=_dtype(x))
    return (
        x,
        x.new_empty((n,)),
        x.new_empty((n,), dtype=torch.int32),
        x.new_empty((n, steps // thin, dim) if thin else (0,)),
        x.new_empty((3, n) if telemetry else (0,)),
    )


# cudagraph_unsafe: the operator reads values on the host, so torch.compile must not put it into a CUDA graph.
@operator(
    "langevin",
    "(Tensor x, Tensor seed, Tensor chains, Tensor first_steps, Tensor? labels, Tensor? frozen, "
    "Tensor[] weights, Tensor?[] biases, str networks, "
    "Tensor? scales, Tensor? curvature, Tensor? mean, Tensor? linear, Tensor? constant, "
    "float[] numbers, Tensor?[] tensors, float? grad_clip, float? grad_norm_clip, bool noise_first, bool clamp_noise, "
    "int steps, int thin, bool telemetry, str path, str precision, str on_nonfinite) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    tags=(torch.Tag.cudagraph_unsafe,),
)
def langevin(  # type: ignore[no-untyped-def]
    x, seed, chains, first_steps, labels, frozen, weights, biases, networks, scales, curvature, mean, linear, constant,
    numbers, tensors, grad_clip, grad_norm_clip, noise_first, clamp_noise, steps, thin, telemetry, path, precision,
    on_nonfinite,
):  # fmt: skip
    """Run a whole call. Returns x, energy, first_bad, trajectory and telemetry as in ``Advanced``; (0,) for None.

    x: (n, *shape) start, or (n, 0) for a uniform one. seed: (1,) int64. chains: (n,) global chain numbers. frozen: bool
    of 1 or n states. weights, biases: those of all networks, one network after another.
    """
    dtype, device, dim = _dtype(x), x.device, weights[0].shape[1]
    mlps = _decode_networks(networks, weights, biases)
    start = None
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        description = Description(mlps, scales, curvature, mean, linear, constant)
        sampler = _decode_sampler(numbers, tensors, grad_clip, grad_norm_clip, noise_first, clamp_noise)
        if not capturing(device):
            if table.reports_bad_starts(path, steps):
                start = x
            else:
                settle.check_finite(x)
            if labels is not None:
                settle.check_classes(labels, min(len(mlp.weights[-1]) for mlp in mlps if mlp.head == "class"))
        if x.ndim == 2 and x.shape[1] == 0:
            start = None
            x = uniform_states(seed, Stream.INITIAL, chains, 0, dim, clamp=sampler.clamp, dtype=dtype)
        else:
            x = x.to(dtype, copy=True, memory_format=torch.contiguous_format).view(len(chains), dim)
        frozen = None if frozen is None else frozen.reshape(-1, dim)
        moving = Chains(x, seed, chains, first_steps, labels, frozen)
        launch = launch_for(description, precision, device) if path in FUSED else None
        kernels = "triton" if path != "tiles" else "numba" if cpu.why_not(device, dtype) is None else "torch"
        # As choose.py has it, which can't read the energy's curvature while a call is traced.
        if (
            path == "tiles"
            and device.type == "cpu"
            and precision != "bf16"
            and collapses(sampler, moving, None, description, kernels)
        ):
            path = "collapsed"
        choice = Choice("auto", path, description, launch, precision, None, kernels)
        done = table.run(table.Job(choice, None, moving, sampler, steps, thin, telemetry))
        named = {f"{kind} {i}": v for kind, vs in (("weight", weights), ("bias", biases)) for i, v in enumerate(vs)}
        parameters = {name: v for name, v in named.items() if v is not None}
        settle.settle(
            done, moving, sampler, steps, lambda: parameters, table.energy_of(description), on_nonfinite, start
        )
    nothing = x.new_empty(0)
    return (
        done.x,
        done.energy,
        done.first_bad,
        nothing if done.trajectory is None else done.trajectory,
        nothing.clone() if done.telemetry is None else torch.stack([done.telemetry[k] for k in LANGEVIN_TELEMETRY]),
    )


def run(
    description: Description, chains: Chains, sampler: Langevin, steps: int, *, path: str, precision: str,
    on_nonfinite: str, thin: int, telemetry: bool,
) -> Advanced:  # fmt: skip
    """Encode a call and apply the operator. chains: x in the form that the operator takes, seed a tensor."""
    x, energy, first_bad, trajectory, table_of_telemetry = langevin(
        *chains[:6],
        [weight for mlp in description.mlps for weight in mlp.weights],
        [bias for mlp in description.mlps for bias in mlp.biases],
        encode_networks(description.mlps),
        description.scales,
        description.curvature,
        description.mean,
        description.linear,
        description.constant,
        *encode_sampler(sampler),
        steps,
        thin,
        telemetry,
        path,
        precision,
        on_nonfinite,
    )
    named = dict(zip(LANGEVIN_TELEMETRY, table_of_telemetry.unbind(), strict=True)) if telemetry else None
    return Advanced(x, energy, first_bad, trajectory if thin else None, named)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
