"""ChainPool: which chains are drawn, what comes back into them, and that a resumed pool goes on bit for bit."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

import fastebm
from fastebm import ChainPool, ClassifierEnergy, Langevin, MLPEnergy, NonFiniteError, langevin_sample
from fastebm.backends import Chains
from fastebm.driver.sampling import advance_chains
from fastebm.pool import draws as draws_module
from fastebm.pool.draws import Draw, draw_distinct
from fastebm.pool.storage import Storage
from fastebm.rng import Stream, normal, uniform, words

DIM = 3
RULE = Langevin(0.1, 0.5)


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def energy() -> MLPEnergy:
    return MLPEnergy(DIM, (9, 8))


def pool_of(n: int = 50, size=DIM, **options) -> ChainPool:
    return ChainPool(n, size, **{"clamp": (-1.0, 1.0), "seed": 7, **options})


def drawn(pool: ChainPool, n: int) -> torch.Tensor:
    """The rows of the next draw."""
    return draw_distinct(pool.seed, pool.draws, len(pool), n)


def same(a: ChainPool, b: ChainPool) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(bits(a[k]), bits(b[k])) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


class Quartic(nn.Module):
    """Falls faster than any step size can follow, for chains that start far enough out."""

    def forward(self, x):
        return -x.square().square().sum(1)


# -- the draw ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 2), (6, 3), (6, 4), (7, 7), (1000, 20), (1000, 999), (4, 0)])
@pytest.mark.parametrize("seed", [0, -1, 2**63])
def test_draws_are_distinct_and_repeatable(n, k, seed):
    for draw in range(20):
        rows = draw_distinct(seed, draw, n, k)
        assert rows.shape == (k,)
        assert len(set(rows.tolist())) == k
        assert all(0 <= row < n for row in rows.tolist())
        assert torch.equal(rows, draw_distinct(seed, draw, n, k))


# few of many (candidates without the repeated ones; 3 of 6 often needs a second try), and many (a random order)
@pytest.mark.parametrize(("n", "k", "draws"), [(5, 2, 1000), (6, 3, 1500), (4, 3, 1000), (3, 3, 500)])
def test_every_ordered_choice_is_equally_likely(n, k, draws):
    counts = dict.fromkeys(itertools.permutations(range(n), k), 0)
    for choice in draws_module._distinct(3, 0, draws, n, k, torch.device("cpu")).tolist():
        counts[tuple(choice)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-6


def test_draws_of_a_large_pool_are_uniform_to_its_ends():
    n = 2**31 - 1
    rows = draw_distinct(5, 0, n, 20000)
    assert len(rows.unique()) == 20000
    assert stats.kstest(rows.double().numpy() / n, "uniform").pvalue > 1e-6


def test_draws_of_other_numbers_and_seeds_differ():
    seen = {tuple(draw_distinct(seed, draw, 1000, 5).tolist()) for seed in (0, 1, 2**32) for draw in (0, 1, 2, 2**31)}
    assert len(seen) == 12


# -- a call -----------------------------------------------------------------------------------------------------


def test_chains_start_uniform_and_know_their_numbers():
    pool = pool_of(2000, clamp=(0.0, 2.0))
    assert torch.equal(pool.states, uniform(7, Stream.INITIAL, torch.arange(2000), 0, DIM) * 2)
    assert torch.equal(pool_of(20, clamp=(0.0, 2.0)).states, pool.states[:20])
    assert pool_of(clamp=None).states.abs().max() <= 1
    assert pool.steps.tolist() == pool.ages.tolist() == pool.reinits.tolist() == [0] * 2000
    assert bool(pool.energies.isnan().all())
    assert pool.labels is None
    assert pool.last is None
    assert repr(pool) == "ChainPool(2000 chains of shape (3,) on cpu, 0 draws)"


@pytest.mark.parametrize("batch_size", [1, 20, 30, 50])
def test_samples_go_back_to_the_rows_they_came_from(energy, batch_size):
    pool = pool_of(reinit_prob=0.0)
    before = pool.states.clone()
    rows = drawn(pool, batch_size)
    samples, energies = pool.sample(energy, batch_size, RULE, 4)
    others = torch.ones(50, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(pool.states[rows], samples)
    assert torch.equal(pool.states[others], before[others])
    assert not bool((samples == before[rows]).any())
    assert pool.steps[rows].tolist() == pool.ages[rows].tolist() == [4] * batch_size
    assert pool.steps[others].tolist() == [0] * (50 - batch_size)
    assert torch.equal(pool.energies[rows], energies)
    assert bool(pool.energies[others].isnan().all())
    assert pool.draws == 1
    assert torch.equal(pool.last.chains, rows)
    assert (pool.last.labels, pool.last.reinits, pool.last.nonfinite) == (None, 0, 0)
    torch.testing.assert_close(energies, fastebm.energy(energy, samples).detach(), rtol=1e-5, atol=1e-6)


def test_a_chain_moves_as_its_number_and_age_say(energy):
    pool = pool_of(reinit_prob=0.0)
    for steps in (3, 5, 2):
        before, ages, rows = pool.states.clone(), pool.steps.clone(), drawn(pool, 20)
        pool.sample(energy, 20, RULE, steps)
        for row in rows.tolist()[:7]:
            alone = langevin_sample(
                energy, init=before[row : row + 1], steps=steps, step_size=0.1, noise_scale=0.5, clamp=(-1.0, 1.0),
                seed=pool.seed, first_chain=row, first_step=int(ages[row]),
            )  # fmt: skip
            assert torch.equal(pool.states[row : row + 1], alone)
    assert int(pool.steps.sum()) == 20 * (3 + 5 + 2)


def test_samples_are_no_view_of_the_pool(energy):
    pool = pool_of()
    samples, _ = pool.sample(energy, 20, RULE, 1)
    before = pool.state_dict()
    samples.fill_(math.nan)
    assert torch.equal(pool.states, before["x"])


def test_images_and_schedules():
    energy = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8, 1))
    pool = pool_of(size=(1, 4, 4))
    samples, energies = pool.sample(energy, 6, Langevin(torch.tensor([0.1, 0.2]), torch.ones(6, 1)), 2)
    assert samples.shape == (6, 1, 4, 4)
    assert pool.states.shape == (50, 1, 4, 4)
    torch.testing.assert_close(energies, fastebm.energy(energy, samples).detach(), rtol=1e-5, atol=1e-6)


def test_the_energy_and_the_global_generator_are_left_alone(energy, untouched):
    pool = pool_of()
    energy[0].eval()
    with untouched(energy):
        pool.sample(energy, 20, RULE, 3)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_backends_move_the_same_chains(energy, backend, device):
    home = device if backend == "triton" else "cpu"
    pool, other = pool_of(), pool_of(device=home)
    for _ in range(3):
        pool.sample(energy.cpu(), 20, RULE, 3, backend="reference")
        other.sample(energy.to(home), 20, RULE, 3, backend=backend)
    torch.testing.assert_close(other.states.cpu(), pool.states, rtol=1e-3, atol=1e-3)
    assert torch.equal(other.steps.cpu(), pool.steps)


# -- restarts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 1.0])
def test_restarts_are_as_many_as_asked_for(energy, probability):
    n, draws = 3000, 4
    pool = pool_of(n, reinit_prob=probability, clamp=(-1.0, 1.0))
    still = Langevin(1e-12, 0.0)  # chains that are not restarted stay where they are
    restarts = 0
    fresh = []
    for _ in range(draws):
        before = pool.states.clone()
        pool.sample(energy, n, still, 1)
        moved = (pool.states - before).abs().amax(dim=1) > 1e-6
        restarts += int(moved.sum())
        assert pool.last.reinits == int(moved.sum())
        assert bool((pool.ages[moved] == 1).all())
        fresh.append(pool.states[moved].flatten())
    assert (
        stats.binomtest(restarts, n * draws, probability).pvalue > 1e-6
        if 0 < probability < 1
        else (restarts == n * draws * probability)
    )
    assert int(pool.reinits.sum()) == restarts
    assert pool.steps.tolist() == [draws] * n
    if restarts:
        u = (torch.cat(fresh).double() + 1) / 2
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("init", ["uniform", lambda *counter: uniform(*counter, DIM)])
def test_draws_and_restarts_are_functions_of_the_number_of_the_draw(energy, init):
    """Not of what was drawn before, nor of how many were worked out at once."""
    options = {"reinit_prob": 0.5, "clamp": (0.0, 1.0), "init": init}
    pool, still = pool_of(**options), Langevin(1e-12, 0.0)
    for draw in range(70):  # more than are worked out at once
        batch = (20, 20, 30)[draw % 3] if draw < 6 else 20
        before = pool.states.clone()
        samples, _ = pool.sample(energy, batch, still, 1)
        rows = draw_distinct(7, draw, 50, batch)
        coins = words(7, Stream.POOL, rows, draw, 1, 0xFFFFFE)[0][:, 0] < 2**31
        assert torch.equal(pool.last.chains, rows)
        assert pool.last.reinits == int(coins.sum())
        fresh = uniform(7, Stream.INITIAL, rows, draw + 1, DIM)
        expected = torch.where(coins[:, None], fresh, before[rows])
        torch.testing.assert_close(samples, expected, rtol=0, atol=1e-6)
        if draw == 40:
            pool.reinit_prob = 0.0
            assert pool.sample(energy, 20, still, 1) is not None
            assert pool.last.reinits == 0
            pool.reinit_prob, pool.draws = 0.5, 41
    with pytest.raises(ValueError, match=r"reinit_prob must be in \[0, 1\], got 5"):
        pool.reinit_prob = 5
    assert pool.reinit_prob == 0.5


# -- save and resume --------------------------------------------------------------------------------------------


def test_a_resumed_pool_goes_on_bit_for_bit(energy):
    pool = pool_of(reinit_prob=0.3)
    for _ in range(3):
        pool.sample(energy, 20, RULE, 2)
    saved = pool.state_dict()
    other = ChainPool(50, DIM, clamp=(0.0, 5.0), seed=99, reinit_prob=0.9)
    other.load_state_dict(saved)
    assert same(pool, other)
    for _ in range(3):
        a, b = pool.sample(energy, 20, RULE, 2), other.sample(energy, 20, RULE, 2)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert same(pool, other)


def test_saved_state_is_a_copy(energy):
    pool = pool_of()
    saved = pool.state_dict()
    x = saved["x"].clone()
    other = pool_of(seed=1)
    other.load_state_dict(saved)
    other.sample(energy, 50, RULE, 2)
    pool.sample(energy, 50, RULE, 2)
    assert torch.equal(saved["x"], x)


def test_saved_state_is_tensors_and_plain_numbers(tmp_path):
    saved = pool_of().state_dict()
    torch.save(saved, tmp_path / "pool.pt")
    other = pool_of(seed=1)
    other.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True))
    assert same(other, pool_of())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": ...}, ValueError, "not the state of a ChainPool: missing x"),
        ({"steps": ..., "draws": ...}, ValueError, "missing draws, steps"),
        ({"version": 99}, ValueError, "saved in version 99 of the format, and this release reads versions 2, 3"),
        ({"version": 1, "x": ...}, ValueError, "saved in version 1 .*: use the release that saved it"),
        (
            {"x": torch.zeros(49, DIM)},
            ValueError,
            r"\(3,\), 49 of them in this process; this pool has 50 of shape \(3,\), 50",
        ),
        ({"n_chains": 60}, ValueError, r"60 chains of shape \(3,\), 50 of them in this process; this pool has 50"),
        ({"x": torch.zeros(50, 4), "shape": [4]}, ValueError, r"50 chains of shape \(4,\)"),
        ({"shape": [1, 3]}, ValueError, r"shape \(1, 3\)"),
        (
            {"steps": torch.zeros(49, dtype=torch.int64)},
            ValueError,
            r"steps must be \(50,\) of .*, got \(49,\)",
        ),
        ({"reinits": torch.zeros(50)}, ValueError, "reinits must be .* of torch.int32, got .* of torch.float32"),
        ({"x": torch.zeros(50, DIM).double()}, ValueError, "x must be .* got .* of torch.float64"),
        ({"labels": torch.zeros(50)}, ValueError, "labels must be .* of torch.int64"),
        ({"storage_dtype": "uint8"}, ValueError, "storage_dtype uint8, this one float32: build it with the same"),
        (
            {"init": "7 rows of data"},
            ValueError,
            "start from 7 rows of data, chains of this one from uniform",
        ),
        ({"x": torch.full((50, DIM), math.nan)}, ValueError, "the saved pool is damaged: states that are not finite"),
        ({"x": torch.full((50, DIM), math.inf)}, ValueError, "the saved pool is damaged: states that are not finite"),
        ({"x": [[0.0] * DIM] * 50}, ValueError, "x must be a tensor, got list"),
        ({"steps": torch.full((50,), -1)}, ValueError, "negative steps"),
        ({"started": torch.full((50,), 99)}, ValueError, "started after their last step"),
        ({"added": -1}, ValueError, "added must be an int >= 0, got -1"),
        ({"draws": "x"}, ValueError, "draws must be an int >= 0, got 'x'"),
        ({"draws": -1}, ValueError, "draws must be an int >= 0, got -1"),
        ({"seed": None}, ValueError, "it has no seed"),
        ({"seed": 2**64}, ValueError, "seed must fit 64 bits"),
        ({"clamp": [1.0, -1.0]}, ValueError, "clamp needs lo < hi"),
        ({"clamp": [1.0]}, TypeError, "clamp must be a pair"),
        ({"clamp": [[0.0] * 4, 1.0]}, ValueError, "one value for each of the 3 dims"),
        ({"reinit_prob": 7.0}, ValueError, r"reinit_prob must be in \[0, 1\], got 7.0"),
        ({"reinit_prob": None}, ValueError, r"reinit_prob must be in \[0, 1\], got None"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(energy, change, error, match):
    pool, source = pool_of(seed=1), pool_of(seed=2)
    pool.sample(energy, 20, RULE, 2)
    source.sample(energy, 30, RULE, 5)
    untouched = pool_of()
    untouched.load_state_dict(pool.state_dict())
    state = {k: v for k, v in {**source.state_dict(), **change}.items() if v is not ...}
    with pytest.raises(error, match=match):
        pool.load_state_dict(state)
    assert same(pool, untouched)


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, r"batch_size must be an int in \[1, 50\], the pool's size, got 0"),
        ({"batch_size": 51}, ValueError, "batch_size must be .* got 51"),
        ({"batch_size": 2.0}, ValueError, "batch_size must be .* got 2.0"),
        ({"steps": -1}, ValueError, "steps must be >= 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps must be an int, got 1.5"),
        ({"sampler": Langevin(clamp=(0.0, 1.0))}, ValueError, r"the pool clamps to \(-1.0, 1.0\) and the sampler to"),
        ({"sampler": Langevin(clamp=(-torch.ones(DIM), 0.5))}, ValueError, "and the sampler to .* use one"),
        ({"sampler": Langevin(torch.ones(3))}, ValueError, "3 entries for 2 steps"),
        ({"sampler": Langevin(torch.ones(19, 1))}, ValueError, r"does not fit 20 chains"),
        ({"on_nonfinite": "hide"}, ValueError, "on_nonfinite must be one of raise, reinit, ignore, got 'hide'"),
        ({"energy": MLPEnergy(4, (3,))}, ValueError, "the energy takes 4 dims, and the chains have 3"),
        ({"energy": MLPEnergy(DIM, (3,)).to("meta")}, ValueError, "the energy is on meta and the chains on cpu"),
        ({"energy": Quartic(), "sampler": Langevin(3e38, 0.0)}, NonFiniteError, "chains are not finite"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_a_call_that_fails_leaves_the_pool_as_it_was(energy, options, error, match):
    pool, twin = pool_of(clamp=(-1.0, 1.0)), pool_of(clamp=(-1.0, 1.0))
    options = {"energy": energy, "batch_size": 20, "sampler": RULE, "steps": 2, **options}
    with pytest.raises(error, match=match):
        pool.sample(**options)
    assert same(pool, twin)
    pool.sample(energy, 20, RULE, 2)
    twin.sample(energy, 20, RULE, 2)
    assert same(pool, twin)


@pytest.mark.parametrize("on_nonfinite", ["reinit", "ignore"])
def test_exploding_chains_leave_a_finite_pool(on_nonfinite):
    pool = pool_of(clamp=None)
    samples, energies = pool.sample(Quartic(), 30, Langevin(10.0, 0.0), 20, on_nonfinite=on_nonfinite)
    assert bool(pool.states.isfinite().all())
    assert bool(energies.isfinite().all()) or on_nonfinite == "ignore"
    assert (samples.abs().max() <= 1) == (on_nonfinite == "reinit")
    assert pool.last.nonfinite == 30
    assert int(pool.nonfinite.sum()) == (30 if on_nonfinite == "reinit" else 0)


class Trap(nn.Module):
    """|x|^2 / 2, but for NaN where the first coordinate passes 100."""

    def forward(self, x):
        return (x.square().sum(1) / 2).masked_fill(x[:, 0] > 100, math.nan)


@pytest.mark.parametrize("call", ["sample", "advance"])
@pytest.mark.parametrize("init", ["uniform", torch.full((4, DIM), 0.25)])
def test_only_chains_that_are_not_finite_restart(call, init):
    """The rest are bit for bit as without them, and the restarted ones are counted and start as ``init`` says."""
    pool, twin = (pool_of(clamp=None, reinit_prob=0.0, init=init) for _ in range(2))
    trapped = torch.tensor([3, 17, 41])
    pool.states[trapped] = 1000.0

    def move(pool, **options):
        if call == "sample":
            return pool.sample(Trap(), 50, RULE, 4, **options)
        return pool.advance(Trap(), RULE, 4, chunk_size=7, **options)

    before = pool_of(clamp=None, init=init)
    before.load_state_dict(pool.state_dict())
    with pytest.raises(NonFiniteError):
        move(pool)
    assert same(pool, before)
    move(pool, on_nonfinite="reinit")
    move(twin)
    rest = torch.ones(50, dtype=torch.bool).index_fill_(0, trapped, False)
    for name in ("states", "energies", "steps", "ages", "reinits", "nonfinite"):
        assert torch.equal(getattr(pool, name)[rest], getattr(twin, name)[rest]), name
    assert pool.last.nonfinite == 3
    assert pool.nonfinite[trapped].tolist() == pool.reinits[trapped].tolist() == [1, 1, 1]
    assert pool.steps[trapped].tolist() == [4, 4, 4]
    assert pool.ages[trapped].tolist() == [0, 0, 0]
    fresh = pool.states[trapped]
    assert bool((fresh == 0.25).all()) if isinstance(init, torch.Tensor) else fresh.abs().max() <= 1
    torch.testing.assert_close(pool.energies[trapped], fresh.square().sum(1) / 2)
    move(pool)
    assert pool.last.nonfinite == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_chains": 0}, "n_chains must be an int in .* got 0"),
        ({"n_chains": 2**31}, "n_chains must be an int in"),
        ({"n_chains": True}, "n_chains must be an int in .* got True"),
        ({"input_size": 0}, "input_size must be an int >= 1"),
        ({"input_size": (2, 0)}, "input_size must be an int >= 1"),
        ({"reinit_prob": 1.5}, r"reinit_prob must be in \[0, 1\], got 1.5"),
        ({"reinit_prob": math.nan}, "reinit_prob must be in"),
        ({"clamp": (1.0, 0.0)}, "clamp needs lo < hi"),
        ({"clamp": (0.0, math.inf)}, "no uniform start on an infinite clamp range"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"init": "zeros"}, "init must be uniform, gaussian, a tensor of states or a callable, got 'zeros'"),
        ({"init": torch.zeros(0, 3)}, "init must have 1 to .* rows, got 0"),
        ({"init": torch.zeros(5, 4)}, r"init must be \(n, 3\), got \(5, 4\)"),
        ({"init": torch.full((2, 3), math.nan)}, "init must be finite"),
        ({"init": torch.full((2, 3), 9.0), "clamp": (0.0, 1.0)}, "init must lie within .* from 9 to 9: scale them"),
        ({"init": lambda *_: torch.zeros(1, 3)}, r"init must return a tensor \(5, 3\), got \(1, 3\)"),
        ({"init": lambda *_: torch.full((5, 3), math.inf)}, "init must return finite states"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels must be \(5,\), one per chain, got \(4,\)"),
        ({"clamp": (0.0, torch.ones(4))}, "one value for each of the 3 dims"),
        ({"storage_dtype": torch.float16}, "storage_dtype must be one of .* got torch.float16"),
        ({"storage_dtype": torch.uint8}, "uint8 has 256 levels on the clamp, which must be finite, got None"),
        ({"storage_device": "meta"}, "storage_device must be the pool's device, cpu, or cpu, got meta"),
        ({"storage_device": "meta", "storage_file": "x", "device": "meta"}, "leave storage_device out, got meta"),
        ({"storage_file": __file__}, "storage_file must not exist, as the pool would overwrite it"),
    ],
)
def test_a_bad_pool_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ChainPool(**{"n_chains": 5, "input_size": 3, **options})


@pytest.mark.parametrize(
    ("pool_clamp", "rule_clamp", "bound"),
    [((-1.0, 1.0), None, 1.0), ((-1.0, 1.0), (-1.0, 1.0), 1.0), (None, (-1.5, 1.5), 1.5), (None, None, None)],
)
def test_clamps_of_the_pool_and_of_the_sampler(energy, pool_clamp, rule_clamp, bound):
    pool = pool_of(clamp=pool_clamp, reinit_prob=0.0)
    pool.sample(energy, 50, Langevin(1.0, 3.0, clamp=rule_clamp), 3)
    largest = float(pool.states.abs().max())
    assert largest == bound if bound is not None else largest > 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"init": 7}, "init must be a name, a tensor of states or a callable, got int"),
        (
            {"init": torch.zeros(5, 3, dtype=torch.int64)},
            "init must be a floating-point tensor .* got torch.int64",
        ),
        ({"labels": torch.zeros(5)}, "labels must be a tensor of integers, got torch.float32"),
    ],
)
def test_a_pool_of_wrong_types_is_refused(options, match):
    with pytest.raises(TypeError, match=match):
        ChainPool(**{"n_chains": 5, "input_size": 3, **options})


def test_a_clamp_a_dim(energy):
    lo, hi = torch.tensor([-1.0, 0.0, 5.0]), torch.tensor([1.0, 0.5, 6.0])
    pool = pool_of(clamp=(lo, hi))
    pool.sample(energy, 50, Langevin(1.0, 3.0, clamp=(lo.clone(), hi)), 3)
    assert torch.equal(pool.states.amin(0), lo)
    assert torch.equal(pool.states.amax(0), hi)
    other = pool_of(clamp=(0.0, 1.0))
    other.load_state_dict(json_round_trip(pool.state_dict()))
    assert same(pool, other)
    assert other.clamp[1].tolist() == hi.tolist()


def json_round_trip(state):
    values = json.loads(json.dumps({k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}))
    return {**values, **{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}}


# -- where chains start -----------------------------------------------------------------------------------------


def test_chains_start_and_restart_as_asked_for(energy):
    """From a Gaussian, from rows of data and from a callable, at first and anew, as functions of chain and step."""
    data = torch.linspace(-0.9, 0.9, 11)[:, None].expand(11, DIM) * torch.tensor([1.0, -1.0, 0.5])
    calls = []

    def start(seed, stream, chains, steps):
        calls.append((stream, chains.tolist(), steps.tolist()))
        return normal(seed, stream, chains, steps, DIM) * 0.1

    still = Langevin(1e-12, 0.0)
    for init in ("gaussian", data, start):
        pool = pool_of(2000, init=init, clamp=(-1.5, 1.5), reinit_prob=1.0)
        first = pool.states.clone()
        samples, _ = pool.sample(energy, 2000, still, 3)
        assert not torch.equal(first[pool.last.chains], samples)
        both = torch.stack([first, pool.states])
        if isinstance(init, torch.Tensor):
            where = (both[:, :, None] - data).abs().amax(dim=3)
            assert where.amin(dim=2).max() < 1e-6
            counts = torch.bincount(where.argmin(dim=2).flatten(), minlength=11)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-6
            assert (where[0].argmin(1) == where[1].argmin(1)).double().mean() < 0.2  # drawn anew
        elif init == "gaussian":
            assert float(both.abs().max()) == 1.5
            for part in both:
                inside = part[part.abs() < 1.5].double().numpy()
                assert stats.kstest(inside, stats.truncnorm(-1.5, 1.5).cdf).pvalue > 1e-6
        else:
            assert torch.equal(first, start(7, Stream.INITIAL, torch.arange(2000), 0 * torch.arange(2000)))
            assert calls[1] == (Stream.INITIAL, pool.last.chains.tolist(), [1] * 2000)
        assert pool.reinits.tolist() == [1] * 2000


def test_a_saved_pool_names_its_starts():
    data = torch.zeros(4, DIM)
    saved = pool_of(init=data).state_dict()
    assert saved["init"] == "4 rows of data"
    pool = pool_of(init=data, seed=9)
    pool.load_state_dict(saved)
    pool.load_state_dict(pool_of(init="gaussian").state_dict())
    assert same(pool, pool_of(init="gaussian"))
    with pytest.raises(ValueError, match="start from 4 rows of data, chains of this one from gaussian"):
        pool.load_state_dict(saved)
    pool = pool_of(init=data + 5, clamp=(4.0, 6.0))
    with pytest.raises(ValueError, match=r"init must lie within .* clamp \(-1.0, 1.0\), got values from 5 to 5"):
        pool.load_state_dict(saved)
    assert same(pool, pool_of(init=data + 5, clamp=(4.0, 6.0)))


# -- all chains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"storage_dtype": torch.bfloat16}, {"storage_dtype": torch.uint8}])
def test_advance_moves_every_chain_whatever_the_chunks(energy, options):
    pools = [pool_of(**options) for _ in range(3)]
    rule = Langevin(torch.linspace(0.05, 0.2, 50)[:, None], 0.5)
    for pool, size in zip(pools, (None, 7, 50), strict=True):
        assert pool.advance(energy, rule, 3, chunk_size=size) is None
        pool.advance(energy, RULE, 2, chunk_size=size, on_nonfinite="ignore")
    assert same(pools[0], pools[1])
    assert same(pools[0], pools[2])
    pool = pools[0]
    assert pool.steps.tolist() == pool.ages.tolist() == [5] * 50
    assert pool.draws == 0
    assert pool.last.chains.tolist() == list(range(50))
    if not options:
        start = pool_of().states
        moved = langevin_sample(
            energy, init=start, steps=3, step_size=rule.step_size, noise_scale=0.5, clamp=(-1.0, 1.0), seed=7
        )
        moved, info = langevin_sample(
            energy, init=moved, steps=2, step_size=0.1, noise_scale=0.5, clamp=(-1.0, 1.0), seed=7, first_step=3,
            return_info=True,
        )  # fmt: skip
        assert torch.equal(pool.states, moved)
        assert torch.equal(pool.energies, info.energies)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be an int >= 1 or None, got 0"),
        ({"steps": -1}, ValueError, "steps must be >= 0"),
        ({"energy": MLPEnergy(4, (3,))}, ValueError, "the energy takes 4 dims"),
        ({"sampler": Langevin(torch.ones(49, 1))}, ValueError, "does not fit 50 chains"),
    ],
)
def test_an_advance_that_fails_leaves_the_pool_as_it_was(energy, options, error, match):
    pool, twin = pool_of(), pool_of()
    with pytest.raises(error, match=match):
        pool.advance(**{"energy": energy, "sampler": RULE, "steps": 2, "chunk_size": 7, **options})
    assert same(pool, twin)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_advance_puts_every_chain_back(tmp_path, error):
    class Interrupted(Trap):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 20:
                raise error
            return super().forward(x)

    pools = pool_of(clamp=None), pool_of(clamp=None, storage_file=tmp_path / "pool")
    for pool in pools:
        with pytest.raises(error):
            pool.advance(Interrupted(), RULE, 3, chunk_size=9)
        assert same(pool, pool_of(clamp=None))
    assert [file.name for file in tmp_path.iterdir()] == ["pool"]
    pool = pools[0]
    with pytest.raises(error):
        pool.advance(Interrupted(), RULE, 3, chunk_size=9, on_nonfinite="reinit")
    moved = pool.steps == 3
    assert 0 < int(moved.sum()) < 50
    whole = pool_of(clamp=None)
    whole.advance(Trap(), RULE, 3)
    assert torch.equal(pool.states, torch.where(moved[:, None], whole.states, pool_of(clamp=None).states))


def test_a_rule_that_fits_the_chunks_and_not_the_pool_is_refused(energy):
    pool = pool_of(50)
    for name in ("step_size", "noise_scale"):
        rule = dataclasses.replace(RULE, **{name: torch.full((25, 1), 0.1)})
        with pytest.raises(ValueError, match=rf"{name} of shape \(25, 1\) does not fit 50 chains; use \(50, 1\)"):
            pool.advance(energy, rule, 2, chunk_size=25)
    assert same(pool, pool_of(50))


def test_a_chunk_that_can_not_be_stored_has_not_moved(energy, monkeypatch):
    pool, pools = pool_of(storage_dtype=torch.uint8), [pool_of(storage_dtype=torch.uint8) for _ in range(2)]
    encoded = Storage.encoded
    pools[0].advance(energy, RULE, 3)

    def failing(self, x, rows, steps):
        if rows.start == 20:
            raise MemoryError
        return encoded(self, x, rows, steps)

    monkeypatch.setattr(Storage, "encoded", failing)
    with pytest.raises(MemoryError):
        pool.advance(energy, RULE, 3, chunk_size=20, on_nonfinite="ignore")
    for name, value in pool.state_dict().items():
        if isinstance(value, torch.Tensor):
            expected = [p.state_dict()[name][rows] for p, rows in zip(pools, (slice(20), slice(20, 50)), strict=True)]
            assert torch.equal(bits(value), bits(torch.cat(expected))), name
    with pytest.raises(MemoryError):
        pools[1].advance(energy, RULE, 3, chunk_size=20)
    assert same(pools[1], pool_of(storage_dtype=torch.uint8))


def test_a_bar_is_shown_when_asked_for(energy, capsys):
    pool = pool_of()
    pool.advance(energy, RULE, 1, chunk_size=10)
    assert capsys.readouterr().err == ""
    pool.advance(energy, RULE, 1, chunk_size=10, progress=True)
    assert "50/50" in capsys.readouterr().err.replace("50.0", "50")


# -- labels and added states ------------------------------------------------------------------------------------


def test_labels_stay_with_their_chains():
    energy = ClassifierEnergy(nn.Sequential(nn.Linear(DIM, 8), nn.SiLU(), nn.Linear(8, 4)))
    labels = torch.arange(50) % 4
    pool = pool_of(labels=labels.to(torch.int32), reinit_prob=0.0)
    samples, energies = pool.sample(energy, 20, RULE, 3)
    assert torch.equal(pool.last.labels, labels[pool.last.chains])
    torch.testing.assert_close(energies, fastebm.energy(energy, samples, labels=pool.last.labels).detach())
    pool.advance(energy, RULE, 2, chunk_size=8)
    torch.testing.assert_close(pool.energies, fastebm.energy(energy, pool.states, labels=labels).detach())
    pool.add(torch.zeros(3, DIM), torch.tensor([3, 3, 2], dtype=torch.uint8))
    assert pool.labels.tolist() == [3, 3, 2, *labels[3:].tolist()]
    assert pool.last.labels.tolist() == labels.tolist()  # of the chains that moved then

    other = pool_of()
    other.load_state_dict(pool.state_dict())
    assert same(pool, other)
    other.labels = labels + 1
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
        other.sample(energy, 20, RULE, 1)
    other.labels = None
    other.sample(energy, 20, RULE, 1)
    assert other.last.labels is None
    with pytest.raises(ValueError, match=r"labels= was given, and MLPEnergy.forward takes x only"):
        pool.sample(MLPEnergy(DIM, (4,)), 20, RULE, 1)


def numbered(first, n):
    """States that say which they are."""
    return torch.arange(first, first + n, dtype=torch.float32)[:, None].expand(n, DIM) / 1000


def test_fifo_replaces_the_oldest(energy):
    pool = pool_of(10, labels=torch.zeros(10, dtype=torch.int64))
    pool.advance(ClassifierEnergy(nn.Linear(DIM, 3)), RULE, 2)
    pool.add(numbered(0, 4), torch.arange(4))
    assert pool.steps.tolist() == [2] * 10  # the noise goes on
    assert pool.ages.tolist() == [0] * 4 + [2] * 6
    assert pool.reinits.tolist() == [1] * 4 + [0] * 6
    assert pool.energies.isnan().tolist() == [True] * 4 + [False] * 6
    pool.add(numbered(4, 3), torch.arange(3))
    pool.add(numbered(7, 6), torch.arange(6))
    assert (pool.states[:, 0] * 1000).round().long().tolist() == [10, 11, 12, 3, 4, 5, 6, 7, 8, 9]
    assert pool.labels.tolist() == [3, 4, 5, 3, 0, 1, 2, 0, 1, 2]
    pool.add(numbered(0, 25), torch.zeros(25, dtype=torch.int64))  # more than there are: the last ones stay
    assert sorted((pool.states[:, 0] * 1000).round().long().tolist()) == list(range(15, 25))
    assert pool.added == 38


def test_a_reservoir_keeps_every_state_that_was_seen_equally_often():
    kept = torch.zeros(40, dtype=torch.int64)
    for seed in range(200):
        pool = pool_of(8, seed=seed)
        for first, n in ((0, 5), (5, 10), (15, 24), (39, 1)):
            pool.add(numbered(first, n), policy="reservoir")
        numbers = (pool.states[:, 0] * 1000).round().long()
        assert len(numbers.unique()) == 8
        kept[numbers] += 1
    assert stats.chisquare(kept.numpy()).pvalue > 1e-6


def test_added_states_do_not_depend_on_how_they_come():
    pool, other = pool_of(8), pool_of(8)
    pool.add(numbered(0, 100), policy="reservoir")
    for first, n in ((0, 3), (3, 60), (63, 37)):
        other.add(numbered(first, n), policy="reservoir")
    assert torch.equal(pool.states, other.states)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"policy": "lifo"}, ValueError, 'policy must be "fifo" or "reservoir", got \'lifo\''),
        ({"samples": torch.zeros(3, 4)}, ValueError, r"samples must be \(n, 3\), got \(3, 4\)"),
        ({"samples": torch.full((3, 3), math.nan)}, ValueError, "samples must be finite"),
        ({"samples": torch.full((3, 3), 1e39, dtype=torch.float64)}, ValueError, "samples must be finite in float32"),
        ({"samples": torch.full((3, 3), 255.0)}, ValueError, "samples must lie within the pool's clamp .* 255: scale"),
        ({"samples": [[0.0] * 3]}, TypeError, "samples must be a floating-point tensor of states, got list"),
        ({"labels": None}, ValueError, "this pool has labels: pass labels= of the samples"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels must be \(3,\), one per sample"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be a tensor of integers"),
        ({"labels": torch.zeros(3) + 0j}, TypeError, "labels must be a tensor of integers, got torch.complex64"),
    ],
)
def test_added_states_that_are_refused_change_nothing(options, error, match):
    labels = torch.zeros(50, dtype=torch.int64)
    pool = pool_of(labels=labels)
    with pytest.raises(error, match=match):
        pool.add(**{"samples": torch.zeros(3, 3), "labels": labels[:3], **options})
    assert same(pool, pool_of(labels=labels))
    with pytest.raises(ValueError, match="this pool has no labels: build it with labels=, or pass none"):
        pool_of().add(torch.zeros(3, 3), labels[:3])


# -- statistics -------------------------------------------------------------------------------------------------


def test_stats_of_a_fresh_pool():
    s = pool_of().stats()
    assert (s.n_chains, s.draws, s.n_energies, s.reinits, s.nonfinite, s.ages) == (50, 0, 0, 0, 0, (50,))
    assert all(math.isnan(v) for v in s.energy.values())


def test_stats_are_those_of_the_chains(energy):
    pool = pool_of(5000, reinit_prob=0.3)
    for n, steps in ((3000, 1), (2000, 7), (1000, 40)):
        pool.sample(energy, n, RULE, steps)
    pool.energies[:4] = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    s = pool.stats()
    known = pool.energies[pool.energies.isfinite()].sort().values
    assert 3000 <= s.n_energies == len(known) < 5000
    for q, value in s.energy.items():
        assert value == float(known[max(math.ceil(q * len(known)) - 1, 0)])
    assert known.min() < 0 < known.max() or len(set(s.energy.values())) == 7
    assert sum(s.ages) == 5000
    assert s.ages[0] == int((pool.ages == 0).sum())
    for i, count in enumerate(s.ages[1:]):
        assert count == int(((pool.ages >= 2**i) & (pool.ages < 2 ** (i + 1))).sum())
    assert s.reinits == int(pool.reinits.sum()) > 0
    assert s.draws == 3


def test_quantiles_of_negative_and_positive_energies():
    pool = pool_of(9)
    pool.energies.copy_(torch.tensor([-3.5, 1e-42, 4.0, -1e30, 7.25, -0.25, 2.0, 3e38, -1e-42]))
    assert pool.stats().energy[0.0] == float(torch.tensor(-1e30))
    assert pool.stats().energy[0.5] == float(torch.tensor(1e-42))
    assert pool.stats().energy[1.0] == float(torch.tensor(3e38))


# -- storage ----------------------------------------------------------------------------------------------------


def test_rounding_keeps_the_mean_and_what_is_stored_already():
    n, dim = 4000, 21
    rows, steps = slice(0, n), torch.arange(n)
    x = torch.linspace(-0.97, 1.93, dim).expand(n, dim)
    for dtype, spacing in ((torch.uint8, 3 / 255), (torch.bfloat16, 2.0**-7)):
        bounds = Langevin(clamp=(-1.0, 2.0))
        store = Storage(n, dim, dtype=dtype, rule=bounds, device=torch.device("cpu"), seed=3)
        store.write(rows, x, steps)
        kept = store.read(rows)
        assert len(kept[:, 3].unique()) == 2  # one of the two neighbours
        assert float((kept - x).abs().max()) < spacing
        # a byte of noise leaves at most 1/512 of a unit, and the mean of n roundings at most half a unit / sqrt(n)
        assert float((kept.mean(0) - x[0]).abs().max()) < spacing * (1 / 512 + 6 * 0.5 / math.sqrt(n))
        stored = store.data.clone()
        store.write(rows, kept, steps + 1)
        assert torch.equal(store.data, stored)
        store.write(torch.arange(n).flip(0), x, steps.flip(0))
        assert torch.equal(store.data, stored)  # of the chain and its step alone


def test_coarse_storage_stays_within_the_clamp_and_near_the_state(energy):
    lo, hi = torch.tensor([-1.1, 0.0, 5.0]), torch.tensor([1.1, 0.3, 6.0])
    for dtype in (torch.bfloat16, torch.uint8):
        pool = pool_of(clamp=(lo, hi), storage_dtype=dtype, reinit_prob=0.0)
        samples, energies = pool.sample(energy, 50, RULE, 3)
        states = pool.states[pool.last.chains]
        assert bool(((states >= lo) & (states <= hi)).all())
        assert bool(
            ((states - samples).abs() <= ((hi - lo) / 255 if dtype == torch.uint8 else samples.abs() / 128)).all()
        )
        torch.testing.assert_close(energies, fastebm.energy(energy, samples).detach())
        assert pool.state_dict()["x"].dtype == dtype
        other = pool_of(clamp=(lo, hi), storage_dtype=dtype, seed=1)
        other.load_state_dict(json_round_trip(pool.state_dict()))
        for p in (pool, other):
            p.sample(energy, 20, RULE, 3)
        assert same(pool, other)


def test_images_of_256_levels_are_kept_as_they_are():
    images = torch.randint(256, (30, DIM)) / 255
    pool = pool_of(30, clamp=(0.0, 1.0), storage_dtype=torch.uint8)
    pool.add(images)
    assert torch.equal((pool.states * 255).round(), images * 255)


def test_a_pool_in_a_file_is_the_same_pool(energy, tmp_path):
    file = tmp_path / "pool"
    pool, other = pool_of(reinit_prob=0.3), pool_of(reinit_prob=0.3, storage_file=file)
    assert file.stat().st_size == 50 * DIM * 4
    for p in (pool, other):
        p.sample(energy, 20, RULE, 2)
        p.advance(energy, RULE, 2, chunk_size=7)
        p.add(torch.zeros(5, DIM))
    assert same(pool, other)
    assert torch.equal(torch.from_file(str(file), size=50 * DIM).view(50, DIM), pool.states)
    with pytest.raises(ValueError, match="storage_file must not exist"):
        pool_of(storage_file=file)
    assert torch.equal(other.states, pool.states)


def test_a_pool_that_could_not_be_built_leaves_no_file(energy, tmp_path, monkeypatch):
    file = tmp_path / "pool"

    def start(seed, stream, chains, steps):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pool_of(init=start, storage_file=file)
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: free)
        with pytest.raises(OSError, match=r"states take 600 bytes, and the disk has 100 left.*/pool"):
            pool_of(storage_file=file)
    assert not file.exists()
    pool = pool_of(storage_file=file)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match="states take 600 bytes"):  # states as they were, which are kept meanwhile
        pool.advance(energy, RULE, 1, chunk_size=20)
    assert same(pool, pool_of())


def test_chains_past_two_billion_elements(tmp_path, monkeypatch):
    """Drawn, advanced, written, read and advanced again as chains by themselves are; no other row is written."""
    n, dim, file, rule = 2**20 + 10, 2100, tmp_path / "pool", Langevin(0.1, 0.5, clamp=(0.0, 1.0))
    energy = MLPEnergy(dim, (3,))
    with monkeypatch.context() as patch:  # the file stays sparse: all chains start at 0
        patch.setattr(Storage, "parts", lambda *_: [])
        pool = pool_of(n, dim, clamp=rule.clamp, reinit_prob=0.0, storage_dtype=torch.uint8, storage_file=file)
    high = torch.tensor([2**31 // dim + 1, n - 1])
    rows = torch.cat([drawn(pool, 6), high])
    monkeypatch.setattr(pool, "_next_draw", lambda *_: Draw(rows, rows[:0], torch.empty(0, dim), None))
    assert pool.state_dict(copy=False)["x"].numel() > 2**31

    def alone(x, steps):
        """Chains by their numbers, without a pool, and what is stored of them: the same rows of a small file."""
        chains = Chains(x, 7, rows, torch.full_like(rows, steps - 2))
        done, _ = advance_chains(energy, chains, rule, 2, shape=(dim,), on_nonfinite="raise")
        cpu = torch.device("cpu")
        stored = []
        for row, state in zip(rows.tolist(), done.x, strict=True):
            one = Storage(1, dim, dtype=torch.uint8, rule=rule, device=cpu, seed=7, first_chain=row)
            one.write(slice(0, 1), state[None], torch.tensor([steps]))
            stored.append(one.data)
        return done.x, torch.cat(stored)

    states = torch.zeros(8, dim)
    for steps in (2, 4):
        expected, stored = alone(states, steps)
        samples, _ = pool.sample(energy, 8, rule, 2)
        assert torch.equal(samples, expected)
        with open(file, "rb") as opened:  # where they must be in the file
            for row, bytes_there in zip(rows.tolist(), stored, strict=True):
                opened.seek(row * dim)
                assert opened.read(dim) == bytes_there.numpy().tobytes()
        states = stored.float() * (1 / 255)
        assert torch.equal(pool.steps[rows], torch.full((8,), steps))
    assert int(pool.steps.sum()) == 8 * 4
    assert file.stat().st_blocks * 512 < 2**20


MEMORY = """
import torch, fastebm.pool.storage as storage
from fastebm import ChainPool, Langevin, MLPEnergy
torch.set_num_threads(1)
storage._CHUNK_BYTES["cpu"] = CHUNK = 2**20
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
energy, rule = MLPEnergy(512, (8,)), Langevin(0.1, 0.1)
def work(n, **options):
    p = ChainPool(n, 512, clamp=(0.0, 1.0), reinit_prob=0.5, **options)
    for policy in ("ignore", "reinit"):
        p.advance(energy, rule, 1, on_nonfinite=policy)
    p.sample(energy, 40, rule, 1)
    p.stats()
    p.load_state_dict(p.state_dict(copy=False))
    return p
work(50)
pools = []
for n, dtype in ((20_000, torch.uint8), (10_000, torch.float32)):
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    pools.append(work(n, storage_dtype=dtype))
    print(n * 512 * dtype.itemsize, (memory("VmHWM") - before - n * (512 * dtype.itemsize + 28 + 40)) / CHUNK)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process' peak memory")
def test_memory_beside_the_pool_is_a_few_chunks():
    """Of a chunk's float32 states, 1 MiB here; the pools take 10 and 20."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300, check=True)
    for line in done.stdout.splitlines():
        size, chunks = map(float, line.split())
        assert size > 9 * 2**20
        assert chunks < 14  # some ten were measured
