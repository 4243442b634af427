"""SampleResult.to_arviz: ArviZ's format, and the same statistics as ``diagnose``."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fastebm import MALA, GaussianEnergy, diagnose, sample

summary = pytest.importorskip("arviz_stats", reason="arviz-stats needs Python 3.11").summary


def test_arviz():
    result = sample(GaussianEnergy(torch.zeros(2, 3)), MALA(0.5), n_chains=4, steps=100, thin=2, seed=0)
    tree = result.to_arviz()
    assert tree["posterior"]["x"].dims[:2] == ("chain", "draw")
    np.testing.assert_array_equal(tree["posterior"]["x"].values, result.trajectory.numpy())
    np.testing.assert_array_equal(tree["sample_stats"]["lp"].values, -result.trajectory_energies().numpy())
    np.testing.assert_array_equal(tree["sample_stats"]["acceptance_rate"].values, result.info.acceptance.numpy())
    assert "n_gradients" not in tree["sample_stats"]
    table, found = summary(tree, round_to="none"), diagnose(result)
    for i, name in enumerate(found.table["name"][:-1]):
        for theirs, ours in (("mean", "mean"), ("ess_bulk", "ess_bulk"), ("r_hat", "rhat")):
            assert table[theirs][name] == pytest.approx(found.table[ours][i], rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(GaussianEnergy(), MALA(0.5), 2, n_chains=30, steps=4, thin=1).to_arviz()  # more chains than draws
    before = result.trajectory.clone()
    tree["posterior"]["x"].values[:] = 0.0
    assert torch.equal(result.trajectory, before)
