"""``fastebm train``: from data to a run folder."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import torch

from ..data.dataset import Data
from ..data.files import find
from ..data.sets import SETS, load
from ..data.tables import load_array
from ..pool.processes import Processes, launched
from ..train import checkpoint
from ..train.folder import CHECKPOINTS, FREE_SETTINGS, SUMMARY, check_empty, located, saved_config
from ..train.loop import CHECKPOINT_EVERY, Stopped, train
from ..train.models import MODELS
from ..train.objectives import OBJECTIVES
from ..train.recipe import TrainConfig, configured
from ..train.resources import check_memory, resolve_device, seconds_of_a_step
from ..train.samplers import SAMPLERS
from ..words import did_you_mean
from . import settings as recipe_settings
from .options import Threads, add_device, add_threads, flat, need, on_threads, positive, rank, sizes
from .progress import Progress, Signals

_DEFAULTS = TrainConfig()
_WORDS = """Train an energy (by default an MLP, by persistent contrastive divergence), then sample from it, measure it
on held-out data and draw it. Ctrl-C (or SIGTERM) saves the run, and --resume continues it with the same bits. On
several processes: torchrun --nproc-per-node 2 -m fastebm train ..."""

# Options that say nothing about the run.
_OF_CALL = ("checkpoint_every", "tensorboard")

# Options of how a file is read. A resumed run reads it as before.
_READING = ("columns", "drop", "header", "label")


def add(commands: Any) -> None:
    command = commands.add_parser(
        "train", help="train an energy on data", description=_WORDS, epilog=recipe_settings.described()
    )
    command.set_defaults(run=_train)
    # With SUPPRESS, an option that was not given leaves no attribute: --resume must know which were given.
    command.add_argument(
        "dataset", nargs="?", metavar="DATASET", default=None,
        help="; ".join(f"{name}: {entry.words}" for name, entry in SETS.items()) + "; or --data FILE",
    )  # fmt: skip
    command.add_argument(
        "--data", type=Path, default=argparse.SUPPRESS, metavar="FILE",
        help="instead of a data set: your own table of real numbers (n, d), as CSV, TSV, Parquet or .npy",
    )  # fmt: skip
    command.add_argument(
        "--columns", nargs="+", default=argparse.SUPPRESS, metavar="NAME",
        help="of --data: names of the columns to keep (0, 1, ... in a file without names); default: all",
    )  # fmt: skip
    command.add_argument(
        "--drop",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="of --data: names of the columns to leave out",
    )
    command.add_argument(
        "--label", default=argparse.SUPPRESS, metavar="NAME[=VALUE]",
        help="of --data: a column of classes, which is left out; with a value, train on the rows that have it, and "
        "measure how well the energy detects the others",
    )  # fmt: skip
    command.add_argument(
        "--header", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="of --data in a text file: whether the first line holds names (default: detected)",
    )  # fmt: skip
    _add_names(command)
    for flag, kind, default, text in (
        (
            "--steps",
            int,
            f"{_DEFAULTS.steps} for digits",
            "training iterations; with --resume, more of them extend the run",
        ),
        ("--seed", int, _DEFAULTS.seed, "of everything random"),
        ("--batch-size", int, f"{_DEFAULTS.batch_size} for digits", "data rows per iteration, and chains drawn"),
        ("--pool-size", int, f"{_DEFAULTS.pool_size} for digits", "persistent chains"),
    ):
        command.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    command.add_argument(
        "--hidden-sizes",
        type=sizes,
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"hidden widths, from the input up (default: {' '.join(map(str, _DEFAULTS.hidden_sizes))} for digits)",
    )
    command.add_argument(
        "--set", nargs="+", action="extend", default=argparse.SUPPRESS, metavar="KEY=VALUE", dest="settings",
        help="any other value of the recipe; see the keys below",
    )  # fmt: skip
    add_device(command, default=argparse.SUPPRESS)
    add_threads(command)
    command.add_argument(
        "--on-nonfinite", choices=["raise", "reinit"], default=argparse.SUPPRESS,
        help="what to do with chains that are no longer finite: end the run, or start them again (default: raise)",
    )  # fmt: skip
    command.add_argument(
        "--checkpoint-every", type=positive, default=CHECKPOINT_EVERY, metavar="N", help="steps between checkpoints"
    )
    command.add_argument(
        "--tensorboard", action="store_true", help="also write the metrics for TensorBoard, into RUN/tensorboard"
    )
    command.add_argument(
        "--out", type=Path, default=argparse.SUPPRESS, metavar="RUN",
        help="run folder to write, new or empty (default: runs/<data>-<time>)",
    )  # fmt: skip
    command.add_argument(
        "--resume", type=Path, default=argparse.SUPPRESS, metavar="RUN",
        help="a run folder to continue as if it had never stopped, or one of its checkpoints/step-N; --steps, the "
        "number of processes, --device, --backend, --on-nonfinite, --threads and --checkpoint-every may change",
    )  # fmt: skip


def _add_names(command: argparse.ArgumentParser) -> None:
    """Add --objective, --model and --sampler."""
    for flag, table, default in (
        ("--objective", OBJECTIVES, _DEFAULTS.objective),
        ("--model", MODELS, "what fits the objective"),
        ("--sampler", SAMPLERS, "what fits the objective"),
    ):
        listed = "; ".join(f"{name}: {entry.words}" for name, entry in table.items())
        command.add_argument(
            flag, choices=list(table), default=argparse.SUPPRESS, metavar="NAME", help=f"{listed} (default: {default})"
        )


def _train(arguments: argparse.Namespace) -> int:
    need("matplotlib", "pandas", "sklearn", "safetensors")
    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "run", *_OF_CALL)}
    if "hidden_sizes" in given:
        given["hidden_sizes"] = flat(given["hidden_sizes"])
    settings = recipe_settings.parsed(given.pop("settings", ()))
    if twice := [key for key in settings if key in given]:
        raise ValueError(f"--{twice[0].replace('_', '-')} and --set {twice[0]}= were both given: leave one out")
    resume, name, file, n_threads = (given.pop(key, None) for key in ("resume", "dataset", "data", "threads"))
    with Progress(rank() == 0) as progress:
        if resume is None:
            reading = {key: given.pop(key) for key in _READING if key in given}
            out = given.pop("out", None)
            if out is not None:
                check_empty(out)
            data = _data(name, file, {**given, **settings}.get("seed", _DEFAULTS.seed), reading, progress)
            config = configured(data, {**given, **settings})
        else:
            _check_resumed(given, settings, file)
            out, data = located(resume)[0], None
            config = TrainConfig.from_dict({**saved_config(resume).to_dict(), **given, **settings})
            if name not in (None, config.data.name):
                raise ValueError(f"the run in {out} is trained on {config.data.name}, not on {name}: leave {name} out")
            if resume == out and (out / SUMMARY).exists() and config.steps <= _saved(out).step:
                if rank() == 0:
                    print(f"{out} is complete: there is nothing to resume (--steps N, more than it has, extends it)")
                return 0
            if n_threads is None:  # as many as before: sums may round differently with another number
                saved = _saved(resume).values.get("threads")
                n_threads = min(saved, torch.get_num_threads()) if isinstance(saved, int) else None
        with launched(config.device) as group, on_threads(n_threads):
            timed = None
            if group is None and n_threads is None and data is not None:
                timed = _timed_threads(config, data, progress)
            if out is None:  # the first process' clock names the folder for all
                new = Path("runs") / time.strftime(f"{name or file.stem}-%Y%m%d-%H%M%S")
                out = Path(Processes(group).gather(str(new))[0])
            source = f"{config.data.name} " if config.data.name in SETS else ""
            again = f"fastebm train {source}--resume {shlex.quote(str(out))}"
            if resume is not None and "steps" in {**given, **settings}:
                again += f" --steps {config.steps}"

            seconds = 0.0

            def on_step(row: dict[str, float]) -> None:
                nonlocal seconds
                progress.train(row, config.steps)
                if timed is not None:
                    timed.watch(row["seconds"] - seconds)
                seconds = row["seconds"]

            with Signals() as signals, progress.noting_warnings():
                try:
                    summary = train(
                        config,
                        out if resume is None else resume,
                        data=data,
                        resume=resume is not None,
                        checkpoint_every=arguments.checkpoint_every,
                        tensorboard=arguments.tensorboard,
                        process_group=group,
                        on_step=on_step,
                        on_phase=progress.show,
                        should_stop=signals.arrived,
                    )
                except Stopped as stopped:
                    progress.note(f"{stopped} and saved; to go on: {again}")
                    return 128 + (signals.number or signal.SIGTERM)  # no number: another process got the signal
                except KeyboardInterrupt:
                    where = f"; to go on from the last checkpoint: {again}" if _has_checkpoint(out) else ""
                    progress.note(f"interrupted{where}")
                    return 128 + (signals.number or signal.SIGINT)
    if rank() == 0:
        show_summary(out, config, summary)
    return 0


def _data(name: str | None, file: Path | None, seed: Any, reading: dict[str, Any], progress: Progress) -> Data:
    if reading and file is None:
        raise ValueError(f"--{next(iter(reading))} is for --data FILE: leave it out, or name a file")
    if (name is None) == (file is None):
        raise ValueError(f"train needs one of the data sets ({', '.join(SETS)}) or --data FILE, and not both")
    seed = dataclasses.replace(_DEFAULTS, seed=seed).seed  # this checks it
    if file is not None:
        return _read(file, seed, reading, progress)
    name = str(name)
    if name not in SETS:
        is_file = Path(name).exists() or Path(name).suffix
        near = f": did you mean --data {name}?" if is_file else did_you_mean(name, SETS)
        if (Path(name) / CHECKPOINTS).is_dir():
            near = f": did you mean --resume {name}?"
        raise ValueError(f"there is no data set {name!r}{near} (there are {', '.join(SETS)}, and --data FILE)")
    progress.show(f"reading {name}")
    return load(name, seed)


def _read(file: Path, seed: int, reading: dict[str, Any], progress: Progress) -> Data:
    """The user's file. Prints a line for each decision on the way, and for each finding."""
    if str(file) in SETS and not file.exists():
        raise ValueError(f"--data takes a file: did you mean fastebm train {file}?")
    find(file)
    progress.show(f"reading {file}")
    with progress.noting_warnings():
        data = load_array(file, seed, **reading)
    for finding in data.findings:
        progress.note(f"{file.name}: {finding}")
    names = ", ".join(data.info.columns[:8]) + (", ..." if data.dim > 8 else "")
    progress.note(
        f"{file.name}: {len(data.train):,} rows to train on and {len(data.test):,} held out, of "
        f"{data.dim} column{'s' * (data.dim > 1)}: {names}"
    )
    return data


def _check_resumed(given: dict[str, Any], settings: dict[str, Any], file: Path | None) -> None:
    """Refuse options that a run can't be resumed with."""
    fixed = [f"--{key.replace('_', '-')}" for key in given if key not in FREE_SETTINGS]
    fixed += [f"--set {key}" for key in settings if key not in FREE_SETTINGS]
    fixed += ["--data"] if file is not None else []
    if fixed:
        raise ValueError(f"--resume goes on with the run's own settings: leave out {', '.join(fixed)}")


def _saved(run: Path) -> checkpoint.Saved:
    return checkpoint.Saved(located(run)[1])


def _timed_threads(config: TrainConfig, data: Data, progress: Progress) -> Threads | None:
    """The number of threads that is fastest for this run; None if there is no choice."""
    if torch.get_num_threads() == 1 or resolve_device(config.device).type != "cpu":
        return None
    check_memory(config, data.dim, torch.device("cpu"))
    progress.show("timing the first steps")
    return Threads(lambda n: seconds_of_a_step(config, data, n), progress)


def show_summary(out: Path, config: TrainConfig, summary: dict[str, Any]) -> None:
    """Print the measures of a finished run."""
    what = "digits" if config.data.kind == "images" else "rows"
    print(
        f"{out}: {summary['steps']:,} steps in {summary['seconds']:.0f} s "
        f"({summary.get('backend', config.objective)} on {summary['device']})"
    )
    aurocs = {k.removeprefix("auroc_"): v for k, v in summary.items() if k.startswith("auroc_")}
    if aurocs:
        print(f"  AUROC against held-out {what}: {', '.join(f'{k} {v:.3f}' for k, v in aurocs.items())}")
    if "two_sample_accuracy" in summary:
        print(f"  a random forest tells samples from {what}: {summary['two_sample_accuracy']:.3f} (0.5 is chance)")
    for name, words in (("accuracy", "of held-out images have"), ("knn_accuracy", "by nearest features have")):
        if name in summary:
            pixels = summary.get("knn_accuracy_of_pixels")
            beside = "" if pixels is None else f" (by nearest pixels: {pixels:.1%})"
            print(f"  {summary[name]:.1%} {words} the right class{beside}")
    if "classes_present" in summary:
        n = len(summary["class_shares"])
        print(f"  classes among {config.n_fresh:,} samples: {summary['classes_present']} of {n}")
    if summary["diverged"]:
        gap = summary.get("energy_gap")
        words = "" if gap is None else f": samples have {gap:.0f} nats more energy than {what} in the end"
        print(
            f"  training diverged{words} (training.png): try --set learning_rate={config.learning_rate / 3:.1g}, or "
            "logarithms of heavy tails"
        )
    pictures = "training.png" if config.model == "pair" else "samples.png, energies.png and training.png"
    print(f"  look at {out / pictures}")


def _has_checkpoint(out: Path) -> bool:
    try:
        located(out)
    except ValueError:
        return False
    return True
