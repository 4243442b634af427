"""Classifiers, Gaussians and sums: what they compute as modules, and what is read out of them for the fast paths."""

import itertools
import math

import pytest
import torch
from torch import nn

from fastebm import ClassifierEnergy, GaussianEnergy, MLPEnergy, SumEnergy, energy, langevin_sample, why_not_fused
from fastebm.energies import n_classes, takes_condition
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe
from fastebm.targets.mlp import NotAnMLP

DIM, CLASSES = 3, 4


pytestmark = pytest.mark.usefixtures("seeded")


def mlp(dim=DIM):
    return MLPEnergy(dim, (9, 8), "tanh")


def logits(dim=DIM, classes=CLASSES):
    return nn.Sequential(nn.Linear(dim, 7), nn.SiLU(), nn.Linear(7, classes))


def classifier(dim=DIM, classes=CLASSES):
    return ClassifierEnergy(logits(dim, classes))


def gaussian():
    return GaussianEnergy(torch.tensor([1.0, -0.5, 0.2]), torch.tensor([0.5, 1.5, 2.0]))


def everything():
    """Nested sums with every kind of term, two Gaussians that do not share a mean, and biases of both kinds."""
    inner = SumEnergy([classifier(), GaussianEnergy(0.3, 2.0), nn.Linear(DIM, 1, bias=False)], [0.7, -0.25, 2.0])
    return SumEnergy([gaussian(), mlp(), inner, nn.Linear(DIM, 1), logits_as_energy()], [1.1, -0.5, 3.0, 0.4, 0.9])


def logits_as_energy():
    return nn.Sequential(nn.Flatten(), nn.Linear(DIM, 5, bias=False), nn.Softplus(1.5), nn.Linear(5, 1))


ENERGIES = {
    "mlp": mlp,
    "classifier": classifier,
    "one class": lambda: classifier(classes=1),
    "sum": everything,
    "sum of one": lambda: SumEnergy([mlp()]),
    "linear first": lambda: SumEnergy([nn.Linear(DIM, 1), classifier()]),
    "classifiers": lambda: SumEnergy([classifier(), classifier(classes=6)], [1.0, -2.0]),
}
every_energy = pytest.mark.parametrize("make", ENERGIES.values(), ids=ENERGIES)


# -- the modules --------------------------------------------------------------------------------------------------


def test_a_classifier_is_the_negative_logsumexp_and_with_labels_the_negative_logit():
    model, x, labels = classifier(), torch.randn(6, DIM), torch.tensor([0, 3, 1, 1, 2, 0])
    f = model.classifier(x)
    torch.testing.assert_close(energy(model, x), -f.exp().sum(dim=1).log())
    assert torch.equal(energy(model, x, labels=labels), torch.stack([-f[i, y] for i, y in enumerate(labels.tolist())]))
    # p(y | x) is the softmax
    share = torch.stack([energy(model, x, labels=torch.full((6,), y)) for y in range(CLASSES)], dim=1)
    torch.testing.assert_close((energy(model, x)[:, None] - share).exp(), f.softmax(dim=1))


def test_a_gaussian_is_minus_its_log_density():
    model, x = gaussian(), torch.randn(6, DIM)
    density = torch.distributions.Normal(model.mean, model.std).log_prob(x).sum(dim=1)
    normaliser = model.std.log().sum() + DIM / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(energy(model, x), -density - normaliser)
    torch.testing.assert_close(energy(GaussianEnergy(), x), x.square().sum(dim=1) / 2)
    images = GaussianEnergy(torch.ones(2, 3), 2.0)
    torch.testing.assert_close(energy(images, torch.zeros(4, 2, 3)), torch.full((4,), 6 / 8))


def test_a_sum_weighs_its_terms_and_hands_labels_to_those_that_take_them():
    model, x, labels = everything(), torch.randn(6, DIM), torch.arange(6) % CLASSES

    def by_hand(labels):
        g, m, inner, linear, soft = model.energies
        c, narrow, slanted = inner.energies
        nested = 0.7 * energy(c, x, labels=labels) - 0.25 * energy(narrow, x) + 2.0 * energy(slanted, x)
        return 1.1 * energy(g, x) - 0.5 * energy(m, x) + 3.0 * nested + 0.4 * energy(linear, x) + 0.9 * energy(soft, x)

    for given in (None, labels):
        torch.testing.assert_close(energy(model, x, labels=given), by_hand(given))


def test_weights_are_a_buffer_and_default_to_one():
    model = SumEnergy([mlp(), gaussian()])
    assert model.weights.tolist() == [1.0, 1.0]
    assert "weights" in dict(model.named_buffers())
    given = torch.tensor([2, 3])
    model = SumEnergy([mlp(), gaussian()], given)
    given.zero_()
    assert model.weights.tolist() == [2.0, 3.0]
    assert model.weights.dtype == torch.float32
    state = model.state_dict()
    other = SumEnergy([mlp(), gaussian()])
    other.load_state_dict(state)
    x = torch.randn(5, DIM)
    assert torch.equal(energy(other, x), energy(model, x))
    assert energy(model.double(), x.double()).dtype == torch.float64


def test_an_rbms_free_energy_is_a_softplus_layer_and_a_linear_term():
    """F(v) = -log sum_h exp(b v + h (c + W v)), summed over all hidden states."""
    hidden = 5
    soft = nn.Sequential(nn.Linear(DIM, hidden), nn.Softplus(), nn.Linear(hidden, 1, bias=False))
    visible = nn.Linear(DIM, 1, bias=False)
    with torch.no_grad():
        soft[2].weight.fill_(-1.0)
    model, v = SumEnergy([soft, visible], [1.0, -1.0]).double(), torch.randn(7, DIM, dtype=torch.float64)
    h = torch.tensor(list(itertools.product((0.0, 1.0), repeat=hidden)), dtype=torch.float64)
    with torch.no_grad():
        drive = soft[0](v)
        free = -torch.logsumexp(visible(v) + drive @ h.t(), dim=1)
        slope = -visible.weight - drive.sigmoid() @ soft[0].weight
        torch.testing.assert_close(energy(model, v), free, rtol=1e-12, atol=1e-12)
    check_fast_path(model, v, None)
    moved, info = langevin_sample(
        model, init=v, steps=1, step_size=2.0, noise_scale=0.0, backend="torch", return_info=True, seed=0
    )
    assert info.path == "tiles"
    torch.testing.assert_close(v - moved, slope, rtol=1e-12, atol=1e-12)


class Labelled(nn.Module):
    def forward(self, x, labels):
        return (x.sum(dim=1) - labels).square()


class KeywordOnly(nn.Module):
    def forward(self, x, *, scale=1.0):
        return scale * x.sum(dim=1)


def test_who_takes_labels():
    for model in (classifier(), Labelled(), SumEnergy([mlp(), classifier()]), SumEnergy([SumEnergy([Labelled()])])):
        assert takes_condition(model)
    for model in (mlp(), logits(), gaussian(), nn.Linear(DIM, 1), KeywordOnly(), SumEnergy([mlp(), gaussian()])):
        assert not takes_condition(model)


def test_number_of_classes():
    x = torch.randn(1, DIM)
    assert n_classes(classifier(), x) == CLASSES
    assert n_classes(classifier(classes=1), x) == 1
    assert n_classes(classifier().double(), x) == CLASSES
    assert n_classes(everything(), x) == CLASSES
    assert n_classes(SumEnergy([classifier(classes=6), SumEnergy([classifier(classes=2)]), mlp()]), x) == 2
    for model in (mlp(), Labelled(), SumEnergy([mlp(), Labelled()])):
        assert n_classes(model, x) is None


def test_energy_with_labels_and_parameters():
    model, other, x = classifier(), classifier(), torch.randn(4, DIM)
    labels = torch.tensor([3, 0, 1, 2])
    params = dict(other.named_parameters())
    assert torch.equal(energy(model, x, params, labels=labels), energy(other, x, labels=labels))
    assert torch.equal(energy(model, x, params), energy(other, x))
    assert not torch.equal(energy(model, x), energy(other, x))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SumEnergy([]), "a SumEnergy needs at least one energy, got none"),
        (lambda: SumEnergy([mlp()], [1.0, 2.0]), r"weights must be 1 finite numbers, one per energy, got \[1.0, 2.0\]"),
        (lambda: SumEnergy([mlp(), mlp()], [1.0]), r"weights must be 2 finite numbers, one per energy, got \[1.0\]"),
        (lambda: SumEnergy([mlp()], [[1.0]]), r"weights must be 1 finite numbers, one per energy, got \[\[1.0\]\]"),
        (lambda: SumEnergy([mlp()], [math.nan]), r"weights must be 1 finite numbers, .* got \[nan\]"),
        (lambda: SumEnergy([mlp()], torch.tensor([math.inf])), r"weights must be 1 finite .* got tensor\(\[inf\]\)"),
        (lambda: GaussianEnergy(std=0.0), "std must be finite and > 0, got 0.0"),
        (lambda: GaussianEnergy(0.0, torch.tensor([1.0, -1.0])), r"std must be finite and > 0, got .*-1"),
        (lambda: GaussianEnergy(std=math.inf), "std must be finite and > 0, got inf"),
        (lambda: GaussianEnergy(std=math.nan), "std must be finite and > 0, got nan"),
        (lambda: GaussianEnergy(torch.tensor([0.0, math.nan])), r"mean must be finite, got .*nan"),
    ],
)
def test_modules_refuse_in_words(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# -- what is read ---------------------------------------------------------------------------------------------------


def value(description, x, labels):
    """E(x) of a description, by its formula."""
    total = description.constant.expand(len(x)).clone()
    for mlp, scale in zip(description.mlps, description.scales, strict=True):
        f = mlp.output(x)
        if mlp.head == "scalar":
            total += scale * f[:, 0]
        elif mlp.head == "logsumexp":
            total -= scale * f.logsumexp(dim=1)
        else:
            total -= scale * f.gather(1, labels[:, None])[:, 0]
    if description.curvature is not None:
        total += (description.curvature * (x - description.mean) ** 2 / 2).sum(dim=1)
    if description.linear is not None:
        total += (description.linear * x).sum(dim=1)
    return total


def check_fast_path(model, x, labels):
    """Energies and gradients of the closed form, and of the description's formula, against autograd: all float64."""
    exact = Energy(model, (DIM,), torch.float64)
    description = describe(model, labels=labels is not None).to(torch.device("cpu"), torch.float64)
    torch.testing.assert_close(value(description, x, labels), exact(x, labels), rtol=1e-12, atol=1e-12)
    moved, info = langevin_sample(
        model, init=x, labels=labels, steps=1, step_size=2.0, noise_scale=0.0, backend="torch", return_info=True, seed=0
    )
    assert (info.backend, info.path) == ("torch", "tiles")
    torch.testing.assert_close(x - moved, exact.gradient(x, labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(info.energies, exact(moved, labels), rtol=1e-12, atol=1e-12)


@every_energy
def test_the_description_and_the_closed_form_are_the_module(make):
    model, x = make().double(), 2 * torch.randn(9, DIM, dtype=torch.float64)
    check_fast_path(model, x, None)
    if takes_condition(model):
        check_fast_path(model, x, torch.arange(9) % (n_classes(model, x) or 1))


def test_logits_of_any_size_give_no_overflow():
    model = classifier().double()
    with torch.no_grad():
        model.classifier[2].weight *= 1e3
        model.classifier[2].bias += torch.tensor([-1e4, 0.0, 1e4, 3.0])
    check_fast_path(model, torch.randn(9, DIM, dtype=torch.float64), None)


def test_what_a_description_holds():
    model = everything()
    g, _, inner, linear, soft = model.energies
    c, narrow, slanted = inner.energies
    for labels, head in ((False, "logsumexp"), (True, "class")):
        d = describe(model, labels=labels)
        assert d.dim == DIM
        assert [mlp.head for mlp in d.mlps] == ["scalar", head, "scalar"]
        assert [mlp.widths for mlp in d.mlps] == [(9, 8), (7,), (5,)]
        assert d.networks == ((9, 8), (7,) if labels else (7, CLASSES), (5,))
        torch.testing.assert_close(d.scales, torch.tensor([-0.5, 3.0 * 0.7, 0.9]))
        assert torch.equal(d.mlps[1].weights[0], c.classifier[0].weight)
        assert torch.equal(d.mlps[2].weights[0], soft[1].weight)
        # two Gaussians, about the mean of the first
        torch.testing.assert_close(d.curvature, 1.1 / g.std**2 - 3.0 * 0.25 / 2.0**2)
        assert torch.equal(d.mean, g.mean)
        shift = -3.0 * 0.25 / 2.0**2 * (g.mean - narrow.mean)
        torch.testing.assert_close(d.linear, shift + 6.0 * slanted.weight[0] + 0.4 * linear.weight[0])


@every_energy
def test_scaled_heads_hold_the_weights(make):
    """sum_k of a head with its weight and sign in it is sum_k w_k E_k, but for "logsumexp" heads."""
    model, x = make(), torch.randn(5, DIM)
    for labels in (False, True):
        d = describe(model, labels=labels)
        for mlp, scaled, scale in zip(d.mlps, d.scaled_heads(), d.scales, strict=True):
            sign = {"scalar": scale, "class": -scale, "logsumexp": 1.0}[mlp.head]
            torch.testing.assert_close(scaled.output(x), sign * mlp.output(x))
            assert scaled.head == mlp.head


def test_no_gaussian_or_linear_term_is_none():
    for make in (mlp, classifier):
        d = describe(make())
        assert d.curvature is d.mean is d.linear is None
        assert d.constant.item() == 0.0
        assert d.scales.tolist() == [1.0]
    d = describe(SumEnergy([mlp(), gaussian()]))
    assert d.linear is None
    assert d.constant.item() == 0.0
    d = describe(SumEnergy([mlp(), nn.Linear(DIM, 1)], [1.0, 2.0]))
    assert d.curvature is d.mean is None


def test_dtype_and_dims_of_gaussian_terms():
    scalar = describe(SumEnergy([mlp().double(), GaussianEnergy(1.0, 2.0).double()]))
    assert scalar.scales.dtype == scalar.curvature.dtype == torch.float64
    assert scalar.curvature.tolist() == [0.25] * DIM
    assert scalar.mean.tolist() == [1.0] * DIM
    images = nn.Sequential(nn.Flatten(), mlp(6))
    d = describe(SumEnergy([images, GaussianEnergy(torch.arange(6.0).reshape(2, 3))]))
    assert d.mean.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    moved = d.to(torch.device("cpu"), torch.float64)
    assert {v.dtype for v in (moved.scales, moved.curvature, moved.mean, moved.constant)} == {torch.float64}
    assert moved.linear is None
    assert moved.mlps[0].weights[0].dtype == torch.float64


def test_reading_leaves_the_module_as_it_was(untouched):
    model = SumEnergy(
        [
            MLPEnergy(DIM, (9, 8), dropout=0.3, spectral_norm=True),
            classifier(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(DIM, 1)),
            gaussian(),
        ]
    ).train()
    model.energies[1].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with untouched(model):
        d = describe(model)
        describe(model, labels=True)
    assert not any(t.requires_grad for t in (d.scales, d.curvature, d.linear, d.constant, *d.mlps[0].weights))
    model.eval()
    x = torch.randn(5, DIM)
    torch.testing.assert_close(value(d, x, None), energy(model, x).detach())


class Louder(SumEnergy):
    def forward(self, x, labels=None):
        return 2 * super().forward(x, labels)


class Wider(GaussianEnergy):
    def forward(self, x):
        return super().forward(x) / 2


class Colder(ClassifierEnergy):
    def forward(self, x, labels=None):
        return super().forward(x, labels) / 2


class Absolute(nn.Linear):
    def forward(self, x):
        return super().forward(x).abs()


def hooked(module, which="register_forward_hook"):
    getattr(module, which)(lambda module, *rest: None)
    return module


NOT_READ = {
    "no MLP": (lambda: SumEnergy([gaussian(), nn.Linear(DIM, 1)]), "none of its terms is an MLP"),
    "one Linear": (lambda: nn.Linear(DIM, 1), "none of its terms is an MLP"),
    "a Gaussian": (gaussian, "none of its terms is an MLP"),
    "dims of MLPs": (lambda: SumEnergy([mlp(), mlp(4)]), "its terms take different numbers of dims"),
    "dims of a classifier": (lambda: SumEnergy([mlp(), classifier(4)]), "its terms take different numbers of dims"),
    "dims of a Linear": (lambda: SumEnergy([mlp(), nn.Linear(4, 1)]), "its terms take different numbers of dims"),
    "dims of a Gaussian": (
        lambda: SumEnergy([mlp(), GaussianEnergy(torch.zeros(4))]), "a GaussianEnergy has 4 dims, and the MLPs have 3",
    ),
    "dims of a std": (
        lambda: SumEnergy([mlp(), GaussianEnergy(0.0, torch.ones(2))]), "a GaussianEnergy has 2 dims, and the MLPs",
    ),
    "outputs of a Linear": (lambda: SumEnergy([mlp(), nn.Linear(DIM, 2)]), "a Linear term has 2 outputs, not one"),
    "outputs of an MLP": (lambda: SumEnergy([mlp(), logits()]), "its last Linear has 4 outputs, not one"),
    "a classifier that is no MLP": (lambda: ClassifierEnergy(nn.Linear(DIM, 2)), "it has no hidden layer"),
    "an unknown term": (lambda: SumEnergy([mlp(), Labelled()]), "Labelled. can't be read: .* missing 1 required"),
    "a sum of its own": (lambda: Louder([mlp()]), "Louder has a forward of its own"),
    "a nested one": (lambda: SumEnergy([mlp(), Louder([mlp()])]), "Louder has a forward of its own"),
    "a classifier of its own": (lambda: Colder(logits()), "Colder has a forward of its own"),
    "a Gaussian of its own": (lambda: SumEnergy([mlp(), Wider()]), "Wider has a forward of its own"),
    "a Linear of its own": (lambda: SumEnergy([mlp(), Absolute(DIM, 1)]), "Absolute has a forward of its own"),
    "hook on a sum": (lambda: hooked(SumEnergy([mlp()])), "SumEnergy has a forward hook"),
    "hook on a classifier": (lambda: hooked(classifier()), "ClassifierEnergy has a forward hook"),
    "hook on logits": (lambda: ClassifierEnergy(hooked(logits())), "has a forward hook"),
    "hook on a Gaussian": (lambda: SumEnergy([mlp(), hooked(gaussian())]), "GaussianEnergy has a forward hook"),
    "hook before a Linear": (
        lambda: SumEnergy([mlp(), hooked(nn.Linear(DIM, 1), "register_forward_pre_hook")]),
        "Linear term has a forward pre-hook",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "match"), NOT_READ.values(), ids=NOT_READ)
def test_what_is_not_read_is_told_in_words(make, match, untouched):
    model = make()
    with untouched(model), pytest.raises(NotAnMLP, match=match):
        describe(model)
    assert why_not_fused(model).startswith("not an MLP that can be read: ")


def test_subclasses_without_a_forward_of_their_own_are_read():
    class Named(SumEnergy):
        """A sum by another name."""

    x = torch.randn(4, DIM)
    model = Named([mlp(), gaussian()])
    torch.testing.assert_close(value(describe(model), x, None), energy(model, x).detach())


@pytest.mark.parametrize("make", [lambda: SumEnergy([mlp(), Labelled()], [0.5, 2.0]), lambda: Louder([classifier()])])
def test_what_is_not_read_is_still_sampled(make):
    """By autograd, in the same words and with the same numbers as by hand."""
    model, x, labels = make(), torch.randn(5, DIM), torch.tensor([0, 3, 1, 1, 2])
    moved, info = langevin_sample(
        model, init=x, labels=labels, steps=1, step_size=0.2, noise_scale=0.0, return_info=True, seed=0
    )
    assert info.path == "autograd"
    free = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(energy(model, free, labels=labels).sum(), free)
    torch.testing.assert_close(moved, x - 0.1 * grad)
    torch.testing.assert_close(info.energies, energy(model, moved, labels=labels).detach())
