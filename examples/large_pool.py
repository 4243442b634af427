"""A pool of many chains in a file: 8 bits per coordinate, moved in chunks, inspected, saved and resumed.

python examples/large_pool.py          # 200,000 chains of 64 dims: 13 MB of states
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fastebm


def main(n_chains: int = 200_000) -> fastebm.PoolStats:
    torch.manual_seed(0)
    energy = fastebm.build(64, hidden_sizes=(128, 128))
    sampler = fastebm.Langevin.ula(step_size=0.02)
    arguments = {"clamp": (-1.0, 1.0), "seed": 0, "storage_dtype": torch.uint8}
    with tempfile.TemporaryDirectory() as folder:
        pool = fastebm.ChainPool(n_chains, 64, storage_file=Path(folder) / "states", **arguments)
        pool.advance(energy, sampler, steps=5)  # all chains; shows a progress bar on a terminal
        for _ in range(10):
            pool.sample(energy, 256, sampler, steps=20)  # a training step's draw

        stats = pool.stats()
        print(f"{stats.n_chains:,} chains, {stats.draws} draws, {stats.reinits} reinits")
        print("energies, by quantile:", {q: round(e, 3) for q, e in stats.energy.items()})

        # The state is tensors and plain numbers, so any format can hold it. A resumed pool continues bit for bit.
        state = pool.state_dict()
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        save_file(tensors, Path(folder) / "pool.safetensors")
        other = fastebm.ChainPool(n_chains, 64, **arguments)
        other.load_state_dict({**state, **load_file(Path(folder) / "pool.safetensors")})
        for p in (pool, other):
            p.sample(energy, 256, sampler, steps=20)
        print("resumed alike:", torch.equal(pool.states, other.states))
    return stats


if __name__ == "__main__":
    main()
