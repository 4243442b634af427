"""Choose the backend of a call, and explain why the fused kernel does not run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..devices import named_device
from ..energies import first_tensor
from ..energies.functions import EnergyLike, as_module
from ..targets.collapsed import reduced_sizes
from ..targets.description import Description, describe
from ..targets.mlp import NotAnMLP
from . import cpu

__all__ = [
    "BACKENDS",
    "FUSED",
    "PRECISIONS",
    "TRITON_PATHS",
    "Choice",
    "choose",
    "default_precision",
    "interpreted",
    "launch_for",
    "multiplies_bf16",
    "why_not_fused",
]

# The paths of the fused kernel, and all paths on which Triton kernels can run.
FUSED = ("resident", "streaming")
TRITON_PATHS = (*FUSED, "collapsed", "products", "autograd")

BACKENDS = ("auto", "triton", "torch", "reference")
PRECISIONS = ("bf16x3", "tf32", "bf16", "ieee")


@dataclass(frozen=True)
class Choice:
    """The backend of a call.

    backend: "triton", "torch" or "reference".
    path: "resident" or "streaming" (the fused kernel), "collapsed" (with steps in the first layer of the MLP, in the
    fused kernel or on tiles), "evaluation" (the sampler's own steps, and a kernel that evaluates the energy), "tiles"
    (closed-form gradient on tiles), "marginal" (Langevin with noise in the first layer, see marginal.py), "products"
    (closed-form gradient by library products, for MLPs too wide for the fused kernel) or "autograd". With backend
    "triton", the last two use the fused update kernel.
    description: the MLP energy, or None if it could not be read as an MLP.
    launch: configuration of the fused kernel, or of the one that evaluates the energy; or None. On the path "collapsed"
        it is that of the reduced energy (targets/collapsed.py).
    precision: of the matrix products.
    why_not_fused: why the fused kernel does not run, and what runs instead. None if it runs.
    kernels: what computes noise, update and activations: "triton" (on the path "evaluation" the activations only),
    "numba" (on a CPU, in float32) or "torch".
    """

    backend: str
    path: str
    description: Description | None
    launch: Any
    precision: str
    why_not_fused: str | None
    kernels: str = "triton"

    @property
    def fused(self) -> bool:
        """Whether all steps are one launch."""
        return self.launch is not None and self.path != "evaluation"

    @property
    def on_device(self) -> bool:
        """Whether kernels compute whole steps, none of which waits for the device."""
        return self.backend == "triton" and self.path != "evaluation"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not_fused(
    energy: EnergyLike, device: torch.device | str | None = None, *, precision: str | None = None
) -> str | None:
    """Explain why the fused kernel would not run for this energy with ``Langevin``.

    Args:
        energy: a module or a function, (batch, *shape) -> (batch,) or (batch, 1).
        device: device of the chains. None: the device of the energy's parameters.
        precision: of the matrix products: "bf16x3", "tf32", "bf16" or "ieee". None: see ``langevin_sample``.

    Returns:
        The reason, and what runs instead, as one line; None if the fused kernel would run.

    Raises:
        TypeError, ValueError: not an energy, or an unknown device or precision.
    """
    energy = as_module(energy)
    if device is None:
        device = torch.device("cpu") if (first := first_tensor(energy)) is None else first.device
    dtype = torch.float32
    if any(p.dtype == torch.float64 for p in energy.parameters()):
        dtype = torch.float64
    return choose(energy, named_device(device), dtype, "auto", precision).why_not_fused


def choose(
    energy: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    precision: str | None,
    *,
    condition: str | None = None,
    sampler: str = "Langevin",
    triton_paths: Collection[str] = TRITON_PATHS,
    exact: bool = False,
    collapses: Callable[[Description, str], bool] = lambda *_: False,
) -> Choice:
    """Choose the backend for an energy and states of ``dtype`` on ``device``.

    Args:
        backend, precision: what the caller asked for.
        condition: the energy's argument besides x: "labels", "condition" (anything else), or None.
        sampler, triton_paths: the sampler's name, and the paths on which a Triton kernel runs it (table.py).
        exact: whether the sampler has an accept test.
        collapses: whether the sampler's steps on this energy are faster in its first layer (targets/collapsed.py), by
            these kernels: "triton" where the reduced energy fits, "numba" or "torch".

    Raises:
        ValueError: an unknown name, or backend="triton" where it can't run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    # The paths in plain PyTorch always compute at full precision, whatever lower one was asked for.
    full = "float64" if dtype == torch.float64 else "ieee"
    if backend == "reference":
        asked = 'backend="reference" was asked for: the definition of correct, and the slowest path'
        return Choice("reference", "autograd", None, None, full, asked, "torch")

    description, launch, why_not = None, None, None
    try:
        if condition == "condition":
            raise NotAnMLP("a condition that is no label is given to it")
        description = describe(energy, labels=condition == "labels", bare=True)
    except NotAnMLP as error:
        why_not = f"not an MLP that can be read: {error}"
    no_triton = _why_not_triton(device, dtype, asked=backend == "triton")
    wanted = precision or default_precision()
    path = "autograd" if description is None else "products"
    if no_triton is None and description is not None:
        reduces = collapses if "collapsed" in triton_paths and backend != "torch" else None
        path, launch, why_not = _fused(description, wanted, device, exact, reduces)
    no_kernel = None
    if path not in triton_paths:
        no_kernel = f"{sampler} has no fused kernel{f' for such energies ({path})' if triton_paths else ''}"
    elif exact and path == "resident" and description is not None:
        no_kernel = why_no_accept_test(description, launch, wanted, device)
    if launch is not None and no_kernel is not None and backend != "torch":
        why_not = f"{no_kernel}; {_INSTEAD['evaluation', 'triton']}"
        return Choice("triton", "evaluation", description, launch, wanted, why_not)
    if backend == "triton" and (no_triton or no_kernel) is not None:
        raise ValueError(f'backend="triton" can\'t run: {no_triton or no_kernel}. Use backend="auto" or "torch"')
    no_triton = no_kernel or no_triton
    why_not = why_not or no_triton
    if backend == "torch":
        why_not = 'backend="torch" was asked for'
    elif no_triton is None and launch is not None:
        return Choice("triton", path, description, launch, wanted, None)
    elif no_triton is None:
        return Choice("triton", path, description, None, full, f"{why_not}; {_INSTEAD[path, 'triton']}")
    path = "autograd" if description is None else "tiles"
    no_numba = cpu.why_not(device, dtype)
    by = "numba" if no_numba is None else "torch"
    if (path, by, wanted) == ("tiles", "numba", "bf16") and multiplies_bf16():
        full = "bf16"
    if description is not None and device.type == "cpu" and full != "bf16" and collapses(description, by):
        path = "collapsed"
    if device.type != "cuda" or _capability(device) > 0:  # without a CUDA device nothing runs instead
        why_not = f"{why_not}; {_INSTEAD[path, by]}"
        why_not += f" ({no_numba})" if device.type == "cpu" and no_numba is not None else ""
    return Choice("torch", path, description, None, full, why_not, by)


def _fused(
    description: Description, precision: str, device: torch.device, exact: bool,
    collapses: Callable[[Description, str], bool] | None,
) -> tuple[str, Any, str | None]:  # fmt: skip
    """The path and launch of the fused kernel. Or "products", None, and why it does not run.

    collapses: as ``choose`` has it, or None if the sampler has no kernel with steps in the first layer.
    """
    launch = launch_for(description, precision, device)
    resident = not isinstance(launch, str) and launch.regime == "resident"
    if resident and exact:
        resident = why_no_accept_test(description, launch, precision, device) is None
    if not resident and collapses is not None:
        reduced = reduced_launch(description, precision, device)
        # collapses comes last, because it waits for the device, to compare the curvatures of the dims
        if reduced is not None and collapses(description, "triton"):
            return "collapsed", reduced, None
    return ("products", None, launch) if isinstance(launch, str) else (launch.regime, launch, None)


# What runs instead of the fused kernel, by path and kernels.
_INSTEAD = {
    ("evaluation", "triton"): "its own steps run in PyTorch, and one launch computes energy and gradient of all chains",
    ("tiles", "numba"): "the closed-form gradient runs instead, by Numba's kernels: the fastest path on a CPU",
    ("collapsed", "numba"): "its steps run in the first layer instead, by Numba's kernels: the fastest path on a CPU",
    ("collapsed", "torch"): "its steps run in the first layer instead, in plain PyTorch",
    ("tiles", "torch"): "the closed-form gradient runs instead, in plain PyTorch",
    ("products", "triton"): "the closed-form gradient runs instead, by library products (cuda_graph=True records them)",
    ("autograd", "numba"): (
        "autograd's gradient runs instead, slower than an MLP's closed form, and Numba's kernels for the rest of a step"
    ),
    ("autograd", "triton"): (
        "autograd's gradient runs instead, and one launch for the rest of a step (cuda_graph=True records both)"
    ),
    ("autograd", "torch"): "autograd's gradient runs instead, slower than an MLP's closed form, in plain PyTorch",
}


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX-512 BF16). Without it bf16 is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def launch_for(description: Description, precision: str, device: torch.device) -> Any:
    """The configuration of the fused kernel, or a str that says why there is none."""
    from ..kernels.triton.launch import choose_launch  # imported here, because only this path needs it

    capability = None if interpreted() else _capability(device)
    return choose_launch(description.dim, description.networks, precision, capability)


def reduced_launch(description: Description, precision: str, device: torch.device) -> Any:
    """The configuration of the fused kernel with an accept test for the reduced energy, or None if there is none."""
    from ..kernels.triton import launch as of  # imported here, because only this path needs it

    capability = None if interpreted() else _capability(device)
    dim, networks = reduced_sizes(description)
    if dim > of.MAX_RESIDENT_DIM:
        return None
    launch = of.choose_launch(dim, networks, precision, capability)
    if isinstance(launch, str) or launch.regime != "resident":
        return None
    why_not = of.why_no_accept_test(launch, dim, networks, precision, capability, reduced=True)
    return launch if why_not is None else None


def why_no_accept_test(description: Description, launch: Any, precision: str, device: torch.device) -> str | None:
    """Why that configuration does not fit for samplers with an accept test, or None."""
    from ..kernels.triton import launch as of  # imported here, because only this path needs it

    capability = None if interpreted() else _capability(device)
    why: str | None = of.why_no_accept_test(launch, description.dim, description.networks, precision, capability)
    return why


def default_precision() -> str:
    """The precision for precision=None: "bf16" if PyTorch's float32 matmul precision is "medium", else "bf16x3".

    ``torch.set_float32_matmul_precision`` defines "high" as about 16 mantissa bits and "medium" as bf16. PyTorch's
    default is "highest", full float32, but such products are very slow in the fused kernel, and bf16x3 agrees with
    them to a relative 1e-5. precision="ieee" selects them explicitly.
    """
    return "bf16" if torch.get_float32_matmul_precision() == "medium" else "bf16x3"


def _capability(device: torch.device) -> int:
    """The compute capability as an int, such as 90 for sm_90; 0 without a CUDA device."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_triton(device: torch.device, dtype: torch.dtype, *, asked: bool) -> str | None:
    if dtype != torch.float32:
        return f"Triton's kernels keep their state in float32, and this one is {dtype}"
    if interpreted() and device.type != "cpu":
        return f"the interpreter (TRITON_INTERPRET=1) works on CPU tensors, and the state is on {device}"
    if not interpreted() and device.type != "cuda":
        return f"Triton's kernels need a CUDA device, and the state is on {device}"
    if not _has_triton():  # last, because it searches folders
        return "the package triton is not installed"
    if interpreted():
        return None if asked else 'the interpreter is for tests: it runs only where backend="triton" asks for it'
    if _capability(device) == 0:
        return "PyTorch finds no CUDA device here"
    if _capability(device) < 80:
        return f"Triton's kernels need compute capability 8.0 or later, and {device} has {_capability(device) / 10}"
    return None
