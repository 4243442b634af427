"""The benchmark of steps in the first layer: all take the same steps, and wrong steps have no time."""

import dataclasses

import pytest
import torch
from fastebm.bench import collapsed, markdown, plot, rows, run, tables_cpu
from fastebm.bench.cases import COLLAPSED
from fastebm.bench.problem import Missing
from fastebm.bench.sampling_contestants import CONTESTANTS, Contestant, Ours

from fastebm.backends.collapsed import FORMS

SAMPLERS = ("HMC", "MALA", "UnderdampedLangevin", "Langevin")
OURS = {c.sampler: c for c in CONTESTANTS if c.library == "fastebm"}


def small(sampler, dim=400):
    """A case whose steps are taken in the first layer."""
    case = next(case for case in COLLAPSED.values() if case.only == (sampler,))
    length = dim ** (-1 / 4 if sampler == "HMC" else -1 / 6)
    return dataclasses.replace(case, dim=dim, widths=(16,), n_chains=40, n_leapfrog=4, length=length)


@pytest.fixture(autouse=True)
def few_chains_and_steps(monkeypatch):
    monkeypatch.setattr(collapsed, "GATE_CHAINS", 100)
    for name, steps in (("STEPS", 3), ("HMC_STEPS", 2), ("PEERS_HMC_STEPS", 1)):
        monkeypatch.setattr(collapsed, name, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_steps_in_the_first_layer_and_outside(sampler):
    before = dict(FORMS)
    found = collapsed.race(small(sampler), [OURS[sampler]], seconds=0.0)
    paths = {"fastebm": "collapsed", collapsed.ORDINARY: "tiles"}
    if sampler == "Langevin":
        paths[collapsed.MARGINAL] = "marginal"
    assert {row["contestant"]: row["path"] for row in found} == paths
    assert FORMS == before
    for row in found:
        assert row["status"] == "ok", row["note"]
        assert row["times_fastebm"] == pytest.approx(row["seconds"] / found[0]["seconds"])
        assert row["gradient_seconds"] == pytest.approx(row["seconds"] / (4 if sampler == "HMC" else 1))
        assert (row["error"] == "") == (row["path"] == "marginal")  # whose noise is another
        assert " ms per step, " in collapsed.brief(row)
    assert found[0]["step_size"] == pytest.approx(
        small(sampler).length ** (1 if sampler in ("HMC", "UnderdampedLangevin") else 2)
    )


@pytest.mark.parametrize("change", [{"length": 0.15}, {"n_leapfrog": 3}], ids=str)
def test_other_steps_fail_whoever_takes_them(change):
    """The states of fastebm tell, and of others the law."""
    right = OURS["HMC"].prepare

    def other(p, thin):
        p.case = dataclasses.replace(p.case, **change)
        p.seed += 7  # other noise than that of the comparison
        return right(p, thin)

    ours = Contestant("fastebm", "HMC", Ours(lambda case: right.make(dataclasses.replace(case, **change))))
    theirs = Contestant("theirs", "HMC", other)
    found = collapsed.race(small("HMC"), [ours, theirs], seconds=0.0)
    assert {row["contestant"]: row["status"] for row in found} == dict.fromkeys(
        ("fastebm", collapsed.ORDINARY, "theirs"), "FAILED"
    )
    assert all(row["seconds"] == row["times_fastebm"] == "" for row in found)
    assert "FAILED" in collapsed.brief(found[0])


def test_what_is_not_here_breaks_or_takes_too_long_is_a_row():
    def raising(error):
        def prepare(p, thin):
            raise error

        return prepare

    there = [
        Contestant("absent", "HMC", raising(Missing("not here"))),
        Contestant("broken", "HMC", raising(OSError("no"))),
    ]
    unlike = Contestant("biased", "HMC", raising(Missing("not here")), exact=False)
    found = collapsed.race(small("HMC"), [*there, OURS["HMC"], unlike, OURS["MALA"]], seconds=0.0, budget=1e-9)
    status = {row["contestant"]: row["status"] for row in found}
    assert status == {"absent": "missing", "broken": "error", "fastebm": "skipped", collapsed.ORDINARY: "skipped"}


def test_chains_that_decide_otherwise_by_rounding_are_no_error():
    gate = collapsed.Gate(small("HMC"))
    one, two = gate.truth.clone(), gate.truth.clone()
    one[0] += 1.0
    two[:2] += 1.0
    assert gate.error(one) == 0.0
    assert gate.error(two) > gate.allowed
    assert gate.error(torch.full_like(gate.truth, torch.nan)) == torch.inf


def test_run_writes_rows_from_which_table_and_figure_follow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = {f"collapsed-dims-{dim}": small("HMC", dim) for dim in (300, 400)}
    for cases in (run.COLLAPSED, run.SUITE):
        for key, case in tiny.items():
            monkeypatch.setitem(cases, key, case)
    options = ["--contestants", "fastebm", "--threads", "1", "--budget", "60", "--out", str(tmp_path)]
    assert run.main(["--cases", *tiny, *options]) == 0
    found = rows.read(tmp_path / "collapsed.csv")
    assert [(row["case"], row["contestant"]) for row in found] == [
        (key, name) for key in tiny for name in ("fastebm", collapsed.ORDINARY)
    ]
    assert plot.main(["--results", "."]) == 0
    assert [path.name for path in (tmp_path / "runs" / "bench").iterdir()] == ["dims.png"]
    figure = plot.dims(plot.numbers(found))
    lines = {line.get_label(): list(line.get_xydata()[:, 1]) for line in figure.axes[0].lines}
    assert lines["fastebm"] == pytest.approx([1e3 * float(row["gradient_seconds"]) for row in found[::2]])
    assert set(lines) == {"fastebm", collapsed.ORDINARY}
    assert plot.dims([{**row, "case": "collapsed-HMC-digits"} for row in plot.numbers(found)]) is None

    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    cells = f"{1e3 * float(found[0]['gradient_seconds']):.3g} | {1e3 * float(found[0]['seconds']):.3g} |"
    assert f"| fastebm | random mlp 300-[16] | 40 | collapsed | {cells}" in tables_cpu.collapsed()
    monkeypatch.setattr(markdown, "RESULTS", tmp_path / "none")
    assert tables_cpu.collapsed() == markdown.none_yet("run.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "c", [c for c in CONTESTANTS if c.exact and c.library != "fastebm" and c.sampler in SAMPLERS], ids=lambda c: c.name
)
def test_peers_take_the_same_steps(c):
    (row,) = collapsed.race(small(c.sampler), [c], seconds=0.0)
    if row["status"] == "missing":
        pytest.skip(row["note"])
    assert row["status"] == "ok", row["note"]
    assert row["step_size"] == pytest.approx(
        small(c.sampler).length ** 2 / 2 if c.sampler == "MALA" else small(c.sampler).length
    )
