"""Energies of images, classes, noise levels and pairs: formulas by hand, shapes, gradients, sampling, and errors."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastebm import (
    MALA,
    ClassConditionalEnergy,
    ClassifierEnergy,
    ConvEnergy,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    MultiLevelDenoisingScoreMatching,
    NoiseConditionalEnergy,
    PairEnergy,
    ResNetEnergy,
    energy,
    sample,
    why_not_fused,
)
from fastebm.data.toys import TOYS
from fastebm.energies import shape_of
from fastebm.energies.noise_conditional import variance_preserving
from fastebm.targets.mlp import read_mlp

pytestmark = pytest.mark.usefixtures("seeded")

SHAPE, DIM, N = (2, 5, 4), 40, 3
LABELS = torch.tensor([0, 2, 1])
SIGMAS = torch.tensor([0.1, 1.0, 7.0])

# name: (a small energy, what forward takes besides x)
MODELS = {
    "conv": (lambda: ConvEnergy(SHAPE, (4, 6)), {}),
    "conv, spectral norm": (lambda: ConvEnergy(SHAPE, (4,), "tanh", spectral_norm=True), {}),
    "conv, condition": (
        lambda: ConvEnergy(SHAPE, (4, 6), condition_size=2),
        {"condition": torch.arange(6.0).view(N, 2)},
    ),
    "resnet": (lambda: ResNetEnergy(SHAPE, (4, 6)), {}),
    "resnet, norms": (lambda: ResNetEnergy(SHAPE, (4, 4), spectral_norm=True, groups=2, downsample=False), {}),
    "classifier": (lambda: ClassifierEnergy(ConvEnergy(SHAPE, (4,), outputs=3)), {"labels": LABELS}),
    "classes": (lambda: ClassConditionalEnergy(ResNetEnergy(SHAPE, (4,), outputs=5), 3), {"labels": LABELS}),
    "classes, no label": (lambda: ClassConditionalEnergy(MLPEnergy(DIM, (8,), outputs=5), 3), {}),
    "noise": (
        lambda: NoiseConditionalEnergy(ConvEnergy(SHAPE, (4,), outputs=DIM, condition_size=5)),
        {"condition": SIGMAS},
    ),
    "noise, MLP": (lambda: NoiseConditionalEnergy(MLPEnergy(DIM + 5, (8,), outputs=DIM)), {"condition": SIGMAS}),
    "pair": (
        lambda: PairEnergy(ConvEnergy(SHAPE, (4,), outputs=5)),
        {"condition": torch.arange(N * DIM).view(N, DIM).sin()},
    ),
}
every_model = pytest.mark.parametrize(("make", "given"), MODELS.values(), ids=MODELS)


def in_double(given):
    return {name: v.double() if v.is_floating_point() else v for name, v in given.items()}


# -- what all have ---------------------------------------------------------------------------------------------------


@every_model
def test_shapes_and_dtypes(make, given):
    model, x = make().eval(), torch.randn(N, DIM)
    values = energy(model, x, **given)
    assert values.shape == (N,)
    double = energy(copy.deepcopy(model).double(), x.double(), **in_double(given))
    assert double.dtype == torch.float64
    torch.testing.assert_close(values, double.float(), rtol=1e-4, atol=1e-5)
    none = {name: v[:0] for name, v in given.items()}
    assert energy(model, x[:0], **none).shape == (0,)


@every_model
def test_first_and_second_derivatives(make, given):
    """Score matching differentiates the gradient once more."""
    model, x = make().eval().double(), torch.randn(N, DIM, dtype=torch.float64, requires_grad=True)
    given = in_double(given)

    def f(x):
        return energy(model, x, **given)

    assert torch.autograd.gradcheck(f, x)
    direction = torch.randn_like(x)

    def along(s):
        y = x.detach() + s * direction
        return torch.autograd.grad(f(y).sum(), y, create_graph=True)[0].mul(direction).sum(1)

    assert torch.autograd.gradcheck(along, torch.zeros((), dtype=torch.float64, requires_grad=True))


@every_model
@pytest.mark.parametrize("sampler", [Langevin(0.01), MALA(0.01)], ids=["Langevin", "MALA"])
def test_sampling_agrees_with_the_reference_and_changes_nothing(make, given, sampler):
    model, start = make(), torch.rand(N, DIM)
    kept = copy.deepcopy(model.state_dict())
    options = {"init": start, "steps": 5, "seed": 3, **given}
    expected = sample(model, sampler, backend="reference", **options)
    for backend in ("auto", "torch"):
        found = sample(model, sampler, backend=backend, **options)
        torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.energies, expected.energies, rtol=1e-3, atol=1e-3)
    assert not torch.equal(expected.x, start)
    assert all(torch.equal(v, kept[name]) for name, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


OF_ROWS = ("classes, no label", "noise, MLP")  # MLPs, which take flat rows only


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OF_ROWS])
def test_flat_rows_and_images_are_the_same_states(name):
    make, given = MODELS[name]
    model, x = make().eval(), torch.rand(N, DIM)
    images = {key: v.view(N, *SHAPE) if v.numel() == x.numel() else v for key, v in given.items()}
    assert torch.equal(energy(model, x.view(N, *SHAPE), **images), energy(model, x, **given))
    assert sample(model, Langevin(0.01), n_chains=N, steps=1, **images).x.shape == (N, *SHAPE)


def test_the_shape_of_a_state():
    assert shape_of(nn.Sequential(ConvEnergy((8, 8), outputs=4), nn.Linear(4, 1))) == (8, 8)
    assert shape_of(MLPEnergy(3)) is None
    assert shape_of(nn.Sequential()) is None


# -- images ----------------------------------------------------------------------------------------------------------


def test_conv_by_hand():
    model, x, c = ConvEnergy((5, 4), (3, 6), condition_size=2, outputs=7), torch.randn(N, 20), torch.randn(N, 2)
    h = x.view(N, 1, 5, 4)
    for conv, shift in zip(model.convs, model.shifts, strict=True):
        h = F.conv2d(h, conv.weight, conv.bias, stride=2, padding=1) + F.linear(
            c, shift.linear.weight, shift.linear.bias
        ).view(N, -1, 1, 1)
        h = h * torch.sigmoid(h)
    assert h.shape == (N, 6, 2, 1)
    torch.testing.assert_close(model(x, c), F.linear(h.flatten(1), model.head.weight, model.head.bias))


@pytest.mark.parametrize("downsample", [True, False])
def test_resnet_by_hand(downsample):
    model = ResNetEnergy((5, 4), (4, 6), "relu", groups=2, downsample=downsample)
    x = torch.randn(N, 20)
    stride = 2 if downsample else 1
    h = F.conv2d(x.view(N, 1, 5, 4), model.stem.weight, model.stem.bias, stride=stride, padding=1)
    for i, block in enumerate(model.blocks):
        normed = F.group_norm(h, 2, block.first_norm.weight, block.first_norm.bias).relu()
        inner = F.conv2d(normed, block.first.weight, block.first.bias, stride=stride if i else 1, padding=1)
        inner = F.group_norm(inner, 2, block.second_norm.weight, block.second_norm.bias).relu()
        if i == 1:
            h = F.avg_pool2d(h, 2, ceil_mode=True) if downsample else h
            h = F.conv2d(h, block.skip[-1].weight, block.skip[-1].bias)
        h = h + F.conv2d(inner, block.second.weight, block.second.bias, padding=1)
    assert h.shape == ((N, 6, 2, 1) if downsample else (N, 6, 5, 4))
    h = F.group_norm(h, 2, model.norm.weight, model.norm.bias).relu().sum((2, 3))
    torch.testing.assert_close(model(x), F.linear(h, model.head.weight, model.head.bias))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (28, 28), (3, 7, 9)])
@pytest.mark.parametrize("make", [ConvEnergy, ResNetEnergy])
def test_any_size_of_image(make, size):
    model, x = make(size, (4, 4, 4)), torch.randn(2, *size)
    assert model(x).shape == (2, 1)
    assert torch.equal(model(x.view(2, -1, *size[-2:])), model(x))


@pytest.mark.parametrize("make", [ConvEnergy, ResNetEnergy])
def test_spectral_norm_gives_every_layer_a_norm_of_one(make):
    model = make((8, 8), (6, 10), spectral_norm=True)
    with torch.no_grad():
        for _ in range(300):  # one power iteration per forward pass
            model(torch.randn(1, 64))
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(layers) == (3 if make is ConvEnergy else 7)
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=1e-3)


def test_group_norm_makes_blocks_independent_of_the_scale_of_x():
    model, x = ResNetEnergy((8, 8), (4,), groups=2).double(), torch.randn(2, 64, dtype=torch.float64)
    with torch.no_grad():
        model.stem.bias.zero_()
    block = model.blocks[0]
    h = model.stem(model.images(x))
    grown = block(1e3 * h, None) - block.skip(1e3 * h)
    torch.testing.assert_close(grown, block(h, None) - block.skip(h), rtol=1e-3, atol=1e-3)


def test_why_images_are_not_fused():
    for model in (ConvEnergy((8, 8)), ClassifierEnergy(ResNetEnergy((8, 8), outputs=3))):
        why = why_not_fused(model)
        assert "Energy) is neither nn.Linear nor a supported activation" in why
        assert "autograd's gradient runs instead" in why


def test_the_memory_format_changes_no_value():
    for model in (ConvEnergy((8, 8)), ResNetEnergy((8, 8), spectral_norm=True)):
        model, x = model.eval(), torch.rand(N, 64)
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(other(x), model(x))


# -- classes ---------------------------------------------------------------------------------------------------------


def test_an_mlp_of_several_outputs_keeps_its_closed_form():
    model = ClassifierEnergy(MLPEnergy(6, (8, 7), outputs=3))
    x = torch.randn(N, 6)
    logits = model.classifier(x)
    assert logits.shape == (N, 3)
    torch.testing.assert_close(model(x), -logits.exp().sum(1).log())
    assert sample(model, Langevin(0.1), init=x, steps=1, backend="torch").info.path == "tiles"
    with pytest.raises(ValueError, match="several numbers per state; sum them, or, of a classifier, use Classifier"):
        energy(model.classifier, x)


def test_class_conditional_by_hand():
    model, x = ClassConditionalEnergy(MLPEnergy(6, (8,), outputs=5), 3), torch.randn(N, 6)
    f, head = model.classifier[0](x), model.classifier[1]
    by_class = torch.stack(
        [-(f @ (head.shared.weight[0] + head.classes.weight[y])) - head.classes.bias[y] for y in range(3)], dim=1
    )
    torch.testing.assert_close(model(x, LABELS), by_class[torch.arange(N), LABELS])
    torch.testing.assert_close(model(x), -(-by_class).exp().sum(1).log())


@pytest.mark.parametrize("labels", [None, LABELS])
def test_class_conditional_mlps_have_their_closed_form(labels):
    model, x = ClassConditionalEnergy(MLPEnergy(6, (8,), outputs=5), 3), torch.randn(N, 6)
    options = {"init": x, "steps": 4, "seed": 1, "labels": labels}
    expected = sample(model, Langevin(0.1), backend="reference", **options)
    found = sample(model, Langevin(0.1), **options)
    assert found.info.path == "tiles"
    torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
    mlp = read_mlp(model.classifier, "class")
    torch.testing.assert_close(mlp.output(x), model.classifier(x).detach())
    model.classifier[1].classes.register_forward_hook(lambda *_: None)
    assert "forward hook" in why_not_fused(model)


# -- noise levels ----------------------------------------------------------------------------------------------------


def test_noise_conditional_by_hand():
    sd = 0.7
    network = MLPEnergy(4 + 3, (8,), outputs=4).double()
    model = NoiseConditionalEnergy(network, sd, n_frequencies=1)
    x, sigma = torch.randn(N, 4, dtype=torch.float64), SIGMAS.double()
    s, u = sigma[:, None], sigma[:, None].log() / 4
    f = network(torch.cat([x / (s**2 + sd**2).sqrt(), u, u.sin(), u.cos()], dim=1))
    denoised = sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2).sqrt() * f
    expected = (x - denoised).square().sum(1) / (2 * sigma**2)
    torch.testing.assert_close(model(x, sigma), expected)
    torch.testing.assert_close(model(x, sigma[:, None]), expected)


def test_the_condition_of_images_shifts_their_channels():
    model = NoiseConditionalEnergy(ConvEnergy((8, 8), (4,), outputs=64, condition_size=5))
    x = torch.rand(1, 64).expand(N, 64)
    assert len(set(model(x, SIGMAS).tolist())) == N
    inputs = []
    model.network.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs["condition"]), with_kwargs=True
    )
    model(x, SIGMAS)
    assert inputs[0].shape == (N, model.n_features)


def test_far_from_the_data_the_score_is_that_of_the_noise():
    """At sigma much larger than the data, sigma^2 dE/dx = x up to the network's part, which is bounded by sd."""
    model, x = NoiseConditionalEnergy(MLPEnergy(7, (8,), outputs=2)), 1e3 * torch.randn(50, 2)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, torch.full((50,), 1e3)).sum(), x)
    torch.testing.assert_close(1e6 * gradient, x.detach(), rtol=0, atol=20.0)


def test_a_variance_preserving_energy_is_that_of_the_scaled_state():
    network = MLPEnergy(7, (8,), outputs=2).double()
    model, scaled = NoiseConditionalEnergy(network, betas=(0.1, 20.0)), NoiseConditionalEnergy(network)
    x, t = torch.randn(N, 2, dtype=torch.float64), torch.tensor([1e-3, 0.4, 1.0], dtype=torch.float64)
    # the integral of beta from 0 to t, by the trapezoidal rule, which is exact for a linear beta
    alpha = torch.exp(-(0.1 + 0.1 + 19.9 * t) * t / 4)
    sigma = (1 - alpha**2).sqrt()
    found = variance_preserving(t, (0.1, 20.0))
    torch.testing.assert_close(found[0], alpha)
    torch.testing.assert_close(found[1], sigma)
    torch.testing.assert_close(model(x, t), scaled(x / alpha[:, None], sigma / alpha))


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_by_hand():
    model = PairEnergy(MLPEnergy(6, (8,), outputs=5), temperature=0.2)
    x, y = torch.randn(N, 6), torch.randn(N, 6)
    torch.testing.assert_close(model(x, y), -F.cosine_similarity(model.encoder(x), model.encoder(y)) / 0.2)
    torch.testing.assert_close(model.features(x).norm(dim=1), torch.ones(N))
    torch.testing.assert_close(model(x, x), torch.full((N,), -5.0))
    assert torch.equal(energy(model, x, condition=y), model(x, y))


# -- bad input -------------------------------------------------------------------------------------------------------

ROWS = torch.randn(N, 6)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ConvEnergy(64), TypeError, "shape must be ints, as in .*, got 64"),
        (lambda: ConvEnergy((64,)), ValueError, r"shape must be \(height, width\) or .*, got \(64,\)"),
        (lambda: ConvEnergy((8, 0)), ValueError, r"shape must be one or more ints >= 1, got \[8, 0\]"),
        (lambda: ConvEnergy((8, 8), ()), ValueError, r"channels must be one or more ints >= 1, got \[\]"),
        (lambda: ConvEnergy((8, 8), "32"), TypeError, "channels must be ints"),
        (lambda: ConvEnergy((8, 8), (True,)), ValueError, "channels must be one or more ints"),
        (lambda: ConvEnergy((8, 8), activation="mish"), ValueError, "activation must be one of silu, .*, got 'mish'"),
        (lambda: ConvEnergy((8, 8), spectral_norm=1), TypeError, "spectral_norm must be True or False, got 1"),
        (lambda: ConvEnergy((8, 8), outputs=0), ValueError, "outputs must be >= 1, got 0"),
        (lambda: ConvEnergy((8, 8), condition_size=-1), ValueError, "condition_size must be >= 0, got -1"),
        (lambda: ResNetEnergy((8, 8), (4, 6), groups=4), ValueError, r"groups must divide .* \(4, 6\), got 4, and 6"),
        (lambda: ResNetEnergy((8, 8), downsample=2), TypeError, "downsample must be True or False, got 2"),
        (lambda: MLPEnergy(2, outputs=0), ValueError, "outputs must be >= 1, got 0"),
        (lambda: ClassConditionalEnergy(nn.Flatten(), 3), ValueError, "pass feature_size="),
        (lambda: ClassConditionalEnergy(MLPEnergy(2), 1), ValueError, "n_classes must be >= 2, got 1"),
        (lambda: PairEnergy(MLPEnergy(2), 0.0), ValueError, "temperature must be a finite number > 0, got 0.0"),
        (lambda: PairEnergy(MLPEnergy(2), "1"), TypeError, "temperature must be a number > 0, got '1'"),
        (lambda: NoiseConditionalEnergy(MLPEnergy(2), -1.0), ValueError, "sigma_data must be .* > 0, got -1.0"),
        (lambda: NoiseConditionalEnergy(MLPEnergy(2), betas=(1.0,)), ValueError, "betas must be .*, got"),
        (lambda: NoiseConditionalEnergy(MLPEnergy(2), betas=(2.0, 1.0)), ValueError, "with 0 < beta_min <= beta_max"),
        (lambda: NoiseConditionalEnergy(MLPEnergy(2), n_frequencies=-1), ValueError, "n_frequencies must be >= 0"),
    ],
)  # fmt: skip
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ConvEnergy((2, 3))(torch.zeros(4, 5)), r"states \(n, 6\) or \(n, 1, 2, 3\), got \(4, 5\): build it"),
        (lambda: ConvEnergy((2, 3))(torch.zeros(4, 3, 2)), r"takes states \(n, 6\) or \(n, 1, 2, 3\), got \(4, 3, 2\)"),
        (lambda: ConvEnergy((2, 3), condition_size=2)(ROWS), r"condition must be \(3, 2\) .* numbers, got None"),
        (
            lambda: energy(ConvEnergy((2, 3), condition_size=2), ROWS, condition=torch.ones(N, 1)),
            r"condition must be \(3, 2\) floating-point numbers, got \(3, 1\) torch.float32",
        ),
        (lambda: energy(ConvEnergy((2, 3)), ROWS, condition=ROWS), "ConvEnergy.forward takes x only"),
        (
            lambda: energy(ClassConditionalEnergy(MLPEnergy(6), 3), ROWS, labels=torch.ones(N)),
            r"takes labels \(batch,\), integers, got \(3,\) torch.float32",
        ),
        (
            lambda: sample(
                ClassConditionalEnergy(MLPEnergy(6), 3), Langevin(0.1), init=ROWS, steps=1, labels=LABELS + 1
            ),
            r"labels must be in \[0, 3\), the energy's classes, got values from 1 to 3",
        ),
        (lambda: PairEnergy(MLPEnergy(6))(ROWS, ROWS[:2]), r"one partner of the states' shape \(3, 6\) .*, got \(2, 6"),
        (lambda: PairEnergy(GaussianEnergy())(ROWS, ROWS), r"an encoder must return features \(3, feature_size\), got"),
        (
            lambda: NoiseConditionalEnergy(MLPEnergy(11, outputs=6))(ROWS, torch.tensor(0.1)),
            r"condition must be \(3,\) noise levels, one per state, got \(\) .*: one level for all is torch.full",
        ),
        (
            lambda: NoiseConditionalEnergy(MLPEnergy(11))(ROWS, SIGMAS),
            r"must return one number per dim, \(3, 6\), got \(3, 1\): build it with outputs=6",
        ),
        (
            lambda: NoiseConditionalEnergy(MLPEnergy(6, outputs=6))(ROWS, SIGMAS),
            r"does not take states and features of the noise level, \(3, 11\): build it for 6 \+ 5 inputs",
        ),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.slow
def test_denoising_score_matching_learns_two_moons():
    """The excess of the loss over its least value, that of the true score, falls below a tenth of that of the start.

    Measured: from 0.394 to 0.026.
    """
    rng = torch.Generator().manual_seed(1)
    draw = TOYS["moons"][1]
    data, reference = (torch.tensor(draw(n, np.random.default_rng(n)), dtype=torch.float32) for n in (20_000, 20_001))
    model = NoiseConditionalEnergy(MLPEnergy(7, (128, 128), outputs=2), 0.7)

    def excess(model):
        total = 0.0
        for sigma in (0.1, 0.5, 2.0):
            x = reference[:500] + sigma * torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
            weights = torch.softmax(-torch.cdist(x, data).square() / (2 * sigma**2), dim=1)
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(energy(model, x, condition=torch.full((500,), sigma)).sum(), x)
            true = (x.detach() - weights @ data) / sigma**2
            total += float((sigma * (gradient - true)).square().sum(1).mean()) / 3
        return total

    before = excess(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    objective = MultiLevelDenoisingScoreMatching(torch.logspace(math.log10(5), math.log10(0.05), 30), seed=0)
    for _ in range(3000):
        loss = objective(model, data[torch.randint(len(data), (256,), generator=rng)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    after = excess(model)
    assert after < before / 10
