"""README.md is up to date: its tables come from committed rows, its Python runs, and its commands exist."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch

from fastebm.cli import main

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_rows():
    done = subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_python_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names = {"loader": [torch.rand(8, 784) for _ in range(2)]}
    for block in blocks:
        exec(block.replace("batch_size=1024", "batch_size=3").replace("steps=60", "steps=2"), names)
    assert names["samples"].shape == (8, 784)
    assert names["pool"].draws == 2


def test_the_two_commands_are_there_word_for_word():
    assert 'pip install -e ".[cli]" && fastebm train digits' in README
    assert 'pip install -e ".[test]" && pytest' in README


def test_every_command_of_the_readme_exists():
    commands = set(re.findall(r"^ +fastebm (\w+)", README, re.MULTILINE))
    assert commands == {"sample", "score", "evaluate", "train", "info", "bench"}
    for command in commands:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([command, "--help"])
