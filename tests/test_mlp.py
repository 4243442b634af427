"""read_mlp: which modules are MLP energies, why others are not, and that reading leaves no trace."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils import weight_norm as hook_weight_norm

from fastebm import Activation, MLPEnergy, langevin_sample, why_not_fused
from fastebm.energies import ACTIVATIONS
from fastebm.targets.mlp import NotAnMLP, read_mlp

pytestmark = pytest.mark.usefixtures("seeded")


class Wrapper(nn.Module):
    """A module with one child and a forward of its own."""

    def __init__(self, net: nn.Module, forward) -> None:
        super().__init__()
        self.net, self.rule = net, forward

    def forward(self, x):
        return self.rule(self.net, x)


def net(*hidden: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.SiLU(), *hidden, nn.Linear(6, 1))


def assert_reads(module: nn.Module, dim: int = 3) -> None:
    """The description computes what the module computes in eval mode."""
    mlp = read_mlp(module)
    modes = [(m, m.training) for m in module.modules()]
    x = torch.randn(20, dim)
    with torch.no_grad():
        expected = module.eval()(x).reshape(20)
    for m, mode in modes:
        m.training = mode
    torch.testing.assert_close(mlp.output(x)[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert mlp.dim == dim
    assert len(mlp.activations) == len(mlp.widths) == len(mlp.weights) - 1 == len(mlp.biases) - 1


ACCEPTED = {
    "flat": lambda: net(),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 4))), nn.Tanh(), nn.Linear(4, 1)
    ),
    "deep": lambda: net(*[m for _ in range(4) for m in (nn.Linear(6, 6), nn.ReLU())]),
    "wrapper": lambda: Wrapper(net(), lambda f, x: f(x)),
    "wrapper that squeezes": lambda: Wrapper(net(), lambda f, x: f(x).squeeze(1)),
    "wrapper that negates": lambda: Wrapper(net(), lambda f, x: -f(x)),
    "wrapper that scales": lambda: Wrapper(net(), lambda f, x: 1.5 * f(x)),
    "wrapper of a wrapper": lambda: Wrapper(Wrapper(net(), lambda f, x: f(x)), lambda f, x: f(x)),
    "dropout": lambda: net(nn.Dropout(0.5), nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.1)),
    "identity": lambda: net(nn.Identity()),
    "linear after linear": lambda: net(nn.Linear(6, 6)),
    "no bias": lambda: nn.Sequential(nn.Linear(3, 6, bias=False), nn.SiLU(), nn.Linear(6, 1, bias=False)),
    "some biases": lambda: nn.Sequential(nn.Linear(3, 6, bias=False), nn.SiLU(), nn.Linear(6, 1)),
    "in-place activation": lambda: net(nn.Linear(6, 6), nn.ReLU(inplace=True)),
    "spectral norm": lambda: MLPEnergy(3, (6, 5), spectral_norm=True),
    "hook spectral norm": lambda: nn.Sequential(
        hook_spectral_norm(nn.Linear(3, 6)), nn.ReLU(), hook_spectral_norm(nn.Linear(6, 1))
    ),
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 6)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 1))
    ),
    "hook weight norm": lambda: nn.Sequential(hook_weight_norm(nn.Linear(3, 6)), nn.ReLU(), nn.Linear(6, 1)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_accepted_and_left_bit_for_bit(make, training, untouched):
    module = make().train(training)
    list(module.modules())[-1].eval()  # mixed modes must be restored
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with untouched(module):
        read_mlp(module)
        why_not_fused(module)
        langevin_sample(module, 3, batch_size=2, steps=2, seed=1)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert_reads(module)


@pytest.mark.parametrize(
    "activation",
    [
        nn.SiLU(),
        nn.ReLU(),
        nn.LeakyReLU(),
        nn.LeakyReLU(0.3),
        nn.Tanh(),
        nn.Softplus(),
        nn.Softplus(beta=3.0),
    ],
    ids=str,
)
def test_activations_with_their_slopes(activation):
    module = nn.Sequential(nn.Linear(3, 6), activation, nn.Linear(6, 1))
    assert_reads(module)
    read = read_mlp(module).activations[0]
    z = torch.linspace(-30, 30, 601).double().requires_grad_()
    value = activation(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    z = z.detach()
    torch.testing.assert_close(read.forward(z, torch.empty_like(z)), value.detach(), rtol=1e-12, atol=1e-12)
    grad = torch.full_like(z, -2.0)
    torch.testing.assert_close(read.backward(grad, z, torch.empty_like(z)), -2.0 * slope, rtol=1e-12, atol=1e-12)


def test_every_named_activation_makes_a_module_that_is_read_back():
    for name in ACTIVATIONS:
        activation = Activation(name, 0.5 if name in ("leaky_relu", "softplus") else 0.0)
        module = nn.Sequential(nn.Linear(3, 6), ACTIVATIONS[name].module(activation.parameter), nn.Linear(6, 1))
        assert read_mlp(module).activations == (activation,)


def test_leading_flatten():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.SiLU(), nn.Linear(6, 1))
    assert_reads(module, dim=12)
    x = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(read_mlp(module).output(x.flatten(1))[:, 0], module(x).detach()[:, 0])


def test_one_instance_used_twice_counts_twice():
    activation, middle = nn.ReLU(), nn.Linear(6, 6)
    assert_reads(nn.Sequential(nn.Linear(3, 6), activation, nn.Linear(6, 6), activation, nn.Linear(6, 1)))
    tied = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), middle, activation, middle, activation, nn.Linear(6, 1))
    assert len(read_mlp(tied).widths) == 3
    assert_reads(tied)


def test_spectral_norm_in_train_mode_reads_the_weight_of_eval_mode():
    """.weight of a parametrized layer in train mode moves the power iteration: no buffer may move here."""
    module = MLPEnergy(3, (6, 5), spectral_norm=True).train()
    first, second = read_mlp(module), read_mlp(module)
    module.eval()
    for a, b, layer in zip(first.weights, second.weights, [m for m in module if isinstance(m, nn.Linear)], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, layer.weight)


class OtherLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).abs()


class AlwaysDropout(nn.Dropout):
    def forward(self, x):
        return nn.functional.dropout(x, self.p, training=True)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def hooked(module: nn.Module, path: str, kind: str) -> nn.Module:
    layer = module.get_submodule(path)
    if kind == "forward":
        layer.register_forward_hook(lambda m, i, out: 2 * out)
    else:
        layer.register_forward_pre_hook(lambda m, i: (2 * i[0],))
    return module


REJECTED = {
    "unsupported activation": (lambda: net(nn.Linear(6, 6), nn.Mish()), r"^3 \(Mish\) is neither nn.Linear nor a sup"),
    "nested unsupported": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 6), nn.Mish()), nn.Linear(6, 1)),
        r"^0\.1 \(Mish\) is neither",
    ),
    "softplus threshold": (lambda: net(nn.Linear(6, 6), nn.Softplus(threshold=5)), r"3 \(Softplus\) is neither"),
    "several outputs": (lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), "last Linear has 2 outp"),
    "no hidden layer": (lambda: nn.Sequential(nn.Linear(3, 1)), "no hidden layer"),
    "one linear": (lambda: nn.Linear(3, 1), "no hidden layer"),
    "empty": (lambda: nn.Sequential(), "no hidden layer"),
    "activation first": (lambda: nn.Sequential(nn.ReLU(), *net()), r"^0 \(ReLU\) does not follow a Linear"),
    "two activations": (lambda: net(nn.ReLU()), r"^2 \(ReLU\) does not follow a Linear"),
    "ends in an activation": (lambda: nn.Sequential(*net(), nn.Softplus()), r"ends in an activation \(softplus\)"),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)),
        "BatchNorm1d",
    ),
    "late flatten": (lambda: net(nn.Flatten()), r"^2 \(Flatten\) is neither"),
    "flatten of some dims": (lambda: nn.Sequential(nn.Flatten(2), *net()), r"^0 \(Flatten\) is neither"),
    "own Linear": (
        lambda: net(OtherLinear(6, 6), nn.ReLU()),
        r"forward of 2 \(OtherLinear\) does what no MLP does: abs\(\)",
    ),
    "dropout that stays on": (
        lambda: net(AlwaysDropout()),
        r"forward of 2 \(AlwaysDropout\) does what no MLP does: dropout\(\)",
    ),
    "hook on the energy": (lambda: hooked(net(), "", "forward"), r"^the energy \(Sequential\) has a forward hook"),
    "hook on an activation": (lambda: hooked(net(), "1", "forward"), r"^1 \(SiLU\) has a forward hook"),
    "pre-hook on an activation": (lambda: hooked(net(), "1", "pre"), r"^1 \(SiLU\) has a forward pre-hook"),
    "hook on a Linear": (lambda: hooked(net(), "0", "forward"), r"^0 \(Linear\) has a forward hook"),
    "pre-hook on a Linear": (lambda: hooked(net(), "0", "pre"), r"^0 \(Linear\) has a forward pre-hook"),
    "wrapper that squares": (lambda: Wrapper(net(), lambda f, x: f(x) ** 2), r"does what no MLP does: pow\(\)"),
    "wrapper that adds": (
        lambda: Wrapper(net(), lambda f, x: f(x) + x.square().sum(1, True)),
        "chain of operations: x is used twice",
    ),
    "wrapper that clamps its input": (
        lambda: Wrapper(net(), lambda f, x: f(x.clamp(-1, 1))),
        r"no MLP does: clamp\(\)",
    ),
    "wrapper that clamps its output": (
        lambda: Wrapper(net(), lambda f, x: f(x).clamp(-9, 9)),
        r"no MLP does: clamp\(\)",
    ),
    "wrapper that sums": (lambda: Wrapper(net(), lambda f, x: f(x).sum()), r"no MLP does: sum\(\)"),
    "wrapper that fails": (lambda: Wrapper(net(), lambda f, x: f(x[:, :, 0])), r"no MLP does: getitem\(\)"),
    "several parts": (
        lambda: nn.ModuleDict({"a": nn.Linear(3, 6), "b": nn.Linear(6, 1)}),
        r"^the forward of the energy \(ModuleDict\) can't be read",
    ),
}


@pytest.mark.parametrize(("make", "match"), REJECTED.values(), ids=REJECTED)
def test_rejected_with_the_layer_named_and_left_bit_for_bit(make, match, untouched):
    module = make().train()
    with untouched(module):
        with pytest.raises(NotAnMLP, match=match):
            read_mlp(module)
        reason = why_not_fused(module)
    assert reason is not None
    assert reason.startswith("not an MLP that can be read: ")


def test_parametrizations_of_pytorch_alone_are_read():
    """The forward of a user's parametrization may do anything: draw random numbers, count its calls."""
    orthogonal = net()
    parametrizations.orthogonal(orthogonal[0])
    assert_reads(orthogonal)
    assert torch.equal(read_mlp(orthogonal).weights[0], orthogonal[0].weight)
    halved = net()
    parametrize.register_parametrization(halved[0], "weight", Halved())
    with pytest.raises(NotAnMLP, match=r"^0 .* has a parametrization that is none of PyTorch's \(Halved\)"):
        read_mlp(halved)


def test_reading_sees_the_weights_of_now():
    module = net()
    read_mlp(module)
    with torch.no_grad():
        module[0].weight.mul_(3)
    assert_reads(module)


def test_to_moves_weights_and_keeps_missing_biases():
    mlp = read_mlp(nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 1))).to(
        torch.device("cpu"), torch.float64
    )
    assert {w.dtype for w in mlp.weights} == {torch.float64}
    assert mlp.biases[0] is None
    assert mlp.biases[1].dtype == torch.float64
