"""Compile kernels ahead of time, without a GPU: ``python tests/compiling.py < cases.json > results.json``.

It runs in a process of its own, because TRITON_INTERPRET, which other tests set where there is no GPU, is read when a
kernel is decorated.

It compiles exactly what a launch would: the backend's entry points run on CPU tensors, with a driver that pretends to
be a GPU of the given capability, and launching is replaced by compiling.

Fields of a case; those after precision are optional:
    kernel ("mlp", "evaluate", "hmc", "reduced hmc", "mala" or "update"), capability, dim, widths, precision
    activations     one per layer; default: silu
    rule            keywords of the sampler, with lists for tensors
    head            "scalar"; "logsumexp" or "class", of 10 classes
    gaussian        true: with a Gaussian term
    sum             true: with a second MLP, a Gaussian and a linear term
    recorded        true: with a trajectory, telemetry and, but for "reduced hmc", frozen coordinates
    wanted          of "evaluate", a method of ``Target``; default: "value_and_gradient"
    silent          true: with zeros instead of normal numbers; the same for all cases of a process
    cubin           a path to write the machine code to
A result is the case with what was compiled, or with "refused", the message of ``choose_launch``.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import runs
import torch
import triton
import triton.language as tl
from fastebm.kernels.triton import step
from fastebm.kernels.triton.launch import SHARED_MEMORY, choose_launch, shared_bytes, why_no_accept_test
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastebm import HMC, MALA, ClassifierEnergy, GaussianEnergy, Langevin, MLPEnergy, SumEnergy
from fastebm.backends import Chains
from fastebm.energies import ACTIVATIONS
from fastebm.targets.autograd import Energy
from fastebm.targets.collapsed import reduced_sizes
from fastebm.targets.description import describe

N_CHAINS = 64

# By kernel, the sampler and its settings.
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "mlp": (Langevin, {"step_size": 0.1, "noise_scale": 1.0}),
    "evaluate": (Langevin, {"step_size": 0.1, "noise_scale": 1.0}),
    "update": (Langevin, {"step_size": 0.1, "noise_scale": 1.0}),
    "hmc": (HMC, {"step_size": 0.1, "n_leapfrog": 10}),
    "reduced hmc": (HMC, {"step_size": 0.1, "n_leapfrog": 10}),
    "mala": (MALA, {"step_size": 0.1}),
}


class PretendedGPU:
    """The part of a Triton driver that compilation needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device number: use one number per capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The last kernel, among those that a call launches: all are compiled, none run."""
    kernels: list[Any] = []

    def instead_of_launching(kernel: JITFunction, grid: Any) -> Any:
        return lambda *args, **kwargs: kernels.append(kernel.warmup(*args, grid=grid, **kwargs))

    with mock.patch.object(JITFunction, "__getitem__", instead_of_launching):
        function(*args, **kwargs)
    *before, kernel = kernels
    # the last one: with the noise first, the drift
    assert [other.metadata.name for other in before] in ([], ["prepare"], ["langevin_update"])
    return kernel


@triton.jit
def silence(
    key0, key1, chain, step, first_block, STREAM: tl.constexpr, DIM: tl.constexpr, BLOCK_CHAINS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr = False, scale=1.0,
):  # fmt: skip
    """Replaces ``normals`` at no cost."""
    return tl.zeros((BLOCK_CHAINS, BLOCK_DIM), tl.float32) + scale


def energy_of(case: dict[str, Any]) -> nn.Module:
    sizes = [case["dim"], *case["widths"]]
    layers: list[nn.Module] = []
    for i, name in enumerate(case.get("activations", ["silu"] * len(case["widths"]))):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), ACTIVATIONS[name].module(0.5)]
    head = case.get("head", "scalar")
    energy: nn.Module = nn.Sequential(*layers, nn.Linear(sizes[-1], 1 if head == "scalar" else 10))
    if head != "scalar":
        energy = ClassifierEnergy(energy)
    if case.get("gaussian"):
        energy = SumEnergy([energy, GaussianEnergy()])
    if case.get("sum"):
        terms = (energy, MLPEnergy(case["dim"], (16,)), GaussianEnergy(), nn.Linear(case["dim"], 1))
        energy = SumEnergy(terms, (1.0, -0.5, 1.0, 1.0))
    return energy


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    capability, dim, precision = case["capability"], case["dim"], case["precision"]
    triton.runtime.driver.set_active(PretendedGPU(capability))
    energy = energy_of(case)
    tensors = ("step_size", "noise_scale", "clamp", "mass", "preconditioner")
    kind, defaults = SAMPLERS[case["kernel"]]
    options = {**defaults, **case.get("rule", {})}
    options = {k: torch.tensor(v) if k in tensors and v is not None else v for k, v in options.items()}
    if options.get("clamp") is not None:  # two numbers, or two lists of one a dim
        options["clamp"] = tuple(options["clamp"])
    recorded, reduced = bool(case.get("recorded")), case["kernel"] == "reduced hmc"
    labels = torch.zeros(N_CHAINS, dtype=torch.int64) if case.get("head") == "class" else None
    chains = Chains(
        torch.zeros(N_CHAINS, dim),
        0,
        torch.arange(N_CHAINS),
        torch.zeros(N_CHAINS, dtype=torch.int64),
        labels,
        torch.zeros(N_CHAINS, dim, dtype=torch.bool) if recorded and not reduced else None,
    )
    arguments = (chains, kind(**options), 1)
    recording = {"thin": int(recorded), "telemetry": recorded}
    estimate, launch = None, None
    if case["kernel"] == "update":
        kernel = compiled_by(runs.fused_module, Energy(energy, (dim,), torch.float32), *arguments, **recording)
    else:
        description = describe(energy, labels=labels is not None)
        exact = case["kernel"] in ("hmc", "reduced hmc", "mala")
        held = "bf16x3" if exact and precision == "bf16" else precision  # of the weights
        dim, networks = reduced_sizes(description) if reduced else (dim, description.networks)
        launch = choose_launch(dim, networks, held, capability)
        if not isinstance(launch, str) and exact:
            resident = launch.regime == "resident"
            why_not: str | None = "W_1 is streamed"
            if resident:
                why_not = why_no_accept_test(launch, dim, networks, held, capability, reduced=reduced)
            launch = why_not or launch
        if isinstance(launch, str):
            return {**case, "refused": launch}
        estimate = shared_bytes(launch, dim, networks, held, capability, exact=exact, reduced=reduced)
        options = {"precision": precision, "launch": launch}
        if case["kernel"] == "evaluate":
            wanted = case.get("wanted", "value_and_gradient")
            kernel = compiled_by(lambda: getattr(runs.evaluation(description, chains, **options), wanted)(chains.x))
        else:
            run = partial(runs.fused_hmc, reduced=reduced) if exact else runs.fused_mlp
            with mock.patch.object(step, "normals", silence if case.get("silent") else step.normals):
                kernel = compiled_by(run, description, *arguments, **options, **recording)
    if "cubin" in case:
        Path(case["cubin"]).write_bytes(kernel.asm["cubin"])
    return {
        **case,
        "refused": None,
        "launch": None if launch is None else dataclasses.asdict(launch),
        "name": kernel.metadata.name,
        "target": kernel.metadata.target.arch,
        "cubin_bytes": len(kernel.asm["cubin"]),
        "tensor_cores": "mma" in kernel.asm["ptx"],
        "shared": kernel.metadata.shared,
        "estimate": estimate,
        "limit": SHARED_MEMORY[capability],
    }


if __name__ == "__main__":
    json.dump([compile_case(case) for case in json.load(sys.stdin)], sys.stdout)
