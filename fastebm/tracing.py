"""torch.compile and CUDA graphs: what a call must do without while it is traced or captured, and operators for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capturing", "operator", "readable"]


def capturing(device: torch.device) -> bool:
    """What is called now is recorded for a CUDA graph, so nothing may wait for the device."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def readable(device: torch.device) -> bool:
    """The host may look at values on the device: torch.compile does not trace now, and no CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not capturing(device)


def operator(
    name: str, schema: str, fake: Callable[..., Any] | None = None, *, tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: ``fastebm::name`` in torch.library, into which a compiler does not look; outputs carry no gradient.

    A compiler that fuses arithmetic rounds it differently, so what samples depend on is kept from it in this way.

    Args:
        fake: outputs without values; None: the function itself gives them.
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
