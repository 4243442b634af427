"""All that changes while training: weights, optimizer, chains, random state. Saved and loaded bit for bit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..data.dataset import Data
from ..driver.langevin_sample import langevin_sample
from ..objectives import ContrastiveDivergence
from ..pool.pool import ChainPool
from ..pool.processes import Processes
from .checkpoint import Saved
from .recipe import TrainConfig, build_model
from .resources import check_memory
from .writer import Writer

__all__ = ["TrainState"]


class TrainState:
    """The state of a run. ``load`` is the inverse of ``save``."""

    def __init__(self, config: TrainConfig, data: Data, device: torch.device, processes: Processes) -> None:
        if config.batch_size > len(data.train):
            raise ValueError(f"batch_size must be <= {len(data.train)}, the training rows, got {config.batch_size}")
        check_memory(config, data.dim, device)
        self.config, self.device, self.processes = config, device, processes
        self.model = build_model(config, data.dim).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        # The loss goes through the wrapper, which averages the gradients of all processes.
        self.wrapped: nn.Module = self.model
        if processes.size > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, process_group=processes.group)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, betas=config.betas)
        self.pool = ChainPool(
            config.pool_size,
            data.dim,
            clamp=config.clamp,
            seed=config.seed,
            device=device,
            reinit_prob=config.reinit_prob,
            process_group=processes.group,
        )
        self.objective = ContrastiveDivergence(
            config.sampler(config.langevin_steps),
            config.langevin_steps,
            pool=self.pool,
            reg_alpha=config.reg_alpha,
            backend=config.backend,
            on_nonfinite=config.on_nonfinite,
        )
        self.generator = torch.Generator().manual_seed(config.seed)  # of the order of the data, and dequantisation
        self.step = 0
        self.seconds = 0.0
        # Sample no chain: if the backend can't run, this fails before anything is written.
        langevin_sample(self.model, data.dim, batch_size=0, steps=0, seed=0, backend=config.backend)

    def average_weights(self) -> None:
        """Update the exponential moving average. Its decay starts small, so that it forgets the initial weights."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(p, 1.0 - decay)

    def save(self, writer: Writer) -> None:
        """Begin a checkpoint. Only the rows of the pool differ between processes."""
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

    def load(self, saved: Saved) -> None:
        """Become the saved run. After an error this state must not be used."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        with self.processes.together():
            average, state = saved.tensors("model"), saved.tensors("state")
            rows = saved.rows(self.pool.first_chain, self.pool.n_local)
            with _explaining(saved):
                self.model.load_state_dict(part("model."))
                self.average.load_state_dict(average)
                for name, p in self.model.named_parameters():
                    for k, v in part(f"adam.{name}.").items():
                        # Adam keeps its step count in a tensor on the CPU.
                        self.optimizer.state[p][k] = v if k == "step" else v.to(self.device)
                self.generator.set_state(state["generator"])
                self.step, self.seconds = saved.step, saved.values["seconds"]
                pool = {**saved.values["pool"], **rows}
        with _explaining(saved):
            self.pool.load_state_dict(pool)


@contextlib.contextmanager
def _explaining(saved: Saved) -> Iterator[None]:
    """Name the checkpoint in errors about what it holds."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if Processes.lost(error):
            raise
        raise ValueError(f"{saved.path} does not hold the run that its configuration describes: {error}") from None
