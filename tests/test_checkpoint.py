"""Checkpoints: what is written comes back bit for bit, and no damaged or foreign file is ever taken for one."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fastebm import checkpoint

TENSORS = {
    "weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "age": torch.tensor([2**40, -1], dtype=torch.int64),
    "generator": torch.Generator().manual_seed(3).get_state(),
    "step": torch.tensor(7.0),
    "empty": torch.empty(0, 5),
}
VALUES = {"step": 7, "pool": {"seed": 2**63 - 1, "clamp": [0.0, 1.0]}, "zeros": "0" * 64, "none": None}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.write(path, TENSORS, VALUES)
    return path


def test_what_is_written_comes_back(path):
    tensors, values = checkpoint.read(path)
    assert values == VALUES
    assert tensors.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert tensors[name].dtype == t.dtype
        assert torch.equal(tensors[name], t)
    assert os.listdir(path.parent) == [path.name]  # no temporary file stays


def test_views_and_strides_are_written_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    checkpoint.write(tmp_path / "c", {"t": base.t(), "row": base[1], "same": base}, {})
    tensors, _ = checkpoint.read(tmp_path / "c")
    assert torch.equal(tensors["t"], base.t())
    assert torch.equal(tensors["row"], base[1])
    assert torch.equal(tensors["same"], base)


def test_any_flipped_bit_is_found(path):
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for position in [*range(header), *range(header, len(data), 29)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c\.safetensors"):
            checkpoint.read(path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_found(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"c\.safetensors is (truncated|damaged)"):
        checkpoint.read(path)


def test_appended_bytes_are_found(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="SHA-256"):
        checkpoint.read(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not written by fastebm"):
        checkpoint.read(path)
    save_file({"a": torch.zeros(2)}, path, {"fastebm": "[" * 100_000})
    with pytest.raises(ValueError, match="not written by fastebm"):
        checkpoint.read(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="foreign"):
        checkpoint.read(path)


def test_another_version_is_named(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_VERSION", 99)
    with pytest.raises(ValueError, match="version 1, and this fastebm reads 99"):
        checkpoint.read(path)


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    (tmp_path / "c").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="truncated, or no safetensors file"):
        checkpoint.read(tmp_path / "c")
    assert not (tmp_path / "sprung").exists()


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, TENSORS, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_no_folder_raises(path):
    with pytest.raises(OSError, match="Not a directory"):
        checkpoint.write(path / "below", TENSORS, {})
