"""InfoNCE: the cross-entropy of the similarities of two views."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from fastebm import InfoNCE, MLPEnergy, PairEnergy, RandomAffine

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


def test_a_tie_is_not_found(batch):
    collapsed = PairEnergy(nn.Sequential(nn.Linear(3, 4), nn.Threshold(1e9, 1.0))).double()
    assert InfoNCE(seed=1)(collapsed, batch).metrics["accuracy"] == 0


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

    found = InfoNCE(augment=augment, noise_std=0.0, seed=1)(energy, batch)
    assert len(seen) == 2
    assert not torch.isin(seen[0], seen[1]).any()
    expected = energy(batch.flip(1), batch).mean()
    assert found.metrics["energy_real"].item() == pytest.approx(expected.item())


class Fixed:
    """Draws whose uniform numbers are these, the same for each row."""

    def __init__(self, *numbers):
        self.numbers = torch.tensor(numbers)

    def uniform(self, copies):
        assert copies == len(self.numbers)
        return self.numbers.expand(2, -1)


STILL = {"degrees": 0.0, "stretch": 0.0, "shear": 0.0, "shift": 0.0}


def test_affine_views_of_images(seeded):
    images = torch.rand(2, 3, 5, 5)

    def view(numbers, **options):
        return RandomAffine((3, 5, 5), **{**STILL, **options})(images, Fixed(*numbers))

    middle, end = [0.5] * 6, [1.0] * 6
    torch.testing.assert_close(view(middle, degrees=90.0, stretch=0.5, shear=1.0, shift=2.0), images)
    torch.testing.assert_close(view(end), images)
    torch.testing.assert_close(view(end, degrees=90.0), images.rot90(1, (2, 3)))
    torch.testing.assert_close(view(end, shift=1.0)[:, :, :4, :4], images[:, :, 1:, 1:])
    assert view(end, shift=1.0)[:, :, 4].abs().max() < 1e-6
    torch.testing.assert_close(view(end, stretch=1.0)[:, :, 2, 1:4], images[:, :, 2, ::2])
    # the row below the centre comes from one pixel further right
    torch.testing.assert_close(view(end, shear=1.0)[:, :, 3, :4], images[:, :, 3, 1:])


def test_an_image_that_is_not_square_is_turned_by_its_pixels(seeded):
    images = torch.rand(2, 2, 5, 3)
    turned = RandomAffine((2, 5, 3), **{**STILL, "degrees": 90.0})(images, Fixed(*[1.0] * 6))
    torch.testing.assert_close(turned[:, :, 1:4], images[:, :, 1:4].rot90(1, (2, 3)))


def test_affine_views_depend_on_the_row_alone(seeded):
    images, augment = torch.rand(6, 20), RandomAffine((5, 4))
    whole = augment(images, InfoNCE(seed=1).draws(images))
    assert whole.shape == images.shape
    assert not torch.isclose(whole, images).all(dim=1).any()
    assert torch.equal(augment(images[4:], InfoNCE(seed=1).draws(images[4:], 4)), whole[4:])
    assert augment(images[:0], InfoNCE(seed=1).draws(images[:0])).shape == (0, 20)


def test_a_saved_objective_goes_on(energy, batch):
    objective, resumed = InfoNCE(seed=1), InfoNCE(seed=2)
    first = objective(energy, batch).loss
    resumed.load_state_dict(objective.state_dict())
    second = objective(energy, batch).loss
    assert torch.equal(second, resumed(energy, batch).loss)
    assert not torch.equal(first, second)


def test_bad_input_is_refused(energy, batch):
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        InfoNCE()(energy, batch[:1])
    with pytest.raises(TypeError, match="trains a PairEnergy, got MLPEnergy"):
        InfoNCE()(MLPEnergy(3), batch.float())
    with pytest.raises(ValueError, match=r"noise_std must be finite and >= 0, got -1\.0"):
        InfoNCE(noise_std=-1.0)
    with pytest.raises(ValueError, match=r"\(height, width\) or \(channels, height, width\), got \(64,\)"):
        RandomAffine((64,))
    with pytest.raises(ValueError, match=r"shear must be finite and >= 0, got -0\.1"):
        RandomAffine((8, 8), shear=-0.1)
