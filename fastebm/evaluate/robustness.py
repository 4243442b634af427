"""Accuracy of a classifier under attack: projected gradient ascent of its loss near each row (Madry et al. 2018).

    x <- P(x + a d),   d = sign(g) for Linf,  g / |g| for L2,   g = d cross-entropy / dx

P projects onto the ball of radius epsilon around the row, and then clamps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..energies.classifier import checked_logits
from ..energies.eval_mode import evaluating
from ..scalars import checked_integer, checked_number
from .rows import check_labels

__all__ = ["pgd_accuracy", "pgd_attack"]

_NORMS = ("linf", "l2")

# The step is this multiple of epsilon over the number of steps, so that it can cross the ball; Madry et al.
_STEP = 2.5


def pgd_attack(
    classifier: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    steps: int = 20,
    step_size: float | None = None,
    clamp: tuple[float, float] | None = None,
    seed: int = 0,
) -> Tensor:
    """Rows near x on which the classifier's loss is high: (n, *shape), no further than epsilon in the norm.

    An attack by gradients shows an upper bound of the accuracy that the worst rows would leave.

    Args:
        classifier: (n, *shape) -> logits (n, n_classes). Its mode and its parameters' gradients are left as they are.
        x: (n, *shape) floating-point, within the clamp. labels: (n,) int64, the true classes.
        epsilon: radius >= 0 in the units of the states. norm: "linf" or "l2", over all dims of a row.
        step_size: a > 0. None: 2.5 epsilon / steps.
        clamp: (lo, hi) of the states, or None.
        seed: of the start, uniform in the ball (for l2: a uniform direction and radius).
    """
    epsilon, steps = checked_number("epsilon", epsilon, positive=False), checked_integer("steps", steps, least=1)
    a = _STEP * epsilon / steps if step_size is None else checked_number("step_size", step_size, positive=True)
    _check(classifier, x, labels, norm, clamp)
    x = x.detach()
    generator = torch.Generator().manual_seed(seed)
    if norm == "linf":
        start = epsilon * (2.0 * torch.rand(x.shape, generator=generator) - 1.0)
    else:
        direction = torch.randn(x.shape, generator=generator)
        start = _scaled(direction, epsilon * torch.rand(len(x), generator=generator))
    adversary = _projected(x + start.to(x), x, epsilon, norm, clamp)
    with evaluating(classifier), torch.enable_grad():
        for _ in range(steps):
            adversary.requires_grad_()
            logits = checked_logits(classifier(adversary), adversary)
            # The sum over rows: the gradient of each row's own loss.
            gradient = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), adversary)[0]
            direction = gradient.sign() if norm == "linf" else _scaled(gradient, torch.ones(len(x)).to(x))
            adversary = _projected(adversary.detach() + a * direction, x, epsilon, norm, clamp)
    return adversary.detach()


def pgd_accuracy(classifier: nn.Module, x: Tensor, labels: Tensor, **options: Any) -> float:
    """The share of rows that are classified right, both as they are and after ``pgd_attack``.

    Args:
        classifier, x, labels: as for ``pgd_attack``. options: its options; epsilon is required.
    """
    attacked = pgd_attack(classifier, x, labels, **options)
    with evaluating(classifier), torch.no_grad():
        right = [checked_logits(classifier(v), v).argmax(1) == labels for v in (x, attacked)]
    return float((right[0] & right[1]).double().mean())


def _check(classifier: nn.Module, x: Tensor, labels: Tensor, norm: str, clamp: tuple[float, float] | None) -> None:
    if norm not in _NORMS:
        raise ValueError(f"norm must be {' or '.join(map(repr, _NORMS))}, got {norm!r}")
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (n, *shape), n >= 1, floating-point, got {tuple(x.shape)} {x.dtype}")
    with evaluating(classifier), torch.no_grad():
        check_labels(labels, len(x), checked_logits(classifier(x[:1]), x[:1]).shape[1])
    if clamp is not None and not bool(((x >= clamp[0]) & (x <= clamp[1])).all()):
        raise ValueError(f"x must lie within the clamp {clamp}, got values from {float(x.min())} to {float(x.max())}")


def _projected(adversary: Tensor, x: Tensor, epsilon: float, norm: str, clamp: tuple[float, float] | None) -> Tensor:
    """The nearest states in the ball around x, clamped. x is within the clamp, so clamping leads out of no ball."""
    moved = adversary - x
    if norm == "linf":
        moved = moved.clamp(-epsilon, epsilon)
    else:
        length = moved.flatten(1).norm(dim=1)
        moved = _scaled(moved, length.clamp_max(epsilon))
    return x + moved if clamp is None else (x + moved).clamp(*clamp)


def _scaled(v: Tensor, lengths: Tensor) -> Tensor:
    """The rows of v with these lengths (n,); a row of zeros stays."""
    factors: Tensor = lengths / v.flatten(1).norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
    return v * factors.reshape(-1, *[1] * (v.ndim - 1))
