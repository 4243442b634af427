"""An energy of pairs: two states are close if a network gives them similar features.

E(x, y) = -cos(f(x), f(y)) / temperature

Softmax over candidates y of -E(x, y) is the InfoNCE loss (van den Oord et al. 2018; Chen et al. 2020).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..scalars import checked_number
from .functions import EnergyLike, as_module

__all__ = ["PairEnergy"]


class PairEnergy(nn.Module):
    """E(x, y) = -cos(f(x), f(y)) / temperature. It lies in [-1 / temperature, 1 / temperature].

    Args:
        encoder: the network f, (batch, *shape) -> (batch, feature_size).
        temperature: > 0.
    """

    def __init__(self, encoder: EnergyLike, temperature: float = 0.1) -> None:
        super().__init__()
        self.encoder = as_module(encoder, "encoder")
        self.temperature = checked_number("temperature", temperature, positive=True)

    def features(self, x: Tensor) -> Tensor:
        """f(x) / |f(x)|: (batch, *shape) -> (batch, feature_size)."""
        features = self.encoder(x)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"an encoder must return features ({len(x)}, feature_size), got {got}: flatten them, as by .flatten(1)"
            )
        return nn.functional.normalize(features, dim=1)

    def forward(self, x: Tensor, condition: Tensor, all_pairs: bool = False) -> Tensor:
        """States and their partners y, both (batch, *shape) -> (batch,).

        all_pairs: every state with every partner: (batch, batch), a row per state.
        """
        if condition.shape != x.shape:
            raise ValueError(
                f"condition must have one partner of the states' shape {tuple(x.shape)} for each, got "
                f"{tuple(condition.shape)}"
            )
        f, g = self.features(x), self.features(condition)
        return -(f @ g.T if all_pairs else (f * g).sum(dim=1)) / self.temperature
