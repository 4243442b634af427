"""The bench of objectives by the commands: its groups name what there is, and a row has what the run wrote."""

from __future__ import annotations

import dataclasses
import math

import pytest
from fastebm.bench import quality, rows

from fastebm.data.sets import SETS
from fastebm.train.measures import MEASURES
from fastebm.train.objectives import OBJECTIVES


def test_groups_name_what_there_is(capsys):
    cases = [case for group in quality.GROUPS.values() for case in group]
    assert {case.data for case in cases} <= SETS.keys()
    assert {case.objective for case in cases} <= OBJECTIVES.keys()
    assert {name for case in cases for name in case.measures} <= MEASURES.keys()
    assert {measure for _, measure, _ in quality.COLUMNS} <= MEASURES.keys()
    assert all(len({dataclasses.astuple(case) for case in group}) == len(group) for group in quality.GROUPS.values())
    assert quality.main(["--list"]) == 0
    assert capsys.readouterr().out.count("seed") == len(cases)


@pytest.mark.slow
def test_a_row_has_what_the_run_wrote(tmp_path, monkeypatch):
    small = ("--steps", "3", "--set", "n_fresh=60", "fresh_steps=10", "hidden_sizes=8,8")
    cases = [
        quality.Case("moons", objective, quality.PLANE, seed=4, options=small) for objective in ("nce", "multi_dsm")
    ]
    monkeypatch.setattr(quality, "GROUPS", {"small": cases})
    monkeypatch.setattr(quality, "kde", lambda name, seed: -4.5)
    assert quality.main(["small", "--out", str(tmp_path)]) == 0
    found = rows.read(tmp_path / "quality.csv")
    assert [(row["objective"], row["model"], row["seed"], row["steps"]) for row in found] == [
        ("nce", "mlp", "4", "3"), ("multi_dsm", "noise_conditional", "4", "3"),
    ]  # fmt: skip
    for row in found:
        assert math.isfinite(float(row["log_likelihood"]))
        assert 0.4 < float(row["two_sample"]) <= 1.0
        assert float(row["kernel_density"]) == -4.5
        assert float(row["wall_seconds"]) > 0
    # one objective of a group alone: its row is replaced
    assert quality.main(["small", "--objectives", "nce", "--out", str(tmp_path)]) == 0
    assert len(rows.read(tmp_path / "quality.csv")) == 2
