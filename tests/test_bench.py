"""The benchmark suite: wrong contestants are found out, the clock takes turns, rows say all that was measured.

And its scripts write nothing that nobody asked for.
"""

import contextlib
import copy
import csv
import dataclasses
import importlib
import importlib.util
import io
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from fastebm.bench import breakdown, compilation, efficiency, limits, plot, race, rows, run, tables, training
from fastebm.bench import pool as pools
from fastebm.bench.cases import CASES, CLAMP, EFFICIENCY, QUICK, SHOWN, SUITE, TABLE, Case, TrainingCase
from fastebm.bench.clock import MIN_ROUNDS, interleaved, quartiles
from fastebm.bench.contestants import CONTESTANTS, Contestant, eager, taking_part
from fastebm.bench.problem import LAW_ALPHA, SEED, Missing, Problem, law_case, law_p_value, law_problem
from torch.utils.flop_counter import FlopCounterMode

import fastebm
from fastebm import cli
from fastebm import rng as noise

CPU = torch.device("cpu")
TINY = Case(3, (16,), 70, 4)
NAMES = ("eager", "closed-form", "compile", "fastebm", "fastebm-reference")
HERE = [c for c in taking_part(CPU) if c.name in NAMES and c.precision == "float32"]
# peers that are installed; the test environment needs none
for _name, _package in (("torchebm", "torchebm"), ("ebmkit", "ebm"), ("jax", "jax"), ("blackjax", "blackjax")):
    if importlib.util.find_spec(_package) is not None:
        HERE.append(next(c for c in CONTESTANTS if c.name == _name))


def named(*names):
    return [c for c in taking_part(CPU) if c.name in names]


# --- the gate ---


def no_noise(p, noise_std):
    return p, 0.0


def noise_times_root_2(p, noise_std):
    return p, noise_std * math.sqrt(2)


def with_case(**changes):
    """The problem as a contestant that slips would take it: the truth still comes from the right one."""

    def mutated(p, noise_std):
        wrong = copy.copy(p)
        wrong.case = dataclasses.replace(p.case, **{k: f(p.case) for k, f in changes.items()})
        return wrong, noise_std

    return mutated


MUTANTS = {
    "no noise": no_noise,
    "noise times root 2": noise_times_root_2,
    "gradient of the mean": with_case(drift=lambda case: case.drift / case.n_chains),
    "step halved": with_case(drift=lambda case: case.drift / 2),
    "no clamp": with_case(clamp=lambda case: None),
}


@pytest.mark.parametrize("contestant", HERE, ids=lambda c: c.name)
def test_the_gate_lets_the_right_pass_and_rejects_every_mutant(contestant):
    p = Problem(TINY, CPU, dry=True)
    row = race.gate(p, contestant)
    assert row["correct"] == "yes"
    assert row["error"] <= row["allowed"] < 1e-5
    for name, mutate in MUTANTS.items():

        def prepare(p, steps, noise_std, mutate=mutate):
            p, noise_std = mutate(p, noise_std)
            return contestant.prepare(p, steps, noise_std)

        wrong = dataclasses.replace(contestant, prepare=prepare)
        assert race.gate(p, wrong)["correct"] == "no", name


@pytest.mark.parametrize("case", [Case(16, (4,), 70, 2, kind="conv"), *EFFICIENCY.values()], ids=lambda c: c.kind)
def test_the_gate_on_energies_that_are_no_mlp(case):
    p = Problem(dataclasses.replace(case, n_chains=70), CPU, dry=True)
    for contestant in HERE:
        if contestant.name == "closed-form":
            with pytest.raises(Missing, match="MLP"):
                race.gate(p, contestant)
        elif contestant.name not in ("compile", "blackjax"):  # the first is eager's code, the second jax'
            assert race.gate(p, contestant)["correct"] == "yes", contestant.name


def test_the_law_finds_noise_that_is_shared_or_reused():
    p = law_problem(law_case(TINY), CPU, True)
    n, dim, b = p.case.n_chains, p.case.dim, p.case.noise_std
    generator = torch.Generator().manual_seed(5)

    def chain(draw):
        x, first = p.x0, draw()
        for _ in range(p.case.steps):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(p.energy(x).sum(), x)
            noise = first if draw is reused else draw()
            x = (x.detach() - p.case.drift * grad + b * noise).clamp(*p.case.clamp)
        return law_p_value(x, p.copies)

    def right():
        return torch.randn(n, dim, generator=generator)

    def reused():
        return right()

    def shared_by_chains():
        return torch.randn(1, dim, generator=generator).expand(n, dim)

    def shared_by_dims():
        return torch.randn(n, 1, generator=generator).expand(n, dim)

    assert chain(right) > 0.01
    assert all(chain(wrong) < LAW_ALPHA for wrong in (reused, shared_by_chains, shared_by_dims))
    assert law_p_value(torch.full((n, dim), torch.nan), p.copies) == 0.0


# --- the clock ---


def test_runs_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(runs, 0.0, CPU)
    assert "".join(order) == "abc" * MIN_ROUNDS
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", MIN_ROUNDS)
    order.clear()
    interleaved(runs, 60.0, CPU, rounds=5)
    assert "".join(order) == "abc" * 5


def test_no_round_begins_past_the_end():
    """The least number of rounds gives way to it: there is one at least."""
    times = interleaved({"a": lambda: None}, 60.0, CPU, until=0.0)
    assert len(times["a"]) == 1


def test_what_runs_out_of_memory_drops_out():
    def hungry():
        raise torch.OutOfMemoryError("no more")

    times = interleaved({"hungry": hungry, "modest": lambda: None}, 0.0, CPU)
    assert list(times) == ["modest"]


def test_quartiles():
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


# --- ratios and limits ---


def test_ratios():
    case = Case(3, (16,), 100, 10)
    ours = race._timed(case, [2.0, 1.0, 2.0], "ok", [4.0, 8.0, 6.0])
    assert (ours["seconds"], ours["rounds"], ours["chain_steps_per_s"]) == (2.0, 3, 500.0)
    assert (ours["eager_seconds"], ours["times_eager"]) == (6.0, 3.0)
    seconds = {("eager", "float32"): 6.0, ("jax", "float32"): 3.0, ("fastebm", "float32"): 2.0}
    beside = race.beside_peers(seconds)
    assert beside["fastebm", "float32"] == {"peer": "jax float32", "peer_seconds": 3.0, "times_peer": 1.5}
    assert beside["eager", "float32"]["times_peer"] == 0.5
    # without the eager loop there is nothing to compare with, and without peers none is named
    assert "times_eager" not in race._timed(case, [2.0], "ok", None)
    assert race.beside_peers({("fastebm", "float32"): 2.0}) == {("fastebm", "float32"): {}}


def test_the_limit_of_a_case():
    sticks = {
        ("FLOPs", "float32", 100.0): [4.0, 2.0, 4.0],  # 50 a second, in the fastest round
        ("FLOPs", "bf16", 600.0): [1.0],
        ("normals", "slow", 10.0): [5.0],
        ("normals", "fast", 20.0): [5.0],  # 4 a second
        ("bytes", "copy", 30.0): [3.0],
    }
    times = {limits.Yardstick(*key, run=lambda: None): t for key, t in sticks.items()}
    found = limits.rates({**times, "a contestant": [1.0]})
    assert found == limits.Rates({"float32": 50.0, "bf16": 600.0}, 4.0, "fast", 10.0)
    assert found.limit_seconds(200.0, 8.0, "float32") == 200 / 50 + 8 / 4
    assert found.limit_seconds(200.0, 8.0, "bf16x3") == 200 / 200 + 8 / 4
    row = race._limits(Case(2, (16,), 10, 5), found, 7.0, "float32", 56.0)
    assert row["limit_seconds"] == 7 * 50 / 50 + 2 * 50 / 4
    assert row["of_limit"] == 32.0 / 56.0


def test_flops_of_an_mlp():
    """Forward and back through each layer, 2 FLOPs a weight and way."""
    assert limits.flops_per_chain_step(Problem(Case(64, (128, 32), 5), CPU)) == 4 * (64 * 128 + 128 * 32 + 32)


def test_a_case_past_the_budget_or_the_memory_is_not_begun():
    found = limits.Rates({"float32": 1e9}, 1e8, "torch.randn", 1e10)
    assert race.why_not(Case(*TABLE, 256), 8, found, 300.0, 1e9) is None
    assert "8 contestants would take" in race.why_not(Case(*TABLE, 1 << 20), 8, found, 300.0, 1e12)
    assert "GiB of memory" in race.why_not(Case(*TABLE, 1 << 20), 8, found, math.inf, 1e9)


def test_a_contestant_past_its_share_is_skipped():
    found = race.race(TINY, named("eager"), CPU, seconds=0.0, budget=1e-6)
    assert [row["status"] for row in found] == ["skipped"]
    assert "share of the budget" in found[0]["note"]
    assert found[0]["seconds"] == ""
    found = training.race(SMALL, ["fastebm"], CPU, seconds=0.0, budget=1e-6)
    assert [(row["status"], row["seconds"]) for row in found] == [("skipped", "")]
    if importlib.util.find_spec("arviz_stats") is not None:
        found = efficiency.race(EFFICIENCY["mixture"], named("eager"), CPU, seconds=0.0, budget=1e-6)
        assert [(row["status"], row["ess_per_s"]) for row in found] == [("skipped", "")]


# --- what is missing, what broke ---


def test_missing_peers_are_reported(monkeypatch):
    for package in ("jax", "torchebm.core", "torchebm.losses", "ebm", "blackjax", "arviz_stats.base"):
        monkeypatch.setitem(sys.modules, package, None)
    names = [c.name for c in named("eager", "graph", "torchebm", "ebmkit", "jax", "blackjax")]
    found = race.race(TINY, named(*names), CPU, seconds=0.0)
    assert [row["contestant"] for row in found] == names
    notes = {row["contestant"]: row["note"] for row in found if row["status"] == "missing"}
    assert list(notes) == names[1:]
    assert all(notes[name] == f"{name} is not installed" for name in ("jax", "torchebm", "ebmkit"))
    assert "missing: jax is not installed" in race.brief(next(row for row in found if row["contestant"] == "jax"))

    found = training.race(TrainingCase(40, 3, (16,), 8, 2), list(training.TRAINERS), CPU, seconds=0.0)
    assert [row["contestant"] for row in found if row["status"] == "missing"] == ["torchebm", "ebmkit"]
    found = efficiency.race(EFFICIENCY["mixture"], named("eager"), CPU)
    assert found[0]["note"] == "arviz-stats is not installed"


# --- training ---

SMALL = TrainingCase(600, dim=8, widths=(16,), batch_size=256, steps=2)


def halved(case):
    return dataclasses.replace(case, drift=case.drift / 2)


@pytest.mark.parametrize("name", list(training.TRAINERS))
def test_the_training_gate(name):
    make = training.TRAINERS[name]
    try:
        assert training.gate(SMALL, make, CPU)["correct"] == "yes"
    except Missing as why:
        pytest.skip(str(why))

    def forgetful(case, device):
        trainer = make(case, device)
        before = trainer.states().clone()
        return dataclasses.replace(trainer, states=lambda: before)

    def other_loss(case, device):
        trainer = make(case, device)

        def step(real):
            negatives = trainer.step(real)
            trainer.model[-1].bias.grad.zero_()  # as if there were no regulariser
            return negatives

        return dataclasses.replace(trainer, step=step)

    changed = {
        "no noise": lambda case, device: make(dataclasses.replace(case, noise_std=0.0), device),
        "noise times root 2": lambda case, device: make(
            dataclasses.replace(case, noise_std=case.noise_std * math.sqrt(2)), device
        ),
        "step halved": lambda case, device: make(halved(case), device),
        "forgetful": forgetful,
        "other loss": other_loss,
    }
    for mutant, wrong in changed.items():
        assert training.gate(SMALL, wrong, CPU)["correct"] == "no", mutant


def test_a_training_race():
    found = training.race(SMALL, ["list-buffer", "fastebm"], CPU, seconds=0.0)
    assert [row["status"] for row in found] == ["ok", "ok"]
    assert found[0]["times_tutorial"] == 1.0
    assert found[1]["times_tutorial"] == found[0]["seconds"] / found[1]["seconds"]
    assert found[1]["tutorial_seconds"] == found[0]["seconds"]


# --- pools ---


def test_a_race_of_pools(tmp_path, monkeypatch):
    for package in ("torchebm.losses", "ebm"):
        monkeypatch.setitem(sys.modules, package, None)
    asked = []

    def memory(*arguments):
        asked.append(arguments)
        return {"state_bytes": 1, "peak_bytes": 2**20, "host_bytes": 2**20}

    monkeypatch.setattr(pools, "memory", memory)
    for name in ("QUICK_POOL", "POOL"):
        monkeypatch.setattr(
            f"fastebm.bench.cases.{name}", {n: dataclasses.replace(SMALL, n_chains=n) for n in (600, 900)}
        )
    assert pools.main(["--quick", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = {(int(row["n_chains"]), row["contestant"]): row for row in read(tmp_path / "pool.csv")}
    missing = [key for key, row in found.items() if row["status"] == "missing"]
    assert missing == [(n, name) for n in (600, 900) for name in ("torchebm", "ebmkit")]
    ours, listed = found[900, "fastebm"], found[900, "list-buffer"]
    assert (listed["times_list"], found[600, "fastebm"]["times_smallest"]) == ("1", "1")
    cost = "draw_and_write_seconds"
    assert float(ours["times_list"]) == pytest.approx(float(listed[cost]) / float(ours[cost]), rel=1e-4)
    assert float(ours["chain_steps_per_s"]) == pytest.approx(256 * 2 / float(ours["sample_seconds"]), rel=1e-4)
    assert ours["correct"] == "yes"
    assert {"cpu", "commit", "torchebm", "training_step_q1", "peak_bytes", "threads"} <= ours.keys()
    assert (pools.UINT8, 900, 2, "cpu") in asked
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| 900 | fastebm-uint8 |" in tables.pool()
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "none")
    assert tables.pool() == "No rows are committed yet: `python bench/pool.py --out bench/results` makes them."


def test_draws_and_writes_of_a_pool_are_those_of_its_samples():
    """What the bench times is what ``sample`` does, but for the steps."""
    a, b = (training.fastebm_pool(dataclasses.replace(SMALL, steps=0), CPU) for _ in range(2))
    for _ in range(3):
        x = a.draw()
        a.put(x)
        assert torch.equal(x, b.sample())
    assert torch.equal(a.states(), b.states())


# --- effective samples ---


def test_effective_samples():
    pytest.importorskip("arviz_stats", reason="a package of the extra [bench]")
    case = EFFICIENCY["gaussian"]
    found = efficiency.race(case, named("eager"), CPU, seconds=0.0, draws=50)
    assert found[0]["status"] == "ok"
    assert found[0]["ess_per_s"] == found[0]["ess"] / found[0]["seconds"]
    assert found[0]["draws"] == 50 * MIN_ROUNDS
    # Exactly: x_{k+1} = B x_k + noise between draws, so coordinate i has tau_i = [(I + B)(I - B)^-1 S]_ii / S_ii.
    # 150 draws a chain flatter it by some 10 %.
    gaussian = Problem(case, CPU).energy
    one = torch.eye(case.dim, dtype=torch.float64)
    between = torch.linalg.matrix_power(one - case.drift * gaussian.precision.double(), case.steps)
    law = gaussian.stationary_covariance(case.drift, case.noise_std)
    tau = ((one + between) @ torch.linalg.inv(one - between) @ law).diagonal() / law.diagonal()
    assert found[0]["ess_per_step"] * case.steps == pytest.approx(float(1 / tau.max()), rel=0.15)


@pytest.mark.parametrize("kind", list(EFFICIENCY))
def test_draws_of_another_law_are_found(kind):
    pytest.importorskip("arviz_stats", reason="a package of the extra [bench]")
    _, ess = efficiency.effective_sizes()
    p = Problem(dataclasses.replace(EFFICIENCY[kind], n_chains=20_000), CPU)
    x = p.x0.reshape(200, 100, -1)  # independent draws of the law
    assert efficiency.worst_deviation(p, x, ess) < efficiency.DEVIATION
    wrong = x * 1.05 if kind == "gaussian" else torch.where(x[..., :1] > -0.5, x, -x)
    assert efficiency.worst_deviation(p, wrong, ess) > efficiency.DEVIATION


# --- first calls ---


def test_first_calls_in_this_process():
    threads = torch.get_num_threads()
    found = compilation.first_calls("compile-table", "eager", "float32", "cpu", threads)
    assert min(found["first"], found["later"]) > 0
    assert "CUDA device" in compilation.first_calls("compile-table", "graph", "float32", "cpu", threads)["missing"]


def test_two_processes_share_their_caches_and_no_others(monkeypatch):
    seen = []

    def pretended(command, *, env, **options):
        seen.append((command, env["NUMBA_CACHE_DIR"]))
        first = 9.0 if len(seen) % 2 else 1.0
        return subprocess.CompletedProcess(command, 0, json.dumps({"first": first, "later": 0.5}), "")

    monkeypatch.setattr(compilation.subprocess, "run", pretended)
    found = list(compilation.measure("compile-table", [("eager", "float32"), ("jax", "float32")], "cpu", 1))
    assert [row["first_call_seconds"] for row in found] == [9.0, 9.0]
    assert [row["second_process_seconds"] for row in found] == [1.0, 1.0]
    assert [(row["first_call_more"], row["second_process_more"]) for row in found] == [(8.5, 0.5)] * 2
    caches = [folder for _, folder in seen]
    assert caches[0] == caches[1] != caches[2] == caches[3]
    assert seen[0][0][1:] == ["-m", "fastebm.bench.compilation", "compile-table", "eager", "float32", "cpu", "1"]


@pytest.mark.parametrize("device", list(compilation.WAYS))
def test_first_calls_are_of_contestants_there_are(device):
    there = {(c.name, c.precision) for c in taking_part(torch.device(device))}
    assert set(compilation.WAYS[device]) <= there


# --- the command, its rows, its figures ---


@pytest.fixture
def tiny_suite(monkeypatch):
    for sizes in (limits.SIDE, limits.NUMBERS, limits.COPIED):
        monkeypatch.setitem(sizes, "cpu", 1024)
    other = dataclasses.replace(TINY, n_chains=90)
    for key, case in (("tiny-70", TINY), ("tiny-90", other)):
        monkeypatch.setitem(run.STEPS, key, case)
        monkeypatch.setitem(run.SUITE, key, case)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def steps_of(folder):
    """Without the rows of bf16, which not every CPU multiplies."""
    return [row for row in read(folder / "steps.csv") if row["precision"] == "float32"]


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
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def body(table):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        return [cells for cells in lines if len(cells) > 1][2:]

    assert [(row[0], row[2] == "", row[4] == "") for row in body(tables.breakdown())] == [
        ("mlp", False, True),
        ("module", True, False),
    ]
    assert [row[:3] for row in body(tables.breakdown_threads())] == [["mlp", "2", "2.00"], ["module", "2", "2.00"]]
    rates = [96 * 3 / whole for (kind, _, threads), (whole, *_) in cases.items() if (kind, threads) == ("steps", 1)]
    assert body(tables.cores()) == [
        [case, f"{rate:.3g}", f"{2 * rate:.3g}", "2.00"] for case, rate in zip(("mlp", "module"), rates, strict=True)
    ]
    assert [row[0] for row in body(tables.breakdown_pools())] == ["pool-300"]
    assert body(tables.breakdown_first_calls()) == [
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
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert {row["threads"] for row in rows.most_threads(both) if row["case"] == "tiny-90"} == {"2"}

    monkeypatch.chdir(tmp_path)
    assert plot.main(["--results", "."]) == 0
    for name in ("speedup", "throughput", "roofline"):
        assert (tmp_path / "runs" / "bench" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "SHOWN", ("tiny-70", "not run"))
    ours = next(row for row in both if (row["case"], row["contestant"]) == ("tiny-70", "fastebm"))
    times, limit = float(ours["times_eager"]), float(ours["of_limit"])
    line = f"| 3-[16] | 70 | {times:.2f} | eager | {times:.2f} | {100 * limit:.0f} % |"  # of peers only eager took part
    assert line in tables.speed()

    text = tables.steps()
    assert "| tiny-70 | fastebm float32 |" in text
    assert "- graph, missing in tiny-70, tiny-90: CUDA graphs need a CUDA device" in text
    assert tables.training() == tables._none("run.py")


def test_a_wrong_contestant_ends_in_status_1_and_has_no_time(tiny_suite, tmp_path, capsys, monkeypatch):
    wrong = Contestant("eager", "float32", lambda p, steps, noise_std: eager(p, steps, 0.0))
    monkeypatch.setattr("fastebm.bench.contestants.CONTESTANTS", (wrong, *named("closed-form")))
    options = ["--device", "cpu", "--budget", "60", "--threads", "1", "--out", str(tmp_path)]
    assert run.main(["--cases", "tiny-70", *options]) == 1
    status = {row["contestant"]: row for row in read(tmp_path / "steps.csv")}
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


# --- the scripts ---

ROOT = Path(__file__).parent.parent
MAIN = 'if __name__ == "__main__":\n'
SCRIPTS = [path.stem for path in sorted((ROOT / "bench").glob("*.py")) if MAIN in path.read_text(encoding="utf-8")]
COMMANDS = [[name] for name in SCRIPTS] + [["gpu", name] for name in ("visit", "rows", "launch")]
linux = pytest.mark.skipif(sys.platform != "linux", reason="triton and GPUs: Linux")


def committed():
    """What a script must not touch unless told to: {path: content}."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*"), *(ROOT / "bench" / "results").rglob("*")]
    return {path: path.read_bytes() for path in files if path.is_file()}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory of its own, and committed files that stay as they are."""
    before = committed()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert committed() == before


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def main_of(name):
    return importlib.import_module(f"fastebm.bench.{name}").main


@linux
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_script_explains_itself_and_refuses_what_it_does_not_know(command, elsewhere, capsys):
    """In this process: importing torch for every script would take a minute. The guard is compared as text."""
    name, *options = command
    assert (ROOT / "bench" / f"{name}.py").read_text(encoding="utf-8").endswith(f"\n\n{MAIN}    sys.exit(main())\n")
    with pytest.raises(SystemExit, match=r"^0$"):
        main_of(name)([*options, "--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: ")
    if "--out" in said and command != ["gpu"]:
        assert "(default: runs/" in " ".join(said.split())
    # and no abbreviations: --hel would print the help
    for unknown in ("--no-such-option", "--hel"):
        with pytest.raises(SystemExit, match=r"^2$"):
            main_of(name)([*options, unknown])
    assert not files(elsewhere)


@linux
@pytest.mark.parametrize("option", ["--help", "--no-such-option"])
def test_the_same_in_a_process_of_its_own(option, elsewhere):
    script = [sys.executable, str(ROOT / "bench" / "resources.py"), option]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == (0 if option == "--help" else 2)
    assert "usage: resources.py" in done.stdout + done.stderr
    assert not files(elsewhere)


@linux
@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("breakdown", ("steps", "pools", "first_calls")),
        ("precision", ("rows_of",)),
        ("recipes", ("run",)),
        ("resources", ("compile_rows",)),
        ("pool", ("race",)),
    ],
)
def test_rows_go_to_runs_unless_told(name, work, elsewhere, monkeypatch):
    module = importlib.import_module(f"fastebm.bench.{name}")
    about = {"n_chains": 3, "contestant": "", "steps": 2, "device": "cpu", "status": "missing", "note": "not here"}
    row = {"data": "moons", "seed": 0, "two_sample_accuracy": 0.5, "wall_seconds": 1.0, **about}
    for function in work:
        monkeypatch.setattr(module, function, lambda *_: row if name == "recipes" else [row])
    assert module.main([]) == 0
    assert module.main(["--out", "there"]) == 0
    assert module.main(["--out", "there"]) == 0  # the same rows again
    assert files(elsewhere) == {f"runs/bench/{name}.csv", f"there/{name}.csv"}
    assert read(elsewhere / "there" / f"{name}.csv") == read(elsewhere / "runs" / "bench" / f"{name}.csv")


@pytest.mark.parametrize(
    ("module", "work", "result", "ask", "asked"),
    [
        (
            *(breakdown, "parts_of_a_first_call", {"whole": 2.0}),
            *(lambda: breakdown.first_calls("compile-table", 1), ("compile-table",)),
        ),
        (
            *(compilation, "first_calls", {"first": 9.0, "later": 1.0}),
            lambda: list(compilation.measure("compile-table", [("eager", "float32")], "cpu", 1)),
            ("compile-table", "eager", "float32", "cpu", 1),
        ),
        (
            *(pools, "measure_memory", {"peak_bytes": 1}),
            *(lambda: pools.memory("fastebm", 600, 2, "cpu"), ("fastebm", 600, 2, "cpu")),
        ),
    ],
    ids=["breakdown", "compilation", "pool"],
)
def test_a_script_understands_what_it_asks_of_a_second_process(module, work, result, ask, asked, monkeypatch):
    seen = []

    def here(command, **options):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = module.main(command[3:])
        return subprocess.CompletedProcess(command, status, out.getvalue(), "")

    monkeypatch.setattr(module, work, lambda *arguments: seen.append(arguments) or result)
    monkeypatch.setattr(module.subprocess, "run", here)
    assert ask()
    assert set(seen) == {asked}


def test_tables_are_written_only_when_asked(elsewhere, monkeypatch, capsys):
    for file in {file for file, _, _ in tables.TABLES}:
        (elsewhere / file).parent.mkdir(exist_ok=True)
        (elsewhere / file).write_bytes((ROOT / file).read_bytes())
    for path in (ROOT / "docs").glob("*.png"):  # the tables show the figures that are there
        (elsewhere / "docs" / path.name).touch()
    monkeypatch.setattr(tables, "ROOT", elsewhere)
    readme = elsewhere / "README.md"
    right = readme.read_text(encoding="utf-8")
    wrong = right.replace("<!-- digits -->\n", "<!-- digits -->\nstale\n")
    readme.write_text(wrong, encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert "README.md: digits" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^2$"):
        tables.main([])
    assert readme.read_text(encoding="utf-8") == wrong
    assert tables.main(["--write"]) == 0
    assert readme.read_text(encoding="utf-8") == right
    assert tables.main(["--check"]) == 0
