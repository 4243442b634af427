"""What comes after training: fresh samples, held-out measures, pictures."""

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
from ..data.sets import Data, DataInfo, Images, Points
from ..driver.sampling import SampleInfo, langevin_sample
from ..energies import energy
from ..threads import survives_fork
from . import checkpoint
from .recipe import TrainConfig

__all__ = ["ENERGIES", "energies_of", "fresh_samples", "landscape", "report", "train_energies"]

# Of a run folder: the energies of the training rows, sorted, float32 (n,), so that the run scores other rows where its
# data are not.
ENERGIES = "train_energies.npy"

# Rows whose energies are computed at once.
_ROWS = 65536

# Fresh chains are numbered past any pool's (fewer than 2**31), so that they never share its noise.
_FIRST_FRESH_CHAIN = 2**31

# Between two calls of on_steps: about so many seconds, and steps at most.
_FRESH_SECONDS, _FRESH_CHUNK = 0.5, 50

# Cells a side of the grid on which an energy of two dims is drawn.
_GRID = 256

# Sets of outliers in the picture of energies; there are colours for no more.
_MAX_SHOWN = 4

# A class is present with at least this share of the samples: one or two stray ones are no mode.
_MIN_CLASS_SHARE = 0.01


@survives_fork
def fresh_samples(
    model: nn.Module,
    config: TrainConfig,
    n: int,
    *,
    dim: int,
    steps: int | None = None,
    seed: int = 0,
    backend: str | None = None,
    on_steps: Callable[[int, int], None] = lambda done, steps: None,
) -> tuple[Tensor, SampleInfo]:
    """Samples from chains that start in uniform noise: (n, dim), and what ran. They have seen no data and no pool.

    Args:
        steps: None: config.fresh_steps. seed: of starts and noise. backend: None: the configuration's.
        on_steps: called with the steps done and all of them, first with 0 and then every half second or so; what it
            raises ends the sampling.
    """
    steps = config.fresh_steps if steps is None else steps
    rule = config.sampler(steps)

    def advance(**options: Any) -> tuple[Tensor, SampleInfo]:
        return langevin_sample(  # type: ignore[return-value]
            model,
            step_size=rule.step_size,
            grad_clip=rule.grad_clip,
            clamp=rule.clamp,
            seed=seed,
            first_chain=_FIRST_FRESH_CHAIN,
            backend=backend or config.backend,
            return_info=True,
            **options,
        )

    x, info = advance(input_size=dim, batch_size=n, steps=0)
    done, chunk = 0, 1
    on_steps(done, steps)
    while done < steps:
        started = time.perf_counter()
        part = rule.noise_scale[done : done + chunk]  # type: ignore[index]
        x, info = advance(init=x, steps=len(part), noise_scale=part, first_step=done)
        done += len(part)
        on_steps(done, steps)
        chunk = int(chunk * _FRESH_SECONDS / (time.perf_counter() - started))
        chunk = min(max(chunk, 1), _FRESH_CHUNK)
    return x, info


def energies_of(model: nn.Module, states: Tensor) -> Tensor:
    """(n, dim) states, wherever they are -> (n,) on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([energy(model, part.to(device)).cpu() for part in torch.split(states, _ROWS)])


def train_energies(model: nn.Module, data: Data) -> NDArray[np.float32]:
    """Energies of the training rows, sorted: (n_train,)."""
    states = data.train / data.levels if isinstance(data, Images) else data.train
    return np.sort(energies_of(model, states).float().numpy())


def landscape(model: nn.Module, info: DataInfo) -> tuple[NDArray[Any], NDArray[Any]]:
    """An energy of two dims over its box, in the data's units.

    Returns:
        (n + 1, 2) edges of the cells of a grid, in x and in y, and (n, n) the energy in their middles, y first.
    """
    edges = torch.linspace(*info.clamp, _GRID + 1, dtype=torch.float64)
    middle = 0.5 * (edges[1:] + edges[:-1])
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    states = torch.stack([x, y], -1).reshape(-1, 2).float()
    e = energies_of(model, states)
    return info.to_data(torch.stack([edges, edges], 1)), e.reshape(_GRID, _GRID).numpy()


def report(
    model: nn.Module,
    config: TrainConfig,
    data: Data,
    metrics: list[dict[str, float]],
    out: Path,
    begin: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Samples, measures and pictures of a trained energy; returns what summary.json tells of them.

    Args:
        metrics: the lines of metrics.jsonl. out: the folder that the pictures are written to.
        begin: called with what goes on, in words, and how many steps of how many are done (0 of 0 where there are
            none); what it raises ends the report.
    """
    samples, info = fresh_samples(
        model,
        config,
        config.n_fresh,
        dim=data.dim,
        seed=config.seed,
        on_steps=lambda done, steps: begin(f"sampling {config.n_fresh:,} fresh chains", done, steps),
    )
    samples = samples.cpu()

    held_out = _held_out(data, config)
    energies = {name: energies_of(model, x).numpy() for name, x in {**held_out, "samples": samples}.items()}
    file = io.BytesIO()
    np.save(file, train_energies(model, data))
    checkpoint.write_atomically(out / ENERGIES, file.getvalue())
    measures: dict[str, Any] = {
        f"auroc_{name}": evaluate.auroc(energies["test"], energies[name]) for name in held_out if name != "test"
    }
    if isinstance(data, Images):
        measures |= _image_measures(data, samples, config.seed, begin)
    else:
        measures |= _point_measures(data, samples, config.seed, begin)

    begin("drawing", 0, 0)
    widths = " → ".join(map(str, (data.dim, *config.hidden_sizes, 1)))
    title = f"fastebm: MLP energy {widths} after {config.steps:,} steps"
    fresh = f"Fresh samples: noise, then {config.fresh_steps:,} Langevin steps"
    if isinstance(data, Images):
        grids = {fresh: data.quantise(samples)[:100], "Real digits, held out": data.test[:100]}
        figure = plot.samples_figure(
            {name: k.reshape(-1, *data.shape).numpy() / data.levels for name, k in grids.items()}, title=title
        )
        rows, shown = "digits", ["shuffled", "uniform"]
    else:
        points = {"Data, held out": data.info.to_data(data.test), fresh: data.info.to_data(samples)}
        if data.info.kind == "plane":
            n = min(map(len, points.values()))  # as many of each, or one looks denser
            points = {name: x[:n] for name, x in points.items()}
            figure = plot.plane_figure(points, landscape(model, data.info), data.info.columns, title=title)
        else:
            bounds = data.info.to_data(torch.tensor(data.info.clamp)[:, None].expand(2, data.dim))
            figure = plot.marginals_figure(points, data.info.columns, bounds, title=title)
        rows, shown = "rows", [name for name in held_out if name != "test"][:_MAX_SHOWN]
    checkpoint.write_atomically(out / "samples.png", plot.png(figure))
    named = {f"test {rows}": energies["test"], "fresh samples": energies["samples"]}
    words = {"shuffled": f"{'pixel' if rows == 'digits' else 'column'}-shuffled {rows}", "uniform": "uniform noise"}
    for name in shown:
        named[f"{words.get(name, name)} (AUROC {measures[f'auroc_{name}']:.3f})"] = energies[name]
    checkpoint.write_atomically(
        out / "energies.png", plot.png(plot.energies_figure(named, [f"test {rows}", "fresh samples"]))
    )
    if metrics:
        checkpoint.write_atomically(out / "training.png", plot.png(plot.training_figure(metrics, title=title)))

    return {
        **measures,
        "seed": config.seed,
        "device": str(device := next(model.parameters()).device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": info.backend,
        "path": info.path,
        "precision": info.precision,
        "why_not_fused": info.why_not_fused,
        "versions": _versions(),
    }


def _held_out(data: Data, config: TrainConfig) -> dict[str, Tensor]:
    """States by name: "test", the held-out data; and what an energy should tell from them."""
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
    if data.info.kind == "table" and data.dim > 1:  # each column in an order of its own: the same marginals
        order = torch.rand(data.test.shape, generator=generator).argsort(dim=0)
        states["shuffled"] = data.test.gather(0, order)
    return {**states, **data.outliers}


def _image_measures(data: Images, samples: Tensor, seed: int, begin: Callable[[str, int, int], None]) -> dict[str, Any]:
    quantised = data.quantise(samples).numpy()
    shares = evaluate.class_shares(data.train.numpy(), data.train_labels.numpy(), quantised)
    return {
        "two_sample_accuracy": _two_sample_accuracy(data.test.numpy(), quantised, seed, begin),
        "classes_present": sum(share >= _MIN_CLASS_SHARE for share in shares),
        "class_shares": shares,
    }


def _point_measures(data: Points, samples: Tensor, seed: int, begin: Callable[[str, int, int], None]) -> dict[str, Any]:
    train, test = data.train.numpy(), data.test.numpy()
    measures: dict[str, Any] = {"two_sample_accuracy": _two_sample_accuracy(test, samples.numpy(), seed, begin)}
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


def _two_sample_accuracy(
    real: NDArray[Any], fake: NDArray[Any], seed: int, begin: Callable[[str, int, int], None]
) -> float:
    def on_fold(done: int, total: int) -> None:
        begin("measuring", done, total)

    return evaluate.two_sample_accuracy(real, fake, seed=seed, on_fold=on_fold)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("fastebm", "torch", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
