"""The command, end to end, in this process."""

import dataclasses
import json
import re
import shutil
import time

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from commands import SMALL, error, newest

from fastebm import threads
from fastebm.cli import main, options
from fastebm.cli import progress as progress_module
from fastebm.cli import sample as sample_command
from fastebm.cli import train as train_command
from fastebm.cli.progress import Progress
from fastebm.data.sets import load
from fastebm.train.folder import saved_config
from fastebm.train.recipe import TrainConfig, recipe
from fastebm.train.resources import seconds_of_a_step

pytestmark = pytest.mark.usefixtures("few_trees")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of the whole command, with fewer fresh steps than the recipe's."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", *SMALL, "--out", str(out)]) == 0
    return out


def test_train_writes_a_whole_run(run):
    summary = json.loads((run / "summary.json").read_text())
    expected = {
        "auroc_uniform", "auroc_shuffled", "auroc_rotated", "auroc_inverted", "two_sample_accuracy",
        "classes_present", "class_shares", "chain_steps", "seconds", "backend", "versions",
    }  # fmt: skip
    assert expected <= summary.keys()
    assert summary["chain_steps"] == 3 * 16 * 20
    assert summary["versions"]["torch"] == torch.__version__
    config = json.loads((run / "config.json").read_text())
    assert (config["hidden_sizes"], config["batch_size"], config["steps"]) == ([8, 4], 16, 3)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["samples", "energies", "training"])
def test_pictures_are_pictures(run, name):
    image = matplotlib.image.imread(run / f"{name}.png")
    height, width = image.shape[:2]
    assert 400 <= height <= 2500
    assert 800 <= width <= 3000
    assert len(np.unique(image[..., :3] @ [1.0, 300.0, 90_000.0])) > 20  # colours: something is drawn


def test_sample_writes_arrays_and_pictures(run, tmp_path, capsys):
    common = ["sample", str(run), "-n", "10", "--steps", "4", "--device", "cpu"]
    for name in ("a.npy", "b.npy", "c.PNG"):
        assert main([*common, "--seed", "5", "--out", str(tmp_path / name)]) == 0
    assert main([*common, "--seed", "6", "--out", str(tmp_path / "d.npy")]) == 0
    a, b, d = (np.load(tmp_path / f"{name}.npy") for name in "abd")
    assert a.shape == (10, 8, 8)
    assert a.dtype == np.float32
    assert 0.0 <= a.min() < a.max() <= 1.0
    assert np.array_equal(a, b)
    assert not np.array_equal(a, d)
    assert min(matplotlib.image.imread(tmp_path / "c.PNG", format="png").shape[:2]) > 300
    assert "10 samples (torch, tiles, on cpu)" in capsys.readouterr().out


def test_samples_as_tables_arrays_and_pictures(run, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal([3.0, 100.0, -5.0], [1.0, 9.0, 0.1], (60, 3)))
    pd.DataFrame(np.load(tmp_path / "x.npy"), columns=["a", "b c", "d"]).to_csv(tmp_path / "x.csv", index=False)
    table = tmp_path / "table"
    assert main(["train", "--data", str(tmp_path / "x.csv"), *SMALL, "--out", str(table)]) == 0
    for source, columns in ((table, ["a", "b c", "d"]), (run, [str(i) for i in range(64)])):
        for name in ("y.npy", "y.npz", "y.CSV"):
            assert main(["sample", str(source), "-n", "9", "--out", str(tmp_path / name)]) == 0
        x, arrays, frame = np.load(tmp_path / "y.npy"), np.load(tmp_path / "y.npz"), pd.read_csv(tmp_path / "y.CSV")
        assert np.array_equal(arrays["samples"], x)
        assert list(frame) == columns
        assert np.array_equal(frame.to_numpy(x.dtype), x.reshape(9, -1))
        assert ("columns" in arrays) == (source == table)
    assert np.load(tmp_path / "y.npz")["samples"].shape == (9, 8, 8)
    signs = {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff", "pdf": b"%PDF"}
    for suffix, sign in signs.items():
        assert main(["sample", str(run), "-n", "9", "--out", str(tmp_path / f"y.{suffix}")]) == 0
        assert (tmp_path / f"y.{suffix}").read_bytes().startswith(sign)


def test_set_takes_any_value_of_the_recipe(tmp_path, monkeypatch, capsys):
    seen = {}

    def train(config, out, **_):
        seen["config"] = config
        raise RuntimeError("enough seen")

    monkeypatch.setattr(train_command, "train", train)
    settings = ["learning_rate=1e-3", "hidden_sizes=8,4", "betas=0.8,0.99", "max_grad_norm=none", "decay=cosine"]
    settings += ["grad-clip=0.5", "noise_std=0.3", "seed=5"]
    command = ["train", "moons", "--set", *settings, "--set", "steps=7", "--threads", "1"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 1
    values = dataclasses.asdict(seen["config"])
    wanted = {"learning_rate": 1e-3, "hidden_sizes": (8, 4), "betas": (0.8, 0.99), "max_grad_norm": None}
    wanted |= {"decay": "cosine", "grad_clip": 0.5, "noise_std": 0.3, "seed": 5, "steps": 7}
    assert {key: values[key] for key in wanted} == wanted
    assert values["pool_size"] == train_command.TrainConfig().pool_size
    # The data are those of the seed.
    assert seen["config"].data == load("moons", 5).info


def test_a_finished_run_is_extended(run, tmp_path, capsys):
    shutil.copytree(run, longer := tmp_path / "run")
    assert main(["train", "--resume", str(longer), "--steps", "3"]) == 0
    assert "there is nothing to resume (--steps N, more than it has, extends it)" in capsys.readouterr().out
    assert main(["train", "--resume", str(longer), "--set", "steps=5"]) == 0
    assert f"{longer}: 5 steps" in capsys.readouterr().out
    assert newest(longer).step == 5
    assert json.loads((longer / "config.json").read_text())["steps"] == 5
    assert "has done 5 steps: steps must be more to extend it, got 4" in error(
        capsys, "train", "--resume", longer / "checkpoints" / "step-00000005", "--steps", "4"
    )


@pytest.fixture
def on_two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_that_is_faster_comes_first(monkeypatch):
    chosen, seconds = [4], {4: 0.03, 2: 0.02, 1: 0.001}
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(threads, "_TIMED", 0.02)
    for fast in (1, 2, 4):
        seconds = {n: 0.001 if n == fast else 0.02 for n in (4, 2, 1)}
        measured = threads.fastest(lambda: time.sleep(seconds[chosen[-1]]), 4)  # noqa: B023
        assert next(iter(measured)) == fast
        assert measured.keys() == {4, 2, 1}
        assert chosen[-1] == 4


def test_threads_are_timed_again_when_steps_become_slow(monkeypatch, capsys, on_two_threads):
    measured, clock = [{2: 0.01, 1: 0.02}, {1: 0.02, 2: 0.1}], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress() as progress:
        timed = options.Threads(lambda n: measured.pop(0), progress)
        for seconds in (0.01, 0.2, 0.01) * 20:  # slow now and then
            clock[0] += 1.0
            timed.watch(seconds)
        assert (timed.n, torch.get_num_threads(), len(measured)) == (2, 2, 1)
        assert capsys.readouterr().err == ""
        for _ in range(30):
            clock[0] += 1.0
            timed.watch(0.1)
    assert (timed.n, torch.get_num_threads(), measured) == (1, 1, [])
    assert capsys.readouterr().err == (
        "fastebm: 1 thread of 2, because with 2 a step takes 5.0 times as long on this machine now "
        "(--threads sets it)\n"
    )


def test_train_and_sample_take_the_threads_that_are_faster(run, tmp_path, monkeypatch, on_two_threads):
    used = []
    monkeypatch.setattr(train_command, "seconds_of_a_step", lambda *_: {1: 0.01, 2: 0.05})
    monkeypatch.setattr(train_command, "train", lambda *_, **__: used.append(torch.get_num_threads()) or {}["stop"])
    command = ["train", "moons", "--device", "cpu", "--out", str(tmp_path / "run")]
    with pytest.raises(KeyError):
        main(command)
    with pytest.raises(KeyError):
        main([*command, "--threads", "2"])
    assert used == [1, 2]
    assert torch.get_num_threads() == 2
    # A resumed run has the number of before, whatever is faster now.
    monkeypatch.setattr(train_command, "seconds_of_a_step", None)
    with pytest.raises(KeyError):
        main(["train", "--resume", str(run), "--steps", "9"])
    assert used == [1, 2, 1]
    monkeypatch.setattr(sample_command, "fastest", lambda *_: {1: 0.01, 2: 0.05})
    monkeypatch.setattr(
        sample_command, "fresh_samples", lambda *_, **__: used.append(torch.get_num_threads()) or {}["stop"]
    )
    with pytest.raises(KeyError):
        main(["sample", str(run), "--device", "cpu", "--out", str(tmp_path / "x.npy")])
    assert used == [1, 2, 1, 1]


def test_a_run_that_diverged_is_said(tmp_path, capsys):
    command = ["train", "moons", *SMALL, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert "training diverged" not in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    diverged = {**summary, "diverged": True, "energy_gap": 500.0}
    train_command.show_summary(tmp_path, saved_config(tmp_path / "run"), diverged)
    assert "training diverged: samples have 500 nats more energy" in capsys.readouterr().out


def test_timing_a_step_moves_nothing():
    points = load("moons")
    config = TrainConfig(**{**recipe(points), "hidden_sizes": (8,), "batch_size": 16})
    state = torch.get_rng_state()
    assert set(seconds_of_a_step(config, points, 2)) == {2, 1}
    assert torch.equal(torch.get_rng_state(), state)


def test_long_sampling_shows_steps_and_time_left(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    command = ["sample", str(run), "--steps", "60", "--threads", "1", "--out", str(tmp_path / "x.npy")]
    assert main(command) == 0
    assert re.search(r"^sampling: step \d+/60: \d+ s left$", capsys.readouterr().err, re.MULTILINE)


def test_sample_backends_agree(run, tmp_path):
    for backend in ("torch", "reference"):
        arguments = ["-n", "4", "--steps", "4", "--device", "cpu", "--out", str(tmp_path / f"{backend}.npy")]
        assert main(["sample", str(run), "--backend", backend, *arguments]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "torch.npy"), np.load(tmp_path / "reference.npy"), atol=1e-5)


def test_sample_without_steps_is_uniform_noise(run, tmp_path):
    assert main(["sample", str(run), "-n", "50", "--steps", "0", "--out", str(tmp_path / "x.npy")]) == 0
    x = np.load(tmp_path / "x.npy")
    assert x.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * x.size))


def test_a_toy_from_training_to_pictures(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "pinwheel", *SMALL, "--pool-size", "40", "--out", str(out)]) == 0
    assert "AUROC against held-out rows: uniform 0." in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["data"]["name"], config["pool_size"], config["clamp"]) == ("pinwheel", 40, config["data"]["clamp"])
    for name in ("x.png", "x.npy"):
        assert main(["sample", str(out), "-n", "20", "--out", str(tmp_path / name)]) == 0
    assert matplotlib.image.imread(tmp_path / "x.png").shape[0] > 300
    x = np.load(tmp_path / "x.npy")
    assert x.shape == (20, 2)
    assert abs(x).max() < 5  # in the pinwheel's units, whose box is narrower than the states'


def test_info_says_what_would_run(capsys):
    assert main(["info", "--device", "cpu", "--input-size", "5", "--hidden-sizes", "6,7", "--activation", "tanh"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert f"numpy {np.__version__}" in text
    assert re.search(r"^triton \S+", text, re.MULTILINE)
    assert "MLP energy 5 -> 6 -> 7 -> 1 (tanh) on cpu:" in text
    assert "kernels: by Numba" in text
    assert "backend: torch (tiles)" in text
    assert "fused kernel: no, because" in text


def test_help_names_the_defaults(capsys):
    for command in ([], ["train"], ["sample"], ["info"], ["bench"]):
        with pytest.raises(SystemExit) as exit:
            main([*command, "--help"])
        assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"more of them extend the run (default: {TrainConfig().steps} for digits)" in text
    for key in {field.name for field in dataclasses.fields(TrainConfig)} - {"data", "clamp", "n_classes"}:
        if key.endswith("_options"):
            continue
        assert re.search(rf"\b{key}=\S", text), key
    assert "number of samples (default: 64)" in text
