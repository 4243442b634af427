"""Persistent contrastive divergence, from the data to a run folder.

    config.json               every hyper-parameter, and what the data are
    checkpoint.safetensors    all that is needed to go on, bit for bit
    model.safetensors         the averaged weights, for sampling
    metrics.jsonl             one line a step
    summary.json              held-out measures, and what ran
    samples.png  energies.png  training.png

The last three kinds are written when training is done. Every random number comes from ``TrainConfig.seed``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .data import Data, reload
from .energies import MLPEnergy, energy
from .objectives import contrastive_divergence_loss
from .pool import ChainPool
from .recipe import TrainConfig
from .report import report
from .sampling import NonFiniteError, langevin_sample

__all__ = [
    "Stopped",
    "TrainConfig",
    "load_model",
    "resolve_device",
    "saved_config",
    "train",
]

CHECKPOINT, MODEL, SUMMARY = "checkpoint.safetensors", "model.safetensors", "summary.json"

# Steps between checkpoints: a few seconds of work to lose, and far more time training than writing.
CHECKPOINT_EVERY = 250


class Stopped(Exception):
    """``should_stop`` asked for an end; the run folder can be resumed."""

    def __init__(self, out: Path, step: int, steps: int) -> None:
        super().__init__(f"stopped at step {step} of {steps}")
        self.out, self.step = out, step


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: it is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device {name!r} is not available: {reason}") from None
    return device


# -- the state of a run -------------------------------------------------------------------------------------


def build_model(config: TrainConfig, data_dim: int) -> MLPEnergy:
    """The energy with the initial weights of the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MLPEnergy(data_dim, config.hidden_sizes, config.activation)


class _Run:
    """All that changes while training. ``state`` and ``load`` are inverse to each other, bit for bit."""

    def __init__(self, config: TrainConfig, data: Data, device: torch.device) -> None:
        if config.batch_size > len(data.train):
            raise ValueError(f"batch_size must be <= {len(data.train)}, the training rows, got {config.batch_size}")
        self.config, self.device = config, device
        self.model = build_model(config, data.dim).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, betas=config.betas)
        self.pool = ChainPool(
            config.pool_size,
            data.dim,
            clamp=config.clamp,
            seed=config.seed,
            device=device,
            reinit_prob=config.restart_prob,
        )
        self.generator = torch.Generator().manual_seed(config.seed)  # of the data: their order, dequantisation
        self.step = 0
        self.seconds = 0.0
        # A batch of no chains: it fails here, before anything is written, if the backend can't run.
        langevin_sample(self.model, data.dim, batch_size=0, steps=0, seed=0, backend=config.backend)

    def average_weights(self) -> None:
        """Exponential moving average, whose early values are not held down by the random start."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(p, 1.0 - decay)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and values that JSON can hold."""
        pool = self.pool.state_dict()
        tensors = {f"pool.{k}": v for k, v in pool.items() if isinstance(v, Tensor)}
        tensors["generator"] = self.generator.get_state()
        tensors |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, p in self.model.named_parameters():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.optimizer.state.get(p, {}).items()}
        values = {
            "kind": "training",
            "config": self.config.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "pool": {k: v for k, v in pool.items() if not isinstance(v, Tensor)},
        }
        return tensors, values

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become the saved run. After an error this run is good for nothing."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.average.load_state_dict(part("average."))
        for name, p in self.model.named_parameters():
            for k, v in part(f"adam.{name}.").items():
                # Adam counts its steps in a tensor that stays on the CPU.
                self.optimizer.state[p][k] = v if k == "step" else v.to(self.device)
        self.pool.load_state_dict({**values["pool"], **part("pool.")})
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds = values["step"], values["seconds"]

    def save(self, out: Path) -> None:
        checkpoint.write(out / CHECKPOINT, *self.state())
        values = {"kind": "model", "config": self.config.to_dict(), "step": self.step}
        checkpoint.write(out / MODEL, self.average.state_dict(), values)


def _open_run(out: Path, config: TrainConfig, data: Data, device: torch.device) -> _Run:
    """The run that was saved in a folder."""
    path = out / CHECKPOINT
    tensors, values = checkpoint.read(path)
    if values.get("kind") != "training":
        raise ValueError(f"{path} holds no training run")
    run = _Run(config, data, device)
    try:
        run.load(tensors, values)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the run that its configuration describes: {error}") from None
    return run


def saved_config(run: str | os.PathLike[str]) -> TrainConfig:
    """The configuration of a run folder, from its checkpoint.

    Raises:
        ValueError: no run, a damaged one, or one whose config.json was edited since.
    """
    path = Path(run) / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"{run} is no run to resume: there is no {path}")
    values = checkpoint.read(path)[1]
    config = _config_of(path, values)
    copy_path = Path(run) / "config.json"
    if copy_path.exists() and _read_json(copy_path) != config.to_dict():
        raise ValueError(
            f"{copy_path} is not the configuration that {path} was trained with: undo the change, or delete {copy_path}"
        )
    return config


def load_model(run: str | os.PathLike[str]) -> tuple[MLPEnergy, TrainConfig]:
    """The energy of a run folder, with its averaged weights, and the configuration.

    Raises:
        ValueError: no run, or a damaged one.
    """
    path = Path(run) / MODEL
    if not path.is_file():
        raise ValueError(f"{run} is no run of fastebm: there is no {path}")
    tensors, values = checkpoint.read(path)
    config = _config_of(path, values)
    try:
        model = build_model(config, config.data.dim)
        model.load_state_dict(tensors)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the energy that its configuration describes: {error}") from None
    return model.requires_grad_(False), config


def _config_of(path: Path, values: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.from_dict(values["config"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no configuration that this fastebm can read: {error}") from None


# -- training -----------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    data: Data | None = None,
    resume: bool = False,
    on_step: Callable[[dict[str, float]], None] = lambda row: None,
    on_phase: Callable[[str], None] = lambda phase: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, sample, measure, draw: the whole run folder.

    A run that was stopped, killed or raised out of, and then resumed, ends with the same bits as one that was
    not (on the same device, backend and number of threads).

    Args:
        out: a folder that does not exist or is empty; with ``resume``, that of a run.
        data: None: what the configuration names. Else the configuration is of this.
        resume: go on from the folder's checkpoint. ``config`` must be the run's own (``saved_config``), save
            for device and backend.
        on_step: is given the line of metrics.jsonl of every finished step.
        on_phase: is given, in words, what goes on after training.
        should_stop: asked after every step, and now and then afterwards; true saves the run and raises ``Stopped``.

    Returns:
        What summary.json holds.

    Raises:
        ValueError, OSError: for bad input or a bad folder. Nothing is changed then.
        NonFiniteError: the loss or the chains exploded. The last checkpoint stays as it was.
        Stopped: see should_stop.
    """
    out = Path(out)
    device = resolve_device(config.device)
    data = data or reload(config.data, config.seed)
    config = dataclasses.replace(config, data=data.info)
    if resume:
        saved = saved_config(out)
        if dataclasses.replace(saved, device=config.device, backend=config.backend) != config:
            raise ValueError(f"the run in {out} has another configuration: resume it with its own")
        run = _open_run(out, config, data, device)
    else:
        run = _Run(config, data, device)
        _start_folder(out, config)
        run.save(out)
    metrics = _metrics_up_to(run.step, out / "metrics.jsonl")

    with open(out / "metrics.jsonl", "a", encoding="utf-8") as log:
        while run.step < config.steps:
            try:
                row = _train_step(run, data)
            except NonFiniteError as error:
                log.flush()
                raise NonFiniteError(
                    f"training failed in step {run.step + 1}: {error} (the last checkpoint stays)"
                ) from None
            metrics.append(row)
            log.write(json.dumps(row) + "\n")
            stop = should_stop()
            if stop or run.step == config.steps or run.step % CHECKPOINT_EVERY == 0:
                log.flush()  # first, so that no line of a saved step is missing
                run.save(out)
            on_step(row)
            if stop and run.step < config.steps:
                raise Stopped(out, run.step, config.steps)
    return _report(run, data, metrics, out, on_phase, should_stop)


def _train_step(run: _Run, data: Data) -> dict[str, float]:
    """One iteration; returns its line of metrics.jsonl."""
    config, model = run.config, run.model
    started = time.perf_counter()

    real = data.batch(config.batch_size, config.dequantisation, run.generator).to(run.device)
    samples, _ = run.pool.sample(
        model, config.batch_size, config.sampler(config.langevin_steps), config.langevin_steps, backend=config.backend
    )
    real_energy, sample_energy = energy(model, torch.cat([real, samples])).chunk(2)
    loss = contrastive_divergence_loss(real_energy, sample_energy, config.alpha)

    learning_rate = config.learning_rate_at(run.step)
    run.optimizer.param_groups[0]["lr"] = learning_rate
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    values = torch.stack([loss.detach(), real_energy.mean().detach(), sample_energy.mean().detach(), norm])
    loss_value, energy_real, energy_samples, grad_norm = values.tolist()  # the step's second device sync
    if not (math.isfinite(loss_value) and math.isfinite(grad_norm)):
        raise NonFiniteError(
            f"the loss is {loss_value:g} and the norm of its gradient {grad_norm:g}; "
            "try a smaller learning_rate or drift, or a larger alpha"
        )
    run.optimizer.step()
    run.step += 1
    run.average_weights()

    seconds = time.perf_counter() - started
    run.seconds += seconds
    return {
        "step": run.step,
        "loss": loss_value,
        "energy_real": energy_real,
        "energy_samples": energy_samples,
        "energy_gap": energy_samples - energy_real,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "chain_steps_per_second": config.batch_size * config.langevin_steps / seconds,
        "seconds": run.seconds,
    }


def _start_folder(out: Path, config: TrainConfig) -> None:
    if out.is_dir() and any(out.iterdir()):
        what = "already holds a run: resume it" if (out / CHECKPOINT).exists() else "is not empty"
        raise ValueError(f"{out} {what}, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", config.to_dict())


def _metrics_up_to(step: int, path: Path) -> list[dict[str, float]]:
    """The lines of the steps that a checkpoint knows; later ones, of steps to be done again, are cut off the file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # half a line: the run was killed while writing it
            break
        if not isinstance(row, dict) or row.get("step", math.inf) > step:
            break
        rows.append(row)
    checkpoint.write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


# -- what comes after ---------------------------------------------------------------------------------------


def _report(
    run: _Run,
    data: Data,
    metrics: list[dict[str, float]],
    out: Path,
    on_phase: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Samples, measures and pictures of a trained run."""
    config = run.config

    def begin(phase: str) -> None:
        if should_stop():
            raise Stopped(out, run.step, config.steps)
        on_phase(phase)

    started = time.perf_counter()
    summary = {
        **report(run.average, config, data, metrics, out, begin),
        "chain_steps": run.step * config.batch_size * config.langevin_steps,
        "seconds": run.seconds,
        "seconds_after_training": time.perf_counter() - started,
        "steps": run.step,
    }
    _write_json(out / SUMMARY, summary)
    return summary


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON") from None


def _write_json(path: Path, value: Any) -> None:
    checkpoint.write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
