"""The comparison of samplers: its laws are known, wrong draws have no speed, and speeds are those of the draws."""

import dataclasses

import pytest
import torch
from fastebm.bench import markdown, rows, run, sampling, sampling_parts, sampling_targets, tables_cpu, trajectories
from fastebm.bench.cases import SAMPLING, SamplingCase
from fastebm.bench.efficiency import DEVIATION, deviations
from fastebm.bench.problem import Missing, gradient_of
from fastebm.bench.sampling_contestants import CONTESTANTS, Contestant, Drawn, tuned
from fastebm.bench.sampling_targets import Target

import fastebm
from fastebm.rng import Noise
from fastebm.threads import threads

SMALL = {
    "gaussian": SamplingCase("gaussian", 3, 40, 0.06, 4, 20, warmup=30),
    "banana": SamplingCase("banana", 2, 40, 0.1, 4, 20, warmup=30),
    "mixture": SamplingCase("mixture", 2, 40, 0.5, 4, 20, warmup=30),
    "mlp": SamplingCase("mlp", 4, 40, 0.2, 4, 20, warmup=30, widths=(8,)),
}


def independent(f, exact):
    """Deviations in standard errors of independent draws, f: (n, k)."""
    deviation, error = deviations(f[None], exact, lambda f: torch.full((f.shape[-1],), float(f.shape[1])).numpy())
    return float((deviation / error).max())


@pytest.mark.parametrize("kind", ["gaussian", "banana", "mixture"])
def test_starts_are_draws_of_the_law_and_its_moments_are_right(kind):
    p = Target(SMALL[kind])
    x = p.start(200_000, torch.Generator().manual_seed(3))
    assert independent(*p.moments(x)) < DEVIATION
    assert independent(*p.moments(1.05 * x)) > DEVIATION
    # Stein's identity holds for the same draws, so energy and draws agree
    stein = x * gradient_of(p.energy, x)
    assert independent(stein, torch.ones(x.shape[1])) < DEVIATION


def test_the_modes_of_the_mixture_are_in_the_moments():
    p = Target(SMALL["mixture"])
    x = p.start(20_000, torch.Generator().manual_seed(3))
    one_mode = torch.where(x[:, :1] > -1.0, x, -x)
    assert independent(*p.moments(one_mode)) > DEVIATION


def test_a_trained_energy_is_the_same_every_time_and_has_steins_moments(monkeypatch):
    monkeypatch.setattr(sampling_targets, "TRAINING_STEPS", 50)
    sampling_targets.energy_of.cache_clear()
    p = Target(SMALL["mlp"])
    before = p.values(p.x0)
    sampling_targets.energy_of.cache_clear()
    assert torch.equal(before, Target(SMALL["mlp"]).values(p.x0))
    sampling_targets.energy_of.cache_clear()  # of the short training
    result = fastebm.sample(p.energy, fastebm.MALA(0.3), init=p.start(4_000, torch.Generator()), steps=100, seed=4)
    assert independent(*p.moments(result.x)) < DEVIATION
    assert independent(*p.moments(1.1 * result.x)) > DEVIATION


def test_all_contestants_have_names_of_their_own():
    names = [c.name for c in CONTESTANTS]
    assert len(set(names)) == len(names)
    assert {name for case in SAMPLING.values() for name in case.only} <= {c.sampler for c in CONTESTANTS}


def test_a_step_size_is_tuned_to_its_acceptance():
    case = SMALL["banana"]
    assert tuned(case, lambda h: min(1.0, 0.1 / h), 1.0, 0.5) == pytest.approx(0.2, rel=0.05)
    assert tuned(dataclasses.replace(case, warmup=0), lambda h: 0.0, 1.0, 0.5) == 1.0


OURS = [c for c in CONTESTANTS if c.library == "fastebm"]
PEERS = [c for c in CONTESTANTS if c.library != "fastebm"]


@pytest.mark.parametrize(
    ("contestant", "kind"),
    [
        *((c, kind) for c in OURS for kind in ("mlp", "banana")),
        # a peer compiles or searches for seconds
        *(pytest.param(c, "banana", marks=pytest.mark.slow) for c in PEERS),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_contestant_draws(contestant, kind):
    pytest.importorskip("arviz_stats", reason="a package of the extra [bench]")
    (row,) = sampling.race(SMALL[kind], [dataclasses.replace(contestant, thin=2)], seconds=0.0)
    if row["status"] == "missing":
        pytest.skip(row["note"])
    assert row["status"] == "ok", row["note"]
    assert row["ess_per_s"] == pytest.approx(row["ess"] / (row["rounds"] * row["seconds"]))
    assert row["draws"] == SMALL[kind].draws * row["rounds"]
    assert row["gradients_per_draw"] >= 2
    assert sampling.brief(row).startswith(contestant.name)


def test_contestants_that_draw_another_law_have_no_speed():
    pytest.importorskip("arviz_stats", reason="a package of the extra [bench]")
    case = dataclasses.replace(SMALL["banana"], draws=100)

    def independent_draws(factor):
        def prepare(p, thin):
            generator = torch.Generator().manual_seed(9)

            def draw():
                x = factor * p.start(case.n_chains * case.draws, generator)
                return Drawn(x.reshape(case.n_chains, case.draws, -1), 1.0, None, 1.0)

            return draw

        return prepare

    right, wrong, biased = (
        Contestant(name, "X", independent_draws(factor), exact=exact)
        for name, factor, exact in (("a", 1.0, True), ("b", 1.05, True), ("c", 1.05, False))
    )
    found = {row["library"]: row for row in sampling.race(case, [right, wrong, biased], seconds=0.0)}
    assert [found[name]["status"] for name in "abc"] == ["ok", "FAILED", "ok"]
    assert found["b"]["ess_per_s"] == ""
    assert "FAILED" in sampling.brief(found["b"])
    # independent draws: as many effective samples as draws
    assert found["a"]["ess"] == pytest.approx(case.n_chains * found["a"]["draws"], rel=0.15)


def test_the_median_of_several_seeds_counts():
    pytest.importorskip("arviz_stats", reason="a package of the extra [bench]")
    case, step_sizes, starts = dataclasses.replace(SMALL["banana"], seeds=3), [0.3, 0.1, 0.2], []

    def prepare(p, thin):
        starts.append(p.x0)
        generator, slow = torch.Generator().manual_seed(p.seed), (1, 8, 3)[p.seed - 1]  # so many equal draws

        def draw():
            x = p.start(case.n_chains * case.draws, generator).reshape(case.n_chains, case.draws, -1)
            x = x[:, : -(-case.draws // slow)].repeat_interleave(slow, dim=1)[:, : case.draws]
            return Drawn(x, 1.0, None, step_sizes[p.seed - 1])

        return draw

    (row,) = sampling.race(case, [Contestant("a", "X", prepare)], seconds=0.0)
    assert row["step_size"] == 0.2
    assert row["seeds"] == 3
    assert len({float(x.sum()) for x in starts}) == 3
    one_wrong = [
        {"status": "ok", "ess_per_s": 3.0},
        {"status": "FAILED", "ess_per_s": ""},
        {"status": "ok", "ess_per_s": 1.0},
    ]
    assert sampling.typical(one_wrong)["status"] == "FAILED"


def test_what_breaks_or_takes_too_long_is_a_row_too():
    pytest.importorskip("arviz_stats", reason="a package of the extra [bench]")

    def broken(p, thin):
        raise RuntimeError("no such kernel")

    slow = next(c for c in CONTESTANTS if c.name == "fastebm MALA")
    found = sampling.race(SMALL["banana"], [Contestant("x", "Y", broken), slow], seconds=0.0, budget=1e-9)
    assert [row["status"] for row in found] == ["error", "skipped"]
    assert "no such kernel" in found[0]["note"]
    assert "share of the budget" in found[1]["note"]


def test_run_writes_rows_from_which_the_tables_follow(tmp_path, monkeypatch):
    pytest.importorskip("arviz_stats", reason="a package of the extra [bench]")
    tiny = dataclasses.replace(SMALL["gaussian"], draws=5, only=("MALA", "Langevin"))
    for cases in (run.SAMPLING, run.SUITE):
        monkeypatch.setitem(cases, "sampling-tiny", tiny)
    options = ["--contestants", "fastebm", "--threads", "1", "--budget", "4", "--out", str(tmp_path)]
    assert run.main(["--cases", "sampling-tiny", *options]) == 0
    found = rows.read(tmp_path / "sampling.csv")
    assert [(row["case"], row["sampler"], row["status"]) for row in found] == [
        ("sampling-tiny", "Langevin", "ok"),
        ("sampling-tiny", "MALA", "ok"),
    ]
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert f"| sampling-tiny | fastebm MALA | {float(found[1]['ess_per_s']):.3g} |" in tables_cpu.sampling()
    assert f"| gaussian 3 | Langevin | no | {float(found[0]['bias']):.3g} |" in tables_cpu.bias()
    monkeypatch.setattr(markdown, "RESULTS", tmp_path / "none")
    assert tables_cpu.bias() == tables_cpu.sampling() == markdown.none_yet("run.py")


@pytest.mark.parametrize("kind", ["mlp", "banana"])
@pytest.mark.parametrize("contestant", [c for c in OURS if c.sampler != "Langevin"], ids=lambda c: c.name)
def test_clocks_count_gradients_and_change_no_bits(contestant, kind):
    p = Target(SMALL[kind])
    result = contestant.prepare.started(p)
    plain = sampling_parts.continued(result, 6, 2)
    parts, clocked = sampling_parts.clocked(result, 6, 2)
    assert torch.equal(clocked.trajectory, plain.trajectory)
    assert min(parts.values()) > 0
    if kind == "banana":  # autograd calls the module
        calls = []
        with p.energy.register_forward_hook(lambda *_: calls.append(1)):
            sampling_parts.continued(result, 0, 2)
            outside = len(calls)
            sampling_parts.continued(result, 6, 2)
        assert 6 * parts["gradients"] == pytest.approx(len(calls) - 2 * outside)


def test_clocks_of_tiles_that_run_side_by_side():
    ladder = next(c for c in OURS if c.sampler == "ParallelTempering")
    result = ladder.prepare.started(Target(dataclasses.replace(SMALL["mlp"], n_chains=64)))
    with threads(2):
        parts, _ = sampling_parts.clocked(result, 100, 100)
    assert parts["loop_seconds"] > 0  # two threads spend more than the time of the call within steps


def test_clocks_tell_the_parts_of_a_step_apart(monkeypatch):
    now = 0.0

    def takes(seconds, method):
        def call(*arguments, **options):
            nonlocal now
            now += seconds
            return method(*arguments, **options)

        return call

    class Slow(fastebm.MALA):
        def step(self, *arguments):
            new, info = takes(100.0, super().step)(*arguments)
            return new, info._replace(averaged=takes(1000.0, info.averaged))

    monkeypatch.setattr(sampling_parts, "perf_counter", lambda: now)
    for draw in ("normal", "uniform"):
        monkeypatch.setattr(Noise, draw, takes(10.0, getattr(Noise, draw)))
    energy = takes(1.0, lambda x: x.square().sum(dim=1) / 2)
    result = fastebm.sample(energy, Slow(0.1), 2, n_chains=5, steps=0, seed=1)
    parts, _ = sampling_parts.clocked(result, 8, 0)
    # the start takes a gradient too
    assert parts == {"gradients": 1.0, "gradients_seconds": 1.0, "numbers_seconds": 20.0, "loop_seconds": 1000 + 1 / 8}


def test_the_parts_of_a_step_add_up_and_become_a_table(tmp_path, monkeypatch):
    def peer(p, thin):
        return lambda: Drawn(p.x0[:, None], 2.0 * thin, None, 1.0)

    def absent(p, thin):
        raise Missing("not here")

    peers = [
        Contestant("ebmkit", "MALA", peer),
        Contestant("blackjax", "MALA", peer),
        Contestant("ebmkit", "NUTS", absent),
    ]
    monkeypatch.setattr(sampling_parts, "CONTESTANTS", (*OURS, *peers))
    tiny = dataclasses.replace(SMALL["banana"], draws=3)
    found = [
        row
        for sampler in ("Langevin", "MALA", "NUTS")
        for row in sampling_parts.rows_of("sampling-tiny", tiny, sampler, seconds=0.0)
    ]
    assert [(row["sampler"], row["library"], row["gradients"]) for row in found[:4]] == [
        ("Langevin", "fastebm", "1"),
        ("MALA", "fastebm", "1"),
        ("MALA", "ebmkit", "2"),
        ("MALA", "blackjax", "2"),
    ]
    langevin, mala, ebmkit, blackjax, nuts = found
    for row in (mala, nuts):
        parts = [float(row[f"{part}_seconds"]) for part in ("gradients", "numbers", "own", "loop")]
        assert sum(parts) == pytest.approx(float(row["seconds"]), rel=1e-4)
    assert "own_seconds" not in langevin  # a fused run
    assert float(ebmkit["eager_seconds"]) > 0
    assert "eager_seconds" not in blackjax

    rows.write(tmp_path / "sampling_parts.csv", found)
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    lines = tables_cpu.sampling_parts().splitlines()[:5]
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    cells = {name: [line[header.index(name)] for line in body] for name in header}
    assert cells["sampler"] == ["Langevin", "MALA", "NUTS"]
    assert cells["step, µs"] == [f"{1e6 * float(row['seconds']):,.0f}" for row in (langevin, mala, nuts)]
    assert cells["the sampler's own"][1] == f"{1e6 * float(mala['own_seconds']):,.0f}"
    assert cells["ebmkit's step, µs"] == ["", f"{1e6 * float(ebmkit['seconds']):,.0f}", ""]
    monkeypatch.setattr(markdown, "RESULTS", tmp_path / "none")
    assert tables_cpu.sampling_parts() == markdown.none_yet("sampling_parts.py")


def test_the_figure_of_trajectories_has_paths_of_as_many_gradients(tmp_path):
    p = Target(SAMPLING["sampling-mixture"])
    for sampler, gradients in trajectories.samplers(p.case.length).values():
        path = trajectories.path_of(p, sampler, gradients)
        assert path.shape == (trajectories.GRADIENTS // gradients + 1, 2)
        assert bool((path[1:] != path[:-1]).any())
    assert trajectories.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "trajectories.png").read_bytes()[1:4] == b"PNG"
