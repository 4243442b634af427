"""Writes of checkpoints that fail: on a full disk, by one process of several, or killed at any moment."""

import errno
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import STATE, VALUES, read_all, rows, same, write, write_by
from safetensors.torch import save_file

from fastebm.pool.processes import Processes
from fastebm.train import atomic
from fastebm.train import writer as writing
from fastebm.train.atomic import write_atomically
from fastebm.train.checkpoint import Saved, newest
from fastebm.train.writer import Writer


def stages(monkeypatch, act):
    """``act(n)`` before the n-th thing that is done to the disk."""
    count = 0

    def watched(call):
        def wrapper(*args, **options):
            nonlocal count
            count += 1
            act(count)
            return call(*args, **options)

        return wrapper

    class HalfWritten(io.FileIO):
        """Of what is written, half arrives before the other half is tried."""

        def write(self, data):
            data = memoryview(data).cast("B")
            half = len(data) // 2
            return super().write(data[:half]) + watched(super().write)(data[half:])

    def half_saved(tensors, path):
        """The library's files too: the first half, and then the whole."""
        save_file(tensors, path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        watched(path.write_bytes)(data)

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(atomic, "open", lambda path, mode: HalfWritten(path, mode.replace("b", "")), raising=False)
    monkeypatch.setattr(safetensors.torch, "save_file", half_saved)
    return lambda: count


def n_stages(folder):
    with pytest.MonkeyPatch.context() as patch:
        count = stages(patch, lambda n: None)
        write(folder, 3)
        return count()


def test_a_full_disk_is_a_clear_error_at_every_stage_and_the_one_before_stays(tmp_path):
    write(tmp_path / "counted", 1)
    write(tmp_path / "counted", 2)
    total = n_stages(tmp_path / "counted")
    assert total > 20
    n_errors = 0
    for step in (1, 2):
        write(tmp_path / "0", step)
    for stage in range(1, total + 1):
        folder = shutil.copytree(tmp_path / "0", tmp_path / str(stage))

        def full(n, stage=stage):
            if n == stage:
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            stages(patch, full)
            x = rows()
            told = None
            try:
                with Writer(folder, Processes()) as writer:
                    writer.begin(3, {"state": STATE}, x, VALUES)
            except OSError as error:
                told = error
            same(x, rows())
        if told is not None:  # else it was what deletes old ones, which the next checkpoint does again
            n_errors += 1
            assert told.errno == errno.ENOSPC
            assert "No space left on device: the checkpoint of step 3 is not written, the one before" in str(told)
        step = Saved(newest(folder)).step
        assert step in (2, 3)
        read_all(folder)
        write(folder, 3)
        assert sorted(os.listdir(folder)) == ["LATEST", "step-00000002", "step-00000003"]
    assert n_errors > 12


def test_a_process_that_is_killed_at_any_stage_leaves_a_whole_checkpoint(tmp_path):
    """Real processes, each killed before, or halfway through, another call to the system."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed = sorted(map(int, os.listdir(tmp_path)))[1:-1]  # 0 is how they begin; in the last one nothing happened
    assert len(killed) > 20
    seen = set()
    for stage in killed:
        folder = tmp_path / str(stage)
        saved = Saved(newest(folder))
        seen.add(saved.step)
        same(saved.tensors("state"), STATE)
        same(saved.rows(0, 7), rows(seed=saved.step))
        assert saved.values["of"] == saved.step
        write(folder, 3, seed=3)  # what was left behind is in nobody's way
        assert sorted(os.listdir(folder)) == ["LATEST", "step-00000002", "step-00000003"]
        same(Saved(newest(folder)).rows(0, 7), rows(seed=3))
    assert seen == {2, 3}


def kill_at_every_stage(folder):
    for step in (1, 2):
        write(folder / "0", step, seed=step)
    for stage in itertools.count(1):
        here = folder / str(stage)
        shutil.copytree(folder / "0", here)
        child = os.fork()
        if child == 0:
            stages(pytest.MonkeyPatch(), lambda n, last=stage: n == last and os.kill(os.getpid(), signal.SIGKILL))
            write(here, 3, seed=3)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:  # there are no more
            break


def test_an_error_in_the_background_comes_with_the_next_call(tmp_path, monkeypatch):
    write(tmp_path, 1)
    with Writer(tmp_path, Processes()) as writer:
        with monkeypatch.context() as patch:

            def full_disk(fd):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "fsync", full_disk)
            writer.begin(2, {"state": STATE}, rows(), VALUES)
            while not writer.ready:
                time.sleep(0.01)
        message = "No space left on device: the checkpoint of step 2 is not written, the one before stays"
        with pytest.raises(OSError, match=message) as caught:
            writer.begin(3, {"state": STATE}, rows(), VALUES)
        assert caught.value.filename.endswith("step-00000002.tmp/rows-0.safetensors") or caught.value.filename.endswith(
            "step-00000002.tmp/state.safetensors"
        )
        assert not writer.pending
        assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000001"]
        writer.begin(3, {"state": STATE}, rows(), VALUES)
    assert Saved(newest(tmp_path)).step == 3


def test_an_error_of_one_process_is_one_of_all(tmp_path, monkeypatch):
    write_by(tmp_path, 1, (3, 4))
    write_tensors = writing.write_tensors

    def full_disk(path, tensors):
        if path.name == "rows-1.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_tensors(path, tensors)

    monkeypatch.setattr(writing, "write_tensors", full_disk)
    first, second = write_by(tmp_path, 2, (3, 4))
    assert isinstance(first, RuntimeError)
    assert "process 1 of 2 can't go on: OSError: [Errno 28] No space left on device" in str(first)
    assert isinstance(second, OSError)
    assert second.errno == errno.ENOSPC
    assert newest(tmp_path).name == "step-00000001"
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000001"]


def test_what_can_not_be_written_is_refused(tmp_path):
    with Writer(tmp_path, Processes()) as writer:
        with pytest.raises(ValueError, match="the same number of rows"):
            writer.begin(1, {}, {"x": torch.zeros(3), "y": torch.zeros(2)}, {})
        writer.begin(1, {"state": {"w": torch.zeros(2, dtype=torch.complex128)}}, rows(), {})
        with pytest.raises(ValueError, match=r"safetensors can't hold torch.complex128"):
            writer.finish()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_under_the_library_is_an_error_of_the_system(tmp_path):
    """Which reports it by an error of its own."""
    with pytest.raises(FileNotFoundError) as caught:
        writing.write_tensors(tmp_path / "none" / "w.safetensors", {"w": torch.ones(2)})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "none" / "w.safetensors"))


def test_files_are_as_public_as_the_folder(tmp_path):
    path = write(tmp_path, 1)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}


def test_a_file_is_replaced_or_left(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"

    def full_disk(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(OSError, match="Not a directory"):
        write_atomically(path / "below", b"")


if __name__ == "__main__":
    kill_at_every_stage(Path(sys.argv[1]))
