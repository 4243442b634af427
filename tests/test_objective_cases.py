"""What holds for every objective: parts of a batch add up, a saved one goes on, and processes can train with it."""

import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from objective_cases import DIM, LABELS, OBJECTIVES, ROWS, SHARED_POOLS
from torch.nn.parallel import DistributedDataParallel

from fastebm import ClassifierEnergy, Loss
from fastebm.energies.conditions import unwrapped

CASES = {**OBJECTIVES, **SHARED_POOLS}
TIMEOUT = 120  # seconds; a process that is left waiting fails the test


@pytest.fixture(params=OBJECTIVES.values(), ids=OBJECTIVES.keys())
def case(request, seeded):
    """How to make the objective, an energy, and a batch."""
    objective, energy = request.param
    return objective, energy(), torch.randn(ROWS, DIM)


def called(objective, energy, x, rows=slice(0, ROWS)):
    """The result for these rows of a batch, with labels for a classifier."""
    labels = LABELS[rows] if isinstance(unwrapped(energy), ClassifierEnergy) else None
    return objective(energy, x[rows], labels=labels, batch_size=len(x), first_row=rows.start)


def trained(objective, energy, x, rows=slice(0, ROWS)):
    """The loss of a call, its metrics, and the gradients of all weights, the objective's own among them."""
    energy.zero_grad()
    found = called(objective, energy, x, rows)
    assert isinstance(found, Loss)
    assert found.loss.shape == ()
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in found.metrics.values())
    found.loss.backward()
    gradients = {name.removeprefix("module."): p.grad.clone() for name, p in energy.named_parameters()}
    own = {f"own {name}": p.grad for name, p in objective.named_parameters()}
    return {"loss": found.loss.detach(), **found.metrics, **gradients, **own}


def test_parts_of_a_batch_add_up_to_the_whole(case):
    objective, energy, x = case
    whole = trained(objective(seed=3), energy, x)
    parts = [
        trained(objective(seed=3), energy, x, rows)
        for rows in (slice(0, 5), slice(5, 5), slice(5, ROWS))  # the second has no rows
    ]
    for name, value in whole.items():
        # sums of 12 float32 terms in another order
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=2e-5, atol=2e-6, msg=name)


def test_a_saved_objective_goes_on(case):
    objective, energy, x = case
    saved, resumed = objective(seed=3), objective(seed=4)
    first = called(saved, energy, x).loss
    resumed.load_state_dict(saved.state_dict())
    second = called(saved, energy, x).loss
    assert not torch.equal(first, second)
    assert torch.equal(called(resumed, energy, x).loss, second)


def test_the_callers_things_stay_as_they_were(case):
    objective, energy, x = case
    before, state = x.clone(), torch.get_rng_state()
    loss = called(objective(seed=3), energy, x).loss
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(p.grad is None for p in energy.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():  # to measure the loss on held-out rows
        assert torch.equal(called(objective(seed=3), energy, x).loss, loss)


def share(folder, rank):
    """Process ``rank`` of two: two calls of each objective, on its part of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    found, rows = {}, slice(0, 5) if rank == 0 else slice(5, ROWS)
    for name, (objective, energy) in CASES.items():
        torch.manual_seed(0)
        parallel, x = DistributedDataParallel(energy()), torch.randn(ROWS, DIM)
        for seed in (3, 4):  # DistributedDataParallel refuses the second unless the first gave all gradients
            found[name] = trained(objective(seed=seed), parallel, x, rows)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # destroying the group earlier would abort the other
    dist.destroy_process_group()


def test_processes_that_share_a_batch_get_the_gradients_of_the_whole(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True, timeout=TIMEOUT)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case, (objective, energy) in CASES.items():
        torch.manual_seed(0)
        model, x = energy(), torch.randn(ROWS, DIM)
        for name, value in trained(objective(seed=4), model, x).items():
            if name in dict(model.named_parameters()):
                assert torch.equal(first[case][name], second[case][name])
                found = 2 * first[case][name]  # DistributedDataParallel takes the mean over processes
            else:
                found = first[case][name] + second[case][name]
            torch.testing.assert_close(found, value, rtol=2e-5, atol=2e-6, msg=f"{case}: {name}")


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")  # torch is imported once
    running = [fork.Process(target=share, args=(sys.argv[1], rank), daemon=True) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.exit(any(process.exitcode for process in running))
