"""A pool sharded over real processes: the same chains, bit for bit, and errors on every process or on none."""

import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pools import Trap
from torch import nn

from fastebm import ChainPool, ClassifierEnergy, Langevin, MLPEnergy, langevin_sample

DIM, N = 3, 23
RULE = Langevin(0.1, 0.5)
TIMEOUT = 120  # seconds; a process that is left waiting fails the test


class Scaled(nn.Module):
    def forward(self, x, sigma):
        return (x / sigma).square().sum(1) / 2


def pool_of(group=None, **options):
    return ChainPool(
        **{"n_chains": N, "input_size": DIM, "seed": 7, "reinit_prob": 0.3, "process_group": group, **options}
    )


def content(pool):
    return {k: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for k, v in pool.state_dict().items()}


def energies():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Linear(DIM, 8), nn.SiLU(), nn.Linear(8, 4))
        return MLPEnergy(DIM, (9, 8)), ClassifierEnergy(classifier)


def story(group=None):
    """What happens to pools in every call, for one process or for each of several."""
    mlp, classifier = energies()
    told = {}
    pool = pool_of(group, clamp=(-1.0, 1.0))
    for i, batch in enumerate((9, 23, 1)):
        rule = Langevin(torch.linspace(0.05, 0.2, batch)[:, None], 0.5)
        x, e = pool.sample(mlp, batch, rule, 3)
        told[f"sample {i}"] = (x, e, pool.last.chains, pool.last.reinits)
    pool.advance(mlp, Langevin(torch.linspace(0.05, 0.2, N)[:, None], 0.5), 2, chunk_size=4)
    pool.add(torch.linspace(-1, 1, 5 * DIM).reshape(5, DIM))
    pool.add(torch.linspace(-1, 1, 60 * DIM).reshape(60, DIM), policy="reservoir")
    pool.sample(mlp, 12, RULE, 2)
    told["stats"] = pool.stats()
    told["state"] = pool.state_dict()
    other = pool_of(group, clamp=(0.0, 5.0))
    other.load_state_dict(told["state"])
    other.sample(mlp, 12, RULE, 2)
    told["resumed"] = other.state_dict()

    pool = pool_of(group, labels=torch.arange(N) % 4, storage_dtype=torch.bfloat16)
    told["stats of none"] = pool.stats()
    pool.sample(classifier, 11, RULE, 2)
    told["labels"] = pool.last.labels
    told["stats of some"] = pool.stats()
    told["labelled"] = pool.state_dict()
    x, e = pool.sample(classifier, 6, RULE, 2, labels=torch.tensor([3, 0, 3, 1, 1, 0]))
    told["for labels"] = (x, e, pool.last.chains, pool.last.reinits)
    told["for labels state"] = pool.state_dict()

    pool = pool_of(group, condition=torch.linspace(0.5, 2.0, N)[:, None])
    pool.sample(Scaled(), 11, RULE, 2)
    pool.add(torch.zeros(30, DIM), condition=torch.linspace(3.0, 4.0, 30)[:, None])
    pool.advance(Scaled(), RULE, 1)
    told["conditioned"] = pool.state_dict()

    pool = pool_of(group, n_chains=2)  # fewer than processes
    x, _ = pool.sample(mlp, 1, RULE, 2)
    pool.advance(mlp, RULE, 1)
    told["few"] = (x, pool.last.chains, pool.stats())
    told["few state"] = pool.state_dict()
    return told


def faults(group, rank, folder):
    """Errors of one process are errors of all, and no pool has changed."""
    mlp, _ = energies()
    told = {}

    def attempt(name, call, pool=None):
        before = None if pool is None else content(pool)
        try:
            call()
        except Exception as error:
            unchanged = pool is None or content(pool) == before
            told[name] = (type(error).__name__, str(error), unchanged)
        else:
            told[name] = None

    attempt("seeds", lambda: pool_of(group, seed=rank))
    attempt("sizes", lambda: pool_of(group, n_chains=N + rank))
    attempt("no size", lambda: pool_of(group, n_chains=N if rank else 0))
    attempt("starts", lambda: pool_of(group, init=lambda *counter: torch.full((len(counter[2]), DIM), 1 / rank)))
    file = f"{folder}/{dist.get_world_size(group)}"
    if rank == 0:
        Path(f"{file}.0").touch()
    attempt("file", lambda: pool_of(group, storage_file=file))
    pool = pool_of(group)
    attempt("batches", lambda: pool.sample(mlp, 5 + rank, RULE, 2), pool)
    attempt("bad batch", lambda: pool.sample(mlp, 0 if rank == 1 else 5, RULE, 2), pool)
    attempt("bad add", lambda: pool.add(torch.zeros(2, DIM + (rank == 1))), pool)
    attempt("adds", lambda: pool.add(torch.zeros(2 + rank, DIM)), pool)
    attempt("steps", lambda: pool.advance(mlp, RULE, 2 + rank), pool)
    attempt("calls", lambda: pool.advance(mlp, RULE, 2) if rank else pool.sample(mlp, 5, RULE, 2), pool)
    labelled = pool_of(group, labels=torch.arange(N) % 4)
    _, classifier = energies()

    def draw(n, label=0):
        labelled.sample(classifier, n, RULE, 1, labels=torch.full((n,), label))

    attempt("labels", lambda: draw(2, label=rank), labelled)
    attempt("numbers of labels", lambda: draw(2 + rank), labelled)
    attempt("no labels", lambda: draw(2, label=9 if rank == 1 else 0), labelled)
    attempt("bad labels", lambda: draw(2, label=0.5 if rank == 1 else 0), labelled)
    told["labels afterwards"] = (draw(2), labelled.draws)[1]
    state = pool.state_dict()
    if rank == 0:
        state["x"][0, 0] = torch.nan
    attempt("load", lambda: pool.load_state_dict(state), pool)
    if rank == 1:
        pool.states[2] = 1000.0
    attempt("exploded", lambda: pool.sample(Trap(), N, RULE, 2), pool)
    attempt("exploded in a chunk", lambda: pool.advance(Trap(), RULE, 2, chunk_size=2), pool)
    pool.sample(Trap(), N, RULE, 2, on_nonfinite="reinit")
    told["reinits"] = (pool.last.nonfinite, int(pool.nonfinite.sum()), pool.stats().nonfinite)
    attempt("afterwards", lambda: pool.sample(mlp, 5, RULE, 2), pool)
    return told


def seeds(rank):
    """Seeds that pools draw: one pool per process, and one shared by all."""
    torch.manual_seed(rank)
    apart = ChainPool(N, DIM)
    apart.sample(energies()[0], 5, RULE, 0)
    return apart.seed, apart.last.chains, ChainPool(N, DIM, process_group=dist.group.WORLD).seed


def wrapped():
    """Pairs of samples, of a model in DistributedDataParallel and of the model itself, before and after a backward."""
    mlp, classifier = energies()
    found = []
    for model, options in (
        (mlp, {}),
        (classifier, {"labels": torch.arange(5) % 4}),
        (Residual(mlp), {}),
    ):
        ddp = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            pair = [langevin_sample(m, init=torch.ones(5, DIM), steps=3, seed=1, **options) for m in (ddp, model)]
            found.append(pair)
            ddp(torch.ones(5, DIM)).sum().backward()
    return found


class Residual(nn.Module):
    """Not an MLP."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[:, 0] + x.square().sum(1)


def main(folder, rank, world):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    pair = dist.new_group([0, 1])
    told = {world: (story(dist.group.WORLD), faults(dist.group.WORLD, rank, folder))}
    told["seeds"] = seeds(rank)
    told["wrapped"] = wrapped()
    if rank < 2:
        told[2] = (story(pair), faults(pair, rank, folder))
    else:
        with pytest.raises(ValueError, match="this process is not in process_group"):
            pool_of(pair)
    torch.save(told, f"{folder}/{rank}.pt")
    dist.barrier()  # destroying the group earlier would abort the others
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """{number of processes: results of each}, from three processes, two of which also form a group of their own."""
    folder = tmp_path_factory.mktemp("processes")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(3)]
    each = {name: [rank[name] for rank in told] for name in ("seeds", "wrapped")}
    return {**{world: [rank[world] for rank in told[:world]] for world in (2, 3)}, **each}


@pytest.fixture(scope="module")
def alone():
    return story()


def bits(value):
    return value.contiguous().view(torch.uint8) if value.numel() else value.numel()


def joined(parts, chains=None):
    """Rows of several processes, in the order of their chains if those are given."""
    rows = torch.cat(list(parts))
    return rows if chains is None else rows[torch.argsort(torch.cat(list(chains)))]


@pytest.mark.parametrize("world", [2, 3])
def test_pools_of_any_number_of_processes_are_bit_equal(worlds, alone, world):
    shares = [told for told, _ in worlds[world]]
    for i, batch in enumerate((9, 23, 1)):
        x, e, chains, reinits = alone[f"sample {i}"]
        order = torch.argsort(chains)
        parts = [told[f"sample {i}"] for told in shares]
        assert sum(len(part[0]) for part in parts) == batch
        assert torch.equal(joined((p[0] for p in parts), (p[2] for p in parts)), x[order])
        assert torch.equal(joined((p[1] for p in parts), (p[2] for p in parts)), e[order])
        assert [part[3] for part in parts] == [reinits] * world
    x, e, chains, reinits = alone["for labels"]
    order, parts = torch.argsort(chains), [told["for labels"] for told in shares]
    assert torch.equal(joined((p[0] for p in parts), (p[2] for p in parts)), x[order])
    assert torch.equal(joined((p[1] for p in parts), (p[2] for p in parts)), e[order])
    assert [part[3] for part in parts] == [reinits] * world
    for name in ("state", "resumed", "labelled", "for labels state", "conditioned", "few state"):
        for key, value in alone[name].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(bits(joined(told[name][key] for told in shares)), bits(value)), (name, key)
            else:
                assert [told[name][key] for told in shares] == [value] * world, (name, key)
    for name in ("stats", "stats of some", "stats of none"):
        assert [repr(told[name]) for told in shares] == [repr(alone[name])] * world, name
    assert sum(len(told["labels"]) for told in shares) == len(alone["labels"])
    assert torch.equal(joined(told["few"][0] for told in shares), alone["few"][0])
    assert [repr(told["few"][2]) for told in shares] == [repr(alone["few"][2])] * world
    assert len({len(told["few state"]["x"]) for told in shares}) == (1 if world == 2 else 2)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("name", "guilty", "kind", "own", "others"),
    [
        ("seeds", None, "ValueError", "built theirs with other arguments or another seed", None),
        ("sizes", None, "ValueError", "built theirs with other arguments or another seed", None),
        ("no size", 0, "ValueError", r"n_chains must be an int in [1, 2**31), got 0", "RuntimeError"),
        ("starts", 0, "ZeroDivisionError", "division by zero", "RuntimeError"),
        ("bad add", 1, "ValueError", "samples must be (n, 3), got (2, 4)", "RuntimeError"),
        ("adds", None, "ValueError", "or made other calls", None),
        ("file", 0, "ValueError", "storage_file must not exist", "RuntimeError"),
        ("batches", None, "ValueError", "used another batch_size or steps", None),
        ("bad batch", 1, "ValueError", "batch_size must be an int", "RuntimeError"),
        ("steps", None, "ValueError", "used another batch_size or steps", None),
        ("calls", None, "ValueError", "or made other calls", None),
        ("labels", None, "ValueError", "asked for other labels", None),
        ("numbers of labels", None, "ValueError", "asked for other labels", None),
        ("no labels", None, "ValueError", "asked for other labels", None),
        ("bad labels", 1, "TypeError", "labels must be a tensor of integers", "RuntimeError"),
        ("load", 0, "ValueError", "states that are not finite", "RuntimeError"),
        ("exploded", 1, "NonFiniteError", "chains are not finite", "NonFiniteError"),
        ("exploded in a chunk", 1, "NonFiniteError", "chains are not finite", "NonFiniteError"),
    ],
)
def test_distributed_errors_are_on_every_process(worlds, world, name, guilty, kind, own, others):
    for rank, (_, told) in enumerate(worlds[world]):
        got, message, unchanged = told[name]
        assert unchanged
        if guilty in (None, rank):
            assert got == kind
            assert own in message
        else:
            assert got == others
            assert f"process {guilty} of {world} can't go on: {kind}: " in message
            assert own in message


@pytest.mark.parametrize("world", [2, 3])
def test_distributed_reinits_are_counted_over_all_processes(worlds, world):
    told = [faults["reinits"] for _, faults in worlds[world]]
    assert [last for last, _, _ in told] == [1] * world
    assert [here for _, here, _ in told] == [int(rank == 1) for rank in range(world)]
    assert [total for _, _, total in told] == [1] * world
    assert all(faults["afterwards"] is None for _, faults in worlds[world])


def test_pools_without_a_seed_differ_or_agree(worlds):
    apart, chains, together = zip(*worlds["seeds"], strict=True)
    assert len(set(apart)) == len({tuple(c.tolist()) for c in chains}) == 3
    assert len(set(together)) == 1


def test_models_in_distributed_data_parallel_are_sampled_as_themselves(worlds):
    for found in worlds["wrapped"]:
        assert len(found) == 6
        for ddp, model in found:
            assert torch.equal(ddp, model)


def test_a_process_group_must_be_there(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"process_group needs torch.distributed.init_process_group\(\) first"):
        pool_of(object())


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")  # torch is imported once
    running = [fork.Process(target=main, args=(sys.argv[1], rank, 3), daemon=True) for rank in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.exit(any(process.exitcode != 0 for process in running))
