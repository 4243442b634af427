"""The operator that langevin_sample calls inside torch.compile."""

import copy

import pytest
import torch
from compiled_calls import LABELS, every_term, same

from fastebm import Activation, Langevin, MLPEnergy
from fastebm.backends import op
from fastebm.rng import Stream
from fastebm.targets.description import describe

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def arguments(
    energy=None, x=True, labels=None, frozen=None, rule=None, grads=False, steps=4, thin=0, telemetry=False,
    path="tiles", precision="ieee", on_nonfinite="raise",
):  # fmt: skip
    description = describe(energy or MLPEnergy(3, (8, 4), Activation("leaky_relu", 0.2)), labels=labels is not None)
    n, mlps = 5, description.mlps
    return (
        torch.randn(n, 3 if x else 0),
        torch.tensor([-7]),
        torch.arange(n),
        torch.zeros(n, dtype=torch.int64),
        labels,
        frozen,
        [w.clone().requires_grad_(grads) for mlp in mlps for w in mlp.weights],
        [b if i > 0 else None for mlp in mlps for i, b in enumerate(mlp.biases)],
        op.encode_networks(mlps),
        description.scales,
        description.curvature,
        description.mean,
        description.linear,
        description.constant,
        *op.encode_rule(rule or Langevin(0.1, 0.3)),
        steps,
        thin,
        telemetry,
        path,
        precision,
        on_nonfinite,
    )


CASES = {
    "plain": {},
    "uniform start": {"x": False, "rule": Langevin(0.1, 0.3, 0.5, (-1.0, 1.0))},
    "a value a chain": {"rule": Langevin(torch.rand(5, 1) + 0.1, torch.rand(4)), "on_nonfinite": "reinit"},
    "gradients": {"on_nonfinite": "ignore", "grads": True},
    "frozen": {"frozen": torch.tensor([[True, False, True]]), "on_nonfinite": "reinit", "telemetry": True},
    "bounds": {"rule": Langevin(0.1, 0.3, None, (-torch.rand(3), 1.0), 0.5), "thin": 2, "telemetry": True},
    "sum": {"energy": every_term(), "thin": 1},
    "labels": {"energy": every_term(), "labels": LABELS},
    "kernel": {"path": "resident", "precision": "bf16x3", "telemetry": True, "thin": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    if case == "kernel":
        pytest.importorskip("triton")
    torch.library.opcheck(torch.ops.fastebm.langevin.default, arguments(**CASES[case]))


@pytest.mark.parametrize("v", [True, False])
def test_opcheck_of_normalised_weights(v):
    w = torch.randn(4, 3)
    u = torch.randn(4) if v else torch.rand(4, 1)
    torch.library.opcheck(torch.ops.fastebm.normalised_weight.default, (w, u, torch.randn(3) if v else None, 0))


def test_the_operator_leaves_its_inputs():
    args = arguments()
    before = copy.deepcopy(args)
    out = torch.ops.fastebm.langevin(*args)
    for old, new in zip(before, args, strict=True):
        if isinstance(old, torch.Tensor):
            same(old, new)
    assert out[0].data_ptr() != args[0].data_ptr()


def test_opcheck_of_gaussian_and_linear_terms():
    zero = torch.zeros(())
    gaussians = [torch.rand(()), torch.tensor(0.5), torch.tensor(2.0), torch.rand(()), torch.randn(3), torch.rand(3)]
    linears = [torch.rand(()), torch.randn(1, 3)]
    for arguments in [(gaussians, linears, [None]), (gaussians[:3], [], []), ([], linears, [torch.randn(1)])]:
        torch.library.opcheck(torch.ops.fastebm.quadratic.default, (*arguments, zero, 3))


def test_networks_round_trip():
    description = describe(every_term(), labels=True)
    mlps = description.mlps
    weights, biases = ([v for mlp in mlps for v in getattr(mlp, name)] for name in ("weights", "biases"))
    again = op._decode_networks(op.encode_networks(mlps), weights, biases)
    assert [(m.activations, m.head) for m in again] == [(m.activations, m.head) for m in mlps]
    for a, b in zip(again, mlps, strict=True):
        assert all(v is w for v, w in zip((*a.weights, *a.biases), (*b.weights, *b.biases), strict=True))


def test_rules_round_trip():
    step, low = torch.rand(4), -torch.rand(3)
    rule = op._decode_rule(*op.encode_rule(Langevin(step, 0.3, 0.5, (low, 1.0), 2)))
    assert rule.step_size is step
    assert rule.clamp == (low, 1.0)
    assert (rule.noise_scale, rule.grad_clip, rule.grad_norm_clip) == (0.3, 0.5, 2.0)
    assert (rule.noise_first, rule.clamp_noise) == (False, False)
    assert op._decode_rule(*op.encode_rule(Langevin())).clamp is None
    for order in ({"noise_first": True}, {"noise_first": True, "clamp_noise": True}):
        rule = op._decode_rule(*op.encode_rule(Langevin(**order)))
        assert {name: getattr(rule, name) for name in order} == order


def test_streams_agree_with_tensor_seeds():
    from fastebm.rng import normal

    chains = torch.arange(5)
    for seed in (3, -3, 2**40):
        same(
            normal(torch.tensor([seed]), Stream.LANGEVIN, chains, 2, 6),
            normal(seed, Stream.LANGEVIN, chains, 2, 6),
        )
