"""Storage of a pool's states: rounding, files, large pools, memory."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pools import DIM, RULE, drawn, json_round_trip, pool_of, same

import fastebm
from fastebm import Langevin, MLPEnergy
from fastebm.backends import Chains
from fastebm.box import Box
from fastebm.driver.run import run_chains
from fastebm.pool.draws import Draw
from fastebm.pool.storage import Storage

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def energy() -> MLPEnergy:
    return MLPEnergy(DIM, (9, 8))


def test_rounding_keeps_the_mean_and_what_is_stored_already():
    n, dim = 4000, 21
    rows, steps = slice(0, n), torch.arange(n)
    x = torch.linspace(-0.97, 1.93, dim).expand(n, dim)
    for dtype, spacing in ((torch.uint8, 3 / 255), (torch.bfloat16, 2.0**-7)):
        box = Box(-1.0, 2.0)
        store = Storage(n, dim, dtype=dtype, box=box, device=torch.device("cpu"), seed=3)
        store.write(rows, x, steps)
        kept = store.read(rows)
        assert len(kept[:, 3].unique()) == 2  # one of the two neighbours
        assert float((kept - x).abs().max()) < spacing
        # a byte of noise leaves at most 1/512 of a unit, and the mean of n roundings at most half a unit / sqrt(n)
        assert float((kept.mean(0) - x[0]).abs().max()) < spacing * (1 / 512 + 6 * 0.5 / math.sqrt(n))
        stored = store.data.clone()
        store.write(rows, kept, steps + 1)
        assert torch.equal(store.data, stored)
        store.write(torch.arange(n).flip(0), x, steps.flip(0))
        assert torch.equal(store.data, stored)  # rounding depends on the chain and its step alone


def test_coarse_storage_stays_within_the_clamp_and_near_the_state(energy):
    lo, hi = torch.tensor([-1.1, 0.0, 5.0]), torch.tensor([1.1, 0.3, 6.0])
    for dtype in (torch.bfloat16, torch.uint8):
        pool = pool_of(clamp=(lo, hi), storage_dtype=dtype, reinit_prob=0.0)
        samples, energies = pool.sample(energy, 50, RULE, 3)
        states = pool.states[pool.last.chains]
        assert bool(((states >= lo) & (states <= hi)).all())
        assert bool(
            ((states - samples).abs() <= ((hi - lo) / 255 if dtype == torch.uint8 else samples.abs() / 128)).all()
        )
        torch.testing.assert_close(energies, fastebm.energy(energy, samples).detach())
        assert pool.state_dict()["x"].dtype == dtype
        other = pool_of(clamp=(lo, hi), storage_dtype=dtype, seed=1)
        other.load_state_dict(json_round_trip(pool.state_dict()))
        for p in (pool, other):
            p.sample(energy, 20, RULE, 3)
        assert same(pool, other)


def test_images_of_256_levels_are_kept_as_they_are():
    images = torch.randint(256, (30, DIM)) / 255
    pool = pool_of(30, clamp=(0.0, 1.0), storage_dtype=torch.uint8)
    pool.add(images)
    assert torch.equal((pool.states * 255).round(), images * 255)


def test_a_pool_in_a_file_is_the_same_pool(energy, tmp_path):
    file = tmp_path / "pool"
    pool, other = pool_of(reinit_prob=0.3), pool_of(reinit_prob=0.3, storage_file=file)
    assert file.stat().st_size == 50 * DIM * 4
    for p in (pool, other):
        p.sample(energy, 20, RULE, 2)
        p.advance(energy, RULE, 2, chunk_size=7)
        p.add(torch.zeros(5, DIM))
    assert same(pool, other)
    assert torch.equal(torch.from_file(str(file), size=50 * DIM).view(50, DIM), pool.states)
    with pytest.raises(ValueError, match="storage_file must not exist"):
        pool_of(storage_file=file)
    assert torch.equal(other.states, pool.states)


def test_a_pool_that_could_not_be_built_leaves_no_file(energy, tmp_path, monkeypatch):
    file = tmp_path / "pool"

    def start(seed, stream, chains, steps):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pool_of(init=start, storage_file=file)
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: free)
        with pytest.raises(OSError, match=r"states take 600 bytes, and the disk has 100 left.*/pool"):
            pool_of(storage_file=file)
    assert not file.exists()
    pool = pool_of(storage_file=file)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match="states take 600 bytes"):  # the backup of the old states
        pool.advance(energy, RULE, 1, chunk_size=20)
    assert same(pool, pool_of())


def test_chains_past_two_billion_elements(tmp_path, monkeypatch):
    """Chains in rows past 2**31 elements move as they do without a pool, and no other row of the file is written."""
    n, dim, file, rule = 2**20 + 10, 2100, tmp_path / "pool", Langevin(0.1, 0.5, clamp=(0.0, 1.0))
    energy = MLPEnergy(dim, (3,))
    with monkeypatch.context() as patch:  # the file stays sparse: all chains start at 0
        patch.setattr(Storage, "parts", lambda *_: [])
        pool = pool_of(n, dim, clamp=rule.clamp, reinit_prob=0.0, storage_dtype=torch.uint8, storage_file=file)
    high = torch.tensor([2**31 // dim + 1, n - 1])
    rows = torch.cat([drawn(pool, 6), high])
    monkeypatch.setattr(pool, "_next_draw", lambda *_: Draw(rows, rows[:0], torch.empty(0, dim), None))
    assert pool.state_dict(copy=False)["x"].numel() > 2**31

    def alone(x, steps):
        """The same chains without a pool, and their stored rows, from a small storage per chain."""
        chains = Chains(x, 7, rows, torch.full_like(rows, steps - 2))
        done, _ = run_chains(energy, chains, rule, 2, shape=(dim,))
        cpu = torch.device("cpu")
        stored = []
        for row, state in zip(rows.tolist(), done.x, strict=True):
            one = Storage(1, dim, dtype=torch.uint8, box=rule.box, device=cpu, seed=7, first_chain=row)
            one.write(slice(0, 1), state[None], torch.tensor([steps]))
            stored.append(one.data)
        return done.x, torch.cat(stored)

    states = torch.zeros(8, dim)
    for steps in (2, 4):
        expected, stored = alone(states, steps)
        samples, _ = pool.sample(energy, 8, rule, 2)
        assert torch.equal(samples, expected)
        with open(file, "rb") as opened:  # the bytes at their places in the file
            for row, bytes_there in zip(rows.tolist(), stored, strict=True):
                opened.seek(row * dim)
                assert opened.read(dim) == bytes_there.numpy().tobytes()
        states = stored.float() * (1 / 255)
        assert torch.equal(pool.steps[rows], torch.full((8,), steps))
    assert int(pool.steps.sum()) == 8 * 4
    assert file.stat().st_blocks * 512 < 2**20


MEMORY = """
import torch, fastebm.pool.storage as storage
from fastebm import ChainPool, Langevin, MLPEnergy
torch.set_num_threads(1)
storage._CHUNK_BYTES["cpu"] = CHUNK = 2**20
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
energy, rule = MLPEnergy(512, (8,)), Langevin(0.1, 0.1)
def work(n, **options):
    p = ChainPool(n, 512, clamp=(0.0, 1.0), reinit_prob=0.5, **options)
    for policy in ("ignore", "reinit"):
        p.advance(energy, rule, 1, on_nonfinite=policy)
    p.sample(energy, 40, rule, 1)
    p.stats()
    p.load_state_dict(p.state_dict(copy=False))
    return p
work(50)
pools = []
for n, dtype in ((20_000, torch.uint8), (10_000, torch.float32)):
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    pools.append(work(n, storage_dtype=dtype))
    print(n * 512 * dtype.itemsize, (memory("VmHWM") - before - n * (512 * dtype.itemsize + 28 + 40)) / CHUNK)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process' peak memory")
def test_memory_beside_the_pool_is_a_few_chunks():
    """In chunks of float32 states, 1 MiB each here. The pools take 10 and 20 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300, check=True)
    for line in done.stdout.splitlines():
        size, chunks = map(float, line.split())
        assert size > 9 * 2**20
        assert chunks < 14  # about ten were measured
