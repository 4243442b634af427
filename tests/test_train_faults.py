"""Training and faults: bad folders, damaged files, full disks, a second process, chains that are not finite."""

import dataclasses
import errno
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, content, images, metrics, newest, same_end

from fastebm import ChainPool, NonFiniteError
from fastebm.pool.draws import draw_distinct
from fastebm.pool.processes import Processes
from fastebm.rng import Stream, words
from fastebm.train import loop as training
from fastebm.train import writer
from fastebm.train.apply import fresh_samples
from fastebm.train.folder import load_model, open_log, saved_config
from fastebm.train.loop import Stopped, train
from fastebm.train.recipe import TrainConfig

pytestmark = pytest.mark.usefixtures("few_trees")


@pytest.fixture(scope="module")
def tiny_images():
    return images()


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


# -- bad folders and files ----------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(whole, tiny_images):
    before = content(whole)
    with pytest.raises(ValueError, match="already holds a run"):
        train(TINY, whole, data=tiny_images)
    assert content(whole) == before


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
    before = content(run)
    message = rf"{file} is damaged.* {run}/checkpoints/step-00000000 is there too: name it in place of the run folder"
    with pytest.raises(ValueError, match=message):
        train(TINY, run, data=tiny_images, resume=True)
    assert content(run) == before
    # As it says.
    train(TINY, run / "checkpoints" / "step-00000000", data=tiny_images, resume=True)
    same_end(run, whole)
    assert newest(run).step == 6


def test_resuming_with_another_configuration_is_refused(tmp_path, tiny_images, whole):
    with pytest.raises(ValueError, match="another configuration"):
        train(dataclasses.replace(TINY, reg_alpha=7.0), whole, data=tiny_images, resume=True)
    with pytest.raises(ValueError, match="has done 6 steps: steps must be more to extend it, got 5"):
        train(dataclasses.replace(TINY, steps=5), whole, data=tiny_images, resume=True)
    with pytest.raises(ValueError, match="is not a run of fastebm"):
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
        assert newest(tmp_path / "run").step == 3
        assert saved_config(tmp_path / "run") == dataclasses.replace(longer, data=tiny_images.info)
        longer = saved_config(tmp_path / "run")
    train(longer, tmp_path / "run", data=tiny_images, resume=True)
    same_end(tmp_path / "run", tmp_path / "straight")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 6
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


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
    assert [row["nonfinite"] for row in metrics(tmp_path / "goes on")] == [0, 0, 1, 0, 1, 0]
    pool = newest(tmp_path / "goes on").rows(0, 20)
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
    assert newest(tmp_path / "run").step == 2
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    same_end(tmp_path / "run", whole)


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
    saved = newest(tmp_path)
    files, whole_rows = {name: saved.tensors(name) for name in ("model", "state")}, saved.rows(0, 20)
    for change, message in (
        (lambda rows: rows.update(x=rows["x"][:, :8]), "the saved pool has 20 chains"),
        (lambda rows: rows.update(steps=rows["steps"].float()), "steps must be .* of torch.int64"),
        (lambda rows: rows.pop("energy"), "missing energy"),
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
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=name):
        train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    assert not (tmp_path / "sprung").exists()
    assert content(tmp_path / "run") == before


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
