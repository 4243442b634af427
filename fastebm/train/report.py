"""The work after training: fresh samples, held-out measures, pictures, and summary.json."""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import evaluate, plot
from ..data.dataset import Data, Images, Points
from ..energies import energy
from .apply import energies_of, features_of, fresh_samples, landscape, train_energies
from .atomic import write_atomically
from .folder import ENERGIES, SUMMARY, write_json
from .models import row_energy
from .recipe import TrainConfig
from .state import TrainState

__all__ = ["OnWork", "held_out_states", "write_report"]

# Loss and energy gap in summary.json are the means over this many last steps.
_LAST_STEPS = 50

# Sets of outliers in the picture of energies: there are no more colours.
_MAX_SHOWN = 4

# A class is present if it has at least this share of the samples; one or two stray samples are no mode.
_MIN_CLASS_SHARE = 0.01

# What samplers do after the start, for titles.
_WORDS = {
    "langevin": "{:,} Langevin steps", "mala": "{:,} MALA steps", "hmc": "{:,} HMC steps",
    "underdamped": "{:,} steps of underdamped Langevin", "tempering": "{:,} steps of parallel tempering",
    "annealed": "{:,} steps of annealed Langevin", "predictor_corrector": "{:,} predictor-corrector steps",
    "probability_flow": "the probability-flow ODE", "recovery": "recovery, level by level",
}  # fmt: skip

# Called with the work at hand in words, the steps done, and their number (0 if there are none to count).
OnWork = Callable[[str, int, int], None]


def write_report(
    state: TrainState, data: Data, metrics: list[dict[str, float]], n_nonfinite: int, out: Path, on_work: OnWork
) -> dict[str, Any]:
    """Sample a trained run, measure it and draw it.

    Args:
        metrics: the lines of metrics.jsonl. n_nonfinite: of the whole pool. out: the run folder.
        on_work: see ``OnWork``. An exception raised in it ends the report.

    Returns:
        The content of summary.json.
    """
    config, model = state.config, state.trainer.average
    started = time.perf_counter()
    title = f"fastebm: {_named(config)} after {config.steps:,} steps of {config.objective}"
    if config.model == "pair":
        measures = _feature_measures(model, data, on_work)
    else:
        measures = _energy_report(model, config, data, out, title, on_work)
    if metrics:
        write_atomically(out / "training.png", plot.png(plot.training_figure(metrics, title=title)))

    summary: dict[str, Any] = {
        **measures,
        "seed": config.seed,
        **_what_ran(model),
        **{name: _last(metrics, name) for name in ("loss", "energy_gap") if metrics and name in metrics[-1]},
        "diverged": bool(metrics and metrics[-1].get("diverging")),
        state.speed_of.removesuffix("_per_second"): state.step * state.work_per_step,
        "nonfinite": n_nonfinite,
        "processes": state.processes.size,
        "seconds": state.seconds,
        "seconds_after_training": time.perf_counter() - started,
        "steps": state.step,
    }
    write_json(out / SUMMARY, summary)
    return summary


def _energy_report(
    model: nn.Module, config: TrainConfig, data: Data, out: Path, title: str, on_work: OnWork
) -> dict[str, Any]:
    """Fresh samples, energies and their pictures. Returns the measures, and what ran."""
    samples, info = fresh_samples(
        model,
        config,
        config.n_fresh,
        dim=data.dim,
        seed=config.seed,
        on_steps=lambda done, steps: on_work(f"sampling {config.n_fresh:,} fresh chains", done, steps),
    )
    samples, of_rows = samples.cpu(), row_energy(model, config)

    held_out = held_out_states(data, config)
    energies = {name: energies_of(of_rows, x).numpy() for name, x in {**held_out, "samples": samples}.items()}
    file = io.BytesIO()
    np.save(file, train_energies(of_rows, data))
    write_atomically(out / ENERGIES, file.getvalue())
    measures: dict[str, Any] = {
        f"auroc_{name}": evaluate.auroc(energies["test"], energies[name]) for name in held_out if name != "test"
    }
    if isinstance(data, Images):
        measures |= _image_measures(data, samples, config.seed, on_work)
        if config.n_classes > 0:
            measures["accuracy"] = _accuracy(model, data, config)
    else:
        measures |= _point_measures(data, samples, config.seed, on_work)

    on_work("drawing", 0, 0)
    write_atomically(out / "samples.png", _samples_picture(of_rows, config, data, samples, title))
    write_atomically(out / "energies.png", _energies_picture(data, energies, measures))
    ran = {name: getattr(info, name) for name in ("backend", "path", "precision", "why_not_fused")}
    return {**measures, **ran}


def _named(config: TrainConfig) -> str:
    """The model in words, for titles."""
    widths = " → ".join(map(str, (config.data.dim, *config.hidden_sizes, 1)))
    return f"MLP energy {widths}" if config.model == "mlp" else f"{config.model} energy"


def _last(metrics: list[dict[str, float]], name: str) -> float:
    """The mean of a column over the last steps."""
    rows = metrics[-_LAST_STEPS:]
    return sum(row[name] for row in rows) / len(rows)


def _what_ran(model: nn.Module) -> dict[str, Any]:
    from importlib.metadata import version

    device = next(model.parameters()).device
    packages = ("fastebm", "torch", "numpy", "scikit-learn")
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


# -- measures -----------------------------------------------------------------------------------------------


def held_out_states(data: Data, config: TrainConfig) -> dict[str, Tensor]:
    """States by name: "test" is the held-out data, the others are what an energy should tell from it."""
    generator = torch.Generator().manual_seed(config.seed)
    if isinstance(data, Images):
        images = data.test.reshape(-1, *data.shape)
        shuffle = torch.rand(data.test.shape, generator=generator).argsort(dim=1)  # another order for each image
        others = {
            "shuffled": data.test.gather(1, shuffle),
            "rotated": images.rot90(1, (1, 2)).reshape(data.test.shape),
            "inverted": data.levels - data.test,
        }
        return {
            "test": data.dequantise(data.test, config.dequantisation, generator),
            "uniform": torch.rand(data.test.shape, generator=generator),
            **{name: data.dequantise(k, config.dequantisation, generator) for name, k in others.items()},
        }
    lo, hi = data.info.clamp
    states = {"test": data.test, "uniform": lo + (hi - lo) * torch.rand(data.test.shape, generator=generator)}
    if data.info.kind == "table" and data.dim > 1:  # each column in another order: the same marginals
        order = torch.rand(data.test.shape, generator=generator).argsort(dim=0)
        states["shuffled"] = data.test.gather(0, order)
    return {**states, **data.outliers}


def _accuracy(model: nn.Module, data: Images, config: TrainConfig) -> float:
    """The share of held-out images whose class has the lowest energy E(x, class)."""
    x, device = data.test / data.levels, next(model.parameters()).device
    with torch.no_grad():
        energies = torch.stack(
            [energy(model, x.to(device), labels=torch.full((len(x),), k)).cpu() for k in range(config.n_classes)]
        )
    return float((energies.argmin(dim=0) == data.test_labels).double().mean())


def _feature_measures(model: nn.Module, data: Data, on_work: OnWork) -> dict[str, Any]:
    """How well the nearest neighbours of held-out images tell their classes: by features, and by pixels."""
    if not isinstance(data, Images):
        return {}
    on_work("measuring", 0, 0)
    train, test = data.states, data.test / data.levels
    features = [features_of(model, x).numpy() for x in (train, test)]
    pixels = [x.numpy() for x in (train, test)]
    labels = data.train_labels.numpy(), data.test_labels.numpy()
    return {
        "knn_accuracy": evaluate.knn_accuracy(features[0], labels[0], features[1], labels[1]),
        "knn_accuracy_of_pixels": evaluate.knn_accuracy(pixels[0], labels[0], pixels[1], labels[1]),
    }


def _image_measures(data: Images, samples: Tensor, seed: int, on_work: OnWork) -> dict[str, Any]:
    quantised = data.quantise(samples).numpy()
    shares = evaluate.class_shares(data.train.numpy(), data.train_labels.numpy(), quantised)
    return {
        "two_sample_accuracy": _two_sample_accuracy(data.test.numpy(), quantised, seed, on_work),
        "classes_present": sum(share >= _MIN_CLASS_SHARE for share in shares),
        "class_shares": shares,
    }


def _point_measures(data: Points, samples: Tensor, seed: int, on_work: OnWork) -> dict[str, Any]:
    train, test = data.train.numpy(), data.test.numpy()
    measures: dict[str, Any] = {"two_sample_accuracy": _two_sample_accuracy(test, samples.numpy(), seed, on_work)}
    for name, outliers in data.outliers.items():
        for baseline, value in evaluate.baseline_aurocs(train, test, outliers.numpy(), seed=seed).items():
            measures[f"auroc_{name}_{baseline}"] = value
    if data.train_labels is not None:
        names, labels = np.unique(data.train_labels, return_inverse=True)
        shares = evaluate.class_shares(train, labels, samples.numpy())
        of_data = np.bincount(labels, minlength=len(names)) / len(labels)
        measures |= {
            "classes_present": sum(share >= _MIN_CLASS_SHARE for share in shares),
            "class_shares": dict(zip(names.tolist(), shares, strict=True)),
            "class_shares_of_data": dict(zip(names.tolist(), of_data.tolist(), strict=True)),
        }
    return measures


def _two_sample_accuracy(real: NDArray[Any], fake: NDArray[Any], seed: int, on_work: OnWork) -> float:
    def on_fold(done: int, total: int) -> None:
        on_work("measuring", done, total)

    return evaluate.two_sample_accuracy(real, fake, seed=seed, on_fold=on_fold)


# -- pictures -----------------------------------------------------------------------------------------------


def _samples_picture(model: nn.Module, config: TrainConfig, data: Data, samples: Tensor, title: str) -> bytes:
    """Fresh samples beside held-out data."""
    fresh = f"Fresh samples: noise, then {_WORDS[config.sampler].format(config.fresh_steps)}"
    if isinstance(data, Images):
        grids = {fresh: data.quantise(samples)[:100], "Real digits, held out": data.test[:100]}
        images = {name: k.reshape(-1, *data.shape).numpy() / data.levels for name, k in grids.items()}
        return plot.png(plot.samples_figure(images, title=title))
    points = {"Data, held out": data.info.to_data(data.test), fresh: data.info.to_data(samples)}
    if data.info.kind == "plane":
        n = min(map(len, points.values()))  # equally many of each: with more points a panel looks denser
        points = {name: x[:n] for name, x in points.items()}
        return plot.png(plot.plane_figure(points, landscape(model, data.info), data.info.columns, title=title))
    bounds = data.info.to_data(torch.tensor(data.info.clamp)[:, None].expand(2, data.dim))
    return plot.png(plot.marginals_figure(points, data.info.columns, bounds, title=title))


def _energies_picture(data: Data, energies: dict[str, NDArray[Any]], measures: dict[str, Any]) -> bytes:
    """Histograms of the energies of held-out data, fresh samples, and a few sets of outliers."""
    if isinstance(data, Images):
        rows, what, shown = "digits", "pixel", ["shuffled", "uniform"]
    else:
        rows, what = "rows", "column"
        shown = [name for name in energies if name not in ("test", "samples")][:_MAX_SHOWN]
    named = {f"test {rows}": energies["test"], "fresh samples": energies["samples"]}
    words = {"shuffled": f"{what}-shuffled {rows}", "uniform": "uniform noise"}
    for name in shown:
        named[f"{words.get(name, name)} (AUROC {measures[f'auroc_{name}']:.3f})"] = energies[name]
    return plot.png(plot.energies_figure(named, [f"test {rows}", "fresh samples"]))
