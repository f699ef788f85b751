"""Carry a table from one size to another on load: the resize rules of the components, in fp32."""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from learnables.errors import ShapeError
from learnables.init.base import Init, initialise_

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
        source = self.source or _square_or_like(value.shape[1] - self.prefix, self.grid)
        if source is None or self.prefix + source[0] * source[1] != value.shape[1]:
            raise ShapeError(
                "the grid of a position table cannot be told from its number of rows",
                found=f"{value.shape[1]} rows, {self.prefix} of them prefix",
                wanted="a square grid, one of the model's aspect ratio, or source_grid=",
                mend="Positions2d(grid, dim, prefix=…, source_grid=(h, w))",
            )
        return resample_grid(value, source, self.grid, prefix=self.prefix)


@dataclass(frozen=True)
class ResampleLine:
    """The resize rule of a table with one row for each place of a line.

    Attributes:
        dim: Which dimension the places are.
        mode: ``"cubic"`` with anti-aliasing, or ``"linear"`` without, as MViT and SAM do.
    """

    dim: int = 1
    mode: Literal["cubic", "linear"] = "cubic"

    def __call__(self, value: Tensor, shape: torch.Size) -> Tensor:
        """``value`` with as many places as ``shape`` has."""
        _same_but(self.dim, value, shape)
        rows = value.movedim(self.dim, -1)
        flat = rows.reshape(1, -1, rows.shape[-1]).float()  # (1, everything else, places)
        if self.mode == "linear":
            flat = F.interpolate(flat, size=shape[self.dim], mode="linear")
        else:
            size = (shape[self.dim], 1)
            flat = F.interpolate(flat[..., None], size=size, mode="bicubic", antialias=True)
        resized = flat.reshape(*rows.shape[:-1], shape[self.dim]).movedim(-1, self.dim)
        return resized.to(value.dtype)


@dataclass(frozen=True)
class ResizeRows:
    """The resize rule of tokens without an order: leave out surplus ones, draw missing ones.

    Attributes:
        dim: Which dimension counts them.
        init: How missing ones are drawn; repeating old ones would give equal gradients for ever.
    """

    dim: int
    init: Init

    def __call__(self, value: Tensor, shape: torch.Size) -> Tensor:
        """``value`` with as many rows as ``shape`` has."""
        _same_but(self.dim, value, shape)
        rows = min(value.shape[self.dim], shape[self.dim])
        resized = initialise_(torch.empty(shape, dtype=value.dtype, device=value.device), self.init)
        with torch.no_grad():
            resized.narrow(self.dim, 0, rows).copy_(value.narrow(self.dim, 0, rows))
        return resized


@dataclass(frozen=True)
class ResampleOffsets:
    """The resize rule of a table with one row for each offset between two places of a window.

    Attributes:
        window: (h, w) of the model's own window.
        extra: Rows at the end that belong to no offset.
        signed: Whether −3 and 3 are two offsets (Swin) or one (LeViT).
        by_column: Whether offsets are the last dimension (LeViT) rather than the first (Swin).
    """

    window: Grid
    extra: int = 0
    signed: bool = True
    by_column: bool = False

    def __call__(self, value: Tensor, shape: torch.Size) -> Tensor:
        """``value`` on the offsets of this window: bicubic, anti-aliased, for each head.

        Raises:
            ShapeError: Another number of heads, or the source window cannot be told.
        """
        if self.by_column:
            flipped = ResampleOffsets(self.window, self.extra, self.signed)
            return flipped(value.t(), torch.Size(reversed(shape))).t().contiguous()
        _same_but(0, value, shape)
        target = self._offsets(self.window)
        rows = value.shape[0] - self.extra
        source = _square_or_like(rows, target)
        if source is None:
            raise ShapeError(
                "the window of a relative-bias table cannot be told from its number of rows",
                found=f"{value.shape[0]} rows, {self.extra} of them extra",
                wanted="a square window, or one of the model's aspect ratio",
            )
        # (1, extra + offsets, heads): the same job as a position table's, extra rows in front.
        table = torch.cat([value[rows:], value[:rows]])[None]
        resized = resample_grid(table, source, target, prefix=self.extra)[0]
        return torch.cat([resized[self.extra :], resized[: self.extra]])

    def _offsets(self, window: Grid) -> Grid:
        return (2 * window[0] - 1, 2 * window[1] - 1) if self.signed else window


@dataclass(frozen=True)
class ResampleLattice:
    """The resize rule of a colour table: trilinear, corners on corners, so identity stays so."""

    def __call__(self, value: Tensor, shape: torch.Size) -> Tensor:
        """``value`` (C, S, S, S) on the lattice of ``shape``.

        Raises:
            ShapeError: Another number of channels.
        """
        if value.ndim != 4 or value.shape[0] != shape[0]:
            raise ShapeError(
                "a colour table can change its lattice, not its channels",
                found=f"shape {tuple(value.shape)} in the checkpoint",
                wanted=f"({shape[0]}, any, any, any)",
            )
        lattice = F.interpolate(
            value[None].float(), size=tuple(shape[1:]), mode="trilinear", align_corners=True
        )
        return lattice[0].to(value.dtype)


def _square_or_like(rows: int, grid: Grid) -> Grid | None:
    """The grid of so many rows: square where the number allows, else of ``grid``'s aspect ratio."""
    if rows <= 0:
        return None
    side = isqrt(rows)
    if side * side == rows:
        return side, side
    for tall in range(1, rows + 1):
        wide = rows // tall
        if tall * wide == rows and tall * grid[1] == wide * grid[0]:
            return tall, wide
    return None


def _same_but(dim: int, value: Tensor, shape: torch.Size) -> None:
    """Refuse a table that differs from ``shape`` in more than one dimension.

    Raises:
        ShapeError: It does.
    """
    ours = [size for i, size in enumerate(shape) if i != dim]
    theirs = [size for i, size in enumerate(value.shape) if i != dim]
    if value.ndim != len(shape) or ours != theirs:
        wanted = ", ".join("any" if i == dim else str(size) for i, size in enumerate(shape))
        raise ShapeError(
            "a table can change one of its dimensions on load",
            found=f"shape {tuple(value.shape)} in the checkpoint",
            wanted=f"({wanted})",
        )
