"""bench/on_gpu.sh with --dry: the results of a visit, whenever it ends, and that a wrong result has no speed."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastebm.bench import gpu, gpu_visit, gpu_workers, launches
from fastebm.bench.cases import Case
from fastebm.bench.contestants import CONTESTANTS, Contestant, compiled_at, eager
from fastebm.bench.problem import MM_BF16, Missing, Problem
from fastebm.bench.race import beside_peers, gate, race

from fastebm.backends.evaluation import Evaluation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton and GPUs: Linux")

CPU = torch.device("cpu")
BENCH = Path(__file__).parent.parent / "bench"
PROVENANCE = {"cpu", "torch", "triton", "fastebm", "commit", "date", "gpu", "driver", "cuda"}
CASE = Case(3, (16,), 70, 2)


def command(out, *options):
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return ["bash", str(BENCH / "on_gpu.sh"), "--dry", *options], environment


def visited(out, *options):
    words, environment = command(out, *options)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    errors = (out / "errors.log").read_text() if (out / "errors.log").exists() else ""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + errors[-3000:]
    return {(row["what"], row["job"]): row for row in gpu_workers.read(out / "rows.jsonl")}, done.stdout


def of(found, what):
    return {job: row for (kind, job), row in found.items() if kind == what}


# -- whole visits ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_part_a(tmp_path):
    began = time.monotonic()
    found, printed = visited(tmp_path, "--part", "a")
    assert time.monotonic() - began < 180
    assert {path.name for path in tmp_path.iterdir()} == {
        "environment.json", "rows.jsonl", "profile.txt", "errors.log",
    }  # fmt: skip
    assert {"nvidia_smi", "packages", "stages", "budget_seconds"} <= set(
        json.loads((tmp_path / "environment.json").read_text())
    )
    assert all(set(row) >= PROVENANCE | {"what", "job", "status"} for row in found.values())

    shipped = of(found, "shipped")
    assert {row["path"] for row in shipped.values()} == {"resident", "streaming", "autograd"}
    for row in shipped.values():
        assert row["status"] == "ok"
        assert ("evaluation_error" in row) == (row["path"] != "autograd")
        assert float(row["error"]) <= float(row["allowed"])
        assert float(row["noisy_error"]) <= float(row["noisy_allowed"])
        assert row["same_bits"] == "yes"
    assert [float(row["call_seconds"]) > 0 for row in of(found, "alone").values()] == [True] * len(shipped)

    tests = of(found, "tests-a")
    assert {row["status"] for row in tests.values()} == {"passed", "skipped"}
    assert any("test_langevin.py" in name for name in tests)
    assert any("test_gpu.py" in name and "needs a CUDA device" in row["note"] for name, row in tests.items())

    timings = of(found, "timings")
    assert len(timings) == 2 * len(gpu_visit.ON_GPU)
    for row in timings.values():
        assert bool(row["times_eager"]) == bool(row["seconds"]) == (row["correct"] == "yes") == (row["status"] == "ok")
        assert row["note"] or row["status"] == "ok"
    status = {(row["energy"], row["contestant"], row["precision"]): row["status"] for row in timings.values()}
    for energy in {row["energy"] for row in timings.values()}:
        names = (("eager", "float32"), ("compile", "float32"), ("fastebm-update", "float32"))
        for name in (*names, *(("fastebm-triton", q) for q in ("bf16x3", "tf32", "bf16"))):
            assert status[(energy, *name)] == "ok"
        # a contestant that can't run says so, and why
        assert status[energy, "graph", "float32"] == status[energy, "fastebm-graph", "bf16"] == "missing"
    assert "langevin_sample" not in printed  # results, no logs
    text = (tmp_path / "profile.txt").read_text()
    assert "Self CPU" in text
    assert "130-[16, 16] bf16, 70 chains" in text

    assert gpu.main(["rows", str(tmp_path), "--out", str(tmp_path / "results")]) == 0
    with (tmp_path / "results" / "gpu.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert {row["what"] for row in written} == {"shipped", "alone", "timings"}
    assert len(written) == 2 * len(shipped) + len(timings)
    assert all(row["commit"] and row["gpu"] for row in written)


@pytest.mark.slow
def test_part_b(tmp_path):
    found, _ = visited(tmp_path, "--part", "b")
    assert {row["status"] for row in of(found, "tests-b").values()} == {"passed", "skipped"}
    sampled = list(of(found, "samplers").values())
    paths = {row["sampler"]: (row["status"], row["path"]) for row in sampled}
    assert paths == {"MALA": ("ok", "resident"), "HMC": ("ok", "collapsed"), "NUTS": ("ok", "evaluation")}
    assert all(float(row["seconds"]) > 0 for row in sampled)
    sweep = list(of(found, "sweep").values())
    assert [row["status"] for row in sweep] == ["ok", "ok"]
    assert [row["shipped"] for row in sweep] == ["yes", "no"]
    assert all(0 < float(row["error_over_allowed"]) <= 1 for row in sweep)
    assert {row["status"] for row in of(found, "watched").values()} <= {"missing", "error"}  # there is no GPU to watch
    assert gpu.main(["rows", str(tmp_path), "--out", str(tmp_path / "results")]) == 0
    assert (tmp_path / "results" / "gpu_samplers.csv").exists()
    assert (tmp_path / "results" / "gpu_sweep.csv").exists()
    assert not (tmp_path / "results" / "gpu.csv").exists()


@pytest.mark.slow
def test_both_parts_bring_their_rows_back(tmp_path):
    """Also in too short a time, and then their rows say so."""
    (tmp_path / "rows.jsonl").write_text("of another visit\n")
    words, environment = command(tmp_path, "--budget", "12")
    assert subprocess.run(words, env=environment, capture_output=True, timeout=200).returncode == 1
    found = gpu_workers.read(tmp_path / "rows.jsonl")
    assert {"shipped", "watched"} <= {row["what"] for row in found}
    assert any(row.get("note") == "out of time" for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("rows_before", [1, 4, 12])
def test_whatever_a_visit_knew_when_it_was_killed_is_there(tmp_path, rows_before):
    words, environment = command(tmp_path, "--stages", "shipped alone timings")
    # a session of its own, so that all of it can be killed at once
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    path = tmp_path / "rows.jsonl"
    end = time.monotonic() + 150
    while time.monotonic() < end and not (path.exists() and path.read_bytes().count(b"\n") >= rows_before):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = gpu_workers.read(path)  # every line is whole JSON
    assert len(found) >= rows_before
    assert all(set(row) >= PROVENANCE | {"what", "job", "status"} for row in found)
    assert json.loads((tmp_path / "environment.json").read_text())["commit"] == found[0]["commit"]


def test_help_and_bad_arguments_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = (["--part", "c"], ["--parts", "a"], ["--budget"], ["--dryy"])
    for options, status in ((["--help"], 0), *((options, 64) for options in bad)):
        words, environment = command(tmp_path / "out", *options)
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == status
        assert "--part a|b" in (done.stderr if status else done.stdout)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_there_is_not_is_told(tmp_path):
    words, environment = command(tmp_path, "--stages", "nope")
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 64
    assert "no stage is called 'nope'" in done.stderr


def test_a_folder_without_rows_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        gpu.main(["rows", str(tmp_path / "nowhere"), "--out", str(tmp_path / "results")])
    assert "nowhere holds no rows.jsonl: name the folder that a visit wrote into" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_cuda_device_nothing_is_written(tmp_path, monkeypatch):
    """By default into runs/gpu; files of an earlier visit stay as they were."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "rows.jsonl").write_text("of an earlier visit\n")
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    for options in ([], ["--out", "earlier"]):
        words = ["bash", str(BENCH / "on_gpu.sh"), *options]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (69, "no CUDA device\n")

    # nor by gpu.py alone
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--out", "earlier"]):
        assert gpu.main(["visit", "--stages", "profile", *options]) == 69
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    assert (tmp_path / "earlier" / "rows.jsonl").read_text() == "of an earlier visit\n"
    assert len(list((tmp_path / "earlier").iterdir())) == 1


# -- forks -------------------------------------------------------------------------------------------------------


def worker(tmp_path, work, what="stage"):
    journal = gpu_workers.Journal(tmp_path, {"commit": "c"})
    return gpu_workers.Worker(what, what, work, journal, tmp_path), journal


def test_a_job_that_kills_its_process_costs_no_other(tmp_path):
    def work(worker):
        for job in ("one", "two", "three"):
            if job in worker.lost or job in worker.journal.done("stage"):
                continue
            worker.underway(job)
            if job == "two":
                os.kill(os.getpid(), signal.SIGKILL)
            worker.journal.add("stage", job, {"status": "ok"})
            worker.underway("")

    one, _ = worker(tmp_path, work)
    gpu_workers.run([one], time.time() + 60)
    found = {row["job"]: row for row in gpu_workers.read(tmp_path / "rows.jsonl")}
    assert {job: row["status"] for job, row in found.items()} == {"one": "ok", "two": "error", "three": "ok"}
    assert "died (status -9)" in found["two"]["note"]


def test_a_job_that_hangs_ends_with_its_stage(tmp_path):
    def work(worker):
        worker.underway("stuck")
        time.sleep(600)

    began = time.monotonic()
    one, _ = worker(tmp_path, work)
    gpu_workers.run([one], time.time() + 0.3)
    assert time.monotonic() - began < 10
    assert [(row["job"], row["note"]) for row in gpu_workers.read(tmp_path / "rows.jsonl")] == [
        ("stuck", "out of time")
    ]


def test_a_test_that_kills_its_process_does_not_stop_the_others(tmp_path, monkeypatch):
    (tmp_path / "test_three.py").write_text(
        "import os, signal\n"
        "def test_one(): pass\n"
        "def test_two(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_three(): assert 1 == 2\n"
    )
    monkeypatch.setattr(gpu_visit, "DRY_TESTS", ([str(tmp_path / "test_three.py")], "test"))
    visit = gpu_visit.Visit(tmp_path, tmp_path, True, gpu_workers.Journal(tmp_path, {}))
    visit.tests("tests-a", time.time() + 60)
    found = {row["job"].split("::")[-1]: row for row in gpu_workers.read(tmp_path / "rows.jsonl")}
    assert {name: row["status"] for name, row in found.items()} == {
        "test_one": "passed", "test_two": "error", "test_three": "failed",
    }  # fmt: skip
    assert "assert 1 == 2" in found["test_three"]["note"]


def test_names_are_claimed_once(tmp_path):
    first = gpu_workers.claimed(tmp_path / "claims", "abc")
    assert next(first) == "a"
    assert list(gpu_workers.claimed(tmp_path / "claims", "abc")) == ["b", "c"]
    assert list(first) == []


# -- the race ----------------------------------------------------------------------------------------------------


def test_a_wrong_result_has_no_speed():
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
    rows, told = [], []
    rows = race(CASE, [right, *wrong], CPU, seconds=0.0, dry=True, found=lambda row: told.append(row["contestant"]))
    assert [row["status"] for row in rows] == ["ok", "FAILED", "FAILED", "missing", "error"]
    assert told == [row["contestant"] for row in rows]
    assert rows[0]["times_eager"] == 1.0
    assert rows[0]["untrusted_seconds"] == ""
    for row in rows[1:]:
        assert row["times_eager"] == row["seconds"] == row["chain_steps_per_s"] == row["times_peer"] == ""
        assert row["peer"] == ""
    # its time is in a separate column, with the size of its error
    assert rows[1]["untrusted_seconds"] > 0
    assert rows[1]["error_over_allowed"] > 10
    assert math.isnan(rows[2]["error_over_allowed"])
    assert rows[3]["untrusted_seconds"] == rows[4]["untrusted_seconds"] == ""

    # nothing is compared with an eager loop that is itself wrong
    rows = race(CASE, [Contestant("eager", "float32", slipped), Contestant("x", "float32", eager)], CPU, seconds=0.0)
    assert [row["status"] for row in rows] == ["FAILED", "ok"]
    assert rows[1]["seconds"] > 0
    assert rows[1]["times_eager"] == ""


def test_a_contestant_that_killed_a_process_is_not_tried_again():
    contestants = [Contestant("eager", "float32", eager), Contestant("graph", "float32", eager)]
    rows = race(CASE, contestants, CPU, lost=[f"{CASE.name}, graph float32"], seconds=0.0)
    assert [row["status"] for row in rows] == ["ok", "error"]


def test_past_its_time_no_contestant_is_begun():
    assert race(CASE, [Contestant("eager", "float32", eager)], CPU, seconds=0.0, until=time.time() - 1) == []


def test_noise_is_gated_too():
    """A contestant of fastebm with the right gradient and other noise has no speed."""
    rows = race(CASE, [Contestant("fastebm", "float32", eager)], CPU, seconds=0.0)
    assert [row["status"] for row in rows] == ["FAILED"]
    assert rows[0]["error_over_allowed"] > 1


def test_a_peer_is_at_least_as_exact():
    """bf16x3 is compared with float32, bf16 with whatever is fastest."""
    seconds = {("eager", "float32"): 8.0, ("compile", "tf32"): 4.0, ("compile", MM_BF16): 2.0}
    ours = {("fastebm-triton", precision): 1.0 for precision in ("bf16x3", "tf32", "bf16")}
    found = beside_peers({**seconds, **ours})
    assert [found[key]["peer"] for key in ours] == ["eager float32", "compile tf32", f"compile {MM_BF16}"]


def test_bf16_products_of_pytorch_pass_their_gate():
    """The peer of fastebm's bf16 row: its gate allows for its rounding."""
    p = Problem(Case(64, (32, 32), 512, 4), CPU, dry=True)
    row = gate(p, Contestant("compile", MM_BF16, compiled_at(MM_BF16)))
    assert row["correct"] == "yes"
    assert row["allowed"] > 100 * p.allowed("float32")


# -- launches ------------------------------------------------------------------------------------------------------


def test_the_sweep_tries_the_shipped_launch_first_and_one_stage_before_more():
    case = Case(784, (256, 128), 65_536)
    for precision in ("bf16x3", "bf16"):
        found = launches.candidates(case, precision, 90)
        assert found[0] == launches.choose_launch(784, ((256, 128),), precision, 90)
        stages = [launch.num_stages for launch in found[1:]]
        assert stages == sorted(stages)
        assert len(set(found)) == len(found)
        assert all(launch.own_chains for launch in found if launch.in_memory)


def test_a_shipped_kernel_that_is_wrong_is_found(monkeypatch):
    kernel = launches.Kernel(3, (16,), "bf16x3")
    sample = launches.sample

    def checked(change):
        def changed(p, precision, steps, noise_std, **options):
            done = sample(p, precision, steps, noise_std, **options)
            return (change(done[0], noise_std), done[1]) if isinstance(done, tuple) else change(done, noise_std)

        monkeypatch.setattr(launches, "sample", changed)
        return launches.check(kernel, 70, CPU, True)["status"]

    def last_chain_off(x, noise_std):
        x[-1, 0] += 1e-3
        return x

    calls = iter(range(100))
    assert checked(lambda x, noise_std: x) == "ok"
    assert checked(last_chain_off) == "FAILED"
    assert checked(lambda x, noise_std: x + 1e-2 * (noise_std > 0)) == "FAILED"
    assert checked(lambda x, noise_std: x + 1e-6 * next(calls) * (noise_std > 0)) == "FAILED"  # other bits each time


def test_an_evaluation_that_is_wrong_is_found(monkeypatch):
    """By its gradient, and by a sampler that it moves elsewhere."""
    gradient = Evaluation.gradient
    both = Evaluation.value_and_gradient
    sampled = next(sampled for sampled in launches.DRY_SAMPLED if sampled[0] == "NUTS")
    assert launches.check(launches.Kernel(3, (16,), "bf16x3"), 70, CPU, True)["status"] == "ok"
    assert launches.time_sampler(sampled, CPU, 0.0, True)["status"] == "ok"
    monkeypatch.setattr(Evaluation, "gradient", lambda self, x: 1.1 * gradient(self, x))
    monkeypatch.setattr(Evaluation, "value_and_gradient", lambda self, x: (both(self, x)[0], 1.1 * both(self, x)[1]))
    assert launches.check(launches.Kernel(3, (16,), "bf16x3"), 70, CPU, True)["status"] == "FAILED"
    assert launches.time_sampler(sampled, CPU, 0.0, True)["status"] == "FAILED"


def test_contestants_of_a_gpu():
    assert (gpu_visit.ON_GPU[0].name, gpu_visit.ON_GPU[0].precision) == ("eager", "float32")
    assert len({(c.name, c.precision) for c in CONTESTANTS}) == len(CONTESTANTS)
