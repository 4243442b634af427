"""Random views of images, for InfoNCE, as functions of the objective's random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from ..scalars import checked_integer, checked_number
from .base import Draws

__all__ = ["RandomAffine"]


class RandomAffine:
    """A random affine map of each image: it is turned, stretched, sheared and moved, each uniformly within a range.

        objective = InfoNCE(augment=RandomAffine((8, 8)))

    Pixels between others are interpolated; those from outside of the image are 0. torchvision and kornia have the same,
    with random numbers from PyTorch's global generator.

    Args:
        shape: of an image, (height, width) or (channels, height, width). States are flat, or of this shape.
        degrees: turned by up to this angle, either way. stretch: height and width change by up to this fraction.
        shear: a row moves by up to this fraction of its height above or below the centre. shift: in pixels.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        degrees: float = 15.0,
        stretch: float = 0.15,
        shear: float = 0.2,
        shift: float = 0.5,
    ) -> None:
        sizes = [checked_integer("shape", size, least=1) for size in shape]
        if len(sizes) not in (2, 3):
            raise ValueError(f"shape must be (height, width) or (channels, height, width), got {tuple(shape)}")
        self.channels, self.height, self.width = sizes if len(sizes) == 3 else [1, *sizes]
        self.angle = math.radians(checked_number("degrees", degrees, positive=False))
        self.stretch = checked_number("stretch", stretch, positive=False)
        self.shear = checked_number("shear", shear, positive=False)
        self.shift = checked_number("shift", shift, positive=False)

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """(n, *shape) or (n, dim) -> the same shape."""
        if len(batch) == 0:  # which affine_grid refuses
            return batch
        size = (len(batch), self.channels, self.height, self.width)
        angle, x, y, shear, right, down = (2.0 * draws.uniform(copies=6) - 1.0).unbind(1)
        cos, sin = torch.cos(self.angle * angle), torch.sin(self.angle * angle)
        x, y, shear = 1.0 + self.stretch * x, 1.0 + self.stretch * y, self.shear * shear
        # From a pixel of the view to its place in the image: turned (sheared (stretched)), in pixels from the centre.
        # affine_grid counts in half widths and half heights.
        aspect = self.height / self.width
        right, down = 2.0 * self.shift * right / self.width, 2.0 * self.shift * down / self.height
        maps = torch.stack(
            [
                torch.stack([x * cos, aspect * y * (shear * cos - sin), right], 1),
                torch.stack([x * sin / aspect, y * (shear * sin + cos), down], 1),
            ],
            1,
        )
        grid = affine_grid(maps, list(size), align_corners=False)
        return grid_sample(batch.reshape(size), grid, align_corners=False).reshape(batch.shape)
