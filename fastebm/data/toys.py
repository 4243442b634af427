"""Toy distributions in the plane: each function draws n points, (n, 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TOYS"]


def _moons(n: int, rng: np.random.Generator) -> NDArray[Any]:
    from sklearn.datasets import make_moons

    return np.asarray(make_moons(n, noise=0.08, random_state=int(rng.integers(2**31)))[0])


def _circles(n: int, rng: np.random.Generator) -> NDArray[Any]:
    from sklearn.datasets import make_circles

    return np.asarray(make_circles(n, noise=0.05, factor=0.5, random_state=int(rng.integers(2**31)))[0])


def _rings(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Four rings of radius 1 .. 4, equally many points on each."""
    angle, radius = rng.uniform(0.0, 2.0 * np.pi, n), rng.integers(1, 5, n)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None] + rng.normal(0.0, 0.1, (n, 2))


def _checkerboard(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """The eight black squares of a board of four by four, on [-2, 2]^2."""
    x, y = rng.uniform(-2.0, 2.0, n), rng.uniform(0.0, 1.0, n)
    return np.stack([x, y - 2.0 * rng.integers(0, 2, n) + np.floor(x) % 2], 1)


def _gaussians(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Eight Gaussians on a circle of radius 4, equally likely, of standard deviation 0.5."""
    angle = 2.0 * np.pi / 8.0 * rng.integers(0, 8, n)
    return 4.0 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0.0, 0.5, (n, 2))


def _pinwheel(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Five bent arms. Source: Johnson et al. 2016, Composing graphical models with neural networks."""
    x = rng.normal((1.0, 0.0), (0.3, 0.1), (n, 2))
    angle = 2.0 * np.pi / 5.0 * rng.integers(0, 5, n) + 0.25 * np.exp(x[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([x[:, 0] * cos + x[:, 1] * sin, x[:, 1] * cos - x[:, 0] * sin], 1)


TOYS: dict[str, tuple[str, Callable[[int, np.random.Generator], NDArray[Any]]]] = {
    "moons": ("two half circles", _moons),
    "circles": ("a circle in a circle", _circles),
    "rings": ("four rings", _rings),
    "checkerboard": ("eight squares", _checkerboard),
    "gaussians": ("eight Gaussians on a circle", _gaussians),
    "pinwheel": ("five bent arms", _pinwheel),
}
