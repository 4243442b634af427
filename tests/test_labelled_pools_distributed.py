"""Objectives with labels and a pool that two real processes share: losses and gradients add up to those of one."""

import multiprocessing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastebm import JEM, ChainPool, ClassifierEnergy, ContrastiveDivergence, Langevin

N, DIM, TIMEOUT = 10, 2, 120
SAMPLER = Langevin(0.1)


def cases(group):
    """Name -> energy and objective. Pools are shared, and have as many chains of each label as a batch may ask for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)

        def network():
            return nn.Sequential(nn.Linear(DIM, 4), nn.SiLU(), nn.Linear(4, 3)).double()

        def pool():
            return ChainPool(3 * N, DIM, labels=torch.arange(3 * N) % 3, seed=1, process_group=group)

        cd = ContrastiveDivergence(SAMPLER, 2, pool=pool(), gradient_penalty=0.1)
        return {
            "cd": (ClassifierEnergy(network()), cd),
            "jem": (ClassifierEnergy(network()), JEM(SAMPLER, 2, pool=pool())),
        }


def results(group=None, rank=0, size=1):
    """Loss, metrics, and gradients of all weights, of this process' part of the batch."""
    x = torch.linspace(-1, 1, N * DIM, dtype=torch.float64).reshape(N, DIM)
    labels, first, end = torch.arange(N) % 3, rank * N * 2 // 5, N if rank == size - 1 else N * 2 // 5
    found = {}
    for name, (energy, objective) in cases(group).items():
        wrapped = energy if group is None else nn.parallel.DistributedDataParallel(energy, process_group=group)
        loss, metrics, _ = objective(wrapped, x[first:end], labels=labels[first:end], batch_size=N, first_row=first)
        loss.backward()
        gradients = [p.grad.clone() for p in energy.parameters()]
        found[name] = loss.item(), {k: float(v) for k, v in metrics.items()}, gradients
    return found


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    torch.save(results(dist.group.WORLD, rank, 2), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_add_up_to_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0, 0]
    parts = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for name, (loss, metrics, gradients) in results().items():
        found = [part[name] for part in parts]
        assert sum(part[0] for part in found) == pytest.approx(loss, rel=1e-6), name
        for metric, value in metrics.items():
            assert sum(part[1][metric] for part in found) == pytest.approx(value, rel=1e-6), (name, metric)
        for first, second, gradient in zip(*(part[2] for part in found), gradients, strict=True):
            assert torch.equal(first, second), name  # the wrapper has averaged them
            assert torch.allclose(2 * first, gradient, rtol=1e-5, atol=1e-8), name
