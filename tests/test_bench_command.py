"""The command of the benchmark suite: its rows, and the figures and tables that follow from them."""

import dataclasses
import json
import subprocess
import types

import pytest
import torch
from fastebm.bench import breakdown, limits, markdown, plot, rows, run, tables_cpu, training
from fastebm.bench.cases import CASES, CLAMP, EFFICIENCY, QUICK, SHOWN, SUITE, Case, TrainingCase
from fastebm.bench.contestants import CONTESTANTS, Contestant, eager, taking_part
from fastebm.bench.problem import SEED, Problem
from torch.utils.flop_counter import FlopCounterMode

import fastebm
from fastebm import cli
from fastebm import rng as noise

CPU = torch.device("cpu")
TINY = Case(3, (16,), 70, 4)


def named(*names):
    return [c for c in taking_part(CPU) if c.name in names]


@pytest.fixture
def tiny_suite(monkeypatch):
    for sizes in (limits.SIDE, limits.NUMBERS, limits.COPIED):
        monkeypatch.setitem(sizes, "cpu", 1024)
    other = dataclasses.replace(TINY, n_chains=90)
    for key, case in (("tiny-70", TINY), ("tiny-90", other)):
        monkeypatch.setitem(run.STEPS, key, case)
        monkeypatch.setitem(run.SUITE, key, case)


def steps_of(folder):
    """Without the rows of bf16, which not every CPU multiplies."""
    return [row for row in rows.read(folder / "steps.csv") if row["precision"] == "float32"]


def test_the_parts_of_a_step_are_those_of_its_case():
    case = Case(6, (16, 8), 96, 3)
    # On one thread, as the mode counts this thread's products. Its hooks on all modules come after the MLP is read.
    with run.on_threads(1):
        products = breakdown.parts_of_steps(Problem(case, CPU))["products"]
        with FlopCounterMode(display=False) as counter:
            products()
    # all but the head's, whose gradient is its weight
    assert counter.get_total_flops() == 96 * 3 * (limits.flops_per_chain_step(Problem(case, CPU)) - 4 * 8)


def test_the_normals_of_a_step_are_normals():
    call = breakdown.draw_of(5, 3)
    call()
    (out,) = (v for v in call.kept if torch.is_tensor(v) and v.ndim == 3)
    assert torch.equal(out.flatten(1), noise.normal(SEED, noise.Stream.LANGEVIN, torch.arange(5), 0, 12))


def test_the_parts_of_a_draw_and_write_back(monkeypatch):
    built = []
    monkeypatch.setattr(training, "ChainPool", lambda *a, **o: built.append(fastebm.ChainPool(*a, **o)) or built[0])
    case = TrainingCase(300, dim=5, batch_size=8)
    runs = breakdown.parts_of_pools(case)
    (pool,) = built
    before = pool.state_dict()
    for part in ("draws", "take", "put"):
        runs[part]()
        after = pool.state_dict()
        # bytes, as energies are NaN
        assert all(v.numpy().tobytes() == after[k].numpy().tobytes() for k, v in before.items() if torch.is_tensor(v))
    runs["whole"]()
    assert int(pool.steps.sum()) == breakdown.ROUND * case.batch_size * case.steps


def test_the_parts_of_a_first_call(monkeypatch):
    monkeypatch.setattr(breakdown.kernels, "_loaded", {})
    load = breakdown.kernels._load
    parts = breakdown.parts_of_a_first_call("compile-table")
    assert breakdown.kernels._load is load
    assert {"update.draw", "mlp.up_silu", "mlp.down"} < set(parts)
    assert sum(v for k, v in parts.items() if k not in ("whole", "later call")) < parts["whole"]


def test_a_breakdown_adds_up_and_becomes_tables(tmp_path, monkeypatch):
    module = dataclasses.replace(EFFICIENCY["mixture"], n_chains=96, steps=3)
    with run.on_threads(1):
        found = breakdown.steps("mlp", Case(6, (16, 8), 96, 3), seconds=0.0)
        found += breakdown.steps("module", module, seconds=0.0)
        # as on a machine of two
        found += [{**row, "threads": 2, "seconds": float(row["seconds"]) / 2} for row in found]
        found += breakdown.pools("pool-300", TrainingCase(300, dim=5, batch_size=8), seconds=0.0)
        told = json.dumps({"whole": 4.0, "import": 0.5, "update.draw": 2.0, "later call": 0.25})
        monkeypatch.setattr(breakdown.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 0, told, ""))
        found += breakdown.first_calls("compile-table")
    cases = {}
    for row in found:
        cases.setdefault((row["kind"], row["case"], row["threads"]), []).append(float(row["seconds"]))
    assert len(cases) == 6
    assert all(sum(parts) == pytest.approx(whole, rel=1e-4) for whole, *parts in cases.values())

    rows.write(tmp_path / "breakdown.csv", found, rows.provenance("numba"))
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)

    def body(table):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        return [cells for cells in lines if len(cells) > 1][2:]

    assert [(row[0], row[2] == "", row[4] == "") for row in body(tables_cpu.breakdown())] == [
        ("mlp", False, True),
        ("module", True, False),
    ]
    assert [row[:3] for row in body(tables_cpu.breakdown_threads())] == [["mlp", "2", "2.00"], ["module", "2", "2.00"]]
    rates = [96 * 3 / whole for (kind, _, threads), (whole, *_) in cases.items() if (kind, threads) == ("steps", 1)]
    assert body(tables_cpu.cores()) == [
        [case, f"{rate:.3g}", f"{2 * rate:.3g}", "2.00"] for case, rate in zip(("mlp", "module"), rates, strict=True)
    ]
    assert [row[0] for row in body(tables_cpu.breakdown_pools())] == ["pool-300"]
    assert body(tables_cpu.breakdown_first_calls()) == [
        ["whole", "4.00"], ["import", "0.50"], ["update.draw", "2.00"], ["later call", "0.25"], ["rest", "1.25"],
    ]  # fmt: skip


def test_run_writes_rows_from_which_figures_and_tables_follow(tiny_suite, tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    options = ["--contestants", "eager", "fastebm", "graph", "--out", str(tmp_path), "--threads", "1"]
    assert run.main(["--cases", "tiny-*", "--budget", "60", "--device", "cpu", *options]) == 0
    assert torch.get_num_threads() == threads
    said = capsys.readouterr()
    assert "[2/2" in said.err
    assert "chain-steps/s" in said.out
    assert "missing: graph in tiny-70, tiny-90: CUDA graphs need a CUDA device" in said.out

    found = steps_of(tmp_path)
    assert [(row["case"], row["contestant"]) for row in found] == [
        (case, name) for case in ("tiny-70", "tiny-90") for name in ("eager", "fastebm", "graph")
    ]
    ok = [row for row in found if row["status"] == "ok"]
    assert len(ok) == 4
    everything = {"dim", "widths", "n_chains", "steps", "drift", "noise_std", "clamp", "device", "threads", "precision"}
    everything |= {"seconds", "seconds_q1", "seconds_q3", "rounds", "times_eager", "times_peer", "of_limit", "allowed"}
    everything |= {"product_rate", "normal_rate", "bandwidth", "cpu", "torch", "jax", "torchebm", "commit", "date"}
    for row in ok:
        assert not {name for name in everything if row[name] == ""}
        assert float(row["times_eager"]) == pytest.approx(float(row["eager_seconds"]) / float(row["seconds"]), rel=1e-4)
        assert float(row["of_limit"]) == pytest.approx(float(row["limit_seconds"]) / float(row["seconds"]), rel=1e-4)
    assert ok[0]["clamp"] == f"{CLAMP[0]} {CLAMP[1]}"

    # one case again: its rows are replaced, the other's stay
    assert run.main(["--cases", "tiny-70", "--device", "cpu", "--budget", "60", *options]) == 0
    again = steps_of(tmp_path)
    assert len(again) == len(found)
    assert [row["case"] for row in again] == [row["case"] for row in found]  # in their place
    assert [row for row in again if row["case"] == "tiny-90"] == [row for row in found if row["case"] == "tiny-90"]

    # those of one thread beside those of two: the tables and figures of a case take the most threads
    more = [{**row, "threads": "2", "chain_steps_per_s": "1e9"} for row in again if row["case"] == "tiny-90"]
    rows.replace(tmp_path / "steps.csv", more, ("case", "device", "threads"))
    both = steps_of(tmp_path)
    assert len(both) == len(again) + len(more)
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert {row["threads"] for row in rows.most_threads(both) if row["case"] == "tiny-90"} == {"2"}

    monkeypatch.chdir(tmp_path)
    assert plot.main(["--results", "."]) == 0
    for name in ("speedup", "throughput", "roofline"):
        assert (tmp_path / "runs" / "bench" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    monkeypatch.setattr(tables_cpu, "SHOWN", ("tiny-70", "not run"))
    ours = next(row for row in both if (row["case"], row["contestant"]) == ("tiny-70", "fastebm"))
    times, limit = float(ours["times_eager"]), float(ours["of_limit"])
    line = f"| 3-[16] | 70 | {times:.2f} | eager | {times:.2f} | {100 * limit:.0f} % |"  # of peers only eager took part
    assert line in tables_cpu.speed()

    text = tables_cpu.steps()
    assert "| tiny-70 | fastebm float32 |" in text
    assert "- graph, missing in tiny-70, tiny-90: CUDA graphs need a CUDA device" in text
    assert tables_cpu.training() == markdown.none_yet("run.py")


def test_a_wrong_contestant_ends_in_status_1_and_has_no_time(tiny_suite, tmp_path, capsys, monkeypatch):
    wrong = Contestant("eager", "float32", lambda p, steps, noise_std: eager(p, steps, 0.0))
    monkeypatch.setattr("fastebm.bench.contestants.CONTESTANTS", (wrong, *named("closed-form")))
    options = ["--device", "cpu", "--budget", "60", "--threads", "1", "--out", str(tmp_path)]
    assert run.main(["--cases", "tiny-70", *options]) == 1
    status = {row["contestant"]: row for row in rows.read(tmp_path / "steps.csv")}
    assert status["eager"]["status"] == "FAILED"
    assert status["eager"]["seconds"] == ""
    assert status["closed-form"]["times_eager"] == ""
    assert "eager float32 FAILED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "nope"], "no case is called 'nope'; there are toy-4096, table-4096"),
        (["--contestants", "nope"], "no contestant is called 'nope'; there are eager, fastebm"),
        (["--threads", "0", "--cases", "toy-256"], "--threads must be from 1 to"),
        (["--budget", "0", "--cases", "toy-256"], "--budget must be > 0 seconds, got 0"),
    ],
)
def test_bad_arguments_are_told_with_what_there_is(options, message, capsys):
    assert cli.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        run.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_fastebm_bench_is_the_quick_set(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "run", lambda arguments, quick: seen.append(quick) or 0)
    assert cli.main(["bench"]) == 0
    assert cli.main(["bench", "--cases", "toy-256"]) == 0
    assert seen == [True, False]


def test_the_list_names_every_case_and_contestant(capsys):
    assert run.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in (*SUITE, *(c.name for c in CONTESTANTS), *training.TRAINERS))


def test_the_suite_holds_the_cases_of_gpu_sessions_and_a_quick_set():
    assert set(CASES) <= set(run.STEPS.values())
    assert set(QUICK) <= set(SUITE)
    assert set(SHOWN) <= set(run.STEPS)
    kinds = [run.describe(key).split(",")[0] for key in QUICK]
    assert set(kinds) == {"steps", "training", "effective samples", "first calls"}


def test_plot_without_rows(tmp_path, capsys):
    for text, message in ((None, "there is no"), ("case,device,status,contestant,precision\n", "no timed row")):
        if text is not None:
            (tmp_path / "steps.csv").write_text(text)
        with pytest.raises(SystemExit):
            plot.main(["--results", str(tmp_path)])
        assert message in capsys.readouterr().err


def test_rows_may_lack_columns(tmp_path):
    rows.write(tmp_path / "a.csv", [{"a": 1}, {"b": 0.1234567}], {"commit": "c"})
    assert (tmp_path / "a.csv").read_text() == "a,b,commit\n1,,c\n,0.1234567,c\n"
    assert rows.rounded({"b": 0.12345678, "n": 3, "s": "x"}) == {"b": "0.123457", "n": 3, "s": "x"}


def test_the_memory_that_is_free():
    assert 0 < run.free_memory(types.SimpleNamespace(type="cpu"))
