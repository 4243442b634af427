"""A classifier as an energy (JEM, Grathwohl et al. 2020): train it as both, sample from a class, multiply experts.

python examples/classifier_as_energy.py
"""

import torch
from torch import nn

import fastebm
from fastebm import ClassifierEnergy, GaussianEnergy, SumEnergy

CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.5]])


def train(iterations: int) -> tuple[nn.Sequential, SumEnergy]:
    """Three blobs in the plane: log p(y | x) by cross-entropy, log p(x) by persistent contrastive divergence."""
    generator = torch.Generator().manual_seed(0)
    classifier = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3))
    # E(x) = -logsumexp f(x) + |x|^2 / 8, and with labels E(x, y) = -f(x)[y] + |x|^2 / 8: one MLP, one launch on a GPU
    energy = SumEnergy([ClassifierEnergy(classifier), GaussianEnergy(0.0, 2.0)])
    pool = fastebm.ChainPool(1_000, 2, clamp=(-3.0, 3.0), seed=0)
    sampler = fastebm.Langevin.ula(step_size=0.02)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    for _ in range(iterations):
        y = torch.randint(3, (250,), generator=generator)
        x = CENTRES[y] + 0.3 * torch.randn(250, 2, generator=generator)
        samples, _ = pool.sample(energy, 250, sampler, steps=20)
        loss = nn.functional.cross_entropy(classifier(x), y)
        loss = loss + fastebm.contrastive_divergence_loss(energy(x), energy(samples))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier, energy


def rounded(x: torch.Tensor) -> list[float]:
    return [round(v, 2) for v in x.tolist()]


def main(iterations: int = 400, steps: int = 500) -> list[float]:
    """Returns, for each class, the share of its samples that the classifier gives to it."""
    torch.manual_seed(0)
    classifier, energy = train(iterations)
    options = {"steps": steps, "step_size": 0.02, "noise_scale": 1.0, "clamp": (-3.0, 3.0), "batch_size": 500}
    shares = []
    for y in range(3):
        x = fastebm.langevin_sample(energy, 2, labels=torch.full((500,), y), seed=y, **options)
        shares.append((classifier(x).argmax(dim=1) == y).float().mean().item())
        print(
            f"p(x | y={y}): mean {rounded(x.mean(0))}, data {rounded(CENTRES[y])}; {shares[-1]:.0%} classified as {y}"
        )
    # A product of experts: the classifier's p(x), and x_0 near 1
    right = GaussianEnergy(torch.tensor([1.0, 0.0]), torch.tensor([0.2, 10.0]))
    x = fastebm.langevin_sample(SumEnergy([energy, right]), 2, seed=4, **options)
    print(f"p(x) and x_0 near 1: mean {rounded(x.mean(0))}")
    return shares


if __name__ == "__main__":
    main()
