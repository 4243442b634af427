"""JEM: its formula, one forward pass, class-conditional chains, and what it learns."""

import pytest
import torch
from torch import nn

from fastebm import JEM, ChainPool, ClassifierEnergy, Langevin, MLPEnergy

SAMPLER = Langevin(0.1)


@pytest.fixture
def energy(seeded):
    return ClassifierEnergy(nn.Sequential(nn.Linear(2, 5), nn.SiLU(), nn.Linear(5, 3))).double()


@pytest.fixture
def batch(seeded):
    return torch.randn(6, 2).double()


LABELS = torch.tensor([2, 0, 0, 1, 2, 1])


def test_the_loss_is_its_formula(energy, batch):
    loss, metrics, samples = JEM(SAMPLER, 3, weight=0.3, reg_alpha=0.1)(energy, batch, labels=LABELS)

    def log_sum_exp(x):
        return energy.classifier(x).exp().sum(dim=1).log()

    logits = energy.classifier(batch)
    nll = torch.stack([log_sum_exp(batch)[i] - logits[i, y] for i, y in enumerate(LABELS)]).mean()
    real, negative = -log_sum_exp(batch), -log_sum_exp(samples)
    expected = nll + 0.3 * (real.mean() - negative.mean() + 0.1 * (real.square().mean() + negative.square().mean()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["cross_entropy"].item() == pytest.approx(nll.item(), rel=1e-12)
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(1) == LABELS).double().mean().item())
    assert metrics["energy_real"].item() == pytest.approx(real.mean().item())
    assert metrics["energy_samples"].item() == pytest.approx(negative.mean().item())
    for found, wanted in zip(
        *(torch.autograd.grad(v, list(energy.parameters())) for v in (loss, expected)), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-13)


def test_one_forward_pass(energy, batch):
    calls = []
    energy.classifier.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled() and energy.training))
    JEM(SAMPLER, 2, backend="reference")(energy, batch, labels=LABELS)
    assert calls.count(True) == 1  # chains move in eval mode


def test_a_pool_with_labels_has_class_conditional_chains(energy, batch):
    energy, batch = energy.float(), batch.float()
    pools = [ChainPool(30, 2, labels=labels, seed=1) for labels in (torch.arange(30) % 3, None)]
    for pool in pools:
        JEM(SAMPLER, 2, pool=pool)(energy, batch, labels=LABELS)
    conditional, plain = pools
    assert torch.equal(conditional.last.labels, LABELS)
    rows = conditional.last.chains
    assert torch.allclose(conditional.energies[rows], energy(conditional.states[rows], LABELS))
    rows = plain.last.chains
    assert torch.allclose(plain.energies[rows], energy(plain.states[rows]))


def test_bad_input_is_refused(energy, batch):
    with pytest.raises(ValueError, match="pass labels="):
        JEM(SAMPLER, 2)(energy, batch)
    for labels in (torch.full((6,), -100), LABELS + 1):  # -100 is left out of torch's cross-entropy
        pool = ChainPool(9, 2)
        with pytest.raises(ValueError, match="labels of 3 classes must be 0 to 2, got"):
            JEM(SAMPLER, 2, pool=pool)(energy, batch, labels=labels)
        assert pool.draws == 0
    with pytest.raises(TypeError, match="wrap it, as ClassifierEnergy"):
        JEM(SAMPLER, 2)(MLPEnergy(2, [3]), batch, labels=LABELS)
    with pytest.raises(ValueError, match="weight must be"):
        JEM(SAMPLER, 2, weight=-1.0)


def test_it_learns_the_classes_and_the_density():
    """Two Gaussian classes. Logits log p(x, y), with free means, have their minimum at the data's own means."""

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.means = nn.Parameter(torch.tensor([[-0.3], [0.3]]))

        def forward(self, x):
            return -(x - self.means.T).square() / 2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labels = torch.arange(1000) % 2
        data = torch.tensor([[-2.0], [1.0]])[labels] + torch.randn(1000, 1)
    energy = ClassifierEnergy(Logits())
    objective = JEM(Langevin(0.2), 5, pool=ChainPool(1000, 1, init=data, reinit_prob=0.0, seed=0), weight=1.0)
    optimizer = torch.optim.Adam(energy.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss, metrics, _ = objective(energy, data, labels=labels)
        loss.backward()
        optimizer.step()
    # The standard error of each class mean is 0.045, and the chains' means move with lag.
    assert torch.allclose(energy.classifier.means.detach(), torch.tensor([[-2.0], [1.0]]), atol=0.25)
    assert metrics["accuracy"] > 0.9  # the best possible is Phi(1.5) = 0.933
