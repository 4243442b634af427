"""The benchmark suite: the gates find wrong contestants, the clock takes turns, ratios and limits are right."""

import copy
import dataclasses
import importlib
import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
from fastebm.bench import compilation, efficiency, limits, markdown, race, rows, tables_cpu, training
from fastebm.bench import pool as pools
from fastebm.bench.cases import EFFICIENCY, TABLE, Case, TrainingCase
from fastebm.bench.clock import MIN_ROUNDS, interleaved, quartiles
from fastebm.bench.contestants import CONTESTANTS, taking_part
from fastebm.bench.problem import LAW_ALPHA, Missing, Problem, law_case, law_p_value, law_problem

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
    """The problem with changed numbers, for a wrong contestant: it is compared with the original problem."""

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
        elif contestant.name not in ("compile", "blackjax"):  # the first runs eager's code, the second that of jax
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
    """``until`` overrides the minimum number of rounds: only one is made."""
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
    """Forward and back through each layer, 2 FLOPs per weight and direction."""
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
    found = {(int(row["n_chains"]), row["contestant"]): row for row in rows.read(tmp_path / "pool.csv")}
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
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert "| 900 | fastebm-uint8 |" in tables_cpu.pool()
    monkeypatch.setattr(markdown, "RESULTS", tmp_path / "none")
    assert tables_cpu.pool() == "No rows are committed yet: `python bench/pool.py --out bench/results` makes them."


def test_draws_and_writes_of_a_pool_are_those_of_its_samples():
    """The bench times what ``sample`` does, without the steps."""
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
    # with 150 draws per chain the estimate is some 10 % too high
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
