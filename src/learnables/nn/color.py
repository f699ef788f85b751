"""Learned colour corrections of images.

Shapes: B batch, C channels, H height, W width.
"""

from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.fixed import identity, zeros
from learnables.nn.component import Component


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
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.matrix = parameter(
            channels, channels, init=identity(), weight_decay="init", role="projection"
        )
        self.bias = parameter(channels, init=zeros(), weight_decay=False)

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
