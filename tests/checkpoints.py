"""Checkpoints for tests: writing one by one process or several, and comparing what is read."""

import threading

import torch

from fastebm.pool.processes import Processes
from fastebm.train.checkpoint import Saved, newest
from fastebm.train.writer import Writer

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


def read_all(folder):
    saved = Saved(newest(folder))
    return saved.tensors("state"), saved.rows(0, 7)
