"""Checkpoints: what is written comes back bit for bit, and a damaged or foreign file is never taken for one."""

import hashlib
import json
import os
import pickle
import threading

import pytest
import torch
from checkpoints import STATE, VALUES, read_all, rows, same, write, write_by
from safetensors.torch import load_file, save_file

from fastebm.pool.processes import Processes
from fastebm.train import checkpoint
from fastebm.train import writer as writing
from fastebm.train.checkpoint import DamagedError, Saved, newest
from fastebm.train.writer import Writer

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
    monkeypatch.setattr(writing, "BACKGROUND_BYTES", 0)
    copies = []
    copied = writing.copied
    monkeypatch.setattr(writing, "copied", lambda named: copies.extend(named) or copied(named))
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
    path.write_bytes(checkpoint.sealed(body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(version=2), "has format version 2, and this fastebm reads 1"),
        (lambda body: body.pop("step"), "does not describe a checkpoint"),
        (lambda body: body.update(files=[]), "does not describe a checkpoint"),
        (lambda body: body["files"].pop("state.safetensors"), "lists no state.safetensors"),
        (lambda body: body["files"].pop("rows-1.safetensors"), "lists 3 rows, and 7 are needed"),
        (lambda body: body["files"]["rows-1.safetensors"].update(rows=5), "it does not have the 5 rows"),
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
        ({"x": torch.zeros(5, 3), "steps": torch.zeros(5)}, "it does not have the 4 rows"),
        ({"x": torch.tensor(1.0)}, "it does not have the 4 rows"),
    ):
        save_file(tensors, path.parent / "other")
        replaced(path, (path.parent / "other").read_bytes())
        refused(folder, message)
