"""The run folder: its files, which run is in it, and its lock.

    config.json               every hyper-parameter, and the data set
    checkpoints/              the two newest (checkpoint.py): all that is needed to go on, bit for bit
      step-00001200/
        model.safetensors     the averaged weights, for sampling
    metrics.jsonl             one line per step
    tensorboard/              the same for TensorBoard, if asked for
    summary.json              held-out measures, device, backend and versions
    train_energies.npy        sorted energies of the training rows
    samples.png  energies.png  training.png
    evaluation.json           measures by ``fastebm evaluate``

The others from summary.json on are written when training is done.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..pool.processes import Processes
from ..words import did_you_mean
from . import checkpoint
from .atomic import write_atomically
from .models import build_model
from .recipe import TrainConfig, current

__all__ = [
    "BOARD",
    "CHECKPOINTS",
    "CONFIG",
    "ENERGIES",
    "EVALUATION",
    "FREE_SETTINGS",
    "METRICS",
    "SUMMARY",
    "check_empty",
    "fixed_settings",
    "load_model",
    "located",
    "locked",
    "metrics_up_to",
    "need_tensorboard",
    "open_board",
    "open_log",
    "saved_config",
    "write_json",
]

CHECKPOINTS, CONFIG, METRICS, SUMMARY = "checkpoints", "config.json", "metrics.jsonl", "summary.json"

# float32 (n,): with these a run can score other rows on a machine that does not have its data.
ENERGIES = "train_energies.npy"

EVALUATION = "evaluation.json"

BOARD = "tensorboard"

_LOCK = ".lock"

# Settings that may change when a run is resumed: they do not say what was computed so far. More steps extend the run.
FREE_SETTINGS = ("steps", "device", "backend", "on_nonfinite")


# -- which run is here --------------------------------------------------------------------------------------


def located(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """A run folder and its newest checkpoint. If the path is a checkpoint: its run folder, and that checkpoint.

    Raises:
        ValueError: this is no run, or LATEST names no checkpoint.
    """
    path = Path(path)
    whole = path.absolute()
    if path.is_file() and (path.parent / CHECKPOINTS).is_dir():
        raise ValueError(f"{path} is a file of a run: name its folder, {path.parent}")
    if re.fullmatch(r"step-\d+", path.name) and whole.parent.name == CHECKPOINTS:
        return (path.parent.parent if len(path.parts) > 2 else whole.parent.parent), path
    if not (path / CHECKPOINTS).is_dir():
        here, beside = (sorted({str(n.parent) for n in p.glob(f"*/{CHECKPOINTS}")}) for p in (path, path.parent))
        near = "" if here else did_you_mean(str(path), beside)
        if not near and (here or beside):
            near = f": there are {', '.join((here or beside)[-5:])}"
        raise ValueError(f"{path} is not a run of fastebm: there is no {path / CHECKPOINTS}{near}")
    return path, checkpoint.newest(path / CHECKPOINTS)


def saved_config(run: str | os.PathLike[str]) -> TrainConfig:
    """The configuration of a run folder, from its newest checkpoint, or of the checkpoint that is named.

    Raises:
        ValueError: this is no run, it is damaged, or its config.json was edited.
    """
    out, path = located(run)
    config = _config_of(path, checkpoint.Saved(path).values)
    beside = out / CONFIG
    if not beside.exists():
        return config
    asked = _read_json(beside)
    if fixed_settings(asked) != fixed_settings(config.to_dict()):
        raise ValueError(
            f"{beside} is not the configuration that {path} was trained with: undo the change, or delete {beside}"
        )
    # A run may have been extended, and killed before its next checkpoint: then config.json has the new end.
    return TrainConfig.from_dict({**config.to_dict(), "steps": asked["steps"]}) if "steps" in asked else config


def fixed_settings(config: Any) -> Any:
    """The settings that must not change when a run is resumed."""
    return {k: v for k, v in current(config).items() if k not in FREE_SETTINGS} if isinstance(config, dict) else config


def load_model(run: str | os.PathLike[str]) -> tuple[nn.Module, TrainConfig]:
    """The energy of a run folder, or of a checkpoint in it, with the averaged weights; and its configuration.

    Raises:
        ValueError: this is no run, or it is damaged.
    """
    path = located(run)[1]
    saved = checkpoint.Saved(path)
    config, tensors = _config_of(path, saved.values), saved.tensors("model")
    try:
        model = build_model(config)
        model.load_state_dict(tensors)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the energy that its configuration describes: {error}") from None
    return model.requires_grad_(False), config


def _config_of(path: Path, values: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.from_dict(values["config"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no configuration that this fastebm can read: {error}") from None


# -- the folder of a new or resumed run ---------------------------------------------------------------------


def check_empty(out: Path) -> None:
    """Refuse a folder for a new run if anything is in it."""
    if out.is_dir() and any(path.name != _LOCK for path in out.iterdir()):
        # A run that was killed before its first checkpoint can't be resumed.
        whole = any((out / CHECKPOINTS).glob("step-*[0-9]"))
        what = "already holds a run: resume it, or" if whole else "is not empty, and holds no run to resume:"
        raise ValueError(f"{out} {what} choose another folder")


@contextlib.contextmanager
def locked(out: Path, processes: Processes) -> Iterator[None]:
    """No other run can use the folder meanwhile. The lock is the system's, so it ends with the process."""
    from filelock import FileLock, Timeout  # an optional package, which torch needs as well

    lock = FileLock(out / _LOCK)

    with processes.together():
        if processes.rank == 0:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(
                    f"{out} is in use: another process trains in it; wait for it, stop it, or choose another folder"
                ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def open_log(path: Path | None) -> Iterator[Any]:
    """metrics.jsonl, opened to append lines. None: the lines are thrown away."""
    try:
        with open(path or os.devnull, "a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        if error.filename is None:  # a failed write does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def need_tensorboard() -> None:
    """Raise ValueError unless tensorboard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError('--tensorboard needs a package that is missing: pip install "fastebm[tensorboard]"')


@contextlib.contextmanager
def open_board(out: Path | None, step: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A function that writes rows of metrics.jsonl for TensorBoard. None: it does nothing.

    step: iterations that are done. What an earlier call wrote of later ones is hidden.
    """
    if out is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / BOARD), purge_step=step + 1) as board:

        def write(row: Mapping[str, float]) -> None:
            for name, value in row.items():
                if name != "step":
                    board.add_scalar(name, value, int(row["step"]))

        yield write


def metrics_up_to(step: int, path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl up to a step. Later ones, of steps that will be done again, are removed."""
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text: move it away to go on without it") from None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # half a line: the run was killed while writing it
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or row["step"] > step:
            break
        rows.append(row)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON") from None
