"""Learned colour corrections of images.

Shapes: B batch, C channels, H height, W width.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Initializer
from learnables.init.fixed import identity, zeros
from learnables.nn.component import Component, wide
from learnables.nn.resample import ResampleLattice


@final
class ColorMatrix(Component):
    """Every pixel times one learned matrix, plus a bias: y = x · M + b over the channels.

    One fused matrix product in the layout the images have, with no copy of them: a batched one for
    NCHW memory, a flat one for channels_last memory. A matrix product rather than a 1×1
    convolution, because cuDNN rounds the latter to TF32 by default and an identity would no longer
    return the image.

    Parameters:
        matrix (C, C): identity; row = channel in, column = channel out. Decays *toward the
            identity*, where every common rule would pull it toward 0, a black image.
        bias (C): zeros. No decay.

    Args:
        channels: C.

    Example:
        >>> import learnables as ln
        >>> image = torch.rand(1, 3, 4, 4)
        >>> torch.equal(ln.nn.ColorMatrix()(image), image)
        True

    Cost:
        On a CPU, a fifth to a half of permuting, multiplying and permuting back for images in NCHW
        memory, about as much for images in channels_last memory: benchmarks/color.py.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.matrix = parameter(
            channels,
            channels,
            init=identity(),
            weight_decay="init",
            role="projection",
            tags=("color",),
        )
        self.bias = parameter(channels, init=zeros(), weight_decay=False, tags=("color",))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W), in the dtype and memory format of ``x``.

        Raises:
            ShapeError: ``x`` has no four dimensions or another number of channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ShapeError(
                "a colour matrix takes images of as many channels as it has",
                found=f"input of shape {tuple(x.shape)}",
                wanted=f"(B, {self.channels}, H, W)",
            )
        matrix, bias = self.matrix.to(x.dtype), self.bias.to(x.dtype)
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C), a view
            y = torch.addmm(bias, pixels.reshape(-1, self.channels), matrix)
            return y.view(pixels.shape).permute(0, 3, 1, 2)
        by_channel = matrix.t().expand(x.shape[0], -1, -1)
        return torch.baddbmm(bias[:, None], by_channel, x.flatten(2)).view(x.shape)


@final
@dataclass(frozen=True, repr=False)
class identity_lattice(Initializer):  # noqa: N801 - named as the initialisers of ln.init
    """The colour table that gives back every colour: at (b, g, r) it holds r, g and b."""

    deterministic = True

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` of shape (3, S, S, S), indexed blue, green, red, in place."""
        for channel in range(3):
            axis = 2 - channel  # red runs fastest
            ramp = torch.linspace(0, 1, x.shape[1 + axis], dtype=x.dtype, device=x.device)
            x[channel] = ramp.view([-1 if i == axis else 1 for i in range(3)])

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """None: the values are not a sample of anything."""
        return None


@final
class ColorLUT(Component):
    """Every pixel looked up in one learned table of colours, trilinear between its entries.

    Colours lie in [0, 1]; those beyond are clipped. One gather for the whole batch, in fp32.
    A checkpoint of another lattice is resampled on load: trilinear, corners on corners.

    Parameters:
        table (3, S, S, S): identity. Indexed channel, blue, green, red, so that red runs fastest as
            in a .cube file. No decay; add `total_variation` and `monotonicity` to the loss, as the
            paper does, because most entries are met by few pixels.

    Args:
        size: S; 33 in the paper.

    Source:
        Zeng et al., *Learning Image-adaptive 3D Lookup Tables for High Performance Photo
        Enhancement in Real-time*, arXiv:2009.14468.

    Example:
        >>> import learnables as ln
        >>> image = torch.rand(2, 3, 4, 4)
        >>> torch.allclose(ln.nn.ColorLUT(9)(image), image, atol=1e-6)
        True
    """

    def __init__(self, size: int = 33) -> None:
        super().__init__()
        self.table = parameter(
            3,
            size,
            size,
            size,
            init=identity_lattice(),
            weight_decay=False,
            resize=ResampleLattice(),
            tags=("color",),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 3, H, W), in the dtype of ``x``.

        Raises:
            ShapeError: ``x`` is no batch of three-channel images.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ShapeError(
                "a colour table takes images of three channels",
                found=f"input of shape {tuple(x.shape)}",
                wanted="(B, 3, H, W)",
            )
        # The batch becomes the depth of one volume of pixels, so the table is not repeated.
        table = wide(self.table)
        pixels = x.to(table.dtype).permute(0, 2, 3, 1)[None] * 2 - 1  # (1, B, H, W, 3)
        colours = F.grid_sample(
            table[None], pixels, mode="bilinear", padding_mode="border", align_corners=True
        )
        return colours[0].movedim(0, 1).to(x.dtype)  # (3, B, H, W) → (B, 3, H, W)

    def total_variation(self) -> Tensor:
        """Mean squared difference of neighbouring entries, shape (1): how uneven the table is."""
        steps = [wide(self.table).diff(dim=dim).square().mean() for dim in (1, 2, 3)]
        return torch.stack(steps).sum(0, keepdim=True)

    def monotonicity(self) -> Tensor:
        """Mean size of backward steps, shape (1): 0 where more of a colour never gives less."""
        steps = [(-wide(self.table).diff(dim=dim)).relu().mean() for dim in (1, 2, 3)]
        return torch.stack(steps).sum(0, keepdim=True)
