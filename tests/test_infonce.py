"""InfoNCE: the cross-entropy of the similarities of two views."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from fastebm import InfoNCE, MLPEnergy, PairEnergy

TEMPERATURE = 0.3


@pytest.fixture
def energy(seeded):
    return PairEnergy(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), TEMPERATURE).double()


@pytest.fixture
def batch(seeded):
    return torch.randn(6, 3, dtype=torch.float64)


def views(batch, noise_std, seed, first_row=0):
    draws = InfoNCE(seed=seed).draws(batch, first_row)
    return batch + noise_std * draws.normal(), batch + noise_std * draws.normal()


def test_the_loss_is_the_cross_entropy_of_the_similarities(energy, batch):
    passes = []
    energy.register_forward_hook(lambda *_: passes.append(1))
    found = InfoNCE(noise_std=0.5, seed=1)(energy, batch)
    a, b = (torch.nn.functional.normalize(energy.encoder(x)) for x in views(batch, 0.5, 1))
    similarities = a @ b.T / TEMPERATURE
    expected = cross_entropy(similarities, torch.arange(6))
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    parameters = list(energy.parameters())
    for x, y in zip(*(torch.autograd.grad(loss, parameters) for loss in (found.loss, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    assert found.samples is None
    assert passes == [1]  # of the module itself, as DistributedDataParallel needs
    assert found.metrics["accuracy"].item() == pytest.approx(
        (similarities.argmax(1) == torch.arange(6)).double().mean()
    )
    diagonal = similarities.diagonal()
    assert found.metrics["energy_real"].item() == pytest.approx(-diagonal.mean().item())
    assert found.metrics["energy_samples"].item() == pytest.approx((diagonal.sum() - similarities.sum()).item() / 30)
    assert not any(value.requires_grad for value in found.metrics.values())


def test_parts_are_contrasted_among_themselves(energy, batch):
    losses, expected = 0.0, 0.0
    for first, last in ((0, 2), (2, 2), (2, 6)):
        part = batch[first:last]
        losses += InfoNCE(noise_std=0.5, seed=1)(energy, part, batch_size=6, first_row=first).loss.item()
        a, b = (energy.encoder(x) for x in views(part, 0.5, 1, first))
        similarities = cosine_similarity(a[:, None], b[None], dim=2) / TEMPERATURE
        expected += cross_entropy(similarities, torch.arange(last - first), reduction="sum").item() / 6
    assert losses == pytest.approx(expected, rel=1e-12)


def test_views_of_the_user(energy, batch):
    seen = []

    def augment(x, draws):
        seen.append(draws.uniform())
        return x.flip(1) if len(seen) == 1 else x

    found = InfoNCE(augment=augment, seed=1)(energy, batch)
    assert len(seen) == 2
    assert not torch.isin(seen[0], seen[1]).any()
    expected = energy(batch.flip(1), batch).mean()
    assert found.metrics["energy_real"].item() == pytest.approx(expected.item())


def test_a_saved_objective_goes_on(energy, batch):
    objective, resumed = InfoNCE(seed=1), InfoNCE(seed=2)
    first = objective(energy, batch).loss
    resumed.load_state_dict(objective.state_dict())
    second = objective(energy, batch).loss
    assert torch.equal(second, resumed(energy, batch).loss)
    assert not torch.equal(first, second)


def test_bad_input_is_refused(batch):
    with pytest.raises(TypeError, match="trains a PairEnergy, got MLPEnergy"):
        InfoNCE()(MLPEnergy(3), batch.float())
    with pytest.raises(ValueError, match=r"noise_std must be finite and >= 0, got -1\.0"):
        InfoNCE(noise_std=-1.0)
