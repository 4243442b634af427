"""Pools: conditions per chain, given labels, seeds, inference mode, forks, and calls that fail at any step."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from fastebm.kernels import cpu as kernels
from pools import same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastebm import ChainPool, ClassifierEnergy, GaussianEnergy, Langevin, MLPEnergy, SumEnergy

DIM = 3
RULE = Langevin(0.1, 1.0)
LABELS = torch.arange(60) % 3


pytestmark = pytest.mark.usefixtures("seeded")


class Noisy(nn.Module):
    """Energy that is conditioned on a noise level per chain."""

    def forward(self, x, sigma):
        return (x / sigma).square().sum(1) / 2


def classifier():
    return ClassifierEnergy(nn.Sequential(nn.Linear(DIM, 8), nn.SiLU(), nn.Linear(8, 3)))


# -- conditions ----------------------------------------------------------------------------------------------------


def test_each_chain_keeps_its_condition():
    levels = torch.linspace(0.2, 3.0, 60)[:, None]
    pool = ChainPool(60, DIM, seed=1, reinit_prob=0.2, condition=levels)
    kept = levels.clone()
    levels.zero_()
    for _ in range(40):
        pool.sample(Noisy(), 20, Langevin(0.02, 1.0), 20)
        assert torch.equal(pool.last.condition, kept[pool.last.chains])
        assert pool.last.labels is None
    pool.advance(Noisy(), Langevin(0.02, 1.0), 200, chunk_size=7)
    assert torch.equal(pool.condition, kept)
    narrow, wide = pool.states[:20].std(), pool.states[-20:].std()
    assert narrow < 0.5 * wide
    torch.testing.assert_close(pool.energies, Noisy()(pool.states, kept))


def test_conditions_are_saved_and_restored():
    options = {"seed": 1, "condition": torch.rand(12, 2, 2)}

    class Images(nn.Module):
        def forward(self, x, image):
            return (x - image.flatten(1)[:, :DIM]).square().sum(1)

    pool, other = ChainPool(12, DIM, **options), ChainPool(12, DIM, seed=5)
    pool.sample(Images(), 6, RULE, 2)
    other.load_state_dict(pool.state_dict())
    assert same(pool, other)
    for p in (pool, other):
        p.sample(Images(), 6, RULE, 2)
        p.add(torch.zeros(2, DIM), condition=torch.ones(2, 2, 2))
    assert same(pool, other)
    assert (pool.condition[:2] == 1).all()
    other.load_state_dict(ChainPool(12, DIM, seed=2).state_dict())
    assert other.condition is None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"condition": torch.ones(11, 1)},
            ValueError,
            r"condition must be \(12, 1\), one row per chain, got \(11, 1\)",
        ),
        ({"condition": torch.ones(())}, ValueError, r"condition must be \(12,\)"),
        ({"condition": [1.0] * 12}, TypeError, "condition must be a tensor, one row per chain, got list"),
        ({"condition": torch.ones(12, 1), "labels": torch.zeros(12, dtype=torch.int64)}, ValueError, "got both"),
    ],
)
def test_bad_conditions_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        ChainPool(12, DIM, seed=0, **options)


def test_setting_one_ends_the_other():
    pool = ChainPool(60, DIM, seed=0, labels=LABELS)
    pool.condition = torch.ones(60, 1)
    assert pool.labels is None
    pool.sample(Noisy(), 5, RULE, 1)
    pool.labels = LABELS
    assert pool.condition is None
    pool.condition = None
    assert torch.equal(pool.labels, LABELS)


def test_adding_without_the_condition_is_refused():
    pool = ChainPool(12, DIM, seed=0, condition=torch.ones(12, 1))
    before = pool.state_dict()
    with pytest.raises(ValueError, match="this pool has condition: pass condition= of the samples"):
        pool.add(torch.zeros(2, DIM))
    with pytest.raises(TypeError, match=r"must be of torch\.float32, as the pool's condition is, got torch\.complex64"):
        pool.add(torch.zeros(2, DIM), condition=torch.ones(2, 1) + 0j)
    with pytest.raises(ValueError, match=r"condition must be \(2, 1\)"):
        pool.add(torch.zeros(2, DIM), condition=torch.ones(2, 3))
    assert same(before, pool)


# -- draws for given labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["uniform", lambda seed, stream, chains, steps: torch.zeros(len(chains), DIM)])
def test_draws_for_given_labels(init):
    pool, twin = (ChainPool(60, DIM, seed=3, labels=LABELS, reinit_prob=0.3, init=init) for _ in range(2))
    energy = classifier()
    for i in range(30):
        wanted = torch.randint(3, (12,), generator=torch.Generator().manual_seed(i))
        samples, energies = pool.sample(energy, 12, RULE, 2, labels=wanted)
        assert torch.equal(pool.last.labels, wanted)
        assert torch.equal(LABELS[pool.last.chains], wanted)
        assert len(set(pool.last.chains.tolist())) == 12
        torch.testing.assert_close(energies, energy(samples, wanted))
        again, _ = twin.sample(energy, 12, RULE, 2, labels=wanted)
        assert torch.equal(samples, again)
    assert same(pool, twin)
    assert pool.last.reinits > 0 or pool.reinits.sum() > 0


def test_every_chain_of_a_label_is_as_likely():
    energy, pool, counts = classifier(), ChainPool(60, DIM, seed=3, labels=LABELS), torch.zeros(60)
    wanted = torch.tensor([0, 0, 0, 0, 0, 2])
    for number in range(2000):
        pool.draws = number
        pool.sample(energy, 6, RULE, 0, labels=wanted)
        counts[pool.last.chains] += 1
    for label, expected in ((0, 500.0), (1, 0.0), (2, 100.0)):
        found = counts[LABELS == label]
        assert (found - expected).abs().max() <= 5 * max(expected, 1) ** 0.5


def test_all_chains_of_a_label_at_once_and_none():
    pool = ChainPool(60, DIM, seed=3, labels=LABELS)
    pool.sample(classifier(), 20, RULE, 0, labels=torch.full((20,), 2))
    assert sorted(pool.last.chains.tolist()) == list(range(2, 60, 3))
    assert pool.steps.sum() == 0


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.zeros(21, dtype=torch.int64), "labels asks for 21 chains of label 0, and the pool has 20"),
        (torch.full((5,), 7), "labels asks for 5 chains of label 7, and the pool has 0"),
        (torch.full((5,), -1), "labels asks for 5 chains of label -1, and the pool has 0"),
        (torch.zeros(4, dtype=torch.int64), r"labels must be \(5,\), one per chain of the batch, got \(4,\)"),
    ],
)
def test_labels_that_can_not_be_drawn_are_refused(labels, match):
    pool = ChainPool(60, DIM, seed=3, labels=LABELS)
    before = pool.state_dict()
    with pytest.raises(ValueError, match=match):
        pool.sample(classifier(), 21 if len(labels) == 21 else 5, RULE, 2, labels=labels)
    with pytest.raises(ValueError, match="this pool has none: build it with labels="):
        ChainPool(60, DIM, seed=3).sample(classifier(), len(labels), RULE, 2, labels=labels)
    assert same(before, pool)


# -- seeds ---------------------------------------------------------------------------------------------------------


def test_without_a_seed_one_is_drawn_from_the_global_generator():
    drawn = []
    for rank in (0, 1, 0):
        torch.manual_seed(rank)
        pool = ChainPool(60, DIM)
        drawn.append((pool.seed, pool.sample(MLPEnergy(DIM, (4,)), 10, RULE, 0)[0], pool.last.chains))
    assert drawn[0][0] == drawn[2][0] != drawn[1][0]
    assert torch.equal(drawn[0][2], drawn[2][2])
    assert not torch.equal(drawn[0][2], drawn[1][2])
    assert not torch.equal(drawn[0][1], drawn[1][1])
    torch.manual_seed(0)
    assert ChainPool(60, DIM).seed != ChainPool(60, DIM).seed


# -- inference mode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("made", [torch.inference_mode, torch.enable_grad])
def test_pools_live_in_and_out_of_inference_mode(made, storage_dtype):
    energy, labels = SumEnergy([classifier(), GaussianEnergy()]), LABELS.clone()
    options = {"seed": 1, "clamp": (-2.0, 2.0), "reinit_prob": 0.3, "storage_dtype": storage_dtype}
    found = []
    for modes in ([made, torch.enable_grad, torch.inference_mode], [torch.enable_grad] * 3):
        with modes[0]():
            pool = ChainPool(60, DIM, labels=labels, **options)
            pool.sample(energy, 10, RULE, 2)
        for mode in modes[1:]:
            with mode():
                samples, _ = pool.sample(energy, 10, RULE, 2)
                pool.advance(energy, RULE, 2)
                pool.add(torch.zeros(2, DIM), torch.tensor([0, 1]))
                pool.labels = pool.labels
                pool.load_state_dict(pool.state_dict())
                pool.reinit_prob = 0.5
                pool.stats()
            assert not samples.is_inference()
        found.append(pool.state_dict())
    assert same(*found)


class Autograd(nn.Module):
    """Not an MLP, and its gradient depends on the labels."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, DIM)

    def forward(self, x, labels):
        return (x - self.table(labels)).square().sum(1) * labels


@pytest.mark.parametrize("make", [Autograd, lambda: SumEnergy([Autograd(), GaussianEnergy()])])
def test_labels_of_inference_mode_with_an_autograd_energy(make):
    from fastebm import langevin_sample

    model, start = make(), torch.randn(60, DIM)
    expected = langevin_sample(model, init=start, labels=LABELS, steps=3, step_size=0.1, seed=0)
    with torch.inference_mode():
        labels, init = LABELS.clone(), start.clone()
        for backend in ("auto", "reference"):
            found = langevin_sample(model, init=init, labels=labels, steps=3, step_size=0.1, seed=0, backend=backend)
            torch.testing.assert_close(found, expected)
    found = langevin_sample(model, init=init, labels=labels, steps=3, step_size=0.1, seed=0)
    torch.testing.assert_close(found, expected)


# -- forks ---------------------------------------------------------------------------------------------------------


def _in_child(queue):
    energy = MLPEnergy(64, (32,))
    pool = ChainPool(20_000, 64, seed=1, labels=torch.zeros(20_000, dtype=torch.int64))
    pool.sample(ClassifierEnergy(nn.Linear(64, 2)), 5_000, RULE, 2, labels=torch.zeros(5_000, dtype=torch.int64))
    pool.labels = None
    pool.advance(energy, RULE, 1)
    pool.add(torch.zeros(100, 64))
    pool.load_state_dict(pool.state_dict())
    queue.put((pool.states.shape, pool.stats().draws, int(pool.ages.max())))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_pools_in_a_forked_process_do_not_hang():
    """The parent has used several threads, whose locks the child inherits without the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(2000, 2000).mm(torch.randn(2000, 2000)).sum()
        torch.ones(4_000_000).add_(1)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(queue,))
        child.start()
        assert queue.get(timeout=60) == ((20_000, 64), 1, 3)
        child.join(timeout=30)
    finally:
        torch.set_num_threads(before)


# -- energies of another dtype -------------------------------------------------------------------------------------


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(DIM, 1)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).square()


class Constant64(nn.Module):
    """A constant in float64 with dims makes the energies float64."""

    def __init__(self):
        super().__init__()
        self.constant = torch.ones(DIM, dtype=torch.float64)

    def forward(self, x):
        return (x * self.constant).square().sum(1)


class Halves(nn.Module):
    def forward(self, x):
        return x.square().sum(1).half()


def in_default_float64():
    torch.set_default_dtype(torch.float64)
    try:
        return SumEnergy([MLPEnergy(DIM, (4,)), GaussianEnergy(torch.zeros(DIM), 2.0)])
    finally:
        torch.set_default_dtype(torch.float32)


OTHER_DTYPES = {
    "autocast": Autocast,
    "float64 constant": Constant64,
    "half": Halves,
    "float64 weights": lambda: MLPEnergy(DIM, (4,)).double(),
    "bfloat16 weights": lambda: nn.Sequential(nn.Linear(DIM, 4), nn.Softsign(), nn.Linear(4, 1)).bfloat16(),
    "default dtype": in_default_float64,
    "double": lambda: nn.Sequential(nn.Linear(DIM, 1), nn.Softsign()).double(),
}


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OTHER_DTYPES.values(), ids=OTHER_DTYPES)
def test_energies_are_brought_to_the_pools_dtype(make, storage, default):
    torch.set_default_dtype(default)
    try:
        model = make()
        pool = ChainPool(20, DIM, seed=0, storage_dtype=storage)
        samples, energies = pool.sample(model, 10, Langevin(0.01, 1.0), 2)
        pool.advance(model, Langevin(0.01, 1.0), 2)
        assert samples.dtype == energies.dtype == pool.energies.dtype == torch.float32
        assert pool.energies.isfinite().all()
        assert sorted(pool.steps.tolist()) == [2] * 10 + [4] * 10
    finally:
        torch.set_default_dtype(torch.float32)


# -- calls that fail -----------------------------------------------------------------------------------------------


class Failing(TorchDispatchMode):
    """Fails at operation number n. Operations that write to the pool's own memory do not count."""

    def __init__(self, pool, n):
        super().__init__()
        tensors = [v for v in pool.state_dict(copy=False).values() if isinstance(v, torch.Tensor)]
        self.own = {v.untyped_storage().data_ptr() for v in tensors}
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        writes = func._schema.is_mutable and any(
            isinstance(v, torch.Tensor) and v.untyped_storage().data_ptr() in self.own
            for v in (*args[:1], (kwargs or {}).get("out"))
        )
        if not writes:
            self.left -= 1
            if self.left == -1:  # only once, so that undoing may succeed
                raise RuntimeError("injected")
        return func(*args, **(kwargs or {}))


class Explodes(nn.Module):
    """Infinite for some states, so that chains are reinitialised."""

    def forward(self, x):
        return x.square().sum(1) + torch.where(x[:, 0] > 0.8, torch.inf, 0.0)


CALLS = {
    "sample": lambda p: p.sample(Explodes(), 8, RULE, 1, on_nonfinite="reinit"),
    "sample of an MLP": lambda p: p.sample(mlp_of_all(), 8, RULE, 1),
    "advance": lambda p: p.advance(Explodes(), RULE, 1, on_nonfinite="reinit"),
    "advance in chunks": lambda p: p.advance(mlp_of_all(), RULE, 1, chunk_size=13),
    "add": lambda p: p.add(torch.zeros(5, DIM)),
    "reservoir": lambda p: p.add(torch.zeros(50, DIM), policy="reservoir"),
    "load": lambda p: p.load_state_dict(OTHERS[p.state_dict(copy=False)["x"].dtype]),
}
OTHERS = {dtype: ChainPool(20, DIM, seed=9, clamp=(-1.0, 1.0), storage_dtype=dtype).state_dict()
          for dtype in (torch.float32, torch.uint8)}  # fmt: skip


def mlp_of_all():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return MLPEnergy(DIM, (4,))


@pytest.mark.parametrize(
    ("storage", "numba"),
    [(torch.float32, True), (torch.uint8, True), pytest.param(torch.float32, False, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_at_any_step_leaves_the_pool_as_it_was(name, storage, numba, monkeypatch):
    if not numba:
        monkeypatch.setattr(kernels, "why_not", lambda: "a test")
    pool = ChainPool(20, DIM, seed=0, clamp=(-1.0, 1.0), reinit_prob=0.4, storage_dtype=storage)
    pool.sample(mlp_of_all(), 10, RULE, 1)
    before, last = pool.state_dict(), pool.last
    n_failed = 0
    while n_failed < 2000:
        try:
            with Failing(pool, n_failed):
                CALLS[name](pool)
            break
        except (RuntimeError, ValueError) as error:
            if "injected" not in str(error):
                raise
            n_failed += 1
            assert same(before, pool), f"changed by a failure at operation {n_failed}"
            assert pool.last is last
    assert n_failed > 5
    assert not same(before, pool)


# -- numbers of other kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "whole", [np.int64, np.int32, np.uint8, np.asarray, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)]
)
@pytest.mark.parametrize("real", [np.float32, np.float64, np.asarray, torch.tensor, lambda v: torch.tensor(v).half()])
def test_numbers_of_numpy_and_tensors_without_dims(whole, real):
    pool = ChainPool(whole(20), whole(DIM), seed=whole(4), clamp=(real(-1.0), real(1.0)), reinit_prob=real(0.5))
    twin = ChainPool(20, DIM, seed=4, clamp=(-1.0, 1.0), reinit_prob=0.5)
    rule = Langevin(real(0.25), real(0.5), grad_clip=real(2.0), grad_norm_clip=real(4.0))
    for p, n, r, steps, chunk in (
        (pool, whole(6), rule, whole(3), whole(5)),
        (twin, 6, Langevin(0.25, 0.5, grad_clip=2.0, grad_norm_clip=4.0), 3, 5),
    ):
        p.sample(mlp_of_all(), n, r, steps)
        p.advance(mlp_of_all(), r, steps, chunk_size=chunk)
    assert same(pool, twin)
    assert type(pool.n_chains) is type(pool.seed) is int


@pytest.mark.parametrize(
    "bad", [True, np.bool_(True), torch.tensor(True), 2.5, np.float64(2.5), torch.ones(1), "3", None]
)
def test_what_is_no_whole_number_is_refused(bad):
    with pytest.raises((TypeError, ValueError), match="n_chains must be an int"):
        ChainPool(bad, DIM)
    with pytest.raises((TypeError, ValueError), match="batch_size must be an int"):
        ChainPool(5, DIM).sample(mlp_of_all(), bad, RULE, 1)
    with pytest.raises((TypeError, ValueError), match="steps must be an int"):
        ChainPool(5, DIM).sample(mlp_of_all(), 2, RULE, bad)
