"""ChainPool: which chains are drawn, how they move, which are reinitialised, and what is refused."""

import itertools
import math

import pytest
import torch
from pools import DIM, RULE, Quartic, Trap, drawn, pool_of, same
from scipy import stats
from torch import nn

import fastebm
from fastebm import ChainPool, Langevin, MLPEnergy, NonFiniteError, langevin_sample
from fastebm.pool.draws import draw_distinct
from fastebm.rng import Stream, normal, uniform, words

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def energy() -> MLPEnergy:
    return MLPEnergy(DIM, (9, 8))


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


# A small part of many (candidates without repeated ones; 3 of 6 often needs a second try), and a large part (sorting).
@pytest.mark.parametrize(("n", "k", "draws"), [(5, 2, 1000), (6, 3, 1500), (4, 3, 1000), (3, 3, 500)])
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


# -- reinits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 1.0])
def test_the_share_of_reinits_is_reinit_prob(energy, probability):
    n, draws = 3000, 4
    pool = pool_of(n, reinit_prob=probability, clamp=(-1.0, 1.0))
    still = Langevin(1e-12, 0.0)  # chains that are not reinitialised stay where they are
    n_reinits = 0
    fresh = []
    for _ in range(draws):
        before = pool.states.clone()
        pool.sample(energy, n, still, 1)
        moved = (pool.states - before).abs().amax(dim=1) > 1e-6
        n_reinits += int(moved.sum())
        assert pool.last.reinits == int(moved.sum())
        assert bool((pool.ages[moved] == 1).all())
        fresh.append(pool.states[moved].flatten())
    assert (
        stats.binomtest(n_reinits, n * draws, probability).pvalue > 1e-6
        if 0 < probability < 1
        else (n_reinits == n * draws * probability)
    )
    assert int(pool.reinits.sum()) == n_reinits
    assert pool.steps.tolist() == [draws] * n
    if n_reinits:
        u = (torch.cat(fresh).double() + 1) / 2
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("init", ["uniform", lambda *counter: uniform(*counter, DIM)])
def test_draws_and_reinits_are_functions_of_the_number_of_the_draw(energy, init):
    """They depend neither on earlier draws nor on how many draws are computed at once."""
    options = {"reinit_prob": 0.5, "clamp": (0.0, 1.0), "init": init}
    pool, still = pool_of(**options), Langevin(1e-12, 0.0)
    for draw in range(70):  # more than are computed at once
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


# -- where chains start -----------------------------------------------------------------------------------------


def test_chains_start_as_init_says(energy):
    """From a Gaussian, rows of data or a callable, at first and after a reinit, as functions of chain and step."""
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
            assert (where[0].argmin(1) == where[1].argmin(1)).double().mean() < 0.2  # other rows than at first
        elif init == "gaussian":
            assert float(both.abs().max()) == 1.5
            for part in both:
                inside = part[part.abs() < 1.5].double().numpy()
                assert stats.kstest(inside, stats.truncnorm(-1.5, 1.5).cdf).pvalue > 1e-6
        else:
            assert torch.equal(first, start(7, Stream.INITIAL, torch.arange(2000), 0 * torch.arange(2000)))
            assert calls[1] == (Stream.INITIAL, pool.last.chains.tolist(), [1] * 2000)
        assert pool.reinits.tolist() == [1] * 2000


# -- chains that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_nonfinite", ["reinit", "ignore"])
def test_exploding_chains_leave_a_finite_pool(on_nonfinite):
    pool = pool_of(clamp=None)
    samples, energies = pool.sample(Quartic(), 30, Langevin(10.0, 0.0), 20, on_nonfinite=on_nonfinite)
    assert bool(pool.states.isfinite().all())
    assert bool(energies.isfinite().all()) or on_nonfinite == "ignore"
    assert (samples.abs().max() <= 1) == (on_nonfinite == "reinit")
    assert pool.last.nonfinite == 30
    assert int(pool.nonfinite.sum()) == (30 if on_nonfinite == "reinit" else 0)


@pytest.mark.parametrize("call", ["sample", "advance"])
@pytest.mark.parametrize("init", ["uniform", torch.full((4, DIM), 0.25)])
def test_only_chains_that_are_not_finite_are_reinitialised(call, init):
    """The others are bit-equal to a pool without them. Those that are reinitialised start as ``init`` says."""
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


def test_a_float64_condition_goes_with_chains_that_start_again():
    class Steep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, x, condition):
            bad = torch.where(x[:, 0] > 0.9, torch.nan, 0.0)
            return self.layer(torch.cat([x, condition], dim=1))[:, 0] + x.square().sum(1) + bad * x[:, 0]

    pool = ChainPool(100, 2, seed=1, condition=torch.randn(100, 1, dtype=torch.float64))
    x, _ = pool.sample(Steep(), 50, Langevin(0.5), 20, on_nonfinite="reinit")
    assert pool.last.nonfinite > 0
    assert bool(x.isfinite().all())
