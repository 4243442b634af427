"""Training any energy with any objective: one step, and all that it changes.

A step is loss -> gradients -> clip -> optimizer -> moving average of the weights. With several processes, each takes
its rows of the batch, and one all-reduce sums the gradients of all parameters. (DistributedDataParallel would do so for
the energy alone, and asks of objectives one forward pass per step and a gradient of every weight.)
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends.settle import NonFiniteError
from ..energies import first_tensor
from ..energies.functions import FunctionModule, name_of_forward
from ..objectives import Objective
from ..objectives.negatives import ChainObjective
from ..pool.processes import Processes
from ..scalars import checked_integer, checked_number

__all__ = ["DECAYS", "Divergence", "Trainer", "learning_rate_factor"]

# With on_nonfinite="reinit", training ends if more than this share of a batch is not finite: that is no accident.
_MAX_NONFINITE_SHARE = 0.1

DECAYS = ("cosine", "linear", "none")


def learning_rate_factor(done: int, steps: int, warmup_steps: int, decay: str) -> float:
    """What the learning rate is multiplied by after ``done`` of ``steps`` iterations: see ``Trainer``."""
    share = done / steps
    factor = {"cosine": 0.5 * (1.0 + math.cos(math.pi * share)), "linear": 1.0 - share, "none": 1.0}[decay]
    return factor * (min(1.0, (done + 1) / warmup_steps) if warmup_steps > 0 else 1.0)


class Trainer:
    """Trains an energy with an objective: ``step`` is one iteration, ``fit`` all of them.

        trainer = Trainer(energy, DenoisingScoreMatching(sigma=0.3), steps=2000, learning_rate=1e-3)
        trainer.fit(loader)
        samples = fastebm.sample(trainer.average, fastebm.HMC(0.1), steps=200, warmup=100)

    ``average`` holds the exponential moving average of the weights, which samples best. In step t its decay is at most
    (1 + t) / (10 + t), so that it forgets the initial weights. The average of a half-precision energy is float32, and
    takes float32 states: bfloat16 would round away what one step adds. Its buffers are those of the energy, so running
    statistics of BatchNorm are not those of the averaged weights; ``torch.optim.swa_utils.update_bn(loader,
    trainer.average)`` computes these.

    A loss or gradient that is not finite raises NonFiniteError before any weight has changed. Training that starts to
    diverge warns once (``Divergence``).

    Args:
        energy: the model that is trained. Functions in it must not call what is trained: their copies in ``average``
            would call the same weights. objective: see ``fastebm.Objective``. It moves to the energy's device.
            Parameters of its own (log Z, a generator, a flow) are trained too.
        steps: iterations of the whole training, over which the learning rate decays.
        learning_rate, betas: Adam's; None: 1e-3 and (0.9, 0.999). objective_learning_rate: of the objective's own
            parameters; None: learning_rate.
        warmup_steps: over which the learning rate rises from 0.
        decay: of the learning rate, to 0 at the end: "cosine", "linear" or "none".
        max_grad_norm: the gradient of the energy's weights is clipped to this norm, and so is that of the objective's
            own. None: never.
        ema_decay: of the averaged weights, in [0, 1).
        optimizer: of all parameters, in place of Adam and its options. Its own learning rates warm up and decay in the
            same way.
        process_group: processes that train together and make the same calls with the same batches. Each takes its
            part of the rows. The result is that of one process up to the order of sums. All start with the weights,
            buffers and seed of the first.
    """

    def __init__(
        self,
        energy: nn.Module,
        objective: Objective,
        *,
        steps: int,
        learning_rate: float | None = None,
        betas: tuple[float, float] | None = None,
        warmup_steps: int = 0,
        decay: str = "linear",
        max_grad_norm: float | None = 1.0,
        ema_decay: float = 0.999,
        objective_learning_rate: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.energy, self.objective = energy, objective
        self.steps, self.steps_done = checked_integer("steps", steps, least=1), 0
        self.warmup_steps = checked_integer("warmup_steps", warmup_steps, least=0)
        if decay not in DECAYS:
            raise ValueError(f'decay must be "cosine", "linear" or "none", got {decay!r}')
        if max_grad_norm is not None:
            checked_number("max_grad_norm", max_grad_norm, positive=True)
        if checked_number("ema_decay", ema_decay, positive=False) >= 1:
            raise ValueError(f"ema_decay must be < 1, got {ema_decay!r}")
        self.decay, self.max_grad_norm, self.ema_decay = decay, max_grad_norm, ema_decay
        _check_energy(energy)
        self._own = [p for p in objective.parameters() if p.requires_grad]
        self._weights = [p for p in energy.parameters() if p.requires_grad]
        rates = (learning_rate, objective_learning_rate, betas)
        self.optimizer = self._adam(*rates) if optimizer is None else self._checked(optimizer, rates)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        tensor = first_tensor(energy)
        self.device = torch.device("cpu") if tensor is None else tensor.device
        self.processes = Processes(process_group, self.device)
        objective.to(self.device)
        for module in (energy, objective):
            self.processes.copy_first(module)
        self.average = copy.deepcopy(energy).requires_grad_(False)
        for kept in chain(self.average.parameters(), self.average.buffers()):
            if kept.dtype in (torch.bfloat16, torch.float16):
                kept.data = kept.data.float()
        self._divergence = Divergence("energy_gap" if isinstance(objective, ChainObjective) else "loss")

    def fit(
        self,
        batches: Iterable[Tensor | tuple[Tensor, Tensor]],
        on_step: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> None:
        """Train until ``steps`` iterations are done, over and over the same batches if there are fewer.

        Args:
            batches: such as a DataLoader: tensors (n, *shape), or pairs of these and labels (n,).
            on_step: called after each iteration with what ``step`` returned.
        """
        while self.steps_done < self.steps:
            before = self.steps_done
            for batch in batches:
                on_step(self.step(batch) if isinstance(batch, Tensor) else self.step(*batch))
                if self.steps_done == self.steps:
                    return
            if self.steps_done == before:
                raise ValueError(
                    f"batches ended after {before} of {self.steps} steps: pass a loader, or an iterator of more"
                )

    def step(self, batch: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """One iteration.

        Args:
            batch: (n, *shape), on any device; with several processes the same on all.
            labels: (n,) int64, for an energy or an objective that takes them.

        Returns:
            Numbers to log, of the whole batch: step, loss, the objective's metrics, energy_gap (samples minus data, if
            it has these), grad_norm before the clip, learning_rate, nonfinite (chains that started again), diverging.

        Raises:
            ValueError: the batch has no rows.
            NonFiniteError: the loss, its gradient or too many chains are not finite. No weight has changed.
        """
        if len(batch) == 0:
            raise ValueError(f"a batch must have at least one row, got shape {tuple(batch.shape)}: leave it out")
        n, (first, end) = len(batch), self.processes.share(len(batch))
        mine = None if labels is None else labels[first:end].to(self.device)
        loss, metrics, _ = self.objective(
            self.energy, batch[first:end].to(self.device), labels=mine, batch_size=n, first_row=first
        )
        n_nonfinite = self._restarted(n)
        factor = learning_rate_factor(self.steps_done, self.steps, self.warmup_steps, self.decay)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._sum_gradients()
        bound = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm, own_norm = (nn.utils.clip_grad_norm_(parts, bound) for parts in (self._weights, self._own))
        values = [norm, *(torch.as_tensor(v).to(norm) for v in (own_norm, loss.detach(), *metrics.values()))]
        grad_norm, own_grad_norm, *parts = torch.stack(values).tolist()  # the step waits for the device here
        loss_value, *totals = self.processes.total(torch.tensor(parts, dtype=torch.float64)).tolist()
        if not all(map(math.isfinite, (loss_value, grad_norm, own_grad_norm))):
            raise NonFiniteError(
                f"the loss is {loss_value:g} and the norm of its gradient {grad_norm:g}; try a smaller learning_rate, "
                "or, with chains, smaller steps of the sampler (drift) or a larger reg_alpha"
            )
        self.optimizer.step()
        self.steps_done += 1
        self._average_weights()
        row = {"step": self.steps_done, "loss": loss_value, **dict(zip(metrics, totals, strict=True))}
        if {"energy_real", "energy_samples"} <= row.keys():
            row["energy_gap"] = row["energy_samples"] - row["energy_real"]
        row |= {"grad_norm": grad_norm, "learning_rate": self._peaks[0] * factor, "nonfinite": n_nonfinite}
        return row | {"diverging": self._divergence.watch(row)}

    def state_dict(self) -> dict[str, Any]:
        """All that changes: tensors by name of "energy", "average", "objective" and "divergence"; what the optimizer
        keeps for each parameter, by PARAMETER.NAME, as "moments" and "objective_moments"; and the number "steps_done".
        Pools have their own."""
        return {
            "energy": self.energy.state_dict(),
            "average": self.average.state_dict(),
            "objective": self.objective.state_dict(),
            "moments": self._moments(self.energy),
            "objective_moments": self._moments(self.objective),
            "divergence": self._divergence.state_dict(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``. After an error this trainer must not be used.

        Raises:
            KeyError, RuntimeError: it is the state of another energy, objective or optimizer.
        """
        self.energy.load_state_dict(state["energy"])
        self.average.load_state_dict(state["average"])
        self.objective.load_state_dict(state["objective"])
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        number = {p: i for i, p in enumerate(parameters)}
        kept = defaultdict[int, dict[str, Any]](dict)
        for part, module in (("moments", self.energy), ("objective_moments", self.objective)):
            named = {name: number[p] for name, p in module.named_parameters() if p in number}
            for key, value in state[part].items():
                name, _, k = key.rpartition(".")
                kept[named[name]][k] = copy.deepcopy(value)  # since the optimizer works in place
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(kept)})
        self._divergence.load_state_dict(state["divergence"])
        self.steps_done = state["steps_done"]

    def _moments(self, module: nn.Module) -> dict[str, Any]:
        """What the optimizer keeps for the parameters of a module."""
        kept = self.optimizer.state
        return {f"{name}.{k}": v for name, p in module.named_parameters() for k, v in kept.get(p, {}).items()}

    def _adam(
        self, learning_rate: float | None, own_rate: float | None, betas: tuple[float, float] | None
    ) -> torch.optim.Optimizer:
        rate = checked_number("learning_rate", 1e-3 if learning_rate is None else learning_rate, positive=True)
        own_rate = rate if own_rate is None else checked_number("objective_learning_rate", own_rate, positive=False)
        betas = (0.9, 0.999) if betas is None else betas
        if len(betas) != 2 or any(checked_number("betas", beta, positive=False) >= 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        groups: list[dict[str, Any]] = [{"params": self._weights}, {"params": self._own, "lr": own_rate}]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=rate, betas=betas)

    def _checked(self, optimizer: torch.optim.Optimizer, rates: tuple[object, ...]) -> torch.optim.Optimizer:
        if any(value is not None for value in rates):
            raise ValueError(
                f"learning_rate, objective_learning_rate and betas must be None with an optimizer, got {rates}: set "
                "them in the optimizer"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := sum(id(p) not in held for p in (*self._weights, *self._own)):
            raise ValueError(
                f"the optimizer must hold all parameters of the energy and of the objective, and lacks {missing}: "
                "add objective.parameters() to it"
            )
        return optimizer

    def _restarted(self, n: int) -> int:
        """How many chains of the objective's pool have just started again, which may be a few."""
        last = getattr(getattr(self.objective, "pool", None), "last", None)
        n_nonfinite: int = 0 if last is None else last.nonfinite
        if n_nonfinite > max(1, _MAX_NONFINITE_SHARE * n):
            raise NonFiniteError(
                f"{n_nonfinite} of {n} chains are not finite, and on_nonfinite='reinit' goes on with up to "
                f"{_MAX_NONFINITE_SHARE:.0%} of them; try a smaller drift or learning_rate, or grad_clip"
            )
        return n_nonfinite

    def _sum_gradients(self) -> None:
        """Sum the gradients over the processes. A weight has none only if it has none on all of them."""
        if self.processes.size == 1:
            return
        weights = [*self._weights, *self._own]
        for dtype in dict.fromkeys(p.dtype for p in weights):
            part = [p for p in weights if p.dtype == dtype]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in part]
            counts = torch.tensor([p.grad is not None for p in part]).to(gradients[0])
            sums = self.processes.total(torch.cat([counts, *(g.flatten() for g in gradients)]))
            n_with, *totals = torch.split(sums, [len(part), *(p.numel() for p in part)])
            for p, total, n in zip(part, totals, n_with.tolist(), strict=True):
                p.grad = total.view_as(p) if n > 0 else None

    def _average_weights(self) -> None:
        decay = min(self.ema_decay, (1 + self.steps_done) / (10 + self.steps_done))
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.energy.parameters(), strict=True):
                mean.lerp_(p.to(mean), 1.0 - decay)
            for kept, b in zip(self.average.buffers(), self.energy.buffers(), strict=True):
                kept.copy_(b)  # such as the vectors of spectral norm, which are no weights


def _check_energy(energy: nn.Module) -> None:
    if isinstance(energy, nn.parallel.DistributedDataParallel):
        raise ValueError("pass the energy itself, not in DistributedDataParallel: process_group= says who trains it")
    for module in energy.modules():
        if isinstance(module, FunctionModule) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                "an energy has an average, a copy with weights of its own, and a copy of the function "
                f"{name_of_forward(module)} calls the same weights: make it an nn.Module that holds what it calls"
            )


class Divergence:
    """Notices early that training diverges, by a plain rule on medians over 50 steps.

    "energy_gap", for objectives with chains: its median is beyond +-100 nats. (Good runs of the recipes end below 15,
    diverged ones above 300.) "loss", for the others: its median has risen by more than 10 max(1, |its first median|).
    """

    STEPS, GAP, RISE = 50, 100.0, 10.0

    def __init__(self, what: str) -> None:
        self.what = what
        self.recent: deque[float] = deque(maxlen=self.STEPS)
        self.first: float | None = None  # the median over the first steps
        self.warned = False

    def watch(self, row: Mapping[str, float]) -> bool:
        """Whether training diverges at this step. row: what ``Trainer.step`` returns."""
        self.recent.append(row[self.what])
        if len(self.recent) < self.STEPS:
            return False
        median = statistics.median(self.recent)
        self.first = median if self.first is None else self.first
        if self.what == "energy_gap":
            diverging, found = abs(median) > self.GAP, f"samples and data are {abs(median):.0f} nats apart"
        else:
            diverging = median > self.first + self.RISE * max(1.0, abs(self.first))
            found = f"the loss has risen from {self.first:.3g} to {median:.3g}"
        if diverging and not self.warned:
            self.warned = True
            warnings.warn(
                f"training diverges: in step {row['step']}, {found} (median of {self.STEPS} steps); try a smaller "
                "learning_rate, or a larger reg_alpha if the objective has one",
                stacklevel=3,
            )
        return diverging

    def state_dict(self) -> dict[str, Tensor]:
        """As tensors in float64, on the CPU."""
        first = [] if self.first is None else [self.first]
        values = {"recent": list(self.recent), "first": first, "warned": [float(self.warned)]}
        return {name: torch.tensor(v, dtype=torch.float64, device="cpu") for name, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.recent = deque(state["recent"].tolist(), maxlen=self.STEPS)
        self.first = next(iter(state["first"].tolist()), None)
        self.warned = bool(state["warned"].any())
