"""The command ``fastebm``: train on real data, sample from a run, say what would run here, time it.

Exit status: 0 done; 1 the computation failed; 2 bad input; 128 + n ended by signal n. Every error is one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from numpy.typing import NDArray

from .backends import cpu
from .backends.choose import BACKENDS, choose
from .bench import run as suite
from .checkpoint import write_atomically
from .data import SETS, DataInfo, Points, load, load_array
from .energies import MLPEnergy
from .mlp import ACTIVATIONS
from .processes import Processes, launched
from .recipe import TrainConfig, recipe
from .report import fresh_samples, landscape
from .train import (
    CHECKPOINT_EVERY,
    FREE_SETTINGS,
    SUMMARY,
    Stopped,
    load_model,
    located,
    resolve_device,
    saved_config,
    train,
)

__all__ = ["main"]

_DEFAULTS = TrainConfig()

# Seconds between lines of progress where there is no terminal to draw a bar on.
_LINE_EVERY = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        return status
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except RuntimeError as error:  # chains that exploded, a device out of memory
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)


def _fail(error: BaseException | str, status: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    who = "fastebm" if _rank() == 0 else f"fastebm (process {_rank()})"
    print(f"{who}: error: {' '.join(text.split())}", file=sys.stderr)
    return status


def _rank() -> int:
    """Of torchrun's processes; only the first one talks, but for errors."""
    return int(os.environ.get("RANK", "0"))


# -- the arguments ------------------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastebm: error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(prog="fastebm", description="Langevin sampling and training of energy-based models in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastebm {_version('fastebm')}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)

    command = commands.add_parser("train", help="train an energy on real data", description=_TRAIN)
    command.set_defaults(run=_train)
    # SUPPRESS tells what was given from what was not, which --resume has to know.
    command.add_argument(
        "dataset", nargs="?", metavar="DATASET", choices=list(SETS), default=None,
        help="; ".join(f"{name}: {entry.words}" for name, entry in SETS.items()) + "; or --data FILE",
    )  # fmt: skip
    command.add_argument(
        "--data", type=Path, default=argparse.SUPPRESS, metavar="FILE",
        help="instead of a data set, your own table (n, d) of real numbers: CSV, TSV, Parquet or .npy",
    )  # fmt: skip
    command.add_argument(
        "--columns", nargs="+", default=argparse.SUPPRESS, metavar="NAME",
        help="of --data: the columns to keep, by name (0, 1, ... where the file has no names); default: all",
    )  # fmt: skip
    command.add_argument(
        "--drop", nargs="+", default=argparse.SUPPRESS, metavar="NAME", help="of --data: the columns to leave out"
    )
    command.add_argument(
        "--header", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="of --data that are text: whether the first line holds names (default: found out)",
    )  # fmt: skip
    for flag, kind, default, text in (
        ("--steps", int, f"{_DEFAULTS.steps} for digits", "training iterations"),
        ("--seed", int, _DEFAULTS.seed, "of everything random"),
        ("--batch-size", int, f"{_DEFAULTS.batch_size} for digits", "real rows, and chains, an iteration"),
        ("--pool-size", int, f"{_DEFAULTS.pool_size} for digits", "persistent chains"),
    ):
        command.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    command.add_argument(
        "--hidden-sizes",
        type=_sizes,
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"hidden widths, from the input up (default: {' '.join(map(str, _DEFAULTS.hidden_sizes))} for digits)",
    )
    _add_device_and_backend(command, default=argparse.SUPPRESS)
    command.add_argument(
        "--on-nonfinite", choices=["raise", "reinit"], default=argparse.SUPPRESS,
        help="chains that leave the finite numbers end the run, or start anew (default: raise)",
    )  # fmt: skip
    command.add_argument(
        "--checkpoint-every", type=_positive, default=CHECKPOINT_EVERY, metavar="N", help="steps between checkpoints"
    )
    command.add_argument(
        "--out", type=Path, default=argparse.SUPPRESS, metavar="RUN",
        help="run folder to write: new or empty (default: runs/<data>-<time>)",
    )  # fmt: skip
    command.add_argument(
        "--resume", type=Path, default=argparse.SUPPRESS, metavar="RUN",
        help="run folder to go on with, as if it had never stopped, or one of its checkpoints/step-N; the number of "
        "processes, --device, --backend, --on-nonfinite and --checkpoint-every may change",
    )  # fmt: skip

    command = commands.add_parser("sample", help="draw samples from a run", description=_SAMPLE)
    command.set_defaults(run=_sample)
    command.add_argument("source", type=Path, metavar="RUN", help="a run folder of fastebm train")
    command.add_argument("-n", type=_positive, default=64, metavar="N", help="number of samples")
    command.add_argument(
        "--out", type=Path, required=True, default=argparse.SUPPRESS, metavar="FILE",
        help=".npy: an array (N, ...) in the data's units (images in [0, 1]); .png: a picture of images or 2-D points",
    )  # fmt: skip
    command.add_argument(
        "--steps", type=_count, default=argparse.SUPPRESS, help="Langevin steps from noise (default: the run's)"
    )
    command.add_argument("--seed", type=_count, default=0, help="of starts and noise")
    _add_device_and_backend(command, default="auto")

    command = commands.add_parser("info", help="versions, devices, and which backend would run", description=_INFO)
    command.set_defaults(run=_info)
    command.add_argument("--input-size", type=_positive, default=64, metavar="N", help="dims of one state")
    command.add_argument(
        "--hidden-sizes", type=_sizes, nargs="+", metavar="N", default=None,
        help=f"hidden widths, from the input up (default: {' '.join(map(str, _DEFAULTS.hidden_sizes))})",
    )  # fmt: skip
    command.add_argument("--activation", choices=list(ACTIVATIONS), default=_DEFAULTS.activation, help="of them")
    command.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1", ...')

    command = commands.add_parser(
        "bench", help="time fastebm against PyTorch loops and peers", description=_BENCH,
        formatter_class=argparse.HelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=_bench)
    suite.add_arguments(command)
    return parser


_TRAIN = """Train an MLP energy by persistent contrastive divergence, then sample from it, measure it on held-out data
and draw it. Ctrl-C (or SIGTERM) saves the run, and --resume goes on with the same bits. On several processes:
torchrun --nproc-per-node 2 -m fastebm train ..."""
_SAMPLE = "Samples of a trained energy, from chains that start in uniform noise."
_INFO = "Versions, devices, and which backend would sample an MLP energy of a given shape, and why."
_BENCH = """Time fastebm, the loops that people write and the peers that are installed (pip install "fastebm[bench]") on
the same problems, each checked first. Without --cases a quick set, of some minutes."""


def _add_device_and_backend(command: _Parser, default: str) -> None:
    note = " (default: auto)" if default == argparse.SUPPRESS else ""
    command.add_argument("--device", default=default, help=f'"auto", "cpu", "cuda", "cuda:1", ...{note}')
    command.add_argument("--backend", choices=BACKENDS, default=default, help=f"what advances the chains{note}")


def _count(text: str) -> int:
    """An int >= 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be an int in [0, 2**32), got {text!r}")
    return value


def _positive(text: str) -> int:
    """An int >= 1."""
    if (value := _count(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return value


def _sizes(text: str) -> list[int]:
    """Widths: "256" or "256,128"."""
    if text in SETS:  # the option takes all words that follow
        raise argparse.ArgumentTypeError(f"takes numbers: name the data set before it, as in fastebm train {text} ...")
    return [_positive(part) for part in text.split(",")]


def _flat(sizes: list[list[int]]) -> tuple[int, ...]:
    return tuple(size for part in sizes for size in part)


# -- train --------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    _need("tqdm", "matplotlib", "pandas", "sklearn", "safetensors")
    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "run", "checkpoint_every")}
    if "hidden_sizes" in given:
        given["hidden_sizes"] = _flat(given["hidden_sizes"])
    resume, name, file = (given.pop(key, None) for key in ("resume", "dataset", "data"))
    reading = {key: given.pop(key) for key in ("columns", "drop", "header") if resume is None and key in given}
    if resume is None:
        if reading and file is None:
            raise ValueError(f"--{next(iter(reading))} is for --data FILE: leave it out, or name a file")
        if (name is None) == (file is None):
            raise ValueError(f"train needs one of the data sets ({', '.join(SETS)}) or --data FILE, and not both")
        seed = dataclasses.replace(_DEFAULTS, seed=given.get("seed", _DEFAULTS.seed)).seed  # checked
        data = load(name, seed) if file is None else _read(file, seed, **reading)
        out = given.pop("out", None)
        config = TrainConfig(**{**recipe(data), **given})
    else:
        given |= {} if file is None else {"data": file}
        fixed = [f"--{name.replace('_', '-')}" for name in given if name not in FREE_SETTINGS]
        if fixed:
            raise ValueError(f"--resume goes on with the run's own settings: leave out {', '.join(fixed)}")
        out, data = located(resume)[0], None
        config = TrainConfig.from_dict({**saved_config(resume).to_dict(), **given})
        if name not in (None, config.data.name):
            raise ValueError(f"the run in {out} is trained on {config.data.name}, not on {name}: leave {name} out")
        if resume == out and (out / SUMMARY).exists():
            if _rank() == 0:
                print(f"{out} is complete: there is nothing to resume")
            return 0

    with launched(config.device) as group, _Signals() as signals, _Progress(config.steps, _rank() == 0) as progress:
        if out is None:  # by the clock of the first process
            new = Path("runs") / time.strftime(f"{name or file.stem}-%Y%m%d-%H%M%S")
            out = Path(Processes(group).gather(str(new))[0])
        source = f"{config.data.name} " if config.data.name in SETS else ""
        again = f"fastebm train {source}--resume {shlex.quote(str(out))}"
        try:
            summary = train(
                config,
                out if resume is None else resume,
                data=data,
                resume=resume is not None,
                checkpoint_every=arguments.checkpoint_every,
                process_group=group,
                on_step=progress.step,
                on_phase=progress.phase,
                should_stop=signals.arrived,
            )
        except Stopped as stopped:
            progress.close()
            if _rank() == 0:
                print(f"fastebm: {stopped} and saved; to go on: {again}", file=sys.stderr)
            return 128 + (signals.number or signal.SIGTERM)  # 0: another process had the signal
        except KeyboardInterrupt:
            progress.close()
            if _rank() == 0:
                where = f"; to go on from the last checkpoint: {again}" if _has_checkpoint(out) else ""
                print(f"fastebm: interrupted{where}", file=sys.stderr)
            return 128 + (signals.number or signal.SIGINT)
    if _rank() > 0:
        return 0
    what = "digits" if config.data.kind == "images" else "rows"
    print(
        f"{out}: {summary['steps']:,} steps in {summary['seconds']:.0f} s ({summary['backend']} on {summary['device']})"
    )
    aurocs = {k.removeprefix("auroc_"): v for k, v in summary.items() if k.startswith("auroc_")}
    print(f"  AUROC against held-out {what}: {', '.join(f'{k} {v:.3f}' for k, v in aurocs.items())}")
    print(f"  a random forest tells samples from {what}: {summary['two_sample_accuracy']:.3f} (0.5 is chance)")
    if "classes_present" in summary:
        print(f"  classes among {config.n_fresh:,} samples: {summary['classes_present']} of 10")
    print(f"  look at {out / 'samples.png'}, energies.png and training.png")
    return 0


def _read(file: Path, seed: int, **reading: Any) -> Points:
    """The user's file; what was decided on the way is told in a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_array(file, seed, **reading)
    if _rank() == 0:
        for warning in caught:
            print(f"fastebm: {warning.message}", file=sys.stderr)
    return data


def _has_checkpoint(out: Path) -> bool:
    try:
        located(out)
    except ValueError:
        return False
    return True


class _Signals:
    """While in it, the first SIGINT and the first SIGTERM are only noted; a second one raises KeyboardInterrupt.

    torchrun hands a Ctrl-C that its processes had from the terminal to them once more, as SIGTERM.
    """

    def __init__(self) -> None:
        self.number = 0
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: it was not Python's
                signal.signal(number, handler)

    def arrived(self) -> bool:
        return self.number != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            raise KeyboardInterrupt
        self._seen.add(number)
        self.number = self.number or number


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; both on stderr, of the first process."""

    def __init__(self, steps: int, is_shown: bool = True) -> None:
        self.steps, self.is_shown = steps, is_shown
        self.bar: Any = None
        self.nonfinite = 0
        self.is_terminal = is_shown and sys.stderr.isatty()
        self.first_step = 0
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def step(self, row: dict[str, float]) -> None:
        if not self.is_shown:
            return
        step = int(row["step"])
        self.nonfinite += int(row["nonfinite"])
        told = f"gap {row['energy_gap']:+.3f}, {row['chain_steps_per_second'] / 1e3:.0f}k chain-steps/s"
        if self.nonfinite > 0:
            told += f", {self.nonfinite} chains restarted as not finite"
        if self.is_terminal:
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(total=self.steps, initial=step - 1, unit="step", dynamic_ncols=True)
            self.bar.set_postfix_str(told, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if self.first_step == 0:
            self.first_step, self.started = step, now
        if now - self.last_line >= _LINE_EVERY or step in (self.first_step, self.steps):
            self.last_line = now
            text = f"step {step}/{self.steps}: {told}"
            if step > self.first_step:
                left = (now - self.started) / (step - self.first_step) * (self.steps - step)
                text += f", {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    def phase(self, text: str) -> None:
        if not self.is_shown:
            return
        self.close()
        if self.is_terminal:
            print(text, end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last_line >= _LINE_EVERY or "step" not in text:
            self.last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)


# -- sample -------------------------------------------------------------------------------------------------


def _sample(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    as_picture = out.suffix.lower() == ".png"
    if out.suffix.lower() not in (".png", ".npy"):
        raise ValueError(f"--out must end in .png or .npy, got {out}")
    folder = out.parent
    if not folder.is_dir():
        raise ValueError(f"--out can't be written: {out}, because there is no folder {folder}: make it first")
    if out.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if out.is_dir() else f"you may not write to the folder {folder}"
        raise ValueError(f"--out can't be written: {out}, because {why}")
    _need("safetensors", *(["matplotlib"] if as_picture else []))

    device = resolve_device(arguments.device)
    model, config = load_model(arguments.source)
    if as_picture and config.data.kind == "table":
        raise ValueError(f"samples of {config.data.dim} dims make no picture: give --out a name that ends in .npy")
    samples, info = fresh_samples(
        model.to(device),
        config,
        arguments.n,
        dim=config.data.dim,
        steps=getattr(arguments, "steps", None),
        seed=arguments.seed,
        backend=arguments.backend,
    )
    x = config.data.to_data(samples)
    write_atomically(out, _picture(x, model, config.data) if as_picture else _as_npy(x))
    print(f"{out}: {arguments.n} samples ({info.backend}, {info.path}, on {device})")
    return 0


def _picture(x: NDArray[Any], model: MLPEnergy, data: DataInfo) -> bytes:
    from . import plot

    title = f"{len(x)} samples"
    if data.kind == "images":
        return plot.png(plot.samples_figure({title: (x * data.levels).round() / data.levels}))
    return plot.png(plot.plane_figure({title: x}, landscape(model, data), data.columns, over=True))


def _as_npy(x: NDArray[Any]) -> bytes:
    import numpy as np

    data = io.BytesIO()
    np.save(data, x)
    return data.getvalue()


# -- info ---------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    import platform

    import torch

    device = resolve_device(arguments.device)
    sizes = _DEFAULTS.hidden_sizes if arguments.hidden_sizes is None else _flat(arguments.hidden_sizes)
    print(f"fastebm {_version('fastebm')}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for package in ("triton", "numba", "numpy", "scikit-learn", "matplotlib", "safetensors", "tqdm"):
        print(f"{package} {_version(package)}")
    print(f"device cpu: {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    no_numba = cpu.why_not(torch.device("cpu"), torch.float32)
    print(f"  kernels: {'by Numba' if no_numba is None else f'plain PyTorch, because {no_numba}'}")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"device cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}")

    model = MLPEnergy(arguments.input_size, sizes, arguments.activation).to(device)
    choice = choose(model, device, torch.float32, "auto", None)
    shape = " -> ".join(map(str, (arguments.input_size, *sizes, 1)))
    print(f"MLP energy {shape} ({arguments.activation}) on {device}:")
    print(f"  backend: {choice.backend} ({choice.path}), products in {choice.precision}")
    print(f"  fused kernel: {'yes' if choice.why_not_fused is None else f'no, because {choice.why_not_fused}'}")
    return 0


# -- bench --------------------------------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace) -> int:
    status: int = suite.run(arguments, quick=arguments.cases is None)
    return status


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'this command needs {", ".join(missing)}: pip install "fastebm[cli]"')
