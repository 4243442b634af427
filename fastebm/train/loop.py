"""The training loop, from the data to a run folder, by one process or several.

Every random number comes from ``TrainConfig.seed``. ``folder.py`` says what is written, ``state.py`` what changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..backends.settle import NonFiniteError
from ..data.dataset import Data
from ..data.sets import reload
from ..pool.processes import Processes
from ..threads import survives_fork
from . import checkpoint
from .folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    SUMMARY,
    check_empty,
    fixed_settings,
    located,
    locked,
    metrics_up_to,
    need_tensorboard,
    open_board,
    open_log,
    saved_config,
    write_json,
)
from .recipe import TrainConfig
from .report import write_report
from .resources import resolve_device
from .state import TrainState
from .writer import Writer

__all__ = ["CHECKPOINT_EVERY", "Stopped", "train"]

# Steps between checkpoints: an interruption loses a few seconds of work, and writing takes far less time than training.
CHECKPOINT_EVERY = 250


class Stopped(Exception):
    """``should_stop`` ended the run; its folder can be resumed."""

    def __init__(self, out: Path, step: int, steps: int) -> None:
        super().__init__(f"stopped at step {step} of {steps}")
        self.out, self.step = out, step


@survives_fork
def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    data: Data | None = None,
    resume: bool = False,
    checkpoint_every: int = CHECKPOINT_EVERY,
    tensorboard: bool = False,
    process_group: dist.ProcessGroup | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda row: None,
    on_phase: Callable[[str, int, int], None] = lambda words, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, sample, measure and draw: the whole run folder.

    A run that was stopped, killed or left by an exception, and then resumed, ends with the same bits as one that was
    not, given the same device, backend, number of steps, threads and processes.

    Args:
        out: a folder that does not exist or is empty. With ``resume``: a run folder, or a checkpoint in one, whose
            later checkpoints are then deleted when the next one is written.
        data: None: what the configuration names. Otherwise the configuration is taken to be of this.
        resume: go on from a checkpoint. ``config`` must be the run's own (``saved_config``), but device, backend,
            on_nonfinite and the number of processes may differ, and steps may be larger: the learning rate is then
            that of the longer run.
        checkpoint_every: steps between checkpoints. One is also written at the start, at the end and when stopped.
        tensorboard: also write the metrics for TensorBoard, into the folder ``tensorboard`` of the run.
        process_group: processes that train this run together and make the same call. Each moves its part of the
            chains and takes its part of the data; ``out`` is one folder for all. Losses and gradients equal those of
            a single process up to the order of sums. The first process writes, samples and measures.
        on_step: called with the line of metrics.jsonl after each step.
        on_phase: called during the work after training with what goes on, in words, the steps done, and the number of
            steps (0 if there are none to count).
        should_stop: called after every step, and now and then after training. If it returns true on any process, the
            run is saved and all processes raise ``Stopped``.

    Returns:
        The content of summary.json; on all processes but the first, an empty dict.

    Raises:
        ValueError, OSError: bad input or a bad folder. Nothing has changed then.
        OSError: a checkpoint could not be written, such as on a full disk. The previous checkpoint stays.
        NonFiniteError: the loss or the chains exploded. The last checkpoint stays.
        RuntimeError: another process ended, or was silent for two minutes. The last checkpoint stays.
        Stopped: see should_stop.
    """
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be an int >= 1, got {checkpoint_every!r}")
    processes = Processes(process_group)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.told_apart())
        with processes.together():
            if tensorboard:
                need_tensorboard()
            device = resolve_device(config.device)
            data = data or reload(config.data, config.seed)
            config = dataclasses.replace(config, data=data.info)
            source = os.fspath(out)
            out = located(source)[0] if resume else Path(out)
        call = config.to_dict(), source, resume, checkpoint_every
        processes.agree(None, call, differ="have another config, out, resume or checkpoint_every")
        if resume:
            state, metrics = _resumed(stack, source, out, config, data, device, processes)
        else:
            state, metrics = _started(stack, out, config, data, device, processes), []
        writer = stack.enter_context(Writer(out / CHECKPOINTS, processes))
        board = stack.enter_context(open_board(out if tensorboard and processes.rank == 0 else None, state.step))
        log = stack.enter_context(open_log(out / METRICS if processes.rank == 0 else None))
        if not resume:
            state.save(writer)
            writer.finish()
        while state.step < config.steps:
            row, stop = _logged_step(state, writer, log, should_stop)
            metrics.append(row)
            board(row)
            is_last = state.step == config.steps
            if stop or is_last or state.step % checkpoint_every == 0:
                log.flush()  # before the checkpoint, so that no line of a saved step is missing
                if processes.rank == 0:
                    os.fsync(log.fileno())
                state.save(writer)
            if stop or is_last:
                writer.finish()
            on_step(row)
            if stop and not is_last:
                raise Stopped(out, state.step, config.steps)
        n_nonfinite = 0 if state.pool is None else state.pool.stats().nonfinite
        with processes.together():
            pass  # all have ended well: now the first process goes on alone
        if processes.rank > 0:
            return {}

        def on_work(words: str, done: int, total: int) -> None:
            if should_stop():
                raise Stopped(out, state.step, config.steps)
            on_phase(words, done, total)

        return write_report(state, data, metrics, n_nonfinite, out, on_work)


def _started(
    stack: contextlib.ExitStack,
    out: Path,
    config: TrainConfig,
    data: Data,
    device: torch.device,
    processes: Processes,
) -> TrainState:
    """Begin a run in a new folder, which stays locked until the stack is closed."""
    state = TrainState(config, data, device, processes)
    with processes.together():
        check_empty(out)
        out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(out, processes))
    with processes.together():
        if processes.rank == 0:
            check_empty(out)  # again: another run may have begun before the folder was locked
            write_json(out / CONFIG, config.to_dict())
    return state


def _resumed(
    stack: contextlib.ExitStack,
    source: str,
    out: Path,
    config: TrainConfig,
    data: Data,
    device: torch.device,
    processes: Processes,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Go on with the run in a folder, which stays locked until the stack is closed; and its metrics so far."""
    stack.enter_context(locked(out, processes))
    with processes.together():
        if fixed_settings(saved_config(source).to_dict()) != fixed_settings(config.to_dict()):
            raise ValueError(f"the run in {out} has another configuration: resume it with its own")
        saved = checkpoint.Saved(located(source)[1])
        if config.steps < saved.step:
            raise ValueError(
                f"the run in {out} has done {saved.step} steps: steps must be more to extend it, got "
                f"{config.steps}; to go on from an earlier checkpoint name that"
            )
    state = TrainState(config, data, device, processes)
    state.load(saved)
    metrics: list[dict[str, float]] = []
    with processes.together():
        if processes.rank == 0:
            checkpoint.name_newest(saved.path)
            if state.step < config.steps:
                (out / SUMMARY).unlink(missing_ok=True)
            write_json(out / CONFIG, config.to_dict())  # the device, for one, may have changed
            metrics = metrics_up_to(state.step, out / METRICS)
    return state, metrics


def _logged_step(
    state: TrainState, writer: Writer, log: Any, should_stop: Callable[[], bool]
) -> tuple[dict[str, float], bool]:
    """One iteration, its line in the log, and a pending checkpoint that is ready. Returns the line, and whether to
    stop."""
    started = time.perf_counter()
    try:
        row = state.train_step()
    except NonFiniteError as error:
        writer.finish()  # all processes have this error
        raise NonFiniteError(f"training failed in step {state.step + 1}: {error} (the last checkpoint stays)") from None
    flags = torch.tensor([should_stop(), writer.ready], dtype=torch.float64, device="cpu")
    n_stop, n_ready = state.processes.total(flags).tolist()
    seconds = time.perf_counter() - started
    state.seconds += seconds
    row |= {state.speed_of: state.work_per_step / seconds, "seconds": state.seconds}
    log.write(json.dumps(row) + "\n")
    if n_ready == state.processes.size:
        writer.finish()
    return row, n_stop > 0
