"""The command in processes of its own, where imports and signals matter."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import SMALL, newest

from fastebm.train.folder import saved_config
from fastebm.train.loop import train

pytestmark = pytest.mark.usefixtures("few_trees")


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_import_brings_no_optional_package():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import fastebm; fastebm.langevin_sample\n"
        "packages = {'matplotlib', 'pandas', 'sklearn', 'safetensors', 'triton'}\n"
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
    assert newest(out).step == step > 1
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
