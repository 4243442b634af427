"""A residual network as an energy (He et al. 2016; as an energy: Du & Mordatch 2019, Grathwohl et al. 2020).

h_0 = conv(x),   h_l = skip(h_{l-1}) + conv(act(norm(conv(act(norm(h_{l-1}))) + C_l c))),
E(x) = <w, sum over pixels of act(norm(h_L))> + b

norm is group normalisation (Wu & He 2018) or nothing. skip is the average of 2x2 pixels where the block halves the
image, and a 1x1 convolution where the number of channels changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..scalars import checked_integer
from .activations import Activation
from .images import ImageEnergy

__all__ = ["ResNetEnergy"]


class ResNetEnergy(ImageEnergy):
    """E(x) of a residual network: (batch, dim) or (batch, *shape) -> (batch, outputs).

    Args:
        shape: of one state, (height, width) or (channels, height, width).
        channels: of each block.
        activation: as for ``MLPEnergy``.
        spectral_norm: normalise every convolution and the head (Miyato et al. 2018).
        groups: groups of channels that are normalised (Wu & He 2018); each number of channels is a multiple of it.
            None: no normalisation.
        downsample: halve height and width in the first convolution, and in each block but the first. If False, all
            blocks work at full resolution, at many times the cost.
        outputs: 1 for an energy, >= 2 for logits or features: ``ClassifierEnergy(ResNetEnergy((28, 28), outputs=10))``.
        condition_size: numbers per state that forward takes as ``condition``; 0: it takes x only.

    Raises:
        TypeError, ValueError: a setting is wrong, or states have another shape.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int] = (32, 64, 64),
        activation: str | Activation = "silu",
        spectral_norm: bool = False,
        *,
        groups: int | None = None,
        downsample: bool = True,
        outputs: int = 1,
        condition_size: int = 0,
    ) -> None:
        super().__init__(shape, channels, activation, spectral_norm, outputs, condition_size)
        if not isinstance(downsample, bool):
            raise TypeError(f"downsample must be True or False, got {downsample!r}")
        if groups is not None:
            groups = checked_integer("groups", groups, least=1)
            if wrong := [n for n in self.channels if n % groups != 0]:
                raise ValueError(
                    f"groups must divide the channels {self.channels}, got {groups}, and {wrong[0]} is one"
                )
        first = self.channels[0]
        self.stem = self.conv((1, *self.shape)[-3], first, stride=2 if downsample else 1)
        sizes = pairwise((first, *self.channels))
        self.blocks = nn.ModuleList(
            _Block(self, n_in, n_out, groups, downsample and i > 0) for i, (n_in, n_out) in enumerate(sizes)
        )
        self.norm = _norm(groups, self.channels[-1])
        self.head = self.normed(nn.Linear(self.channels[-1], self.outputs))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(batch, dim) or (batch, *shape), and (batch, condition_size) if built for one -> (batch, outputs)."""
        h = self.stem(self.images(x))
        for block in self.blocks:
            h = block(h, condition)
        value: Tensor = self.head(self.activation(self.norm(h)).sum(dim=(2, 3)))
        return value


class _Block(nn.Module):
    """A residual block with the settings of ``energy``. halve: the first convolution has stride 2."""

    def __init__(self, energy: ResNetEnergy, n_in: int, n_out: int, groups: int | None, halve: bool) -> None:
        super().__init__()
        self.first_norm, self.second_norm = _norm(groups, n_in), _norm(groups, n_out)
        self.first = energy.conv(n_in, n_out, stride=2 if halve else 1)
        self.second = energy.conv(n_out, n_out)
        self.activation, self.shift = energy.activation, energy.shift(n_out)
        self.skip = nn.Sequential()
        if halve:
            self.skip.append(nn.AvgPool2d(2, ceil_mode=True))
        if n_in != n_out:
            self.skip.append(energy.conv(n_in, n_out, kernel_size=1))

    def forward(self, h: Tensor, condition: Tensor | None) -> Tensor:
        inner = self.shift(self.first(self.activation(self.first_norm(h))), condition)
        outer: Tensor = self.skip(h) + self.second(self.activation(self.second_norm(inner)))
        return outer


def _norm(groups: int | None, channels: int) -> nn.Module:
    return nn.Identity() if groups is None else nn.GroupNorm(groups, channels)
