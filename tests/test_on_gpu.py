"""bench/on_gpu.sh, dry: what a GPU session brings back, and the rule that a wrong result has no speed."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastebm.bench import gpu, gpu_tests
from fastebm.bench.cases import Case
from fastebm.bench.contestants import Contestant, eager
from fastebm.bench.problem import Missing
from fastebm.bench.race import race

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton and GPUs: Linux")

BENCH = Path(__file__).parent.parent / "bench"
PROVENANCE = {"cpu", "torch", "triton", "fastebm", "commit", "date", "gpu", "driver", "cuda"}
RESULT = {"status", "correct", "error", "allowed", "rounds", "seconds", "chain_steps_per_s", "note"}


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("on_gpu")
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    command = ["bash", str(BENCH / "on_gpu.sh"), "--dry"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    errors = (out / "errors.log").read_text() if (out / "errors.log").exists() else ""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + errors[-3000:]
    return out


@pytest.mark.slow
def test_files(dry):
    files = {path.name: path.stat().st_size for path in dry.iterdir()}
    assert set(files) == {"tests.log", "timings.csv", "sweep.csv", "environment.json", "errors.log"}
    assert max(files.values()) < 4e6
    environment = json.loads((dry / "environment.json").read_text())
    assert {"torch", "triton", "nvidia_smi", "packages", "took_seconds", "tests_status"} <= set(environment)
    log = (dry / "tests.log").read_text()
    assert " passed" in log
    assert "test_langevin.py" in log


@pytest.mark.slow
def test_timings(dry):
    rows = read(dry / "timings.csv")
    assert set(rows[0]) >= RESULT | PROVENANCE | {"energy", "n_chains", "contestant", "precision", "times_eager"}
    status = {(row["energy"], row["contestant"], row["precision"]): row["status"] for row in rows}
    energies = {row["energy"] for row in rows}
    assert len(energies) == 2
    for energy in energies:
        assert status[energy, "eager", "float32"] == "ok"
        assert status[energy, "compile", "float32"] == "ok"
        assert status[energy, "fastebm-update", "float32"] == "ok"
        for precision in ("bf16x3", "tf32", "bf16"):
            assert status[energy, "fastebm-triton", precision] == "ok"
        # a contestant that can't run says so, and why
        assert status[energy, "graph", "float32"] == "missing"
    for row in rows:
        assert bool(row["times_eager"]) == bool(row["seconds"]) == (row["correct"] == "yes") == (row["status"] == "ok")
        assert row["note"] or row["status"] == "ok"


@pytest.mark.slow
def test_sweep(dry):
    rows = read(dry / "sweep.csv")
    assert set(rows[0]) >= RESULT | PROVENANCE | {"block_chains", "num_warps", "num_stages", "block_dim", "shipped"}
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert [row["shipped"] for row in rows] == ["yes", "no"]
    assert all(float(row["error"]) <= float(row["allowed"]) for row in rows)


def test_a_wrong_result_has_no_speed():
    case = Case(3, (16,), 70, 2)
    right = Contestant("eager", "float32", eager)

    def slipped(p, steps, noise_std):
        run = eager(p, steps, noise_std)
        return lambda: p.x0 + 1.001 * (run() - p.x0)

    def nan(p, steps, noise_std):
        return lambda: torch.full_like(p.x0, torch.nan)

    def absent(p, steps, noise_std):
        raise Missing("not here")

    def breaks(p, steps, noise_std):
        raise RuntimeError("broken")

    wrong = [Contestant(f.__name__, "float32", f) for f in (slipped, nan, absent, breaks)]
    rows = race(case, [right, *wrong], gpu.DEVICE, seconds=0.0, dry=True)
    assert [row["status"] for row in rows] == ["ok", "FAILED", "FAILED", "missing", "error"]
    assert rows[0]["times_eager"] == 1.0
    for row in rows[1:]:
        assert row["times_eager"] == row["seconds"] == row["chain_steps_per_s"] == ""

    # nor is anything compared with an eager loop that is wrong itself
    rows = race(
        case, [Contestant("eager", "float32", slipped), Contestant("other", "float32", eager)], gpu.DEVICE, seconds=0.0
    )
    assert [row["status"] for row in rows] == ["FAILED", "ok"]
    assert rows[1]["seconds"] > 0
    assert rows[1]["times_eager"] == ""


def test_a_contestant_that_killed_a_process_is_not_tried_again(tmp_path):
    case = Case(3, (16,), 70, 2)
    journal = gpu.Journal(tmp_path / "part")
    journal.underway(f"{case.name}, graph float32")
    assert journal.bury() == f"{case.name}, graph float32"
    contestants = [Contestant("eager", "float32", eager), Contestant("graph", "float32", eager)]
    rows = race(case, contestants, gpu.DEVICE, lost=journal.lost(), seconds=0.0)
    assert [row["status"] for row in rows] == ["ok", "error"]
    journal.add(case.name, rows)
    assert journal.done() == {case.name}
    assert journal.bury() == ""


def test_noise_is_gated_too():
    """A fused path with the right gradient and another noise has no speed either."""
    case = Case(3, (16,), 70, 2)
    rows = race(case, [Contestant("fastebm", "float32", eager)], gpu.DEVICE, seconds=0.0)
    assert [row["status"] for row in rows] == ["FAILED"]


@pytest.mark.slow
def test_a_test_that_kills_its_process_does_not_stop_the_others(tmp_path):
    test = tmp_path / "test_three.py"
    test.write_text(
        "import os, signal\n"
        "def test_one(): pass\n"
        "def test_two(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_three(): pass\n"
    )
    log = tmp_path / "tests.log"
    done = subprocess.run([sys.executable, BENCH / "gpu_tests.py", "--log", log, test], capture_output=True, text=True)
    text = log.read_text()
    assert done.returncode == 1
    assert "PROCESS LOST (status -9) in" in text
    assert "test_two" in text
    assert "1 passed" in text.split("PROCESS LOST")[-1]


# -- stand-ins: what the tests use of hypothesis and scipy, where they are not installed ---------------------


def test_scipy_standin():
    from scipy import special, stats

    _, own_stats, own_special = gpu_tests.scipy_standin()
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    assert own_stats.norm.sf(4.0) == pytest.approx(stats.norm.sf(4.0), rel=1e-9)
    assert own_stats.norm.pdf(x, 0.3, 2.0) == pytest.approx(stats.norm.pdf(x, 0.3, 2.0), rel=1e-12)
    assert own_special.ndtr(x) == pytest.approx(special.ndtr(x), rel=1e-9)
    for value, df in ((20.0, 10), (600_500.0, 600_000), (594_000.0, 600_000), (606_000.0, 600_000)):
        assert own_stats.chi2.sf(value, df) == pytest.approx(stats.chi2.sf(value, df), rel=1e-4)
        assert own_stats.chi2.cdf(value, df) == pytest.approx(stats.chi2.cdf(value, df), rel=1e-4)
    for sample in (x, x + 0.02, x + 0.05):
        assert own_stats.kstest(sample, "norm").pvalue == pytest.approx(stats.kstest(sample, "norm").pvalue, rel=0.1)
    for k in (3000, 3100, 3200):
        ours, theirs = own_stats.binomtest(k, 10_000, 0.3).pvalue, stats.binomtest(k, 10_000, 0.3).pvalue
        assert ours == pytest.approx(theirs, rel=0.1)


def test_hypothesis_standin():
    hypothesis, st = gpu_tests.hypothesis_standin()
    seen = []

    @hypothesis.settings(max_examples=25)
    @hypothesis.given(n=st.integers(1, 3) | st.none(), values=st.lists(st.sampled_from("ab"), min_size=1, max_size=2))
    def test(device, n, values):
        seen.append((device, n, values))
        assert n != 3, "found"

    assert test.__signature__.parameters.keys() == {"device"}
    with pytest.raises(AssertionError, match="found"):
        test(device="cpu")
    assert seen[-1][:2] == ("cpu", 3)
    assert all(1 <= len(values) <= 2 for _, _, values in seen)
