"""``fastebm info``: versions, devices, and which backend would run."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import torch

from ..backends import cpu
from ..backends.choose import choose
from ..energies import MLPEnergy
from ..energies.activations import ACTIVATIONS
from ..train.recipe import TrainConfig
from ..train.resources import resolve_device
from .options import flat, positive, sizes, version

_DEFAULTS = TrainConfig()
_WORDS = "Versions, devices, and which backend would sample an MLP energy of a given shape, and why."


def add(commands: Any) -> None:
    command = commands.add_parser("info", help="versions, devices, and which backend would run", description=_WORDS)
    command.set_defaults(run=_info)
    command.add_argument("--input-size", type=positive, default=64, metavar="N", help="dims of one state")
    command.add_argument(
        "--hidden-sizes", type=sizes, nargs="+", metavar="N", default=None,
        help=f"hidden widths, from the input up (default: {' '.join(map(str, _DEFAULTS.hidden_sizes))})",
    )  # fmt: skip
    command.add_argument(
        "--activation", choices=list(ACTIVATIONS), default=_DEFAULTS.activation, help="of the hidden layers"
    )
    command.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1", ...')


def _info(arguments: argparse.Namespace) -> int:
    device = resolve_device(arguments.device)
    widths = _DEFAULTS.hidden_sizes if arguments.hidden_sizes is None else flat(arguments.hidden_sizes)
    print(f"fastebm {version('fastebm')}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for package in ("triton", "numba", "numpy", "scikit-learn", "matplotlib", "safetensors", "tqdm"):
        print(f"{package} {version(package)}")
    print(f"device cpu: {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    no_numba = cpu.why_not(torch.device("cpu"), torch.float32)
    print(f"  kernels: {'by Numba' if no_numba is None else f'plain PyTorch, because {no_numba}'}")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"device cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}")

    model = MLPEnergy(arguments.input_size, widths, arguments.activation).to(device)
    choice = choose(model, device, torch.float32, "auto", None)
    shape = " -> ".join(map(str, (arguments.input_size, *widths, 1)))
    print(f"MLP energy {shape} ({arguments.activation}) on {device}:")
    print(f"  backend: {choice.backend} ({choice.path}), products in {choice.precision}")
    print(f"  fused kernel: {'yes' if choice.why_not_fused is None else f'no, because {choice.why_not_fused}'}")
    return 0
