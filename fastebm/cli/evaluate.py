"""``fastebm evaluate``: every measure of a run that its data and its energy allow."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..data.sets import reload
from ..train.apply import fresh_labels, fresh_samples
from ..train.folder import EVALUATION, load_model, located, write_json
from ..train.measures import MEASURES, Subject, measured
from ..train.models import row_energy
from ..train.resources import resolve_device
from .options import add_device, add_threads, check_writable, count, need, on_threads, positive, version
from .progress import Progress

_WORDS = """Draw fresh samples from a trained energy, and measure them and the energy on held-out data. A measure that
the data or the energy do not allow is skipped, with the reason. The file has every number."""


def add(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="measure a run in every way that applies", description=_WORDS)
    command.set_defaults(run=_evaluate)
    command.add_argument("source", type=Path, metavar="RUN", help="a run folder of fastebm train")
    command.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help=f"a .json file to write (default: RUN/{EVALUATION})"
    )
    command.add_argument(
        "--measures", nargs="+", choices=list(MEASURES), default=None, metavar="NAME",
        help=f"some of {', '.join(MEASURES)} (default: all)",
    )  # fmt: skip
    command.add_argument(
        "-n", type=positive, default=argparse.SUPPRESS, metavar="N", help="fresh samples (default: the run's n_fresh)"
    )
    command.add_argument("--seed", type=count, default=0, help="of the samples, and of all that measures draw")
    add_device(command, default="auto")
    add_threads(command)


def _evaluate(arguments: argparse.Namespace) -> int:
    need("safetensors", "sklearn")
    folder, checkpoint = located(arguments.source)
    out: Path = folder / EVALUATION if arguments.out is None else arguments.out
    check_writable(out, (".json",))
    device = resolve_device(arguments.device)
    model, config = load_model(arguments.source)
    model.to(device).eval()
    with Progress() as progress, on_threads(getattr(arguments, "threads", None)):
        progress.show(f"reading {config.data.name}")
        data = reload(config.data, config.seed)
        samples, info = fresh_samples(
            model,
            config,
            getattr(arguments, "n", config.n_fresh),
            dim=config.data.dim,
            seed=arguments.seed,
            backend=arguments.backend,
            on_steps=lambda done, steps: progress.show("sampling", done, steps),
        )
        subject = Subject(
            row_energy(model, config),
            config,
            data,
            samples.cpu(),
            fresh_labels(config, len(samples)),
            seed=arguments.seed,
            on_work=progress.show,
        )
        results = measured(subject, MEASURES if arguments.measures is None else arguments.measures)
    what = {
        "run": str(folder),
        "checkpoint": checkpoint.name,
        "data": config.data.name,
        "n_samples": len(samples),
        "seed": arguments.seed,
        "device": str(device),
        "backend": info.backend,
        "path": info.path,
        "versions": {package: version(package) for package in ("fastebm", "torch", "scikit-learn")},
    }
    write_json(out, {**what, "measures": results})
    _print(out, len(samples), results)
    return 0


def _print(out: Path, n_samples: int, results: dict[str, dict[str, Any]]) -> None:
    print(f"{out}: {n_samples:,} fresh samples")
    for name, result in results.items():
        if "skipped" in result:
            print(f"  {name}: skipped: {result['skipped']}")
            continue
        print(f"  {name} ({result['seconds']:.1f} s)")
        for key, value in result.items():
            if key not in ("seconds", "warnings") and isinstance(value, (int, float, str)):
                print(f"    {key:<34} {value if isinstance(value, (int, str)) else format(value, '.4g')}")
        for warning in result.get("warnings", ()):
            print(f"    warning: {' '.join(warning.split())}")
