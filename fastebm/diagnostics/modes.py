"""Chains that stay in separate regions, such as modes of the energy that they never leave.

On one axis, the chains' means are split at the widest gap between two neighbours. The chains stay apart if the gap is
wide beside the spread of a single chain, and next to no chain has many states on both sides. Fewer chains must cross
than stay on either side: of chains on a long way, a few are ahead. The axes are the coordinates, and the direction in
which the chains' means differ most (their first principal component), for modes that no single coordinate tells apart.
Everything is in units of the chains' own standard deviations.

All this is of the second halves of the chains, so that the way from the start does not count. Only the direction is
that of the first halves: one fitted to the states that it is tested on would separate any few chains in many dims.

If all chains sit in one mode, nothing in their states tells that there are others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .draws import Draws

__all__ = ["Apart", "apart"]

# In standard deviations. From the middle of a gap of 3.3, Gaussian chains on both sides have 5% of their states beyond.
_GAP = 3.0

# A chain stays on a side if at most this fraction of its states is on the other; and at most this fraction of the
# chains may stay on neither.
_RARE = 0.05

# So many coordinates are looked at, those with the widest gaps.
_MOST = 8

_ITERATIONS = 50


class Apart(NamedTuple):
    """Chains that stay on two sides of a gap.

    axis: a coordinate and where its gap is, or another axis. below, above, crossed: numbers of chains that stay on one
    side, on the other, and on neither.
    """

    axis: str
    below: int
    above: int
    crossed: int


def apart(draws: Draws) -> Apart | None:
    """The first axis on which the chains stay apart, or None."""
    if len(draws.x) < 2:
        return None
    half = draws.x.shape[1] // 2
    for axis, values, at in _axes(draws):
        above = values[:, half:] > at
        share = above.double().mean(dim=1)
        up, down = int((share >= 1 - _RARE).sum()), int((share <= _RARE).sum())
        crossed = len(above) - up - down
        if crossed < min(up, down) and crossed <= _RARE * len(above):
            return Apart(axis, down, up, crossed)
    return None


def _axes(draws: Draws) -> Iterator[tuple[str, Tensor, float]]:
    """Axes with a wide gap: in words, the values there (n, draws), and where the gap is."""
    mean, variance = draws.halves
    spread = variance[:, 1].sqrt().median(dim=0).values
    # Not a coordinate that is frozen, or in which most chains did not move.
    spread = torch.where(draws.held | (spread == 0), torch.inf, spread)
    wide, at = _gaps(mean[:, 1])
    wide = wide / spread
    for i in wide.argsort(descending=True)[:_MOST].tolist():
        if wide[i] >= _GAP:
            yield f"{draws.name(i)} = {float(at[i]):.3g}", draws.x[:, :, i], float(at[i])
    centred = (mean[:, 0] - mean[:, 0].mean(dim=0)) / spread
    axis = _principal(centred) / spread
    values = (draws.x @ axis.to(draws.x.dtype)).double()
    half = values.shape[1] // 2
    wide, at = _gaps(values[:, half:].mean(dim=1, keepdim=True))
    if wide >= _GAP * values[:, half:].std(dim=1).median():
        yield "a gap on the axis on which their means differ most", values, float(at)


def _gaps(means: Tensor) -> tuple[Tensor, Tensor]:
    """Width and middle of the widest gap between two neighbours, each (dim,). means: (n, dim)."""
    order = means.sort(dim=0).values
    wide, i = order.diff(dim=0).max(dim=0)
    return wide, order.gather(0, i[None])[0] + wide / 2


def _principal(rows: Tensor) -> Tensor:
    """The first principal direction of centred rows, (dim,), by power iteration from the longest row."""
    axis = rows[rows.square().sum(dim=1).argmax()]
    for _ in range(_ITERATIONS):
        axis = rows.T @ (rows @ axis)
        axis = axis / axis.norm().clamp(min=1e-300)
    return axis
