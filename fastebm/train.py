"""Persistent contrastive divergence on images, from the data to a run folder.

    config.json               every hyper-parameter
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
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, evaluate, plot
from .energies import MLPEnergy, energy
from .langevin import Langevin
from .objectives import contrastive_divergence_loss
from .pool import ChainPool
from .sampling import NonFiniteError, SampleInfo, langevin_sample

__all__ = [
    "DIGITS_LEVELS",
    "DIGITS_SHAPE",
    "Images",
    "Stopped",
    "TrainConfig",
    "fresh_samples",
    "load_digits",
    "load_model",
    "resolve_device",
    "saved_config",
    "train",
]

CHECKPOINT, MODEL, SUMMARY = "checkpoint.safetensors", "model.safetensors", "summary.json"

# Steps between checkpoints: a few seconds of work to lose, and far more time training than writing.
CHECKPOINT_EVERY = 250

# Fresh chains are numbered past any pool's (fewer than 2**31), so that they never share its noise.
_FIRST_FRESH_CHAIN = 2**31

# Steps of fresh chains between two calls of on_steps.
_FRESH_CHUNK = 50

# A class is present with at least this share of the samples: one or two stray ones are no mode.
_MIN_CLASS_SHARE = 0.01

DIGITS_SHAPE, DIGITS_LEVELS = (8, 8), 16


class Stopped(Exception):
    """``should_stop`` asked for an end; the run folder can be resumed."""

    def __init__(self, out: Path, step: int, steps: int) -> None:
        super().__init__(f"stopped at step {step} of {steps}")
        self.out, self.step = out, step


# -- the recipe ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """Every hyper-parameter of a run; these defaults are the recipe.

    A chain moves by x' = clamp(x - drift clip(dE/dx, grad_clip) + noise xi) in blocks of langevin_steps, alike
    in training and when sampling afresh. Within a block the noise is noise_std, and over its last part
    (cooling, a share) falls linearly to 0, so a block ends on a step without noise. drift = noise_std^2 / 2 is
    temperature 1: the energy is the negative log-density, and finds its own scale.

    Args:
        steps: training iterations. batch_size: real images, and chains, of each.
        hidden_sizes, activation: of the MLPEnergy.
        dequantisation: width, in grey levels, of the uniform noise added to the data; 1 fills the gaps between
            levels, 0 leaves black and white exactly on the clamp's bounds, where clamped chains lie as well.
        pool_size: persistent chains. restart_prob: of a drawn chain. langevin_steps: of each iteration.
        learning_rate, betas: Adam's. warmup_steps: over which the learning rate rises from 0. decay: of the
            learning rate, to 0 at the end: "cosine", "linear" or "none".
        alpha: weight of the energies' squares in the loss.
        max_grad_norm: the weights' gradient is scaled down to it; None: never.
        ema_decay: of the averaged weights, which grows to it as (1 + step) / (10 + step).
        n_fresh: chains, from uniform noise, that the measures use. fresh_steps: of each.
        device: "auto" (a GPU if there is one) or any name of PyTorch's.
    """

    seed: int = 0
    steps: int = 2500
    batch_size: int = 256
    hidden_sizes: tuple[int, ...] = (256, 128)
    activation: str = "silu"
    dequantisation: float = 0.0

    pool_size: int = 10_000
    restart_prob: float = 0.02
    langevin_steps: int = 20
    drift: float = 0.01125
    noise_std: float = 0.15
    cooling: float = 0.5
    grad_clip: float | None = None
    clamp: tuple[float, float] | None = (0.0, 1.0)

    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 100
    decay: str = "linear"
    alpha: float = 1e-3
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.999

    n_fresh: int = 1000
    fresh_steps: int = 1000

    device: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "pool_size", "langevin_steps", "n_fresh", "fresh_steps"):
            _require(name, getattr(self, name), int, lambda v: v >= 1, "an int >= 1")
        _require("seed", self.seed, int, lambda v: 0 <= v < 2**63, "an int in [0, 2**63)")
        for name in ("drift", "learning_rate"):
            _require(name, getattr(self, name), float, lambda v: v > 0, "a number > 0")
        _require("warmup_steps", self.warmup_steps, int, lambda v: v >= 0, "an int >= 0")
        for name in ("noise_std", "alpha"):
            _require(name, getattr(self, name), float, lambda v: v >= 0, "a number >= 0")
        for name in ("restart_prob", "cooling", "dequantisation"):
            _require(name, getattr(self, name), float, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        _require("ema_decay", self.ema_decay, float, lambda v: 0 <= v < 1, "a number in [0, 1)")
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        for beta in self.betas:
            _require("betas", beta, float, lambda v: 0 <= v < 1, "two numbers in [0, 1)")
        self.sampler(1)  # checks grad_clip and clamp
        if self.max_grad_norm is not None:
            _require("max_grad_norm", self.max_grad_norm, float, lambda v: v > 0, "a number > 0, or None")
        if self.decay not in ("cosine", "linear", "none"):
            raise ValueError(f'decay must be "cosine", "linear" or "none", got {self.decay!r}')
        if self.batch_size > self.pool_size:
            raise ValueError(f"batch_size must be <= pool_size: got {self.batch_size} chains from {self.pool_size}")

    def sampler(self, steps: int) -> Langevin:
        """The sampler of ``steps`` steps, as many blocks as they hold; what is left over is the end of a block."""
        cooling = round(self.cooling * self.langevin_steps)
        noise = torch.full((self.langevin_steps,), self.noise_std)
        noise[self.langevin_steps - cooling :] *= torch.linspace(1.0, 0.0, cooling + 1)[1:]
        blocks = noise.repeat(-(-steps // self.langevin_steps))
        return Langevin.from_drift_and_noise(
            self.drift, blocks[len(blocks) - steps :], grad_clip=self.grad_clip, clamp=self.clamp
        )

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the iteration after ``step`` finished ones."""
        done = step / self.steps
        share = {"cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done, "none": 1.0}
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        return self.learning_rate * share[self.decay] * warm

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: missing, unknown or impossible entries.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            odd = ", ".join(sorted(values.keys() ^ names))
            raise ValueError(f"these entries of the configuration are missing or unknown: {odd}")
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**entries)


def _require(name: str, value: Any, kind: type, rule: Callable[[Any], bool], words: str) -> None:
    kinds = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not rule(value):  # NaN fails every rule
        raise ValueError(f"{name} must be {words}, got {value!r}")


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


# -- the data -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Images:
    """Images of integer grey levels 0 .. levels, split in two.

    train: (n_train, dim), test: (n_test, dim), float32 holding integers; their labels: (n,) int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    shape: tuple[int, int]
    levels: int

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    def dequantise(self, k: Tensor, width: float, generator: torch.Generator) -> Tensor:
        """x = clamp((k + width (u - 1/2)) / levels, 0, 1), u uniform on [0, 1), which rounds back to k."""
        u = torch.rand(k.shape, generator=generator)
        return ((k + width * (u - 0.5)) / self.levels).clamp_(0.0, 1.0)

    def quantise(self, x: Tensor) -> Tensor:
        """The nearest grey level, as a float."""
        return (x * self.levels).round_()

    def batch(self, size: int, width: float, generator: torch.Generator) -> Tensor:
        """Distinct dequantised training images: (size, dim)."""
        rows = torch.randperm(len(self.train), generator=generator)[:size]
        return self.dequantise(self.train[rows], width, generator)


def load_digits() -> Images:
    """scikit-learn's bundled handwritten digits: 8 x 8, levels 0 .. 16; 1,437 to train on and 360 held out.

    The split is the same for every seed, so that what is held out stays held out.
    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits (its test set).
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    x, y = load(return_X_y=True)
    split = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    train, test = (torch.from_numpy(part).float() for part in split[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in split[2:])
    return Images(train, train_labels, test, test_labels, DIGITS_SHAPE, DIGITS_LEVELS)


# -- the state of a run -------------------------------------------------------------------------------------


def build_model(config: TrainConfig, data_dim: int) -> MLPEnergy:
    """The energy with the initial weights of the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MLPEnergy(data_dim, config.hidden_sizes, config.activation)


class _Run:
    """All that changes while training. ``state`` and ``load`` are inverse to each other, bit for bit."""

    def __init__(self, config: TrainConfig, data: Images, device: torch.device) -> None:
        if config.batch_size > len(data.train):
            raise ValueError(f"batch_size must be <= {len(data.train)}, the training images, got {config.batch_size}")
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


def _open_run(out: Path, config: TrainConfig, data: Images, device: torch.device) -> _Run:
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
        model = build_model(config, tensors["0.weight"].shape[1])
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
    data: Images | None = None,
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
        data: None: the digits.
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
    data = data or load_digits()
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


def _train_step(run: _Run, data: Images) -> dict[str, float]:
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


def _report(
    run: _Run,
    data: Images,
    metrics: list[dict[str, float]],
    out: Path,
    on_phase: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Samples, measures and pictures of a trained run."""
    config, model = run.config, run.average

    def begin(phase: str) -> None:
        if should_stop():
            raise Stopped(out, run.step, config.steps)
        on_phase(phase)

    started = time.perf_counter()
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
        energies = {name: energy(model, x.to(run.device)).cpu().numpy() for name, x in states.items()}
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
    title = f"fastebm: MLP energy {data.dim} → {' → '.join(map(str, config.hidden_sizes))} → 1 after {run.step:,} steps"
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

    summary = {
        **measures,
        "chain_steps": run.step * config.batch_size * config.langevin_steps,
        "seconds": run.seconds,
        "seconds_after_training": time.perf_counter() - started,
        "steps": run.step,
        "seed": config.seed,
        "device": str(run.device),
        "device_name": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": info.backend,
        "path": info.path,
        "precision": info.precision,
        "why_not_fused": info.why_not_fused,
        "versions": _versions(),
    }
    _write_json(out / SUMMARY, summary)
    return summary


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("fastebm", "torch", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON") from None


def _write_json(path: Path, value: Any) -> None:
    checkpoint.write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
