"""Carry a table of positions from one grid to another, in fp32."""

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from learnables.errors import ShapeError

Grid = tuple[int, int]


def resample_grid(table: Tensor, source: Grid, target: Grid, *, prefix: int = 0) -> Tensor:
    """The table that a grid of another size would have: bicubic, anti-aliased, in fp32.

    The first ``prefix`` rows, which belong to class and register tokens, are kept as they are.

    Args:
        table: Shape ``(1, prefix + h · w, D)``, rows of the grid one after another.
        source: (h, w) of ``table``.
        target: (h, w) wanted.
        prefix: Number of rows without a place in the grid.

    Returns:
        Shape ``(1, prefix + h · w, D)`` of the target, in the dtype of ``table``.

    Example:
        >>> resample_grid(torch.ones(1, 1 + 9, 4), (3, 3), (2, 5), prefix=1).shape
        torch.Size([1, 11, 4])
    """
    if source == target:
        return table
    kept, grid = table[:, :prefix], table[:, prefix:]
    image = grid.float().reshape(1, *source, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    image = F.interpolate(image, size=target, mode="bicubic", antialias=True)
    rows = image.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], -1)
    return torch.cat([kept, rows.to(table.dtype)], dim=1)


@dataclass(frozen=True)
class ResampleGrid:
    """The resize rule of a 2-D position table, for ``ln.parameter(resize=)``.

    Attributes:
        grid: (h, w) of the model's own table.
        prefix: Rows in front that belong to no place.
        source: (h, w) of what is loaded, where it can neither be read off nor is square.
    """

    grid: Grid
    prefix: int = 0
    source: Grid | None = None

    def __call__(self, value: Tensor, shape: torch.Size) -> Tensor:
        """``value`` on this grid.

        Raises:
            ShapeError: The width is another, or the source grid cannot be told from the number of
                rows.
        """
        if value.ndim != 3 or value.shape[0] != 1 or value.shape[2] != shape[2]:
            raise ShapeError(
                "a position table can change its grid, not its width",
                found=f"shape {tuple(value.shape)} in the checkpoint",
                wanted=f"(1, any, {shape[2]})",
            )
        source = self.source or self._guess(value.shape[1] - self.prefix)
        if source is None or self.prefix + source[0] * source[1] != value.shape[1]:
            raise ShapeError(
                "the grid of a position table cannot be told from its number of rows",
                found=f"{value.shape[1]} rows, {self.prefix} of them prefix",
                wanted="a square grid, one of the model's aspect ratio, or source_grid=",
                mend="Positions2d(grid, dim, prefix=…, source_grid=(h, w))",
            )
        return resample_grid(value, source, self.grid, prefix=self.prefix)

    def _guess(self, rows: int) -> Grid | None:
        """Square where the number allows, else the aspect ratio of the model's own grid."""
        if rows <= 0:
            return None
        side = isqrt(rows)
        if side * side == rows:
            return side, side
        height, width = self.grid
        tall = isqrt(rows * height // width)
        if tall and tall * width == (rows // tall) * height and rows % tall == 0:
            return tall, rows // tall
        return None
