"""Complete the lower half of held-out digits with a trained energy: frozen coordinates, a trajectory, a picture.

fastebm train digits --out runs/digits
python examples/inpainting.py runs/digits      # writes inpainting.png into that folder
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fastebm
from fastebm.data.images import load_digits
from fastebm.train.folder import load_model
from fastebm.train.samplers import build_sampler


def main(run: str) -> Path:
    energy, config = load_model(run)
    digits = load_digits()
    real = digits.test[:8] / digits.info.levels  # (8, 64) in [0, 1]
    given = torch.zeros(8, 8, dtype=torch.bool)
    given[:4] = True  # the upper half stays as it is

    start = torch.where(given.flatten(), real, torch.rand_like(real))
    steps = 200
    sampler = build_sampler(config, steps)  # as in training
    trajectory = fastebm.langevin_sample(
        energy, init=start, frozen=given.flatten(), steps=steps, step_size=sampler.step_size,
        noise_scale=sampler.noise_scale, clamp=sampler.clamp, seed=0, return_trajectory=True, thin=steps // 4,
    )  # fmt: skip

    rows = {"original": real, "start: lower\nhalf is noise": start}
    for quarter, states in enumerate(trajectory.unbind(dim=1), 1):  # trajectory: (8, 4, 64)
        rows[f"after {quarter * steps // 4}\nsteps"] = states
    figure, axes = plt.subplots(len(rows), 8, figsize=(8, 6.4), layout="constrained")
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(row, images, strict=True):
            ax.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
    figure.suptitle("Lower halves of held-out digits, sampled while the upper halves are kept")
    path = Path(run) / "inpainting.png"
    figure.savefig(path)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/inpainting.py RUN, a run folder of fastebm train digits")
    print(main(sys.argv[1]))
