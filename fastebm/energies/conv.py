"""A convolutional energy: strided convolutions, then one linear head (Xie et al. 2016; Du & Mordatch 2019).

h_0 = x,   h_l = act(conv_l(h_{l-1}) + C_l c),   E(x) = <w, h_L> + b

with a condition c only if the energy is built for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from .activations import Activation
from .images import ImageEnergy

__all__ = ["ConvEnergy"]


class ConvEnergy(ImageEnergy):
    """E(x) of a small convolutional network: (batch, dim) or (batch, *shape) -> (batch, outputs).

    Each layer is a 3x3 convolution of stride 2, which halves height and width, and an activation. Full resolution is
    where convolutions are slow: with stride 1 in the first layer, a pass takes some four times as long. On a CPU,
    ``model.to(memory_format=torch.channels_last)`` saves about a tenth of the time, and a fifth with a ResNetEnergy.
    safetensors then asks for contiguous copies of the weights.

    Args:
        shape: of one state, (height, width) or (channels, height, width).
        channels: of each layer. The default suits 28x28 and 8x8.
        activation: as for ``MLPEnergy``. A smooth one, such as "silu" (Swish), gives a smooth gradient.
        spectral_norm: normalise every layer (Miyato et al. 2018).
        outputs: 1 for an energy, >= 2 for logits or features: ``ClassifierEnergy(ConvEnergy((28, 28), outputs=10))``.
        condition_size: numbers per state that forward takes as ``condition``; 0: it takes x only.

    Raises:
        TypeError, ValueError: a setting is wrong, or states have another shape.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int] = (32, 64, 128),
        activation: str | Activation = "silu",
        spectral_norm: bool = False,
        *,
        outputs: int = 1,
        condition_size: int = 0,
    ) -> None:
        super().__init__(shape, channels, activation, spectral_norm, outputs, condition_size)
        sizes = pairwise(((1, *self.shape)[-3], *self.channels))
        self.convs = nn.ModuleList(self.conv(n_in, n_out, stride=2) for n_in, n_out in sizes)
        self.shifts = nn.ModuleList(self.shift(n) for n in self.channels)
        height, width = (-(-size // 2 ** len(self.channels)) for size in self.shape[-2:])
        self.head = self.normed(nn.Linear(self.channels[-1] * height * width, self.outputs))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(batch, dim) or (batch, *shape), and (batch, condition_size) if built for one -> (batch, outputs)."""
        h = self.images(x)
        for conv, shift in zip(self.convs, self.shifts, strict=True):
            h = self.activation(shift(conv(h), condition))
        value: Tensor = self.head(h.flatten(1))
        return value
