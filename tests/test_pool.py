"""ChainPool: which chains are drawn, what comes back into them, and that a resumed pool goes on bit for bit."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import nn

import fastebm
from fastebm import ChainPool, Langevin, MLPEnergy, NonFiniteError, langevin_sample
from fastebm.noise import Stream, uniform
from fastebm.pool import draw_distinct

DIM = 3
RULE = Langevin(0.1, 0.5)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


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
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


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
@pytest.mark.parametrize(("n", "k", "draws"), [(5, 2, 4000), (6, 3, 6000), (4, 3, 4000), (3, 3, 2000)])
def test_every_ordered_choice_is_equally_likely(n, k, draws):
    counts = dict.fromkeys(itertools.permutations(range(n), k), 0)
    for draw in range(draws):
        counts[tuple(draw_distinct(3, draw, n, k).tolist())] += 1
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
    assert pool.ages.tolist() == [0] * 2000
    assert repr(pool) == "ChainPool(2000 chains of shape (3,) on cpu, 0 draws)"


@pytest.mark.parametrize("batch_size", [1, 20, 30, 50])
def test_samples_go_back_to_the_rows_they_came_from(energy, batch_size):
    pool = pool_of()
    before = pool.states.clone()
    rows = drawn(pool, batch_size)
    samples, energies = pool.sample(energy, batch_size, RULE, 4)
    others = torch.ones(50, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(pool.states[rows], samples)
    assert torch.equal(pool.states[others], before[others])
    assert not bool((samples == before[rows]).any())
    assert pool.ages[rows].tolist() == [4] * batch_size
    assert pool.ages[others].tolist() == [0] * (50 - batch_size)
    assert pool.draws == 1
    torch.testing.assert_close(energies, fastebm.energy(energy, samples).detach(), rtol=1e-5, atol=1e-6)


def test_a_chain_moves_as_its_number_and_age_say(energy):
    pool = pool_of(reinit_prob=0.0)
    for steps in (3, 5, 2):
        before, ages, rows = pool.states.clone(), pool.ages.clone(), drawn(pool, 20)
        pool.sample(energy, 20, RULE, steps)
        for row in rows.tolist()[:7]:
            alone = langevin_sample(
                energy, init=before[row : row + 1], steps=steps, step_size=0.1, noise_scale=0.5, clamp=(-1.0, 1.0),
                seed=pool.seed, first_chain=row, first_step=int(ages[row]),
            )  # fmt: skip
            assert torch.equal(pool.states[row : row + 1], alone)
    assert int(pool.ages.sum()) == 20 * (3 + 5 + 2)


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
    assert torch.equal(other.ages.cpu(), pool.ages)


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
        fresh.append(pool.states[moved].flatten())
    assert (
        stats.binomtest(restarts, n * draws, probability).pvalue > 1e-6
        if 0 < probability < 1
        else (restarts == n * draws * probability)
    )
    if restarts:
        u = (torch.cat(fresh).double() + 1) / 2
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-6


def test_restarts_do_not_depend_on_the_batch(energy):
    """The coin belongs to a chain's number and age, so one batch of all and batches of some toss the same."""
    whole, parts = pool_of(reinit_prob=0.5), pool_of(reinit_prob=0.5)
    whole.sample(energy, 50, RULE, 2)
    while int(parts.ages.min()) == 0:
        before = parts.ages.clone()
        parts.sample(energy, 10, RULE, 2)
        first = (before == 0) & (parts.ages == 2)
        assert torch.equal(parts.states[first], whole.states[first])


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
        ({"x": ...}, ValueError, "not the state of a ChainPool: it lacks x"),
        ({"age": ..., "draws": ...}, ValueError, "it lacks age, draws"),
        ({"version": 99}, ValueError, "saved by version 99"),
        ({"x": torch.zeros(49, DIM)}, ValueError, r"49 chains of shape \(3,\), and this one 50 of shape \(3,\)"),
        ({"x": torch.zeros(50, 4), "shape": [4]}, ValueError, r"50 chains of shape \(4,\)"),
        ({"shape": [1, 3]}, ValueError, r"shape \(1, 3\)"),
        ({"age": torch.zeros(49, dtype=torch.int64)}, ValueError, "and this one 50"),
        ({"x": torch.full((50, DIM), math.nan)}, ValueError, "the saved pool is damaged: states that are not finite"),
        ({"x": torch.full((50, DIM), math.inf)}, ValueError, "the saved pool is damaged: states that are not finite"),
        ({"x": [[0.0] * DIM] * 50}, ValueError, "x and age must be tensors, got list and Tensor"),
        ({"age": torch.full((50,), -1)}, ValueError, "negative ages"),
        ({"draws": "x"}, ValueError, "draws must be an int >= 0, got 'x'"),
        ({"draws": -1}, ValueError, "draws must be an int >= 0, got -1"),
        ({"seed": None}, ValueError, "it has no seed"),
        ({"seed": 2**64}, ValueError, "seed must fit 64 bits"),
        ({"clamp": [1.0, -1.0]}, ValueError, "clamp needs lo < hi"),
        ({"clamp": [1.0]}, TypeError, "clamp must be a pair"),
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
        ({"langevin": Langevin(clamp=(0.0, 1.0))}, ValueError, r"the pool clamps to \(-1.0, 1.0\) and the sampler to"),
        ({"langevin": Langevin(torch.ones(3))}, ValueError, "3 entries for 2 steps"),
        ({"energy": MLPEnergy(4, (3,))}, ValueError, "the energy takes 4 dims, and the chains have 3"),
        ({"energy": MLPEnergy(DIM, (3,)).to("meta")}, ValueError, "the energy is on meta and the chains on cpu"),
        ({"energy": Quartic(), "langevin": Langevin(3e38, 0.0)}, NonFiniteError, "chains are not finite"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_a_call_that_fails_leaves_the_pool_as_it_was(energy, options, error, match):
    pool, twin = pool_of(clamp=(-1.0, 1.0)), pool_of(clamp=(-1.0, 1.0))
    options = {"energy": energy, "batch_size": 20, "langevin": RULE, "steps": 2, **options}
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
