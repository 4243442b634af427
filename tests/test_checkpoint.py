"""Checkpoints: what is written comes back bit for bit, and no damaged or foreign file is ever taken for one."""

import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastebm.pool.processes import Processes
from fastebm.train import checkpoint
from fastebm.train.checkpoint import DamagedError, Saved, Writer, newest, write_atomically

STATE = {
    "weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "step": torch.tensor(7.0),
    "empty": torch.empty(0, 5),
    "generator": torch.Generator().manual_seed(3).get_state(),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "flag": torch.tensor([True, False, True]),
}
VALUES = {"pool": {"seed": 2**63 - 1, "clamp": [0.0, 1.0]}, "none": None, "text": "ξ"}


def rows(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, 3, generator=generator), "steps": torch.arange(n) + 2**40}


def write(folder, step, *, seed=0):
    folder.mkdir(exist_ok=True)
    with Writer(folder, Processes()) as writer:
        writer.begin(step, {"state": STATE, "model": {"w": torch.ones(2)}}, rows(seed=seed), {**VALUES, "of": step})
        writer.finish()
    return folder / f"step-{step:08d}"


class Thread(Processes):
    """One of several processes that are threads."""

    def __init__(self, rank, size, barrier, board):
        super().__init__()
        self.rank, self.size, self.barrier, self.board = rank, size, barrier, board

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait(30)
        values = list(self.board)
        self.barrier.wait(30)
        return values

    _numbers = gather


def write_by(folder, step, sizes, rows=rows):
    """By so many processes; what each of them raised."""
    whole, size, errors = rows(sum(sizes)), len(sizes), [None] * len(sizes)
    barrier, board = threading.Barrier(size), [None] * size

    def work(rank):
        first = sum(sizes[:rank])
        part = {k: v[first : first + sizes[rank]] for k, v in whole.items()}
        try:
            with Writer(folder, Thread(rank, size, barrier, board)) as writer:
                writer.begin(step, {"state": STATE}, part, VALUES)
                writer.finish()
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype
        assert torch.equal(found[name], t)


# -- what is written ----------------------------------------------------------------------------------------


def test_what_is_written_comes_back(tmp_path):
    path = write(tmp_path, 1200)
    assert newest(tmp_path) == path
    saved = Saved(path)
    assert saved.step == 1200
    assert saved.values == {**VALUES, "of": 1200}
    same(saved.tensors("state"), STATE)
    same(saved.rows(0, 7), rows())
    same(saved.rows(2, 3), {k: v[2:5] for k, v in rows().items()})
    same(saved.rows(5, 0), {k: v[:0] for k, v in rows().items()})
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00001200"]
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "rows-0.safetensors", "state.safetensors"]


def test_other_programs_read_the_files_and_check_their_sums(tmp_path):
    path = write(tmp_path, 3)
    same(load_file(path / "state.safetensors"), STATE)
    files = json.loads((path / "manifest.json").read_text())["checkpoint"]["files"]
    for name, file in files.items():
        data = (path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    for step, left in ((0, "step-00000009.tmp"), (250, "step-00000250.tmp"), (500, "step-00000000.old.tmp")):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rows-0.safetensors").write_text("of a process that was killed")
        write(tmp_path, step)
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000250", "step-00000500"]


def test_steps_that_are_done_again_replace_what_was_there(tmp_path):
    for step in (100, 200, 300):
        write(tmp_path, step)
    checkpoint.name_newest(tmp_path / "step-00000200")
    write(tmp_path, 250, seed=1)
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000200", "step-00000250"]
    write(tmp_path, 250, seed=2)
    same(Saved(newest(tmp_path)).rows(0, 7), rows(seed=2))


def test_views_and_strides_are_written_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    with Writer(tmp_path, Processes()) as writer:
        writer.begin(0, {"state": {"t": base.t(), "row": base[1], "same": base}}, {"x": base.t()}, {})
    saved = Saved(newest(tmp_path))
    same(saved.tensors("state"), {"t": base.t(), "row": base[1], "same": base})
    same(saved.rows(0, 4), {"x": base.t()})


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (2, 2, 3), (0, 1, 0, 6)])
def test_rows_of_any_number_of_processes_are_read_by_any_other(tmp_path, sizes):
    assert write_by(tmp_path, 5, sizes) == [None] * len(sizes)
    whole = rows()
    saved = Saved(newest(tmp_path))
    for size in (1, 2, 3, 9):
        for rank in range(size):
            lo, hi = 7 * rank // size, 7 * (rank + 1) // size
            same(saved.rows(lo, hi - lo), {k: v[lo:hi] for k, v in whole.items()})
    with pytest.raises(DamagedError, match="lists 7 rows, and 8 are needed"):
        saved.rows(3, 5)


def test_what_chains_do_meanwhile_is_not_in_it(tmp_path, monkeypatch):
    """The snapshot is taken first; the files are written by a thread."""
    go_on = threading.Event()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (go_on.wait(30), sync(fd))[1])
    x = rows()
    with Writer(tmp_path, Processes()) as writer:
        writer.begin(1, {"state": {"w": (w := torch.ones(3))}}, x, {})
        assert writer.pending
        assert not writer.ready
        x["x"].zero_()
        w.zero_()
        go_on.set()
    assert torch.equal(Saved(newest(tmp_path)).rows(0, 7)["x"], rows()["x"])
    assert torch.equal(Saved(newest(tmp_path)).tensors("state")["w"], torch.ones(3))


def test_many_rows_are_written_without_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_BACKGROUND_BYTES", 0)
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 64)
    copies = []
    copy = checkpoint._copy
    monkeypatch.setattr(checkpoint, "_copy", lambda named: copies.extend(named) or copy(named))
    with Writer(tmp_path, Processes()) as writer:
        writer.begin(1, {"state": STATE}, rows(50), VALUES)
        assert writer.ready
        writer.finish()
    assert sorted(copies) == sorted(STATE)
    same(Saved(newest(tmp_path)).rows(0, 50), rows(50))


# -- what is damaged or foreign -----------------------------------------------------------------------------

NAMES = ("manifest.json", "state.safetensors", "rows-0.safetensors", "rows-1.safetensors")


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of two processes."""
    for step in (1, 2):
        write_by(tmp_path, step, (3, 4))
    return tmp_path


def read_all(folder):
    saved = Saved(newest(folder))
    return saved.tensors("state"), saved.rows(0, 7)


def refused(folder, what):
    """The error names the file and the checkpoint before, which is whole."""
    way_out = f"{folder}/step-00000001 is there too: name it in place of the run folder"
    with pytest.raises(DamagedError, match=rf"{what}.*{way_out}"):
        read_all(folder)
    saved = Saved(folder / "step-00000001")
    same(saved.tensors("state"), STATE)
    same(saved.rows(0, 7), rows())


def test_any_flipped_bit_is_found(folder):
    for name in NAMES:
        path = folder / "step-00000002" / name
        data = path.read_bytes()
        for position in [*range(0, 150, 7), *range(0, len(data), 31), len(data) - 1]:
            if data[position : position + 1].isspace():
                continue  # between values of the JSON, where a flipped bit may be another space
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 7)
            path.write_bytes(damaged)
            with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
                read_all(folder)
        path.write_bytes(data)
    read_all(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_found(folder, name, size):
    path = folder / "step-00000002" / name
    if name == "manifest.json" and size == -1:
        size = -3  # the last one is the end of the line
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, rf"{name} is (truncated|damaged)")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_found(folder, name):
    (folder / "step-00000002" / name).unlink()
    refused(folder, rf"{name} is missing")


def test_files_of_another_checkpoint_are_found(folder):
    write_by(folder, 2, (4, 3))
    (folder / "step-00000002" / "rows-0.safetensors").write_bytes(
        (folder / "step-00000001" / "rows-0.safetensors").read_bytes()
    )
    refused(folder, "rows-0.safetensors is truncated: it has .* bytes, and had")


@pytest.mark.parametrize("content", [b"", b"step-00000009\n", b"../elsewhere\n", b"\xff\xfe", b"step-00000002.tmp"])
def test_latest_that_names_nothing_is_found(folder, content):
    (folder / "LATEST").write_bytes(content)
    with pytest.raises(DamagedError, match=r"LATEST names no checkpoint .*step-00000002 is there too"):
        newest(folder)
    (folder / "LATEST").unlink()
    with pytest.raises(DamagedError, match="LATEST is missing"):
        newest(folder)


def resealed(path, change):
    """A manifest with a right sum of its own."""
    body = json.loads(path.read_text())["checkpoint"]
    change(body)
    path.write_bytes(checkpoint._sealed(body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(version=2), "has format version 2, and this fastebm reads 1"),
        (lambda body: body.pop("step"), "does not describe a checkpoint"),
        (lambda body: body.update(files=[]), "does not describe a checkpoint"),
        (lambda body: body["files"].pop("state.safetensors"), "lists no state.safetensors"),
        (lambda body: body["files"].pop("rows-1.safetensors"), "lists 3 rows, and 7 are needed"),
        (lambda body: body["files"]["rows-1.safetensors"].update(rows=5), "it has not the 5 rows"),
    ],
)
def test_a_manifest_of_another_version_or_of_something_else_is_refused(folder, change, message):
    resealed(folder / "step-00000002" / "manifest.json", change)
    refused(folder, message)


@pytest.mark.parametrize("text", ["{}", "[]", "7", "[" * 100_000, "\x89PNG", '{"checkpoint": 3, "sha256": 3}'])
def test_a_foreign_manifest_is_refused(folder, text):
    (folder / "step-00000002" / "manifest.json").write_text(text)
    refused(folder, "manifest.json is damaged, or was not written by fastebm")


def replaced(path, data):
    """Other content with the right sums, as somebody who wants it read would write it."""
    path.write_bytes(data)
    sums = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    resealed(path.parent / "manifest.json", lambda body: body["files"][path.name].update(sums))


@pytest.mark.parametrize("name", ["LATEST", *NAMES])
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_is_never_run(folder, name, protocol):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "sprung"),))

    path = folder / ("" if name == "LATEST" else "step-00000002") / name
    data = pickle.dumps(Trap(), protocol)
    if name.endswith(".safetensors"):
        replaced(path, data)
        refused(folder, f"{name} can't be used")
    else:
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=name):
            read_all(folder)
    assert not (folder / "sprung").exists()


def test_rows_that_do_not_fit_together_are_refused(folder):
    path = folder / "step-00000002" / "rows-1.safetensors"
    for tensors, message in (
        ({"x": torch.zeros(4, 2), "steps": torch.zeros(4, dtype=torch.int64)}, "do not fit together"),
        ({"x": torch.zeros(4, 3)}, "holds other tensors"),
        ({"x": torch.zeros(5, 3), "steps": torch.zeros(5)}, "it has not the 4 rows"),
        ({"x": torch.tensor(1.0)}, "it has not the 4 rows"),
    ):
        save_file(tensors, path.parent / "other")
        replaced(path, (path.parent / "other").read_bytes())
        refused(folder, message)


# -- writes that fail ---------------------------------------------------------------------------------------


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

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(checkpoint, "open", lambda path, mode: HalfWritten(path, mode.replace("b", "")), raising=False)
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
    assert n_errors > 15


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
            writer._thread.join()
        assert writer.ready
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
    write_bytes = checkpoint._write_bytes

    def full_disk(path, parts):
        if path.name == "rows-1.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, parts)

    monkeypatch.setattr(checkpoint, "_write_bytes", full_disk)
    first, second = write_by(tmp_path, 2, (3, 4))
    assert isinstance(first, RuntimeError)
    assert "process 1 of 2 can't go on: OSError: [Errno 28] No space left on device" in str(first)
    assert isinstance(second, OSError)
    assert second.errno == errno.ENOSPC
    assert newest(tmp_path).name == "step-00000001"
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000001"]


def test_what_can_not_be_written_is_refused(tmp_path):
    with Writer(tmp_path, Processes()) as writer:
        with pytest.raises(ValueError, match="equally many"):
            writer.begin(1, {}, {"x": torch.zeros(3), "y": torch.zeros(2)}, {})
        writer.begin(1, {"state": {"w": torch.zeros(2, dtype=torch.complex64)}}, rows(), {})
        with pytest.raises(ValueError, match=r"holds no torch.complex64, as w is"):
            writer.finish()
    assert os.listdir(tmp_path) == []


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
