"""Tiny runs for tests of training: their configuration and data, and what they leave behind."""

import json

import torch

from fastebm.data.dataset import Images
from fastebm.train import checkpoint
from fastebm.train.recipe import TrainConfig

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


def images():
    """Images of 3 x 3 in two classes: enough for a run whose report takes no time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    k = torch.randint(0, 5, (60, 9), generator=generator).float() + 4.0 * labels[:, None] * (torch.arange(9) < 4)
    return Images(k[:40], labels[:40], k[40:], labels[40:], shape=(3, 3), levels=8)


def newest(run):
    return checkpoint.Saved(checkpoint.newest(run / "checkpoints"))


def same_end(a, b):
    """Every file of the checkpoint byte for byte, and its values; then the metrics, without the clock."""
    a_end, b_end = newest(a), newest(b)
    for name in ("model", "state", "rows-0"):
        assert (a_end.path / f"{name}.safetensors").read_bytes() == (b_end.path / f"{name}.safetensors").read_bytes()
    assert {**a_end.values, "seconds": 0} == {**b_end.values, "seconds": 0}
    assert a_end.step == b_end.step
    assert metrics(a) == metrics(b)


def tree(folder):
    """Names of all files in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def content(folder):
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]
