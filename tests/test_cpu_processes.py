"""Numba's kernels in threads and processes, and the cache on disk that they are loaded from."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from small_energies import STEP, Square, seeded_mlp

from fastebm import langevin_sample, threads
from fastebm import rng as noise
from fastebm.rng import Stream
from fastebm.threads import share


def threads_in_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_pytorchs_threads_are_left_as_they_were(team, n):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n)
        for make in (seeded_mlp, Square):
            langevin_sample(make(40), 40, batch_size=2000, steps=2, **STEP)
            assert torch.get_num_threads() == n
            assert threads_in_a_new_thread() == n
        with pytest.raises(ZeroDivisionError):
            share(range(8), lambda item, interrupted: item // 0, n)
        assert torch.get_num_threads() == n
        assert threads_in_a_new_thread() == n
    finally:
        torch.set_num_threads(before)


def test_shared_work_is_done_once_each_and_stops_at_an_error(team):
    done = []
    share(range(100), lambda item, interrupted: done.append(item), 3)
    assert sorted(done) == list(range(100))
    started = threading.Barrier(2, timeout=60)

    def work(item, interrupted):
        started.wait()
        if item == 0:
            raise KeyboardInterrupt
        while not interrupted():
            pass

    with pytest.raises(KeyboardInterrupt):
        share(range(50), work, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch has another OpenMP")
def test_work_is_shared_by_the_threads_that_pytorch_has_already():
    """Both threads work at once, and the next call uses the same two."""
    both = threading.Barrier(2, timeout=60)
    seen = set()

    def work(item, interrupted):
        both.wait()
        seen.add(threading.get_native_id())

    share(range(2), work, 2)
    before = seen.copy()
    share(range(2), work, 2)
    assert len(before) == 2
    assert seen == before


def test_numbers_drawn_in_several_threads_at_once(team):
    chains = torch.arange(30_000)
    expected = [noise.normal(seed, Stream.LANGEVIN, chains, 0, 5) for seed in range(3)]
    found = {}
    drawers = [
        threading.Thread(target=lambda s=seed: found.update({s: noise.normal(s, Stream.LANGEVIN, chains, 0, 5)}))
        for seed in range(3)
    ]
    with threads.threads(3):
        for thread in drawers:
            thread.start()
        for thread in drawers:
            thread.join()
    assert all(torch.equal(found[seed], x) for seed, x in enumerate(expected))


def test_calls_in_several_threads_at_once(team):
    energy = seeded_mlp(40)
    expected = langevin_sample(energy, batch_size=300, steps=5, **STEP)
    found = [None] * 4

    def call(i):
        found[i] = langevin_sample(energy, batch_size=300, steps=5, **STEP)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(x, expected) for x in found)


# -- processes -------------------------------------------------------------------------------------------------
SCRIPT = """
import sys, torch, fastebm
torch.manual_seed(0)
energy = fastebm.build(3, hidden_sizes=(8, 8))
options = {"step_size": 0.1, "noise_scale": 0.3, "seed": 1, "return_info": True}
x, info = fastebm.langevin_sample(energy, batch_size=5, steps=3, **options)
print(info.kernels, "numba" in sys.modules, x.double().sum().item())
"""


def run(script=SCRIPT, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


def result(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out.split()


@pytest.mark.slow
def test_the_cache_is_filled_used_and_repaired(tmp_path):
    """Two processes start without a cache; a later one loads it without Numba; a damaged file is written again."""
    folder = {"NUMBA_CACHE_DIR": str(tmp_path / "new")}
    both = [run(**folder), run(**folder)]
    first, second = map(result, both)
    assert first == second
    assert first[:2] == ["numba", "True"]
    later = result(run(**folder))
    assert later == ["numba", "False", first[2]]
    files = sorted((tmp_path / "new").iterdir())
    assert files
    assert not [file for file in files if file.suffix != ".kernel"]
    draw = next(file for file in files if file.name.startswith("update.draw"))
    whole = draw.read_bytes()
    draw.write_bytes(whole[:-100] + bytes(100))
    assert result(run(**folder))[2] == first[2]
    assert result(run(**folder)) == later


@pytest.mark.slow
def test_without_a_folder_to_keep_them_in(tmp_path):
    nowhere = tmp_path / "file"
    nowhere.touch()
    where = {"NUMBA_CACHE_DIR": str(nowhere / "a"), "XDG_CACHE_HOME": str(nowhere / "b")}
    assert result(run(**where))[:2] == ["numba", "True"]


@pytest.mark.slow
def test_without_numba():
    without = "import sys; sys.modules['numba'] = None" + SCRIPT
    found = result(run(without))
    assert found[0] == "torch"
    assert float(found[2]) == pytest.approx(float(result(run())[2]), abs=1e-4)
    assert result(run(NUMBA_DISABLE_JIT="1"))[0] == "torch"


THREADS = """
import os, torch, fastebm
torch.manual_seed(0)
energy = fastebm.build(40, hidden_sizes=(32, 32))
before = len(os.listdir("/proc/self/task"))
x = fastebm.langevin_sample(energy, batch_size=2000, steps=20, step_size=0.1, noise_scale=0.3, seed=1)
started = len(os.listdir("/proc/self/task")) - before
print(torch.get_num_threads(), started, x.numpy().tobytes().hex()[:4000])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_omp_num_threads_says_how_many_work():
    one, two = (result(run(THREADS, OMP_NUM_THREADS=n)) for n in "12")
    assert one[:2] == ["1", "0"]
    assert two[0] == "2"
    assert int(two[1]) <= 1
    assert one[2] == two[2]


FORKED = """
import os, numpy, torch, fastebm
torch.set_num_threads(2)
torch.manual_seed(0)
energy = fastebm.build(40, hidden_sizes=(32, 32))
sampler = fastebm.Langevin(step_size=0.1, noise_scale=0.3)

def sample():
    x = fastebm.langevin_sample(energy, batch_size=600, steps=4, step_size=0.1, noise_scale=0.3, seed=1)
    pool = fastebm.ChainPool(40_000, 40, seed=1)
    pool.labels = torch.from_numpy(numpy.arange(40_000))
    pool.labels = None
    pool.sample(energy, 1200, sampler, 2)
    pool.advance(energy, sampler, 1)
    pool.load_state_dict(pool.state_dict())
    pool.add(x.clamp(-1, 1))
    assert pool.stats().n_chains == len(pool.ages) == 40_000
    return [v.numpy() for v in (x, pool.states)]  # PyTorch's own operations on many numbers would hang

x = sample()
child = os.fork()
if child == 0:
    same = all(map(numpy.array_equal, sample(), x))
    os._exit(0 if same and torch.get_num_threads() == 2 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), all(map(numpy.array_equal, sample(), x)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_samples_too():
    """A fork does not copy its parent's threads."""
    assert result(run(FORKED)) == ["0", "True"]
