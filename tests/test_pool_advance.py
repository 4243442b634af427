"""ChainPool.advance: all chains in chunks, undone after errors."""

import dataclasses

import pytest
import torch
from pools import DIM, RULE, Trap, bits, pool_of, same

from fastebm import Langevin, MLPEnergy, langevin_sample
from fastebm.pool.storage import Storage

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def energy() -> MLPEnergy:
    return MLPEnergy(DIM, (9, 8))


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
