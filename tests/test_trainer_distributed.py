"""A trainer on two processes: both start alike, and their gradients, of any dtype, add up to those of one."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastebm import (
    DenoisingScoreMatching,
    GaussianNoise,
    Loss,
    MLPEnergy,
    NoiseContrastiveEstimation,
    Objective,
    Trainer,
)


class Parts(nn.Module):
    """E(x) = |first x|^2 + |both x|^2, and a weight of no use."""

    def __init__(self):
        super().__init__()
        self.first, self.both, self.unused = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def forward(self, x):
        return (self.both * x).square().sum(1)


class OfParts(Objective):
    """Row 0 alone has a gradient of ``first``."""

    def forward(self, energy, batch, *, labels=None, batch_size=None, first_row=0):
        loss = energy(batch).sum()
        if first_row == 0:
            loss = loss + (energy.first * batch[0]).square().sum()
        return Loss(loss / (batch_size or len(batch)), {})


def start(case, rank=0, group=None):
    """What differs between the processes before the trainer has made it equal: seeds, weights, buffers."""
    torch.manual_seed(rank)
    if case == "seed":
        return Trainer(MLPEnergy(2, [4]), DenoisingScoreMatching(0.3), steps=4, process_group=group)
    if case == "parts":
        return Trainer(Parts(), OfParts(seed=rank), steps=4, process_group=group)
    energy = MLPEnergy(2, [4]).double()
    noise = GaussianNoise.fit(torch.randn(50, 2))
    return Trainer(energy, NoiseContrastiveEstimation(noise, seed=rank), steps=4, process_group=group)


def trained(trainer):
    before = {k: v.clone() for k, v in trainer.objective.state_dict().items()}
    dtype = next(trainer.energy.parameters()).dtype
    rows = [trainer.step(torch.linspace(-1, t + 1, 10, dtype=dtype).reshape(5, 2)) for t in range(3)]
    return {"before": before, "losses": [row["loss"] for row in rows], "state": trainer.state_dict()}


CASES = ("seed", "parts", "double")


def play(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for case in CASES:
        torch.save(trained(start(case, rank, dist.group.WORLD)), folder / f"{case} {rank}.pt")
    wrapped = nn.parallel.DistributedDataParallel(Parts(), init_sync=False)
    with pytest.raises(ValueError, match="not in DistributedDataParallel"):
        Trainer(wrapped, OfParts(), steps=1, process_group=dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("played")
    torch.multiprocessing.spawn(play, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(played, case):
    first, second = (torch.load(played / f"{case} {rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, trained(start(case)), rtol=1e-4, atol=1e-6)


def test_a_weight_that_no_process_uses_stays_out_of_the_optimizer(played):
    moments = torch.load(played / "parts 1.pt")["state"]["moments"]
    assert {name.partition(".")[0] for name in moments} == {"first", "both"}
