"""``fastebm sample``: new samples from a trained energy."""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..data.info import DataInfo
from ..samplers.base import Sampler
from ..threads import fastest
from ..train.apply import fresh_samples, landscape
from ..train.atomic import write_atomically
from ..train.folder import load_model
from ..train.models import row_energy
from ..train.recipe import TrainConfig
from ..train.resources import resolve_device
from ..train.samplers import build_sampler
from .options import Threads, add_device, add_threads, check_writable, count, need, on_threads, positive
from .progress import Progress

_WORDS = "Sample from a trained energy, by chains that start in uniform noise."
_ARRAYS = (".csv", ".npy", ".npz")
_PICTURES = (".png", ".jpg", ".pdf")

# Steps, and at most this many chains, with which the threads are timed.
_TIMED_STEPS, _TIMED_CHAINS = 5, 2048


def add(commands: Any) -> None:
    command = commands.add_parser("sample", help="draw samples from a run", description=_WORDS)
    command.set_defaults(run=_sample)
    command.add_argument("source", type=Path, metavar="RUN", help="a run folder of fastebm train")
    command.add_argument("-n", type=positive, default=64, metavar="N", help="number of samples")
    command.add_argument(
        "--out", type=Path, required=True, default=argparse.SUPPRESS, metavar="FILE",
        help="file to write: .csv (with the names of the columns), .npy or .npz, in the units of the data (images in "
        "[0, 1]); or a picture of images or 2-D points: .png, .jpg or .pdf",
    )  # fmt: skip
    command.add_argument(
        "--steps", type=count, default=argparse.SUPPRESS, help="Langevin steps from noise (default: the run's)"
    )
    command.add_argument("--seed", type=count, default=0, help="of the starts and the noise")
    add_device(command, default="auto")
    add_threads(command)


def _sample(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    check_writable(out, (*_ARRAYS, *_PICTURES))
    is_picture = out.suffix.lower() in _PICTURES
    need("safetensors", *(["matplotlib"] if is_picture else ["pandas"] if out.suffix.lower() == ".csv" else []))

    device = resolve_device(arguments.device)
    model, config = load_model(arguments.source)
    if is_picture and config.data.kind == "table":
        raise ValueError(
            f"samples of {config.data.dim} dims make no picture: give --out a name that ends in {', '.join(_ARRAYS)}"
        )
    n_threads = getattr(arguments, "threads", None)
    with Progress() as progress, on_threads(n_threads):
        timed = None
        has_steps = isinstance(build_sampler(config, 1), Sampler)
        if n_threads is None and device.type == "cpu" and torch.get_num_threads() > 1 and has_steps:
            progress.show("timing the first steps")
            n = min(arguments.n, _TIMED_CHAINS)
            timed = Threads(lambda most: _seconds_of_a_step(model, config, n, arguments.backend, most), progress)
        last = 0, time.perf_counter()

        def on_steps(done: int, steps: int) -> None:
            nonlocal last
            progress.show("sampling", done, steps)
            (before, then), last = last, (done, time.perf_counter())
            if timed is not None and done > before:
                timed.watch((last[1] - then) / (done - before) * n / arguments.n)

        samples, info = fresh_samples(
            model.to(device),
            config,
            arguments.n,
            dim=config.data.dim,
            steps=getattr(arguments, "steps", None),
            seed=arguments.seed,
            backend=arguments.backend,
            on_steps=on_steps,
        )
    x = config.data.to_data(samples)
    write_atomically(
        out, _picture(x, row_energy(model, config), config.data, out) if is_picture else _array(x, config.data, out)
    )
    many = "sample" if arguments.n == 1 else "samples"
    print(f"{out}: {arguments.n:,} {many} ({info.backend}, {info.path}, on {device})")
    return 0


def _seconds_of_a_step(model: nn.Module, config: TrainConfig, n: int, backend: str, threads: int) -> dict[int, float]:
    """Seconds per step of n chains, by number of threads (``threads.fastest``)."""

    def work() -> None:
        fresh_samples(model, config, n, dim=config.data.dim, steps=_TIMED_STEPS, backend=backend)

    return {number: seconds / _TIMED_STEPS for number, seconds in fastest(work, threads).items()}


def _picture(x: NDArray[Any], energy: nn.Module, data: DataInfo, out: Path) -> bytes:
    from .. import plot

    title = f"{len(x):,} sample{'s' * (len(x) > 1)}"
    if data.kind == "images":
        figure = plot.samples_figure({title: (x * data.levels).round() / data.levels})
    else:
        figure = plot.plane_figure({title: x}, landscape(energy, data), data.columns, over=True)
    return plot.encoded(figure, out.suffix.lower().removeprefix("."))


def _array(x: NDArray[Any], data: DataInfo, out: Path) -> bytes:
    """The samples as a file of the kind that the name of ``out`` says."""
    file = io.BytesIO()
    if out.suffix.lower() == ".npy":
        np.save(file, x)
    elif out.suffix.lower() == ".npz":
        arrays = {"samples": x, **({"columns": np.array(data.columns)} if data.columns else {})}
        np.savez(file, **arrays)  # type: ignore[arg-type]
    else:
        import pandas as pd

        columns = data.columns or range(data.dim)
        pd.DataFrame(x.reshape(len(x), -1), columns=columns).to_csv(file, index=False)
    return file.getvalue()
