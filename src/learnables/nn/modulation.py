"""Learned offsets for what a condition does to each block.

Shapes: B batch, D dim, n pieces.
"""

from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.random import normal
from learnables.nn.component import Component


@final
class AdaLNTable(Component):
    """A block's own learned shift of the modulation that all blocks share.

    One projection of the condition serves all blocks; each adds its table and cuts the sum into
    pieces (shift, scale, gate; once for attention, once for the MLP).

    Parameters:
        table (n, D): normal with std 1/√D. No decay.

    Args:
        dim: D.
        num_pieces: n; 6 in a block, 2 in the last layer.
        init: Another initialiser.

    Source:
        Chen et al., *PixArt-α* (its adaLN-single), arXiv:2310.00426.

    Example:
        >>> import learnables as ln
        >>> shift, scale, *rest = ln.nn.AdaLNTable(8)(torch.zeros(2, 48))
        >>> shift.shape, len(rest)
        (torch.Size([2, 1, 8]), 4)
    """

    def __init__(self, dim: int, num_pieces: int = 6, *, init: Init | None = None) -> None:
        super().__init__()
        self.table = parameter(
            num_pieces, dim, init=init or normal(dim**-0.5), weight_decay=False, tags=("scale",)
        )

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, n · D) or (B, n, D) → n pieces (B, 1, D), in the dtype of ``condition``.

        Raises:
            ShapeError: ``condition`` has another size.
        """
        pieces, dim = self.table.shape
        if condition[0].numel() != pieces * dim:
            raise ShapeError(
                "the condition does not fill the modulation table",
                found=f"condition of shape {tuple(condition.shape)}",
                wanted=f"(B, {pieces * dim}) or (B, {pieces}, {dim})",
            )
        shifted = condition.reshape(-1, pieces, dim) + self.table.to(condition.dtype)
        return torch.split(shifted, 1, dim=1)
