"""Training: a run that was interrupted ends with the bits of one that was not, and nothing bad is papered over."""

import dataclasses
import errno
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastebm import ChainPool, ContrastiveDivergence, NonFiniteError, evaluate
from fastebm.data.dataset import Images
from fastebm.data.sets import load
from fastebm.data.tables import load_array
from fastebm.pool.draws import draw_distinct
from fastebm.pool.processes import Processes
from fastebm.rng import Stream, words
from fastebm.train import apply, checkpoint, writer
from fastebm.train import loop as training
from fastebm.train.apply import fresh_samples
from fastebm.train.folder import load_model, open_log, saved_config
from fastebm.train.loop import Stopped, train
from fastebm.train.recipe import TrainConfig, recipe
from fastebm.train.state import TrainState

pytestmark = pytest.mark.usefixtures("few_trees")

TINY = TrainConfig(
    seed=3,
    steps=6,
    batch_size=8,
    hidden_sizes=(7, 5),
    pool_size=20,
    langevin_steps=2,
    n_fresh=60,
    fresh_steps=3,
    warmup_steps=0,
)


@pytest.fixture(scope="module")
def tiny_images():
    """Images of 3 x 3 in two classes: enough for a run whose report takes no time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    k = torch.randint(0, 5, (60, 9), generator=generator).float() + 4.0 * labels[:, None] * (torch.arange(9) < 4)
    return Images(k[:40], labels[:40], k[40:], labels[40:], shape=(3, 3), levels=8)


@pytest.fixture
def no_report(monkeypatch):
    """For tests of what training leaves behind."""
    monkeypatch.setattr(training, "write_report", lambda *_: {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_images):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(TINY, out, data=tiny_images)
    return out


def _newest(run):
    return checkpoint.Saved(checkpoint.newest(run / "checkpoints"))


def _same_end(a, b):
    """Every file of the checkpoint byte for byte, and its values; then the metrics, without the clock."""
    a_end, b_end = _newest(a), _newest(b)
    for name in ("model", "state", "rows-0"):
        assert (a_end.path / f"{name}.safetensors").read_bytes() == (b_end.path / f"{name}.safetensors").read_bytes()
    assert {**a_end.values, "seconds": 0} == {**b_end.values, "seconds": 0}
    assert a_end.step == b_end.step
    assert _metrics(a) == _metrics(b)


def _tree(folder):
    """Names of all files in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _content(folder):
    return {name: (folder / name).read_bytes() for name in _tree(folder)}


def _metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.mark.parametrize("stop_at", range(1, 6))
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, tiny_images, whole, no_report, stop_at):
    done = []
    with pytest.raises(Stopped, match=f"step {stop_at} of 6"):
        train(
            TINY,
            tmp_path / "run",
            data=tiny_images,
            on_step=done.append,
            should_stop=lambda: len(done) == stop_at - 1,
        )
    assert not (tmp_path / "run" / "summary.json").exists()
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_that_was_cut_off_resumes_from_its_last_checkpoint(tmp_path, tiny_images, whole, no_report, at):
    """KeyboardInterrupt out of the loop, with nothing saved since step 0, 2 or 4."""

    def cut(row):
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run", data=tiny_images, on_step=cut, checkpoint_every=2)
    assert _newest(tmp_path / "run").step == at // 2 * 2
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # as a killed process leaves it
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)


def test_interrupted_in_the_middle_of_a_step(tmp_path, tiny_images, whole, no_report, monkeypatch):
    average = TrainState.average_weights

    def cut(run):
        if run.step == 3:
            raise KeyboardInterrupt
        average(run)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "average_weights", cut)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "run", data=tiny_images)
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)


def test_stopped_while_sampling_and_measuring(tmp_path, tiny_images, whole):
    phases = []
    with pytest.raises(Stopped, match="step 6 of 6"):
        train(
            TINY, tmp_path / "run", data=tiny_images, on_phase=lambda *phase: phases.append(phase),
            should_stop=lambda: len(phases) == 6,
        )  # fmt: skip
    sampling = "sampling 60 fresh chains"
    assert phases[0] == (sampling, 0, 3)
    assert (sampling, 3, 3) in phases
    assert phases[-1][0] == "measuring"
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)
    clock = ("seconds", "seconds_after_training")
    a, b = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", whole))
    assert {k: v for k, v in a.items() if k not in clock} == {k: v for k, v in b.items() if k not in clock}


def test_another_seed_is_another_run(tmp_path, tiny_images, whole, no_report):
    train(dataclasses.replace(TINY, seed=4), tmp_path / "run", data=tiny_images)
    a, b = (load_file(_newest(run).path / "model.safetensors") for run in (tmp_path / "run", whole))
    assert not torch.equal(a["0.weight"], b["0.weight"])


def test_training_leaves_the_global_generator_alone(tmp_path, tiny_images, no_report):
    before = torch.random.get_rng_state()
    train(TINY, tmp_path / "run", data=tiny_images)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_run_folder_is_complete(whole, tiny_images):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        ".lock", "config.json", "checkpoints", "metrics.jsonl", "summary.json", "samples.png", "energies.png",
        "training.png", "train_energies.npy",
    }  # fmt: skip
    assert _tree(whole / "checkpoints") == {"LATEST"} | {
        f"step-0000000{step}/{name}"
        for step in (0, 6)
        for name in ("manifest.json", "model.safetensors", "state.safetensors", "rows-0.safetensors")
    }
    assert json.loads((whole / "config.json").read_text()) == dataclasses.replace(TINY, data=tiny_images.info).to_dict()
    assert [row["step"] for row in _metrics(whole)] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((whole / "summary.json").read_text())
    for key in ("auroc_uniform", "auroc_shuffled", "auroc_rotated", "auroc_inverted", "two_sample_accuracy"):
        assert 0.0 <= summary[key] <= 1.0
    assert summary["chain_steps"] == 6 * 8 * 2
    assert sum(summary["class_shares"]) == pytest.approx(1.0)
    assert summary["classes_present"] == sum(share >= 0.01 for share in summary["class_shares"])
    assert summary["seconds"] > 0


def test_training_lowers_the_energy_of_data(tmp_path, tiny_images):
    """Data that fill two corners of the cube against samples that start everywhere: the energy must tell them."""
    config = dataclasses.replace(
        TINY, steps=150, hidden_sizes=(32,), pool_size=200, batch_size=40, langevin_steps=5, learning_rate=3e-3
    )
    summary = train(config, tmp_path / "run", data=tiny_images)
    assert summary["auroc_uniform"] > 0.75


# -- planes and tables ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaussians(tmp_path_factory):
    """A function of dims: a file of a Gaussian, whose columns hang together, as the user's own data."""

    def points(dim):
        rng = np.random.default_rng(dim)
        path = tmp_path_factory.mktemp("data") / f"gaussian-{dim}.npy"
        np.save(path, 100.0 + rng.normal(size=(400, dim)) @ rng.normal(size=(dim, dim)))
        return load_array(path)

    return points


def _small(data, **changes):
    tiny = {"seed": 0, "steps": 6, "batch_size": 8, "pool_size": 20, "hidden_sizes": (7, 5), "n_fresh": 30}
    return TrainConfig(**{**recipe(data), **tiny, "fresh_steps": 3, **changes})


@pytest.mark.parametrize("dim", [1, pytest.param(2, marks=pytest.mark.slow), 14])
def test_a_table_or_plane_is_reported_and_resumed_from_its_folder_alone(tmp_path, gaussians, dim):
    config = _small(gaussians(dim))
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", should_stop=lambda: True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["offset"] == list(config.data.offset)
    summary = train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    aurocs = {"auroc_uniform", "auroc_shuffled"} if dim == 14 else {"auroc_uniform"}
    assert {key for key in summary if key.startswith("auroc")} == aurocs
    assert 0.0 <= summary["two_sample_accuracy"] <= 1.0
    for name in ("samples", "energies", "training"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 10_000


def test_a_run_whose_file_has_changed_does_not_go_on(tmp_path, gaussians):
    data = gaussians(3)
    with pytest.raises(Stopped):
        train(_small(data), tmp_path / "run", should_stop=lambda: True)
    before = _content(tmp_path / "run")
    np.save(data.info.name, np.random.default_rng(1).normal(size=(400, 3)))
    with pytest.raises(ValueError, match="has changed since the run began"):
        train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert _content(tmp_path / "run") == before


@pytest.mark.slow
def test_known_outliers_are_measured_beside_plain_detectors(tmp_path):
    data = load("breast_cancer")
    summary = train(_small(data), tmp_path / "run", data=data)
    assert {"auroc_malignant", "auroc_malignant_isolation_forest", "auroc_malignant_mahalanobis"} <= summary.keys()
    assert summary["auroc_malignant_isolation_forest"] > 0.8  # whatever six steps make of the energy


def test_the_landscape_is_the_energy_where_the_axes_say():
    """A paraboloid around a point of the data's own plane."""
    info = load("moons").info
    at = info.to_states([[1.0, 0.5]])

    class Paraboloid(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.centre = torch.nn.Parameter(at[0])

        def forward(self, x):
            return (x - self.centre).square().sum(1, keepdim=True)

    edges, energies = apply.landscape(Paraboloid(), info)
    assert np.allclose(info.to_states(edges[[0, -1]]), [[lo, lo] for lo in info.clamp])
    row, column = np.unravel_index(energies.argmin(), energies.shape)
    assert edges[column, 0] <= 1.0 <= edges[column + 1, 0]
    assert edges[row, 1] <= 0.5 <= edges[row + 1, 1]


@pytest.mark.slow
def test_a_toy_is_learned(tmp_path):
    """The recipe in a quarter of its steps: samples are nearer to the moons than a Gaussian of their moments."""
    data = load("moons")
    config = TrainConfig(**{**recipe(data), "steps": 500})
    summary = train(config, tmp_path / "run", data=data)
    gaussian = np.random.default_rng(0).multivariate_normal([0, 0], np.cov(data.train.T.numpy()), 1000)
    others = evaluate.two_sample_accuracy(data.test.numpy(), gaussian)
    assert summary["two_sample_accuracy"] < 0.62 < 0.72 < others


# -- bad folders and files ----------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(whole, tiny_images):
    before = _content(whole)
    with pytest.raises(ValueError, match="already holds a run"):
        train(TINY, whole, data=tiny_images)
    assert _content(whole) == before


def test_a_folder_with_other_things_is_refused(tmp_path, tiny_images):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and holds no run to resume: choose another folder"):
        train(TINY, tmp_path, data=tiny_images)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "killed" / "checkpoints" / "step-00000000.tmp").mkdir(parents=True)  # before its first checkpoint
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(TINY, tmp_path / "killed", data=tiny_images)


def test_nothing_is_written_for_a_backend_that_cannot_run(tmp_path, tiny_images, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = dataclasses.replace(TINY, backend="triton", device="cpu")
    with pytest.raises(ValueError, match="can't run"):
        train(config, tmp_path / "run", data=tiny_images)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["manifest.json", "state.safetensors", "rows-0.safetensors"])
def test_a_damaged_checkpoint_is_named_and_changes_nothing_and_the_one_before_serves(
    tmp_path, tiny_images, whole, no_report, file
):
    with pytest.raises(Stopped):
        train(TINY, tmp_path / "run", data=tiny_images, should_stop=lambda: True)
    run = tmp_path / "run"
    path = run / "checkpoints" / "step-00000001" / file
    path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
    before = _content(run)
    message = rf"{file} is damaged.* {run}/checkpoints/step-00000000 is there too: name it in place of the run folder"
    with pytest.raises(ValueError, match=message):
        train(TINY, run, data=tiny_images, resume=True)
    assert _content(run) == before
    # As it says.
    train(TINY, run / "checkpoints" / "step-00000000", data=tiny_images, resume=True)
    _same_end(run, whole)
    assert _newest(run).step == 6


def test_resuming_with_another_configuration_is_refused(tmp_path, tiny_images, whole):
    with pytest.raises(ValueError, match="another configuration"):
        train(dataclasses.replace(TINY, reg_alpha=7.0), whole, data=tiny_images, resume=True)
    with pytest.raises(ValueError, match="has done 6 steps: steps must be more to extend it, got 5"):
        train(dataclasses.replace(TINY, steps=5), whole, data=tiny_images, resume=True)
    with pytest.raises(ValueError, match="is no run of fastebm"):
        train(TINY, tmp_path, data=tiny_images, resume=True)


def test_an_edited_config_is_not_silently_ignored(tmp_path, tiny_images):
    with pytest.raises(Stopped):
        train(TINY, tmp_path / "run", data=tiny_images, should_stop=lambda: True)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"reg_alpha": 0.001', '"reg_alpha": 0.002'))
    with pytest.raises(ValueError, match="undo the change"):
        train(TINY, tmp_path / "run", data=tiny_images, resume=True)


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_finished_run_can_be_extended(tmp_path, tiny_images, no_report, is_killed):
    """Where the learning rate does not depend on the number of steps, to the bits of the longer run."""
    short = dataclasses.replace(TINY, steps=3, decay="none")
    longer = dataclasses.replace(short, steps=6)
    train(longer, tmp_path / "straight", data=tiny_images)
    train(short, tmp_path / "run", data=tiny_images)

    def killed(row):
        raise KeyboardInterrupt

    if is_killed:  # before the first checkpoint of the longer run
        with pytest.raises(KeyboardInterrupt):
            train(longer, tmp_path / "run", data=tiny_images, resume=True, on_step=killed)
        assert _newest(tmp_path / "run").step == 3
        assert saved_config(tmp_path / "run") == dataclasses.replace(longer, data=tiny_images.info)
        longer = saved_config(tmp_path / "run")
    train(longer, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", tmp_path / "straight")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 6
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


# -- explosions ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, tiny_images, monkeypatch):
    forward = ContrastiveDivergence.forward
    calls = []

    def broken(*args, **options):
        calls.append(1)
        found = forward(*args, **options)
        return found._replace(loss=found.loss * (float("nan") if len(calls) == 4 else 1.0))

    monkeypatch.setattr(ContrastiveDivergence, "forward", broken)
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan .* learning_rate"):
        train(TINY, tmp_path / "run", data=tiny_images, checkpoint_every=2)
    saved = _newest(tmp_path / "run")
    assert saved.step == 2
    tensors = {**saved.tensors("state"), "x": saved.rows(0, 20)["x"]}
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_chains_that_explode_stop_the_run(tmp_path, tiny_images):
    config = dataclasses.replace(TINY, drift=1e38, clamp=None, langevin_steps=200)
    with pytest.raises(NonFiniteError, match=r"training failed in step 1: .* chains are not finite"):
        train(config, tmp_path / "run", data=tiny_images)
    assert _newest(tmp_path / "run").step == 0


# -- faults -------------------------------------------------------------------------------------------------


def _poisoned(monkeypatch, calls, n_bad):
    """In these calls of the pool, so many of the chains that it is about to draw are where no energy is finite."""
    sample = ChainPool.sample
    count = itertools.count(1)

    def poisoned(pool, model, batch_size, *args, **options):
        if next(count) in calls:
            drawn = draw_distinct(pool.seed, pool.draws, len(pool), batch_size)
            coins = words(pool.seed, Stream.POOL, drawn, pool.draws, 1, 0xFFFFFE)[0][:, 0]
            drawn = drawn[coins >= pool.reinit_prob * 2**32]  # a chain that starts anew forgets it
            pool.states[drawn[:n_bad]] = torch.inf
        return sample(pool, model, batch_size, *args, **options)

    monkeypatch.setattr(ChainPool, "sample", poisoned)


def test_chains_that_are_not_finite_end_the_run_unless_they_may_restart(tmp_path, tiny_images, no_report, monkeypatch):
    shown = []
    with monkeypatch.context() as patch:
        _poisoned(patch, {3}, 1)
        with pytest.raises(NonFiniteError, match=r"step 3: 1 of 8 chains are not finite"):
            train(TINY, tmp_path / "ends", data=tiny_images)
    with monkeypatch.context() as patch:
        _poisoned(patch, {3, 5}, 1)
        config = dataclasses.replace(TINY, on_nonfinite="reinit")
        train(config, tmp_path / "goes on", data=tiny_images, on_step=shown.append)
    assert [row["nonfinite"] for row in shown] == [0, 0, 1, 0, 1, 0]
    assert [row["nonfinite"] for row in _metrics(tmp_path / "goes on")] == [0, 0, 1, 0, 1, 0]
    pool = _newest(tmp_path / "goes on").rows(0, 20)
    assert int(pool["nonfinite"].sum()) == 2
    assert pool["x"].isfinite().all()
    # The way out of the run that ended.
    train(config, tmp_path / "ends", data=tiny_images, resume=True)
    with monkeypatch.context() as patch:
        _poisoned(patch, {2}, 2)
        with pytest.raises(NonFiniteError, match=r"step 2: 2 of 8 chains are not finite.* up to 10% of them"):
            train(config, tmp_path / "gives up", data=tiny_images)


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_resumes(tmp_path, tiny_images, whole, no_report, monkeypatch):
    write = writer.write_tensors

    def full_disk(path, tensors):
        if path.name == "rows-0.safetensors" and "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, tensors)

    rows = []
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", full_disk)
        with pytest.raises(OSError, match="No space left on device: the checkpoint of step 4 is not written") as caught:
            train(TINY, tmp_path / "run", data=tiny_images, checkpoint_every=2, on_step=rows.append)
    assert caught.value.filename.endswith("rows-0.safetensors")
    assert rows[-1]["step"] in (4, 5)  # written in the background
    assert _newest(tmp_path / "run").step == 2
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)


def test_a_full_disk_under_the_metrics_is_named(tmp_path, tiny_images, no_report, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")

    def on_full_disk(path):
        path.symlink_to("/dev/full")
        return open_log(path)

    monkeypatch.setattr(training, "open_log", on_full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        train(TINY, tmp_path / "run", data=tiny_images)
    assert caught.value.filename.endswith("metrics.jsonl")


def test_a_second_process_is_refused(tmp_path, tiny_images, no_report):
    """Of which the lock knows nothing but that the folder was opened another time."""
    run = tmp_path / "run"

    def second(row):
        for resume, message in ((True, "is in use: another process trains in it"), (False, "already holds a run")):
            with pytest.raises(ValueError, match=message):
                train(TINY, run, data=tiny_images, resume=resume)

    train(TINY, run, data=tiny_images, on_step=second)
    train(TINY, run, data=tiny_images, resume=True)  # the lock ended with the run


def test_a_lock_ends_with_its_process(tmp_path, tiny_images, no_report):
    with pytest.raises(Stopped):
        train(TINY, tmp_path, data=tiny_images, should_stop=lambda: True)
    code = "import sys, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()
        with pytest.raises(ValueError, match="is in use"):
            train(TINY, tmp_path, data=tiny_images, resume=True)
    finally:
        process.kill()
        process.communicate()
    train(TINY, tmp_path, data=tiny_images, resume=True)


def test_a_pool_of_another_shape_is_refused(tmp_path, tiny_images, no_report):
    with pytest.raises(Stopped):
        train(TINY, tmp_path, data=tiny_images, should_stop=lambda: True)
    saved = _newest(tmp_path)
    files, whole_rows = {name: saved.tensors(name) for name in ("model", "state")}, saved.rows(0, 20)
    for change, message in (
        (lambda rows: rows.update(x=rows["x"][:, :8]), "the saved pool has 20 chains"),
        (lambda rows: rows.update(steps=rows["steps"].float()), "steps must be .* of torch.int64"),
        (lambda rows: rows.pop("energy"), "it lacks energy"),
        (lambda rows: rows["x"].fill_(torch.nan), "states that are not finite"),
    ):
        rows = {name: t.clone() for name, t in whole_rows.items()}
        change(rows)
        with writer.Writer(tmp_path / "checkpoints", Processes()) as out:
            out.begin(1, files, rows, saved.values)
        with pytest.raises(ValueError, match=rf"step-00000001 does not hold the run .*{message}"):
            train(TINY, tmp_path, data=tiny_images, resume=True)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints/LATEST"])
def test_a_pickle_in_a_run_folder_is_never_run(tmp_path, tiny_images, name):
    """Those in a checkpoint are test_checkpoint's."""

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    with pytest.raises(Stopped):
        train(TINY, tmp_path / "run", data=tiny_images, should_stop=lambda: True)
    (tmp_path / "run" / name).write_bytes(pickle.dumps(Trap()))
    before = _content(tmp_path / "run")
    with pytest.raises(ValueError, match=name):
        train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    assert not (tmp_path / "sprung").exists()
    assert _content(tmp_path / "run") == before


def test_resuming_may_change_what_does_not_change_the_result(tmp_path, tiny_images, no_report):
    with pytest.raises(Stopped):
        train(TINY, tmp_path, data=tiny_images, should_stop=lambda: True)
    other = dataclasses.replace(TINY, device="cpu", backend="reference", on_nonfinite="reinit")
    for _ in range(2):  # the second time before a checkpoint knows of the change
        with pytest.raises(KeyboardInterrupt):
            train(other, tmp_path, data=tiny_images, resume=True, on_step=_interrupt)
    train(other, tmp_path, data=tiny_images, resume=True)
    assert saved_config(tmp_path) == dataclasses.replace(other, data=tiny_images.info)


def test_a_run_of_an_earlier_version_resumes_and_gives_samples(tmp_path, tiny_images, no_report, monkeypatch):
    """Its configuration has an entry that no longer exists, and two with another name now."""
    to_dict = TrainConfig.to_dict
    old = {"reg_alpha": "alpha", "reinit_prob": "restart_prob"}
    with monkeypatch.context() as patch:
        patch.setattr(
            TrainConfig,
            "to_dict",
            lambda config: {"compile": True, **{old.get(k, k): v for k, v in to_dict(config).items()}},
        )
        with pytest.raises(Stopped):
            train(TINY, tmp_path, data=tiny_images, should_stop=lambda: True)
    for path in (tmp_path / "config.json", *tmp_path.glob("checkpoints/step-*/manifest.json")):
        assert '"compile": true' in path.read_text()
    model, config = load_model(tmp_path)
    assert config == dataclasses.replace(TINY, data=tiny_images.info)
    assert fresh_samples(model, config, 9, dim=tiny_images.dim)[0].isfinite().all()
    train(saved_config(tmp_path), tmp_path, data=tiny_images, resume=True)
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()


def _interrupt(row):
    raise KeyboardInterrupt


@pytest.mark.parametrize("every", [0, 2.0, True])
def test_checkpoint_every_is_checked(tmp_path, tiny_images, every):
    with pytest.raises(ValueError, match=f"checkpoint_every must be an int >= 1, got {every}"):
        train(TINY, tmp_path / "run", data=tiny_images, checkpoint_every=every)
    assert not (tmp_path / "run").exists()


# -- configuration, data, samples ---------------------------------------------------------------------------


def test_config_survives_json():
    config = dataclasses.replace(TINY, grad_clip=0.5, clamp=None, max_grad_norm=None)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="missing or unknown: momentum"):
        TrainConfig.from_dict({**TINY.to_dict(), "momentum": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an int"),
        ({"batch_size": 21}, "batch_size must be <= pool_size"),
        ({"seed": -1}, "seed must be"),
        ({"drift": float("nan")}, "drift must be a number > 0, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0"),
        ({"reinit_prob": 1.5}, r"reinit_prob must be a number in \[0, 1\]"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"decay": "step"}, "decay must be"),
        ({"clamp": (1.0, 0.0)}, "clamp needs lo < hi"),
        ({"grad_clip": 0.0}, "grad_clip must be"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be"),
        ({"dequantisation": 0.5, "data": load("moons").info}, "dequantisation is for images: it must be 0, got 0.5"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be"),
    ],
)
def test_config_refuses_impossible_values(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_learning_rate_goes_from_its_value_to_zero():
    for decay, middle in (("cosine", 0.5), ("linear", 0.5), ("none", 1.0)):
        config = dataclasses.replace(TINY, learning_rate=0.01, decay=decay)
        assert config.learning_rate_at(0) == 0.01
        assert config.learning_rate_at(3) == pytest.approx(0.01 * middle)
        assert config.learning_rate_at(6) == pytest.approx(0.01 if decay == "none" else 0.0)


def test_noise_cools_over_the_last_part_of_every_block():
    config = dataclasses.replace(TINY, noise_std=0.02, drift=0.5, langevin_steps=5, cooling=0.8)
    block = [0.02, 0.015, 0.01, 0.005, 0.0]
    assert config.sampler(10).noise_scale.tolist() == pytest.approx(block * 2)
    assert config.sampler(7).noise_scale.tolist() == pytest.approx(block[-2:] + block)
    assert config.sampler(7).step_size == 1.0
    assert dataclasses.replace(config, cooling=0.0).sampler(3).noise_scale.tolist() == pytest.approx([0.02] * 3)


def test_learning_rate_warms_up():
    config = dataclasses.replace(TINY, learning_rate=0.01, decay="none", warmup_steps=4)
    assert [config.learning_rate_at(step) for step in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_fresh_samples_do_not_depend_on_their_number_or_on_the_chunks(whole, tiny_images, monkeypatch):
    model, config = load_model(whole)
    assert config == dataclasses.replace(TINY, data=tiny_images.info)
    many, info = fresh_samples(model, config, 20, dim=9, steps=7, seed=1)
    monkeypatch.setattr(apply, "MAX_STEPS_PER_CALL", 3)
    seen = []
    few, _ = fresh_samples(model, config, 4, dim=9, steps=7, seed=1, on_steps=lambda *done: seen.append(done))
    assert torch.equal(many[:4], few)
    assert (seen[0], seen[-1]) == ((0, 7), (7, 7))
    assert all(0 < b - a <= 3 for (a, _), (b, _) in itertools.pairwise(seen))
    assert info.backend in ("torch", "triton")
    assert not torch.equal(many, fresh_samples(model, config, 20, dim=9, steps=7, seed=2)[0])
