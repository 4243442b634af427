"""Measures of samples by the features of a small classifier that is trained on the spot on labelled data.

The usual measures of this kind (FID, inception score) take features of an Inception network trained on ImageNet. Here
a ``Judge`` is trained on the data set itself, in seconds: it suits small grey images and tables, and needs no download.
So the numbers compare samples of one data set by one judge, and are not those of other papers; their names say "judge".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from .rows import checked_pair

__all__ = ["Judge", "frechet_distance", "inception_score", "train_judge"]

# Rows at once when nothing is trained.
_AT_ONCE = 4096

_N_FEATURES = 64


class Judge(nn.Module):
    """A small classifier of states: two convolutions and a linear layer for images (h, w), else two linear layers.

    Args:
        shape: of one state. n_classes: >= 2.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Sequence[int], n_classes: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("std", torch.ones(()))
        if len(self.shape) == 2:
            height, width = (-(-size // 4) for size in self.shape)
            self.trunk = nn.Sequential(
                nn.Unflatten(1, (1, self.shape[0])),
                nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.SiLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU(),
                nn.Flatten(), nn.Linear(32 * height * width, _N_FEATURES), nn.SiLU(),
            )  # fmt: skip
        else:
            dim = int(np.prod(self.shape))
            self.trunk = nn.Sequential(
                nn.Flatten(), nn.Linear(dim, 128), nn.SiLU(), nn.Linear(128, _N_FEATURES), nn.SiLU()
            )
        self.head = nn.Linear(_N_FEATURES, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, *shape) or (n, dim) -> logits (n, n_classes)."""
        x = (x.reshape(len(x), *self.shape) - self.mean) / self.std
        logits: Tensor = self.head(self.trunk(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """(n, *shape) or (n, dim) -> (n, 64) on the CPU: the values before the last layer."""
        return self._in_parts(x, lambda part: self.trunk((part - self.mean) / self.std))

    def probabilities(self, x: Tensor) -> Tensor:
        """(n, *shape) or (n, dim) -> (n, n_classes) on the CPU."""
        return self._in_parts(x, lambda part: self(part).softmax(1))

    def accuracy(self, samples: Tensor, labels: Tensor) -> float:
        """The share of samples that the judge takes for their own class, such as those drawn with ``labels=``."""
        if labels.shape != (len(samples),):
            raise ValueError(f"labels must be ({len(samples)},), one per sample, got {tuple(labels.shape)}")
        return float((self.probabilities(samples).argmax(1) == labels.cpu()).double().mean())

    def _in_parts(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        if x.ndim < 2 or len(x) == 0 or x[0].numel() != self.mean.numel():
            raise ValueError(f"this judge takes states (n, *{self.shape}) or flat, n >= 1, got {tuple(x.shape)}")
        x = x.detach().reshape(len(x), *self.shape).to(self.mean)
        with torch.no_grad():
            return torch.cat([function(part).cpu() for part in torch.split(x, _AT_ONCE)])


def train_judge(
    states: Tensor,
    labels: Tensor,
    shape: Sequence[int] | None = None,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    on_epoch: Callable[[int, int], None] = lambda done, total: None,
) -> Judge:
    """Train a ``Judge`` with Adam and a learning rate that falls to 0; the same bits for the same seed and threads.

    Args:
        states: (n, *shape) or (n, dim), labelled training rows; on their device the judge is trained. Rows are centred
            and divided by their overall standard deviation inside the judge.
        labels: (n,) int64, 0 .. n_classes - 1, at least two classes.
        shape: of one state, if states are flat. (h, w) for images.
        on_epoch: called before each epoch with the number of those done and their total.
    """
    n = len(states)
    shape = tuple(states.shape[1:]) if shape is None else tuple(shape)
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"labels must be integers ({n},), one per row, got {tuple(labels.shape)} {labels.dtype}")
    if n < 2 or int(labels.min()) < 0 or int(labels.max()) < 1:
        raise ValueError(
            f"a judge needs rows of at least two classes 0, 1, ..., got {n} rows of {set(labels.tolist())}"
        )
    if int(np.prod(shape)) != states[0].numel():
        raise ValueError(f"states of {states[0].numel()} numbers do not have the shape {shape}")
    x, y = states.detach().float().reshape(n, *shape), labels.to(states.device)
    if not bool(x.isfinite().all()):
        raise ValueError("a judge needs finite states to train on, and some are not")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        judge = Judge(shape, int(labels.max()) + 1).to(x.device)
        judge.mean.copy_(x.mean(0))
        judge.std.copy_((x - judge.mean).std().clamp_min(1e-6))
        optimizer = torch.optim.Adam(judge.parameters(), lr=learning_rate)
        steps = epochs * -(-n // batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for epoch in range(epochs):
            on_epoch(epoch, epochs)
            for rows in torch.split(torch.randperm(n).to(x.device), batch_size):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(judge(x[rows]), y[rows]))
                optimizer.step()
                schedule.step()
    return judge.requires_grad_(False)


def frechet_distance(real_features: ArrayLike, fake_features: ArrayLike) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets (Heusel et al. 2017), in float64:

        |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))

    It is biased upwards, the more so the fewer rows: compare only numbers with as many rows of both.

    Args:
        real_features, fake_features: (n_real, d) and (n_fake, d), at least 2 rows each; of a ``Judge``, for example.
    """
    real, fake = checked_pair("frechet_distance", real_features, fake_features, least=2)
    means = [x.mean(0) for x in (real, fake)]
    # S = R^T R, so tr (S S')^(1/2) is the sum of the singular values of R R'^T.
    roots = [np.linalg.qr(x - x.mean(0))[1] / math.sqrt(len(x) - 1) for x in (real, fake)]
    traces = sum(np.square(root).sum() for root in roots)
    distance = np.square(means[0] - means[1]).sum() + traces - 2 * np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    return max(0.0, float(distance))


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean over samples x of KL(p(y | x) || p(y)), where p(y) is the mean of p(y | x).

    From 1 to the number of classes. It is high if each sample has a clear class and all classes are there; it does not
    see whether samples of one class differ. Source: Salimans et al. 2016, there of the Inception network.

    Args:
        probabilities: (n, n_classes) of a classifier for samples: ``Judge.probabilities``.
    """
    p = probabilities.detach().double()
    if p.ndim != 2 or len(p) == 0 or not bool(((p >= 0) & ((p.sum(1, keepdim=True) - 1).abs() < 1e-3)).all()):
        raise ValueError(f"probabilities must be (n, n_classes) with rows that sum to 1, got shape {tuple(p.shape)}")
    entropies = torch.special.entr(p).sum(1)
    return float((torch.special.entr(p.mean(0)).sum() - entropies.mean()).exp())
