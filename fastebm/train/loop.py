"""Persistent contrastive divergence, from the data to a run folder, by one process or several.

    config.json               every hyper-parameter, and what the data are
    checkpoints/              the two newest: all that is needed to go on, bit for bit (checkpoint.py)
      step-00001200/
        model.safetensors     the averaged weights, for sampling
    metrics.jsonl             one line a step
    summary.json              held-out measures, and what ran
    samples.png  energies.png  training.png

The last three kinds are written when training is done. Every random number comes from ``TrainConfig.seed``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends import Chains
from ..data.sets import Data, reload
from ..devices import checked_device
from ..driver.sampling import NonFiniteError, advance_chains, langevin_sample
from ..energies import MLPEnergy, energy
from ..objectives import contrastive_divergence_loss
from ..pool.pool import ChainPool
from ..pool.processes import Processes
from ..threads import fastest, survives_fork
from ..words import did_you_mean
from . import checkpoint
from .recipe import RETIRED, TrainConfig
from .report import report

__all__ = [
    "Stopped",
    "TrainConfig",
    "load_model",
    "resolve_device",
    "saved_config",
    "seconds_of_a_step",
    "train",
]

CHECKPOINTS, LOCK, SUMMARY = "checkpoints", ".lock", "summary.json"

# What a run may be resumed with another value of: nothing that says what it has computed. More steps extend it.
FREE_SETTINGS = ("steps", "device", "backend", "on_nonfinite")

# Steps between checkpoints: a few seconds of work to lose, and far more time training than writing.
CHECKPOINT_EVERY = 250

# Steps at the end of which summary.json tells the mean energy gap.
_LAST_STEPS = 50

# A run goes on without this share of its chains at most, in one step: more are no accident.
_MAX_NONFINITE_SHARE = 0.1


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
    device = checked_device(name)
    if device.type == "meta":
        raise ValueError("device 'meta' holds no values: name another")
    return device


# -- the state of a run -------------------------------------------------------------------------------------


def build_model(config: TrainConfig, data_dim: int) -> MLPEnergy:
    """The energy with the initial weights of the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MLPEnergy(data_dim, config.hidden_sizes, config.activation)


def check_memory(config: TrainConfig, dim: int, device: torch.device) -> None:
    """An error for a run that can't fit in memory: by the time that memory has run out, the system ends the process.

    Raises:
        ValueError: with what takes how much.
    """
    sizes = (dim, *config.hidden_sizes, 1)
    # the weights, their gradient, Adam's two moments, their average, and a copy on its way to the disk
    weights = 6 * sum(n_in * n_out + n_out for n_in, n_out in pairwise(sizes))
    pool, batch = 2 * config.pool_size * dim, 4 * config.batch_size * sum(sizes)
    gib, there = [4 * n / 2**30 for n in (weights, pool, batch)], _memory(device) / 2**30
    if sum(gib) > there:
        raise ValueError(
            f"training needs some {sum(gib):,.0f} GiB, and {device} has {there:,.0f}: {gib[0]:,.1f} for the weights "
            f"of hidden_sizes {config.hidden_sizes}, {gib[1]:,.1f} for a pool_size of {config.pool_size:,}, and "
            f"{gib[2]:,.1f} for a batch_size of {config.batch_size:,}: take less"
        )


def _memory(device: torch.device) -> float:
    """Bytes that a device has, or that this process may use of them; inf where nobody knows."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    known = [math.inf]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for of_container in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):
            known.append(int(Path(of_container).read_text()))
    return min(known)


def seconds_of_a_step(config: TrainConfig, data: Data, threads: int) -> dict[int, float]:
    """Of training on the CPU, by number of threads up to this, the best first (``threads.fastest``). It is the work of
    a step, on a model of its own: nothing of a run is moved."""
    model = build_model(config, data.dim)
    steps = config.langevin_steps
    rule = config.sampler(steps)
    real = data.batch(config.batch_size, config.dequantisation, torch.Generator().manual_seed(config.seed))

    def step() -> None:
        samples, _ = advance_chains(
            model,
            Chains(real, config.seed, torch.arange(len(real)), torch.zeros(len(real), dtype=torch.int64)),
            rule,
            steps,
            shape=(data.dim,),
            backend=config.backend,
            on_nonfinite="ignore",
        )
        energies = energy(model, torch.cat([real, samples.x]))
        contrastive_divergence_loss(energies[: len(real)], energies[len(real) :], config.alpha).backward()  # type: ignore[no-untyped-call]

    return fastest(step, threads)


class _Run:
    """All that changes while training. ``save`` and ``load`` are inverse to each other, bit for bit."""

    def __init__(self, config: TrainConfig, data: Data, device: torch.device, processes: Processes) -> None:
        if config.batch_size > len(data.train):
            raise ValueError(f"batch_size must be <= {len(data.train)}, the training rows, got {config.batch_size}")
        check_memory(config, data.dim, device)
        self.config, self.device, self.processes = config, device, processes
        self.model = build_model(config, data.dim).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        # What the loss goes through: gradients are then those of all processes.
        self.trained: nn.Module = self.model
        if processes.size > 1:
            self.trained = nn.parallel.DistributedDataParallel(self.model, process_group=processes.group)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, betas=config.betas)
        self.pool = ChainPool(
            config.pool_size,
            data.dim,
            clamp=config.clamp,
            seed=config.seed,
            device=device,
            reinit_prob=config.restart_prob,
            process_group=processes.group,
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

    def save(self, writer: checkpoint.Writer) -> None:
        """Begin a checkpoint. All but the pool's rows is the same on every process."""
        state = {"generator": self.generator.get_state()}
        state |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            state |= {f"adam.{name}.{k}": v for k, v in self.optimizer.state.get(p, {}).items()}
        pool = self.pool.state_dict(copy=False)
        values = {
            "config": self.config.to_dict(),
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "pool": {k: v for k, v in pool.items() if not isinstance(v, Tensor)},
        }
        rows = {k: v for k, v in pool.items() if isinstance(v, Tensor)}
        writer.begin(self.step, {"model": self.average.state_dict(), "state": state}, rows, values)

    def load(self, saved: checkpoint.Saved) -> None:
        """Become the saved run. After an error this run is good for nothing."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        with self.processes.together():
            average, state = saved.tensors("model"), saved.tensors("state")
            rows = saved.rows(self.pool.first_chain, self.pool.n_local)
            with _described(saved):
                self.model.load_state_dict(part("model."))
                self.average.load_state_dict(average)
                for name, p in self.model.named_parameters():
                    for k, v in part(f"adam.{name}.").items():
                        # Adam counts its steps in a tensor that stays on the CPU.
                        self.optimizer.state[p][k] = v if k == "step" else v.to(self.device)
                self.generator.set_state(state["generator"])
                self.step, self.seconds = saved.step, saved.values["seconds"]
                pool = {**saved.values["pool"], **rows}
        with _described(saved):
            self.pool.load_state_dict(pool)


@contextlib.contextmanager
def _described(saved: checkpoint.Saved) -> Iterator[None]:
    """What can't be taken over from a checkpoint is named."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if Processes.lost(error):
            raise
        raise ValueError(f"{saved.path} does not hold the run that its configuration describes: {error}") from None


def located(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """A run folder and its newest checkpoint; or, if the path is of a checkpoint, that one and its run folder.

    Raises:
        ValueError: it is no run, or its newest checkpoint is not known.
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
        raise ValueError(f"{path} is no run of fastebm: there is no {path / CHECKPOINTS}{near}")
    return path, checkpoint.newest(path / CHECKPOINTS)


def saved_config(run: str | os.PathLike[str]) -> TrainConfig:
    """The configuration of a run folder, from its newest checkpoint, or of the checkpoint that is named.

    Raises:
        ValueError: no run, a damaged one, or one whose config.json was edited since.
    """
    out, path = located(run)
    config = _config_of(path, checkpoint.Saved(path).values)
    copy_path = out / "config.json"
    if not copy_path.exists():
        return config
    asked = _read_json(copy_path)
    if _fixed(asked) != _fixed(config.to_dict()):
        raise ValueError(
            f"{copy_path} is not the configuration that {path} was trained with: undo the change, or delete {copy_path}"
        )
    # A run that was extended, and then killed before its next checkpoint, goes on to its new end.
    return TrainConfig.from_dict({**config.to_dict(), "steps": asked["steps"]}) if "steps" in asked else config


def _fixed(config: Any) -> Any:
    """What a run can't be resumed with another value of."""
    left_out = (*FREE_SETTINGS, *RETIRED)
    return {k: v for k, v in config.items() if k not in left_out} if isinstance(config, dict) else config


def load_model(run: str | os.PathLike[str]) -> tuple[MLPEnergy, TrainConfig]:
    """The energy of a run folder, with its averaged weights, and the configuration; or those of a checkpoint in it.

    Raises:
        ValueError: no run, or a damaged one.
    """
    path = located(run)[1]
    saved = checkpoint.Saved(path)
    config, tensors = _config_of(path, saved.values), saved.tensors("model")
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


@survives_fork
def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    data: Data | None = None,
    resume: bool = False,
    checkpoint_every: int = CHECKPOINT_EVERY,
    process_group: dist.ProcessGroup | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda row: None,
    on_phase: Callable[[str, int, int], None] = lambda words, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, sample, measure, draw: the whole run folder.

    A run that was stopped, killed or raised out of, and then resumed, ends with the same bits as one that was
    not (on the same device, backend, number of threads and processes; of steps, too).

    Args:
        out: a folder that does not exist or is empty; with ``resume``, that of a run, or a checkpoint in it: those
            after it are then deleted with the next one that is written.
        data: None: what the configuration names. Else the configuration is of this.
        resume: go on from a checkpoint. ``config`` must be the run's own (``saved_config``), save for device, backend,
            on_nonfinite, and steps, which may be more than the run was to have: the learning rate of a step is then
            that of the longer run. The number of processes may be another.
        checkpoint_every: steps between checkpoints. One is also written at the start, at the end and when stopped.
        process_group: of processes that train this run together, each of which makes the same call. Each moves its
            part of the chains and takes its part of the data; ``out`` is one folder for all. Losses and gradients are
            those of one process, but for the order of sums. The first one writes, samples and measures.
        on_step: is given the line of metrics.jsonl of every finished step.
        on_phase: is given, in words, what goes on after training, and how many steps of how many are done (0 of 0
            where there are none).
        should_stop: asked after every step, and now and then afterwards; true saves the run and raises ``Stopped``, on
            all processes if on one.

    Returns:
        What summary.json holds; nothing on processes but the first.

    Raises:
        ValueError, OSError: for bad input or a bad folder. Nothing is changed then.
        OSError: a checkpoint could not be written (a full disk): the run ends, and the checkpoint before stays.
        NonFiniteError: the loss or the chains exploded. The last checkpoint stays as it was.
        RuntimeError: another process ended, or was silent for two minutes. The last checkpoint stays.
        Stopped: see should_stop.
    """
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be an int >= 1, got {checkpoint_every!r}")
    processes = Processes(process_group)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.told_apart())
        with processes.together():
            device = resolve_device(config.device)
            data = data or reload(config.data, config.seed)
            config = dataclasses.replace(config, data=data.info)
            source, saved = os.fspath(out), None
            out = located(source)[0] if resume else Path(out)
        call = config.to_dict(), source, resume, checkpoint_every
        processes.agree(None, call, differ="have another config, out, resume or checkpoint_every")
        if resume:
            stack.enter_context(_locked(out, processes))
            with processes.together():
                if _fixed(saved_config(source).to_dict()) != _fixed(config.to_dict()):
                    raise ValueError(f"the run in {out} has another configuration: resume it with its own")
                saved = checkpoint.Saved(located(source)[1])
                if config.steps < saved.step:
                    raise ValueError(
                        f"the run in {out} has done {saved.step} steps: steps must be more to extend it, got "
                        f"{config.steps}; to go on from an earlier checkpoint name that"
                    )
        run = _Run(config, data, device, processes)
        if saved is not None:
            run.load(saved)
        else:
            with processes.together():
                check_empty(out)
                out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(out, processes))
        metrics: list[dict[str, float]] = []
        with processes.together():
            if processes.rank == 0:
                if saved is None:
                    check_empty(out)
                else:
                    checkpoint.name_newest(saved.path)
                    if run.step < config.steps:
                        (out / SUMMARY).unlink(missing_ok=True)
                # Anew in a resumed run too, whose device, say, may be another.
                _write_json(out / "config.json", config.to_dict())
                metrics = _metrics_up_to(run.step, out / "metrics.jsonl")
        writer = stack.enter_context(checkpoint.Writer(out / CHECKPOINTS, processes))
        log = stack.enter_context(_log(out / "metrics.jsonl" if processes.rank == 0 else None))
        if saved is None:
            run.save(writer)
            writer.finish()
        while run.step < config.steps:
            try:
                row, stop, n_ready = _train_step(run, data, lambda: (should_stop(), writer.ready))
            except NonFiniteError as error:
                writer.finish()  # all processes have this error
                raise NonFiniteError(
                    f"training failed in step {run.step + 1}: {error} (the last checkpoint stays)"
                ) from None
            metrics.append(row)
            log.write(json.dumps(row) + "\n")
            if n_ready == processes.size:
                writer.finish()
            is_last = run.step == config.steps
            if stop or is_last or run.step % checkpoint_every == 0:
                log.flush()  # first, so that no line of a saved step is missing
                if processes.rank == 0:
                    os.fsync(log.fileno())
                run.save(writer)
            if stop or is_last:
                writer.finish()
            on_step(row)
            if stop and not is_last:
                raise Stopped(out, run.step, config.steps)
        n_nonfinite = run.pool.stats().nonfinite
        with processes.together():
            pass  # from here on the first one works alone
        if processes.rank > 0:
            return {}
        return _report(run, data, metrics, out, n_nonfinite, on_phase, should_stop)


def _train_step(run: _Run, data: Data, flags: Callable[[], tuple[bool, bool]]) -> tuple[dict[str, float], bool, int]:
    """One iteration; returns its line of metrics.jsonl, and what ``flags`` says: on any process; on how many."""
    config, model, processes = run.config, run.model, run.processes
    started = time.perf_counter()

    n = config.batch_size
    real = data.batch(n, config.dequantisation, run.generator)  # the same on all processes, which each take a part
    real = real[slice(*processes.share(n))].to(run.device)
    samples, _ = run.pool.sample(
        model, n, config.sampler(config.langevin_steps), config.langevin_steps, backend=config.backend,
        on_nonfinite=config.on_nonfinite,
    )  # fmt: skip
    n_nonfinite = run.pool.last.nonfinite if run.pool.last is not None else 0
    if n_nonfinite > max(1, _MAX_NONFINITE_SHARE * n):
        raise NonFiniteError(
            f"{n_nonfinite} of {n} chains are not finite, and on_nonfinite='reinit' goes on with up to "
            f"{_MAX_NONFINITE_SHARE:.0%} of them; try a smaller drift or learning_rate, or grad_clip"
        )
    energies = energy(run.trained, torch.cat([real, samples]))
    real_energy, sample_energy = energies[: len(real)], energies[len(real) :]
    loss = contrastive_divergence_loss(real_energy, sample_energy, config.alpha, batch_size=n)

    learning_rate = config.learning_rate_at(run.step)
    run.optimizer.param_groups[0]["lr"] = learning_rate
    run.optimizer.zero_grad(set_to_none=True)
    (loss * processes.size).backward()  # type: ignore[no-untyped-call]  # DistributedDataParallel divides by it
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    values = torch.stack([norm, loss.detach(), real_energy.detach().sum() / n, sample_energy.detach().sum() / n])
    grad_norm, *parts = values.tolist()  # the step's second device sync
    sums = processes.total(torch.tensor([*parts, *flags()], dtype=torch.float64))
    loss_value, energy_real, energy_samples, n_stop, n_ready = sums.tolist()
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
    row = {
        "step": run.step,
        "loss": loss_value,
        "energy_real": energy_real,
        "energy_samples": energy_samples,
        "energy_gap": energy_samples - energy_real,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "nonfinite": n_nonfinite,
        "chain_steps_per_second": n * config.langevin_steps / seconds,
        "seconds": run.seconds,
    }
    return row, n_stop > 0, int(n_ready)


def check_empty(out: Path) -> None:
    """An error if a new run would disturb what is there."""
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        whole = any((out / CHECKPOINTS).glob("step-*[0-9]"))  # not if it was killed before its first checkpoint
        what = "already holds a run: resume it, or" if whole else "is not empty, and holds no run to resume:"
        raise ValueError(f"{out} {what} choose another folder")


@contextlib.contextmanager
def _locked(out: Path, processes: Processes) -> Iterator[None]:
    """No other run can use the folder. The lock is the system's, and ends with the process however that ends."""
    from filelock import FileLock, Timeout  # an optional package, which torch itself needs

    lock = FileLock(out / LOCK)

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
def _log(path: Path | None) -> Iterator[Any]:
    """metrics.jsonl, to append to; None: nothing is kept."""
    try:
        with open(path or os.devnull, "a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        if error.filename is None:  # a write has no name of its own
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _metrics_up_to(step: int, path: Path) -> list[dict[str, float]]:
    """The lines of the steps that a checkpoint knows; later ones, of steps to be done again, are cut off the file."""
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: move it away to go on without it") from None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # half a line: the run was killed while writing it
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or row["step"] > step:
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
    n_nonfinite: int,
    on_phase: Callable[[str, int, int], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Samples, measures and pictures of a trained run."""
    config = run.config

    def begin(words: str, done: int, total: int) -> None:
        if should_stop():
            raise Stopped(out, run.step, config.steps)
        on_phase(words, done, total)

    started = time.perf_counter()
    summary = {
        **report(run.average, config, data, metrics, out, begin),
        "energy_gap": sum(row["energy_gap"] for row in metrics[-_LAST_STEPS:]) / max(1, len(metrics[-_LAST_STEPS:])),
        "chain_steps": run.step * config.batch_size * config.langevin_steps,
        "nonfinite": n_nonfinite,
        "processes": run.processes.size,
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
