"""The trainer: its step is the loop that people write, nothing bad reaches the weights, and its state goes on."""

import copy
import warnings

import pytest
import torch
from torch import nn

from fastebm import (
    ChainPool,
    ContrastiveDivergence,
    Langevin,
    Loss,
    MLPEnergy,
    NonFiniteError,
    Objective,
    SumEnergy,
    Trainer,
)
from fastebm.train.trainer import Divergence


class Shifted(Objective):
    """mean (E(x + noise) - level)^2: it draws, and has a parameter of its own. With labels, they are the levels."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.level = nn.Parameter(torch.ones(()))

    def loss_of(self, energy, batch, labels, draws):
        x = batch + draws.normal()
        level = self.level if labels is None else labels
        loss = (energy(x)[:, 0] - level).square().sum() / draws.n_rows
        return Loss(loss, {"level": self.level.detach()})


@pytest.fixture
def energy(seeded):
    return MLPEnergy(3, [5, 4])


@pytest.fixture
def batches(seeded):
    return [torch.randn(6, 3) for _ in range(4)]


def test_a_step_is_the_loop_that_people_write(energy, batches):
    by_hand, average, objective = copy.deepcopy(energy), copy.deepcopy(energy), Shifted()
    optimizer = torch.optim.Adam(
        [{"params": by_hand.parameters(), "lr": 0.01}, {"params": objective.parameters(), "lr": 0.1}], betas=(0.5, 0.9)
    )
    trainer = Trainer(
        energy, Shifted(), steps=4, learning_rate=0.01, betas=(0.5, 0.9), max_grad_norm=0.5, ema_decay=0.3,
        objective_learning_rate=0.1, decay="linear",
    )  # fmt: skip
    for t, batch in enumerate(batches):
        loss = objective(by_hand, batch).loss
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        for group, rate in zip(optimizer.param_groups, (0.01, 0.1), strict=True):
            group["lr"] = rate * (1 - t / 4)
        optimizer.step()
        decay = min(0.3, (2 + t) / (11 + t))
        for mean, p in zip(average.parameters(), by_hand.parameters(), strict=True):
            mean.data.lerp_(p.data, 1 - decay)
        row = trainer.step(batch)
        assert (row["step"], row["loss"], row["grad_norm"]) == (t + 1, loss.item(), norm.item())
        assert row["learning_rate"] == 0.01 * (1 - t / 4)
    for found, expected in (
        (energy, by_hand), (trainer.objective, objective), (trainer.average, average),
    ):  # fmt: skip
        for p, q in zip(found.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q)
    assert objective.level.item() != 1.0


def test_fit_goes_over_the_batches_until_the_steps_are_done(energy, batches):
    rows = []
    pairs = [(x, torch.full((6,), i)) for i, x in enumerate(batches)]
    trainer = Trainer(energy, Shifted(), steps=10)
    trainer.fit(pairs, on_step=rows.append)
    assert [row["step"] for row in rows] == list(range(1, 11))
    again = Trainer(MLPEnergy(3, [5, 4]), Shifted(), steps=10)
    with pytest.raises(ValueError, match="batches ended after 4 of 10 steps"):
        again.fit(iter(batches))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_reaches_no_weight(energy, batches, where):
    class Broken(Shifted):
        def forward(self, energy, batch, **options):
            loss, metrics, _ = super().forward(energy, batch, **options)
            if where == "loss":
                return Loss(loss * torch.inf, metrics)
            return Loss(loss + (self.level - self.level.detach()).abs().sqrt(), metrics)  # infinite slope at 0

    trainer = Trainer(energy, Broken(), steps=3)
    before = copy.deepcopy(trainer.state_dict()["energy"] | trainer.state_dict()["objective"])
    with pytest.raises(NonFiniteError, match="try a smaller learning_rate"):
        trainer.step(batches[0])
    after = trainer.state_dict()["energy"] | trainer.state_dict()["objective"]
    assert all(torch.equal(after[k], v) for k, v in before.items() if k != "_extra_state")
    assert trainer.steps_done == 0


def test_a_saved_trainer_goes_on_bit_for_bit(energy, batches):
    trainer = Trainer(energy, Shifted(seed=1), steps=4)
    trainer.step(batches[0])
    trainer.step(batches[1])
    saved = copy.deepcopy(trainer.state_dict())
    other = Trainer(MLPEnergy(3, [5, 4]), Shifted(seed=2), steps=4)
    other.load_state_dict(saved)
    for batch in batches[2:]:
        assert trainer.step(batch) == other.step(batch)
    a, b = trainer.state_dict(), other.state_dict()
    for part in ("energy", "average", "objective", "moments", "objective_moments", "divergence"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
    assert set(a["objective_moments"]) == {"level.step", "level.exp_avg", "level.exp_avg_sq"}


class Momentum(torch.optim.Optimizer):
    """Counts its steps in a number."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p] = self.state[p] or {"n": 0, "mean": torch.zeros_like(p)}
            state["n"] += 1
            state["mean"].lerp_(p.grad, 0.1)
            p.sub_(self.param_groups[0]["lr"] * state["mean"] / (1 - 0.9 ** state["n"]))


@pytest.mark.parametrize("optimizer", [None, Momentum])
@pytest.mark.parametrize("n_before", [0, 2])
def test_a_used_trainer_loads_any_state_and_leaves_it_as_it_is(energy, batches, optimizer, n_before):
    objective = Shifted()
    held = None if optimizer is None else optimizer([*energy.parameters(), *objective.parameters()], lr=0.1)
    trainer = Trainer(energy, objective, steps=4, optimizer=held)
    for batch in batches[:n_before]:
        trainer.step(batch)
    saved = copy.deepcopy(trainer.state_dict())
    state = copy.deepcopy(saved)
    rows = [trainer.step(batch) for batch in batches[n_before:]]
    trainer.load_state_dict(state)
    assert trainer.state_dict()["moments"].keys() == saved["moments"].keys()
    assert [trainer.step(batch) for batch in batches[n_before:]] == rows
    for part in ("energy", "average", "objective", "moments", "objective_moments"):
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(saved[part][k])) for k, v in state[part].items())


def test_buffers_of_the_average_are_those_of_the_energy(batches, seeded):
    energy = MLPEnergy(3, [4], spectral_norm=True)
    trainer = Trainer(energy, Shifted(), steps=4)
    trainer.fit(batches)
    for a, b in zip(trainer.average.buffers(), energy.buffers(), strict=True):
        assert torch.equal(a, b)


def test_update_bn_renews_the_statistics_of_the_average(batches, seeded):
    energy = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    trainer = Trainer(energy, Shifted(), steps=4, learning_rate=0.1)
    trainer.fit(batches)
    assert torch.equal(trainer.average[1].running_mean, energy[1].running_mean)
    torch.optim.swa_utils.update_bn(batches, trainer.average)
    hidden = trainer.average[0](torch.cat(batches))
    torch.testing.assert_close(trainer.average[1].running_mean, hidden.mean(0), rtol=1e-5, atol=1e-6)


def test_the_average_of_half_precision_weights_moves_in_float32(batches, seeded):
    energy = MLPEnergy(3, [4], spectral_norm=True).bfloat16()
    trainer = Trainer(energy, Shifted(), steps=400, ema_decay=0.999)
    expected = [p.float() for p in energy.parameters()]
    for t in range(40):
        trainer.step(batches[t % 4].bfloat16())
        decay = (2 + t) / (11 + t)
        expected = [decay * a + (1 - decay) * p.float() for a, p in zip(expected, energy.parameters(), strict=True)]
    for mean, value in zip(trainer.average.parameters(), expected, strict=True):
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)
    assert {v.dtype for v in trainer.average.state_dict().values()} == {torch.float32}
    again = Trainer(copy.deepcopy(energy), Shifted(), steps=400)
    again.load_state_dict(trainer.state_dict())
    assert all(map(torch.equal, again.average.parameters(), trainer.average.parameters()))
    assert trainer.average(batches[0]).dtype == torch.float32


def test_a_function_that_calls_weights_is_refused(energy):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = energy

        def forward(self, x):
            return self.net(x)

    def call(x):
        return energy(x)

    def quadratic(x):
        return x.square().sum(1)

    with pytest.raises(ValueError, match=r"the function .*call calls the same weights: make it an nn.Module"):
        Trainer(SumEnergy([call, quadratic]), Shifted(), steps=3)
    trainer = Trainer(SumEnergy([Holder(), quadratic]), Shifted(), steps=3)
    before, x = trainer.average(torch.ones(1, 3)), torch.ones(1, 3)
    with torch.no_grad():
        energy[-1].bias += 1.0
    assert torch.equal(trainer.average(x), before)


def test_the_objective_moves_to_the_device_of_the_energy(energy):
    objective = Shifted()
    Trainer(energy.to("meta"), objective, steps=3)
    assert objective.level.device.type == "meta"


def test_rates_of_the_objective(energy, batches):
    """0 leaves its parameters as they are."""
    trainer = Trainer(energy, Shifted(), steps=3, objective_learning_rate=0.0)
    before = energy[0].weight.clone()
    trainer.step(batches[0])
    assert trainer.objective.level.item() == 1.0
    assert not torch.equal(energy[0].weight, before)


def test_an_empty_batch_is_refused(energy):
    objective = Shifted()
    with pytest.raises(ValueError, match=r"at least one row, got shape \(0, 3\): leave it out"):
        Trainer(energy, objective, steps=3).step(torch.zeros(0, 3))
    assert objective.calls == 0


def test_another_optimizer_holds_all_parameters_and_keeps_its_rates(energy, batches):
    objective = Shifted()
    with pytest.raises(ValueError, match=r"lacks 1: add objective.parameters\(\) to it"):
        Trainer(energy, objective, steps=2, optimizer=torch.optim.SGD(energy.parameters(), lr=0.5))
    optimizer = torch.optim.SGD([*energy.parameters(), *objective.parameters()], lr=0.5)
    trainer = Trainer(energy, objective, steps=2, optimizer=optimizer)
    assert [trainer.step(x)["learning_rate"] for x in batches[:2]] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"steps": 2.0}, "steps must be an int, got 2.0"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and > 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and > 0, got nan"),
        ({"objective_learning_rate": -1.0}, "objective_learning_rate must be finite and >= 0, got -1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
        ({"warmup_steps": -3}, "warmup_steps must be >= 0, got -3"),
        ({"warmup_steps": 2.5}, "warmup_steps must be an int, got 2.5"),
        ({"decay": "step"}, "decay must be"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be finite and > 0, got -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be finite and > 0, got 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be finite and > 0, got nan"),
        ({"ema_decay": 1.0}, "ema_decay must be < 1, got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay must be finite and >= 0, got -0.1"),
    ],
)
def test_bad_settings(energy, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Trainer(energy, Shifted(), **{"steps": 3, **options})


@pytest.mark.parametrize("options", [{"learning_rate": 5.0}, {"objective_learning_rate": 0.0}, {"betas": (0.9, 0.999)}])
def test_an_optimizer_goes_without_the_options_of_adam(energy, options):
    objective = Shifted()
    optimizer = torch.optim.SGD([*energy.parameters(), *objective.parameters()], lr=0.5)
    with pytest.raises(ValueError, match="must be None with an optimizer"):
        Trainer(energy, objective, steps=3, optimizer=optimizer, **options)


def test_too_many_chains_that_start_again_end_training(energy, batches):
    pool = ChainPool(20, 3, seed=0)
    objective = ContrastiveDivergence(Langevin(0.1), 2, pool=pool, on_nonfinite="reinit")
    trainer = Trainer(energy, objective, steps=5)
    assert trainer.step(batches[0])["nonfinite"] == 0
    pool.states[:] = torch.inf
    before = copy.deepcopy(energy.state_dict())
    with pytest.raises(NonFiniteError, match="of 6 chains are not finite"):
        trainer.step(batches[1])
    assert all(torch.equal(v, before[k]) for k, v in energy.state_dict().items())


def rows_of(values, name="loss"):
    return [{"step": i + 1, "loss": 0.0, name: v} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        (rows_of([5.0] * 50 + [-500.0] * 100), None),  # a loss may fall as far as it likes
        (rows_of([5.0] * 50 + [56.0] * 100), 76),  # 5 + 10 * 5 = 55, and most of the last 50 are above
        (rows_of([0.1] * 50 + [10.0] * 100), None),  # 0.1 + 10
        (rows_of([1.0, 900.0] * 100, "energy_gap"), 50),  # the median is the mean of both
        (rows_of([1.0] * 60 + [900.0] * 20 + [1.0] * 60, "energy_gap"), None),  # a spike
        (rows_of([1.0] * 60 + [-900.0] * 40, "energy_gap"), 85),
    ],
)
def test_divergence_is_noticed_once_by_its_rule(rows, first):
    watched = Divergence("energy_gap" if "energy_gap" in rows[0] else "loss")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [watched.watch(row) for row in rows]
    assert next((i + 1 for i, diverging in enumerate(found) if diverging), None) == first
    assert len(caught) == (first is not None)
    again = Divergence("loss")
    again.load_state_dict(watched.state_dict())
    assert again.state_dict().keys() == watched.state_dict().keys()
    assert (again.recent, again.first, again.warned) == (watched.recent, watched.first, watched.warned)
