"""The bench of log_partition: its laws have the log Z that it compares with, and its rows count what they say."""

from __future__ import annotations

import pytest
import torch
from fastebm.bench import markdown, partition, rows, tables

from fastebm import LogPartition


@pytest.mark.parametrize("law", partition.LAWS)
def test_log_z_of_the_laws_by_quadrature(law):
    energy, truth = partition.LAWS[law](2)
    axis, cell = torch.linspace(-12, 17, 1500, dtype=torch.float64), 29 / 1499
    values = energy(torch.cartesian_prod(axis, axis).float()).double().reshape(-1)
    assert float((cell**2 * (-values).exp().sum()).log()) == pytest.approx(truth, abs=1e-5)


def found(truth, error, upper):
    """A result with such errors of both bounds, and standard errors of 0.02 and 0.01."""
    weights = torch.zeros(7)
    return LogPartition(truth + error, 0.02, truth + upper, 0.01, 6.0, weights, weights, torch.zeros(5), weights, None)


def test_rows_count_what_they_say(tmp_path, monkeypatch):
    _, truth = partition.gaussian(2)
    results = [
        found(truth, 0.03, 0.0),  # near, covered, bracketed
        found(truth, -0.03, -0.03),  # near, covered
        found(truth, -0.045, 0.0),  # near, bracketed
        found(truth, -0.06, 0.01),  # bracketed
        found(truth, -0.07, 0.01),  # bracketed
        found(truth, 0.06, 0.06),  # none of these
    ]
    monkeypatch.setattr(partition, "log_partition", lambda energy, input_size, seed: results[seed])
    monkeypatch.setattr(partition, "LAWS", {"gaussian": partition.gaussian})
    assert partition.main(["2", "--seeds", "6", "--out", str(tmp_path)]) == 0
    (row,) = rows.read(tmp_path / "partition.csv")
    counts = {name: row[name] for name in ("chains", "temperatures", "seeds", "near", "covered", "bracketed")}
    assert counts == {
        "chains": "7", "temperatures": "5", "seeds": "6", "near": "3", "covered": "2", "bracketed": "4",
    }  # fmt: skip
    assert (float(row["mean_error"]), float(row["max_error"])) == (
        pytest.approx(0.295 / 6, rel=1e-4),
        pytest.approx(0.07),
    )
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert "| gaussian | 2 | 3 | 2 | 4 | 0.049 | 0.070 | 0.020 | 6 | 0.0 |" in tables.partition()
    monkeypatch.setattr(markdown, "RESULTS", tmp_path / "none")
    assert tables.partition() == markdown.none_yet("partition.py")
