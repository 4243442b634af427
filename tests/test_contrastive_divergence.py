"""Contrastive divergence: its terms by their formulas, where chains start, labels, processes, and its minimum."""

import copy
import math

import pytest
import torch
from torch import nn

from fastebm import MALA, ChainPool, ContrastiveDivergence, Langevin, MLPEnergy, Negative
from fastebm.rng import Stream, normal

SAMPLER = Langevin(0.1)


class Conditional(nn.Module):
    """E(x, y): the MLP of class y."""

    def __init__(self, n_classes=3, dim=2):
        super().__init__()
        self.energies = nn.ModuleList(MLPEnergy(dim, [4]) for _ in range(n_classes))

    def forward(self, x, labels):
        return torch.stack([e(x)[:, 0] for e in self.energies], dim=1).gather(1, labels[:, None])[:, 0]


class Quadratic(nn.Module):
    """E(x) = sum_d exp(log_precision_d) (x_d - mean_d)^2 / 2."""

    def __init__(self, dim=2):
        super().__init__()
        self.mean, self.log_precision = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return (self.log_precision.exp() * (x - self.mean).square()).sum(dim=1) / 2


@pytest.fixture
def energy(seeded):
    return MLPEnergy(3, [5, 4]).double()


@pytest.fixture
def batch(seeded):
    return torch.randn(6, 3).double()


def gradients(loss, energy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(energy.parameters()))])


def gradient_penalty(energy, real, samples):
    def mean(x):
        rows = [row.clone().requires_grad_() for row in x]
        slopes = [torch.autograd.grad(energy(row[None]).sum(), row, create_graph=True)[0] for row in rows]
        return torch.stack([slope.square().sum() for slope in slopes]).mean()

    return mean(real) + mean(samples)


def entropy(energy, real, samples):
    x = samples.clone().requires_grad_()
    y = x - 0.05 * torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]
    distances = [min((y[i] - y[j]).norm() for j in range(6) if j != i) for i in range(6)]
    fixed = copy.deepcopy(energy).requires_grad_(False)
    return fixed(y).mean() - 3 * torch.stack(distances).log().mean()


def pull_away(energy, real, samples):
    features = energy[:-1](samples)
    pairs = [(features[i], features[j]) for i in range(6) for j in range(6) if i != j]
    return torch.stack([torch.cosine_similarity(f, g, dim=0).square() for f, g in pairs]).mean()


@pytest.mark.parametrize("term", [gradient_penalty, entropy, pull_away])
def test_each_term_is_its_formula(energy, batch, term):
    objective = ContrastiveDivergence(SAMPLER, 2, reg_alpha=0.1, **{term.__name__: 0.5})
    loss, metrics, samples = objective(energy, batch)
    real, negative = energy(batch), energy(samples)
    expected = term(energy, batch, samples)
    whole = real.mean() - negative.mean() + 0.1 * (real.square().mean() + negative.square().mean()) + 0.5 * expected
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    assert metrics[term.__name__].item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradients(loss, energy), gradients(whole, energy), rtol=1e-10, atol=1e-12)
    assert not any(value.requires_grad for value in metrics.values())
    assert not samples.requires_grad


def test_several_terms_share_the_forward_pass(energy, batch):
    calls = []
    energy.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled() and energy.training))
    weights = {"gradient_penalty": 0.1, "entropy": 0.2, "pull_away": 0.3}
    ContrastiveDivergence(SAMPLER, 1, backend="reference", **weights)(energy, batch).loss.backward()
    assert calls.count(True) == 1  # the chains, and the energies with fixed weights, are in eval mode


def test_the_extra_step_has_the_samplers_clips_bounds_and_preconditioner(energy, batch):
    scale = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)
    schedule = torch.tensor([0.5, 0.1], dtype=torch.float64)
    sampler = Langevin(schedule, grad_clip=0.01, clamp=(-0.5, 0.5), preconditioner=scale)
    _, metrics, samples = ContrastiveDivergence(sampler, 2, entropy=1.0)(energy, batch)
    x = samples.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(x).sum(), x)
    y = (samples - 0.05 * scale * slope.clamp(-0.01, 0.01)).clamp(-0.5, 0.5)
    distances = torch.cdist(y, y).fill_diagonal_(math.inf).min(dim=1).values
    expected = energy(y).mean() - 3 * distances.log().mean()
    assert metrics["entropy"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_equal_samples_leave_the_entropy_finite(energy):
    still = ContrastiveDivergence(Langevin(0.1, 0.0), 0, entropy=1.0)
    loss = still(energy, torch.zeros(4, 3).double()).loss
    assert loss.isfinite()
    assert gradients(loss, energy).isfinite().all()
    assert still(energy, torch.zeros(1, 3).double()).loss.isfinite()  # no neighbour


def test_the_kl_term_has_no_gradient_on_average_if_samples_follow_the_model():
    """E = k |x|^2 / 2 in 2 dims, and its derivative with respect to k = 1, in units of the drift a.

    Since y = (1 - a k) x, the parts of the term have the derivatives -2 (1 - a) and 2 / (1 - a): in sum about 4 a.
    """
    n, drift, energy = 4000, 0.005, Quadratic().double()
    x = normal(3, Stream.OBJECTIVE, torch.arange(n), 0, 2, dtype=torch.float64)
    objective = ContrastiveDivergence(Langevin(2 * drift), 0, reg_alpha=0.0, entropy=1.0)
    (slope,) = torch.autograd.grad(objective(energy, x).loss, energy.log_precision)
    # the mean of n |x|^2 has the standard error 2 / sqrt(n)
    assert abs(slope.sum() / drift - 4 * drift) < 4.9 * 2 / math.sqrt(n)


def test_chains_from_noise_start_uniformly_on_the_bounds(energy):
    batch = torch.zeros(2000, 3).double()

    def starts(sampler, **options):
        return ContrastiveDivergence(sampler, 0, start="noise", seed=3, **options)(energy, batch).samples

    x = starts(SAMPLER, clamp=(-1.0, 3.0))
    assert x.dtype == torch.float64
    assert x.min() >= -1.0
    assert x.max() <= 3.0
    assert abs(x.mean() - 1.0) < 4.9 * 4 / math.sqrt(12 * x.numel())
    assert torch.equal(starts(Langevin(0.1, clamp=(-1.0, 3.0))), x)
    assert torch.equal(starts(SAMPLER), (x - 1.0) / 2)  # on [-1, 1]
    moved = ContrastiveDivergence(Langevin(9.0), 3, start="noise", clamp=(-1.0, 3.0))(energy, batch).samples
    assert moved.min() == -1.0  # chains stay within
    assert moved.max() == 3.0
    two = ContrastiveDivergence(SAMPLER, 0, start="noise")
    assert (two(energy, batch).samples != two(energy, batch).samples).all(dim=1).all()  # each call has new starts


@pytest.mark.parametrize("pooled", [False, True])
def test_negatives_have_the_labels_of_the_batch(seeded, pooled):
    energy, batch, labels = Conditional(), torch.randn(5, 2), torch.tensor([2, 0, 0, 1, 2])
    pool = ChainPool(30, 2, labels=torch.arange(30) % 3, seed=1) if pooled else None
    objective = ContrastiveDivergence(SAMPLER, 2, pool=pool, reg_alpha=0.0, entropy=0.1)
    loss, metrics, samples = objective(energy, batch, labels=labels)
    assert metrics["energy_samples"].item() == pytest.approx(energy(samples, labels).mean().item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in energy.parameters())
    if pooled:
        assert torch.equal(pool.labels[pool.last.chains], labels)
        with pytest.raises(ValueError, match="this pool has none"):
            ContrastiveDivergence(SAMPLER, 2, pool=ChainPool(9, 2))(energy, batch, labels=labels)


@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_it_runs_through_a_distributed_wrapper(energy, batch, tmp_path):
    """With the gradients of the bare energy. DistributedDataParallel raises if a weight is used in two passes."""
    import torch.distributed as dist

    options = {"gradient_penalty": 0.1, "entropy": 0.2, "pull_away": 0.3, "seed": 1}
    expected = gradients(ContrastiveDivergence(SAMPLER, 2, **options)(energy, batch).loss, energy)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(energy)
        ContrastiveDivergence(SAMPLER, 2, **options)(wrapped, batch).loss.backward()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    assert torch.allclose(torch.cat([p.grad.flatten() for p in energy.parameters()]), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "prior"}, 'start must be "data" or "noise"'),
        ({"pool": ChainPool(3, 2), "start": "noise"}, "a pool has its own init="),
        ({"pool": ChainPool(3, 2), "clamp": (-1, 1)}, "a pool has its own init="),
        ({"clamp": (1, 1)}, "lo < hi"),
        ({"reg_alpha": -1.0}, "reg_alpha must be finite and >= 0"),
        ({"gradient_penalty": math.nan}, "gradient_penalty must be"),
        ({"pull_away": -0.1}, "pull_away must be"),
        ({"entropy": math.inf}, "entropy must be"),
        ({"on_nonfinite": "drop"}, "on_nonfinite must be"),
        ({"steps": -1}, "steps must be >= 0"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ContrastiveDivergence(**{"sampler": SAMPLER, "steps": 2, **options})


def test_terms_that_do_not_fit_are_refused(batch):
    with pytest.raises(ValueError, match="entropy takes one more step of Langevin"):
        ContrastiveDivergence(MALA(0.1), 2, entropy=1.0)
    with pytest.raises(ValueError, match=r"last nn\.Linear"):
        ContrastiveDivergence(SAMPLER, 2, pull_away=1.0)(Negative(Quadratic(3)), batch)
    with pytest.raises(TypeError, match="the sampler must be"):
        ContrastiveDivergence(0.1, 2)


@pytest.mark.slow
def test_the_minimum_is_the_law_of_the_data():
    """A Gaussian: mean and precision are the data's own, whatever the number of steps, thanks to the accept test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = torch.tensor([1.0, -0.5]) + torch.tensor([0.5, 1.5]) * torch.randn(2000, 2)
    energy = Quadratic()
    objective = ContrastiveDivergence(MALA(0.3), 10, pool=ChainPool(2000, 2, init=data, seed=0), reg_alpha=0.0, seed=0)
    optimizer = torch.optim.Adam(energy.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=600)
    for _ in range(600):
        optimizer.zero_grad()
        objective(energy, data).loss.backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(energy.mean, data.mean(0), atol=0.05)
    assert torch.allclose(energy.log_precision, -2 * data.std(0).log(), atol=0.1)
