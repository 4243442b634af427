"""What each option means, on every path: labels, frozen coordinates, clips, bounds per dim, trajectories."""

import pytest
import torch
from paths import (
    CLASSES,
    FAST_PATHS,
    PATHS,
    advance,
    advance_reference,
    begin,
    every_path,
    free_gradient,
    largest,
    make_energy,
    network,
    per_dim_bounds,
    same_bits,
    seldom,
    start,
)
from torch import nn

from fastebm import GaussianEnergy, Langevin, SumEnergy, langevin_sample
from fastebm.rng import Stream, normal
from fastebm.targets.autograd import Energy

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

DIM = 5


@every_path
@pytest.mark.parametrize(
    ("frozen", "bounds"),
    [
        ("dims", "numbers"),
        ("chains", "dims"),
        pytest.param("dims", "dims", marks=pytest.mark.slow),
        pytest.param("chains", "numbers", marks=pytest.mark.slow),
    ],
)
def test_frozen_coordinates_keep_their_bits_whatever_the_bounds(device, path, frozen, bounds):
    """They keep them outside the clamp too, and in the whole trajectory. All others move and stay within the clamp."""
    dim = 19
    energy = make_energy(dim, [9], terms=("gaussian",)).to(device)
    x, counters = begin(40, dim, device, frozen=frozen)
    x *= 3.0
    frozen = counters["frozen"].expand_as(x)
    lo, hi = (-0.2, 0.3) if bounds == "numbers" else per_dim_bounds(dim)
    sampler = Langevin(0.3, 1.0, clamp=(lo, hi))
    done = advance(path, energy, x, sampler, 3, counters, thin=1, telemetry=True)
    lo, hi = (torch.as_tensor(v, device=device).expand_as(x) for v in (lo, hi))
    assert ((x < lo) | (x > hi))[frozen].any()
    for state in (done.x, *done.trajectory.unbind(1)):
        assert torch.equal(state[frozen], x[frozen])
        assert ((state >= lo) & (state <= hi))[~frozen].all()
        assert (state != x)[~frozen].all()
    assert (done.first_bad == -1).all()


@every_path
def test_all_coordinates_frozen(device, path):
    """The gradient counts as 0. Clipping its norm must not divide by 0."""
    energy = make_energy(DIM).to(device)
    x, counters = start(7, DIM, device)
    counters["frozen"] = torch.ones(1, DIM, dtype=torch.bool, device=device)
    sampler = Langevin(0.3, 1.0, clamp=(-0.1, 0.1), grad_clip=0.1, grad_norm_clip=0.1)
    done = advance(path, energy, x, sampler, 2, counters, telemetry=True)
    assert torch.equal(done.x, x)
    assert (done.first_bad == -1).all()
    assert [v.abs().sum().item() for v in done.telemetry.values()] == [0.0, 0.0, 0.0]


@every_path
def test_the_gradient_of_a_frozen_coordinate_does_not_count(device, path):
    """Its infinite gradient stops no chain and is not part of the norm, and the others move as without it."""
    dim, far = 19, 17
    base = make_energy(dim, [9])
    std = torch.full((dim,), 1e10)
    std[far] = 1e-18
    energy = SumEnergy([base, GaussianEnergy(0.0, std)]).to(device)
    x, counters = start(6, dim, device)
    x[:, far] = 1e5
    counters["frozen"] = (torch.arange(dim, device=device) == far)[None]
    sampler = Langevin(0.3, 0.5, grad_norm_clip=2.0)
    expected = advance_reference(base.to(device), x, sampler, 3, counters, telemetry=True)
    done = advance(path, energy, x, sampler, 3, counters, telemetry=True)
    assert (done.first_bad == -1).all()
    assert torch.equal(done.x[:, far], x[:, far])
    torch.testing.assert_close(done.x, expected.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(done.telemetry["grad_norm"], expected.telemetry["grad_norm"], rtol=1e-4, atol=1e-4)


@every_path
@pytest.mark.parametrize("frozen", [None, "chains"])
@pytest.mark.parametrize("grad_clip", [None, 0.6])
def test_norm_clip_in_closed_form(device, path, grad_clip, frozen):
    """x' = x - a g min(1, c / |g|), g clipped elementwise before, over the coordinates that are not frozen."""
    dim, norm_clip, a = 19, 1.2, 0.25
    energy = make_energy(dim, [9], head="logsumexp", terms=("gaussian",)).to(device)
    x, counters = begin(40, dim, device, frozen=frozen)
    x *= torch.linspace(0.01, 1.5, 40, device=device)[:, None]
    raw = free_gradient(energy, x, counters)
    grad = raw if grad_clip is None else raw.clamp(-grad_clip, grad_clip)
    norm = torch.linalg.vector_norm(grad, dim=1)
    shrunk = grad * (norm_clip / norm).clamp(max=1.0)[:, None]
    assert 0 < int((norm > norm_clip).sum()) < 40
    if grad_clip is not None:  # clipping in the other order would give another result
        other = raw * (norm_clip / torch.linalg.vector_norm(raw, dim=1)).clamp(max=1.0)[:, None]
        assert largest(other.clamp(-grad_clip, grad_clip) - shrunk) > 0.01
    sampler = Langevin(2 * a, 0.0, grad_clip=grad_clip, grad_norm_clip=norm_clip)
    done = advance(path, energy, x, sampler, 1, counters, telemetry=True)
    torch.testing.assert_close(done.x.double(), x - a * shrunk, rtol=0, atol=2e-6)
    # telemetry describes the gradient before both clips
    torch.testing.assert_close(
        done.telemetry["grad_norm"].double(), torch.linalg.vector_norm(raw, dim=1), rtol=1e-5, atol=0
    )
    clipped = norm > norm_clip if grad_clip is None else (norm > norm_clip) | (raw.abs() > grad_clip).any(dim=1)
    assert torch.equal(done.telemetry["clipped"], clipped.float())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_norm_clip_is_exact_in_float64(backend):
    energy = make_energy(DIM, head="logsumexp").double()
    x = torch.randn(9, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad = free_gradient(energy, x, {})
    moved = langevin_sample(
        energy, init=x, steps=1, step_size=2.0, noise_scale=0.0, grad_norm_clip=0.01, backend=backend, seed=0
    )
    torch.testing.assert_close(
        torch.linalg.vector_norm(moved - x, dim=1), torch.full((9,), 0.01, dtype=torch.float64), rtol=1e-10, atol=0
    )
    torch.testing.assert_close((x - moved) / 0.01, nn.functional.normalize(grad), rtol=1e-10, atol=1e-12)


@every_path
def test_each_dim_has_its_own_bounds(device, path):
    """Infinite bounds do nothing, and a chain beyond a bound ends on it, in the second chunk of dims too."""
    dim = 19
    energy = make_energy(dim, [9]).to(device)
    x, counters = start(12, dim, device)
    lo, hi = torch.full((dim,), -torch.inf), torch.full((dim,), torch.inf)
    lo[3], hi[4], lo[17], hi[18] = 0.5, -0.25, 100.0, -100.0
    sampler = Langevin(0.3, 0.7)
    free = advance(path, energy, x, sampler, 1, counters, telemetry=True)
    done = advance(path, energy, x, Langevin(0.3, 0.7, clamp=(lo, hi)), 1, counters, telemetry=True)
    assert torch.equal(done.x, free.x.clamp(lo.to(device), hi.to(device)))
    assert (done.x[:, 17] == 100.0).all()
    assert (done.x[:, 18] == -100.0).all()
    assert torch.equal(done.telemetry["clamped"], torch.ones(12, device=device))
    assert torch.equal(free.telemetry["clamped"], torch.zeros(12, device=device))


@every_path
def test_bounds_as_numbers_and_as_tensors_are_the_same(device, path):
    energy = make_energy(19, [9]).to(device)
    x, counters = start(12, 19, device)
    numbers, *others = (
        advance(path, energy, x, Langevin(0.3, 0.7, clamp=clamp), 2, counters, telemetry=True)
        for clamp in ((-0.5, 0.7), (torch.full((19,), -0.5), torch.full((19,), 0.7)), (-0.5, torch.full((19,), 0.7)))
    )
    for done in others:
        assert same_bits(done, numbers)


@every_path
def test_a_label_picks_its_row_of_the_head(device, path):
    """A chain of label y moves as with the energy -f_y, and has its energy at the end."""
    x, counters = begin(40, 19, device, classes=CLASSES)
    energy = make_energy(19, head="class").to(device)
    sampler = Langevin(0.3, 0.5)
    done = advance(path, energy, x, sampler, 2, counters, telemetry=True)
    for y in range(CLASSES):
        alone = make_energy(19, head="class").classifier
        last = nn.Linear(alone[-1].in_features, 1)
        last.weight.data, last.bias.data = -alone[-1].weight.data[y : y + 1], -alone[-1].bias.data[y : y + 1]
        alone = nn.Sequential(*alone[:-1], last).to(device)
        bare = {k: v for k, v in counters.items() if k != "labels"}
        expected = advance(path, alone, x, sampler, 2, bare, telemetry=True)
        rows = counters["labels"] == y
        assert rows.any()
        torch.testing.assert_close(done.x[rows], expected.x[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(done.energy[rows], expected.energy[rows], rtol=1e-5, atol=1e-5)


@every_path
def test_an_energy_minus_itself_leaves_a_random_walk(device, path):
    body = network(19, [20, 11])
    x, counters = start(40, 19, device)
    sampler = Langevin(0.3, 0.5)
    done = advance(path, SumEnergy([body, body], [1.0, -1.0]).to(device), x, sampler, 3, counters, telemetry=True)
    _, b = sampler.coefficients(1, 1)
    for t in range(3):
        x = x + b.to(device) * normal(
            counters["seed"], Stream.LANGEVIN, counters["numbers"], counters["first_steps"] + t, 19
        )
    torch.testing.assert_close(done.x, x, rtol=0, atol=3e-5)
    assert largest(done.energy) < 1e-4
    assert largest(done.telemetry["grad_norm"]) < 1e-4


@every_path
def test_telemetry_by_hand(device, path):
    """A clip at 1 and bounds at 2 on E = 10 x: every step clips, and clamps from the fourth on."""
    body = network(1, [4])
    energy = SumEnergy([body, nn.Linear(1, 1)], [0.0, 1.0])
    with torch.no_grad():
        energy.energies[1].weight.fill_(-10.0)
    x, counters = start(3, 1, device)
    x.fill_(0.25)
    done = advance(
        path,
        energy.to(device),
        x,
        Langevin(1.0, 0.0, clamp=(-2.0, 2.0), grad_clip=1.0),
        8,
        counters,
        thin=1,
        telemetry=True,
    )
    norm, clipped, clamped = (v.tolist() for v in done.telemetry.values())
    assert norm == [10.0] * 3
    assert clipped == [1.0] * 3
    assert clamped == [5 / 8] * 3
    assert done.trajectory[0, :, 0].tolist() == [0.75, 1.25, 1.75, 2.0, 2.0, 2.0, 2.0, 2.0]


@seldom(PATHS, often=("reference", "torch", "resident"))
def test_a_trajectory_is_the_run_at_each_step(device, path):
    energy = make_energy(19, [9], head="class", terms=("gaussian",)).to(device)
    x, counters = begin(40, 19, device, classes=CLASSES, frozen="chains")
    schedule = torch.linspace(0.1, 0.5, 6)
    sampler = Langevin(schedule, 0.5, clamp=per_dim_bounds(19), grad_norm_clip=1.0)
    bare = advance(path, energy, x, sampler, 6, counters)
    assert bare.trajectory is None
    assert bare.telemetry is None
    whole = advance(path, energy, x, sampler, 6, counters, thin=1)
    assert whole.trajectory.shape == (40, 6, 19)
    for thin in (1, 2, 3, 6):
        done = advance(path, energy, x, sampler, 6, counters, thin=thin, telemetry=thin > 1)
        assert torch.equal(done.trajectory, whole.trajectory[:, thin - 1 :: thin])
        assert torch.equal(done.trajectory[:, -1], done.x)
        # a trajectory and telemetry change no bits
        assert torch.equal(done.x, bare.x)
        assert torch.equal(done.energy, bare.energy)
    for t in (1, 4):
        sampler = Langevin(schedule[:t], 0.5, clamp=per_dim_bounds(19), grad_norm_clip=1.0)
        assert torch.equal(advance(path, energy, x, sampler, t, counters).x, whole.trajectory[:, t - 1])


@every_path
@pytest.mark.parametrize("n_chains", [0, 6])
def test_no_steps_or_no_chains(device, path, n_chains):
    energy = make_energy(19, [9], head="class", terms=("gaussian", "linear")).to(device)
    x, counters = begin(n_chains, 19, device, classes=CLASSES, frozen="chains")
    for steps in (0, 2):
        done = advance(path, energy, x, Langevin(0.1, 0.1), steps, counters, thin=2, telemetry=True)
        assert done.trajectory.shape == (n_chains, steps // 2, 19)
        assert {v.shape for v in (done.energy, done.first_bad, *done.telemetry.values())} == {(n_chains,)}
        if steps == 0:
            assert torch.equal(done.x, x)
            assert (done.first_bad == -1).all()
            assert done.telemetry["grad_norm"].isnan().all()
            assert (done.telemetry["clipped"] == 0).all()
            assert (done.telemetry["clamped"] == 0).all()
            exact = Energy(energy, (19,), torch.float64)(x.double(), counters["labels"])
            torch.testing.assert_close(done.energy.double(), exact, rtol=1e-5, atol=1e-5)


@seldom(FAST_PATHS, often=("torch", "products", "resident"))
def test_bits_do_not_depend_on_the_batch(device, path):
    """Prefixes, the rest and a permutation of chains, each with its own label, frozen coordinates and step size."""
    energy = make_energy(19, [20, 11], head="class", terms=("classifier", "gaussian", "linear")).to(device)
    n = 130
    x, counters = begin(n, 19, device, classes=CLASSES, frozen="chains")

    def run(rows):
        sampler = Langevin(
            torch.linspace(0.1, 0.5, n)[:, None][rows], 0.7, clamp=per_dim_bounds(19), grad_clip=0.4, grad_norm_clip=1.0
        )
        own = {k: v if k == "seed" else v[rows] for k, v in counters.items()}
        return advance(path, energy, x[rows].contiguous(), sampler, 2, own, thin=1, telemetry=True)

    whole = run(slice(None))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    for rows in (slice(1), slice(1, None), slice(64), slice(65, 129), order):
        assert same_bits(run(rows), whole, rows)


@pytest.mark.parametrize("n_chains", [1, 200, 600])
def test_bits_do_not_depend_on_threads(n_chains):
    energy = make_energy(19, [20, 11], head="class", terms=("classifier", "gaussian", "linear"))
    x, counters = begin(n_chains, 19, classes=CLASSES, frozen="chains")
    sampler, before, done = (
        Langevin(0.3, 0.7, clamp=per_dim_bounds(19), grad_norm_clip=1.0),
        torch.get_num_threads(),
        [],
    )
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            done.append(advance("torch", energy, x, sampler, 3, counters, thin=3, telemetry=True))
    finally:
        torch.set_num_threads(before)
    assert same_bits(*done)
