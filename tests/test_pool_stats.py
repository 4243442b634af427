"""ChainPool.stats."""

import math

import pytest
import torch
from pools import DIM, RULE, pool_of

from fastebm import MLPEnergy

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def energy() -> MLPEnergy:
    return MLPEnergy(DIM, (9, 8))


def test_stats_of_a_fresh_pool():
    s = pool_of().stats()
    assert (s.n_chains, s.draws, s.n_energies, s.reinits, s.nonfinite, s.ages) == (50, 0, 0, 0, 0, (50,))
    assert all(math.isnan(v) for v in s.energy.values())


def test_stats_are_those_of_the_chains(energy):
    pool = pool_of(5000, reinit_prob=0.3)
    for n, steps in ((3000, 1), (2000, 7), (1000, 40)):
        pool.sample(energy, n, RULE, steps)
    pool.energies[:4] = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    s = pool.stats()
    known = pool.energies[pool.energies.isfinite()].sort().values
    assert 3000 <= s.n_energies == len(known) < 5000
    for q, value in s.energy.items():
        assert value == float(known[max(math.ceil(q * len(known)) - 1, 0)])
    assert known.min() < 0 < known.max() or len(set(s.energy.values())) == 7
    assert sum(s.ages) == 5000
    assert s.ages[0] == int((pool.ages == 0).sum())
    for i, count in enumerate(s.ages[1:]):
        assert count == int(((pool.ages >= 2**i) & (pool.ages < 2 ** (i + 1))).sum())
    assert s.reinits == int(pool.reinits.sum()) > 0
    assert s.draws == 3


def test_quantiles_of_negative_and_positive_energies():
    pool = pool_of(9)
    pool.energies.copy_(torch.tensor([-3.5, 1e-42, 4.0, -1e30, 7.25, -0.25, 2.0, 3e38, -1e-42]))
    assert pool.stats().energy[0.0] == float(torch.tensor(-1e30))
    assert pool.stats().energy[0.5] == float(torch.tensor(1e-42))
    assert pool.stats().energy[1.0] == float(torch.tensor(3e38))
