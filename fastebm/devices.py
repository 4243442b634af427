"""Devices by name, with errors that say why a device can't be used and which ones there are."""

from __future__ import annotations

import re
from typing import Any

import torch

__all__ = ["checked_device", "named_device"]


def named_device(device: torch.device | str | int) -> torch.device:
    """The device that a name means, whether or not this machine has it.

    Raises:
        TypeError, ValueError: it is not the name of a device.
    """
    if isinstance(device, torch.device):
        return device
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"device must be a torch.device or a name such as 'cpu' or 'cuda:1', got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError:
        if isinstance(device, int) and device >= 0:
            return torch.device("cuda", device)  # what PyTorch answers on a machine with a GPU
        raise ValueError(
            f"device must be 'cpu', 'cuda', 'cuda:1' or another name of PyTorch's, got {device!r}{_meant(device)}"
        ) from None


def checked_device(device: torch.device | str | int) -> torch.device:
    """The device that a name means, if this machine has it.

    Raises:
        TypeError, ValueError: it is not the name of a device, or this machine has no such device.
    """
    found = named_device(device)
    # torch.compile can't ask, and a device that it compiles for exists
    if found.type in ("cpu", "meta") or torch.compiler.is_compiling():
        return found
    if found.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        build = f"of CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        why = f"PyTorch finds no CUDA device here (it is {torch.__version__}, a build {build})"
        if found.index is not None and found.index >= n > 0:
            why = f"there {'is 1 CUDA device' if n == 1 else f'are {n} CUDA devices'} here, and the first is cuda:0"
        is_here = n > (found.index or 0)
    else:
        is_here, why = _makes_tensors(found), f"PyTorch {torch.__version__} finds no device of this kind here"
    if not is_here:
        raise ValueError(f"device {str(found)!r} is not here: {why}; leave the device out, or name one that is")
    return found


def _makes_tensors(device: torch.device) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError):
        return False
    return True


def _meant(name: Any) -> str:
    """The likely mistake behind a name that PyTorch does not know, as the end of an error message."""
    if name == "auto":
        return ": leave it out, and a device is chosen"
    match = re.fullmatch(r"(cpu|cuda|gpu|nvidia|mps|xpu)[\s:._-]*(\d*)", str(name).strip().lower())
    if match is None:
        return ""
    kind = "cuda" if match[1] in ("gpu", "nvidia") else match[1]
    return f": did you mean {f'{kind}:{match[2]}' if match[2] else kind!r}?"
