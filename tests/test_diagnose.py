"""fastebm.diagnose: statistics of chains whose law is known, and each warning where it is due and not elsewhere."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

import fastebm
from fastebm import (
    MALA,
    SVGD,
    AnnealedLangevin,
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    ParallelTempering,
    UnderdampedLangevin,
    diagnose,
    sample,
)
from fastebm.diagnostics.draws import Draws
from fastebm.diagnostics.step_bias import excess_variance

array_stats = pytest.importorskip("arviz_stats.base", reason="arviz-stats needs Python 3.11").array_stats
pytestmark = pytest.mark.usefixtures("seeded")


def result_of(trajectory, sampler=None, energy=None, info=None, **given):
    """A result with these states, (n_chains, draws, *shape), as if they had been sampled."""
    done = sample(energy or GaussianEnergy(), sampler or MALA(0.1), init=trajectory[:, -1], steps=0, seed=0, **given)
    n = len(trajectory)
    number = {"acceptance": torch.full((n,), 0.6), "divergences": torch.zeros(n), "seconds": 2.0}
    number = number if sampler is None else {"seconds": 2.0}
    return dataclasses.replace(
        done, trajectory=trajectory, info=dataclasses.replace(done.info, **{**number, **(info or {})})
    )


def autoregressive(rho, n, draws, dim=1):
    """Stationary chains with x' = rho x + sqrt(1 - rho^2) xi, of mean 0 and variance 1."""
    x = torch.randn(n, draws, dim)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + (1 - rho**2) ** 0.5 * x[:, t]
    return x


def column(diagnosis, name):
    return dict(zip(diagnosis.table["name"], diagnosis.table[name], strict=True))


def warned(diagnosis, *words):
    """Whether each warning has the words at its place, and there are no others."""
    return len(diagnosis.warnings) == len(words) and all(w in t for w, t in zip(words, diagnosis.warnings, strict=True))


# -- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.7, -0.4])
def test_ess_of_an_autoregressive_series(rho):
    n, draws = 8, 4000
    found = diagnose(result_of(autoregressive(rho, n, draws)), energy=False)
    expected = n * draws * (1 - rho) / (1 + rho)
    # the variance of Geyer's estimator, for these lengths, is far below this
    assert column(found, "ess_bulk")["x[0]"] == pytest.approx(expected, rel=0.15)
    assert column(found, "mcse")["x[0]"] == pytest.approx(expected**-0.5, rel=0.1)
    assert column(found, "sd")["x[0]"] == pytest.approx(1, abs=5 * (2 / (n * draws) * 6) ** 0.5)
    assert abs(column(found, "mean")["x[0]"]) < 5 * expected**-0.5
    assert column(found, "rhat")["x[0]"] < 1.01
    lower = min(column(found, "ess_bulk")["x[0]"], column(found, "ess_tail")["x[0]"])
    assert column(found, "ess_per_second")["x[0]"] == pytest.approx(lower / 2.0)
    assert found.warnings == []


def test_rhat_of_shifted_chains():
    x = torch.randn(8, 500, 2)
    x[:4, :, 1] += 1.0
    found = diagnose(result_of(x), energy=False)
    # chain means 0 and 1: between-chain variance 2/7, within-chain variance 1; ranks hardly change it
    assert column(found, "rhat")["x[1]"] == pytest.approx((1 + 2 / 7) ** 0.5, rel=0.05)
    assert column(found, "rhat")["x[0]"] < 1.01
    assert found.table["name"] == ["x[1]", "x[0]"]  # the worst first
    assert warned(found, "R-hat of x[1] is", "x[1] has")
    assert column(found, "rhat")["x[1]"] == array_stats.rhat(x[:, :, 1].double().numpy(), method="rank")


def test_the_worst_coordinates_are_examined():
    x = torch.randn(6, 400, 3, 4, 5)
    x[..., 1, 2, 3] = autoregressive(0.95, 6, 400)[..., 0]
    x[:3, :, 2, 0, 4] += 2.0
    x[..., 0, 0, 0] = 7.0  # never changes
    found = diagnose(result_of(x), coordinates=2, energy=False)
    assert found.table["name"] == ["x[2, 0, 4]", "x[1, 2, 3]"]
    assert len(diagnose(result_of(x), coordinates=99, energy=False).table["name"]) == 59
    assert found.summary["dims"] == 60


def test_the_energy_is_examined():
    x = torch.randn(4, 50, 3)
    found = diagnose(result_of(x))
    energies = x.square().sum(-1) / 2
    assert found.table["name"][-1] == "energy"
    assert column(found, "mean")["energy"] == pytest.approx(float(energies.mean()), rel=1e-5)
    torch.testing.assert_close(result_of(x).trajectory_energies(), energies)


class Measured(nn.Module):
    """Holds one measurement per chain, so it takes all chains at once, in their order."""

    def forward(self, x):
        assert len(x) == 5
        return (x - torch.arange(5.0)[:, None]).square().sum(dim=1)


@pytest.mark.parametrize("kind", ["labels", "mlp", "measured"])
def test_energies_of_stored_states(kind, monkeypatch):
    monkeypatch.setattr("fastebm.driver.run._AT_ONCE", 7)  # 30 states, some of them in a last, smaller part
    energy, given = {
        "labels": (ClassifierEnergy(nn.Linear(3, 4)), {"labels": torch.arange(5) % 4}),
        "mlp": (MLPEnergy(3, (8,)), {}),
        "measured": (Measured(), {}),
    }[kind]
    result = sample(energy, Langevin(0.1), 3, n_chains=5, steps=12, thin=2, seed=1, **given)
    found = result.trajectory_energies()
    assert found.shape == (5, 6)
    torch.testing.assert_close(found[:, -1], result.energies)
    for t in range(6):
        torch.testing.assert_close(found[:, t], energy(result.trajectory[:, t], *given.values()).reshape(5).detach())


def test_nested_rhat_of_many_short_chains():
    groups, size, draws = 8, 128, 8
    x = autoregressive(0.8, groups * size, draws)
    plain, nested = (diagnose(result_of(x), superchains=s, energy=False) for s in (None, groups))
    assert warned(plain, "R-hat of x[0]")  # a chain has one effective draw, too few for it
    assert warned(nested)
    assert 1 <= column(nested, "rhat_nested")["x[0]"] < 1.01
    x += 0.5 * torch.randn(groups).repeat_interleave(size)[:, None, None]  # starts that are not forgotten
    assert any("nested R-hat of x[0]" in text for text in diagnose(result_of(x), superchains=groups).warnings)
    x = x[torch.randperm(len(x))]  # groups that share no start hide it, as the documentation says
    assert column(diagnose(result_of(x), superchains=groups), "rhat_nested")["x[0]"] < 1.01


def test_a_resumed_result():
    energy, options = MLPEnergy(3, (8,)), {"n_chains": 4, "seed": 1, "thin": 1}
    whole = sample(energy, MALA(0.3), steps=60, **options)
    first = sample(energy, MALA(0.3), steps=20, **options)
    then = sample(energy, init=first, steps=40, thin=1)
    expected = diagnose(dataclasses.replace(whole, trajectory=whole.trajectory[:, 20:]))
    found = diagnose(then)
    for name in ("name", "mean", "sd", "mcse", "ess_bulk", "ess_tail", "rhat"):
        assert found.table[name] == expected.table[name]


# -- the law -------------------------------------------------------------------------------------------------------


def langevin_on_a_gaussian(step_size, dim, temperature=1.0, dtype=torch.float32):
    """Chains in the law that Langevin steps have on a standard Gaussian at this temperature."""
    std = (temperature / (1 - step_size / 4)) ** 0.5
    x = std * torch.randn(600, 4, dim, dtype=dtype)
    return diagnose(result_of(x, Langevin.ula(step_size, temperature)), superchains=4)


@pytest.mark.parametrize("dim", [1, 16, 100])
@pytest.mark.parametrize("step_size", [0.1, 0.4, 0.8])
def test_acceptance_tells_the_bias(step_size, dim):
    """The excess of the variance is known, u / (4 - u); that from the acceptance is an approximation for small u."""
    found = langevin_on_a_gaussian(step_size, dim)
    true = step_size / (4 - step_size)
    told = excess_variance(found.summary["mala_acceptance"], dim)
    assert told == pytest.approx(true, rel=0.25)
    assert warned(found, *(["a Metropolis test would accept"] if told > 0.05 else []))


def test_acceptance_at_another_temperature():
    """Langevin at temperature T on E is Langevin on E / T with T times the step size."""
    cold, hot = (langevin_on_a_gaussian(0.6, 16, t).summary["mala_acceptance"] for t in (1.0, 9.0))
    assert hot == pytest.approx(cold, abs=0.03)
    halved = langevin_on_a_gaussian(0.3, 16).summary["mala_acceptance"]
    assert abs(halved - cold) > 0.05  # the tolerance has power


def test_small_steps_are_not_warned_of():
    energy = GaussianEnergy(torch.zeros(2), 0.5)
    fine = sample(energy, Langevin(0.03), n_chains=30, warmup=200, steps=5000, thin=20, seed=0)
    assert diagnose(fine).warnings == []
    coarse = sample(energy, Langevin(0.2), n_chains=30, warmup=100, steps=1500, thin=5, seed=0)
    assert warned(diagnose(coarse), "smaller step_size, to which the bias is proportional")
    per_chain = sample(energy, Langevin(torch.full((100, 1), 0.4)), n_chains=100, warmup=9, steps=30, thin=1, seed=0)
    schedule = sample(energy, Langevin(torch.full((39,), 0.4)), n_chains=100, warmup=9, steps=30, thin=1, seed=0)
    one = sample(energy, Langevin(0.4), n_chains=100, warmup=9, steps=30, thin=1, seed=0)
    found = [diagnose(result).summary["mala_acceptance"] for result in (per_chain, schedule, one)]
    assert found[0] == pytest.approx(found[2], abs=1e-5)
    assert found[1] == pytest.approx(found[2], abs=1e-5)


def test_the_metropolis_test_uses_the_settings_of_the_call(monkeypatch):
    """Labels, frozen coordinates and dtype reach it."""
    seen = []
    step = MALA.step

    def noted(self, target, state, *rest):
        seen.append((target, state))
        return step(self, target, state, *rest)

    monkeypatch.setattr(MALA, "step", noted)
    energy = ClassifierEnergy(nn.Linear(3, 4)).double()
    frozen = torch.tensor([True, False, False])
    result = sample(
        energy, Langevin(0.1), init=torch.randn(300, 3).double(), labels=torch.full((300,), 2), frozen=frozen,
        steps=10, thin=1, seed=0,
    )  # fmt: skip
    found = diagnose(result, energy=False)
    assert sorted(found.table["name"]) == ["x[1]", "x[2]"]
    states = torch.cat([state.x for _, state in seen])
    torch.testing.assert_close(torch.cat([state.energy for _, state in seen]), energy(states, torch.full((300,), 2)))
    assert states.dtype == torch.float64
    assert all(bool(target.frozen[0, 0]) for target, _ in seen)


def test_the_temperature():
    x = torch.randn(4, 200, 2)
    assert warned(diagnose(result_of(x, Langevin.ula(0.01, 0.25)), energy=False), "with the temperature T = 0.25, not")
    assert "nothing: use noise_scale=1" in diagnose(result_of(x, Langevin(0.01, 0.0))).warnings[0]
    cooled = Langevin(0.01, torch.linspace(1, 0, 200))
    result = result_of(x)
    found = diagnose(dataclasses.replace(result, info=dataclasses.replace(
        result.info, sampler=cooled, temperature=cooled.temperature,
    )))  # fmt: skip
    assert "changed over the steps, from 1 to 0" in found.warnings[0]
    assert "mala_acceptance" not in found.summary
    default = sample(
        GaussianEnergy(torch.zeros(2)), Langevin(), n_chains=4, steps=10, thin=1, seed=0, on_nonfinite="ignore"
    )
    assert any("T = 2.5e-05, not exp(-E)" in text for text in diagnose(default).warnings)


@pytest.mark.parametrize(
    ("sampler", "measured"),
    [
        (ParallelTempering(MALA(0.5), (1, 2)), True),
        (ParallelTempering(Langevin(0.5), (1, 2)), False),
        (UnderdampedLangevin(1.5), False),
        (Langevin(0.6, noise_first=True), False),  # its variances are too small, those of MALA's proposals too large
    ],
)
def test_a_bias_that_is_not_measured(sampler, measured):
    result = sample(GaussianEnergy(torch.zeros(2)), sampler, n_chains=16, warmup=100, steps=500, thin=2, seed=0)
    assert warned(diagnose(result), *([] if measured else ["have no accept test, and their bias is not measured"]))


@pytest.mark.parametrize("name", ["clipped", "clamped"])
@pytest.mark.parametrize(("rate", "due"), [(0.03, False), (0.1, True)])
def test_clips_and_clamps(name, rate, due):
    x = torch.randn(4, 500, 2)
    found = diagnose(result_of(x, Langevin(0.01), info={name: torch.full((4,), rate)}))
    words = {"clipped": "the gradient was clipped in 10.0%", "clamped": "the clamp changed the state in 10.0%"}
    assert warned(found, *([words[name]] if due else []))


# -- mixing --------------------------------------------------------------------------------------------------------


def two_modes(x):
    return -torch.logsumexp(torch.stack([-(x - 2).square().sum(1) / 0.1, -(x + 2).square().sum(1) / 0.1]), 0)


def test_chains_that_never_leave_their_mode():
    stuck = sample(two_modes, MALA(0.05), 3, n_chains=40, warmup=20, steps=200, thin=1, seed=0)
    found = diagnose(stuck)
    assert any("the chains stay in separate regions" in text and "0 on both sides" in text for text in found.warnings)
    one = stuck.trajectory[:, -1, 0] > 0
    assert not any("regions" in text for text in diagnose(stuck, chains=one).warnings)  # the others can't be seen


def mixture(n, draws, dim, at, changes):
    """Standard normal coordinates, on one side or the other, that each chain changes in each step or never."""
    side = torch.randint(2, (n, draws if changes else 1, 1)) * 2.0 - 1
    return torch.randn(n, draws, dim) + at * side


@pytest.mark.parametrize(("dim", "at"), [(1, 4.0), (64, 0.8)], ids=["a coordinate", "no coordinate tells them apart"])
@pytest.mark.parametrize("changes", [False, True])
def test_regions(dim, at, changes):
    found = diagnose(result_of(mixture(40, 300, dim, at, changes)), energy=False)
    assert any("separate regions" in text for text in found.warnings) != changes
    if not changes:
        (text,) = (text for text in found.warnings if "separate regions" in text)
        assert ("above x[0] = " in text or "below x[0] = " in text) == (dim == 1)


def test_a_few_chains_may_cross():
    x = mixture(100, 300, 1, 6.0, False)
    x[:3] = mixture(3, 300, 1, 6.0, True)
    assert any("3 on both sides" in text for text in diagnose(result_of(x)).warnings)
    x[:10] = mixture(10, 300, 1, 6.0, True)
    assert not any("regions" in text for text in diagnose(result_of(x)).warnings)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_one_region_in_many_dims(rho, monkeypatch):
    """A few chains in many dims: on the axis of their own means they would look apart."""
    result = result_of(autoregressive(rho, 2, 100, 800))
    assert not any("regions" in text for text in diagnose(result, energy=False).warnings)
    halves = Draws.halves.func
    monkeypatch.setattr(Draws, "halves", property(lambda self: tuple(v[:, [1, 1]] for v in halves(self))))
    assert any("regions" in text for text in diagnose(result, energy=False).warnings)


def test_few_effective_draws():
    assert warned(diagnose(result_of(torch.randn(4, 60, 2)), energy=False)) is False
    enough = diagnose(result_of(torch.randn(8, 500, 2)), energy=False)
    assert enough.warnings == []
    few = diagnose(result_of(torch.randn(2, 150, 1)), energy=False)
    assert any("effective draws, fewer than 400" in text for text in few.warnings)


def test_one_chain():
    found = diagnose(result_of(torch.randn(1, 3000, 2)))
    assert np.isnan(found.table["rhat"]).all()
    assert warned(found, "there is one chain, and R-hat needs several")


def test_chains_of_different_laws():
    """Labels, conditions and frozen values tell chains apart; then they are not compared."""
    x = torch.randn(8, 500, 3)
    x[:4, :, 1] += 5.0
    labels = torch.arange(8) // 4
    energy = ClassifierEnergy(nn.Linear(3, 4))
    result = result_of(x, energy=energy, labels=labels)
    assert warned(diagnose(result), "the chains have different labels")
    assert diagnose(result, chains=labels == 0).warnings == []
    assert diagnose(result, chains=[4, 5, 6, 7]).summary["chains"] == 4
    by_condition = result_of(x, energy=lambda x, condition: ((x - condition) ** 2).sum(1), condition=x[:, 0])
    assert warned(diagnose(by_condition), "the chains have different condition")
    frozen = torch.tensor([True, False, False])
    x[:, :, 0] = torch.arange(8.0)[:, None]
    assert warned(diagnose(result_of(x, frozen=frozen)), "the chains have different frozen coordinates")
    x[:, :, 0], x[:4, :, 1] = 3.0, torch.randn(4, 500)
    same = diagnose(result_of(x, frozen=frozen))
    assert same.warnings == []
    assert sorted(same.table["name"]) == ["energy", "x[1]", "x[2]"]


def test_levels_of_noise():
    energy = lambda x, sigma: x.square().sum(1) / (2 * (1 + sigma**2))  # noqa: E731
    result = sample(energy, AnnealedLangevin([3.0, 0.1], 20, 0.01), 2, n_chains=6, steps=40, thin=1, seed=0)
    assert warned(diagnose(result), "the noise level of AnnealedLangevin falls")


def test_chains_that_interact():
    result = sample(GaussianEnergy(torch.zeros(2)), SVGD(0.1), n_chains=6, steps=30, thin=1, seed=0)
    assert warned(diagnose(result), "the chains of SVGD interact")


# -- failures ------------------------------------------------------------------------------------------------------


def test_chains_that_failed():
    x = torch.randn(8, 500, 2)
    first_bad = torch.full((8,), -1, dtype=torch.int32)
    first_bad[3], x[3] = 7, 100.0
    found = diagnose(result_of(x, info={"first_bad_step": first_bad}))
    assert warned(found, "1 of 8 chains stopped")
    assert found.summary["chains"] == 7
    assert max(column(found, "rhat").values()) < 1.01
    x[3] = torch.randn(500, 2)
    x[5] = x[5, 0]
    assert "1 of 8 chains never moved" in diagnose(result_of(x)).warnings[0]
    x[5] = torch.randn(500, 2)
    assert warned(diagnose(result_of(x, info={"divergences": torch.full((8,), 0.02)})), "2.00% of the trajectories")
    assert warned(diagnose(result_of(x, info={"divergences": torch.zeros(8)})))
    swaps = torch.tensor([[0.3, 0.01]]).repeat(8, 1)
    found = diagnose(result_of(x, info={"swap_acceptance": swaps}))
    assert warned(found, "the temperatures 1 and 2 swap in 1.0%")
    assert found.summary["swap_acceptance"] == pytest.approx(0.01)
    assert warned(diagnose(result_of(x, info={"swap_acceptance": swaps + 0.2})))
    swaps[:, 1] = torch.nan  # as where swap_every exceeds the steps
    found = diagnose(result_of(x, info={"swap_acceptance": swaps}))
    assert warned(found, "the temperatures 1 and 2 did not try to swap once")
    assert found.summary["swap_acceptance"] == pytest.approx(0.3)
    found = diagnose(result_of(x, info={"swap_acceptance": swaps * torch.nan}))
    assert warned(found, "the temperatures 0 and 1 did not try to swap once")
    assert "swap_acceptance" not in found.summary


def test_chains_that_all_stood_still():
    found = diagnose(result_of(torch.randn(4, 1, 2).repeat(1, 50, 1)))
    assert "4 of 4 chains never moved" in found.warnings[0]
    assert column(found, "rhat")["x[0]"] == np.inf


def test_infinite_energies():
    wall = lambda x: torch.where(x[:, 0] > 2, torch.inf, x.square().sum(1) / 2)  # noqa: E731
    x = torch.randn(8, 500, 1).clamp(max=1.9)
    x[0, 3:5] = 2.1
    found = diagnose(result_of(x, energy=wall))
    assert warned(found, "the energy is not finite at 2 of 4000 stored states")
    assert found.table["name"] == ["x[0]"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda r: diagnose(dataclasses.replace(r, trajectory=None)), ValueError, r"sample\(\.\.\., thin=1\) stores"),
        (lambda r: diagnose(r.x), TypeError, "takes the result of fastebm.sample, got Tensor"),
        (lambda r: diagnose(dataclasses.replace(r, trajectory=r.trajectory[:, :3])), ValueError, "at least 4 .* got 3"),
        (lambda r: diagnose(r, chains=[]), ValueError, "there are no chains"),
        (lambda r: diagnose(r, chains=[4]), ValueError, "numbers from 0 to 3"),
        (lambda r: diagnose(r, chains=[1, 1]), ValueError, "different numbers"),
        (lambda r: diagnose(r, chains=[True]), ValueError, "one bool for each of the 4"),
        (lambda r: diagnose(r, chains=[0.5]), TypeError, "chain numbers or a mask"),
        (lambda r: diagnose(r, superchains=3), ValueError, "divide the 4 chains, got 3"),
        (lambda r: diagnose(r, superchains=1), ValueError, "at least 2"),
        (lambda r: diagnose(r, coordinates=0, energy=False), ValueError, "nothing to diagnose"),
        (lambda r: diagnose(r, coordinates=1.5), TypeError, "coordinates must be an int"),
        (
            lambda r: diagnose(
                dataclasses.replace(r, info=dataclasses.replace(r.info, first_bad_step=r.info.first_bad_step + 1))
            ),
            ValueError,
            "all 4 chains stopped.*smaller step_size",
        ),
        (lambda r: dataclasses.replace(r, trajectory=None).to_arviz(), ValueError, "thin=1"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make(result_of(torch.randn(4, 10, 2)))


def test_missing_packages(monkeypatch):
    result = result_of(torch.randn(4, 10, 2))
    for package in ("arviz_stats", "arviz_base"):
        for module in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
    for call in (lambda: diagnose(result), result.to_arviz):
        with pytest.raises(ImportError, match=r'pip install "fastebm\[diagnostics\]"'):
            call()


def test_nothing_is_changed(untouched):
    energy = MLPEnergy(3, (8,)).train()
    result = sample(energy, Langevin(0.3), n_chains=6, steps=20, thin=1, seed=0)
    with untouched(energy, result.x, result.trajectory, result.energies, result.state.chains.x):
        diagnose(result).plot()
        result.to_arviz()


def test_importing_fastebm_imports_no_arviz():
    code = "import sys, fastebm; fastebm.diagnose, fastebm.sample; print(any('arviz' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# -- what is shown -------------------------------------------------------------------------------------------------


def test_the_printed_table():
    found = diagnose(result_of(torch.randn(4, 10, 2)))
    lines = str(found).splitlines()
    assert lines[0] == "chains 4, draws 10, dims 2, seconds 2, acceptance 0.6, divergences 0"
    assert lines[1].split() == [name for name in found.table if name != "name"]
    assert [line.split()[0] for line in lines[2:5]] == found.table["name"]
    assert len({len(line) for line in lines[1:5]}) == 1
    assert lines[5] == "warnings:"
    assert str(diagnose(result_of(torch.randn(8, 500, 2)))).endswith("no warnings")


def test_the_picture(tmp_path):
    x = torch.randn(4, 100, 5)
    x[..., 2] = autoregressive(0.9, 4, 100)[..., 0]
    found = diagnose(result_of(x))
    figure = found.plot(tmp_path / "chains.png")
    assert matplotlib.image.imread(tmp_path / "chains.png").shape[1] == 1500
    labels = [axes.get_ylabel() for axes in figure.axes if axes.lines and axes.get_ylabel()]
    assert labels[0] == "x[2]"  # the lowest ESS first
    assert len(labels) == 3


def test_it_is_public():
    assert {"diagnose", "Diagnosis"} <= set(fastebm.__all__)
