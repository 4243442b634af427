"""Runs of K steps on one path each, for tests that compare paths: the one file that knows the internal modules.

All take chains, a sampler and a number of steps, and options ``thin`` and ``telemetry``; all return an ``Advanced``.
"""

from __future__ import annotations

from functools import partial

import torch
from fastebm.kernels import cpu as kernels

from fastebm import Langevin
from fastebm.backends import Advanced, Chains, cpu, op, reference, tiles
from fastebm.backends import collapsed as in_first_layer
from fastebm.targets.autograd import Autograd, Energy
from fastebm.targets.closed_form import ClosedForm
from fastebm.targets.description import Description, describe


def by_definition(energy: Energy, chains: Chains, sampler, steps: int, **asked) -> Advanced:
    """The reference."""
    return reference.run(Autograd(energy, chains.labels_or_condition), chains, sampler, steps, **asked)


def closed_form(description: Description, chains: Chains, sampler, steps: int, **asked) -> Advanced:
    """An MLP in plain PyTorch, on tiles."""
    x = chains.x
    make_target = partial(ClosedForm, description.to(x.device, x.dtype))
    return tiles.run(chains, sampler, steps, make_target=make_target, **asked)


def collapsed(description: Description, chains: Chains, sampler, steps: int, *, kernels: str, **asked) -> Advanced:
    """An MLP with the sampler's steps in its first layer. kernels: "numba" or "torch"."""
    x = chains.x
    return in_first_layer.run(description.to(x.device, x.dtype), chains, sampler, steps, kernels=kernels, **asked)


def cpu_mlp(*arguments, **asked) -> Advanced:
    """An MLP by Numba's kernels."""
    return cpu.run_mlp(*arguments, **asked)


def cpu_module(*arguments, **asked) -> Advanced:
    """Any module: autograd's gradient, and Numba's kernels."""
    return cpu.run_module(*arguments, **asked)


def fused_mlp(*arguments, **asked) -> Advanced:
    """The fused Triton kernel."""
    from fastebm.backends import fused  # here, because it imports triton

    return fused.run_mlp(*arguments, **asked)


def fused_hmc(*arguments, **asked) -> Advanced:
    """The fused Triton kernel of HMC and MALA."""
    from fastebm.backends import fused_hmc

    return fused_hmc.run_hmc(*arguments, **asked)


def evaluation(*arguments, **options):
    """A target: an MLP energy by the Triton kernel that evaluates it."""
    from fastebm.backends.evaluation import Evaluation

    return Evaluation(*arguments, **options)


def fused_module(*arguments, **asked) -> Advanced:
    """Any module: autograd's gradient, and the Triton kernel of the update."""
    from fastebm.backends import fused

    return fused.run_module(*arguments, **asked)


def fused_products(*arguments, **asked) -> Advanced:
    """A wide MLP: library products, and the Triton kernel of the update."""
    from fastebm.backends import fused

    return fused.run_products(*arguments, **asked)


def operator_arguments(
    energy, x=True, labels=None, frozen=None, sampler=None, grads=False, steps=4, thin=0, telemetry=False,
    path="tiles", precision="ieee", on_nonfinite="raise",
):  # fmt: skip
    """What torch.ops.fastebm.langevin takes for a run of 5 chains of 3 dims. x=False: the start is drawn."""
    description = describe(energy, labels=labels is not None)
    n, mlps = 5, description.mlps
    return (
        torch.randn(n, 3 if x else 0),
        torch.tensor([-7]),
        torch.arange(n),
        torch.zeros(n, dtype=torch.int64),
        labels,
        frozen,
        [w.clone().requires_grad_(grads) for mlp in mlps for w in mlp.weights],
        [b if i > 0 else None for mlp in mlps for i, b in enumerate(mlp.biases)],
        op.encode_networks(mlps),
        description.scales,
        description.curvature,
        description.mean,
        description.linear,
        description.constant,
        *op.encode_sampler(sampler or Langevin(0.1, 0.3)),
        steps,
        thin,
        telemetry,
        path,
        precision,
        on_nonfinite,
    )


def drawn_chains(seed, first, count, n_chains, batch_size, reinit_prob):
    """The chains of ``count`` draws of a pool, and which of them are reinitialised, without the pool's memory."""
    from fastebm.pool import draws

    return draws._drawn(seed, first, count, n_chains, batch_size, reinit_prob, torch.device("cpu"))


def cpu_words(counter, key):
    """The four Philox words of one counter (four words) and key (two), by the CPU kernel."""
    c0, c1, c2, c3 = counter
    chain = (c1 << 32 | c0) - (2**64 if c1 >> 31 else 0)  # as a signed 64-bit integer
    out, (w, _, _) = torch.zeros(4), kernels.scratch(0)
    kernels.load("update.draw")(
        kernels.WORDS, 0, 1, 1, c3 & 0xFFFFFF, 1, c3 >> 24, *key, torch.tensor([chain]), torch.tensor([c2]), 1,
        torch.zeros(1, dtype=torch.int64), w, w, out, None, None, None, 0, 0, None, None, 0, 0, None, 0, 0, 0.0, 0.0,
    )  # fmt: skip
    return [word & 0xFFFFFFFF for word in out.view(torch.int32).tolist()]


def cpu_activation(name, z, parameter):
    """Values and slopes of an activation at z (n, width), by the CPU kernel."""
    n, width = z.shape
    slope, value, bias, head = z.clone(), torch.empty_like(z), torch.zeros(width), torch.ones(1, width)
    kernels.load(f"mlp.up_{name}")(slope, value, n, width, width, bias, parameter, head, None, 0, None, 0, 0, None)
    return value, slope
