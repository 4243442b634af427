"""All that changes while training: weights, optimizer, chains, random state. Saved and loaded bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Data
from ..driver.langevin_sample import langevin_sample
from ..pool.pool import ChainPool
from ..pool.processes import Processes
from .checkpoint import Saved
from .models import build_model, row_energy
from .objectives import OBJECTIVES, Place, build_objective
from .recipe import TrainConfig
from .resources import check_memory
from .trainer import Trainer
from .writer import Writer

__all__ = ["TrainState"]


class TrainState:
    """The state of a run. ``load`` is the inverse of ``save``."""

    def __init__(self, config: TrainConfig, data: Data, device: torch.device, processes: Processes) -> None:
        if config.batch_size > len(data.train):
            raise ValueError(f"batch_size must be <= {len(data.train)}, the training rows, got {config.batch_size}")
        check_memory(config, data.dim, device)
        self.config, self.data, self.device, self.processes = config, data, device, processes
        objective = build_objective(Place(config, data, device, processes.group))
        self.trainer = Trainer(
            build_model(config).to(device),
            objective,
            steps=config.steps,
            learning_rate=config.learning_rate,
            betas=config.betas,
            warmup_steps=config.warmup_steps,
            decay=config.decay,
            max_grad_norm=config.max_grad_norm,
            ema_decay=config.ema_decay,
            objective_learning_rate=config.objective_learning_rate,
            process_group=processes.group,
        )
        self.pool: ChainPool | None = getattr(objective, "pool", None)
        self.generator = torch.Generator().manual_seed(config.seed)  # of the order of the data, and dequantisation
        self.seconds = 0.0
        # Sample no chain: if the backend can't run, this fails before anything is written.
        if config.model != "pair":
            energy = row_energy(self.trainer.energy, config)
            langevin_sample(energy, data.dim, batch_size=0, steps=0, seed=0, backend=config.backend)

    @property
    def step(self) -> int:
        """Iterations that are done."""
        return self.trainer.steps_done

    @property
    def speed_of(self) -> str:
        """What the speed of training is measured in: the name of its column in metrics.jsonl."""
        return "chain_steps_per_second" if OBJECTIVES[self.config.objective].chains else "rows_per_second"

    @property
    def work_per_step(self) -> int:
        """Steps of chains in an iteration; or, without chains, rows of data."""
        return self.config.batch_size * (self.config.langevin_steps if "chain" in self.speed_of else 1)

    def train_step(self) -> dict[str, float]:
        """One iteration, on a batch that is the same on all processes: see ``Trainer.step``."""
        batch, labels = self.data.batch(self.config.batch_size, self.config.dequantisation, self.generator)
        return self.trainer.step(batch, labels if self.config.n_classes > 0 else None)

    def save(self, writer: Writer) -> None:
        """Begin a checkpoint. Only the rows of the pool differ between processes."""
        trained = self.trainer.state_dict()
        state = {"generator": self.generator.get_state()}
        for part, prefix in _PREFIXES.items():
            state |= {prefix + k: v for k, v in trained[part].items()}
        pool = {} if self.pool is None else self.pool.state_dict(copy=False)
        values = {
            "config": self.config.to_dict(),
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "pool": {k: v for k, v in pool.items() if not isinstance(v, Tensor)},
        }
        rows = {k: v for k, v in pool.items() if isinstance(v, Tensor)}
        writer.begin(self.step, {"model": trained["average"], "state": state}, rows, values)

    def load(self, saved: Saved) -> None:
        """Become the saved run. After an error this state must not be used."""
        with self.processes.together():
            average, state = saved.tensors("model"), saved.tensors("state")
            rows = {} if self.pool is None else saved.rows(self.pool.first_chain, self.pool.n_local)
            with _explaining(saved):
                trained: dict[str, Any] = {"average": average, "steps_done": saved.step}
                for part, prefix in _PREFIXES.items():
                    trained[part] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                for part in ("objective", "divergence"):  # runs of earlier versions have not saved these
                    trained[part] = trained[part] or self.trainer.state_dict()[part]
                self.trainer.load_state_dict(trained)
                self.generator.set_state(state["generator"])
                self.seconds = saved.values["seconds"]
                pool = {**saved.values["pool"], **rows}
        with _explaining(saved):
            if self.pool is not None:
                self.pool.load_state_dict(pool)


# Parts of ``Trainer.state_dict`` -> how their names begin in a checkpoint.
_PREFIXES = {
    "energy": "model.", "moments": "adam.", "objective": "objective.", "objective_moments": "objective_adam.",
    "divergence": "divergence.",
}  # fmt: skip


@contextlib.contextmanager
def _explaining(saved: Saved) -> Iterator[None]:
    """Name the checkpoint in errors about what it holds."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if Processes.lost(error):
            raise
        raise ValueError(f"{saved.path} does not hold the run that its configuration describes: {error}") from None
