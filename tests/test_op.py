"""The operator that langevin_sample calls inside torch.compile."""

import copy

import pytest
import runs
import torch
from compiled_calls import LABELS, every_term, same

from fastebm import Activation, Langevin, MLPEnergy
from fastebm.rng import Stream

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def plain_mlp():
    return MLPEnergy(3, (8, 4), Activation("leaky_relu", 0.2))


CASES = {
    "plain": {},
    "uniform start": {"x": False, "sampler": Langevin(0.1, 0.3, 0.5, (-1.0, 1.0))},
    "one value per chain": {"sampler": Langevin(torch.rand(5, 1) + 0.1, torch.rand(4)), "on_nonfinite": "reinit"},
    "gradients": {"on_nonfinite": "ignore", "grads": True},
    "frozen": {"frozen": torch.tensor([[True, False, True]]), "on_nonfinite": "reinit", "telemetry": True},
    "bounds": {"sampler": Langevin(0.1, 0.3, None, (-torch.rand(3), 1.0), 0.5), "thin": 2, "telemetry": True},
    "sum": {"energy": every_term(), "thin": 1},
    "labels": {"energy": every_term(), "labels": LABELS},
    "kernel": {"path": "resident", "precision": "bf16x3", "telemetry": True, "thin": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    if case == "kernel":
        pytest.importorskip("triton")
    torch.library.opcheck(
        torch.ops.fastebm.langevin.default, runs.operator_arguments(**{"energy": plain_mlp(), **CASES[case]})
    )


@pytest.mark.parametrize("v", [True, False])
def test_opcheck_of_normalised_weights(v):
    w = torch.randn(4, 3)
    u = torch.randn(4) if v else torch.rand(4, 1)
    torch.library.opcheck(torch.ops.fastebm.normalised_weight.default, (w, u, torch.randn(3) if v else None, 0))


def test_the_operator_leaves_its_inputs():
    args = runs.operator_arguments(plain_mlp())
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


def test_streams_agree_with_tensor_seeds():
    from fastebm.rng import normal

    chains = torch.arange(5)
    for seed in (3, -3, 2**40):
        same(
            normal(torch.tensor([seed]), Stream.LANGEVIN, chains, 2, 6),
            normal(seed, Stream.LANGEVIN, chains, 2, 6),
        )
