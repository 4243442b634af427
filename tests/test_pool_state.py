"""Saved states of a ChainPool: a resumed pool goes on bit for bit, and bad states change nothing."""

import math

import pytest
import torch
from pools import DIM, RULE, json_round_trip, pool_of, same

from fastebm import ChainPool, Langevin, MLPEnergy

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def energy() -> MLPEnergy:
    return MLPEnergy(DIM, (9, 8))


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


@pytest.mark.parametrize("left_out", [[], ["condition"]])
def test_states_of_format_version_2_still_load(energy, left_out):
    pool, other = pool_of(reinit_prob=0.5), pool_of(seed=3)
    pool.sample(energy, 20, RULE, 2)
    state = pool.state_dict()
    old = {**state, "version": 2, "restarts": state["reinits"]}
    other.load_state_dict({k: v for k, v in old.items() if k not in ("reinits", *left_out)})
    assert same(pool, other)
    assert other.reinits.sum() > 0


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
