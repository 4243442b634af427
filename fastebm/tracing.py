"""Helpers for torch.compile and CUDA-graph capture, and operators that a compiler does not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capturing", "operator", "readable"]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may synchronise with the device."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def readable(device: torch.device) -> bool:
    """Whether the host may read values on the device: no torch.compile trace and no CUDA-graph capture is running."""
    return not torch.compiler.is_compiling() and not capturing(device)


def operator(
    name: str, schema: str, fake: Callable[..., Any] | None = None, *, tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register the function as ``fastebm::name`` in torch.library. Its outputs carry no gradient.

    A compiler that fuses arithmetic rounds it differently. Inside an operator, the numbers that samples depend on are
    safe from that.

    Args:
        fake: returns outputs of the right shapes without values. None: the function itself can run on fake tensors.
    """

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("no output is differentiable")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"fastebm::{name}", function, mutates_args=(), schema=schema, tags=tags)
        op.register_fake(fake or function)
        op.register_autograd(backward, setup_context=setup_context)
        return op

    return decorate
