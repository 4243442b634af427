"""Energies: their shapes, their parts, functional parameters, gradients, and the loss."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastebm import (
    Activation,
    MLPEnergy,
    build,
    build_energy_fn,
    contrastive_divergence_loss,
    energy,
    why_not_fused,
)
from fastebm.energies import ACTIVATIONS
from fastebm.targets import autograd
from fastebm.targets.autograd import Energy
from fastebm.targets.mlp import read_mlp

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("make", [build, MLPEnergy])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, Activation("leaky_relu", 0.2), Activation("softplus", 3.0)])
@pytest.mark.parametrize(("size", "hidden"), [(1, (3,)), (5, (256, 128)), (7, (4, 1, 6))])
def test_build_shapes_and_parts(make, activation, size, hidden):
    model = make(size, hidden, activation)
    assert model(torch.randn(9, size)).shape == (9, 1)
    assert energy(model, torch.randn(9, size)).shape == (9,)
    assert energy(model, torch.randn(0, size)).shape == (0,)
    mlp = read_mlp(model)
    assert (mlp.dim, mlp.widths) == (size, hidden)
    name = activation if isinstance(activation, str) else activation.name
    assert {a.name for a in mlp.activations} == {name}


def test_defaults_of_activations_are_those_of_torch():
    assert read_mlp(build(2, (3,), "leaky_relu")).activations[0].parameter == nn.LeakyReLU().negative_slope
    assert read_mlp(build(2, (3,), "softplus")).activations[0].parameter == nn.Softplus().beta
    assert read_mlp(build(2, (3,), Activation("leaky_relu", 0.2))).activations[0].parameter == 0.2


def test_dropout_only_while_training():
    model = build(4, (16, 16), dropout=0.5)
    assert sum(isinstance(m, nn.Dropout) for m in model) == 2
    x = torch.randn(8, 4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_spectral_norm_gives_every_linear_a_norm_of_one():
    model = build(20, (30, 10), spectral_norm=True)
    with torch.no_grad():
        for _ in range(200):  # one power iteration per forward pass
            model(torch.randn(2, 20))
    model.eval()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 3
    for layer in linears:
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: build(2, ()), "hidden_sizes must name at least one layer"),
        (lambda: build(2, (0,)), r"layer sizes must be ints >= 1, got \[2, 0\]"),
        (lambda: build(2.0, (3,)), r"layer sizes must be ints >= 1, got \[2.0, 3\]"),
        (lambda: build(True, (3,)), "layer sizes must be ints >= 1"),
        (
            lambda: build(2, (3,), "mish"),
            "activation must be one of silu, relu, .*, got 'mish'",
        ),
        (lambda: build(2, (3,), Activation("mish", 1.0)), "activation must be one of"),
        (lambda: build(2, (3,), dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: build(2, (3,), dropout=float("nan")), "dropout must be in"),
        (lambda: build_energy_fn(nn.Flatten()), "pass feature_size="),
    ],
)
def test_build_rejects(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_build_energy_fn_on_an_mlp_trunk_is_one_mlp():
    trunk = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh())
    model = build_energy_fn(trunk, hidden_sizes=(7,))
    x = torch.randn(6, 3)
    assert model(x).shape == (6, 1)
    mlp = read_mlp(model)
    assert mlp.widths == (8, 5, 7)
    torch.testing.assert_close(mlp.output(x)[:, 0], energy(model, x).detach())


def test_build_energy_fn_on_a_conv_trunk():
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten())
    model = build_energy_fn(trunk, 4 * 6 * 6, (8,), dropout=0.1, spectral_norm=True)
    assert energy(model, torch.randn(2, 1, 8, 8)).shape == (2,)
    assert why_not_fused(model).startswith(
        "not an MLP that can be read: 0.0 (Conv2d) is neither nn.Linear nor a supported activation "
        f"({', '.join(ACTIVATIONS)})"
    )
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 1


def test_build_energy_fn_with_one_linear_head():
    model = build_energy_fn(nn.Sequential(nn.Linear(3, 8), nn.ReLU()), hidden_sizes=())
    assert read_mlp(model).widths == (8,)


def test_energy_with_params_is_the_model_with_those_params():
    model, other = build(3, (8,)), build(3, (8,))
    x = torch.randn(5, 3)
    assert torch.equal(energy(model, x, dict(other.named_parameters())), energy(other, x))


def test_energy_composes_with_torch_func():
    model = build(3, (8, 8))
    params = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(5, 3)

    # d mean E / d params
    grads = torch.func.grad(lambda p: energy(model, x, p).mean())(params)
    expected = torch.autograd.grad(energy(model, x).mean(), list(model.parameters()))
    for grad, value in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(grad, value)

    # scores of each point
    scores = torch.func.vmap(torch.func.grad(lambda p: energy(model, p[None], params)[0]))(x)
    torch.testing.assert_close(scores, Energy(model, (3,), torch.float32).gradient(x))

    # an ensemble
    stacked = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    both = torch.func.vmap(lambda p: energy(model, x, p))(stacked)
    torch.testing.assert_close(both[0], energy(model, x).detach())


class Of(nn.Module):
    """E(x) = f(x), with a parameter to train."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f, self.weight = f, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.f(self.weight * x)


@pytest.mark.parametrize(
    ("f", "got"),
    [
        (lambda x: x, r"shape \(4, 3\): one number per coordinate; sum over all dims but the first"),
        (lambda x: x.sum(), r"shape \(\): one number for the whole batch; drop the mean\(\) or sum\(\)"),
        (lambda x: x.sum(0), r"shape \(3,\): the first dim is the batch"),
        (lambda x: x.sum(1)[None], r"shape \(1, 4\): the first dim is the batch"),
        (lambda x: x[:, :2], r"shape \(4, 2\): several numbers per state; .* ClassifierEnergy"),
        (lambda x: (x.sum(1), 0), "tuple: return a tensor, one energy for each state"),
        (lambda x: None, "NoneType: is a return missing"),
    ],
)
def test_energy_of_another_shape_is_refused(f, got):
    with pytest.raises(ValueError, match=r"an energy maps \(4, ...\) to \(4,\) or \(4, 1\), got " + got):
        energy(Of(f), torch.randn(4, 3))


class Constant(nn.Module):
    """An energy that depends on its parameter only."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.level.expand(len(x))


@pytest.mark.parametrize(
    "make", [lambda: Of(lambda x: x.detach().sum(1)), lambda: Of(lambda x: torch.zeros(len(x))), Constant]
)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_of_an_energy_that_does_not_depend_on_x_raises(make, frozen):
    model = make().requires_grad_(not frozen)
    with pytest.raises(ValueError, match="does not depend on x through differentiable operations"):
        Energy(model, (3,), torch.float32).gradient(torch.randn(4, 3))


def test_gradient_is_of_the_sum_so_no_chain_sees_the_batch():
    module = Energy(Of(lambda x: x.square().sum(1)), (3,), torch.float32)
    x = torch.randn(4, 3)
    with torch.inference_mode():
        torch.testing.assert_close(module.gradient(x), 2 * x)
    with torch.no_grad():
        torch.testing.assert_close(module.gradient(x[:1]), 2 * x[:1])
    assert module.gradient(x[:0]).shape == (0, 3)


class Named(torch.Tensor):
    """A subclass of Tensor, which an energy may return."""


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.pow(3).flatten(1).sum(1),
        lambda x: x.sin().flatten(1).prod(dim=1, keepdim=True),
        lambda x: x.flatten(1)[:, 0].exp() + 0 * x.detach().sum(),
        lambda x: x.mean().expand(len(x)),
        lambda x: x.flatten(1).norm(dim=1).as_subclass(Named),
        lambda x: checkpoint(lambda y: y.tanh().flatten(1).sum(1), x, use_reentrant=False),
        lambda x: x.double().flatten(1).square().sum(1),
        lambda x: torch.autograd.grad(x.pow(4).sum(), x, create_graph=True)[0].flatten(1).sum(1),
    ],
)
def test_gradient_is_that_of_autograd_grad(forward, ours, monkeypatch):
    assert autograd._engine() is not None  # PyTorch still has the engine that is called directly
    if not ours:
        monkeypatch.setattr(autograd, "_engine", lambda: None)
    x = torch.randn(4, 2, 3)
    weight = nn.Parameter(torch.ones(()))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(forward(leaf).sum(), leaf)
    found = Energy(Of(lambda x: forward(x) * weight), (2, 3), torch.float32).gradient(x.flatten(1))
    assert torch.equal(found.reshape(x.shape), expected)
    assert weight.grad is None
    assert not found.requires_grad


def test_subclasses_are_left_to_autograd_grad(monkeypatch):
    monkeypatch.setattr(autograd, "_engine", lambda: pytest.fail("asked for a subclass"))
    x = torch.randn(4, 3)
    found = Energy(Of(lambda x: x.square().sum(1).as_subclass(Named)), (3,), torch.float32).gradient(x)
    torch.testing.assert_close(found, 2 * x)


@pytest.mark.parametrize("forward", [lambda x: torch.fft.fft(x).sum(1), lambda x: ((x * (1 + 2j)) ** 2).sum(1)])
def test_complex_energies_raise(forward):
    for call in (energy, lambda model, x: Energy(model, (3,), torch.float32).gradient(x)):
        with pytest.raises(ValueError, match=r"an energy is real, got torch\.complex64: take \.real"):
            call(Of(forward), torch.randn(4, 3))


def test_an_engine_of_another_kind_is_not_used(monkeypatch):
    class Engine:
        def run_backward(self, tensors, grads):
            raise AssertionError("never called")

    class Other:
        _execution_engine = Engine()

    autograd._engine.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "Variable", Other)
            assert autograd._engine() is None
            x = torch.randn(4, 3)
            found = Energy(Of(lambda x: x.square().sum(1)), (3,), torch.float32).gradient(x)
            torch.testing.assert_close(found, 2 * x)
    finally:
        autograd._engine.cache_clear()


def test_gradient_in_float64_of_a_float32_model():
    model = build(3, (8,))
    x = torch.randn(4, 3, dtype=torch.float64)
    grad = Energy(model, (3,), torch.float64).gradient(x)
    assert torch.equal(grad, Energy(model.double(), (3,), torch.float64).gradient(x))


def test_contrastive_divergence_loss_by_hand():
    real, neg = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, -2.0])
    # 3 - 1 + 0.1 (41/3 + 10)
    assert contrastive_divergence_loss(real, neg, reg_alpha=0.1).item() == pytest.approx(2 + 0.1 * (41 / 3 + 10))
    assert contrastive_divergence_loss(real, neg, reg_alpha=0.0).item() == pytest.approx(2.0)
    column = contrastive_divergence_loss(real[:, None], neg[:, None])
    assert column.item() == pytest.approx(2 + 0.01 * (41 / 3 + 10))
    assert column.shape == ()


def test_contrastive_divergence_losses_of_parts_add_up_to_that_of_the_whole():
    real, neg = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 1.0, 2.0])
    parts = ((real[:1], neg[:0]), (real[1:], neg[:3]), (real[:0], neg[:0]))
    losses = [contrastive_divergence_loss(*part, 0.1, batch_size=3) for part in parts]
    assert sum(losses).item() == pytest.approx(contrastive_divergence_loss(real, neg, 0.1).item())
    assert losses[2] == 0


def test_contrastive_divergence_loss_has_the_gradient_of_the_likelihood():
    real, neg = torch.randn(4, requires_grad=True), torch.randn(2, requires_grad=True)
    contrastive_divergence_loss(real, neg, reg_alpha=0.5).backward()
    torch.testing.assert_close(real.grad, 1 / 4 + 0.5 * 2 * real.detach() / 4)
    torch.testing.assert_close(neg.grad, -1 / 2 + 0.5 * 2 * neg.detach() / 2)


@pytest.mark.parametrize(
    ("real", "neg", "alpha", "match"),
    [
        (2, 2, -1.0, "reg_alpha must be finite and >= 0, got -1.0"),
        (2, 2, float("nan"), "reg_alpha must be finite and >= 0, got nan"),
        (2, 2, float("inf"), "reg_alpha must be finite and >= 0, got inf"),
        (0, 2, 0.1, "at least one energy on each side"),
        (2, 0, 0.1, "at least one energy on each side"),
    ],
)
def test_contrastive_divergence_loss_rejects(real, neg, alpha, match):
    with pytest.raises(ValueError, match=match):
        contrastive_divergence_loss(torch.ones(real), torch.ones(neg), alpha)


def test_contrastive_divergence_loss_shows_nan_as_it_is():
    assert contrastive_divergence_loss(torch.tensor([float("nan")]), torch.ones(2)).isnan()


def test_a_slice_of_an_mlp_energy_is_its_layers():
    model = build(5, (7, 3))
    assert list(model[:-1]) == list(model)[:-1]
    assert model[-1].out_features == 1
    x = torch.randn(2, 5)
    assert torch.equal(model[-1](model[:-1](x)), model(x))


def _grad(n):
    return torch.randn(n, requires_grad=True)


@pytest.mark.parametrize(
    ("real", "neg", "match"),
    [
        (
            _grad(3),
            torch.randn(3),
            r"^neg_energy carries no gradient, so the negative phase is lost .* energy\(sa",
        ),
        (_grad(3)[:, None], torch.randn(3, 1), "^neg_energy carries no gradient"),
        (_grad(3) * 2, _grad(3).detach(), "^neg_energy carries no gradient"),
        (
            torch.randn(3),
            _grad(3),
            r"^real_energy carries no gradient, so the positive .* pass energy\(data\)",
        ),
    ],
)
def test_half_a_loss_is_told(real, neg, match):
    with pytest.warns(UserWarning, match=match):
        contrastive_divergence_loss(real, neg)


def test_energies_from_a_pool_lose_the_negative_phase_with_a_word():
    from fastebm import ChainPool, Langevin, langevin_sample

    model, pool = build(3, (4,)), ChainPool(10, 3, seed=0)
    samples, energies = pool.sample(model, 5, Langevin(0.1, 0.005), 2)
    _, info = langevin_sample(model, init=samples, steps=1, return_info=True)
    for lost in (energies, info.energies):
        with pytest.warns(UserWarning, match="the negative phase is lost"):
            contrastive_divergence_loss(energy(model, torch.randn(5, 3)), lost)


@pytest.mark.filterwarnings("error")
def test_whole_losses_are_not_warned_of():
    contrastive_divergence_loss(_grad(3), _grad(2))
    contrastive_divergence_loss(torch.randn(3), torch.randn(2))  # for logging, without a gradient
    with torch.no_grad():
        contrastive_divergence_loss(_grad(3), torch.randn(2))
    contrastive_divergence_loss(_grad(3), torch.randn(0), batch_size=3)  # one of several processes
