"""A training step by persistent contrastive divergence: fastebm's pool, the tutorials' list, the buffers of peers.

One recipe for all: draw a batch of persistent chains, restart some, move them K Langevin steps, put them back,
contrastive divergence with a regulariser (``contrastive_divergence_loss``), Adam. How chains are drawn, restarted and
put back differs: fastebm draws distinct rows, restarts them uniformly and writes them back in place; the tutorials'
list draws with replacement, restarts chains in the same way and keeps the newest; torchebm draws one row per stratum,
adds noise of 0.01 instead of a restart and overwrites the oldest; ebmkit draws with replacement, restarts uniformly and
writes back in place.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastebm.bench.cases import TrainingCase
from fastebm.bench.clock import MIN_ROUNDS, interleaved, past_share, quartiles, seconds_of
from fastebm.bench.problem import NOISE_SEED, SEED, ULP, Missing, gradient_of, largest, make_energy
from torch import Tensor, nn

from fastebm import ChainPool, Langevin, contrastive_divergence_loss
from fastebm.backends import Advanced
from fastebm.pool import moves

LEARNING_RATE, REGULARISER = 1e-4, 0.01
DATA_BATCHES = 8
TUTORIAL = "list-buffer"
TIMED = ("correct", "error", "allowed", "spread", "rounds", "seconds", "seconds_q1", "seconds_q3", "steps_per_s")


@dataclass
class Trainer:
    """step: real (batch, dim) -> the negatives it trained against; it leaves the loss's gradients in the model.

    states: all chains, (n_chains, dim), to look at. fill: sets all chains to one state, (dim,). draw: where a batch
    begins, (batch, dim), restarts and all. put: a batch takes its place. sample: draw, K steps, put.
    """

    model: nn.Module
    step: Callable[[Tensor], Tensor]
    states: Callable[[], Tensor]
    fill: Callable[[Tensor], None]
    draw: Callable[[], Tensor]
    put: Callable[[Tensor], None]
    sample: Callable[[], Tensor]


def fresh_model(case: TrainingCase, device: torch.device) -> nn.Module:
    """A trainable copy of the case's energy, one for every contestant."""
    return copy.deepcopy(make_energy("mlp", case.dim, case.widths, device)).requires_grad_(True).train()


def _finish(model: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, negatives: Tensor) -> Tensor:
    """Loss, gradients and Adam, for the contestants without a loss of their own."""
    loss = contrastive_divergence_loss(model(real), model(negatives), REGULARISER)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return negatives


def fastebm_pool(case: TrainingCase, device: torch.device, storage_dtype: torch.dtype = torch.float32) -> Trainer:
    model = fresh_model(case, device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    pool = ChainPool(
        case.n_chains, case.dim, clamp=case.clamp, seed=SEED, device=device, reinit_prob=case.restart_prob,
        storage_dtype=storage_dtype,
    )  # fmt: skip
    sampler = Langevin.from_drift_and_noise(case.drift, case.noise_std)
    energies = torch.zeros(case.batch_size, device=device)
    taken: Any = None

    def draw() -> Tensor:
        nonlocal taken
        drawn = pool._next_draw(case.batch_size)
        x, steps = moves.take(drawn, pool._storage, pool._records)
        taken = drawn, steps
        return x

    def put(x: Tensor) -> None:
        drawn, steps = taken
        done = Advanced(x, energies, energies)
        moves.put(drawn, pool._storage, pool._records, steps, steps + case.steps, done)()
        pool.draws += 1

    def sample() -> Tensor:
        return pool.sample(model, case.batch_size, sampler, case.steps)[0]

    def step(real: Tensor) -> Tensor:
        return _finish(model, optimizer, real, sample())

    def fill(x: Tensor) -> None:
        pool.states.copy_(x.expand_as(pool.states))

    return Trainer(model, step, lambda: pool.states, fill, draw, put, sample)


def list_buffer(case: TrainingCase, device: torch.device) -> Trainer:
    """The replay buffer of the IGEBM and UvA tutorials: a Python list of single states, on the CPU."""
    model = fresh_model(case, device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    (lo, hi), n = case.clamp, case.batch_size
    examples = list((torch.rand(case.n_chains, case.dim) * (hi - lo) + lo).split(1))

    def negatives_of(x: Tensor) -> Tensor:
        training = model.training
        model.eval()
        for p in model.parameters():
            p.requires_grad_(False)
        for _ in range(case.steps):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(model(x).sum(), x)
            x = x.detach().sub(grad, alpha=case.drift).add_(torch.randn_like(grad), alpha=case.noise_std)
            x.clamp_(lo, hi)
        for p in model.parameters():
            p.requires_grad_(True)
        model.train(training)
        return x

    def draw() -> Tensor:
        n_new = sum(random.random() < case.restart_prob for _ in range(n))
        fresh = torch.rand(n_new, case.dim) * (hi - lo) + lo
        old = torch.cat(random.choices(examples, k=n - n_new))
        return torch.cat([fresh, old]).to(device)

    def put(x: Tensor) -> None:
        nonlocal examples
        examples = (list(x.cpu().split(1)) + examples)[: case.n_chains]

    def sample() -> Tensor:
        negatives = negatives_of(draw())
        put(negatives)
        return negatives

    def step(real: Tensor) -> Tensor:
        return _finish(model, optimizer, real, sample())

    def fill(x: Tensor) -> None:
        examples[:] = x.cpu().expand(case.n_chains, -1).clone().split(1)

    return Trainer(model, step, lambda: torch.cat(examples).to(device), fill, draw, put, sample)


def torchebm_buffer(case: TrainingCase, device: torch.device) -> Trainer:
    try:
        from torchebm.core import BaseModel
        from torchebm.losses import PersistentContrastiveDivergence
        from torchebm.samplers import LangevinDynamics
    except ImportError:
        raise Missing("torchebm is not installed") from None
    layers = fresh_model(case, device)

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(device=device)
            self.layers = layers

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.layers(x).squeeze(1)  # type: ignore[no-any-return]

    model = Model()
    sampler = LangevinDynamics(
        model,
        step_size=case.drift,
        noise_scale=max(case.noise_std, 1e-20) / (2 * case.drift) ** 0.5,  # 0 is not allowed
        clamp=case.clamp,
        device=device,
    )
    objective = PersistentContrastiveDivergence(
        model, sampler, k_steps=case.steps, buffer_size=case.n_chains, init_steps=0, device=device,
        new_sample_ratio=case.restart_prob, energy_reg_weight=REGULARISER,
    )  # fmt: skip
    objective.initialize_buffer((case.dim,))
    optimizer = torch.optim.Adam(layers.parameters(), LEARNING_RATE)
    lo, hi = case.clamp
    objective.replay_buffer.uniform_(lo, hi)  # it would start near 0

    def step(real: Tensor) -> Tensor:
        loss, negatives = objective(real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return negatives  # type: ignore[no-any-return]

    def fill(x: Tensor) -> None:
        objective.replay_buffer.copy_(x.expand(case.n_chains, -1))

    like = torch.empty(case.batch_size, case.dim, device=device)

    def draw() -> Tensor:
        return objective.get_start_points(like)  # type: ignore[no-any-return]

    def sample() -> Tensor:
        negatives = sampler.sample(x=draw(), n_steps=case.steps)
        with torch.no_grad():
            objective.update_buffer(negatives)
        return negatives  # type: ignore[no-any-return]

    return Trainer(layers, step, lambda: objective.replay_buffer, fill, draw, objective.update_buffer, sample)


def ebmkit_buffer(case: TrainingCase, device: torch.device) -> Trainer:
    try:
        from ebm import ContrastiveDivergence, EnergyModel, LangevinDynamics, ReplayBuffer
    except ImportError:
        raise Missing("ebmkit is not installed") from None
    layers = fresh_model(case, device)
    model = EnergyModel(layers)
    lo, hi = case.clamp
    buffer = ReplayBuffer(
        case.n_chains,
        (case.dim,),
        reinit_prob=case.restart_prob,
        init_fn=lambda size: torch.rand(size) * (hi - lo) + lo,
    )
    sampler = LangevinDynamics(case.drift, case.steps, noise_scale=case.noise_std, clamp=case.clamp)
    objective = ContrastiveDivergence(sampler, buffer, energy_reg=REGULARISER)
    optimizer = torch.optim.Adam(layers.parameters(), LEARNING_RATE)

    def draw() -> Tensor:
        return buffer.sample(case.batch_size, device)  # type: ignore[no-any-return]

    def sample() -> Tensor:
        negatives = sampler.sample(model, draw())
        buffer.push(negatives)
        return negatives  # type: ignore[no-any-return]

    def step(real: Tensor) -> Tensor:
        done = objective(model, real)
        optimizer.zero_grad()
        done.loss.backward()
        optimizer.step()
        return done.x_neg  # type: ignore[no-any-return]

    def fill(x: Tensor) -> None:
        buffer.data.copy_(x.expand(case.n_chains, -1))

    return Trainer(layers, step, lambda: buffer.data.to(device), fill, draw, buffer.push, sample)


TRAINERS: dict[str, Callable[[TrainingCase, torch.device], Trainer]] = {
    TUTORIAL: list_buffer,
    "torchebm": torchebm_buffer,
    "ebmkit": ebmkit_buffer,
    "fastebm": fastebm_pool,
}


# -- gate ----------------------------------------------------------------------------------------------------


def gate(
    case: TrainingCase, make: Callable[[TrainingCase, torch.device], Trainer], device: torch.device
) -> dict[str, Any]:
    """One step of a small pool whose chains are all at 0, with no restarts.

    error: the largest of two, against float64: the chains after one Langevin step without noise, and, relative to
    their size, the loss's gradients in the weights. allowed: twice those of plain PyTorch in float32, plus rounding.
    spread: std of (x' - descent) / noise_std over chains and dims after one step with noise, 1 for a right one. All
    drawn chains must be found in the pool afterwards.
    """
    small = replace(case, n_chains=2 * case.batch_size, steps=1, restart_prob=0.0, noise_std=0.0)
    data = real_batches(case, device)[0]
    zero = torch.zeros(1, case.dim, device=device)
    energy = make_energy("mlp", case.dim, case.widths, device)
    exact, plain = (
        (-case.drift * gradient_of(energy, zero.to(dtype))).clamp(*case.clamp)
        for dtype in (torch.float64, torch.float32)
    )
    trainer = make(small, device)
    trainer.fill(zero[0])
    negatives = trainer.step(data).detach()
    kept = all(bool((trainer.states() == x).all(dim=1).any()) for x in (negatives[0], negatives[-1]))
    moved = largest(negatives.double() - exact)
    grads = [p.grad for p in trainer.model.parameters()]
    truths, plains = (
        _loss_gradients(fresh_model(case, device).to(t), data, negatives) for t in (torch.float64, torch.float32)
    )
    error = max(moved, *(relative(g, t) for g, t in zip(grads, truths, strict=True)))
    allowed = 2 * max(largest(plain - exact), *(relative(g, t) for g, t in zip(plains, truths, strict=True))) + 8 * ULP

    torch.manual_seed(NOISE_SEED)
    trainer = make(replace(small, noise_std=case.noise_std), device)
    trainer.fill(zero[0])
    noise = (trainer.step(data).detach().double() - exact) / case.noise_std
    inside = (
        noise.abs() < 2.0
    )  # the clamp cuts the tails, so compare with a normal law truncated at 2, of variance 0.7737
    spread = float((noise[inside].square().mean() / 0.77374).sqrt())
    share = float(inside.double().mean()) / 0.95450
    correct = kept and error <= allowed and abs(spread - 1) < 0.03 and abs(share - 1) < 0.03
    return {"correct": "yes" if correct else "no", "error": error, "allowed": allowed, "spread": spread}


def relative(value: Tensor | None, truth: Tensor) -> float:
    if value is None or value.shape != truth.shape:
        return float("inf")
    return largest(value.double() - truth) / max(largest(truth), 1e-30)


def _loss_gradients(model: nn.Module, real: Tensor, negatives: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the recipe's loss in the weights. (That of the head's bias comes from the regulariser alone.)"""
    dtype = next(model.parameters()).dtype
    e_real, e_neg = model(real.to(dtype)), model(negatives.to(dtype))
    loss = e_real.mean() - e_neg.mean() + REGULARISER * ((e_real**2).mean() + (e_neg**2).mean())
    return torch.autograd.grad(loss, list(model.parameters()))


def real_batches(case: TrainingCase, device: torch.device) -> list[Tensor]:
    """Batches that stand in for data: points of a few clusters within the clamp range."""
    lo, hi = case.clamp
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.rand(10, case.dim, generator=generator)
    picks = torch.randint(10, (DATA_BATCHES, case.batch_size), generator=generator)
    x = centres[picks] + 0.1 * torch.randn(*picks.shape, case.dim, generator=generator)
    return list((x.clamp(0, 1) * (hi - lo) + lo).to(device))


# -- race ----------------------------------------------------------------------------------------------------


def row_of(case: TrainingCase, **columns: Any) -> dict[str, Any]:
    return {
        "energy": case.energy,
        "n_chains": case.n_chains,
        "batch_size": case.batch_size,
        "steps": case.steps,
        "drift": case.drift,
        "noise_std": case.noise_std,
        "clamp": "{} {}".format(*case.clamp),
        "restart_prob": case.restart_prob,
        **columns,
    }


def race(
    case: TrainingCase, names: Sequence[str], device: torch.device, *, seconds: float = 6.0, budget: float = math.inf
) -> list[dict[str, Any]]:
    """One row per contestant: the gate, then interleaved training steps, each on another batch of data.

    seconds: for the timed steps. budget: seconds for the case; each contestant may take an equal share of it.
    """
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    data = real_batches(case, device)
    for name in names:
        row = row_of(case, device=device.type, contestant=name, status="ok")
        results[name] = row | dict.fromkeys((*TIMED, "tutorial_seconds", "times_tutorial", "note"), "")
        row = results[name]
        try:
            row |= gate(case, TRAINERS[name], device)
            if row["correct"] == "no":
                row |= {"status": "FAILED", "note": "failed its gate: not timed"}
                continue
            trainer = TRAINERS[name](case, device)
            step = _cycling(trainer, data)
            step()
            if (why := past_share(MIN_ROUNDS, seconds_of(step, device), budget / len(names))) is not None:
                row |= {"status": "skipped", "note": why}
                continue
            runs[name] = step
        except Missing as why:
            row |= {"status": "missing", "note": str(why)}
        except Exception as error:
            row |= {"status": "error", "note": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
    times = interleaved(runs, seconds, device, rounds=100)
    medians = {name: quartiles(t)[1] for name, t in times.items()}
    for name, t in times.items():
        q1, median, q3 = quartiles(t)
        results[name] |= {"rounds": len(t), "seconds": median, "seconds_q1": q1, "seconds_q3": q3}
        results[name]["steps_per_s"] = 1 / median
        if TUTORIAL in medians:
            results[name] |= {"tutorial_seconds": medians[TUTORIAL], "times_tutorial": medians[TUTORIAL] / median}
    return list(results.values())


def _cycling(trainer: Trainer, data: list[Tensor]) -> Callable[[], object]:
    batches = itertools.cycle(data)
    return lambda: trainer.step(next(batches))


def brief(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['contestant']}: {row['status']}: {row['note'][:120]}"
    ratio = f", {row['times_tutorial']:.2f} x {TUTORIAL}" if row["times_tutorial"] else ""
    return f"{row['contestant']}: {1e3 * row['seconds']:.3g} ms per training step{ratio}"
