"""Small pools, energies that misbehave, and bit-exact comparison, for the tests of pools."""

import json
import math

import torch
from torch import nn

from fastebm import ChainPool, Langevin
from fastebm.pool.draws import draw_distinct

DIM = 3
RULE = Langevin(0.1, 0.5)


def pool_of(n: int = 50, size=DIM, **options) -> ChainPool:
    return ChainPool(n, size, **{"clamp": (-1.0, 1.0), "seed": 7, **options})


def drawn(pool: ChainPool, n: int) -> torch.Tensor:
    """The rows of the next draw."""
    return draw_distinct(pool.seed, pool.draws, len(pool), n)


def same(a: ChainPool | dict, b: ChainPool | dict) -> bool:
    """Bit for bit. a, b: pools, or states of pools."""
    a, b = (v.state_dict() if isinstance(v, ChainPool) else v for v in (a, b))
    return a.keys() == b.keys() and all(
        torch.equal(bits(a[k]), bits(b[k])) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """To compare NaNs too."""
    return tensor.contiguous().view(torch.uint8)


def json_round_trip(state):
    values = json.loads(json.dumps({k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}))
    return {**values, **{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}}


class Quartic(nn.Module):
    """Unbounded below: chains that start far enough out explode with any step size."""

    def forward(self, x):
        return -x.square().square().sum(1)


class Trap(nn.Module):
    """|x|^2 / 2, but NaN where the first coordinate is above 100."""

    def forward(self, x):
        return (x.square().sum(1) / 2).masked_fill(x[:, 0] > 100, math.nan)
