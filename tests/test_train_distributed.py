"""Training by several real processes: the run of one process, but for the order of sums, and faults of one for all."""

import dataclasses
import errno
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_runs import images

from fastebm import ChainPool
from fastebm.pool.draws import draw_distinct
from fastebm.rng import Stream, words
from fastebm.train import checkpoint, writer
from fastebm.train import loop as training
from fastebm.train.folder import saved_config
from fastebm.train.loop import train
from fastebm.train.recipe import TrainConfig, configured

TINY = TrainConfig(
    seed=3, steps=6, batch_size=9, hidden_sizes=(7, 5), pool_size=20, langevin_steps=2, warmup_steps=0, device="cpu"
)  # fmt: skip
FEW = dataclasses.replace(TINY, batch_size=2)
SMALL = {"seed": 3, "steps": 6, "batch_size": 9, "hidden_sizes": (7, 5), "langevin_steps": 2, "warmup_steps": 0}
OTHERS = {  # chains from the data, draws alone, and a parameter of its own
    "cd": configured(images(), {**SMALL, "objective": "cd", "device": "cpu"}),
    "multi_dsm": configured(images(), {**SMALL, "objective": "multi_dsm", "device": "cpu"}),
    "nce": configured(
        images(), {**SMALL, "objective": "nce", "device": "cpu", "objective_options": {"n_components": 2}}
    ),
}
TIMEOUT = 60  # seconds; a process that is left waiting fails the test


def run(config, out, *, rank=0, size=1, meet=None, **options):
    """One process of a run; what it tells."""
    training.write_report = lambda *_: {"here": rank}
    group = None
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
        )
        group = dist.group.WORLD
    try:
        return train(config, out, data=images(), process_group=group, checkpoint_every=2, **options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


# -- what the processes do, each in a folder of its own -----------------------------------------------------


def whole(folder, **place):
    return run(TINY, folder / "run", **place)


def few(folder, **place):
    """Some have no chain and no data in a step."""
    return run(FEW, folder / "run", **place)


def cd(folder, **place):
    return run(OTHERS["cd"], folder / "run", **place)


def multi_dsm(folder, **place):
    return run(OTHERS["multi_dsm"], folder / "run", **place)


def nce(folder, **place):
    return run(OTHERS["nce"], folder / "run", **place)


def stopped(folder, rank, **place):
    """The last one alone is told to stop, in step 3."""
    steps = []
    return run(
        TINY, folder / "run", rank=rank, **place, on_step=steps.append,
        should_stop=lambda: rank == place["size"] - 1 and len(steps) == 2,
    )  # fmt: skip


def resumed(folder, **place):
    return run(TINY, folder.parent / "stopped 3" / "run", resume=True, **place)


def killed(folder, rank, **place):
    """The last one dies in step 5; the others' clock starts."""

    def on_step(row):
        if row["step"] == 4:
            if rank == place["size"] - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            started.append(time.monotonic())

    started = []
    told = run(TINY, folder / "run", rank=rank, **place, on_step=on_step)
    return {**told, "seconds": time.monotonic() - started[0]}


def other_configs(folder, rank, **place):
    return run(dataclasses.replace(TINY, seed=rank), folder / "run", rank=rank, **place)


def in_use(folder, rank, **place):
    """Of a folder where another run is at work."""
    from filelock import FileLock

    (folder / "run").mkdir(exist_ok=True)
    lock = FileLock(folder / "run" / ".lock")
    if rank == 0:
        lock.acquire()
    return run(TINY, folder / "run", rank=rank, **place)


def full_disk(folder, rank, **place):
    write = writer.write_tensors

    def full(path, tensors):
        if rank == 1 and "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, tensors)

    writer.write_tensors = full
    return run(TINY, folder / "run", rank=rank, **place)


def not_finite(folder, rank, on_nonfinite="raise", **place):
    """Chains of the last process, when they are drawn next."""
    sample, calls = ChainPool.sample, []

    def poisoned(pool, *args, **options):
        calls.append(1)
        if rank == place["size"] - 1 and len(calls) == 3:
            drawn = draw_distinct(pool.seed, pool.draws, len(pool), TINY.batch_size)
            coins = words(pool.seed, Stream.POOL, drawn, pool.draws, 1, 0xFFFFFE)[0][:, 0]
            rows = drawn[coins >= pool.reinit_prob * 2**32] - pool.first_chain  # a chain that starts again forgets it
            pool.states[rows[(rows >= 0) & (rows < pool.n_local)][:1]] = torch.inf
        return sample(pool, *args, **options)

    ChainPool.sample = poisoned
    done = []
    config = dataclasses.replace(TINY, on_nonfinite=on_nonfinite)
    told = run(config, folder / "run", rank=rank, **place, on_step=done.append)
    return {**told, "nonfinite": [row["nonfinite"] for row in done]}


def reinit(folder, **place):
    return not_finite(folder, on_nonfinite="reinit", **place)


def damaged(folder, rank, **place):
    """A file that only the last process needs."""
    out = folder / "run"
    if rank == 0:
        shutil.copytree(folder.parent / "whole 3" / "run", folder / "copy")
        path = folder / "copy" / "checkpoints" / "step-00000006" / "rows-2.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        (folder / "copy").rename(out)
    while not out.exists():
        time.sleep(0.01)
    return run(TINY, out, rank=rank, resume=True, **place)


SCENES = [
    (whole, 2), (whole, 3), (few, 3), (stopped, 3), (resumed, 2), (killed, 2), (other_configs, 2), (in_use, 2),
    (full_disk, 2), (not_finite, 2), (reinit, 2), (damaged, 3), (cd, 2), (multi_dsm, 2), (nce, 2),
]  # fmt: skip


def play(folder):
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # as DistributedDataParallel does: once, not in each process
    fork = multiprocessing.get_context("fork")
    for scene, size in SCENES:
        here = folder / f"{scene.__name__} {size}"
        here.mkdir()

        def process(rank, scene=scene, size=size, here=here):
            told = scene(here, rank=rank, size=size, meet=here / "meet")
            (here / f"{rank}.json").write_text(json.dumps(told))
            if "error" not in told:
                dist.barrier()  # destroying too early aborts the others
                dist.destroy_process_group()
            os._exit(0)

        running = [fork.Process(target=process, args=(rank,), daemon=True) for rank in range(size)]
        for one in running:
            one.start()
        for one in running:
            one.join(2 * TIMEOUT)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=4 * TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_report", lambda *_: {})
        for name, config in (("whole", TINY), ("few", FEW), *OTHERS.items()):
            train(config, folder / name, data=images())
    return folder


def told(scenes, name):
    return [json.loads(path.read_text()) for path in sorted((scenes / name).glob("?.json"))]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_run(out, expected):
    """The same numbers but for the order of sums."""
    a, b = metrics(out), metrics(expected)
    assert [row["step"] for row in a] == [row["step"] for row in b] == [1, 2, 3, 4, 5, 6]
    assert a[0].keys() == b[0].keys()
    for name in a[0].keys() - {"seconds", "chain_steps_per_second", "rows_per_second"}:
        assert [row[name] for row in a] == pytest.approx([row[name] for row in b], rel=1e-4, abs=1e-6)
    a_end, b_end = (checkpoint.Saved(checkpoint.newest(run / "checkpoints")) for run in (out, expected))
    assert a_end.step == b_end.step == 6
    for name, t in b_end.tensors("model").items():
        torch.testing.assert_close(a_end.tensors("model")[name], t, rtol=1e-4, atol=1e-6)
    for name, t in b_end.tensors("state").items():
        torch.testing.assert_close(a_end.tensors("state")[name], t, rtol=1e-4, atol=1e-6)
    if b_end.values["pool"]:
        for name in ("steps", "reinits"):
            assert torch.equal(a_end.rows(0, 20)[name], b_end.rows(0, 20)[name])


@pytest.mark.parametrize("name", ["whole 2", "whole 3", "few 3", "cd 2", "multi_dsm 2", "nce 2"])
def test_distributed_training_is_that_of_one_process(scenes, alone, name):
    same_run(scenes / name / "run", alone / name.split()[0])
    assert told(scenes, name) == [{"here": 0}] + [{}] * (int(name[-1]) - 1)  # only the first one reports
    saved = checkpoint.Saved(checkpoint.newest(scenes / name / "run" / "checkpoints"))
    assert len(list(saved.path.glob("rows-*"))) == int(name[-1])
    assert sum(name in (".lock", "config.json", "metrics.jsonl") for name in os.listdir(scenes / name / "run")) == 3


def test_distributed_samples_of_equal_weights_are_bit_equal(scenes, alone):
    """The first step's, whose weights are those of the seed."""
    for name in ("whole 2", "whole 3"):
        a, b = metrics(scenes / name / "run")[0], metrics(alone / "whole")[0]
        assert a["energy_samples"] == pytest.approx(b["energy_samples"], rel=1e-6)
        first = checkpoint.Saved(scenes / name / "run" / "checkpoints" / "step-00000004")
        assert first.rows(0, 20)["x"].shape == (20, 9)


def test_distributed_stop_of_one_stops_all_and_any_number_resumes(scenes, alone, tmp_path, monkeypatch):
    out = scenes / "stopped 3" / "run"
    assert told(scenes, "stopped 3") == [{"error": "Stopped: stopped at step 3 of 6"}] * 3
    assert told(scenes, "resumed 2") == [{"here": 0}, {}]
    same_run(out, alone / "whole")  # 3 processes, then 2
    monkeypatch.setattr(training, "write_report", lambda *_: {})
    shutil.copytree(scenes / "whole 3" / "run", tmp_path / "run")
    train(TINY, tmp_path / "run" / "checkpoints" / "step-00000004", data=images(), resume=True)
    same_run(tmp_path / "run", alone / "whole")  # 3 processes, then 1


def test_distributed_loss_of_a_process_ends_the_others_and_the_run_resumes(scenes, alone, tmp_path, monkeypatch):
    (left,) = told(scenes, "killed 2")
    assert re.match(
        "RuntimeError: process 0 of 2 lost another one, which ended or was silent for 120 s: resume the run from its "
        "last checkpoint, with any number of processes",
        left["error"],
    )
    assert left["seconds"] < 30
    monkeypatch.setattr(training, "write_report", lambda *_: {})
    out = shutil.copytree(scenes / "killed 2" / "run", tmp_path / "run")
    assert checkpoint.Saved(checkpoint.newest(out / "checkpoints")).step in (2, 4)
    train(saved_config(out), out, data=images(), resume=True)
    same_run(out, alone / "whole")


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        (
            "other_configs 2",
            ["ValueError: .* the same calls, and some have another config, out, resume"] * 2,
        ),
        (
            "in_use 2",
            ["ValueError: .* is in use", "RuntimeError: process 0 of 2 can't go on: ValueError: .* is in use"],
        ),
        (
            "full_disk 2",
            [
                "RuntimeError: process 1 of 2 can't go on: OSError: .*No space left",
                "OSError: .*No space left on device: the checkpoint of step 4 is not written",
            ],
        ),
        ("not_finite 2", ["NonFiniteError: training failed in step 3"] * 2),
        (
            "damaged 3",
            ["RuntimeError: process 2 of 3 can't go on: DamagedError: .*rows-2.safetensors is damaged"] * 2
            + ["DamagedError: .*rows-2.safetensors is damaged.*step-00000004 is there too"],
        ),
    ],
)
def test_distributed_fault_of_one_is_one_of_all(scenes, name, errors):
    found = [each["error"] for each in told(scenes, name)]
    assert len(found) == len(errors)
    for text, pattern in zip(found, errors, strict=True):
        assert re.match(pattern, text)


def test_distributed_faults_leave_the_last_checkpoint(scenes):
    for name, step in (("full_disk 2", 2), ("not_finite 2", 2), ("damaged 3", 6)):
        assert checkpoint.newest(scenes / name / "run" / "checkpoints").name == f"step-0000000{step}"


def test_distributed_chains_restart_alone_and_are_counted_on_all(scenes):
    assert [each["nonfinite"] for each in told(scenes, "reinit 2")] == [[0, 0, 1, 0, 0, 0]] * 2


# -- torchrun -----------------------------------------------------------------------------------------------


def torchrun(size, *arguments):
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "fastebm", "train",
        "digits", "--device", "cpu", *arguments,
    ]  # fmt: skip


def until_trained(process, out, steps):
    """The processes that train, when so many steps are done."""
    for _ in range(600):
        assert process.poll() is None, process.communicate()
        if (out / "checkpoints" / f"step-{steps:08d}").is_dir():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("no step in a minute")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"fastebm" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("fault", ["kill", "SIGTERM", "SIGINT"])
def test_distributed_run_by_torchrun_survives(tmp_path, fault):
    """One process is killed, or torchrun is told to stop; the run resumes with another number of processes."""
    out = tmp_path / "run"
    small = ["--steps", "100000", "--batch-size", "16", "--hidden-sizes", "8", "4", "--checkpoint-every", "20"]
    process = subprocess.Popen(
        torchrun(2, *small, "--out", str(out)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        workers = until_trained(process, out, 20)
        assert len(workers) == 2
        if fault == "kill":
            os.kill(workers[1], signal.SIGKILL)
        elif fault == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)  # as the terminal does
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert stdout == ""
    assert process.returncode != 0
    step = checkpoint.Saved(checkpoint.newest(out / "checkpoints")).step
    if fault == "kill":
        assert "fastebm: error: process 0 of 2 lost another one" in stderr
    else:
        assert f"fastebm: stopped at step {step} of 100000 and saved; to go on: fastebm train digits --resume" in stderr
        assert len(metrics(out)) == step
    steps = []

    def on_step(row):
        steps.append(row["step"])
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(saved_config(out), out, resume=True, on_step=on_step)
    assert steps == [step + 1, step + 2, step + 3]


if __name__ == "__main__":
    play(Path(sys.argv[1]))
