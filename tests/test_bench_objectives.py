"""The bench of objectives: it trains what it says, and its likelihood is that of the trained energy."""

from __future__ import annotations

import math

import pytest
import torch
from fastebm.bench import objectives, rows

import fastebm
from fastebm.data.sets import load


@pytest.mark.parametrize("name", objectives.CASES)
def test_each_objective_trains_the_energy_and_is_timed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "STEPS", 4)
    monkeypatch.setattr(objectives, "BLOCK", 2)
    monkeypatch.setattr(objectives, "BATCH", 8)
    monkeypatch.setattr(objectives, "CHAINS", 50)
    monkeypatch.setattr(objectives, "kernel_density", lambda *_, **__: (torch.zeros(1), 1.0))
    monkeypatch.setattr(objectives, "log_z_by_quadrature", lambda energy, clamp: 0.5)
    before = objectives.start_of(objectives.CASES[name], load("moons", 3), 3)
    assert objectives.main([name, "--data", "moons", "--seeds", "3", "--out", str(tmp_path)]) == 0
    ours, *_ = rows.read(tmp_path / "objectives.csv")
    assert (ours["library"], ours["objective"], ours["data"], ours["seed"]) == ("fastebm", name, "moons", "3")
    assert float(ours["seconds_per_step"]) > 0
    untrained = objectives.log_likelihood(before, objectives.CASES[name], load("moons", 3))
    assert math.isfinite(float(ours["log_likelihood"]))
    assert float(ours["log_likelihood"]) != pytest.approx(untrained, abs=1e-4)


def test_the_likelihood_of_a_gaussian():
    data = load("moons", 0)
    gaussian = fastebm.GaussianEnergy(0.0, 2.0)
    found = objectives.log_likelihood(gaussian, objectives.CASES["dsm"], data)
    exact = -float((data.test.double() ** 2).sum(1).mean()) / 8 - math.log(2 * math.pi * 4)
    lo, hi = data.info.clamp
    inside = 2 * math.log(math.erf(hi / (2 * math.sqrt(2))))  # of the mass, per side
    assert lo == -hi
    assert found == pytest.approx(exact - inside, abs=1e-6)
