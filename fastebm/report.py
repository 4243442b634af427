"""What comes after training: fresh samples, held-out measures, pictures."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, evaluate, plot
from .data import Images
from .energies import energy
from .recipe import TrainConfig
from .sampling import SampleInfo, langevin_sample

__all__ = ["fresh_samples", "report"]

# Fresh chains are numbered past any pool's (fewer than 2**31), so that they never share its noise.
_FIRST_FRESH_CHAIN = 2**31

# Steps of fresh chains between two calls of on_steps.
_FRESH_CHUNK = 50

# A class is present with at least this share of the samples: one or two stray ones are no mode.
_MIN_CLASS_SHARE = 0.01


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
        on_steps: called with the steps done and all of them, every few steps; what it raises ends the sampling.
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
    noise = rule.noise_scale.split(_FRESH_CHUNK) if steps > 0 else ()  # type: ignore[union-attr]
    done = 0
    for part in noise:
        x, info = advance(init=x, steps=len(part), noise_scale=part, first_step=done)
        done += len(part)
        on_steps(done, steps)
    return x, info


def report(
    model: nn.Module,
    config: TrainConfig,
    data: Images,
    metrics: list[dict[str, float]],
    out: Path,
    begin: Callable[[str], None],
) -> dict[str, Any]:
    """Samples, measures and pictures of a trained energy; returns what summary.json tells of them.

    Args:
        metrics: the lines of metrics.jsonl. out: the folder that the pictures are written to.
        begin: called with what goes on, in words; what it raises ends the report.
    """
    device = next(model.parameters()).device
    samples, info = fresh_samples(
        model,
        config,
        config.n_fresh,
        dim=data.dim,
        seed=config.seed,
        on_steps=lambda done, steps: begin(f"sampling {config.n_fresh:,} fresh chains: step {done} of {steps}"),
    )
    samples = samples.cpu()

    begin("measuring")
    generator = torch.Generator().manual_seed(config.seed)
    digits = data.test.reshape(-1, *data.shape)
    shuffle = torch.rand(data.test.shape, generator=generator).argsort(dim=1)  # another order for each digit
    outliers = {
        "shuffled": data.test.gather(1, shuffle),
        "rotated": digits.rot90(1, (1, 2)).reshape(data.test.shape),
        "inverted": data.levels - data.test,
    }
    states = {
        "test": data.dequantise(data.test, config.dequantisation, generator),
        "samples": samples,
        "uniform": torch.rand(data.test.shape, generator=generator),
        **{name: data.dequantise(k, config.dequantisation, generator) for name, k in outliers.items()},
    }
    with torch.no_grad():
        energies = {name: energy(model, x.to(device)).cpu().numpy() for name, x in states.items()}
    measures: dict[str, Any] = {
        f"auroc_{name}": evaluate.auroc(energies["test"], energies[name])
        for name in ("uniform", "shuffled", "rotated", "inverted")
    }
    quantised = data.quantise(samples).numpy()
    shares = evaluate.class_shares(data.train.numpy(), data.train_labels.numpy(), quantised)
    measures |= {
        "two_sample_accuracy": evaluate.two_sample_accuracy(data.test.numpy(), quantised, seed=config.seed),
        "classes_present": sum(share >= _MIN_CLASS_SHARE for share in shares),
        "class_shares": shares,
    }

    begin("drawing")
    title = (
        f"fastebm: MLP energy {data.dim} → {' → '.join(map(str, config.hidden_sizes))} → 1 after {config.steps:,} steps"
    )
    grids = {
        f"Fresh samples: noise, then {config.fresh_steps:,} Langevin steps": quantised[:100],
        "Real digits, held out": data.test[:100].numpy(),
    }
    images = {name: k.reshape(-1, *data.shape) / data.levels for name, k in grids.items()}
    checkpoint.write_atomically(out / "samples.png", plot.png(plot.samples_figure(images, title=title)))
    named = {
        "test digits": energies["test"],
        "fresh samples": energies["samples"],
        f"pixel-shuffled digits (AUROC {measures['auroc_shuffled']:.3f})": energies["shuffled"],
        f"uniform noise (AUROC {measures['auroc_uniform']:.3f})": energies["uniform"],
    }
    checkpoint.write_atomically(
        out / "energies.png", plot.png(plot.energies_figure(named, ["test digits", "fresh samples"]))
    )
    if metrics:
        checkpoint.write_atomically(out / "training.png", plot.png(plot.training_figure(metrics, title=title)))

    return {
        **measures,
        "seed": config.seed,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": info.backend,
        "path": info.path,
        "precision": info.precision,
        "why_not_fused": info.why_not_fused,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("fastebm", "torch", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
